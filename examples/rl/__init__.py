"""Reinforcement learning on the module that vLLM serves."""
