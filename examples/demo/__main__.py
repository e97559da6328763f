"""Train TorchTitan's Qwen3 on this machine, serve it in stock vLLM, prove they agree.

Then the same proof for TorchTitan's DeepSeek V3 with random weights: latent
attention from vLLM's latent cache, experts in groups.

As a script::

    python -m examples.demo            # two to three minutes on two cores
    python -m examples.demo --quick    # a few training steps, the same checks

Exits with 1 if a check fails. The checkpoints stay in `--output`.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    # Threads that spin while they wait stall each other when the cores are shared.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Defaults that keep the engine small, quiet and offline; a value already set stays."""


def settle_environment() -> None:
    """Set what vLLM and torch read when they are first imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    # Engine and worker in this process: the live module is within reach of autograd.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="few training steps, same checks")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="checkpoint folder")
    return parser.parse_args()


def main() -> None:
    """Run the demo and exit with its status."""
    arguments = parse_arguments()
    settle_environment()
    # After the environment: these import torch and vLLM.
    from examples.demo.story import tell

    passed = tell(arguments.output, quick=arguments.quick)
    sys.stdout.flush()
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
