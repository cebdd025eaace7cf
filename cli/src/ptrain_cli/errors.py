"""How the command line ends when something is wrong: a message without a traceback, and an exit code."""

from __future__ import annotations

import sys
import traceback

from ptrain_cli.options import Settings


def report(error: BaseException) -> int:
    """Show an error on stderr and return the exit code that it stands for."""
    from ptrain.errors import PtrainError
    from ptrain.launch.failure import Failure
    from ptrain.launch.report import show, show_failure

    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, BrokenPipeError):
        return _closed_pipe()
    if Settings.debug:
        traceback.print_exception(error)
    usage = getattr(error, "format_message", None)
    if usage is not None:
        show("error", usage() + _help_of(error))
        return int(getattr(error, "exit_code", 2))
    failure = Failure.of(error, 0)
    show_failure(failure, ranks=False)
    if not isinstance(error, PtrainError) and not Settings.debug:
        sys.stderr.write("  `ptrain --debug ...` shows the traceback\n")
    return failure.exit_code


def _help_of(error: BaseException) -> str:
    """Where the help of the command stands that was called wrongly."""
    context = getattr(error, "ctx", None)
    return f"\n  see: {context.command_path} --help" if context is not None else ""


def _closed_pipe() -> int:
    """The reader of our output went away (`ptrain plugins list | head`): no error of anybody."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
