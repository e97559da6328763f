"""The doctor on every architecture of the zoo: `python -m tests.zoo.certificates [NAME ...]`.

Builds each small, with random weights, runs `vllm-graft doctor` on it in a process of its own, and
writes docs/certificates.md from the reports of all. Reports stay in runs/certificates.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from tests.megatron_checkpoints import llama_checkpoint
from tests.moe_checkpoints import deepseek_v3_checkpoint, qwen3_moe_checkpoint
from tests.support import ROOT, qwen3_checkpoint, spread_weights
from tests.zoo import test_flex as flex
from tests.zoo import test_handwritten as written
from tests.zoo.test_transformers import GPT2, ZOO, original

REPORTS = ROOT / "runs" / "certificates"
PAGE = ROOT / "docs" / "certificates.md"
ANY_TRANSFORMERS = ("--factory", "transformers:AutoModelForCausalLM.from_config")
RANKS_TOO = ("--compile", "--tp", "2")
GRADIENT_LIMIT = 1e-5
"""Of the issue that asked for certificates; the doctor itself allows 1e-4."""


@dataclass(frozen=True)
class Subject:
    """An architecture to examine."""

    make: Callable[[Path], Any]
    """Writes the checkpoint into a folder."""
    family: str
    arguments: tuple[str, ...]


def _transformers(kind: str) -> Subject:
    return Subject(lambda to: original(kind).save_pretrained(to), "transformers", ANY_TRANSFORMERS)


def _plain(style: Any) -> Subject:
    code = f"from {style.__module__} import {style.__name__}\n\n\n"
    code += f"def build(config):\n    return {style.__name__}()\n"

    def make(folder: Path) -> None:
        from safetensors.torch import save_file
        from transformers import GPT2Config

        GPT2Config(**GPT2).save_pretrained(folder)
        state = spread_weights(style()).state_dict().items()
        kept = {name: t.clone() for name, t in state if name != "lm_head.weight"}
        save_file(kept, folder / "model.safetensors")
        (folder / "model.py").write_text(code)

    arguments = ("--factory", "{folder}/model.py:build", "--reference", "original")
    return Subject(make, "plain", arguments)


def _built_in(arch: str, make: Callable[[Path], Any], family: str, *more: str) -> Subject:
    return Subject(make, family, ("--arch", arch, *more))


SUBJECTS = {
    **{kind: _transformers(kind) for kind in ZOO},
    **{style.__name__: _plain(style) for style in (*written.STYLES, *flex.STYLES)},
    "Qwen3TorchTitan": _built_in("Qwen3TorchTitan", qwen3_checkpoint, "TorchTitan", *RANKS_TOO),
    "Qwen3TorchTitan, MoE": _built_in("Qwen3TorchTitan", qwen3_moe_checkpoint, "TorchTitan"),
    "DeepSeekV3TorchTitan": _built_in("DeepSeekV3TorchTitan", deepseek_v3_checkpoint, "TorchTitan"),
    "MegatronModel, Qwen3": _built_in(
        "MegatronModel", qwen3_checkpoint, "Megatron-core", *RANKS_TOO
    ),
    "MegatronModel, Llama": _built_in("MegatronModel", llama_checkpoint, "Megatron-core"),
}


def examine(name: str) -> dict[str, Any]:
    """The doctor's report on one of `SUBJECTS`, kept in `REPORTS`.

    Raises:
        RuntimeError: the port could not be built or run.
    """
    subject, report = SUBJECTS[name], REPORTS / f"{name.replace(', ', '-')}.json"
    REPORTS.mkdir(parents=True, exist_ok=True)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "PYTHONPATH": str(ROOT)}
    if "--tp" not in subject.arguments:
        del environment["VLLM_CPU_OMP_THREADS_BIND"]
    if name == "deepseek_v3":  # Transformers expands keys and values; no latent cache
        environment["VLLM_MLA_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        subject.make(Path(folder))
        arguments = [each.format(folder=folder) for each in subject.arguments]
        command = [sys.executable, "-m", "vllm_graft.cli", "doctor", folder, *arguments]
        done = subprocess.run(
            [*command, "--json", str(report)], env=environment, cwd=ROOT,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"{name}: exit code {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
        )
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def certified(report: dict[str, Any]) -> bool:
    """Whether every path is healthy, and gradients are within `GRADIENT_LIMIT`."""
    return bool(report["healthy"]) and furthest_gradient(report) <= GRADIENT_LIMIT


def furthest_gradient(report: dict[str, Any]) -> float:
    """Of all compared weights, in units of the weight's largest gradient."""
    return float(max(each["error"] for each in report["gradients"]))


HEAD = """# Certificates

What [the doctor](doctor.md) found on every architecture of the test tree: small models with random
weights, in float32 on CPU, each against the model it was made from.
`python -m tests.zoo.certificates` builds them all, runs `vllm-graft doctor` on each, and writes
this page.

- **log-probabilities**: the largest difference, in nats, over the whole vocabulary and all paths;
  the limit is 1e-4.
- **greedy tokens**: how many agree, on all paths together.
- **gradients**: the largest difference in units of a weight's largest gradient; the limit here is
  1e-5. Weights that only one of the two models fuses are left out.
- **reference**: of `Flex` the gradients, and all of `Varlen`, are compared with the original whose
  attention is written out, since torch has no kernel for them on CPU.
- **paths**: 8 are training forward, prefill, chunked prefill, prefix cache, decode, mixed batch,
  after a weight update, after export and reload; 10 have torch.compile and two ranks as well.

| architecture | family | reference | paths | log-probabilities | greedy tokens | weights | \
gradients | |
|---|---|---|---|---|---|---|---|---|
"""


def row(name: str, report: dict[str, Any]) -> str:
    """Its line in the table."""
    paths = report["paths"]
    equal, all_of_them = (sum(p[key] for p in paths) for key in ("greedy_equal", "tokens"))
    cells = (
        f"`{name}`",
        SUBJECTS[name].family,
        report["reference"],
        len(paths),
        f"{max(p['max_difference'] for p in paths):.1e}",
        f"{equal:,} of {all_of_them:,}",
        len(report["gradients"]),
        f"{furthest_gradient(report):.1e}",
        "certified" if certified(report) else "**not certified**",
    )
    return "| " + " | ".join(map(str, cells)) + " |\n"


def main() -> int:
    """Examine those named, or all; 1 if one is not certified."""
    names = sys.argv[1:] or list(SUBJECTS)
    for name in track(names, "examining"):
        print(row(name, examine(name)), end="", flush=True)
    reports = {n: REPORTS / f"{n.replace(', ', '-')}.json" for n in SUBJECTS}
    missing = [name for name, file in reports.items() if not file.is_file()]
    if missing:
        print(f"{PAGE.name} not written: no report yet for {', '.join(missing)}")
        return 1
    found = {name: json.loads(file.read_text()) for name, file in reports.items()}
    PAGE.write_text(HEAD + "".join(row(name, report) for name, report in found.items()))
    return 0 if all(map(certified, found.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
