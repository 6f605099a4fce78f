"""A batch decodes a few images, then crops them, and holds what it would one by one; an error ends all."""

from __future__ import annotations

import gc
import multiprocessing
from functools import partial
from itertools import islice

import pytest
import torch
from torch import Tensor

from nextblock.config import DataConfig
from nextblock.data import BadImageError, Source, TrainLoader, eval_batches, eval_crop
from nextblock.data import loader as loader_module
from nextblock.data.augment import Decoded
from nextblock.data.loader import Key, TrainCrop

DATA = DataConfig(val_resize_px=18)
MEGABYTE = 2**20


class Pictures(Source):
    """Noise of sizes that differ, some of it unreadable."""

    in_memory = True
    spec = "noise"

    def __init__(self, number: int, bad: tuple[int, ...] = ()) -> None:
        self.number, self.bad = number, bad

    def __len__(self) -> int:
        return self.number

    @property
    def has_labels(self) -> bool:
        return False

    def _read(self, index: int) -> Tensor:
        if index in self.bad:
            raise BadImageError(f"broken {index}")
        noise = torch.Generator().manual_seed(index)
        return torch.randint(256, (3, 20 + index, 50 - index), dtype=torch.uint8, generator=noise)

    def _name(self, index: int) -> str:
        return f"noise {index}"

    def _find_labels(self):
        raise NotImplementedError

    def _make_fingerprint(self) -> str:
        return "noise"


class Recorded:
    """A crop that writes down when it decodes and when it cuts; the pixels take `image_bytes`."""

    data = DATA
    image_size = 4
    dtype = torch.uint8

    def __init__(self, image_bytes: list[int], bad: tuple[int, ...] = ()) -> None:
        self.image_bytes, self.bad = image_bytes, bad
        self.events = ""

    def decode(self, source: Source, key: Key) -> Decoded:
        sample = key[1]
        if sample in self.bad:
            self.events += "x"
            raise BadImageError("broken")
        self.events += "d"
        pixels = torch.empty((1, 1, self.image_bytes[sample]), dtype=torch.uint8)
        return Decoded(pixels, partial(self._cut, sample))

    def _cut(self, sample: int, pixels: Tensor) -> Tensor:
        self.events += "c"
        return torch.full((3, 4, 4), sample, dtype=torch.uint8)


def batch_of(crop: Recorded) -> Tensor:
    number = len(crop.image_bytes)
    images = loader_module._Images(Pictures(number), crop)
    batch = images.__getitems__([(0, sample) for sample in range(number)])
    assert batch.samples.tolist() == [sample for sample in range(number) if sample not in crop.bad]
    assert batch.images[:, 0, 0, 0].tolist() == batch.samples.tolist()
    return batch.images


# ----------------------------------------------------------------------------------------- when what is done


def test_eight_small_images_are_decoded_and_then_cropped() -> None:
    crop = Recorded([100] * 19)
    batch_of(crop)
    assert crop.events == 2 * (8 * "d" + 8 * "c") + 3 * "d" + 3 * "c"


def test_large_images_do_not_pile_up() -> None:
    crop = Recorded([9 * MEGABYTE] * 3 + [3 * MEGABYTE // 2] * 3 + [100])
    batch_of(crop)
    assert crop.events == 3 * "dc" + 2 * "ddcc"


def test_what_cannot_be_read_takes_no_place() -> None:
    crop = Recorded([100] * 12, bad=(0, 5, 11))
    assert len(batch_of(crop)) == 9
    assert crop.events == "xddddxdddd" + 8 * "c" + "dxc"


# --------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("group_bytes", [1, 5000, 2**22])
def test_a_batch_is_its_images_one_by_one(group_bytes, monkeypatch) -> None:
    monkeypatch.setattr(loader_module, "GROUP_BYTES", group_bytes)
    source = Pictures(21, bad=(2, 3, 17))
    crop = TrainCrop(data=DATA, image_size=16, seed=5)
    loader = TrainLoader(source, DATA, image_size=16, seed=5, batch_size=21)
    for step in islice(loader, 2):
        (batch,) = step.micro_batches
        keys = zip(batch.visits.tolist(), batch.samples.tolist(), strict=True)
        expected = [crop(source.read(key[1]), key) for key in keys]
        assert torch.equal(batch.images, torch.stack(expected))
        assert sorted(bad.sample for bad in batch.bad) == [2, 3, 17]


def test_an_evaluation_batch_is_its_images_one_by_one() -> None:
    source = Pictures(11, bad=(1, 10))
    batches = list(eval_batches(source, DATA, 16, 9))
    assert [len(batch.images) for batch in batches] == [8, 1]
    for batch in batches:
        expected = [eval_crop(source.read(sample), 16, 18) for sample in batch.samples.tolist()]
        assert torch.equal(batch.images, torch.stack(expected))


def test_a_crop_of_another_shape_is_not_spread_over_its_place() -> None:
    crop = Recorded([100])
    crop.image_size = 5
    with pytest.raises(AssertionError, match=r"a crop of \(3, 4, 4\), not \(3, 5, 5\)"):
        batch_of(crop)


# -------------------------------------------------------------------------------------------- after an error


class Gone(Pictures):
    """A source with a defect that is none of an image's."""

    def _read(self, index: int) -> Tensor:
        raise RuntimeError(f"the disk is gone at {index}")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_after_an_error_in_a_worker_none_is_left() -> None:
    loader = iter(TrainLoader(Gone(12), DATA, image_size=16, seed=5, batch_size=4, workers=2))
    before = set(multiprocessing.active_children())
    gc.disable()  # it ends them too late
    try:
        with pytest.raises(RuntimeError, match="the disk is gone"):
            next(loader)
        assert set(multiprocessing.active_children()) <= before
    finally:
        gc.enable()
