"""`WeightWatch`: steps that leave no version are seen, and no hook outlives the watch."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

from vllm_graft import ServedOptimizer
from vllm_graft.train.watch import WeightWatch

FUSED = [torch.optim.AdamW, torch.optim.SGD]


def model_of(dtype=torch.float32):
    model = torch.nn.Linear(8, 8).to(dtype)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


@pytest.mark.parametrize("thorough", [False, True])
@pytest.mark.parametrize("kind", FUSED)
def test_a_fused_step_is_a_change(kind, thorough):
    model = model_of()
    watch = WeightWatch(model)
    optimizer = kind(model.parameters(), lr=0.1, fused=True)
    version = model.weight._version
    for _ in range(2):
        assert not watch.changed(thorough=thorough)
        optimizer.step()
        assert model.weight._version == version  # what the watch is to see it by is no version
        assert watch.changed(thorough=thorough)
    assert not watch.changed(thorough=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_served_optimizers_step_is_a_change(dtype):
    model = model_of(dtype)
    watch = WeightWatch(model)
    ServedOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1, fused=True).step()
    assert watch.changed(thorough=False)
    assert not watch.changed(thorough=True)


def test_other_models_steps_are_no_change():
    watch, other = WeightWatch(model_of()), model_of()
    torch.optim.AdamW(other.parameters(), lr=0.1, fused=True).step()
    assert not watch.changed(thorough=False)


def test_the_hook_goes_with_the_watch():
    gc.collect()
    hooks = torch_optimizer._global_optimizer_post_hooks
    before = len(hooks)
    watch = WeightWatch(model_of())
    assert len(hooks) == before + 1
    del watch
    gc.collect()
    assert len(hooks) == before
