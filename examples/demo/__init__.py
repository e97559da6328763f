"""`make demo`: small TorchTitan models in vLLM, trained and served; checks that the two agree."""
