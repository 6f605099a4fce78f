"""`nextblock.complete`: images of which a part is given, continued by a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextblock.look.settings import CompleteSettings
from nextblock.settings import from_dict, require

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64
    from torch import Tensor

    from nextblock.config import ModelConfig
    from nextblock.visualize import PredictResult


def complete(**settings: Any) -> PredictResult:
    """Complete images as `nextblock complete` does; `settings` are the fields of `CompleteSettings`.

    Paths may stand for strings.
    """
    config = from_dict(CompleteSettings, settings)
    from nextblock.blocks import block_orders
    from nextblock.look.opened import open_look
    from nextblock.models.completion import check_completes
    from nextblock.visualize.completion import draw_completions

    model, source, data, device = open_look(config)
    check_completes(model.config)
    order = block_orders(
        config.order or model.config.order, model.config.block_grid, model.config.order_seed
    )[0]
    return draw_completions(
        model,
        source,
        data,
        Path(config.out),
        given_blocks(config, model.config, order),
        order if config.order else None,
        num_images=config.num_images,
        device=device,
    )


def given_blocks(
    settings: CompleteSettings, config: ModelConfig, order: Int64[Tensor, " k"]
) -> Bool[Tensor, " k"]:
    """Which blocks the settings give, in raster order."""
    import torch

    k, (rows, columns) = config.num_blocks, config.block_grid
    if settings.given_blocks is not None:
        wrong = [block for block in settings.given_blocks if block >= k]
        require(not wrong, f"given_blocks has {wrong[0] if wrong else 0}; an image's blocks are 0 to {k - 1}")
        chosen = torch.tensor(settings.given_blocks, dtype=torch.int64)
    elif settings.given is not None:
        require(settings.given < k, f"given is {settings.given} of {k} blocks; hide at least one")
        chosen = order[: settings.given]
    else:
        share = 0.5 if settings.given_rows is None else settings.given_rows
        above = int(share * rows + 1e-6)
        require(
            0 < above < rows,
            f"given_rows {share:g} gives {above} of {rows} rows of blocks; "
            + (f"use {1 / rows:.2g} to {1 - 1 / rows:.2g}" if rows > 1 else "use given or given_blocks"),
        )
        chosen = torch.arange(above * columns)
    given = torch.zeros(k, dtype=torch.bool)
    given[chosen] = True
    return given
