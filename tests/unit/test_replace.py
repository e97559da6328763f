"""replace_with_trainable_attention on TorchTitan's Qwen3 and on Llama-style blocks."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support import relative_error
from vllm_graft import CoreAttention, packed, replace_with_trainable_attention


def qwen3(layers: int = 2, **overrides):
    from transformers import Qwen3Config

    from examples.custom_models.qwen3_torchtitan import qwen3_config

    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    }  # fmt: skip
    torch.manual_seed(0)
    return qwen3_config(Qwen3Config(**(sizes | overrides)), max_seq_len=128).build()


class LlamaAttention(nn.Module):
    """Meta's and older TorchTitan's block: complex RoPE table as an argument."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, dim // n_heads
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=True)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)

    def forward(self, x, freqs_cis, mask=None):
        b, length, _ = x.shape
        q, k, v = (w(x).view(b, length, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        q, k = (
            torch.view_as_real(
                torch.view_as_complex(h.reshape(*h.shape[:-1], -1, 2)) * freqs_cis[:, None]
            ).flatten(3)
            for h in (q, k)
        )
        q, k, v = (h.transpose(1, 2) for h in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(out.transpose(1, 2).flatten(2))


class LlamaLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = LlamaAttention(64, 4, 2)

    def forward(self, x, freqs_cis, mask=None):
        return x + self.attention(x, freqs_cis, mask)


class Llama(nn.Module):
    def __init__(self, container=nn.ModuleList, n_layers: int = 2) -> None:
        super().__init__()
        layers = [LlamaLayer() for _ in range(2)]
        if container is nn.ModuleList:
            self.layers = nn.ModuleList(layers)
        elif container is nn.ModuleDict:
            self.layers = nn.ModuleDict({str(i): layer for i, layer in enumerate(layers)})
        else:
            self.layers = {str(i): layer for i, layer in enumerate(layers)}
            self.held = nn.ModuleList(layers)
        self.config = SimpleNamespace(n_layers=n_layers)
        angles = torch.outer(torch.arange(32.0), 100.0 ** -(torch.arange(0, 16, 2) / 16))
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x, mask=None):
        layers = self.layers.values() if hasattr(self.layers, "values") else self.layers
        for layer in layers:
            x = layer(x, self.freqs_cis[: x.shape[1]], mask)
        return x


def test_torchtitan_takes_the_seam_and_keeps_all_names():
    model = qwen3(layers=3)
    names = list(model.state_dict())
    report = replace_with_trainable_attention(model)
    assert list(model.state_dict()) == names
    assert report.swapped == len(report.layers) == 3
    first = report.layers[0]
    assert (first.name, first.kind) == ("layers.0.attention", "inner_attention")
    assert (first.num_heads, first.num_kv_heads, first.head_dim) == (4, 2, 32)
    assert isinstance(model.layers["2"].attention.inner_attention, CoreAttention)
    assert "3 of 3 attention layers swapped" in str(report)


def test_torchtitan_forward_and_gradients_equal_the_original_with_sdpa_in_its_seam():
    class Sdpa(nn.Module):
        def forward(self, q, k, v, *, attention_masks=None, scale=None, enable_gqa=False):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            )
            return out.transpose(1, 2)

    swapped, original = qwen3(), qwen3()
    swapped.load_state_dict(original.state_dict())
    for layer in original.layers.values():
        layer.attention.inner_attention = Sdpa()
    replace_with_trainable_attention(swapped)
    tokens = torch.randint(0, 64, (2, 21))
    results = []
    for model in (original, swapped):
        out = model(tokens)
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters())])
    for want, got in zip(*results, strict=True):
        # Two float32 attention kernels, two layers deep.
        assert relative_error(got, want) < 1e-5


def test_torchtitan_packed_equals_each_sample_alone():
    model = qwen3()
    replace_with_trainable_attention(model)
    samples = [torch.randint(0, 64, (n,)) for n in (13, 20)]
    with packed([0, 13, 33]):
        together = model(torch.cat(samples)[None])[0]
    alone = torch.cat([model(s[None])[0] for s in samples])
    # float32 products of 13 to 33 rows are equal bit for bit, attention is the same kernel.
    assert torch.equal(together, alone)


def test_torchtitan_understands_its_own_varlen_metadata():
    from torchtitan.models.common.attention import create_varlen_metadata_for_document

    model = qwen3()
    replace_with_trainable_attention(model)
    positions = torch.cat([torch.arange(13), torch.arange(20)])[None]
    tokens = torch.randint(0, 64, (1, 33))
    masks = create_varlen_metadata_for_document(positions)
    with packed([0, 13, 33]):
        want = model(tokens)
    assert torch.equal(model(tokens, positions, masks), want)


def test_a_sliding_window_config_reaches_the_seam():
    model = qwen3(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    replace_with_trainable_attention(model)
    windows = [x.attention.inner_attention.spec.sliding_window for x in model.layers.values()]
    assert windows == [None, 8]


def test_a_scale_that_is_not_the_built_one_is_refused():
    model = qwen3()
    replace_with_trainable_attention(model)
    model.layers["0"].attention.scaling = 0.5
    with pytest.raises(ValueError, match=r"called with scale=0.5, but built with scale=0.17"):
        model(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("container", [nn.ModuleList, nn.ModuleDict, dict])
def test_llama_blocks_adopt_their_projections(container):
    torch.manual_seed(0)
    model = Llama(container)
    original = copy.deepcopy(model)
    report = replace_with_trainable_attention(model)
    assert [swap.kind for swap in report.layers] == ["block", "block"]
    assert list(model.state_dict()) == list(original.state_dict())
    x = torch.randn(2, 15, 64)
    # Two float32 attention kernels and RoPE in real instead of complex arithmetic.
    assert relative_error(model(x), original(x)) < 1e-5


def test_a_second_call_changes_nothing():
    for model in (qwen3(), Llama()):
        first = replace_with_trainable_attention(model)
        modules = list(model.modules())
        second = replace_with_trainable_attention(model)
        assert list(model.modules()) == modules
        assert second.layers == first.layers and second.swapped == 0
        hooks = [len(m._forward_pre_hooks) for m in model.modules()]
        assert max(hooks) <= 1


def test_tables_keep_their_precision_through_a_cast():
    titan, llama = qwen3(), Llama()
    for model, owner, name in (
        (titan, lambda m: m.layers["0"].attention.rope, "cache"),
        (llama, lambda m: m, "freqs_cis"),
    ):
        replace_with_trainable_attention(model)
        before = getattr(owner(model), name).clone()
        cast = copy.deepcopy(model.to(torch.bfloat16)).to(torch.bfloat16)
        after = getattr(owner(cast), name)
        assert after.dtype == before.dtype and torch.equal(after, before)
        assert next(cast.parameters()).dtype == torch.bfloat16


def test_router_biases_keep_their_precision_too():
    model = Llama()
    model.layers[0].register_buffer("expert_bias", torch.rand(4))
    replace_with_trainable_attention(model)
    assert model.to(torch.bfloat16).layers[0].expert_bias.dtype == torch.float32


def test_causal_masks_are_understood_and_others_refused():
    model = Llama()
    x = torch.randn(1, 6, 64)
    replace_with_trainable_attention(model)
    causal = torch.full((6, 6), float("-inf")).triu(1)
    assert torch.equal(model(x, causal), model(x))
    with pytest.raises(ValueError, match=r"mask \(6, 6\) is not the plain causal mask"):
        model(x, torch.zeros(6, 6))


class RopeInside(LlamaAttention):
    def forward(self, x):
        return self.wo(apply_rotary(self.wq(x)))  # noqa: F821


class ExtraPart(LlamaAttention):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gate = nn.Linear(64, 64)


@pytest.mark.parametrize(
    ("break_it", "error", "text"),
    [
        (lambda m: delattr(m, "layers"), AttributeError, "Llama has no `layers`"),
        (lambda m: setattr(m, "layers", nn.ModuleList()), ValueError, "no attention was swapped"),
        (lambda m: delattr(m.layers[1], "attention"), ValueError, "layers.1: no attention found"),
        (lambda m: delattr(m.layers[1].attention, "wo"), ValueError, "layers.1.attention: .*seam"),
        (lambda m: setattr(m.config, "n_layers", 3), ValueError, "2 .* found, .*n_layers says 3"),
        (
            lambda m: setattr(m.layers[0], "attention", RopeInside(64, 4, 2)),
            ValueError,
            "applies RoPE, but takes its table from no argument",
        ),
        (
            lambda m: setattr(m.layers[0], "attention", ExtraPart(64, 4, 2)),
            ValueError,
            r"would drop: \['gate'\]",
        ),
    ],
)
def test_what_cannot_be_swapped_is_refused_by_name(break_it, error, text):
    model = Llama()
    break_it(model)
    with pytest.raises(error, match=text):
        replace_with_trainable_attention(model)


class Halves(LlamaAttention):
    """Rotates halves with a real cos|sin table."""

    def forward(self, x, freqs_cis, mask=None):
        b, length, _ = x.shape
        q, k, v = (w(x).view(b, length, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        cos, sin = freqs_cis[:, None].chunk(2, -1)

        def turn(h):
            first, second = h.chunk(2, -1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

        q, k, v = (h.transpose(1, 2) for h in (turn(q), turn(k), v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(out.transpose(1, 2).flatten(2))


def test_the_pairing_of_real_tables_is_found_by_trial():
    torch.manual_seed(0)
    model = Llama()
    for layer in model.layers:
        layer.attention = Halves(64, 4, 2)
    model.freqs_cis = torch.cat([model.freqs_cis.real, model.freqs_cis.imag], -1)
    original = copy.deepcopy(model)
    replace_with_trainable_attention(model)
    x = torch.randn(2, 15, 64)
    assert relative_error(model(x), original(x)) < 1e-5


def hidden_rotation(self, x, freqs_cis=None):
    table = torch.outer(torch.arange(float(x.shape[1])), torch.linspace(1.0, 0.01, 8))
    return LlamaAttention.forward(self, x, torch.polar(torch.ones_like(table), table))


def windowed(self, x, freqs_cis, mask=None):
    length = x.shape[1]
    near = torch.arange(length)[:, None] - torch.arange(length) < 4
    q, k, v = (w(x).unflatten(-1, (-1, 16)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=near.tril(), enable_gqa=True)
    return self.wo(out.transpose(1, 2).flatten(2))


def clamped(self, x, freqs_cis, mask=None):
    return LlamaAttention.forward(self, x.clamp(-0.1, 0.1), freqs_cis)


def bidirectional(self, x, freqs_cis, mask=None):
    q, k, v = (w(x).unflatten(-1, (-1, 16)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return self.wo(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("forward", [hidden_rotation, windowed, clamped, bidirectional])
def test_a_block_that_computes_something_else_is_refused_and_left_alone(forward):
    torch.manual_seed(0)
    model = Llama()
    odd = type("Odd", (LlamaAttention,), {"forward": forward})(64, 4, 2)
    model.layers[1].attention = odd.train()
    before, random = list(model.modules()), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"layers.1.attention: Odd computes something else"):
        replace_with_trainable_attention(model)
    assert list(model.modules()) == before and odd.training
    assert torch.equal(torch.get_rng_state(), random)


def test_a_scale_that_is_a_divisor_is_refused():
    model = Llama()
    model.layers[0].attention.scale = 16**0.5
    with pytest.raises(ValueError, match="layers.0.attention: .*differs by"):
        replace_with_trainable_attention(model)


@pytest.mark.parametrize(("window", "proven"), [(60, True), (5000, False)])
def test_a_window_attribute_is_adopted_and_tried_beyond(window, proven):
    def forward(self, x, freqs_cis=None):
        length = x.shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        near = (distance >= 0) & (distance < self.window_size)
        q, k, v = (
            w(x).unflatten(-1, (-1, 16)).transpose(1, 2) for w in (self.wq, self.wk, self.wv)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=near, enable_gqa=True)
        return self.wo(out.transpose(1, 2).flatten(2))

    class Windowed(LlamaAttention):
        def forward(self, x):
            return forward(self, x)

    torch.manual_seed(0)
    model = Llama()
    for layer in model.layers:
        layer.attention = Windowed(64, 4, 2)
        layer.attention.window_size = window
    old = copy.deepcopy(model.layers[0].attention)
    report = replace_with_trainable_attention(model)
    assert [swap.proven for swap in report.layers] == [proven] * 2
    x = torch.randn(1, 90, 64)
    assert relative_error(model.layers[0].attention(x), old(x)) < 1e-5


def test_a_swapped_model_can_be_pickled():
    import pickle

    from vllm_graft.exact import make_exact

    torch.manual_seed(0)
    model = Llama()
    replace_with_trainable_attention(model)
    make_exact(model)
    twin = pickle.loads(pickle.dumps(model))
    x = torch.randn(1, 6, 64)
    assert torch.equal(twin(x), model(x))
    twin.bfloat16()
    assert model.layers[0].attention.wq.weight.dtype == torch.float32
    assert twin.freqs_cis.is_complex()


def test_parameters_of_the_block_itself_are_refused_before_anything_changes():
    model = Llama()
    model.layers[1].attention.sinks = nn.Parameter(torch.zeros(4))
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=r"would drop: \['sinks'\]"):
        replace_with_trainable_attention(model)
    assert list(model.state_dict()) == names


def test_a_block_that_cannot_be_tried_is_reported_as_unproven(caplog):
    with torch.device("meta"):
        model = Llama()
    report = replace_with_trainable_attention(model)
    assert [swap.proven for swap in report.layers] == [False, False]
    assert "layers.0.attention: the swapped block could not be tried out" in caplog.text
    assert all(swap.proven for swap in replace_with_trainable_attention(Llama()).layers)


def test_use_mla_must_say_what_the_model_has():
    with pytest.raises(ValueError, match="use_mla=True, but LlamaAttention has no latent"):
        replace_with_trainable_attention(Llama(), use_mla=True)
    model = Llama()
    model.layers[0].attention.wkv_a = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="is latent attention .*use_mla=True"):
        replace_with_trainable_attention(model)
