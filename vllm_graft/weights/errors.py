"""The one error of loading and exporting, the hints in its texts, and failures that wait."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


class WeightError(ValueError):
    """A checkpoint that does not fit the model; the text names tensors and shapes."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause with the names most like `name`, for error texts."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.3)
    return f"nearest existing: {', '.join(close)}" if close else "nothing similar exists"


def failure_of(step: Callable[[], object]) -> Exception | None:
    """What `step` raised: ranks that work together raise only when all know of it."""
    try:
        step()
    except Exception as error:
        return error
    return None
