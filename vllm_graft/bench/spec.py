"""What is measured (the workload) and who is measured (the contenders)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

GRAFT = "graft"
PEERS: dict[str, dict[str, Any]] = {
    "vllm": {"model_impl": "vllm"},
    "transformers": {"model_impl": "transformers"},
}
"""Peers, and what makes vLLM build them: its own model class, or its Transformers backend."""
VARIANTS: dict[str, dict[str, Any]] = {
    GRAFT: {"additional_config": {"vllm_graft_packing": "release"}},
    "graft-fast": {
        "additional_config": {"vllm_graft_packing": "release", "vllm_graft_exact": False}
    },
    "graft-training": {"additional_config": {"vllm_graft_packing": "keep"}},
    "graft-unpacked": {"additional_config": {"vllm_graft_packing": "off"}},
}
"""The same Graft model with other options of `vllm.LLM`: serving, without exactness, as
`TrainableLLM` holds it, and that without packed copies."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One round: `batch_size` random prompts, greedy, end of sequence ignored."""

    batch_size: int = 8
    prompt_len: int = 64
    output_len: int = 32
    rounds: int = 5

    def __post_init__(self) -> None:
        for name in ("batch_size", "prompt_len", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.output_len < 2:
            raise ValueError(
                f"output_len={self.output_len}; decode is measured from the second token on, "
                "so at least 2"
            )

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens of one round."""
        return self.batch_size * self.prompt_len

    @property
    def decode_tokens(self) -> int:
        """Tokens of one round that decode steps make; prefill makes the first of each sequence."""
        return self.batch_size * (self.output_len - 1)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One engine: arguments of `vllm.LLM`, in an environment of its own."""

    name: str
    llm: dict[str, Any]
    env: dict[str, str] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Round:
    """Seconds of one round, and the first token of every sequence."""

    prefill_s: float
    total_s: float
    first_tokens: tuple[int, ...]
    other_load: float = 0.0
    """Part of the machine that other processes used meanwhile, 0 to 1."""

    def prefill_rate(self, workload: Workload) -> float:
        """Prompt tokens per second, up to the first new token."""
        return workload.prefill_tokens / self.prefill_s

    def decode_rate(self, workload: Workload) -> float:
        """New tokens per second after the first, over all sequences."""
        return workload.decode_tokens / (self.total_s - self.prefill_s)


@dataclass(kw_only=True)
class Measured:
    """Everything measured of one contender."""

    contender: Contender
    cold_startup_s: float
    """From starting the process to an engine ready for requests, with empty caches."""
    startup_s: float
    """The same for a second start, which finds what the first one cached."""
    engine_s: float
    """The part of `startup_s` in `vllm.LLM(...)`: load, compile, KV cache."""
    rss_gib: float = 0.0
    peak_rss_gib: float = 0.0
    python_us: float | None = None
    """Microseconds of a decode step in Graft's own Python around the model; of Graft only."""
    rounds: dict[int, list[Round]] = field(default_factory=dict)
    """By batch size."""
