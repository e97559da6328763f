"""How much memory loading needs beside the model itself.

    PYTHONPATH=. python benchmarks/load_memory.py [--fp8] [--json out.json]

Writes a random checkpoint of about a gigabyte in Hugging Face's DeepSeek V3 layout
(several safetensors shards, one tensor per expert) to a temporary folder, then loads it
in a process of its own into a model with expert stacks, and reports the peak of
anonymous memory while loading against the limit: the largest layer plus 256 MB.

Anonymous memory is `RssAnon` of /proc/self/status (so this needs Linux), read every
millisecond by a thread. Whole RSS would count pages of the shards, which are mapped and
which the system takes back when it wants. The model's own pages are touched before the
first reading.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from vllm_graft import load_external_weights
from vllm_graft.weights.fp8 import BLOCK

MB = 1_000_000
SLACK = 256 * MB
READING_S = 1e-3

NAMES = {
    "model.layers.{}.self_attn.o_proj.weight": "layers.{}.attention.wo.weight",
    "model.layers.{}.mlp.gate.weight": "layers.{}.router.weight",
    "model.layers.{}.mlp.experts.{}.gate_proj.weight": "layers.{}.experts.w1_EFD[{}]",
    "model.layers.{}.mlp.experts.{}.up_proj.weight": "layers.{}.experts.w3_EFD[{}]",
    "model.layers.{}.mlp.experts.{}.down_proj.weight": "layers.{}.experts.w2_EDF[{}]",
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "lm_head.weight": "lm_head.weight",
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """E experts of width F in each of `layers` layers of width D."""

    layers: int
    experts: int = 64
    hidden: int = 1024
    expert_hidden: int = 512
    vocab: int = 32000

    def tensors(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Checkpoint names and shapes, layer by layer."""
        d, f = self.hidden, self.expert_hidden
        yield "model.embed_tokens.weight", (self.vocab, d)
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            yield f"{layer}.self_attn.o_proj.weight", (d, d)
            yield f"{layer}.mlp.gate.weight", (self.experts, d)
            for e in range(self.experts):
                yield f"{layer}.mlp.experts.{e}.gate_proj.weight", (f, d)
                yield f"{layer}.mlp.experts.{e}.up_proj.weight", (f, d)
                yield f"{layer}.mlp.experts.{e}.down_proj.weight", (d, f)
        yield "lm_head.weight", (self.vocab, d)

    def layer_bytes(self) -> int:
        """bf16 bytes of one layer of the model."""
        d, f, e = self.hidden, self.expert_hidden, self.experts
        return 2 * (3 * e * f * d + e * d + d * d)


class Model(nn.Module):
    """The tensors of a mixture of experts under TorchTitan's kind of names; computes nothing."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        d, f, e = sizes.hidden, sizes.expert_hidden, sizes.experts
        self.tok_embeddings = nn.Embedding(sizes.vocab, d)
        self.layers = nn.ModuleList(nn.Module() for _ in range(sizes.layers))
        for layer in self.layers:
            layer.attention = nn.Module()
            layer.attention.wo = nn.Linear(d, d, bias=False)
            layer.router = nn.Linear(d, e, bias=False)
            layer.experts = nn.Module()
            layer.experts.w1_EFD = nn.Parameter(torch.zeros(e, f, d))
            layer.experts.w2_EDF = nn.Parameter(torch.zeros(e, d, f))
            layer.experts.w3_EFD = nn.Parameter(torch.zeros(e, f, d))
        self.lm_head = nn.Linear(d, sizes.vocab, bias=False)


def write_checkpoint(folder: Path, sizes: Sizes, shards: int, *, fp8: bool) -> int:
    """Write the shards; returns their bytes. Scales are kept apart from their weights."""
    names = dict(sizes.tensors())
    per_shard = -(-len(names) // shards)
    torch.manual_seed(0)
    scales: dict[str, torch.Tensor] = {}
    for shard in range(shards):
        _say(f"writing shard {shard + 1} of {shards}")
        tensors, scales = scales, {}
        for name in list(names)[shard * per_shard : (shard + 1) * per_shard]:
            rows, columns = names[name]
            tensors[name] = torch.randn(rows, columns, dtype=torch.bfloat16)
            if fp8 and "proj" in name:
                tensors[name] = tensors[name].to(torch.float8_e4m3fn)
                scales[f"{name}_scale_inv"] = torch.rand(-(-rows // BLOCK), -(-columns // BLOCK))
        if shard == shards - 1:
            tensors |= scales
        save_file(tensors, folder / f"model-{shard:05}.safetensors")
    return sum(path.stat().st_size for path in folder.iterdir())


def stream(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of every shard, memory-mapped, in the order of the files."""
    for path in sorted(folder.glob("*.safetensors")):
        _say(f"loading {path.name}")
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)


def anonymous_bytes() -> int:
    """This process's resident memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status; this benchmark needs Linux 4.5 or newer")


class Peak(threading.Thread):
    """The highest `anonymous_bytes` between `start` and `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = anonymous_bytes()
        self._done = threading.Event()

    def run(self) -> None:
        """Read until stopped."""
        while not self._done.wait(READING_S):
            self.bytes = max(self.bytes, anonymous_bytes())

    def stop(self) -> int:
        """End the readings and return the highest."""
        self._done.set()
        self.join()
        return self.bytes


def load_here(folder: Path, sizes: Sizes) -> dict[str, int]:
    """Load the checkpoint in this process: extra bytes at the peak, tensors, numbers."""
    default, dtype = torch.get_default_dtype(), torch.bfloat16
    torch.set_default_dtype(dtype)
    model = Model(sizes)
    torch.set_default_dtype(default)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)  # zeros may share one page that was never written
    before, peak = anonymous_bytes(), Peak()
    peak.start()
    report = load_external_weights(model, stream(folder), NAMES).report
    extra = peak.stop() - before
    return {"extra_bytes": extra, "tensors": len(report.loaded), "numbers": report.numel}


def measure(sizes: Sizes, shards: int, *, fp8: bool) -> dict[str, object]:
    """Write a checkpoint, load it in a fresh process, return the figures."""
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder), sizes, shards, fp8=fp8)
        command = [sys.executable, __file__, "--load", folder, "--sizes", json.dumps(asdict(sizes))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        loaded = json.loads(done.stdout)
    limit = sizes.layer_bytes() + SLACK
    return {
        "format": "fp8 blocks" if fp8 else "bf16",
        "checkpoint_bytes": size,
        "layer_bytes": sizes.layer_bytes(),
        "limit_bytes": limit,
        **loaded,
        "within": loaded["extra_bytes"] < limit,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Measure and print; 1 if the peak is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fp8", action="store_true", help="projections in FP8 with block scales")
    parser.add_argument("--layers", type=int, help="default: a checkpoint of about 1.2 GB")
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load is not None:
        print(json.dumps(load_here(arguments.load, Sizes(**json.loads(arguments.sizes)))))
        return 0
    layers = arguments.layers or (10 if arguments.fp8 else 5)
    figures = measure(Sizes(layers=layers), arguments.shards, fp8=arguments.fp8)
    for name, value in figures.items():
        shown = f"{value / MB:,.0f} MB" if isinstance(value, int) and "bytes" in name else value
        print(f"{name.removesuffix('_bytes'):<12} {shown}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2))
    return 0 if figures["within"] else 1


if __name__ == "__main__":
    sys.exit(main())
