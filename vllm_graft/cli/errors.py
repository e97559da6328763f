"""What a command raises when it cannot go on; `main` prints one message, no traceback."""

from __future__ import annotations


class CommandError(Exception):
    """A command failed; the text says where, what came, what was expected and the fix."""

    exit_code = 1


class UsageError(CommandError):
    """The command was called wrongly."""

    exit_code = 2
