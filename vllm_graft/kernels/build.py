"""Operators in C++: compiled at first use, kept for the next process, loaded into PyTorch.

They use PyTorch's stable interface only, which compiles in seconds. Where they cannot be
built, callers have another way.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger("vllm_graft")

AVX512_BF16 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16")
"""Flags for processors that have it."""
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-Wl,-z,now")


def load_operators(source: Path, *, flags: tuple[str, ...]) -> bool:
    """Compile `source` unless that was done before, and load it.

    Args:
        source: a C++ file that registers operators.
        flags: for the processor, such as `-mavx512f`.

    Returns:
        Whether its operators are there; the log says why not.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        logger.info("%s: no C++ compiler (g++, or CXX), so it is not used", source.name)
        return False
    command = [compiler, *_FLAGS, *flags, *_torch_flags()]
    library = _library(source, command)
    try:
        if not library.exists():
            _compile([*command, str(source), "-ltorch_cpu", "-lc10"], library)
        torch.ops.load_library(library)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        logger.warning("%s: not built, so it is not used: %s", source.name, str(reason)[-2000:])
        return False
    return True


def _torch_flags() -> list[str]:
    root = Path(torch.__file__).parent
    return [f"-I{root / 'include'}", f"-L{root / 'lib'}"]


def _library(source: Path, command: list[str]) -> Path:
    """Where the compiled file is kept, by all that it depends on."""
    made_of = f"{torch.__version__}|{command}|{source.read_text()}"
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "vllm_graft" / f"{source.stem}-{digest}.so"


def _compile(command: list[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    # Processes may build at the same time; each moves a whole file into place.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        subprocess.run(  # noqa: S603 - the user's compiler on a file of this package
            [*command, "-o", str(made)], check=True, capture_output=True, text=True
        )
        made.replace(library)
