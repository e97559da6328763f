"""What the dry run says of logits that are too narrow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vllm_graft.serve.body import TokenBody
from vllm_graft.serve.dry_run import DryRun
from vllm_graft.serve.stages import Stage

VOCAB = 8


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCAB, VOCAB)

    def forward(self, input_ids, positions=None, **kwargs):
        return self.emb(input_ids)


def refusal(width: int, tp_size: int) -> str:
    """What is said of logits of this width."""
    model = Model()
    stage = Stage(index=0, count=1, width=VOCAB, dtype=torch.float32)
    with pytest.raises(RuntimeError) as caught:
        DryRun(
            arch="Arch", model=model, body=TokenBody(model=model, vllm_config=None), paged=[],
            stage=stage, vocab_size=VOCAB, max_model_len=64, tp_size=tp_size,
            compute_logits=lambda hidden: hidden[:, :width],
        ).run()  # fmt: skip
    return str(caught.value)


def test_a_ranks_share_of_the_logits_is_named_with_the_fix():
    said = refusal(VOCAB // 2, tp_size=2)
    assert f"returned (1, {VOCAB // 2}) for 1 token; expected (1, {VOCAB})" in said
    assert "With tensor_parallel_size=2 these are the columns of one rank" in said
    assert "gather the output of the head" in said


@pytest.mark.parametrize(("width", "tp_size"), [(VOCAB // 2, 1), (VOCAB // 4, 2)])
def test_gathering_is_not_advised_where_it_would_not_help(width, tp_size):
    assert "gather" not in refusal(width, tp_size)
