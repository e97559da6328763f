"""Models that call `flex_attention` or `varlen_attn`: served and trained, or refused."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.overrides import TorchFunctionMode

import vllm_graft
from tests.support import python, relative_error, spread_weights
from tests.zoo.test_handwritten import D, LearnedPositions, Masked, N, check_served_and_trained
from vllm_graft.families.written_out import WrittenOut

WINDOW = 24
CALL = {"eager": flex_attention, "compiled": torch.compile(flex_attention)}


class FlexAttention(nn.Module):
    """Projections around `flex_attention` under what `mask_mod` shows."""

    def __init__(self, mask_mod, kv_heads=2, call=flex_attention, **options):
        super().__init__()
        self.kv_heads, self.mask_mod, self.call, self.options = kv_heads, mask_mod, call, options
        self.c_attn = nn.Linear(D, D + 2 * kv_heads * D // N)
        self.c_proj = nn.Linear(D, D)

    def projected(self, x):
        parts = self.c_attn(x).split([D, *[self.kv_heads * D // N] * 2], -1)
        return (y.unflatten(-1, (-1, D // N)) for y in parts)

    def forward(self, x):
        b, length, _ = x.shape
        q, k, v = (y.transpose(1, 2) for y in self.projected(x))
        mask = None
        if self.mask_mod is not None:
            mask = create_block_mask(self.mask_mod, None, None, length, length, device=x.device)
        grouped = self.kv_heads != N
        out = self.call(q, k, v, block_mask=mask, enable_gqa=grouped, **self.options)
        return self.c_proj(out.transpose(1, 2).reshape(b, length, D))


class VarlenAttention(FlexAttention):
    """The same around `varlen_attn`, all rows one after another."""

    def __init__(self, window_size, sequences=None, **options):
        super().__init__(None, **options)
        self.window_size, self.sequences = window_size, sequences

    def forward(self, x):
        b, length, _ = x.shape
        q, k, v = (y.flatten(0, 1) for y in self.projected(x))
        ends = torch.arange(0, b * length + 1, length, dtype=torch.int32)
        if self.sequences is not None:
            ends = torch.tensor([0, *self.sequences, length], dtype=torch.int32)
        grouped = self.kv_heads != N
        out = varlen_attn(
            q, k, v, ends, ends, length, length,
            window_size=self.window_size, enable_gqa=grouped, **self.options,
        )  # fmt: skip
        return self.c_proj(out.view(b, length, D))


def causal(b, h, i, j):
    return i >= j


def windowed(b, h, i, j):
    return (i >= j) & (i - j < WINDOW)


class Flex(LearnedPositions):
    """`flex_attention` under block masks, causal and a window, eager and compiled."""

    def __init__(self):
        super().__init__()
        layers = (FlexAttention(causal), FlexAttention(windowed, call=CALL["compiled"]))
        self.h = nn.ModuleList(layers)


class Varlen(LearnedPositions):
    """`varlen_attn`, causal and with a window: itself and 23 before."""

    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList([VarlenAttention((-1, 0)), VarlenAttention((WINDOW - 1, 0))])


STYLES = (Flex, Varlen)


def twin(model):
    """The same weights under `scaled_dot_product_attention` with the same masks."""
    other = Masked(kv_heads=2)
    other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.mark.engine
@pytest.mark.parametrize("style", STYLES)
def test_served_and_trained_as_its_twin(style, tmp_path):
    model = spread_weights(style()).eval()
    check_served_and_trained(style, model, twin(model), tmp_path)


def test_rows_stay_apart():
    """Neither sees the other's keys, though `varlen_attn` gets one flat row."""
    model = spread_weights(Varlen()).eval()
    rows = torch.arange(80).view(2, 40)
    adapted = vllm_graft.adapt(model)
    # Another order of sums in float32; a key too many changes logits of about 8 by more than 1e-2.
    assert (adapted(rows) - twin(model)(rows)).abs().max() < 1e-4


@pytest.mark.parametrize("style", STYLES)
def test_windows_and_heads_are_found(style):
    adapted = vllm_graft.adapt(spread_weights(style()).eval())
    assert [(s.name, s.num_heads, s.num_kv_heads) for s in adapted.sites] == [
        ("h.0", N, 2), ("h.1", N, 2),
    ]  # fmt: skip
    adapted.prove(60)
    assert [core.spec.sliding_window for core in adapted.cores] == [None, WINDOW]


class OneLayer(LearnedPositions):
    def __init__(self, layer):
        super().__init__()
        self.h = nn.ModuleList([layer])


def test_a_mask_that_asks_for_the_head_may_be_the_same_for_all():
    model = spread_weights(OneLayer(FlexAttention(lambda b, h, i, j: (i >= j) & (h < N)))).eval()
    assert [site.masked for site in vllm_graft.adapt(model).sites] == [True]


def softcapped(score, b, h, i, j):
    return 5.0 * torch.tanh(score / 5.0)


def hiding(score, b, h, i, j):
    return torch.where(i >= j, 0.5 * score, -float("inf"))


@pytest.mark.parametrize(
    ("score_mod", "mask_mod", "softcap", "scale"),
    [(softcapped, causal, 5.0, 1.0), (hiding, None, None, 0.5)],
)
def test_score_mods_are_read_step_by_step(score_mod, mask_mod, softcap, scale):
    model = spread_weights(OneLayer(FlexAttention(mask_mod, score_mod=score_mod))).eval()
    adapted = vllm_graft.adapt(model)  # tried out against torch's own flex_attention
    site = adapted.sites[0]
    assert site.softcap == softcap
    assert site.scale == pytest.approx(scale * (D // N) ** -0.5)


def alibi(score, b, h, i, j):
    return score + torch.tensor([0.3, 0.1, 0.05, 0.02])[h] * (j - i)


def test_alibi_as_a_score_mod():
    model = spread_weights(OneLayer(FlexAttention(causal, score_mod=alibi))).eval()
    [site] = vllm_graft.adapt(model).sites  # tried out against torch's own flex_attention
    assert site.alibi_slopes == pytest.approx([0.3, 0.1, 0.05, 0.02])


def squared(score, b, h, i, j):
    return score - 0.1 * (j - i) ** 2


def sigmoid(score, b, h, i, j):
    return torch.sigmoid(score)


def of_positions(score, b, h, i, j):
    return (i - j).float()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (FlexAttention(None), "attention is not causal"),
        (FlexAttention(lambda b, h, i, j: (i >= j) | (j < 4)), "its mask shows later tokens"),
        (FlexAttention(lambda b, h, i, j: (i >= j) & (i - j < 3 + h)), "differs between heads"),
        (FlexAttention(lambda b, h, i, j: (i >= j) & ((h == 0) | (i - j < 3))), "between heads"),
        (FlexAttention(lambda b, h, i, j: (i >= j) & (j != 2)), "neither causal nor a window"),
        (FlexAttention(causal, score_mod=squared), r"something is added .*\(a bias\)"),
        (FlexAttention(causal, score_mod=sigmoid), "sigmoid of attention scores is not"),
        (FlexAttention(causal, score_mod=of_positions), "score_mod returns something else"),
        (FlexAttention(causal, return_aux=AuxRequest(lse=True)), "return_lse or return_aux"),
        (VarlenAttention((-1, -1)), "its mask shows later tokens"),
        (VarlenAttention((-1, 0), (5,)), "neither causal nor a window"),
        (VarlenAttention((-1, 0), seqused_k=torch.tensor([4])), "varlen_attn with seqused_k"),
    ],
)
def test_what_cannot_be_proven_is_refused_with_the_place(layer, message):
    with pytest.raises(ValueError, match=rf"h\.0: .*{message}"):
        vllm_graft.adapt(spread_weights(OneLayer(layer)).eval())


@pytest.mark.parametrize("style", STYLES)
def test_an_original_without_a_kernel_is_written_out(style):
    model = spread_weights(style()).eval()
    rows = torch.arange(60).view(2, 30)
    with WrittenOut() as original:
        got = model(rows)
    want = twin(model)(rows)
    # Float32, another order of sums.
    assert (got - want).abs().max() < 1e-4
    got.logsumexp(-1).sum().backward()
    other = twin(model)
    other(rows).logsumexp(-1).sum().backward()
    gradients = {name: p.grad for name, p in other.named_parameters()}
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, gradients[name]) < 1e-5, name
    expected = {Flex: "gradient of flex_attention", Varlen: "varlen_attn"}[style]
    assert original.replaced == {expected}


def test_torchs_own_runs_where_it_can():
    with WrittenOut() as original, torch.no_grad():
        spread_weights(Flex()).eval()(torch.arange(30)[None])
    assert original.replaced == set()


# --- the exchanged code -------------------------------------------------------


def test_torch_still_asks_no_mode():
    """`visible.py` can go when this fails."""
    code = (
        "import torch\n"
        "from torch.nn.attention.flex_attention import flex_attention\n"
        "from torch.overrides import TorchFunctionMode\n"
        "class Mode(TorchFunctionMode):\n"
        "    def __torch_function__(self, func, types, args=(), kwargs=None):\n"
        "        assert func is not flex_attention, 'asked'\n"
        "        return func(*args, **(kwargs or {}))\n"
        "q = torch.ones(1, 1, 4, 16)\n"
        "with torch.compiler.set_stance('force_eager'), Mode(): flex_attention(q, q, q)"
    )
    assert python(code).returncode == 0


class Other(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func is not flex_attention
        return func(*args, **(kwargs or {}))


def test_outside_a_watch_torchs_functions_are_what_they_were():
    vllm_graft.adapt(spread_weights(Flex()).eval())
    parameters = list(inspect.signature(flex_attention).parameters)
    assert parameters[:5] == ["query", "key", "value", "score_mod", "block_mask"]
    q = torch.randn(1, 2, 16, 32)
    mask = create_block_mask(causal, None, None, 16, 16, device="cpu")
    want = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    compiled = torch.compile(flex_attention, fullgraph=True, backend="eager")
    with torch.compiler.set_stance("force_eager"), Other():
        unwatched = flex_attention(q, q, q, block_mask=mask)
    for got in (flex_attention(q, q, q, block_mask=mask), compiled(q, q, q, None, mask), unwatched):
        # Float32, another order of sums.
        assert (got - want).abs().max() < 1e-5
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex_attention(q.requires_grad_(), q, q)
