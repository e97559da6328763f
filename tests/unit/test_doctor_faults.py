"""Faults put into right ports of three architectures are caught, and named first."""

from __future__ import annotations

import pytest
import torch

from tests.doctored import gemma, torchtitan, written
from vllm_graft.doctor.compare import agreement
from vllm_graft.doctor.diagnose import diagnose
from vllm_graft.doctor.sides import trace

ARCHITECTURES = {"written": written, "torchtitan": torchtitan, "gemma": gemma}
PROMPTS = [[3, 14, 15, 92, 65, 35, 89, 79], list(range(1, 30))]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_a_fault_the_port_is_healthy(name):
    adapted, reference, _ = ARCHITECTURES[name].ports()
    want = trace(reference, PROMPTS)
    assert agreement("", trace(adapted, PROMPTS).logprobs, want.logprobs).healthy
    assert ARCHITECTURES[name].FAULTS.keys() == written.FAULTS.keys()


@pytest.mark.parametrize(
    ("name", "fault"),
    [(name, fault) for name, each in ARCHITECTURES.items() for fault in each.FAULTS],
)
def test_fault_is_caught_and_named_first(name, fault):
    adapted, reference, config = ARCHITECTURES[name].ports()
    ARCHITECTURES[name].FAULTS[fault](adapted.module)
    before = trace(adapted, PROMPTS).logprobs
    assert not agreement("", before, trace(reference, PROMPTS).logprobs).healthy
    ranked = diagnose(adapted, reference, PROMPTS, config)
    assert ranked[0].fault == fault, [str(each) for each in ranked]
    assert torch.equal(trace(adapted, PROMPTS).logprobs, before), "the port was changed"
