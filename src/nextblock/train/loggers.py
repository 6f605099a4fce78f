"""Loggers that receive a run's numbers and pictures: TensorBoard, W&B, MLflow and Trackio.

RUN/loggers.json stores each logger's id of the run, so that a resumed run continues its curves.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple, Protocol

import numpy as np
import yaml
from PIL import Image

from nextblock.atomic import write_text
from nextblock.config import RunConfig
from nextblock.errors import UsageError
from nextblock.settings import flatten, to_dict
from nextblock.train.run_dir import DamagedRunError, RunDir

log = logging.getLogger(__name__)

MAX_PARAMS, MAX_PARAM_LETTERS = 100, 500
"""MLflow's limits on the parameters per request and on the length of each."""


class LoggerError(RuntimeError):
    """A logger of a new run cannot start."""


class RunInfo(NamedTuple):
    """What a logger needs to know about the run."""

    run_id: str | None
    """The logger's id of the run; None for a new run."""
    project: str
    name: str
    config: dict[str, Any]
    """All settings, by dotted name."""
    out: Path


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

    def __init__(self, directory: Path, start_step: int, settings: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=start_step + 1)
        # TensorBoard renders Markdown; indented lines are shown verbatim.
        self._writer.add_text("settings", indent(settings, "    "), start_step)

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

    def __init__(self, info: RunInfo) -> None:
        wandb = importlib.import_module("wandb")
        self.run_id = info.run_id or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=info.project,
            name=info.name,
            id=self.run_id,
            resume="allow",
            dir=str(info.out),
            config=info.config,
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

    def __init__(self, info: RunInfo) -> None:
        # Not mlflow.start_run, which keeps one global current run per process.
        mlflow = importlib.import_module("mlflow")
        self._client, self._metric = mlflow.MlflowClient(), mlflow.entities.Metric
        if info.run_id is not None:
            self.run_id = info.run_id
            self._client.update_run(self.run_id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(info.project)
        place = experiment.experiment_id if experiment else self._client.create_experiment(info.project)
        self.run_id = str(self._client.create_run(place, run_name=info.name).info.run_id)
        # Only at the first start, as MLflow refuses to change a parameter.
        param = mlflow.entities.Param
        params = [param(name, str(value)[:MAX_PARAM_LETTERS]) for name, value in info.config.items()]
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

    def __init__(self, info: RunInfo) -> None:
        trackio = importlib.import_module("trackio")
        # Trackio identifies a run by its name only, so the name must be unique.
        self.run_id = info.run_id or f"{info.name}-{uuid.uuid4().hex[:8]}"
        with contextlib.redirect_stdout(sys.stderr):
            self._run = trackio.init(
                info.project, name=self.run_id, config=info.config, resume="allow", embed=False
            )

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


class Loggers:
    """All loggers of a run. A logger that fails during training is reported once and dropped."""

    def __init__(self, config: RunConfig, run: RunDir, start_step: int) -> None:
        self._loggers: dict[str, Logger] = {}
        self._last_steps: dict[str, Mapping[str, int]] = {}
        if config.monitor.tensorboard:
            settings = yaml.safe_dump(to_dict(config), sort_keys=False)
            self._loggers["tensorboard"] = TensorBoard(run.path / "tensorboard", start_step, settings)
        file, ids = run.path / "loggers.json", dict[str, str]()
        try:
            if file.is_file():
                ids = {**json.loads(file.read_text(encoding="utf-8"))}
        except (ValueError, TypeError) as error:
            raise DamagedRunError(f"{file} is damaged; remove it: loggers then begin new curves") from error
        name, values = run.path.resolve().name, flatten(to_dict(config))
        for kind in dict.fromkeys(config.monitor.loggers):
            known = ids.get(kind)
            try:
                logger = OPTIONAL[kind](RunInfo(known, config.monitor.project, name, values, run.path))
            except Exception as error:
                # At the start of a run a user can fix this. A run that resumes continues without the logger.
                if start_step == 0 and known is None:
                    raise LoggerError(
                        f"{kind} cannot start ({_cause(error)}); fix it, or leave it out of monitor.loggers"
                    ) from error
                self._drop(kind, error, f"; to start a new curve, remove {file}" if known else "")
                continue
            self._loggers[kind], ids[kind] = logger, logger.run_id
            # Steps that a killed process lost run again with the same numbers. The curve already has them.
            self._last_steps[kind] = run.last_steps if known else {}
            write_text(file, json.dumps(ids, indent=1))

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a line of metrics, named "train/loss" unless a name contains a slash."""
        named = {name if "/" in name else f"{kind}/{name}": value for name, value in values.items()}
        self._send(kind, step, "log", named)

    def image(self, step: int, name: str, path: Path) -> None:
        """Send a monitor's picture to the loggers that accept pictures."""
        self._send("monitor", step, "image", name, path)

    def _send(self, kind: str, step: int, method: str, *what: Any) -> None:
        for name, logger in list(self._loggers.items()):
            if step > self._last_steps.get(name, {}).get(kind, -1) and hasattr(logger, method):
                try:
                    getattr(logger, method)(step, *what)
                except Exception as error:
                    self._drop(name, error)

    def close(self, *, failed: bool) -> None:
        """Close all loggers."""
        for name, logger in list(self._loggers.items()):
            try:
                logger.close(failed=failed)
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception, remedy: str = "") -> None:
        self._loggers.pop(name, None)
        log.warning("%s receives no more numbers of this run (%s)%s", name, _cause(error), remedy)


def _cause(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
