"""Masters and stochastic rounding: small steps are not lost, and nothing else changes."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from vllm_graft import ServedOptimizer
from vllm_graft.train.optimizer import round_stochastically


def model_of(dtype):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 8)).to(dtype)


def train(model, optimizer, steps, scheduler=None):
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = noise.to(torch.bfloat16).to(parameter.dtype)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


def test_masters_are_a_float32_training_rounded():
    served, exact = model_of(torch.bfloat16), model_of(torch.bfloat16).float()
    optimizer = ServedOptimizer(served.parameters(), torch.optim.AdamW, lr=1e-6)
    reference = torch.optim.AdamW(exact.parameters(), lr=1e-6)
    schedulers = [
        torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=20)
        for o in (optimizer, reference)
    ]
    train(served, optimizer, 100, schedulers[0])
    train(exact, reference, 100, schedulers[1])
    for p, q in zip(served.parameters(), exact.parameters(), strict=True):
        assert torch.equal(p, q.to(torch.bfloat16))
    assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]


def test_steps_that_bf16_would_lose_are_kept():
    plain, served = model_of(torch.bfloat16), model_of(torch.bfloat16)
    before = [p.clone() for p in plain.parameters()]
    for model, optimizer in (
        (plain, torch.optim.AdamW(plain.parameters(), lr=1e-6)),
        (served, ServedOptimizer(served.parameters(), torch.optim.AdamW, lr=1e-6)),
    ):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        for _ in range(100):
            optimizer.step()

    def moved(model):
        pairs = zip(model.parameters(), before, strict=True)
        return sum(int((p != b).sum()) for p, b in pairs)

    assert moved(served) > 10 * moved(plain)


def test_stochastic_rounding_has_the_right_mean_and_neighbours():
    torch.manual_seed(0)
    value = torch.tensor(1.0 + 2**-7 * 0.3)  # 0.3 of the way between two bf16 numbers
    rounded = round_stochastically(value.repeat(100_000), torch.bfloat16).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    # 100,000 draws: the standard error of the share is 0.0015.
    assert abs((rounded > 1).float().mean() - 0.3) < 0.006
    exact = torch.randn(1000).to(torch.bfloat16)
    assert torch.equal(round_stochastically(exact.float(), torch.bfloat16), exact)
    assert round_stochastically(-value.repeat(9), torch.bfloat16).max() < 0


def test_stochastic_rounding_follows_a_float32_training():
    served, exact = model_of(torch.bfloat16), model_of(torch.bfloat16).float()
    start = [p.detach().clone() for p in exact.parameters()]
    optimizer = ServedOptimizer(
        served.parameters(), torch.optim.SGD, rounding="stochastic", lr=1e-4
    )
    train(served, optimizer, 400)
    train(exact, torch.optim.SGD(exact.parameters(), lr=1e-4), 400)
    change = torch.cat(
        [(p.float() - s).flatten() for p, s in zip(served.parameters(), start, strict=True)]
    )
    wanted = torch.cat([(p - s).flatten() for p, s in zip(exact.parameters(), start, strict=True)])
    slope = float(((change @ wanted) / (wanted @ wanted)).detach())
    assert 0.8 < slope < 1.2  # unbiased; 800 entries with noise of about the change itself
    assert all(m.numel() == 0 for _, m in optimizer._apart())


def through_version(parameter, value):
    with torch.no_grad():
        parameter.fill_(value)


def through_data(parameter, value):
    parameter.data.fill_(value)


def other_storage(parameter, value):
    parameter.data = torch.full_like(parameter, value)


@pytest.mark.parametrize("write", [through_version, through_data, other_storage])
@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_foreign_writes_and_float32_parameters(rounding, write):
    model = model_of(torch.bfloat16)
    model[1].float()
    optimizer = ServedOptimizer(model.parameters(), torch.optim.SGD, rounding=rounding, lr=0.5)
    train(model, optimizer, 1)
    write(model[0].weight, 3.0)
    write(model[1].weight, 5.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(model[0].weight, torch.full_like(model[0].weight, 2.5))
    assert torch.equal(model[1].weight, torch.full_like(model[1].weight, 4.5))


def test_a_saved_state_goes_on_where_it_was():
    one, two = model_of(torch.bfloat16), model_of(torch.bfloat16)
    first = ServedOptimizer(one.parameters(), lr=1e-4)
    train(one, first, 5)
    second = ServedOptimizer(two.parameters(), lr=1.0)
    second.load_state_dict(deepcopy(first.state_dict()))
    train(one, first, 5)
    train(two, second, 5)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)
    other = ServedOptimizer(two.parameters(), rounding="stochastic", lr=1e-4)
    with pytest.raises(ValueError, match="4 masters, this optimizer 0"):
        other.load_state_dict(first.state_dict())


def test_bad_use_is_refused():
    model = model_of(torch.float16)
    with pytest.raises(ValueError, match="rounding='down'"):
        ServedOptimizer(model.parameters(), rounding="down")
    with pytest.raises(ValueError, match="bfloat16 parameters, got torch.float16"):
        ServedOptimizer(model.parameters(), rounding="stochastic")
    optimizer = ServedOptimizer(model.parameters())
    with pytest.raises(NotImplementedError, match="build a new one"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
