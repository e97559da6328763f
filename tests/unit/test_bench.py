"""The benchmark: its arithmetic, its children's environment, and one small run."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from vllm_graft.bench.ceilings import ceilings, decode_limit, prefill_limit, weights_read
from vllm_graft.bench.machine import OtherLoad, machine, rss_gib, versions
from vllm_graft.bench.plot import draw
from vllm_graft.bench.process import WorkerError
from vllm_graft.bench.report import as_json, ratios, tables
from vllm_graft.bench.run import contenders, usable_round
from vllm_graft.bench.spec import Contender, Measured, Round, Workload
from vllm_graft.bench.worker import random_prompts
from vllm_graft.serve import registry

WORKLOAD = Workload(batch_size=2, prompt_len=50, output_len=11, rounds=3)
SPLIT_KV = "VLLM_CPU_ATTN_SPLIT_KV"


def measured(name: str, seconds: list[tuple[float, float]], startup_s: float = 1.0) -> Measured:
    """A contender whose rounds took `(prefill_s, decode_s)` each."""
    return Measured(
        contender=Contender(name=name, llm={}, env={}),
        cold_startup_s=2 * startup_s,
        startup_s=startup_s,
        engine_s=startup_s,
        rss_gib=1.0,
        peak_rss_gib=2.0,
        rounds={2: [Round(prefill_s=p, total_s=p + d, first_tokens=(1, 2)) for p, d in seconds]},
    )


def test_rates_count_prompt_tokens_and_tokens_after_the_first() -> None:
    (one,) = measured("graft", [(0.5, 2.0)]).rounds[2]
    assert one.prefill_rate(WORKLOAD) == 100 / 0.5
    assert one.decode_rate(WORKLOAD) == 20 / 2.0


def test_ratios_are_paired_by_round_before_the_median() -> None:
    """A machine that slows down for one whole round leaves the ratio alone."""
    graft = measured("graft", [(1.0, 1.0), (3.0, 3.0), (1.0, 2.0)], startup_s=4.0)
    peer = measured("vllm", [(2.0, 1.5), (6.0, 4.5), (1.0, 2.0)])
    found = ratios(graft, peer, [WORKLOAD])
    assert found["startup"] == found["cold_startup"] == pytest.approx(4.0)
    assert found["peak_memory"] == found["memory"] == pytest.approx(1.0)
    paired = found["batches"]["2"]
    assert paired == pytest.approx({"prefill": 2.0, "decode": 1.5, "same_first_token": 1.0})


CEILINGS = {"bytes_per_s": 1e9, "bytes_per_number": 2, "flops_per_s": 8e9, "weights": 10**7}


def test_a_step_reads_all_weights_or_multiplies_by_them_whichever_takes_longer() -> None:
    assert decode_limit(CEILINGS, 1) == pytest.approx(1 / 0.02)
    assert decode_limit(CEILINGS, 16) == pytest.approx(16 / 0.04)
    assert prefill_limit(CEILINGS) == pytest.approx(400)
    assert decode_limit({**CEILINGS, "weights": None}, 1) is None


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_that_is_looked_up_is_not_read(tied: bool, tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.zeros(7, 4), "model.norm.weight": torch.zeros(4)}
    if not tied:
        tensors["lm_head.weight"] = torch.zeros(7, 4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert weights_read(tmp_path) == 7 * 4 + 4


def test_experts_have_no_fixed_number_of_weights_to_read(tmp_path: Path) -> None:
    save_file({"layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2)}, tmp_path / "m.safetensors")
    assert weights_read(tmp_path) is None


def test_ceilings_are_measured(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    found = ceilings(tmp_path, "bfloat16", dict(os.environ))
    assert found["weights"] == 6 and found["bytes_per_number"] == 2
    assert found["bytes_per_s"] > 1e8 and found["flops_per_s"] > 1e8


def test_picture_of_a_report(tmp_path: Path) -> None:
    results = [measured(name, [(1.0, 2.0)]) for name in ("graft", "vllm")]
    settings = {"enforce_eager": True, "dtype": "bfloat16", "checkpoint": "mine"}
    draw(as_json(results, [WORKLOAD], settings, CEILINGS), tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_report_has_medians_rounds_ratios_and_no_host_name() -> None:
    seconds = [(1.0, 1.0), (2.0, 4.0), (4.0, 2.0)]
    results = [measured(name, seconds) for name in ("graft", "vllm", "transformers")]
    report = json.loads(json.dumps(as_json(results, [WORKLOAD], {"enforce_eager": True}, CEILINGS)))
    rates = report["contenders"]["graft"]["batches"]["2"]
    assert (rates["prefill"], rates["decode"], len(rates["rounds"])) == (50.0, 10.0, 3)
    assert set(report["ratios"]) == {"vllm", "transformers"}
    assert report["ratios"]["vllm"]["batches"]["2"]["decode"] == 1.0
    assert report["ceilings"]["limits"]["2"]["prefill"] == pytest.approx(400)
    assert os.uname().nodename not in json.dumps(report["machine"])


def shown(other_load: float) -> str:
    """The report on a terminal after rounds with this much load from others."""
    results = [measured("graft", [(1.0, 1.0)]), measured("vllm", [(2.0, 2.0)])]
    for result in results:
        result.rounds = {2: [replace(r, other_load=other_load) for r in result.rounds[2]]}
    settings = {"enforce_eager": True, "dtype": "bfloat16"}
    report = as_json(results, [WORKLOAD], settings, CEILINGS)
    console = Console(width=120, file=io.StringIO())
    console.print(tables(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return str(text)


def test_tables_show_ratios_and_warn_of_a_busy_machine() -> None:
    assert "2.00" in shown(other_load=0.0)
    assert "Other processes" not in shown(other_load=0.0)
    assert "Other processes used 50%" in shown(other_load=0.5)


def test_other_load_leaves_out_this_process() -> None:
    load = OtherLoad()
    assert 0.0 <= load.share() <= 1.0


@pytest.mark.parametrize(
    "sizes", [{"batch_size": 0}, {"prompt_len": 0}, {"rounds": 0}, {"output_len": 1}]
)
def test_workloads_that_measure_nothing_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(sizes))):
        Workload(**sizes)


def test_prompts_repeat_by_seed_and_differ_between_rounds() -> None:
    first = random_prompts(1, 3, 5, 100)
    assert first == random_prompts(1, 3, 5, 100)
    assert first != random_prompts(2, 3, 5, 100)
    assert all(0 <= token < 100 for prompt in first for token in prompt)


class Scripted:
    """A worker whose rounds took the given `(prefill_s, total_s)`."""

    def __init__(self, *seconds: tuple[float, float]) -> None:
        self.seconds = list(seconds)

    def round(self, workload: Workload, seed: int) -> Round:
        prefill_s, total_s = self.seconds.pop(0)
        return Round(prefill_s=prefill_s, total_s=total_s, first_tokens=())


def test_round_without_decode_time_is_repeated() -> None:
    worker: Any = Scripted((2.0, 1.0), (1.0, 3.0))
    assert usable_round(worker, WORKLOAD, seed=1).total_s == 3.0


def test_machine_too_busy_to_measure_is_an_error() -> None:
    worker: Any = Scripted((2.0, 1.0), (2.0, 2.0), (3.0, 1.0))
    with pytest.raises(WorkerError, match="too busy"):
        usable_round(worker, WORKLOAD, seed=1)


def entrants(user_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Contender]:
    """Contenders of a run whose own process has registered a model and changed a setting."""
    monkeypatch.setenv(registry.ENV, '{"Mine": {"target": "mine:build"}}')
    monkeypatch.setenv(SPLIT_KV, "0")
    made = contenders(
        arch="Mine",
        peers=["vllm", "transformers", "graft-fast"],
        llm={"model": "checkpoint"},
        user_env=user_env,
        cache=Path("cache"),
    )
    return {contender.name: contender for contender in made}


def test_stock_peers_know_nothing_of_graft(monkeypatch: pytest.MonkeyPatch) -> None:
    made = entrants({}, monkeypatch)
    assert "Mine" in made["graft"].env[registry.ENV]
    assert made["graft"].llm["hf_overrides"] == {"architectures": ["Mine"]}
    for name in ("vllm", "transformers"):
        assert registry.ENV not in made[name].env
        assert SPLIT_KV not in made[name].env
        assert made[name].llm == {"model": "checkpoint", "model_impl": name}


def test_variants_are_the_same_model_with_other_options(monkeypatch: pytest.MonkeyPatch) -> None:
    made = entrants({}, monkeypatch)
    assert "Mine" in made["graft-fast"].env[registry.ENV]
    other = {"additional_config": {"vllm_graft_packing": "release", "vllm_graft_exact": False}}
    assert made["graft-fast"].llm == {**made["graft"].llm, **other}


def test_what_the_user_set_reaches_every_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    made = entrants({SPLIT_KV: "1", "VLLM_CPU_KVCACHE_SPACE": "3"}, monkeypatch)
    assert {c.env[SPLIT_KV] for c in made.values()} == {"1"}
    assert {c.env["VLLM_CPU_KVCACHE_SPACE"] for c in made.values()} == {"3"}


def test_compile_caches_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    made = entrants({}, monkeypatch)
    assert len({c.env["VLLM_CACHE_ROOT"] for c in made.values()}) == 4
    assert len({c.env["TORCHINDUCTOR_CACHE_DIR"] for c in made.values()}) == 4


def test_machine_and_memory_have_plausible_units() -> None:
    now, peak = rss_gib()
    assert 0.001 < now <= peak < machine()["memory_gib"]
    assert machine()["cores"] >= 1
    assert versions()["python"] is not None


@pytest.mark.slow
@pytest.mark.engine
def test_tiny_run_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "vllm_graft.cli", "bench", "--shape", "tiny"]
    command += ["--arch", "Qwen3TorchTitan", "--against", "vllm", "--rounds", "1"]
    command += ["--batch-size", "1", "--batch-size", "2", "--prompt-len", "16"]
    command += ["--output-len", "4", "--png", str(tmp_path / "report.png")]
    command += ["--dtype", "bfloat16", "--enforce-eager", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Graft over" in done.stdout
    report: dict[str, Any] = json.loads(path.read_text())
    ratio = report["ratios"]["vllm"]
    paired = [ratio["batches"][batch] for batch in ("1", "2")]
    figures = [p[key] for p in paired for key in ("prefill", "decode")] + [ratio["startup"]]
    figures.append(report["contenders"]["graft"]["python_us"])
    assert all(math.isfinite(figure) and figure > 0 for figure in figures)
    assert [p["same_first_token"] for p in paired] == [1.0, 1.0]
    assert (tmp_path / "report.png").is_file()
