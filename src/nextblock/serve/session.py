"""What the page asks for: an open model, the uploaded images, and a method for each question.

Methods take values as they come from JSON or a URL and raise `UsageError` if they are wrong. They return
values for JSON, or the bytes of a PNG.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from einops import rearrange
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from torch import Tensor

from nextblock.atomic import RUN_FILES
from nextblock.checkpoint import latest_checkpoint
from nextblock.config import pair
from nextblock.data import BadImageError, Source, normalize, open_source
from nextblock.data.augment import val_crop
from nextblock.data.sources.base import decode
from nextblock.errors import UsageError
from nextblock.evaluate.embed import thumbnail
from nextblock.evaluate.features import (
    classifier_directory,
    encoder_extract,
    evaluation_data,
    patch_grid,
    pooled,
)
from nextblock.evaluate.knn import nearest_neighbours
from nextblock.evaluate.settings import CPU_BATCH, GPU_BATCH, SearchSettings
from nextblock.evaluate.table import FeatureTable
from nextblock.interop import attach_teacher, open_encoder
from nextblock.look.features import PatchColours
from nextblock.look.opened import about_image
from nextblock.look.settings import ServeSettings
from nextblock.look.surprise import block_surprise
from nextblock.models import EncoderModel, NextBlockModel
from nextblock.models.completion import complete
from nextblock.report import RunSummary, read_run
from nextblock.report.page import page_values, run_header
from nextblock.settings import require
from nextblock.train.runtime import choose_device
from nextblock.visualize.predictions import look_at, visible
from nextblock.visualize.sheet import shown_channels
from nextblock.visualize.words import BASELINE_WORDS

log = logging.getLogger(__name__)

KEPT_IMAGES, NEAREST, THUMBNAIL_PX = 64, 18, 128


class Session:
    """A model and the images it was shown; hold `lock` to call a method that runs the model."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings, self.lock = settings, threading.Lock()
        self.images: dict[int, tuple[UInt8[Tensor, "c h w"], int]] = {}
        """Uploaded or chosen images by number, each with its number in --data, or -1."""
        self.model: EncoderModel | None = None
        self.no_prediction = ""
        """Why the model predicts no blocks, or is not there."""
        self.source: Source | None = None
        self.table: FeatureTable | None = None
        self.encoded, self.is_indexed, self.search_failed = 0, False, ""

        self.run_dir, spec = Path(settings.model).expanduser(), classifier_directory(settings.model)
        self.is_run, self.step = all((self.run_dir / name).is_file() for name in RUN_FILES), None
        if self.is_run:
            newest = latest_checkpoint(self.run_dir / "checkpoints")
            if newest is None:
                self.no_prediction = (
                    "The run has no checkpoint yet. Start nextblock serve again when it does."
                )
                return
            spec, self.step = str(newest), _step_of(newest)
        model = open_encoder(spec, num_heads=settings.num_heads)
        data = evaluation_data(spec, model.config, workers=settings.workers)
        self.data = replace(data, max_bad_fraction=1.0)  # the others can be searched
        self.device = choose_device(settings.device)
        self.model = model = model.to(self.device).eval().requires_grad_(requires_grad=False)
        try:
            require(isinstance(model, NextBlockModel), "This is timm's encoder alone: it predicts no blocks.")
            model.config.check_predicts()  # type: ignore[union-attr]
            attach_teacher(model, self.data.mean, self.data.std, self.device)  # type: ignore[arg-type]
        except UsageError as error:
            self.no_prediction = str(error)
        if settings.data is not None:
            self.source = open_source(settings.data, self.data)
            self._open_table(model, self.source)

    def _encoder(self) -> EncoderModel:
        if self.model is None:
            raise UsageError(self.no_prediction)
        return self.model

    def _predictor(self) -> NextBlockModel:
        require(not self.no_prediction, self.no_prediction)
        assert isinstance(self.model, NextBlockModel), "otherwise there is a reason"
        return self.model

    def about(self) -> dict[str, Any]:
        """Sizes of the model, and why it does not predict."""
        config = None if self.model is None else self.model.config
        return {
            "model": self.settings.model,
            "is_run": self.is_run,
            "step": self.step,
            "image_size": None if config is None else pair(config.image_size),
            "block_grid": getattr(config, "block_grid", (0, 0)),
            "no_prediction": self.no_prediction,
            "data": None if self.source is None else {"spec": self.source.spec, "images": len(self.source)},
            "max_upload_mb": self.settings.max_upload_mb,
        }

    # ------------------------------------------------------------------------------------------ the images

    def upload(self, content: bytes) -> dict[str, Any]:
        """Keep the pixels of an image file, cropped for the model."""
        self._encoder()
        try:
            return self._keep(decode(content, self.data))
        except BadImageError as error:
            raise UsageError(f"The file cannot be read as an image: {error}.") from error

    def choose(self, index: Any) -> dict[str, Any]:
        """Keep an image of --data."""
        source = self._source()
        number = _number("index", index, len(source))
        return self._keep(source.read(number), number)

    def thumbnail(self, index: Any) -> bytes:
        """A small picture of an image of --data."""
        source = self._source()
        return thumbnail(source, _number("index", index, len(source)), THUMBNAIL_PX)

    def _source(self) -> Source:
        if self.source is None:
            raise UsageError("There are no images to search; start nextblock serve with --data SOURCE.")
        return self.source

    def _keep(self, pixels: UInt8[Tensor, "c h w"], index: int = -1) -> dict[str, Any]:
        number = max(self.images, default=-1) + 1
        crop = val_crop(pixels, self._encoder().config.image_size, self.data)
        self.images[number] = crop, index
        if len(self.images) > KEPT_IMAGES:
            del self.images[min(self.images)]
        return {"image": number, "picture": _url(crop)}

    def _normalized(self, image: Any) -> Float[Tensor, "1 c h w"]:
        number = _number("image", image, math.inf)
        require(number in self.images, "This image is no longer kept; choose it again.")
        return normalize(self.images[number][0][None].to(self.device), self.data.mean, self.data.std)

    # ----------------------------------------------------------------------------------------- the answers

    def predict(self, image: Any) -> dict[str, Any]:
        """Every block predicted from the true ones before it, and the loss with the reference losses."""
        model = self._predictor()
        look = look_at(model, self._normalized(image), self.data.mean, self.data.std)
        assert model.targets is not None, "it predicts"
        return {
            "picture": _url(look.pictures[0]),
            "loss": float(look.losses[0]),
            "references": {BASELINE_WORDS[name]: float(losses[0]) for name, losses in look.baselines.items()},
            "words": model.targets.words,
        }

    def complete(self, image: Any, given: Any) -> dict[str, Any]:
        """The image completed by the model from the given blocks; `given` is in raster order."""
        model, images = self._predictor(), self._normalized(image)
        k = model.config.num_blocks
        is_right = isinstance(given, list) and len(given) == k and all(isinstance(one, bool) for one in given)
        require(is_right, f"given must be true or false for each of the {k} blocks")
        if not all(given):
            images = complete(model, images, torch.tensor(given)).images
        return {"picture": _url(visible(images.cpu(), self.data.mean, self.data.std)[0])}

    def surprise(self, image: Any) -> dict[str, Any]:
        """The loss of each block, in raster order; null for blocks that are not predicted."""
        return {"losses": block_surprise(self._predictor(), self._normalized(image))[0].tolist()}

    def features(self, image: Any) -> dict[str, Any]:
        """The first three principal components of the patch features as colours, one pixel per patch."""
        images = self._normalized(image)
        with torch.no_grad():
            tokens = self._encoder().encode(images).tokens[0].float().cpu().numpy()
        rows, _ = patch_grid(len(tokens), images.shape[-2:])
        colours = torch.from_numpy(PatchColours.fit(tokens).colours(tokens))
        return {"picture": _url(rearrange(colours, "(i j) c -> c i j", i=rows))}

    def nearest(self, image: Any) -> dict[str, Any]:
        """The most similar images of --data among those encoded so far, without the image itself."""
        source, table, images = self._source(), self.table, self._normalized(image)
        require(not self.search_failed, self.search_failed)
        assert table is not None, "made with its source"
        rows = []
        # The table can be read once its first batch is encoded.
        numbers = table.readable() if self.encoded else np.empty(0, dtype=np.int64)
        if len(numbers):
            with torch.no_grad():
                (asked,) = self.extract(images)
            known = F.normalize(table.read(numbers).to(self.device), dim=-1)
            own = np.flatnonzero(numbers == self.images[int(image)][1])
            itself = torch.from_numpy(own).to(self.device) if len(own) else None
            found = nearest_neighbours(asked, known, NEAREST, itself=itself)
            rows = [
                {**about_image(source, int(numbers[row])), "similarity": similarity}
                for similarity, row in zip(found.similarity[0].tolist(), found.rows[0].tolist(), strict=True)
            ]
        return {"rows": rows, "searched": len(numbers), "images": len(source), "is_done": self.is_indexed}

    # ---------------------------------------------------------------------------------- features of --data

    def _open_table(self, model: EncoderModel, source: Source) -> None:
        settings = SearchSettings(model=self.settings.model, data=source.spec, query="")
        self.extract = encoder_extract(model, [pooled(settings, model.config.depth)])
        batch_size = CPU_BATCH if self.device.type == "cpu" else GPU_BATCH

        def extract(images: Tensor) -> tuple[Tensor, ...]:
            with self.lock:  # one batch at a time, so that questions are answered in between
                return self.extract(images)

        size = model.config.image_size
        self.table = FeatureTable(extract, source, self.data, size, batch_size=batch_size, device=self.device)

    def index(self) -> None:
        """Encode the images of --data."""
        if self.table is None:
            return

        def note(encoded: int, _: int) -> None:
            self.encoded = encoded

        try:
            self.is_indexed = self.table.fill(progress=note)
        except (RuntimeError, ValueError) as error:
            log.warning("--data: %s", error)
            self.search_failed = f"The images of --data cannot be searched: {error}"

    # --------------------------------------------------------------------------------------------- the run

    def summary(self) -> RunSummary:
        """The files of the run, read again; `UsageError` if the model is not a run."""
        require(self.is_run, "This model is not a run, so there are no losses to follow.")
        return read_run(self.run_dir)

    def run(self) -> dict[str, Any]:
        """What the run's page updates: its header, charts and pictures."""
        summary = self.summary()
        pictures = [{"step": step, "src": f"/api/picture?step={step}"} for step in _pictures(summary)]
        values = page_values(summary, pictures=False) | {"pictures": pictures}
        return {"header": run_header(summary), "values": values}

    def picture(self, step: Any) -> bytes:
        """The picture that the run drew at a step."""
        paths, wanted = _pictures(self.summary()), _number("step", step, math.inf)
        require(wanted in paths, f"The run has no picture of step {wanted}.")
        return paths[wanted].read_bytes()


def _pictures(summary: RunSummary) -> dict[int, Path]:
    return {_step_of(path): path for path in summary.pictures}


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _number(name: str, value: Any, below: float) -> int:
    """A whole number from 0, from JSON or a URL."""
    is_number = isinstance(value, int) or (isinstance(value, str) and value.isdecimal() and len(value) < 10)
    require(is_number and 0 <= int(value) < below, f"{name} must be a whole number from 0 to below {below}")
    return int(value)


def _url(pixels: Shaped[Tensor, "c h w"]) -> str:
    """A picture as a data: URL, from bytes or floats in [0, 1]; of many channels, the first three."""
    if pixels.is_floating_point():
        pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    shown = pixels[: shown_channels(len(pixels))].expand(3, -1, -1)
    picture = Image.fromarray(np.ascontiguousarray(rearrange(shown, "c h w -> h w c").numpy()))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
