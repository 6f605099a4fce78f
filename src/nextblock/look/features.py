"""`nextblock.features`: what an encoder sees in patches, as colours; where a head looks; nearest patches."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from nextblock.atomic import remove, write_text
from nextblock.config import DataConfig, pair
from nextblock.data import BadSample, Source, eval_batches, normalize, open_source
from nextblock.data.sources import SubsetSource
from nextblock.evaluate.features import (
    attention_maps,
    check_one_head,
    classifier_directory,
    encoder_extract,
    evaluation_data,
    patch_grid,
)
from nextblock.evaluate.layers import layer_choices
from nextblock.evaluate.results import encoder_of
from nextblock.evaluate.search import SAME
from nextblock.evaluate.table import Extract, FeatureTable
from nextblock.interop import load_classifier, open_encoder
from nextblock.interop.hub import is_hub_spec
from nextblock.interop.load import own_file
from nextblock.logs import counted
from nextblock.look.settings import FeaturesSettings
from nextblock.models import EncoderModel
from nextblock.models.heads import FeatureConfig, LinearHead
from nextblock.settings import from_dict, require, to_dict
from nextblock.tables import Shown, finite
from nextblock.train.runtime import choose_device
from nextblock.visualize.evaluation import draw_attention
from nextblock.visualize.features import Cell, PatchColours, draw_cells
from nextblock.visualize.predictions import some_images
from nextblock.visualize.sheet import shown_channels

AT_ONCE = 16
"""Images encoded at a time."""


@dataclass(frozen=True, kw_only=True)
class FeaturesResult(Shown):
    """What `features` found and drew."""

    picture: Path
    """The images and the colours of their patches."""
    attention: Path | None
    nearest: Path | None
    explained: tuple[float, ...]
    """Shares of the variance of the patches' features that red, green and blue show."""
    fitted_on: int
    """Images whose patches chose the colours."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    rows: tuple[dict[str, Any], ...]
    """The nearest patches: rank, index and name of the image, its class, the patch, similarity (cosine)."""
    patch: tuple[int, int] | None
    """The query's."""
    images: tuple[str, ...]
    """Names of the images that are drawn."""
    bad: tuple[BadSample, ...]
    """Images that could not be read, as far as met."""

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        values = {name: getattr(self, name) for name in ("explained", "fitted_on", "grid", "images", "patch")}
        bad = [{"name": sample.name, "reason": sample.reason} for sample in self.bad]
        return finite({**values, "nearest": self.rows, "bad": bad, "pictures": [*map(str, self.pictures)]})

    @property
    def pictures(self) -> tuple[Path, ...]:
        """Colours, attention, nearest patches, as far as asked for."""
        return tuple(path for path in (self.picture, self.attention, self.nearest) if path is not None)


class _Opened(NamedTuple):
    """An encoder, images, and how it sees them."""

    model: EncoderModel
    source: Source
    data: DataConfig
    device: torch.device
    extract: Extract

    def table(self, extract: Extract, source: Source) -> FeatureTable:
        """The filled table of what `extract` gives of a source."""
        size = self.model.config.image_size
        table = FeatureTable(extract, source, self.data, size, batch_size=AT_ONCE, device=self.device)
        table.fill()
        return table

    def patches(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        with torch.no_grad():
            return self.extract(self.ready(images))[0].cpu()

    def ready(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return normalize(images.to(self.device), self.data.mean, self.data.std)


def features(**settings: Any) -> FeaturesResult:
    """Draw patch features as `nextblock features` does; `settings` are the fields of `FeaturesSettings`.

    OUT/features.png has images and the colours of their patches; OUT/attention.png, with `head`, where its
    queries look; OUT/nearest.png, with `query`, the patches nearest to one; OUT/features.json the numbers.
    """
    config = from_dict(FeaturesSettings, settings)
    model, device = open_encoder(config.model, num_heads=config.num_heads), choose_device(config.device)
    model.to(device).eval().requires_grad_(requires_grad=False)
    (layers,) = layer_choices(config.layers, model.config.depth)
    wanted = FeatureConfig(layers=layers, norm_layers=True, pooled=False, attention=config.attention)
    data = evaluation_data(config.model, model.config, workers=config.workers)
    opened = _Opened(
        model, open_source(config.data, data), data, device, encoder_extract(model, [wanted], chunk=AT_ONCE)
    )
    out, size = Path(config.out), pair(model.config.image_size)
    # What may be refused comes before what takes time.
    draw_head = None if config.head is None else _opened_head(opened, config)
    query = None if config.query is None else _query(opened, config)
    images, names, bad = some_images(opened.source, data, size, config.num_images)
    patches = opened.patches(images)
    grid = patch_grid(patches.shape[1], size)
    row, column = config.patch or (0, 0)
    require(
        row < grid[0] and column < grid[1],
        f"patch is {row},{column}, but an image has {grid[0]} rows of {grid[1]} patches, counted from 0",
    )

    fitted = opened.table(opened.extract, _spread(opened.source, config.fit_images))
    known = fitted.read(fitted.readable())
    colours = PatchColours.fit(rearrange(known, "b n d -> (b n) d").numpy())
    maps = rearrange(colours.colours(patches.numpy()), "b (r q) c -> b r q c", r=grid[0])
    unreadable = [*bad, *fitted.bad]
    near = None if query is None else _nearest(opened, config, *query, grid)
    for name in ("features.json", "attention.png", "nearest.png"):  # of a result that is replaced
        remove(out / name)
    _draw_colours(_pictures(images), maps, names, colours, known, out, size)
    attention = None if draw_head is None else draw_head(images, names, out / "attention.png")
    nearest, rows, patch = None, (), None
    if near is not None:
        nearest, rows, patch = out / "nearest.png", near.rows, near.patch
        unreadable += near.bad
        draw_cells(near.cells, nearest, size=size, title="Nearest patches", caption=near.caption)
    result = FeaturesResult(
        picture=out / "features.png",
        attention=attention,
        nearest=nearest,
        explained=colours.explained,
        fitted_on=len(known),
        grid=grid,
        rows=rows,
        patch=patch,
        images=tuple(names),
        bad=tuple({sample.name: sample for sample in unreadable}.values()),
    )
    content = {"settings": to_dict(config), **result.as_dict()}
    write_text(out / "features.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    return result


def _spread(source: Source, count: int) -> Source:
    """Up to so many images, one from the middle of each of as many equal parts of a source."""
    if len(source) <= count:
        return source
    return SubsetSource(source.spec, source, (2 * np.arange(count) + 1) * len(source) // (2 * count))


def _pictures(images: UInt8[Tensor, "b c h w"]) -> UInt8[np.ndarray, "b h w shown"]:
    return rearrange(images[:, : shown_channels(images.shape[1])], "b c h w -> b h w c").numpy()


def _draw_colours(
    pictures: UInt8[np.ndarray, "b h w shown"],
    maps: Float[np.ndarray, "b rows columns 3"],
    names: list[str],
    colours: PatchColours,
    known: Float[Tensor, "i n d"],
    out: Path,
    size: tuple[int, int],
) -> None:
    """Images in bands of up to eight, the colours of each below it."""
    bands = -(-len(names) // 8)
    each = -(-len(names) // bands)
    rows = []
    for start in range(0, len(names), each):
        some = slice(start, start + each)
        rows.append([Cell(picture) for picture in pictures[some]])
        rows.append([Cell(one, name) for one, name in zip(maps[some], names[some], strict=True)])
    shares = ", ".join(
        f"{colour} {100 * share:.0f} %"
        for colour, share in zip(("red", "green", "blue"), colours.explained, strict=False)
    )
    caption = (
        "Red, green and blue are the first three principal components of "
        f"{known.shape[0] * known.shape[1]:,} patches of {counted(known.shape[0], 'image')}, on one scale: a "
        f"component that varies little stays grey. They show {shares} of the features' variance. Patches of "
        "one colour may differ in the rest."
    )
    title, lines = "Patch features as colours", ["image", "patch\nfeatures"] * bands
    draw_cells(rows, out / "features.png", size=size, title=title, caption=caption, names=lines)


# ----------------------------------------------------------------------------------------------- attention


def _opened_head(opened: _Opened, config: FeaturesSettings) -> Callable[[Tensor, list[str], Path], Path]:
    """Open the head that the settings name; what is returned draws where it looks in images."""
    assert config.head is not None, "a head is asked for"
    check_one_head(config.head, "head")
    spec = classifier_directory(config.head)
    # A head of ours is saved with its encoder; the second file of an official AIM classifier needs the first.
    alone = own_file(Path(spec)) is not None or config.head == config.model
    require(
        alone or Path(config.head).exists() or is_hub_spec(config.head),
        f"there is no head {config.head}; give a classifier's directory, such as RUN/probe/ep",
    )
    files = (spec, None) if alone else (config.model, config.head)
    classifier = load_classifier(*files, num_heads=config.num_heads)
    require(
        encoder_of(classifier.encoder_model)["weights"] == encoder_of(opened.model)["weights"],
        f"{config.head} is a head on another encoder than {config.model}; give --model {config.head}",
    )
    kind = classifier.head_config.kind
    require(
        not isinstance(classifier.head, LinearHead),
        f"{config.head} is a linear head, which weighs all patches alike; give an attentive or ep head",
    )
    classifier.to(opened.device).eval()

    def draw(images: UInt8[Tensor, "b c h w"], names: list[str], path: Path) -> Path:
        maps = attention_maps(classifier, opened.ready(images)).cpu().numpy()
        unit = "query" if kind == "ep" or classifier.head_config.num_heads == 1 else "head"
        draw_attention(_pictures(images), maps, path, unit=unit, names=names)
        return path

    return draw


# ------------------------------------------------------------------------------------------ nearest patches


class _Near(NamedTuple):
    """The nearest patches: what is said of them and drawn."""

    rows: tuple[dict[str, Any], ...]
    patch: tuple[int, int]
    bad: tuple[BadSample, ...]
    cells: list[list[Cell]]
    caption: str


def _query(opened: _Opened, config: FeaturesSettings) -> tuple[Source, int | None]:
    """The query's image, as a source of one image, and its number, if it is one of the data."""
    text, source = str(config.query), opened.source
    if text.isdecimal() and not Path(text).exists():
        require(
            int(text) < len(source),
            f"query is {text}, but {source.spec} has {counted(len(source), 'image')}, numbered from 0",
        )
        return SubsetSource(source.spec, source, np.array([int(text)])), int(text)
    found = open_source(text, opened.data)
    require(
        len(found) == 1,
        f"query {text} has {counted(len(found), 'image')}; give an image file, or the number of an image of "
        "data, from 0",
    )
    return found, None


def _nearest(
    opened: _Opened, config: FeaturesSettings, query: Source, number: int | None, grid: tuple[int, int]
) -> _Near:
    """Find the patches nearest to one of the query, which may be image `number` of the data."""
    size = pair(opened.model.config.image_size)
    image, (name,), _ = some_images(query, opened.data, size, 1)
    own = F.normalize(opened.patches(image)[0], dim=-1)
    least = divmod(int((own @ own.mean(0)).argmin()), grid[1])
    patch = least if config.patch is None else config.patch
    wanted = own[patch[0] * grid[1] + patch[1]].to(opened.device)
    each = min(config.per_image, len(own))

    # Only the best of each image are kept, so that a folder of any size can be searched.
    def best(images: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        similar = F.normalize(opened.extract(images)[0], dim=-1) @ wanted
        values, places = similar.topk(each, dim=-1)
        return values, places.float()

    source, table = opened.source, opened.table(best, opened.source)
    numbers = table.readable()
    values, places = (table.read(numbers, kind).numpy() for kind in (0, 1))
    pixels, rows, same = query.read(0), [], set() if number is None else {number}
    for flat in np.argsort(-values, axis=None, kind="stable").tolist():
        row, rank = divmod(flat, each)
        index, similarity = int(numbers[row]), float(values[row, rank])
        # A file may be in the data too; then its own patch comes before any other of that image.
        if number is None and similarity > SAME and torch.equal(pixels, source.read(index)):
            same.add(index)
        if index in same:
            continue
        place = divmod(int(places[row, rank]), grid[1])
        rows.append(
            {
                "rank": len(rows) + 1,
                "index": index,
                "name": source.name(index),
                "class": source.class_names[source.labels[index]] if source.has_labels else None,
                "patch": place,
                "similarity": similarity,
            }
        )
        if len(rows) == config.top:
            break

    def marked(picture: np.ndarray, words: str, at: tuple[int, int]) -> Cell:
        return Cell(picture, words, (at[0] / grid[0], at[1] / grid[1], 1 / grid[0], 1 / grid[1]))

    require(
        len(rows) > 0,
        f"{source.spec} has no readable image but the query{' and its copies' if number is None else ''}; "
        "give data of more images, or a query that is not one of them",
    )
    (found,) = eval_batches(source, opened.data, size, len(rows), [row["index"] for row in rows])
    cells = [marked(_pictures(image)[0], f"query\n{name}", patch)]
    for row, picture in zip(rows, _pictures(found.images), strict=True):
        words = f"similarity {row['similarity']:.3f}\n{row['name']}"
        words += "" if row["class"] is None else f"\nclass {row['class']}"
        cells.append(marked(picture, words, row["patch"]))
    caption = (
        f"Marked: the patches nearest to the query's, by the cosine similarity of their features, in "
        f"{counted(len(numbers), 'image')}; at most {counted(each, 'patch', 'patches')} an image."
        + (" Copies of the query are left out." if number is None else "")
    )
    lines = [cells[start : start + 7] for start in range(0, len(cells), 7)]
    return _Near(tuple(rows), patch, table.bad, lines, caption)
