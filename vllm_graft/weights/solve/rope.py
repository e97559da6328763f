"""RoPE conventions: which rows of a query or key projection are rotated together."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.solve.layouts import Heads

HALVES, PAIRS = "halves", "pairs"
"""Row j with row j + half of the head's RoPE rows; or rows 2j and 2j + 1."""
_ADJACENT = {"cohere", "cohere2", "codegen", "ernie4_5", "glm", "glm4", "gptj", "helium"}
_ROLES, _LATENT_ROLES = ("q", "k", "q_norm", "k_norm"), ("q", "q_b", "kv_a")
_LATENT = {"deepseek_v2", "deepseek_v3"}
_SPLIT = {
    "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt_neox", "gpt_oss", "granite",
    "llama", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip


@dataclass(frozen=True)
class Rope:
    """Rows of a projection, put from one RoPE convention into the other."""

    to: str
    """HALVES or PAIRS."""
    heads: int
    before: int
    """Rows of a head before its RoPE rows."""
    rotated: int
    """RoPE rows of a head, even."""
    after: int
    """Rows of a head after them."""

    def order(self) -> tuple[int, ...]:
        """The permutation: `new_rows = old_rows[order]`."""
        half = self.rotated // 2
        if self.to == PAIRS:
            turned = [row for j in range(half) for row in (j, j + half)]
        else:
            turned = [*range(0, self.rotated, 2), *range(1, self.rotated, 2)]
        size = self.before + self.rotated + self.after
        head = [
            *range(self.before),
            *(self.before + row for row in turned),
            *range(self.before + self.rotated, size),
        ]
        return tuple(h * size + row for h in range(self.heads) for row in head)

    def to_json(self) -> dict[str, Any]:
        """As a plan has it."""
        return asdict(self)


def checkpoint_rope(config: dict[str, Any]) -> str | None:
    """The convention of a checkpoint that Transformers reads; None: unknown."""
    kind = config.get("model_type")
    if kind in _ADJACENT:
        return PAIRS
    if kind in _LATENT:
        return PAIRS if config.get("rope_interleave", True) else HALVES
    return HALVES if kind in _SPLIT else None


def orders(config: dict[str, Any], model: nn.Module) -> list[str | None]:
    """The orders that rows may have to be put into; None: they stay."""
    theirs, ours = checkpoint_rope(config), model_rope(model)
    if theirs is not None and ours is not None:
        return [None if theirs == ours else ours]
    if theirs is None and ours is None:
        return [None, HALVES, PAIRS]
    return [None, ours or (PAIRS if theirs == HALVES else HALVES)]


def turned(
    role: str,
    shape: tuple[int, ...],
    order: str | None,
    heads: Heads | None,
    config: dict[str, Any],
) -> Rope | None:
    """How the rows of a role are put into `order`; None: they stay.

    Raises:
        WeightError: the config does not say what the heads are.
    """
    latent = config.get("qk_rope_head_dim")
    if order is None or role not in (_LATENT_ROLES if latent else _ROLES):
        return None
    if latent and role == "kv_a":
        return Rope(order, 1, config["kv_lora_rank"], latent, 0)
    if latent:
        before = config["qk_nope_head_dim"]
        return Rope(order, shape[0] // (before + latent), before, latent, 0)
    if heads is None:
        raise WeightError("no plan: the config has no head counts, which RoPE rows need")
    return Rope(order, shape[0] // heads.dim, 0, heads.rotated, heads.dim - heads.rotated)


def model_rope(model: nn.Module) -> str | None:
    """The convention of a model, from what its modules say of it; None: unknown."""
    found = {kind for module in model.modules() for kind in _said_by(module)}
    return found.pop() if len(found) == 1 else None


def _said_by(module: nn.Module) -> set[str]:
    said: set[str] = set()
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if kinds & {"ComplexRoPE", "TrainableMLA", "MLASelfAttention"}:
        said.add(PAIRS)
    if "CosSinRoPE" in kinds:
        said.add(HALVES)
    config: Any = getattr(module, "config", None)
    latent = getattr(config, "multi_latent_attention", False)
    if "GPTModel" in kinds and not latent:
        said.add(PAIRS if getattr(config, "rotary_interleaved", False) else HALVES)
    kind = getattr(config, "model_type", None)
    if isinstance(kind, str) and isinstance(getattr(module, "config_class", None), type):
        said |= {c for c in [checkpoint_rope(config.to_dict())] if c}
    tensors = [*vars(module).values(), *module.buffers(recurse=False)]
    if any(getattr(tensor, "is_complex", bool)() for tensor in tensors):
        said.add(PAIRS)
    return said
