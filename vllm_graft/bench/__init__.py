"""Measuring Graft against vLLM's own models, round by round in turn."""
