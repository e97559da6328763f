"""Hand-written models that map token ids to logits and call `scaled_dot_product_attention`.

The model stays as it is: a forward inside Graft's watch has its attention calls answered by
`CoreAttention` and its own counting of positions by the running batch's. Outside, the model
is the original, against which the adapted one is tried out.

Legend: T tokens, V vocabulary, B sequences, L length.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from vllm_graft.attention.core import CoreAttention
from vllm_graft.families.probe import Calls, Line, SdpaSite, sdpa_site
from vllm_graft.model import VLLMModelForCausalLM
from vllm_graft.positions import current_batch, packed

_LENGTHS = (11, 13)
"""Two, so that a count that follows the tokens differs from one that only looks so."""
_POSITION_ARGUMENTS = ("positions", "position_ids", "input_pos")
_LIMIT = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest difference over the largest logit: another order of sums, not another result."""


class PlainForCausalLM(VLLMModelForCausalLM):
    """A module `tokens [B, L] -> logits [B, L, V]` behind the Custom Model API.

    Attributes:
        sites: the attention calls found, in the order of the forward.

    Raises:
        ValueError: attention that cannot be served, or a trial whose logits differ.
    """

    supports_tp: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.sites = find_sites(model)
        self._placed = _place_calls(model)
        self.cores = nn.ModuleList(
            CoreAttention(s.num_heads, s.num_kv_heads, s.head_dim, scale=s.scale)
            for s in self.sites
        )
        self._try_out()

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed token ids by the model's first `nn.Embedding`."""
        table = next(m for m in self.model.modules() if isinstance(m, nn.Embedding))
        embedded: torch.Tensor = table(input_ids)
        return embedded

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Logits `[T, V]` of tokens `[T]`, or `[B, L, V]` of `[B, L]`."""
        rows = input_ids if input_ids.dim() == 2 else input_ids[None]
        if positions is None:
            batch = current_batch()
            length = torch.arange(rows.shape[1], device=rows.device)
            positions = length if batch is None else batch.positions.to(rows.device)
        flat = positions.reshape(-1)[: rows.shape[1]]
        queue = iter(self.cores)

        def attend(q: Any, k: Any, v: Any, *_: Any, dropout_p: float = 0.0, **__: Any) -> Any:
            core: Any = next(queue)
            core.dropout = dropout_p
            return core(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        with Calls(rows.shape[1], attend, lambda line: flat if line in self._placed else None):
            logits = _run(self.model, rows, flat)
        return logits.view(*input_ids.shape, -1)

    def compute_logits(
        self, hidden_states: torch.Tensor, sampling_metadata: Any = None
    ) -> torch.Tensor:
        """`forward` has made them: where a head begins is the model's own business."""
        return hidden_states

    def load_weights(self, weights_iter: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint under the model's own names.

        Raises:
            WeightError: a tensor is missing or has another shape.
        """
        from vllm_graft.weights.load import load_external_weights

        names = {name: name for name in self.model.state_dict()}
        report = load_external_weights(self.model, weights_iter, names).report
        return {f"model.{name}" for name in report.loaded.values()}

    @torch.no_grad()
    def _try_out(self) -> None:
        first, second = (_tokens(self.model, length) for length in _LENGTHS)
        want = torch.cat([_run(self.model, x, _count(x))[0] for x in (first, second)])
        borders = torch.tensor([0, _LENGTHS[0], sum(_LENGTHS)])
        with packed(borders):
            got = self(torch.cat([first[0], second[0]]))
        difference = float((got - want).abs().max() / want.abs().max())
        if not difference <= _LIMIT.get(want.dtype, 5e-2):
            raise ValueError(
                f"{type(self.model).__name__}: two samples packed into one row give other logits "
                f"than alone, by {difference:.2g} of the largest. Usual causes: positions that are "
                "counted in a way Graft does not see (pass `positions` to forward), state outside "
                "attention, attention that is not scaled_dot_product_attention"
            )


@torch.no_grad()
def find_sites(model: nn.Module) -> list[SdpaSite]:
    """Run `model` on a few tokens and record its attention calls.

    Raises:
        ValueError: none, two from one module, or one that cannot be served.
    """
    running: list[str] = []
    sites: list[SdpaSite] = []
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, n=name: running.append(n)))
        hooks.append(module.register_forward_hook(lambda *_: (running.pop(), None)[1]))

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        site = sdpa_site(running[-1], *args, **kwargs)
        if any(other.name == site.name for other in sites):
            raise ValueError(f"{site.name}: attention runs twice in one forward")
        sites.append(site)
        return torch.zeros_like(args[0])

    tokens = _tokens(model, _LENGTHS[0])
    try:
        with Calls(_LENGTHS[0], attend, lambda _: None):
            _run(model, tokens, _count(tokens))
    finally:
        for hook in hooks:
            hook.remove()
    if not sites:
        raise ValueError(f"{type(model).__name__} never calls scaled_dot_product_attention")
    return sites


@torch.no_grad()
def _place_calls(model: nn.Module) -> set[Line]:
    """Lines that count the tokens, and nothing else, at every length."""
    found = []
    for length in _LENGTHS:
        calls = Calls(length, lambda q, *_, **__: torch.zeros_like(q), lambda _: None)
        tokens = _tokens(model, length)
        with calls:
            _run(model, tokens, _count(tokens))
        found.append(calls.follows - calls.others)
    return set.intersection(*found)


def _run(model: nn.Module, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    known = inspect.signature(model.forward).parameters
    named = {n: positions for n in _POSITION_ARGUMENTS if n in known}
    output: Any = model(rows, **named)
    logits: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return logits


def _tokens(model: nn.Module, length: int) -> torch.Tensor:
    table = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if table is None:
        raise ValueError(f"{type(model).__name__} has no nn.Embedding, so it takes no token ids")
    device = table.weight.device
    return (torch.arange(length, device=device) * 7 % table.num_embeddings)[None]


def _count(rows: torch.Tensor) -> torch.Tensor:
    return torch.arange(rows.shape[1], device=rows.device)
