"""Tests that train, or start engines with worker processes."""
