"""Heads of latent attention, multiplied by packed copies of their shares of `wkv_b`.

`torch.bmm` copies the halves of `wkv_b`, which do not lie in one piece, at every step, and reads
few rows slower than memory gives them. Graft's own products take one packed matrix per head, as
they take one per expert.

Legend: T tokens, N heads, C nope dims, R latent rank, V value dims, K inputs, M outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from vllm_graft.attention.latent import split_kv_b
from vllm_graft.exact import heads_product
from vllm_graft.kernels import packed_bf16
from vllm_graft.products import Call, Packed, is_plain, stack_of
from vllm_graft.tiles import cancelling


@dataclass(frozen=True)
class Copies:
    """Packed halves of one `wkv_b`."""

    keys: packed_bf16.Packed
    """`[R, C]` of each head."""
    values: packed_bf16.Packed
    """`[V, R]` of each head."""

    @property
    def handle(self) -> torch.Tensor:
        """See `products.Copy`."""
        return self.keys.handle


@dataclass(frozen=True)
class HeadsKernel:
    """Packs weights `[N * (C + V), R]` head by head."""

    num_heads: int
    nope_dim: int
    """C"""
    chunks: tuple[int, int]
    """Inputs that are added up at a time, for keys and for values."""

    def pack(self, weights: Sequence[torch.Tensor]) -> Copies:
        """See `products.Kernel`."""
        keys, values = split_kv_b(weights[0], self.num_heads, self.nope_dim)
        return Copies(packed_bf16.pack(list(keys.mT)), packed_bf16.pack(list(values)))

    def unpack(self, copy: Any, like: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """See `products.Kernel`."""
        rows, rank = like[0].shape
        width = rows // self.num_heads - self.nope_dim
        keys = packed_bf16.unpack(copy.keys, [rank] * self.num_heads)
        values = packed_bf16.unpack(copy.values, [width] * self.num_heads)
        halves = zip(keys, values, strict=True)
        return [torch.cat([half for key, value in halves for half in (key.t(), value)])]

    def multiply(self, *_: Any) -> Sequence[torch.Tensor]:
        """There is no product by the whole weight."""
        raise NotImplementedError


class PackedHeads(Packed):
    """Packed heads of one `wkv_b`: `attention.latent.Heads`."""

    kernel: HeadsKernel
    serves = True
    """Until `unpack`."""

    def unpack(self) -> None:
        """Let the weight itself serve again."""
        super().unpack()
        self.serves = False

    def absorb(self, q_nope_TNC: torch.Tensor) -> torch.Tensor:
        """See `attention.latent.Heads`."""
        copies, rank = cast(Copies, self._copy), self._weights[0].shape[1]
        return _by_head(q_nope_TNC, copies.keys, rank, self.kernel.chunks[0])

    def expand(self, latent_TNR: torch.Tensor) -> torch.Tensor:
        """See `attention.latent.Heads`."""
        copies, kernel = cast(Copies, self._copy), self.kernel
        width = self._weights[0].shape[0] // kernel.num_heads - kernel.nope_dim
        return _by_head(latent_TNR, copies.values, width, kernel.chunks[1])


def packed_heads(wkv_b: Any, num_heads: int, nope_dim: int) -> PackedHeads | None:
    """Packed heads with the bits of `exact.heads_product`, None where there are none."""
    weight = wkv_b.weight
    on_cpu = is_plain(weight) and weight.device.type == "cpu"
    if not on_cpu or nope_dim % 2 or not packed_bf16.takes(weight):
        return None
    rank, value_dim = weight.shape[1], weight.shape[0] // num_heads - nope_dim
    keys = chunk_as_heads(num_heads, nope_dim, rank)
    values = chunk_as_heads(num_heads, rank, value_dim)
    if keys is None or values is None:
        return None
    call = Call(stack_of(wkv_b, "weight"), torch.empty(0), with_bias=False)
    return PackedHeads([call], HeadsKernel(num_heads, nope_dim, (keys, values)))


def _by_head(
    x_TNK: torch.Tensor, packed: packed_bf16.Packed, outputs: int, chunk: int
) -> torch.Tensor:
    tokens, heads, inputs = x_TNK.shape
    rows = x_TNK.transpose(0, 1).reshape(heads * tokens, inputs)
    counts = torch.full((heads,), tokens)
    [out] = packed_bf16.multiply_experts(rows, counts, packed.handle, [outputs], chunk)
    return out.view(heads, tokens, outputs).transpose(0, 1)


_ROWS = 19
"""Of a trial: whole passes of the kernel, and a rest."""


@functools.cache
def chunk_as_heads(heads: int, inputs: int, outputs: int) -> int | None:
    """The chunk by which `packed_bf16` has the bits of `exact.heads_product` in these sizes."""
    with torch.inference_mode(False), torch.no_grad():
        weight_NMK = cancelling((heads, outputs, inputs), torch.bfloat16, seed=0)
        x_TNK = cancelling((_ROWS, heads, inputs), torch.bfloat16, seed=1)
        want = heads_product(x_TNK, weight_NMK.transpose(1, 2))
        packed = packed_bf16.pack(list(weight_NMK))

        def has_the_bits(chunk: int) -> bool:
            return torch.equal(_by_head(x_TNK, packed, outputs, chunk), want)

        return packed_bf16.find_chunk(inputs, has_the_bits)
