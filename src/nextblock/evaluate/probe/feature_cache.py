"""Features on disk: each kind in a memory-mapped file of its own, whose name tells what it was made from.

A directory of the cache holds `features.npy` (fp32, a row an image, in the source's order) and `about.json`
(its key, how many rows are written, and which images could not be read). Until all rows are there its name
begins with `.filling-`, and whoever asks for the same features goes on with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor

from nextblock.atomic import write_text
from nextblock.checkpoint import CheckpointError
from nextblock.data import BadSample, TooManyBadImages
from nextblock.errors import UsageError
from nextblock.evaluate.features import FeatureBatch

__all__ = ["ABOUT_FILE", "FILLING", "FeatureCache", "StoredFeatures"]

log = logging.getLogger(__name__)

FEATURES_FILE, ABOUT_FILE, FILLING = "features.npy", "about.json", ".filling-"

SAVE_EVERY_S = 5.0
"""What is written is flushed to the disk and counted so often: more is not lost to a kill."""

MakeBatches = Callable[[tuple[int, ...], int], Iterator[FeatureBatch]]
"""From the numbers of some kinds of features, and the image to begin with, to batches of them, of all images
from that one on in the source's order."""


class StoredFeatures(NamedTuple):
    """Features of a whole source, on disk."""

    arrays: tuple[Float[np.ndarray, "n ..."], ...]
    """One for each kind, a row an image."""
    bad: tuple[BadSample, ...]
    """Images that could not be read; their rows mean nothing."""

    def read(
        self, samples: Int64[np.ndarray, " b"]
    ) -> tuple[tuple[Float[Tensor, "r ..."], ...], Int64[Tensor, " r"]]:
        """Features of the readable images among these, and which they are."""
        missing = [one.sample for one in self.bad]
        kept = samples[~np.isin(samples, missing)] if missing else samples
        return tuple(torch.from_numpy(array[kept]) for array in self.arrays), torch.from_numpy(kept)

    def batches(self, size: int, device: torch.device) -> Iterator[FeatureBatch]:
        """All images in order, `size` at a time."""
        count = len(self.arrays[0])
        for start in range(0, count, size):
            features, samples = self.read(np.arange(start, min(start + size, count)))
            on_device = tuple(one.to(device) for one in features)
            yield FeatureBatch(on_device, samples, self.bad if start == 0 else ())


class FeatureCache:
    """Features kept in a directory, all together at most `max_gb`."""

    def __init__(self, directory: Path, max_gb: float) -> None:
        self.directory = directory
        self._max_gb = max_gb

    def get(
        self, keys: Sequence[Mapping[str, Any]], num_images: int, make: MakeBatches
    ) -> StoredFeatures | None:
        """Features by what they are made from, made in one pass where they are not there yet.

        `keys` hold what JSON can. None where they would take more than `max_gb`, or than the disk has.
        """
        places = [self.directory / _name(key) for key in keys]
        missing = tuple(number for number, place in enumerate(places) if not place.is_dir())
        if missing and not self._fill(
            [places[n] for n in missing], [keys[n] for n in missing], num_images, partial(make, missing)
        ):
            return None
        return _open(places)

    def clear(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _fill(
        self,
        places: Sequence[Path],
        keys: Sequence[Mapping[str, Any]],
        num_images: int,
        make: Callable[[int], Iterator[FeatureBatch]],
    ) -> bool:
        asides = [place.with_name(FILLING + place.name) for place in places]
        begun = _begun(asides)
        batches = make(begun.rows) if begun.rows < num_images else iter(())
        if not begun.rows:
            first, batches = _peeked(batches)
            begun = _Begun(0, tuple(tuple(one.shape[1:]) for one in first.features), [])
        if not self._has_room(asides, num_images * sum(4 * math.prod(shape) for shape in begun.shapes) / 1e9):
            for aside in asides:
                shutil.rmtree(aside, ignore_errors=True)
            return False
        for aside in asides:
            aside.mkdir(exist_ok=True, parents=True)
        if begun.rows:
            log.info("%d of %d images are encoded already", begun.rows, num_images)
        try:
            _write(asides, keys, begun, num_images, batches)
        except TooManyBadImages:
            for aside in asides:  # or the images would count as unreadable when they have been repaired
                shutil.rmtree(aside)
            raise
        for place, aside in zip(places, asides, strict=True):
            aside.replace(place)
        return True

    def _has_room(self, asides: Sequence[Path], needed_gb: float) -> bool:
        self.directory.mkdir(parents=True, exist_ok=True)
        there_gb = _size_gb(asides)  # which is part of what is needed
        free_gb = shutil.disk_usage(self.directory).free / 1e9
        others_gb = _size_gb(self.directory.iterdir()) - there_gb
        if others_gb + needed_gb <= self._max_gb and needed_gb - there_gb <= free_gb:
            return True
        log.info(
            "the features take %.3g GB, more than cache_gb %g leaves or the disk has: not kept",
            needed_gb,
            self._max_gb,
        )
        return False


class _Begun(NamedTuple):
    """How far features that are filled in together have come."""

    rows: int
    shapes: tuple[tuple[int, ...], ...]
    """Of one image's features, by kind; none where no row is written."""
    bad: list[BadSample]
    """Unreadable images among these rows."""


def _begun(asides: Sequence[Path]) -> _Begun:
    """What is written of all of these kinds."""
    abouts = [_read_about(aside) for aside in asides if (aside / ABOUT_FILE).is_file()]
    if len(abouts) < len(asides):
        return _Begun(0, (), [])
    least = min(abouts, key=lambda about: about["rows"])
    bad = [BadSample(*one) for one in least["bad"]]
    return _Begun(least["rows"], tuple(tuple(about["shape"]) for about in abouts), bad)


def _read_about(place: Path) -> dict[str, Any]:
    try:
        return json.loads((place / ABOUT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{place} holds damaged features ({error}); remove it") from error


def _size_gb(places: Iterable[Path]) -> float:
    files = (place / FEATURES_FILE for place in places)
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e9


def _name(key: Mapping[str, Any]) -> str:
    text = json.dumps(key, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _peeked(batches: Iterator[FeatureBatch]) -> tuple[FeatureBatch, Iterator[FeatureBatch]]:
    """The first batch with a readable image, and all batches."""
    seen: list[FeatureBatch] = []
    for batch in batches:
        seen.append(batch)
        if batch.features:
            return batch, chain(seen, batches)
    bad = [one for batch in seen for one in batch.bad]
    first = f", the first: {bad[0].name}: {bad[0].reason}" if bad else ""
    raise UsageError(f"none of the images could be read ({len(bad)} bad{first})")


def _write(
    asides: Sequence[Path],
    keys: Sequence[Mapping[str, Any]],
    begun: _Begun,
    num_images: int,
    batches: Iterator[FeatureBatch],
) -> None:
    """Write rows as they come. Not through a memory map: a full disk would kill the process."""
    done, _, bad = begun
    with ExitStack() as stack:
        files = [
            stack.enter_context(_opened(aside / FEATURES_FILE, (num_images, *shape), done))
            for aside, shape in zip(asides, begun.shapes, strict=True)
        ]

        def save() -> None:
            told = {"rows": done, "bad": [list(one) for one in bad]}
            for aside, key, shape, file in zip(asides, keys, begun.shapes, files, strict=True):
                _flush(file)
                write_text(aside / ABOUT_FILE, json.dumps({"key": key, "shape": shape, **told}) + "\n")

        saved_at_s = time.monotonic()
        try:
            for batch in batches:
                count = len(batch.samples) + len(batch.bad)
                features = batch.features or tuple(torch.empty(0, *shape) for shape in begun.shapes)
                for file, of_one in zip(files, features, strict=True):
                    rows = np.zeros((count, *of_one.shape[1:]), dtype="<f4")
                    rows[batch.samples.numpy() - done] = of_one.cpu().numpy()
                    _append(file, rows)
                bad += batch.bad
                done += count
                if time.monotonic() - saved_at_s >= SAVE_EVERY_S:
                    save()
                    saved_at_s = time.monotonic()
        finally:
            save()
    assert done == num_images, f"{done} of {num_images} images came"


def _opened(path: Path, shape: tuple[int, ...], done: int) -> IO[bytes]:
    """Open a file to append to after so many rows; what lies beyond them was not counted."""
    file = path.open("r+b" if done else "w+b")
    _write_header(file, shape)
    end = file.tell() + 4 * done * math.prod(shape[1:])
    file.truncate(end)
    file.seek(end)
    return file


def _flush(file: IO[bytes]) -> None:
    try:
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(file, error) from error


def _append(file: IO[bytes], rows: Float[np.ndarray, "b ..."]) -> None:
    try:
        file.write(rearrange(rows, "b ... -> (b ...)").data)
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: IO[bytes], error: OSError) -> CheckpointError:
    return CheckpointError(
        f"could not write {file.name}: {error}; make room on the disk, give --cache another place, or "
        "--cache_gb 0"
    )


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})


def _open(places: Sequence[Path]) -> StoredFeatures:
    arrays, bad = [], ()
    for place in places:
        about = _read_about(place)
        try:
            array = np.load(place / FEATURES_FILE, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise CheckpointError(f"{place} holds damaged features ({error}); remove it") from error
        assert math.prod(array.shape) > 0
        arrays.append(array)
        bad = tuple(BadSample(*one) for one in about["bad"])
    return StoredFeatures(tuple(arrays), bad)
