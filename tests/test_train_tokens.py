"""A run that predicts tokens: its k-means is fitted once, before the first step, and stays with the run."""

from __future__ import annotations

import json
import math
import signal

import pytest
import torch

import nextblock
from nextblock.config import RunConfig
from nextblock.data import normalize
from nextblock.targets import KMeansTokenizer, TokenTargets
from nextblock.train.trainer import Trainer, sample_patches
from nextblock.visualize.report import read_run, report_markdown
from tiny_runs import (
    ALL_RANDOM,
    CPU,
    CrashAt,
    CrashError,
    Meddle,
    Quiet,
    SignalAt,
    assert_same_end,
    checkpoints,
    metrics,
    run_toy,
    same,
    settings,
    weights,
)
from toy import ToySource

TOKENS = {"model.tokenizer": "kmeans", "model.vocab_size": 6}
CENTROIDS = "tokenizer.centroids"


def tokenizer_of(config: RunConfig) -> KMeansTokenizer:
    return KMeansTokenizer(config.model.vocab_size, 3, config.model.patch_size)


def patches_of(source: ToySource, index: int) -> torch.Tensor:
    """All normalised patches of an image, one by one."""
    data = settings().data
    image = normalize(source.images[index][None], data.mean, data.std)[0]
    patches = [
        image[:, row : row + 4, column : column + 4] for row in range(0, 16, 4) for column in range(0, 16, 4)
    ]
    return torch.stack([((patch - patch.mean()) / patch.std()).flatten() for patch in patches])


# ------------------------------------------------------------------------------------------------- its sample


def test_all_patches_of_a_small_source_are_in_the_sample():
    config, source = settings(TOKENS), ToySource(9)
    sample = sample_patches(tokenizer_of(config), source, config)
    everything = torch.cat([patches_of(source, index) for index in range(9)])
    assert sample.shape == everything.shape == (9 * 16, 48)
    distances = torch.cdist(sample.double(), everything.double())
    assert distances.min(1).values.max() < 1e-4
    assert sorted(distances.argmin(1).tolist()) == list(range(9 * 16))


def test_the_sample_is_spread_over_images_and_patches_and_bounded_by_both_limits():
    config, source = settings(TOKENS), ToySource(200)
    sample = sample_patches(tokenizer_of(config), source, config, max_images=100, max_patches=400)
    assert source.reads == 100
    assert len(sample) == 400
    everything = torch.cat([patches_of(source, index) for index in range(200)])
    found = torch.cdist(sample.double(), everything.double()).argmin(1)
    assert len(set(found.tolist())) == 400
    images, places = found // 16, found % 16
    assert len(set(images.tolist())) > 90
    assert int(images.min()) < 20
    assert int(images.max()) > 180
    assert torch.bincount(places, minlength=16).min() > 10


def test_the_sample_is_a_function_of_the_seed_and_not_of_workers():
    config, source = settings(TOKENS), ToySource(60)
    first = sample_patches(tokenizer_of(config), source, config, max_patches=300)
    torch.manual_seed(1)
    workers = settings({**TOKENS, "data.workers": 1})
    assert torch.equal(first, sample_patches(tokenizer_of(config), source, workers, max_patches=300))
    other = settings({**TOKENS, "seed": 1})
    assert not torch.equal(first, sample_patches(tokenizer_of(config), source, other, max_patches=300))


def test_unreadable_images_are_missing_in_the_sample():
    config, source = settings(TOKENS), ToySource(9, bad=(2, 5))
    assert len(sample_patches(tokenizer_of(config), source, config)) == 7 * 16
    with pytest.raises(ValueError, match="none of 3 images of 'toy-0' can be read"):
        sample_patches(tokenizer_of(config), ToySource(3, bad=range(3)), config)


# ------------------------------------------------------------------------------------------------------- when


def test_a_fresh_run_fits_its_tokenizer_before_the_first_step_and_saves_it(tmp_path):
    with pytest.raises(CrashError):
        run_toy(tmp_path / "run", TOKENS, monitors=[CrashAt(0)])
    assert checkpoints(tmp_path / "run") == ["step_00000000"]
    centroids = weights(tmp_path / "run", 0)[CENTROIDS]
    trainer = Trainer(settings(TOKENS), CPU, None)
    assert trainer.fit_targets(ToySource(40))
    assert not trainer.fit_targets(ToySource(40)), "once"
    assert torch.equal(trainer.model.state_dict()[CENTROIDS], centroids)


def test_a_run_cut_before_its_first_checkpoint_goes_on_with_the_same_tokens(tmp_path, monkeypatch):
    changes = {**ALL_RANDOM, **TOKENS}
    run_toy(tmp_path / "whole", changes, monitors=[Meddle()])
    with pytest.raises(CrashError):
        run_toy(tmp_path / "run", changes, monitors=[Meddle(), CrashAt(5)])

    def refit(*_: object) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr(TokenTargets, "fit", refit)
    run_toy(tmp_path / "run", changes, monitors=[Meddle()])
    assert_same_end(tmp_path / "run", tmp_path / "whole", 7)
    assert [line["step"] for line in metrics(tmp_path / "run", "monitor")] == [0, 2, 4, 6, 7]
    assert checkpoints(tmp_path / "run") == ["step_00000000", "step_00000007"]


def test_a_run_of_tokens_stopped_anywhere_goes_on_bit_for_bit(tmp_path):
    changes = {**ALL_RANDOM, **TOKENS, "model.prefix": True}
    run_toy(tmp_path / "whole", changes)
    run_toy(tmp_path / "run", changes, monitors=[SignalAt(4, signal.SIGTERM)])
    run_toy(tmp_path / "run", changes)
    assert_same_end(tmp_path / "run", tmp_path / "whole", 7)
    assert same(weights(tmp_path / "run", 7)[CENTROIDS], weights(tmp_path / "whole", 7)[CENTROIDS])


def test_the_checkpoint_of_step_0_is_not_kept_for_good(tmp_path):
    saving = {"checkpoint.every": "2st", "checkpoint.keep": 1, "checkpoint.keep_every": "4st"}
    run_toy(tmp_path / "run", {**TOKENS, **saving})
    assert checkpoints(tmp_path / "run") == ["step_00000004", "step_00000007"]


def test_a_run_from_another_runs_weights_keeps_its_tokens(tmp_path):
    run_toy(tmp_path / "first", TOKENS)
    changes = {**TOKENS, "model.init": str(tmp_path / "first"), "train.duration": "1st"}
    run_toy(tmp_path / "second", changes, sources={"train": ToySource(40, seed=3)})
    first, second = weights(tmp_path / "first", 7)[CENTROIDS], weights(tmp_path / "second", 1)[CENTROIDS]
    assert torch.equal(first, second)


def test_too_few_patches_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="640 patches hold only 640 distinct ones, too few for 700 tokens"):
        run_toy(tmp_path / "run", {**TOKENS, "model.vocab_size": 700})
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- its baselines


def test_baselines_of_tokens_are_guessing_evenly_and_by_frequency(tmp_path):
    reporter, source = Quiet(), ToySource(8)
    crops = {"data.flip": 0.0, "data.crop_scale": (1.0, 1.0), "data.crop_ratio": (1.0, 1.0)}
    run_toy(
        tmp_path / "run",
        {**TOKENS, **crops, "train.duration": "1st"},
        sources={"train": source},
        reporter=reporter,
    )
    baselines = json.loads((tmp_path / "run" / "baselines.json").read_text())
    assert list(baselines) == ["uniform", "frequency"]
    assert baselines["uniform"] == pytest.approx(math.log(6))
    centroids = weights(tmp_path / "run", 1)[CENTROIDS]
    patches = torch.cat([patches_of(source, index) for index in range(8)])
    tokens = torch.cdist(patches, centroids).argmin(1).tolist()
    shares = [tokens.count(token) / len(tokens) for token in set(tokens)]
    assert baselines["frequency"] == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-5)
    assert f"(uniform 1.79, frequency {baselines['frequency']:.2f})" in reporter.ticks[0].text()
    report = report_markdown(read_run(tmp_path / "run"))
    assert "predicting all tokens alike 1.7918, predicting tokens by their frequency" in report


def test_the_first_loss_of_tokens_is_near_guessing_evenly_and_falls(tmp_path):
    changes = {**TOKENS, "optim.lr": 1e-2, "train.duration": "40st", "data.flip": 0.0}
    run_toy(tmp_path / "run", changes, sources={"train": ToySource(8), "val": ToySource(8)})
    lines = metrics(tmp_path / "run")
    baselines = json.loads((tmp_path / "run" / "baselines.json").read_text())
    assert lines[0]["loss"] == pytest.approx(baselines["uniform"], rel=0.1)
    assert lines[-1]["loss"] < baselines["frequency"]
    assert metrics(tmp_path / "run", "val")[-1]["val_loss"] < baselines["uniform"]
    model = nextblock.load(tmp_path / "run")
    assert isinstance(model, nextblock.NextBlockModel)
    assert isinstance(model.tokenizer, KMeansTokenizer)
    assert model.tokenizer.is_fitted
