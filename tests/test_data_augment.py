"""Crops and flips are torchvision's, pixel for pixel; timm's augmentation is timm's."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import center_crop_or_pad
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from nextblock.config import DataConfig, pair
from nextblock.data import TrainLoader, keyed_rng, keyed_seed, normalize
from nextblock.data.augment import (
    TimmCrop,
    color_jitter,
    eval_crop,
    random_resized_crop_box,
    seeded_globally,
    train_crop,
    val_crop,
)
from toy import ToySource

BICUBIC = v2.InterpolationMode.BICUBIC


def image(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def boxes(height: int, width: int, number: int, **data: Any) -> np.ndarray:
    config, rng = DataConfig(**data), keyed_rng(0, "boxes")
    limits = config.crop_scale, config.crop_ratio
    return np.array([random_resized_crop_box(height, width, *limits, rng) for _ in range(number)])


def resized(picture: Tensor, *size: int) -> Tensor:
    """By torchvision, to rows and columns, or to a shorter side."""
    return reference.resize(picture, list(size), interpolation=BICUBIC, antialias=True)


def test_boxes_are_distributed_like_torchvisions() -> None:
    ours = boxes(120, 200, 3000, crop_scale=(0.3, 1.0), crop_ratio=(0.75, 1.5))
    torch.manual_seed(0)
    picture = torch.empty(3, 120, 200)
    transform = v2.RandomResizedCrop(8, scale=(0.3, 1.0), ratio=(0.75, 1.5))
    drawn = [transform.make_params([picture]) for _ in range(3000)]
    theirs = np.array([[params[key] for key in ("top", "left", "height", "width")] for params in drawn])
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 2.5
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 2.5


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (10, 1000, (0, 492, 10, 15)),  # too wide: the full height, a ratio of 1.5
        (1000, 9, (494, 0, 12, 9)),  # too high: the full width, a ratio of 0.75
    ],
)
def test_a_strip_falls_back_to_its_centre(height, width, expected) -> None:
    assert tuple(boxes(height, width, number=1)[0]) == expected


@pytest.mark.parametrize("shape", [(8, 8), (75, 100), (300, 200)])
@pytest.mark.parametrize("size", [32, (48, 64)])
def test_a_training_crop_is_torchvisions_resized_crop_and_a_flip_mirrors_it(shape, size) -> None:
    (height, width), data, rng = shape, DataConfig(flip=0), keyed_rng(3, "crop")
    picture = image(height, width)
    rng.random()  # decides on the flip
    top, left, rows, columns = random_resized_crop_box(height, width, data.crop_scale, data.crop_ratio, rng)
    target = list(pair(size))
    expected = reference.resized_crop(picture, top, left, rows, columns, target, BICUBIC, antialias=True)
    assert torch.equal(train_crop(picture, size, data, keyed_rng(3, "crop")), expected)
    flipped = train_crop(picture, size, DataConfig(flip=1), keyed_rng(3, "crop"))
    assert torch.equal(flipped, expected.flip(-1))


@pytest.mark.parametrize("shape", [(8, 8), (100, 75), (121, 83)])
@pytest.mark.parametrize("size", [32, 33, (30, 31)])
def test_an_evaluation_crop_is_torchvisions_resize_and_centre_crop(shape, size) -> None:
    expected = reference.center_crop(resized(image(*shape), 37), list(pair(size)))
    assert torch.equal(eval_crop(image(*shape), size, 37), expected)


def test_a_picture_that_would_not_cover_the_crop_is_enlarged() -> None:
    picture = image(40, 50)  # 20 x 25 would leave 35 columns empty
    assert torch.equal(eval_crop(picture, (20, 60), 20), resized(picture, 48, 60)[:, 14:34])


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 2), (1, 1), (1, 5), (7, 1)])
def test_strips_and_dots_are_cropped_too(shape) -> None:
    assert eval_crop(image(*shape), (24, 32), 40).shape == (3, 24, 32)
    assert val_crop(image(*shape), (24, 32), DataConfig(val_crop="border")).shape == (3, 24, 32)
    for top, left, height, width in boxes(*shape, number=50):
        assert 0 <= top < top + height <= shape[0]
        assert 0 <= left < left + width <= shape[1]


@pytest.mark.parametrize("shape", [(8, 8), (75, 100), (121, 83), (1, 4000), (4000, 2)])
@pytest.mark.parametrize("size", [32, (30, 40)])
def test_a_squashed_crop_is_the_centre_of_the_whole_picture_in_another_shape(shape, size) -> None:
    picture = image(*shape)
    expected = reference.center_crop(resized(picture, 37, 37 if size == 32 else 49), list(pair(size)))
    assert torch.equal(val_crop(picture, size, DataConfig(val_resize_px=37, val_crop="squash")), expected)


@pytest.mark.parametrize("resize_px", [32, 60])
@pytest.mark.parametrize("shape", [(8, 8), (121, 83), (33, 200)])
def test_a_bordered_crop_is_the_whole_picture_on_its_mean_colour(shape, resize_px) -> None:
    picture, data = image(*shape), DataConfig(val_resize_px=resize_px, val_crop="border")
    inside = resized(picture, *(round(side * resize_px / max(shape)) for side in shape))
    fill: Any = tuple(round(255 * part) for part in data.mean)
    expected = center_crop_or_pad(reference.to_pil_image(inside), [32, 32], fill=fill)
    assert torch.equal(val_crop(picture, 32, data), reference.pil_to_tensor(expected))


def test_normalize_is_torchvisions() -> None:
    pictures = torch.stack([image(9, 7, seed) for seed in range(2)])
    data = DataConfig()
    floats = reference.to_dtype(pictures, torch.float32, scale=True)
    expected = reference.normalize(floats, list(data.mean), list(data.std))
    torch.testing.assert_close(normalize(pictures, data.mean, data.std), expected, rtol=0, atol=1e-6)


def test_another_number_of_channels_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"3 channels, data.mean has 1 and data.std 1; give one number per"):
        normalize(image(4, 4)[None], (0.5,), (0.5,))


JITTER = (0.4, 0.3, 0.2, 0.1)
CHANGES = ("brightness", "contrast", "saturation", "hue")


def test_changed_colours_are_torchvisions_with_the_drawn_factors_in_the_drawn_order(monkeypatch) -> None:
    for seed in range(20):
        picture = image(12, 17, seed)
        ours = color_jitter(picture, JITTER, keyed_rng(seed, "jitter"))
        rng = keyed_rng(seed, "jitter")
        drawn = [rng.random() for _ in range(8)]
        low, high = (0.6, 0.7, 0.8, -0.1), (1.4, 1.3, 1.2, 0.1)
        params = {f"{name}_factor": low[i] + (high[i] - low[i]) * drawn[i] for i, name in enumerate(CHANGES)}
        transform = v2.ColorJitter(*JITTER)
        order = torch.tensor(np.argsort(drawn[4:]))
        monkeypatch.setattr(transform, "make_params", lambda _, p=params, o=order: {"fn_idx": o, **p})
        assert torch.equal(ours, transform(picture))
        assert ours.dtype == torch.uint8


def test_crop_and_flip_are_the_same_with_and_without_changed_colours() -> None:
    without, never = DataConfig(), DataConfig(color_jitter=JITTER, color_jitter_prob=0.0)
    unchanged = DataConfig(color_jitter=(0.0, 0.0, 0.0, 0.0), color_jitter_prob=1.0)
    always = DataConfig(color_jitter=JITTER, color_jitter_prob=1.0)
    for seed in range(20):
        picture = image(40, 30, seed)
        expected = train_crop(picture, 16, without, keyed_rng(seed, "crop"))
        for data in (never, unchanged):
            assert torch.equal(train_crop(picture, 16, data, keyed_rng(seed, "crop")), expected)
        assert not torch.equal(train_crop(picture, 16, always, keyed_rng(seed, "crop")), expected)


CROP = TimmCrop(data=DataConfig(), image_size=16, seed=5)


def global_states() -> tuple:
    numpy = pickle.dumps(np.random.get_state())  # noqa: NPY002
    return random.getstate(), numpy, torch.get_rng_state().tolist()


def test_it_is_timms_own_transform_under_the_same_seeds() -> None:
    policy: dict[str, Any] = {"auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic"}
    erasing: dict[str, Any] = {"re_prob": 0.25, "re_mode": "pixel", "re_count": 1}
    theirs: Any = create_transform(16, is_training=True, **policy, **erasing)
    for number in range(40):
        picture = image(40, 50, number)
        seed = keyed_seed(5, "timm", 2, number)
        before = global_states()
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        expected = theirs(Image.fromarray(picture.permute(1, 2, 0).numpy()))
        random.setstate(before[0])
        source = ToySource(1)
        source.images = picture.expand(40, -1, -1, -1)
        assert torch.equal(CROP.read(source, (2, number)), expected)


@pytest.mark.parametrize(("magnitude", "mask"), [(0.0, 0xF0), (9.0, 0x80), (10.0, 0)])
def test_posterizing_keeps_the_highest_bits_of_each_colour_down_to_none(magnitude: float, mask: int) -> None:
    policy = next(part for part in replace(CROP)._transform.transforms if hasattr(part, "ops"))
    (posterize,) = (one for one in policy.ops if one.name == "PosterizeIncreasing")
    posterize.prob, posterize.magnitude, posterize.magnitude_std = 1.0, magnitude, 0.0
    pixels = image(40, 50).permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(posterize(Image.fromarray(pixels))), pixels & mask)


def test_the_global_generators_are_left_as_they_were_even_after_an_error() -> None:
    before = global_states()
    with seeded_globally(3):
        inside = random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002
    assert global_states() == before
    with pytest.raises(RuntimeError), seeded_globally(3):
        assert (random.random(), np.random.rand(), float(torch.rand(()))) == inside  # noqa: NPY002
        raise RuntimeError
    assert global_states() == before


def test_batches_of_workers_are_its_floats() -> None:
    source = ToySource(12)
    options: dict[str, Any] = {"image_size": 16, "seed": 5, "batch_size": 8, "crop": CROP}
    (batch,) = next(iter(TrainLoader(source, DataConfig(), workers=2, **options))).micro_batches
    assert batch.images.dtype == torch.float32
    for image, *key in zip(batch.images, batch.visits.tolist(), batch.samples.tolist(), strict=True):
        assert torch.equal(image, CROP.read(source, (key[0], key[1])))


def test_other_than_colour_is_refused() -> None:
    data = DataConfig(channels=1, mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match=r"data.channels is 1; use augment crop"):
        TimmCrop(data=data, image_size=16, seed=0)
