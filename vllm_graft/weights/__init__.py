"""Checkpoint tensors to model parameters, every one accounted for."""
