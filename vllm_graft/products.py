"""Linear layers that serve together, and by packed copies of their weights.

Layers that read the same input share one product. Where a fast kernel wants weights in a
layout of its own, they share a packed copy, made anew when they changed; a process that
only serves can give back the memory of what is packed. Elsewhere (`joined.py`) their weights
lie in one storage. The parameters stay, one for each layer under its own name.

Torch only: who packs is an argument. Legend: `[..., K]` inputs, `[..., M]` outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

ATTRIBUTE = "graft_packed"
_STACKS = "graft_stacks"


class Copy(Protocol):
    """Packed weights, owned by who multiplies by them."""

    @property
    def handle(self) -> torch.Tensor:
        """What `multiply` takes, `[1]` int64."""


class Kernel(Protocol):
    """Multiplies by packed weights that share their input."""

    def pack(self, weights: Sequence[torch.Tensor]) -> Copy:
        """A packed copy of weights `[M, K]`, or of stacks of them, `[E, M, K]`."""

    def unpack(self, copy: Any, like: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The weights that `copy` was made of, in the shapes and dtype of `like`."""

    def multiply(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        handle: torch.Tensor,
        outputs: Sequence[int],
        counts: torch.Tensor | None = None,
    ) -> Sequence[torch.Tensor]:
        """`[..., K]` to `[..., M]` for each weight; no gradient.

        Args:
            x: any number of rows.
            bias: of all weights, one behind the other.
            handle: of the packed copy.
            outputs: M of each weight.
            counts: `[E]`: rows of each expert, one expert after the other, for stacks.
        """


class Packer(Protocol):
    """Knows how to multiply by packed weights (`serve._vllm_packed` has one)."""

    def kernel(self, weights: Sequence[torch.Tensor]) -> Kernel | None:
        """For one product by all `weights`; None where it has other bits.

        Other than `exact.linear` by each of them, that is.
        """

    def settle(self, copies: Sequence[Packed]) -> None:
        """Once all is packed: `copies` may be rehearsed, to time them."""


class _State:
    # Plain attributes: torch.compile traces reads of them.
    serving = False
    calls: list[Call] | None = None
    looks = 0


class Stack:
    """Weights of experts as a layer that can be packed: parameter `name`, `[E, M, K]`."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.held = module._parameters
        self.name = name

    @property
    def weight(self) -> Any:
        """The parameter."""
        return self.held[self.name]


@dataclass(frozen=True)
class Call:
    """A product that ran: the layer, its input and whether its bias was added."""

    module: Any
    x: torch.Tensor
    with_bias: bool


@contextmanager
def serving() -> Iterator[None]:
    """Multiply by packed copies in the block, where no gradient is wanted."""
    before, _State.serving = _State.serving, True
    try:
        yield
    finally:
        _State.serving = before


@contextmanager
def watching() -> Iterator[list[Call]]:
    """The products that run in the block, in order."""
    calls: list[Call] = []
    _State.calls = calls
    try:
        yield calls
    finally:
        _State.calls = None


def packed_product(
    module: nn.Module, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """`x @ module.weight.T + bias`, where a packed copy may serve; else None."""
    if _State.calls is not None:
        _State.calls.append(Call(module, x, bias is not None))
    place = _serving_place(module)
    return None if place is None else place.packed.product(place.index, x)


def packed_experts(
    module: nn.Module, names: Sequence[str], x: torch.Tensor, counts: torch.Tensor
) -> Sequence[torch.Tensor] | None:
    """Rows of experts times stacks of weights, where a packed copy may serve; else None.

    Args:
        module: holds the stacks.
        names: of parameters `[E, M, K]` that read the same input.
        x: `[R, K]` sorted by expert.
        counts: `[E]` int64: the rows of each expert.

    Returns:
        `[R, M]` for each of `names`.
    """
    if _State.calls is not None:
        _State.calls.extend(Call(stack_of(module, name), x, False) for name in names)
    stacks: dict[str, Stack] = getattr(module, _STACKS, {})
    place = _serving_place(stacks.get(names[0]))
    return None if place is None else place.packed.multiply(x, counts)


def _serving_place(layer: Any) -> _Place | None:
    """Where `layer` finds a packed copy to serve by; released weights come back for the rest."""
    place: _Place | None = getattr(layer, ATTRIBUTE, None)
    if place is None or (_State.serving and not torch.is_grad_enabled()):
        return place
    place.packed.restore()
    return None


def stack_of(module: nn.Module, name: str) -> Stack:
    """The one of this parameter: it keeps the place of its packed copy."""
    stacks: dict[str, Stack] = vars(module).setdefault(_STACKS, {})
    return stacks.setdefault(name, Stack(module, name))


@dataclass(frozen=True)
class _Place:
    """Where a layer finds its product."""

    packed: Group
    index: int

    def __reduce__(self) -> Any:
        # A copy of the model has no packed copies.
        return _nothing, ()


def _nothing() -> None:
    return None


class Group:
    """Layers that read the same input, and the one product by which they serve."""

    def __init__(self, members: Sequence[Call]) -> None:
        self._members: tuple[Any, ...] = tuple(call.module for call in members)
        self._with_bias = members[0].with_bias
        # Held, since vLLM's reload puts stand-ins into the modules for a while.
        self._weights: list[nn.Parameter] = [member.weight for member in self._members]
        self._rows = [weight.shape[-2] for weight in self._weights]
        self._bias: torch.Tensor | None = None
        self._seen: list[Seen] = []
        self._input: torch.Tensor | None = None
        self._outputs: Sequence[torch.Tensor] | None = None
        self.released = False
        for index, member in enumerate(self._members):
            setattr(member, ATTRIBUTE, _Place(self, index))

    def pack(self) -> None:
        """Take the weights as they are now."""
        raise NotImplementedError

    def multiply(
        self, x: torch.Tensor, counts: torch.Tensor | None = None
    ) -> Sequence[torch.Tensor]:
        """`[..., K]` to the outputs of each member; with `counts` if these are stacks."""
        raise NotImplementedError

    def product(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """`[..., M]` of member `index`; one product for all, made for the first of them."""
        outputs = self._outputs
        if outputs is None or self._input is not x:
            outputs = self.multiply(x)
            self._input, self._outputs = x, outputs
        if index == len(self._rows) - 1:
            self._input = self._outputs = None
        return outputs[index]

    def refresh(self) -> None:
        """Pack anew if a weight or bias was exchanged, moved or written by an operation."""
        if not self.released and not (self._seen and unchanged(self._seen)):
            self.pack()

    def seen(self) -> list[Seen]:
        """The weights and biases as they were packed; none while they are released."""
        return [] if self.released else self._seen

    def shares(self, weights: set[int]) -> bool:
        """Whether one of `weights`, by id, is in here."""
        return any(id(weight) in weights for weight in self._weights)

    def release(self) -> None:
        """Give back the memory of weights that have a copy here."""

    def restore(self, *, values: bool = True) -> None:
        """Take back `release`; without `values` the memory only."""

    def _look(self) -> list[Seen]:
        _State.looks += 1
        held = [slot for member in self._members for slot in _slots(member, self._with_bias)]
        return [(h, n, h[n], h[n]._version, h[n].data_ptr()) for h, n in held]

    def unpack(self) -> None:
        """Undo it all: the layers multiply by their weights again."""
        self.restore()
        for member in self._members:
            delattr(member, ATTRIBUTE)


def _slots(member: Any, with_bias: bool) -> list[tuple[dict[str, Any], str]]:
    if isinstance(member, Stack):
        return [(member.held, member.name)]
    return [
        (member._parameters, name) for name in (("weight", "bias") if with_bias else ("weight",))
    ]


class Packed(Group):
    """One packed copy of the weights of layers that read the same input."""

    def __init__(self, members: Sequence[Call], kernel: Kernel) -> None:
        super().__init__(members)
        self.kernel = kernel
        self._copy: Copy | None = None
        # Compiled code holds this very tensor.
        self._handle = torch.zeros(1, dtype=torch.int64)

    def multiply(
        self, x: torch.Tensor, counts: torch.Tensor | None = None
    ) -> Sequence[torch.Tensor]:
        """By the packed copy."""
        return self.kernel.multiply(x, self._bias, self._handle, self._rows, counts)

    def rehearse(self, rows: int) -> int:
        """Make the product with so many rows of zeros; how many bytes of weights it read."""
        weight = self._weights[0]
        inputs = weight.shape[1]
        self.multiply(torch.zeros(rows, inputs, dtype=weight.dtype))
        return sum(self._rows) * inputs * weight.itemsize

    def pack(self) -> None:
        """Pack the weights as they are now."""
        self._input = self._outputs = None
        self._weights = [member.weight for member in self._members]
        with torch.inference_mode(False), torch.no_grad():
            weights = [weight.detach() for weight in self._weights]
            self._copy = self.kernel.pack(weights)
            self._handle.copy_(self._copy.handle)
            if self._with_bias:
                bias = torch.cat([member.bias.detach() for member in self._members])
                self._bias = bias if self._bias is None else self._bias.copy_(bias)
        self._seen = self._look()

    def release(self) -> None:
        """Give back the memory of the weights; reading them then gives NaN."""
        for weight in self._weights:
            weight.data = weight.new_full((1,), float("nan")).expand(weight.shape)
        self.released = True

    def restore(self, *, values: bool = True) -> None:
        """Take back `release`; without `values` the memory only."""
        if not self.released:
            return
        self.released = False
        with torch.inference_mode(False), torch.no_grad():
            if values:
                restored = self.kernel.unpack(self._copy, self._weights)
            else:
                restored = [w.new_empty(w.shape) for w in self._weights]
            for weight, own in zip(self._weights, restored, strict=True):
                weight.data = own
        seen = self._look()
        self._seen = seen if values else []


Seen = tuple[dict[str, Any], str, torch.Tensor, int, int]
"""Where a tensor is kept, itself, its version and its address, when it was last packed."""


def unchanged(seen: list[Seen]) -> bool:
    """Whether all tensors are in their places and no operation has written into them."""
    # One loop over all weights of a model before every step: a call for each takes half as long
    # again.
    for held, name, tensor, version, address in seen:
        if held[name] is not tensor or tensor._version != version or tensor.data_ptr() != address:
            return False
    return True


def looks() -> int:
    """A number that tells when what `Group.seen` gave may be old."""
    return _State.looks


def siblings(calls: Iterable[Call], takes: Callable[[torch.Tensor], bool]) -> list[list[Call]]:
    """The layers that ran and whose weights are taken, those in a row with one input together."""
    groups: list[list[Call]] = []
    known: set[nn.Module] = set()
    for call in calls:
        if call.module in known or not takes(call.module.weight):
            continue
        known.add(call.module)
        before = groups[-1][-1] if groups else None
        if before and call.x is before.x and call.with_bias == before.with_bias:
            groups[-1].append(call)
        else:
            groups.append([call])
    return groups


def pack_products(calls: Iterable[Call], packer: Packer) -> list[Packed]:
    """Packed copies for the layers that ran."""
    groups = siblings(calls, lambda weight: packer.kernel([weight]) is not None)
    return [packed for group in groups for packed in _packed(group, packer)]


def _packed(group: list[Call], packer: Packer) -> list[Packed]:
    """One copy for all, or one for each where that has other bits."""
    together = packer.kernel([call.module.weight for call in group])
    if together is not None:
        return [Packed(group, together)]
    alone = [(call, packer.kernel([call.module.weight])) for call in group]
    return [Packed([call], kernel) for call, kernel in alone if kernel is not None]


def is_plain(weight: torch.Tensor) -> bool:
    """Whether this is a whole parameter, no shard that knows of a mesh."""
    return isinstance(weight, nn.Parameter) and type(weight.data) is torch.Tensor


def restore_weights(model: nn.Module) -> None:
    """Give the parameters of `model` their values where a serving process had released them."""
    for module in model.modules():
        for layer in (module, *vars(module).get(_STACKS, {}).values()):
            place: _Place | None = getattr(layer, ATTRIBUTE, None)
            if place is not None:
                place.packed.restore()
