"""`make demo`: train a small TorchTitan model, serve it in vLLM, check that the two agree."""
