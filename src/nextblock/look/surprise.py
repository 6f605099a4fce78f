"""How badly a model predicts each block of each image: the images with the highest losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from matplotlib.colors import Normalize
from torch import Tensor

from nextblock.checkpoint import digest_of
from nextblock.config import ModelConfig
from nextblock.data import Source, eval_batches, open_source
from nextblock.evaluate.evaluation import Evaluation, Result, evaluation
from nextblock.evaluate.files import pyarrow, write_parquet
from nextblock.evaluate.results import encoder_of
from nextblock.interop import attach_teacher
from nextblock.logs import counted
from nextblock.look.opened import about_image
from nextblock.look.settings import SurpriseSettings
from nextblock.models import NextBlockModel
from nextblock.settings import from_dict, require
from nextblock.tables import Column, image, number
from nextblock.targets import make_targets
from nextblock.train.runtime import autocast
from nextblock.visualize.predictions import predicted_blocks
from nextblock.visualize.sheet import (
    banded,
    channel_words,
    coloured,
    draw_cells,
    pictures_of,
    pixels_of_blocks,
)

PICTURE = "surprise.png"
PREDICTING = ("predictor", "target", "mask_ratio", "teacher_digest")
"""Settings that the encoder's identity leaves out."""
QUANTILES = (0.01, 0.99)
"""The ends of the colour scale, among the losses of all blocks."""

COLUMNS = (
    Column("group", "score"),
    number("rank", "rank"),
    Column("name", "image", image),
    Column("class", "class"),
    number("mean_loss", "mean loss", ".3f"),
    number("largest_loss", "largest", ".3f"),
    number("largest_block", "of block"),
)


@torch.no_grad()
def block_surprise(model: NextBlockModel, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
    """The loss of each block in raster order; NaN if the model does not predict it, such as the first.

    `images` are normalised and on the model's device. Put the model in evaluation mode first. Blocks are
    predicted in the model's own order (of a random set, the first). If the model predicts several blocks
    ahead, the nearest prediction counts.
    """
    config = replace(model.config, image_size=(images.shape[2], images.shape[3]))
    found = model(images).block_loss
    losses = found.new_full((len(images), config.num_blocks), torch.nan)
    losses[:, predicted_blocks(config).to(images.device)] = found
    return losses


class Losses(NamedTuple):
    """The losses of readable images."""

    indices: Int64[np.ndarray, " n"]
    """Their numbers in the source, in order."""
    blocks: Float[np.ndarray, "n k"]
    """In raster order, NaN if a block is not predicted."""

    def of(self, rows: Sequence[dict[str, Any]]) -> Float[np.ndarray, "m k"]:
        """The blocks' losses of rows."""
        return self.blocks[np.searchsorted(self.indices, [row["index"] for row in rows])]


def surprise(**settings: Any) -> Result:
    """Rank images by the loss of their blocks; `settings` are the fields of `SurpriseSettings`.

    Rows: the images with the highest and the lowest scores (group, rank from 1), with index, name, class,
    mean_loss, largest_loss and largest_block (raster number from 0). With `out`, surprise.csv has all images,
    surprise.parquet also their blocks' losses (if pyarrow is installed), and surprise.png shows the rows.
    """
    config = from_dict(SurpriseSettings, settings)
    with evaluation(config) as opened:
        model = opened.model
        require(
            isinstance(model, NextBlockModel),
            f"{config.model} is an encoder alone, which predicts no blocks; give a model with its predictor",
        )
        assert isinstance(model, NextBlockModel)
        model.config.check_predicts()
        attach_teacher(model, opened.data.mean, opened.data.std, opened.device)
        source = open_source(config.data, opened.data)
        settings = {name: getattr(model.config, name) for name in PREDICTING}
        predictor = {"predictor": {"weights": digest_of(model), **settings}}
        # Measured once, for the result and for its files; not at all if the result exists.
        measured = cache(lambda: _measure(opened, model, source, predictor))

        def save(out: Path, result: Result) -> None:
            if find_spec("pyarrow"):
                _write_parquet(out / "surprise.parquet", result.all_rows, measured())
            _draw(out / PICTURE, opened, model.config, result, source, measured())

        def measure() -> Result:
            return _result(opened, config, model, source, measured())

        found = opened.result("surprise", {"data": source}, COLUMNS, measure, save=save, made_from=predictor)
        return found if config.out is None else replace(found, picture=Path(config.out) / PICTURE)


def _measure(opened: Evaluation, model: NextBlockModel, source: Source, predictor: dict[str, Any]) -> Losses:
    # A table takes only finite numbers, so it leaves out the blocks that are not predicted.
    columns = predicted_blocks(model.config).sort().values

    def extract(images: Tensor) -> tuple[Tensor, ...]:
        with autocast(images.device, opened.settings.precision):
            return (block_surprise(model, images)[:, columns.to(images.device)],)

    origin = {**encoder_of(model), **predictor, "precision": opened.settings.precision}
    table = opened.fill("data", source, extract, [origin])
    indices = table.readable()
    blocks = np.full((len(indices), model.config.num_blocks), np.nan, dtype=np.float32)
    blocks[:, columns.numpy()] = table.read(indices).numpy()
    return Losses(indices, blocks)


def _result(
    opened: Evaluation, config: SurpriseSettings, model: NextBlockModel, source: Source, losses: Losses
) -> Result:
    mean = np.asarray(np.nanmean(losses.blocks, axis=1, dtype=np.float64))
    largest, block = np.nanmax(losses.blocks, axis=1), np.nanargmax(losses.blocks, axis=1)
    # A stable sort: of equal scores, the first image comes first.
    ranked = np.argsort(-(mean if config.score == "mean" else largest), kind="stable").tolist()
    rows = [
        {
            **about_image(source, int(losses.indices[place])),
            "mean_loss": float(mean[place]),
            "largest_loss": float(largest[place]),
            "largest_block": int(block[place]),
        }
        for place in ranked
    ]
    count = config.num_images
    # Half as many of the lowest. If there are few images, none is in both groups.
    lowest = max(count, len(rows) - (count + 1) // 2)
    shown = [
        {"group": "highest" if rank <= count else "lowest", "rank": rank, **row}
        for rank, row in enumerate(rows, start=1)
        if rank <= count or rank > lowest
    ]
    notes = [f"{counted(len(rows), 'image')} of {source.spec}, mean loss {mean.mean():.3f}."]
    if config.out is not None:
        out = Path(config.out)
        notes.append(f"Picture: {out / PICTURE}; all images: {out / 'surprise.csv'}")
    facts = {
        "num_images": len(rows),
        "bad_images": opened.bad_counts(),
        "mean_loss": float(mean.mean()),
        "block_grid": list(model.config.block_grid),
        **make_targets(model.config).facts,
    }
    return Result(verb="surprise", rows=tuple(shown), notes=tuple(notes), facts=facts, all_rows=tuple(rows))


def _write_parquet(path: Path, rows: Sequence[dict[str, Any]], losses: Losses) -> None:
    pa, blocks = pyarrow(), losses.of(rows)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns["class"] = pa.array(columns["class"], pa.string())
    ends = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * blocks.shape[1])
    columns["block_losses"] = pa.ListArray.from_arrays(ends, pa.array(blocks.ravel()))
    write_parquet(path, [pa.table(columns)], {"block_losses": "in raster order; NaN: not predicted"})


def _draw(
    path: Path, opened: Evaluation, config: ModelConfig, result: Result, source: Source, losses: Losses
) -> None:
    """Draw the rows' images, each above a heat map of its blocks' losses."""
    chosen = np.array([row["index"] for row in result.rows])
    (batch,) = eval_batches(source, opened.data, config.image_size, len(chosen), chosen)
    readable = set(batch.samples.tolist())  # a file may have gone since it was measured
    rows = [row for row in result.rows if row["index"] in readable]
    low, high = np.nanquantile(losses.blocks, QUANTILES).tolist()
    scale = Normalize(low, max(high, low + 1e-6), clip=True)
    heat = coloured(pixels_of_blocks(torch.from_numpy(losses.of(rows)), config), scale, config)
    pictures, maps = pictures_of(batch.images), pictures_of(heat)
    lines, names = [], []
    for group in dict.fromkeys(row["group"] for row in rows):
        places = [i for i, row in enumerate(rows) if row["group"] == group]
        some = [rows[i] for i in places]
        more, more_names = banded(
            {f"{group}\nscores": pictures[places], "loss of\nblocks": maps[places]},
            [f"mean {row['mean_loss']:.3f}\nlargest {row['largest_loss']:.3f}" for row in some],
            ["\n".join(filter(None, (row["name"], row["class"]))) for row in some],
        )
        lines += more
        names += more_names
    sentences = [
        f"Score: the {result.identity['settings']['score']} loss of an image's blocks.",
        *make_targets(config).words[:1],
        f"Colours: from the 1st to the 99th percentile of the losses of all blocks of "
        f"{counted(len(losses.blocks), 'image')}, {low:.2g} to {high:.2g}.",
        *["Hatched blocks are not predicted."] * (len(predicted_blocks(config)) < config.num_blocks),
        *channel_words(config.in_chans),
    ]
    title, caption = "Surprise: how badly blocks are predicted", " ".join(sentences)
    draw_cells(lines, path, title=title, caption=caption, names=names, blocks_of=config, bar=(1, scale))
