"""vLLM's configuration: a format for models without a Hugging Face config, clearer refusals.

Relies on `register_config_parser`, and on vLLM handing `hf_overrides` to the parser.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from vllm_graft.order import ORDER
from vllm_graft.serve.own_config import FORMAT, described


def show_order(config: Any, registered: Callable[[], Collection[str]]) -> None:
    """Let vLLM's refusal of query heads that ranks cannot share say what a Graft model needs.

    vLLM raises it from the configuration, before any factory is called. Relies on
    `ModelConfig.verify_with_parallel_config`, up to 0.32. Idempotent.

    Args:
        config: vLLM's class `ModelConfig`.
        registered: the architectures that are Graft's.
    """
    stock = config.verify_with_parallel_config
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def verify(self: Any, parallel_config: Any) -> None:
        try:
            stock(self, parallel_config)
        except ValueError as error:
            ours = set(self.architectures) & set(registered())
            if not ours or "attention heads" not in str(error):
                raise
            raise ValueError(
                f"{error} Each rank serves an equal share of the heads: choose a "
                f"tensor_parallel_size that divides them. The factory's order: {ORDER}"
            ) from None

    config.verify_with_parallel_config = verify


def register_parser(factory_of: Callable[[str], Callable[..., Any]]) -> None:
    """Let vLLM read `config_format="graft"`. Idempotent.

    Args:
        factory_of: the factory of a registered architecture.
    """
    from transformers import PretrainedConfig
    from vllm.transformers_utils import config as vllm_config
    from vllm.transformers_utils.config_parser_base import ConfigParserBase

    if FORMAT in vllm_config._CONFIG_FORMAT_TO_CONFIG_PARSER:
        return

    @vllm_config.register_config_parser(FORMAT)  # type: ignore[untyped-decorator]
    class GraftConfigParser(ConfigParserBase):  # type: ignore[misc]
        """Reads the config object of the factory that `hf_overrides` names."""

        def parse(
            self, model: str | Path, *_: Any, hf_overrides: Any = None, **__: Any
        ) -> tuple[dict[str, Any], Any]:
            """The config as a dictionary and as vLLM holds it."""
            # vLLM asks once more, for generation settings, without naming the architecture.
            if not isinstance(hf_overrides, dict) or not hf_overrides.get("architectures"):
                return {}, PretrainedConfig()
            fields = described(Path(model), factory_of(hf_overrides["architectures"][0]))
            return fields, PretrainedConfig(**fields)
