"""Surprise: each block's loss in its place, the ranking, the files, and what the same command reads again."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.colors import Normalize
from PIL import Image

import nextblock
from evaluating import written
from nextblock.blocks import block_orders
from nextblock.checkpoint import save_model
from nextblock.config import DataConfig
from nextblock.data import eval_batches, normalize
from nextblock.errors import UsageError
from nextblock.look.surprise import block_surprise
from nextblock.visualize.sheet import ERROR_COLOURS, coloured, hatch, pixels_of_blocks
from toy import ToySource, tiny_config, tiny_images, tiny_model

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from surprise import auroc, standard_error

DATA = DataConfig(val_resize_px=24, workers=0, max_bad_fraction=0.5)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (16, 24)),
        ({}, (24, 32)),
        ({"order": "reverse"}, (16, 24)),
        ({"order": "random", "norm_pixels": False, "loss": "l1"}, (16, 24)),
        ({"num_predicted_blocks": 2, "block_size": (2, 1)}, (16, 24)),
        ({"class_token": True, "order": "spiral"}, (16, 24)),
        ({"mask_ratio": 0.5, "order": "per_image", "feature_attention": "full"}, (16, 24)),
    ],
)
def test_each_blocks_loss_is_the_slow_definitions_in_its_place_of_the_image(changes, size):
    model, images = tiny_model(**changes), tiny_images(3, size)
    config = replace(model.config, image_size=size)
    found = block_surprise(model, images)
    expected = torch.full((3, config.num_blocks), torch.nan, dtype=torch.float64)
    order = block_orders(config.order, config.block_grid, config.order_seed)[0].tolist()
    with torch.no_grad():
        predictions = model(images).predictions.double()
    steps, (height, width) = predictions.shape[1], config.block_px
    for image in range(3):
        for step, block in enumerate(order[len(order) - steps :]):
            row, column = divmod(block, config.block_grid[1])
            place = (slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
            true = images[image][:, *place].double().flatten()
            if config.norm_pixels:
                true = (true - true.mean()) / (true.var(correction=1) + 1e-6).sqrt()
            error = true - predictions[image, step]
            expected[image, block] = error.square().mean() if config.loss == "mse" else error.abs().mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_heat_map_has_each_block_in_the_colour_of_its_loss_and_a_hatch_for_none():
    config, scale = tiny_config(), Normalize(0, 2, clip=True)
    losses = torch.tensor([[torch.nan, 0.0, 0.5, 1.0, 2.0, 9.0]])
    (drawn,) = coloured(pixels_of_blocks(losses, config), scale, config)
    assert drawn.shape == (3, 16, 24)
    assert torch.equal(drawn[:, :8, :8], hatch(config)[:8, :8].expand(3, 8, 8))
    for block, level in ((1, 0.0), (2, 0.25), (3, 0.5), (4, 1.0), (5, 1.0)):
        top, left = 8 * (block // 3), 8 * (block % 3)
        colour = torch.tensor(ERROR_COLOURS(level)[:3], dtype=torch.float32)[:, None, None]
        assert torch.equal(drawn[:, top : top + 8, left : left + 8], colour.expand(3, 8, 8))


class Named(ToySource):
    """Its first image has a name that a spreadsheet would run."""

    def _name(self, index):
        return "=1+1" if index == 0 else super()._name(index)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(**settings)` ranks the images of `run.source` with a saved tiny model."""

    class Run:
        model, source = tiny_model(), Named(12, bad={5})

        def __call__(self, **settings):
            save_model(tmp_path / "model.safetensors", self.model, data=DATA)
            usual = {"data": "toy", "num_images": 3, "device": "cpu", "workers": 0}
            usual["out"] = str(tmp_path / "out")
            return nextblock.surprise(model=str(tmp_path / "model.safetensors"), **{**usual, **settings})

    run = Run()
    monkeypatch.setattr("nextblock.look.surprise.open_source", lambda *_: run.source)
    return run


@pytest.mark.parametrize("score", ["mean", "largest"])
def test_all_readable_images_are_ranked_and_written_with_their_blocks_losses(run, tmp_path, score):
    found = run(score=score, num_images=4)
    (batch,) = eval_batches(run.source, DATA, (16, 24), 12)
    losses = block_surprise(run.model, normalize(batch.images, DATA.mean, DATA.std)).double().numpy()
    value = np.nanmean(losses, axis=1) if score == "mean" else np.nanmax(losses, axis=1)
    order = np.argsort(-value).tolist()
    indices = batch.samples.numpy()[order].tolist()
    assert [row["index"] for row in found.rows] == indices[:4] + indices[-2:]
    assert [row["rank"] for row in found.rows] == [1, 2, 3, 4, 10, 11]
    assert found.facts["bad_images"] == {"data": 1}

    with (tmp_path / "out" / "surprise.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["index"]) for line in lines] == indices
    assert {line["name"] for line in lines if line["index"] == "0"} == {"'=1+1"}
    assert [line["class"] for line in lines] == ["abcd"[index % 4] for index in indices]
    for line, place in zip(lines, order, strict=True):
        means = [float(line["mean_loss"]), float(line["largest_loss"])]
        assert means == pytest.approx([np.nanmean(losses[place]), np.nanmax(losses[place])], rel=1e-5)
        assert int(line["largest_block"]) == np.nanargmax(losses[place])
    table = pq.read_table(tmp_path / "out" / "surprise.parquet").to_pydict()
    assert table["index"] == indices
    np.testing.assert_allclose(table["block_losses"], losses[order], rtol=1e-5)
    with Image.open(tmp_path / "out" / "surprise.png") as picture:
        assert picture.width > 500
    assert "toy-0[5]" in (tmp_path / "out" / "quarantine.jsonl").read_text()


def test_the_same_command_reads_its_result_and_another_predictor_is_refused(run, tmp_path):
    first = run()
    reads = run.source.reads
    assert run().rows == tuple(written(tmp_path / "out" / "surprise.json")["rows"]) == first.rows
    assert run.source.reads == reads
    assert not (tmp_path / "out" / "features").exists()
    with pytest.raises(UsageError, match=r"settings\.num_images: 3 there, 2 here"):
        run(num_images=2)
    with torch.no_grad():
        next(run.model.predictor.parameters()).add_(1)  # of the same encoder
    with pytest.raises(UsageError, match=r"predictor\.weights: .* there"):
        run()
    assert run(overwrite=True).rows != first.rows


def test_few_images_are_drawn_once_and_nothing_is_written_without_out(run, tmp_path):
    run.source = ToySource(3)
    found = run(out=None)
    assert [row["group"] for row in found.rows] == ["highest"] * 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"), [({"predictor": None}, "cannot predict"), ({"block_size": (4, 6)}, "no next block")]
)
def test_a_model_that_predicts_nothing_is_refused(run, tmp_path, changes, words):
    run.model = tiny_model(**changes)
    with pytest.raises(UsageError, match=words):
        run()
    assert not (tmp_path / "out").exists()


def test_an_auroc_is_the_share_of_pairs_in_order_with_the_error_of_the_papers_example():
    odd, even = np.array([3.0, 1.0, 2.0]), np.array([0.0, 2.0, 1.5, 0.5])
    pairs = [(a > b) + (a == b) / 2 for a in odd for b in even]
    area, error = auroc(np.concatenate([odd, even]), np.arange(7) < 3)
    assert area == pytest.approx(np.mean(pairs))
    assert error == standard_error(area, 3, 4)
    assert standard_error(0.893, 51, 58) == pytest.approx(0.032, abs=1e-3)
