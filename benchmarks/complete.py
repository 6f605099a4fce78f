"""Completing images with kept keys and values, against the model's forward pass for every block.

A model 192 wide with 6 + 4 layers, 128 px in 64 blocks of 2x2 patches, the upper half given, fp32. Both
complete the same images in turn, in one process. If the images differ, no ratio is printed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from statistics import median

import torch

from common import Row, best_device, now_s, parse, report
from nextblock.config import ModelConfig, pair
from nextblock.models import NextBlockModel
from nextblock.models.completion import complete

MODEL = ModelConfig(
    image_size=128,
    patch_size=8,
    block_size=2,
    embed_dim=192,
    depth=6,
    num_heads=6,
    projection_dim=None,
    predictor_dim=192,
    predictor_depth=4,
    predictor_heads=6,
    block_mlp_dim=768,
)
MAX_DIFFERENCE = 1e-4
"""Of pixels, as a share of the largest."""


def main() -> None:
    """Measure both and print how they compare."""
    options = parse(__doc__, threads=1)
    tiny = {"image_size": 32, "embed_dim": 24, "depth": 1, "predictor_dim": 24, "predictor_depth": 1}
    config, device = replace(MODEL, **tiny) if options.quick else MODEL, best_device()
    torch.manual_seed(0)
    model = NextBlockModel(config).to(device).eval()
    given = torch.arange(config.num_blocks) < config.num_blocks // 2
    table, differences = [], []
    for count in (1, 8):
        images = torch.randn(count, config.in_chans, *pair(config.image_size), device=device)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        completed = {}
        for _ in range(options.rounds + 1):  # the first is not timed
            for cached, times in seconds.items():
                start = now_s()
                completed[cached] = complete(model, images, given, cached=cached).images
                times.append(now_s() - start)
        difference = float((completed[True] - completed[False]).abs().max() / completed[False].abs().max())
        if not difference <= MAX_DIFFERENCE:  # also if it is NaN
            sys.exit(f"no ratio: kept keys and recomputation differ by {difference:.2g} of the largest pixel")
        differences.append(difference)
        ours, plain = (median(times[1:]) for times in seconds.values())
        what = f"completing half of {count} image{'s' * (count > 1)}"
        table.append(Row(what, ours, plain, "s", plain / ours, "at least 4.0"))
    report("complete", options, table, largest_difference=max(differences))


if __name__ == "__main__":
    main()
