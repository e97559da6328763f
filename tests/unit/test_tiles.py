"""Products by numbers of rows that give each row the same bits, tried on this processor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from vllm_graft import exact
from vllm_graft.tiles import (
    TILE,
    Rows,
    by_rows,
    cancelling,
    fill_by_rows,
    same_order,
    trial_rows,
    try_rows,
)

SHAPES = [(64, 8), (63, 9), (128, 48), (512, 128), (1024, 1024), (3072, 64), (2048, 1024)]
"""K and M of products that take many different kernels."""


def other_way(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product, its sums cut in two places."""
    terms, half = x[:, None] * weight, x.shape[1] // 2
    return terms[..., :half].sum(-1) + terms[..., half:].sum(-1)


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    return cancelling((256, 100), torch.float64, seed=1), cancelling(
        (24, 100), torch.float64, seed=0
    )


def one_by_one(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x[:, None] * weight).sum(-1)


def test_sums_of_cancelling_numbers_are_rounding_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = (cancelling((20, 301), dtype, seed=seed).double() for seed in (1, 0))
        assert (x @ weight.t()).abs().max() < 1e-12
        assert x.abs().mean() > 0.5 and weight.abs().mean() > 0.5


def test_another_order_for_many_rows_is_noticed_and_avoided(data) -> None:
    x, weight = data

    def product(rows: torch.Tensor) -> torch.Tensor:
        return (other_way if len(rows) > 100 else one_by_one)(rows, weight)

    allowed = try_rows(product, x)
    assert allowed == Rows((1, 2, 4, 8, 16, 32, 64), None)
    assert not torch.equal(product(x), one_by_one(x, weight))
    for rows in (1, 31, 64, 65, 130, 256):
        assert torch.equal(by_rows(product, x[:rows], allowed), one_by_one(x[:rows], weight))


@pytest.mark.parametrize("rows", [0, 1, 5, 64, 70, 255])
def test_rows_are_filled_in_place(data, rows) -> None:
    x, weight = data
    seen = []

    def fill(part: torch.Tensor, room: torch.Tensor) -> None:
        seen.append(len(part))
        room.copy_(one_by_one(part, weight))

    out, allowed = torch.full((rows, 24), float("nan"), dtype=x.dtype), Rows((4, 8, 64), None)
    fill_by_rows(fill, x[:rows], out, allowed)
    assert torch.equal(out, one_by_one(x[:rows], weight))
    assert tuple(seen) == allowed.parts(rows)


def test_a_kernel_for_the_last_rows_of_odd_numbers_is_noticed(data) -> None:
    x, weight = data

    def product(rows: torch.Tensor) -> torch.Tensor:
        even = len(rows) - len(rows) % 4
        return torch.cat([one_by_one(rows[:even], weight), other_way(rows[even:], weight)])

    allowed = try_rows(product, x)
    assert (allowed.sizes[0], allowed.step) == (4, 4)
    for rows in (1, 3, 4, 97, 255):
        assert torch.equal(by_rows(product, x[:rows], allowed), one_by_one(x[:rows], weight))


def test_a_kernel_that_knows_places_is_used_row_by_row(data) -> None:
    x, weight = data

    def product(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([other_way(rows[:8], weight), one_by_one(rows[8:], weight)])

    assert try_rows(product, x) == Rows((1,), None)
    assert torch.equal(by_rows(product, x, Rows((1,), None)), other_way(x, weight))


@given(st.integers(0, 5000), st.sampled_from([
    Rows((1, 2, 4, 8, 16, 32, 512), None), Rows((16, 32, 64, 128), None), Rows((32,), None),
    Rows((1,), None), Rows((4, 8, 16, 32, 64), 4), Rows((1, 2, 4), 1),
]))  # fmt: skip
def test_parts_cover_all_rows_and_only_the_last_is_padded(rows: int, allowed: Rows) -> None:
    parts = allowed.parts(rows)
    assert sum(parts[:-1]) <= rows <= sum(parts)
    assert rows == 0 or sum(parts[:-1]) < rows
    for part in parts if rows else ():
        assert part in allowed.sizes or (allowed.step and part % allowed.step == 0)
    assert allowed.whole(rows) == (parts == (rows,))


def test_a_little_padding_is_cheaper_than_many_products() -> None:
    allowed = Rows((1, 2, 4, 8, 16, 32, 512), None)
    assert allowed.parts(1) == (1,) and allowed.parts(9) == (16,)
    assert allowed.parts(400) == (512,) and allowed.parts(70) == (32, 32, 8)


def test_trials_of_wide_products_stay_small() -> None:
    assert trial_rows(64) == 1024
    assert trial_rows(6144) == 1024
    assert trial_rows(150_000) == 2 * TILE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_gives_a_row_the_same_bits_in_any_batch(shape, dtype) -> None:
    """With numbers that show the order of additions, for numbers of rows that were not tried."""
    inputs, outputs = shape
    weight = cancelling((outputs, inputs), dtype, seed=0)
    x = cancelling((1100, inputs), dtype, seed=3)
    with torch.no_grad():
        whole = exact.linear(x, weight, None)
        for rows in (1, 2, 3, 6, 11, 13, 30, 45, 77, 90, 111, 150, 250, 303, 450, 600, 1000):
            for first in (0, 5, 41):
                part = slice(first, first + rows)
                assert torch.equal(exact.linear(x[part], weight, None), whole[part]), (rows, first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linear_trains_by_the_same_bits(dtype) -> None:
    x, weight = (cancelling((n, 1024), dtype, seed=n % 2) for n in (333, 256))
    bias, grad = torch.randn(256).to(dtype), torch.randn(333, 256).to(dtype)
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    out = exact.linear(*tensors)
    with torch.no_grad():
        assert torch.equal(out, exact.linear(*tensors))
    got = torch.autograd.grad(out, tensors, grad)
    double = [t.detach().double().requires_grad_() for t in tensors]
    want = torch.autograd.grad(F.linear(*double), double, grad.double())
    for one, other in zip(got, want, strict=True):
        assert one.dtype == dtype
        # In bf16 one rounding; in float32 those of 333 additions, the root of which is 18.
        units = 1 if dtype == torch.bfloat16 else 18
        limit = units * torch.finfo(dtype).eps * other.abs().max()
        assert (one.double() - other).abs().max() <= limit


def test_autocast_multiplies_in_its_dtype_and_keeps_the_bits() -> None:
    x, weight = torch.randn(40, 512), torch.randn(96, 512)
    with torch.autocast("cpu", torch.bfloat16):
        out = exact.linear(x, weight.requires_grad_(), None)
    assert torch.equal(out, exact.linear(x.bfloat16(), weight.bfloat16(), None))
    assert torch.autograd.grad(out.sum(), weight)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_of_heads_give_a_row_the_same_bits_in_any_batch(dtype) -> None:
    weight = cancelling((4, 128, 512), dtype, seed=0).transpose(1, 2)
    x = cancelling((300, 4, 512), dtype, seed=3)
    whole = exact.heads_product(x, weight)
    for rows in (1, 2, 5, 13, 33, 100, 299):
        assert torch.equal(exact.heads_product(x[:rows], weight), whole[:rows])


@pytest.mark.parametrize("built", [True, False], ids=["built", "not built"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_products_have_the_bits_of_linear_or_are_not_taken(
    shape, dtype, built, monkeypatch
) -> None:
    pytest.importorskip("vllm")
    from vllm_graft.kernels import packed_bf16
    from vllm_graft.serve._vllm_packed import CpuPacker

    inputs, outputs = shape
    weight = torch.nn.Parameter(cancelling((outputs, inputs), dtype, seed=0))
    x = cancelling((700, inputs), dtype, seed=3)
    if not built:
        monkeypatch.setattr(packed_bf16, "available", lambda: False)
    packer = CpuPacker(exact=True)
    kernel = packer.kernel([weight])
    if kernel is None:
        assert dtype == torch.float32 or CpuPacker(exact=False).kernel([weight]) is None
        return
    copy = kernel.pack([weight.detach()])
    with torch.no_grad():
        for fewest in (1, 4):
            packer._one_dnn._fewest = fewest
            for rows in (1, 2, 3, 11, 33, 77, 128, 303, 450, 700):
                [got] = kernel.multiply(x[:rows], None, copy.handle, [outputs])
                assert torch.equal(got, exact.linear(x[:rows], weight, None)), rows


@pytest.mark.parametrize(
    ("seconds", "fewest"),
    [
        ({1: 26, 2: 36, 4: 21, 8: 30}, 4),
        ({1: 10, 2: 10, 4: 11, 8: 14}, 1),
        ({1: 100, 2: 99, 4: 98, 8: 98}, 1),
    ],
)
def test_few_rows_are_padded_where_that_takes_less_time(seconds, fewest, monkeypatch) -> None:
    pytest.importorskip("vllm")
    from vllm_graft.serve import _vllm_packed

    class Clock:
        now = 0.0

    def run(rows: int) -> None:
        Clock.now += seconds[rows]

    monkeypatch.setattr(_vllm_packed.time, "perf_counter", lambda: Clock.now)
    kernel = _vllm_packed.OneDnn(exact=True)
    kernel.settle(run)
    assert kernel._fewest == fewest
    fast = _vllm_packed.OneDnn(exact=False)
    fast.settle(run)
    assert fast._fewest == 1  # its bits would depend on the clock


def test_another_order_of_additions_is_told_apart() -> None:
    def halves(weight: torch.Tensor):
        return lambda x: other_way(x, weight)

    assert same_order(exact.by_weight, exact.by_weight, 24, 100, torch.float32)
    assert not same_order(exact.by_weight, halves, 24, 100, torch.float32)


def test_compiled_code_is_not_shared_by_processors_of_another_kind(monkeypatch) -> None:
    """It holds what was found by trial."""
    pytest.importorskip("vllm")
    from vllm_graft.serve.adapter import model_digest

    model = torch.nn.Linear(4, 4)
    here = model_digest("Mine", model)
    assert model_digest("Mine", model) == here
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert model_digest("Mine", model) != here
