"""The run directory: what belongs to one training, who may write to it, and whether it holds the same run.

RUN/config.yaml        all settings, resolved
    source.json        number of images and fingerprint of their list, also of each part of a mixture
    environment.json   a list, one entry for each start: versions, device, git commit, command
    baselines.json     the loss of predictions that need no model, on this data
    metrics.jsonl      one JSON object a line
    heartbeat.json     step and state of the run, a few seconds old
    loggers.json       the ids by which loggers know the run
    quarantine.jsonl   images that could not be read
    best.json          which checkpoint is the best, and its value, if checkpoint.keep_best is set
    checkpoints/       step_00001234/{model.safetensors, optimizer/, state.json, checksums.json}
    logs/              warnings of all processes but the first
    pictures/  tensorboard/  wandb/
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from nextblock.atomic import OUTPUT_MARK, RUN_FILES, WriteError, exclusive, remove, write_text
from nextblock.config import RunConfig
from nextblock.data import Source, jpeg_decoder
from nextblock.errors import UsageError
from nextblock.settings import from_dict, to_dict, typed
from nextblock.train.distributed import ALONE, Group, is_lost
from nextblock.train.runtime import device_name

T = TypeVar("T", bound=RunConfig)

PACKAGES = ("nextblock", "torch", "torchvision", "timm", "torchcodec", "numpy", "pillow", "safetensors")
OTHER_FILES = (
    "baselines.json",
    "heartbeat.json",
    "loggers.json",
    "metrics.jsonl",
    "quarantine.jsonl",
    "best.json",
    "checkpoints",
    "pictures",
    "tensorboard",
    "logs",
    "wandb",
)
HEARTBEAT_EVERY_S = 10.0
MESSAGE_LETTERS = 300
LOG_FILES = ("*.out", "*.err", "*.log", "slurm-*")
"""What a scheduler may have put in a directory before its run begins."""
LOST = "restore it from a copy, or train on from the weights here: --model.init RUN with another --out"


class RunDirError(UsageError):
    """`--out` holds something else than this run."""


class DamagedRunError(RuntimeError):
    """A file of a run cannot be read."""


class RunDir:
    """Paths and records of a run. Between `begin` and the end only the process that holds `locked` writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.quarantine = path / "quarantine.jsonl"
        self.logs = path / "logs"
        self.is_anew = False
        """Whether the run here is to be replaced, when this one begins."""
        self.last_steps: dict[str, int] = {}
        """The last step of each kind of metrics, also of lines that `cut_metrics` dropped."""
        self._starts: list[dict[str, Any]] = []

    def is_run(self) -> bool:
        """Whether a run was begun here."""
        return all((self.path / name).is_file() for name in RUN_FILES)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only process that trains here; a directory that was made for nothing is removed again.

        `RunDirError` if something else lies here, `InUseError` if another process trains here.
        """
        # Asked before the lock is taken, as taking it makes the directory and files in it.
        is_new = not self.path.exists()
        if not is_new and not self.is_run() and not self._is_free():
            if self.path == Path():  # what Path makes of ""
                raise RunDirError("--out is empty, or this directory, which is not a run; name another")
            raise RunDirError(f"{self.path} exists and is not a run; choose another --out, or empty it")
        if is_new and self.path.is_symlink():
            raise RunDirError(
                f"{self.path} is a link to nothing ({self.path.readlink()}); make that directory, or choose "
                "another --out"
            )
        with ExitStack() as stack:
            # Only what goes wrong here is about the directory, not what the run inside raises.
            try:
                stack.enter_context(exclusive(self.path))
            except OSError as error:
                raise RunDirError(
                    f"cannot make or write the directory {self.path}: {error.strerror}; choose another --out"
                ) from error
            try:
                yield
            finally:
                if is_new and not self.is_run() and self._is_free():
                    remove(self.path)

    def _is_free(self) -> bool:
        """Whether nothing is here but log files and, perhaps, what a run killed at its very start left."""
        # config.yaml is written last and not among them: a project that has one of its own is no free place.
        return self.path.is_dir() and all(
            entry.name.startswith((".writing-", OUTPUT_MARK))
            or entry.name in RUN_FILES[:2]
            or any(entry.match(pattern) for pattern in LOG_FILES)
            for entry in self.path.iterdir()
        )

    # -------------------------------------------------------------------------------- the same run, or not

    def check(self, config: RunConfig, sources: dict[str, Source], *, overwrite: bool) -> RunConfig:
        """The settings to train with; `RunDirError` if another run, or the same on other images, is here.

        With `overwrite` the run here is replaced when this one begins. But if that is this very run, begun by
        --overwrite and unfinished, the command is being repeated to resume it.
        """
        if not self.is_run():
            return config
        if not overwrite:
            return self._checked(config, sources)
        # Nothing is removed yet: the new run may still be refused. `begin` does it.
        try:
            config_here = self._checked(config, sources)
            self._starts = self._read_starts()
        except (RunDirError, DamagedRunError):
            self.is_anew = True
            return config
        self.is_anew = not self._starts[0].get("overwrite") or bool(self._starts[-1].get("complete"))
        return config if self.is_anew else config_here

    def _checked(self, config: RunConfig, sources: dict[str, Source]) -> RunConfig:
        with self._reading("config.yaml", LOST) as text:
            settings = _mapping(yaml.safe_load(text))
        try:
            there = from_dict(type(config), settings)
        except ValueError as error:
            raise RunDirError(
                f"{self.path}/config.yaml is not of this version of nextblock: {error}; choose another --out"
            ) from error
        if config.train.precision == "auto":  # a run keeps the precision it began with, on any device
            config = replace(config, train=replace(config.train, precision=there.train.precision))
        if config.train.micro_batch_size == "auto":  # nor does it look for another number on each start
            micro = there.train.micro_batch_size
            config = replace(config, train=replace(config.train, micro_batch_size=micro))
        # What touches no weight, such as workers, checkpoints and the place of the images, is not compared.
        if differences := config.differences(there):
            listed = "; ".join(
                f"{name}: {typed(old)} there, {typed(new)} now" for name, (new, old) in differences.items()
            )
            # The schedule depends on the duration, so a longer run is another run from its first step on.
            longer = (
                f". To train longer from its weights: --model.init {self.path} with another --out"
                if "train.duration" in differences
                else ""
            )
            raise RunDirError(
                f"{self.path} holds another run ({listed}); choose another --out, the same settings to "
                f"resume, or --overwrite to start over{longer}"
            )
        # The same settings are not yet the same run: the order of samples follows from the list of images,
        # and their pixels from the decoder.
        with self._reading("source.json", LOST) as text:
            recorded = _mapping(json.loads(text))
        decoder = jpeg_decoder(config.data.decoder)
        if recorded.get("decoder", decoder) != decoder:
            raise RunDirError(
                f"{self.path} was decoding JPEG with {recorded['decoder']}, this installation would with "
                f"{decoder}, and some pixels would differ; install what it had, or "
                "begin a new run with another --out"
            )
        if "val" in recorded and "val" not in sources:
            raise RunDirError(
                f"{self.path} validates on {recorded['val']['spec']!r}; name these images again: "
                f"--{config.flag('data.val')}"
            )
        for kind, source in sources.items():
            then = recorded.get(kind, {})
            if then.get("fingerprint") == source.fingerprint:
                continue
            # Of a mixture, the first part that is another; if none is, there are more or fewer of them.
            parts = zip(source.parts, then.get("parts", []), strict=False)
            changed = (pair for pair in parts if pair[0].fingerprint != pair[1]["fingerprint"])
            part, then = next(changed, (source, then))
            raise RunDirError(
                f"{config.flag(f'data.{kind}')} {part.spec!r} has changed since this run began: "
                f"{then.get('num_images')} images then, {len(part)} now, or other names; the order of "
                "samples would not be the same. "
                "Restore the images, or begin a new run with another --out"
            )
        return config

    # --------------------------------------------------------------------------------------------- records

    def begin(
        self,
        config: RunConfig,
        sources: dict[str, Source],
        device: torch.device,
        step: int,
        *,
        group: Group = ALONE,
        overwrite: bool = False,
    ) -> None:
        """Write what this run is and that it starts from `step`; with `overwrite`, remove the one before."""
        if self.is_anew:  # by --overwrite
            # Only what a run writes, and what makes it a run last: killed here, the command can be repeated.
            for name in (*OTHER_FILES, *RUN_FILES):
                remove(self.path / name)
            self.is_anew = False
        # config.yaml, the last of the three, makes the directory a run. Killed before that, it is still free.
        self._starts = self._read_starts() if self.is_run() else []
        processes = {"processes": group.size, "launcher": group.world.launcher}
        self._starts.append(
            {**_environment(device), **processes, "step": step, "overwrite": overwrite, "complete": False}
        )
        described: dict[str, Any] = {kind: _describe(source) for kind, source in sources.items()}
        described["decoder"] = jpeg_decoder(config.data.decoder)
        write_text(self.path / "source.json", json.dumps(described, indent=1))
        self._write_starts()
        write_text(self.path / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))

    def complete(self) -> None:
        """Note that the run is complete."""
        # Repeated with --overwrite, a command resumes a run that lacks this note, and begins others anew.
        self._starts = self._read_starts()
        if not self._starts[-1].get("complete"):
            self._starts[-1]["complete"] = True
            self._write_starts()

    def _read_starts(self) -> list[dict[str, Any]]:
        with self._reading("environment.json", "remove it and put an empty list, [], in its place") as text:
            starts = json.loads(text)
        # A dict is from before 0.1.0, when only the first start was recorded.
        return [starts] if isinstance(starts, dict) else starts or [{}]

    def _write_starts(self) -> None:
        write_text(self.path / "environment.json", json.dumps(self._starts, indent=1))

    def check_present(self) -> None:
        """`WriteError` if the run was removed while it trained: a checkpoint alone could not be resumed."""
        if not self.is_run():
            raise WriteError(
                f"{self.path} was removed or emptied while the run was training; what it held is lost. "
                "Run the same command again to start over"
            )

    def metrics_until(self, step: int) -> list[tuple[str, dict[str, Any]]]:
        """The lines of metrics up to `step` and the values in them, without a last line that was cut off."""
        kept: list[tuple[str, dict[str, Any]]] = []
        if not self.metrics.exists():
            return kept
        with self._reading(self.metrics.name, "move it away to resume without the loss curve so far") as text:
            for line in text.splitlines(keepends=True):
                if not line.endswith("\n"):  # cut off by a kill
                    break
                values = _mapping(json.loads(line))
                self.last_steps[values["kind"]] = values["step"]
                if values["step"] <= step:  # those after the checkpoint will be written again
                    kept.append((line, values))
        return kept

    def cut_metrics(self, step: int) -> dict[str, float]:
        """Drop the lines of metrics after `step`; gives the last value of every name in those that stay."""
        latest: dict[str, float] = {}
        kept = self.metrics_until(step)
        for _, values in kept:
            latest |= {name: value for name, value in values.items() if isinstance(value, int | float)}
        if self.metrics.exists():
            write_text(self.metrics, "".join(line for line, _ in kept))
        return latest

    def write_best(self, record: dict[str, Any]) -> None:
        """Say which checkpoint is the best so far."""
        write_text(self.path / "best.json", json.dumps(record))

    def baselines(self) -> dict[str, float]:
        """What was measured when the run began; empty before."""
        if not (self.path / "baselines.json").exists():
            return {}
        with self._reading("baselines.json", "remove it: it is then measured again") as text:
            return _mapping(json.loads(text))

    def write_baselines(self, values: dict[str, float]) -> None:
        """Keep the baselines for later starts and for reports."""
        write_text(self.path / "baselines.json", json.dumps(values, indent=1))

    @contextmanager
    def beating(self, step: Callable[[], int], total_steps: int) -> Iterator[None]:
        """Keep heartbeat.json up to date meanwhile, and write at the end how the run ended."""

        def beat(status: str, message: str | None = None) -> None:
            values = {
                "status": status,
                "step": step(),
                "total_steps": total_steps,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "host": platform.node(),
                "pid": os.getpid(),
                "message": message,
            }
            # Whole or not at all for a reader, but not flushed to the disk; and no reason to end a run.
            aside = self.path / ".writing-heartbeat.json"
            with suppress(OSError):
                aside.write_text(json.dumps(values), encoding="utf-8")
                aside.replace(self.path / "heartbeat.json")

        # By a thread, as a step on a CPU, or a validation, can take longer than a reader would wait.
        is_over = threading.Event()

        def beat_on() -> None:
            while not is_over.wait(HEARTBEAT_EVERY_S):
                beat("running")

        thread = threading.Thread(target=beat_on, name="heartbeat", daemon=True)
        beat("running")
        thread.start()
        status, message = "failed", None
        try:
            yield
            status = "finished" if step() == total_steps else "stopped"
        except BaseException as error:
            what = "another process of the run died" if is_lost(error) else str(error)
            message = textwrap.shorten(what or type(error).__name__, MESSAGE_LETTERS, placeholder=" …")
            raise
        finally:
            is_over.set()
            thread.join()
            beat(status, message)

    @contextmanager
    def _reading(self, name: str, remedy: str) -> Iterator[str]:
        """Give a file's text; whatever is wrong with it is a `DamagedRunError`."""
        path = self.path / name
        try:
            yield path.read_text(encoding="utf-8")
        except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
            cause = " ".join(str(error).split())
            raise DamagedRunError(f"{path} is damaged ({cause}); {remedy}") from error


def _mapping(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise TypeError(f"{str(values)[:40]!r} is not a list of names and values")
    return values


def recorded_config(path: Path, kind: type[T] = RunConfig) -> T | None:
    """The settings of the run in a directory; None if there is none, or none that this version reads."""
    if not RunDir(path).is_run():
        return None
    try:
        return from_dict(kind, _mapping(yaml.safe_load((path / "config.yaml").read_text("utf-8"))))
    except (ValueError, TypeError, yaml.YAMLError):
        return None  # `RunDir.check` says what is wrong


def _describe(source: Source) -> dict[str, Any]:
    """What makes a source the same source."""
    described = {"spec": source.spec, "num_images": len(source), "fingerprint": source.fingerprint}
    parts = source.parts
    return described if len(parts) == 1 else {**described, "parts": [_describe(part) for part in parts]}


def _environment(device: torch.device) -> dict[str, Any]:
    """When and on what: versions, device, git commit of the working directory, and the command."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    try:
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
        commit = git.stdout.strip() if git.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "device": device_name(device),
        "git_commit": commit,
        "command": sys.argv,
    }
