"""vLLM's own reload hooks on a Graft model: whole updates land, partial ones are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import vllm_graft
from examples.custom_models.qwen3_torchtitan import ARCH, build_qwen3_torchtitan
from tests.support import (
    adapter,
    engine,
    generate,
    live_module,
    prompts,
    qwen3_checkpoint,
    sampled_logprobs,
)
from vllm_graft import WeightError

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def checkpoint(request, tmp_path_factory):
    vllm_graft.register(ARCH, build_qwen3_torchtitan)
    folder = tmp_path_factory.mktemp("qwen3")
    return qwen3_checkpoint(folder, num_hidden_layers=2, tie_word_embeddings=request.param)


def changed(checkpoint) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(checkpoint / "model.safetensors").items()
    }


def update(llm, tensors, one_by_one: bool) -> None:
    """As vLLM's weight-transfer engines drive it, in one call or one tensor at a time."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    model, config = adapter(llm), llm.llm_engine.vllm_config
    with set_current_vllm_config(config), torch.inference_mode(False), torch.no_grad():
        initialize_layerwise_reload(model)
        for chunk in [[item] for item in tensors.items()] if one_by_one else [tensors.items()]:
            model.load_weights(chunk)
        finalize_layerwise_reload(model, config.model_config)
    llm.reset_prefix_cache()


def save(checkpoint, tensors, folder):
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(checkpoint, folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("one_by_one", [False, True], ids=["one call", "one tensor at a time"])
def test_an_update_serves_the_new_weights(checkpoint, one_by_one, tmp_path):
    tokens, tensors = prompts((5, 140)), changed(checkpoint)
    with engine(save(checkpoint, tensors, tmp_path / "new"), ARCH, dtype="float32") as llm:
        want = [sampled_logprobs(c) for c in generate(llm, tokens)]
    with engine(checkpoint, ARCH, dtype="float32") as llm:
        module = live_module(llm)
        storage = {name: p.data_ptr() for name, p in module.named_parameters()}
        old = [sampled_logprobs(c) for c in generate(llm, tokens)]
        update(llm, tensors, one_by_one)
        assert [sampled_logprobs(c) for c in generate(llm, tokens)] == want != old
        # The same module with the same storage: an optimizer built before still fits.
        assert {name: p.data_ptr() for name, p in module.named_parameters()} == storage
        assert not any(p.isnan().any() for p in module.parameters())


def test_a_partial_update_is_refused_and_so_is_serving_after_it(checkpoint):
    tensors = changed(checkpoint)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with engine(checkpoint, ARCH, dtype="float32") as llm:
        with pytest.raises(
            WeightError, match=r"(?s)1 parameter was left.*model.layers.1.feed_forward.w3.weight"
        ):
            update(llm, tensors, one_by_one=True)
        with pytest.raises(WeightError, match="refuses to serve"):
            adapter(llm)(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
        assert not any(p.isnan().any() for p in live_module(llm).parameters())
        update(llm, changed(checkpoint), one_by_one=False)
        assert generate(llm, prompts((5,)))


def test_a_partial_update_after_a_failed_one_is_refused_too(checkpoint):
    broken = changed(checkpoint)
    last = next(reversed(broken))
    broken[last] = torch.zeros(broken[last].shape, dtype=torch.int8)
    partial = changed(checkpoint)
    del partial["model.layers.1.mlp.up_proj.weight"]
    with engine(checkpoint, ARCH, dtype="float32") as llm:
        with pytest.raises(WeightError, match="looks quantized"):
            update(llm, broken, one_by_one=True)
        with pytest.raises(WeightError):
            update(llm, partial, one_by_one=True)
        with pytest.raises(WeightError, match="refuses to serve"):
            adapter(llm)(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
        assert not any(p.isnan().any() for p in live_module(llm).parameters())


def test_reloading_from_disk_works(checkpoint):
    with engine(checkpoint, ARCH, dtype="float32") as llm:
        before = [sampled_logprobs(c) for c in generate(llm, prompts((9,)))]
        with torch.no_grad():
            for parameter in live_module(llm).parameters():
                parameter.mul_(1.5)
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
        assert [sampled_logprobs(c) for c in generate(llm, prompts((9,)))] == before
