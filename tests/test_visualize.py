"""Sheets of predictions: pixels against a loop, captions, losses, files, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nextblock.blocks import patchify
from nextblock.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig, ModelConfig
from nextblock.data import open_source
from nextblock.data.augment import val_crop
from nextblock.errors import UsageError
from nextblock.look import predict as look
from nextblock.look.opened import Opened
from nextblock.models import NextBlockModel
from nextblock.train import MonitorEvent
from nextblock.visualize import predictions
from nextblock.visualize.figure import wrapped
from nextblock.visualize.predictions import Look, PredictionMonitor, draw_sheet, look_at, visible
from nextblock.visualize.sheet import MAX_PICTURE_BYTES, hatch, shortened, side_by_side
from toy import ToySource, tiny_images, tiny_model

CPU = torch.device("cpu")
DATA = DataConfig(val_resize_px=32)


def small_model(**changes) -> NextBlockModel:
    """Of 4x4 blocks; a tokenizer has centroids."""
    model = tiny_model(**{"image_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2, **changes})
    if model.targets is not None and model.targets.needs_fit:
        model.targets.fit(torch.randn(60, 48, generator=torch.Generator().manual_seed(1)), seed=0)
    return model


def random_images(config: ModelConfig, count: int = 2) -> Tensor:
    """Images whose pixels, normalised with mean 0.5 and deviation 0.25, lie in [0, 1]."""
    sides = (blocks * px for blocks, px in zip(config.block_grid, config.block_px, strict=True))
    return torch.rand((count, config.in_chans, *sides), generator=torch.Generator().manual_seed(0)) * 4 - 2


def seen(model: NextBlockModel, images: Tensor | None = None, **options) -> Look:
    channels = model.config.in_chans
    images = random_images(model.config) if images is None else images
    return look_at(model, images, (0.5,) * channels, (0.25,) * channels, **options)


@pytest.fixture
def predict(monkeypatch, tmp_path):
    """`predict(model, source, **settings)` with what is already open."""

    def call(model, source, out=tmp_path, **settings):
        monkeypatch.setattr(look, "open_look", lambda _: Opened(model, source, DATA, CPU))
        return look.predict(model="", data="", out=str(out), **settings)

    return call


@pytest.fixture
def looks(monkeypatch):
    """What is drawn, in place of drawing it."""
    looks = []
    monkeypatch.setattr(look, "draw_sheet", lambda look, *_: looks.append(look))
    return looks


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"order": "random"}, {"unpredicted": "mean"}),
        ({"image_size": (24, 32), "block_size": (3, 2)}, {}),
        ({"image_size": (16, 32), "block_size": (4, 1), "in_chans": 1}, {}),
        ({"norm_pixels": False, "in_chans": 7}, {}),
        ({"norm_pixels": False, "in_chans": 2}, {}),
        ({"num_predicted_blocks": 2, "norm_pixels": False}, {"distance": 2, "unpredicted": "mean"}),
    ],
)
def test_predictions_are_put_together_as_a_loop_over_blocks_does_and_make_a_small_sheet(
    changes, options, tmp_path
):
    model = small_model(**{"order": "fixed_random", **changes})
    config, images, distance = model.config, random_images(model.config), options.get("distance", 1)
    look = seen(model, images, **options)
    assert look.zero is not None
    with torch.no_grad():
        part, order = model(images).distances[distance - 1], model.orders[0].tolist()
    (height, width), channels = config.block_px, min(config.in_chans, 6)
    for position, block in enumerate(order):
        row, column = divmod(block, config.block_grid[1])
        place = (slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
        assert (look.predicted[place] == (position >= distance)).all()
        for image in range(2):
            true = images[image][:, *place]
            pixels = true[:channels] / 4 + 0.5
            torch.testing.assert_close(look.originals[image][:, *place], pixels)
            if position < distance:
                mean = pixels.mean((1, 2), keepdim=True).expand_as(pixels)
                expected = mean if "unpredicted" in options else hatch(config)[place].expand_as(pixels)
                torch.testing.assert_close(look.pictures[image][:, *place], expected)
                continue
            predicted = part.predictions[image, position - distance].view_as(true)
            for pictures, values in ((look.pictures, predicted), (look.zero, torch.zeros_like(true))):
                if config.norm_pixels:
                    values = values * (true.var(correction=1) + 1e-6).sqrt() + true.mean()
                expected = (values[:channels] / 4 + 0.5).clamp(0, 1)
                torch.testing.assert_close(pictures[image][:, *place], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(look.losses, part.block_loss.mean(1))
    torch.testing.assert_close(look.baselines["zero"], part.targets.square().mean((1, 2)))
    draw_sheet(look, tmp_path / "new" / "sheet.png", None)
    assert [file.name for file in (tmp_path / "new").glob("[!.]*")] == ["sheet.png"]
    assert (tmp_path / "new" / "sheet.png").stat().st_size <= MAX_PICTURE_BYTES


def test_predictions_that_are_no_numbers_are_shown_black():
    assert not visible(torch.full((2, 3, 8, 8), float("nan")), IMAGENET_MEAN, IMAGENET_STD).any()


@pytest.mark.parametrize(
    ("changes", "options", "words", "skipped"),
    [
        ({"target": "embedding"}, {}, ["The first block (hatched)", "1 - cosine", "row by row"], 1),
        (
            {"target": "embedding", "class_token": True, "predictor": "identity", "order": "reverse"},
            {},
            ["order reverse", "from a class token alone"],
            0,
        ),
        (
            {"mask_ratio": 0.5, "order": "per_image", "feature_attention": "full"},
            {},
            ["Each masked block of 8 x 8 px is predicted from the visible blocks"],
            8,
        ),
        (
            {"num_predicted_blocks": 2},
            {"distance": 2, "unpredicted": "mean"},
            ["predicted 2 blocks ahead", "The first 2 blocks (in mean colour) cannot be predicted"],
            2,
        ),
        ({"target": "tokens", "vocab_size": 5}, {}, ["cross-entropy of 5 tokens"], 1),
    ],
)
def test_a_sheet_shows_the_blocks_that_its_objective_predicts_and_says_from_what(
    tmp_path, changes, options, words, skipped
):
    model = small_model(**changes)
    look = seen(model, **options)
    caption = predictions._caption(look)
    assert all(part in caption for part in words), caption
    blocks = look.predicted.unfold(0, 8, 8).unfold(1, 8, 8).flatten(2).float().mean(2).flatten()
    assert blocks.tolist() == [block in model.orders[0].tolist()[skipped:] for block in range(16)]
    is_pixels = "target" not in changes
    assert (look.zero is not None) == ("Predicting zero shows" in caption) == is_pixels
    draw_sheet(look, tmp_path / "a.png", ["花/$x_$\n.png", "a/very/long/path/that/fits/nowhere/at/all.jpeg"])
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.slow
def test_eight_noisy_large_images_stay_under_the_limit(tmp_path):
    model = small_model(image_size=256, patch_size=16, block_size=4)
    draw_sheet(seen(model, random_images(model.config, 8)), tmp_path / "s.png", None)
    assert (tmp_path / "s.png").stat().st_size <= MAX_PICTURE_BYTES


def test_looking_leaves_a_training_model_as_it_was():
    model = small_model(drop_path=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    seen(model)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_wrapped_text_fits_its_width():
    lines = wrapped("a word or two " * 20, 3.0, 8).splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) * 8 * 0.54 <= 3.0 * 72


@pytest.mark.parametrize(("channels", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (4, 2, 2), (5, 2, 3)])
def test_channels_that_are_no_colours_are_panels_with_a_white_gap_between(channels, rows, columns):
    pictures = torch.rand(2, channels, 32, 64)
    expected = torch.ones(2, 1, rows * 34 - 2, columns * 66 - 2)
    for channel in range(channels):
        top, left = 34 * (channel // columns), 66 * (channel % columns)
        expected[:, 0, top : top + 32, left : left + 64] = pictures[:, channel]
    assert torch.equal(side_by_side(pictures), expected)
    white = side_by_side(torch.zeros(1, 2, 32, 64, dtype=torch.uint8))[0, 0, 0, 64:66]
    assert white.tolist() == [255, 255]
    colours = torch.rand(2, 3, 32, 64)
    assert torch.equal(side_by_side(colours), colours)


def test_a_vector_is_drawn_as_the_patch_of_these_images_whose_own_is_nearest():
    model, images = tiny_model(target="embedding"), tiny_images()
    order = model.orders[0]
    targets = model.targets_of(images, order)
    true = patchify(images, (8, 8))[:, order]
    # Predictions of other lengths, in the opposite order: each is exactly some patch's own vector.
    assert model.targets is not None
    drawn = model.targets.to_pixels(2 * targets.flip(0, 1, 2), targets, true)
    other = patchify(drawn.view(12, 3, 8, 8), (4, 4)).flatten(0, 1).flip(0)
    assert torch.equal(other, patchify(true.reshape(12, 3, 8, 8), (4, 4)).flatten(0, 1))


def test_the_monitor_writes_its_picture_and_returns_the_mean_loss(tmp_path):
    model, sent = small_model(), []
    images = (random_images(model.config, 3) * 64 + 128).byte()
    monitor = PredictionMonitor(images, IMAGENET_MEAN, IMAGENET_STD, "2ep")
    event = MonitorEvent(step=12, run_dir=tmp_path, device=CPU, log_image=lambda *what: sent.append(what))
    measured = monitor(model, event)
    assert sent == [(12, "pictures/predictions", tmp_path / "pictures" / "step_00000012.png")]
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = model((images / 255 - mean) / std).loss.item()
    assert monitor.every == "2ep"
    assert measured == {"pictures/loss": pytest.approx(expected, rel=1e-5)}
    assert [path.name for path in (tmp_path / "pictures").glob("[!.]*")] == ["step_00000012.png"]


def test_predict_writes_a_picture_and_each_images_losses(predict, tmp_path):
    result = predict(small_model(), open_source("digits", DATA), tmp_path / "out", num_images=4)
    written = json.loads((tmp_path / "out" / "predictions.json").read_text(encoding="utf-8"))
    assert result.picture == tmp_path / "out" / "predictions.png"
    assert result.picture.stat().st_size > 10_000
    assert tuple(written["images"]) == result.rows
    assert len(result.rows) == len({row["name"] for row in result.rows}) == 4
    assert written["mean_loss"] == pytest.approx(np.mean([row["loss"] for row in result.rows]))
    assert result.bad == ()
    for row in result.rows:
        assert 0.5 < row["zero"] <= 1.0
        assert row["copy_previous"] > row["zero"]


def test_many_images_are_predicted_in_batches_with_the_numbers_of_one_pass(predict, looks, monkeypatch):
    model, digits, sizes = small_model(), open_source("digits", DATA), []
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    found = []
    for at_once in (20, 8):
        monkeypatch.setattr(predictions, "AT_ONCE", at_once)
        found.append([row["loss"] for row in predict(model, digits, num_images=20).rows])
    assert sizes == [20, 8, 8, 4]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_predict_says_which_images_are_broken_and_draws_the_others_if_there_are_any(predict, looks, tmp_path):
    result = predict(small_model(), ToySource(3, bad={1}))
    assert len(result.rows) == len(looks[0].losses) == 2
    assert [sample.name for sample in result.bad] == ["toy-0[1]"]
    with pytest.raises(UsageError, match="none of the 2 chosen images"):
        predict(small_model(), ToySource(3, bad=range(3)), tmp_path / "out", num_images=2)
    assert not (tmp_path / "out").exists()


def test_each_image_is_written_beside_its_prediction_pixel_for_pixel(predict, looks, tmp_path):
    source, model = ToySource(3), small_model(num_predicted_blocks=2)
    for count in (3, 2):
        result = predict(model, source, num_images=count, each_image=True, distance=2, unpredicted="mean")
        assert [row["loss"] for row in result.rows] == pytest.approx(looks[-1].losses.tolist())
        assert (looks[-1].distance, looks[-1].unpredicted) == (2, "mean")
    files = sorted(path.name for path in (tmp_path / "images").glob("[!.]*"))
    assert files == ["1_toy-0_0.png", "2_toy-0_2.png"]
    for name, index, row in zip(files, (0, 2), range(2), strict=True):
        with Image.open(tmp_path / "images" / name) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(pixels[:, :, :32], val_crop(source.read(index), 32, DATA))
        assert (pixels[:, :, 32] == 255).all()
        assert torch.equal(pixels[:, :, 33:], (looks[1].pictures[row] * 255).round().byte())


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"predictor": None}, {}, "cannot predict blocks"),
        ({}, {"distance": 2}, "distance is 2, but this model predicts 1 block ahead"),
        ({"num_predicted_blocks": 3}, {"distance": 4}, "give 1 to 3"),
        ({"class_token": True}, {"unpredicted": "mean"}, "predicts every block"),
        ({}, {"each_image": True}, "images holds other files"),
    ],
)
def test_predict_refuses_what_is_impossible_and_to_replace_what_is_not_its_own(
    predict, tmp_path, changes, settings, message
):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.png").touch()
    with pytest.raises(UsageError, match=message):
        predict(small_model(**changes), ToySource(3), **settings)
    assert [path.name for path in tmp_path.rglob("*")] == ["images", "mine.png"]


def test_of_a_long_name_both_ends_are_shown_and_of_an_absolute_path_the_end():
    assert shortened("animals/a_name_of_many_letters.png", 15) == "animals…ers.png"
    assert shortened("/usr/share/animals/cat.png", 15) == "…nimals/cat.png"
    assert shortened("short.png", 15) == "short.png"
