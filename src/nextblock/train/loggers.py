"""The numbers and pictures of a run: metrics.jsonl, TensorBoard, W&B, MLflow and Trackio.

RUN/loggers.json stores each logger's id of the run, so that a resumed run continues its curves.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent
from typing import Any, Protocol

import numpy as np
import yaml
from PIL import Image

from nextblock.atomic import WriteError, write_text, writing
from nextblock.config import RunConfig
from nextblock.errors import UsageError
from nextblock.settings import flatten, to_dict
from nextblock.train.run_dir import DamagedRunError, RunDir

log = logging.getLogger(__name__)

MAX_PARAMS, MAX_PARAM_LETTERS = 100, 500
"""MLflow's limits on the parameters per request and on the length of each."""


class LoggerError(RuntimeError):
    """A logger of a new run cannot start."""


class Logger(Protocol):
    """Sends numbers to a service. An error is reported once and ends the logger, not the run.

    A logger that accepts pictures also has `image(step, name, path)`.
    """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a step; steps never decrease."""

    def close(self, *, failed: bool) -> None:
        """Send pending values and the state in which the run ended."""


class TensorBoard:
    """Events in RUN/tensorboard; events after `start_step` are hidden, as those steps run again."""

    def __init__(self, config: RunConfig, out: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=start_step + 1)
        # TensorBoard renders Markdown; indented lines are shown verbatim.
        settings = indent(yaml.safe_dump(to_dict(config), sort_keys=False), "    ")
        self._writer.add_text("settings", settings, start_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one event per value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        """Write the picture as an event."""
        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:  # noqa: ARG002 - TensorBoard stores no final state
        """Close the file."""
        self._writer.close()


class WandB:
    """Weights & Biases; with WANDB_MODE=offline it writes to RUN/wandb, for `wandb sync`."""

    def __init__(self, run_id: str | None, config: RunConfig, out: Path) -> None:
        wandb = importlib.import_module("wandb")
        self.run_id = run_id or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=config.monitor.project,
            name=out.name,
            id=self.run_id,
            resume="allow",
            dir=str(out),
            config=flatten(to_dict(config)),
            allow_val_change=True,  # settings such as data.workers may change when a run resumes
            settings=wandb.Settings(console="off"),  # else W&B captures the terminal's output
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Queue the values; W&B sends them from another process."""
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        """Queue the picture."""
        self._run.log({name: importlib.import_module("wandb").Image(str(path))}, step=step)

    def close(self, *, failed: bool) -> None:
        """Wait until everything is sent."""
        self._run.finish(exit_code=int(failed))


class MLflow:
    """MLflow at MLFLOW_TRACKING_URI; a project becomes an experiment."""

    def __init__(self, run_id: str | None, config: RunConfig, out: Path) -> None:
        # Not mlflow.start_run, which keeps one global current run per process.
        mlflow = importlib.import_module("mlflow")
        self._client, self._metric = mlflow.MlflowClient(), mlflow.entities.Metric
        if run_id is not None:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return
        project = config.monitor.project
        experiment = self._client.get_experiment_by_name(project)
        place = experiment.experiment_id if experiment else self._client.create_experiment(project)
        self.run_id = str(self._client.create_run(place, run_name=out.name).info.run_id)
        # Only at the first start, as MLflow refuses to change a parameter.
        settings, param = flatten(to_dict(config)), mlflow.entities.Param
        params = [param(name, str(value)[:MAX_PARAM_LETTERS]) for name, value in settings.items()]
        for at in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(self.run_id, params=params[at : at + MAX_PARAMS])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values in one request."""
        now_ms = int(time.time() * 1000)
        metrics = [self._metric(name, float(value), now_ms, step) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self, *, failed: bool) -> None:
        """Mark the run as finished or failed."""
        self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


class Trackio:
    """Trackio, on this machine or in the Space named by TRACKIO_SPACE_ID."""

    def __init__(self, run_id: str | None, config: RunConfig, out: Path) -> None:
        trackio = importlib.import_module("trackio")
        # Trackio identifies a run by its name only, so the name must be unique.
        self.run_id = run_id or f"{out.name}-{uuid.uuid4().hex[:8]}"
        project, settings = config.monitor.project, flatten(to_dict(config))
        with contextlib.redirect_stdout(sys.stderr):
            self._run = trackio.init(project, name=self.run_id, config=settings, resume="allow", embed=False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Queue the values; Trackio writes them from another thread."""
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:  # noqa: ARG002 - Trackio stores no final state
        """Wait until everything is written."""
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


OPTIONAL = {"wandb": WandB, "mlflow": MLflow, "trackio": Trackio}
"""Loggers that need the package of the same name."""


def require_packages(names: tuple[str, ...]) -> None:
    """Refuse loggers whose package is not installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            need = f"monitor.loggers {name} needs a package ({error})"
            raise UsageError(f"{need}: pip install {name}") from error


class Metrics:
    """Appends to metrics.jsonl, flushed line by line, and sends the numbers to the loggers.

    A logger that fails during training is reported once and dropped.
    """

    def __init__(self, config: RunConfig, run: RunDir, start_step: int) -> None:
        self._path, self._loggers = run.metrics, dict[str, Logger]()
        self._sent: dict[str, Mapping[str, int]] = {}
        """Last step of each kind of line that a logger already has."""
        # Resolved, as loggers name a run after its directory and may be used from another one.
        out, file, ids = run.path.resolve(), run.path / "loggers.json", dict[str, str]()
        if config.monitor.tensorboard:
            self._loggers["tensorboard"] = TensorBoard(config, out, start_step)
        try:
            if file.is_file():
                ids = {**json.loads(file.read_text(encoding="utf-8"))}
        except (ValueError, TypeError) as error:
            raise DamagedRunError(f"{file} is damaged; remove it: loggers then begin new curves") from error
        for name in dict.fromkeys(config.monitor.loggers):
            known = ids.get(name)
            try:
                logger = OPTIONAL[name](known, config, out)
            except Exception as error:
                # At the start of a run a user can fix this. A run that resumes continues without the logger.
                if start_step == 0 and known is None:
                    raise LoggerError(
                        f"{name} cannot start ({_cause(error)}); fix it, or leave it out of monitor.loggers"
                    ) from error
                self._drop(name, error, f"; to start a new curve, remove {file}" if known else "")
                continue
            self._loggers[name], ids[name] = logger, logger.run_id
            # Steps that a killed process lost run again with the same numbers. The curve already has them.
            self._sent[name] = run.last_steps if known else {}
            write_text(file, json.dumps(ids, indent=1))
        with writing(self._path):
            self._file = self._path.open("a", encoding="utf-8")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._file.close()
        for name in list(self._loggers):
            self._call(name, "close", failed=error is not None)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Write one line of `kind` ("train", "val", "monitor"); non-finite values are written as null.

        Loggers get names such as "train/loss", unless a name already contains a slash.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with writing(self._path):
            self._file.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
            self._file.flush()
        named = {name if "/" in name else f"{kind}/{name}": value for name, value in values.items()}
        self._send(kind, "log", step, named)

    def image(self, step: int, name: str, path: Path) -> None:
        """Send a monitor's picture to the loggers that accept pictures."""
        self._send("monitor", "image", step, name, path)

    def sync(self) -> None:
        """Flush all lines to disk; call it before a checkpoint gets its name, or a power cut leaves a gap."""
        with writing(self._path):
            os.fsync(self._file.fileno())
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise WriteError(f"{self._path} was removed while the run wrote to it; its content is lost")

    def _send(self, kind: str, method: str, step: int, *what: Any) -> None:
        for name in list(self._loggers):
            if step > self._sent.get(name, {}).get(kind, -1):
                self._call(name, method, step, *what)

    def _call(self, name: str, method: str, *what: Any, **options: Any) -> None:
        if hasattr(self._loggers[name], method):
            try:
                getattr(self._loggers[name], method)(*what, **options)
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception, remedy: str = "") -> None:
        self._loggers.pop(name, None)
        log.warning("%s receives no more numbers of this run (%s)%s", name, _cause(error), remedy)


def _cause(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
