"""A sheet of pictures: rows with text above, below and beside them.

The layout is in inches, so that it fits eight images of 32 px as well as one of 256 px.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Num, Shaped
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn.functional import pad

from nextblock.config import ModelConfig
from nextblock.visualize.figure import INK, MUTED, axes_at, save_png, text_at, wrapped

MAX_PICTURE_BYTES = 1_500_000
MAX_CHANNELS = 6
"""The most channels that are drawn of an image that is neither grey nor RGB."""
ERROR_COLOURS = colormaps["magma"]
MARK = "#f2b705"
GAP_IN, LINE_IN = 0.08, 0.14


class Cell(NamedTuple):
    """A picture of a sheet."""

    picture: Num[np.ndarray, "h w c"]
    """Bytes, or floats in [0, 1], of one channel or three."""
    words: str = ""
    """Lines below it."""
    mark: tuple[float, float, float, float] | None = None
    """A rectangle: its top, left, height and width as shares of the picture."""
    above: str = ""
    """Lines above it."""


def banded(
    panels: Mapping[str, Num[np.ndarray, "b _ _ _"]],
    words: Sequence[str],
    above: Sequence[str],
    *,
    most: int = 8,
) -> tuple[list[list[Cell]], list[str]]:
    """Rows of up to `most` images, one per panel, and their names; `words` are below the last panel."""
    images = len(words)
    columns = -(-images // -(-images // most))
    rows = []
    for start in range(0, images, columns):
        some = range(start, min(start + columns, images))
        band = [[Cell(pictures[i]) for i in some] for pictures in panels.values()]
        band[0] = [cell._replace(above=above[i]) for cell, i in zip(band[0], some, strict=True)]
        band[-1] = [cell._replace(words=words[i]) for cell, i in zip(band[-1], some, strict=True)]
        rows += band
    return rows, [*panels] * (len(rows) // len(panels))


def draw_cells(
    rows: Sequence[Sequence[Cell]],
    path: Path,
    *,
    title: str,
    caption: str,
    subtitle: str = "",
    names: Sequence[str] = (),
    blocks_of: ModelConfig | None = None,
    bar: tuple[int, Normalize] | None = None,
) -> None:
    """Write rows of pictures as a PNG of at most `MAX_PICTURE_BYTES`, at the highest resolution that fits.

    The first picture of a row sets its height; `names` are those of rows. `blocks_of` draws the lines between
    blocks, `bar` a scale of `ERROR_COLOURS` beside the row with that number.
    """
    columns, left_in = max(map(len, rows)), 0.95 if names else 0.2
    height_px, width_px = rows[0][0].picture.shape[:2]
    cell_in = min(2.4, max(1.15, 9.2 / columns), max(0.8, 2.6 * width_px / height_px))
    across_in = max(4.5, left_in + columns * (cell_in + GAP_IN) + (0.77 if bar else 0.12))
    subtitle, caption = wrapped(subtitle, across_in - 0.4, 8.5), wrapped(caption, across_in - 0.4, 8)
    y, places = 0.56 + 0.18 * _lines(subtitle), []
    for row in rows:
        y += 1.3 * LINE_IN * max(_lines(cell.above) for cell in row)
        height_px, width_px = row[0].picture.shape[:2]
        places.append((y, cell_in * height_px / width_px))
        y += places[-1][1] + GAP_IN + LINE_IN * max(_lines(cell.words) for cell in row)
    figure = Figure(figsize=(across_in, y + 0.18 + 0.16 * _lines(caption)))
    text_at(figure, 0.2, 0.2, title, size=13, weight="bold", va="top")
    text_at(figure, 0.2, 0.5, subtitle, size=8.5, color=MUTED, va="top")
    text_at(figure, 0.2, y + 0.08, caption, size=8, color=MUTED, va="top")
    letters = int(cell_in * 72 / (7.5 * 0.62))
    for row, name, (y, high_in) in zip(rows, names or [""] * len(rows), places, strict=True):
        text_at(figure, left_in - 0.1, y + high_in / 2, name, size=8.5, ha="right", va="center")
        for column, cell in enumerate(row):
            x = left_in + column * (cell_in + GAP_IN)
            axes = axes_at(figure, x, y, cell_in, high_in)
            picture = np.broadcast_to(cell.picture, (*cell.picture.shape[:2], 3))
            how = "nearest" if max(picture.shape[:2]) < 128 else "antialiased"
            axes.imshow(picture, interpolation=how, aspect="auto", extent=(0, 1, 1, 0))
            axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
            axes.spines[:].set(linewidth=0.4, color=MUTED)
            if blocks_of is not None:
                _draw_block_lines(axes, picture.shape, blocks_of)
            if cell.mark is not None:
                top, left, height, width = cell.mark
                for colour, line in ((INK, 3.2), (MARK, 1.6)):
                    frame = Rectangle((left, top), width, height, fill=False, color=colour, linewidth=line)
                    frame.set_clip_on(False)
                    axes.add_patch(frame)
            for words, at, side in (
                (cell.above, y - 0.05, "bottom"),
                (cell.words, y + high_in + 0.05, "top"),
            ):
                words = "\n".join(shortened(line, letters) for line in words.split("\n"))
                style = {"size": 7.5, "linespacing": 1.1, "color": INK if side == "top" else MUTED}
                text_at(figure, x + cell_in / 2, at, words, ha="center", va=side, **style)
    if bar is not None:
        (y, high_in), scale = places[bar[0]], bar[1]
        axes = axes_at(figure, left_in + columns * (cell_in + GAP_IN), y, 0.09, high_in)
        colours = figure.colorbar(ScalarMappable(scale, cmap=ERROR_COLOURS), cax=axes, format="%.3g")
        colours.set_ticks([float(scale.inverse(share)) for share in (0, 0.5, 1)])
        colours.outline.set_visible(False)  # type: ignore[operator]
        axes.tick_params(labelsize=7, length=2, width=0.5, color=MUTED, labelcolor=MUTED)
    save_png(figure, path, dpis=(200, 170, 150, 130, 110, 90, 70, 50), max_bytes=MAX_PICTURE_BYTES)


def _lines(words: str) -> int:
    return words.count("\n") + bool(words)


def _draw_block_lines(axes: Axes, shape_px: tuple[int, ...], config: ModelConfig) -> None:
    """Draw the lines between blocks in an image, or in each panel if channels have their own."""
    (rows, columns), block_px = config.block_grid, config.block_px
    height, width = rows * block_px[0], columns * block_px[1]
    line = {"color": "#8c959f", "linewidth": 0.5 if max(rows, columns) <= 8 else 0.25, "alpha": 0.7}
    gap = panel_gap(width)
    for panel in range(1 if shape_px[1] == width else min(config.in_chans, MAX_CHANNELS)):
        down, along = divmod(panel, (shape_px[1] + gap) // (width + gap))
        # The ends of the panel and of its blocks, as shares of the picture.
        y = (down * (height + gap) + block_px[0] * np.arange(rows + 1)) / shape_px[0]
        x = (along * (width + gap) + block_px[1] * np.arange(columns + 1)) / shape_px[1]
        axes.hlines(y[1:-1], x[0], x[-1], **line)
        axes.vlines(x[1:-1], y[0], y[-1], **line)


# ------------------------------------------------------------------------------------------------ pictures


def pictures_of(images: Shaped[Tensor, "b shown h w"]) -> Shaped[np.ndarray, "b h2 w2 c"]:
    """Images (bytes, or floats in [0, 1]) as pictures of cells; unless grey or RGB, a panel per channel."""
    return rearrange(side_by_side(images[:, :MAX_CHANNELS]), "b c h w -> b h w c").numpy()


def side_by_side(pictures: Shaped[Tensor, "b shown h w"]) -> Shaped[Tensor, "b c h2 w2"]:
    """Pictures of one or three channels unchanged; of others, each channel as a grey panel."""
    shown, width = pictures.shape[1], pictures.shape[3]
    if shown in (1, 3):
        return pictures
    columns, gap = math.ceil(math.sqrt(shown)), panel_gap(width)
    # White below and to the right of each panel, and white panels that fill the last row.
    white = 1.0 if pictures.is_floating_point() else 255
    padded = pad(pictures, (0, gap, 0, gap, 0, -shown % columns), value=white)
    tiled = rearrange(padded, "b (r q) h w -> b 1 (r h) (q w)", q=columns)
    return tiled[..., :-gap, :-gap]


def panel_gap(width_px: int) -> int:
    """Pixels between the panels of `side_by_side`."""
    return max(1, width_px // 32)


def channel_words(channels: int) -> list[str]:
    """A sentence for a caption if `pictures_of` draws panels."""
    few = f"the first {MAX_CHANNELS} of {channels}" if channels > MAX_CHANNELS else f"all {channels}"
    return [] if channels in (1, 3) else [f"Grey panels: {few} channels."]


def shown_channels(channels: int) -> int:
    """How many channels one RGB or grey picture shows."""
    return 3 if channels >= 3 else 1


def pixels_of_blocks(blocks: Shaped[Tensor, "*b k"], config: ModelConfig) -> Shaped[Tensor, "*b h w"]:
    """The value of each block, in raster order, in all of its pixels."""
    (rows, columns), (height, width) = config.block_grid, config.block_px
    return repeat(blocks, "... (r q) -> ... (r h) (q w)", r=rows, q=columns, h=height, w=width)


def hatch(config: ModelConfig) -> Float[Tensor, "h w"]:
    """Diagonal stripes of two greys, over the whole image."""
    height, width = config.block_grid[0] * config.block_px[0], config.block_grid[1] * config.block_px[1]
    stripe_px = max(2, min(config.block_px) // 16)
    diagonal = torch.arange(height)[:, None] + torch.arange(width)[None]
    return torch.where(diagonal // stripe_px % 2 == 0, 0.78, 0.86)


def coloured(
    values: Float[Tensor, "*b h w"], scale: Normalize, config: ModelConfig
) -> Float[Tensor, "*b c h w"]:
    """Values in `ERROR_COLOURS`; NaN is hatched."""
    colours = torch.from_numpy(ERROR_COLOURS(scale(values.numpy()))).float()
    return torch.where(values.isnan()[..., None, :, :], hatch(config), colours[..., :3].movedim(-1, -3))


def shortened(name: str, letters: int) -> str:
    """Shorten a name in its middle, an absolute path at its beginning; letters without a glyph become ?."""
    font = get_font(findfont("DejaVu Sans"))
    drawable = "".join(letter if font.get_char_index(ord(letter)) else "?" for letter in name)
    if len(drawable) <= letters:
        return drawable
    # The first folders of an absolute path are the same for all images.
    head = 0 if name.startswith("/") else (letters - 1) // 2
    return drawable[:head] + "…" + drawable[len(drawable) - (letters - 1 - head) :]
