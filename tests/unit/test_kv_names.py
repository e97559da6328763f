"""KV-cache layer names: unique, one integer each, from the module's own name."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_graft.serve.kv import cache_names


def integers(name: str) -> int:
    return sum(part.isdigit() for part in name.split("."))


def test_a_name_with_one_integer_stays():
    names = ["layers.0.attention.core", "layers.1.attention.core"]
    assert cache_names(names) == names


def test_one_name_with_none_or_several_gives_all_their_ordinals():
    names = ["block_a.attn", "blocks.0.1.attn", "layers.7.attn"]
    assert cache_names(names) == ["kv_block_a_attn.0", "kv_blocks_0_1_attn.1", "kv_layers_7_attn.2"]


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b_0", "0", "1", "27"]), min_size=1, max_size=4).map(
            ".".join
        ),
        unique=True,
        max_size=8,
    )
)
def test_every_name_has_one_integer_and_is_unique(names):
    result = cache_names(names)
    assert all(integers(name) == 1 for name in result)
    assert len(set(result)) == len(names)
