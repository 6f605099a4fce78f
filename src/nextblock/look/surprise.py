"""How badly each block of each image was predicted: what a model finds odd in a set of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from nextblock.blocks import block_orders
from nextblock.checkpoint import digest_of
from nextblock.config import ModelConfig
from nextblock.data import Source, eval_batches, open_source
from nextblock.evaluate.evaluation import Evaluation, Result, evaluation
from nextblock.evaluate.files import pyarrow, write_parquet
from nextblock.evaluate.results import encoder_of
from nextblock.interop import attach_teacher
from nextblock.logs import counted
from nextblock.look.settings import SurpriseSettings
from nextblock.models import NextBlockModel
from nextblock.settings import from_dict, require
from nextblock.tables import Column, end_of, number
from nextblock.targets import make_targets
from nextblock.train.runtime import autocast
from nextblock.visualize.surprise import draw_surprise

PICTURE, PARQUET = "surprise.png", "surprise.parquet"
PREDICTING = ("predictor", "target", "mask_ratio", "teacher_digest")
CHUNK, NAME_LETTERS = 4096, 60
HIGHEST, LOWEST = "highest", "lowest"

COLUMNS = (
    Column("group", "score"),
    number("rank", "rank"),
    Column("name", "image", lambda name, _: end_of(name, NAME_LETTERS)),
    Column("class", "class"),
    number("mean_loss", "mean loss", ".3f"),
    number("largest_loss", "largest", ".3f"),
    number("largest_block", "of block"),
)


# ---------------------------------------------------------------------------------------- losses of blocks


@torch.no_grad()
def block_surprise(model: NextBlockModel, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
    """The loss of each block in raster order, NaN where the model does not predict it (the first one).

    `images` are normalised and on the model's device; the model is used as it is, so put it in evaluation
    mode first. Blocks come in the model's own order (of a random set, the first); a model that predicts
    several blocks ahead counts with its nearest prediction, a masked one with its masked blocks.
    """
    config = replace(model.config, image_size=(images.shape[2], images.shape[3]))
    found = model(images).block_loss
    losses = found.new_full((len(images), config.num_blocks), torch.nan)
    losses[:, predicted_blocks(config).to(images.device)] = found
    return losses


def predicted_blocks(config: ModelConfig) -> Int64[Tensor, " steps"]:
    """The blocks that the first output map predicts, by their raster numbers, in the order of its rows."""
    order = block_orders(config.order, config.block_grid, config.order_seed)[0]
    _, first, count = config.steps(config.distances[0])
    return order[first : first + count]


class Losses(NamedTuple):
    """The losses of readable images."""

    indices: Int64[np.ndarray, " n"]
    """Their numbers in the source."""
    blocks: Float[np.ndarray, "n k"]
    """In raster order, NaN where a block is not predicted."""

    @property
    def mean(self) -> Float[np.ndarray, " n"]:
        """The mean over predicted blocks."""
        return np.asarray(np.nanmean(self.blocks, axis=1, dtype=np.float64))

    @property
    def largest(self) -> Float[np.ndarray, " n"]:
        """The largest of an image."""
        return np.nanmax(self.blocks, axis=1)


# --------------------------------------------------------------------------------------------- the command


def surprise(**settings: Any) -> Result:
    """Rank images by how badly their blocks are predicted; `settings` are the fields of `SurpriseSettings`.

    Rows: the images of the highest and of the lowest scores (group, rank from 1), with index, name, class,
    mean_loss, largest_loss and largest_block (raster number from 0). With `out`, surprise.csv has all images,
    surprise.parquet their blocks' losses too (if pyarrow is installed), and surprise.png shows the rows.
    """
    config = from_dict(SurpriseSettings, settings)
    with evaluation(config) as opened:
        model = opened.model
        require(
            isinstance(model, NextBlockModel),
            f"{config.model} is an encoder alone, which predicts no blocks; give a run or a model with its "
            "predictor",
        )
        assert isinstance(model, NextBlockModel)
        model.config.check_predicts()
        attach_teacher(model, opened.data.mean, opened.data.std, opened.device)
        source = open_source(config.data, opened.data)
        # What the encoder's identity leaves out.
        told = {name: getattr(model.config, name) for name in PREDICTING}
        predictor = {"predictor": {"weights": digest_of(model), **told}}
        losses: list[Losses] = []

        def measure() -> Result:
            losses.append(_measure(opened, model, source, predictor))
            return _result(opened, config, source, losses[0])

        def save(out: Path, result: Result) -> None:
            if find_spec("pyarrow"):
                _write_parquet(out / PARQUET, result.all_rows, losses[0])
            _draw(out / PICTURE, opened, result, source, losses[0])

        found = opened.result("surprise", {"data": source}, COLUMNS, measure, save=save, made_from=predictor)
        return replace(found, picture=Path(config.out) / PICTURE if config.out else None)


def _measure(opened: Evaluation, model: NextBlockModel, source: Source, predictor: dict[str, Any]) -> Losses:
    # A table takes only what is finite: blocks that are not predicted are left out of it.
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


def _result(opened: Evaluation, config: SurpriseSettings, source: Source, losses: Losses) -> Result:
    mean, largest, block = losses.mean, losses.largest, np.nanargmax(losses.blocks, axis=1)
    # Of equal scores the first image comes first.
    ranked = np.argsort(-(mean if config.score == "mean" else largest), kind="stable").tolist()
    rows = []
    for place in ranked:
        index = int(losses.indices[place])
        rows.append(
            {
                "index": index,
                "name": source.name(index),
                "class": source.class_names[source.labels[index]] if source.has_labels else None,
                "mean_loss": float(mean[place]),
                "largest_loss": float(largest[place]),
                "largest_block": int(block[place]),
            }
        )
    count = config.num_images
    shown = [{"group": HIGHEST, "rank": rank, **row} for rank, row in enumerate(rows[:count], start=1)]
    first = max(count, len(rows) - (count + 1) // 2)
    lowest = enumerate(rows[first:], start=first + 1)
    shown += [{"group": LOWEST, "rank": rank, **row} for rank, row in lowest]
    notes = [f"{counted(len(rows), 'image')} of {source.spec}, mean loss {mean.mean():.3f}."]
    if config.out is not None:
        notes.append(
            f"Picture: {Path(config.out) / PICTURE}; all images: {Path(config.out) / 'surprise.csv'}"
        )
    facts = {
        "num_images": len(rows),
        "bad_images": opened.bad_counts(),
        "mean_loss": float(mean.mean()),
        "block_grid": list(opened.model.config.block_grid),  # type: ignore[union-attr]
        **make_targets(opened.model.config).facts,  # type: ignore[arg-type]
    }
    return Result(verb="surprise", rows=tuple(shown), notes=tuple(notes), facts=facts, all_rows=tuple(rows))


def _write_parquet(path: Path, rows: Sequence[dict[str, Any]], losses: Losses) -> None:
    pa = pyarrow()
    places = {index: place for place, index in enumerate(losses.indices.tolist())}

    def tables() -> Any:
        for start in range(0, len(rows), CHUNK):
            some = rows[start : start + CHUNK]
            columns = {name: [row[name] for row in some] for name in rows[0]}
            columns["class"] = pa.array(columns["class"], pa.string())
            blocks = losses.blocks[[places[row["index"]] for row in some]]
            columns["block_losses"] = pa.array(blocks.tolist(), pa.list_(pa.float32()))
            yield pa.table(columns)

    write_parquet(path, tables(), {"block_losses": "in raster order; NaN: not predicted"})


def _draw(path: Path, opened: Evaluation, result: Result, source: Source, losses: Losses) -> None:
    score = result.identity["settings"]["score"]
    config = opened.model.config
    assert isinstance(config, ModelConfig)
    chosen = np.array([row["index"] for row in result.rows])
    (batch,) = eval_batches(source, opened.data, config.image_size, len(chosen), chosen)
    # Files may have gone since they were measured.
    there = np.isin(chosen, batch.samples.numpy())
    rows = [row for row, is_there in zip(result.rows, there, strict=True) if is_there]
    drawn = losses.blocks[np.searchsorted(losses.indices, chosen[there])]
    draw_surprise(path, config, batch.images, drawn, rows, losses.blocks, score)
