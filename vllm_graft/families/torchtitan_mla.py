"""TorchTitan's DeepSeek V3 attention, 0.3's (it owns its RoPE) and the older (`freqs_cis` given).

The block keeps its class, names, hooks and sharding; only its forward becomes
`TrainableMLA`'s. Imports nothing of TorchTitan. Legend as in `attention.mla`.
"""

from __future__ import annotations

import functools
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_graft.attention.flash import token_positions
from vllm_graft.attention.mla import MLAConfig, TrainableMLA
from vllm_graft.families.swap import Swap
from vllm_graft.families.torchtitan import borders_of, refuse_parallelized

KIND = "mla"
_PARTS = ("wq", "wq_a", "q_norm", "wq_b", "wkv_a", "kv_norm", "wkv_b", "wo")
_REPLACED = ("inner_attention", "sdpa")
"""Children without parameters whose work the latent cache does."""


class TitanMLA(TrainableMLA):
    """Called as TorchTitan 0.3 calls its block."""

    rope: nn.Module

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, attention_masks: Any = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend to `[B, L, D]`; `attention_masks` may be None or TorchTitan's `VarlenMetadata`."""
        borders = borders_of(attention_masks)
        at = token_positions(x, positions, borders)[None]

        def rotate(q_pe: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            q_1TNP, k_1TNP = self.rope(q_pe[None], k_pe[None], at)
            return q_1TNP[0], k_1TNP[0]

        return self.attend(x, rotate, borders)


class TitanTableMLA(TrainableMLA):
    """Called as TorchTitan before 0.3 calls its block."""

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        freqs_cis: torch.Tensor,
        attention_masks: Any = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to `[B, L, D]`; `freqs_cis` is complex `[S, P / 2]`, whole or a prefix of it."""
        borders = borders_of(attention_masks)
        return super().forward(x, freqs_cis, positions=positions, cu_seqlens=borders)


def matches(attention: nn.Module) -> bool:
    """Whether the block has latent projections."""
    return hasattr(attention, "wkv_a")


def plan(attention: Any) -> Swap:
    """Prepare the change of forward, without touching the block.

    Raises:
        ValueError: the block computes something that `TrainableMLA` would not.
    """
    if isinstance(attention, TrainableMLA):
        return _swap(attention.config)
    refuse_parallelized(attention)
    config = _config_of(attention)
    owns_rope = isinstance(getattr(attention, "rope", None), nn.Module)
    new_class: type[TrainableMLA] = TitanMLA if owns_rope else TitanTableMLA
    return _swap(
        config,
        apply=partial(_become, attention, new_class, config),
        proven=_prove(attention, new_class, config),
    )


def _swap(config: MLAConfig, **rest: Any) -> Swap:
    cached = config.kv_lora_rank + config.qk_rope_head_dim
    return Swap(kind=KIND, num_heads=config.num_heads, num_kv_heads=1, head_dim=cached, **rest)


def _become(attention: Any, new_class: type[TrainableMLA], config: MLAConfig) -> None:
    attention.__class__ = _merged(new_class, type(attention))  # type: ignore[arg-type]
    attention.config, attention._paged = config, None
    for name in _REPLACED:
        if hasattr(attention, name):
            delattr(attention, name)


@functools.cache
def _merged(new_class: Any, old_class: Any) -> Any:
    """`old_class` with the forward of `new_class`; still an instance of both."""
    return type(
        f"{new_class.__name__}{old_class.__name__}",
        (new_class, old_class),
        # Pickle finds no class by this name: it is made again where it is loaded.
        {"__reduce_ex__": lambda block, _: (_blank, (new_class, old_class), block.__getstate__())},
    )


def _blank(new_class: Any, old_class: Any) -> Any:
    merged = _merged(new_class, old_class)
    return merged.__new__(merged)


def _config_of(attention: Any) -> MLAConfig:
    children = {name for name, _ in attention.named_children()}
    extra = sorted(children - {*_PARTS, *_REPLACED, "rope"})
    own = sorted(name for name, _ in attention.named_parameters(recurse=False))
    if extra or own:
        raise ValueError(
            f"{type(attention).__name__} has parts that the latent block would drop: {extra + own}"
        )
    if getattr(attention.wkv_b, "bias", None) is not None:
        raise ValueError("wkv_b has a bias, which cannot be absorbed; build it with bias=False")
    config = MLAConfig(
        hidden_size=attention.wkv_a.weight.shape[1],
        num_heads=attention.n_heads,
        q_lora_rank=attention.wq_a.weight.shape[0] if hasattr(attention, "wq_a") else 0,
        kv_lora_rank=attention.kv_lora_rank,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        qk_rope_head_dim=attention.qk_rope_head_dim,
        v_head_dim=attention.v_head_dim,
        norm_eps=attention.kv_norm.eps,
        scale=attention.softmax_scale,
    )
    _check_shapes(attention, config)
    return config


def _check_shapes(attention: Any, c: MLAConfig) -> None:
    query = attention.wq_b if c.q_lora_rank else attention.wq
    heads = c.num_heads
    wanted = {
        "wkv_a": (attention.wkv_a, (c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size)),
        "wkv_b": (attention.wkv_b, (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)),
        "wq_b" if c.q_lora_rank else "wq": (
            query,
            (heads * c.qk_head_dim, c.q_lora_rank or c.hidden_size),
        ),
    }
    for name, (linear, shape) in wanted.items():
        if tuple(linear.weight.shape) != shape:
            raise ValueError(
                f"{name}.weight is {tuple(linear.weight.shape)}, expected {shape} for "
                f"n_heads={heads}, kv_lora_rank={c.kv_lora_rank}, v_head_dim={c.v_head_dim}, "
                f"qk_nope_head_dim={c.qk_nope_head_dim}, qk_rope_head_dim={c.qk_rope_head_dim}"
            )


_LENGTH = 37
_PROVEN: set[tuple[Any, ...]] = set()
"""Classes, settings and sizes that were tried out: their other layers run the same code."""


def _settings(attention: Any) -> str:
    """The block's own attributes: a flag may make one layer compute something else."""
    own = {name: value for name, value in vars(attention).items() if name not in _MODULE_STATE}
    return repr(sorted(own.items(), key=lambda item: item[0]))


_MODULE_STATE = frozenset(vars(nn.Module()))


def _prove(attention: Any, new_class: type[TrainableMLA], config: MLAConfig) -> bool:
    """Compare the block with what it would become, on random tokens.

    Returns:
        False where the old block cannot run (on meta, or another signature).

    Raises:
        ValueError: both ran and differ.
    """
    key = (type(attention), _settings(attention), *astuple(config))
    if key in _PROVEN:
        return True
    weight = attention.wkv_a.weight
    if weight.is_meta or not isinstance(weight, nn.Parameter):
        return False
    x, arguments = _trial(attention, new_class, config)
    with torch.no_grad():
        want = _run_old(attention, x, arguments)
        if want is None or not bool(want.isfinite().all()):
            return False
        got = _run_new(attention, new_class, config, x, arguments)
    largest = float(want.abs().max())
    if largest == 0.0:
        # An output projection that is still zero hides what stands before it.
        return False
    difference = float((got.float() - want.float()).abs().max()) / largest
    # Other orders of summation; a real difference is 100 times as large.
    limit = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    if not difference <= limit:
        raise ValueError(
            f"{type(attention).__name__} computes something else than multi-head latent attention: "
            f"on {_LENGTH} random tokens TrainableMLA differs by {difference:.2g} of the largest "
            f"value (limit {limit:g})"
        )
    _PROVEN.add(key)
    return True


def _trial(
    attention: Any, new_class: type[TrainableMLA], c: MLAConfig
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Random tokens `[1, L, D]`, and the RoPE table where the block is given one."""
    weight = attention.wkv_a.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _LENGTH, c.hidden_size, generator=generator, device="cpu").to(weight)
    if new_class is TitanMLA:
        return x, ()
    dims = torch.arange(0, c.qk_rope_head_dim, 2, device=x.device).float()
    angles = torch.outer(
        torch.arange(_LENGTH, device=x.device).float(), 10000.0 ** -(dims / c.qk_rope_head_dim)
    )
    return x, (torch.polar(torch.ones_like(angles), angles),)


class _DenseSeam(nn.Module):
    """Plain attention in the seam of the old block, in either of its layouts."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *_: Any,
        scale: Any = None,
        **__: Any,
    ) -> torch.Tensor:
        heads_first = q.shape[-2] == _LENGTH
        q, k, v = (x if heads_first else x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return out if heads_first else out.transpose(1, 2)


def _run_old(
    attention: Any, x: torch.Tensor, arguments: tuple[torch.Tensor, ...]
) -> torch.Tensor | None:
    seam = next((name for name in _REPLACED if hasattr(attention, name)), None)
    if seam is None:
        return None
    before = getattr(attention, seam)
    setattr(attention, seam, _DenseSeam())
    try:
        out = type(attention).forward(attention, x, *arguments, None)
    except (TypeError, RuntimeError):
        return None
    finally:
        setattr(attention, seam, before)
    return out if isinstance(out, torch.Tensor) else None


def _run_new(
    attention: Any,
    new_class: type[TrainableMLA],
    config: MLAConfig,
    x: torch.Tensor,
    arguments: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """The new forward on the block's own parts, in a shell of its own."""
    shell = new_class.__new__(new_class)
    nn.Module.__init__(shell)
    shell.__dict__["_modules"] = attention._modules
    shell.config, shell._paged = config, None
    out: torch.Tensor = shell(x, *arguments, None)
    return out
