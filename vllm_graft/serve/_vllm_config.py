"""A config format of vLLM for models without a Hugging Face config.

Relies on `register_config_parser`, and on vLLM handing `hf_overrides` to the parser.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_graft.serve.own_config import FORMAT, described


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
