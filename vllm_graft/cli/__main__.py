"""`python -m vllm_graft.cli` is `vllm-graft`."""

from vllm_graft.cli.main import main

if __name__ == "__main__":
    main()
