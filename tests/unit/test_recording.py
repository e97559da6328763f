"""A forward written down as a graph: eager bits for every number of tokens, or a reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vllm_graft.serve.recording import NotRecordableError, Recording, record

D = 32


class Model(nn.Module):
    """Token ids and positions to hidden states; `own` is what a test adds."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.norm = nn.Embedding(64, D), nn.Linear(D, D), nn.LayerNorm(D)
        self.register_buffer("scale", torch.linspace(0.5, 2, D))

    def forward(self, tokens, positions):
        x = self.table(tokens) + positions[:, None]
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        return self.own(self.norm(torch.tanh(self.up(x))))

    def own(self, x):
        return x


def recorded(model: nn.Module, most: int = 1024, exact: bool = True) -> Recording:
    return record(model, model.forward, torch.int64, most=most, exact=exact)


def sample(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(count) * 5 % 64, torch.arange(count) + 3


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 7, 130])
def test_a_recording_has_the_bits_of_the_forward(count):
    model = Model()
    assert torch.equal(recorded(model)(*sample(count)), model(*sample(count)))


@torch.no_grad()
def test_weights_are_those_that_the_model_has_now():
    model = Model()
    recording = recorded(model)
    model.up.weight.add_(1)
    assert torch.equal(recording(*sample(5)), model(*sample(5)))
    model.load_state_dict({n: t + 1 for n, t in model.state_dict().items()}, assign=True)
    assert torch.equal(recording(*sample(5)), model(*sample(5)))


@torch.no_grad()
def test_a_table_in_a_plain_attribute_is_the_one_that_the_model_has_now():
    class Tabled(Model):
        def __init__(self):
            super().__init__()
            self.rows = torch.rand(64, D)

        def own(self, x):
            return x + self.rows[0]

    model = Tabled()
    recording = recorded(model)
    model.rows = model.rows + 1
    assert torch.equal(recording(*sample(5)), model(*sample(5)))


def test_sums_stay_eager_and_the_rest_is_the_compilers():
    exact, fast = recorded(Model()).source, recorded(Model(), exact=False).source
    assert "vllm_graft.eager_aten_mean_dim" in exact
    assert "vllm_graft.eager_aten_tanh" in exact
    assert "aten.mean.dim" in fast
    assert "vllm_graft.eager" not in fast
    for source in (exact, fast):
        assert "aten.mul.Tensor" in source
        assert "self.model.up.weight" in source
        assert "self.model.scale" in source


@torch.no_grad()
def test_masks_that_nothing_reads_limit_nothing():
    class Masked(Model):
        def own(self, x):
            self.mask_of(x)
            return x

        def mask_of(self, x):
            return torch.ones(64, 64).tril()[: x.shape[0], : x.shape[0]] == 0

    model = Masked()
    recording = recorded(model)
    assert "tril" not in recording.source
    assert torch.equal(recording(*sample(130)), model(*sample(130)))


class Branches(Model):
    def own(self, x):
        return x * 2 if x.shape[0] > 100 else x


class Counts(Model):
    def own(self, x):
        return x + torch.tensor(list(range(len(x))))[:, None]


class Cuts(Model):
    def own(self, x):
        return x + self.table.weight[: x.shape[0]]


class Looks(Model):
    def own(self, x):
        return x * 2 if x.sum() > 0 else x


class Selects(Model):
    def own(self, x):
        return x[x[:, 0] > 0]


class Keeps(Model):
    last = None

    def own(self, x):
        self.last = x
        return x


class Writes(Model):
    def own(self, x):
        return x.clone().exp_()


REFUSED = {
    Branches: r"test_recording.py:\d+ in own\) asks for T <= 100 of T tokens, which a step of 101 ",
    Counts: "in own. fixes the number of tokens",
    Cuts: "asks for .*T.*64|64.*T",
    Looks: "DataDependent",
    Selects: "follows from values|DataDependent|DynamicOutput",
    Keeps: "keeps a tensor as last",
    Writes: "exp_.default writes into its argument",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_no_graph_can_do_is_refused_with_the_reason(kind):
    with pytest.raises(NotRecordableError, match=REFUSED[kind]):
        recorded(kind())


def test_a_branch_beyond_any_step_is_no_reason():
    model = Branches()
    assert recorded(model, most=100)


def test_a_refused_model_is_as_it_was():
    model = Keeps()
    with pytest.raises(NotRecordableError):
        recorded(model)
    assert "last" not in vars(model)
    assert all(type(p) is nn.Parameter for p in model.parameters())
