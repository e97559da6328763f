"""LoRA adapters on external models: the tokens of merged weights, and of vLLM's own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vllm_graft
from examples.custom_models.qwen3_torchtitan import ARCH, build_qwen3_torchtitan
from tests.serve.test_push import trainer
from tests.support import adapter, engine, prompts, qwen3_checkpoint, sampled_logprobs
from vllm_graft.train.targets import BACKEND

pytestmark = pytest.mark.engine

TOKENS = prompts((1, 5, 17, 64))
OWN_NAMES = {
    "self_attn.q_proj": "attention.qkv_linear.wq",
    "self_attn.v_proj": "attention.qkv_linear.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
}
RANK, ALPHA = 4, 8


def lora_tensors(checkpoint: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B for five layers of each block, by the checkpoint's names."""
    generator = torch.Generator().manual_seed(3)
    weights = load_file(checkpoint / "model.safetensors")
    found = {}
    for name in sorted(weights):
        layer = name.removesuffix(".weight")
        if any(layer.endswith(hf) for hf in OWN_NAMES):
            rows, width = weights[name].shape
            a = torch.randn(RANK, width, generator=generator) * 0.1
            found[layer] = a, torch.randn(rows, RANK, generator=generator) * 0.1
    assert len(found) == 3 * len(OWN_NAMES)
    return found


def save_adapter(folder: Path, tensors: dict[str, Any], own: bool = False, dot: str = "") -> str:
    """A folder as PEFT writes it, by the checkpoint's names or by the model's own."""
    folder.mkdir()
    named = {}
    for layer, (a, b) in tensors.items():
        name = layer
        if own:
            name = name.removeprefix("model.")
            for hf, mine in OWN_NAMES.items():
                name = name.replace(hf, mine)
        named[f"base_model.model.{dot}{name}.lora_A.weight"] = a
        named[f"base_model.model.{dot}{name}.lora_B.weight"] = b
    save_file(named, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-3] for name in named})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def merge(checkpoint: Path, folder: Path, tensors: dict[str, Any]) -> Path:
    """The checkpoint with the adapter added to its weights."""
    folder.mkdir()
    weights = load_file(checkpoint / "model.safetensors")
    for layer, (a, b) in tensors.items():
        weights[f"{layer}.weight"] += ALPHA / RANK * b @ a
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((checkpoint / "config.json").read_text())
    return folder


def request(folder: str, number: int) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"adapter-{number}", number, folder)


def run(llm: Any, lora: Any = None) -> tuple[list[list[int]], list[float]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=32, logprobs=0, detokenize=False,
                            ignore_eos=True)  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": p} for p in TOKENS], params,
                           use_tqdm=False, lora_request=lora)  # fmt: skip
    completions = [output.outputs[0] for output in outputs]
    tokens = [list(c.token_ids) for c in completions]
    return tokens, [x for c in completions for x in sampled_logprobs(c)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What engines say: ours and vLLM's own, with an adapter and with merged weights."""
    vllm_graft.register(ARCH, build_qwen3_torchtitan)
    folder = tmp_path_factory.mktemp("lora")
    checkpoint = qwen3_checkpoint(folder / "base")
    tensors = lora_tensors(checkpoint)
    hf = save_adapter(folder / "hf", tensors)
    own = save_adapter(folder / "own", tensors, own=True)
    inner = save_adapter(folder / "inner", tensors, own=True, dot="model.")
    wrong = save_adapter(folder / "wrong", {"model.layers.0.elsewhere.wq": tensors.popitem()[1]})
    tensors = lora_tensors(checkpoint)
    options = {"dtype": "float32", "enable_lora": True, "max_lora_rank": 8}
    found: dict[str, Any] = {}
    receiving = {"weight_transfer_config": {"backend": BACKEND}}
    with engine(checkpoint, ARCH, **options, **receiving) as llm:
        found["base"] = run(llm)
        found["hf"] = run(llm, request(hf, 1))
        found["inner"] = run(llm, request(inner, 2))
        found["own"] = run(llm, request(own, 3))
        with pytest.raises(Exception, match=r"no layer of the model") as refused:
            llm.llm_engine.add_lora(request(wrong, 4))
        found["refusal"] = str(refused.value)
        with pytest.raises(Exception, match="cannot be changed while"):
            vllm_graft.push_weights(trainer(checkpoint), llm)
        found["again"] = run(llm)
        held = adapter(llm)._loading
        found["held"] = len(held._tensors) + len(held._parameters)
        with pytest.raises(ValueError, match="cannot be changed while") as refused:
            adapter(llm).load_weights(iter([]))
    with engine(checkpoint, **options) as llm:
        found["stock"] = run(llm, request(hf, 1))
    with engine(merge(checkpoint, folder / "merged", tensors), ARCH, dtype="float32") as llm:
        found["merged"] = run(llm)
    with engine(checkpoint, ARCH, dtype="float32") as llm:
        found["plain"] = run(llm)
    return found


def test_an_adapter_gives_the_tokens_of_merged_weights_and_of_vllms_own_model(results):
    assert results["inner"][0] == results["merged"][0] == results["stock"][0]
    # fp32, three layers; merging rounds the weights.
    assert results["inner"][1] == pytest.approx(results["merged"][1], abs=1e-4)
    assert results["inner"][1] == pytest.approx(results["stock"][1], abs=1e-4)


def test_names_of_the_checkpoint_and_of_either_module_name_the_same_layers(results):
    assert results["hf"] == results["inner"] == results["own"]


def test_requests_without_an_adapter_get_the_models_own_tokens(results):
    assert results["base"][0] == results["plain"][0] == results["again"][0]
    assert results["base"][0] != results["inner"][0]


def test_a_name_that_is_no_layer_is_refused(results):
    assert "'model.layers.0.elsewhere.wq'" in results["refusal"]
    assert "layers.0.attention" in results["refusal"]


def test_nothing_holds_what_was_loaded(results):
    assert results["held"] == 0
