"""The drawn order and mask are those of the slow definitions, and of the model that is trained."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import nextblock
from nextblock.blocks import block_orders
from nextblock.config import pair
from nextblock.visualize.orders import EARLIER, OWN, PREFIX, geometry
from tiny_runs import call_cli, refused
from toy import tiny_config

CONFIGS = {
    "raster": (tiny_config(), None),
    "oblong blocks": (tiny_config(block_size=(2, 3), order="spiral"), None),
    "single patches": (tiny_config(block_size=1, order="column"), None),
    "random, prefix": (tiny_config(order="random", order_seed=1), 3),
    "class token": (tiny_config(class_token=True, order="per_image"), None),
    "prefix of its own": (tiny_config(prefix=True, order="checkerboard"), None),
}


DRAW = ["xtra-tiny", "--draw", "x.png"]


@pytest.mark.parametrize("name", CONFIGS)
def test_order_and_mask_are_those_of_the_slow_definition(name):
    config, prefix = CONFIGS[name]
    shown = geometry(config, prefix)
    order = block_orders(config.order, config.block_grid, config.order_seed)[0].tolist()
    rows, columns = pair(config.block_size)
    for row, column in np.ndindex(config.grid):
        block = row // rows * config.block_grid[1] + column // columns
        assert shown.positions[row, column] == order.index(block)

    length = prefix or (config.num_blocks // 2 if config.prefix else 0)
    assert (shown.prefix, shown.masked) == (length, 0)
    sequence = [-1] * config.class_token
    sequence += [place for place in range(config.num_blocks) for _ in range(config.patches_per_block)]

    def kind(asks, seen):
        return OWN if seen == asks else PREFIX if 0 <= seen < length else EARLIER if seen < asks else 0

    assert shown.attends.tolist() == [[kind(asks, seen) for seen in sequence] for asks in sequence]


def test_masked_blocks_are_the_last_of_the_order_and_all_attend_to_all():
    shown = geometry(tiny_config(mask_ratio=0.5, order="per_image", feature_attention="full"))
    assert (shown.masked, shown.prefix) == (3, 0)
    assert (shown.attends > 0).all()


def test_the_command_draws_a_preset_with_settings_changed(tmp_path, capsys):
    path = tmp_path / "order.png"
    words = ("presets", "xtra-tiny", "--draw", path, "--model.image_size", "16x24", "--prefix", "2")
    assert call_cli(capsys, *words)[:2] == (0, f"picture: {path}\n")
    with Image.open(path) as picture:
        assert picture.width > picture.height
    assert path.stat().st_size < 60_000
    assert nextblock.draw_order(tiny_config(block_size=(4, 6)), tmp_path / "one.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["xtra-tiny", "--draw", "."], "--draw . must be a name that ends in .png"),
        (["xtra-tiny", "--prefix", "1"], "give --draw FILE.png with --prefix"),
        (["xtra-tiny", "--model.block_size", "1"], "give --draw FILE.png with --model.block_size"),
        (["--draw", "x.png"], "--draw needs a preset"),
        (["xtra-tiny", "--draw", "x.png", "--model.block_size", "3"], "cannot be cut into blocks"),
        ([*DRAW, "--prefix", "16"], "prefix is 16; it must be from 0 to 15, of 16 blocks"),
        ([*DRAW, "--prefix", "2", "--model.class_token", "true"], "have no prefix; leave --prefix out"),
    ],
)
def test_what_cannot_be_drawn_is_refused(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(call_cli(capsys, "presets", *words))
