"""Experts divided among ranks: which part each rank adds, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.unit.test_moe import DIM, EXPERTS, TOP_K, corrected
from vllm_graft import ParallelContext
from vllm_graft.families.torchtitan_ep import check_expert_parallel, divide_experts
from vllm_graft.families.torchtitan_tp import TitanParallel

STACK = "routed_experts.inner_experts"


def context(**sizes: int) -> ParallelContext:
    return ParallelContext(**{"tensor_model_parallel_size": 2, "expert_parallel_size": 2} | sizes)


def of_rank(rank: int, ranks: int) -> nn.Module:
    """A layer that holds its share of the experts, as `parallelize` would leave it."""
    moe = corrected()
    mesh = SimpleNamespace(size=lambda: ranks, get_local_rank=lambda: rank)
    divide_experts(moe, mesh)
    for parameter in moe.get_submodule(STACK).parameters():
        parameter.data = parameter.data.chunk(ranks)[rank]
    return moe


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 40])
def test_every_routed_row_is_one_ranks_and_zero_elsewhere(ranks, tokens):
    moe, seen = corrected(), []
    moe.get_submodule(STACK).register_forward_hook(lambda _, args, out: seen.append((args, out)))
    moe(torch.randn(1, tokens, DIM))
    ((rows_RD, counts_E), want_RD) = seen[0]
    parts = [of_rank(r, ranks).get_submodule(STACK)(rows_RD, counts_E) for r in range(ranks)]
    assert torch.equal(sum(parts), want_RD)
    held = torch.stack([part.any(-1) for part in parts])
    assert torch.equal(held.sum(0), torch.ones(len(rows_RD), dtype=torch.int64))


def test_a_rank_whose_experts_nobody_chose_has_gradients_of_zero():
    alone, x = corrected(), torch.randn(1, 1, DIM)
    ranks = [of_rank(rank, EXPERTS) for rank in range(EXPERTS)]
    for moe in (alone, *ranks):
        moe(x).sum().backward()
    whole, *shares = (moe.get_submodule(STACK).w1_EFD.grad for moe in (alone, *ranks))
    assert sum(not grad.any() for grad in shares) == EXPERTS - TOP_K
    assert torch.equal(torch.cat(shares), whole)


def test_sizes_are_vllms():
    config = SimpleNamespace(
        tensor_parallel_size=2, pipeline_parallel_size=5, data_parallel_size=3,
        enable_expert_parallel=True,
    )  # fmt: skip
    context = ParallelContext.from_config(config)
    assert context.get_tensor_parallel_world_size() == 2
    assert context.get_pipeline_parallel_world_size() == 5
    assert context.get_data_parallel_size() == 3
    assert context.get_expert_parallel_world_size() == 6
    config.enable_expert_parallel = False
    assert ParallelContext.from_config(config).get_expert_parallel_world_size() == 1


def test_experts_that_the_ranks_cannot_share_are_refused():
    sizes = context(tensor_model_parallel_size=3, expert_parallel_size=3)
    error = rf"{STACK}: num_experts=8 is not divisible by expert_parallel_size=3"
    with pytest.raises(ValueError, match=error):
        check_expert_parallel(corrected(), sizes)


def test_ranks_with_other_tokens_are_refused():
    sizes = context(tensor_model_parallel_size=1)
    with pytest.raises(ValueError, match="use data_parallel_size=1"):
        check_expert_parallel(corrected(), sizes)


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="the model has no experts"):
        check_expert_parallel(nn.Linear(2, 2), context())


@pytest.mark.parametrize("size", [1, 2])
def test_configs_for_torchtitans_own_dispatchers_are_refused(size):
    from torchtitan.models.common.moe_sharding import expert_param_placement_sparse
    from torchtitan.protocols.sharding import ShardingConfig

    moe = corrected()
    layout = {"w1_EFD": expert_param_placement_sparse()}
    moe.get_submodule(STACK)._sharding_config = ShardingConfig(state_shardings=layout)
    with pytest.raises(ValueError, match=rf"{STACK}: sharded with enable_ep=True"):
        check_expert_parallel(moe, context(expert_parallel_size=size))
    # One rank has all tokens and all experts, whatever the configs say.
    check_expert_parallel(moe, ParallelContext())


@pytest.mark.parametrize("beside", ["data_parallel_size", "pipeline_model_parallel_size"])
def test_processes_beside_the_tensor_parallel_ranks_are_refused(beside):
    """TorchTitan's mesh would hold the first ranks of the world, whoever asks."""
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    try:
        with pytest.raises(ValueError, match="and .*, 4 processes in one world: TorchTitan"):
            TitanParallel(corrected(), context(expert_parallel_size=1, **{beside: 2}))
    finally:
        dist.destroy_process_group()
