"""`verify_exactness` says so when engine and training forward differ, or nothing was compared."""

from __future__ import annotations

import pytest

import vllm_graft
from tests.serve.test_trainable_llm import trainable
from tests.support import adapter, prompts, qwen3_checkpoint
from vllm_graft.train.exactness import ExactnessReport, Path


@pytest.mark.parametrize("paths", [(), (Path("one batch", 0, 0),), (Path("one batch", 8, 9),)])
def test_nothing_compared_or_something_unequal_is_not_exact(paths):
    report = ExactnessReport(paths)
    assert not report.exact
    assert "all" in str(report)
    equal = Path("each alone", 9, 9)
    assert ExactnessReport((equal,)).exact
    assert ExactnessReport((*paths, equal)).exact is (not paths)


@pytest.mark.engine
def test_an_engine_that_computes_something_else_is_not_exact(tmp_path, monkeypatch):
    checkpoint = qwen3_checkpoint(tmp_path, num_hidden_layers=2)
    with trainable(checkpoint) as llm:
        chosen = prompts((5, 140))
        assert vllm_graft.verify_exactness(llm, chosen, max_tokens=4, show=False).exact
        served = adapter(llm)
        stock = served.compute_logits
        monkeypatch.setattr(served, "compute_logits", lambda hidden: stock(hidden) * 1.001)
        report = vllm_graft.verify_exactness(llm, chosen, max_tokens=4, show=False)
        assert not report.exact
        assert all(path.equal < path.total for path in report.paths)
