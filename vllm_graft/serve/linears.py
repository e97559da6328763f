"""Linear layers of a served model as vLLM's own, where quantization or LoRA needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vllm_graft.attention.mla import TrainableMLA
from vllm_graft.serve import _vllm_linear
from vllm_graft.weights.mapping import NameMap, NameMapping

_SHOWN = 8


def convert_linears(arch: str, model: nn.Module, vllm_config: Any) -> None:
    """Replace `nn.Linear` layers by vLLM's if quantization or LoRA is asked for.

    Those inside numbered layers, with the forward of `nn.Linear` and a weight of their own:
    embeddings and the head stay. Names of parameters stay too.

    Raises:
        ValueError: with several ranks, or no such layer.
    """
    asked = _vllm_linear.asked_for(vllm_config)
    if asked is None:
        return
    parallel = vllm_config.parallel_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(parallel, name) > 1:
            raise ValueError(
                f"{arch}: {asked} with {name}={getattr(parallel, name)}: linear layers that the "
                f"model shards itself are not converted to vLLM's; use {name}=1"
            )
    found = dict(_convertible(model))
    if not found:
        raise ValueError(
            f"{arch}: {asked} needs nn.Linear layers inside numbered layers (such as "
            f"layers.0.feed_forward.w1), but {type(model).__name__} has none"
        )
    for name, old in found.items():
        parent, _, last = name.rpartition(".")
        new = _vllm_linear.linear_like(old, f"model.{name}", vllm_config)
        setattr(model.get_submodule(parent), last, new)


def _convertible(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    # With duplicates: a layer in two places, or a tied weight, is left alone.
    linears = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear)
    }
    holders = [id(module.weight) for module in linears.values()]
    for name, module in linears.items():
        parts = name.split(".")
        parent = model.get_submodule(".".join(parts[:-1]))
        own = type(module).forward is nn.Linear.forward and "forward" not in vars(module)
        # Latent attention multiplies by the halves of this weight, not by the layer.
        halved = isinstance(parent, TrainableMLA) and parts[-1] == "wkv_b"
        numbered = any(part.isdigit() for part in parts)
        if numbered and own and not halved and holders.count(id(module.weight)) == 1:
            yield name, module


def converted(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` that are vLLM's, by name."""
    return {n: module for n, module in model.named_modules() if _vllm_linear.is_linear(module)}


@contextmanager
def all_running(arch: str, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Expect every layer to be called in the block.

    Whoever reads the weight of a layer without calling it would miss its adapter.

    Raises:
        ValueError: some were not.
    """
    ran: set[nn.Module] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda module, _: ran.add(module))
        for layer in layers.values()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    idle = [name for name, layer in layers.items() if layer not in ran]
    if idle:
        raise ValueError(
            f"{arch}: quantization and LoRA need layers that every forward calls; these were not "
            f"called, or their weight was read instead: {', '.join(idle[:_SHOWN])}"
            + (", ..." if len(idle) > _SHOWN else "")
        )


def layer_finder(
    arch: str, adapter: nn.Module, mappings: list[tuple[nn.Module, NameMapping]]
) -> Callable[[str], str]:
    """Finds the layer for a name in a LoRA adapter: the model's own, or a checkpoint's.

    Args:
        adapter: what vLLM holds, before it wraps layers; the user's module is its `model`.
        mappings: modules and the name mappings that they were loaded with; adapters may also
            name layers from such a module on.
    """
    layers = set(converted(adapter))
    places = {id(module): name for name, module in adapter.named_modules()}
    known = [(places[id(module)], NameMap(mapping)) for module, mapping in mappings]

    def layer_of(name: str) -> str:
        own = [f"{below}.{name}" for below in ("model", *(below for below, _ in known))]
        for layer in own:
            if layer in layers:
                return layer
        for below, names in known:
            place = names(f"{name}.weight")
            if place is None or place.target is None:
                continue
            if place.row is not None or place.order is not None:
                raise ValueError(
                    f"{arch}: LoRA for {name!r}: the model has it as {place!s}, rows joined or "
                    "reordered; name the adapter's tensors as the model does"
                )
            target = f"{below}.{place.target.removesuffix('.weight')}"
            if target in layers:
                return target
        raise ValueError(
            f"{arch}: LoRA for {name!r}: no layer of the model that takes adapters has that name, "
            "its own or the checkpoint's; there are "
            + ", ".join(sorted(n.removeprefix("model.") for n in layers)[:_SHOWN])
            + (", ..." if len(layers) > _SHOWN else "")
        )

    return layer_of
