"""Every plan that names, shapes and the config allow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torch import nn

from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.solve.groups import Group
from vllm_graft.weights.solve.layouts import Heads
from vllm_graft.weights.solve.line import Line
from vllm_graft.weights.solve.pieces import Piece, Role, pieces_of
from vllm_graft.weights.solve.rope import orders, turned
from vllm_graft.weights.solve.transposed import ways

Pair = tuple[Piece, Piece, Line]


@dataclass(frozen=True)
class Candidate:
    """A plan's lines, and what had to be assumed for it."""

    assumed: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Sides:
    """The groups of both sides, and what says how to read them."""

    sources: list[Group]
    targets: list[Group]
    wanted: list[Group]
    """Those of `targets` that must be filled."""
    config: dict[str, Any]
    model: nn.Module


def candidates(sides: Sides) -> list[Candidate]:
    """All plans in which every tensor is used and every parameter filled.

    Raises:
        WeightError: there is none; lists what stays open.
    """
    heads = Heads.of(sides.config)
    found: dict[tuple[Line, ...], Candidate] = {}
    refused: list[WeightError] = []
    for transposed in (options := ways(sides.sources, sides.targets, heads)):
        theirs = list(pieces_of(sides.sources, heads, transposed=transposed))
        for (said, source), (heard, target) in product(theirs, pieces_of(sides.targets, heads)):
            assumed = [f"matrices {'transposed' if transposed else 'as they are'}"]
            texts = (assumed if len(options) > 1 else []) + said + heard
            try:
                for candidate in _turned(sides, _pairs(sides, source, target), heads, texts):
                    found.setdefault(candidate.lines, candidate)
            except WeightError as error:
                refused.append(error)
    if not found:
        raise refused[0]
    return list(found.values())


def _pairs(sides: Sides, theirs: dict[Role, Piece], ours: dict[Role, Piece]) -> dict[Role, Pair]:
    """The pieces of one role brought together.

    Raises:
        WeightError: a tensor is left over, or a parameter without a value.
    """
    pairs: dict[Role, Pair] = {}
    for role in sorted(theirs.keys() & ours.keys()):
        line = _line(theirs[role], ours[role])
        if line is not None:
            pairs[role] = (theirs[role], ours[role], line)
    _tie(sides, theirs, ours, pairs)
    unused = _open(sides.sources, [p[0] for p in pairs.values()], "checkpoint tensor")
    unfilled = _open(sides.wanted, [p[1] for p in pairs.values()], "parameter")
    if unused or unfilled:
        raise WeightError(
            "no plan: names and shapes leave open:\n  " + "\n  ".join(unused + unfilled) + "\n"
            "write the mapping by hand, for load_external_weights"
        )
    return pairs


def _tie(
    sides: Sides, theirs: dict[Role, Piece], ours: dict[Role, Piece], pairs: dict[Role, Pair]
) -> None:
    """A checkpoint without a head has the embeddings for it, unless its config says otherwise."""
    embed, head = ("embed", "weight"), ("head", "weight")
    tied = sides.config.get("tie_word_embeddings", True)
    if not tied or head in theirs or embed not in theirs or head not in ours:
        return
    line = _line(theirs[embed], ours[head])
    if line is not None and ours[head].group in sides.wanted:
        pairs[head] = (theirs[embed], ours[head], replace(line, by="tied: there is no head"))


def _line(source: Piece, target: Piece) -> Line | None:
    """The line for two pieces of one role; None: their shapes or numbers differ."""
    theirs, ours, name = source.group, target.group, target.group.pattern
    if source.shape != target.shape or theirs.numbers != ours.numbers:
        size = ours.shape[0] if ours.shape else 0
        experts = {(*n, str(row)) for n in ours.numbers for row in range(size)}
        cut = source.rows or target.rows or source.transposed
        if cut or ours.shape[1:] != source.shape or theirs.numbers != experts:
            return None
        name += "[{}]"
    return Line(theirs.pattern, name, "names", source.transposed, take=source.rows, put=target.rows)


def _open(groups: list[Group], used: list[Piece], what: str) -> list[str]:
    """A text for every group of which not every row is used, or some row twice."""
    wrong = []
    for group in groups:
        pieces = [piece for piece in used if piece.group == group]
        rows = sorted(row for piece in pieces for row in piece.rows or ())
        whole = any(piece.rows is None for piece in pieces)
        if not whole and (not pieces or rows != list(range(pieces[0].whole[0]))):
            wrong.append(
                f"{what} {group.pattern!r} {list(group.shape)}, {len(group.numbers)} of it"
            )
    return wrong


def _turned(
    sides: Sides, pairs: dict[Role, Pair], heads: Heads | None, texts: list[str]
) -> Iterator[Candidate]:
    """The pairs' lines, once for each RoPE order that is possible."""
    options = orders(sides.config, sides.model)
    if ("positions", "weight") in pairs:
        options = [None]
    for order in options:
        lines = [
            replace(line, rope=rope)
            for (role, _), (source, _, line) in pairs.items()
            for rope in [turned(role, source.shape, order, heads, sides.config)]
        ]
        said = [f"RoPE rows {'as they are' if order is None else f'put into {order}'}"]
        yield Candidate(
            "; ".join(texts + (said if len(options) > 1 else [])), _sorted(sides, _whole(lines))
        )


def _whole(lines: list[Line]) -> list[Line]:
    """Parts that are the same rows on both sides need no cutting: one line for them all."""
    made: dict[tuple[str, str | None], list[Line]] = {}
    for line in lines:
        made.setdefault((line.source, line.target), []).append(line)
    return [
        line
        for parts in made.values()
        for line in (
            [replace(parts[0], take=None, put=None)]
            if len(parts) > 1 and all(p.take == p.put and p.rope is None for p in parts)
            else parts
        )
    ]


def _sorted(sides: Sides, lines: list[Line]) -> tuple[Line, ...]:
    order = {group.pattern: at for at, group in enumerate(sides.sources)}
    return tuple(sorted(lines, key=lambda line: (order[line.tensor], line.put or line.take or ())))
