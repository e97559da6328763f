"""Graft's own bf16 products: their numbers, their bits in any batch, and how they are built."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_graft.kernels import build, packed_bf16
from vllm_graft.tiles import cancelling

needs_kernel = pytest.mark.skipif(
    not packed_bf16.available(), reason="needs AVX-512 with bf16, no AMX, and a C++ compiler"
)


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 70),
    pairs=st.integers(1, 300),
    outputs=st.lists(st.integers(1, 130), min_size=1, max_size=3),
    chunk=st.integers(1, 300).map(lambda pairs: 2 * pairs),
    with_bias=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_products_are_right_for_any_sizes(rows, pairs, outputs, chunk, with_bias, seed):
    random = torch.Generator().manual_seed(seed)
    x, *weights = (torch.randn(n, 2 * pairs, generator=random).bfloat16() for n in (rows, *outputs))
    bias = torch.randn(sum(outputs), generator=random).bfloat16() if with_bias else None
    packed = packed_bf16.pack(weights)
    got = packed_bf16.multiply(x, bias, packed.handle, outputs, chunk)
    assert [part.shape for part in got] == [(rows, count) for count in outputs]
    joined = torch.cat(weights)
    want = F.linear(x.double(), joined.double(), None if bias is None else bias.double())
    # One rounding to bf16 (half a unit of 2**-7), and float32 sums of up to 600 products.
    assert ((torch.cat(got, -1) - want).abs() <= 2**-8 * want.abs() + 1e-4 * pairs**0.5).all()


@needs_kernel
@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    pairs=st.integers(1, 100),
    outputs=st.lists(st.integers(1, 70), min_size=1, max_size=2),
    seed=st.integers(0, 1 << 30),
)
def test_experts_multiply_their_own_rows(counts, pairs, outputs, seed):
    random = torch.Generator().manual_seed(seed)
    weights = [
        [torch.randn(count, 2 * pairs, generator=random).bfloat16() for count in outputs]
        for _ in counts
    ]
    x = torch.randn(sum(counts), 2 * pairs, generator=random).bfloat16()
    packed = packed_bf16.pack([weight for own in weights for weight in own])
    got = packed_bf16.multiply_experts(x, torch.tensor(counts), packed.handle, outputs, 64)
    for own, *results in zip(weights, *(part.split(counts) for part in got), strict=True):
        alone = packed_bf16.pack(own)
        rows = x[: len(results[0])]
        x = x[len(rows) :]
        want = packed_bf16.multiply(rows, None, alone.handle, outputs, 64)
        assert all(map(torch.equal, results, want))


@needs_kernel
@pytest.mark.parametrize("outputs", [[32], [33, 1, 64]])
def test_packed_weights_are_unpacked_bit_by_bit(outputs):
    weights = [torch.randn(count, 64).bfloat16() for count in outputs]
    weights[0][0, :2] = torch.tensor([-0.0, float("nan")])
    got = packed_bf16.unpack(packed_bf16.pack(weights), outputs)
    for one, other in zip(got, weights, strict=True):
        assert torch.equal(one.view(torch.int16), other.view(torch.int16))


@needs_kernel
@pytest.mark.parametrize("inputs", [64, 1024, 3072])
def test_a_row_has_the_same_bits_in_any_batch(inputs):
    weight = cancelling((200, inputs), torch.bfloat16, seed=0)
    x = cancelling((1100, inputs), torch.bfloat16, seed=1)
    packed = packed_bf16.pack([weight])
    [whole] = packed_bf16.multiply(x, None, packed.handle, [200], 512)
    for rows in (*range(1, 40), 100, 255, 256, 257, 1000):
        for first in (0, 1, 37):
            part = slice(first, first + rows)
            [got] = packed_bf16.multiply(x[part], None, packed.handle, [200], 512)
            assert torch.equal(got, whole[part]), (rows, first)


@needs_kernel
def test_the_number_of_threads_changes_no_bit():
    weight = cancelling((200, 1024), torch.bfloat16, seed=0)
    x = cancelling((300, 1024), torch.bfloat16, seed=1)
    packed, results = packed_bf16.pack([weight]), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += packed_bf16.multiply(x, None, packed.handle, [200], 512)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_kernel
@pytest.mark.parametrize("parts", [(4096,), (2048, 1024, 1024), (100, 7)])
@pytest.mark.parametrize("inputs", [256, 1024, 2048, 3072])
def test_a_chunk_is_found_that_gives_the_bits_of_linear(parts, inputs):
    pytest.importorskip("vllm")
    from vllm_graft.serve._vllm_packed import chunk_as_linear

    chunk = chunk_as_linear(parts, inputs)
    assert chunk is not None
    random = torch.Generator().manual_seed(7)
    weight, x = (torch.randn(n, inputs, generator=random).bfloat16() for n in (sum(parts), 64))
    packed = packed_bf16.pack(weight.split(parts))
    got = packed_bf16.multiply(x, None, packed.handle, parts, chunk)
    assert all(map(torch.equal, got, [F.linear(x, part) for part in weight.split(parts)]))


@needs_kernel
def test_input_that_cannot_be_multiplied_is_refused():
    packed = packed_bf16.pack([torch.zeros(32, 64, dtype=torch.bfloat16)])
    op = torch.ops.vllm_graft.packed_bf16
    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    for wrong, chunk in ((x[:, :63].contiguous(), 64), (x, 0), (x, 3), (x.t(), 64)):
        with pytest.raises(RuntimeError, match="must be contiguous, inputs and chunk even"):
            op(wrong, None, packed.handle, [32], chunk)
    for counts in ([3], [5, -1]):
        with pytest.raises(RuntimeError, match="must add up to the 4 rows"):
            packed_bf16.multiply_experts(x, torch.tensor(counts), packed.handle, [32], 64)
    assert not packed_bf16.takes(torch.zeros(4, 63, dtype=torch.bfloat16))
    assert not packed_bf16.takes(torch.zeros(4, 64))


OPERATOR = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
int64_t answer(torch::stable::Tensor) { return 42; }
STABLE_TORCH_LIBRARY_FRAGMENT(graft_test, m) { m.def("answer(Tensor x) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(graft_test, CPU, m) { m.impl("answer", TORCH_BOX(&answer)); }
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vllm_graft"


def test_operators_are_built_once(tmp_path, cache, monkeypatch):
    source = tmp_path / "answer.cpp"
    source.write_text(OPERATOR)
    assert build.load_operators(source, flags=())
    assert torch.ops.graft_test.answer(torch.zeros(1)) == 42
    [made] = cache.iterdir()
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    load = f"""
from pathlib import Path
from vllm_graft.kernels import build
build._compile = None
assert build.load_operators(Path({str(source)!r}), flags=())
"""
    subprocess.run([sys.executable, "-c", load], check=True)
    assert list(cache.iterdir()) == [made]


def test_without_a_compiler_there_are_none(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not build.load_operators(tmp_path / "any.cpp", flags=())
    assert not cache.exists()


def test_what_does_not_compile_is_reported_and_leaves_nothing(tmp_path, cache, caplog):
    source = tmp_path / "broken.cpp"
    source.write_text("int main( {")
    assert not build.load_operators(source, flags=())
    assert "broken.cpp: not built" in caplog.text
    assert "error" in caplog.text
    assert list(cache.iterdir()) == []
