"""The doctor's comparison: what agrees, what does not, and where."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.doctored.written import Model, reference_of
from vllm_graft.doctor.compare import agreement, divergences, first
from vllm_graft.doctor.sides import Adapted, trace

PROMPTS = [[3, 14, 15, 92, 65, 35, 89, 79], list(range(1, 30))]


def test_equal_models_agree_everywhere():
    model = Model()
    want, got = trace(reference_of(model), PROMPTS), trace(Adapted(copy.deepcopy(model)), PROMPTS)
    assert agreement("training forward", got.logprobs, want.logprobs).healthy
    roles = [each.role for each in divergences(got, want)]
    assert roles == ["embedding", "layer 0 attention", "layer 0", "layer 1 attention", "layer 1"]
    assert first(divergences(got, want)) is None


def test_the_first_diverging_spot_has_name_and_both_values():
    model = Model()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.layers[1].self_attn.o_proj.weight.mul_(2)
    found = first(divergences(trace(Adapted(broken), PROMPTS), trace(reference_of(model), PROMPTS)))
    assert (found.role, found.name) == ("layer 1 attention", "layers.1.self_attn")
    assert found.value == pytest.approx(2 * found.expected, rel=1e-4)
