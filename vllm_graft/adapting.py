"""`adapt`: a servable, trainable model from any supported module, without a wrapper class."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from vllm_graft.model import VLLMModelForCausalLM

_OWN_WAY = ("compute_logits", "load_weights")
"""Who has one of these was written for the Custom Model API, and is told what is missing."""


def adapt(model_or_factory: Any, config: Any = None) -> VLLMModelForCausalLM:
    """A `VLLMModelForCausalLM` around a model that maps token ids to logits.

    Args:
        model_or_factory: a module with weights on a real device, or a callable that
            builds one. The module is changed in place, its names stay.
        config: the factory's argument; None for a factory that takes none.

    Raises:
        TypeError: neither a module nor a callable that builds one.
        ValueError: attention that cannot be served, with the module's name.
    """
    model = model_or_factory
    if isinstance(model, type) or not isinstance(model, nn.Module):
        if not callable(model):
            raise TypeError(f"adapt takes a module or a factory, got {type(model).__name__}")
        model = model() if config is None else model(config)
    if isinstance(model, VLLMModelForCausalLM):
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"the factory returned {type(model).__name__}, not an nn.Module")
    if is_transformers(model):
        return _adapt_transformers(model)
    from vllm_graft.families.handwritten import PlainForCausalLM

    return PlainForCausalLM(model)


def _adapt_transformers(model: Any) -> VLLMModelForCausalLM:
    # The class says whether it asks Transformers' table of attention functions.
    if getattr(model, "_supports_attention_backend", False):
        from vllm_graft.families.transformers import TransformersForCausalLM

        return TransformersForCausalLM(model)
    from vllm_graft.families.transformers_plain import PlainTransformersForCausalLM

    return PlainTransformersForCausalLM(model)


def asks_for_adapt(model: nn.Module) -> bool:
    """Whether a factory returned a model for token ids with nothing of the Custom Model API."""
    if any(hasattr(model, name) for name in _OWN_WAY):
        return False
    return any(isinstance(module, nn.Embedding) for module in model.modules())


def is_transformers(model: nn.Module) -> bool:
    """Whether the model has Transformers' switch for attention functions."""
    return hasattr(model, "set_attn_implementation") and hasattr(model, "base_model")


def call_factory(factory: Any, vllm_config: Any, parallel_context: Any) -> Any:
    """Call a factory with what its signature asks for.

    A class with a parameter `vllm_config` gets both arguments by name. A callable with one
    required parameter of another name gets the Hugging Face config, one that requires none
    gets nothing, and any other one gets both in order.
    """
    if isinstance(factory, type) and issubclass(factory, VLLMModelForCausalLM):
        return factory(vllm_config=vllm_config, parallel_context=parallel_context)
    parameters = inspect.signature(factory).parameters
    if isinstance(factory, type) and "vllm_config" in parameters:
        return factory(vllm_config=vllm_config, parallel_context=parallel_context)
    required = _required(parameters.values())
    kinds = {parameter.kind for parameter in parameters.values()}
    open_ended = inspect.Parameter.VAR_POSITIONAL in kinds
    # Transformers' `from_config` shows nothing but `**kwargs`: it cannot be meant for two.
    hidden = kinds == {inspect.Parameter.VAR_KEYWORD} and not isinstance(factory, type)
    if hidden or ("vllm_config" not in parameters and required == 1):
        return factory(vllm_config.model_config.hf_config)
    if "vllm_config" not in parameters and not required and not open_ended:
        return factory()
    return factory(vllm_config, parallel_context)


def _required(parameters: Any) -> int:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)
