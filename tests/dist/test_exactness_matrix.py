"""Engine and training forward agree on every path: families, dtypes, threads, ranks, compiled."""

from __future__ import annotations

import json

import pytest
import torch

from tests.dist.launch import torchrun
from tests.moe_checkpoints import deepseek_v3_checkpoint, qwen3_moe_checkpoint
from tests.support import python, qwen3_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1000)]

WORKER = "import runpy, sys; runpy.run_module('tests.dist.exactness_worker', run_name='__main__')"
MAKE = {
    "qwen3": ("Qwen3TorchTitan", qwen3_checkpoint),
    "qwen3_moe": ("Qwen3TorchTitan", qwen3_moe_checkpoint),
    "deepseek_v3": ("DeepSeekV3TorchTitan", deepseek_v3_checkpoint),
}


MAX_TOKENS = {"qwen3": 40, "qwen3_moe": 40, "deepseek_v3": 8}
"""The latent kernel is slow."""
LIMIT_S = 900
PATHS = 12
PROMPTS = 10
MAX_LEN = 512
PROMPT_TOKENS = 767 - 1
"""Of all prompts but the longest, without the first of each, which has no log-probability; the longest
fills the context."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def checkpoint(family):
        if family not in made:
            made[family] = MAKE[family][1](tmp_path_factory.mktemp(family) / "checkpoint")
        return made[family]

    return checkpoint


def run(family, checkpoint, tmp_path, *, threads=2, ranks=1, **options):
    """What the worker saw on rank 0, all ranks being complete and equal."""
    options = {"enforce_eager": True, **options}
    tokens = MAX_TOKENS[family]
    arguments = [MAKE[family][0], str(checkpoint), str(tmp_path / "seen"), str(tokens)]
    arguments.append(json.dumps(options))
    if ranks > 1:
        torchrun(ranks, "tests.dist.exactness_worker", *arguments)
    else:
        # vLLM binds threads in worker processes only; an engine in this process takes OpenMP's.
        done = python(WORKER, *arguments, limit_s=LIMIT_S, OMP_NUM_THREADS=str(threads))
        assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads((tmp_path / f"seen.{rank}").read_text()) for rank in range(ranks)]
    assert ranks > 1 or seen[0]["threads"] == threads
    for one in seen:
        # vLLM turns these off for MLA where the processor has no AMX.
        assert not one["without"] or (family == "deepseek_v3" and not _has_amx())
        count = PATHS - len(one["without"])
        assert len(one["paths"]) == count
        assert [p for p in one["paths"] if p[1] != p[2]] == []
        scored = PROMPT_TOKENS + MAX_LEN - tokens
        assert sum(p[2] for p in one["paths"]) == count * PROMPTS * tokens + scored
    return seen[0]


def _has_amx():
    return torch.cpu._is_amx_tile_supported()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", MAKE)
def test_every_path_is_equal(checkpoints, family, dtype, tmp_path):
    run(family, checkpoints(family), tmp_path, dtype=dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])  # The latent kernel splits by threads.
def test_the_number_of_threads_changes_nothing(checkpoints, family, dtype, tmp_path):
    one, two = (
        run(family, checkpoints(family), tmp_path, threads=threads, dtype=dtype)
        for threads in (1, 2)
    )
    assert one["scored"] == two["scored"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", MAKE)
def test_two_ranks_are_exact_too(checkpoints, family, dtype, tmp_path):
    run(family, checkpoints(family), tmp_path, ranks=2, dtype=dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_experts_divided_among_two_ranks_are_exact_too(checkpoints, dtype, tmp_path):
    options = {"dtype": dtype, "enable_expert_parallel": True}
    run("qwen3_moe", checkpoints("qwen3_moe"), tmp_path, ranks=2, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiled_serving_is_exact_too(checkpoints, dtype, tmp_path):
    run("qwen3", checkpoints("qwen3"), tmp_path, dtype=dtype, enforce_eager=False)
