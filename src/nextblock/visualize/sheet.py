"""The contact sheet: of every image the original, its prediction and the error, with the loss below.

Laid out in inches, so that the same sheet serves eight images of 32 px and one of 256 px.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from torch import Tensor

from nextblock.config import ModelConfig
from nextblock.targets import make_targets
from nextblock.visualize.figure import MUTED, axes_at, save_png, text_at, wrapped
from nextblock.visualize.words import BASELINE_WORDS

__all__ = ["MAX_PICTURE_BYTES", "Look", "draw_sheet", "hatch", "shortened", "shown_channels"]

MAX_PICTURE_BYTES = 1_500_000
ERROR_COLOURS = colormaps["magma"]


class Look(NamedTuple):
    """What one forward pass shows of some images, on the CPU."""

    config: ModelConfig
    is_raster: bool
    originals: Float[Tensor, "b shown h w"]
    pictures: Float[Tensor, "b shown h w"]
    predicted: Bool[Tensor, "h w"]
    losses: Float[Tensor, " b"]
    baselines: dict[str, Float[Tensor, " b"]]
    """What the losses would be without a model, by the names of `BASELINE_WORDS`."""


def shown_channels(channels: int) -> int:
    """How many channels a picture shows: three (colour) where there are as many, else one (grey)."""
    return 3 if channels >= 3 else 1


def hatch(config: ModelConfig) -> Float[Tensor, "h w"]:
    """Diagonal stripes of two greys over the whole image."""
    height, width = config.block_grid[0] * config.block_px[0], config.block_grid[1] * config.block_px[1]
    stripe_px = max(2, min(config.block_px) // 16)
    diagonal = torch.arange(height)[:, None] + torch.arange(width)[None]
    return torch.where(diagonal // stripe_px % 2 == 0, 0.78, 0.86)


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where things lie on the sheet, in inches from its upper left corner."""

    num_images: int
    columns: int
    cell_width_in: float
    cell_height_in: float
    has_titles: bool
    caption_lines: int
    subtitle_lines: int

    left_in = 0.95
    right_in = 0.85
    gap_in = 0.07

    @property
    def bands(self) -> int:
        return -(-self.num_images // self.columns)

    @property
    def width_in(self) -> float:
        return self.left_in + self.columns * (self.cell_width_in + self.gap_in) - self.gap_in + self.right_in

    @property
    def top_in(self) -> float:
        return 0.62 + 0.16 * self.subtitle_lines + (0.24 if self.has_titles else 0.06)

    @property
    def band_in(self) -> float:
        """Height from one band of images to the next: three cells, their losses, the next titles."""
        return 3 * (self.cell_height_in + self.gap_in) + (0.56 if self.has_titles else 0.4)

    @property
    def height_in(self) -> float:
        return self.top_in + self.bands * self.band_in + 0.16 * self.caption_lines + 0.1

    def cell(self, image: int, panel: int) -> tuple[float, float]:
        """The upper left corner of an image's panel: 0 the original, 1 the prediction, 2 the error."""
        band, column = divmod(image, self.columns)
        x = self.left_in + column * (self.cell_width_in + self.gap_in)
        return x, self.top_in + band * self.band_in + panel * (self.cell_height_in + self.gap_in)


def draw_sheet(look: Look, path: Path, titles: Sequence[str] | None) -> None:
    """Write the sheet as a PNG of at most `MAX_PICTURE_BYTES`, in as many dots per inch as that allows."""
    subtitle, caption = _subtitle(look), _caption(look)
    layout = _plan(look, subtitle, caption, has_titles=titles is not None)
    figure = Figure(figsize=(layout.width_in, layout.height_in))
    error, largest_error = _error_pictures(look)
    for panel, pixels in enumerate((look.originals, look.pictures, error)):
        for image in range(len(pixels)):
            _draw_cell(_axes_at(figure, layout, *layout.cell(image, panel)), pixels[image], look.config)
    _draw_scale(figure, layout, largest_error)
    _label(figure, layout, look, titles)
    text_width = layout.width_in - 0.4
    title = f"{'Next' if look.config.mask_ratio is None else 'Masked'}-block prediction"
    text_at(figure, 0.2, 0.22, title, size=13, weight="bold", va="top")
    text_at(figure, 0.2, 0.5, wrapped(subtitle, text_width, 8.5), size=8.5, color=MUTED, va="top")
    below = layout.top_in + layout.bands * layout.band_in - (0.16 if titles is not None else 0.02)
    text_at(figure, 0.2, below, wrapped(caption, text_width, 8), size=8, color=MUTED, va="top")
    save_png(figure, path, dpis=(200, 170, 150, 130, 110, 90, 70), max_bytes=MAX_PICTURE_BYTES)


def _plan(look: Look, subtitle: str, caption: str, *, has_titles: bool) -> _Layout:
    """Up to eight images side by side, cells as large as a page's width allows."""
    num_images, (height, width) = len(look.originals), look.originals.shape[-2:]
    columns = -(-num_images // -(-num_images // 8))
    cell_width = min(2.4, max(1.15, 9.2 / columns), max(0.8, 2.6 * width / height))
    sides = _Layout.left_in + _Layout.right_in
    text_width = columns * (cell_width + _Layout.gap_in) + sides - _Layout.gap_in - 0.4
    return _Layout(
        num_images=num_images,
        columns=columns,
        cell_width_in=cell_width,
        cell_height_in=cell_width * height / width,
        has_titles=has_titles,
        caption_lines=wrapped(caption, text_width, 8).count("\n") + 1,
        subtitle_lines=wrapped(subtitle, text_width, 8.5).count("\n") + 1,
    )


def _axes_at(
    figure: Figure, layout: _Layout, x_in: float, y_in: float, size_in: tuple[float, float] | None = None
) -> Axes:
    width, height = size_in or (layout.cell_width_in, layout.cell_height_in)
    return axes_at(figure, x_in, y_in, width, height)


def _draw_cell(axes: Axes, pixels: Shaped[Tensor, "shown h w"], config: ModelConfig) -> None:
    picture = rearrange(pixels.expand(3, -1, -1), "c h w -> h w c").numpy()
    enlarged = max(picture.shape[:2]) < 128
    axes.imshow(picture, interpolation="nearest" if enlarged else "antialiased", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(linewidth=0.4, color=MUTED)
    rows, columns = config.block_grid
    line = {"color": "#8c959f", "linewidth": 0.5 if max(rows, columns) <= 8 else 0.25, "alpha": 0.7}
    for row in range(1, rows):
        axes.axhline(row * config.block_px[0] - 0.5, **line)
    for column in range(1, columns):
        axes.axvline(column * config.block_px[1] - 0.5, **line)


def _error_pictures(look: Look) -> tuple[Float[Tensor, "b 3 h w"], float]:
    """The absolute error, averaged over channels, in colours; and where their scale ends."""
    error = (look.pictures - look.originals).abs().mean(1)
    largest = float(np.quantile(error[:, look.predicted].numpy(), 0.995))
    largest = max(0.05, math.ceil(largest * 20) / 20)
    colours = torch.from_numpy(ERROR_COLOURS((error / largest).numpy())).float()
    colours = rearrange(colours[..., :3], "b h w c -> b c h w")
    return torch.where(look.predicted, colours, hatch(look.config)), largest


def _draw_scale(figure: Figure, layout: _Layout, largest: float) -> None:
    """The colour bar, at the right of the first band's errors."""
    x, y = layout.cell(layout.columns - 1, 2)
    axes = _axes_at(figure, layout, x + layout.cell_width_in + 0.1, y, (0.09, layout.cell_height_in))
    scale = ScalarMappable(Normalize(0, largest), cmap=ERROR_COLOURS)
    bar = figure.colorbar(scale, cax=axes, ticks=[0, largest / 2, largest], format="%.3g")
    bar.outline.set_visible(False)  # type: ignore[operator]
    axes.tick_params(labelsize=7, length=2, width=0.5, color=MUTED, labelcolor=MUTED)


def _label(figure: Figure, layout: _Layout, look: Look, titles: Sequence[str] | None) -> None:
    """The rows' names at the left, the images' titles above them, their losses below."""
    predicted = "next-block\nprediction" if look.config.mask_ratio is None else "masked\nblocks"
    for band in range(layout.bands):
        for panel, words in enumerate(("original", predicted, "absolute\nerror")):
            x, y = layout.cell(band * layout.columns, panel)
            middle = y + layout.cell_height_in / 2
            text_at(figure, x - 0.1, middle, words, size=8.5, ha="right", va="center")
    for image, loss in enumerate(look.losses.tolist()):
        x, y = layout.cell(image, 2)
        middle = x + layout.cell_width_in / 2
        below = y + layout.cell_height_in + 0.06
        text_at(figure, middle, below, f"loss {loss:.3f}", size=8.5, ha="center", va="top")
        if titles is not None:
            name = shortened(titles[image], int(layout.cell_width_in * 72 / (7.5 * 0.62)))
            above = layout.cell(image, 0)[1] - 0.05
            text_at(figure, middle, above, name, size=7.5, ha="center", va="bottom", color=MUTED)


def shortened(name: str, letters: int) -> str:
    """A name that fits: its middle left out, letters that the font lacks as a question mark."""
    font = get_font(findfont("DejaVu Sans"))
    drawable = "".join(letter if font.get_char_index(ord(letter)) else "?" for letter in name)
    if len(drawable) <= letters:
        return drawable
    head = (letters - 1) // 2
    return drawable[:head] + "…" + drawable[len(drawable) - (letters - 1 - head) :]


def _subtitle(look: Look) -> str:
    parts = [f"mean loss {look.losses.mean():.3f}"]
    parts += [f"{BASELINE_WORDS[name]} {losses.mean():.3f}" for name, losses in look.baselines.items()]
    return "   ·   ".join(parts)


def _caption(look: Look) -> str:
    """What is seen, in a few sentences."""
    config = look.config
    size = f"block of {config.block_px[0]} x {config.block_px[1]} px"
    if config.mask_ratio is not None:
        first = f"Each masked {size} is predicted from all blocks that are not masked (hatched)."
    else:
        order = "row by row" if look.is_raster else "in another order than row by row"
        alone = (
            "is predicted from a class token alone"
            if config.class_token
            else "(hatched) has none before it and is not predicted"
        )
        first = f"Each {size} is predicted from the true blocks before it, {order}; the first one {alone}."
    sentences = [first, *make_targets(config).words]
    if config.in_chans not in (1, 3):
        sentences.append(f"Shown: {shown_channels(config.in_chans)} of {config.in_chans} channels.")
    return " ".join(sentences)
