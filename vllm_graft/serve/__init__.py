"""The vLLM side: registration, the adapter and the paged layers."""
