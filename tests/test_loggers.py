"""Loggers: a resumed run continues its curve, and no logger ends a run."""

from __future__ import annotations

import io
import json
import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nextblock.train import MonitorEvent
from nextblock.train.loggers import LoggerError
from tiny_runs import checkpoints, crash_toy, run_toy

NAMES = ("wandb", "mlflow", "trackio")


class Told:
    """What a service was told of a run."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.endings: list[Any] = []

    def log(self, values, step):
        if not isinstance(next(iter(values.values())), Picture):
            self.steps.append(step)
        self.values |= values

    def finish(self, **how):
        self.endings.append(how)


class Picture(str):
    """W&B's Image."""

    __slots__ = ()


class Pair(NamedTuple):
    """MLflow's Metric and Param."""

    key: str
    value: Any
    timestamp: int = 0
    step: int = 0


class Client:
    """MLflow's, as far as it is used."""

    def __init__(self, runs):
        self.runs = runs

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return name

    def create_run(self, experiment_id, run_name):
        return SimpleNamespace(info=SimpleNamespace(run_id=f"{experiment_id}/{run_name}/{len(self.runs)}"))

    def update_run(self, run_id, status):
        assert run_id in self.runs

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(params) <= 100
        self.runs[run_id].config |= {param.key: param.value for param in params}
        if metrics:
            self.runs[run_id].log({metric.key: metric.value for metric in metrics}, metrics[0].step)

    def set_terminated(self, run_id, status):
        self.runs[run_id].finish(status=status)


@pytest.fixture
def services(monkeypatch):
    """Stand-ins of the three packages: what each was told, by the run's id there."""
    services = {name: defaultdict[str, Told](Told) for name in NAMES}

    def start(name):
        def init(project="", *, name="", id="", config=(), resume="", **_):  # noqa: A002
            assert resume == "allow"
            run = runs[id or name]
            run.config |= dict(config)
            return run

        runs = services[name]
        return init

    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["wandb"].__dict__.update(init=start("wandb"), Settings=dict, Image=Picture)
    sys.modules["trackio"].__dict__.update(init=start("trackio"))
    entities = SimpleNamespace(Metric=Pair, Param=Pair)
    sys.modules["mlflow"].__dict__.update(MlflowClient=lambda: Client(services["mlflow"]), entities=entities)
    return services


def test_a_resumed_run_continues_its_curves_and_sends_no_step_twice(services, tmp_path):
    changes = {"monitor.loggers": NAMES, "monitor.project": "toys"}
    run_toy(tmp_path, changes, stop=3)
    crash_toy(tmp_path, 5, changes)
    run_toy(tmp_path, changes)
    ids = json.loads((tmp_path / "loggers.json").read_text())
    for name, runs in services.items():
        assert list(runs) == [ids[name]]
        told = runs[ids[name]]
        assert told.steps == [1, 2, 3, 4, 5, 6, 7]
        assert {"train/loss", "train/lr"} < set(told.values)
        assert float(told.config["optim.lr"]) == 1e-3
    endings = services["mlflow"][ids["mlflow"]].endings
    assert [ending["status"] for ending in endings] == ["FINISHED", "FAILED", "FINISHED"]
    run_toy(tmp_path, changes, overwrite=True)
    assert all(len(runs) == 2 for runs in services.values()), "another run has another curve"


class Draws:
    """A monitor that sends a picture as grey as its step."""

    every = "2st"

    def __call__(self, model: object, event: MonitorEvent) -> dict[str, float]:
        path = event.run_dir / "grey.png"
        Image.new("L", (3, 2), 10 * event.step).save(path)
        assert event.log_image is not None
        event.log_image(event.step, "pictures/grey", path)
        return {"pictures/level": 10 * event.step}


def test_pictures_and_settings_reach_tensorboard_and_wandb(services, tmp_path):
    changes = {"monitor.loggers": ("wandb", "mlflow"), "monitor.tensorboard": True}
    run_toy(tmp_path, changes, stop=3, monitors=[Draws()])
    run_toy(tmp_path, changes, monitors=[Draws()])
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    shown = events.Images("pictures/grey")
    assert [one.step for one in shown] == [0, 2, 4, 6, 7]
    for one in shown:
        with Image.open(io.BytesIO(one.encoded_image_string)) as picture:
            assert np.array_equal(np.asarray(picture), np.full((2, 3, 3), 10 * one.step))
    (text,) = {one.tensor_proto.string_val[0] for one in events.Tensors("settings/text_summary")}
    assert "\n      lr: 0.001\n" in text.decode()
    (told,) = services["wandb"].values()
    assert told.values["pictures/grey"] == str(tmp_path / "grey.png")
    assert told.values["pictures/level"] == 70


def test_a_logger_that_fails_is_reported_once_and_dropped(services, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise ConnectionError("the network\nis gone")

    monkeypatch.setattr(Client, "log_batch", fail)
    run_toy(tmp_path / "run", {"monitor.loggers": ("wandb",)}, stop=2)
    # New to a run that resumes: even its start fails nothing.
    result = run_toy(tmp_path / "run", {"monitor.loggers": ("mlflow", "wandb")})
    assert result.step == 7
    assert [told.steps for told in services["wandb"].values()] == [[1, 2, 3, 4, 5, 6, 7]]
    warnings = [record.message for record in caplog.records if record.name == "nextblock.train.loggers"]
    assert len(warnings) == 1
    assert "ConnectionError: the network is gone" in warnings[0]
    monkeypatch.setattr(Told, "log", fail)
    assert run_toy(tmp_path / "other", {"monitor.loggers": ("wandb", "trackio")}).step == 7
    assert len([record for record in caplog.records if record.name == "nextblock.train.loggers"]) == 3


def test_a_logger_that_cannot_start_refuses_a_new_run(services, tmp_path):
    del sys.modules["wandb"].init  # type: ignore[attr-defined]
    with pytest.raises(LoggerError, match="wandb cannot start"):
        run_toy(tmp_path, {"monitor.loggers": ("wandb",)})
    assert checkpoints(tmp_path) == []


def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match="pip install trackio"):
        run_toy(tmp_path / "run", {"monitor.loggers": ("trackio",)})
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_the_real_package_continues_a_run_offline(name, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    pytest.importorskip(name)  # after the settings: Trackio reads its own when it is imported
    run_toy(tmp_path / "run", {"monitor.loggers": (name,)}, stop=3)
    ids = (tmp_path / "run" / "loggers.json").read_text()
    run_toy(tmp_path / "run", {"monitor.loggers": (name,)})
    assert (tmp_path / "run" / "loggers.json").read_text() == ids
    assert not [record for record in caplog.records if record.name == "nextblock.train.loggers"]
    if name == "mlflow":
        client = sys.modules["mlflow"].MlflowClient()
        history = client.get_metric_history(json.loads(ids)["mlflow"], "train/loss")
        assert [metric.step for metric in history] == [1, 2, 3, 4, 5, 6, 7]
