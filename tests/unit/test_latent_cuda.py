"""Latent attention on a card: everything but the kernel, which a float64 reference stands for."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from tests.support import relative_error
from vllm_graft import MLAConfig, TrainableMLA
from vllm_graft.attention import latent
from vllm_graft.attention.kernels import AttentionSpec
from vllm_graft.serve import _vllm_cuda, _vllm_mla_cuda
from vllm_graft.serve.scratch import LATENT_RANK, LATENT_ROPE

LENGTHS = (1, 17, 40)
HEADS, NOPE, VALUES = 3, 24, 20
SIZES = [(512, 64), (48, 16)]
WHOLE = LATENT_RANK + LATENT_ROPE


def flash(q, k_pages, v_pages, layout, scale, version, *, causal, q_v):
    """`_vllm_cuda._flash` in float64, for one key head."""
    assert causal and version == 3
    out = torch.zeros(*q.shape[:2], v_pages.shape[-1], dtype=q.dtype)
    borders = layout.cu_seqlens.tolist()
    for sample, (start, end) in enumerate(itertools.pairwise(borders)):
        known = int(layout.lengths[sample])
        keys, values = (
            pages[layout.table[sample].long()].flatten(0, 1)[:known, 0].double()
            for pages in (k_pages, v_pages)
        )
        query = torch.cat([q, q_v], -1)[start:end].double()
        scores = torch.einsum("tnc,sc->nts", query, torch.cat([keys, values], -1)) * scale
        at = torch.arange(known - (end - start), known)[:, None]
        weights = scores.masked_fill(torch.arange(known) > at, float("-inf")).softmax(-1)
        out[start:end] = torch.einsum("nts,sr->tnr", weights, values).to(q.dtype)
    return out, None


@pytest.fixture(autouse=True)
def _kernel(monkeypatch):
    monkeypatch.setattr(_vllm_cuda, "_flash", flash)


def borders():
    return torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)


def tensors(rank, rope):
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    weight = torch.randn(HEADS * (NOPE + VALUES), rank) / rank**0.5
    sizes = [(tokens, HEADS, NOPE + rope), (tokens, rank), (tokens, rope)]
    return [*(torch.randn(size) for size in sizes), weight]


@pytest.mark.parametrize(("rank", "rope"), SIZES)
def test_training_runs_the_latent_kernel_and_differentiates_the_expanded_form(
    rank, rope, monkeypatch
):
    inputs, spec = tensors(rank, rope), AttentionSpec(scale=0.1)
    leaves = [[x.clone().requires_grad_() for x in inputs] for _ in range(2)]
    want = latent.attend_expanded(*leaves[1], borders(), spec)
    monkeypatch.setattr(latent, "_kernels", lambda device: _vllm_cuda)
    monkeypatch.setattr(_vllm_cuda, "supports_latent", lambda **sizes: True)
    got = latent.attend_latent(*leaves[0], borders(), spec)
    # Two orders of float32 sums over up to 576 numbers.
    assert relative_error(got, want) < 1e-5
    assert "EngineLatent" in type(got.grad_fn).__name__
    for ours, theirs in zip(
        torch.autograd.grad(got.square().sum(), leaves[0]),
        torch.autograd.grad(want.square().sum(), leaves[1]),
        strict=True,
    ):
        assert relative_error(ours, theirs) < 1e-5


class Stock(torch.nn.Module):
    """What the layer uses of vLLM's `MLAAttention`."""

    scale = 0.1

    def __init__(self, heads):
        super().__init__()
        self.kv_b_proj = SimpleNamespace(heads=heads)

    def update_kv_cache(self, kv_c, k_pe, cache, slots, metadata):
        assert metadata is None
        cache.view(-1, WHOLE)[slots] = torch.cat([kv_c, k_pe.squeeze(1)], -1)


@pytest.mark.parametrize(("rank", "rope"), SIZES)
def test_serving_in_chunks_gives_the_training_forward(rank, rope):
    """Every sample's last three tokens in a second step, with rows that fill a graph."""
    q, kv_c, k_pe, weight = tensors(rank, rope)
    attend = _vllm_cuda.latent_over_scratch(kv_c, k_pe, borders(), 0.1)
    heads = latent.PlainHeads(weight, q.shape[1], q.shape[2] - rope)
    want = latent.absorbed(q, heads, rope, attend)
    layout, slots, pages = _vllm_cuda._scratch(LENGTHS, q.device)
    layer = _vllm_mla_cuda.exact_layer(Stock)(heads)
    cache = torch.zeros(pages, _vllm_cuda.PAGE_SIZE, WHOLE)
    got = torch.empty_like(want)
    for rows, new, known in steps():
        common = SimpleNamespace(
            query_start_loc=torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32),
            seq_lens=torch.tensor(known, dtype=torch.int32),
            block_table_tensor=layout.table,
            max_query_len=max(new),
            max_seq_len=max(known),
            num_actual_tokens=sum(new),
        )
        padded = [torch.cat([x[rows], x[:2]]) for x in (q, kv_c, k_pe[:, None])]
        layer.update_kv_cache(kv_c[rows], k_pe[rows, None], cache, slots[rows], "metadata")
        out = torch.full((len(rows) + 2, HEADS * VALUES), torch.nan)
        layer.forward_impl(*padded, cache, _vllm_mla_cuda.pages_of(common), out)
        assert out[-2:].isnan().all()
        got[rows] = out[:-2].view(-1, HEADS, VALUES)
    assert torch.equal(got, want)


def steps():
    """Rows of two steps, and of each sample its new tokens and those that are then known."""
    parts = torch.arange(sum(LENGTHS)).split(LENGTHS)
    first = [max(n - 3, 0) for n in LENGTHS]
    rest = [n - cut for n, cut in zip(LENGTHS, first, strict=True)]
    begun = torch.cat([part[:n] for part, n in zip(parts, first, strict=True)])
    ended = torch.cat([part[n:] for part, n in zip(parts, first, strict=True)])
    return (begun, first, first), (ended, rest, LENGTHS)


def test_without_metadata_the_layer_gives_zeros():
    q, kv_c, k_pe, weight = tensors(48, 16)
    out = torch.full((len(q), HEADS * VALUES), torch.nan)
    heads = latent.PlainHeads(weight, HEADS, q.shape[2] - 16)
    layer = _vllm_mla_cuda.exact_layer(Stock)(heads)
    layer.forward_impl(q, kv_c, k_pe[:, None], torch.empty(0), None, out)
    assert not out.any()


def test_a_recorded_graph_has_one_query_at_least():
    names = ("query_start_loc", "seq_lens", "block_table_tensor", "max_seq_len")
    common = SimpleNamespace(max_query_len=0, num_actual_tokens=4, **dict.fromkeys(names))
    assert _vllm_mla_cuda.pages_of(common).layout.max_q == 1


def config(dtype=torch.bfloat16, cache="auto", **parallel):
    ways = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    return SimpleNamespace(
        model_config=SimpleNamespace(dtype=dtype),
        cache_config=SimpleNamespace(cache_dtype=cache),
        parallel_config=SimpleNamespace(**(ways | parallel)),
    )


@pytest.mark.parametrize(
    ("sizes", "settings", "text"),
    [
        ({"kv_lora_rank": 520}, {}, "kv_lora_rank=520, .*512 and 64 at the most"),
        ({"qk_rope_head_dim": 72}, {}, "qk_rope_head_dim=72"),
        ({}, {"dtype": torch.float32}, "float32: .*bfloat16 and float16"),
        ({}, {}, "compute capability 9"),
        ({}, {"cache": "fp8"}, "kv_cache_dtype='fp8'"),
        ({}, {"decode_context_parallel_size": 2}, "context parallelism"),
    ],
    ids=["rank", "rope", "dtype", "card", "cache", "ranks"],
)
def test_what_the_kernel_cannot_take_is_refused(sizes, settings, text):
    block = SimpleNamespace(config=MLAConfig(hidden_size=8, num_heads=1, **sizes))
    with pytest.raises(ValueError, match=f"{text}.*exact=False.*'vllm_graft_exact': False"):
        _vllm_mla_cuda.check_exact(block, config(**settings), "vllm_graft_exact")


def test_training_takes_the_kernel_only_in_batch_invariant_mode(monkeypatch):
    monkeypatch.setattr(_vllm_cuda, "why_no_latent", lambda **sizes: None)
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "dtype": torch.bfloat16}
    for switch in ("0", "1"):
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", switch)
        assert _vllm_cuda.supports_latent(**sizes) is (switch == "1")


def test_a_block_trains_through_the_kernel(monkeypatch):
    monkeypatch.setattr(latent, "_kernels", lambda device: _vllm_cuda)
    monkeypatch.setattr(_vllm_cuda, "supports_latent", lambda **sizes: True)
    torch.manual_seed(0)
    mla = TrainableMLA(
        MLAConfig(
            hidden_size=32, num_heads=2, kv_lora_rank=32,
            qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        )
    )  # fmt: skip
    table = torch.polar(torch.ones(9, 4), torch.rand(9, 4))
    x = torch.randn(2, 9, 32)
    grads = torch.autograd.grad(mla(x, table).square().sum(), [*mla.parameters()])
    monkeypatch.setattr(_vllm_cuda, "supports_latent", lambda **sizes: False)
    wanted = torch.autograd.grad(mla(x, table).square().sum(), [*mla.parameters()])
    for got, want in zip(grads, wanted, strict=True):
        assert relative_error(got, want) < 1e-5
