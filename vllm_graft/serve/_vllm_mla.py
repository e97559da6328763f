"""vLLM's MLA layer around a user's `wkv_b` (internals of vLLM, as `_vllm.py`).

vLLM copies the two halves of `wkv_b` when loading is complete; after an
optimizer step the copies would be stale. Here they are views, made where they
are used. Relies on `MLAAttention` up to 0.32: its constructor,
`forward_impl(q, k_c_normed, k_pe, kv_cache, attn_metadata, output)`, its
attributes `W_UK_T` `[N, C, R]` and `W_UV` `[N, R, V]`, and `forward_mha`
calling `kv_b_proj`. Can go when vLLM reads `kv_b_proj` instead of copies.

Legend: T tokens, N heads, R latent rank, C nope dims, P rope dims, V value dims.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_graft.attention.latent import Heads, PlainHeads, absorbed, split_kv_b
from vllm_graft.attention.mla import TrainableMLA
from vllm_graft.products import Group
from vllm_graft.serve import _vllm_cpu, _vllm_mla_cuda
from vllm_graft.serve._vllm import EXACT_OPTION
from vllm_graft.serve.heads import PackedHeads, packed_heads
from vllm_graft.serve.scratch import LATENT_RANK, LATENT_ROPE, LatentBatch


class LiveKvB:
    """`wkv_b` of a block as vLLM's MLA layer calls it: always the block's current one."""

    def __init__(self, block: TrainableMLA) -> None:
        self._block = block
        self._packed: PackedHeads | None = None

    @property
    def weight(self) -> torch.Tensor:
        """`[N * (C + V), R]`."""
        weight: torch.Tensor = self._block.wkv_b.weight
        return weight

    @property
    def heads(self) -> Heads:
        """Its heads, by packed copies where there are."""
        if self._packed is not None and self._packed.serves:
            return self._packed
        return PlainHeads(self.weight, self.num_heads, self._block.config.qk_nope_head_dim)

    @property
    def num_heads(self) -> int:
        """N."""
        c = self._block.config
        return self.weight.shape[0] // (c.qk_nope_head_dim + c.v_head_dim)

    def pack(self) -> Group | None:
        """Serve by packed heads from now on; None where their products have other bits."""
        self._packed = packed_heads(
            self._block.wkv_b, self.num_heads, self._block.config.qk_nope_head_dim
        )
        return self._packed

    def __call__(self, kv_c_TR: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Keys without RoPE and values of every head, `[T, N * (C + V)]`."""
        return F.linear(kv_c_TR, self.weight), None


def paged_latent_layer(
    block: TrainableMLA,
    *,
    prefix: str,
    vllm_config: Any,
    exact: bool,
    on_weights_ready: Callable[[], None],
) -> nn.Module:
    """A vLLM `MLAAttention` for `block`; building it registers its latent cache under `prefix`.

    Args:
        exact: run prefill and decode in one arithmetic, the training forward's.
            Otherwise vLLM's own two paths.

    Raises:
        ValueError: sizes or settings that the kernel cannot take.
    """
    c, kv_b = block.config, LiveKvB(block)
    kind, own = _kind(block, vllm_config, exact)
    layer: nn.Module = kind(
        num_heads=kv_b.num_heads,
        scale=block.spec.scale,
        qk_nope_head_dim=c.qk_nope_head_dim,
        v_head_dim=c.v_head_dim,
        q_lora_rank=c.q_lora_rank or None,
        kv_b_proj=kv_b,
        cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config,
        prefix=prefix,
        **own,
    )
    layer.on_weights_ready = on_weights_ready  # type: ignore[assignment]
    return layer


def _kind(block: TrainableMLA, vllm_config: Any, exact: bool) -> tuple[Any, dict[str, Any]]:
    """The layer's class, and the sizes and backend that it has on this platform."""
    from vllm.platforms import current_platform

    c = block.config
    sizes = {"kv_lora_rank": c.kv_lora_rank, "qk_rope_head_dim": c.qk_rope_head_dim}
    if current_platform.is_cpu():
        _check_sizes(block, exact)
        _check_cpu_config(vllm_config, exact)
        # Never AMX_MLA, which packs `wkv_b` and frees the original.
        layer = _exact_layer() if exact else _stock_layer()
        return layer, {**sizes, "attn_backend": _cpu_backend(exact)}
    if not exact:
        return _stock_layer(), sizes
    _vllm_mla_cuda.check_exact(block, vllm_config, EXACT_OPTION)
    return _vllm_mla_cuda.exact_layer(_stock_layer()), _vllm_mla_cuda.options()


def _check_sizes(block: TrainableMLA, exact: bool) -> None:
    c = block.config
    most = (LATENT_RANK, LATENT_ROPE)
    sizes = (c.kv_lora_rank, c.qk_rope_head_dim)
    if sizes == most or (exact and all(s <= m for s, m in zip(sizes, most, strict=True))):
        return
    fix = "" if exact else ", or exact serving, which pads smaller sizes"
    raise ValueError(
        f"kv_lora_rank={sizes[0]}, qk_rope_head_dim={sizes[1]}: vLLM's CPU MLA kernel takes "
        f"{most[0]} and {most[1]}{' at the most' if exact else ''}{fix}"
    )


def _check_cpu_config(vllm_config: Any, exact: bool) -> None:
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype != "auto":
        raise ValueError(
            f"kv_cache_dtype={cache_dtype!r}: vLLM's CPU MLA kernel reads the model's dtype only; "
            "leave it at 'auto'"
        )
    if not exact and not vllm_config.model_config.use_mla:
        model_type = vllm_config.model_config.hf_text_config.model_type
        raise ValueError(
            f"model_type={model_type!r}: vLLM's own MLA path runs only configs that vLLM takes for "
            "MLA (deepseek_v3 and its kin); serve it exactly, the default"
        )


def _cpu_backend(exact: bool) -> Any:
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

    return _exact_backend() if exact else CPUMLABackend


@functools.cache
def _exact_backend() -> Any:
    from vllm.v1.attention.backend import AttentionMetadataBuilder
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

    class LatentBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
        def __init__(self, kv_cache_spec: Any, layer_names: Any, config: Any, device: Any) -> None:
            super().__init__(kv_cache_spec, layer_names, config, device)

        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
        ) -> Any:
            common = common_attn_metadata
            blocks = -(-int(common.seq_lens.max()) // _vllm_cpu.LATENT_BLOCK_SIZE)
            return LatentBatch.of(
                common.query_start_loc, common.block_table_tensor[:, :blocks], common.seq_lens
            )

    class LatentBackend(CPUMLABackend):  # type: ignore[misc]
        @staticmethod
        def get_builder_cls() -> Any:
            return LatentBuilder

    return LatentBackend


@functools.cache
def _stock_layer() -> Any:
    from vllm.model_executor.layers.attention.attention import set_default_quant_scales
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention

    class GraftMLAAttention(MLAAttention):  # type: ignore[misc]
        on_weights_ready: Callable[[], None]

        @property
        def W_UK_T(self) -> torch.Tensor:  # noqa: N802 - vLLM's name
            return split_kv_b(self.kv_b_proj.weight, self.num_heads, self.qk_nope_head_dim)[0]

        @property
        def W_UV(self) -> torch.Tensor:  # noqa: N802 - vLLM's name
            values = split_kv_b(self.kv_b_proj.weight, self.num_heads, self.qk_nope_head_dim)[1]
            return values.transpose(1, 2)

        def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
            self.impl.process_weights_after_loading(act_dtype)
            set_default_quant_scales(self, register_buffer=False)
            self.on_weights_ready()

    return GraftMLAAttention


@functools.cache
def _exact_layer() -> Any:
    class GraftExactMLAAttention(_stock_layer()):  # type: ignore[misc]
        def update_kv_cache(
            self, kv_c: Any, k_pe: Any, cache: Any, slots: Any, metadata: Any, *rest: Any
        ) -> None:
            # The metadata is only asked for decode counts, which this path has none of.
            super().update_kv_cache(kv_c, k_pe, cache, slots, None, *rest)

        def forward_impl(
            self,
            q: torch.Tensor,
            k_c_normed: torch.Tensor,
            k_pe: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: LatentBatch | None,
            output: torch.Tensor,
            **_: Any,
        ) -> torch.Tensor:
            if attn_metadata is None:
                return output.fill_(0)
            tokens, rope = len(attn_metadata.sequence), self.qk_rope_head_dim
            result = absorbed(
                q[:tokens],
                self.kv_b_proj.heads,
                rope,
                lambda query: _vllm_cpu.latent_attention(
                    query, kv_cache, attn_metadata, self.scale, rope
                ),
            )
            output[:tokens] = result.flatten(1)
            return output

    return GraftExactMLAAttention
