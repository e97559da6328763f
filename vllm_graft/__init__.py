"""Graft: any PyTorch causal language model in stock vLLM, still trainable.

Importing this package loads neither torch nor vLLM. Each public name is
imported from its module on first use; `__all__` is the whole public API.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "VLLMModelForCausalLM": "vllm_graft.model",
    "adapt": "vllm_graft.adapting",
    "CoreAttention": "vllm_graft.attention.core",
    "TrainableFlashAttention": "vllm_graft.attention.flash",
    "MLAConfig": "vllm_graft.attention.mla",
    "TrainableMLA": "vllm_graft.attention.mla",
    "create_mla_kv_cache_spec": "vllm_graft.attention.mla",
    "replace_with_trainable_attention": "vllm_graft.attention.replace",
    "SwapReport": "vllm_graft.attention.replace",
    "record_routing": "vllm_graft.routing",
    "convert_freqs_cis_to_real": "vllm_graft.rope",
    "store_positions_in_context": "vllm_graft.positions",
    "packed": "vllm_graft.positions",
    "load_external_weights": "vllm_graft.weights.load",
    "export_weights": "vllm_graft.weights.export",
    "LoadReport": "vllm_graft.weights.account",
    "WeightPlan": "vllm_graft.weights.solve.plan",
    "load_weight_plan": "vllm_graft.weights.solve.plan",
    "solve_weight_plan": "vllm_graft.weights.solve.solver",
    "RowOrder": "vllm_graft.weights.rows",
    "Rows": "vllm_graft.weights.rows",
    "interleave_rope_rows": "vllm_graft.weights.rows",
    "WeightError": "vllm_graft.weights.errors",
    "ParallelContext": "vllm_graft.parallel",
    "OtherStage": "vllm_graft.stage",
    "TrainableLLM": "vllm_graft.train.llm",
    "TrainableAsyncLLM": "vllm_graft.train.async_llm",
    "make_exact": "vllm_graft.exact",
    "verify_exactness": "vllm_graft.train.exactness",
    "ExactnessReport": "vllm_graft.train.exactness",
    "ServedOptimizer": "vllm_graft.train.optimizer",
    "push_weights": "vllm_graft.train.push",
    "register": "vllm_graft.serve.registry",
    "RegistrationError": "vllm_graft.serve.registry",
}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vllm_graft' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from vllm_graft.adapting import adapt as adapt
    from vllm_graft.attention.core import CoreAttention as CoreAttention
    from vllm_graft.attention.flash import TrainableFlashAttention as TrainableFlashAttention
    from vllm_graft.attention.mla import MLAConfig as MLAConfig
    from vllm_graft.attention.mla import TrainableMLA as TrainableMLA
    from vllm_graft.attention.mla import create_mla_kv_cache_spec as create_mla_kv_cache_spec
    from vllm_graft.attention.replace import SwapReport as SwapReport
    from vllm_graft.attention.replace import (
        replace_with_trainable_attention as replace_with_trainable_attention,
    )
    from vllm_graft.exact import make_exact as make_exact
    from vllm_graft.model import VLLMModelForCausalLM as VLLMModelForCausalLM
    from vllm_graft.parallel import ParallelContext as ParallelContext
    from vllm_graft.positions import packed as packed
    from vllm_graft.positions import store_positions_in_context as store_positions_in_context
    from vllm_graft.rope import convert_freqs_cis_to_real as convert_freqs_cis_to_real
    from vllm_graft.routing import record_routing as record_routing
    from vllm_graft.serve.registry import RegistrationError as RegistrationError
    from vllm_graft.serve.registry import register as register
    from vllm_graft.stage import OtherStage as OtherStage
    from vllm_graft.train.async_llm import TrainableAsyncLLM as TrainableAsyncLLM
    from vllm_graft.train.exactness import ExactnessReport as ExactnessReport
    from vllm_graft.train.exactness import verify_exactness as verify_exactness
    from vllm_graft.train.llm import TrainableLLM as TrainableLLM
    from vllm_graft.train.optimizer import ServedOptimizer as ServedOptimizer
    from vllm_graft.train.push import push_weights as push_weights
    from vllm_graft.weights.account import LoadReport as LoadReport
    from vllm_graft.weights.errors import WeightError as WeightError
    from vllm_graft.weights.export import export_weights as export_weights
    from vllm_graft.weights.load import load_external_weights as load_external_weights
    from vllm_graft.weights.rows import RowOrder as RowOrder
    from vllm_graft.weights.rows import Rows as Rows
    from vllm_graft.weights.rows import interleave_rope_rows as interleave_rope_rows
    from vllm_graft.weights.solve.plan import WeightPlan as WeightPlan
    from vllm_graft.weights.solve.plan import load_weight_plan as load_weight_plan
    from vllm_graft.weights.solve.solver import solve_weight_plan as solve_weight_plan
