"""K-means tokens of patches: the tokenizer, which is saved with the model, and the fit of its centroids."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from nextblock.blocks import normalize_blocks, patchify
from nextblock.settings import require

MAX_DISTANCES = 2**24
"""Distances in memory at once when searching the nearest centroids: 64 MiB of fp32."""
MAX_LLOYD_PRODUCTS = 2 * 10**10
"""Patches x clusters x values up to which Lloyd's algorithm is used: about a minute on a core."""


class KMeansTokenizer(nn.Module):
    """Tokens are the nearest of `vocab_size` centroids to each patch's normalised pixels.

    The centroids are a buffer, so model files contain them; they are zero until a fit or a file fills them.
    """

    centroids: Float[Tensor, "v p"]

    def __init__(self, vocab_size: int, in_chans: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        values = in_chans * patch_size**2
        # A buffer: saved and moved with the model, and never changed by an optimizer.
        self.register_buffer("centroids", torch.zeros(vocab_size, values, dtype=torch.float32))
        self._seen_fitted = False

    @property
    def is_fitted(self) -> bool:
        """Whether centroids are set; waits for the device."""
        return bool(self.centroids.any())

    def patches(self, images: Float[Tensor, "b c h w"]) -> Float32[Tensor, "b n p"]:
        """Normalised patches in raster order, the points to cluster."""
        return normalize_blocks(patchify(images.float(), (self.patch_size, self.patch_size)))

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b c h w"]) -> Int64[Tensor, "b i j"]:
        """The tokens of images; raises `ValueError` if centroids are not set."""
        # Reading the buffer waits for a GPU and breaks a compiled graph, so check only once; a training run
        # fits before it compiles.
        if not torch.compiler.is_compiling() and not self._seen_fitted:
            self._seen_fitted = self.is_fitted
            require(
                self._seen_fitted,
                "the k-means tokenizer has no centroids yet; fit it on patches of the training images, "
                "or load a model that was trained with one",
            )
        with torch.autocast(images.device.type, enabled=False):
            patches = rearrange(self.patches(images), "b n p -> (b n) p")
            tokens = nearest_centroids(patches, self.centroids.float())
        rows, columns = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        return rearrange(tokens, "(b i j) -> b i j", i=rows, j=columns)


def nearest_centroids(
    points: Float[Tensor, "r p"], centroids: Float[Tensor, "v p"], max_distances: int = MAX_DISTANCES
) -> Int64[Tensor, " r"]:
    """The index of the centroid nearest to each point; the lowest in a tie."""
    # |x - c|² = |x|² - 2 x·c + |c|², whose first term is the same for all centroids. addmm makes one matrix
    # of distances instead of three, and splitting the points limits it to `max_distances`.
    offsets = centroids.square().sum(1)
    size = max(1, max_distances // len(centroids))
    nearest = [torch.addmm(offsets, part, centroids.T, alpha=-2).argmin(1) for part in points.split(size)]
    return torch.cat(nearest)


def fit_kmeans(patches: Float[Tensor, "r p"], vocab_size: int, seed: int) -> Float32[Tensor, "v p"]:
    """Cluster a sample of patches: Lloyd's algorithm if that is affordable, else mini-batches.

    The same patches and seed give the same centroids on the same machine. Raises `ValueError` if there are
    too few distinct patches.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans  # takes a second, needed only here
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    points = patches.detach().to("cpu", torch.float32).numpy()
    # Clusters start at distinct patches in random order: many patches are flat, hence equal, and clusters
    # that start at the same point stay empty.
    shuffled = points[np.random.default_rng(seed % 2**32).permutation(len(points))]
    _, distinct = np.unique(shuffled, axis=0, return_index=True)
    require(
        len(distinct) >= vocab_size,
        f"{len(points)} patches contain only {len(distinct)} distinct ones, too few for {vocab_size} tokens; "
        f"set model.vocab_size to at most {len(distinct)}, or use more images",
    )
    start = shuffled[np.sort(distinct)[:vocab_size]]
    common: dict[str, Any] = {"init": start, "n_init": 1, "random_state": seed % 2**32}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an unused token does no harm
        if points.size * vocab_size <= MAX_LLOYD_PRODUCTS:
            # One thread: several would add their sums in any order, and the last digits would vary.
            with threadpool_limits(1):
                centroids = KMeans(vocab_size, max_iter=25, **common).fit(points).cluster_centers_
        else:
            # A fixed number of passes, as early stopping would depend on such a sum. No reassignment: it
            # moves rare clusters to random, mostly flat patches, which leaves few tokens in use.
            common |= {"max_iter": 5, "max_no_improvement": None, "reassignment_ratio": 0.0}
            batches = MiniBatchKMeans(vocab_size, batch_size=max(1024, vocab_size), **common)
            centroids = batches.fit(points).cluster_centers_
    return torch.from_numpy(np.asarray(centroids)).float().to(patches.device)
