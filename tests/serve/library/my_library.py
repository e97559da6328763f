"""A small hand-written Llama, standing in for a user's own library.

Written for training: tokens `[B, L]`, a RoPE table sliced by L, no positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class MyModelConfig:
    vocab_size: int
    hidden_size: int
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    max_length: int = 1024


class Attention(nn.Module):
    def __init__(self, config: MyModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.hidden_size // config.n_heads
        self.wq = nn.Linear(config.hidden_size, config.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, config.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.hidden_size, config.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = (w(x).view(batch, length, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        q, k = (self.rotate(h, freqs_cis) for h in (q, k))
        out = F.scaled_dot_product_attention(
            *(h.transpose(1, 2) for h in (q, k, v)), is_causal=True, enable_gqa=True
        )
        return self.wo(out.transpose(1, 2).flatten(2))

    @staticmethod
    def rotate(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs_cis[:, None]).flatten(3).type_as(x)


class Layer(nn.Module):
    def __init__(self, config: MyModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-5)
        self.up = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.down = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x), freqs_cis)
        return x + self.dropout(self.down(F.silu(self.up(self.norm(x)))))


class MyModel(nn.Module):
    """Returns hidden states; `output` makes logits of them."""

    def __init__(self, config: MyModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        head_dim = config.hidden_size // config.n_heads
        # As many people write it: in torch's default dtype.
        frequencies = 1.0 / (10000 ** (torch.arange(0, head_dim, 2) / head_dim))
        angles = torch.outer(torch.arange(config.max_length).float(), frequencies.float())
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        _, length = tokens.shape
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, self.freqs_cis[:length])
        return h
