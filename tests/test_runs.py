"""The heartbeat of a run, and the table that `nextblock runs` makes of it."""

import json
import shutil
import time
from datetime import UTC, datetime, timedelta

import pytest

from nextblock.atomic import exclusive
from nextblock.train import run_dir
from tiny_runs import After, call_cli, crash_toy, refused, run_toy


@pytest.fixture
def runs(capsys):
    """`runs(DIR)` -> the text of the table, and its rows by the name of the run."""

    def call(folder):
        code, out, _ = call_cli(capsys, "runs", folder, "--json")
        assert code == 0
        *lines, rows = out.splitlines()
        assert all(len(line) <= 80 for line in lines)
        return "\n".join(lines), {row["run"]: row for row in json.loads(rows)}

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stopped, a finished and a failed run, only looked at."""
    folder = tmp_path_factory.mktemp("runs")
    run_toy(folder / "a" / "stopped", stop=3)
    run_toy(folder / "done", monitors=[Knn()])
    crash_toy(folder / "z\x1b[2J", 5)
    shutil.copytree(folder / "done", folder / "done" / "pictures" / "copy")
    (folder / "other").mkdir()
    (folder / "other" / "config.yaml").touch()
    return folder


class Knn:
    every = "1st"

    def __call__(self, model, event):
        return {"knn/top1": 0.5 if event.step == 4 else 0.25}


@pytest.fixture
def silent(folder, tmp_path):
    """`silent(seconds, host=...)`: a copy of a run whose process was killed that long ago."""

    def make(seconds, **changes):
        run = shutil.copytree(folder / "a" / "stopped", tmp_path / "runs" / "run")
        beat = json.loads((run / "heartbeat.json").read_text())
        then = (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()
        beat |= {"status": "running", "time": then, **changes}
        (run / "heartbeat.json").write_text(json.dumps(beat))
        return run

    return make


def test_the_table_has_a_row_for_each_run_and_none_within_a_run(folder, runs):
    table, rows = runs(folder)
    assert {name: (row["status"], row["step"], row["total_steps"]) for name, row in rows.items()} == {
        "a/stopped": ("stopped", 3, 7),
        "done": ("finished", 7, 7),
        "z\x1b[2J": ("failed", 5, 7),
    }
    assert rows["done"]["best_knn"] == 0.5
    assert rows["done"]["loss"] > 0
    assert rows["z\x1b[2J"]["message"] == "division by zero"
    assert "\x1b" not in table
    assert [*runs(folder / "done")[1]] == ["done"], "a run by itself"


@pytest.mark.parametrize(
    ("seconds", "changes", "status", "message"),
    [
        (10, {}, "running", None),
        (60, {}, "failed", "no heartbeat for 1 min"),
        (60, {"host": "elsewhere"}, "running", None),
        (7300, {"host": "elsewhere"}, "failed", "no heartbeat for 2 h"),
    ],
)
def test_a_run_that_is_silent_has_failed(seconds, changes, status, message, silent, runs):
    row = runs(silent(seconds, **changes).parent)[1]["run"]
    assert (row["status"], row["message"]) == (status, message)


def test_a_run_that_holds_its_lock_is_running(silent, runs):
    run = silent(60)
    with exclusive(run):
        assert runs(run.parent)[1]["run"]["status"] == "running"
    (run / "heartbeat.json").unlink()  # as of earlier releases
    with exclusive(run):
        assert runs(run.parent)[1]["run"]["status"] == "running"
    assert runs(run.parent)[1]["run"]["status"] == "stopped"


@pytest.mark.parametrize("content", ["", '{"time": 3}', '{"time": "2026-01-01T00:00:00+00:00"}'])
def test_a_damaged_heartbeat_hides_no_other_run(content, silent, runs):
    run = silent(0)
    shutil.copytree(run, run.parent / ("x" * 100))
    (run / "heartbeat.json").write_text(content)
    damaged, sound = runs(run.parent)[1].values()
    assert (damaged["status"], sound["status"]) == ("unreadable", "running")
    assert str(run / "heartbeat.json") in damaged["message"]


def test_a_run_beats_while_it_trains_and_a_finished_one_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "HEARTBEAT_EVERY_S", 0.01)
    file, seen = tmp_path / "run" / "heartbeat.json", []

    def look(*_):
        wanted_until = time.monotonic() + 30
        while not seen and time.monotonic() < wanted_until:
            beat = json.loads(file.read_text())
            seen.extend([beat] if beat["step"] == 4 else [])

    run_toy(tmp_path / "run", monitors=[After(4, look)])
    assert seen[0]["status"] == "running"
    ended = file.read_bytes()
    run_toy(tmp_path / "run")
    assert file.read_bytes() == ended
    assert not list((tmp_path / "run").glob(".writing*"))


def test_runs_refuses_what_is_no_directory_and_finds_none_in_an_empty_one(capsys, runs, tmp_path):
    refused(call_cli(capsys, "runs", tmp_path / "none"))
    assert runs(tmp_path)[1] == {}
