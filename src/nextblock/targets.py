"""What the model predicts of each block, and how far off it is: pixels, or k-means tokens.

Both kinds have the same methods, so that the model, training and pictures need not know which one it is.
Everything is computed in fp32, whatever the precision around it. The loss of several micro-batches or
processes is a sum over kept blocks divided by their number in the whole batch; so block losses and counts
come apart here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding

from nextblock.blocks import patchify, unpatchify
from nextblock.config import ModelConfig
from nextblock.data.random import keyed_seed
from nextblock.settings import require

NORMALIZE_EPS = 1e-6
MAX_DISTANCES = 2**24
"""Distances held at a time when the nearest centroids are sought: 64 MiB of fp32."""
MAX_LLOYD_PRODUCTS = 2 * 10**10
"""Patches x clusters x values up to which every step of a fit sees all patches: about a minute on a core."""


class PixelTargets:
    """A block's pixels as (c h w), normalised or raw (`config.norm_pixels`), by MSE or L1 (`config.loss`).

    Another kind of target needs the same attributes and methods. `*p` below are the axes of a prediction,
    `*t` those of a target; here both are p pixel values.
    """

    needs_fit = False
    """Whether `fit` must be called before targets can be made."""
    tokenizer = None
    """The module behind the targets, which is saved with the model."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.outputs = config.block_values
        """Numbers that the predictor puts out for a block."""

    def fit(self, patches: Float[Tensor, "r p"], seed: int) -> None:
        """Fit to normalised patches of training images; the result is f(patches, seed). Pixels need none."""

    def shaped(self, outputs: Float[Tensor, "b steps o"]) -> Float[Tensor, "b steps *p"]:
        """The predictor's outputs as predictions."""
        return outputs

    def of_blocks(
        self, images: Float[Tensor, "b c h w"], order: Int64[Tensor, " k"]
    ) -> Float[Tensor, "b k *t"]:
        """The targets of all blocks, along the order."""
        # A block is one large patch, so patchify cuts blocks as well; the order then sorts them by position.
        pixels = patchify(images.float(), self.config.block_px).index_select(1, order)
        return normalize_blocks(pixels) if self.config.norm_pixels else pixels

    def losses(
        self, predictions: Float[Tensor, "b steps *p"], targets: Float[Tensor, "b steps *t"]
    ) -> Float32[Tensor, "b steps"]:
        """Mean over a block's pixel values of the squared or absolute difference."""
        difference = predictions.float() - targets.float()
        return (difference.square() if self.config.loss == "mse" else difference.abs()).mean(-1)

    def reference_losses(self, targets: Float[Tensor, "b k *t"]) -> dict[str, Float[Tensor, " b"]]:
        """The mean loss of each image without a model, from the targets of all its blocks.

        Predicting "zero", and "copy_previous", the previous block. With normalised pixels and MSE, zero costs
        about 1 (exactly (p-1)/p on a block that is not flat).
        """
        # Position 0 is never predicted.
        true = targets[:, 1:]
        return {
            "zero": self.losses(torch.zeros_like(true), true).mean(1),
            "copy_previous": self.losses(targets[:, :-1], true).mean(1),
        }

    def to_pixels(
        self,
        predictions: Float[Tensor, "b steps *p"],
        images: Float[Tensor, "b c h w"],
        order: Int64[Tensor, " k"],
    ) -> Float[Tensor, "b steps values"]:
        """Pixels that predictions of positions 1, 2, ... stand for, to be drawn.

        A normalised prediction says nothing of brightness and contrast: it gets those of the true pixels.
        """
        if not self.config.norm_pixels:
            return predictions.float()
        true = patchify(images.float(), self.config.block_px).index_select(1, order[1:])
        return denormalize_blocks(predictions.float(), true)


class TokenTargets:
    """The k-means token of each patch of a block, by cross-entropy (AIM, section 4.1)."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.tokenizer = KMeansTokenizer(config.vocab_size, config.in_chans, config.patch_size)
        self.outputs = config.patches_per_block * config.vocab_size
        # Of a block: patches along (height, width), and the (height, width) of one.
        self._per_block = (config.block_px[0] // config.patch_size, config.block_px[1] // config.patch_size)
        self._patch_px = (config.patch_size, config.patch_size)

    @property
    def needs_fit(self) -> bool:
        """True until `fit`, or a model file, fills the centroids."""
        return not self.tokenizer.is_fitted

    def fit(self, patches: Float[Tensor, "r p"], seed: int) -> None:
        """Cluster a sample of patches; `ValueError` if they are too few."""
        self.tokenizer.centroids.copy_(fit_kmeans(patches, self.config.vocab_size, seed))

    def shaped(self, outputs: Float[Tensor, "b steps o"]) -> Float[Tensor, "b steps m v"]:
        """Logits of every token."""
        return rearrange(outputs, "b k (m v) -> b k m v", v=self.config.vocab_size)

    def of_blocks(
        self, images: Float[Tensor, "b c h w"], order: Int64[Tensor, " k"]
    ) -> Int64[Tensor, "b k m"]:
        """Tokens, in raster order within a block."""
        # Tokens are an image of one channel, a pixel a patch, so blocks are cut out of it like pixels.
        tokens = rearrange(self.tokenizer(images), "b i j -> b 1 i j")
        return patchify(tokens, self._per_block).index_select(1, order)

    def losses(
        self, predictions: Float[Tensor, "b steps m v"], targets: Int64[Tensor, "b steps m"]
    ) -> Float[Tensor, "b steps"]:
        """Mean over a block's tokens of the cross-entropy in nats."""
        logits = rearrange(predictions.float(), "b k m v -> (b k m) v")
        return cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape).mean(-1)

    def reference_losses(self, targets: Int64[Tensor, "b k m"]) -> dict[str, Float[Tensor, " b"]]:
        """Predicting all tokens alike, "uniform", and by their "frequency" in these images."""
        # Who knows only how frequent each token is pays the entropy of these frequencies.
        shares = targets.cpu().flatten().bincount().double() / targets.numel()
        costs = {"uniform": math.log(self.config.vocab_size), "frequency": -torch.xlogy(shares, shares).sum()}
        return {
            name: torch.full((len(targets),), float(cost), dtype=torch.float64)
            for name, cost in costs.items()
        }

    def to_pixels(
        self,
        predictions: Float[Tensor, "b steps m v"],
        images: Float[Tensor, "b c h w"],
        order: Int64[Tensor, " k"],
    ) -> Float[Tensor, "b steps p"]:
        """The likeliest tokens' centroids, each with the mean and deviation of the true patch."""
        # A centroid is a normalised patch: it gets the brightness and contrast of the true one.
        centroids = self.tokenizer.centroids.to(predictions.device)
        patches = rearrange(embedding(predictions.argmax(-1), centroids), "b k m p -> (b k) m p")
        # A true block is an image of its own, cut into the same patches; then the patches go back together.
        true = patchify(images.float(), self.config.block_px).index_select(1, order[1:])
        blocks = rearrange(true, "b k p -> (b k) p").view(-1, images.shape[1], *self.config.block_px)
        patches = denormalize_blocks(patches, patchify(blocks, self._patch_px))
        blocks = unpatchify(patches, self._per_block, self._patch_px)
        return rearrange(blocks, "(b k) c h w -> b k (c h w)", b=len(images))


Targets = PixelTargets | TokenTargets


def make_targets(config: ModelConfig) -> Targets:
    """What a model of these settings predicts."""
    return PixelTargets(config) if config.tokenizer is None else TokenTargets(config)


# -------------------------------------------------------------------------------------- normalised pixels


def normalize_blocks(pixels: Float[Tensor, "*b p"]) -> Float[Tensor, "*b p"]:
    """Subtract each row's mean, divide by its deviation (unbiased variance, eps 1e-6 inside the root)."""
    # Each block by itself, so the target is the structure of a block and not how bright it is. Official XTRA
    # and MAE use the unbiased variance, with eps inside the root.
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True, correction=1)
    return (pixels - mean) * torch.rsqrt(variance + NORMALIZE_EPS)


def denormalize_blocks(pixels: Float[Tensor, "*b p"], true: Float[Tensor, "*b p"]) -> Float[Tensor, "*b p"]:
    """Give normalised rows the mean and deviation of the true ones."""
    variance, mean = torch.var_mean(true, dim=-1, keepdim=True, correction=1)
    return pixels * torch.sqrt(variance + NORMALIZE_EPS) + mean


# ----------------------------------------------------------------------- prefixes, kept rows and their sum


def draw_prefix_lengths(
    seed: int, visits: Iterable[int], samples: Iterable[int], num_blocks: int
) -> Int64[Tensor, " b"]:
    """How many blocks of each image all its tokens may attend to (AIM, section 4.2): 1 to num_blocks - 1.

    Each is f(seed, visit, sample), so it is known before the image is.
    """
    # Keyed by visit and sample, not drawn one after the other: no generator has a state to save, and a length
    # depends on no worker, rank or micro-batch. 63 random bits modulo k-1: the bias is below k / 2**63.
    keys = zip(visits, samples, strict=True)
    lengths = [1 + keyed_seed(seed, "prefix", visit, sample) % (num_blocks - 1) for visit, sample in keys]
    return torch.tensor(lengths, dtype=torch.int64)


def kept_rows(steps: int, distance: int, prefix_lengths: Int64[Tensor, " b"]) -> Bool[Tensor, "b steps"]:
    """Which rows count: row i predicts position i + distance, which must not lie in the prefix."""
    positions = torch.arange(distance, steps + distance, device=prefix_lengths.device)
    return positions[None] >= prefix_lengths[:, None]


def count_kept_rows(prefix_lengths: Int64[Tensor, " b"], num_blocks: int, distance: int) -> int:
    """How many rows `kept_rows` keeps of images with these prefixes."""
    # Row i, of 0 .. k-1-distance, is kept if i + distance >= S: k - S rows, but never more than there are.
    return int((num_blocks - prefix_lengths).clamp(max=num_blocks - distance).sum())


def combine(
    losses: Sequence[Float[Tensor, "b _"]], divisors: Sequence[int | Float[Tensor, ""]]
) -> Float[Tensor, ""]:
    """Sum block losses, divide them, and average over the predicted distances: the loss of a part of a batch.

    Rows that are not kept hold zero. `divisors` are numbers of kept rows, one for each distance: those of
    this part for its own mean, those of the global batch for its share of the batch's loss.
    """
    # Distances weigh alike, however many rows each has. A sum over the whole batch's count, and not a mean of
    # means: micro-batches and processes then add up to exactly the batch's loss.
    means = [part.sum() / divisor for part, divisor in zip(losses, divisors, strict=True)]
    return torch.stack(means).mean()


# ------------------------------------------------------------------------------------------------ k-means


class KMeansTokenizer(nn.Module):
    """Tokens are the nearest of `vocab_size` centroids to each patch's normalised pixels.

    The centroids are a buffer, so a model's file holds them; they are zero until a fit or a file fills them.
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
        """Whether there are centroids; waits for the device."""
        return bool(self.centroids.any())

    def patches(self, images: Float[Tensor, "b c h w"]) -> Float32[Tensor, "b n p"]:
        """Normalised patches in raster order: what is clustered."""
        return normalize_blocks(patchify(images.float(), (self.patch_size, self.patch_size)))

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b c h w"]) -> Int64[Tensor, "b i j"]:
        """The tokens of images; `ValueError` before there are centroids."""
        # Looking at the buffer waits for a GPU and breaks a compiled graph: once is enough, and a training
        # run fits before it compiles.
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
    """The index of the centroid nearest to each point, the lowest of those equally near."""
    # |x - c|² = |x|² - 2 x·c + |c|², whose first term is the same for all centroids. addmm makes one matrix
    # of distances, not three, and points are split so that it holds at most `max_distances`.
    offsets = centroids.square().sum(1)
    size = max(1, max_distances // len(centroids))
    nearest = [torch.addmm(offsets, part, centroids.T, alpha=-2).argmin(1) for part in points.split(size)]
    return torch.cat(nearest)


def fit_kmeans(patches: Float[Tensor, "r p"], vocab_size: int, seed: int) -> Float32[Tensor, "v p"]:
    """Cluster a sample of patches: Lloyd's algorithm if that is affordable, else mini-batches.

    The same patches and seed give the same centroids on the same machine. `ValueError` if the patches are too
    few.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans  # a second, and needed only here
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    points = patches.detach().to("cpu", torch.float32).numpy()
    # Clusters start at distinct patches in random order: many patches are flat, hence equal, and clusters
    # that start at the same point stay empty.
    shuffled = points[np.random.default_rng(seed % 2**32).permutation(len(points))]
    _, distinct = np.unique(shuffled, axis=0, return_index=True)
    require(
        len(distinct) >= vocab_size,
        f"{len(points)} patches hold only {len(distinct)} distinct ones, too few for {vocab_size} tokens; "
        f"set model.vocab_size to at most {len(distinct)}, or use more images",
    )
    start = shuffled[np.sort(distinct)[:vocab_size]]
    common: dict[str, Any] = {"init": start, "n_init": 1, "random_state": seed % 2**32}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a token that no patch has does no harm
        if points.size * vocab_size <= MAX_LLOYD_PRODUCTS:
            # One thread: several add their sums in any order, and the last digits would differ by run.
            with threadpool_limits(1):
                centroids = KMeans(vocab_size, max_iter=25, **common).fit(points).cluster_centers_
        else:
            # A fixed number of passes, as stopping early would depend on such a sum. No reassignment: it
            # moves rare clusters onto random patches, mostly flat ones, and few tokens would be left.
            common |= {"max_iter": 5, "max_no_improvement": None, "reassignment_ratio": 0.0}
            batches = MiniBatchKMeans(vocab_size, batch_size=max(1024, vocab_size), **common)
            centroids = batches.fit(points).cluster_centers_
    return torch.from_numpy(np.asarray(centroids)).float().to(patches.device)
