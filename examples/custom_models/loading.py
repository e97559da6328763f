"""Loading a whole checkpoint: nothing left over, nothing dropped but multi-token prediction."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from vllm_graft import WeightError, load_external_weights
from vllm_graft.weights.mapping import NameMapping


def load_checkpoint(
    model: nn.Module, weights_iter: Iterable[tuple[str, torch.Tensor]], name_mapping: NameMapping
) -> None:
    """Load a Hugging Face checkpoint into a model that its config describes.

    Args:
        model: see `load_external_weights`, as for the other two.
        weights_iter: its tensors under Hugging Face names.
        name_mapping: Hugging Face names to the model's.

    Raises:
        WeightError: tensors left over, or a layer of the decoder among those that the
            mapping drops: the config describes another model than the weights.
    """
    report = load_external_weights(
        model=model, weights_iter=weights_iter, name_mapping=name_mapping
    ).report
    if report.skipped:
        raise WeightError(
            f"{len(report.skipped)} checkpoint tensors have no place in the model that the "
            f"config describes: {', '.join(report.skipped[:8])}"
        )
    _check_predictors(report.dropped)


def _check_predictors(dropped: list[str]) -> None:
    """Raise if a dropped layer is no multi-token prediction layer but one of the decoder's."""
    layers = {name.split(".")[2] for name in dropped if name.endswith(".input_layernorm.weight")}
    for layer in layers:
        if f"model.layers.{layer}.eh_proj.weight" not in dropped:
            raise WeightError(
                f"model.layers.{layer} would be dropped as multi-token prediction, but it has "
                "no eh_proj: num_hidden_layers or num_nextn_predict_layers is wrong"
            )
