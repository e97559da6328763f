"""Registrations that travel: from the parent to every process vLLM starts.

vLLM spawns its engine core and workers, so a function registered in the parent
is unknown there. Each registration is therefore recorded as an import string in
the environment (`VLLM_GRAFT_MODELS`, a name Ray copies too) and replayed when a
child imports vLLM's registry. This module needs neither torch nor vLLM.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from vllm_graft import _bootstrap
from vllm_graft.serve.importing import Importable, UnnameableError, locate, name_of

ENV = "VLLM_GRAFT_MODELS"
Factory = Callable[..., Any]

BUILT_IN = {
    "Qwen3TorchTitan": "vllm_graft.examples.qwen3_torchtitan:build_qwen3_torchtitan",
    "DeepSeekV3TorchTitan": (
        "vllm_graft.examples.deepseek_v3_torchtitan:build_deepseek_v3_torchtitan"
    ),
    "MegatronModel": "vllm_graft.examples.megatron_gpt:build_megatron_model",
}
"""Architectures that `--arch NAME` knows without registration."""


class RegistrationError(ValueError):
    """A factory that cannot be registered, or cannot reach a child process."""


@dataclass(frozen=True, kw_only=True)
class Registration:
    """One architecture: where its factory is, or why only this process has it."""

    target: str | None
    """`"module:attribute"`, or None for a factory that only this process has."""
    path: str | None = None
    """Source file, for modules that a child cannot import by name."""
    reason: str = ""
    """Why there is no import string."""


_LOCAL: dict[str, Factory] = {}
_REGISTRY: ModuleType | None = None


def registrations() -> dict[str, Registration]:
    """Everything registered in this process or, through the environment, outside it.

    The variable may be written by hand, `{"MyModel": "my_package.models:build"}`,
    so that a stock `vllm serve` knows a model.

    Raises:
        RegistrationError: the variable does not hold such an object.
    """
    try:
        return {
            arch: Registration(**({"target": entry} if isinstance(entry, str) else entry))
            for arch, entry in json.loads(os.environ.get(ENV, "{}")).items()
        }
    except (ValueError, AttributeError, TypeError) as error:
        raise RegistrationError(
            f"{ENV} must be a JSON object of architecture names and 'module:factory' strings, "
            f"got {os.environ.get(ENV)!r} ({error})"
        ) from error


def register(arch: str, factory: Factory | str) -> None:
    """Register a model architecture with vLLM.

    Args:
        arch: the architecture name, as it stands in a checkpoint's
            `config.json` or in `hf_overrides={"architectures": [arch]}`.
        factory: `build(vllm_config, parallel_context) -> nn.Module`; a
            `VLLMModelForCausalLM` subclass, called the same way; or either as an
            import string, `"package.module:attribute"` or `"path/file.py:attribute"`.

    Raises:
        RegistrationError: not a factory, a malformed string, or Graft's import
            hook is missing. A factory that has no import string (a lambda, a
            nested function) is accepted and works where the engine runs in this
            process; starting one with child processes raises then.
    """
    if not _bootstrap.installed_at_startup():
        raise RegistrationError(
            "vllm-graft's start-up hook did not run in this interpreter, so child processes "
            "would not know this model; reinstall vllm-graft (pip install --force-reinstall "
            "vllm-graft) so that vllm_graft.pth lies in site-packages, and do not use python -S"
        )
    if not isinstance(arch, str) or not arch:
        raise RegistrationError(f"an architecture needs a name, got {arch!r}")
    named = _named(arch, factory)
    if callable(factory):
        _LOCAL[arch] = factory
    else:
        _LOCAL.pop(arch, None)
    _record(arch, named)
    if _REGISTRY is not None:
        _attach_one(_REGISTRY, arch)


def _named(arch: str, factory: Factory | str) -> Registration:
    try:
        found = Importable.parse(factory) if isinstance(factory, str) else name_of(factory)
    except UnnameableError as reason:
        return Registration(target=None, reason=str(reason))
    except (TypeError, ValueError) as error:
        raise RegistrationError(f"{arch}: {error}") from None
    return Registration(target=found.target, path=found.path)


def _record(arch: str, registration: Registration) -> None:
    _write({**registrations(), arch: registration})


def _write(known: dict[str, Registration]) -> None:
    os.environ[ENV] = json.dumps({arch: asdict(entry) for arch, entry in known.items()})


def forget(arch: str) -> None:
    """Drop the record of an architecture that stock vLLM now provides."""
    known = registrations()
    if known.pop(arch, None) is not None:
        _LOCAL.pop(arch, None)
        _write(known)


def attach(registry: ModuleType) -> None:
    """Called when vLLM's registry module was just imported: patch it and replay."""
    global _REGISTRY
    from vllm_graft.serve import _vllm
    from vllm_graft.serve._vllm_config import register_parser

    _REGISTRY = registry
    _vllm.accept_factories(registry, register, forget)
    register_parser(factory_of)
    for arch in registrations():
        _attach_one(registry, arch)


def show_order(config: ModuleType) -> None:
    """Called when vLLM's model config was just imported: its refusals of heads show the order."""
    from vllm_graft.serve import _vllm_config

    _vllm_config.show_order(config.ModelConfig, registrations)


def guard(executor: ModuleType) -> None:
    """Called when vLLM's executor module was just imported: check factories at engine start."""
    from vllm_graft.serve import _vllm

    _vllm.guard_engine_start(executor, refuse_children)


def _attach_one(registry: ModuleType, arch: str) -> None:
    from vllm_graft.serve import _vllm
    from vllm_graft.serve.adapter import adapter_class

    _vllm.prepare_process()
    _vllm.register_stock(registry, arch, adapter_class(arch))


def refuse_children(architectures: list[str]) -> None:
    """Raise if one of `architectures` could not be built in a child process.

    Raises:
        RegistrationError: naming the factory and the two ways out.
    """
    known = registrations()
    for arch in architectures:
        if arch in known and known[arch].target is None:
            raise RegistrationError(_unreachable(arch, known[arch].reason))


def _unreachable(arch: str, reason: str) -> str:
    return (
        f"{arch}: the engine runs in child processes, which cannot import its factory "
        f"({reason}). Move the factory to the top level of an importable module and register it "
        f"there or as 'module:function', or keep the engine in this process with "
        f"VLLM_ENABLE_V1_MULTIPROCESSING=0 and tensor_parallel_size=1"
    )


def factory_of(arch: str) -> Factory:
    """The factory of a registered architecture, imported if need be.

    Raises:
        RegistrationError: unknown, not importable here, or not callable.
    """
    if arch in _LOCAL:
        return _LOCAL[arch]
    registration = registrations().get(arch)
    if registration is None:
        known = ", ".join(sorted(registrations())) or "none"
        raise RegistrationError(f"{arch} is not registered with vllm-graft (registered: {known})")
    if registration.target is None:
        raise RegistrationError(_unreachable(arch, registration.reason))
    try:
        factory = locate(Importable(target=registration.target, path=registration.path))
    except (ImportError, AttributeError) as error:
        raise RegistrationError(
            f"{arch}: cannot import its factory {registration.target!r} in process {os.getpid()} "
            f"({Path(sys.argv[0]).name}): {error}"
        ) from error
    if not callable(factory):
        raise RegistrationError(f"{arch}: {registration.target!r} is not callable: {factory!r}")
    resolved: Factory = factory
    return resolved
