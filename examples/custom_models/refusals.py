"""Refusing config fields that a model would not honour, by name."""

from __future__ import annotations

from typing import Any


def refuse_fields(model: str, *fields: tuple[str, Any, tuple[Any, ...]]) -> None:
    """Raise if a field has a value that `model` cannot honour.

    Args:
        model: for the error text.
        fields: name, value and supported values of each.

    Raises:
        ValueError: naming each such field, its value and those that work.
    """
    wrong = [
        f"{name}={value!r} (supported: {', '.join(map(repr, supported))})"
        for name, value, supported in fields
        if value not in supported
    ]
    if wrong:
        raise ValueError(f"{model} cannot honour {'; '.join(wrong)}")
