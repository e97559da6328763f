"""The adapter: vLLM's model interface around a user's module."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from vllm_graft.attention.mla import TrainableMLA
from vllm_graft.exact import make_exact
from vllm_graft.parallel import ParallelContext
from vllm_graft.precision import keep_table_precision, parameters_as
from vllm_graft.serve import _vllm
from vllm_graft.serve.body import find_layout, make_body
from vllm_graft.serve.kv import bind
from vllm_graft.serve.registry import factory_of
from vllm_graft.weights.load import LoadReport, WeightError, accounting_later, missing_text
from vllm_graft.weights.sentinel import Sentinels

logger = logging.getLogger("vllm_graft")

_METHODS = ("get_input_embeddings", "forward", "compute_logits", "load_weights")
_DRY_RUN_TOKENS = 4


class GraftForCausalLM(nn.Module):
    """What vLLM builds for a registered architecture.

    `model` is the user's module, just as the factory returned it. `kv_layers`
    holds vLLM's paged attention layers, so the user's state dict has no trace
    of them.
    """

    arch: ClassVar[str]

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.model = build(self.arch, vllm_config)
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        self._paged = bind(self.model, vllm_config, prefix, self._weights_ready)
        self.kv_layers = nn.ModuleList([paged.layer for paged in self._paged])
        self._body = make_body(self.model, vllm_config)
        self._vllm_config = vllm_config
        self._modules_below = list(self.model.modules())
        self._parameters_below = dict(self.model.named_parameters())
        self._sentinels: Sentinels | None = None
        self._reports: list[LoadReport] = []
        self._loaded_once = False
        self._refusal: str | None = None

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings `[T, D]`."""
        embedded: torch.Tensor = self.model.get_input_embeddings(input_ids)  # type: ignore[operator]
        return embedded

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states `[T, D]` for vLLM's flat batch of T tokens."""
        if self._refusal is not None:
            raise WeightError(f"{self.arch} refuses to serve: {self._refusal}")
        if input_ids is None or inputs_embeds is not None:
            raise ValueError(f"{self.arch}: prompt embeddings are not supported; send token ids")
        if positions.dim() != 1:
            raise ValueError(f"{self.arch}: expected positions [T], got {tuple(positions.shape)}")
        self._new_forward()
        with evaluating(self._modules_below):
            hidden: torch.Tensor = self._body(input_ids, positions)
        return hidden

    def _new_forward(self) -> None:
        for paged in self._paged:
            paged.calls = 0

    @torch.inference_mode()
    def _try_out(self) -> None:
        """Run a few tokens: learn which shape the model takes, refuse what cannot serve."""
        device = next(self.model.parameters()).device
        tokens = torch.zeros(_DRY_RUN_TOKENS, dtype=torch.long, device=device)
        positions = torch.arange(_DRY_RUN_TOKENS, device=device)
        dummy = _vllm.dummy_forward(self._vllm_config, _DRY_RUN_TOKENS)
        with dummy, evaluating(self._modules_below):
            self._body.batched, hidden = find_layout(
                self.model, tokens, positions, self._new_forward
            )
        unused = [paged.name for paged in self._paged if paged.calls == 0]
        if unused:
            raise RuntimeError(
                f"{self.arch}: attention modules that no forward reaches: {', '.join(unused)}"
            )
        self._check_logits(hidden)

    def _check_logits(self, hidden: torch.Tensor) -> None:
        try:
            logits = self.compute_logits(hidden[:1])
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.arch}: compute_logits failed on hidden states {tuple(hidden.shape)} from "
                f"forward (which must return hidden states, not logits): {error}"
            ) from error
        if logits.shape[0] != 1 or logits.shape[-1] < self._vocab_size:
            raise RuntimeError(
                f"{self.arch}: compute_logits returned {tuple(logits.shape)} for 1 token; "
                f"expected (1, {self._vocab_size}), vocab_size of the checkpoint's config"
            )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `[T, V]` for hidden states `[T, D]`."""
        with evaluating(self._modules_below):
            logits: torch.Tensor = self.model.compute_logits(hidden_states)  # type: ignore[operator]
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
        """Let the user's module load, and learn which parameters were written.

        vLLM may call this once with everything or once per tensor. Returns the
        written names as soon as all are; None says "not complete", and the
        account is then settled in `_weights_ready`.
        """
        self._mark()
        with accounting_later() as reports:
            self.model.load_weights(weights)  # type: ignore[operator]
        self._reports += reports
        if self._sentinels is None or self._sentinels.unwritten():
            return None
        return {f"model.{name}" for name in self._parameters_below}

    def _mark(self) -> None:
        """Mark parameters before the initial load, and before a layerwise update.

        A layerwise update has put parameters on meta, so no request can read
        the marked storage. Any other later call writes to weights in use:
        those are not marked.
        """
        on_meta = any(p.is_meta for p in self.model.parameters())
        if self._sentinels is None and (on_meta or not self._loaded_once):
            self._sentinels = Sentinels(dict(self._parameters_below))
            self._reports = []

    def _weights_ready(self) -> None:
        """Hear from vLLM that the initial load or a whole live update is complete."""
        if self._sentinels is not None:
            unwritten = self._sentinels.unwritten()
            self._sentinels.remove()
            self._sentinels = None
            self._refusal = self._account(unwritten)
        if self._refusal is not None:
            raise WeightError(f"{self.arch}: {self._refusal}")
        if not self._loaded_once:
            self._loaded_once = True
            self._try_out()

    def _account(self, unwritten: dict[str, str]) -> str | None:
        for report in self._reports:
            logger.info("%s: %s", self.arch, str(report).splitlines()[0])
        if not unwritten:
            return None
        written = tuple(name for report in self._reports for name in report.loaded.values())
        bad = [name for name in unwritten if name.endswith(written)] if written else []
        if bad:
            return f"the checkpoint has NaN values in {', '.join(bad)}"
        skipped = [name for report in self._reports for name in report.skipped]
        partly = [name for name, state in unwritten.items() if state != "missing"]
        text = missing_text(list(unwritten), skipped)
        return text + (f"\nonly partly written: {', '.join(partly)}" if partly else "")


@functools.cache
def adapter_class(arch: str) -> type[GraftForCausalLM]:
    """The class vLLM builds for `arch`."""
    return type("GraftForCausalLM", (GraftForCausalLM,), {"arch": arch, "__module__": __name__})


def build(arch: str, vllm_config: Any) -> nn.Module:
    """Call the factory of `arch` as the Custom Model API promises.

    Raises:
        TypeError: the factory returned something that cannot be served.
        ValueError: it asks for what Graft does not do.
    """
    _vllm.give_hf_config(vllm_config)
    factory: Any = factory_of(arch)
    context = ParallelContext.from_config(vllm_config.parallel_config)
    with parameters_as(vllm_config.model_config.dtype):
        model: Any = (
            factory(vllm_config=vllm_config, parallel_context=context)
            if isinstance(factory, type)
            else factory(vllm_config, context)
        )
    _check_model(arch, model)
    keep_table_precision(model, {})
    make_exact(model)
    _vllm.extend_compile_key(vllm_config, model_digest(arch, model))
    _vllm.emulate_eager_rounding(vllm_config)
    built: nn.Module = model
    return built


def _check_model(arch: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{arch}: the factory returned {type(model).__name__}, not an nn.Module")
    missing = [name for name in _METHODS if not callable(getattr(model, name, None))]
    if missing:
        raise TypeError(
            f"{arch}: {type(model).__name__} has no {', '.join(missing)}; derive it from "
            "VLLMModelForCausalLM, which names what is needed"
        )
    if getattr(model, "supports_multimodal", False):
        raise ValueError(
            f"{arch}: supports_multimodal = True, but Graft serves text only; set it to False"
        )
    if any(isinstance(module, TrainableMLA) for module in model.modules()):
        raise ValueError(f"{arch}: TrainableMLA trains, but this release does not serve it")


def model_digest(arch: str, model: nn.Module) -> str:
    """A digest of what the compiled code of `model` depends on, values of weights aside."""
    digest = hashlib.sha256(arch.encode())
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, tuple))}
        digest.update(
            f"{name}|{type(module).__qualname__}|{sorted(plain.items(), key=str)}".encode()
        )
    for name, tensor in model.state_dict(keep_vars=True).items():
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
    return digest.hexdigest()


@contextmanager
def evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Run in eval mode and give back the training flags; free when none is set."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
