"""Features of a source of images: encoded once, indexed by image, and shared by evaluations.

On disk, each kind of features has its own directory, named by a hash of the features' identity:

    features.npy   fp32, one row per image
    state.npy      one byte per image: whether it is encoded
    about.json     the identity

Rows are filled on demand, in any order and by any number of processes. After a kill, the next command fills
the missing rows. Unreadable images are not recorded, so every command tries them again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from nextblock.atomic import WriteError, make_directory, mark_output, write_text, writing
from nextblock.config import DataConfig, Size, pair
from nextblock.data import (
    BadSample,
    Batch,
    Source,
    TooManyBadImages,
    eval_batches,
    normalize,
    resolve_workers,
)
from nextblock.data.loader import most_bad
from nextblock.train.distributed import ALONE, Group

Extract = Callable[[Tensor], tuple[Tensor, ...]]
"""Maps normalised images (b c h w) to features, each (b n d) or (b d)."""

FLUSH_EVERY_S = 5.0
"""A kill loses at most this much work."""


class NonFiniteFeaturesError(RuntimeError):
    """Features are NaN or infinite."""


class NoFeaturesError(RuntimeError):
    """No image could be read."""


class _Kind(NamedTuple):
    """One kind of features of a source: arrays in memory, or mapped from a directory."""

    rows: Float[np.ndarray, "n ..."]
    state: UInt8[np.ndarray, " n"]
    """1 if an image is encoded, else 0."""

    def flush(self) -> None:
        """Write mapped arrays to disk."""
        for array in self:
            if isinstance(array, np.memmap):
                array.flush()


@dataclass(eq=False)
class FeatureTable:
    """Features of the images of a source, of one kind or several, indexed by image.

    `extract` returns one tensor per kind; `keys` are their identities, ready for JSON. Without a `directory`,
    the table is in memory. `image_size` is the encoder's.
    """

    extract: Extract
    source: Source
    data: DataConfig
    image_size: Size
    _: KW_ONLY
    batch_size: int
    device: torch.device
    group: Group = ALONE
    directory: Path | None = None
    keys: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        self._bad: dict[int, BadSample] = {}
        self._kinds: tuple[_Kind, ...] = ()

    @property
    def bad(self) -> tuple[BadSample, ...]:
        """Unreadable images found so far, in the source's order."""
        return tuple(self._bad[number] for number in sorted(self._bad))

    def readable(self, indices: Int64[np.ndarray, " n"] | None = None) -> Int64[np.ndarray, " m"]:
        """The given indices, or all, whose images have features."""
        chosen = np.arange(len(self.source)) if indices is None else np.asarray(indices, dtype=np.int64)
        return chosen[self._is_encoded(chosen)]

    def _is_encoded(self, chosen: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        return np.array([kind.state[chosen] for kind in self._kinds]).min(axis=0) == 1

    def read(self, indices: Int64[np.ndarray, " n"], kind: int = 0) -> Float[Tensor, "n ..."]:
        """Read the features of encoded images into main memory, in the order of `indices`."""
        return torch.from_numpy(self._kinds[kind].rows[indices])

    def fill(
        self,
        indices: Int64[np.ndarray, " n"] | None = None,
        *,
        should_stop: Callable[[], bool] = bool,
        progress: Callable[[int, int], None] | None = None,
    ) -> bool:
        """Encode the given images, or all, that are not encoded yet; a collective call.

        Each rank encodes its share and can then read all rows. Every rank calls `extract` once per batch, on
        zeros when its share is done, because the model may be sharded over ranks. Returns False if
        `should_stop`, which is called once per batch and must agree on all ranks. `progress` is called with
        the number of images encoded and the total. Raises `NonFiniteFeaturesError`, `NoFeaturesError` and
        `TooManyBadImages` on all ranks.
        """
        group = self.group
        if not self._kinds:
            self._kinds = self._open()
        wanted = np.arange(len(self.source)) if indices is None else np.asarray(indices, dtype=np.int64)
        missing = wanted[~self._is_encoded(wanted) & ~np.isin(wanted, list(self._bad))]
        if group.any(len(missing)):
            missing = group.broadcast(missing)
            if not self._encode(missing, should_stop, progress):
                return False
            self._exchange(missing)
        with group.together():
            check_bad(self.bad, self.source, self.data)
            if len(wanted) and not len(self.readable(wanted)):
                first = self._bad[int(wanted[0])]
                raise NoFeaturesError(
                    f"no image of {self.source.spec} could be read; the first: {first.name}: {first.reason}"
                )
        return True

    def _encode(
        self,
        missing: Int64[np.ndarray, " n"],
        should_stop: Callable[[], bool],
        progress: Callable[[int, int], None] | None,
    ) -> bool:
        """Encode this rank's share of the missing images; False if stopped."""
        group, data = self.group, self.data
        workers = resolve_workers(data.workers, self.source, group.sharing_cores)
        done: list[np.ndarray] = []

        def flush() -> None:
            # Rows reach the disk before their state: a kill in between only repeats work.
            for kind in self._kinds:
                kind.flush()
                kind.state[np.concatenate(done)] = 1
                kind.flush()

        failure: str | None = None
        flushed_s, count, is_stopped = time.monotonic(), 0, False
        for batch in eval_batches(
            self.source, data, self.image_size, self.batch_size, missing, workers, group.rank, group.size
        ):
            if should_stop():
                is_stopped = True
                break
            features = features_of_batch(batch, self.extract, data, self.device, self.image_size)
            failure = failure or non_finite(features, batch)
            samples = batch.samples.numpy()
            for kind, values in zip(self._kinds, features, strict=True):
                kind.rows[samples] = values[: len(samples)].cpu().numpy()
            done.append(samples)
            self._bad |= {sample.sample: sample for sample in batch.bad}
            count += len(samples) + len(batch.bad)
            if progress is not None:
                progress(min(count * group.size, len(missing)), len(missing))
            if failure is None and time.monotonic() - flushed_s >= FLUSH_EVERY_S:
                flush()
                done.clear()
                flushed_s = time.monotonic()
        failures = [message for message in group.gather(failure) if message]
        with group.together():
            if failures:
                raise NonFiniteFeaturesError(failures[0])
        if done:
            flush()
        return not is_stopped

    def _exchange(self, missing: Int64[np.ndarray, " n"]) -> None:
        """Give every rank the rows of the others."""
        group = self.group
        if group.size == 1:
            return
        self._bad |= {sample.sample: sample for bad in group.gather(self.bad) for sample in bad}
        if self.directory is not None:  # all ranks map the same files; mapping again drops stale pages
            self._kinds = self._open()
            return
        for rank in range(group.size):
            start, stop = (len(missing) * number // group.size for number in (rank, rank + 1))
            share = missing[start:stop]  # must match how `eval_batches` divides
            for kind in self._kinds:
                # Broadcasting each share in place avoids `all_gather`'s second copy of all rows.
                rows, state = torch.from_numpy(kind.rows[share]), torch.from_numpy(kind.state[share])
                if len(share):
                    dist.broadcast(rows, src=rank, group=group.processes)
                    dist.broadcast(state, src=rank, group=group.processes)
                kind.rows[share], kind.state[share] = rows.numpy(), state.numpy()

    def _open(self) -> tuple[_Kind, ...]:
        shapes = feature_shapes(self.extract, self.data, self.image_size, self.device)
        n = len(self.source)
        if self.directory is None:
            # np.zeros allocates pages only when they are written, so rows that are never filled cost nothing.
            return tuple(_Kind(np.zeros((n, *s), "f4"), np.zeros(n, "u1")) for s in shapes)
        texts = [json.dumps(key, sort_keys=True).encode() for key in self.keys]
        paths = [self.directory / hashlib.blake2b(text, digest_size=8).hexdigest() for text in texts]
        with self.group.together():
            for path, key, shape in zip(paths, self.keys, shapes, strict=True):
                if self.group.is_main:
                    _make(path, key, (n, *shape))
        with self.group.together():
            return tuple(_map(path) for path in paths)


def feature_shapes(
    extract: Extract, data: DataConfig, image_size: Size, device: torch.device
) -> list[tuple[int, ...]]:
    """Shapes of one image's features, without the batch dimension."""
    with torch.no_grad():
        blank = torch.zeros(1, data.channels, *pair(image_size), device=device)
        return [tuple(tensor.shape[1:]) for tensor in extract(blank)]


def features_of_batch(
    batch: Batch, extract: Extract, data: DataConfig, device: torch.device, image_size: Size
) -> tuple[Float[Tensor, "b ..."], ...]:
    """Normalise a batch on the device and extract its features, without gradients.

    A batch without readable images gives the features of one image of zeros.
    """
    with torch.no_grad():
        if not len(batch.samples):
            return extract(torch.zeros(1, data.channels, *pair(image_size), device=device))
        images = batch.images.to(device, non_blocking=True)
        if not images.is_floating_point():  # float images are normalised already
            images = normalize(images, data.mean, data.std)
        return extract(images)


def non_finite(features: tuple[Tensor, ...], batch: Batch) -> str | None:
    """Describe the NaN or infinite features of a batch; None if there are none."""
    if not len(batch.samples):
        return None
    finite = torch.stack([tensor.isfinite().flatten(1).all(dim=1) for tensor in features]).all(dim=0).cpu()
    if finite.all():
        return None
    return (
        f"{int((~finite).sum())} of {len(finite)} feature vectors contain NaN or inf (first: image "
        f"{int(batch.samples[~finite][0])}); encode with --precision fp32, or check the weights: training "
        "may have diverged"
    )


def check_bad(bad: Sequence[BadSample], source: Source, data: DataConfig) -> None:
    """Raise `TooManyBadImages` if more images are unreadable than `data.max_bad_fraction` allows."""
    if len(bad) <= most_bad(data.max_bad_fraction, len(source)):
        return
    first = "".join(f"\n  {sample.name}: {sample.reason}" for sample in bad[:10])
    raise TooManyBadImages(
        f"{len(bad)} of the {len(source)} images of {source.spec} cannot be read, more than "
        f"max_bad_fraction {data.max_bad_fraction:g} allows; the first are:{first}\n"
        "Repair or remove them, or raise --max_bad_fraction."
    )


def _make(path: Path, key: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """Make an empty table unless there is one. about.json is written last, and marks the files complete."""
    make_directory(path)
    with writing(path):
        mark_output(path.parent)
    # Two commands may share a cache: the second must not empty the files that the first is filling.
    with writing(path), FileLock(path / ".lock"):
        if (path / "about.json").is_file():
            return
        for name, dtype, dims in (("features.npy", "<f4", shape), ("state.npy", "u1", shape[:1])):
            array = np.lib.format.open_memmap(path / name, mode="w+", dtype=dtype, shape=dims)
            size = (path / name).stat().st_size
            del array
            if hasattr(os, "posix_fallocate"):
                # On a full disk this raises; writing through the map later would kill the process (SIGBUS).
                with (path / name).open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, size)
        write_text(path / "about.json", json.dumps(key, indent=1) + "\n")


def _map(path: Path) -> _Kind:
    files = [path / "features.npy", path / "state.npy"]
    try:
        for file in files:
            np.load(file, mmap_mode="r")  # raises for a truncated file, which "r+" would extend with zeros
        rows, state = (np.load(file, mmap_mode="r+") for file in files)
    except (OSError, ValueError, EOFError) as error:
        raise WriteError(f"{path} contains damaged features ({error}); remove it") from error
    return _Kind(rows, state)
