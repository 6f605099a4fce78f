"""What may train in a directory: the same run, known by its settings and its images, and nothing else."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nextblock import atomic, pretrain
from nextblock.atomic import InUseError, WriteError, exclusive, make_directory
from nextblock.config import RunConfig
from nextblock.data import ConcatSource
from nextblock.errors import UsageError
from nextblock.settings import from_dict
from nextblock.train import DamagedRunError, RunDir, RunDirError
from tiny_runs import (
    After,
    Quiet,
    SignalAt,
    assert_same_end,
    checkpoints,
    contents,
    logged_steps,
    run_toy,
    settings,
    write_images,
)
from toy import ToySource

MIXED = {"data.train": ("toy-0", "toy-1"), "data.weights": (0.75, 0.25)}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run stopped after three steps, only looked at."""
    run = tmp_path_factory.mktemp("stopped")
    run_toy(run, stop=3)
    return run


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of that run."""
    return shutil.copytree(stopped, tmp_path / "run")


def read_yaml(run):
    return yaml.safe_load((run / "config.yaml").read_text())


def open_with(run, changes=None, sources=None):
    RunDir(run).check(settings(changes), sources or {"train": ToySource(40)}, overwrite=False)


@pytest.mark.parametrize(
    ("changes", "listed"),
    [
        ({"train.duration": "9st"}, "train.duration: 7st there, 9st now"),
        ({"train.micro_batch_size": 4}, "train.micro_batch_size: none there, 4 now"),
        (MIXED, "data.weights: none there, 0.75,0.25 now"),
    ],
)
def test_another_setting_is_another_run_and_both_values_are_listed(stopped, changes, listed):
    message = f"holds another run ({listed}); choose another --out"
    with pytest.raises(RunDirError, match=rf"{re.escape(message)}.*--overwrite to start over") as raised:
        open_with(stopped, changes)
    assert ("--model.init" in str(raised.value)) == ("train.duration" in changes), "how to train longer"


def mixture(first=30, second=5):
    sources = [ToySource(first), ToySource(second, seed=1)]
    return {"train": ConcatSource(sources), "val": ToySource(9, seed=2)}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"train": ToySource(41)}, "40 images then, 41 now"),
        ({"train": ToySource(40, seed=1)}, "40 images then, 40 now, or other names"),
        (
            {"train": ToySource(40), "val": ToySource(9)},
            r"was started without data\.val; leave it out to resume",
        ),
    ],
)
def test_other_images_are_refused_with_their_numbers(stopped, sources, message):
    with pytest.raises(RunDirError, match=message):
        open_with(stopped, sources=sources)


def test_the_changed_source_of_a_mixture_is_named_and_images_for_validation_are_not_left_out(tmp_path):
    run_toy(tmp_path, MIXED, sources=mixture(), stop=0)
    open_with(tmp_path, MIXED, mixture())
    for sources, message in (
        (mixture(30, 6), "'toy-1' has changed .*: 5 images then, 6 now"),
        (mixture(29, 6), "'toy-0' has changed .*: 30 images then, 29 now"),
        ({"train": mixture()["train"]}, r"validates on 'toy-2'; name these images again: --data\.val"),
    ):
        with pytest.raises(RunDirError, match=message):
            open_with(tmp_path, MIXED, sources)


def test_images_may_move_between_two_starts(tmp_path, monkeypatch):
    write_images(tmp_path / "here", 10)
    monkeypatch.setattr("nextblock.pretraining._monitors", lambda *_: [SignalAt(2, signal.SIGINT)])
    reporter = Quiet()
    for place, stop in (("here", 2), ("there", 4)):
        (tmp_path / "here").rename(tmp_path / place)
        config = settings({"train.duration": "4st", "data.train": str(tmp_path / place)})
        assert pretrain(config, out=tmp_path / "run", reporter=reporter).step == stop
    assert reporter.began_at == (2, 4)


def test_records_tell_the_settings_the_images_and_the_decoder_without_which_it_is_refused(
    stopped, monkeypatch
):
    assert from_dict(RunConfig, read_yaml(stopped)) == settings()
    source = json.loads((stopped / "source.json").read_text())
    assert source["train"] == {"spec": "toy-0", "num_images": 40, "fingerprint": "toy-0-40"}
    assert source["decoder"] in ("torchcodec", "pillow")
    monkeypatch.setattr("nextblock.train.run_dir.jpeg_decoder", lambda _: "another")
    with pytest.raises(RunDirError, match=f"was decoding JPEG with {source['decoder']}.* with another"):
        run_toy(stopped)


def test_resuming_records_the_settings_of_now(run):
    run_toy(run, {"monitor.log_every": "2st", "checkpoint.keep": 1})
    written = read_yaml(run)
    assert (written["monitor"]["log_every"], written["checkpoint"]["keep"]) == ("2st", 1)
    assert checkpoints(run) == ["step_00000007"]
    assert logged_steps(run) == [1, 2, 3, 4, 6, 7]


def test_a_run_records_the_precision_that_auto_stood_for_and_keeps_it(tmp_path, monkeypatch):
    for native, stop in (("bf16", 3), ("fp32", None)):
        monkeypatch.setattr("nextblock.train.loop.native_precision", lambda _, native=native: native)
        run_toy(tmp_path / "run", {"train.precision": "auto"}, stop=stop)
    assert read_yaml(tmp_path / "run")["train"]["precision"] == "bf16"
    run_toy(tmp_path / "whole", {"train.precision": "bf16"})
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_run_from_before_a_setting_resumes_where_that_has_its_default(run):
    told, config = read_yaml(run), run / "config.yaml"
    del told["data"]["val_crop"]
    config.write_text(yaml.safe_dump(told))
    open_with(run)
    with pytest.raises(RunDirError, match=r"data.val_crop: center there, squash now"):
        open_with(run, {"data.val_crop": "squash"})
    config.write_text(yaml.safe_dump({**told, "dream": 1}))
    with pytest.raises(RunDirError, match=r"config.yaml is not of this version .* unknown setting 'dream'"):
        open_with(run)


PART = '{"train": {"spec": "a", "num_images": 1, "fingerprint": "", "parts": [{}]}}'
WEIGHTS = "--model.init RUN with another --out"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", None, f"is a run that lacks config.yaml; restore it .*{WEIGHTS}"),
        ("config.yaml", "a: [", rf"is damaged \(.+\); .*{WEIGHTS}"),
        *(
            ("source.json", text, rf"is damaged \(.+\); .*{WEIGHTS}")
            for text in ("{", "{}", '{"train": 5}', PART)
        ),
        *(("environment.json", text, "is damaged .* empty list") for text in ("", "5", '{"host": "a"}')),
        *(("baselines.json", text, "is damaged .*; remove it") for text in ("", '{"zero": null}')),
        ("metrics.jsonl", "x\n", r"is damaged \(.+\); move it away"),
    ],
)
def test_a_damaged_file_is_named_with_cause_and_remedy(run, name, content, message):
    (run / name).unlink() if content is None else (run / name).write_text(content)
    with pytest.raises(DamagedRunError, match=message) as raised:
        run_toy(run)
    assert name in str(raised.value)


def test_a_second_process_is_refused_at_once_and_changes_nothing(run):
    def intrude(_, event):
        with pytest.raises(InUseError, match=f"process {os.getpid()}"), exclusive(event.run_dir):
            pass

    other = (
        "import sys, time; from pathlib import Path; from nextblock.atomic import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", other, str(run)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        before = contents(run)
        try:
            with pytest.raises(InUseError, match=f"is being written by process {process.pid} on .*, since"):
                run_toy(run)
        finally:
            process.kill()
        assert contents(run) == before
    # The system frees the lock of a process that is killed; then this one holds it while it trains.
    assert run_toy(run, monitors=[After(5, intrude)]).step == 7


@pytest.mark.parametrize(
    ("what", "told"), [("", "run was removed or emptied"), ("metrics.jsonl", "metrics.jsonl was removed")]
)
def test_a_run_deleted_under_way_ends_at_the_next_checkpoint_with_an_error(tmp_path, what, told):
    def delete(_, event):
        path = event.run_dir / what
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    with pytest.raises(WriteError, match=told):
        run_toy(tmp_path / "run", {"checkpoint.every": "3st"}, monitors=[After(2, delete)])
    assert not checkpoints(tmp_path / "run")


def test_log_files_and_what_a_killed_start_left_do_not_occupy_a_directory_and_logs_survive(tmp_path):
    for name in ("slurm-123.out", "train.log", "err.err", ".writing-environment.json", "source.json"):
        (tmp_path / name).write_text("words")
    assert run_toy(tmp_path, {"train.duration": "1st"}).step == 1
    run_toy(tmp_path, {"seed": 1, "train.duration": "1st"}, overwrite=True)
    assert (tmp_path / "slurm-123.out").read_text() == "words"


@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml"])
def test_a_directory_with_other_files_is_refused_even_with_overwrite(tmp_path, name):
    (tmp_path / name).write_text("years: of work")
    for overwrite in (False, True):
        with pytest.raises(RunDirError, match="exists and is not a run; choose another --out, or empty it"):
            run_toy(tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == {tmp_path / name: b"years: of work"}, "not even a lock"


def test_a_place_that_cannot_have_a_directory_is_refused_by_cause(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    for path in ("file", "."):
        with pytest.raises(RunDirError, match="exists and is not a run"):
            run_toy(Path(path))
    for path, why in {
        "file/run": "file is a file",
        "link": "link is a link to nowhere, which does not exist",
        "link/runs/1": "link is a link to nowhere, which does not exist",
        "/proc/run": "No such file or directory",
    }.items():
        told = f"^cannot make or write the directory {path}: {why}; choose another place$"
        with pytest.raises(UsageError, match=told):
            run_toy(Path(path))
        with pytest.raises(UsageError, match=told):
            make_directory(Path(path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.parametrize("is_new", [True, False])
def test_a_full_disk_is_told_and_no_directory_is_left(tmp_path, monkeypatch, is_new):
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", path)

    monkeypatch.setattr(atomic, "mark_output", full)
    if not is_new:
        (tmp_path / "out").mkdir()
    told = r"could not make or write the directory .*out: No space left on device; make room"
    with pytest.raises(WriteError, match=told), exclusive(tmp_path / "out"):
        pass
    assert (tmp_path / "out").exists() == (not is_new)


def test_an_overwritten_run_begins_anew_and_if_stopped_is_resumed_by_the_same_command(run, tmp_path):
    begun, changes = [], {"optim.lr": 0.5, "train.duration": "4st"}
    for stop in (2, None, None):
        reporter = Quiet()
        result = run_toy(run, changes, overwrite=True, reporter=reporter, stop=stop)
        begun.append((*reporter.began_at, result.step, checkpoints(run), logged_steps(run)))
    assert begun == [
        (0, 4, 2, ["step_00000002"], [1, 2]),
        (2, 4, 4, ["step_00000002", "step_00000004"], [1, 2, 3, 4]),
        (0, 4, 4, ["step_00000004"], [1, 2, 3, 4]),  # a complete run is trained again
    ]
    run_toy(tmp_path / "a" / "whole", changes)  # missing parents are made
    assert_same_end(run, tmp_path / "a" / "whole", 4)


def test_overwrite_replaces_a_run_through_a_link_but_nothing_that_links_in_it_lead_to(run, tmp_path):
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "precious").touch()
    (run / "pictures").symlink_to(tmp_path / "disk")
    assert run_toy(tmp_path / "link", overwrite=True, stop=2).step == 2, "not that of step 3 resumed"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "precious").exists()
