"""`python -m vllm_graft.cli` is `vllm-graft`."""

from vllm_graft.cli import run

if __name__ == "__main__":
    run()
