"""A source and a model small enough for tests of evaluation: pictures whose colour tells their class."""

from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from nextblock.config import DataConfig, ModelConfig
from nextblock.data import BadImageError, Batch, Source, keyed_rng
from nextblock.evaluate.features import seeded
from nextblock.models.next_block import NextBlockModel

DATA = DataConfig(val_resize_px=16, workers=0, max_bad_fraction=0.5)
COLOURS = np.array([[180, 60, 60], [60, 180, 60], [60, 60, 180], [150, 150, 40]])
CONFIG = ModelConfig(
    image_size=16, patch_size=4, block_size=2, embed_dim=32, depth=2, num_heads=2, predictor=None
)


class ToySource(Source):
    """Noisy pictures of four colours; `bad` ones cannot be read, `shuffled` labels tell nothing."""

    in_memory = True

    def __init__(self, count=96, *, seed=0, bad=(), shuffled=False, class_names=("a", "b", "c", "d")):
        self.spec = f"toy-{seed}"
        rng = keyed_rng(seed, "toy")
        colours = np.arange(count) % len(COLOURS)
        noise = rng.normal(0, 25, (count, 3, 16, 16))
        self.images = torch.from_numpy((COLOURS[colours][:, :, None, None] + noise).clip(0, 255)).byte()
        self.toy_labels = rng.permutation(colours) if shuffled else colours
        self.names = class_names
        self.bad = set(bad)
        self.reads = 0

    def __len__(self):
        return len(self.images)

    def _read(self, index):
        self.reads += 1
        if index in self.bad:
            raise BadImageError("truncated")
        return self.images[index]

    def _name(self, index):
        return f"{self.spec}[{index}]"

    def _find_labels(self):
        return self.toy_labels, self.names

    def _make_fingerprint(self):
        return f"{self.spec}-{len(self)}"


def take(loader, number):
    """The next steps of a loader, with their micro-batches in lists."""
    return [step._replace(micro_batches=list(step.micro_batches)) for step in islice(loader, number)]


def joined(*steps):
    """The micro-batches of a step, or of the same step of several ranks, as one batch."""
    batches = [batch for step in steps for batch in step.micro_batches]
    bad = tuple(one for batch in batches for one in batch.bad)
    columns = {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in Batch._fields
        if name != "bad"
    }
    return Batch(bad=bad, **columns)


def toy_model(seed=0):
    """An untrained model of 16-px pictures, in evaluation mode."""
    with seeded(seed):
        return NextBlockModel(CONFIG).eval()


def tiny_config(**changes):
    """A model that predicts: 2x3 blocks of 2x2 patches, oblong, lest rows and columns are mixed up."""
    tiny = ModelConfig(
        image_size=(16, 24),
        patch_size=4,
        block_size=2,
        embed_dim=24,
        depth=2,
        num_heads=3,
        projection_dim=40,
        predictor_dim=16,
        predictor_depth=2,
        predictor_heads=2,
        block_mlp_dim=32,
    )
    return replace(tiny, **changes)


def tiny_model(seed=0, **changes):
    """Such a model with weights of a seed, large enough to tell tokens apart; in evaluation mode."""
    with seeded(seed):
        model = NextBlockModel(tiny_config(**changes)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and parameter.ndim > 1 and "patch_embed" not in name:
                    parameter.mul_(8)
    return model


def tiny_images(count=2, size=(16, 24), seed=0):
    """Noise, as the model takes it."""
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))
