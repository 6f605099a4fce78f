"""Loggers: a resumed run continues its curve, and no logger ends a run."""

import io
import json
import sys
import uuid
from collections import namedtuple
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nextblock.train import MonitorEvent
from nextblock.train.loggers import LoggerError
from tiny_runs import checkpoints, crash_toy, run_toy

NAMES = ("wandb", "mlflow", "trackio")
STEPS = [1, 2, 3, 4, 5, 6, 7]
GONE = ConnectionError("the network\nis gone")


@pytest.fixture
def services(monkeypatch):
    """Stand-ins of the three packages, which note what they are told."""
    services = MagicMock()
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, getattr(services, name))
    services.wandb.Image = str
    services.client = services.mlflow.MlflowClient.return_value
    services.client.get_experiment_by_name.return_value = None
    services.client.create_run.side_effect = lambda *_, **__: Mock(info=Mock(run_id=uuid.uuid4().hex))
    entities = services.mlflow.entities
    entities.Metric = entities.Param = namedtuple("Entity", "key value timestamp step", defaults=(0, 0))
    return services


def told(services, name):
    """The steps of which a service was told, and the last values."""
    if name == "mlflow":
        calls = [call.kwargs.get("metrics") for call in services.client.log_batch.call_args_list]
        sent = [({one.key: one.value for one in metrics}, metrics[0].step) for metrics in calls if metrics]
    else:
        calls = getattr(services, name).init.return_value.log.call_args_list
        sent = [(call.args[0], call.kwargs["step"]) for call in calls]
    return [step for _, step in sent], {name: value for values, _ in sent for name, value in values.items()}


def test_a_resumed_run_continues_its_curves_and_sends_no_step_twice(services, tmp_path):
    changes = {"monitor.loggers": NAMES, "monitor.project": "toys"}
    run_toy(tmp_path, changes, stop=3)
    crash_toy(tmp_path, 5, changes)
    run_toy(tmp_path, changes)
    ids = json.loads((tmp_path / "loggers.json").read_text())
    for name in NAMES:
        steps, values = told(services, name)
        assert steps == STEPS
        assert {"train/loss", "train/lr"} < set(values)
    for name, key in (("wandb", "id"), ("trackio", "name")):
        starts = [call.kwargs for call in getattr(services, name).init.call_args_list]
        assert [(start[key], start["resume"]) for start in starts] == [(ids[name], "allow")] * 3
        assert starts[0]["config"]["optim.lr"] == 1e-3
    client = services.client
    assert [call.args[0] for call in client.update_run.call_args_list] == [ids["mlflow"]] * 2
    params = [call.kwargs["params"] for call in client.log_batch.call_args_list if "params" in call.kwargs]
    assert max(map(len, params)) <= 100
    assert {param.key: param.value for some in params for param in some}["optim.lr"] == "0.001"
    endings = [call.args for call in client.set_terminated.call_args_list]
    assert endings == [(ids["mlflow"], how) for how in ("FINISHED", "FAILED", "FINISHED")]
    run_toy(tmp_path, changes, overwrite=True)
    other = json.loads((tmp_path / "loggers.json").read_text())
    assert not set(other.values()) & set(ids.values()), "another run has another curve"


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
    _, values = told(services, "wandb")
    assert values["pictures/grey"] == str(tmp_path / "grey.png")
    assert values["pictures/level"] == 70


def warnings(caplog):
    return [record.message for record in caplog.records if record.name == "nextblock.train.loggers"]


def test_a_logger_that_fails_is_reported_once_and_dropped(services, tmp_path, caplog):
    services.client.log_batch.side_effect = GONE
    run_toy(tmp_path / "run", {"monitor.loggers": ("wandb",)}, stop=2)
    # New to a run that resumes: even its start fails nothing.
    assert run_toy(tmp_path / "run", {"monitor.loggers": ("mlflow", "wandb")}).step == 7
    assert told(services, "wandb")[0] == STEPS
    (warning,) = warnings(caplog)
    assert "ConnectionError: the network is gone" in warning
    for name in ("wandb", "trackio"):
        getattr(services, name).init.return_value.log.side_effect = GONE
    assert run_toy(tmp_path / "other", {"monitor.loggers": ("wandb", "trackio")}).step == 7
    assert len(warnings(caplog)) == 3


def test_a_new_run_whose_logger_cannot_start_is_refused(services, tmp_path, monkeypatch):
    services.wandb.init.side_effect = GONE
    with pytest.raises(LoggerError, match="wandb cannot start"):
        run_toy(tmp_path, {"monitor.loggers": ("wandb",)})
    assert checkpoints(tmp_path) == []
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match="pip install trackio"):
        run_toy(tmp_path / "run", {"monitor.loggers": ("trackio",)})
    assert not (tmp_path / "run").exists(), "nothing is written"


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
    assert not warnings(caplog)
    if name == "mlflow":
        client = sys.modules["mlflow"].MlflowClient()
        history = client.get_metric_history(json.loads(ids)["mlflow"], "train/loss")
        assert [metric.step for metric in history] == STEPS
