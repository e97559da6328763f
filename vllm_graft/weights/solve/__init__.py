"""Proposing how a checkpoint's tensors become a model's parameters."""
