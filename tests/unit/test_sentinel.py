"""Sentinels find what a loader did not write, however it writes, and leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vllm_graft.weights.sentinel import Sentinels


def copy_in(p: nn.Parameter, value: torch.Tensor) -> None:
    with torch.no_grad():
        p.copy_(value)


def through_data(p: nn.Parameter, value: torch.Tensor) -> None:
    p.data.copy_(value)


def by_rows(p: nn.Parameter, value: torch.Tensor) -> None:
    for row in range(len(p)):
        p.data[row] = value[row]


@pytest.mark.parametrize("write", [copy_in, through_data, by_rows])
def test_every_way_of_writing_is_seen(write):
    written, left = (nn.Parameter(torch.rand(9, 5)) for _ in range(2))
    before, value = left.detach().clone(), torch.rand(9, 5)
    sentinels = Sentinels({"written": written, "left": left})
    write(written, value)
    assert sentinels.unwritten() == {"left": "missing"}
    sentinels.remove()
    assert torch.equal(written, value) and torch.equal(left, before)


def test_a_half_written_parameter_is_told_apart():
    fused = nn.Parameter(torch.rand(12, 4))
    sentinels = Sentinels({"qkv": fused})
    fused.data[:8] = 1.0
    assert sentinels.unwritten() == {"qkv": "only partly written"}
    sentinels.remove()
    assert not fused.isnan().any()


def test_one_absent_expert_of_256_is_seen():
    stack = nn.Parameter(torch.rand(256, 3, 5))
    sentinels = Sentinels({"w1_EFD": stack})
    with torch.no_grad():
        for row in set(range(256)) - {131}:
            stack[row] = 1.0
    assert sentinels.unwritten() == {"w1_EFD": "only partly written"}
    with torch.no_grad():
        stack[131] = 1.0
    assert sentinels.unwritten() == {}


def test_odd_tensors():
    tied = nn.Parameter(torch.rand(3, 3))
    odd = {
        "tied": tied,
        "alias": tied,
        "transposed": nn.Parameter(torch.rand(4, 6).t()),
        "bf16": nn.Parameter(torch.rand(1).bfloat16()),
        "counter": torch.zeros(3, dtype=torch.long),
        "meta": torch.empty(3, device="meta"),
        "empty": torch.empty(0),
        "fp8": torch.zeros(3).to(torch.float8_e4m3fn),
        "expanded": nn.Parameter(torch.rand(1, 3).expand(4, 3)),
    }
    before = odd["transposed"].detach().clone()
    sentinels = Sentinels(odd)
    assert set(sentinels.unwritten()) == {"tied", "transposed", "bf16"}
    sentinels.remove()
    assert torch.equal(odd["transposed"], before)
