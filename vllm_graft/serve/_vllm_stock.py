"""Stock vLLM: its own implementation of a checkpoint's model, with nothing of Graft's.

Tested with vLLM 0.32 by `tests/contract`.
"""

from __future__ import annotations

from typing import Any

from vllm_graft.serve._vllm import platform_device
from vllm_graft.serve._vllm_engine import in_this_process
from vllm_graft.serve.registry import registrations

_ON_CPU = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
"""RoPE by vLLM's PyTorch code: its CPU kernel is wrong for latent attention, up to 0.32. Can go
with the test that says so (`tests/serve/test_deepseek_v3.py`)."""


def stock_engine(checkpoint: str, **options: Any) -> Any:
    """A `vllm.LLM` in this process that runs the checkpoint by vLLM's own code.

    Args:
        checkpoint: folder in Hugging Face format.
        **options: anything else that `vllm.LLM` takes.
    """
    from vllm import LLM

    corrections = _ON_CPU if platform_device() == "cpu" else {}
    with in_this_process():
        return LLM(checkpoint, model_impl="vllm", **corrections, **options)


def refuse_without_own_model(checkpoint: str) -> None:
    """Raise if vLLM would not run the checkpoint by a model of its own.

    Relies on `registry._VLLM_MODELS`: by architecture the module and class, where
    "transformers" is the backend that runs Transformers' model.

    Raises:
        ValueError: with the reason and what there is instead.
    """
    import vllm
    from transformers import AutoConfig
    from vllm.model_executor.models.registry import _VLLM_MODELS

    arch = (AutoConfig.from_pretrained(checkpoint).architectures or ["no architecture"])[0]
    module, _ = _VLLM_MODELS.get(arch, (None, None))
    if arch in registrations():
        reason = "that name is registered with Graft, so vLLM would run the port once more"
    elif module is None:
        reason = f"vLLM {vllm.__version__} has no implementation of it"
    elif module == "transformers":
        reason = f"vLLM {vllm.__version__} runs it by Transformers' model, not by one of its own"
    else:
        return
    raise ValueError(
        f"{checkpoint}: config.json names {arch}, and {reason}. "
        "Use --reference transformers or --reference original"
    )
