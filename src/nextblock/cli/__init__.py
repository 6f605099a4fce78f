"""The command line: `nextblock VERB ...`; `verbs.VERBS` names the function of each verb.

A verb's module is imported when the verb runs, and imports torch only when it needs it, so that help and
usage errors appear at once.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import socket
import sys
from collections.abc import Sequence

from nextblock.cli.output import write
from nextblock.cli.verbs import VERBS
from nextblock.errors import BAD_PATH, UsageError
from nextblock.launch import LaunchError, find_world

__all__ = ["VERBS", "main"]

USAGE_ERROR, FAILURE = 2, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 for a failure, 2 for wrong usage, or 128 + n if signal n stopped it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Names of files and classes may have characters that the output's encoding lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        write(_help())
        return 0
    if arguments[0] == "--version":
        from nextblock.version import __version__

        write(f"nextblock {__version__}\n")
        return 0
    words = 2 if " ".join(arguments[:2]) in VERBS else 1
    verb, rest = " ".join(arguments[:words]), arguments[words:]
    if verb not in VERBS:
        from nextblock.settings import nearest_name

        why = f"unknown command {verb!r}; {nearest_name(verb, _commands())}"
        return _complain("nextblock", why, USAGE_ERROR)
    try:
        world = find_world()
    except LaunchError as error:
        return _complain(f"nextblock {verb}", str(error), USAGE_ERROR)
    if world.size > 1:  # hides torch's stack traces of broken connections; set before torch is imported
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if world.rank == 0:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    else:
        logging.basicConfig(handlers=[logging.NullHandler()])
        logging.captureWarnings(capture=True)
    # Errors become messages; --debug shows the traceback.
    try:
        module, _, name = VERBS[verb].run.partition(":")
        function = getattr(importlib.import_module(f"nextblock.cli.{module}"), name)
        return function([word for word in rest if word != "--debug"])
    except SystemExit as stop:  # --help, --print_config
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return 130 if world.rank else _complain(f"nextblock {verb}", "interrupted", 130)
    except Exception as error:
        stopped_by = getattr(error, "signal", None)  # a signal stopped the command, which saved its work
        if "--debug" in rest and stopped_by is None:
            raise
        is_path = isinstance(error, OSError) and error.errno in BAD_PATH and error.filename is not None
        is_usage = isinstance(error, UsageError)
        code = USAGE_ERROR if is_path or is_usage else FAILURE
        code = code if stopped_by is None else 128 + stopped_by
        is_on_all = getattr(error, "is_reported", False) or stopped_by is not None
        # Rank 0 prints errors that all ranks raise, the first rank of each host prints usage errors.
        if world.rank and (is_on_all or (is_usage and world.local_rank)):
            return code
        why = str(error)
        if isinstance(error, OSError) and is_path:
            why = f"{str(error.filename)!r}: {error.strerror}; check the path and its permissions"
        elif code == FAILURE and not type(error).__module__.startswith("nextblock."):
            why = f"{type(error).__name__}: {why}; run it again with --debug to see where"
        where = getattr(error, "where", f"rank {world.rank} on {socket.gethostname()}")
        return _complain(f"nextblock {verb}", f"{where}: {why}" if world.rank else why, code)


def _complain(who: str, message: str, code: int) -> int:
    sys.stderr.write(f"{who}: {message}\n")
    return code


def _commands() -> list[str]:
    return [verb for verb in VERBS if " " not in verb]


def _help() -> str:
    verbs = "\n".join(f"  {verb:<10}{VERBS[verb].about}" for verb in _commands())
    return (
        "Pre-train a vision transformer by predicting the next block of an image.\n\n"
        "  nextblock doctor DIR                            # look at the images first\n"
        "  nextblock pretrain --data.train DIR --out RUN   # again: resume\n"
        "  nextblock report RUN\n\n"
        f"commands:\n{verbs}\n\n"
        "nextblock COMMAND --help explains one. --debug shows where an error comes from.\n"
    )
