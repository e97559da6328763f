"""Loads of a served model through vLLM's layerwise reload, without an engine around it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vllm_graft import WeightError, load_external_weights
from vllm_graft.serve.loading import Loading

E, F, D = 256, 8, 4
MAPPING = {
    "experts.{}.gate.weight": "moe.experts.w1_EFD[{}]",
    "experts.{}.up.weight": "moe.experts.w3_EFD[{}]",
    "bias": "moe.expert_bias_E",
    "proj.weight": "proj.weight",
    "proj.bias": "proj.bias",
}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1_EFD = nn.Parameter(torch.zeros(E, F, D))
        self.w3_EFD = nn.Parameter(torch.zeros(E, F, D))
        self.register_buffer("table", torch.arange(1000.0))


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.register_buffer("expert_bias_E", torch.zeros(E))
        self.register_buffer("tokens_per_expert_E", torch.zeros(E), persistent=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = Moe()
        self.proj = nn.Linear(D, F)

    def load_weights(self, weights) -> None:
        load_external_weights(self, weights, MAPPING)


class Served:
    """A model in vLLM's hands."""

    def __init__(self, model: nn.Module | None = None) -> None:
        from vllm.model_executor.model_loader import reload

        self.model = model or Model()
        self.loading = Loading("Arch", self.model)
        self.reload = reload
        reload.record_metadata_for_reloading(self.model)

    def start(self, tensors) -> None:
        self.loading.take(tensors.items())
        assert self.loading.finish()

    def update(self, tensors, one_by_one: bool = True) -> None:
        self.reload.initialize_layerwise_reload(self.model)
        for chunk in [[item] for item in tensors.items()] if one_by_one else [tensors.items()]:
            self.loading.take(chunk)
        self.reload.finalize_layerwise_reload(self.model, None)
        self.loading.finish()


def checkpoint(seed: int):
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    experts = {f"experts.{i}.{n}.weight": rand(F, D) for i in range(E) for n in ("gate", "up")}
    return experts | {"bias": rand(E), "proj.weight": rand(F, D), "proj.bias": rand(F)}


def holds(model, tensors) -> bool:
    experts = model.moe.experts
    return (
        all(torch.equal(experts.w1_EFD[i], tensors[f"experts.{i}.gate.weight"]) for i in range(E))
        and all(torch.equal(experts.w3_EFD[i], tensors[f"experts.{i}.up.weight"]) for i in range(E))
        and torch.equal(model.moe.expert_bias_E, tensors["bias"])
        and torch.equal(model.proj.weight, tensors["proj.weight"])
        and torch.equal(model.proj.bias, tensors["proj.bias"])
    )


@pytest.fixture
def served():
    served = Served()
    served.start(checkpoint(0))
    return served


@pytest.mark.parametrize("one_by_one", [True, False])
def test_an_update_of_stacks_and_buffers_lands_in_the_same_storage(served, one_by_one):
    model = served.model
    storage = {name: p.data_ptr() for name, p in model.named_parameters()}
    for seed in (1, 2):
        served.update(checkpoint(seed), one_by_one)
        assert holds(model, checkpoint(seed))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == storage
    assert torch.equal(model.moe.experts.table, torch.arange(1000.0))
    assert model.moe.tokens_per_expert_E.eq(0).all()


def test_a_direct_write_to_one_expert_works_after_an_update(served):
    served.update(checkpoint(1))
    new = torch.rand(F, D)
    served.loading.take([("experts.7.up.weight", new)])
    assert torch.equal(served.model.moe.experts.w3_EFD[7], new)
    assert served.loading.refusal is None


@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize(
    ("absent", "text"),
    [
        (["experts.3.gate.weight"], r"w1_EFD\[3\] \(expected from 'experts.3.gate.weight'; 255 of"),
        (["bias"], r"moe.expert_bias_E \(expected from 'bias'"),
        (["proj.bias"], r"proj.bias \(expected from 'proj.bias'"),
        (["proj.weight", "proj.bias"], r"2 parameters were left"),
        ([f"experts.{i}.up.weight" for i in range(E)], r"1 parameter was left.*\n  .*w3_EFD \("),
    ],
)
def test_a_partial_update_is_refused_until_a_whole_one(served, absent, text, one_by_one):
    partial = {k: v for k, v in checkpoint(1).items() if k not in absent}
    with pytest.raises(WeightError, match=text):
        served.update(partial, one_by_one)
    assert served.loading.refusal is not None
    served.update(checkpoint(2), one_by_one)
    assert holds(served.model, checkpoint(2)) and served.loading.refusal is None


@pytest.mark.parametrize("absent", ["experts.3.gate.weight", "bias", "proj.bias"])
@pytest.mark.parametrize("one_by_one", [True, False])
def test_a_partial_initial_load_is_refused(absent, one_by_one):
    served, tensors = Served(), checkpoint(0)
    del tensors[absent]
    for chunk in [[item] for item in tensors.items()] if one_by_one else [tensors.items()]:
        assert served.loading.take(chunk) is None
    with pytest.raises(WeightError, match=f"expected from '{absent}'"):
        served.loading.finish()


def test_an_initial_load_names_everything_once_it_is_complete():
    served = Served()
    *first, last = checkpoint(0).items()
    assert all(served.loading.take([item]) is None for item in first)
    assert served.loading.take([last]) == dict(served.model.named_parameters()).keys()


def test_shapes_twice_and_counts_are_checked_in_an_update_too(served):
    for change, text in (
        ({"experts.256.gate.weight": torch.rand(F, D)}, "at least 257 rows"),
        ({"experts.3.gate.weight": torch.rand(D, F)}, r"\(4, 8\) does not fit \(8, 4\)"),
        ({"proj.weight": torch.rand(D, F)}, r"does not fit \(8, 4\) \(transposed\?\)"),
    ):
        with pytest.raises(WeightError, match=text):
            served.update(checkpoint(1) | change)
        served.reload.finalize_layerwise_reload(served.model, None)
    served.update(checkpoint(2))
    assert holds(served.model, checkpoint(2))


def test_fp8_halves_survive_between_the_calls_of_an_update():
    class Fp8(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(130, 200, bias=False)

        def load_weights(self, weights) -> None:
            load_external_weights(self, weights, {"w": "proj.weight"})

    served = Served(Fp8())
    pair = {"w_scale_inv": torch.rand(2, 2), "w": torch.randn(200, 130).to(torch.float8_e4m3fn)}
    served.start(pair)
    twice = {"w_scale_inv": 2 * pair["w_scale_inv"], "w": pair["w"]}
    before = served.model.proj.weight.detach().clone()
    served.update(dict(reversed(twice.items())))
    assert torch.equal(served.model.proj.weight, 2 * before)
    with pytest.raises(WeightError, match="its scale 'w_scale_inv' did not come"):
        served.update({"w": pair["w"]})


@pytest.mark.parametrize("through_loader", [True, False])
def test_other_loaders_count_only_where_they_go_through_the_weight_loader(through_loader):
    class Own(Model):
        def load_weights(self, weights) -> None:
            parameters = dict(self.named_parameters())
            for name, tensor in weights:
                if through_loader:
                    parameters[name].weight_loader(parameters[name], tensor)
                else:
                    parameters[name].data.copy_(tensor)

    served = Served(Own())
    tensors = {n: torch.rand(p.shape) for n, p in served.model.named_parameters()}
    served.start(tensors)
    new = {name: tensor + 1 for name, tensor in tensors.items()}
    if through_loader:
        served.update(new)
        assert all(torch.equal(p, new[n]) for n, p in served.model.named_parameters())
        del new["moe.experts.w3_EFD"]
    with pytest.raises(WeightError, match="moe.experts.w3_EFD"):
        served.update(new)


def test_a_served_model_can_be_copied_and_pickled(served, tmp_path):
    import copy

    assert holds(copy.deepcopy(served.model), checkpoint(0))
    torch.save(served.model, tmp_path / "model.pt")
    assert holds(torch.load(tmp_path / "model.pt", weights_only=False), checkpoint(0))


def test_tensors_that_the_model_was_built_without_are_named_in_a_warning(caplog):
    extra = {f"shared.{n}.weight": torch.rand(2) for n in ("gate", "up")}
    Served().start(checkpoint(0) | extra)
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "2 checkpoint tensors are not served" in record.getMessage()
    assert "shared.gate.weight, shared.up.weight" in record.getMessage()
    caplog.clear()
    Served().start(checkpoint(0))
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
