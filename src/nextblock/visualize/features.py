"""Patch features as pictures: three principal components as colours, and patches marked in their images.

Everything here takes plain arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.decomposition import PCA

from nextblock.visualize.figure import INK, MUTED, axes_at, save_png, text_at, wrapped
from nextblock.visualize.sheet import MAX_PICTURE_BYTES, shortened

QUANTILE = 0.01
"""This share of the patches at either end of a component has the end's colour."""
MARK = "#f2b705"
LEFT_IN, GAP_IN = 0.95, 0.09


@dataclass(frozen=True)
class PatchColours:
    """A map from features to colours: their three first principal components as red, green and blue."""

    mean: Float[np.ndarray, " d"]
    components: Float[np.ndarray, "components d"]
    middle: Float[np.ndarray, " components"]
    """The value of each component that is 0.5."""
    span: float
    """From dark to bright, the same for all: a component that varies less stays nearer to grey."""
    explained: tuple[float, ...]
    """Shares of the features' variance that red, green and blue show."""

    @classmethod
    def fit(cls, features: Float[np.ndarray, "r d"]) -> PatchColours:
        """Fit the map on the features of patches of many images; the same ones give the same colours.

        A component's sign is arbitrary: here its largest weight is positive. The span is the widest range
        that a component has in the patches, without the hundredth at either end.
        """
        pca = PCA(min(3, *features.shape), svd_solver="covariance_eigh").fit(features)
        mean, components = np.asarray(pca.mean_), np.array(pca.components_)
        largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
        components[largest[:, 0] < 0] *= -1
        low, high = np.quantile((features - mean) @ components.T, (QUANTILE, 1 - QUANTILE), axis=0)
        explained = tuple(pca.explained_variance_ratio_.tolist())
        return cls(mean, components, (low + high) / 2, float((high - low).max()), explained)

    def colours(self, features: Float[np.ndarray, "*p d"]) -> Float[np.ndarray, "*p 3"]:
        """Colours of patches, in [0, 1]; a component that does not vary, or is not there, is 0.5."""
        colours = np.full((*features.shape[:-1], 3), 0.5)
        if self.span > 0:
            values = (features - self.mean) @ self.components.T
            colours[..., : len(self.middle)] += (values - self.middle) / self.span
        return colours.clip(0, 1)


class Cell(NamedTuple):
    """A picture of a sheet."""

    picture: Num[np.ndarray, "h w c"]
    """Bytes, or floats in [0, 1], of one channel or three."""
    words: str = ""
    """Lines below it."""
    mark: tuple[float, float, float, float] | None = None
    """A rectangle around a patch: its top, left, height and width as shares of the picture."""


def draw_cells(
    rows: Sequence[Sequence[Cell]],
    path: Path,
    *,
    size: tuple[int, int],
    title: str,
    caption: str,
    names: Sequence[str] = (),
) -> None:
    """Write rows of pictures as a PNG; `size` is the height and width of their images, `names` those of rows.

    Pictures are stretched to the images' shape, so that a picture of patches lies over its image.
    """
    columns, left_in = max(map(len, rows)), LEFT_IN if names else 0.2
    cell_in = min(2.4, max(1.15, 9.2 / columns), max(0.8, 2.6 * size[1] / size[0]))
    high_in = cell_in * size[0] / size[1]
    width_in = max(4.5, left_in + columns * (cell_in + GAP_IN) + 0.12)
    lines = [max(cell.words.count("\n") + bool(cell.words) for cell in row) for row in rows]
    below = [GAP_IN + 0.14 * count for count in lines]
    caption = wrapped(caption, width_in - 0.4, 8)
    caption_in = 0.64 + len(rows) * high_in + sum(below)
    height_in = caption_in + 0.16 * (caption.count("\n") + 1) + 0.12
    figure = Figure(figsize=(width_in, height_in))
    top_in = 0.58
    for row, name, below_in in zip(rows, names or [""] * len(rows), below, strict=True):
        text_at(figure, left_in - 0.1, top_in + high_in / 2, name, size=8.5, ha="right", va="center")
        for column, cell in enumerate(row):
            x = left_in + column * (cell_in + GAP_IN)
            axes = axes_at(figure, x, top_in, cell_in, high_in)
            picture = np.broadcast_to(cell.picture, (*cell.picture.shape[:2], 3))
            small = max(picture.shape[:2]) < 128
            axes.imshow(
                picture,
                interpolation="nearest" if small else "antialiased",
                aspect="auto",
                extent=(0, 1, 1, 0),
            )
            axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
            axes.spines[:].set(linewidth=0.4, color=MUTED)
            if cell.mark is not None:
                top, left, height, width = cell.mark
                for colour, line in ((INK, 3.2), (MARK, 1.6)):
                    frame = Rectangle((left, top), width, height, fill=False, color=colour, linewidth=line)
                    frame.set_clip_on(False)
                    axes.add_patch(frame)
            letters = int(cell_in * 72 / (7.5 * 0.62))
            words = "\n".join(shortened(line, letters) for line in cell.words.split("\n"))
            text_at(
                figure, x + cell_in / 2, top_in + high_in + 0.05, words,
                size=7.5, ha="center", va="top", color=MUTED, linespacing=1.1,
            )  # fmt: skip
        top_in += high_in + below_in
    text_at(figure, 0.2, 0.2, title, size=13, weight="bold", va="top")
    text_at(figure, 0.2, caption_in, caption, size=8, color=MUTED, va="top")
    save_png(figure, path, dpis=(200, 150, 110, 80, 60), max_bytes=MAX_PICTURE_BYTES)
