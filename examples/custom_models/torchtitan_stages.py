"""One pipeline stage of a TorchTitan decoder, for the examples beside this file."""

from __future__ import annotations

from typing import Any

from vllm_graft import OtherStage


class _OtherStageConfig:
    """Stands in a decoder's config for what another stage builds."""

    def build(self) -> OtherStage:
        return OtherStage()


def keep_stage(config: Any, parallel_context: Any) -> None:
    """Leave in a decoder's config what this pipeline stage holds; layers keep their numbers.

    Tied embeddings are on the first stage and, with the head, on the last one.

    Args:
        config: of the whole decoder, with its sharding set; changed in place.
        parallel_context: vLLM's, from the factory.

    Raises:
        ValueError: fewer layers than stages.
    """
    count = len(config.layers)
    own = parallel_context.stage_layers(count)
    first, last = own.start == 0, own.stop == count
    elsewhere: Any = _OtherStageConfig()
    config.layers = [
        layer if index in own else elsewhere for index, layer in enumerate(config.layers)
    ]
    if not last:
        config.norm = config.lm_head = elsewhere
    if not (first or (last and config.enable_weight_tying)):
        config.tok_embeddings = elsewhere
    config.enable_weight_tying = config.enable_weight_tying and last
