"""Log-probabilities by a sampler's own kernel: its bits, and the gradient of a softmax."""

from __future__ import annotations

import pytest
import torch

from vllm_graft.train.logprobs import token_logprobs

VOCAB = 23
SEQUENCES = [[1, 5, 7, 7, 2], [3, 22, 0]]
PROMPT_LENS = [2, 1]


def kernel(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Another order of rounding than `log_softmax` in float32."""
    assert not torch.is_grad_enabled()
    return logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0].float()


def scored(weight: torch.Tensor, **options) -> torch.Tensor:
    table = torch.randn(VOCAB, weight.shape[1], generator=torch.Generator().manual_seed(1))
    parts = token_logprobs(
        lambda tokens, positions: table[tokens].to(weight.dtype) + 0 * positions[:, None],
        lambda hidden: hidden @ weight.t(),
        SEQUENCES,
        PROMPT_LENS,
        vocab_size=VOCAB,
        device=torch.device("cpu"),
        **options,
    )
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_gives_the_values(dtype):
    weight = torch.randn(VOCAB, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    seen: list[torch.Tensor] = []

    def noted(logits, tokens):
        seen.append(kernel(logits, tokens))
        return seen[-1]

    out = scored(weight, kernel=noted)
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.cat(seen))


def test_the_gradient_is_that_of_log_softmax():
    grads = []
    for options in ({"kernel": kernel}, {}):
        weight = torch.randn(VOCAB, 8, generator=torch.Generator().manual_seed(2))
        weight.requires_grad_()
        (scored(weight, **options) * torch.arange(1.0, 6.0)).sum().backward()
        grads.append(weight.grad)
    # Both round in float32, in another order.
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    assert grads[0].abs().max() > 0.1


def test_the_gradient_keeps_impossible_tokens_out():
    """Tokens that sampling cut off have no gradient, and no NaN."""
    weight = torch.randn(VOCAB, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    cut = torch.zeros(VOCAB)
    cut[11:20] = float("-inf")
    out = scored(weight, kernel=kernel, process=lambda logits, rows: logits + cut)
    out.sum().backward()
    assert bool(torch.isfinite(weight.grad).all())
    assert bool((weight.grad[11:20] == 0).all())
