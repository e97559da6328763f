"""`make demo`: small TorchTitan models, served in vLLM and trained, and checks that the two agree."""
