"""`nextblock.predict`: how a model predicts each next block of images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nextblock.atomic import OUTPUT_MARK, mark_output, write_aside
from nextblock.look.opened import LookResult, losses_result, open_look
from nextblock.look.settings import PredictSettings
from nextblock.settings import from_dict, require
from nextblock.targets import make_targets
from nextblock.visualize.predictions import Look, draw_sheet, look_at, some_images
from nextblock.visualize.sheet import panel_gap, pictures_of


def predict(**settings: Any) -> LookResult:
    """Draw predictions as `nextblock predict` does; `settings` are the fields of `PredictSettings`.

    OUT/predictions.json has the losses. With `each_image`, OUT/images has each image at full size.
    """
    config = from_dict(PredictSettings, settings)
    opened = open_look(config)
    model, source, data, _ = opened
    out = Path(config.out)
    folder = out / "images"
    require(
        not config.each_image or not folder.exists() or (folder / OUTPUT_MARK).is_file(),
        f"{folder} holds other files, which each_image would replace; choose another --out",
    )
    images, names, bad = some_images(source, data, model.config.image_size, config.num_images)
    how = {"distance": config.distance, "unpredicted": config.unpredicted}
    look = look_at(model, opened.ready(images), data.mean, data.std, **how)
    picture = out / "predictions.png"
    draw_sheet(look, picture, names)
    if config.each_image:
        _write_each(look, names, folder)
    losses = {"loss": look.losses, **look.baselines}
    losses = {kind: values.tolist() for kind, values in losses.items()}
    facts = {"distance": config.distance, **make_targets(model.config).facts}
    return losses_result(picture, names, losses, bad, **facts)


def _write_each(look: Look, names: Sequence[str], folder: Path) -> None:
    """Write each original next to its prediction, pixel for pixel; replace an earlier folder."""
    originals, predicted = (pictures_of(pictures) for pictures in (look.originals, look.pictures))
    gap = np.ones((*originals.shape[:2], panel_gap(originals.shape[2]), originals.shape[3]))
    both = np.concatenate([originals, gap, predicted], axis=2).repeat(3 // originals.shape[3], axis=3)
    with write_aside(folder) as aside:
        aside.mkdir()
        mark_output(aside)
        for number, (name, picture) in enumerate(zip(names, both, strict=True), start=1):
            # Names may contain folders and characters that files cannot; the number keeps them distinct.
            plain = re.sub(r"[^\w.-]+", "_", name.removesuffix(Path(name).suffix))[-100:].strip("_.")
            pixels = (picture * 255).round().astype(np.uint8)
            Image.fromarray(pixels).save(aside / f"{number:0{len(str(len(names)))}d}_{plain}.png")
