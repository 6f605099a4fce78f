"""A run on a mixture: its records and what is refused."""

from __future__ import annotations

import json

import pytest

from nextblock.data import ConcatSource, TooManyBadImages
from nextblock.pretraining import pretrain
from nextblock.train import RunDirError
from tiny_runs import TINY, TINY_FLAGS, Quiet, call_cli, metrics, refused, run_toy, write_images
from toy import ToySource

SHARES = {"data.train": ("toy-0", "toy-1"), "data.weights": (0.75, 0.25)}
"""Of the 32 samples of an epoch 24 and 8; an epoch is four steps."""


def mixture(first: int = 30, second: int = 5, bad=()) -> dict[str, ConcatSource]:
    return {"train": ConcatSource([ToySource(first), ToySource(second, seed=1, bad=bad)])}


@pytest.fixture
def folders(tmp_path):
    """Two folders of images, 20 and 4."""
    for name, count in (("A", 20), ("B", 4)):
        write_images(tmp_path / name, count)
    return str(tmp_path / "A"), str(tmp_path / "B")


def test_every_line_of_metrics_tells_how_much_of_each_source_was_seen(tmp_path):
    run_toy(tmp_path, {**SHARES, "train.duration": "3ep"}, sources=mixture())
    lines = metrics(tmp_path)
    assert [(line["seen/toy-0"], line["seen/toy-1"]) for line in lines[3::4]] == [(24, 8), (48, 16), (72, 24)]
    assert [line["seen/toy-0"] + line["seen/toy-1"] for line in lines] == list(range(8, 97, 8))
    assert [line["epoch"] for line in lines[3::4]] == [1, 2, 3]


def test_a_run_tells_which_source_or_weight_of_a_mixture_has_changed(tmp_path):
    changes = {**SHARES, "train.duration": "1st"}
    run_toy(tmp_path, changes, sources=mixture())
    recorded = json.loads((tmp_path / "source.json").read_text())["train"]
    assert (recorded["spec"], recorded["num_images"]) == ("toy-0 + toy-1", 35)
    assert [(part["spec"], part["num_images"]) for part in recorded["parts"]] == [("toy-0", 30), ("toy-1", 5)]
    with pytest.raises(RunDirError, match=r"data.train 'toy-1' has changed .*: 5 images then, 6 now"):
        run_toy(tmp_path, changes, sources=mixture(second=6))
    with pytest.raises(RunDirError, match=r"data.train 'toy-0' has changed .*: 30 images then, 29 now"):
        run_toy(tmp_path, changes, sources=mixture(first=29, second=6))
    with pytest.raises(RunDirError, match=r"data.weights: 0.75,0.25 there, 0.5,0.5 now"):
        run_toy(tmp_path, {**changes, "data.weights": (0.5, 0.5)}, sources=mixture())
    run_toy(tmp_path, changes, sources=mixture())


def test_unreadable_images_are_listed_with_their_source_and_limited_over_all(tmp_path):
    changes = {**SHARES, "train.duration": "1ep", "data.max_bad_fraction": 1 / 35}
    run_toy(tmp_path / "run", changes, sources=mixture(bad=(3,)))
    (line,) = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == {"name": "toy-1: toy-1[3]", "sample": 33, "reason": "truncated"}
    with pytest.raises(TooManyBadImages, match="2 of 35 files cannot be read"):
        run_toy(tmp_path / "other", changes, sources=mixture(bad=(3, 4)))


def test_a_mixture_is_named_by_repeated_flags_and_resumed_by_the_same_command(capsys, tmp_path, folders):
    first, second = folders
    words = ["pretrain", *TINY_FLAGS, "--data.train", first, "--out", tmp_path / "run"]
    words += ["--data.weights", "0.75", "--data.train", second, "--data.weights=0.25"]
    for _ in range(2):
        assert call_cli(capsys, *words)[0] == 0
        last = metrics(tmp_path / "run")[-1]
        assert (last[f"seen/{first}"], last[f"seen/{second}"]) == (18, 6)
    message = refused(call_cli(capsys, *words, "--data.train", tmp_path / "C"))
    assert "data.train names 3 sources and data.weights 2" in message


def test_python_takes_a_list_of_sources(tmp_path, folders):
    data = {"train": list(folders), "weights": [0.75, 0.25]}
    pretrain(TINY, out=tmp_path / "run", data=data, train={"duration": "1st"}, reporter=Quiet())
    assert metrics(tmp_path / "run")[0][f"seen/{folders[0]}"] <= 8
