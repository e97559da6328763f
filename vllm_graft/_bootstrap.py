"""The import hook that puts Graft into every process vLLM starts.

`vllm_graft.pth` calls `install` when an interpreter starts, so parent, engine
core, workers and vLLM's model-inspection subprocess all have it, whatever
`VLLM_PLUGINS` or `VLLM_TARGET_DEVICE` say. It costs one finder that compares
names; torch and vLLM are imported only when vLLM itself is.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

API_MODULE = "vllm.model_executor.custom_models"
OLD_MODULE = "vllm.model_executor.layers.trainable_attention"
HOOKED = {
    "vllm.config.model": ("registry", "show_order"),
    "vllm.model_executor.models.registry": ("registry", "attach"),
    "vllm.v1.executor.abstract": ("registry", "guard"),
    "vllm.v1.engine.core": ("lifetime", "watch_core"),
    "vllm.v1.executor.multiproc_executor": ("lifetime", "watch_workers"),
    "vllm.distributed.device_communicators.cpu_communicator": ("lifetime", "watch_ranks"),
    "vllm.v1.worker.gpu_worker": ("_vllm_transfer", "prepare_worker"),
    "vllm.entrypoints.launchers.api_server.routers": ("_vllm_routes", "mount"),
}
"""vLLM modules whose import calls a function of a module in `vllm_graft.serve`."""

_SPEC_NAMES = (
    "VLLMModelForCausalLM",
    "TrainableFlashAttention",
    "TrainableMLA",
    "MLAConfig",
    "replace_with_trainable_attention",
    "load_external_weights",
    "convert_freqs_cis_to_real",
    "store_positions_in_context",
    "create_mla_kv_cache_spec",
    "ParallelContext",
)


class _ApiLoader:
    """Fills `vllm.model_executor.custom_models` with Graft's own objects."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        import vllm_graft

        def resolve(name: str) -> Any:
            if name not in _SPEC_NAMES:
                raise AttributeError(f"module {API_MODULE!r} has no attribute {name!r}")
            return getattr(vllm_graft, name)

        module.__doc__ = "The Custom Model API, provided by vllm-graft."
        module.__dict__.update(__all__=list(_SPEC_NAMES), __getattr__=resolve)


class _OldPathLoader:
    """Explains the move of `trainable_attention` instead of a bare 'not found'."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        raise ImportError(
            f"{OLD_MODULE} is gone; use the Custom Model API instead:\n"
            f"    from {API_MODULE} import TrainableFlashAttention"
        )


class _Finder:
    """Serves the two module names above and reports when a hooked module is loaded."""

    installed_by = ""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name in HOOKED:
            return self._hooked(name, path)
        if name in (API_MODULE, OLD_MODULE):
            # A vLLM release that ships the module itself comes first.
            loader: Any = _ApiLoader() if name == API_MODULE else _OldPathLoader()
            return PathFinder.find_spec(name, path) or ModuleSpec(name, loader, origin=__file__)
        return None

    @staticmethod
    def _hooked(name: str, path: Any) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            where, function = HOOKED[name]
            getattr(import_module(f"vllm_graft.serve.{where}"), function)(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install(by: str) -> None:
    """Put the finder in front of `sys.meta_path`; a second call changes nothing.

    Args:
        by: who asks, `"pth"` for the interpreter's start-up line. Registration
            checks it, since children replay registrations only with that line.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        finder = _Finder()
        finder.installed_by = by
        sys.meta_path.insert(0, finder)  # type: ignore[arg-type]


def installed_at_startup() -> bool:
    """Whether the `.pth` line ran in this interpreter, and so will in its children."""
    return any(getattr(finder, "installed_by", "") == "pth" for finder in sys.meta_path)
