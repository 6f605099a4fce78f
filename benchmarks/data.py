"""From JPEG files to training crops on one core, against Pillow and torchvision v1; and waiting for images.

The plain pipeline is that of most training scripts: Pillow decodes, crops and resizes, `ToTensor` and
`Normalize` make floats. Ours is the loader with each of its decoders; it leaves bytes, which the device
normalises. The photos are cut from scikit-learn's two.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision import transforms

from common import Row, median_of, now_s, parse, report, take_turns
from nextblock.config import DataConfig
from nextblock.data import Batch, Source, TrainLoader, jpeg_decoder, normalize, open_source
from nextblock.data.augment import Crop

SIZES = {"500x375": (500, 375), "2000x1500": (2000, 1500)}
QUICK_SIZES = {"40x30": (40, 30), "80x60": (80, 60)}
BUDGETS = {"500x375, auto": "at least 2.0", "2000x1500, auto": "at least 2.4"}
PHOTOS = 8
"""Files of a size, which are also a batch."""
WARMUP = 2
DECODE_S = 4e-3
"""Of an image, to measure waiting."""
Decoder = Literal["auto", "pillow", "fast"]
DECODERS: tuple[Decoder, ...] = ("auto", "pillow", "fast")
EXACT: tuple[Decoder, ...] = ("auto", "pillow")
MAX_LEVELS = 2.5
"""Between our pixels and plain ones, of 255: Pillow and torch round what they resize differently."""


def write_photos(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """Write a folder of JPEG files for every size: cuts of 4:3."""
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for name, size in sizes.items():
        (folder / name).mkdir()
        for number in range(PHOTOS):
            photo = photos[number % len(photos)]
            width = round(photo.height * 4 / 3)
            left = (photo.width - width) * number // (PHOTOS - 1)
            cut = photo.resize(size, Image.Resampling.LANCZOS, (left, 0, left + width, photo.height))
            cut.save(folder / name / f"{number}.jpg", quality=90)


def plain_batches(folder: Path, image_size: int, data: DataConfig) -> Iterator[Float[Tensor, "b c h w"]]:
    """Crops of all files of a folder, as most training scripts make them."""
    bicubic = transforms.InterpolationMode.BICUBIC
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size, data.crop_scale, data.crop_ratio, bicubic),
            transforms.RandomHorizontalFlip(data.flip),
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )
    while True:
        images = (Image.open(path).convert("RGB") for path in sorted(folder.iterdir()))
        yield torch.stack([torch.as_tensor(augment(image)) for image in images])


def our_batches(folder: Path, image_size: int, data: DataConfig) -> Iterator[Batch]:
    """The same by our loader, as bytes."""
    source = open_source(str(folder), data)
    loader = TrainLoader(source, data, image_size=image_size, seed=0, batch_size=PHOTOS)
    return (batch for step in loader for batch in step.micro_batches)


def time_crops(
    folder: Path, sizes: Iterable[str], decoder: Decoder | None, image_size: int, batches: int
) -> dict[str, list[float]]:
    """Seconds of batches by size, with one of our decoders, or (None) of the plain pipeline."""
    laps_s: dict[str, list[float]] = {size: [] for size in sizes}
    for size, laps in laps_s.items():
        if decoder is None:
            iterator = plain_batches(folder / size, image_size, DataConfig())
        else:
            iterator = our_batches(folder / size, image_size, DataConfig(decoder=decoder))
        for number in range(WARMUP + batches):
            started_s = now_s()
            next(iterator)
            if number >= WARMUP:
                laps.append(now_s() - started_s)
    return laps_s


def pixel_difference(folder: Path, decoder: Decoder, image_size: int) -> float:
    """The largest difference between ours and plain, in levels of 255, if a crop is the whole photo."""
    data = DataConfig(crop_scale=(1.0, 1.0), crop_ratio=(4 / 3, 4 / 3), flip=0.0, decoder=decoder)
    data = replace(data, mean=(0.0,) * 3, std=(1.0,) * 3)
    batch, plain = next(our_batches(folder, image_size, data)), next(plain_batches(folder, image_size, data))
    ours = normalize(batch.images, data.mean, data.std)[batch.samples.argsort()]
    return float((ours - plain).abs().max() * 255)


class Pause(Crop):
    """Grey images, each of which takes some milliseconds."""

    def read(self, source: Source, key: object) -> Tensor:  # noqa: ARG002
        """Sleep instead of decoding."""
        time.sleep(DECODE_S)
        return torch.zeros(3, 32, 32, dtype=torch.uint8)


def time_waiting(batch_size: int, workers: int, steps: int) -> dict[str, list[float]]:
    """Seconds of steps, and of waiting in them, if workers decode 1.6 times as fast as a step computes.

    Decoding and computing are pauses, so the result depends on the loader alone.
    """
    data, laps_s = DataConfig(epoch_samples=2 * batch_size), {"step": [], "waiting": []}
    source, crop = open_source("digits", data), Pause(data=data, image_size=32)
    loader = TrainLoader(
        source,
        data,
        image_size=32,
        seed=0,
        batch_size=batch_size,
        micro_batch_size=64,
        workers=workers,
        crop=crop,
    )
    for step in islice(loader, 1 + steps):
        started_s, computed_s = time.perf_counter(), 0.0
        for batch in step.micro_batches:
            before_s = time.perf_counter()
            time.sleep(1.6 * len(batch.samples) * DECODE_S / workers)
            computed_s += time.perf_counter() - before_s
        if step.index > 0:  # in the first one workers start
            laps_s["step"].append(time.perf_counter() - started_s)
            laps_s["waiting"].append(laps_s["step"][-1] - computed_s)
    return laps_s


def main() -> None:
    """Measure all pipelines and print how they compare."""
    options = parse(__doc__, threads=1)
    sizes, image_size, batches = (QUICK_SIZES, 16, 2) if options.quick else (SIZES, 256, 10)
    waits = {64: (1, 1)} if options.quick else {2048: (4, 3), 4096: (4, 3)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder, sizes)
        variants: dict[str, Any] = {
            str(decoder): partial(time_crops, folder, list(sizes), decoder, image_size, batches)
            for decoder in (None, *DECODERS)
        }
        variants |= {str(batch): partial(time_waiting, batch, *wait) for batch, wait in waits.items()}
        found = take_turns(variants, options)
        levels = [pixel_difference(folder / size, one, image_size) for size in sizes for one in EXACT]
        difference = max(levels)
    if not difference <= MAX_LEVELS:
        sys.exit(f"no ratio: our pixels and plain ones differ by up to {difference:.1f} of 255 levels")
    rows = []
    for size in sizes:
        plain = PHOTOS / median_of(found["None"], size)
        for decoder in DECODERS:
            ours, what = PHOTOS / median_of(found[decoder], size), f"{size}, {decoder}"
            label = f"{what} ({jpeg_decoder(decoder)})"
            rows.append(Row(label, ours, plain, "images/s", ours / plain, BUDGETS.get(what, "")))
    for batch in waits:
        waited_s, step_s = (median_of(found[str(batch)], key) for key in ("waiting", "step"))
        what = f"waiting at batch {batch}, against the step"
        rows.append(Row(what, waited_s, step_s, "s", waited_s / step_s, "at most 0.05"))
    report("data", options, rows, crop_px=image_size, largest_pixel_difference=difference)


if __name__ == "__main__":
    main()
