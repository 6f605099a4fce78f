"""A run that predicts tokens: its k-means is fitted once, before the first step, and stays with the run."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from einops import rearrange
from safetensors.torch import load_file

import nextblock
from nextblock.checkpoint import CHECKSUMS_FILE, read_metadata, write_safetensors
from nextblock.data import normalize
from nextblock.report import read_run, report_markdown
from nextblock.targets import KMeansTokenizer
from nextblock.train.trainer import Trainer, sample_patches
from tiny_runs import CPU, Quiet, checkpoints, crash_toy, metrics, run_toy, same, settings, weights
from toy import ToySource

TOKENS = {"model.target": "tokens", "model.vocab_size": 6}
CENTROIDS = "tokenizer.centroids"


def patches_of(source: ToySource) -> torch.Tensor:
    """All normalised patches of all images."""
    data = settings().data
    images = normalize(source.images, data.mean, data.std)
    patches = rearrange(images, "b c (h p) (w q) -> (b h w) (c p q)", p=4, q=4)
    return (patches - patches.mean(1, keepdim=True)) / patches.std(1, keepdim=True)


def sample(source: ToySource, changes=None, **limits: int) -> torch.Tensor:
    config = settings({**TOKENS, **(changes or {})})
    return sample_patches(KMeansTokenizer(6, 3, 4), source, config, **limits)


def nearest(found: torch.Tensor, source: ToySource) -> torch.return_types.min:
    return torch.cdist(found.double(), patches_of(source).double()).min(1)


def test_all_patches_of_a_small_source_are_in_the_sample_but_for_unreadable_images():
    source = ToySource(9)
    found = nearest(sample(source), source)
    assert found.values.max() < 1e-4
    assert sorted(found.indices.tolist()) == list(range(9 * 16))
    assert len(sample(ToySource(9, bad=(2, 5)))) == 7 * 16
    with pytest.raises(ValueError, match="none of 3 images of 'toy-0' can be read"):
        sample(ToySource(3, bad=range(3)))


def test_the_sample_is_bounded_spread_and_a_function_of_the_seed_and_not_of_workers():
    source, limits = ToySource(200), {"max_images": 100, "max_patches": 400}
    first = sample(source, **limits)
    assert source.reads == 100
    found = nearest(first, source).indices
    assert len(set(found.tolist())) == len(found) == 400
    assert len(set((found // 16).tolist())) > 90, "images"
    assert torch.bincount(found % 16, minlength=16).min() > 10, "places in an image"
    torch.manual_seed(1)
    assert torch.equal(first, sample(source, {"data.workers": 1}, **limits))
    assert not torch.equal(first, sample(source, {"seed": 1}, **limits))


def test_a_fresh_run_fits_its_tokenizer_before_the_first_step_and_saves_it(tmp_path):
    crash_toy(tmp_path, 0, TOKENS)
    assert checkpoints(tmp_path) == ["step_00000000"]
    trainer = Trainer(settings(TOKENS), CPU, None)
    assert trainer.fit_targets(ToySource(40))
    assert not trainer.fit_targets(ToySource(40)), "once"
    assert torch.equal(trainer.model.state_dict()[CENTROIDS], weights(tmp_path, 0)[CENTROIDS])


def test_the_checkpoint_of_step_0_is_not_kept_for_good_and_a_run_from_the_weights_keeps_the_tokens(tmp_path):
    saving = {"checkpoint.every": "2st", "checkpoint.keep": 1, "checkpoint.keep_every": "4st"}
    run_toy(tmp_path / "first", {**TOKENS, **saving})
    assert checkpoints(tmp_path / "first") == ["step_00000004", "step_00000007"]
    changes = {**TOKENS, "model.init": str(tmp_path / "first"), "train.duration": "1st"}
    run_toy(tmp_path / "second", changes, sources={"train": ToySource(40, seed=3)})
    first, second = weights(tmp_path / "first", 7), weights(tmp_path / "second", 1)
    assert torch.equal(first[CENTROIDS], second[CENTROIDS])


def test_too_few_patches_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="640 patches contain only 640 distinct ones, too few for 700"):
        run_toy(tmp_path / "run", {**TOKENS, "model.vocab_size": 700})
    assert not (tmp_path / "run").exists()


def test_baselines_of_tokens_are_guessing_evenly_and_by_frequency_and_a_run_goes_below_them(tmp_path):
    reporter, source = Quiet(), ToySource(8)
    crops = {"data.flip": 0.0, "data.crop_scale": (1.0, 1.0), "data.crop_ratio": (1.0, 1.0)}
    changes = {**TOKENS, **crops, "optim.lr": 1e-2, "train.duration": "40st"}
    run_toy(tmp_path, changes, sources={"train": source, "val": source}, reporter=reporter)
    baselines = json.loads((tmp_path / "baselines.json").read_text())
    assert list(baselines) == ["uniform", "frequency"]
    assert baselines["uniform"] == pytest.approx(math.log(6))
    tokens = torch.cdist(patches_of(source), weights(tmp_path, 40)[CENTROIDS]).argmin(1).tolist()
    shares = [tokens.count(token) / len(tokens) for token in set(tokens)]
    assert baselines["frequency"] == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-5)
    assert f"(uniform 1.79, frequency {baselines['frequency']:.2f})" in reporter.ticks[0].text()
    report = report_markdown(read_run(tmp_path))
    assert "predicting all tokens alike 1.7918, predicting tokens by their frequency" in report

    lines = metrics(tmp_path)
    assert lines[0]["loss"] == pytest.approx(baselines["uniform"], rel=0.1)
    assert lines[-1]["loss"] < baselines["frequency"]
    assert metrics(tmp_path, "val")[-1]["val_loss"] < baselines["uniform"]
    model = nextblock.load(tmp_path)
    assert isinstance(model, nextblock.NextBlockModel)
    assert isinstance(model.tokenizer, KMeansTokenizer)
    assert model.tokenizer.is_fitted


def as_written_before(model: dict) -> dict:
    """The settings of a model as the release before `model.target` wrote them."""
    newer = "rope_rescale class_token qk_norm layer_scale mask_ratio target_positions target teacher"
    newer += " teacher_dim teacher_digest predict_visible"
    tokenizer = {"pixels": None, "tokens": "kmeans"}[model["target"]]
    older = {name: value for name, value in model.items() if name not in newer.split()}
    return {**older, "tokenizer": tokenizer, "token_px": None}


@pytest.mark.parametrize("changes", [{}, TOKENS], ids=["pixels", "tokens"])
def test_runs_of_the_release_before_load_and_resume(tmp_path, changes):
    run, whole = tmp_path / "run", tmp_path / "whole"
    run_toy(whole, changes)
    run_toy(run, changes, stop=3)
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"] = as_written_before(config["model"])
    del config["monitor"]["collapse"]
    path.write_text(yaml.safe_dump(config))
    file = run / "checkpoints/step_00000003/model.safetensors"
    metadata, tensors = read_metadata(file), load_file(file)
    metadata["config"] = json.dumps(as_written_before(json.loads(metadata["config"])))
    write_safetensors(file, tensors, metadata)
    (file.parent / CHECKSUMS_FILE).unlink()
    assert nextblock.load(file).config == settings(changes).model
    run_toy(run, changes)
    assert same(weights(run, 7), weights(whole, 7))
