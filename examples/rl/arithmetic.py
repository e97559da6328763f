"""The task: sums of two numbers, one character per token, checked exactly."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHARACTERS = "0123456789+="
END = "<|end|>"
MAX_ANSWER = 4
"""Tokens of the longest answer to a sum of two digits: three digits and `END`."""


@dataclass(frozen=True)
class Sum:
    """`left` + `right`."""

    left: int
    right: int

    @property
    def prompt(self) -> str:
        """What the model sees."""
        return f"{self.left}+{self.right}="

    @property
    def answer(self) -> str:
        """What it should say before it ends."""
        return str(self.left + self.right)

    def reward(self, completion: Any) -> float:
        """1 for the right sum, and nothing after it, in a `vllm.CompletionOutput`; else 0."""
        ended = completion.finish_reason == "stop"
        return float(ended and completion.text == self.answer)

    def likeness(self, completion: Any) -> float:
        """The share of places where a `vllm.CompletionOutput` has the answer's character."""
        return likeness(completion.text, self.answer)


def likeness(made: str, answer: str) -> float:
    """The share of places where `made` has the character of `answer`."""
    return sum(a == b for a, b in zip(made, answer, strict=False)) / max(len(made), len(answer))


def draw(generator: random.Random, count: int, digits: int) -> list[Sum]:
    """`count` random problems with numbers of `digits` digits."""
    low, high = 10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1
    return [Sum(generator.randint(low, high), generator.randint(low, high)) for _ in range(count)]


def build_tokenizer() -> Any:
    """One token per character, and `END`, which ends a completion."""
    vocab = {token: index for index, token in enumerate([END, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
