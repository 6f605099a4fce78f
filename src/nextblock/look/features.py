"""`nextblock.features`: what an encoder sees in patches, as colours; where a head looks; nearest patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from nextblock.atomic import remove
from nextblock.config import pair
from nextblock.data import BadSample, Source, eval_batches, open_source
from nextblock.data.sources import SubsetSource
from nextblock.evaluate.features import (
    attention_maps,
    check_one_head,
    classifier_directory,
    encoder_extract,
    layer_choices,
    patch_grid,
)
from nextblock.evaluate.results import encoder_of
from nextblock.evaluate.search import SAME
from nextblock.evaluate.table import Extract, FeatureTable
from nextblock.interop import load_classifier
from nextblock.interop.hub import is_hub_spec
from nextblock.interop.load import own_file
from nextblock.logs import counted
from nextblock.look.opened import LookResult, Opened, about_image, open_look, write_numbers
from nextblock.look.settings import FeaturesSettings
from nextblock.models.heads import FeatureConfig, ImageClassifier, LinearHead
from nextblock.settings import from_dict, require, to_dict
from nextblock.visualize.evaluation import draw_attention
from nextblock.visualize.features import PatchColours
from nextblock.visualize.predictions import evenly_spaced, some_images
from nextblock.visualize.sheet import Cell, banded, draw_cells, shown_channels

AT_ONCE = 16
"""Images encoded at a time."""


def _filled(opened: Opened, extract: Extract, source: Source) -> FeatureTable:
    """Extract features of a source into a table."""
    size, device = opened.model.config.image_size, opened.device
    table = FeatureTable(extract, source, opened.data, size, batch_size=AT_ONCE, device=device)
    table.fill()
    return table


def features(**settings: Any) -> LookResult:
    """Draw patch features as `nextblock features` does; `settings` are the fields of `FeaturesSettings`.

    OUT/features.png has images and the colours of their patches; OUT/attention.png, with `head`, where its
    queries look; OUT/nearest.png, with `query`, the patches nearest to one; OUT/features.json the numbers.
    Facts: explained (shares of the features' variance that red, green and blue show), fitted_on (images whose
    patches chose the colours), grid (rows and columns of patches), images (names of those drawn), patch (the
    query's). Rows: the nearest patches.
    """
    config = from_dict(FeaturesSettings, settings)
    opened = open_look(config, predicts=False)
    model, source, data, _ = opened
    model.requires_grad_(requires_grad=False)
    (layers,) = layer_choices(config.layers, model.config.depth)
    wanted = FeatureConfig(layers=layers, norm_layers=True, pooled=False, attention=config.attention)
    encode = encoder_extract(model, [wanted], chunk=AT_ONCE)
    out, size = Path(config.out), pair(model.config.image_size)
    # What may be refused comes before what takes time.
    classifier = None if config.head is None else _open_head(opened, config, config.head)
    query = None if config.query is None else _open_query(opened, config.query)
    images, names, bad = some_images(source, data, size, config.num_images)
    (patches,) = encode(opened.ready(images))
    patches = patches.cpu()
    grid = patch_grid(patches.shape[1], size)
    row, column = config.patch or (0, 0)
    require(
        row < grid[0] and column < grid[1],
        f"patch is {row},{column}, but an image has {grid[0]} rows of {grid[1]} patches, counted from 0",
    )

    some = SubsetSource(source.spec, source, evenly_spaced(len(source), config.fit_images))
    fitted = _filled(opened, encode, some)
    known = fitted.read(fitted.readable())
    colours = PatchColours.fit(rearrange(known, "b n d -> (b n) d").numpy())
    maps = rearrange(colours.colours(patches.numpy()), "b (r q) c -> b r q c", r=grid[0])
    unreadable = [*bad, *fitted.bad]
    rows, patch, cells, caption = [], None, [], ""
    if query is not None:
        rows, patch, cells, caption, bad = _nearest(opened, config, encode, *query, grid)
        unreadable += bad
    for name in ("features.json", "attention.png", "nearest.png"):  # of a result that is replaced
        remove(out / name)

    pictures = _pictures(images)
    lines, line_names = banded({"image": pictures, "patch\nfeatures": maps}, names, [""] * len(names))
    shares = ", ".join(
        f"{name} {100 * share:.0f} %"
        for name, share in zip(("red", "green", "blue"), colours.explained, strict=False)
    )
    about = (
        "Red, green and blue are the first three principal components of "
        f"{known.shape[0] * known.shape[1]:,} patches of {counted(known.shape[0], 'image')}, on one scale: a "
        f"component that varies little stays grey. They show {shares} of the features' variance. Patches of "
        "one colour may differ in the rest."
    )
    title = "Patch features as colours"
    draw_cells(lines, out / "features.png", title=title, caption=about, names=line_names)
    further = []
    if classifier is not None:
        further.append(out / "attention.png")
        attention = attention_maps(classifier, opened.ready(images)).cpu().numpy()
        head = classifier.head_config
        unit = "query" if head.kind == "ep" or head.num_heads == 1 else "head"
        draw_attention(pictures, attention, further[-1], unit=unit, names=names)
    if cells:
        further.append(out / "nearest.png")
        draw_cells(cells, further[-1], title="Nearest patches", caption=caption)
    result = LookResult(
        picture=out / "features.png",
        further=tuple(further),
        rows=tuple(rows),
        bad=tuple({sample.name: sample for sample in unreadable}.values()),
        facts={
            "explained": colours.explained,
            "fitted_on": len(known),
            "grid": grid,
            "images": names,
            "patch": patch,
            "nearest": rows,
            "pictures": [str(path) for path in (out / "features.png", *further)],
        },
    )
    write_numbers(out / "features.json", {"settings": to_dict(config), **result.as_dict()})
    return result


def _pictures(images: UInt8[Tensor, "b c h w"]) -> UInt8[np.ndarray, "b h w shown"]:
    return rearrange(images[:, : shown_channels(images.shape[1])], "b c h w -> b h w c").numpy()


def _open_head(opened: Opened, config: FeaturesSettings, head: str) -> ImageClassifier:
    """Open a head; `UsageError` if it belongs to another encoder or has no attention."""
    check_one_head(head, "head")
    spec = classifier_directory(head)
    # A head of ours is saved with its encoder; the second file of an official AIM classifier needs the first.
    alone = own_file(Path(spec)) is not None or head == config.model
    require(
        alone or Path(head).exists() or is_hub_spec(head),
        f"there is no head {head}; give a classifier's directory, such as RUN/probe/ep",
    )
    files = (spec, None) if alone else (config.model, head)
    classifier = load_classifier(*files, num_heads=config.num_heads)
    require(
        encoder_of(classifier.encoder_model)["weights"] == encoder_of(opened.model)["weights"],
        f"{head} is a head on another encoder than {config.model}; give --model {head}",
    )
    require(
        not isinstance(classifier.head, LinearHead),
        f"{head} is a linear head, which weighs all patches alike; give an attentive or ep head",
    )
    return classifier.to(opened.device).eval()


def _open_query(opened: Opened, text: str) -> tuple[Source, int | None]:
    """The query's image, as a source of one image, and its number, if it is one of the data."""
    source = opened.source
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
    opened: Opened,
    config: FeaturesSettings,
    encode: Extract,
    query: Source,
    number: int | None,
    grid: tuple[int, int],
) -> tuple[list[dict[str, Any]], tuple[int, int], list[list[Cell]], str, tuple[BadSample, ...]]:
    """Find the patches nearest to one of the query, which may be image `number` of the data.

    Return rows, the query's patch, the sheet and its caption, and unreadable images.
    """
    size = pair(opened.model.config.image_size)
    image, (name,), _ = some_images(query, opened.data, size, 1)
    own = F.normalize(encode(opened.ready(image))[0][0].cpu(), dim=-1)
    patch = config.patch or divmod(int((own @ own.mean(0)).argmin()), grid[1])
    wanted = own[patch[0] * grid[1] + patch[1]].to(opened.device)
    each = min(config.per_image, len(own))

    # Only the best of each image are kept, so that a folder of any size can be searched.
    def best(images: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        similar = F.normalize(encode(images)[0], dim=-1) @ wanted
        values, places = similar.topk(each, dim=-1)
        return values, places.float()

    source, table = opened.source, _filled(opened, best, opened.source)
    numbers = table.readable()
    values, places = (table.read(numbers, kind).numpy() for kind in (0, 1))
    pixels, rows, same = query.read(0), [], {number}
    for flat in np.argsort(-values, axis=None, kind="stable").tolist():
        if len(rows) == config.top:
            break
        row, rank = divmod(flat, each)
        index, similarity = int(numbers[row]), float(values[row, rank])
        # A file may be in the data too; then its own patch comes before any other of that image.
        if number is None and similarity > SAME and torch.equal(pixels, source.read(index)):
            same.add(index)
        if index not in same:
            place = divmod(int(places[row, rank]), grid[1])
            about = {"rank": len(rows) + 1, **about_image(source, index)}
            rows.append({**about, "patch": place, "similarity": similarity})
    require(
        len(rows) > 0,
        f"{source.spec} has no readable image but the query{' and its copies' if number is None else ''}; "
        "give data of more images, or a query that is not one of them",
    )

    def marked(picture: np.ndarray, words: str, at: tuple[int, int]) -> Cell:
        return Cell(picture, words, (at[0] / grid[0], at[1] / grid[1], 1 / grid[0], 1 / grid[1]))

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
    return rows, patch, lines, caption, table.bad
