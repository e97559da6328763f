"""Import strings for factories: finding the name of an object, and the object of a name."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

_MAIN_NAMES = ("__main__", "__mp_main__")


class UnnameableError(Exception):
    """An object that no import string leads to; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Importable:
    """`target` is `"module:attribute"`; `path` its source file, a second way to it."""

    target: str
    path: str | None = None

    @classmethod
    def parse(cls, text: str) -> Importable:
        """Read `"package.module:attribute"` or `"path/to/file.py:attribute"`.

        Raises:
            ValueError: neither form, or the file does not exist.
        """
        module, colon, attribute = text.rpartition(":")
        if not colon or not module or not attribute.replace(".", "_").isidentifier():
            raise ValueError(f"expected 'module:attribute' or 'file.py:attribute', got {text!r}")
        if not module.endswith(".py"):
            return cls(target=text)
        path = Path(module).resolve()
        if not path.is_file():
            raise ValueError(f"{text!r}: there is no file {path}")
        return cls(target=f"{path.stem}:{attribute}", path=str(path))


def name_of(thing: Any) -> Importable:
    """The import string of a module-level function or class.

    Raises:
        TypeError: not callable.
        UnnameableError: a lambda, nested function, partial or instance, or something
            defined where a child process does not execute it.
    """
    if not callable(thing):
        raise TypeError(f"expected a factory (callable) or an import string, got {thing!r}")
    name = getattr(thing, "__qualname__", None)
    if name is None:
        raise UnnameableError(f"{thing!r} is an object without a name of its own")
    if "<lambda>" in name or "<locals>" in name:
        raise UnnameableError(f"{name} is defined inside a function or is a lambda")
    module = sys.modules.get(thing.__module__)
    path = getattr(module, "__file__", None)
    if _member(module, name) is not thing:
        raise UnnameableError(f"{thing.__module__}:{name} leads to another object")
    if thing.__module__ in _MAIN_NAMES:
        return _name_in_main(thing, name, module, path)
    return Importable(target=f"{thing.__module__}:{name}", path=path)


def _member(module: ModuleType | None, name: str) -> Any:
    """What `name` leads to in `module`, or None."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _name_in_main(thing: Any, name: str, module: ModuleType | None, path: str | None) -> Importable:
    if path is None or not Path(path).is_file():
        raise UnnameableError(f"{name} is defined in an interactive session")
    if _is_guarded(path, name):
        raise UnnameableError(f"{name} is defined under if __name__ == '__main__' in {path}")
    spec = getattr(module, "__spec__", None)
    if spec is not None and spec.name not in _MAIN_NAMES:
        return Importable(target=f"{spec.name}:{name}", path=path)
    return Importable(target=f"__main__:{name}", path=str(Path(path).resolve()))


def _is_guarded(path: str, name: str) -> bool:
    """Whether `name` is bound only under the main guard of the script."""
    top = name.split(".")[0]
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))

    def binds(nodes: list[ast.stmt]) -> bool:
        return any(getattr(node, "name", None) == top for node in nodes)

    guards = [n for n in tree.body if isinstance(n, ast.If) and "__main__" in ast.dump(n.test)]
    return not binds(tree.body) and any(binds(guard.body) for guard in guards)


def locate(importable: Importable) -> Any:
    """The object an import string names, in this process.

    Raises:
        ImportError, AttributeError: no such module, file or attribute.
    """
    module_name, _, attribute = importable.target.partition(":")
    found: Any = _module(module_name, importable.path)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _module(name: str, path: str | None) -> ModuleType:
    for main in _MAIN_NAMES:
        module = sys.modules.get(main)
        same_file = path is not None and getattr(module, "__file__", None) is not None
        if (
            module is not None
            and same_file
            and Path(module.__file__ or "").resolve() == Path(path or "")
        ):
            return module
    if name not in _MAIN_NAMES:
        loaded = _import_by_name(name, path)
        if loaded is not None:
            return loaded
    if path is None:
        raise ImportError(f"no module named {name!r}")
    return _import_file(path)


def _import_by_name(name: str, path: str | None) -> ModuleType | None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if path is None or error.name is None or not name.startswith(error.name):
            raise
        return None
    other_file = path is not None and Path(module.__file__ or "").resolve() != Path(path).resolve()
    return None if other_file else module


def _import_file(path: str) -> ModuleType:
    """Import a source file once under a private name, its folder importable as for a script."""
    name = f"_graft_file_{Path(path).stem}_{abs(hash(path))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python source file")
    folder = str(Path(path).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
