"""The corpus (Python's own reference, as shipped with `pydoc`) and a tokenizer for it."""

from __future__ import annotations

from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 2048
HELD_OUT = 0.05
"""Share of the text, its end, that training never sees."""

END = "<|end|>"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokens of the reference, and the tokenizer that made them."""

    tokenizer: Any
    train: torch.Tensor
    """`[T]` int64."""
    held_out: torch.Tensor
    """`[T]` int64."""


def load_corpus() -> Corpus:
    """Train the tokenizer and cut the text into a training and a held-out part."""
    text = reference_text()
    border = int(len(text) * (1 - HELD_OUT))
    tokenizer = train_tokenizer(text[:border])
    train, held_out = (
        torch.tensor(tokenizer.encode(part)) for part in (text[:border], text[border:])
    )
    return Corpus(tokenizer=tokenizer, train=train, held_out=held_out)


def reference_text() -> str:
    """All help topics; of paragraphs that several topics share, the first."""
    paragraphs = "\n\n".join(topics.values()).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs))


def train_tokenizer(text: str) -> Any:
    """A byte-level BPE tokenizer with `VOCAB_SIZE` tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)
