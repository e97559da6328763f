"""A program that serves on two worker processes: `parent.py FACTORY CHECKPOINT ENDING`.

It prints READY when tokens come, then generates until it is killed. ENDING `exit` leaves
by `os._exit` instead, which runs no clean-up.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import vllm_graft
from tests.support import engine, generate, prompts


def main() -> None:
    """Serve until something dies."""
    factory, checkpoint, ending = sys.argv[1:]
    vllm_graft.register("Tested", factory)
    with engine(Path(checkpoint), "Tested", dtype="float32", tensor_parallel_size=2) as llm:
        generate(llm, prompts((5,)), max_tokens=4)
        print("READY", flush=True)
        if ending == "exit":
            threading.Thread(target=leave, daemon=True).start()
        while True:
            generate(llm, prompts((5, 40)), max_tokens=400)


def leave() -> None:
    """Vanish in the middle of a request."""
    time.sleep(1)
    os._exit(3)


if __name__ == "__main__":
    main()
