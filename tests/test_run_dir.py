"""What may train in a directory: the same run, known by its settings and its images, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nextblock.atomic import InUseError, WriteError, exclusive
from nextblock.config import RunConfig
from nextblock.settings import from_dict
from nextblock.train import DamagedRunError, RunDir, RunDirError
from tiny_runs import (
    CrashAt,
    CrashError,
    Quiet,
    SignalAt,
    assert_same_end,
    checkpoints,
    metrics,
    run_toy,
    settings,
    write_images,
)
from toy import ToySource


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run stopped after three steps, only looked at."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    run_toy(run, monitors=[SignalAt(3, signal.SIGINT)])
    return run


def open_with(run, changes=None, sources=None, *, overwrite=False):
    directory = RunDir(run)
    directory.check(settings(changes), sources or {"train": ToySource(40)}, overwrite=overwrite)
    return directory


# ----------------------------------------------------------------------------------------------- the same run


@pytest.mark.parametrize(
    "changes",
    [
        {"data.workers": 2},
        {"data.max_bad_fraction": 0.5},
        {"train.device": "auto"},
        {"checkpoint.every": "1st", "checkpoint.keep": 5, "checkpoint.keep_every": "1ep"},
        {"monitor.log_every": "5st", "monitor.pictures_every": "1ep", "monitor.tensorboard": True},
        {"preset": "xtra-tiny"},
        {"data.train": "elsewhere", "data.val": None},
        {"train.precision": "auto"},
    ],
)
def test_what_does_not_touch_the_weights_may_change(stopped, changes):
    latest = open_with(stopped, changes).latest()
    assert latest is not None
    assert latest.name == "step_00000003"


@pytest.mark.parametrize(
    ("changes", "listed"),
    [
        ({"optim.lr": 0.5}, "optim.lr: 0.001 there, 0.5 now"),
        ({"seed": 3}, "seed: 0 there, 3 now"),
        ({"model.depth": 3}, "model.depth: 2 there, 3 now"),
        ({"train.duration": "9st"}, "train.duration: '7st' there, '9st' now"),
        ({"train.micro_batch_size": 4}, "train.micro_batch_size: None there, 4 now"),
        ({"data.decoder": "pillow"}, "data.decoder: 'auto' there, 'pillow' now"),
        ({"data.crop_scale": (0.5, 1.0)}, "data.crop_scale: [0.3, 1.0] there, [0.5, 1.0] now"),
    ],
)
def test_another_setting_is_another_run_and_both_values_are_listed(stopped, changes, listed):
    with pytest.raises(RunDirError) as raised:
        open_with(stopped, changes)
    assert f"holds another run ({listed}); choose another --out" in str(raised.value)
    assert "--overwrite to start over" in str(raised.value)
    assert ("--model.init" in str(raised.value)) == ("train.duration" in changes), "how to train longer"


def test_other_images_are_refused_with_their_numbers(stopped):
    with pytest.raises(RunDirError, match="40 images then, 41 now"):
        open_with(stopped, sources={"train": ToySource(41)})
    with pytest.raises(RunDirError, match="40 images then, 40 now, or other names"):
        open_with(stopped, sources={"train": ToySource(40, seed=1)})
    with pytest.raises(RunDirError, match=r"data\.val .*None images then, 9 now"):
        open_with(stopped, sources={"train": ToySource(40), "val": ToySource(9)})


def test_images_may_move_between_two_starts(tmp_path):
    from nextblock import pretrain

    write_images(tmp_path / "here", 10)
    changes = {"train.duration": "4st", "data.val": None}
    for place, stop in (("here", 2), ("there", 4)):
        shutil.move(tmp_path / "here", tmp_path / place) if place == "there" else None
        config = settings({**changes, "data.train": str(tmp_path / place)})
        reporter = Quiet()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nextblock.cli.pretrain._monitors", lambda *_: [SignalAt(2, signal.SIGINT)])
            assert pretrain(config, out=tmp_path / "run", reporter=reporter).step == stop
    assert reporter.began_at == (2, 4)


def test_validation_images_cannot_silently_be_left_out(tmp_path):
    val = {"train": ToySource(40), "val": ToySource(9, seed=1)}
    run_toy(tmp_path / "run", sources=val, monitors=[SignalAt(3, signal.SIGINT)])
    with pytest.raises(RunDirError, match=r"validates on 'toy-1'; name these images again: --data.val"):
        run_toy(tmp_path / "run")


def test_the_config_that_is_written_is_the_run(stopped):
    written = yaml.safe_load((stopped / "config.yaml").read_text())
    assert from_dict(RunConfig, written) == settings()


def test_going_on_records_the_settings_and_the_place_of_now(tmp_path):
    run_toy(tmp_path / "run", monitors=[SignalAt(3, signal.SIGINT)])
    run_toy(tmp_path / "run", {"monitor.log_every": "2st", "checkpoint.keep": 1})
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["monitor"]["log_every"], written["checkpoint"]["keep"]) == ("2st", 1)
    assert checkpoints(tmp_path / "run") == ["step_00000007"]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 6, 7]


def test_source_json_tells_how_many_images_and_which(stopped):
    source = json.loads((stopped / "source.json").read_text())
    assert source["train"] == {"spec": "toy-0", "num_images": 40, "fingerprint": "toy-0-40"}
    assert source["decoder"] in ("torchcodec", "pillow")


def test_a_run_whose_jpeg_decoder_is_gone_is_refused(stopped, monkeypatch):
    recorded = json.loads((stopped / "source.json").read_text())
    monkeypatch.setattr("nextblock.train.run_dir.jpeg_decoder", lambda _: "another")
    with pytest.raises(RunDirError, match=f"was decoding JPEG with {recorded['decoder']}.* with another"):
        run_toy(stopped)


def test_a_run_records_the_precision_that_auto_stood_for_and_keeps_it(tmp_path, monkeypatch):
    auto = {"train.precision": "auto"}
    monkeypatch.setattr("nextblock.train.loop.native_precision", lambda _: "bf16")
    run_toy(tmp_path / "run", auto, monitors=[SignalAt(3, signal.SIGINT)])
    monkeypatch.setattr("nextblock.train.loop.native_precision", lambda _: "fp32")
    run_toy(tmp_path / "run", auto)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["precision"] == "bf16"
    run_toy(tmp_path / "whole", {"train.precision": "bf16"})
    assert_same_end(tmp_path / "run", tmp_path / "whole", 7)


def test_every_start_is_recorded_with_its_first_step(tmp_path):
    run_toy(tmp_path / "run", monitors=[SignalAt(3, signal.SIGINT)])
    run_toy(tmp_path / "run")
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [(start["step"], start["complete"]) for start in starts] == [(0, False), (3, True)]


def test_a_run_killed_while_it_wrote_its_first_files_begins_again(tmp_path):
    (tmp_path / "source.json").write_text("{}")
    (tmp_path / ".writing-environment.json").touch()
    assert run_toy(tmp_path).step == 7


# ----------------------------------------------------------------------------------- damaged, deleted, in use


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("config.yaml", "", "--model.init RUN"),
        ("config.yaml", "a: [", "--model.init RUN"),
        ("source.json", "{", "--model.init RUN"),
        ("environment.json", "", "empty list"),
        ("baselines.json", "", "remove it"),
        ("metrics.jsonl", "x\n", "move it away"),
    ],
)
def test_a_damaged_file_is_named_with_cause_and_remedy(tmp_path, stopped, name, content, remedy):
    shutil.copytree(stopped, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(DamagedRunError, match=rf"run/{name} is damaged \(.+\); .*{remedy}"):
        run_toy(tmp_path / "run")


def test_a_second_process_is_refused_at_once_and_changes_nothing(tmp_path):
    other = (
        "import sys, time; from pathlib import Path; from nextblock.atomic import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    run = tmp_path / "run"
    run_toy(run, monitors=[SignalAt(3, signal.SIGINT)])
    with subprocess.Popen([sys.executable, "-c", other, str(run)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with pytest.raises(InUseError, match=f"is being written by process {process.pid} on .*, since"):
            run_toy(run)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        process.kill()
    assert run_toy(run).step == 7, "the system frees the lock of a process that is killed"


def test_a_run_is_locked_while_it_trains(tmp_path):
    class Intrude:
        every = "1st"

        def __call__(self, model, event):
            with pytest.raises(InUseError, match=f"process {os.getpid()}"), exclusive(event.run_dir):
                pass
            return {}

    assert run_toy(tmp_path / "run", monitors=[Intrude()]).step == 7


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("", "run was removed or emptied"),
        ("config.yaml", "run was removed or emptied"),
        ("metrics.jsonl", "metrics.jsonl was removed"),
    ],
)
def test_a_run_deleted_under_way_ends_at_the_next_checkpoint_with_an_error(tmp_path, what, told):
    class Delete:
        every = "3st"

        def __call__(self, model, event):
            if event.step == 3:
                path = event.run_dir / what
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            return {}

    with pytest.raises(WriteError, match=told):
        run_toy(tmp_path / "run", {"checkpoint.every": "5st"}, monitors=[Delete()])
    assert not checkpoints(tmp_path / "run")


# -------------------------------------------------------------------------------------------- another's place


def test_a_schedulers_log_files_do_not_occupy_a_directory_and_survive_overwrite(tmp_path):
    for name in ("slurm-123.out", "train.log", "err.err"):
        (tmp_path / name).write_text("words")
    assert run_toy(tmp_path).step == 7
    run_toy(tmp_path, {"seed": 1}, overwrite=True)
    assert (tmp_path / "slurm-123.out").read_text() == "words"


@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml"])
def test_a_directory_with_other_files_is_refused_even_with_overwrite(tmp_path, name):
    (tmp_path / name).write_text("years: of work")
    for overwrite in (False, True):
        with pytest.raises(RunDirError, match="exists and is no run; choose another --out, or empty it"):
            run_toy(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == [name], "not even a lock"
    assert (tmp_path / name).read_text() == "years: of work"


def test_a_run_from_before_a_setting_goes_on_where_that_has_its_default(tmp_path):
    run = tmp_path / "run"
    run_toy(run, {"train.duration": "1st"})
    told = yaml.safe_load((run / "config.yaml").read_text())
    del told["data"]["val_crop"]
    (run / "config.yaml").write_text(yaml.safe_dump(told))
    open_with(run, {"train.duration": "1st"})
    with pytest.raises(RunDirError, match=r"data.val_crop: 'center' there, 'squash' now"):
        open_with(run, {"train.duration": "1st", "data.val_crop": "squash"})


def test_a_run_of_another_version_is_refused_by_the_name_of_the_setting(tmp_path):
    run_toy(tmp_path / "run", {"train.duration": "1st"})
    with (tmp_path / "run" / "config.yaml").open("a") as file:
        file.write("dream: 1\n")
    with pytest.raises(RunDirError, match=r"config.yaml is not of this version .* unknown setting 'dream'"):
        run_toy(tmp_path / "run", {"train.duration": "1st"})


def test_a_file_in_the_place_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="exists and is no run"):
        run_toy(tmp_path / "file")
    with pytest.raises(RunDirError, match=r"cannot make or write the directory .*; choose"):
        run_toy(tmp_path / "file" / "run")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(RunDirError, match="is a link to nothing"):
        run_toy(tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunDirError, match="--out is empty"):
        run_toy(Path())


def test_an_empty_directory_and_one_with_missing_parents_will_do(tmp_path):
    (tmp_path / "empty").mkdir()
    assert run_toy(tmp_path / "empty", {"train.duration": "1st"}).step == 1
    assert run_toy(tmp_path / "a" / "b", {"train.duration": "1st"}).step == 1


def test_overwrite_begins_anew(tmp_path):
    run_toy(tmp_path / "run")
    reporter = Quiet()
    changes = {"train.duration": "2st", "optim.lr": 0.5}
    result = run_toy(tmp_path / "run", changes, overwrite=True, reporter=reporter)
    assert reporter.began_at == (0, 2)
    assert result.step == 2
    assert checkpoints(tmp_path / "run") == ["step_00000002"]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]


def test_an_overwritten_run_that_was_stopped_is_resumed_by_the_same_command(tmp_path):
    run_toy(tmp_path / "run", {"seed": 1})
    run_toy(tmp_path / "whole")
    again = {"overwrite": True, "monitors": [SignalAt(3, signal.SIGTERM)]}
    assert run_toy(tmp_path / "run", **again).step == 3
    reporter = Quiet()
    assert run_toy(tmp_path / "run", **again, reporter=reporter).step == 7
    assert reporter.began_at == (3, 7)
    assert_same_end(tmp_path / "run", tmp_path / "whole", 7)
    run_toy(tmp_path / "run", overwrite=True, reporter=reporter)
    assert reporter.began_at == (0, 7), "a complete run is trained again"


def test_overwrite_replaces_a_run_through_a_link_but_nothing_that_links_in_it_lead_to(tmp_path):
    for name in ("there", "disk"):
        (tmp_path / name).mkdir()
    (tmp_path / "run").symlink_to("there")
    run_toy(tmp_path / "run", {"train.duration": "1st"})
    (tmp_path / "disk" / "precious").touch()
    (tmp_path / "run" / "pictures").symlink_to(tmp_path / "disk")
    assert run_toy(tmp_path / "run", {"train.duration": "2st"}, overwrite=True).step == 2
    assert (tmp_path / "run").is_symlink()
    assert (tmp_path / "disk" / "precious").exists()


def test_a_run_that_fails_before_it_begins_leaves_the_old_one(tmp_path):
    run_toy(tmp_path / "run", {"train.duration": "2st"})
    with pytest.raises(ValueError, match="less than one batch"):
        run_toy(tmp_path / "run", {"data.epoch_samples": 3}, overwrite=True)
    with pytest.raises(CrashError):
        run_toy(tmp_path / "other", monitors=[CrashAt(0)])
    assert checkpoints(tmp_path / "run") == ["step_00000002"]


# ---------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(("step", "left"), [(-1, 0), (0, 1), (2, 4), (3, 5), (9, 5)])
def test_metrics_are_cut_back_to_a_step(tmp_path, step, left):
    run = RunDir(tmp_path)
    lines = [json.dumps({"kind": "train", "step": s}) + "\n" for s in (0, 1, 2, 2, 3)]
    run.metrics.write_text("".join(lines) + '{"kind": "tr')
    run.cut_metrics(step)
    assert run.metrics.read_text() == "".join(lines[:left])
