"""The hand-written model and its checkpoint, as `tests/serve` has them."""

from __future__ import annotations

from tests.serve.conftest import my_checkpoint, my_library, my_model

__all__ = ["my_checkpoint", "my_library", "my_model"]
