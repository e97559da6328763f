"""Attention modules that serve from vLLM's paged cache and train by autograd."""
