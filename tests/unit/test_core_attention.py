"""CoreAttention against a float64 reference: forward, gradients, packing, leaks."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.support import reference_attention, relative_error
from vllm_graft import CoreAttention, packed
from vllm_graft.attention.kernels import AttentionSpec, attend, sdpa_packed
from vllm_graft.positions import TokenBatch, running

# fp32: a few ulp times sqrt(length); bf16: inputs and outputs carry 8 bits of mantissa.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LENGTHS = (1, 7, 33, 130)


def qkv(heads: int, kv_heads: int, dtype: torch.dtype, head_dim: int = 64, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)

    def make(n: int) -> torch.Tensor:
        return torch.randn(tokens, n, head_dim, generator=generator).to(dtype).requires_grad_()

    return make(heads), make(kv_heads), make(kv_heads)


def borders(lengths=LENGTHS) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (8, 1)])
def test_forward_and_gradients_match_float64(dtype, window, heads, kv_heads):
    scale = 0.21  # not the default 1/8
    module = CoreAttention(heads, kv_heads, 64, scale=scale, sliding_window=window)
    inputs = qkv(heads, kv_heads, dtype)
    out = module(*inputs, cu_seqlens=borders())
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad((out.float() * weight).sum(), inputs)

    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = reference_attention(*exact, LENGTHS, scale, window)
    want_grads = torch.autograd.grad((want * weight.double()).sum(), exact)

    assert relative_error(out, want) < TOLERANCE[dtype]
    for got, wanted in zip(grads, want_grads, strict=True):
        assert relative_error(got, wanted) < TOLERANCE[dtype]


EXTRAS = {
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": (0.5, 0.25, 0.1, 0.02)},
    "sinks": {"has_sinks": True},
    "all": {"softcap": 2.0, "alibi_slopes": (0.5, 0.25, 0.1, 0.02), "has_sinks": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("head_dim", [64, 40])  # 40: without the engine's kernel
def test_softcap_alibi_and_sinks_match_float64(dtype, window, extra, head_dim):
    options = EXTRAS[extra]
    module = CoreAttention(4, 2, head_dim, scale=0.21, sliding_window=window, **options)
    inputs = list(qkv(4, 2, dtype, head_dim))
    sinks = torch.tensor([1.0, -1.0, 3.0, 0.5], dtype=dtype, requires_grad=True)
    named = {"sinks": sinks} if module.has_sinks else {}
    out = module(*inputs, cu_seqlens=borders(), **named)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    leaves = [*inputs, *named.values()]
    grads = torch.autograd.grad((out.float() * weight).sum(), leaves)

    exact = [x.detach().double().requires_grad_() for x in leaves]
    want = reference_attention(
        *exact[:3], LENGTHS, 0.21, window, options.get("softcap"), options.get("alibi_slopes"),
        exact[3] if named else None,
    )  # fmt: skip
    want_grads = torch.autograd.grad((want * weight.double()).sum(), exact)

    assert relative_error(out, want) < TOLERANCE[dtype]
    for got, wanted in zip(grads, want_grads, strict=True):
        assert relative_error(got, wanted) < TOLERANCE[dtype]


def test_narrow_values_are_padded_and_cut():
    q, k, v = qkv(4, 2, torch.float32)
    module = CoreAttention(4, 2, 64)
    narrow = module(q, k, v[..., :24], cu_seqlens=borders())
    assert torch.equal(narrow, module(q, k, v, cu_seqlens=borders())[..., :24])


@pytest.mark.parametrize("sinks", [None, torch.zeros(2)])
def test_sinks_are_asked_for_by_count(sinks):
    with pytest.raises(ValueError, match=r"sinks .*, expected \(4,\)"):
        CoreAttention(4, 2, 64, has_sinks=True)(*qkv(4, 2, torch.float32), sinks=sinks)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"softcap": 0.0}, "softcap=0.0"), ({"alibi_slopes": (1.0,)}, "1 alibi_slopes")],
)
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        CoreAttention(4, 2, 64, **wrong)


def test_sdpa_path_matches_float64_where_the_kernel_has_no_head_size():
    inputs = qkv(4, 2, torch.float32, head_dim=40)
    out = CoreAttention(4, 2, 40)(*inputs, cu_seqlens=borders())
    want = reference_attention(*(x.double() for x in inputs), LENGTHS, 40**-0.5)
    assert relative_error(out, want) < TOLERANCE[torch.float32]


def test_rows_of_a_batch_are_separate_samples():
    q, k, v = (x.detach().view(2, 9, -1, 64) for x in qkv(4, 2, torch.float32, lengths=(18,)))
    module = CoreAttention(4, 2, 64)
    both = module(q, k, v)
    assert torch.equal(both[1], module(q[1], k[1], v[1]))


def test_packed_context_equals_explicit_borders():
    inputs = qkv(4, 2, torch.float32)
    module = CoreAttention(4, 2, 64)
    with packed(borders()):
        in_context = module(*inputs)
    assert torch.equal(in_context, module(*inputs, cu_seqlens=borders()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5])
def test_changing_one_sample_leaves_the_others_bit_identical(dtype, window):
    module = CoreAttention(8, 2, 64, sliding_window=window)
    inputs = qkv(8, 2, dtype)
    changed = [x.detach().clone() for x in inputs]
    victim = slice(LENGTHS[0] + LENGTHS[1], sum(LENGTHS[:3]))
    for x in changed:
        x[victim] += 1.0
    results = []
    for leaves in (inputs, [x.requires_grad_() for x in changed]):
        out = module(*leaves, cu_seqlens=borders())
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
        results.append((out.detach(), *grads))
    keep = torch.ones(sum(LENGTHS), dtype=torch.bool)
    keep[victim] = False
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[keep], after[keep])
        assert not torch.equal(before[victim], after[victim])


def test_dropout_acts_in_training_only():
    inputs = qkv(4, 2, torch.float32)
    module = CoreAttention(4, 2, 64, dropout=0.5)
    torch.manual_seed(0)
    dropped = module.train()(*inputs, cu_seqlens=borders())
    plain = module.eval()(*inputs, cu_seqlens=borders())
    assert not torch.allclose(dropped, plain)
    assert torch.equal(plain, CoreAttention(4, 2, 64)(*inputs, cu_seqlens=borders()))


def test_engine_kernel_and_sdpa_agree():
    inputs = qkv(8, 2, torch.float32)
    spec = AttentionSpec(scale=0.125)
    kernel = attend(*inputs, borders(), spec)
    # Two float32 summation orders over at most 130 keys.
    assert relative_error(kernel, sdpa_packed(*inputs, borders(), spec)) < 1e-5


def test_without_vllm_the_sdpa_path_is_the_forward(monkeypatch):
    inputs = qkv(8, 2, torch.float32)
    spec = AttentionSpec(scale=0.125)
    monkeypatch.setattr("vllm_graft.attention.kernels.find_spec", lambda name: None)
    without = attend(*inputs, borders(), spec)
    assert torch.equal(without, sdpa_packed(*inputs, borders(), spec))


def test_it_has_no_parameters_and_copies_are_unbound():
    module = CoreAttention(4, 2, 64)
    module.bind(lambda q, k, v: q)
    assert not module.state_dict()
    assert copy.deepcopy(module)._paged is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, "num_heads=6 is not a multiple of num_kv_heads=4"),
        ({"num_heads": 4, "dropout": 1.0}, "dropout=1.0"),
        ({"num_heads": 4, "sliding_window": 0}, "sliding_window=0"),
    ],
)
def test_bad_construction_is_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        CoreAttention(**arguments)


def test_wrong_shapes_are_refused_with_both():
    q, k, v = qkv(4, 4, torch.float32)
    with pytest.raises(ValueError, match=r"expects q .*, 4, 64.*got q \(171, 4, 64\), k \(171, 4"):
        CoreAttention(4, 2, 64)(q, k, v)


@pytest.mark.parametrize("bad", [[0, 5], [1, 171], [0, 9, 3, 171], [171]])
def test_bad_borders_are_refused(bad):
    inputs = qkv(4, 2, torch.float32)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0"):
        CoreAttention(4, 2, 64)(*inputs, cu_seqlens=torch.tensor(bad))


@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing_recomputes_inside_the_packed_block_or_raises(inside):
    from torch.utils.checkpoint import checkpoint

    module, inputs = CoreAttention(4, 2, 64), qkv(4, 2, torch.float32)
    want = torch.autograd.grad(module(*inputs, cu_seqlens=borders()).square().sum(), inputs)
    with packed(borders()):
        out = checkpoint(module, *inputs, use_reentrant=False)
        if inside:
            got = torch.autograd.grad(out.square().sum(), inputs)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    if not inside:
        with pytest.raises(RuntimeError, match=r"call backward\(\) inside the block"):
            torch.autograd.grad(out.square().sum(), inputs)


def test_checkpointing_of_plain_batches_needs_no_block():
    from torch.utils.checkpoint import checkpoint

    module, inputs = CoreAttention(4, 2, 64), qkv(4, 2, torch.float32)
    with packed(borders()):
        module(*inputs)
    out = checkpoint(module, *inputs, use_reentrant=False)
    assert all(g is not None for g in torch.autograd.grad(out.sum(), inputs))


def test_an_unbound_module_does_not_run_in_the_engine():
    inputs = qkv(4, 2, torch.float32)
    batch = TokenBatch(positions=torch.arange(171), serving=True)
    with running(batch), pytest.raises(RuntimeError, match="without a KV cache runs in the engine"):
        CoreAttention(4, 2, 64)(*inputs)


def test_no_tokens_give_no_output():
    empty = torch.zeros(0, 4, 64)
    assert CoreAttention(4, 4, 64)(empty, empty, empty).shape == (0, 4, 64)


def test_two_checkpointed_blocks_before_one_backward_are_refused():
    """Recomputed inside the second block, the first would get the borders of the second."""
    from torch.utils.checkpoint import checkpoint

    module, inputs = CoreAttention(4, 2, 64), qkv(4, 2, torch.float32)
    with torch.no_grad(), packed([0, 100, 171]):
        module(*inputs)  # reference log-probs: no backward, so no matter
    with packed(borders()):
        first = checkpoint(module, *inputs, use_reentrant=False).sum()
        torch.autograd.grad(first, inputs)  # accumulated the right way: each in its block
    with packed([0, 100, 171]):
        second = checkpoint(module, *inputs, use_reentrant=False).sum()
        torch.autograd.grad(second, inputs)
        second = checkpoint(module, *inputs, use_reentrant=False).sum()
    with packed(borders()):
        both = second + checkpoint(module, *inputs, use_reentrant=False).sum()
        with pytest.raises(RuntimeError, match=r"in several such blocks before one backward"):
            torch.autograd.grad(both, inputs)
