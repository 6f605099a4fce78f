"""`nextblock bench data`: from files to training crops on one core, against Pillow and torchvision v1.

Besides, how long a step waits for images where workers decode faster than it computes.

The plain pipeline is what most training scripts have: Pillow decodes, crops and resizes, `ToTensor` and
`Normalize` make floats of every image. Ours is the loader itself, with each decoder there is; it leaves
bytes, which are normalised on the device, and is measured with that done on the CPU as well. The photos are
scikit-learn's two, cut and scaled to the stated sizes and written as JPEG into a temporary folder.
"""

from __future__ import annotations

import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from nextblock.bench.measure import BenchResult, Clock, Row, Stopwatch, take_turns
from nextblock.config import DataConfig
from nextblock.settings import check_types, require

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

__all__ = ["DataBench", "measure_crops", "measure_reading", "plain_pipeline", "write_photos"]

SIZES = {"500x375": (500, 375), "2000x1500": (2000, 1500)}
"""Width and height."""
SPEEDUP = {"500x375": 2.0, "2000x1500": 2.4}
"""What the ratio of the best decoder should reach."""
PHOTOS = 8
"""Files of a size, which are also a batch."""
QUALITY = 90
WARMUP_STEPS, QUICK_STEPS = 2, 3
CROPS, READING = "nextblock.bench.data:measure_crops", "nextblock.bench.data:measure_reading"
WAITING = "nextblock.bench.data:measure_waiting"
WAITING_BATCHES = (2048, 4096)
MAX_WAITING = 5.0
"""Percent of a step spent waiting for images, at most."""
FLOATS = "floats"
NEEDS = {"auto": "torchcodec", "pillow": "PIL", "fast": "PIL"}
"""The package that makes a setting of data.decoder what it is."""
EXACT = ("auto", "pillow")
"""Decoders that make the same pixels as Pillow."""

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DataBench:
    """How long to measure, and for which crop."""

    image_size: int = 256
    """Side of the training crop in pixels."""
    steps: int = 10
    """Measured batches in a turn, of each size."""
    rounds: int = 3
    """How often each variant has its turn, every time in a new process."""
    clock: Clock = "wall"
    """Seconds as they pass, or CPU seconds: for a machine that is not yours alone."""
    quick: bool = False
    """One short turn: a first idea."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("image_size", "steps", "rounds"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; use at least 1")

    def run(self) -> BenchResult:
        """Write photos, measure all pipelines on them, and compare."""
        decoders = [name for name, package in NEEDS.items() if find_spec(package) is not None]
        with tempfile.TemporaryDirectory() as folder:
            write_photos(Path(folder))
            results = take_turns(self._jobs(decoders, folder), 1 if self.quick else self.rounds)
            kilobytes = {size: _mean_kb(Path(folder) / size) for size in SIZES}
        first = results["plain"][0]
        return BenchResult(
            bench="data",
            rows=(
                *_crop_rows(results, decoders),
                *_reading_rows(results["reading"]),
                *_waiting_rows(results["waiting"]),
            ),
            machine={name: first[name] for name in ("device", "threads", "torch")},
            details={
                "image_size": self.image_size,
                "clock": self.clock,
                "decoders": {name: results[name][0]["decoder"] for name in decoders},
                "file_kb": kilobytes,
                "laps_s": {
                    name: {label: _laps(runs, label) for label in runs[0]["laps_s"]}
                    for name, runs in results.items()
                },
            },
            notes=self._notes(kilobytes),
        )

    def _jobs(self, decoders: Iterable[str], folder: str) -> dict[str, tuple[str, dict[str, Any]]]:
        job = {
            "folder": folder,
            "steps": QUICK_STEPS if self.quick else self.steps,
            "image_size": self.image_size,
            "clock": self.clock,
            "threads": 1,
        }
        names = ("plain", *decoders)
        return {
            **{name: (CROPS, {**job, "variant": name}) for name in names},
            "reading": (READING, job),
            "waiting": (WAITING, job),
        }

    def _notes(self, kilobytes: dict[str, float]) -> tuple[str, ...]:
        files = ", ".join(f"{size} of {kb:.0f} kB" for size, kb in kilobytes.items())
        return (
            f"training crops of {self.image_size} px on one core"
            + (", in CPU seconds" if self.clock == "cpu" else ""),
            f"JPEG files of scikit-learn's photos, quality {QUALITY}, in the system's cache: {files}",
            "plain: Pillow, torchvision v1 transforms, normalised floats; ours: bytes, by each data.decoder, "
            "which the device normalises, or (floats) normalised here as well",
        )


def _crop_rows(results: dict[str, list[Result]], decoders: list[str]) -> Iterable[Row]:
    """The best exact decoder on each size, with its budget, then all decoders."""
    exact = [name for name in EXACT if name in decoders]
    for size in SIZES:
        best = max(exact, key=lambda name: _per_s(results[name], size))
        yield _row(f"{size}, best exact decoder", results, best, size, size, SPEEDUP[size])
    for size in SIZES:
        for name in decoders:
            told = f"{size}, {name} ({results[name][0]['decoder']})"
            yield _row(told, results, name, size, size)
            yield _row(f"{told}, {FLOATS}", results, name, f"{size} {FLOATS}", size)


def _row(
    what: str,
    results: dict[str, list[Result]],
    name: str,
    label: str,
    plain_label: str,
    at_least: float | None = None,
) -> Row:
    ours_per_s, plain_per_s = _per_s(results[name], label), _per_s(results["plain"], plain_label)
    ratio = ours_per_s / plain_per_s
    return Row(what=what, ours=ours_per_s, plain=plain_per_s, unit="images/s", ratio=ratio, at_least=at_least)


def _reading_rows(runs: list[Result]) -> Iterable[Row]:
    """How fast files come out of a tar, beside a folder; not decoded."""
    for size in SIZES:
        tar_per_s, folder_per_s = (_per_s(runs, f"{size} {kind}") for kind in ("tar", "folder"))
        yield Row(
            what=f"{size}, reading only: tar, folder",
            ours=tar_per_s,
            plain=folder_per_s,
            unit="images/s",
            ratio=tar_per_s / folder_per_s,
        )


def _waiting_rows(runs: list[Result]) -> Iterable[Row]:
    for batch in WAITING_BATCHES:
        share = sum(_laps(runs, f"{batch} waiting")) / sum(_laps(runs, f"{batch} step"))
        yield Row(
            what=f"batch {batch}, waiting for images",
            ours=100 * share,
            unit="% of a step",
            ratio=share,
            at_most=MAX_WAITING,
        )


def _laps(runs: Iterable[Result], label: str) -> list[float]:
    return [lap_s for run in runs for lap_s in run["laps_s"][label]]


def _per_s(runs: Iterable[Result], label: str) -> float:
    return PHOTOS / median(_laps(runs, label))


# ---------------------------------------------------------------------------------------------- the photos


def write_photos(folder: Path) -> None:
    """For every size a folder of that name with JPEG files, and a tar of them beside it."""
    for size, pixels in SIZES.items():
        (folder / size).mkdir()
        for number, photo in enumerate(_photos(pixels)):
            photo.save(folder / size / f"{number}.jpg", quality=QUALITY)
        with tarfile.open(folder / f"{size}.tar", "w") as tar:
            for path in sorted((folder / size).iterdir()):
                tar.add(path, path.name)


def _photos(size: tuple[int, int]) -> Iterable[Image.Image]:
    """Cuts of 4:3 out of scikit-learn's photos, of which each makes as many as the other."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number in range(PHOTOS):
        photo = photos[number % len(photos)]
        height = photo.height
        width = round(height * 4 / 3)
        left = (photo.width - width) * number // max(1, PHOTOS - 1)
        yield photo.resize(size, Image.Resampling.LANCZOS, box=(left, 0, left + width, height))


def _mean_kb(folder: Path) -> float:
    sizes = [path.stat().st_size for path in folder.iterdir()]
    return sum(sizes) / len(sizes) / 1000


# ------------------------------------------------------------------------------------------- the pipelines


def measure_crops(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every batch of training crops of one variant, by size."""
    import torch

    torch.set_num_threads(job["threads"])
    watch = Stopwatch(clock=job["clock"])
    decoder = "pillow"
    for size in SIZES:
        folder = Path(job["folder"]) / size
        if job["variant"] == "plain":
            _time_batches(watch, job["steps"], plain_pipeline(folder, job["image_size"]), size)
        else:
            decoder = _measure_ours(watch, folder, size, job)
    return {
        "laps_s": watch.laps_s,
        "decoder": decoder,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _measure_ours(watch: Stopwatch, folder: Path, size: str, job: dict[str, Any]) -> str:
    """Time the loader, and the loader with its batches normalised; what decodes JPEG."""
    from nextblock.data import TrainLoader, jpeg_decoder, normalize, open_source

    data = DataConfig(decoder=job["variant"])
    source = open_source(str(folder), data)
    loader = TrainLoader(source, data, image_size=job["image_size"], seed=0, batch_size=PHOTOS)
    steps = iter(loader)

    def batch() -> Tensor:
        return next(next(steps).micro_batches).images

    _time_batches(watch, job["steps"], batch, size)
    _time_batches(watch, job["steps"], lambda: normalize(batch(), data.mean, data.std), f"{size} {FLOATS}")
    return jpeg_decoder(data.decoder)


def plain_pipeline(folder: Path, image_size: int, data: DataConfig | None = None) -> Callable[[], Tensor]:
    """What makes a batch of all files of a folder, as most training scripts do it."""
    import torch
    from PIL import Image
    from torchvision import transforms

    data = data or DataConfig()
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                image_size,
                scale=data.crop_scale,
                ratio=data.crop_ratio,
                interpolation=transforms.InterpolationMode.BICUBIC,
            ),
            transforms.RandomHorizontalFlip(data.flip),
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )
    paths = sorted(folder.iterdir())

    def batch() -> Tensor:
        images = []
        for path in paths:
            with path.open("rb") as file:
                images.append(augment(Image.open(file).convert("RGB")))
        return torch.stack(images)

    return batch


def measure_reading(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of reading the content of as many files as a batch, from a folder and from a tar."""
    from nextblock.data import open_source

    watch = Stopwatch(clock=job["clock"])
    for size in SIZES:
        for kind, spec in (("folder", size), ("tar", f"{size}.tar")):
            source = open_source(str(Path(job["folder"]) / spec), DataConfig(cache_dir=job["folder"]))

            def read(source: Any = source) -> None:
                for index in range(PHOTOS):
                    source.content(index)

            _time_batches(watch, 10 * job["steps"], read, f"{size} {kind}")
    return {"laps_s": watch.laps_s}


def measure_waiting(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of steps that compute 1.6 times as long as four workers decode, and of their waits for images.

    Decoding and computing are pauses, so that the figure depends on the loader alone.
    """
    from nextblock.data import TrainLoader

    watch, steps = Stopwatch(clock="wall"), 2 if job["steps"] <= QUICK_STEPS else 4
    workers, decode_s = 4, 0.004
    for batch in WAITING_BATCHES:
        loader = TrainLoader(
            _pauses(2 * batch, decode_s),
            DataConfig(),
            image_size=32,
            seed=0,
            batch_size=batch,
            micro_batch_size=64,
            workers=workers,
        )
        for step in islice(loader, steps):
            is_warm = step.index > 0
            started_s, waited_s = watch.now_s(), 0.0
            while True:
                asked_s = watch.now_s()
                images = next(step.micro_batches, None)
                waited_s += watch.now_s() - asked_s
                if images is None:
                    break
                time.sleep(1.6 * len(images.samples) * decode_s / workers)
            if is_warm:
                watch.laps_s.setdefault(f"{batch} step", []).append(watch.now_s() - started_s)
                watch.laps_s.setdefault(f"{batch} waiting", []).append(waited_s)
    return {"laps_s": watch.laps_s}


def _pauses(number: int, decode_s: float) -> Any:
    """A source of grey images, each of which takes so long to read."""
    import torch

    from nextblock.data import Source

    class Pauses(Source):
        spec = "pauses"

        def __len__(self) -> int:
            return number

        @property
        def has_labels(self) -> bool:
            return False

        def _read(self, index: int) -> Tensor:  # noqa: ARG002
            time.sleep(decode_s)
            return torch.zeros(3, 32, 32, dtype=torch.uint8)

        def _name(self, index: int) -> str:
            return str(index)

        def _find_labels(self) -> Any:
            raise ValueError("no labels")

        def _make_fingerprint(self) -> str:
            return self.spec

    return Pauses()


def _time_batches(watch: Stopwatch, steps: int, make: Callable[[], Any], label: str) -> None:
    for _ in range(WARMUP_STEPS):
        make()
    for _ in range(steps):
        with watch.lap(label):
            make()
