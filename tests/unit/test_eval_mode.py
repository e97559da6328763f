"""Serving runs in eval mode whatever flags are set, and gives them back."""

from __future__ import annotations

from torch import nn

from vllm_graft.serve.eval_mode import EvalMode, evaluating


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), nn.Linear(4, 4), nn.Dropout(0.5)
    ).eval()


def flags(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


def assert_serves_in_eval_mode(module: nn.Module, mode: EvalMode) -> None:
    before = flags(module)
    with evaluating(mode.in_training()):
        assert not any(flags(module))
    assert flags(module) == before


def test_a_model_in_training_is_served_in_eval_mode() -> None:
    served = model()
    mode = EvalMode(served)
    assert mode.in_training() == []
    assert_serves_in_eval_mode(served.train(), mode)


def test_a_part_in_training_is_enough() -> None:
    served = model()
    mode = EvalMode(served)
    for part in (served[0], served[0][1], served[2]):
        assert_serves_in_eval_mode(served.eval(), mode)
        part.train()
        assert_serves_in_eval_mode(served, mode)


def test_modules_that_come_later_are_looked_at() -> None:
    served = model()
    mode = EvalMode(served)
    assert mode.in_training() == []
    served.append(nn.Dropout(0.5))
    assert_serves_in_eval_mode(served, mode)
