"""What the page asks for: an open model, the images it was shown, and a method for each question.

Methods take values as they come from JSON or an address, and check them: `UsageError` if they are wrong. They
return what is sent as JSON, or the bytes of a PNG.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import threading
from importlib.util import find_spec
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
from nextblock.look.opened import about_image
from nextblock.look.surprise import block_surprise
from nextblock.models import EncoderModel, NextBlockModel
from nextblock.models.completion import complete
from nextblock.report import RunSummary, read_run
from nextblock.report.page import page_values, run_sections
from nextblock.serve.settings import ServeSettings
from nextblock.settings import require
from nextblock.train.runtime import choose_device
from nextblock.visualize.features import PatchColours
from nextblock.visualize.predictions import look_at, visible
from nextblock.visualize.sheet import shown_channels
from nextblock.visualize.words import BASELINE_WORDS

log = logging.getLogger(__name__)

KEPT_IMAGES, MOST_NEAREST, THUMBNAIL_PX = 64, 100, 128
EXAMPLES = ("china.jpg", "flower.jpg")
"""Photographs that scikit-learn carries."""


class Session:
    """A model and what it is shown. Hold `lock` for all but `about`, `run`, `summary`, `picture`, `index`."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings, self.lock, self.changed = settings, threading.Lock(), threading.Event()
        self.device = choose_device(settings.device)
        self.run_dir = Path(settings.model).expanduser()
        self.is_run = all((self.run_dir / name).is_file() for name in RUN_FILES)
        self.images: dict[int, tuple[UInt8[Tensor, "c h w"], int]] = {}
        """Kept images by number, each with its number in --data, or -1."""
        self.source: Source | None = None
        self.table: FeatureTable | None = None
        self.opened: EncoderModel | None = None
        self.reload()

    # ------------------------------------------------------------------------------------------- the model

    def reload(self) -> dict[str, Any]:
        """Load the model, of a run its newest checkpoint; the images of --data are then encoded again."""
        newest = latest_checkpoint(self.run_dir / "checkpoints") if self.is_run else None
        self.step = None if newest is None else _step_of(newest)
        if self.is_run and newest is None:
            self.no_prediction = "The run has saved no checkpoint yet; its first one can be loaded here."
            return self.about()
        spec = classifier_directory(self.settings.model) if newest is None else str(newest)
        model = open_encoder(spec, num_heads=self.settings.num_heads)
        self.data = evaluation_data(spec, model.config, workers=self.settings.workers)
        model = model.to(self.device).eval().requires_grad_(requires_grad=False)
        self.no_prediction = ""
        try:
            require(isinstance(model, NextBlockModel), "This is timm's encoder alone: it predicts no blocks.")
            model.config.check_predicts()  # type: ignore[union-attr]
            attach_teacher(model, self.data.mean, self.data.std, self.device)  # type: ignore[arg-type]
        except UsageError as error:
            self.no_prediction = str(error)
        self.opened = model
        if self.settings.data is not None:
            self.source = self.source or open_source(self.settings.data, self.data)
            self._begin_index(model, self.source)
        return self.about()

    def _model(self) -> EncoderModel:
        if self.opened is None:
            raise UsageError(self.no_prediction)
        return self.opened

    def _predictor(self) -> NextBlockModel:
        require(not self.no_prediction, self.no_prediction)
        assert isinstance(self.opened, NextBlockModel), "else there is a reason"
        return self.opened

    def about(self) -> dict[str, Any]:
        """What is served: sizes of the model, and what it cannot do, as sentences."""
        config = None if self.opened is None else self.opened.config
        newest = latest_checkpoint(self.run_dir / "checkpoints") if self.is_run else None
        is_colour = config is not None and config.in_chans in (1, 3)
        return {
            "model": self.settings.model,
            "is_run": self.is_run,
            "step": self.step,
            "newest": None if newest is None else _step_of(newest),
            "image_size": None if config is None else pair(config.image_size),
            "block_grid": getattr(config, "block_grid", (0, 0)),
            "no_prediction": self.no_prediction,
            "data": None if self.source is None else {"spec": self.source.spec, "images": len(self.source)},
            "examples": [name.partition(".")[0] for name in EXAMPLES] if is_colour else [],
            "max_upload_mb": self.settings.max_upload_mb,
        }

    # ------------------------------------------------------------------------------------------ the images

    def upload(self, content: bytes) -> dict[str, Any]:
        """Keep an image file's pixels, cut as the model takes them."""
        self._model()
        try:
            return self._keep(decode(content, self.data))
        except BadImageError as error:
            raise UsageError(f"The file cannot be read as an image: {error}.") from error

    def example(self, index: Any) -> dict[str, Any]:
        """Keep a built-in image."""
        name = EXAMPLES[_number("index", index, len(EXAMPLES))]
        # Without importing scikit-learn, which takes seconds.
        (folder,) = find_spec("sklearn").submodule_search_locations  # type: ignore[union-attr, misc]
        return self.upload((Path(folder) / "datasets" / "images" / name).read_bytes())

    def choose(self, index: Any) -> dict[str, Any]:
        """Keep an image of --data."""
        return self._keep(self._read(index), int(index))

    def thumbnail(self, index: Any) -> bytes:
        """An image of --data, made small."""
        return _png(self._read(index), THUMBNAIL_PX)

    def _read(self, index: Any) -> UInt8[Tensor, "c h w"]:
        source = self._source()
        return source.read(_number("index", index, len(source)))

    def _source(self) -> Source:
        if self.source is None:
            raise UsageError("There are no images to search; start nextblock serve with --data SOURCE.")
        return self.source

    def _keep(self, pixels: UInt8[Tensor, "c h w"], index: int = -1) -> dict[str, Any]:
        number = max(self.images, default=-1) + 1
        crop = val_crop(pixels, self._model().config.image_size, self.data)
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
        """Every block predicted from the true ones before it, and the loss beside the reference losses."""
        model, data = self._predictor(), self.data
        look = look_at(model, self._normalized(image), data.mean, data.std)
        assert model.targets is not None, "it predicts"
        return {
            "picture": _url(look.pictures[0]),
            "loss": float(look.losses[0]),
            "references": {BASELINE_WORDS[name]: float(losses[0]) for name, losses in look.baselines.items()},
            "words": model.targets.words,
        }

    def complete(self, image: Any, given: Any) -> dict[str, Any]:
        """The image as the model completes it from the blocks that are given; `given` is in raster order."""
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
        """The first three principal components of the patch features as colours, a pixel a patch."""
        images = self._normalized(image)
        with torch.no_grad():
            tokens = self._model().encode(images).tokens[0].float().cpu().numpy()
        rows, _ = patch_grid(len(tokens), images.shape[-2:])
        colours = torch.from_numpy(PatchColours.fit(tokens).colours(tokens))
        return {"picture": _url(rearrange(colours, "(i j) c -> c i j", i=rows))}

    def nearest(self, image: Any, top: Any = 12) -> dict[str, Any]:
        """The images of --data that are most alike, of those encoded so far; not the image itself."""
        source, table, images = self._source(), self.table, self._normalized(image)
        require(not self.search_failed, self.search_failed)
        top, rows = _number("top", top, MOST_NEAREST + 1), []
        # Features are there once the first batch is.
        numbers = table.readable() if table is not None and self.encoded else np.empty(0, dtype=np.int64)
        if table is not None and len(numbers):
            with torch.no_grad():
                (asked,) = self.extract(images)
            known = F.normalize(table.read(numbers).to(self.device), dim=-1)
            own = np.flatnonzero(numbers == self.images[int(image)][1])
            itself = torch.from_numpy(own).to(self.device) if len(own) else None
            found = nearest_neighbours(asked, known, top, itself=itself)
            rows = [
                {**about_image(source, int(numbers[row])), "similarity": similarity}
                for similarity, row in zip(found.similarity[0].tolist(), found.rows[0].tolist(), strict=True)
            ]
        return {"rows": rows, "searched": len(numbers), "images": len(source), "is_done": self.is_indexed}

    # ---------------------------------------------------------------------------------- features of --data

    def _begin_index(self, model: EncoderModel, source: Source) -> None:
        batch_size = CPU_BATCH if self.device.type == "cpu" else GPU_BATCH
        settings = SearchSettings(model=self.settings.model, data=source.spec, query="")
        self.extract = encode = encoder_extract(model, [pooled(settings, model.config.depth)])

        def extract(images: Tensor) -> tuple[Tensor, ...]:
            with self.lock:  # a batch at a time, so that questions are answered in between
                return encode(images)

        size = model.config.image_size
        self.encoded, self.is_indexed, self.search_failed = 0, False, ""
        self.table = FeatureTable(extract, source, self.data, size, batch_size=batch_size, device=self.device)
        self.changed.set()

    def index(self) -> None:
        """Encode the images of --data; ends early if the model is loaded again meanwhile."""
        table = self.table
        if table is None:
            return

        def note(encoded: int, _: int) -> None:
            self.encoded = encoded if self.table is table else 0

        try:
            if table.fill(should_stop=lambda: self.table is not table, progress=note):
                self.is_indexed = self.table is table
        except (RuntimeError, ValueError) as error:
            log.warning("--data: %s", error)
            self.search_failed = f"The images of --data cannot be searched: {error}"

    # --------------------------------------------------------------------------------------------- the run

    def summary(self) -> RunSummary:
        """The files of the run, read again; `UsageError` if the model is none."""
        require(self.is_run, "This model is no run, so there are no losses to follow.")
        return read_run(self.run_dir)

    def run(self) -> dict[str, Any]:
        """What the run's page shows: its text, and the values of its charts and pictures."""
        summary = self.summary()
        pictures = [{"step": step, "src": f"/api/picture?step={step}"} for step in _pictures(summary)]
        values = page_values(summary, pictures=False) | {"pictures": pictures}
        return {"sections": run_sections(summary), "values": values}

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
    """A whole number from 0, of JSON or of an address."""
    is_number = isinstance(value, int) or (isinstance(value, str) and value.isdecimal() and len(value) < 10)
    require(is_number and 0 <= int(value) < below, f"{name} must be a whole number from 0 to below {below}")
    return int(value)


def _png(pixels: Shaped[Tensor, "c h w"], most_px: int | None = None) -> bytes:
    """Bytes, or floats in [0, 1], as a colour picture; of many channels the first three."""
    if pixels.is_floating_point():
        pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    shown = pixels[: shown_channels(len(pixels))].expand(3, -1, -1)
    picture = Image.fromarray(np.ascontiguousarray(rearrange(shown, "c h w -> h w c").numpy()))
    if most_px is not None:
        picture.thumbnail((most_px, most_px))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _url(pixels: Shaped[Tensor, "c h w"]) -> str:
    """A picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(_png(pixels)).decode()
