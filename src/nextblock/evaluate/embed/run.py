"""Features of all images of a source, written to a file; a run that was cut off goes on where it was.

Until the file is finished, features lie in a folder beside it, `.NAME.partial`, with a count of the images
that are done. It is kept at the end of a batch, so that the batches after a restart are those that an
uninterrupted run makes, and their features too, to the last bit.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from nextblock.atomic import exclusive, write_text
from nextblock.config import DataConfig
from nextblock.data import BadSample, Source, TooManyBadImages, open_source
from nextblock.data.sources import absolute_spec
from nextblock.errors import UsageError
from nextblock.evaluate.embed.config import EmbedConfig, FeatureSettings
from nextblock.evaluate.embed.files import (
    Embeddings,
    EmbeddingsError,
    Origin,
    Rows,
    check_writable,
    finish_npy,
    npy_layout,
    read_embeddings,
    read_origin,
    start_npy,
    write,
)
from nextblock.evaluate.features import (
    FeatureBatch,
    check_bad,
    encoder_extract,
    iterate_features,
    open_model,
)
from nextblock.evaluate.layers import layer_choices
from nextblock.evaluate.results import differences, identity_of
from nextblock.models import EncoderModel
from nextblock.models.heads import FeatureConfig
from nextblock.train.runtime import choose_device, process_settings

__all__ = ["embed", "embed_model", "feature_configs"]

log = logging.getLogger(__name__)

COMMIT_EVERY_S, TELL_EVERY_S = 2.0, 30.0
DTYPES = {"fp32": (torch.float32, np.dtype(np.float32)), "fp16": (torch.float16, np.dtype(np.float16))}


def embed(config: EmbedConfig) -> Embeddings:
    """Write the features of `config.data` to `config.out`, or go on with it, and open the file.

    A finished file of the same model, images and settings is opened as it is; any other is refused, unless
    `config.overwrite`. Raises `TooManyBadImages` where too many cannot be read.
    """
    model, data = open_model(config)
    with process_settings(choose_device(config.device)):
        return embed_model(model, config, open_source(config.data, data), data)


def embed_model(model: EncoderModel, config: EmbedConfig, source: Source, data: DataConfig) -> Embeddings:
    """Embed as `embed` does with a model and a source at hand; the model is moved, frozen and set to eval."""
    out, device = Path(config.out), choose_device(config.device)
    wanted = feature_configs(config, model.config.depth)
    check_writable(out)
    identity = identity_of(config, model, data, {"data": source})
    # For `nextblock search`, wherever that is called.
    identity["sources"]["data"]["spec"] = absolute_spec(source.spec)
    folder = out.with_name(f".{out.name}.partial")
    if (found := _finished(out, identity, overwrite=config.overwrite)) is not None:
        log.info("%s is finished: nothing to do", out)
        _remove(folder)
        return found
    with exclusive(folder):
        working = _Working(folder, identity, source, DTYPES[config.dtype][1], overwrite=config.overwrite)
        model = model.to(device).eval().requires_grad_(requires_grad=False)
        batch_size = config.batch_size(device.type)
        batches = iterate_features(
            encoder_extract(model, wanted, precision=config.precision, chunk=batch_size),
            source,
            data,
            model.config.image_size,
            batch_size=batch_size,
            indices=np.arange(working.images, len(source)),
            device=device,
        )
        try:
            with torch.inference_mode():
                for batch in batches:
                    working.append(_feature(batch, config), batch)
                    check_bad(working.bad, source, data)
        except TooManyBadImages:
            _remove(folder)  # or the images would count as unreadable when they have been repaired
            raise
        except EmbeddingsError:
            if not working.images:
                _remove(folder)
            raise
        _finish(out, working, source, identity)
    return read_embeddings(out)


def feature_configs(settings: FeatureSettings, depth: int) -> tuple[FeatureConfig, ...]:
    """What to take of an encoder with `depth` layers: one, or where each layer is kept apart one for each."""
    return tuple(
        FeatureConfig(
            layers=layers,
            layer_pool=settings.layer_pool,
            norm_layers=settings.norm,
            tokens=settings.tokens,
            pooled=settings.pool == "mean",
            attention=settings.attention,
        )
        for layers in layer_choices(settings.layers, depth)
    )


def _feature(batch: FeatureBatch, config: EmbedConfig) -> Float[Tensor, "b *feature d"] | None:
    """A batch's features as they are written, (b [layers] [tokens] f), on the CPU; None if it has none."""
    if not batch.features:
        return None
    joined = torch.stack(batch.features, dim=1) if config.layers == "each" else batch.features[0]
    cast = joined.to(DTYPES[config.dtype][0]).cpu()
    if not bool(cast.isfinite().all()):
        raise EmbeddingsError(
            f"features are too large for {config.dtype}, among images {int(batch.samples[0])} to "
            f"{int(batch.samples[-1])}; write them with --dtype fp32"
        )
    return cast


def _finished(out: Path, identity: Mapping[str, Any], *, overwrite: bool) -> Embeddings | None:
    """The features of `out`, if there are any; an error where it is another file, or damaged."""
    if overwrite or not out.exists():
        return None
    origin = read_origin(out)
    remedy = "give another --out, or --overwrite"
    if origin is None:
        raise UsageError(f"{out} is there and was not written by `nextblock embed`; {remedy}")
    if different := differences(origin.identity, identity):
        raise UsageError(f"{out} holds other features ({'; '.join(different[:3])}); {remedy}")
    found = read_embeddings(out)
    _ = found.indices  # refuses names that are lost or cut off
    return found


def _finish(out: Path, working: _Working, source: Source, identity: Mapping[str, Any]) -> None:
    """Make the file of what the working folder holds; killed here, the same command does it again."""
    if not working.rows:
        _remove(working.folder)
        raise UsageError(f"none of the {len(source)} images of {source.spec} could be read")
    working.commit()
    rows = Rows(source=source, indices=working.indices)
    features = working.features
    origin = Origin(
        identity=identity,
        shape=features.shape[1:],
        rows=working.rows,
        bad=len(working.bad),
        class_names=rows.class_names,
    )
    quarantine = "".join(
        json.dumps({"name": bad.name, "sample": bad.sample, "reason": bad.reason}) + "\n"
        for bad in working.bad
    )
    out.unlink(missing_ok=True)  # lest what lies beside it belongs to another
    write(out, features, rows, origin, quarantine)
    if out.suffix == ".npy":
        finish_npy(working.path, out, working.rows)
    _remove(working.folder)


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


class _Working:
    """Features that are done so far: an npy file with room for all rows, and a count of finished images."""

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], source: Source, dtype: np.dtype, *, overwrite: bool
    ) -> None:
        self.folder, self.path = folder, folder / "features.npy"
        self.images = 0
        self.bad: list[BadSample] = []
        self._identity, self._total, self._dtype = identity, len(source), dtype
        self._resume(overwrite=overwrite)
        self._committed_s = self._told_s = self._started_s = time.monotonic()
        self._began_at = self.images

    @property
    def rows(self) -> int:
        """Readable images among those that are done."""
        return self.images - len(self.bad)

    @property
    def indices(self) -> Int64[np.ndarray, " n"]:
        """The readable images that are done."""
        return np.setdiff1d(np.arange(self.images), [bad.sample for bad in self.bad]).astype(np.int64)

    @property
    def features(self) -> np.ndarray:
        """The finished rows."""
        header_bytes, shape, dtype = npy_layout(self.path)
        return np.memmap(self.path, dtype, "r", offset=header_bytes, shape=(self.rows, *shape[1:]))

    def append(self, features: Float[Tensor, "b *feature d"] | None, batch: FeatureBatch) -> None:
        """Add a batch, the next in order."""
        if features is not None:
            try:
                self._write(features.numpy())
            except OSError as error:
                raise EmbeddingsError(
                    f"could not write {self.path}: {error.strerror}; make room and run the same command again"
                ) from error
        self.images += len(batch.samples) + len(batch.bad)
        self.bad += batch.bad
        now_s = time.monotonic()
        if now_s - self._committed_s >= COMMIT_EVERY_S:
            self.commit()
            self._committed_s = time.monotonic()
        if now_s - self._told_s >= TELL_EVERY_S:
            per_s = (self.images - self._began_at) / (now_s - self._started_s)
            log.info("%d of %d images, %.1f a second", self.images, self._total, per_s)
            self._told_s = now_s

    def commit(self) -> None:
        """Make what is done outlast a kill."""
        self.folder.mkdir(exist_ok=True)
        if self.path.is_file():
            with self.path.open("r+b") as file:
                os.fsync(file.fileno())
        progress = {"identity": self._identity, "images": self.images, "bad": self.bad}
        write_text(self.folder / "progress.json", json.dumps(progress))

    def _write(self, features: np.ndarray) -> None:
        if not self.path.is_file():
            self._check_space(features[0].nbytes)
            self.folder.mkdir(exist_ok=True)
            start_npy(self.path, (self._total, *features.shape[1:]), self._dtype)
        with self.path.open("ab") as file:
            file.write(features.tobytes())

    def _check_space(self, bytes_each: int) -> None:
        """Say how much there will be, and refuse what does not fit."""
        copies = 1 if self.folder.name.endswith(".npy.partial") else 2  # npy is renamed, others are written
        needed, free = copies * bytes_each * self._total, shutil.disk_usage(self.folder.parent).free
        log.info("%d images of %.1f kB each: %.2f GB", self._total, bytes_each / 1e3, needed / copies / 1e9)
        if needed > free:
            raise EmbeddingsError(
                f"features of {self._total} images need {needed / 1e9:.1f} GB while they are written, "
                f"{self.folder.parent} has {free / 1e9:.1f} GB; make room, or use --dtype fp16 or --pool mean"
            )

    def _clear(self) -> None:
        for path in self.folder.glob("[!.]*"):  # the lock stays
            path.unlink()

    def _resume(self, *, overwrite: bool) -> None:
        """Go on with the folder, or start over where it holds nothing of use."""
        progress = self.folder / "progress.json"
        if not progress.is_file():
            self._clear()
            return
        found = json.loads(progress.read_text(encoding="utf-8"))
        if different := differences(found["identity"], self._identity):
            if overwrite:
                self._clear()
                return
            raise UsageError(
                f"{self.folder} holds unfinished features of others ({'; '.join(different[:3])}); give "
                "another --out, or --overwrite"
            )
        self.images, self.bad = found["images"], [BadSample(*bad) for bad in found["bad"]]
        if self.path.is_file():
            header_bytes, shape, dtype = npy_layout(self.path)
            kept = header_bytes + self.rows * dtype.itemsize * int(np.prod(shape[1:]))
            with self.path.open("r+b") as file:
                file.truncate(kept)  # what came after the last count
        log.info("going on after %d of %d images", self.images, self._total)
