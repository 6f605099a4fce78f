"""Pre-training: the next-block loss of a micro-batch and its divisors, validation, and fitted targets."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from nextblock.checkpoint import MODEL_FILE, CheckpointError, read_model
from nextblock.config import RunConfig, pair
from nextblock.data import (
    BadSample,
    Batch,
    Source,
    Step,
    eval_batches,
    keyed_permutation,
    keyed_rng,
    keyed_seed,
    normalize,
    resolve_workers,
)
from nextblock.errors import UsageError
from nextblock.interop import attach_teacher, initialize
from nextblock.models import NextBlockModel
from nextblock.models.next_block import check_predicts, masks_leak
from nextblock.optim import build_optimizer
from nextblock.targets import (
    KMeansTokenizer,
    combine,
    count_kept_rows,
    draw_orders,
    draw_prefix_lengths,
    spread,
)
from nextblock.train.distributed import ALONE, Group
from nextblock.train.learner import Learner
from nextblock.train.monitors import rankme
from nextblock.train.parallel import choose_strategy, shard

log = logging.getLogger(__name__)

HEALTH_VECTORS = 1024
"""Number of random target vectors per micro-batch that are checked for collapse."""


class Trainer(Learner):
    """Trains a model to predict next blocks: a fresh one (or from `model.init`), or one from a checkpoint."""

    model: NextBlockModel

    def __init__(
        self, config: RunConfig, device: torch.device, checkpoint: Path | None, group: Group = ALONE
    ) -> None:
        check_predicts(config.model, leaks=masks_leak(config.model))
        strategy = choose_strategy(config, group, device)

        def make() -> NextBlockModel:
            """A model on the CPU: that of the checkpoint, or weights f(seed), or those of `model.init`."""
            if checkpoint is not None:
                model = read_model(checkpoint / MODEL_FILE)
                if isinstance(model, NextBlockModel):
                    return model
                raise CheckpointError(f"{checkpoint} contains a classifier, not a pre-training run's model")
            # Not `torch.manual_seed`, as that would reseed the caller's GPUs as well.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(keyed_seed(config.seed, "weights"))
                model = NextBlockModel(config.model)
            if config.model.init is not None:
                initialize(model, config.model.init)
            return model

        if strategy == "fsdp":
            model = shard(make, config, device, group)
        else:
            with group.together():
                model = make().to(device)
        model.train()
        model.set_grad_checkpointing(config.train.activation_checkpointing)
        model.predictor_fp32 = config.train.predictor_fp32
        attach_teacher(model, config.data.mean, config.data.std, device, config.model.teacher)
        super().__init__(config, device, group, model, build_optimizer(model, config.optim), strategy)
        if config.train.compile and strategy != "fsdp":
            self._forward = torch.compile(model)
        self._orders = model.orders.cpu()  # on the CPU, so drawing one never waits for a GPU
        # A missing image scales the count of each distance by another ratio.
        self.holes_differ = config.model.prefix and config.model.num_predicted_blocks > 1
        # Two per layer: attention and MLP.
        self.loader_options = {"drop_path_draws": 2 * config.model.depth if config.model.drop_path else 0}
        self.counted = config.model
        self._may_collapse = model.targets is not None and model.targets.may_collapse
        self._last: list[tuple[Tensor, Tensor]] | None = None
        """Targets of the last micro-batch, then the losses of each distance, each with its `kept` mask."""
        self.resume(checkpoint)

    # ------------------------------------------------------------------------------------------- the loss

    def _draw(self, step: Step) -> tuple[Int64[Tensor, " k"], Float[Tensor, ""] | None]:
        """Draw a block order from the model's set, and the scale of rotary coordinates."""
        seed, limit = self.config.seed, self.config.model.rope_rescale
        order_index = keyed_rng(seed, "block-order", step.index).integers(len(self._orders))
        scale = None
        if limit != 1:  # between 1 / limit and limit, uniform in its logarithm
            scale = torch.tensor(limit ** (2 * keyed_rng(seed, "rope", step.index).random() - 1))
        return self._orders[int(order_index)], scale

    def _loss(self, batch: Batch, drawn: tuple[Any, Any], divisors: list[int]) -> Float[Tensor, ""]:
        order, rope_scale = drawn
        with self.autocast:
            draws = batch.drop_path if self.config.model.drop_path else None
            own, prefix = self._drawn_per_image(batch)
            order = order if own is None else own
            out = self._forward(self.to_model(batch.images), order, prefix, draws, rope_scale)
        if self._may_collapse or self.config.model.predict_visible:
            losses = [(part.block_loss.detach(), part.kept) for part in out.distances]
            self._last = [(out.targets, out.kept), *losses]
        # Divided by the counts of the global batch, so gradients of micro-batches sum to the batch's.
        return combine([part.block_loss for part in out.distances], divisors)

    def _zero_loss(self, forward: Callable[..., Any], count: int = 1) -> Float[Tensor, ""]:
        config = self.model.config
        rows, columns = (side * config.patch_size for side in config.grid)
        images = torch.zeros(count, config.in_chans, rows, columns, device=self.device)
        prefix = torch.zeros(count, dtype=torch.int64) if config.prefix else None
        draws = torch.ones(count, 2 * config.depth) if config.drop_path else None
        # Every parameter takes part, with a gradient of zero. Drop path keeps all, so nothing is drawn.
        with self.autocast:
            return 0 * forward(images, self.model.orders[0].cpu(), prefix, draws).loss

    def _drawn_per_image(
        self, batch: Batch
    ) -> tuple[Int64[Tensor, "b k"] | None, Int64[Tensor, " b"] | None]:
        """Block order and prefix length in blocks of each image; None if images share one, or have none."""
        seed, model = self.config.seed, self.config.model
        keys = batch.visits.tolist(), batch.samples.tolist()
        orders = draw_orders(seed, *keys, model.num_blocks) if model.order == "per_image" else None
        return orders, draw_prefix_lengths(seed, *keys, model.num_blocks) if model.prefix else None

    def _counts(self, visits: list[int], samples: list[int]) -> list[int]:
        """Number of predicted blocks in these images, for each distance."""
        model = self.config.model
        if not model.prefix:
            return [len(samples) * model.steps(distance).number for distance in model.distances]
        lengths = draw_prefix_lengths(self.config.seed, visits, samples, model.num_blocks)
        return [count_kept_rows(lengths, model.num_blocks, distance) for distance in model.distances]

    # ---------------------------------------------------------------------------- evaluation, fitted targets

    def reference_losses(self, own: Sequence[UInt8[Tensor, "_ c h w"]], most: int) -> dict[str, float]:
        """Losses of predictions that need no model, by name (see `targets`), on the first `most` images.

        `own` contains this rank's images. They are gathered, so the result does not depend on ranks or
        micro-batches. Empty if there are no images.
        """
        parts = [images for of_rank in self.group.gather(list(own)) for images in of_rank if len(images)]
        if not parts:
            return {}
        images = torch.cat(parts)[:most]
        with self.evaluating() as model:
            assert model.targets is not None, "checked before training begins"
            targets = model.targets_of(self.to_model(images), model.orders[0])
            losses = model.targets.reference_losses(targets)
            # If training changes the targets, these losses are not comparable with later ones.
            when = "initial_" if self._may_collapse else ""
            return {f"{when}{name}": loss.mean().item() for name, loss in losses.items()}

    def validate(
        self, batches: Iterator[Batch], should_stop: Callable[[], object] = bool
    ) -> tuple[dict[str, float], list[BadSample]] | None:
        """Mean loss over all images under the first order (NaN if there are none), and unreadable images.

        Prefixes and orders per image are always those of visit 0. Returns None if asked to stop.
        """
        # Sums and counts per distance in fp64 on the CPU, so the mean does not depend on batches or ranks.
        distances = len(self.config.model.distances)
        totals = torch.zeros(2, distances, dtype=torch.float64)
        bad: list[BadSample] = []
        with self.evaluating() as model:
            for batch in batches:
                bad += batch.bad
                if self.group.any(should_stop()):
                    return None
                if len(batch.images):
                    out = model(self.to_model(batch.images), *self._drawn_per_image(batch)).distances
                    totals[0] += torch.stack([part.block_loss.cpu().double().sum() for part in out])
                    totals[1] += torch.stack([part.kept.cpu().sum() for part in out])
                elif self.strategy == "fsdp":  # the other ranks wait for this one's shards
                    self._zero_loss(model)
        sums, counts = torch.tensor(self.group.sum(totals.flatten().tolist())).view(2, distances)
        bad = [one for of_rank in self.group.gather(bad) for one in of_rank]
        return {"val_loss": float((sums / counts).mean())}, bad

    def health(self) -> dict[str, float]:
        """Similarity of targets and parts of the loss in the last micro-batch, averaged over ranks."""
        values: dict[str, float] = {}
        if self._last is not None and self.config.model.predict_visible:
            nearest, *_, visible = (losses[kept].mean().item() for losses, kept in self._last[1:])
            values |= {"loss_next": nearest, "loss_visible": visible}
        if self._last is not None and self._may_collapse:
            targets, kept = self._last[0]
            vectors = targets[kept].flatten(0, -2)
            # Sampled over images and positions, as vectors of one image or position are more similar.
            chosen = torch.randperm(len(vectors), generator=torch.Generator("cpu").manual_seed(0))
            vectors = vectors[chosen[:HEALTH_VECTORS].to(vectors.device)].float().cpu()
            values |= dict.fromkeys(("target_variance", "target_rankme"), math.nan)
            if vectors.isfinite().all():  # else there are no singular values
                units = torch.nn.functional.normalize(vectors, dim=-1)
                similarity = torch.nn.functional.cosine_similarity(units.mean(0), units, dim=-1).mean()
                values |= {"target_variance": spread(vectors), "target_rankme": rankme(vectors)}
                values["mean_loss"] = 1 - similarity.item()  # loss of predicting their current mean
        of_ranks = [of_rank for of_rank in self.group.gather(values) if of_rank]
        names = (of_ranks or [{}])[0]
        return {name: sum(of_rank[name] for of_rank in of_ranks) / len(of_ranks) for name in names}

    def describe(self) -> tuple[str, str]:
        """Describe the sizes of encoder and predictor, and an image's patches and blocks."""
        settings = self.config.model
        encoder = sum(p.numel() for p in self.model.encoder.parameters())
        predictor = sum(p.numel() for p in self.model.parameters()) - encoder
        image, grid, blocks, block = (
            "{}x{}".format(*numbers)
            for numbers in (
                pair(settings.image_size), settings.grid, settings.block_grid, pair(settings.block_size)
            )
        )  # fmt: skip
        return (
            f"encoder {encoder / 1e6:.1f} M, predictor {predictor / 1e6:.1f} M parameters",
            f"image {image} px -> {grid} patches of {settings.patch_size} px -> {blocks} blocks of {block} "
            "patches",
        )

    def fit_targets(self, source: Source) -> bool:
        """Fit the targets, f(seed), if they need it; return whether they did.

        Raises `ValueError` if `source` has too few patches.
        """
        targets, group = self.model.targets, self.group
        if targets is None or targets.tokenizer is None or not targets.needs_fit:
            return False
        # Only on rank 0, as k-means is reproducible only on the same machine.
        with group.together():
            if group.is_main:
                patches = sample_patches(targets.tokenizer, source, self.config)
                log.info("fitting %d tokens on %d patches", self.config.model.vocab_size, len(patches))
                targets.fit(patches, keyed_seed(self.config.seed, "tokenizer"))
        centroids = targets.tokenizer.centroids
        centroids.copy_(group.broadcast(centroids.cpu() if group.is_main else None))
        return True


def sample_patches(
    tokenizer: KMeansTokenizer,
    source: Source,
    config: RunConfig,
    *,
    max_images: int = 2_000,
    max_patches: int = 200_000,
) -> Float[Tensor, "r p"]:
    """Sample patches of centre crops as the tokenizer sees them, f(seed, source).

    Unreadable images are skipped. Raises `ValueError` if no image can be read.
    """
    images = keyed_permutation(config.seed, len(source), "tokenizer-images")[:max_images]
    per_image = config.model.num_patches
    # Chosen by index among all patches before any image is read, so the sample depends neither on which
    # worker reads an image nor on unreadable images.
    patches = keyed_permutation(config.seed, len(images) * per_image, "tokenizer-patches")[:max_patches]
    chosen = np.zeros(len(images) * per_image, dtype=bool)
    chosen[patches] = True
    of_image = dict(zip(images.tolist(), torch.from_numpy(chosen).view(-1, per_image), strict=True))
    workers = resolve_workers(config.data.workers, source)
    sampled = []
    for batch in eval_batches(source, config.data, config.model.image_size, 64, images, workers):
        if len(batch.images):
            pixels = normalize(batch.images, config.data.mean, config.data.std)
            kept = torch.stack([of_image[sample] for sample in batch.samples.tolist()])
            sampled.append(tokenizer.patches(pixels)[kept])
    if not sampled:
        raise UsageError(
            f"none of {len(images)} images of {source.spec!r} can be read, so there is nothing to fit "
            "model.target tokens on; give images that can be read"
        )
    return torch.cat(sampled)
