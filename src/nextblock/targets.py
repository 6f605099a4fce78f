"""What the model predicts for each block, and its losses: pixels, tokens, embeddings, features.

All kinds have the same methods, so the model, training and pictures need not know the kind. Everything is
computed in fp32, whatever the surrounding precision. Block losses and counts of kept blocks are separate,
because the loss over micro-batches and processes is a sum divided by the count in the whole batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float32, Int64, Shaped
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, embedding, interpolate, normalize

from nextblock.blocks import denormalize_blocks, normalize_blocks, patchify, take, unpatchify
from nextblock.config import ModelConfig, pair
from nextblock.data.random import keyed_permutation, keyed_seed
from nextblock.errors import UsageError
from nextblock.settings import require

MAX_DISTANCES = 2**24
"""Distances in memory at once when searching the nearest centroids: 64 MiB of fp32."""
MAX_LLOYD_PRODUCTS = 2 * 10**10
"""Patches x clusters x values up to which Lloyd's algorithm is used: about a minute on a core."""


class _BaseTargets:
    """What all kinds have. `*p` below are the axes of a prediction, `*t` those of a target."""

    needs_fit = False
    """Whether `fit` must be called before targets can be made."""
    may_collapse = False
    """Whether training could make all targets alike."""
    are_pixels = True
    """Whether a prediction can be turned into pixels, so that an image can be continued."""
    tokenizer: Any = None
    """The module that makes the targets; saved with the model."""
    flops = 0
    """Operations to make the targets of an image."""
    outputs: int
    """Numbers that the predictor outputs per block."""
    facts: dict[str, object]
    """Describes the loss, ready for JSON."""
    words: list[str]
    """Sentences for the caption of a picture: the loss, and what is drawn for a prediction."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def fit(self, patches: Float[Tensor, "r p"], seed: int) -> None:
        """Fit to normalised patches of training images, if `needs_fit`; the result is f(patches, seed)."""


class PixelTargets(_BaseTargets):
    """A block's pixels as (c h w), normalised or raw (`config.norm_pixels`), by MSE or L1 (`config.loss`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.outputs = config.block_values
        self.facts = {"loss_function": config.loss, "norm_pixels": config.norm_pixels}
        error, pixels = "squared" if config.loss == "mse" else "absolute", "block-normalised"
        self.words = [f"Loss: {error} error of {pixels if config.norm_pixels else 'raw'} pixels."]
        if config.norm_pixels:
            self.words += ["Predicted blocks are un-normalised with the mean and deviation of the true ones."]

    def shaped(self, outputs: Float[Tensor, "b steps o"]) -> Float[Tensor, "b steps *p"]:
        """Shape the predictor's outputs as predictions."""
        return outputs

    def of_blocks(
        self,
        images: Float[Tensor, "b c h w"],
        order: Int64[Tensor, "... k"],
        embedded: Float[Tensor, "b n d"] | None = None,  # noqa: ARG002 - for targets made from it
    ) -> Float[Tensor, "b k *t"]:
        """The targets of all blocks, along the order; `embedded` are the encoder's patch embeddings."""
        # A block is one large patch, so patchify cuts blocks as well; the order then sorts them by position.
        pixels = take(patchify(images.float(), self.config.block_px), order)
        return normalize_blocks(pixels) if self.config.norm_pixels else pixels

    def losses(
        self, predictions: Float[Tensor, "b steps *p"], targets: Float[Tensor, "b steps *t"]
    ) -> Float32[Tensor, "b steps"]:
        """Mean over a block's pixel values of the squared or absolute difference."""
        difference = predictions.float() - targets.float()
        return (difference.square() if self.config.loss == "mse" else difference.abs()).mean(-1)

    def reference_losses(self, targets: Float[Tensor, "b k *t"]) -> dict[str, Float[Tensor, " b"]]:
        """Each image's mean loss when predicting "zero" or the previous block ("copy_previous").

        `targets` are those of all blocks. With normalised pixels and MSE, zero costs about 1 (exactly (p-1)/p
        on a block that is not flat).
        """
        true = predicted(targets, self.config)
        zero = {"zero": self.losses(torch.zeros_like(true), true).mean(1)}
        return zero | copying(self, targets)

    def to_pixels(
        self,
        predictions: Float[Tensor, "b steps *p"],
        targets: Float[Tensor, "b steps *t"],  # noqa: ARG002
        true: Float[Tensor, "b steps values"],
    ) -> Float[Tensor, "b steps values"]:
        """Turn predictions into pixels to draw; `true` are the pixels of the predicted blocks.

        A normalised prediction has no brightness and contrast of its own: it gets those of the true pixels.
        """
        pixels = predictions.float()
        return denormalize_blocks(pixels, true) if self.config.norm_pixels else pixels


class TokenTargets(_BaseTargets):
    """The k-means token of each patch of a block, by cross-entropy (AIM, section 4.1)."""

    tokenizer: KMeansTokenizer

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.tokenizer = KMeansTokenizer(config.vocab_size, config.in_chans, config.patch_size)
        self.outputs = config.patches_per_block * config.vocab_size
        values = config.num_patches * config.in_chans * config.patch_size**2
        self.flops = 2 * values * config.vocab_size
        self.facts = {
            "loss_function": "cross_entropy",
            "tokenizer": "kmeans",
            "vocab_size": config.vocab_size,
        }
        self.words = [
            f"Loss: cross-entropy of {config.vocab_size} tokens, in nats.",
            "Shown: the likeliest tokens' centroids, with the mean and deviation of the true patches.",
        ]

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
        self,
        images: Float[Tensor, "b c h w"],
        order: Int64[Tensor, "... k"],
        embedded: Float[Tensor, "b n d"] | None = None,  # noqa: ARG002
    ) -> Int64[Tensor, "b k m"]:
        """Tokens, in raster order within a block."""
        # Tokens are an image of one channel with one pixel per patch, so patchify cuts blocks out of it.
        tokens = rearrange(self.tokenizer(images), "b i j -> b 1 i j")
        return take(patchify(tokens, pair(self.config.block_size)), order)

    def losses(
        self, predictions: Float[Tensor, "b steps m v"], targets: Int64[Tensor, "b steps m"]
    ) -> Float[Tensor, "b steps"]:
        """Mean over a block's tokens of the cross-entropy in nats."""
        logits = rearrange(predictions.float(), "b k m v -> (b k m) v")
        return cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape).mean(-1)

    def reference_losses(self, targets: Int64[Tensor, "b k m"]) -> dict[str, Float[Tensor, " b"]]:
        """Losses when predicting all tokens equally ("uniform") or by their "frequency" in these images."""
        # Predicting each token by its frequency costs the entropy of the frequencies.
        shares = targets.cpu().flatten().bincount().double() / targets.numel()
        costs = {"uniform": math.log(self.config.vocab_size), "frequency": -torch.xlogy(shares, shares).sum()}
        return {name: shares.new_full((len(targets),), float(cost)) for name, cost in costs.items()}

    def to_pixels(
        self,
        predictions: Float[Tensor, "b steps m v"],
        targets: Int64[Tensor, "b steps m"],  # noqa: ARG002
        true: Float[Tensor, "b steps p"],
    ) -> Float[Tensor, "b steps p"]:
        """Centroids of the likeliest tokens, each with the mean and deviation of the true patch."""
        # A centroid is a normalised patch: it gets the brightness and contrast of the true one.
        centroids = self.tokenizer.centroids.to(predictions.device)
        patches = embedding(predictions.argmax(-1), centroids)
        return join_patches(denormalize_blocks(patches, patches_in(true, self.config)), self.config)


class EmbeddingTargets(_BaseTargets):
    """The encoder's own input embeddings of a block's patches, by cosine (NEPA, arXiv 2512.16922).

    They are the output of the patch projection before positions are added: the position of a patch is known
    anyway. They are detached, so the projection learns only as the encoder's input; nothing else stops all
    embeddings from becoming one vector.
    """

    may_collapse, are_pixels = True, False
    scale, loss_name, name = 1, "1 - cosine", "patch embeddings"

    def __init__(self, config: ModelConfig, width: int | None = None) -> None:
        super().__init__(config)
        self.width = config.embed_dim if width is None else width
        self.outputs = config.patches_per_block * self.width
        self.facts = {"loss_function": "cosine", "target": config.target, "teacher": config.teacher}
        self.words = [
            f"Loss: {self.loss_name} of {self.name}.",
            "A predicted vector is shown as the patch of these images with the nearest vector.",
        ]

    def shaped(self, outputs: Float[Tensor, "b steps o"]) -> Float[Tensor, "b steps m e"]:
        """A vector for each patch of a block."""
        return rearrange(outputs, "b k (m e) -> b k m e", e=self.width)

    def of_blocks(
        self,
        images: Float[Tensor, "b c h w"],
        order: Int64[Tensor, "... k"],
        embedded: Float[Tensor, "b n d"] | None = None,
    ) -> Float[Tensor, "b k m e"]:
        """Vectors of all patches, in raster order within a block."""
        grid = (images.shape[2] // self.config.patch_size, images.shape[3] // self.config.patch_size)
        # Vectors are an image of e channels with one pixel per patch.
        blocks = patchify(self._vectors(images, embedded, grid).float(), pair(self.config.block_size))
        return take(rearrange(blocks, "b k (e m) -> b k m e", e=self.width), order)

    def _vectors(self, images: Tensor, embedded: Tensor | None, grid: tuple[int, int]) -> Tensor:  # noqa: ARG002
        assert embedded is not None, "the model passes its patch embeddings"
        return rearrange(embedded.detach(), "b (i j) e -> b e i j", i=grid[0])

    def losses(
        self, predictions: Float[Tensor, "b steps m e"], targets: Float[Tensor, "b steps m e"]
    ) -> Float32[Tensor, "b steps"]:
        """Mean over a block's patches of 1 - cosine; NEPA's loss is this minus 1."""
        return self.scale * (1 - cosine_similarity(predictions.float(), targets.float(), dim=-1)).mean(-1)

    def reference_losses(self, targets: Float[Tensor, "b k m e"]) -> dict[str, Float[Tensor, " b"]]:
        """Losses when predicting the targets' "mean" direction or the previous block ("copy_previous")."""
        true = predicted(targets, self.config)
        mean = normalize(targets, dim=-1).mean((0, 1, 2)).expand_as(true)
        return {"mean": self.losses(mean, true).mean(1)} | copying(self, targets)

    def to_pixels(
        self,
        predictions: Float[Tensor, "b steps m e"],
        targets: Float[Tensor, "b steps m e"],
        true: Float[Tensor, "b steps p"],
    ) -> Float[Tensor, "b steps p"]:
        """For each predicted vector, the patch of these images with the nearest vector."""
        wanted, own = (normalize(x.float(), dim=-1).flatten(0, 2) for x in (predictions, targets))
        patches = patches_in(true, self.config)
        parts = wanted.split(max(1, MAX_DISTANCES // len(own)))
        nearest = torch.cat([(part @ own.T).argmax(1) for part in parts])
        return join_patches(patches.flatten(0, 2)[nearest.cpu()].view_as(patches), self.config)


class FeatureTargets(EmbeddingTargets):
    """Features of a frozen teacher on the patches of a block, by cosine (D-iGPT, arXiv 2312.02147)."""

    may_collapse = False
    scale, loss_name, name = 2, "2 - 2 x cosine", "the teacher's features"
    teacher: Callable[[Tensor], Tensor] | None = None
    """Maps normalised images to features (b e i j) on the teacher's own grid. Not a part of the model: it is
    neither trained nor saved."""

    def __init__(self, config: ModelConfig) -> None:
        if config.teacher_dim is None:
            raise UsageError(
                "model.teacher_dim, the width of the teacher's features, is not known; give it, e.g. "
                "--model.teacher_dim 768 (nextblock pretrain reads it from the teacher)"
            )
        super().__init__(config, config.teacher_dim)

    def _vectors(self, images: Tensor, embedded: Tensor | None, grid: tuple[int, int]) -> Tensor:  # noqa: ARG002
        if self.teacher is None:
            raise UsageError(
                f"this model predicts features of {self.config.teacher}, which is not loaded; it can "
                "encode, and predicts after nextblock.interop.attach_teacher(model, mean, std)"
            )
        # Vectors on another grid are resampled like pixels, then normalised to length 1.
        features = interpolate(self.teacher(images).float(), size=grid, mode="bilinear")
        return normalize(features, dim=1)


Targets = PixelTargets | TokenTargets | EmbeddingTargets

KINDS: dict[str, type[Targets]] = {
    "pixels": PixelTargets, "tokens": TokenTargets, "embedding": EmbeddingTargets, "features": FeatureTargets,
}  # fmt: skip


def make_targets(config: ModelConfig) -> Targets:
    """Build the targets of a model with these settings."""
    return KINDS[config.target](config)


def predicted(targets: Shaped[Tensor, "b k *t"], config: ModelConfig) -> Shaped[Tensor, "b steps *t"]:
    """Select the targets, in order, that the first output map predicts."""
    _, first, number = config.steps(config.distances[0])
    return targets[:, first : first + number]


def copying(kind: Targets, targets: Float[Tensor, "b k *t"]) -> dict[str, Float[Tensor, " b"]]:
    """The loss of copying the previous block; empty for masked blocks, which may have no visible one."""
    if kind.config.mask_ratio is not None:
        return {}
    return {"copy_previous": kind.losses(targets[:, :-1], targets[:, 1:]).mean(1)}


def spread(vectors: Float[Tensor, "*r e"]) -> float:
    """Variance of directions up to their sign: the mean of 1 - cosine² over all pairs; 0: all on one line."""
    # The squared entries of the second-moment matrix add up to the mean of cosine² over all pairs.
    units = normalize(vectors.float(), dim=-1).flatten(0, -2)
    return 1 - float((units.T @ units / len(units)).square().sum())


# ------------------------------------------------------------------------------------------- k-means tokens


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


# ------------------------------------------------------------------------------------- patches within a block


def patches_in(blocks: Float[Tensor, "b k p"], config: ModelConfig) -> Float[Tensor, "b k m q"]:
    """The patches of blocks, each as (c h w)."""
    side = config.patch_size
    of_block = rearrange(blocks, "b k (c h w) -> (b k) c h w", h=config.block_px[0], w=config.block_px[1])
    return rearrange(patchify(of_block, (side, side)), "(b k) m q -> b k m q", b=len(blocks))


def join_patches(patches: Float[Tensor, "b k m q"], config: ModelConfig) -> Float[Tensor, "b k p"]:
    """Undo `patches_in`."""
    side = config.patch_size
    of_block = unpatchify(rearrange(patches, "b k m q -> (b k) m q"), pair(config.block_size), (side, side))
    return rearrange(of_block, "(b k) c h w -> b k (c h w)", b=len(patches))


# ----------------------------------------------------------------------- prefixes, kept rows and their sum


def draw_prefix_lengths(
    seed: int, visits: Iterable[int], samples: Iterable[int], num_blocks: int
) -> Int64[Tensor, " b"]:
    """Draw the length of each image's prefix in blocks (AIM, section 4.2): 1 to num_blocks - 1.

    Each is f(seed, visit, sample), so it is known before the image is read.
    """
    # Keyed by visit and sample, not drawn in sequence: there is no generator state to save, and a length does
    # not depend on worker, rank or micro-batch. 63 random bits modulo k-1: the bias is below k / 2**63.
    keys = zip(visits, samples, strict=True)
    lengths = [1 + keyed_seed(seed, "prefix", visit, sample) % (num_blocks - 1) for visit, sample in keys]
    return torch.tensor(lengths, dtype=torch.int64)


def draw_orders(
    seed: int, visits: Iterable[int], samples: Iterable[int], num_blocks: int
) -> Int64[Tensor, "b k"]:
    """Draw an order of the blocks for each image, f(seed, visit, sample)."""
    keys = zip(visits, samples, strict=True)
    orders = [keyed_permutation(seed, num_blocks, "order", visit, sample) for visit, sample in keys]
    return torch.from_numpy(np.stack(orders)) if orders else torch.empty(0, num_blocks, dtype=torch.int64)


def kept_rows(steps: int, distance: int, prefix_lengths: Int64[Tensor, " b"]) -> Bool[Tensor, "b steps"]:
    """Which rows count: row i predicts position i + distance, which must not lie in the prefix."""
    positions = torch.arange(distance, steps + distance, device=prefix_lengths.device)
    return positions[None] >= prefix_lengths[:, None]


def count_kept_rows(prefix_lengths: Int64[Tensor, " b"], num_blocks: int, distance: int) -> int:
    """Count the rows that `kept_rows` keeps for these prefixes."""
    # Row i, of 0 .. k-1-distance, is kept if i + distance >= S: k - S rows, at most k - distance.
    return int((num_blocks - prefix_lengths).clamp(max=num_blocks - distance).sum())


def combine(
    losses: Sequence[Float[Tensor, "b _"]], divisors: Sequence[int | Float[Tensor, ""]]
) -> Float[Tensor, ""]:
    """Compute the loss of a part of a batch: sum block losses, divide, average over predicted distances.

    Rows that are not kept are zero. `divisors` holds a count of kept rows per distance: this part's for its
    own mean, or the global batch's for its share of the batch's loss.
    """
    # Distances have equal weight, however many rows each has. Sums are divided by the global count, not
    # averaged by part, so micro-batches and processes add up to exactly the batch's loss.
    means = [part.sum() / divisor for part, divisor in zip(losses, divisors, strict=True)]
    return torch.stack(means).mean()
