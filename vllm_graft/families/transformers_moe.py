"""Transformers' mixtures of experts, given results that do not depend on the batch.

Transformers multiplies an expert by all tokens that chose it, in a product whose order of
additions follows their number; its routers multiply by a parameter of their own. `correct_experts`
gives both another forward. Parameters, names and configuration stay.

Experts are known by what `use_experts_implementation` leaves on them; others stay as they are,
and so does everything on other devices than CPU.

Imports nothing of Transformers. Legend: T tokens, K experts per token, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from vllm_graft import exact
from vllm_graft.experts import by_expert, expert_products, of_tokens

_Functions = dict[Callable[..., Any], Callable[..., torch.Tensor]]
_ACTIVATIONS: _Functions = {torch.sigmoid: exact.sigmoid, torch.Tensor.sigmoid: exact.sigmoid}
_PRODUCTS: _Functions = {F.linear: exact.linear}


def correct_experts(model: nn.Module) -> None:
    """Give Transformers' experts in `model`, and what routes to them, a forward for any batch."""
    for block, experts in _mixtures(model):
        for router in filter(_is_router, block.modules()):
            router.forward = partial(_run_router, router.forward)
        experts.forward = partial(_experts, experts, experts.forward)
        block.forward = partial(_run_block, block.forward)


def _mixtures(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Experts that follow Transformers' interface, each behind the module that holds it."""
    for block in model.modules():
        for child in block.children():
            if _follows_interface(child):
                yield block, child


def _follows_interface(module: Any) -> bool:
    decorated = hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
    # A class that overrides the decorated forward has ideas of its own, and FP8 an interface.
    inherits = hasattr(type(module).forward, "__wrapped__")
    return decorated and inherits and module.down_proj.dtype.itemsize > 1


def _is_router(module: nn.Module) -> bool:
    """Whether it multiplies by a matrix of its own and will get no exact forward elsewhere."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or "forward" in vars(module):
        return False
    # Around an exact layer, the mode would meet its trials.
    layers = [part for part in module.modules() if type(part).forward is nn.Linear.forward]
    return not layers


class _Instead(TorchFunctionMode):
    """Calls of some functions go to others; these see no mode."""

    def __init__(self, functions: _Functions) -> None:
        super().__init__()
        self.functions = functions

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self.functions.get(func, func)(*args, **(kwargs or {}))


def _run_router(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _Instead(_ACTIVATIONS | _PRODUCTS):
        return forward(*args, **kwargs)


def _run_block(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # Shared experts may be weighed by a sigmoid here, and gpt-oss's experts have one.
    with _Instead(_ACTIVATIONS):
        return forward(*args, **kwargs)


def _experts(
    module: Any,
    forward: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What Transformers' experts compute, `[T, D]` of `[T, D]`, `[T, K]` and `[T, K]`."""
    if hidden_states.device.type != "cpu":
        return forward(hidden_states, top_k_index, top_k_weights)
    run = partial(_plain_experts if _is_plain(module) else _other_experts, module)
    experts = len(module.down_proj)
    return of_tokens(run, hidden_states, top_k_index, top_k_weights, experts)


def _is_plain(module: Any) -> bool:
    """Whether its weights are `[E, M, K]` and all there is."""
    return not (module.is_transposed or module.has_bias)


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _activate(module: Any, rows: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    return out


def _plain_experts(module: Any, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    [up] = expert_products(module, (_first(module),), rows, counts)
    [down] = expert_products(module, ("down_proj",), _activate(module, up), counts)
    return down


def _other_experts(module: Any, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    names = (_first(module), "down_proj")
    biases = tuple(f"{name}_bias" for name in names) if module.has_bias else ()
    stacks = [getattr(module, name) for name in (*names, *biases)]
    return by_expert(partial(_expert, module), rows, counts, *stacks)


def _expert(
    module: Any,
    rows: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    if module.is_transposed:
        up, down = up.t(), down.t()
    hidden = _activate(module, exact.linear(rows, up, up_bias))
    return exact.linear(hidden, down, down_bias)
