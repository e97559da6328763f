"""`replace_with_trainable_attention(model, use_mla=True)` on both layouts of DeepSeek V3."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support import relative_error
from tests.unit.test_replace import Llama
from vllm_graft import TrainableMLA, packed, replace_with_trainable_attention
from vllm_graft.exact import make_exact

WIDTH, HEADS, SIZES = 48, 4, (40, 24, 16, 20)


def table(length: int = 64) -> torch.Tensor:
    angles = torch.outer(torch.arange(float(length)), 1000.0 ** -(torch.arange(0, 16, 2) / 16))
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rows).flatten(-2).type_as(x)


class DenseSeam(nn.Module):
    def forward(self, q, k, v, *, scale):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


class OlderAttention(nn.Module):
    """Latent attention written as TorchTitan wrote it before 0.3: `freqs_cis` is an argument."""

    seam = DenseSeam

    def __init__(self, q_lora_rank: int = 0) -> None:
        super().__init__()
        rank, nope, rope, value = SIZES
        self.n_heads, self.kv_lora_rank, self.q_lora_rank = HEADS, rank, q_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = nope, rope, value
        self.qk_head_dim = nope + rope
        if q_lora_rank:
            self.wq_a = nn.Linear(WIDTH, q_lora_rank, bias=False)
            self.q_norm = nn.RMSNorm(q_lora_rank, eps=1e-5)
            self.wq_b = nn.Linear(q_lora_rank, HEADS * self.qk_head_dim, bias=False)
        else:
            self.wq = nn.Linear(WIDTH, HEADS * self.qk_head_dim, bias=False)
        self.wkv_a = nn.Linear(WIDTH, rank + rope, bias=False)
        self.kv_norm = nn.RMSNorm(rank, eps=1e-5)
        self.wkv_b = nn.Linear(rank, HEADS * (nope + value), bias=False)
        self.wo = nn.Linear(HEADS * value, WIDTH, bias=False)
        self.softmax_scale = 1.3 * self.qk_head_dim**-0.5
        self.inner_attention = self.seam()

    def forward(self, x, freqs_cis, attention_masks=None):
        lead = x.shape[:2]
        rows = freqs_cis[: x.shape[1], None]
        q = self.wq_b(self.q_norm(self.wq_a(x))) if self.q_lora_rank else self.wq(x)
        q = q.view(*lead, HEADS, -1)
        latent, k_pe = self.wkv_a(x).split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        kv = self.wkv_b(self.kv_norm(latent)).view(*lead, HEADS, -1)
        k_nope, v = kv.split([self.qk_nope_head_dim, self.v_head_dim], -1)
        k_pe = rotate(k_pe[:, :, None], rows).expand(-1, -1, HEADS, -1)
        q = torch.cat([q[..., :-16], rotate(q[..., -16:], rows)], -1)
        k = torch.cat([k_nope, k_pe], -1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = self.inner_attention(q, k, v, scale=self.softmax_scale)
        return self.wo(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention


class Model(nn.Module):
    def __init__(self, attentions: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): Layer(a) for i, a in enumerate(attentions)})


def titan_attention(q_lora_rank: int, **overrides) -> nn.Module:
    """TorchTitan 0.3's own block."""
    from torchtitan.models.common import ComplexRoPE
    from torchtitan.models.deepseek_v3 import make_mla_attention_config

    rank, nope, rope, value = SIZES
    rope_config = ComplexRoPE.Config(dim=rope, max_seq_len=64, theta=1000.0, **overrides)
    config = make_mla_attention_config(
        layer_id=0, dim=WIDTH, n_heads=HEADS, q_lora_rank=q_lora_rank, kv_lora_rank=rank,
        qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=value, attn_backend="flex",
        linear_init={}, norm_init={}, depth_init=lambda _: {}, rope=rope_config,
    )  # fmt: skip
    block = config.build()
    for parameter in block.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return block


@pytest.mark.parametrize("q_lora_rank", [0, 24])
def test_the_older_layout_computes_what_it_did(q_lora_rank):
    torch.manual_seed(0)
    model = Model([OlderAttention(q_lora_rank) for _ in range(2)])
    old, names = copy.deepcopy(model), [name for name, _ in model.named_parameters()]
    report = replace_with_trainable_attention(model, use_mla=True)
    assert [(x.name, x.kind, x.num_heads, x.num_kv_heads, x.head_dim) for x in report.layers] == [
        (f"layers.{i}.attention", "mla", HEADS, 1, 56) for i in range(2)
    ]
    assert report.swapped == 2 and all(layer.proven for layer in report.layers)
    assert [name for name, _ in model.named_parameters()] == names
    x = torch.randn(2, 11, WIDTH)
    new = model.layers["0"].attention
    assert isinstance(new, TrainableMLA) and isinstance(new, OlderAttention)
    # fp32, another order of summation.
    assert relative_error(new(x, table()), old.layers["0"].attention(x, table())) < 1e-5
    assert replace_with_trainable_attention(model, use_mla=True).swapped == 0


@pytest.mark.parametrize("q_lora_rank", [0, 24])
@pytest.mark.parametrize("yarn", [False, True])
def test_torchtitan_computes_what_it_did(q_lora_rank, yarn):
    scaling = {"scaling": "yarn", "rope_factor": 4.0, "original_seq_len": 16} if yarn else {}
    block = titan_attention(q_lora_rank, **scaling)
    old = copy.deepcopy(block)
    old.inner_attention = TitanSeam()
    model = Model([block])
    names = list(model.state_dict())
    report = replace_with_trainable_attention(model, use_mla=True)
    assert report.swapped == 1 and report.layers[0].proven
    assert list(model.state_dict()) == names
    x, positions = torch.randn(2, 9, WIDTH), torch.arange(9).expand(2, 9) + 20
    assert relative_error(block(x, None), old(x, None)) < 1e-5
    assert relative_error(block(x, None, positions), old(x, None, positions)) < 1e-5


class TitanSeam(nn.Module):
    def forward(self, q, k, v, *, attention_masks=None, scale=None):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return out.transpose(1, 2)


def test_packed_samples_never_meet_and_positions_restart():
    torch.manual_seed(0)
    block = titan_attention(0)
    replace_with_trainable_attention(Model([block]), use_mla=True)
    make_exact(block)
    samples = [torch.randn(n, WIDTH) for n in (1, 7, 12)]
    with packed([0, 1, 8, 20]):
        together = block(torch.cat(samples)[None], None)[0]
    alone = torch.cat([block(sample[None], None)[0] for sample in samples])
    assert torch.equal(together, alone)


def test_a_copy_of_a_swapped_model_works_by_itself():
    model = Model([titan_attention(24)])
    replace_with_trainable_attention(model, use_mla=True)
    twin, x = copy.deepcopy(model), torch.randn(1, 5, WIDTH)
    with torch.no_grad():
        model.layers["0"].attention.wkv_b.weight.zero_()
    assert twin.layers["0"].attention(x, None).abs().max() > 0
    assert model.layers["0"].attention(x, None).abs().max() == 0


@pytest.mark.parametrize("use_mla", [True, False])
def test_the_wrong_flag_is_an_error_that_says_so(use_mla):
    model = Llama() if use_mla else Model([OlderAttention()])
    text = "use_mla=True, but" if use_mla else "call with use_mla=True"
    with pytest.raises(ValueError, match=text):
        replace_with_trainable_attention(model, use_mla=use_mla)


class OtherScale(OlderAttention):
    """Divides by the scale that it names."""

    class seam(DenseSeam):
        def forward(self, q, k, v, *, scale):
            return super().forward(q, k, v, scale=1 / scale)

    def forward(self, x, freqs_cis, attention_masks=None):
        return super().forward(x, freqs_cis) + x


def test_a_block_that_computes_something_else_is_refused_and_untouched():
    model = Model([OtherScale()])
    with pytest.raises(ValueError, match="layers.0.attention: OtherScale computes something else"):
        replace_with_trainable_attention(model, use_mla=True)
    assert type(model.layers["0"].attention) is OtherScale


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda a: setattr(a, "kv_lora_rank", 32), r"wkv_a.weight is \(56, 48\), expected \(48"),
        (lambda a: setattr(a, "n_heads", 8), r"wkv_b.weight is \(176, 40\), expected \(352, 40\)"),
        (lambda a: setattr(a, "gate", nn.Linear(2, 2)), "parts that the latent block would drop"),
        (lambda a: setattr(a, "wkv_b", nn.Linear(40, 176)), "wkv_b has a bias"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_named(change, text):
    model = Model([OlderAttention()])
    change(model.layers["0"].attention)
    with pytest.raises(ValueError, match=text):
        replace_with_trainable_attention(model, use_mla=True)


def test_a_zero_output_projection_proves_nothing():
    model = Model([Doubled()])
    nn.init.zeros_(model.layers["0"].attention.wo.weight)
    report = replace_with_trainable_attention(model, use_mla=True)
    assert [layer.proven for layer in report.layers] == [False]


class Doubled(OlderAttention):
    def forward(self, x, freqs_cis, attention_masks=None):
        return super().forward(x, freqs_cis) * 2


class SometimesUnrotated(OlderAttention):
    use_rope = True

    def forward(self, x, freqs_cis, attention_masks=None):
        return super().forward(x, freqs_cis if self.use_rope else torch.ones_like(freqs_cis))


def test_a_layer_that_differs_by_a_flag_is_tried_out_by_itself():
    model = Model([SometimesUnrotated(), SometimesUnrotated()])
    model.layers["1"].attention.use_rope = False
    with pytest.raises(ValueError, match="layers.1.attention: SometimesUnrotated computes"):
        replace_with_trainable_attention(model, use_mla=True)


def test_a_swapped_model_can_be_pickled():
    model = Model([titan_attention(24)])
    replace_with_trainable_attention(model, use_mla=True)
    again, x = pickle.loads(pickle.dumps(model)), torch.randn(1, 5, WIDTH)
    block, twin = model.layers["0"].attention, again.layers["0"].attention
    assert type(twin) is type(block) and torch.equal(twin(x, None), block(x, None))
