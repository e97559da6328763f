"""The one error of loading and exporting, and the hints in its texts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WeightError(ValueError):
    """A checkpoint that does not fit the model; the text names tensors and shapes."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause with the names most like `name`, for error texts."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.3)
    return f"nearest existing: {', '.join(close)}" if close else "nothing similar exists"
