"""Transformers' causal language models: their attention interface becomes `CoreAttention`.

The model keeps its modules, its names and its own way from hidden states to logits. One
forward on a few tokens records what each attention site passes to the interface; a
`CoreAttention` without parameters is then added to each.

Legend: T tokens, D width, V vocabulary, B sequences, L length, N query heads, K key/value
heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from vllm_graft.attention.core import CoreAttention
from vllm_graft.families.transformers_exact import correct_layers
from vllm_graft.families.transformers_names import SavedByTransformers
from vllm_graft.families.trial import LENGTHS, check_packed, packed_logits, tokens_of
from vllm_graft.model import VLLMModelForCausalLM
from vllm_graft.positions import current_batch

INTERFACE = "vllm_graft"
"""Name in Transformers' table of attention functions. It has no mask function: samples are
kept apart by `CoreAttention`, so the models build no masks."""
CORE = "graft_core_attention"
"""Name of the `CoreAttention` inside each attention module."""
_TOKENS = 3


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """What one attention module asked of the attention interface."""

    name: str
    """Qualified module name."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None
    softcap: float | None
    has_sinks: bool


class TransformersForCausalLM(SavedByTransformers, VLLMModelForCausalLM):
    """A Transformers model, `*ForCausalLM`, behind the Custom Model API.

    Args:
        model: with weights on a real device; changed in place, names stay.

    Attributes:
        sites: the attention found, in the order of the forward.

    Raises:
        ValueError: attention that asks for what `CoreAttention` does not do, or samples that see
            each other when they are packed.
    """

    supports_tp: ClassVar[bool] = False
    recorded: ClassVar[bool] = True
    """The compiler gets `serve.recording` in place of the Python."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        _register()
        model.set_attn_implementation(INTERFACE)
        self.sites = find_sites(model)
        correct_layers(model)
        for site in self.sites:
            model.get_submodule(site.name).add_module(CORE, _core(site))
        first, second = (tokens_of(model.get_input_embeddings(), length) for length in LENGTHS)
        check_packed(self, [first, second], packed_logits(self, [second]))

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed token ids `[T]` to `[T, D]`."""
        embedded: torch.Tensor = self.model.get_input_embeddings()(input_ids)
        return embedded

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Hidden states `[T, D]` of tokens `[T]`, or `[B, L, D]` of `[B, L]`."""
        rows = input_ids if input_ids.dim() == 2 else input_ids[None]
        if positions is None:
            positions = _positions(rows)
        output = self.model.base_model(
            input_ids=rows, position_ids=positions.view(-1, rows.shape[1]), use_cache=False
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden.view(*input_ids.shape, -1)

    def compute_logits(
        self, hidden_states: torch.Tensor, sampling_metadata: Any = None
    ) -> torch.Tensor:
        """Logits `[T, V]` as the model's own forward makes them of `[T, D]`."""
        # Only the model knows what follows its last norm: a softcap, a scale, a bias.
        with _gives(self.model.base_model, hidden_states[None]):
            logits: torch.Tensor = self.model(inputs_embeds=hidden_states[None]).logits
        return logits[0]


def find_sites(model: Any) -> list[AttentionSite]:
    """Run `model` once on a few tokens and record each call of the attention interface.

    Raises:
        ValueError: no call, two calls from one module, or a call that cannot be honoured.
    """
    names = {module: name for name, module in model.named_modules()}
    sites: dict[str, AttentionSite] = {}

    def record(module: nn.Module, q: Any, k: Any, v: Any, options: dict[str, Any]) -> None:
        site = _site(names[module], module, (q, k, v), options)
        if sites.setdefault(site.name, site) is not site:
            raise ValueError(f"{site.name}: attention runs twice in one forward")

    tokens = torch.zeros(1, _TOKENS, dtype=torch.long, device=model.device)
    with _recording(record), torch.no_grad():
        model.base_model(input_ids=tokens, use_cache=False)
    if not sites:
        raise ValueError(f"{type(model).__name__} never calls Transformers' attention interface")
    return list(sites.values())


def _site(
    name: str, module: Any, qkv: tuple[torch.Tensor, ...], options: dict[str, Any]
) -> AttentionSite:
    q, k, v = qkv
    refused = {
        "position_bias": options.get("position_bias"),
        "attention_mask": options.get("attention_mask"),
    }
    for what, value in refused.items():
        if value is not None:
            raise ValueError(f"{name}: {what} is not supported in attention")
    if not options.get("is_causal", getattr(module, "is_causal", True)):
        raise ValueError(f"{name}: attention is not causal; it cannot be served from a KV cache")
    if k.shape[:3] != v.shape[:3] or v.shape[3] > k.shape[3] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{name}: keys {tuple(k.shape)} and values {tuple(v.shape)} must have the same heads "
            f"and the length of the queries {tuple(q.shape)}, and values be no wider than keys"
        )
    scale = options.get("scaling")
    return AttentionSite(
        name=name,
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[3],
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        sliding_window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        has_sinks=options.get("s_aux") is not None,
    )


def _core(site: AttentionSite) -> CoreAttention:
    return CoreAttention(
        site.num_heads,
        site.num_kv_heads,
        site.head_dim,
        scale=site.scale,
        sliding_window=site.sliding_window,
        softcap=site.softcap,
        has_sinks=site.has_sinks,
    )


class _Recorder:
    record: Any = None


@contextmanager
def _recording(record: Any) -> Iterator[None]:
    _Recorder.record = record
    try:
        yield
    finally:
        _Recorder.record = None


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(INTERFACE, _attend)


def _attend(
    module: nn.Module,
    q_BNLH: torch.Tensor,
    k_BKLH: torch.Tensor,
    v_BKLH: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that Transformers calls; returns `[B, L, N, H]` and no weights."""
    if _Recorder.record is not None:
        _Recorder.record(
            module, q_BNLH, k_BKLH, v_BKLH, {**options, "attention_mask": attention_mask}
        )
        q_BLNH = q_BNLH.transpose(1, 2)
        return q_BNLH.new_zeros(q_BLNH.shape[:3] + v_BKLH.shape[3:]), None
    core: Any = module.get_submodule(CORE)
    core.dropout = dropout
    q, k, v = (x.transpose(1, 2) for x in (q_BNLH, k_BKLH, v_BKLH))
    return core(q, k, v, sinks=options.get("s_aux")), None


def _positions(rows: torch.Tensor) -> torch.Tensor:
    """Those of `packed(...)`, else every row of `[B, L]` counts from 0."""
    batch = current_batch()
    if batch is not None:
        return batch.positions.to(rows.device)
    return torch.arange(rows.shape[1], device=rows.device).expand(rows.shape)


class _BodyOutput:
    """A body's output with nothing but hidden states, whatever else its class would name."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None


@contextmanager
def _gives(base: nn.Module, hidden: torch.Tensor) -> Iterator[None]:
    """Let `base` return `hidden` as its last hidden states in the block, computing nothing."""
    before = base.__dict__.get("forward")
    base.forward = lambda *_, **__: _BodyOutput(hidden)
    try:
        yield
    finally:
        del base.forward
        if before is not None:
            base.forward = before
