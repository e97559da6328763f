"""Freed memory back to the system."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Give back what was freed between blocks that are in use; glibc only, else nothing.

    Released weights lie between packed ones, and glibc keeps such room for itself.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
