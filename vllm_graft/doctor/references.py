"""The right model: Transformers', the factory's own, or stock vLLM's. Torch only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vllm_graft.adapting import call_factory
from vllm_graft.doctor.engine import options, prefill
from vllm_graft.doctor.sides import LeftOut, ModuleReference, Reference
from vllm_graft.families.handwritten import run_original
from vllm_graft.families.written_out import WrittenOut
from vllm_graft.parallel import ParallelContext
from vllm_graft.serve import _vllm_stock
from vllm_graft.serve.registry import factory_of
from vllm_graft.weights.load import load_external_weights


def reference_of(kind: str, checkpoint: str, arch: str, max_model_len: int) -> Reference:
    """The right model of a checkpoint.

    Args:
        kind: "transformers", "original" or "vllm".
        checkpoint: folder in Hugging Face format.
        arch: registered architecture of the port.
        max_model_len: longest token list that it will get.

    Raises:
        ValueError: there is no such model; names what there may be.
    """
    if kind == "original":
        return original_reference(checkpoint, arch, max_model_len)
    if kind == "vllm":
        return StockEngine(checkpoint, max_model_len)
    return transformers_reference(checkpoint)


class StockEngine(Reference):
    """Stock vLLM's own implementation of a checkpoint, which gives log-probs only.

    Its engine lives as long as a call: beside the port's, memory would have to be shared.

    Args:
        checkpoint: folder in Hugging Face format.
        max_model_len: longest token list that it will get, and one.

    Raises:
        ValueError: vLLM has no implementation of its own for the checkpoint's architecture.
    """

    kind = "vllm"

    def __init__(self, checkpoint: str, max_model_len: int) -> None:
        self._checkpoint, self._max_model_len = checkpoint, max_model_len
        _vllm_stock.refuse_without_own_model(checkpoint)

    def logprobs(self, sequences: Iterable[Sequence[int]]) -> list[torch.Tensor]:
        """See `Reference`.

        Raises:
            RuntimeError: vLLM cannot start its own implementation.
        """
        try:
            llm = _vllm_stock.stock_engine(self._checkpoint, **options(self._max_model_len))
        except Exception as error:
            raise RuntimeError(
                f"stock vLLM cannot start on {self._checkpoint}: {type(error).__name__}: {error}"
            ) from error
        try:
            return [rows.logprobs for rows in prefill(llm, list(sequences))]
        finally:
            llm.llm_engine.engine_core.shutdown()

    def update(self, factor: float, exported: Path) -> None:
        """See `Reference`; vLLM loads what the port exported."""
        self._checkpoint = str(exported)

    def left_out(self) -> list[LeftOut]:
        """See `Reference`."""
        why = "as a reference, vllm gives log-probabilities only"
        return [LeftOut(what, why) for what in ("layers", "gradients", "diagnosis")]


def transformers_reference(checkpoint: str) -> ModuleReference:
    """Transformers' model of the checkpoint, in float32 with eager attention.

    Raises:
        ValueError: the checkpoint lacks tensors that Transformers' model has.
    """
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ValueError(
            f"Transformers' {type(model).__name__} finds {len(missing)} of its tensors missing in "
            f"{checkpoint}, the first is {missing[0]}: not its names. Use --reference original"
        )
    model.eval()
    return ModuleReference(model, lambda t: model(t[None]).logits[0], "transformers")


def original_reference(checkpoint: str, arch: str, max_model_len: int) -> ModuleReference:
    """What the factory returns, untouched, with the checkpoint under the module's own names.

    Attention that has no kernel on CPU, or none with a gradient, is written out; see `WrittenOut`.

    Raises:
        ValueError: the factory returns a model that is adapted already.
        WeightError: a tensor of the module is not in the checkpoint.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    made = SimpleNamespace(hf_config=config, max_model_len=max_model_len, dtype=torch.float32)
    vllm_config = SimpleNamespace(hf_config=config, model_config=made)
    model: Any = call_factory(factory_of(arch), vllm_config, ParallelContext())
    if hasattr(model, "compute_logits") or hasattr(model, "load_weights"):
        raise ValueError(
            f"{arch}: its factory returns a model that is adapted already, so there is no original "
            "to compare with. Use --reference transformers"
        )
    load_external_weights(model, _tensors(checkpoint), {name: name for name in model.state_dict()})
    model.float().eval()
    written_out = WrittenOut()

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        with written_out:
            return run_original(model, tokens[None], torch.arange(len(tokens)))[0]

    return ModuleReference(model, logits, "original", written_out.replaced)


def _tensors(checkpoint: str) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for file in sorted(Path(checkpoint).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (no mapping)
                yield name, opened.get_tensor(name)
