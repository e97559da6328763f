"""A pipeline stage holds its part of a model, and accounts for its part of a checkpoint."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.unit.test_load_weights import MAPPING, Model, checkpoint
from tests.unit.test_replace import Llama
from vllm_graft import (
    CoreAttention,
    OtherStage,
    ParallelContext,
    WeightError,
    export_weights,
    load_external_weights,
    replace_with_trainable_attention,
)
from vllm_graft.serve.body import TokenBody
from vllm_graft.serve.dry_run import DryRun
from vllm_graft.serve.stages import Stage, check_stages


def stage(own: range, *, tied: bool = False) -> Model:
    """The model of `test_load_weights`, 4 layers, with the layers `own`."""
    model = Model(4, tied=tied)
    for index in range(4):
        if index not in own:
            model.layers[index] = OtherStage()
    if own.start > 0 and not (tied and own.stop == 4):
        model.emb = OtherStage()
    if own.stop < 4:
        model.head = OtherStage()
    return model


def test_the_stages_share_a_checkpoint_and_read_nothing_of_each_other():
    tensors = checkpoint(4)
    shares = []
    for own in (range(2), range(2, 3), range(3, 4)):
        model = stage(own)
        report = load_external_weights(model, tensors.items(), MAPPING).report
        shares.append(set(report.loaded))
        assert shares[-1].isdisjoint(report.elsewhere)
        assert shares[-1] | set(report.elsewhere) == tensors.keys()
        # Tensors without values would fail to be read.
        own_only = {n: t if n in shares[-1] else t.to("meta") for n, t in tensors.items()}
        assert set(load_external_weights(stage(own), own_only.items(), MAPPING).report.loaded)
        for name, tensor in export_weights(model, MAPPING):
            assert torch.equal(tensor, tensors[name])
        assert {name for name, _ in export_weights(model, MAPPING)} == shares[-1]
    assert sum(len(share) for share in shares) == len(tensors)


def test_tied_embeddings_are_on_the_first_and_the_last_stage():
    tensors = checkpoint(4, **{"head.weight": None})
    first, last = stage(range(2), tied=True), stage(range(2, 4), tied=True)
    for model in (first, last):
        load_external_weights(model, tensors.items(), MAPPING)
    assert torch.equal(first.emb.weight, tensors["model.embed.weight"])
    assert torch.equal(last.head.weight, tensors["model.embed.weight"])


@pytest.mark.parametrize(
    ("mapping", "tensors", "text"),
    [
        ({"head.weight": "haed.weight"}, {}, "'haed.weight': the model has no such parameter"),
        ({}, {"model.layers.4.w.weight": torch.rand(6, 4)}, "layers.4.weight.* does not have"),
        ({}, {"model.layers.0.w.weight": None}, "layers.0.weight"),
    ],
)
def test_what_no_stage_has_is_still_refused(mapping, tensors, text):
    pairs = checkpoint(4, **tensors).items()
    with pytest.raises(WeightError, match=text):
        load_external_weights(stage(range(2)), pairs, MAPPING | mapping)


def test_attention_is_replaced_in_the_layers_of_this_stage():
    model = Llama()
    model.layers[0] = OtherStage()
    report = replace_with_trainable_attention(model)
    assert [layer.name for layer in report.layers] == ["layers.1.attention"]
    assert sum(isinstance(m, CoreAttention) for m in model.modules()) == 1


def test_a_place_of_another_stage_passes_its_input_on():
    h = torch.rand(3, 4)
    assert OtherStage()(h, None, positions=torch.arange(3)) is h


def test_without_stages_all_layers_are_here():
    assert ParallelContext().stage_layers(3) == range(3)


class TwoStages:
    """A context of two stages whose other one said `other`."""

    def __init__(self, monkeypatch, other):
        def gather(results, mine, group):
            results[:] = [mine, other]

        monkeypatch.setattr(dist, "all_gather_object", gather)

    def get_pp_process_group(self):
        return "group"

    def get_pipeline_parallel_world_size(self):
        return 2


def test_stages_that_make_up_the_model_are_accepted(monkeypatch):
    check_stages(["layers.0"], {"b"}, TwoStages(monkeypatch, ({"layers.1"}, {"a"})))


def test_a_layer_on_two_stages_is_refused(monkeypatch):
    context = TwoStages(monkeypatch, ({"layers.0", "layers.1"}, set()))
    with pytest.raises(RuntimeError, match=r"several stages hold layers\.0: build only"):
        check_stages(["layers.0"], set(), context)


def test_a_tensor_that_every_stage_leaves_to_others_is_refused(monkeypatch):
    context = TwoStages(monkeypatch, ({"layers.1"}, {"a", "b"}))
    with pytest.raises(WeightError, match="no pipeline stage holds the checkpoint tensors b"):
        check_stages(["layers.0"], {"b"}, context)


class Part(nn.Module):
    """A stage of width 4 for the dry run."""

    def __init__(self, *, listens: bool = True, width: int = 4, dtype=torch.float32) -> None:
        super().__init__()
        self.emb, self.listens, self.dtype = nn.Embedding(8, 4), listens, dtype
        self.out = nn.Linear(4, width)

    def forward(self, input_ids, positions=None, hidden_states=None, **kwargs):
        use = self.listens and hidden_states is not None
        return self.out(hidden_states if use else self.emb(input_ids)).to(self.dtype)


def try_out(model: nn.Module, index: int) -> None:
    DryRun(
        arch="Arch", model=model, body=TokenBody(model=model, vllm_config=None), paged=[],
        stage=Stage(index=index, count=2, width=4, dtype=torch.float32), vocab_size=4,
        max_model_len=64, compute_logits=lambda hidden: hidden,
    ).run()  # fmt: skip


def test_the_dry_run_accepts_both_stages():
    try_out(Part(), 0)
    try_out(Part(), 1)


def test_a_later_stage_that_starts_from_the_tokens_is_refused():
    with pytest.raises(RuntimeError, match="stage 1 of 2 ignores the hidden states of the stage"):
        try_out(Part(listens=False), 1)


@pytest.mark.parametrize("wrong", [{"width": 6}, {"dtype": torch.bfloat16}])
def test_hidden_states_that_the_next_stage_cannot_receive_are_refused(wrong):
    with pytest.raises(RuntimeError, match=r"next stage receives width 4 .* in torch.float32"):
        try_out(Part(**wrong), 0)
