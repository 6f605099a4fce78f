"""A run on a mixture: its records, the same run again, and what is refused."""

from __future__ import annotations

import json
import signal
from functools import partial

import pytest

from nextblock.cli.pretrain import pretrain
from nextblock.data import ConcatSource, TooManyBadImages
from nextblock.train import RunDirError
from tiny_runs import (
    ALL_RANDOM,
    TINY,
    TINY_FLAGS,
    Quiet,
    SignalAt,
    assert_same_end,
    call_cli,
    metrics,
    refused,
    run_toy,
    write_images,
)
from toy import ToySource

SHARES = {"data.train": ("toy-0", "toy-1"), "data.weights": (0.75, 0.25)}
"""Of the 32 samples of an epoch 24 and 8; an epoch is four steps."""


def mixture(first: int = 30, second: int = 5, bad=()) -> dict[str, ConcatSource]:
    return {"train": ConcatSource([ToySource(first), ToySource(second, seed=1, bad=bad)])}


@pytest.fixture
def cli(capsys):
    return partial(call_cli, capsys)


@pytest.fixture
def folders(tmp_path):
    """Two folders of images, 20 and 4."""
    for name, count in (("A", 20), ("B", 4)):
        write_images(tmp_path / name, count)
    return tmp_path / "A", tmp_path / "B"


# ------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_run_on_a_mixture_stopped_anywhere_goes_on_bit_for_bit(tmp_path, workers):
    changes = {**ALL_RANDOM, **SHARES, "train.duration": "6st", "data.workers": workers}
    run_toy(tmp_path / "whole", {**changes, "data.workers": 0}, sources=mixture())
    for step in (1, 3, 4):
        stop = SignalAt(step, signal.SIGTERM)
        assert run_toy(tmp_path / "run", changes, sources=mixture(), monitors=[stop]).step == step
    run_toy(tmp_path / "run", changes, sources=mixture())
    assert_same_end(tmp_path / "run", tmp_path / "whole", 6)
    assert metrics(tmp_path / "run")[-1]["seen/toy-0"] + metrics(tmp_path / "run")[-1]["seen/toy-1"] == 48


def test_every_line_of_metrics_tells_how_much_of_each_source_was_seen(tmp_path):
    run_toy(tmp_path / "run", {**SHARES, "train.duration": "3ep"}, sources=mixture())
    lines = metrics(tmp_path / "run")
    assert [(line["seen/toy-0"], line["seen/toy-1"]) for line in lines[3::4]] == [(24, 8), (48, 16), (72, 24)]
    assert [line["seen/toy-0"] + line["seen/toy-1"] for line in lines] == list(range(8, 97, 8))
    assert [line["epoch"] for line in lines[3::4]] == [1, 2, 3]
    run_toy(tmp_path / "one")
    assert not any(name.startswith("seen/") for line in metrics(tmp_path / "one") for name in line)


def test_one_source_may_have_epochs_of_another_length(tmp_path):
    run_toy(tmp_path / "run", {"data.epoch_samples": 100, "train.duration": "1ep"})
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["epoch"] == 1


# ------------------------------------------------------------------------------------------ what is on record


def test_a_run_tells_which_source_of_a_mixture_has_changed(tmp_path):
    changes = {**SHARES, "train.duration": "1st"}
    run_toy(tmp_path / "run", changes, sources=mixture())
    recorded = json.loads((tmp_path / "run" / "source.json").read_text())["train"]
    assert (recorded["spec"], recorded["num_images"]) == ("toy-0 + toy-1", 35)
    assert [(part["spec"], part["num_images"]) for part in recorded["parts"]] == [("toy-0", 30), ("toy-1", 5)]
    with pytest.raises(RunDirError, match=r"data.train 'toy-1' has changed .*: 5 images then, 6 now"):
        run_toy(tmp_path / "run", changes, sources=mixture(second=6))
    with pytest.raises(RunDirError, match=r"data.train 'toy-0' has changed .*: 30 images then, 29 now"):
        run_toy(tmp_path / "run", changes, sources=mixture(first=29, second=6))
    run_toy(tmp_path / "run", changes, sources=mixture())


def test_other_weights_are_another_run(tmp_path):
    run_toy(tmp_path / "run", {**SHARES, "train.duration": "1st"}, sources=mixture())
    other = {**SHARES, "data.weights": (0.5, 0.5), "train.duration": "1st"}
    with pytest.raises(RunDirError, match=r"data.weights: \[0.75, 0.25\] there, \[0.5, 0.5\] now"):
        run_toy(tmp_path / "run", other, sources=mixture())


def test_unreadable_images_are_listed_with_their_source_and_limited_over_all(tmp_path):
    changes = {**SHARES, "train.duration": "1ep", "data.max_bad_fraction": 1 / 35}
    run_toy(tmp_path / "run", changes, sources=mixture(bad=(3,)))
    (line,) = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == {"name": "toy-1: toy-1[3]", "sample": 33, "reason": "truncated"}
    with pytest.raises(TooManyBadImages, match="2 of 35 files cannot be read"):
        run_toy(tmp_path / "other", changes, sources=mixture(bad=(3, 4)))


@pytest.mark.parametrize("changes", [{"data.weights": (0.999, 0.001)}, {"data.epoch_samples": 3}])
def test_a_mixture_that_cannot_be_is_refused_before_anything_is_written(tmp_path, changes):
    with pytest.raises(ValueError, match=r"which is not one of|less than one batch of 8"):
        run_toy(tmp_path / "run", {**SHARES, **changes}, sources=mixture())
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- the command line


def test_a_mixture_is_named_by_repeated_flags_and_resumed_by_the_same_command(cli, tmp_path, folders):
    first, second = folders
    words = (
        "pretrain",
        *TINY_FLAGS,
        "--data.train",
        first,
        "--out",
        tmp_path / "run",
        "--data.weights",
        "0.75",
    )
    words += ("--data.train", second, "--data.weights=0.25")
    assert cli(*words)[0] == 0
    assert metrics(tmp_path / "run")[-1][f"seen/{first}"] == 18
    assert metrics(tmp_path / "run")[-1][f"seen/{second}"] == 6
    assert cli(*words)[0] == 0
    message = refused(cli(*words, "--data.train", tmp_path / "C"))
    assert "data.train names 3 sources and data.weights 2" in message


def test_weights_without_sources_ask_for_as_many(cli, tmp_path):
    message = refused(
        cli("pretrain", "--data.weights", "0.8", "--data.weights", "0.2", "--out", tmp_path / "r")
    )
    assert (
        "name 2 sources, for data.weights 0.8, 0.2 in this order: --data.train DIR --data.train DIR"
        in message
    )


def test_python_takes_a_list_of_sources(tmp_path, folders):
    data = {"train": [str(folder) for folder in folders], "weights": [0.75, 0.25]}
    pretrain(TINY, out=tmp_path / "run", data=data, train={"duration": "1st"}, reporter=Quiet())
    assert metrics(tmp_path / "run")[0][f"seen/{folders[0]}"] <= 8
