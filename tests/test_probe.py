"""Probes from end to end: what is chosen on what, what is measured, written, refused, resumed, shared."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import nextblock
from nextblock.data import TooManyBadImages
from nextblock.errors import UsageError
from nextblock.evaluate import evaluation, splits
from nextblock.evaluate.evaluation import Stopped
from nextblock.evaluate.probe import run as probe_module
from nextblock.evaluate.probe.heads import Grid
from nextblock.evaluate.probe.settings import RECIPES, ProbeSettings
from nextblock.evaluate.results import SATURATED
from nextblock.models.heads import ImageClassifier
from ranks import run_ranks
from toy import DATA, ToySource, one_thread, toy_model  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("coarse_pictures")
HEADS = ("linear", "attentive", "ep")
QUICK = {
    "model": "RUN",
    "train": "toy-0",
    "test": "toy-1",
    "epochs": 12,
    "batch_size": 16,
    "lr": (1e-2,),
    "attentive_heads": 4,
    "baselines": False,
    "device": "cpu",
}


def know(replace):
    """Let an evaluation find the toy model and toy sources; parts of "bad" and "rotten" are unreadable."""
    sources = {
        "toy-0": ToySource(96),
        "toy-1": ToySource(48, seed=1),
        "toy-2": ToySource(40, seed=2),
        "single": ToySource(4, seed=3),
        "lacking": ToySource(3, seed=4),
        "shuffled": ToySource(400, seed=5, shuffled=True),
        "shuffled-test": ToySource(400, seed=6, shuffled=True),
        "bad": ToySource(96, bad=(3, 50)),
        "rotten": ToySource(96, bad=range(0, 96, 2)),
    }
    replace(splits, "open_source", lambda spec, data: sources[spec])
    replace(evaluation, "open_model", lambda *_: (toy_model(), DATA))
    return sources


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Sources and model are found by these names; the sources."""
    return know(monkeypatch.setattr)


def run(**changes):
    return nextblock.probe(**{**QUICK, **changes})


def scores(result):
    """Everything that a probe measured."""
    names = ("encoder", "head", "lr", "layers", "top1", "top5", "loss", "calibration_error")
    grid = [tuple(map(str, (one[n] for n in names[:-1]))) for one in result.facts["grid"]]
    return [tuple(str(row[name]) for name in names) for row in result.rows], grid


# --------------------------------------------------------------------------------------- what is measured


def test_all_heads_tell_colours_apart_and_the_baselines_stand_beside():
    result = run(baselines=True)
    rows = [(row["encoder"], row["head"]) for row in result.rows]
    assert rows == [
        *(("model", head) for head in HEADS),
        *(("untrained", head) for head in HEADS),
        ("pixels 16x16", "linear"),
        ("colour histogram", "linear"),
    ]
    assert min(row["top1"] for row in result.rows) > 0.9
    assert all(row["top5"] == 1 for row in result.rows)  # of four classes
    assert all("lead" in row for row in result.rows[3:])
    assert SATURATED in result.notes
    assert result.facts["split_images"] == {"train": 96, "test": 48}
    assert np.array(list(result.facts["confusion"].values())).shape == (3, 4, 4)  # of the model's heads alone


def test_shuffled_labels_leave_the_chosen_heads_at_chance():
    result = run(train="shuffled", test="shuffled-test", lr=(1e-3, 1e-2), batch_size=64)
    assert all(abs(row["top1"] - 0.25) < 0.08 for row in result.rows)


@pytest.mark.parametrize(
    ("changes", "chosen_on", "images"),
    [
        ({"test": "toy-1"}, "choice", {"train": 88, "choice": 8, "test": 48}),
        ({"test": "toy-1", "val": "toy-2"}, "val", {"train": 96, "val": 40, "test": 48}),
        ({"test": None, "val": "toy-2"}, "val", {"train": 88, "val": 40, "held-out": 8}),
        ({"test": None}, "choice", {"train": 80, "choice": 8, "held-out": 8}),
        ({"test": "toy-1", "val": "toy-2", "lr": (1e-2,)}, None, {"train": 96, "test": 48}),
        ({"test": None, "lr": (1e-2,)}, None, {"train": 88, "held-out": 8}),
    ],
)
def test_winners_are_chosen_on_other_images_than_they_are_measured_on(changes, chosen_on, images):
    result = run(**{"lr": (1e-3, 1e-2), "heads": ("linear",), "epochs": 1, **changes})
    assert result.facts["chosen_on"] == chosen_on
    assert result.facts["split_images"] == images
    assert result.rows[0]["images"] == list(images.values())[-1]


def test_the_images_of_the_three_purposes_are_disjoint(monkeypatch):
    made, original = [], probe_module._Probe.measure
    monkeypatch.setattr(probe_module._Probe, "measure", lambda self: made.append(self) or original(self))
    run(test=None, lr=(1e-3, 1e-2), heads=("linear",), epochs=1)
    numbers = np.concatenate([part.numbers for part in made[0].parts])
    assert sorted(numbers) == list(range(96))


def test_the_winner_is_the_head_that_a_probe_of_it_alone_gives():
    """Also on val: a candidate's accuracy there is that of a probe of it alone, measured on val."""
    grid = run(val="toy-2", lr=(1e-3, 1e-2), epochs=2)
    for row in grid.rows:
        alone = {"heads": (row["head"],), "lr": (row["lr"],), "epochs": 2}
        assert run(**alone).rows[0]["loss"] == row["loss"]
        (on_val,) = run(**alone, test="toy-2").rows
        (candidate,) = (one for one in grid.facts["grid"] if one["is_winner"] and one["head"] == row["head"])
        assert (candidate["top1"], candidate["loss"]) == (on_val["top1"], on_val["loss"])


def test_of_equal_accuracies_the_lower_loss_wins():
    grid = run(lr=(2e-3, 1e-2), heads=("linear",), epochs=30).facts["grid"]
    assert [one["top1"] for one in grid] == [1, 1]
    assert grid[0]["loss"] > grid[1]["loss"]
    assert [one["is_winner"] for one in grid] == [False, True]


def test_a_grid_whose_best_rate_is_at_its_end_is_extended(monkeypatch):
    # So small rates that heads learn next to nothing: the largest is the best, and the larger the better.
    few = {**vars(RECIPES["xtra"]), "lr": (2e-5, 3e-5)}
    monkeypatch.setitem(RECIPES, "xtra", type(RECIPES["xtra"])(**few))
    result = run(lr=None, heads=("linear",), epochs=1)
    rates = [one["lr"] for one in result.facts["grid"]]
    assert rates == pytest.approx([2e-5, 3e-5, *(3e-5 * 2**n for n in range(1, 7))])
    assert any("extended" in note and "linear" in note for note in result.notes)
    assert len(run(heads=("linear",), epochs=1).facts["grid"]) == 1  # a rate that is given stays alone


def test_heads_that_diverge_lose_and_stop_no_other():
    alone = run(heads=("linear",), val="toy-2")
    result = run(heads=("linear",), val="toy-2", lr=(1e-2, 1e38), clip_grad=None)
    assert [one["is_diverged"] for one in result.facts["grid"]] == [False, True]
    assert result.facts["grid"][1]["top1"] is None
    assert any(note == "Diverged: model linear at 1e+38." for note in result.notes)
    assert run(heads=("linear",), clip_grad=None).rows[0]["lr"] == alone.rows[0]["lr"] == 1e-2
    with pytest.raises(UsageError, match=r"model: the linear head diverged at learning rate 1e\+38"):
        run(heads=("linear",), lr=(1e38,), clip_grad=None)


def test_a_test_set_that_lacks_a_class_is_measured_and_this_is_said():
    result = run(test="lacking")
    assert result.rows[0]["images"] == 3
    assert any("toy-4 has no image of 1 class of train: d" in note for note in result.notes)


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_unreadable_images_are_left_out_and_counted(augment, tmp_path):
    result = run(train="bad", augment=augment, heads=("linear",), out=str(tmp_path / "out"))
    assert result.facts["bad_images"] == {"train": 2, "test": 0} if augment == "none" else {"train": 2}
    assert result.facts["split_images"]["train"] == 94
    assert result.rows[0]["top1"] > 0.9
    assert len((tmp_path / "out/quarantine.jsonl").read_text().splitlines()) == 2


def test_more_unreadable_crops_than_allowed_stop_the_probe(monkeypatch):
    strict = (toy_model(), replace(DATA, max_bad_fraction=0.1))
    monkeypatch.setattr(evaluation, "open_model", lambda *_: strict)
    with pytest.raises(TooManyBadImages, match="of the 96 images of toy-0 cannot be read"):
        run(train="rotten", augment="crop")


def test_crops_are_new_in_every_epoch_and_repeatable():
    crops = {"augment": "crop", "heads": ("linear", "ep"), "lr": (1e-3, 1e-2), "epochs": 2}
    first, again, other = run(**crops), run(**crops), run(**crops, seed=1)
    assert scores(first) == scores(again) != scores(other)
    assert scores(run(**{**crops, "augment": "none"})) != scores(first)


def test_features_beyond_cache_gb_are_refused_with_the_size_and_the_remedy():
    with pytest.raises(
        UsageError, match=r"144 images take 0\.000\d+ GB, more than cache_gb 1e-06.*--augment crop"
    ):
        run(cache_gb=1e-6)
    assert run(cache_gb=1e-6, augment="crop", epochs=1).rows


# --------------------------------------------------------------------------------- files, resume, processes


def test_winners_are_written_as_classifiers_of_the_accuracy_that_was_measured(tmp_path, known):
    out = tmp_path / "out"
    result = run(out=str(out), lr=(1e-3, 1e-2), epochs=3)
    there = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    files = {"probe.json", "probe.md", "probe.csv", "grid.csv", "right.npz", "figures"}
    assert there == files | set(HEADS)
    drawn = {f"{name}.png" for name in ("probe", "attention-ep", *(f"confusion-{head}" for head in HEADS))}
    assert {path.name for path in (out / "figures").iterdir()} == drawn | {".nextblock"}
    assert len((out / "grid.csv").read_text().splitlines()) == 1 + 6
    test = known["toy-1"]
    images = torch.stack([test.read(i) for i in range(len(test))]).float() / 255
    for head in HEADS:
        classifier = nextblock.load(out / head)
        assert isinstance(classifier, ImageClassifier)
        mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        with torch.no_grad():
            right = classifier((images - mean) / std).argmax(1).numpy() == test.labels
        assert right.mean() == result.row(head=head)["top1"]


def test_the_same_probe_is_read_and_another_refused(tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    first = run(out=out, epochs=1)
    monkeypatch.setattr(Grid, "learn", None)
    again = run(out=out, epochs=1)
    assert scores(again) == scores(first)
    with pytest.raises(UsageError, match="another result"):
        run(out=out, epochs=2)


@pytest.mark.parametrize(
    ("changes", "stop_at"),
    [
        ({}, 5),
        ({"baselines": True}, 30),
        ({"augment": "crop"}, 5),
        ({"augment": "crop", "lr": (1e-3, 1e-2)}, 9),
    ],
)
def test_a_stopped_probe_ends_as_if_it_had_not_been_stopped(changes, stop_at, tmp_path, monkeypatch):
    settings = {"epochs": 3, "heads": ("linear", "ep"), **changes}
    expected = run(**settings)
    steps, learn = [], Grid.learn

    def stopping(self, features, labels, step):
        learn(self, features, labels, step)
        steps.append(step)
        if len(steps) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Grid, "learn", stopping)
    out = tmp_path / "out"
    with pytest.raises(Stopped, match="the same command resumes"):
        run(**settings, out=str(out))
    assert not (out / "probe.json").exists()
    result = run(**settings, out=str(out))
    assert scores(result) == scores(expected)
    assert len(steps) == len(set(steps)) * (4 if "baselines" in changes else 1)  # none was taken twice
    assert not (out / "heads").exists()
    assert not (out / "features").exists()


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_two_processes_find_what_one_finds(augment, tmp_path):
    settings = {"augment": augment, "epochs": 2, "lr": (1e-3, 1e-2), "baselines": True}
    expected = run(**settings)
    first, second = run_ranks(2, _on_a_rank, {**settings, "out": str(tmp_path / "out")})
    times = [row.pop("elapsed_s") for row in (*first, *second)]
    assert first == second
    assert min(times) > 0
    written = json.loads((tmp_path / "out/probe.json").read_text())["rows"]
    assert [row["loss"] for row in written] == [row["loss"] for row in first]
    for mine, theirs in zip(expected.rows, first, strict=True):
        assert all(mine[name] == theirs[name] for name in ("encoder", "head", "lr"))
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert isinstance(nextblock.load(tmp_path / "out/ep"), ImageClassifier)


def _on_a_rank(settings):
    know(setattr)
    return list(run(**settings).rows)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": ()}, "heads is empty"),
        ({"heads": ("linear", "linear")}, "each once"),
        ({"layers": ("last0",)}, "layers is 'last0'"),
        ({"batch_size": 1}, "from 2"),
        ({"lr": (1e-6,)}, "end_lr 1e-05 is above lr 1e-06"),
        ({"warmup_epochs": 12.0}, "warm up for fewer"),
        ({"tokens": ("class",), "heads": ("ep",)}, "linear heads"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        ProbeSettings(**{**QUICK, **changes})


def test_a_source_of_single_images_cannot_be_divided():
    with pytest.raises(UsageError, match="no class of two images to hold one out; give --test and --val"):
        run(train="single", test=None)
