"""Models without a Hugging Face config or a tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

import vllm_graft
from tests.support import engine, generate, prompts, spread_weights
from tests.zoo.test_handwritten import LearnedPositions
from vllm_graft.serve.own_config import described, is_own


@dataclass
class Sizes:
    n_vocab: int = 512
    n_embd: int = 128
    n_layer: int = 2
    n_head: int = 4
    block_size: int = 256


class OwnConfig(LearnedPositions):
    def __init__(self):
        super().__init__()
        self.config = Sizes()


class FromFile(LearnedPositions):
    def __init__(self, config):
        super().__init__()
        assert config.n_embd == 128


@pytest.mark.engine
@pytest.mark.parametrize("style", [OwnConfig, FromFile])
def test_served_without_a_hugging_face_config(style, tmp_path):
    from safetensors.torch import save_file

    if style is FromFile:
        (tmp_path / "config.json").write_text(json.dumps(vars(Sizes())))
    model = spread_weights(LearnedPositions()).eval()
    save_file({n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight"},
              tmp_path / "model.safetensors")  # fmt: skip
    vllm_graft.register("Own", style)
    options = {"config_format": "graft", "dtype": "float32", "max_model_len": None}
    with engine(tmp_path, "Own", **options) as llm:
        assert llm.llm_engine.model_config.max_model_len == 256
        (completion,) = generate(llm, prompts((5,)), max_tokens=8)
    tokens = prompts((5,))[0]
    for token in completion.token_ids:
        assert int(model(torch.tensor([tokens]))[0, -1].argmax()) == token
        tokens.append(token)


def test_fields_have_hugging_faces_names_and_their_own(tmp_path):
    fields = described(tmp_path, OwnConfig)
    assert fields["hidden_size"] == fields["n_embd"] == 128
    assert fields["max_position_embeddings"] == 256


def test_a_hugging_face_config_is_known_by_its_model_type(tmp_path):
    assert is_own(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not is_own(tmp_path)


@pytest.mark.parametrize(
    ("factory", "content", "message"),
    [
        (LearnedPositions, None, "LearnedPositions keeps no config object"),
        (FromFile, None, "called with no arguments, which fails"),
        (FromFile, {"n_embd": 4}, "config has no vocab_size, nor n_vocab"),
    ],
)
def test_what_is_missing_is_named(factory, content, message, tmp_path):
    if content:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        described(tmp_path, factory)
