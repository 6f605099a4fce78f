"""Probes: what is chosen on what, measured, written, refused, resumed, shared; then grids and schedules."""

import json
import os
import signal
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from torch import nn

import nextblock
from nextblock.data import TooManyBadImages, normalize
from nextblock.errors import UsageError
from nextblock.evaluate import evaluation, splits
from nextblock.evaluate.evaluation import Stopped
from nextblock.evaluate.probe import run as probe_module
from nextblock.evaluate.probe.heads import Grid, encoder_candidates, rate_notes
from nextblock.evaluate.probe.settings import RECIPES, ProbeSettings
from nextblock.evaluate.results import SATURATED
from nextblock.interop import open_encoder
from nextblock.models.heads import ImageClassifier
from nextblock.models.next_block import NextBlockModel
from nextblock.optim import lr_at, parameter_groups
from ranks import run_ranks
from toy import CONFIG, DATA, ToySource, toy_model

pytestmark = pytest.mark.usefixtures("coarse_pictures")
HEADS = ("linear", "attentive", "ep")
QUICK = {"model": "RUN", "train": "toy-0", "test": "toy-1", "baselines": False, "device": "cpu"}
QUICK |= {"epochs": 12, "batch_size": 16, "lr": (1e-2,), "attentive_heads": 4}


def know(replace):
    """Let an evaluation find the toy model and toy sources; two of "bad" are unreadable."""
    sources = {
        "toy-0": ToySource(96),
        "toy-1": ToySource(48, seed=1),
        "toy-2": ToySource(40, seed=2),
        "lacking": ToySource(3, seed=4),
        "shuffled": ToySource(400, seed=5, shuffled=True),
        "shuffled-test": ToySource(400, seed=6, shuffled=True),
        "bad": ToySource(96, bad=(3, 50)),
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


def test_all_heads_tell_colours_apart_and_the_baselines_stand_beside():
    result = run(baselines=True)
    rows = [(row["encoder"], row["head"]) for row in result.rows]
    cheap = [("pixels 16x16", "linear"), ("colour histogram", "linear")]
    assert rows == [*product(("model", "untrained"), HEADS), *cheap]
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
def test_winners_are_chosen_on_other_images_than_measured_on(changes, chosen_on, images, monkeypatch):
    made, measure = [], probe_module._Probe.measure
    monkeypatch.setattr(probe_module._Probe, "measure", lambda self: made.append(self) or measure(self))
    result = run(**{"lr": (1e-3, 1e-2), "heads": ("linear",), "epochs": 1, **changes})
    assert result.facts["chosen_on"] == chosen_on
    assert result.facts["split_images"] == images
    assert result.rows[0]["images"] == list(images.values())[-1]
    of_train = np.concatenate([part.numbers for part in made[0].parts if part.purpose == "train"])
    assert sorted(of_train) == list(range(96))


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


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_unreadable_images_are_left_out_and_counted_and_a_class_without_an_image_is_named(augment, tmp_path):
    result = run(train="bad", test="lacking", augment=augment, heads=("linear",), out=str(tmp_path / "out"))
    assert result.facts["bad_images"] == {"train": 2, "test": 0} if augment == "none" else {"train": 2}
    assert result.facts["split_images"]["train"] == 94
    assert (result.rows[0]["images"], result.rows[0]["top1"]) == (3, 1)
    assert any("toy-4 has no image of 1 class of train: d" in note for note in result.notes)
    assert len((tmp_path / "out/quarantine.jsonl").read_text().splitlines()) == 2


def test_more_unreadable_crops_than_allowed_stop_the_probe(monkeypatch):
    strict = (toy_model(), replace(DATA, max_bad_fraction=0.01))
    monkeypatch.setattr(evaluation, "open_model", lambda *_: strict)
    with pytest.raises(TooManyBadImages, match="of the 96 images of toy-0 cannot be read"):
        run(train="bad", augment="crop")


def test_crops_are_new_in_every_epoch_and_repeatable_and_need_no_cache():
    crops = {"augment": "crop", "cache_gb": 1e-6, "heads": ("linear", "ep"), "lr": (1e-3, 1e-2), "epochs": 2}
    first, again, other = run(**crops), run(**crops), run(**crops, seed=1)
    assert scores(first) == scores(again) != scores(other)
    assert scores(run(**{**crops, "augment": "none", "cache_gb": 1.0})) != scores(first)


def test_winners_are_written_as_classifiers_of_the_accuracy_that_was_measured(tmp_path, known, monkeypatch):
    out = tmp_path / "out"
    settings = {"out": str(out), "lr": (1e-3, 1e-2), "epochs": 3}
    result = run(**settings)
    there = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    files = {"probe.json", "probe.md", "probe.csv", "grid.csv", "right.npz", "figures"}
    assert there == files | set(HEADS)
    drawn = {f"{name}.png" for name in ("probe", "attention-ep", *(f"confusion-{head}" for head in HEADS))}
    assert {path.name for path in (out / "figures").iterdir()} == drawn | {".nextblock"}
    assert len((out / "grid.csv").read_text().splitlines()) == 1 + 6
    images, labels = normalize(known["toy-1"].images, DATA.mean, DATA.std), known["toy-1"].labels
    for head in HEADS:
        classifier = nextblock.load(out / head)
        assert isinstance(classifier, ImageClassifier)
        with torch.no_grad():
            right = classifier(images).argmax(1).numpy() == labels
        assert right.mean() == result.row(head=head)["top1"]
    monkeypatch.setattr(Grid, "learn", None)
    assert scores(run(**settings)) == scores(result)  # the same probe is read
    with pytest.raises(UsageError, match="another result"):
        run(**settings, seed=1)


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
    assert not {"heads", "features"} & {path.name for path in out.iterdir()}


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_two_processes_find_what_one_finds(augment, tmp_path):
    settings = {"augment": augment, "epochs": 2, "lr": (1e-3, 1e-2), "baselines": True}
    expected = run(**settings)
    first, second = run_ranks(2, _on_a_rank, {**settings, "out": str(tmp_path / "out")})
    assert min(row.pop("elapsed_s") for row in (*first, *second)) > 0
    assert first == second
    written = json.loads((tmp_path / "out/probe.json").read_text())["rows"]
    assert [row["loss"] for row in written] == [row["loss"] for row in first]
    for mine, theirs in zip(expected.rows, first, strict=True):
        assert all(mine[name] == theirs[name] for name in ("encoder", "head", "lr"))
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert isinstance(nextblock.load(tmp_path / "out/ep"), ImageClassifier)


def _on_a_rank(settings):
    know(setattr)
    return list(run(**settings).rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": ()}, "heads is empty"),
        ({"layers": ("last0",)}, "layers is 'last0'"),
        ({"layers": ("layer2",)}, "layers is layer2, but the encoder has 2 layers"),
        ({"layers": ("best",)}, "known for AIM's sizes only"),
        ({"tokens": ("class",), "heads": ("ep",)}, "linear heads"),
        ({"tokens": ("class",), "heads": ("linear",)}, "no class token"),
        ({"attentive_heads": 5}, "cannot have 5 attention heads"),
        ({"batch_size": 1}, "from 2"),
        ({"lr": (1e-6,)}, "end_lr 1e-05 is above lr 1e-06"),
        ({"warmup_epochs": 12.0}, "warm up for fewer"),
        ({"cache_gb": 1e-6}, r"144 images take 0\.000\d+ GB, more than cache_gb 1e-06.*--augment crop"),
        ({"train": "lacking", "test": None}, "no class of two images to hold one out; give --test and --val"),
        ({"lr": (1e38,), "clip_grad": None}, r"model: the linear head diverged at learning rate 1e\+38"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        run(**changes)


def settings(**changes):
    return ProbeSettings(**{"model": "RUN", "train": "T", **changes})


def deep(width=32, depth=8, heads=2):
    with torch.device("meta"):
        return NextBlockModel(replace(CONFIG, embed_dim=width, depth=depth, num_heads=heads))


def configs(candidates, *kinds) -> list[Any]:
    return [one.config for one in candidates if not kinds or one.head in kinds]


def test_the_grid_of_xtra_is_its_official_sweep():
    found = encoder_candidates(settings(), deep(), 4)
    rates = (1e-4, 3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3)
    last6 = [2, 3, 4, 5, 6, 7]
    wanted = {"linear": (0.0, [7], 1), "attentive": (0.1, last6, 16), "ep": (0.1, last6, 1)}
    rows = [
        (one.head, one.lr, one.weight_decay, list(config.layers), config.num_heads)
        for one, config in zip(found, configs(found), strict=True)
    ]
    assert rows == [
        (head, lr, decay, layers, heads) for head, (decay, layers, heads) in wanted.items() for lr in rates
    ]
    assert {one.num_queries for one in configs(found, "ep")} == {32}
    assert all(one.bias for one in configs(found))


def test_the_grid_of_aim_is_the_sweep_of_aimv2_with_aims_heads():
    found = encoder_candidates(settings(recipe="aim"), deep(heads=4), 4)
    assert len(found) == 3 * 2 * 7  # the best layers are known for AIM's own sizes only
    assert {one.num_heads for one in configs(found, "attentive")} == {4}
    assert not any(one.bias for one in configs(found))
    known = encoder_candidates(settings(recipe="aim", heads=("ep",)), deep(2048, 24, 16), 4)
    assert len({one.layers for one in configs(known)}) == 2


def test_every_setting_is_crossed_with_every_other():
    changes = {"layers": ("last", "each"), "attention": ("native", "full"), "weight_decay": (0.0, 1.0)}
    config = settings(heads=("linear",), lr=(1e-3, 1e-2), **changes)
    found = encoder_candidates(config, toy_model(), 4)
    rows = {
        (config.layers, config.attention, one.lr, one.weight_decay)
        for one, config in zip(found, configs(found), strict=True)
    }
    assert rows == set(product(((0,), (1,)), ("native", "full"), (1e-3, 1e-2), (0, 1)))
    assert len(found) == len(rows)  # "last" and "each" name the same layer once


def test_timms_encoders_are_probed_on_their_class_token_and_on_all_tokens():
    config = settings(tokens=("patches", "class", "all"), attention=("full", "native"), lr=(1e-2,))
    found = encoder_candidates(config, open_encoder("timm:test_vit,pretrained=false,img_size=32"), 4)
    tokens = {head: [one.tokens for one in configs(found, head)] for head in config.heads}
    of_queries = ["patches", "all"]
    assert tokens == {"linear": ["patches", "class", "all"], "attentive": of_queries, "ep": of_queries}
    assert {one.attention for one in configs(found)} == {"full"}  # which native is too


@pytest.mark.parametrize(
    ("changes", "images", "expected"),
    [
        ({}, 40, (1000, 16, 2, 200)),
        ({}, 569, (100, 16, 35, 350)),
        ({}, 1437, (100, 64, 22, 220)),
        ({}, 50_000, (100, 1024, 48, 480)),
        ({}, 1_281_167, (100, 1024, 1251, 12_510)),
        ({"epochs": 3, "batch_size": 500, "warmup_epochs": 1.5}, 100, (3, 100, 1, 2)),  # what is given stays
        ({"epochs": 40, "batch_size": 10, "recipe": "aim"}, 100, (40, 10, 10, 20)),
    ],
)
def test_epochs_batches_steps_and_warmup_follow_the_number_of_images(changes, images, expected):
    assert settings(**changes).schedule(images) == expected


def test_a_best_rate_at_the_end_of_the_grid_is_noted_unless_one_inside_is_as_good():
    def row(lr, top1):
        facts = {"encoder": "model", "head": "linear", "is_winner": lr == 1e-3, "is_diverged": False}
        return {**facts, "lr": lr, "top1": top1}

    for inside, notes in ((0.8, 1), (0.9, 0)):
        tops = {1e-3: 0.9, 1e-2: inside, 1e-1: 0.1}
        assert len(rate_notes([row(lr, top1) for lr, top1 in tops.items()], list(tops))) == notes


def test_every_head_of_a_grid_is_bit_for_bit_the_head_trained_alone():
    """Alone: its own batch norm, AdamW, clipping and loss; also beside a head that diverges."""
    plan = {"epochs": 4, "batch_size": 16, "warmup_epochs": 1.0, "clip_grad": 0.5, "attentive_heads": 4}
    config = settings(lr=(1e-3, 1e-2, 1e38), weight_decay=(0.0, 0.1), **plan)
    candidates = encoder_candidates(config, toy_model(), 4)
    columns = list(dict.fromkeys(one.features for one in configs(candidates)))
    seen = [columns.index(one.features) for one in configs(candidates)]
    plan, generator = config.schedule(64), torch.Generator().manual_seed(0)
    batches = [
        (
            tuple(torch.randn(16, *(() if c.pooled else (9,)), 32, generator=generator) for c in columns),
            torch.randint(4, (16,), generator=generator),
        )
        for _ in range(plan.steps)
    ]
    heads = [one.create(32, 4, seed=0) for one in candidates]
    grid = Grid(heads, candidates, seen, config, plan)
    for step, (features, labels) in enumerate(batches):
        grid.learn(features, labels, step)
    grid.finish()
    diverged = 0
    for one, column, head in zip(candidates, seen, heads, strict=True):
        alone = one.create(32, 4, seed=0)
        groups = parameter_groups(alone, one.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=one.lr, betas=(0.9, 0.95), fused=True)
        for step, (features, labels) in enumerate(batches):
            rate = {"start": one.lr / 10, "end": 1e-5, "warmup_steps": plan.warmup_steps}
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, peak=one.lr, total_steps=plan.steps, **rate)
            F.cross_entropy(alone(features[column]), labels).backward()
            nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(head.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
        diverged += not all(value.isfinite().all() for value in alone.state_dict().values())
    assert 0 < diverged < len(heads)


def test_a_heads_first_weights_depend_on_seed_and_kind_alone_and_leave_the_global_generator():
    (one, *_, other) = encoder_candidates(settings(heads=("linear",)), toy_model(), 4)
    before = torch.random.get_rng_state()
    weights = [c.create(32, 4, seed).linear.weight for c, seed in ((one, 0), (other, 0), (one, 1))]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.random.get_rng_state(), before)
