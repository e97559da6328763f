"""How projections share one fused tensor: which rows are whose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_graft.weights.errors import WeightError

PARTS = {
    "qkv": ("q", "k", "v"),
    "gate_up": ("gate", "up"),
    "expert.gate_up": ("expert.gate", "expert.up"),
    "shared.gate_up": ("shared.gate", "shared.up"),
}
_GROUPED = ("linear_qkv", "query_key_value", "qkv_linear.wqkv")
_IN_ORDER = ("qkv_proj", "c_attn")
Rows = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Heads:
    """Head counts and sizes of a config."""

    queries: int
    groups: int
    dim: int
    rotated: int

    @property
    def rows(self) -> int:
        """Of queries, keys and values together."""
        return (self.queries + 2 * self.groups) * self.dim

    @classmethod
    def of(cls, config: dict[str, Any]) -> Heads | None:
        """Those of a Hugging Face config; None: it does not say."""
        queries = config.get("num_attention_heads") or config.get("n_head")
        width = config.get("hidden_size") or config.get("n_embd")
        if not queries or not width:
            return None
        dim = config.get("head_dim") or width // queries
        rope = config.get("rope_parameters") or {}
        share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        share = config.get("rotary_pct", share)
        return cls(queries, config.get("num_key_value_heads") or queries, dim, int(dim * share))


def layouts(role: str, pattern: str, rows: int, heads: Heads | None) -> dict[str, Rows]:
    """The layouts that a fused tensor may have, by name; one where its name decides.

    Raises:
        WeightError: its rows are not those of the config's heads.
    """
    parts = PARTS[role]
    if role != "qkv":
        half = rows // 2
        in_order = dict(zip(parts, (tuple(range(half)), tuple(range(half, rows))), strict=True))
        by_turns = {p: tuple(range(at, rows, 2)) for at, p in enumerate(parts)}
        named = role == "gate_up" or role == "shared.gate_up"
        return {"gate, then up": in_order} | ({} if named else {"gate and up by turns": by_turns})
    if heads is None or rows != heads.rows:
        raise WeightError(
            f"{pattern!r} has {rows} rows of queries, keys and values, which {heads} does not "
            "explain; give the config of the checkpoint"
        )
    found = {"queries, keys, values": _in_order(heads), "query group by group": _grouped(heads)}
    if any(word in pattern for word in _GROUPED):
        found.pop("queries, keys, values")
    elif any(word in pattern for word in _IN_ORDER):
        found.pop("query group by group")
    return found


def _in_order(heads: Heads) -> Rows:
    ends = [heads.queries, heads.queries + heads.groups, heads.queries + 2 * heads.groups]
    return {
        part: tuple(range(first * heads.dim, end * heads.dim))
        for part, first, end in zip("qkv", [0, *ends], ends, strict=False)
    }


def _grouped(heads: Heads) -> Rows:
    kinds = ["q"] * (heads.queries // heads.groups) + ["k", "v"]
    rows: dict[str, list[int]] = {"q": [], "k": [], "v": []}
    for head, kind in enumerate(kinds * heads.groups):
        rows[kind] += range(head * heads.dim, (head + 1) * heads.dim)
    return {part: tuple(at) for part, at in rows.items()}
