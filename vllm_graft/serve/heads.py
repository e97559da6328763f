"""Heads of latent attention, multiplied by packed copies of their shares of `wkv_b`.

`torch.bmm` copies the halves of `wkv_b`, which do not lie in one piece, at every step, and reads
few rows slower than memory gives them. Graft's own products take one packed matrix per head, as
they take one per expert.

Legend: T tokens, N heads, C nope dims, R latent rank, V value dims, K inputs, M outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from vllm_graft.attention.latent import split_kv_b
from vllm_graft.exact import heads_product
from vllm_graft.kernels import packed_bf16
from vllm_graft.products import Call, Group, Stack
from vllm_graft.tiles import cancelling


class PackedHeads(Group):
    """Packed heads of one `wkv_b`, whose weight keeps its memory.

    Args:
        wkv_b: has the weight `[N * (C + V), R]`.
        num_heads: N.
        nope_dim: C.
        chunks: inputs that are added up at a time, for keys and for values.
    """

    def __init__(self, wkv_b: Any, num_heads: int, nope_dim: int, chunks: Sequence[int]) -> None:
        super().__init__([Call(Stack(wkv_b, "weight"), torch.empty(0), with_bias=False)])
        self._sizes = num_heads, nope_dim
        self._chunks = chunks
        self._copies: list[packed_bf16.Packed] = []
        rank = wkv_b.weight.shape[1]
        self._widths = rank, wkv_b.weight.shape[0] // num_heads - nope_dim
        self.serves = True
        """Until `unpack`."""

    def pack(self) -> None:
        """Take the weight as it is now."""
        self._weights = [member.weight for member in self._members]
        with torch.inference_mode(False), torch.no_grad():
            keys, values = split_kv_b(self._weights[0].detach(), *self._sizes)
            self._copies = [packed_bf16.pack(list(w)) for w in (keys.transpose(1, 2), values)]
        self._seen = self._look()

    def unpack(self) -> None:
        """Let the weight itself serve again."""
        super().unpack()
        self.serves = False

    def absorb(self, q_nope_TNC: torch.Tensor) -> torch.Tensor:
        """See `attention.latent.Heads`."""
        return self._multiply(0, q_nope_TNC)

    def expand(self, latent_TNR: torch.Tensor) -> torch.Tensor:
        """See `attention.latent.Heads`."""
        return self._multiply(1, latent_TNR)

    def _multiply(self, half: int, x_TNK: torch.Tensor) -> torch.Tensor:
        handle, outputs = self._copies[half].handle, self._widths[half]
        return _by_head(x_TNK, handle, outputs, self._chunks[half])


def packed_heads(wkv_b: Any, num_heads: int, nope_dim: int) -> PackedHeads | None:
    """Packed heads with the bits of `exact.heads_product`, None where there are none."""
    weight = wkv_b.weight
    plain = isinstance(weight, torch.nn.Parameter) and type(weight.data) is torch.Tensor
    if not plain or weight.device.type != "cpu" or nope_dim % 2 or not packed_bf16.takes(weight):
        return None
    rank, value_dim = weight.shape[1], weight.shape[0] // num_heads - nope_dim
    keys = chunk_as_heads(num_heads, nope_dim, rank)
    values = chunk_as_heads(num_heads, rank, value_dim)
    if keys is None or values is None:
        return None
    return PackedHeads(wkv_b, num_heads, nope_dim, (keys, values))


def _by_head(x_TNK: torch.Tensor, handle: torch.Tensor, outputs: int, chunk: int) -> torch.Tensor:
    tokens, heads, inputs = x_TNK.shape
    rows = x_TNK.transpose(0, 1).reshape(heads * tokens, inputs)
    counts = torch.full((heads,), tokens)
    [out] = packed_bf16.multiply_experts(rows, counts, handle, [outputs], chunk)
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
            return torch.equal(_by_head(x_TNK, packed.handle, outputs, chunk), want)

        return next(filter(has_the_bits, (1024, 512, inputs)), None)
