"""Row numbers as short text: `0:64 96:160`, `0:8:2`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vllm_graft.weights.errors import WeightError

_RUN = re.compile(r"(\d+):(\d+)(?::(\d+))?")


def rows_text(rows: Sequence[int]) -> str:
    """Rows in their order, as runs `first:end` or `first:end:step`.

    >>> rows_text([0, 1, 2, 6, 7, 8])
    '0:3 6:9'
    >>> rows_text([1, 3, 5])
    '1:6:2'
    """
    runs, at = [], 0
    while at < len(rows):
        step = rows[at + 1] - rows[at] if at + 1 < len(rows) else 1
        step = step if step > 0 else 1
        end = at + 1
        while end < len(rows) and rows[end] - rows[end - 1] == step:
            end += 1
        last = rows[end - 1] + 1
        runs.append(f"{rows[at]}:{last}" + (f":{step}" if step > 1 else ""))
        at = end
    return " ".join(runs)


def rows_of_text(text: str) -> tuple[int, ...]:
    """The rows that `rows_text` wrote.

    Raises:
        WeightError: not such a text.
    """
    rows: list[int] = []
    for run in text.split():
        match = _RUN.fullmatch(run)
        if match is None or match.group(3) == "0":
            raise WeightError(f"rows {text!r}: expected runs as 0:64 or 0:8:2, got {run!r}")
        first, end, step = match.groups()
        rows += range(int(first), int(end), int(step or 1))
    return tuple(rows)
