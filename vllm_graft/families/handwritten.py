"""Hand-written models that map token ids to logits, served and trained as they are.

The model stays as it is: a forward inside Graft's watch has its attention calls answered by
`CoreAttention` and its own counting of positions by the running batch's. Outside, the model
is the original, against which the adapted one is tried out.

Legend: T tokens, V vocabulary, B sequences, L length.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import nn

from vllm_graft.attention.core import CoreAttention
from vllm_graft.families.calls import AttentionCall, Site, site_of
from vllm_graft.families.masks import NotUnderstoodError
from vllm_graft.families.probe import Calls, Line
from vllm_graft.families.trial import LENGTHS, check_packed, near, tokens_of
from vllm_graft.families.written_out import WrittenOut
from vllm_graft.model import VLLMModelForCausalLM
from vllm_graft.positions import current_batch

_POSITION_ARGUMENTS = ("positions", "position_ids", "input_pos")


class PlainForCausalLM(VLLMModelForCausalLM):
    """A module `tokens [B, L] -> logits [B, L, V]` behind the Custom Model API.

    Attributes:
        sites: the attention calls found, in the order of the forward.

    Raises:
        ValueError: attention that cannot be served, or a trial whose logits differ.
    """

    supports_tp: ClassVar[bool] = False
    recorded: ClassVar[bool] = True
    """The compiler gets `serve.recording` in place of the Python."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.sites = find_sites(model)
        self._placed, self._written = _find_lines(model)
        self.sites = self._with_rope(self.sites)
        self.cores = nn.ModuleList(_core(site) for site in self.sites)
        self._proven = LENGTHS[0] if any(site.masked for site in self.sites) else sys.maxsize
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
        batch = current_batch()
        if positions is None:
            positions = _count(rows) if batch is None else batch.positions.to(rows.device)
        flat = positions.reshape(-1)[: rows.shape[1]]
        if self._proven < sys.maxsize and (batch is None or not batch.serving):
            self.prove(int(flat.max()) + 1)
        queue = iter(self.cores)

        def attend(call: AttentionCall) -> torch.Tensor:
            core: Any = next(queue)
            core.dropout = call.dropout
            # Transformers repeats grouped heads where it has a mask, and not where it has none.
            k, v = (x[:, :: x.shape[1] // core.num_kv_heads] for x in (call.k, call.v))
            out: torch.Tensor = core(*(x.transpose(1, 2) for x in (call.q, k, v)))
            return out.transpose(1, 2)

        logits = self._watched(rows, flat, attend)
        return logits.view(*input_ids.shape, -1)

    def _watched(
        self,
        rows: torch.Tensor,
        at: torch.Tensor,
        attend: Callable[[AttentionCall], torch.Tensor],
    ) -> torch.Tensor:
        """The model's logits of `[B, L]` at positions `[L]`, its attention answered by `attend`."""

        def place(line: Line) -> torch.Tensor | None:
            return at if line in self._placed else None

        with Calls(rows.shape, attend, place, self._written.__contains__):
            return run_original(self.model, rows, at)

    def prove(self, length: int) -> None:
        """Look at the model's masks for samples of up to `length` tokens, and take their windows.

        Raises:
            ValueError: a mask that is neither causal nor a window, or a window that comes too
                late, after the engine has made its cache.
        """
        if length <= self._proven:
            return
        for core, site in zip(self.cores, find_sites(self.model, length), strict=True):
            cast(CoreAttention, core).set_window(site.sliding_window)
            _check_slopes(cast(CoreAttention, core).spec.alibi_slopes, site)
        self._proven = length

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
    def _with_rope(self, sites: list[Site]) -> list[Site]:
        """Note where RoPE was applied: a shift of all positions turns queries, and no score."""
        marked = []
        for site, (q, score), (moved, same) in zip(
            sites, self._scored(0), self._scored(1), strict=True
        ):
            turned = not near(q, moved) and near(score, same)
            marked.append(replace(site, rotated=turned))
        return marked

    def _scored(self, first: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Queries, and their products with the keys, for positions that begin at `first`."""
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def attend(call: AttentionCall) -> torch.Tensor:
            k = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
            seen.append((call.q, call.q @ k.transpose(-2, -1)))
            return _zeros(call)

        tokens = _tokens(self.model, LENGTHS[0])
        self._watched(tokens, _count(tokens) + first, attend)
        return seen

    @torch.no_grad()
    def _try_out(self) -> None:
        samples = [_tokens(self.model, length) for length in LENGTHS]
        with WrittenOut():
            want = torch.cat([run_original(self.model, rows, _count(rows))[0] for rows in samples])
        check_packed(self, [rows[0] for rows in samples], want)


def _check_slopes(known: Sequence[float] | None, site: Site) -> None:
    """Refuse a bias that came with the checkpoint, or follows the length of a sample."""
    if known != site.alibi_slopes and not near(
        *(torch.tensor(slopes or (0.0,)) for slopes in (known, site.alibi_slopes))
    ):
        raise ValueError(
            f"{site.name}: ALiBi's slopes were {known} when the model was adapted and are "
            f"{site.alibi_slopes} now; they must not be learned, nor follow a sample's length"
        )


def _core(site: Site) -> CoreAttention:
    return CoreAttention(
        site.num_heads,
        site.num_kv_heads,
        site.head_dim,
        scale=site.scale,
        softcap=site.softcap,
        sliding_window=site.sliding_window,
        alibi_slopes=site.alibi_slopes,
    )


def find_sites(model: nn.Module, length: int = LENGTHS[0]) -> list[Site]:
    """Run `model` on `length` tokens and record its attention calls.

    Raises:
        ValueError: none, two from one module, or one that cannot be served.
    """
    running: list[str] = []
    sites: list[Site] = []
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, n=name: running.append(n)))
        hooks.append(module.register_forward_hook(lambda *_: (running.pop(), None)[1]))

    def attend(call: AttentionCall) -> torch.Tensor:
        site = site_of(running[-1], call)
        if any(other.name == site.name for other in sites):
            raise ValueError(f"{site.name}: attention runs twice in one forward")
        sites.append(site)
        return _zeros(call)

    tokens = _tokens(model, length)
    try:
        # Short samples with gradients: they show what of a bias is learned.
        with Calls(tokens.shape, attend), torch.set_grad_enabled(length in LENGTHS):
            run_original(model, tokens, _count(tokens))
    except NotUnderstoodError as error:
        raise ValueError(f"{running[-1]}: {error}") from None
    finally:
        for hook in hooks:
            hook.remove()
    if not sites:
        raise ValueError(
            f"{type(model).__name__} never calls scaled_dot_product_attention, flex_attention, "
            "varlen_attn, flash-attn or nn.MultiheadAttention, and writes out no "
            "softmax(q @ k^T) @ v that Graft knows"
        )
    return sites


@torch.no_grad()
def _find_lines(model: nn.Module) -> tuple[set[Line], set[Line]]:
    """Lines that count the tokens and nothing else, and those that multiply queries by keys."""
    placed, written = [], []
    for length in LENGTHS:
        tokens = _tokens(model, length)
        calls = Calls(tokens.shape, _zeros)
        with calls:
            run_original(model, tokens, _count(tokens))
        placed.append(calls.follows - calls.others)
        written.append(calls.products)
    return set.intersection(*placed), set.intersection(*written)


def run_original(model: nn.Module, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits `[B, L, V]` of token ids `[B, L]`; a model that takes positions gets these, `[L]`."""
    known = inspect.signature(model.forward).parameters
    named: dict[str, Any] = dict.fromkeys((n for n in _POSITION_ARGUMENTS if n in known), positions)
    if "position_ids" in named:  # Transformers' name, and its shape
        named["position_ids"] = positions.expand(rows.shape)
    if "use_cache" in known:
        named["use_cache"] = False
    return logits_of(model(rows, **named))


def logits_of(output: Any) -> torch.Tensor:
    """Logits of what a model returns: these alone, first in a tuple, or by their name."""
    first = output[0] if isinstance(output, tuple) else output
    logits: torch.Tensor = first if isinstance(first, torch.Tensor) else first.logits
    return logits


def _zeros(call: AttentionCall) -> torch.Tensor:
    """In attention's place, where its numbers are not wanted; its dtype is that of the values."""
    return call.v.new_zeros(call.q.shape)


def _tokens(model: nn.Module, length: int) -> torch.Tensor:
    table = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if table is None:
        raise ValueError(f"{type(model).__name__} has no nn.Embedding, so it takes no token ids")
    return tokens_of(table, length)[None]


def _count(rows: torch.Tensor) -> torch.Tensor:
    return torch.arange(rows.shape[1], device=rows.device)
