"""The training loop, in the order in which things happen.

Exactness comes from having nothing to save but weights, optimizer and the number of the step: the order of
samples is f(seed, visit), a crop and a prefix length f(seed, visit, sample), a block order f(seed, step), and
drop path takes numbers that are f(seed, visit, sample). So a monitor can disturb nothing, and an interrupted
run resumes bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from nextblock.atomic import writing
from nextblock.checkpoint import latest_checkpoint, prune_checkpoints, save_checkpoint
from nextblock.config import IMAGENET_MEAN, IMAGENET_STD, RunConfig, pair
from nextblock.data import (
    Batch,
    DataError,
    QuarantineLog,
    Source,
    Step,
    TrainLoader,
    eval_batches,
    resolve_workers,
)
from nextblock.models.next_block import NextBlockModel, check_predicts, masks_leak
from nextblock.optim import lr_at
from nextblock.settings import Duration
from nextblock.train.logging import MetricsLog, Reporter, Tick, Window
from nextblock.train.run_dir import RunDir
from nextblock.train.runtime import (
    autocast,
    choose_device,
    device_name,
    is_native,
    native_precision,
    process_settings,
    stop_on_signals,
)
from nextblock.train.trainer import Trainer

log = logging.getLogger(__name__)

BASELINE_IMAGES = 256

SHOWN = ("loss", "val_loss", "knn/top1")
"""What the screen shows of the measured values."""


class NonFiniteError(RuntimeError):
    """The weights are not finite, or the loss or its gradient were not for several steps in a row."""


class MonitorEvent(NamedTuple):
    """When and where a monitor is called."""

    step: int
    """Optimizer steps done."""
    run_dir: Path
    """The run directory; a monitor writes into a folder of its own in it."""
    device: torch.device
    """The model's."""


@runtime_checkable
class Monitor(Protocol):
    """Looks at the model every `every` (a duration such as "20ep"), and at the end of the run.

    The model is in evaluation mode without gradients. What is returned is logged under its names. A monitor
    leaves the model as it was, so that a run with and without it ends with the same weights.
    """

    every: str

    def __call__(self, model: NextBlockModel, event: MonitorEvent) -> dict[str, float]: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a call of `train` ended."""

    run_dir: Path
    step: int
    """Optimizer steps done."""
    total_steps: int
    stopped_by: str | None
    """The signal that asked the run to stop; None: the run is complete."""
    num_bad: int
    """Distinct images that could not be read."""
    losses: dict[str, float]
    """The last training loss, and what was measured of "val_loss" and "knn/top1"."""
    baselines: dict[str, float]
    """The loss of predictions that need no model."""

    @property
    def warning(self) -> str | None:
        """Cause and remedy if the training loss is not below that of predicting zero, or all tokens alike."""
        return _not_learned(self.losses.get("loss", math.nan), self.baselines)


def train(
    config: RunConfig,
    out: Path,
    sources: dict[str, Source],
    *,
    monitors: Sequence[Monitor] = (),
    reporter: Reporter,
    overwrite: bool = False,
) -> TrainResult:
    """Train on `sources["train"]` into the run directory `out`, or resume there.

    `sources["val"]`, if given, is validated on. Raises `RunDirError` if `out` holds something else,
    `InUseError` if another process trains there, `DamagedRunError`, `TooManyBadImages`, `NonFiniteError`, and
    `WriteError` if a disk is full; the last checkpoint stays. What it changes of the process (signals, seeds,
    memory, algorithms) is put back.
    """
    # All that can be refused is refused before a directory is made, or an old run removed.
    config.check_trainable()
    check_predicts(config.model, leaks=masks_leak(config.model))
    data = config.data
    if data.normalize == "auto" and (data.mean, data.std) == (IMAGENET_MEAN, IMAGENET_STD):
        raise ValueError(
            "data.normalize is auto, but data.mean and data.std were not measured; nextblock.pretrain does "
            "that, or set them to those of nextblock.data.statistics.measure_pixels"
        )
    device = choose_device(config.train.device)
    autocast(device, config.train.precision)  # refuses what the device cannot do
    run = RunDir(out)
    with process_settings(device, deterministic=config.train.deterministic), run.locked():
        # ------------------------------------------- model and optimizer, as the last checkpoint left them
        config = run.check(config, sources, overwrite=overwrite)
        if config.train.precision == "auto":
            precision: Any = native_precision(device)
            # Recorded as what it stands for: on another device, "auto" might resume in another precision.
            config = replace(config, train=replace(config.train, precision=precision))
        if not is_native(config.train.precision, device):
            log.warning(
                "train.precision %s is emulated on this %s, many times slower than fp32; a new run with "
                "train.precision auto takes what the device computes in",
                config.train.precision,
                device.type,
            )
        checkpoint = run.latest()
        trainer = Trainer(config, device, checkpoint)

        # -------------------------------------------------------------------- data, and durations in steps
        source, val = sources["train"], sources.get("val")
        loader = TrainLoader(
            source,
            data,
            image_size=config.model.image_size,
            seed=config.seed,
            batch_size=config.train.batch_size,
            micro_batch_size=config.train.micro_batch_size,
            start_step=trainer.step,  # the order is f(seed, step), so this is all that a resume needs
            workers=resolve_workers(data.workers, source),
            pin_memory=device.type == "cuda",
            # Two for each layer: attention and MLP.
            drop_path_draws=2 * config.model.depth if config.model.drop_path else 0,
        )

        def steps(duration: str) -> int:
            # In batches of the real size: of few images, a batch is all of them.
            size, per_epoch = loader.batch_size, loader.steps_per_epoch
            return max(1, Duration.parse(duration).steps(batch_size=size, steps_per_epoch=per_epoch))

        total = steps(config.train.duration)
        log_every, val_every = steps(config.monitor.log_every), steps(config.monitor.val_every)
        monitor_every = [steps(monitor.every) for monitor in monitors]
        keep_every = config.checkpoint.keep_every and steps(config.checkpoint.keep_every)
        saving = Duration.parse(config.checkpoint.every, allow=("ep", "st", "sa", "min"))
        is_by_clock = saving.unit == "minutes"
        save_every = math.inf if is_by_clock else steps(config.checkpoint.every)
        save_every_s = 60 * saving.value if is_by_clock else math.inf
        warmup = Duration.parse(config.optim.warmup, allow=("ep", "st", "sa", "%")).steps(
            batch_size=loader.batch_size, steps_per_epoch=loader.steps_per_epoch, total_steps=total
        )
        if warmup >= total:
            log.warning(
                "optim.warmup %s is %d steps, train.duration %s only %d: the rate never reaches its peak",
                config.optim.warmup,
                warmup,
                config.train.duration,
                total,
            )
        is_fitted_now = trainer.fit_targets(source)

        # ------------------------------------------------------------------------------------- the records
        if trainer.step < total:  # a finished run stays as it is
            run.begin(config, sources, device, trainer.step, overwrite=overwrite)
            for line in _opening_lines(config, trainer, loader, len(source), total, run):
                reporter.note(line)
        # Lines after the checkpoint are dropped, as their steps are done again; of a run that begins, also
        # those of step 0.
        latest = run.cut_metrics(trainer.step or -1)
        quarantine = QuarantineLog(run.quarantine, len(source), data.max_bad_fraction)
        baselines = run.baselines()
        tensorboard = out / "tensorboard" if config.monitor.tensorboard and trainer.step < total else None
        metrics = MetricsLog(run.metrics, tensorboard, start_step=trainer.step)

        waited_s, nonfinite, is_behind = 0.0, 0, False
        saved_step = -1 if is_fitted_now else trainer.step
        saved_at_s = time.monotonic()

        def is_time(every: int) -> bool:
            return trainer.step % every == 0 or trainer.step == total

        def arriving(step: Step) -> Iterator[Batch]:
            """The step's micro-batches as they arrive; lists what is unreadable, and measures the wait."""
            # The trainer takes them from here one by one, so that workers read on while it computes. What is
            # measured is only the time in which it had nothing to compute.
            nonlocal waited_s, baselines
            waited_s, samples = 0.0, 0
            while True:
                started_s = time.perf_counter()
                batch = next(step.micro_batches, None)
                waited_s += time.perf_counter() - started_s
                if batch is None:
                    return
                with writing(run.quarantine):
                    for bad in batch.bad:
                        quarantine.add(bad)
                if not baselines and len(batch.images):  # measured on the run's first images
                    baselines = trainer.reference_losses(batch.images[:BASELINE_IMAGES])
                    run.write_baselines(baselines)
                yield batch
                samples += len(batch.images) + len(batch.bad)
                if samples < loader.batch_size:
                    reporter.within(step.index, samples / loader.batch_size)

        def record(kind: str, values: dict[str, float]) -> None:
            metrics.write(kind, trainer.step, values)
            latest.update({name: value for name, value in values.items() if math.isfinite(value)})

        def observe(*, at_start: bool = False) -> None:
            # They may draw and reseed what they like: a step takes no number from a global generator.
            event = MonitorEvent(trainer.step, out, device)
            for monitor, every in zip(monitors, monitor_every, strict=True):
                if at_start or is_time(every):
                    reporter.busy_with = "pictures and kNN"
                    with trainer.looking() as model:
                        values = monitor(model, event)
                    record("monitor", values)
                    reporter.busy_with = ""

        def save() -> None:
            """Write a checkpoint of the steps done, unless there is one, and remove old ones."""
            nonlocal saved_step, saved_at_s
            if trainer.step == saved_step:
                return
            # A step whose loss and gradient are finite can still make weights that are not. Never saved, they
            # cannot replace the last good checkpoint.
            if not all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values()):
                raise NonFiniteError(f"weights are not finite after step {trainer.step}. {_remedy(run)}")
            reporter.busy_with = f"the checkpoint of step {trainer.step}"
            run.check_present()
            # First the loss curve, then the checkpoint's name: after a power cut, a checkpoint without the
            # lines up to it would leave a gap in the curve.
            metrics.sync()
            save_checkpoint(run.checkpoints, trainer.model, trainer.state(), trainer.step, data=data)
            prune_checkpoints(
                run.checkpoints,
                config.checkpoint.keep,
                lambda step: bool(keep_every and step > 0 and step % keep_every == 0),
            )
            saved_step, saved_at_s = trainer.step, time.monotonic()
            reporter.busy_with = ""

        # ---------------------------------------------------------------------------------------- the loop
        with stop_on_signals(reporter.finishing) as stop, reporter, closing(metrics):
            # Fitted tokens are saved at once. A run that is killed early must not fit them again: k-means is
            # the same on the same machine only.
            if is_fitted_now:
                save()
            if trainer.step == 0:
                observe(at_start=True)
            reporter.begin(trainer.step, total)  # from here on the time left is estimated
            step_iterator = iter(loader)
            try:
                # A signal only sets `stop`: the step in hand is finished, and then saved.
                while trainer.step < total and not stop:
                    started_s = time.perf_counter()
                    step = next(step_iterator)
                    lr = lr_at(
                        step.index,
                        peak=config.optim.lr,
                        start=config.optim.start_lr,
                        end=config.optim.end_lr,
                        warmup_steps=warmup,
                        total_steps=total,
                    )
                    outcome = trainer.train_step(step._replace(micro_batches=arriving(step)), lr)
                    # Such a step has changed no weight. One may be chance; several in a row do not heal.
                    nonfinite = 0 if trainer.is_fine(outcome) else nonfinite + 1
                    if nonfinite:
                        log.warning(
                            "step %d: loss %s, gradient norm %s; step skipped", step.index, *outcome[:2]
                        )
                    if nonfinite >= config.train.nonfinite_limit:
                        names = ", ".join(source.name(sample) for sample in step.keys.samples[:5].tolist())
                        raise NonFiniteError(
                            f"loss {outcome.loss} and gradient norm {outcome.grad_norm} for {nonfinite} "
                            f"steps in a row, the last of them step {step.index}, whose first samples are "
                            f"{names}. "
                            f"{_remedy(run)}, or look at those images"
                        )
                    elapsed_s = time.perf_counter() - started_s
                    trainer.window.add(outcome, waited_s=waited_s, elapsed_s=elapsed_s)

                    # Screen and metrics. The window is part of the checkpoint: a resumed run writes the same
                    # means, also if it was interrupted between two lines.
                    values = trainer.window.values()
                    epoch = trainer.step / loader.steps_per_epoch
                    reporter.update(
                        Tick(
                            step=trainer.step,
                            epoch=epoch,
                            lr=lr,
                            values=values,
                            num_bad=quarantine.count,
                            baselines=baselines,
                            latest={name: latest[name] for name in SHOWN[1:] if name in latest},
                        )
                    )
                    if is_time(log_every):
                        seen = loader.order.seen(trainer.step) if len(source.parts) > 1 else ()
                        parts = zip(source.parts, seen, strict=False)
                        seen_by_part = {f"seen/{part.spec}": count for part, count in parts}
                        record(
                            "train",
                            {"epoch": epoch, "lr": lr, **values, "bad": quarantine.count, **seen_by_part},
                        )
                        trainer.window = Window()
                        # Told once, until the loss falls below; in the warm-up nothing is expected yet.
                        warning = _not_learned(values["loss"], baselines) if trainer.step > warmup else None
                        if warning is not None and not is_behind:
                            log.warning("step %d: %s", trainer.step, warning)
                        is_behind = warning is not None

                    # Validation, pictures, kNN.
                    if val is not None and is_time(val_every):
                        reporter.busy_with = "validation"
                        size = config.train.micro_batch_size or loader.batch_size
                        workers = resolve_workers(data.workers, val)
                        batches = eval_batches(val, data, config.model.image_size, size, workers=workers)
                        loss, bad = trainer.validation_loss(batches)
                        if bad:
                            log.warning(
                                "%d validation images cannot be read, such as %s: %s", len(bad), *bad[0][1:]
                            )
                        record("val", {"val_loss": loss, "val_bad": len(bad)})
                        reporter.busy_with = ""
                    observe()

                    # Checkpoint, unless the run is in trouble: what came before it must not be pruned away.
                    is_due = trainer.step % save_every == 0 or time.monotonic() - saved_at_s >= save_every_s
                    if is_due and not nonfinite:
                        save()
            except DataError:  # a step that lacks images has changed no weight: those before it are saved
                save()
                if trainer.step:
                    reporter.note(f"step {trainer.step} is saved; the same command resumes after it")
                raise
            # Complete, or stopped by a signal; in both cases unless the last step was just saved.
            save()
        if trainer.step == total:
            run.complete()
    return TrainResult(
        run_dir=out,
        step=trainer.step,
        total_steps=total,
        stopped_by=stop.signal.name if stop.signal is not None and trainer.step < total else None,
        num_bad=quarantine.count,
        losses={name: latest[name] for name in SHOWN if name in latest},
        baselines=baselines,
    )


def _opening_lines(
    config: RunConfig, trainer: Trainer, loader: TrainLoader, images: int, total_steps: int, run: RunDir
) -> list[str]:
    """What a run is about to do, in a few lines."""
    model, settings, batch_size = trainer.model, config.model, loader.batch_size
    encoder = sum(p.numel() for p in model.encoder.parameters())
    predictor = sum(p.numel() for p in model.parameters()) - encoder
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    moments = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)  # AdamW's two, fp32

    def times(numbers: tuple[int, int]) -> str:
        return f"{numbers[0]}x{numbers[1]}"

    micro = config.train.micro_batch_size
    in_parts = f" (micro-batches of {micro})" if micro is not None and micro < batch_size else ""
    lines = [
        f"{device_name(trainer.device)} · {config.train.precision} · encoder {encoder / 1e6:.1f} M, "
        f"predictor {predictor / 1e6:.1f} M parameters",
        f"image {times(pair(settings.image_size))} px -> {times(settings.grid)} patches of "
        f"{settings.patch_size} px -> {times(settings.block_grid)} blocks of "
        f"{times(pair(settings.block_size))} patches",
        f"{images:,} images, batch {batch_size:,}{in_parts} -> {loader.steps_per_epoch:,} steps an epoch, "
        f"{total_steps:,} steps in {total_steps / loader.steps_per_epoch:,.4g} epochs",
        f"a checkpoint of {(weights + moments) / 1e6:,.1f} MB every {config.checkpoint.every} in "
        f"{run.checkpoints}, the latest {config.checkpoint.keep} kept",
    ]
    return [*lines, f"resuming at step {trainer.step:,}"] if trainer.step else lines


def _not_learned(loss: float, references: dict[str, float]) -> str | None:
    """Cause and remedy if a loss is not below that of predicting zero, or all tokens alike; else None."""
    name, meaning = ("zero", "zero") if "zero" in references else ("uniform", "all tokens alike")
    if loss < references.get(name, math.inf):
        return None
    return (
        f"the loss {loss:.4f} is not below {references.get(name, math.nan):.4f}, that of predicting "
        f"{meaning}: nothing is learned so far. Train longer, try another optim.lr, or look at the images"
    )


def _remedy(run: RunDir) -> str:
    latest = latest_checkpoint(run.checkpoints)
    saved = f"The last checkpoint, {latest}, is intact" if latest else "No checkpoint was written yet"
    return f"{saved}. Try a lower optim.lr, a longer optim.warmup, train.precision bf16 or fp32"
