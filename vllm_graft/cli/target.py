"""Which model a command means: `--arch`, `--factory`, or the checkpoint's own architecture."""

from __future__ import annotations

import difflib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from vllm_graft.cli.errors import UsageError
from vllm_graft.serve import registry
from vllm_graft.serve.own_config import FORMAT, is_own

_FACTORY_VERBS = ("build_", "make_", "create_", "get_")


def register_target(checkpoint: str, arch: str | None, factory: str | None) -> str:
    """Register the model that a command line names.

    The current folder becomes importable, as with `python -m`. The factory
    itself is not imported here: `import_factory` does that.

    Args:
        checkpoint: local folder or Hub name.
        arch: architecture name; with `factory` the name to register it under.
        factory: `"module:attribute"` or `"path/file.py:attribute"`.

    Returns:
        The architecture name, for `hf_overrides={"architectures": [name]}`.

    Raises:
        UsageError: no or an unknown architecture, a malformed factory, or a
            checkpoint folder without `config.json`.
    """
    _check_checkpoint(checkpoint, factory)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if factory is not None:
        name = arch or name_from_factory(factory)
        _register(name, factory)
        return name
    name = arch or _own_architecture(checkpoint)
    _check_known(name)
    if name not in registry.registrations():
        _register(name, registry.BUILT_IN[name])
    return name


def _register(name: str, factory: str) -> None:
    try:
        registry.register(name, factory)
    except registry.RegistrationError as error:
        raise UsageError(f"--factory {factory}: {error}") from error


def import_factory(arch: str) -> None:
    """Import the factory of a registered architecture now, before an engine starts.

    Raises:
        UsageError: it cannot be imported; names the cause and its source line.
    """
    try:
        registry.factory_of(arch)
    except registry.RegistrationError as error:
        raise UsageError(f"{error}. Give --factory MODULE:ATTR or FILE.py:ATTR") from error
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UsageError(
            f"{arch}: importing its factory raised {type(error).__name__}: {error} "
            f"({place.filename}:{place.lineno})"
        ) from error


def name_from_factory(factory: str) -> str:
    """An architecture name from an import string.

    >>> name_from_factory("my.models:build_tiny_llama")
    'TinyLlama'
    >>> name_from_factory("models.py:MyModel")
    'MyModel'
    """
    attribute = factory.rpartition(":")[2].rpartition(".")[2]
    for verb in _FACTORY_VERBS:
        attribute = attribute.removeprefix(verb)
    words = [word for word in attribute.split("_") if word]
    return "".join(word[0].upper() + word[1:] for word in words) or "GraftModel"


def known_architectures() -> dict[str, str]:
    """Every architecture `--arch` takes, with the import string of its factory."""
    registered = registry.registrations()
    known = dict(registry.BUILT_IN)
    known.update((arch, entry.target or entry.reason) for arch, entry in registered.items())
    return known


def _check_known(arch: str) -> None:
    known = sorted(known_architectures())
    if arch in known:
        return
    close = difflib.get_close_matches(arch, known, n=1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    raise UsageError(
        f"--arch {arch}: no such architecture{meant}; known: {', '.join(known)}. "
        "Give --factory MODULE:ATTR to use your own"
    )


def _own_architecture(checkpoint: str) -> str:
    """The checkpoint's architecture if Graft knows it."""
    known = known_architectures()
    own = read_config(checkpoint).get("architectures") or []
    for arch in own:
        if arch in known:
            return str(arch)
    raise UsageError(
        f"{checkpoint}: give --arch NAME or --factory MODULE:ATTR; the checkpoint's own "
        f"architecture ({', '.join(own) or 'none given'}) is not one of Graft's: "
        f"{', '.join(sorted(known))}"
    )


def read_config(checkpoint: str) -> dict[str, Any]:
    """`config.json` of a local checkpoint; empty for a Hub name."""
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        return {}
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON: {error}") from error
    return config


def config_format(checkpoint: str) -> dict[str, str]:
    """VLLM's `config_format` for a checkpoint, if it has no Hugging Face `config.json`."""
    return {"config_format": FORMAT} if is_own(Path(checkpoint)) else {}


def _check_checkpoint(checkpoint: str, factory: str | None) -> None:
    """Refuse paths that are not a checkpoint; a Hub name (`owner/model`) passes."""
    path = Path(checkpoint)
    if path.is_dir():
        if factory is None and not (path / "config.json").is_file():
            raise UsageError(f"{checkpoint}: no config.json in this folder; not a checkpoint")
        if not any(path.glob("*.safetensors")) and not (path / "config.json").is_file():
            raise UsageError(f"{checkpoint}: neither config.json nor *.safetensors in this folder")
        return
    if checkpoint.startswith("-"):
        raise UsageError(
            f"CHECKPOINT must come before the options, got {checkpoint!r} in its place"
        )
    if path.is_file():
        raise UsageError(f"{checkpoint}: a file; expected the checkpoint's folder")
    if checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") != 1:
        raise UsageError(
            f"{checkpoint}: no such folder; expected a checkpoint folder or a Hub name owner/model"
        )
