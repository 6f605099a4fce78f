"""Features on disk: each kind in a memory-mapped file of its own, whose name tells what it was made from.

A directory of the cache holds `features.npy` (fp32, a row an image, in the source's order) and `about.json`
(its key, and the images that could not be read). It appears whole or not at all: what is there can be used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor

from nextblock.checkpoint import CheckpointError, write_aside
from nextblock.data import BadSample
from nextblock.evaluate.features import FeatureBatch

__all__ = ["FeatureCache", "StoredFeatures"]

log = logging.getLogger(__name__)

FEATURES_FILE, ABOUT_FILE = "features.npy", "about.json"

MakeBatches = Callable[[tuple[int, ...]], Iterator[FeatureBatch]]
"""From the numbers of some kinds of features to batches of them, of all images in the source's order."""


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
            [places[n] for n in missing], [keys[n] for n in missing], num_images, make(missing)
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
        batches: Iterator[FeatureBatch],
    ) -> bool:
        first, batches = _peeked(batches)
        needed_gb = num_images * sum(one[0].numel() * 4 for one in first.features) / 1e9
        self.directory.mkdir(parents=True, exist_ok=True)
        free_gb = shutil.disk_usage(self.directory).free / 1e9
        if self._size_gb() + needed_gb > self._max_gb or needed_gb > free_gb:
            log.info(
                "the features take %.3g GB, more than cache_gb %g leaves or the disk has: not kept",
                needed_gb,
                self._max_gb,
            )
            return False
        asides = [place.with_name(f".filling-{place.name}") for place in places]
        try:
            for aside in asides:
                shutil.rmtree(aside, ignore_errors=True)  # of one that was killed
                aside.mkdir()
            bad = _write(asides, [one.shape[1:] for one in first.features], num_images, batches)
            for place, aside, key in zip(places, asides, keys, strict=True):
                with write_aside(place) as target:
                    about = json.dumps({"key": key, "bad": [list(one) for one in bad]})
                    (aside / ABOUT_FILE).write_text(about + "\n", encoding="utf-8")
                    aside.replace(target)
        finally:
            for aside in asides:
                shutil.rmtree(aside, ignore_errors=True)
        return True

    def _size_gb(self) -> float:
        return sum(path.stat().st_size for path in self.directory.glob(f"*/{FEATURES_FILE}")) / 1e9


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
    raise ValueError(f"none of the images could be read ({len(bad)} bad{first})")


def _write(
    asides: Sequence[Path],
    shapes: Sequence[torch.Size],
    num_images: int,
    batches: Iterator[FeatureBatch],
) -> list[BadSample]:
    """Write rows as they come. Not through a memory map: a full disk would kill the process."""
    bad: list[BadSample] = []
    done = 0
    with ExitStack() as stack:
        files = [stack.enter_context((aside / FEATURES_FILE).open("wb")) for aside in asides]
        for file, shape in zip(files, shapes, strict=True):
            _write_header(file, (num_images, *shape))
        for batch in batches:
            bad += batch.bad
            count = len(batch.samples) + len(batch.bad)
            features = batch.features or tuple(torch.empty(0, *shape) for shape in shapes)
            for file, of_one in zip(files, features, strict=True):
                rows = np.zeros((count, *of_one.shape[1:]), dtype="<f4")
                rows[batch.samples.numpy() - done] = of_one.cpu().numpy()
                _append(file, rows)
            done += count
    assert done == num_images, f"{done} of {num_images} images came"
    return bad


def _append(file: IO[bytes], rows: Float[np.ndarray, "b ..."]) -> None:
    try:
        file.write(rearrange(rows, "b ... -> (b ...)").data)
    except OSError as error:
        raise CheckpointError(
            f"could not write {file.name}: {error}; make room on the disk, give --cache another place, or "
            "--cache_gb 0"
        ) from error


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})


def _open(places: Sequence[Path]) -> StoredFeatures:
    arrays, bad = [], ()
    for place in places:
        try:
            array = np.load(place / FEATURES_FILE, mmap_mode="r")
            about = json.loads((place / ABOUT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, EOFError) as error:
            raise CheckpointError(f"{place} holds damaged features ({error}); remove it") from error
        assert math.prod(array.shape) > 0
        arrays.append(array)
        bad = tuple(BadSample(*one) for one in about["bad"])
    return StoredFeatures(tuple(arrays), bad)
