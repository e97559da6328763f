"""Train TorchTitan's Qwen3 on this machine, serve it in stock vLLM, prove they agree.

Then the same proof for TorchTitan's DeepSeek V3 with random weights: latent
attention from vLLM's latent cache, experts in groups. Last, reinforcement learning:
another small Qwen3 learns to add in the engine that samples its answers.

As a script::

    python -m examples.demo            # two to three minutes on two cores
    python -m examples.demo --quick    # a few training steps, the same checks

Exits with 1 if a check fails. The checkpoints stay in `--output`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from examples.environment import settle_environment


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
    # Engine and worker in this process: the live module is within reach of autograd.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # After the environment: these import torch and vLLM.
    from examples.demo.story import tell

    passed = tell(arguments.output, quick=arguments.quick)
    sys.stdout.flush()
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
