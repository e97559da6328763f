"""Models that call the package flash-attn: served and trained, or refused. A stand-in has its
signatures here; what the calls mean is the package's documentation."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch import nn

import vllm_graft
from tests.support import spread_weights
from tests.zoo.test_flex import FlexAttention, OneLayer, twin
from tests.zoo.test_handwritten import D, LearnedPositions, N, check_served_and_trained
from vllm_graft.families.written_out import WrittenOut

NAME = "flash_attn.flash_attn_interface"
_SPEC = spec_from_file_location(NAME, Path(__file__).with_name("flash_attn_stand_in.py"))
PACKAGE = module_from_spec(_SPEC)
_SPEC.loader.exec_module(PACKAGE)
flash_attn_func = PACKAGE.flash_attn_func
flash_attn_kvpacked_func = PACKAGE.flash_attn_kvpacked_func
flash_attn_qkvpacked_func = PACKAGE.flash_attn_qkvpacked_func
flash_attn_varlen_func = PACKAGE.flash_attn_varlen_func


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    """The module only: others look for the package `flash_attn` and would use more of it."""
    monkeypatch.setitem(sys.modules, NAME, PACKAGE)


WINDOW = (23, 0)
"""Itself and 23 before, as in `test_flex`."""


class FlashAttention(FlexAttention):
    """Projections around one of the package's functions."""

    def __init__(self, function, kv_heads=2, **options):
        super().__init__(None, kv_heads, **{"causal": True, **options})
        self.function = function

    def forward(self, x):
        b, length, _ = x.shape
        out = self.function(*self.arguments(*self.projected(x)), **self.options)
        return self.c_proj(out.reshape(b, length, D))

    def arguments(self, q, k, v):
        if self.function is flash_attn_kvpacked_func:
            return q, torch.stack([k, v], 2)
        if self.function is flash_attn_qkvpacked_func:
            return (torch.stack([q, k, v], 2),)
        if self.function is not flash_attn_varlen_func:
            return q, k, v
        length = q.shape[1]
        ends = torch.arange(0, len(q) * length + 1, length, dtype=torch.int32)
        return *(y.flatten(0, 1) for y in (q, k, v)), ends, ends, length, length


class Dense(LearnedPositions):
    """`flash_attn_func`, causal, and keys and values packed, with a window."""

    def __init__(self):
        super().__init__()
        packed = FlashAttention(flash_attn_kvpacked_func, window_size=WINDOW)
        self.h = nn.ModuleList([FlashAttention(flash_attn_func), packed])


class Varlen(LearnedPositions):
    """`flash_attn_varlen_func`, causal and with a window."""

    def __init__(self):
        super().__init__()
        windowed = FlashAttention(flash_attn_varlen_func, window_size=WINDOW)
        self.h = nn.ModuleList([FlashAttention(flash_attn_varlen_func), windowed])


@pytest.mark.engine
@pytest.mark.parametrize("style", [Dense, Varlen])
def test_served_and_trained_as_its_twin(style, tmp_path):
    model = spread_weights(style()).eval()
    check_served_and_trained(style, model, twin(model), tmp_path)


@pytest.mark.parametrize("style", [Dense, Varlen])
def test_an_original_without_the_kernel_is_written_out(style):
    model, rows = spread_weights(style()).eval(), torch.arange(80).view(2, 40)
    with WrittenOut() as original:
        got = model(rows)
    # Float32, another order of sums; a key too many changes logits of about 8 by more than 1e-2.
    assert (got - twin(model)(rows)).abs().max() < 1e-4
    assert original.replaced == {"flash-attn"}


def test_all_packed_with_scale_and_softcap():
    layer = FlashAttention(flash_attn_qkvpacked_func, N, softmax_scale=0.5, softcap=5.0)
    model, rows = spread_weights(OneLayer(layer)).eval(), torch.arange(40)[None]
    adapted = vllm_graft.adapt(model)
    [site] = adapted.sites
    assert (site.scale, site.softcap, site.num_kv_heads) == (0.5, 5.0, N)
    q, k, v = (y.transpose(1, 2) for y in layer.projected(model.wte(rows)))
    scores = 5.0 * torch.tanh(0.5 * q @ k.transpose(-2, -1) / 5.0)
    future = torch.ones(40, 40, dtype=torch.bool).triu(1)
    out = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
    want = layer.c_proj(out.transpose(1, 2).flatten(2))
    with WrittenOut():
        assert (layer(model.wte(rows)) - want).abs().max() < 1e-5  # float32


def test_alibi_slopes():
    slopes = torch.tensor([0.3, 0.1, 0.05, 0.02])
    layer = FlashAttention(flash_attn_qkvpacked_func, N, alibi_slopes=slopes)
    model, rows = spread_weights(OneLayer(layer)).eval(), torch.arange(40)[None]
    [site] = vllm_graft.adapt(model).sites
    assert site.alibi_slopes == pytest.approx(slopes.tolist())
    q, k, v = (y.transpose(1, 2) for y in layer.projected(model.wte(rows)))
    at = torch.arange(40)
    scores = (D // N) ** -0.5 * q @ k.transpose(-2, -1) + slopes[:, None, None] * (at - at[:, None])
    out = scores.masked_fill(at[:, None] < at, float("-inf")).softmax(-1) @ v
    want = layer.c_proj(out.transpose(1, 2).flatten(2))
    with WrittenOut():
        assert (layer(model.wte(rows)) - want).abs().max() < 1e-5  # float32


def test_without_a_watch_the_package_answers():
    vllm_graft.adapt(spread_weights(Dense()).eval())
    with pytest.raises(RuntimeError, match="only supports CUDA"):
        Dense()(torch.arange(5)[None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": False}, "attention is not causal"),
        ({"causal": False, "window_size": (4, 4)}, "its mask shows later tokens"),
        ({"return_attn_probs": True}, "flash-attn with return_attn_probs"),
    ],
)
def test_what_cannot_be_proven_is_refused_with_the_place(options, message):
    layer = FlashAttention(flash_attn_func, **options)
    with pytest.raises(ValueError, match=rf"h\.0: .*{message}"):
        vllm_graft.adapt(spread_weights(OneLayer(layer)).eval())
