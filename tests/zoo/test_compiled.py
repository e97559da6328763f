"""The zoo under vLLM's compiler: one graph, and the bits of the training forward."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
from torch._dynamo.utils import counters

import vllm_graft
from tests.support import ROOT, adapter, engine, generate, live_module, prompts
from tests.zoo import test_flex as flex
from tests.zoo import test_handwritten as written
from tests.zoo.certificates import SUBJECTS
from tests.zoo.test_transformers import ZOO, _gap

pytestmark = pytest.mark.engine

STYLES = {style.__name__: style for style in (*written.STYLES, *flex.STYLES)}
EAGER = {
    "gpt_oss": "sinks",
    "mpt": "asks for",
    "Alibi": "fixes the number of tokens",
    "Flex": "asks for",
}
"""Which make no graph, and what the log says of it."""
FLOAT32_ONLY = ("Rotated", "GivenPositions")
"""Turn pairs as complex numbers, which bf16 has none of."""
FAST = ("qwen3", "Softmax", "Alibi")


def cases():
    for name in (*ZOO, *STYLES):
        for dtype in ("float32", "bfloat16"):
            if dtype == "bfloat16" and name in FLOAT32_ONLY:
                continue
            fast = name in FAST and dtype == "bfloat16"
            yield pytest.param(name, dtype, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("name", "dtype"), list(cases()))
def test_compiled_as_one_graph_with_the_bits_of_training(
    name, dtype, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    if name == "deepseek_v3":
        monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    SUBJECTS[name].make(tmp_path)
    style = STYLES.get(name)
    any_transformers = "transformers:AutoModelForCausalLM.from_config"
    vllm_graft.register("Compiled", any_transformers if style is None else lambda _: style())
    counters.clear()
    with (
        caplog.at_level(logging.WARNING, logger="vllm_graft"),
        engine(tmp_path, "Compiled", dtype=dtype, enforce_eager=False) as llm,
    ):
        tokens = prompts((1, 5, 40, 130))
        graphs = counters["stats"]["unique_graphs"]
        completions = generate(llm, tokens, max_tokens=8)
        assert adapter(llm)._compiled == (name not in EAGER)
        assert not counters["graph_break"]
        assert graphs == (0 if name in EAGER else 1)
        assert _gap(live_module(llm), tokens, completions) == 0
    said = [r.getMessage() for r in caplog.records if "runs eagerly" in r.getMessage()]
    assert len(said) == (name in EAGER)
    assert all(EAGER[name] in text for text in said)


@pytest.mark.slow
def test_the_compile_key_is_the_same_in_every_process():
    code = """
import vllm_graft
from tests.zoo.test_transformers import original
from vllm_graft.serve.adapter import model_digest
model = vllm_graft.adapt(original("gpt2"))
print(model_digest("Any", model))
"""
    keys = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout.split()[-1]
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(keys) == 1
