"""Fine-tuning: train encoder and head together on labels, with the training loop of pre-training.

OUT/finetune.json, .md, .csv   the result
    classifier/                the classifier, readable by `nextblock.load`
    model/, scratch/           the runs: config.yaml, metrics.jsonl, checkpoints (until the result is written)
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from jaxtyping import Float, Int64
from safetensors.torch import load_file
from timm.data.mixup import Mixup, mixup_target
from timm.utils import ModelEmaV3
from torch import Tensor

from nextblock.atomic import remove
from nextblock.checkpoint import MODEL_FILE, save_classifier
from nextblock.config import pair
from nextblock.data import BadSample, Batch, QuarantineLog, Step, eval_batches, keyed_seed, resolve_workers
from nextblock.data.augment import EvalCrop, TimmCrop, TrainCrop, seeded_globally
from nextblock.data.sources import SubsetSource
from nextblock.evaluate.evaluation import MODEL, Evaluation, Result, Stopped, labelled_evaluation
from nextblock.evaluate.features import untrained
from nextblock.evaluate.finetune.model import KeyedDropPath, build_classifier, merge_lora, tuning_groups
from nextblock.evaluate.finetune.settings import FinetuneSettings, TuneConfig, TunedModel
from nextblock.evaluate.metrics import Measures, Tally
from nextblock.evaluate.results import add_leads, digest_of, labels_digest
from nextblock.evaluate.splits import Labelled, hold_out, source_notes
from nextblock.evaluate.table import check_bad
from nextblock.logs import counted
from nextblock.models import EncoderModel
from nextblock.models.heads import ImageClassifier
from nextblock.settings import from_dict, require
from nextblock.tables import Column, lead, number, share
from nextblock.train import Reporter, train
from nextblock.train.distributed import Group
from nextblock.train.learner import Learner
from nextblock.train.run_dir import recorded_config
from nextblock.train.runtime import autocast
from nextblock.train.state import OPTIMIZER_FILE

SCRATCH = "from scratch"
RUNS = {MODEL: "model", SCRATCH: "scratch"}
"""Rows of the result, and the directories of their runs in OUT."""


# ------------------------------------------------------------------------------------------------ learning


class FineTuner(Learner):
    """Trains a classifier's parameters that require gradients, optionally with a moving average."""

    model: ImageClassifier
    config: TuneConfig

    def __init__(
        self,
        config: TuneConfig,
        device: torch.device,
        checkpoint: Path | None,
        group: Group,
        *,
        make: Callable[[], ImageClassifier],
        labels: Mapping[str, Int64[np.ndarray, " n"]],
    ) -> None:
        settings = self.settings = config.finetune
        with group.together():
            model = make()
            stored = {} if checkpoint is None else load_file(checkpoint / MODEL_FILE)
            model.load_state_dict(stored or model.state_dict())
            model.to(device).train()
            groups = tuning_groups(model, settings)
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)
        super().__init__(config, device, group, model, optimizer, "single" if group.size == 1 else "ddp")
        self.labels = {purpose: torch.from_numpy(values) for purpose, values in labels.items()}
        self.averaged: ModelEmaV3 | None = None
        if settings.ema_decay is not None:
            self.averaged = ModelEmaV3(model, decay=settings.ema_decay, use_warmup=True)
        blocks: Any = getattr(model.encoder_model.encoder, "blocks", ())
        paths = [getattr(block, name, None) for block in blocks for name in ("drop_path1", "drop_path2")]
        self._paths = [(i, path) for i, path in enumerate(paths) if isinstance(path, KeyedDropPath)]
        crop = {"none": EvalCrop, "crop": TrainCrop, "timm": TimmCrop}[settings.augment]
        self.loader_options = {
            "crop": crop(data=config.data, image_size=config.model.image_size, seed=config.seed),
            "drop_path_draws": len(paths) if self._paths else 0,
            "unit": 2 if settings.mixes else 1,  # mixed pairs must share a rank and a micro-batch
        }
        self.resume(checkpoint)
        if checkpoint is not None and self.averaged is not None:
            state, average = load_file(checkpoint / OPTIMIZER_FILE), self.averaged.module
            average.load_state_dict({name: state[f"averaged/{name}"] for name in average.state_dict()})

    @property
    def tuned(self) -> ImageClassifier:
        """The classifier to measure and save: the moving average if there is one."""
        return self.model if self.averaged is None else self.averaged.module  # type: ignore[return-value]

    def kept(self) -> Mapping[str, Tensor]:
        """Tensors of the moving average, which checkpoints store."""
        average = {} if self.averaged is None else self.averaged.module.state_dict()
        return {f"averaged/{name}": tensor for name, tensor in average.items()}

    def describe(self) -> tuple[str, str]:
        """Describe the network and its input for the log."""
        (rows, columns), head = pair(self.config.model.image_size), self.model.head_config
        sizes = [(p.numel() / 1e6, p.requires_grad) for p in self.model.parameters()]
        whole, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
        return (
            f"{self.settings.trained} and {head.kind} head, {trained:.2f} of {whole:.2f} M parameters",
            f"image {rows}x{columns} px -> {counted(head.num_classes, 'class', 'classes')}",
        )

    # ------------------------------------------------------------------------------------------- the loss

    def _counts(self, visits: list[int], samples: list[int]) -> list[int]:  # noqa: ARG002
        return [len(samples)]

    def _loss(self, batch: Batch, drawn: Step, divisors: list[int]) -> Float[Tensor, ""]:
        images = batch.images
        # timm's crops are floats and already normalised.
        images = images.to(self.device) if images.is_floating_point() else self.to_model(images)
        labels = self.labels["train"][batch.samples].to(self.device)
        # Neighbours in the global batch form pairs, so pairs depend neither on ranks nor on micro-batches.
        pairs = {sample: place // 2 for place, sample in enumerate(drawn.keys.samples.tolist())}
        mixed = mix(
            images,
            labels,
            [pairs[sample] for sample in batch.samples.tolist()],
            self.settings,
            num_classes=self.model.head_config.num_classes,
            seed=keyed_seed(self.config.seed, "mixing", drawn.index),
        )
        for place, path in self._paths:
            path.draws = batch.drop_path[mixed.order, place].to(self.device)
        with self.autocast:
            logits = self._forward(mixed.images)
        return F.cross_entropy(logits.float(), mixed.targets, reduction="sum") / divisors[0]

    def _zero_loss(self, forward: Callable[..., Any], count: int = 1) -> Float[Tensor, ""]:
        model = self.config.model
        images = torch.zeros(count, model.in_chans, *pair(model.image_size), device=self.device)
        for _, path in self._paths:
            path.draws = torch.ones(count, device=self.device)
        with self.autocast:
            return 0 * forward(images).float().sum()

    def _after_step(self) -> None:
        if self.averaged is not None:
            self.averaged.update(self.model, self.step)

    # ------------------------------------------------------------------------------------------ measuring

    def reference_losses(self, own: Sequence[Tensor], most: int) -> dict[str, float]:  # noqa: ARG002
        """Loss of a uniform prediction, which label smoothing does not change."""
        return {"chance": math.log(self.model.head_config.num_classes)}

    def validate(
        self, batches: Iterator[Batch], should_stop: Callable[[], object]
    ) -> tuple[dict[str, float], list[BadSample]] | None:
        """Measure accuracy and loss on val."""
        measured = self.measure(batches, self.labels["val"], lambda: self.group.any(should_stop()))
        if measured is None:
            return None
        values = measured[0].row()
        shown = {name: values[name] for name in ("top1", "top5", "balanced", "calibration_error")}
        return {**shown, "val_loss": values["loss"]}, measured[1]

    @torch.no_grad()
    def measure(
        self, batches: Iterator[Batch], labels: Int64[Tensor, " n"], should_stop: Callable[[], object]
    ) -> tuple[Measures, list[BadSample]] | None:
        """Measure each rank's batches and join them; None if `should_stop`, which must agree on all ranks."""
        classifier, bad = self.tuned, list[BadSample]()
        tally = Tally(self.model.head_config.num_classes)
        was_training = classifier.training
        classifier.eval()
        for batch in batches:
            bad += batch.bad
            if should_stop():
                classifier.train(was_training)
                return None
            if len(batch.images):
                with self.autocast:
                    logits = classifier(self.to_model(batch.images))
                tally.add(logits.float(), labels[batch.samples])
        classifier.train(was_training)
        tallies = self.group.gather(tally)
        bad = [sample for of_rank in self.group.gather(bad) for sample in of_rank]
        return Tally.joined(tallies).measures(), bad


class Mixed(NamedTuple):
    """Mixed images, their class weights, and the rows of the batch that they come from."""

    images: Float[Tensor, "b c h w"]
    targets: Float[Tensor, "b classes"]
    order: list[int]


def mix(
    images: Float[Tensor, "b c h w"],
    labels: Int64[Tensor, " b"],
    pairs: list[int],
    settings: FinetuneSettings,
    *,
    num_classes: int,
    seed: int,
) -> Mixed:
    """Mix the two images of each pair and their labels with timm's mixup and cutmix, and smooth labels.

    Neighbours with equal `pairs` form a pair; an image whose partner is unreadable stays unmixed. Only `seed`
    decides the random choices, and global generators are restored.
    """
    firsts = [i for i in range(len(pairs) - 1) if pairs[i] == pairs[i + 1]] if settings.mixes else []
    both = [*firsts, *(i + 1 for i in reversed(firsts))]
    alone = sorted({*range(len(pairs))} - {*both})
    targets = mixup_target(labels[alone], num_classes, smoothing=settings.label_smoothing)
    if not firsts:
        return Mixed(images, targets, alone)
    # timm mixes image i with the i-th from the end, so the second images of the pairs follow in reverse.
    mixer = Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.label_smoothing,
        num_classes=num_classes,
    )
    with seeded_globally(seed):
        mixed_images, mixed_targets = mixer(images[both], labels[both])
    return Mixed(
        torch.cat([mixed_images, images[alone]]), torch.cat([mixed_targets, targets]), [*both, *alone]
    )


# ----------------------------------------------------------------------------------------- the evaluation

COLUMNS = (
    Column("encoder", "weights"),
    Column("split", "measured on"),
    number("images", "images", ",d"),
    share("top1", "top-1 %"),
    share("top5", "top-5 %"),
    share("balanced", "balanced %"),
    share("calibration_error", "ECE %"),
    lead("the model's lead"),
)


def finetune(*, reporter: Reporter | None = None, **settings: Any) -> Result:
    """Train encoder and head together; `settings` are the fields of `FinetuneSettings`.

    Rows: encoder ("model", "from scratch"), split, images, top1 with its standard error, top5, balanced,
    calibration_error, loss, epoch. The classifier is in OUT/classifier. Raises `UsageError` if `out` has
    another result, labels are missing, or the encoder does not support a setting; `Stopped`,
    `TooManyBadImages`, `NonFiniteError`.
    """
    config = from_dict(FinetuneSettings, settings)
    with labelled_evaluation(config) as (opened, sources):
        # Check the encoder and the device before anything is written.
        autocast(opened.device, config.precision)
        tuning_groups(build_classifier(opened.model, config, sources["train"].source.class_names), config)
        report = reporter or Reporter(is_quiet=not opened.group.is_main)
        result = opened.result(
            "finetune", sources, COLUMNS, lambda: _measure(opened, config, sources, report)
        )
        if opened.group.is_main:
            for name in RUNS.values():
                remove(Path(config.out) / name / "checkpoints")
        return result


def _measure(
    opened: Evaluation, config: FinetuneSettings, sources: dict[str, Labelled], reporter: Reporter
) -> Result:
    """Train the model and, as a baseline, the same network from scratch; measure both."""
    out, group, notes = Path(config.out), opened.group, source_notes(sources)
    with group.together():
        if group.is_main and config.overwrite and (out / "finetune.json").is_file():
            for name in ("finetune.json", "classifier", *RUNS.values()):
                remove(out / name)
    # Training sees only `given`.
    given = {purpose: labelled for purpose, labelled in sources.items() if purpose != "test"}
    split = "test" if "test" in sources else "val" if "val" in sources else "held-out"
    measured = sources.get(split)
    if measured is None:
        whole, labels, *_ = sources["train"]
        given["train"], measured = (
            Labelled(SubsetSource(config.train, whole, part), labels[part])
            for part in hold_out(labels, config.seed)
        )
        images = len(measured.labels)
        require(images > 0, f"no class of {config.train} has two images, so none is held out; give --test")
        notes.append(f"Measured on {counted(images, 'image')} of train, a tenth of each class, held out.")
    elif split == "val":
        notes.append(
            "The epoch was chosen on the images it is measured on: for an unbiased number give --test."
        )
    train_on, rows, rights, facts = given["train"].source, [], [], {}
    for encoder, place in RUNS.items() if config.baselines else [(MODEL, RUNS[MODEL])]:
        model, settings = opened.model, config
        if encoder == SCRATCH:
            # Layer decay protects pre-trained layers; with it, new lower layers would hardly learn.
            model = untrained(model, keyed_seed(config.seed, "untrained encoder"))
            settings = replace(config, layer_decay=1.0)
            frozen = ", frozen except for the adapters" if config.lora.rank else ""
            notes.append(f"{encoder}: fresh weights{frozen}, trained the same way with layer_decay 1.")
        tuner, epoch = _train(opened, model, settings, out / place, given, reporter)
        data, at_once = tuner.config.data, config.encode_batch_size or 128
        # Merged into the weights, an adapter costs nothing more, and the saved classifier is a plain one.
        if config.lora.rank:
            merge_lora(tuner.tuned.encoder_model.encoder)
        size, workers = tuner.config.model.image_size, resolve_workers(data.workers, measured.source)
        batches = eval_batches(measured.source, data, size, at_once, None, workers, group.rank, group.size)
        outcome = tuner.measure(batches, torch.from_numpy(measured.labels), opened.check_stop)
        assert outcome is not None, "check_stop raises"
        measures, bad = outcome
        check_bad(bad, measured.source, data)
        bad_train = QuarantineLog(out / place / "quarantine.jsonl", len(train_on), 1.0).bad
        opened.bad |= {"train": (train_on, bad_train), split: (measured.source, tuple(bad))}
        rows.append({"encoder": encoder, "split": split, **measures.row(), "epoch": epoch})
        rights.append(measures.right)
        if encoder == MODEL:
            chosen = f"epoch {epoch} was the best on val" if "val" in given else "the last epoch was measured"
            about = (
                f"Trained: {config.trained} and a {config.head} head, {counted(config.epochs, 'epoch')} of "
                f"{counted(len(train_on), 'image')} of {config.train}; {chosen}."
            )
            notes.insert(0, about)
            facts = {
                "class_names": train_on.class_names,
                "per_class": measures.per_class,
                "confusion": measures.confusion,
                "train_images": len(train_on),
                "num_classes": len(train_on.class_names),
            }
            with group.together():
                if group.is_main:
                    save_classifier(out / "classifier", tuner.tuned.eval(), data=data)
    facts["bad_images"] = opened.bad_counts()
    verdict = add_leads(rows, rights, match=())
    return Result(verb="finetune", rows=tuple(rows), notes=(*notes, *verdict), facts=facts)


def _train(
    opened: Evaluation,
    model: EncoderModel,
    settings: FinetuneSettings,
    place: Path,
    given: dict[str, Labelled],
    reporter: Reporter,
) -> tuple[FineTuner, int]:
    """Train or resume; return the tuner of the last epoch, or of the best on val, and that epoch."""
    sources = {purpose: labelled.source for purpose, labelled in given.items()}
    old, group = model.config.image_size, opened.group
    size = settings.image_size or old
    # Scale the resize with the image size, so that the crop covers the same share of the image.
    resize_px = round(opened.data.resize_px(old) * max(pair(size)) / max(pair(old)))
    tuned = TunedModel(
        image_size=size,
        in_chans=model.config.in_chans,
        weights=digest_of(model.encoder),
        labels=labels_digest(sources["train"]),
    )
    config = TuneConfig.of(settings, tuned, replace(opened.data, val_resize_px=resize_px))
    learner: Any = partial(
        FineTuner,
        make=partial(build_classifier, model, settings, sources["train"].class_names),
        labels={purpose: labelled.labels for purpose, labelled in given.items()},
    )
    # Repeating an interrupted command, which may include --overwrite, must resume the run and not delete it.
    stored = recorded_config(place, TuneConfig)
    overwrite = group.broadcast(settings.overwrite and (stored is None or bool(config.differences(stored))))
    result = train(
        config, place, sources, reporter=reporter, overwrite=overwrite, group=group, learner=learner
    )
    if result.stopped_by is not None:
        raise Stopped(
            signal.Signals[result.stopped_by],
            f"stopped by {result.stopped_by} after step {result.step} of {result.total_steps} in {place}, "
            "saved; the same command resumes",
        )
    best = place / "best.json"
    step = json.loads(best.read_text())["step"] if best.is_file() else result.step
    tuner = learner(config, opened.device, place / "checkpoints" / f"step_{step:08d}", group)
    return tuner, round(step * settings.epochs / result.total_steps)
