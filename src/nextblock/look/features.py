"""`nextblock.features`: patch features as colours, the attention of a head, the nearest patches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from einops import rearrange
from jaxtyping import Float, UInt8
from sklearn.decomposition import PCA
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
from nextblock.visualize.predictions import AT_ONCE, evenly_spaced, some_images
from nextblock.visualize.sheet import Cell, banded, draw_cells, shown_channels

QUANTILE = 0.01
"""The share of patches at either end of a component that gets the end's colour."""
COLUMNS = 7


@dataclass(frozen=True)
class PatchColours:
    """A map from patch features to colours: their first three principal components as red, green and blue."""

    mean: Float[np.ndarray, " d"]
    components: Float[np.ndarray, "components d"]
    middle: Float[np.ndarray, " components"]
    """The value of each component that becomes 0.5."""
    span: float
    """From dark to bright, the same for all components: one that varies less stays closer to grey."""
    explained: tuple[float, ...]
    """Shares of the features' variance that red, green and blue show."""

    @classmethod
    def fit(cls, features: Float[np.ndarray, "r d"]) -> PatchColours:
        """Fit the map on patches of many images; the same patches always give the same colours."""
        pca = PCA(min(3, *features.shape), svd_solver="covariance_eigh").fit(features)
        mean, components = np.asarray(pca.mean_), np.array(pca.components_)
        # The sign of a component is arbitrary: make its largest weight positive.
        largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
        components[largest[:, 0] < 0] *= -1
        low, high = np.quantile((features - mean) @ components.T, (QUANTILE, 1 - QUANTILE), axis=0)
        explained = tuple(pca.explained_variance_ratio_.tolist())
        return cls(mean, components, (low + high) / 2, float((high - low).max()), explained)

    def colours(self, features: Float[np.ndarray, "*p d"]) -> Float[np.ndarray, "*p 3"]:
        """Colours of patches in [0, 1]; 0.5 for a component that does not vary or does not exist."""
        colours = np.full((*features.shape[:-1], 3), 0.5)
        if self.span > 0:
            values = (features - self.mean) @ self.components.T
            colours[..., : len(self.middle)] += (values - self.middle) / self.span
        return colours.clip(0, 1)


def features(**settings: Any) -> LookResult:
    """Draw patch features as `nextblock features` does; `settings` are the fields of `FeaturesSettings`.

    Writes OUT/features.png (images and the colours of their patches), OUT/attention.png (with `head`),
    OUT/nearest.png (with `query`) and OUT/features.json. Facts: explained (shares of the variance that red,
    green and blue show), fitted_on (number of images that determined the colours), grid (rows and columns of
    patches), images (names of those drawn), patch (the query's). Rows: the nearest patches.
    """
    config = from_dict(FeaturesSettings, settings)
    opened = open_look(config, predicts=False)
    model, source, out = opened.model.requires_grad_(requires_grad=False), opened.source, Path(config.out)
    (layers,) = layer_choices(config.layers, model.config.depth)
    wanted = FeatureConfig(layers=layers, norm_layers=True, pooled=False, attention=config.attention)
    encode = encoder_extract(model, [wanted], chunk=AT_ONCE)
    classifier = None if config.head is None else _open_head(opened, config, config.head)
    images, names, bad = some_images(source, opened.data, model.config.image_size, config.num_images)
    patches = encode(opened.ready(images))[0].cpu()
    grid = patch_grid(patches.shape[1], pair(model.config.image_size))
    pictures, further, rows, patch = _pictures(images), [], [], None
    if config.query is not None:
        further.append(out / "nearest.png")
        rows, patch, more_bad = _draw_nearest(opened, config, config.query, encode, grid, further[-1])
        bad += more_bad
    if classifier is not None:
        further.insert(0, out / "attention.png")
        attention = attention_maps(classifier, opened.ready(images)).cpu().numpy()
        head = classifier.head_config
        unit = "query" if head.kind == "ep" or head.num_heads == 1 else "head"
        draw_attention(pictures, attention, further[0], unit=unit, names=names)

    some = SubsetSource(source.spec, source, evenly_spaced(len(source), config.fit_images))
    fitted = _filled(opened, encode, some)
    known = fitted.read(fitted.readable())
    colours = PatchColours.fit(rearrange(known, "b n d -> (b n) d").numpy())
    maps = rearrange(colours.colours(patches.numpy()), "b (r q) c -> b r q c", r=grid[0])
    shares = zip(("red", "green", "blue"), colours.explained, strict=False)
    caption = (
        "Red, green and blue are the first three principal components of "
        f"{known.shape[0] * known.shape[1]:,} patches of {counted(known.shape[0], 'image')}. All use one "
        "scale, so a component that varies little stays grey. They show "
        f"{', '.join(f'{name} {100 * share:.0f} %' for name, share in shares)} of the features' variance. "
        "Patches of one colour may differ in the rest."
    )
    lines, line_names = banded({"image": pictures, "patch\nfeatures": maps}, names, [""] * len(names))
    title = "Patch features as colours"
    draw_cells(lines, out / "features.png", title=title, caption=caption, names=line_names)
    for path in {out / "attention.png", out / "nearest.png"} - set(further):  # of a result that is replaced
        remove(path)
    result = LookResult(
        picture=out / "features.png",
        further=tuple(further),
        rows=tuple(rows),
        bad=tuple({sample.name: sample for sample in (*bad, *fitted.bad)}.values()),
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


def _filled(opened: Opened, extract: Extract, source: Source) -> FeatureTable:
    """Extract features of a source into a table."""
    size, device = opened.model.config.image_size, opened.device
    table = FeatureTable(extract, source, opened.data, size, batch_size=AT_ONCE, device=device)
    table.fill()
    return table


def _pictures(images: UInt8[Tensor, "b c h w"]) -> UInt8[np.ndarray, "b h w shown"]:
    return rearrange(images[:, : shown_channels(images.shape[1])], "b c h w -> b h w c").numpy()


def _open_head(opened: Opened, config: FeaturesSettings, head: str) -> ImageClassifier:
    """Open a head; `UsageError` if it belongs to another encoder or has no attention."""
    check_one_head(head, "head")
    spec = classifier_directory(head)
    # Our heads are saved with their encoder; the second file of an official AIM classifier needs the first.
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
        f"{head} is a linear head, which weights all patches equally; give an attentive or ep head",
    )
    return classifier.to(opened.device).eval()


def _draw_nearest(
    opened: Opened, config: FeaturesSettings, query: str, encode: Extract, grid: tuple[int, int], path: Path
) -> tuple[list[dict[str, Any]], tuple[int, int], tuple[BadSample, ...]]:
    """Draw the patches nearest to one of the query: a file, or the number of an image of the data.

    Returns their rows, the query's patch, and unreadable images.
    """
    source, size, number = opened.source, pair(opened.model.config.image_size), -1
    if query.isdecimal() and not Path(query).exists():
        number, count = int(query), counted(len(source), "image")
        require(number < len(source), f"query is {query}, but {source.spec} has {count}, numbered from 0")
        asked: Source = SubsetSource(source.spec, source, np.array([number]))
    else:
        asked = open_source(query, opened.data)
        count = counted(len(asked), "image")
        require(len(asked) == 1, f"query {query} has {count}; give an image file, or a number of one of data")
    row, column = config.patch or (0, 0)
    require(
        row < grid[0] and column < grid[1],
        f"patch is {row},{column}, but an image has {grid[0]} rows of {grid[1]} patches, counted from 0",
    )
    image, (name,), _ = some_images(asked, opened.data, size, 1)
    own = F.normalize(encode(opened.ready(image))[0][0].cpu(), dim=-1)
    patch = config.patch or divmod(int((own @ own.mean(0)).argmin()), grid[1])
    wanted = own[patch[0] * grid[1] + patch[1]].to(opened.device)
    each = min(config.per_image, len(own))

    # Keep only the best patches of each image, so that a source of any size can be searched.
    def best(images: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        similar = F.normalize(encode(images)[0], dim=-1) @ wanted
        values, places = similar.topk(each, dim=-1)
        return values, places.float()

    table = _filled(opened, best, source)
    numbers = table.readable()
    numbers = numbers[numbers != number]
    require(len(numbers) > 0, f"{source.spec} has no readable image but the query; give data of more images")
    values, places = (table.read(numbers, kind).numpy() for kind in (0, 1))
    rows = []
    for flat in np.argsort(-values, axis=None, kind="stable")[: config.top].tolist():
        row, rank = divmod(flat, each)
        about = {"rank": len(rows) + 1, **about_image(source, int(numbers[row]))}
        place = divmod(int(places[row, rank]), grid[1])
        rows.append({**about, "patch": place, "similarity": float(values[row, rank])})

    (found,) = eval_batches(source, opened.data, size, len(rows), [row["index"] for row in rows])
    pictures = [*_pictures(image), *_pictures(found.images)]
    words, marks = [f"query\n{name}"], [patch, *(row["patch"] for row in rows)]
    for row in rows:
        label = "" if row["class"] is None else f"\nclass {row['class']}"
        words.append(f"similarity {row['similarity']:.3f}\n{row['name']}{label}")
    cells = [
        Cell(picture, line, (down / grid[0], along / grid[1], 1 / grid[0], 1 / grid[1]))
        for picture, line, (down, along) in zip(pictures, words, marks, strict=True)
    ]
    caption = (
        "Marked: the patches nearest to the query's, by the cosine similarity of their features, in "
        f"{counted(len(numbers), 'image')}; at most {counted(each, 'patch', 'patches')} an image."
    )
    lines = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    draw_cells(lines, path, title="Nearest patches", caption=caption)
    return rows, patch, table.bad
