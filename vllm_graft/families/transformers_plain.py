"""Transformers' models that ask no attention interface (Bloom, MPT, Falcon, GPT-J and others)."""

from __future__ import annotations

from typing import Any

from vllm_graft.families.handwritten import PlainForCausalLM
from vllm_graft.families.transformers_exact import correct_layers
from vllm_graft.families.transformers_names import SavedByTransformers


class PlainTransformersForCausalLM(SavedByTransformers, PlainForCausalLM):
    """A Transformers model whose attention is found as in one written by hand.

    Its checkpoint is the one that Transformers saves.
    """

    def __init__(self, model: Any) -> None:
        correct_layers(model)
        super().__init__(model)
