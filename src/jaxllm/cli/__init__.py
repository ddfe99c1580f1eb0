"""The ``jaxllm`` command: each subcommand is a module with a frozen dataclass ``Args`` and ``run(args) -> int``."""
