"""The contact sheet: of every image the original, its prediction and the error, with the loss below.

Beneath the prediction is what predicting zero looks like, so that one sees what the model adds to it.

Laid out in inches, so that the same sheet serves eight images of 32 px and one of 256 px.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from torch.nn.functional import pad

from nextblock.config import ModelConfig
from nextblock.logs import counted
from nextblock.targets import make_targets
from nextblock.visualize.figure import MUTED, axes_at, save_png, text_at, wrapped
from nextblock.visualize.words import BASELINE_WORDS

MAX_PICTURE_BYTES = 1_500_000
MAX_CHANNELS = 6
"""So many channels of an image are drawn, if it is neither grey nor RGB."""
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
    zero: Float[Tensor, "b shown h w"] | None = None
    """As `pictures`, if the model predicted zero; None if zero stands for no pixels."""
    distance: int = 1
    """How many blocks ahead the drawn blocks are predicted."""
    is_hatched: bool = True
    """Whether blocks that are not predicted are a hatch, not their mean colour."""


def shown_channels(channels: int) -> int:
    """How many channels one RGB or grey picture shows: three if there are as many, else one."""
    return 3 if channels >= 3 else 1


def drawn_channels(channels: int) -> int:
    """How many channels `side_by_side` is given: all, up to `MAX_CHANNELS`; three are colours."""
    return min(channels, MAX_CHANNELS)


def side_by_side(pictures: Shaped[Tensor, "b shown h w"]) -> Shaped[Tensor, "b c h2 w2"]:
    """Pictures with one channel or three as they are; of others each channel as a grey panel of its own.

    Bytes, or floats in [0, 1].
    """
    shown, width = pictures.shape[1], pictures.shape[3]
    if shown in (1, 3):
        return pictures
    columns, gap = math.ceil(math.sqrt(shown)), panel_gap(width)
    # White below and to the right of each panel, and white panels that fill the last row.
    white = 1.0 if pictures.is_floating_point() else 255
    padded = pad(pictures, (0, gap, 0, gap, 0, -shown % columns), value=white)
    tiled = rearrange(padded, "b (r q) h w -> b 1 (r h) (q w)", q=columns)
    return tiled[..., :-gap, :-gap]


def channel_words(channels: int) -> list[str]:
    """A sentence for a caption about what `side_by_side` does with so many channels, if it does anything."""
    number = drawn_channels(channels)
    few = f"the first {number} of {channels}" if number < channels else f"all {number}"
    return [] if channels in (1, 3) else [f"Grey panels: {few} channels, each by itself."]


def panel_gap(width_px: int) -> int:
    """Pixels between the panels of `side_by_side`."""
    return max(1, width_px // 32)


def hatch(config: ModelConfig) -> Float[Tensor, "h w"]:
    """Diagonal stripes of two greys over the whole image."""
    height, width = config.block_grid[0] * config.block_px[0], config.block_grid[1] * config.block_px[1]
    stripe_px = max(2, min(config.block_px) // 16)
    diagonal = torch.arange(height)[:, None] + torch.arange(width)[None]
    return torch.where(diagonal // stripe_px % 2 == 0, 0.78, 0.86)


class _Layout:
    """Where things lie on the sheet, in inches from its upper left corner; its two texts are wrapped to it.

    Up to eight images side by side, cells as large as a page's width allows.
    """

    left_in, right_in, gap_in = 0.95, 0.85, 0.07

    def __init__(self, look: Look, rows: int, *, has_titles: bool) -> None:
        images, (height, width) = len(look.originals), side_by_side(look.originals[:1]).shape[-2:]
        self.bands = -(-images // (8 if look.originals.shape[1] in (1, 3) else 4))
        self.columns = columns = -(-images // self.bands)
        self.cell_width_in = min(2.4, max(1.15, 9.2 / columns), max(0.8, 2.6 * width / height))
        self.cell_height_in = self.cell_width_in * height / width
        across_in = columns * (self.cell_width_in + self.gap_in) - self.gap_in
        self.width_in = self.left_in + across_in + self.right_in
        parts = [f"mean loss {look.losses.mean():.3f}"]
        parts += [f"{BASELINE_WORDS[name]} {losses.mean():.3f}" for name, losses in look.baselines.items()]
        self.subtitle = wrapped("   ·   ".join(parts), self.width_in - 0.4, 8.5)
        self.caption = wrapped(_caption(look), self.width_in - 0.4, 8)
        # From one band of images to the next: its cells, their losses, the next titles.
        self.band_in = rows * (self.cell_height_in + self.gap_in) + (0.56 if has_titles else 0.4)
        lines = self.subtitle.count("\n") + 1
        self.top_in = 0.62 + 0.16 * lines + (0.24 if has_titles else 0.06)
        below_in = self.top_in + self.bands * self.band_in
        self.caption_in = below_in - (0.16 if has_titles else 0.02)
        self.height_in = below_in + 0.16 * (self.caption.count("\n") + 1) + 0.1

    def cell(self, image: int, panel: int) -> tuple[float, float]:
        """The upper left corner of an image's panel; 0 is the original, the last one the error."""
        band, column = divmod(image, self.columns)
        x = self.left_in + column * (self.cell_width_in + self.gap_in)
        return x, self.top_in + band * self.band_in + panel * (self.cell_height_in + self.gap_in)


def draw_sheet(look: Look, path: Path, titles: Sequence[str] | None) -> None:
    """Write the sheet as a PNG of at most `MAX_PICTURE_BYTES`, in as many dots per inch as that allows."""
    is_masked = look.config.mask_ratio is not None
    predicted = "prediction of\nmasked blocks" if is_masked else "next-block\nprediction"
    panels = {"original": look.originals, predicted: look.pictures}
    if look.zero is not None:
        panels["predicting\nzero"] = look.zero
    layout = _Layout(look, len(panels) + 1, has_titles=titles is not None)
    width, height = layout.cell_width_in, layout.cell_height_in
    figure = Figure(figsize=(layout.width_in, layout.height_in))
    # The absolute error of each grey panel, of RGB the mean over channels, in colours whose scale leaves out
    # the largest errors.
    error = (look.pictures - look.originals).abs()
    error = error.mean(1, keepdim=True) if error.shape[1] == 3 else error
    largest = float(np.quantile(error[..., look.predicted].numpy(), 0.995))
    largest = max(0.05, math.ceil(largest * 20) / 20)
    colours = torch.from_numpy(ERROR_COLOURS((error / largest).numpy())).float()
    colours = rearrange(colours[..., :3], "b e h w c -> (b c) e h w")
    colours = side_by_side(torch.where(look.predicted, colours, hatch(look.config)))
    colours = rearrange(colours, "(b c) 1 h w -> b c h w", c=3)
    cells = {**{name: side_by_side(pixels) for name, pixels in panels.items()}, "absolute\nerror": colours}
    for panel, pixels in enumerate(cells.values()):
        for image in range(len(pixels)):
            draw_cell(axes_at(figure, *layout.cell(image, panel), width, height), pixels[image], look.config)
    # The colour bar, at the right of the first band's errors.
    x, y = layout.cell(layout.columns - 1, len(panels))
    axes = axes_at(figure, x + width + 0.1, y, 0.09, height)
    scale = ScalarMappable(Normalize(0, largest), cmap=ERROR_COLOURS)
    bar = figure.colorbar(scale, cax=axes, ticks=[0, largest / 2, largest], format="%.3g")
    bar.outline.set_visible(False)  # type: ignore[operator]
    axes.tick_params(labelsize=7, length=2, width=0.5, color=MUTED, labelcolor=MUTED)
    # The rows' names at the left, the images' titles above them, their losses below.
    for band in range(layout.bands):
        for panel, words in enumerate(cells):
            x, y = layout.cell(band * layout.columns, panel)
            text_at(figure, x - 0.1, y + height / 2, words, size=8.5, ha="right", va="center")
    for image, loss in enumerate(look.losses.tolist()):
        x, y = layout.cell(image, len(panels))
        below = y + height + 0.06
        text_at(figure, x + width / 2, below, f"loss {loss:.3f}", size=8.5, ha="center", va="top")
        if titles is not None:
            name, above = (
                shortened(titles[image], int(width * 72 / (7.5 * 0.62))),
                layout.cell(image, 0)[1] - 0.05,
            )
            text_at(figure, x + width / 2, above, name, size=7.5, ha="center", va="bottom", color=MUTED)
    title = f"{'Masked' if is_masked else 'Next'}-block prediction"
    text_at(figure, 0.2, 0.22, title, size=13, weight="bold", va="top")
    text_at(figure, 0.2, 0.5, layout.subtitle, size=8.5, color=MUTED, va="top")
    text_at(figure, 0.2, layout.caption_in, layout.caption, size=8, color=MUTED, va="top")
    save_png(figure, path, dpis=(200, 170, 150, 130, 110, 90, 70), max_bytes=MAX_PICTURE_BYTES)


def draw_cell(axes: Axes, pixels: Shaped[Tensor, "shown h w"], config: ModelConfig) -> None:
    """Draw a picture of `side_by_side` with the lines between its blocks."""
    picture = rearrange(pixels.expand(3, -1, -1), "c h w -> h w c").numpy()
    enlarged = max(picture.shape[:2]) < 128
    axes.imshow(picture, interpolation="nearest" if enlarged else "antialiased", aspect="auto")
    axes.set(xticks=[], yticks=[], autoscale_on=False)
    axes.spines[:].set(linewidth=0.4, color=MUTED)
    rows, columns = config.block_grid
    line = {"color": "#8c959f", "linewidth": 0.5 if max(rows, columns) <= 8 else 0.25, "alpha": 0.7}
    # A cell holds the image, or a panel of its size for each channel that is shown.
    height, width = rows * config.block_px[0], columns * config.block_px[1]
    gap = panel_gap(width)
    panels = 1 if picture.shape[1] == width else drawn_channels(config.in_chans)
    for panel in range(panels):
        down, along = divmod(panel, (picture.shape[1] + gap) // (width + gap))
        top, left = down * (height + gap) - 0.5, along * (width + gap) - 0.5
        axes.hlines(top + np.arange(1, rows) * config.block_px[0], left, left + width, **line)
        axes.vlines(left + np.arange(1, columns) * config.block_px[1], top, top + height, **line)


def shortened(name: str, letters: int) -> str:
    """A name that fits: its middle left out, letters that the font lacks as a question mark."""
    font = get_font(findfont("DejaVu Sans"))
    drawable = "".join(letter if font.get_char_index(ord(letter)) else "?" for letter in name)
    if len(drawable) <= letters:
        return drawable
    head = (letters - 1) // 2
    return drawable[:head] + "…" + drawable[len(drawable) - (letters - 1 - head) :]


def _caption(look: Look) -> str:
    """What is seen, in a few sentences."""
    config = look.config
    size = f"block of {config.block_px[0]} x {config.block_px[1]} px"
    shown = "hatched" if look.is_hatched else "in mean colour"
    position = config.steps(config.distances[look.distance - 1]).position
    if config.mask_ratio is not None:
        first = f"Each masked {size} is predicted from the visible blocks, which are {shown}."
    else:
        order = "row by row" if look.is_raster else "in another order than row by row"
        if config.order == "per_image":
            order = "in one random order (training draws another for each image)"
        if position == 0:
            alone = "the first one is predicted from a class token alone"
        elif look.distance == 1:
            alone = f"the first one ({shown}) has none before it and is not predicted"
        else:
            alone = f"the first {counted(position, 'block')} ({shown}) cannot be predicted"
        ahead = "" if look.distance == 1 else f"{look.distance} blocks ahead, "
        first = f"Each {size} is predicted {ahead}from the true blocks before it, {order}; {alone}."
    sentences = [first, *make_targets(config).words]
    if look.zero is not None:
        colours = " and colours" if config.in_chans > 1 else ""
        what = (
            f"each true block's mean over pixels{colours}, which is given"
            if config.norm_pixels
            else "data.mean"
        )
        sentences.append(f"Predicting zero shows {what}; all else comes from the model.")
    return " ".join([*sentences, *channel_words(config.in_chans)])
