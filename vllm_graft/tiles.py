"""Products that give a row the same bits among any others: by numbers of rows that were tried.

Kernels choose in what order they add by the number of rows. MKL has several orders for float32,
oneDNN cuts long sums in other places where a processor has AMX, and PyTorch takes a kernel of its
own for small bf16 products. Which numbers of rows go together depends on the processor, the
sizes and the releases. So it is tried, once for every size of product, with numbers whose products
cancel: what remains is rounding, and another order of additions shows in its first digits.

`TILE` rows are what all are compared with. Torch only. Legend: R rows, K inputs, M outputs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

TILE = 32
_SIZES = (1, 2, 4, 8, 16, TILE, 64, 128, 256, 512, 1024)
_STEPS = (1, 2, 4, 8, 16)
_COUNTS = (3, 5, 7, 9, 12, 17, 33, 47, 96, 131, 200, 321, 700)
"""Numbers of rows that are no powers of two, by which a step is tried."""
_LARGEST = 1 << 23
"""Outputs of a trial, in numbers: above it, larger sizes are not tried and not used."""
_LARGEST_WEIGHT = 1 << 27
"""A weight with more numbers is not tried at all, and multiplied by `TILE` rows."""
_SHIFT = 7
_LINE = 64
"""Bytes of a cache line, on which PyTorch's own tensors begin."""

Product = Callable[[torch.Tensor], torch.Tensor]
"""`[R, K]` to `[R, M]`."""
ByWeight = Callable[[torch.Tensor], Product]
"""The product by a weight `[M, K]`."""


@dataclass(frozen=True)
class Rows:
    """With how many rows a product gives each of them the bits it has among `TILE`."""

    sizes: tuple[int, ...]
    """Powers of two that do; `(1,)` where even the place among `TILE` rows matters."""
    step: int | None
    """All multiples of it do, as far as tried; None where only some do."""

    def parts(self, rows: int) -> tuple[int, ...]:
        """The products to make of `rows` rows; the last may have room for more."""
        if self.step is None:
            return _cheapest(rows, self.sizes)
        most = self.sizes[-1]
        rest = rows % most
        padded = (rest + -rest % self.step,) if rest or not rows else ()
        return (most,) * (rows // most) + padded

    def whole(self, rows: int) -> bool:
        """Whether `rows` rows need neither cutting nor padding."""
        return self.parts(rows) == (rows,)


@functools.lru_cache(maxsize=1 << 14)
def _cheapest(rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """`rows` cut to `sizes`, largest first.

    A product of few rows costs about as much as one of `TILE` more, since it reads the weights.
    """
    padded = min((size for size in sizes if size >= rows), default=None)
    smaller = max((size for size in sizes if size < rows), default=None)
    if smaller is None or padded == rows:
        return (0,) if rows == 0 else (padded or rows,)
    rest = rows % smaller
    parts = (smaller,) * (rows // smaller) + (_cheapest(rest, sizes) if rest else ())
    if padded is not None and padded + TILE <= sum(parts) + TILE * len(parts):
        return (padded,)
    return parts


def by_rows(product: Product, x: torch.Tensor, allowed: Rows) -> torch.Tensor:
    """`product(x)`, made of products that `allowed` has; rows along dim 0."""
    pieces, first = [], 0
    for size in allowed.parts(x.shape[0]):
        pieces.append(_padded_product(product, x[first : first + size], size))
        first += size
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def fill_by_rows(
    fill: Callable[[torch.Tensor, torch.Tensor], None],
    x: torch.Tensor,
    out: torch.Tensor,
    allowed: Rows,
) -> None:
    """As `by_rows`, by a kernel that takes rows and where their results go, `[R, M]`."""
    parts, first = allowed.parts(len(x)), 0
    if parts == (len(x),):
        fill(x, out)
        return
    for size in parts:
        part, room = x[first : first + size], out[first : first + size]
        if len(part) == size:
            fill(part, room)
        else:
            padded = out.new_empty(size, out.shape[1])
            fill(F.pad(part, (0, 0, 0, size - len(part))), padded)
            room.copy_(padded[: len(part)])
        first += size


def aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy where it does not begin on a cache line: MKL may then add in another order."""
    return x if x.data_ptr() % _LINE == 0 else x.clone()


def _padded_product(product: Product, x: torch.Tensor, size: int) -> torch.Tensor:
    rows = x.shape[0]
    if rows == size:
        return product(aligned(x))
    return product(F.pad(x, (0, 0) * (x.dim() - 1) + (0, size - rows)))[:rows]


def try_rows(product: Product, x: torch.Tensor) -> Rows:
    """What `product` allows.

    Args:
        x: `cancelling` rows, as many as are to be tried.
    """
    want = torch.cat([product(tile) for tile in x.split(TILE)])

    def agrees(count: int, first: int = 0) -> bool:
        rows = slice(first, first + count)
        return torch.equal(product(aligned(x[rows])), want[rows])

    def multiples_agree(step: int) -> bool:
        padded = {count + -count % step for count in _COUNTS}
        return all(agrees(count) for count in sorted(padded) if count <= len(x))

    if not agrees(TILE, first=_SHIFT):
        return Rows((1,), None)
    tried = [size for size in _SIZES if size <= len(x)]
    sizes = tuple(size for size in tried if all(map(agrees, [size] * 2, (0, TILE - size % TILE))))
    steps = [s for s in _STEPS if set(sizes).issuperset(size for size in tried if size >= s)]
    return Rows(sizes, next(filter(multiples_agree, steps), None))


def trial_rows(outputs: int) -> int:
    """How many rows to try for a product with so many outputs, a multiple of `TILE`."""
    fitting = [size for size in _SIZES if size > TILE and size * outputs <= _LARGEST]
    return max(fitting, default=2 * TILE)


def cancelling(shape: Sequence[int], dtype: torch.dtype, *, seed: int) -> torch.Tensor:
    """Random numbers `[..., K]` whose products along K with others of these cancel.

    One half of K repeats the other, negated where `seed` is odd, in an order that all share.
    """
    *lead, width = shape
    random = torch.Generator().manual_seed(seed)
    half = torch.randn(*lead, width // 2, generator=random)
    both = torch.cat([half, -half if seed % 2 else half], dim=-1)
    order = torch.randperm(both.shape[-1], generator=torch.Generator().manual_seed(0))
    return F.pad(both[..., order], (0, width % 2)).to(dtype)


@functools.cache
def linear_rows(
    by_weight: ByWeight, outputs: int, inputs: int, dtype: torch.dtype, threads: int
) -> Rows:
    """`try_rows` of products by a weight `[M, K]`.

    Args:
        by_weight: a function that lives as long as the process.
        outputs: M; inputs: K.
        threads: PyTorch's; kernels choose by them too.
    """
    if outputs * inputs > _LARGEST_WEIGHT:
        return Rows((TILE,), None)
    with torch.inference_mode(False), torch.no_grad():
        product = by_weight(cancelling((outputs, inputs), dtype, seed=0))
        return try_rows(product, cancelling((trial_rows(outputs), inputs), dtype, seed=1))


def circumstances() -> str:
    """What trials depend on besides sizes; compiled code holds their results."""
    kind = torch.backends.cpu.get_cpu_capability()
    amx = torch.cpu._is_amx_tile_supported()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    return f"{kind}|{amx}|{limit}|{torch.get_num_threads()}"


def same_order(
    one: ByWeight, other: ByWeight, outputs: int, inputs: int, dtype: torch.dtype
) -> bool:
    """Whether two products by a weight `[M, K]` add in one order, tried with `TILE` rows."""
    with torch.inference_mode(False), torch.no_grad():
        weight, x = telling(outputs, inputs, dtype)
        return torch.equal(one(weight)(x), other(weight)(x))


def telling(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight `[M, K]` and `TILE` rows whose product tells in what order it was added."""
    weight = cancelling((outputs, inputs), dtype, seed=0)
    return weight, cancelling((TILE, inputs), dtype, seed=1)
