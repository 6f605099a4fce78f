import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nextblock.blocks import patchify
from nextblock.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig, ModelConfig
from nextblock.data import normalize, open_source
from nextblock.data.augment import val_crop
from nextblock.errors import UsageError
from nextblock.look import predict as look
from nextblock.look.opened import Opened
from nextblock.models import NextBlockModel
from nextblock.targets import PixelTargets
from nextblock.train import MonitorEvent
from nextblock.visualize import predictions
from nextblock.visualize.figure import wrapped
from nextblock.visualize.predictions import PredictionMonitor, draw_sheet, joined, look_at
from nextblock.visualize.sheet import MAX_PICTURE_BYTES, hatch, side_by_side
from toy import ToySource, tiny_config, tiny_images, tiny_model

CPU = torch.device("cpu")


def small_config(**overrides) -> ModelConfig:
    return tiny_config(**{"image_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2, **overrides})


def small_model(**overrides) -> NextBlockModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NextBlockModel(small_config(**overrides)).eval()


def random_images(config: ModelConfig, count: int = 2, seed: int = 0) -> Tensor:
    """Images whose pixels, normalised with mean 0.5 and deviation 0.25, lie in [0, 1]."""
    sides = (blocks * px for blocks, px in zip(config.block_grid, config.block_px, strict=True))
    return torch.rand((count, config.in_chans, *sides), generator=torch.Generator().manual_seed(seed)) * 4 - 2


def constants(config: ModelConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return (0.5,) * config.in_chans, (0.25,) * config.in_chans


def random_order(config: ModelConfig) -> Tensor:
    return torch.randperm(config.num_blocks, generator=torch.Generator().manual_seed(3))


def predicted_image(predictions: Tensor, images: Tensor, config: ModelConfig, order: Tensor) -> Tensor:
    """The picture of all blocks but the first of an order."""
    true = patchify(images, config.block_px)[:, order[1:]]
    pixels = PixelTargets(config).to_pixels(predictions, true, true)
    return joined(pixels, order[1:], config, *constants(config), hatch(config))


def draw_predictions(model: NextBlockModel, images: Tensor, path: Path, names=None) -> None:
    draw_sheet(look_at(model, images, *constants(model.config)), path, names)


@pytest.fixture
def predict(monkeypatch, tmp_path):
    """`predict(model, source, **settings)` with what is already open."""
    data = DataConfig(val_resize_px=32)

    def call(model, source, out=tmp_path, **settings):
        monkeypatch.setattr(look, "open_look", lambda _: Opened(model, source, data, CPU))
        return look.predict(model="", data="", out=str(out), **settings)

    return call


GEOMETRIES = [
    small_config(),
    small_config(image_size=(24, 32), block_size=(3, 2)),
    small_config(image_size=(16, 32), block_size=(4, 1), in_chans=1),
    small_config(norm_pixels=False, in_chans=5),
    small_config(norm_pixels=False, in_chans=2),
]


# ------------------------------------------------------------------------------- blocks to image


@pytest.mark.parametrize("config", GEOMETRIES)
def test_prediction_is_put_together_as_a_loop_over_pixels_does(config):
    images, order = random_images(config), random_order(config)
    height, width = config.block_px
    predictions = torch.randn(
        2, config.num_blocks - 1, config.block_values, generator=torch.Generator().manual_seed(1)
    )
    mean, std = constants(config)
    pictures = predicted_image(predictions, images, config, order)
    assert pictures.shape == images.shape
    for image in range(2):
        for position in range(1, config.num_blocks):
            row, column = divmod(int(order[position]), config.block_grid[1])
            top, left = row * height, column * width
            true = images[image, :, top : top + height, left : left + width].double()
            block = predictions[image, position - 1].double().reshape(config.in_chans, height, width)
            if config.norm_pixels:
                block = block * (true.var(correction=1) + 1e-6).sqrt() + true.mean()
            for channel in range(config.in_chans):
                expected = (block[channel] * std[channel] + mean[channel]).clamp(0, 1)
                seen = pictures[image, channel, top : top + height, left : left + width]
                torch.testing.assert_close(seen.double(), expected, atol=1e-5, rtol=0)


def test_predictions_that_are_no_numbers_are_shown_black():
    config = small_config()
    images, order = random_images(config), torch.arange(config.num_blocks)
    broken = torch.full((2, config.num_blocks - 1, config.block_values), float("nan"))
    pictures = predicted_image(broken, images, config, order)
    assert pictures[:, :, 8:].abs().max() == 0


# ------------------------------------------------------------------------------- the sheet


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.parametrize("config", [*GEOMETRIES, small_config(order="random")])
def test_a_sheet_is_drawn_at_every_geometry_and_is_small(config, tmp_path):
    path = tmp_path / "new" / "sheet.png"
    model = NextBlockModel(config)
    draw_predictions(model, random_images(config), path)
    assert path.stat().st_size <= MAX_PICTURE_BYTES
    assert [file.name for file in path.parent.glob("[!.]*")] == ["sheet.png"]


def test_names_that_no_font_or_formula_can_take_are_drawn(tmp_path):
    names = ["花/$x_$\n.png", "a/very/long/path/of/a/file/that/does/not/fit/anywhere.jpeg"]
    draw_predictions(small_model(), random_images(small_config()), tmp_path / "s.png", names)
    assert (tmp_path / "s.png").exists()


@pytest.mark.slow
def test_eight_noisy_large_images_stay_under_the_limit(tmp_path):
    config = small_config(image_size=256, patch_size=16, block_size=4)
    draw_predictions(NextBlockModel(config), random_images(config, 8), tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size <= MAX_PICTURE_BYTES


def test_drawing_leaves_a_training_model_as_it_was(tmp_path):
    model = small_model(drop_path=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    draw_predictions(model, random_images(model.config), tmp_path / "s.png")
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_wrapped_text_fits_its_width():
    lines = wrapped("a word or two " * 20, 3.0, 8).splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) * 8 * 0.54 <= 3.0 * 72


# ------------------------------------------------------------------------------- monitor and predict


def test_the_monitor_writes_its_picture_and_returns_the_mean_loss(tmp_path):
    model = small_model()
    images = torch.randint(
        0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    monitor, sent = PredictionMonitor(images, IMAGENET_MEAN, IMAGENET_STD, "2ep"), []
    event = MonitorEvent(step=12, run_dir=tmp_path, device=CPU, log_image=lambda *what: sent.append(what))
    measured = monitor(model, event)
    assert sent == [(12, "pictures/predictions", tmp_path / "pictures" / "step_00000012.png")]

    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = model((images / 255 - mean) / std).loss.item()
    assert monitor.every == "2ep"
    assert measured == {"pictures/loss": pytest.approx(expected, rel=1e-5)}
    assert [path.name for path in (tmp_path / "pictures").glob("[!.]*")] == ["step_00000012.png"]


def test_predict_writes_a_picture_and_each_images_losses(predict, tmp_path):
    digits = open_source("digits", DataConfig(val_resize_px=32))
    result = predict(small_model(), digits, tmp_path / "out", num_images=4)

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
        assert row["loss"] > 0


def test_many_images_are_predicted_in_batches_with_the_numbers_of_one_pass(predict, monkeypatch):
    model, digits, sizes = small_model(), open_source("digits", DataConfig(val_resize_px=32)), []
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    found = []
    for at_once in (20, 8):
        monkeypatch.setattr(predictions, "AT_ONCE", at_once)
        found.append([row["loss"] for row in predict(model, digits, num_images=20).rows])
    assert sizes == [20, 8, 8, 4]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_predict_says_which_images_are_broken_and_draws_the_others_if_there_are_any(predict, tmp_path):
    result = predict(small_model(), ToySource(3, bad={1}))
    assert len(result.rows) == 2
    assert [sample.name for sample in result.bad] == ["toy-0[1]"]
    with pytest.raises(UsageError, match="none of the 2 chosen images"):
        predict(small_model(), ToySource(3, bad=range(3)), tmp_path / "out", num_images=2)
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------- channels, distances, pixels


@pytest.mark.parametrize(
    ("channels", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 1, 1), (4, 2, 2), (5, 2, 3)]
)
def test_channels_that_are_no_colours_are_panels_with_a_gap_between(channels, rows, columns):
    pictures = torch.rand(2, channels, 32, 64)
    tiled = side_by_side(pictures)
    assert tiled.shape == (2, 3 if channels == 3 else 1, rows * 34 - 2, columns * 66 - 2)
    if channels == 3:
        assert torch.equal(tiled, pictures)
        return
    expected = torch.ones(2, 1, rows * 34 - 2, columns * 66 - 2)
    for channel in range(channels):
        top, left = 34 * (channel // columns), 66 * (channel % columns)
        expected[:, 0, top : top + 32, left : left + 64] = pictures[:, channel]
    assert torch.equal(tiled, expected)
    white = torch.zeros(1, 2, 32, 64, dtype=torch.uint8)
    assert side_by_side(white)[0, 0, 0, 64:66].tolist() == [255, 255]


@pytest.fixture
def looks(monkeypatch):
    """What is drawn, in place of drawing it."""
    looks = []
    monkeypatch.setattr(look, "draw_sheet", lambda look, *_: looks.append(look))
    return looks


def test_the_second_distance_is_drawn_with_its_own_losses_and_two_blocks_unpredicted(predict, looks):
    model, data = small_model(num_predicted_blocks=2), DataConfig(val_resize_px=32)
    result = predict(model, ToySource(3), num_images=3, distance=2, unpredicted="mean")
    (look,) = looks
    images = torch.stack([ToySource(3).read(index) for index in range(3)])
    images = eval_images(images, data)
    out = model(images).further[0]
    np.testing.assert_allclose(
        [row["loss"] for row in result.rows], out.block_loss.detach().mean(1), rtol=1e-5
    )
    # The first two blocks in their mean colours, and all others as the targets' statistics say.
    mean = look.originals[:, :, :8, 8:16].mean((2, 3))
    torch.testing.assert_close(look.pictures[:, :, 3, 12], mean)
    assert not look.predicted[:8, :16].any()
    assert look.predicted[:, 16:].all()
    zero = PixelTargets(model.config).to_pixels(
        torch.zeros_like(out.targets), out.targets, blocks(images)[:, 2:]
    )
    for block in (2, 9, 15):
        top, left = 8 * (block // 4), 8 * (block % 4)
        std, centre = (torch.tensor(numbers)[:, None, None] for numbers in (data.std, data.mean))
        pixels = (zero[:, block - 2].view(3, 3, 8, 8) * std + centre).clamp(0, 1)
        torch.testing.assert_close(look.zero[:, :, top : top + 8, left : left + 8], pixels)
    true = out.targets
    assert [row["zero"] for row in result.rows] == pytest.approx(true.square().mean((1, 2)).tolist())
    assert "predicted 2 blocks ahead" in predictions._caption(look)
    assert "The first 2 blocks (in mean colour) cannot be predicted" in predictions._caption(look)


def eval_images(images: Tensor, data: DataConfig) -> Tensor:
    crops = torch.stack([val_crop(image, 32, data) for image in images])
    return normalize(crops, data.mean, data.std)


def blocks(images: Tensor) -> Tensor:
    return patchify(images, (8, 8))


@pytest.mark.parametrize("target", ["pixels", "tokens", "embedding"])
def test_only_pixels_have_a_row_of_predicting_zero(target):
    model = tiny_model(target=target, vocab_size=5)
    assert model.targets is not None
    if target == "tokens":
        model.targets.fit(torch.randn(60, 48, generator=torch.Generator().manual_seed(1)), seed=0)
    seen = look_at(model, tiny_images(), [0.5] * 3, [0.5] * 3)
    assert (seen.zero is not None) == (target == "pixels")
    assert ("Predicting zero" in predictions._caption(seen)) == (target == "pixels")


def test_each_image_is_written_beside_its_prediction_pixel_for_pixel(predict, looks, tmp_path):
    data, source = DataConfig(val_resize_px=32), ToySource(3)
    for count in (3, 2):
        predict(small_model(), source, num_images=count, each_image=True)
    files = sorted(path.name for path in (tmp_path / "images").glob("[!.]*"))
    assert files == ["1_toy-0_0.png", "2_toy-0_2.png"]
    for name, index, row in zip(files, (0, 2), range(2), strict=True):
        pixels = torch.from_numpy(pixels_of(tmp_path / "images" / name)).permute(2, 0, 1)
        assert torch.equal(pixels[:, :, :32], val_crop(source.read(index), 32, data).long())
        assert (pixels[:, :, 32] == 255).all()
        assert torch.equal(pixels[:, :, 33:], (looks[1].pictures[row] * 255).round().long())


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


# --------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    ("changes", "words", "is_drawn"),
    [
        (
            {"target": "embedding"},
            ["The first block (hatched)", "1 - cosine", "row by row"],
            [0, 1, 1, 1, 1, 1],
        ),
        (
            {"target": "embedding", "class_token": True, "predictor": "identity", "order": "reverse"},
            ["order reverse", "from a class token alone"],
            [1] * 6,
        ),
        (
            {"mask_ratio": 0.5, "order": "per_image", "feature_attention": "full"},
            ["Each masked block of 8 x 8 px is predicted from the visible blocks"],
            None,
        ),
    ],
)
def test_a_sheet_shows_the_blocks_that_its_objective_predicts_and_says_from_what(
    tmp_path, changes, words, is_drawn
):
    model = tiny_model(**changes)
    look = look_at(model, tiny_images(), [0.5] * 3, [0.5] * 3)
    caption = predictions._caption(look)
    assert all(part in caption for part in words), caption
    blocks = look.predicted.unfold(0, 8, 8).unfold(1, 8, 8).flatten(2).float().mean(2).flatten()
    order = model.orders[0].tolist()
    assert blocks.tolist() == (is_drawn or [float(block in order[3:]) for block in range(6)])
    draw_sheet(look, tmp_path / "a.png", None)
    assert (tmp_path / "a.png").stat().st_size > 1000


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


def test_a_sheet_of_tokens_tells_their_loss_beside_guessing(predict, tmp_path):
    model = tiny_model(target="tokens", vocab_size=5)
    assert model.targets is not None
    model.targets.fit(torch.randn(60, 48, generator=torch.Generator().manual_seed(1)), seed=0)
    result = predict(model, ToySource(6), num_images=3)
    assert result.picture.stat().st_size > 1000
    assert [row["uniform"] for row in result.rows] == [pytest.approx(math.log(5))] * 3
    assert all(0 < row["frequency"] <= math.log(5) for row in result.rows)
    told = json.loads((tmp_path / "predictions.json").read_text())
    assert (told["loss_function"], told["vocab_size"]) == ("cross_entropy", 5)
    assert "norm_pixels" not in told
