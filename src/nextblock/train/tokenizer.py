"""The patches that the k-means tokenizer of a fresh model is fitted on: some of what it will train on."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nextblock.config import RunConfig
from nextblock.data import Source, eval_batches, keyed_permutation, normalize, resolve_workers
from nextblock.targets import KMeansTokenizer

__all__ = ["sample_patches"]

MAX_IMAGES = 2_000
MAX_PATCHES = 200_000
BATCH_SIZE = 64


def sample_patches(
    tokenizer: KMeansTokenizer,
    source: Source,
    config: RunConfig,
    *,
    max_images: int = MAX_IMAGES,
    max_patches: int = MAX_PATCHES,
) -> Float[Tensor, "r p"]:
    """Patches, as the tokenizer sees them, of a sample of centre crops: f(seed, source).

    Those of unreadable images are missing. `ValueError` if no image can be read.
    """
    images = keyed_permutation(config.seed, len(source), "tokenizer-images")[:max_images]
    per_image = config.model.num_patches
    patches = keyed_permutation(config.seed, len(images) * per_image, "tokenizer-patches")[:max_patches]
    chosen = np.zeros(len(images) * per_image, dtype=bool)
    chosen[patches] = True
    of_image = dict(zip(images.tolist(), torch.from_numpy(chosen).view(-1, per_image), strict=True))

    workers = resolve_workers(config.data.workers, source)
    found = []
    for batch in eval_batches(source, config.data, config.model.image_size, BATCH_SIZE, images, workers):
        if len(batch.images):
            pixels = normalize(batch.images, config.data.mean, config.data.std)
            kept = torch.stack([of_image[sample] for sample in batch.samples.tolist()])
            found.append(tokenizer.patches(pixels)[kept])
    if not found:
        raise ValueError(
            f"none of {len(images)} images of {source.spec!r} can be read, so there is nothing to fit "
            "model.tokenizer kmeans on; give images that can be read"
        )
    return torch.cat(found)
