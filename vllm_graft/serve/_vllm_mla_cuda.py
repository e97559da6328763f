"""vLLM's MLA layer on a Hopper card, with the training forward's arithmetic (its internals).

vLLM expands keys for prompts and decodes in the latent space: two orders of additions. Here
every token, of prompts too, goes through the kernel that vLLM decodes with. Relies on what
`_vllm_mla.py` names, on `FlashAttnMLABackend`, and on what a metadata builder is given: borders,
lengths and block table in buffers that stay, which is what CUDA graphs need (0.31 and 0.32).

Legend: T tokens, R latent rank, P rope dims.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from vllm_graft.attention.latent import absorbed
from vllm_graft.attention.mla import TrainableMLA
from vllm_graft.serve import _vllm_cuda
from vllm_graft.serve.scratch import LATENT_RANK, LATENT_ROPE, pad_to


@dataclass(frozen=True)
class LatentPages:
    """Where the tokens of a batch lie in the paged latent cache."""

    layout: _vllm_cuda.Layout
    num_actual_tokens: int
    """Without those that fill a CUDA graph."""


def check_exact(block: TrainableMLA, vllm_config: Any, option: str) -> None:
    """Raise if `block` cannot be served with the training forward's bits here.

    Raises:
        ValueError: a card, size, dtype or setting that the kernel does not take.
    """
    c, parallel = block.config, vllm_config.parallel_config
    reason = _vllm_cuda.why_no_latent(
        kv_lora_rank=c.kv_lora_rank,
        qk_rope_head_dim=c.qk_rope_head_dim,
        dtype=vllm_config.model_config.dtype,
    )
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype != "auto":
        reason = f"kv_cache_dtype={cache_dtype!r}: only 'auto' is exact"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        reason = "context parallelism, which adds up in parts"
    if reason:
        raise ValueError(
            f"latent attention cannot be served exactly here: {reason}. Pass exact=False to "
            f"TrainableLLM, or to vLLM additional_config={{{option!r}: False}}"
        )


LAYER_SIZES = {"kv_lora_rank": LATENT_RANK, "qk_rope_head_dim": LATENT_ROPE}
"""Of the cache: narrower vectors are padded."""


def options() -> dict[str, Any]:
    """What the layer's constructor gets."""
    # vLLM looks for a prefill path that takes the block's sizes; there is none here.
    return {**LAYER_SIZES, "attn_backend": exact_backend(), "prefill_backend_cls": _NoPrefill}


class _NoPrefill:
    def __init__(self, **sizes: Any) -> None:
        pass


@functools.cache
def exact_backend() -> Any:
    """`FLASH_ATTN_MLA` in pages of `PAGE_SIZE`, as in training, with metadata for one path."""
    from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder
    from vllm.v1.attention.backends.mla.flashattn_mla import FlashAttnMLABackend

    class LatentPagesBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
        _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

        def __init__(self, kv_cache_spec: Any, layer_names: Any, config: Any, device: Any) -> None:
            super().__init__(kv_cache_spec, layer_names, config, device)

        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
        ) -> LatentPages:
            return pages_of(common_attn_metadata)

    class ExactLatentBackend(FlashAttnMLABackend):  # type: ignore[misc]
        @staticmethod
        def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
            return [_vllm_cuda.PAGE_SIZE]

        @staticmethod
        def get_builder_cls() -> Any:
            return LatentPagesBuilder

    return ExactLatentBackend


def pages_of(common: Any) -> LatentPages:
    """From vLLM's `CommonAttentionMetadata`."""
    layout = _vllm_cuda.Layout(
        cu_seqlens=common.query_start_loc,
        lengths=common.seq_lens,
        table=common.block_table_tensor,
        # 0 where a graph is recorded; the kernel's grid follows from it.
        max_q=max(common.max_query_len, 1),
        max_k=common.max_seq_len,
    )
    return LatentPages(layout, common.num_actual_tokens)


@functools.cache
def exact_layer(stock: Any) -> Any:
    """A subclass of `stock`, Graft's `MLAAttention`, that has one path."""

    class GraftExactMLAAttention(stock):  # type: ignore[misc]
        def update_kv_cache(
            self, kv_c: Any, k_pe: Any, cache: Any, slots: Any, metadata: Any, *rest: Any
        ) -> None:
            kv_c, k_pe = pad_to(kv_c, LATENT_RANK), pad_to(k_pe, LATENT_ROPE)
            # The metadata is only asked for decode counts, which this path has none of.
            super().update_kv_cache(kv_c, k_pe, cache, slots, None, *rest)

        def forward_impl(
            self,
            q: torch.Tensor,
            k_c_normed: torch.Tensor,
            k_pe: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: LatentPages | None,
            output: torch.Tensor,
            **_: Any,
        ) -> torch.Tensor:
            rank, rope = k_c_normed.shape[-1], k_pe.shape[-1]
            if attn_metadata is None:
                # vLLM measures memory: take as much as a batch does.
                absorbed(q, self.kv_b_proj.heads, rope, lambda query: query[..., :rank].clone())
                return output.fill_(0)
            tokens, layout = attn_metadata.num_actual_tokens, attn_metadata.layout
            result = absorbed(
                q[:tokens],
                self.kv_b_proj.heads,
                rope,
                lambda query: _vllm_cuda.latent_attention(
                    query, kv_cache, layout, self.scale, rank
                ),
            )
            output[:tokens] = result.flatten(1)
            return output

    return GraftExactMLAAttention
