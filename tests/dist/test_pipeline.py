"""TorchTitan's Qwen3 on two pipeline stages against one: tokens, bits, what each stage holds."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import vllm_graft
from examples.custom_models.qwen3_torchtitan import ARCH, build_qwen3_torchtitan
from tests.dist.launch import torchrun, with_workers
from tests.dist.stage_worker import LENGTHS
from tests.support import engine, generate, prompts, qwen3_checkpoint, sampled_logprobs

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TWO_STAGES = {"pipeline_parallel_size": 2}


@pytest.fixture(scope="module", params=["untied", "tied"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return qwen3_checkpoint(folder, tie_word_embeddings=request.param == "tied")


@pytest.fixture(scope="module")
def alone(checkpoint):
    """Completions of one stage, eager."""
    vllm_graft.register(ARCH, build_qwen3_torchtitan)
    with engine(checkpoint, ARCH, dtype="float32") as llm:
        return generate(llm, prompts(LENGTHS), max_tokens=16)


@pytest.mark.parametrize(
    ("checkpoint", "mode"),
    [("untied", "eager"), ("untied", "compiled"), ("tied", "compiled")],
    indirect=["checkpoint"],
)
def test_worker_processes_give_the_tokens_of_one_stage(checkpoint, alone, mode):
    options = TWO_STAGES | {"enforce_eager": mode == "eager"}
    tokens = with_workers(checkpoint, ARCH, prompts(LENGTHS), options).tokens()
    assert tokens == [list(c.token_ids) for c in alone]


def test_every_stage_has_its_part_and_the_bits_are_those_of_one(checkpoint, alone, tmp_path):
    torchrun(2, "tests.dist.stage_worker", str(checkpoint), str(tmp_path / "stage"))
    stages = [torch.load(tmp_path / f"stage.{rank}", weights_only=False) for rank in range(2)]
    tensors = load_file(checkpoint / "model.safetensors")
    tied = "lm_head.weight" not in tensors
    table = {"model.embed_tokens.weight"} if tied else set()
    for mine, other in (stages, stages[::-1]):
        assert mine["tokens"] == [list(c.token_ids) for c in alone]
        # What stages exchange is copied, not rounded.
        assert mine["logprobs"] == [sampled_logprobs(c) for c in alone]
        assert mine["loaded"] & other["loaded"] == table
        assert mine["loaded"] | other["loaded"] == tensors.keys()
        assert mine["elsewhere"] == tensors.keys() - mine["loaded"]
        assert mine["exported"].keys() == mine["loaded"]
        for name, tensor in mine["exported"].items():
            assert torch.equal(tensor, tensors[name]), name
    cached = [stage["cached"] for stage in stages]
    names = "model.layers.{}.attention.inner_attention"
    assert cached == [[names.format(i) for i in own] for own in ((0, 1), (2,))]


@pytest.mark.parametrize(
    ("target", "layers", "text"),
    [
        (ARCH, 1, "pipeline_parallel_size=2, but the model has 1 layers, divided 1|0"),
        (
            "tests.dist.wrong_stages:unsupported", 3,
            "pipeline_parallel_size=2, but Unsupported.supports_pp is False",
        ),
        (
            "tests.dist.wrong_stages:whole", 3,
            "several stages hold model.layers.0.attention.inner_attention",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_is_refused_before_the_first_token(target, layers, text, tmp_path):
    small = qwen3_checkpoint(tmp_path / "checkpoint", num_hidden_layers=layers)
    done = with_workers(small, target, [[1, 2, 3]], TWO_STAGES | {"enforce_eager": True})
    assert done.returncode != 0 and "TOKENS" not in done.stdout
    assert text in done.stdout + done.stderr
