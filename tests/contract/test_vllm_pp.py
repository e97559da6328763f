"""What Graft uses of vLLM's pipeline parallelism, run against every release."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.dist.launch import with_workers
from tests.support import qwen3_checkpoint
from vllm_graft import ParallelContext
from vllm_graft.serve import _vllm_pp


def test_vllm_still_sees_that_graft_models_may_have_stages():
    from vllm.model_executor.models.interfaces import supports_pp

    from vllm_graft.serve.adapter import adapter_class

    assert supports_pp(adapter_class("Any"))


def test_layers_are_divided_as_vllm_does(monkeypatch):
    thirds = [_vllm_pp.layers_of_stage(5, stage, 3) for stage in range(3)]
    assert thirds == [range(2), range(2, 4), range(4, 5)]
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,3,1")
    assert _vllm_pp.layers_of_stage(5, 1, 3) == range(1, 4)


def test_a_stage_without_layers_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"model has 1 layers, divided 1\|0: each stage needs"):
        ParallelContext(pipeline_model_parallel_size=2).stage_layers(1)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "0,3")
    with pytest.raises(ValueError, match=r"model has 3 layers, divided 0\|3: each stage needs"):
        ParallelContext(pipeline_model_parallel_size=2).stage_layers(3)


def test_the_receive_buffer_is_made_once_and_in_the_runners_shape(monkeypatch):
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    name = "sync_and_gather_intermediate_tensors"
    stock = getattr(GPUModelRunner, name)
    stock = getattr(stock, "__wrapped__", stock)
    monkeypatch.setattr(GPUModelRunner, name, stock)
    sent = _vllm_pp.message(torch.rand(5, 4))

    def empty(batch_size, dtype, device):
        return _vllm_pp.message(torch.zeros(batch_size, 4, dtype=dtype, device=device))

    runner = SimpleNamespace(
        intermediate_tensors=None, max_num_tokens=8, device="cpu",
        model_config=SimpleNamespace(dtype=torch.float32),
        model=SimpleNamespace(make_empty_intermediate_tensors=empty),
    )  # fmt: skip
    with pytest.raises(AssertionError):
        stock(runner, 5, sent, True)
    _vllm_pp.make_receive_buffer_when_eager()
    patched = getattr(GPUModelRunner, name)
    _vllm_pp.make_receive_buffer_when_eager()
    assert getattr(GPUModelRunner, name) is patched
    got = _vllm_pp.received(patched(runner, 5, sent, True))
    assert torch.equal(got, _vllm_pp.received(sent))
    buffer = runner.intermediate_tensors
    assert _vllm_pp.received(buffer).shape == (8, 4)
    patched(runner, 5, sent, True)
    assert runner.intermediate_tensors is buffer


@pytest.mark.slow
@pytest.mark.engine
def test_stock_vllm_still_cannot_receive_in_eager_mode(tmp_path):
    """`make_receive_buffer_when_eager` can go when this fails."""
    checkpoint = qwen3_checkpoint(tmp_path / "checkpoint")
    options = {"pipeline_parallel_size": 2, "enforce_eager": True}
    done = with_workers(checkpoint, "stock", [[1, 2, 3]], options)
    assert "TOKENS" not in done.stdout
    assert "assert self.intermediate_tensors is not None" in done.stdout + done.stderr
