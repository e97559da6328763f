"""The `vllm-graft` command: one file per subcommand, nothing heavy imported at start."""
