"""Models written by hand, without a wrapper: served, trained, or refused with the place."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vllm_graft
from tests.support import engine, generate, live_module, prompts, sampled_logprobs, spread_weights
from tests.zoo.test_transformers import GPT2, _check_gradients, _gap
from vllm_graft.families.handwritten import find_sites

V, D, N = 512, 128, 4


class Attention(nn.Module):
    def __init__(self, kv_heads=N, rotate=None, **options):
        super().__init__()
        self.kv_heads, self.rotate = kv_heads, rotate
        self.options = options or {"is_causal": True}
        self.c_attn = nn.Linear(D, D + 2 * kv_heads * D // N)
        self.c_proj = nn.Linear(D, D)

    def forward(self, x, table=None):
        b, length, _ = x.shape
        q, k, v = self.c_attn(x).split([D, *[self.kv_heads * D // N] * 2], -1)
        q, k, v = (y.view(b, length, -1, D // N) for y in (q, k, v))
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kv_heads != N, **self.options)
        return self.c_proj(out.transpose(1, 2).reshape(b, length, D))


def rotate(x, table):
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[None, :, None]).flatten(-2)


class LearnedPositions(nn.Module):
    """GPT-2: an `arange` into a table, fused `c_attn`, tied head."""

    def __init__(self, **options):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, D), nn.Embedding(512, D)
        self.h = nn.ModuleList(Attention(**options) for _ in range(2))
        self.lm_head = nn.Linear(D, V, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens) + self.embed_positions(tokens)
        for block in self.h:
            x = x + block(x)
        return self.lm_head(x)

    def embed_positions(self, tokens):
        return self.wpe(torch.arange(tokens.shape[1], device=tokens.device))


class SlicedTable(LearnedPositions):
    """A learned table cut to the length."""

    def embed_positions(self, tokens):
        return self.wpe.weight[: tokens.shape[1]]


class Rotated(LearnedPositions):
    """Llama reference: `freqs_cis` cut to the length, grouped heads."""

    def __init__(self):
        super().__init__(kv_heads=2)
        angles = torch.outer(torch.arange(512.0), 1e4 ** -(torch.arange(0, D // N, 2) / (D // N)))
        self.freqs_cis = torch.polar(torch.ones_like(angles), angles)

    def forward(self, tokens):
        x, table = self.wte(tokens), self.freqs_cis[: tokens.shape[1]]
        for block in self.h:
            x = x + block(x, table)
        return self.lm_head(x)


class GivenPositions(Rotated):
    """gpt-fast: `input_pos` indexes the table."""

    def forward(self, tokens, input_pos):
        x, table = self.wte(tokens), self.freqs_cis[input_pos]
        for block in self.h:
            x = x + block(x, table)
        return self.lm_head(x)


class WrittenOut(Attention):
    """nanoGPT: softmax in the open, under a stored triangle."""

    def __init__(self, softcap=None):
        super().__init__()
        self.softcap = softcap
        self.register_buffer("seen", torch.ones(512, 512).tril().view(1, 1, 512, 512), False)
        self.attn_dropout = nn.Dropout(0.1)

    def forward(self, x, table=None):
        b, length, _ = x.shape
        q, k, v = (
            y.view(b, length, N, D // N).transpose(1, 2) for y in self.c_attn(x).split(D, -1)
        )
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        if self.softcap is not None:
            att = self.softcap * torch.tanh(att / self.softcap)
        att = att.masked_fill(self.seen[:, :, :length, :length] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        return self.c_proj((att @ v).transpose(1, 2).contiguous().view(b, length, D))


class Softmax(LearnedPositions):
    """Scores, mask, softmax and product written out, with a softcap."""

    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList(WrittenOut(softcap) for softcap in (None, 5.0))


class EinsumAttention(Attention):
    """Scores of `[B, L, N, H]`, weights before values or behind them."""

    def __init__(self, scores, values):
        super().__init__()
        self.scores, self.values = scores, values

    def forward(self, x, table=None):
        q, k, v = self.c_attn(x).unflatten(-1, (3, N, D // N)).unbind(2)
        operands = (q, k) if self.scores[1] == "q" else (k, q)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        att = torch.einsum(self.scores, *operands) * (D // N) ** -0.5
        att = att.masked_fill(later, float("-inf")).softmax(-1)
        operands = (att, v) if self.values[3] == "k" else (v, att)
        return self.c_proj(torch.einsum(self.values, *operands).flatten(2))


class Functional(LearnedPositions):
    """Products with bare parameters."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.eye(D))

    def forward(self, tokens):
        x = self.wte(tokens) + self.embed_positions(tokens)
        for block in self.h:
            x = x + block(x) @ self.mix.T
        return F.linear(x, self.wte.weight)


class Einsum(LearnedPositions):
    """Both products by `torch.einsum`."""

    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList([
            EinsumAttention("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"),
            EinsumAttention("bkhd, bqhd -> bhqk", "bkhd,bhqk->bqhd"),
        ])  # fmt: skip


class Alibi(LearnedPositions):
    """Slopes of the model's own in its mask, and none else that knows of positions."""

    def forward(self, tokens):
        x, i = self.wte(tokens), torch.arange(tokens.shape[1])
        later = torch.zeros(len(i), len(i)).masked_fill(i[:, None] < i, float("-inf"))
        bias = -torch.tensor([0.3, 0.1, 0.05, 0.0])[:, None, None] * (i[:, None] - i)
        for block in self.h:
            block.options = {"attn_mask": bias + later}
            x = x + block(x)
        return self.lm_head(x)


class Masked(LearnedPositions):
    """A mask of the model's own: causal in one layer, a window of 24 in the other."""

    def forward(self, tokens):
        x = self.wte(tokens) + self.embed_positions(tokens)
        i = torch.arange(tokens.shape[1])
        seen = i[:, None] >= i
        far = torch.where(i[:, None] - i >= 24, float("-inf"), 0.0)
        later = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
        for block, mask in zip(self.h, (seen, far + later), strict=True):
            block.options = {"attn_mask": mask}
            x = x + block(x)
        return self.lm_head(x)


class Encoder(LearnedPositions):
    """`nn.TransformerEncoder` under a causal mask."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, N, 2 * D, activation="gelu", batch_first=True)
        self.h = nn.TransformerEncoder(layer, 2)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.wte(tokens) + self.embed_positions(tokens)
        return self.lm_head(self.h(x, mask=mask, is_causal=True))


STYLES = (
    LearnedPositions, SlicedTable, Rotated, GivenPositions, Softmax, Einsum, Functional, Alibi,
    Masked, Encoder,
)  # fmt: skip


def reference(model, rows):
    length = torch.arange(rows.shape[1])
    return model(rows, length) if isinstance(model, GivenPositions) else model(rows)


class Original(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def named_parameters(self, *args, **kwargs):
        return self.inner.named_parameters(*args, **kwargs)

    def forward(self, rows):
        from types import SimpleNamespace

        return SimpleNamespace(logits=reference(self.inner, rows))


@pytest.mark.engine
@pytest.mark.parametrize("style", STYLES)
def test_served_and_trained_as_the_original(style, tmp_path):
    model = spread_weights(style()).eval()
    check_served_and_trained(style, model, model, tmp_path)


def check_served_and_trained(style, served, model, folder):
    """Serve the weights of `served` as `style`, and compare with what `model` computes."""
    from safetensors.torch import save_file
    from transformers import GPT2Config

    GPT2Config(**GPT2, architectures=["Plain"]).save_pretrained(folder)
    tensors = {n: t.clone() for n, t in served.state_dict().items() if n != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors")
    vllm_graft.register("Plain", style)
    tokens = prompts((5, 40, 130))
    with engine(folder, dtype="float32") as llm:
        completions = generate(llm, tokens, max_tokens=8)
        samples = [p + list(c.token_ids) for p, c in zip(tokens, completions, strict=True)]
        for prompt, sample, completion in zip(tokens, samples, completions, strict=True):
            with torch.no_grad():
                logits = reference(model, torch.tensor([sample]))[0, len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == list(completion.token_ids)
            want = logits.log_softmax(-1).max(-1).values
            assert torch.tensor(sampled_logprobs(completion)).sub(want).abs().max() < 1e-4
        assert _gap(live_module(llm), tokens, completions) == 0
        _check_gradients(Original(model), live_module(llm), samples)


@pytest.mark.parametrize("style", STYLES)
def test_rope_is_told_from_other_positions(style):
    sites = vllm_graft.adapt(spread_weights(style()).eval()).sites
    assert {site.rotated for site in sites} == {issubclass(style, Rotated)}


class Leaking(LearnedPositions):
    def forward(self, tokens):
        return super().forward(tokens) + self.wte.weight[tokens].mean(1, True).sum()


class Twice(LearnedPositions):
    def forward(self, tokens):
        return self.lm_head(self.h[0](self.h[0](self.wte(tokens))))


class Written(LearnedPositions):
    """One layer whose scores go through `step`."""

    def __init__(self, step):
        super().__init__()
        self.step = step
        self.h = nn.ModuleList([self.Block(step)])

    class Block(WrittenOut):
        def __init__(self, step):
            super().__init__()
            self.step = step

        def forward(self, x):
            q = x[:, None]
            return (self.step(q @ q.transpose(-2, -1)) @ q)[:, 0]


class Cross(LearnedPositions):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(D, N, batch_first=True)

        def forward(self, x):
            return self.attn(x, x + 1, x + 1)[0]

    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList([self.Block()])


def biased(bias):
    """A model that adds `bias` to the scores of 11 tokens under a causal mask."""
    later = torch.ones(11, 11, dtype=torch.bool).triu(1)
    return LearnedPositions(attn_mask=(bias + torch.zeros(11, 11)).masked_fill(later, -math.inf))


class TimesVector(LearnedPositions):
    def embed_positions(self, tokens):
        x = super().embed_positions(tokens)
        return x + (x @ x.new_ones(D))[..., None]


def test_products_with_a_vector_are_left_alone():
    assert len(vllm_graft.adapt(spread_weights(TimesVector()).eval()).sites) == 2


def test_a_parameter_without_values_is_named():
    model = Functional().eval()
    with torch.no_grad():
        model.mix.fill_(math.nan)
    with pytest.raises(ValueError, match=r"logits are not finite.* nan, is in mix;"):
        vllm_graft.adapt(model)


class LearnedSlopes(LearnedPositions):
    """ALiBi whose slopes come with the checkpoint."""

    def __init__(self):
        super().__init__()
        self.slopes = nn.Parameter(torch.full((N, 1, 1), 0.5))

    def forward(self, tokens):
        i = torch.arange(tokens.shape[1])
        bias = (self.slopes * (i - i[:, None])).masked_fill(i[:, None] < i, -math.inf)
        for block in self.h:
            block.options = {"attn_mask": bias}
        return super().forward(tokens)


def test_slopes_that_are_learned_are_refused():
    with pytest.raises(ValueError, match=r"h\.0: something learned is added to the scores"):
        vllm_graft.adapt(LearnedSlopes().eval())


def test_a_number_for_all_keys_of_a_query_changes_nothing():
    row = torch.arange(11.0)[:, None].sqrt()
    sites = find_sites(biased(row).eval())
    assert [site.alibi_slopes for site in sites] == [None, None]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LearnedPositions(is_causal=False), r"h\.0: attention is not causal"),
        (lambda: LearnedPositions(attn_mask=torch.zeros(1)), r"h\.0: its mask shows later"),
        (lambda: biased(torch.arange(11.0).square()), r"h\.0: something is added .*bias"),
        (
            lambda: LearnedPositions(attn_mask=torch.ones(11, 11).tril(-1).bool()),
            r"h\.0: its mask is neither causal nor a window",
        ),
        (lambda: Written(lambda s: s.softmax(-1)), r"h\.0: attention is not causal"),
        (lambda: Written(lambda s: s.relu()), r"h\.0: relu of attention scores is not"),
        (lambda: Written(lambda s: s.softmax(-1) * 2), r"h\.0: .*changed after the softmax"),
        (lambda: Written(lambda s: s.softmax(-2)), r"h\.0: softmax over dimension -2"),
        (lambda: Written(lambda s: s.cumsum(-1)), r"h\.0: cumsum of attention scores"),
        (Cross, r"h\.0\.attn: nn.MultiheadAttention with other keys"),
        (Leaking, "packed into one row give other logits"),
        (Twice, r"h\.0: attention runs twice"),
        (lambda: nn.Sequential(nn.Embedding(V, D)), "never calls scaled_dot_product_attention,"),
        (lambda: nn.Linear(2, 2), "takes no token ids"),
    ],
)
def test_what_cannot_be_proven_is_refused_with_the_place(build, message):
    with pytest.raises(ValueError, match=message):
        vllm_graft.adapt(spread_weights(build()).eval())


def test_ranks_are_refused():
    from types import SimpleNamespace

    from vllm_graft.serve.adapter import _check_ranks_supported

    two = SimpleNamespace(get_tensor_parallel_world_size=lambda: 2)
    model = vllm_graft.adapt(LearnedPositions().eval())
    with pytest.raises(ValueError, match="Plain: tensor_parallel_size=2: a model that adapt made"):
        _check_ranks_supported("Plain", model, two)
