"""Queries of samples, cut into requests of a few: none lost, each sees the keys it saw before."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_graft.serve._vllm_cpu import few_queries, in_few_queries

SAMPLES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), min_size=1, max_size=6)
"""Cached tokens and queries of each sample."""


@given(samples=SAMPLES, few=st.integers(1, 9))
def test_every_query_keeps_its_sample_and_its_keys(samples, few):
    queries = torch.tensor([n for _, n in samples])
    cu_queries = torch.cat([torch.zeros(1), queries.cumsum(0)]).to(torch.int32)
    lengths = torch.tensor([cached + n for cached, n in samples], dtype=torch.int32)
    borders, tokens, sample = in_few_queries(cu_queries, lengths, few)
    assert borders.dtype == tokens.dtype == torch.int32
    seen = []
    for one, (begin, end) in enumerate(
        zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)
    ):
        assert 1 <= end - begin <= few
        last = int(tokens[one])
        seen += [(int(sample[one]), last - (end - begin) + i + 1) for i in range(end - begin)]
    assert seen == [
        (index, cached + i + 1) for index, (cached, n) in enumerate(samples) for i in range(n)
    ]


def test_heads_that_share_keys_count_as_rows():
    assert [few_queries(*heads) for heads in ((8, 8), (16, 8), (32, 8), (16, 1))] == [8, 4, 2, 1]
