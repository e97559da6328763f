"""What `cuda_kernels.py` checks and times: layer shapes, paged caches, kernels.

Legend: T packed tokens, B samples, N query heads, K key/value heads, H head dim,
R latent rank, P rope dims.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from vllm_graft.attention.cuda import varlen, varlen_packed, varlen_parameters, window_of
from vllm_graft.attention.kernels import AttentionSpec, attend, sdpa_packed

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One attention layer."""

    name: str
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    window: int | None = None
    causal: bool = True
    latent_scale: float | None = None
    """Softmax scale of MLA in the latent space, where values are the first part of the keys."""

    @property
    def spec(self) -> AttentionSpec:
        """What the kernels need beside the tensors."""
        scale = self.latent_scale or self.qk_dim**-0.5
        return AttentionSpec(scale=scale, causal=self.causal, sliding_window=self.window)

    def flop(self, lengths: list[int], *, backward: bool = False) -> float:
        """Floating-point operations that causal attention needs: no padding, no masked half.

        Two products forward; five backward (scores again, dP, dQ, dK, dV).
        """
        pairs = self.heads * sum(n * (n + 1) / 2 for n in lengths)
        widths = 3 * self.qk_dim + 2 * self.v_dim if backward else self.qk_dim + self.v_dim
        return 2 * pairs * widths

    def cached_bytes(self, tokens: int) -> int:
        """Bytes of bf16 keys and values; latent values are part of the keys."""
        values = 0 if self.latent_scale else self.v_dim
        return 2 * tokens * self.kv_heads * (self.qk_dim + values)


def shapes(*, small: bool) -> list[Shape]:
    """Qwen3-8B (GQA) and DeepSeek V3 (MLA, expanded and latent), with MHA and MQA beside them."""
    if small:
        gqa = Shape(name="GQA", heads=4, kv_heads=2, qk_dim=32, v_dim=32)
        mla = Shape(name="MLA", heads=4, kv_heads=4, qk_dim=24, v_dim=16)
        latent = replace(mla, kv_heads=1, qk_dim=40, v_dim=32)
    else:
        gqa = Shape(name="GQA", heads=32, kv_heads=8, qk_dim=128, v_dim=128)
        mla = Shape(name="MLA", heads=128, kv_heads=128, qk_dim=192, v_dim=128)
        latent = replace(mla, kv_heads=1, qk_dim=576, v_dim=512)
    return [
        replace(gqa, name="MHA", kv_heads=gqa.heads),
        gqa,
        replace(gqa, name="MQA", kv_heads=1),
        mla,
        replace(latent, name="MLA latent", latent_scale=mla.qk_dim**-0.5),
    ]


def variants(base: list[Shape]) -> list[Shape]:
    """The same layers, and more that are checked but not timed."""
    gqa = base[1]
    return [
        *base,
        replace(gqa, name="GQA half head dim", qk_dim=gqa.qk_dim // 2, v_dim=gqa.v_dim // 2),
        replace(gqa, name="GQA window 100", window=100),
        replace(gqa, name="GQA bidirectional", causal=False),
    ]


def borders_of(lengths: list[int]) -> torch.Tensor:
    """Borders `[B + 1]` int32 on CPU."""
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)


def random_qkv(
    shape: Shape, tokens: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> Tensors:
    """Normal q, k, v of `tokens` tokens."""
    make = partial(torch.randn, device=device, dtype=dtype)
    q = make(tokens, shape.heads, shape.qk_dim)
    k = make(tokens, shape.kv_heads, shape.qk_dim)
    if shape.latent_scale:
        return q, k, k[..., : shape.v_dim]
    return q, k, make(tokens, shape.kv_heads, shape.v_dim)


def poison(like: torch.Tensor) -> None:
    """Leave NaN in freed blocks, for the next outputs of that size to land on."""
    blocks = [torch.full_like(like, torch.nan) for _ in range(4)]
    del blocks


@dataclass(frozen=True, kw_only=True)
class Pages:
    """A paged cache with its pages in random order."""

    k: torch.Tensor
    """`[pages, page size, K, H]`; v: the same with its own head dim."""
    v: torch.Tensor
    table: torch.Tensor
    """`[B, M]` int32 on CPU: the pages of every sample."""

    @classmethod
    def of(
        cls, k: torch.Tensor, v: torch.Tensor, lengths: list[int], page_size: int, fill: float
    ) -> Pages:
        """Store packed `k` and `v` (`[T, K, H]`); slots without a token hold `fill`."""
        most = -(-max(lengths) // page_size)
        table = torch.randperm(len(lengths) * most).view(len(lengths), most).to(torch.int32)
        slots = cls._slots(table, lengths, page_size).to(k.device)
        pools = []
        for x in (k, v):
            pool = x.new_full((table.numel() * page_size, *x.shape[1:]), fill)
            pool[slots] = x
            pools.append(pool.view(table.numel(), page_size, *x.shape[1:]))
        return cls(k=pools[0], v=pools[1], table=table)

    @staticmethod
    def _slots(table: torch.Tensor, lengths: list[int], page_size: int) -> torch.Tensor:
        rows = table.long()[:, :, None] * page_size + torch.arange(page_size)
        return torch.cat([row.flatten()[:n] for row, n in zip(rows, lengths, strict=True)])

    def gather(self, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed k and v of the first `lengths` tokens of every sample."""
        slots = self._slots(self.table, lengths, self.k.shape[1]).to(self.k.device)
        return self.k.flatten(0, 1)[slots], self.v.flatten(0, 1)[slots]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A training forward and the serving forward that should equal it."""

    name: str
    page_size: int
    train: Callable[..., torch.Tensor]
    """`(q, k, v, borders, spec)` of packed samples."""
    serve: Callable[[torch.Tensor, Pages, list[int], list[int], AttentionSpec], torch.Tensor]
    """`(q, pages, new, total, spec)`: the last `new` of `total` cached tokens are queries."""
    takes: Callable[[Shape], bool]
    exact: bool = True
    """Whether it promises bit equality."""
    differentiable: bool = True
    fill: float = torch.nan
    """What empty cache slots hold. The cache of vLLM holds finite numbers there."""


def serve_sdpa(
    q: torch.Tensor, pages: Pages, new: list[int], total: list[int], spec: AttentionSpec
) -> torch.Tensor:
    """Serve by scaled dot-product attention, one sample at a time."""
    k, v = pages.gather(total)
    outputs = []
    for one_q, one_k, one_v in zip(q.split(new), k.split(total), v.split(total), strict=True):
        before = one_k.shape[0] - one_q.shape[0]
        padded = F.pad(one_q, (0, 0, 0, 0, before, 0))
        whole = sdpa_packed(padded, one_k, one_v, borders_of([one_k.shape[0]]), spec)
        outputs.append(whole[before:])
    return torch.cat(outputs)


def serve_varlen(
    q: torch.Tensor, pages: Pages, new: list[int], total: list[int], spec: AttentionSpec
) -> torch.Tensor:
    """Serve by `varlen_attn`: over the block table where it has one, else gathered pages."""
    cu_q = borders_of(new).to(q.device)
    if "block_table" not in varlen_parameters():
        k, v = pages.gather(total)
        return varlen(q, k, v, cu_q, borders_of(total).to(q.device), max(new), max(total), spec)
    capacity = pages.table.shape[1] * pages.k.shape[1]
    cu_k = torch.arange(len(total) + 1, dtype=torch.int32, device=q.device) * capacity
    paged = {
        "block_table": pages.table.to(q.device),
        "seqused_k": torch.tensor(total, dtype=torch.int32, device=q.device),
    }
    return varlen(q, pages.k, pages.v, cu_q, cu_k, max(new), capacity, spec, **paged)


def serve_vllm(
    q: torch.Tensor, pages: Pages, new: list[int], total: list[int], spec: AttentionSpec
) -> torch.Tensor:
    """Serve by the op of vLLM, in the latent space where keys contain the values."""
    from vllm_graft.serve._vllm_cuda import Layout, flash_over_pages, latent_flash_over_pages

    on_device = (borders_of(new), torch.tensor(total, dtype=torch.int32), pages.table)
    layout = Layout(*(x.to(q.device) for x in on_device), max(new), max(total))
    rank = pages.v.shape[-1]
    if rank != pages.k.shape[-1]:
        return latent_flash_over_pages(q, pages.k.squeeze(2), rank, layout, spec.scale)
    out, _ = flash_over_pages(
        q, pages.k, pages.v, layout, spec.scale, window_of(spec), causal=spec.causal
    )
    return out


def train_latent(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: torch.Tensor, spec: AttentionSpec
) -> torch.Tensor:
    """Packed samples through the latent op of vLLM, from a paged cache of their own."""
    lengths = (borders[1:] - borders[:-1]).tolist()
    pages = Pages.of(k, v, lengths, LATENT_PAGE_SIZE, 0.0)
    return serve_vllm(q, pages, lengths, lengths, spec)


LATENT_PAGE_SIZE = 64
"""A block size of vLLM's MLA backends."""

KERNELS = {
    "sdpa": [
        Kernel(
            name="sdpa",
            page_size=16,
            train=attend,
            serve=serve_sdpa,
            takes=lambda shape: True,
            exact=False,
        )
    ],
    "torch": [
        Kernel(
            name="torch varlen_attn",
            page_size=256,  # FlashAttention 2 asks for a multiple of it
            train=varlen_packed,
            serve=serve_varlen,
            takes=lambda shape: not shape.latent_scale,
        )
    ],
    "vllm": [
        Kernel(
            name="vllm flash_attn_varlen_func",
            page_size=16,
            train=attend,
            serve=serve_vllm,
            takes=lambda shape: shape.qk_dim == shape.v_dim,
            fill=0.0,
        ),
        Kernel(
            name="vllm flash_attn_varlen_func, latent",
            page_size=LATENT_PAGE_SIZE,
            train=train_latent,
            serve=serve_vllm,
            takes=lambda shape: shape.latent_scale is not None,
            differentiable=False,
            fill=0.0,
        ),
    ],
}
"""What `--kernel` knows."""
