"""What pre-trains: the next-block loss of a micro-batch, its divisors, its validation, its fitted targets."""

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
from nextblock.kmeans import KMeansTokenizer
from nextblock.models import NextBlockModel
from nextblock.models.next_block import check_predicts, masks_leak
from nextblock.optim import build_optimizer
from nextblock.targets import (
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
"""So many target vectors of a micro-batch, chosen at random, are looked at for collapse."""


class Trainer(Learner):
    """A model that learns to predict next blocks: made fresh (or from `model.init`), or from a checkpoint."""

    model: NextBlockModel

    def __init__(
        self, config: RunConfig, device: torch.device, checkpoint: Path | None, group: Group = ALONE
    ) -> None:
        check_predicts(config.model, leaks=masks_leak(config.model))
        strategy = choose_strategy(config, group, device)

        def make() -> NextBlockModel:
            return _fresh_model(config) if checkpoint is None else read_run_model(checkpoint)

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
        self._orders = model.orders.cpu()  # drawn from there: no wait for a GPU in every step
        # A hole changes each distance's number by its own ratio.
        self.holes_differ = config.model.prefix and config.model.num_predicted_blocks > 1
        # Two for each layer: attention and MLP.
        self.loader_options = {"drop_path_draws": 2 * config.model.depth if config.model.drop_path else 0}
        self.counted = config.model
        self._may_collapse = model.targets is not None and model.targets.may_collapse
        self._last: list[tuple[Tensor, Tensor]] | None = None
        """Targets of the last micro-batch, then the losses of each distance; and which of them count."""
        self.resume(checkpoint)

    # ------------------------------------------------------------------------------------------- the loss

    def _draw(self, step: Step) -> tuple[Int64[Tensor, " k"], Float[Tensor, ""] | None]:
        """The order of the blocks, one of the model's set, and the scale of rotary coordinates."""
        seed, limit = self.config.seed, self.config.model.rope_rescale
        order_index = keyed_rng(seed, "block-order", step.index).integers(len(self._orders))
        scale = None
        if limit != 1:
            scale = torch.tensor(limit ** (2 * keyed_rng(seed, "rope", step.index).random() - 1))
        return self._orders[int(order_index)], scale

    def _loss(self, batch: Batch, drawn: tuple[Any, Any], divisors: list[int]) -> Float[Tensor, ""]:
        images = self.to_model(batch.images)
        order, rope_scale = drawn
        with self.autocast:
            draws = batch.drop_path if self.config.model.drop_path else None
            own = self._orders_of(batch)
            prefix = self._prefix_lengths(batch)
            out = self._forward(images, order if own is None else own, prefix, draws, rope_scale)
        if self._may_collapse or self.config.model.predict_visible:
            losses = [(part.block_loss.detach(), part.kept) for part in out.distances]
            self._last = [(out.targets, out.kept), *losses]
        # The share of this micro-batch in the batch's loss; gradients add up to those of the batch.
        return combine([part.block_loss for part in out.distances], divisors)

    def _touch(self, forward: Callable[..., Any], count: int = 1) -> Float[Tensor, ""]:
        config = self.model.config
        rows, columns = (side * config.patch_size for side in config.grid)
        images = torch.zeros(count, config.in_chans, rows, columns, device=self.device)
        prefix = torch.zeros(count, dtype=torch.int64) if config.prefix else None
        draws = torch.ones(count, 2 * config.depth) if config.drop_path else None
        with self.autocast:
            return 0 * forward(images, self.model.orders[0].cpu(), prefix, draws).loss

    def _orders_of(self, batch: Batch) -> Int64[Tensor, "b k"] | None:
        """The images' own orders; None if all have the same."""
        if self.config.model.order != "per_image":
            return None
        visits, samples = batch.visits.tolist(), batch.samples.tolist()
        return draw_orders(self.config.seed, visits, samples, self.config.model.num_blocks)

    def _prefix_lengths(self, batch: Batch) -> Int64[Tensor, " b"] | None:
        """How many blocks of each image all its tokens may attend to; None if the model has no prefix."""
        if not self.config.model.prefix:
            return None
        visits, samples = batch.visits.tolist(), batch.samples.tolist()
        return draw_prefix_lengths(self.config.seed, visits, samples, self.config.model.num_blocks)

    def _counts(self, visits: list[int], samples: list[int]) -> list[int]:
        """How many blocks of these images are predicted, one number for each distance."""
        model = self.config.model
        if not model.prefix:
            return [len(samples) * model.steps(distance).number for distance in model.distances]
        lengths = draw_prefix_lengths(self.config.seed, visits, samples, model.num_blocks)
        return [count_kept_rows(lengths, model.num_blocks, distance) for distance in model.distances]

    # ---------------------------------------------------------------------------- evaluation, fitted targets

    def reference_losses(self, own: Sequence[UInt8[Tensor, "_ c h w"]], most: int) -> dict[str, float]:
        """The loss of predictions that need no model, by name (see `targets`), on the first `most` images.

        `own` are this rank's; with those of the others they do not depend on ranks or micro-batches. Empty
        if there is none.
        """
        found = [images for of_rank in self.group.gather(list(own)) for images in of_rank if len(images)]
        if not found:
            return {}
        images = torch.cat(found)[:most]
        with self.looking() as model:
            assert model.targets is not None, "checked before training begins"
            targets = model.targets_of(self.to_model(images), model.orders[0])
            losses = model.targets.reference_losses(targets)
            # What training changes is not to be compared with later losses.
            when = "initial_" if self._may_collapse else ""
            return {f"{when}{name}": loss.mean().item() for name, loss in losses.items()}

    def validation_loss(
        self, batches: Iterator[Batch], should_stop: Callable[[], object] = bool
    ) -> tuple[float, list[BadSample]] | None:
        """The loss over all these images, under the first order (NaN of none), and those unreadable.

        An image's prefix or order, if the model has one for each, is that of its visit 0, always the same.
        None if it was asked to stop before the end.
        """
        # Sums and counts for each distance, in fp64 on the CPU: the mean does not depend on batches or ranks.
        distances = len(self.config.model.distances)
        totals = torch.zeros(2, distances, dtype=torch.float64)
        bad: list[BadSample] = []
        with self.looking() as model:
            for batch in batches:
                bad += batch.bad
                if self.group.any(should_stop()):
                    return None
                if len(batch.images):
                    order, prefix = self._orders_of(batch), self._prefix_lengths(batch)
                    out = model(self.to_model(batch.images), order, prefix).distances
                    totals[0] += torch.stack([part.block_loss.cpu().double().sum() for part in out])
                    totals[1] += torch.stack([part.kept.cpu().sum() for part in out])
                elif self.strategy == "fsdp":
                    self._touch(model)
        sums, counts = torch.tensor(self.group.sum(totals.flatten().tolist())).view(2, distances)
        bad = [one for of_rank in self.group.gather(bad) for one in of_rank]
        return float((sums / counts).mean()), bad

    def validate(
        self, batches: Iterator[Batch], should_stop: Callable[[], object]
    ) -> tuple[dict[str, float], list[BadSample]] | None:
        """The validation loss."""
        measured = self.validation_loss(batches, should_stop)
        return None if measured is None else ({"val_loss": measured[0]}, measured[1])

    def health(self) -> dict[str, float]:
        """Of the last micro-batch, the mean over ranks: how alike targets are, and parts of the loss."""
        found: dict[str, float] = {}
        if self._last is not None and self.config.model.predict_visible:
            nearest, *_, visible = (losses[kept].mean().item() for losses, kept in self._last[1:])
            found |= {"loss_next": nearest, "loss_visible": visible}
        if self._last is not None and self._may_collapse:
            targets, kept = self._last[0]
            vectors = targets[kept].flatten(0, -2)
            # From everywhere: those of one image or one place are more alike.
            chosen = torch.randperm(len(vectors), generator=torch.Generator("cpu").manual_seed(0))
            vectors = vectors[chosen[:HEALTH_VECTORS].to(vectors.device)].float().cpu()
            found |= dict.fromkeys(("target_variance", "target_rankme"), math.nan)
            if vectors.isfinite().all():  # else there are no singular values
                units = torch.nn.functional.normalize(vectors, dim=-1)
                alike = torch.nn.functional.cosine_similarity(units.mean(0), units, dim=-1).mean()
                found |= {"target_variance": spread(vectors), "target_rankme": rankme(vectors)}
                found["mean_loss"] = 1 - alike.item()  # of predicting their mean now
        of_ranks = [of_rank for of_rank in self.group.gather(found) if of_rank]
        names = (of_ranks or [{}])[0]
        return {name: sum(of_rank[name] for of_rank in of_ranks) / len(of_ranks) for name in names}

    def describe(self) -> tuple[str, str]:
        """The sizes of encoder and predictor; an image's patches and blocks."""
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
        """Fit the targets, f(seed), if they must be, and return whether they were.

        Raises `ValueError` if the patches of `source` are too few.
        """
        targets, group = self.model.targets, self.group
        if targets is None or targets.tokenizer is None or not targets.needs_fit:
            return False
        # Once, on rank 0: k-means gives the same on the same machine only.
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
    """Patches, as the tokenizer sees them, of a sample of centre crops: f(seed, source).

    Those of unreadable images are missing. `ValueError` if no image can be read.
    """
    images = keyed_permutation(config.seed, len(source), "tokenizer-images")[:max_images]
    per_image = config.model.num_patches
    # Chosen by number among all patches of those images, before any is read: then it does not matter which
    # worker reads an image, or that some image cannot be read.
    patches = keyed_permutation(config.seed, len(images) * per_image, "tokenizer-patches")[:max_patches]
    chosen = np.zeros(len(images) * per_image, dtype=bool)
    chosen[patches] = True
    of_image = dict(zip(images.tolist(), torch.from_numpy(chosen).view(-1, per_image), strict=True))
    workers = resolve_workers(config.data.workers, source)
    found = []
    for batch in eval_batches(source, config.data, config.model.image_size, 64, images, workers):
        if len(batch.images):
            pixels = normalize(batch.images, config.data.mean, config.data.std)
            kept = torch.stack([of_image[sample] for sample in batch.samples.tolist()])
            found.append(tokenizer.patches(pixels)[kept])
    if not found:
        raise UsageError(
            f"none of {len(images)} images of {source.spec!r} can be read, so there is nothing to fit "
            "model.target tokens on; give images that can be read"
        )
    return torch.cat(found)


def read_run_model(checkpoint: Path) -> NextBlockModel:
    """The model of a pre-training run's checkpoint."""
    model = read_model(checkpoint / MODEL_FILE)
    if not isinstance(model, NextBlockModel):
        raise CheckpointError(f"{checkpoint} holds a classifier, not the model of a pre-training run")
    return model


def _fresh_model(config: RunConfig) -> NextBlockModel:
    """A model whose weights are f(seed), or those of `model.init`."""
    # Built on the CPU. `torch.manual_seed` would reseed the caller's GPUs as well.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(keyed_seed(config.seed, "weights"))
        model = NextBlockModel(config.model)
    if config.model.init is not None:
        initialize(model, config.model.init)
    return model
