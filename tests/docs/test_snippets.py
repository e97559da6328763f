"""The code that the documentation shows runs as it stands there.

The Python blocks of a page form one script, run in a fresh interpreter in a
folder that holds `checkpoint/`, a tiny Qwen3. A block with `title="name.py"` is
a file of that name beside the script; titled test files are run by pytest.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.docs.markdown import ROOT, Block, blocks, commands, page_id, pages
from tests.support import qwen3_checkpoint

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m")
NOT_RUN: dict[str, int] = {}
"""Pages with blocks marked `python no-run`, and how many; the block's line says why."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = qwen3_checkpoint(
        tmp_path_factory.mktemp("docs") / "checkpoint",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        eos_token_id=0,
        bos_token_id=None,
    )
    alphabet = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return folder


def python_blocks(page: Path) -> list[Block]:
    return [b for b in blocks(page) if b.language == "python" and "no-run" not in b.info]


def pages_with_code() -> list[Any]:
    found = []
    for page in pages():
        code = [block.code for block in python_blocks(page)]
        marks = [pytest.mark.engine] if any("LLM(" in text for text in code) else []
        if code:
            found.append(pytest.param(page, id=page_id(page), marks=marks))
    return found


def script_of(page: Path) -> str:
    """The page's untitled blocks on the page's own line numbers."""
    lines: list[str] = []
    for block in python_blocks(page):
        if block.title is None:
            lines += [""] * (block.line - 1 - len(lines))
            lines += block.code.splitlines()
    return "\n".join(lines) + "\n"


def write_files(page: Path, folder: Path, checkpoint: Path) -> list[str]:
    """Put the checkpoint and the page's titled blocks into `folder`; returns the test files."""
    (folder / "checkpoint").symlink_to(checkpoint)
    titled = [block for block in python_blocks(page) if block.title is not None]
    for block in titled:
        (folder / str(block.title)).write_text(block.code)
    return [str(block.title) for block in titled if str(block.title).startswith("test_")]


def run(folder: Path, *arguments: str) -> None:
    """Run Python as a user would who stands in `folder` and has the repository on the path."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CACHE_ROOT": str(folder / ".cache")}
    # Pages set this themselves where they need it; the test session's value must not help them.
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


@pytest.mark.parametrize("page", pages_with_code())
def test_python_blocks_run(page: Path, checkpoint: Path, tmp_path: Path) -> None:
    tests = write_files(page, tmp_path, checkpoint)
    script = script_of(page)
    if script.strip():
        (tmp_path / "page.py").write_text(script)
        run(tmp_path, "page.py")
    if tests:
        run(tmp_path, *PYTEST, "not slow", *tests)


@pytest.mark.slow
def test_slow_tests_shown_in_the_docs_pass(checkpoint: Path, tmp_path: Path) -> None:
    tests = write_files(ROOT / "docs/tests.md", tmp_path, checkpoint)
    run(tmp_path, *PYTEST, "slow", *tests)


def test_blocks_that_are_not_run_are_listed_with_a_reason() -> None:
    found: dict[str, int] = {}
    for page in pages():
        for block in blocks(page):
            if block.language == "python" and "no-run" in block.info:
                assert re.search(r'reason="[^"]+"', block.info), f"{page}:{block.line}"
                found[page_id(page)] = found.get(page_id(page), 0) + 1
    assert found == NOT_RUN


@pytest.mark.parametrize("page", pages(), ids=page_id)
def test_commands_exist(page: Path) -> None:
    from vllm_graft.cli.main import app

    known: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    makefile = (ROOT / "Makefile").read_text() if (ROOT / "Makefile").exists() else ""
    for words in commands(page):
        words = [w for w in words if not re.fullmatch(r"[A-Z_]+=.*", w)]
        if words[0] == "make":
            targets = [w for w in words[1:] if "=" not in w]
            for target in targets:
                assert re.search(rf"^{re.escape(target)}\b.*:", makefile, re.M), target
        if words[0] == "vllm-graft" and not words[1].startswith("-"):
            command = known[words[1]]
            flags = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
            used = {w.partition("=")[0] for w in words[2:] if w.startswith("--")} - {"--help"}
            # `serve` hands every flag it does not know to vLLM.
            if words[1] != "serve":
                assert used <= flags, (words, used - flags)
