"""A checkpoint of `my_library` and its own greedy continuation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

LIBRARY = Path(__file__).parent / "library"
HF_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "output": "lm_head",
}


@pytest.fixture(scope="session")
def my_library():
    """The stand-in for a user's library, importable by name here and in child processes."""
    if str(LIBRARY) not in sys.path:
        sys.path.append(str(LIBRARY))
    import my_library

    return my_library


@pytest.fixture(scope="session")
def my_model(my_library):
    """The original model, untouched, with random weights."""
    torch.manual_seed(0)
    model = my_library.MyModel(my_library.MyModelConfig(vocab_size=256, hidden_size=128))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="session")
def my_checkpoint(my_model, tmp_path_factory):
    """Its weights under Hugging Face names, with a Llama config that vLLM can read."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("my_checkpoint")
    tensors = {}
    for name, tensor in my_model.named_parameters():
        name = f"model.{name}" if name.startswith("layers.") else name
        for mine, theirs in HF_NAMES.items():
            name = name.replace(mine, theirs)
        tensors[name] = tensor.detach()
    save_file(tensors, folder / "model.safetensors")
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        architectures=["MyCustomModel"], torch_dtype="float32",
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """The original model's greedy continuation, recomputed from the start for every token."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            logits = model.output(model(torch.tensor([tokens])))[0, -1]
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]
