"""timm's augmentation is timm's, a function of its key, and disturbs nothing."""

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

from nextblock.config import DataConfig
from nextblock.data import TrainLoader, keyed_seed
from nextblock.data.transforms import TimmCrop, seeded_globally
from toy import ToySource

DATA = DataConfig(workers=0)
CROP = TimmCrop(data=DATA, image_size=16, seed=5)


def picture(seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return torch.from_numpy(np.array(small.resize((50, 40), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def global_states() -> tuple:
    numpy = pickle.dumps(np.random.get_state())  # noqa: NPY002
    return random.getstate(), numpy, torch.get_rng_state().tolist()


def test_it_is_timms_own_transform_under_the_same_seeds() -> None:
    theirs: Any = create_transform(
        16,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )
    for number in range(40):
        image = picture(number)
        seed = keyed_seed(5, "timm", 2, number)
        before = global_states()
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        expected = theirs(Image.fromarray(image.permute(1, 2, 0).numpy()))
        random.setstate(before[0])
        assert torch.equal(CROP(image, (2, number)), expected)


def policy(crop: TimmCrop) -> Any:
    return next(part for part in crop._transform.transforms if hasattr(part, "ops"))


@pytest.mark.parametrize(("magnitude", "mask"), [(0.0, 0xF0), (9.0, 0x80), (9.99, 0x80), (10.0, 0)])
def test_posterizing_keeps_the_highest_bits_of_each_colour_down_to_none(magnitude: float, mask: int) -> None:
    (posterize,) = (one for one in policy(replace(CROP)).ops if one.name == "PosterizeIncreasing")
    posterize.prob, posterize.magnitude, posterize.magnitude_std = 1.0, magnitude, 0.0
    pixels = picture().permute(1, 2, 0).numpy()
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


def test_batches_are_normalised_floats_and_do_not_depend_on_workers() -> None:
    source = ToySource(12)
    batches = []
    for workers in (0, 2):
        loader = TrainLoader(
            source, DATA, image_size=16, seed=5, batch_size=8, micro_batch_size=4, workers=workers, crop=CROP
        )
        batches.append(list(next(iter(loader)).micro_batches))
    for alone, divided in zip(*batches, strict=True):
        assert alone.images.dtype == torch.float32
        assert torch.equal(alone.images, divided.images)
    first = batches[0][0]
    key = (int(first.visits[0]), int(first.samples[0]))
    assert torch.equal(first.images[0], CROP(source.read(key[1]), key))


def test_other_than_colour_is_refused() -> None:
    data = DataConfig(channels=1, mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match=r"data.channels is 1; use augment crop"):
        TimmCrop(data=data, image_size=16, seed=0)
