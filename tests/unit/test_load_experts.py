"""Stacks of experts, wildcard drops, row orders, block FP8: exact, every row accounted for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vllm_graft import RowOrder, WeightError, load_external_weights
from vllm_graft.weights.fp8 import check_scale, dequantize
from vllm_graft.weights.load import Load
from vllm_graft.weights.slots import tied_names

E, F, D = 256, 2, 3


class Model(nn.Module):
    def __init__(self, experts: int = E) -> None:
        super().__init__()
        self.moe = nn.Module()
        self.moe.w1_EFD = nn.Parameter(torch.zeros(experts, F, D))
        self.moe.register_buffer("expert_bias_E", torch.zeros(experts))
        self.moe.register_buffer("counter_E", torch.zeros(experts), persistent=False)
        self.norm = nn.Parameter(torch.zeros(4))


MAPPING = {
    "model.layers.61.*": None,
    "mlp.experts.{}.gate_proj.weight": "moe.w1_EFD[{}]",
    "mlp.gate.e_score_correction_bias": "moe.expert_bias_E",
    "norm.weight": "norm",
}


def checkpoint(experts: int = E, **changes):
    tensors = {f"mlp.experts.{i}.gate_proj.weight": torch.rand(F, D) for i in range(experts)}
    tensors |= {"mlp.gate.e_score_correction_bias": torch.rand(E), "norm.weight": torch.rand(4)}
    tensors |= changes
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def load(tensors, model=None, mapping=MAPPING):
    model = model or Model()
    return model, load_external_weights(model, tensors.items(), mapping).report


def expert(i: int) -> str:
    return f"mlp.experts.{i}.gate_proj.weight"


def test_experts_land_in_their_rows_in_any_order():
    tensors = checkpoint()
    model, report = load(dict(reversed(tensors.items())))
    assert torch.equal(model.moe.w1_EFD, torch.stack([tensors[expert(i)] for i in range(E)]))
    assert report.loaded[expert(3)] == "moe.w1_EFD[3]"
    assert report.missing == [] and report.numel == E * F * D + E + 4


def test_one_absent_expert_of_256_is_named():
    with pytest.raises(
        WeightError,
        match=r"1 parameter was left.*\n  moe.w1_EFD\[3\] \(expected from "
        r"'mlp.experts.3.gate_proj.weight'; 255 of 256 rows came",
    ):
        load(checkpoint(**{expert(3): None}))


def test_many_absent_experts_are_counted_and_no_expert_is_one_line():
    with pytest.raises(WeightError, match=r"(?s)128 parameters were left.*\[128\].*and 88 more"):
        load(checkpoint(128))
    with pytest.raises(WeightError, match=r"1 parameter was left.*\n  moe.w1_EFD \("):
        load(checkpoint(0))


def test_a_buffer_that_the_mapping_names_is_required_and_others_are_not():
    with pytest.raises(WeightError, match=r"\n  moe.expert_bias_E \(expected from 'mlp.gate.e_s"):
        load(checkpoint(**{"mlp.gate.e_score_correction_bias": None}))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({expert(256): torch.rand(F, D)}, r"row 256 means at least 257 rows .* \(256, 2, 3\)"),
        ({expert(3): torch.rand(F, D + 1)}, r"shape \(2, 4\) does not fit \(2, 3\), row 3 of"),
        ({expert(3): torch.rand(D, F)}, r"\(3, 2\) does not fit \(2, 3\), .*\(transposed\?\)"),
        ({"whole": torch.rand(E, F, D)}, "already loaded from 'mlp.experts.0.gate_proj.weight'"),
        ({"again.3": torch.rand(F, D)}, rf"w1_EFD\[3\]'.*already loaded from '{expert(3)}'"),
    ],
)
def test_what_does_not_fit_is_refused(change, text):
    mapping = MAPPING | {"whole": "moe.w1_EFD", "again.{}": "moe.w1_EFD[{}]"}
    with pytest.raises(WeightError, match=text):
        load(checkpoint(**change), mapping=mapping)


def test_rows_of_a_scalar_are_refused():
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(0.0))
    with pytest.raises(WeightError, match=r"at least 1 rows .* the parameter is \(\)"):
        load({"s.0": torch.tensor(1.0)}, model, {"s.{}": "scale[{}]"})


def test_wildcards_drop_and_the_first_entry_wins():
    extra = {"model.layers.61.mlp.x": torch.rand(1), "model.layers.610.mlp.x": torch.rand(1)}
    _, report = load(checkpoint() | extra)
    assert report.dropped == ["model.layers.61.mlp.x"] and "dropped: model.layers.61" in str(report)
    assert report.skipped == ["model.layers.610.mlp.x"]
    first = {"mlp.experts.*": None} | MAPPING
    with pytest.raises(WeightError, match="1 parameter was left"):
        load(checkpoint(), mapping=first)
    _, report = load(checkpoint(), mapping=MAPPING | {"*": None})
    assert report.dropped == []
    with pytest.raises(WeightError, match=r"`\*` is for dropping only"):
        load(checkpoint(), mapping={"a.*": "norm"})


def test_a_row_order_is_applied_and_checked():
    mapping = MAPPING | {"norm.weight": RowOrder("norm", torch.tensor([2, 0, 3, 1]))}
    model, _ = load(checkpoint(**{"norm.weight": torch.arange(4.0)}), mapping=mapping)
    assert model.norm.tolist() == [2.0, 0.0, 3.0, 1.0]
    with pytest.raises(WeightError, match="no permutation of 0..2"):
        RowOrder("norm", [0, 2, 2])
    short = MAPPING | {"norm.weight": RowOrder("norm", [1, 0])}
    with pytest.raises(WeightError, match=r"shape \(4,\) has not the 2 rows"):
        load(checkpoint(), mapping=short)


class Matrix(nn.Module):
    def __init__(self, shape=(130, 257), dtype=torch.bfloat16) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(shape, dtype=dtype))


def quantized(shape=(130, 257)):
    blocks = [-(-n // 128) for n in shape]
    return {"w": torch.randn(shape).to(torch.float8_e4m3fn), "w_scale_inv": torch.rand(blocks)}


@given(
    rows=st.sampled_from([1, 127, 128, 129, 300]),
    columns=st.sampled_from([1, 127, 128, 129, 300]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_dequantized_values_are_exact(rows, columns, dtype):
    pair = quantized((rows, columns))
    spread = pair["w_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    want = (pair["w"].float() * spread[:rows, :columns]).to(dtype)
    assert torch.equal(dequantize(*pair.values(), dtype), want)


@pytest.mark.parametrize("order", [["w", "w_scale_inv"], ["w_scale_inv", "w"]])
@pytest.mark.parametrize("one_by_one", [True, False])
def test_halves_find_each_other_in_any_order_and_over_several_calls(order, one_by_one):
    pair, model = quantized(), Matrix()
    items = [(name, pair[name]) for name in order]
    running = Load(tied_names(model))
    with running.running():
        for chunk in [[item] for item in items] if one_by_one else [items]:
            load_external_weights(model, chunk, {"w": "w"})
    assert running.errors(running.account.missing()) == []
    assert torch.equal(model.w, dequantize(*pair.values(), torch.bfloat16))
    assert running.report().loaded == {"w": "w", "w_scale_inv": "w"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"w_scale_inv": None}, r"FP8 tensor 'w' \(130, 257\): its scale 'w_scale_inv' did not"),
        ({"w": None}, r"scale 'w_scale_inv' \(2, 3\): no FP8 tensor 'w' came"),
        ({"w": torch.zeros(130, 257)}, r"scale 'w_scale_inv' \(2, 3\): no FP8 tensor 'w' came"),
        (
            {"w_scale_inv": torch.rand(3, 2)},
            r"'w' \(130, 257\): its scale 'w_scale_inv' is \(3, 2\) torch.float32; "
            r"expected \(2, 3\) torch.float32",
        ),
        ({"w_scale_inv": torch.rand(2, 3).half()}, r"is \(2, 3\) torch.float16; expected \(2, 3\)"),
        ({"w": torch.zeros(130, 256).to(torch.float8_e4m3fn)}, r"expected \(2, 2\)"),
    ],
)
def test_halves_that_do_not_fit_are_refused(change, text):
    tensors = {k: v for k, v in (quantized() | change).items() if v is not None}
    with pytest.raises(WeightError, match=text):
        load(tensors, Matrix(), {"w": "w"})


def test_a_dropped_or_unmapped_weight_takes_its_scale_along():
    other = {f"mtp.{name}": tensor for name, tensor in quantized().items()}
    _, report = load(quantized() | other, Matrix(), {"mtp.w": None, "w": "w"})
    assert report.dropped == ["mtp.w", "mtp.w_scale_inv"]
    _, report = load(quantized() | other, Matrix(), {"w": "w"})
    assert report.skipped == ["mtp.w", "mtp.w_scale_inv"]


def test_a_drop_takes_scales_only_where_it_stands_before_the_weight():
    _, report = load(quantized(), Matrix(), {"w": "w", "*": None})
    assert report.dropped == []
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(1, 130, 257))
    stray = {"x.0_scale_inv": torch.rand(2, 3), "x.0": torch.rand(130, 257)}
    _, report = load(stray, model, {"*_scale_inv": None, "x.{}": "w[{}]"})
    assert report.dropped == ["x.0_scale_inv"]


def test_a_model_that_holds_fp8_itself_gets_both_as_they_are():
    class Native(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            zeros = torch.zeros(130, 257).to(torch.float8_e4m3fn)
            self.w = nn.Parameter(zeros, requires_grad=False)
            self.s = nn.Parameter(torch.zeros(2, 3))

    pair = quantized()
    model, _ = load(pair, Native(), {"w": "w", "w_scale_inv": "s"})
    assert torch.equal(model.w.float(), pair["w"].float())
    assert torch.equal(model.s, pair["w_scale_inv"])
    pair["w2_scale_inv"] = pair["w_scale_inv"]
    _, report = load(pair, Native(), {"w2": "w", "w": "w", "w_scale_inv": "s"})
    assert report.skipped == ["w2_scale_inv"]


def test_fp8_experts_go_into_a_stack():
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(2, 130, 257))
    pairs = [quantized(), quantized()]
    tensors = {f"e.{i}.{k}": t for i, pair in enumerate(pairs) for k, t in pair.items()}
    load(tensors, model, {"e.{}.w": "w[{}]"})
    want = [dequantize(*pair.values(), torch.float32) for pair in pairs]
    assert torch.equal(model.w, torch.stack(want))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(value):
    weight, scale = torch.ones(130, 4).to(torch.float8_e4m3fn), torch.ones(2, 1)
    scale[1] = value
    with pytest.raises(WeightError, match="'w_scale_inv' has NaN or infinity"):
        check_scale("w", weight, scale)
