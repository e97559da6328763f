"""A model's forward as one graph, written down while it runs.

The compiler reads Python; a model that counts in Python, looks at frames or answers calls by
modes is beyond it. Such a forward runs once on stand-ins without numbers, and every operation
that reaches a kernel is noted. The notes are a function of straight-line code, which the compiler
reads like any other.

In exact mode compiled bits are eager bits (`eager_kernels.py`).

Legend: T tokens, D width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sympy import Eq, Integer, Symbol
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from vllm_graft.exact import recording
from vllm_graft.serve.eager_kernels import NotRecordableError, keep_eager_kernels
from vllm_graft.weights.slots import slots, tensor_in

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_TOKENS = 7
"""Of the run that is written down."""
_TORCH = os.path.dirname(torch.__file__)


class Recording:
    """`(input_ids [T], positions [T]) -> hidden [T, D]`: straight-line code on the model's weights.

    Attributes:
        source: the code.
    """

    def __init__(self, model: nn.Module, graph: fx.GraphModule) -> None:
        # Weights are looked up in the model at every step: an optimizer or a load may exchange
        # them. What else the forward read (tables, handles of packed weights) is held.
        self.model = model
        for node in graph.graph.find_nodes(op="get_attr"):
            if not node.target.startswith("model."):
                setattr(self, node.target, getattr(graph, node.target))
        code = graph.graph.python_code("self")
        self.source: str = code.src
        made: dict[str, Any] = dict(code.globals)
        exec(compile(self.source, "<string>", "exec"), made)  # noqa: S102 - fx wrote it just now
        self._run: Any = made["forward"]

    @property
    def digest(self) -> str:
        """Of the code."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run it."""
        hidden: torch.Tensor = self._run(self, input_ids, positions)
        return hidden


def record(
    model: nn.Module, forward: Forward, ids: torch.dtype, *, most: int, exact: bool
) -> Recording:
    """Write down `forward`, a serving forward of `model`, which computes nothing meanwhile.

    Args:
        forward: takes token ids and positions `[T]`.
        ids: dtype of token ids.
        most: tokens that a step may have.
        exact: let eager kernels compute what compiled code would round in another way.

    Raises:
        NotRecordableError: with the reason.
    """
    device = next(model.parameters()).device
    with torch.inference_mode(False), torch.no_grad(), recording(), _left_as_it_is(model):
        like = (
            torch.zeros(_TOKENS, dtype=ids, device=device),
            torch.arange(_TOKENS, device=device),
        )
        try:
            written = _write_down(forward, like)
            _check_sizes(written, _asked_by_python(written), most)
            # What nothing reads is gone, and what it asked of sizes with it: masks, mostly.
            written.graph.eliminate_dead_code()
            written.recompile()
            graph = _write_down(written, like)
        except NotRecordableError:
            raise
        except Exception as error:
            raise NotRecordableError(f"{type(error).__name__}: {error}") from error
    _check_sizes(graph, _guards(graph), most)
    _find_weights(graph, model)
    if exact:
        keep_eager_kernels(graph.graph)
    return Recording(model, graph)


def _write_down(forward: Forward, like: tuple[torch.Tensor, torch.Tensor]) -> fx.GraphModule:
    def run(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return forward(tokens, positions)

    graph: fx.GraphModule
    # Models may hold compiled functions, which run eagerly here.
    with torch._dynamo.config.patch(error_on_nested_fx_trace=False):
        graph = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*like)
    return graph


@contextmanager
def _left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Take back what a forward keeps in its modules: here that has no numbers.

    Raises:
        NotRecordableError: a tensor was kept, which a graph would not do.
    """
    kept = [vars(module) for module in model.modules()]
    kept += [held for module in model.modules() for held in (module._parameters, module._buffers)]
    before = [dict(held) for held in kept]
    try:
        yield
    finally:
        fakes = [n for held in kept for n, value in held.items() if isinstance(value, FakeTensor)]
        for held, was in zip(kept, before, strict=True):
            held.clear()
            held.update(was)
    if fakes:
        raise NotRecordableError(f"its forward keeps a tensor as {fakes[0]}")


def _asked_by_python(graph: fx.GraphModule) -> list[Any]:
    """What the model's own code asked of the number of tokens."""
    return [guard for guard in _guards(graph) if not _in_torch(guard.sloc.framework_loc)]


def _guards(graph: fx.GraphModule) -> list[Any]:
    made: Any = graph  # make_fx leaves its notes here
    guards: list[Any] = made.shape_env.guards
    return guards


def _in_torch(place: Any) -> bool:
    return str(getattr(place, "filename", place)).startswith(_TORCH)


def _check_sizes(graph: fx.GraphModule, guards: Iterable[Any], most: int) -> None:
    """Refuse a graph that is right for some numbers of tokens only.

    Args:
        guards: what was assumed of their number.
        most: tokens that a step may have.

    Raises:
        NotRecordableError: an assumption does not hold for all.
    """
    for node in graph.graph.nodes:
        if free_unbacked_symbols(node.meta.get("val")):
            raise NotRecordableError(f"the size of {node.name} follows from values")
    for guard in guards:
        telling = _telling(guard.expr, most)
        broken = [n for n in telling if not _with_tokens(guard.expr, Integer(n))]
        if broken:
            raise NotRecordableError(_why(guard, broken[0]))


def _with_tokens(assumed: Any, count: Any) -> Any:
    return assumed.xreplace(dict.fromkeys(assumed.free_symbols, count))


def _why(guard: Any, count: int) -> str:
    tokens = Symbol("T")
    assumed = _with_tokens(guard.expr, tokens)
    if assumed == Eq(tokens, _TOKENS):
        return f"{guard.sloc} fixes the number of tokens, as len(x) does and x.shape[0] does not"
    return f"{guard.sloc} asks for {assumed} of T tokens, which a step of {count} does not give"


def _telling(assumed: Any, most: int) -> list[int]:
    """Numbers of tokens, 2 to `most`, among them those around every number in `assumed`."""
    named = {int(n) + d for n in assumed.atoms(Integer) for d in (-1, 0, 1)}
    return sorted(n for n in {2, 3, most, *named} if 2 <= n <= most)


def _find_weights(graph: fx.GraphModule, model: nn.Module) -> None:
    """Name what the model holds as the model does: `model.layers.0.norm.weight`."""
    names = {id(tensor): name for name, tensor in _held(model)}
    for node in graph.graph.find_nodes(op="get_attr"):
        name = names.get(id(getattr(graph, node.target)))
        if name is not None:
            node.target = f"model.{name}"


def _held(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tables that modules keep as plain attributes, then buffers and parameters."""
    for prefix, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield f"{prefix}.{attribute}" if prefix else attribute, value
    for name, slot in reversed(slots(model).items()):
        yield name, tensor_in(slot)
