"""The command line: `nextblock VERB ...`, one file a verb.

Each verb module has `run(argv)`; it is imported when its verb is used, and imports torch when it has work to
do, so that help and usage errors come at once.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
from collections.abc import Sequence

from nextblock.errors import UsageError
from nextblock.launch import LaunchError, find_world

__all__ = ["VERBS", "main"]

VERBS = {
    "pretrain": "train a vision transformer to predict the next block, or resume a run",
    "probe": "measure what a frozen encoder's features are worth",
    "knn": "measure them by their nearest neighbours, without training",
    "fewshot": "measure them with few labels: k a class, 1 %, 10 %",
    "finetune": "train encoder and head together, whole or by LoRA",
    "suite": "probe the papers' benchmarks and write their table",
    "classify": "name the classes of images with a trained head",
    "embed": "write the features of images to a file",
    "search": "find the images nearest to one",
    "predict": "draw how a model predicts the blocks of images",
    "runs": "list the runs below a directory and how they are doing",
    "report": "sum up a run: accuracies, speed, losses, pictures",
    "convert": "write a model in another format, or push it to the hub",
    "info": "show what a run or a weight file holds",
    "doctor": "examine images before training",
    "data": "pack images into shards, draw and divide subsets",
    "plan": "estimate memory and time of a training, before it is run",
    "presets": "list the named runs and model sizes",
    "bench": "measure speed against the plain alternative",
}

USAGE_ERROR, FAILURE = 2, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, 1 for a failure, 2 for wrong usage, 128 + signal where that stopped it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        return 0
    if arguments[0] == "--version":
        from nextblock.version import __version__

        sys.stdout.write(f"nextblock {__version__}\n")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        from nextblock.settings import nearest_name

        why = f"unknown command {verb!r}; {nearest_name(verb, list(VERBS))}"
        return _complain("nextblock", why, USAGE_ERROR)
    # Of several processes rank 0 speaks for all, of what all can get wrong the first one on each host.
    try:
        world = find_world()
    except LaunchError as error:
        return _complain(f"nextblock {verb}", str(error), USAGE_ERROR)
    if world.size > 1:  # torch's own stack traces of broken connections, before it is imported
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if world.rank == 0:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    else:
        logging.basicConfig(handlers=[logging.NullHandler()])
        logging.captureWarnings(capture=True)
    # What a user can get wrong becomes a message, and a traceback only under --debug.
    try:
        words = [word for word in rest if word != "--debug"]
        return importlib.import_module(f"nextblock.cli.{verb}").run(words)
    except SystemExit as stop:  # --help, --print_config
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return 130 if world.rank else _complain(f"nextblock {verb}", "interrupted", 130)
    except Exception as error:
        if "--debug" in rest:
            raise
        code = USAGE_ERROR if isinstance(error, UsageError) else FAILURE
        if type(error).__name__ == "Stopped":  # by name, as its file imports torch
            code = 128 + error.signal  # type: ignore[attr-defined]
        if world.rank and (getattr(error, "is_told", False) or (code == USAGE_ERROR and world.local_rank)):
            return code
        why = str(error)
        if code == FAILURE and not type(error).__module__.startswith("nextblock."):
            why = f"{type(error).__name__}: {why}; run it again with --debug to see where"
        where = getattr(error, "where", f"rank {world.rank} on {socket.gethostname()}")
        return _complain(f"nextblock {verb}", f"{where}: {why}" if world.rank else why, code)


def _complain(who: str, message: str, code: int) -> int:
    sys.stderr.write(f"{who}: {message}\n")
    return code


def _help() -> str:
    verbs = "\n".join(f"  {verb:<10}{what}" for verb, what in VERBS.items())
    return (
        "usage: nextblock COMMAND [--SETTING VALUE ...]\n\n"
        "Pre-train a vision transformer by predicting the next block of an image.\n\n"
        f"commands:\n{verbs}\n\n"
        "nextblock COMMAND --help lists its settings. --debug shows where an error comes from.\n\n"
        "start:  nextblock pretrain --data.train DIR --out RUN     (the same command again resumes)\n"
    )
