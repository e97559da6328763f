"""Who may import what, and that the example and library stay as documented."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "vllm_graft"
# The command line and the benchmark drive vLLM's public API; they touch no internals.
MAY_IMPORT_VLLM = ("cli", "bench", "examples")
SUBCLASSES_VLLM = ("train/llm.py", "train/async_llm.py")
"""Classes of vLLM's public API cannot be derived from without importing them."""


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def sources() -> list[Path]:
    return [p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts[0] != "examples"]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_vllm_files_import_vllm(path):
    parts = path.relative_to(PACKAGE).parts
    if (
        str(path.relative_to(PACKAGE)) not in SUBCLASSES_VLLM
        and not (parts[0] == "serve" and path.name.startswith("_vllm"))
        and parts[0] not in MAY_IMPORT_VLLM
    ):
        assert "vllm" not in imported(path)


def test_libraries_are_imported_inside_functions_only():
    for path in sources():
        if str(path.relative_to(PACKAGE)) in SUBCLASSES_VLLM:
            continue
        tree = ast.parse(path.read_text())
        top = {n.name for node in tree.body if isinstance(node, ast.Import) for n in node.names}
        top |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
        roots = {name.split(".")[0] for name in top}
        assert not roots & {"vllm", "torchtitan", "megatron", "transformers"}, path
