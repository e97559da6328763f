"""The adapter: vLLM's model interface around a user's module."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn

from vllm_graft import products, tiles
from vllm_graft.adapting import adapt, asks_for_adapt, call_factory
from vllm_graft.attention.shard import shard_attention
from vllm_graft.exact import make_exact, take_products
from vllm_graft.families.handwritten import PlainForCausalLM
from vllm_graft.kernels import packed_bf16
from vllm_graft.parallel import ParallelContext
from vllm_graft.precision import keep_table_precision, parameters_as
from vllm_graft.products import Group
from vllm_graft.serve import _vllm, _vllm_linear, _vllm_pp, _vllm_sampling
from vllm_graft.serve.body import is_recorded, make_body
from vllm_graft.serve.dry_run import DryRun
from vllm_graft.serve.eager_kernels import NotRecordableError
from vllm_graft.serve.eval_mode import EvalMode, evaluating
from vllm_graft.serve.kv import bind, new_forward
from vllm_graft.serve.linears import all_running, convert_linears, converted, layer_finder
from vllm_graft.serve.loading import Loading
from vllm_graft.serve.packing import packing_for
from vllm_graft.serve.ranks import check_ranks_differ, naming_rank
from vllm_graft.serve.registry import factory_of
from vllm_graft.serve.stages import Stage, check_stages
from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.slots import on_meta

logger = logging.getLogger("vllm_graft")

_METHODS = ("get_input_embeddings", "forward", "compute_logits", "load_weights")


class GraftForCausalLM(nn.Module):
    """What vLLM builds for a registered architecture.

    `model` is the user's module, just as the factory returned it. `kv_layers`
    holds vLLM's paged attention layers, so the user's state dict has no trace
    of them.
    """

    arch: ClassVar[str]
    supports_pp: ClassVar[bool] = True
    """vLLM asks before there is a model to ask; `build` refuses those that say no."""
    # vLLM's `SupportsLoRA`: layers become its own where `build` converts them.
    supports_lora: ClassVar[bool] = True
    is_3d_moe_weight: ClassVar[bool] = False
    is_non_gated_moe: ClassVar[bool] = False
    embedding_modules: ClassVar[dict[str, str]] = {}
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {}
    lora_skip_prefixes: ClassVar[list[str]] = []
    lora_manager: Any = None

    @naming_rank()
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.model = build(self.arch, vllm_config)
        self._linears = converted(self.model)
        self._stage = Stage.of(vllm_config)
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        exact = _vllm.serves_exactly(vllm_config)
        self._float32_logits = exact and _vllm_sampling.samples_in_float32(vllm_config)
        if exact:
            _vllm_sampling.cut_alike_in_any_batch(vllm_config)
        self._paged = bind(self.model, vllm_config, prefix, self._weights_ready)
        self.kv_layers = nn.ModuleList([paged.layer for paged in self._paged])
        self._body = make_body(self.model, vllm_config)
        self._compiled = _vllm.runs_compiled(self._body)
        self._to_record = self._compiled and is_recorded(self.model)
        if self._to_record and self._linears:
            # Adapters change from step to step what such layers do in Python.
            self._run_eagerly("quantization and LoRA make layers of vLLM's")
        self._max_model_len = vllm_config.model_config.max_model_len
        self._parallel_config = vllm_config.parallel_config
        self._dummy_weights = vllm_config.load_config.load_format == "dummy"
        self._eval_mode = EvalMode(self.model)
        self._traced = False
        self._loading = Loading(self.arch, self.model)
        self.packing = packing_for(self.model, vllm_config)

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
    ) -> Any:
        """Hidden states `[T, D]` for vLLM's flat batch of T tokens; packed for a next stage."""
        self.check_servable()
        if input_ids is None or inputs_embeds is not None:
            raise ValueError(f"{self.arch}: prompt embeddings are not supported; send token ids")
        if positions.dim() != 1:
            raise ValueError(f"{self.arch}: expected positions [T], got {tuple(positions.shape)}")
        if not self._traced:
            new_forward(self._paged)
        self.packing.refresh()
        with self._evaluating(), products.serving():
            if self._to_record:
                self._record(input_ids.dtype)
            hidden = self._body(input_ids, positions, self._stage.received(intermediate_tensors))
        if self._compiled and not self._traced:
            self._traced = True
        return self._stage.sent(hidden)

    def check_servable(self) -> None:
        """Raise if the weights are incomplete.

        Raises:
            WeightError: a load broke off or left something out.
        """
        if self._loading.refusal is not None:
            raise WeightError(f"{self.arch} refuses to serve: {self._loading.refusal}")

    def check_changeable(self) -> None:
        """Raise if the weights cannot be loaded anew.

        Raises:
            ValueError: vLLM's layers hold them in another form.
        """
        if self._loading.closed:
            raise ValueError(
                f"{self.arch}: weights cannot be changed while quantization or LoRA is on, since "
                "vLLM's layers hold them in another form; start the engine without"
            )

    def refuse(self, reason: str) -> None:
        """Serve nothing until a whole load has gone through."""
        self._loading.give_up(reason)

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> Any:
        """Room for what the stage before sends: `[batch_size, D]`."""
        return _vllm_pp.message(
            torch.zeros(batch_size, self._stage.width, dtype=dtype, device=device)
        )

    def _evaluating(self) -> AbstractContextManager[None]:
        """Eval mode for a forward; code that is compiled already was traced in it."""
        return nullcontext() if self._traced else evaluating(self._eval_mode.in_training())

    def _record(self, ids: torch.dtype) -> None:
        """Give the compiler a recording of the model; without one it runs eagerly."""
        self._to_record = False
        try:
            self._body.record(ids)
        except NotRecordableError as reason:
            self._run_eagerly(f"it makes no graph: {reason}")
        new_forward(self._paged)

    def _run_eagerly(self, reason: str) -> None:
        logger.warning("%s runs eagerly: %s", self.arch, reason)
        _vllm.never_compile(self._body)
        self._compiled = self._to_record = False

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `[T, V]` for hidden states `[T, D]`."""
        compute: Any = self.model.compute_logits
        with products.serving():
            logits = self._eval_mode.logits(compute, hidden_states)
        if logits.shape[-1] > self._vocab_size:  # rows that only pad the vocabulary are no tokens
            logits = logits[..., : self._vocab_size]
        return logits.float() if self._float32_logits else logits

    def training_hidden(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states `[T, D]` with gradient, for the batch in `packed(...)`."""
        if self._body.batched:
            input_ids, positions = input_ids[None], positions[None]
        hidden: torch.Tensor = self.model(input_ids, positions=positions)
        return hidden.flatten(0, 1) if hidden.dim() == 3 else hidden

    @naming_rank()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
        """Let the user's module load; see `Loading.take`."""
        self.check_changeable()
        self.packing.before_load(whole=on_meta(self.model))
        written = self._loading.take(weights)
        return None if written is None else {f"model.{name}" for name in written}

    @naming_rank()
    def _weights_ready(self) -> None:
        """Hear from vLLM that the initial load or a whole live update is complete."""
        if not self._loading.finish():
            self.packing.ready()
            return
        self._check_ranks()
        dry_run = self._dry_run()
        with evaluating(self._eval_mode.modules()):
            with products.watching() as calls, all_running(self.arch, self._linears):
                dry_run.run()
            self.packing.start(calls, dry_run.hidden, self._pack_attention)
        if self._linears:
            finder = layer_finder(self.arch, self, self._loading.mappings)
            self.hf_to_vllm_mapper = _vllm_linear.names_of_adapters(finder)
            self._loading.close()

    def _pack_attention(self) -> list[Group]:
        made = [paged.pack() for paged in self._paged]
        return [group for group in made if group is not None]

    def _check_ranks(self) -> None:
        context = ParallelContext.from_config(self._parallel_config)
        # vLLM's dummy loader draws the same numbers for tensors of one shape, on every rank.
        if not self._dummy_weights:
            check_ranks_differ(self.model, context)
        layers = [paged.name for paged in self._paged]
        check_stages(layers, self._loading.report.elsewhere, context)

    def _dry_run(self) -> DryRun:
        return DryRun(
            arch=self.arch,
            model=self.model,
            body=self._body,
            paged=self._paged,
            stage=self._stage,
            vocab_size=self._vocab_size,
            max_model_len=self._max_model_len,
            tp_size=self._parallel_config.tensor_parallel_size,
            compute_logits=self.compute_logits,
        )


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
    _vllm.refuse_hidden_experts(vllm_config.parallel_config)
    factory: Any = factory_of(arch)
    context = ParallelContext.from_config(vllm_config.parallel_config)
    with parameters_as(vllm_config.model_config.dtype):
        model: Any = call_factory(factory, vllm_config, context)
    if isinstance(model, nn.Module) and asks_for_adapt(model):
        _vllm.refuse_latent_cache(vllm_config)
        model = adapt(model.eval())
    if isinstance(model, PlainForCausalLM):
        model.prove(vllm_config.model_config.max_model_len)
    _check_model(arch, model)
    _check_ranks_supported(arch, model, context)
    _check_stages_supported(arch, model, context)
    convert_linears(arch, model, vllm_config)
    shard_attention(model, context.get_tensor_parallel_world_size())
    keep_table_precision(model, {})
    _vllm.extend_compile_key(vllm_config, model=model_digest(arch, model))
    if _vllm.serves_exactly(vllm_config):
        make_exact(model)
        _vllm.emulate_eager_rounding(vllm_config)
    else:
        take_products(model)
    built: nn.Module = model
    return built


def _check_ranks_supported(arch: str, model: nn.Module, context: ParallelContext) -> None:
    ranks = context.get_tensor_parallel_world_size()
    if ranks > 1 and not getattr(model, "supports_tp", True):
        raise ValueError(
            f"{arch}: tensor_parallel_size={ranks}: a model that adapt made is not sharded; use 1"
        )


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


def _check_stages_supported(arch: str, model: nn.Module, context: ParallelContext) -> None:
    stages = context.get_pipeline_parallel_world_size()
    if stages == 1:
        return
    if not getattr(model, "supports_pp", False):
        raise ValueError(
            f"{arch}: pipeline_parallel_size={stages}, but {type(model).__name__}.supports_pp is "
            "False: it would be whole on every stage. Use pipeline_parallel_size=1, or build "
            "the layers in parallel_context.stage_layers(num_layers) and set supports_pp = True"
        )
    _vllm_pp.make_receive_buffer_when_eager()


def model_digest(arch: str, model: nn.Module) -> str:
    """A digest of what the compiled code of `model` depends on, values of weights aside."""
    own_products = _vllm.platform_device() == "cpu" and packed_bf16.available()
    digest = hashlib.sha256(f"{arch}|{tiles.circumstances()}|{own_products}".encode())
    # A recording is code with its constants, and has a digest of its own.
    modules = [] if is_recorded(model) else model.named_modules()
    for name, module in modules:
        plain = {k: v for k, v in vars(module).items() if k not in _TORCH_STATE}
        digest.update(f"{name}|{type(module).__qualname__}|{_constants(plain, 3)}".encode())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue  # extra state, as Megatron's layers have
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
    return digest.hexdigest()


_TORCH_STATE = frozenset(vars(nn.Module()))


def _constants(value: Any, depth: int) -> str:
    """Numbers, strings and containers of them, config objects included; modules and tensors not."""
    if isinstance(value, (int, float, str, bytes, type(None), torch.dtype)):
        return repr(value)
    if depth == 0 or isinstance(value, (torch.Tensor, nn.Module)) or callable(value):
        return type(value).__qualname__
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_constants(item, depth - 1) for item in value) + "]"
    items = value if isinstance(value, dict) else _attributes(value)
    inside = sorted(f"{key}:{_constants(item, depth - 1)}" for key, item in items.items())
    return f"{type(value).__qualname__}{{{','.join(inside)}}}"


def _attributes(value: Any) -> dict[str, Any]:
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return {**{n: getattr(value, n, None) for n in slots}, **getattr(value, "__dict__", {})}
