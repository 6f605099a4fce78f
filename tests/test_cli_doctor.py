"""`nextblock doctor`: what it prints and writes, and the exit code that tells."""

from __future__ import annotations

import json
import tarfile
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from nextblock.cli.doctor import _progress
from tiny_runs import call_cli, refused, write_images

FLAGS = (
    "--workers",
    "0",
    "--image_size",
    "16",
    "--patch_size",
    "4",
    "--block_size",
    "2",
    "--data.normalize",
    "auto",
)


@pytest.fixture
def cli(capsys):
    """`cli("info", "RUN")` -> exit code, standard output, standard error."""
    return partial(call_cli, capsys)


@pytest.fixture
def healthy(tmp_path) -> Path:
    write_images(tmp_path / "images", 12)
    return tmp_path / "images"


@pytest.fixture
def broken(tmp_path) -> Path:
    """Twelve images of which twelve more cannot be read."""
    write_images(tmp_path / "broken", 12, broken=12)
    return tmp_path / "broken"


def last_json(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def test_a_healthy_folder_ends_with_code_0(cli, healthy):
    code, out, _ = cli("doctor", healthy, *FLAGS)
    assert code == 0
    assert out.splitlines()[-1] == "healthy"
    assert "16 to 16, median 16" in out
    assert "4x4 patches in 4 blocks of 2x2" in out
    assert "PNG 12" in out


def test_too_many_broken_files_end_with_code_1_and_the_reason(cli, broken, tmp_path):
    out_file = tmp_path / "new" / "report.json"
    code, out, _ = cli("doctor", broken, *FLAGS, "--out", out_file, "--json")
    assert code == 1
    lines = out.splitlines()
    assert "problem: too many broken files: 12 of 24 files" in out
    assert lines[-2] == "not fit for training, because of: too many broken files"
    assert sum(line.startswith("unreadable: broken_") for line in lines) == 10
    assert "unreadable: broken_01.png: the file is empty (0 bytes)" in lines
    assert "... and 2 more; --out FILE.json lists all" in lines
    told = last_json(out)
    assert told == json.loads(out_file.read_text())
    assert (told["healthy"], told["decided_by"]) == (False, "too many broken files")
    assert [bad["name"] for bad in told["train"]["bad"]] == [f"broken_{i:02d}.png" for i in range(12)]


def test_a_shard_that_is_cut_off_is_a_problem(cli, tmp_path):
    with tarfile.open(tmp_path / "cut.tar", "w") as tar:
        write_images(tmp_path / "images", 4)
        tar.add(tmp_path / "images", "images")
    with tarfile.open(tmp_path / "cut.tar") as tar:
        end = tar.getmembers()[-1].offset_data + 9
    content = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:end])
    code, out, _ = cli("doctor", tmp_path / "cut.tar", *FLAGS, "--json")
    assert code == 1
    assert "problem: damaged shards: 1 shard of " in out
    told = last_json(out)
    assert told["decided_by"] == "damaged shards"
    assert told["train"]["damaged_shards"][0]["shard"] == "cut.tar"


def test_a_terminal_shows_a_bar_with_the_number_of_unreadable_files():
    screen = StringIO()
    with _progress(Console(file=screen, force_terminal=True, width=100), "IMAGES", 12) as progress:
        progress(7, 2)
    shown = Text.from_ansi(screen.getvalue()).plain
    assert "IMAGES" in shown
    assert "7/12 2 unreadable" in shown


def test_the_limit_of_broken_files_is_the_runs(cli, broken):
    code, out, _ = cli("doctor", broken, *FLAGS, "--data.max_bad_fraction", "0.5")
    assert code == 0
    assert "warning: broken files: 12 of 24 files" in out


def test_a_size_that_does_not_divide_ends_with_code_1(cli, healthy):
    code, out, _ = cli("doctor", healthy, "--workers", "0", "--image_size", "224", "--json")
    assert code == 1
    assert last_json(out)["decided_by"] == "image size"
    assert "use model.image_size 192 or 256" in out
    assert cli("doctor", healthy, "--workers", "0", "--model", "xtra-tiny")[0] == 0


def test_validation_images_that_are_trained_on_end_with_code_1(cli, healthy, tmp_path):
    write_images(tmp_path / "val", 3)
    code, out, _ = cli("doctor", healthy, *FLAGS, "--val", tmp_path / "val", "--json")
    assert code == 1
    assert last_json(out)["decided_by"] == "leakage"
    assert last_json(out)["leakage"]["images"] == 3
    assert "validation: " in out


def test_several_sources_are_examined_as_one(cli, healthy, tmp_path):
    write_images(tmp_path / "same", 12)
    code, out, _ = cli("doctor", healthy, tmp_path / "same", *FLAGS, "--json")
    assert code == 1
    assert last_json(out)["decided_by"] == "duplicates"
    assert last_json(out)["train"]["duplicates"]["groups"] == 12


def test_the_workers_that_a_rate_needs_are_told(cli, healthy):
    out = cli("doctor", healthy, *FLAGS, "--images_per_s", "1000000", "--json")[1]
    told = last_json(out)
    assert told["images_per_core_s"] > 0
    assert told["workers_needed"] > told["cores"]
    assert "warning: starving: 1,000,000 images/s need" in out


def test_a_sample_is_examined_where_one_is_asked_for(cli, healthy):
    told = last_json(cli("doctor", healthy, *FLAGS, "--samples", "5", "--json")[1])
    assert (told["train"]["images"], told["train"]["examined"]) == (12, 5)


def test_worker_processes_find_the_same(cli, broken):
    told = [
        last_json(cli("doctor", broken, *FLAGS[2:], "--workers", workers, "--json")[1]) for workers in (0, 1)
    ]
    for values in told:
        values["train"].pop("elapsed_s")
    assert told[0]["train"] == told[1]["train"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "SRC must be given"),
        (("nowhere",), "there is no such directory"),
        (("digits", "--model", "xtra-b17"), "unknown preset 'xtra-b17'"),
        (("digits", "--samples", "0"), "samples is 0; use at least 1"),
        (("digits", "--block_size", "0"), "block_size is 0; use at least 1"),
        (("digits", "--images_per_s", "0"), "images_per_s is 0.0; use a number above 0"),
        (("digits", "--sample", "5"), "--sample; did you mean --samples?"),
        (("digits", "--data.workers", "5"), "unknown setting --data.workers"),
        (("digits", "--data.max_bad_fraction", "2"), "it must lie in [0, 1]"),
    ],
)
def test_wrong_usage_ends_with_code_2(cli, words, message):
    assert message in refused(cli("doctor", *words))


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_read(cli, tmp_path):
    assert "cannot be written: Is a directory" in refused(cli("doctor", "digits", "--out", tmp_path))
