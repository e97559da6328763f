"""The order in which a factory prepares a model for several ranks; errors show it."""

from __future__ import annotations

ORDER = "create -> replace -> TP -> dtype"
"""The model, its attention, tensor parallelism, its dtype."""
