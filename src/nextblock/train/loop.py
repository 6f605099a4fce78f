"""The training loop, in the order in which things happen.

An interrupted run resumes exactly because its state is only weights, optimizer and step number. All random
numbers are functions: the order of samples is f(seed, visit), a block order f(seed, step), and crop, prefix
length and drop path f(seed, visit, sample). So monitors cannot affect training either.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from nextblock.atomic import writing
from nextblock.checkpoint import checkpoints, latest_checkpoint, prune_checkpoints
from nextblock.config import IMAGENET_MEAN, IMAGENET_STD, RunConfig
from nextblock.data import (
    BadSample,
    Batch,
    DataError,
    QuarantineLog,
    Source,
    Step,
    TrainLoader,
    eval_batches,
    resolve_workers,
)
from nextblock.data.loader import NO_IMAGES
from nextblock.errors import UsageError
from nextblock.optim import lr_at
from nextblock.settings import Duration, require
from nextblock.train.distributed import ALONE, DistributedError, Group, find_device
from nextblock.train.learner import MakeLearner, Sums
from nextblock.train.loggers import Metrics, require_packages
from nextblock.train.logging import Reporter, Tick, Window, log_to_file
from nextblock.train.monitors import EARLY_STOP, Best, Monitor, MonitorEvent, collapsed, not_learned
from nextblock.train.parallel import local_part
from nextblock.train.run_dir import RunDir
from nextblock.train.runtime import (
    autocast,
    choose_device,
    device_use,
    is_native,
    native_precision,
    process_settings,
    stop_on_signals,
)
from nextblock.train.state import Saver, find_intact, write_snapshot
from nextblock.train.trainer import Trainer

log = logging.getLogger(__name__)

BASELINE_IMAGES = 256

SHOWN = ("loss", "loss_next", "mean_loss", "val_loss", "knn/top1", "top1")
"""Measured values shown in the terminal."""


class NonFiniteError(RuntimeError):
    """Weights are not finite, or loss or gradient were not finite for several steps in a row."""


class CollapseError(RuntimeError):
    """All targets are nearly the same vector, which is easy to predict and teaches nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Result of `train`."""

    run_dir: Path
    step: int
    """Number of optimizer steps done."""
    total_steps: int
    stopped_by: str | None
    """The signal that stopped the run, or "early stop"; None if the run is complete."""
    num_bad: int
    """Number of distinct unreadable images."""
    losses: dict[str, float]
    """Last training loss, and the latest measurements such as "val_loss" and "knn/top1"."""
    baselines: dict[str, float]
    """Losses of predictions that need no model."""

    @property
    def is_finished(self) -> bool:
        """Whether the run is complete or stopped early, so that repeating the command trains no further."""
        return self.stopped_by in (None, EARLY_STOP)

    @property
    def warning(self) -> str | None:
        """Cause and remedy if the training loss is not below that of a constant prediction."""
        return not_learned(self.losses, self.baselines)


def train(
    config: RunConfig,
    out: Path,
    sources: dict[str, Source],
    *,
    monitors: Sequence[Monitor] = (),
    reporter: Reporter,
    overwrite: bool = False,
    group: Group = ALONE,
    learner: MakeLearner = Trainer,
) -> TrainResult:
    """Train on `sources["train"]` in the run directory `out`, or resume there.

    `sources["val"]`, if given, is used for validation. `learner` makes the learner, fresh or from a
    checkpoint. Every process of `group` must call this. Only rank 0 prints and writes, except that each rank
    writes its shard of a checkpoint. Raises `RunDirError` if `out` contains something else, `InUseError` if
    another process trains there, `DamagedRunError`, `TooManyBadImages`, `NonFiniteError`, `CollapseError`,
    and `WriteError` if the disk is full; the last checkpoint is kept. Signal handlers, seeds and other
    settings of the process are restored.
    """
    # Refuse whatever can be refused before creating a directory.
    config.check_trainable()
    data = config.data
    if data.normalize == "auto" and (data.mean, data.std) == (IMAGENET_MEAN, IMAGENET_STD):
        raise UsageError(
            "data.normalize is auto, but data.mean and data.std were not measured; nextblock.pretrain does "
            "that, or set them to those of nextblock.data.loader.measure_pixels"
        )
    device = find_device(choose_device(config.train.device), group.world)
    autocast(device, config.train.precision)  # refuses what the device cannot do
    run = RunDir(out)
    with ExitStack() as stack:
        stack.enter_context(process_settings(device, deterministic=config.train.deterministic))
        # ------------------------------------------------ model and optimizer, fresh or from a checkpoint
        group.check_same({f"data.{kind}": source.fingerprint for kind, source in sources.items()})
        with group.together():
            if group.is_main:
                require_packages(config.monitor.loggers)
                stack.enter_context(run.locked())
                config = run.check(config, sources, overwrite=overwrite)
        config, starts_over = group.broadcast((config, run.starts_over))
        if config.train.precision == "auto":
            precision: Any = native_precision(device)
            # Recorded as resolved: "auto" might resume in another precision on another device.
            config = replace(config, train=replace(config.train, precision=precision))
        if not is_native(config.train.precision, device):
            log.warning(
                "train.precision %s is emulated on this %s, many times slower than fp32; a new run with "
                "train.precision auto takes what the device computes in",
                config.train.precision,
                device.type,
            )
        checkpoint = None if starts_over else find_intact(run.checkpoints, group)
        trainer = learner(config, device, checkpoint, group)

        # -------------------------------------------------------------------- data, and durations in steps
        source, val = sources["train"], sources.get("val")
        micro = config.train.micro_batch_size
        if micro == "auto":
            share = -(-min(config.train.batch_size, len(source)) // group.size)
            micro = trainer.largest_micro_batch(share)
            config = replace(config, train=replace(config.train, micro_batch_size=micro))
        loader = TrainLoader(
            source,
            data,
            image_size=config.model.image_size,
            seed=config.seed,
            batch_size=config.train.batch_size,
            micro_batch_size=micro,
            start_step=trainer.step,  # the order is f(seed, step), so this is all that a resume needs
            workers=resolve_workers(data.workers, source, group.sharing_cores),
            pin_memory=device.type == "cuda",
            rank=group.rank,
            world_size=group.size,
            **trainer.loader_options,
        )

        def steps(duration: str) -> int:
            # Uses the real batch size, which is smaller if there are fewer images.
            size, per_epoch = loader.batch_size, loader.steps_per_epoch
            return max(1, Duration.parse(duration).steps(batch_size=size, steps_per_epoch=per_epoch))

        total = steps(config.train.duration)
        log_every, val_every = steps(config.monitor.log_every), steps(config.monitor.val_every)
        monitor_every = [steps(monitor.every) for monitor in monitors]
        keep_every = steps(length) if (length := config.checkpoint.keep_every) else None
        saving = Duration.parse(config.checkpoint.every, allow=("ep", "st", "sa", "min"))
        is_by_clock = saving.unit == "minutes"
        save_every = math.inf if is_by_clock else steps(config.checkpoint.every)
        save_every_s = 60 * saving.value if is_by_clock else math.inf
        warmup = Duration.parse(config.optim.warmup, allow=("ep", "st", "sa", "%")).steps(
            batch_size=loader.batch_size, steps_per_epoch=loader.steps_per_epoch, total_steps=total
        )
        if warmup >= total:
            log.warning(
                "%s %s is %d steps, %s %s only %d: the rate never reaches its peak",
                config.flag("optim.warmup"), config.optim.warmup, warmup,
                config.flag("train.duration"), config.train.duration, total,
            )  # fmt: skip
        is_fitted_now = trainer.fit_targets(source)

        # ------------------------------------------------------------------------------------- the records
        keeping, stopping = Best(config.checkpoint.keep_best), Best(config.monitor.early_stop)

        def is_over() -> bool:
            return trainer.step == total or stopping.since >= config.monitor.patience

        def remedy() -> str:
            """What to do if numbers are not finite."""
            latest = latest_checkpoint(run.checkpoints)
            saved = f"The last checkpoint, {latest}, is intact" if latest else "No checkpoint was written yet"
            lr, warmup, precision = map(config.flag, ("optim.lr", "optim.warmup", "train.precision"))
            return f"{saved}. Try a lower {lr}, a longer {warmup}, {precision} bf16 or fp32"

        with group.together():
            require(
                group.size <= loader.batch_size,
                f"a batch of {loader.batch_size} cannot be divided among {group.size} processes; start "
                f"fewer, or raise {config.flag('train.batch_size')}",
            )
            latest, metrics, quarantine = dict[str, float](), None, None
            if group.is_main:
                # Lines after the checkpoint are dropped, as their steps run again; in a new run, also those
                # of step 0.
                lines = [] if starts_over else run.read_metrics(trainer.step or -1)
                at_checkpoint = checkpoints(run.checkpoints)
                for line in lines:
                    latest |= {k: x for k, x in line.items() if line["step"] and isinstance(x, int | float)}
                    stopping.add(line["step"], line)
                    # checkpoint.keep_best may be new to this run: only steps with a checkpoint can be kept.
                    if line["step"] in at_checkpoint:
                        keeping.add(line["step"], line)
                if not is_over():  # a finished run is not changed
                    run.begin(config, sources, device, trainer.step, group, overwrite=overwrite)
                    for text in trainer.opening_lines(loader, micro, len(source), total, run.checkpoints):
                        reporter.note(text)
                    run.write_metrics(lines)
                    stack.enter_context(run.heartbeat(lambda: trainer.step, total))
                    metrics = stack.enter_context(Metrics(config, run, trainer.step))
                setting = config.flag("data.max_bad_fraction")
                quarantine = QuarantineLog(run.quarantine, len(source), data.max_bad_fraction, setting)
            baselines = run.read_baselines() if group.is_main else {}
        latest, keeping, stopping, baselines = group.broadcast((latest, keeping, stopping, baselines))
        if not group.is_main:
            stack.enter_context(log_to_file(run.logs / f"rank_{group.rank:04d}.log"))

        waited_s, nonfinite, has_warned, is_time_to_save, is_best = 0.0, 0, False, False, False
        failure: DataError | None = None
        first_images, unreadable, interrupted = list[Tensor](), list[BadSample](), set[str]()
        saver = Saver(group, in_background=config.checkpoint.in_background)
        saved_step = -1 if is_fitted_now else trainer.step
        saved_at_s = time.monotonic()

        def is_time(every: int) -> bool:
            return trainer.step % every == 0 or trainer.step == total

        def arriving(step: Step) -> Iterator[Batch]:
            """Yield the step's micro-batches as they arrive; collect unreadable images, measure the wait."""
            # The trainer consumes them one by one, so workers read while it computes. Only the time in which
            # it has nothing to compute counts as waiting.
            nonlocal waited_s, failure
            waited_s, samples = 0.0, 0
            share = loader.batch_size / group.size
            for number in range(1, step.num_micro_batches + 1):
                started_s = time.perf_counter()
                try:
                    batch = NO_IMAGES if failure else next(step.micro_batches)
                except DataError as error:
                    # Other ranks wait for this one in every pass, so it takes part until the step ends.
                    batch, failure = NO_IMAGES, error
                waited_s += time.perf_counter() - started_s
                unreadable.extend(batch.bad)
                if len(batch.images) and not baselines and sum(map(len, first_images)) < BASELINE_IMAGES:
                    first_images.append(batch.images)
                yield batch
                samples += len(batch.images) + len(batch.bad)
                if number < step.num_micro_batches:
                    reporter.within(step.index, min(1.0, samples / share))

        def notes() -> list[float]:
            """Flags and counts of this rank at the end of a step; all ranks get the sums."""
            is_time_to_save = group.is_main and time.monotonic() - saved_at_s >= save_every_s
            return [is_time_to_save, failure is not None, len(unreadable)]

        def check(sums: Sums) -> None:
            """Record unreadable images; end the run if there are too many, or if a rank failed to read."""
            nonlocal is_time_to_save, baselines
            if not baselines:
                baselines = trainer.reference_losses(first_images, BASELINE_IMAGES)
                first_images.clear()
                if group.is_main:
                    run.write("baselines.json", baselines)
            is_time_to_save, is_failing, num_unreadable = map(bool, sums.notes)
            if not num_unreadable and not is_failing:
                return
            found = group.gather(unreadable)
            try:
                with group.together():
                    if failure is not None:
                        raise failure
                    if quarantine is not None:
                        with writing(run.quarantine):
                            for bad in (bad for of_rank in found for bad in of_rank):
                                quarantine.add(bad)
            except (DataError, DistributedError):
                # This step has not changed the weights yet, so the previous step can be saved.
                save()
                saver.wait()
                if trainer.step:
                    reporter.note(f"step {trainer.step} is saved; the same command resumes after it")
                raise

        def record(kind: str, values: dict[str, float]) -> None:
            nonlocal is_best
            is_best |= keeping.add(trainer.step, values)  # equal on all ranks, as the values are
            stopping.add(trainer.step, values)
            if metrics is not None:
                run.check_present()
                metrics.write(kind, trainer.step, values)
            if trainer.step:  # the untrained encoder's values would look like the run's
                latest.update({name: value for name, value in values.items() if math.isfinite(value)})

        def validate(val: Source) -> None:
            """Measure the validation loss; give up if the run is asked to stop meanwhile."""

            def batches() -> Iterator[Batch]:
                done, size, image_size = 0, micro or loader.batch_size, config.model.image_size
                workers = resolve_workers(data.workers, val, group.sharing_cores)
                for batch in eval_batches(val, data, image_size, size, None, workers, group.rank, group.size):
                    yield batch
                    done += group.size * (len(batch.samples) + len(batch.bad))
                    reporter.measuring("the validation loss", min(done, len(val)), len(val))

            with reporter.busy("a batch of the validation", trainer.step):
                measured = trainer.validate(batches(), lambda: stop)
            if measured is None:
                return interrupted.add("val")
            values, bad = measured
            if bad:
                log.warning("%d validation images cannot be read, such as %s: %s", len(bad), *bad[0][1:])
            record("val", {**values, "val_bad": len(bad)})

        def observe(*, at_start: bool = False) -> None:
            """Call the monitors that are due; record all of their values or none."""

            # They may use or reseed global generators: a training step draws no numbers from them.
            def should_stop() -> bool:
                if group.any(stop):
                    interrupted.add("monitor")
                return "monitor" in interrupted

            image, progress = metrics and metrics.image, partial(reporter.measuring, "features")
            event = MonitorEvent(trainer.step, out, device, group, should_stop, image, progress)
            values: dict[str, float] = {}
            for monitor, every in zip(monitors, monitor_every, strict=True):
                if at_start or is_time(every):
                    work = reporter.busy("a batch of the monitors", trainer.step)
                    with work, trainer.evaluating() as model:
                        values |= group.broadcast(monitor(model, event))
            if values and "monitor" not in interrupted:
                record("monitor", values)

        def save() -> None:
            """Write a checkpoint of the current step, unless there is one, and prune old ones."""
            nonlocal saved_step, saved_at_s, is_best
            if trainer.step == saved_step:
                return
            # Weights can become non-finite although loss and gradient are finite. Such weights are never
            # saved, so they cannot replace the last good checkpoint.
            weights = trainer.model.state_dict().values()
            if group.any(not all(local_part(tensor).isfinite().all() for tensor in weights)):
                raise NonFiniteError(f"weights are not finite after step {trainer.step}. {remedy()}")
            with reporter.busy(f"the checkpoint of step {trainer.step}", trainer.step):
                with group.together():
                    if metrics is not None:
                        run.check_present()
                        # Sync the loss curve before the checkpoint appears. Otherwise a power cut could
                        # leave a checkpoint without the metrics up to it, and the curve would have a gap.
                        metrics.sync()
                step, best, best_step = trainer.step, keeping.record(), keeping.step
                saver.wait()
                snapshot = trainer.snapshot(interrupted, copied=saver.in_background)

                def write(group: Group) -> None:
                    write_snapshot(run.checkpoints, snapshot, step, group, data=data)
                    if group.is_main:
                        if best_step:
                            run.write("best.json", best)
                        prune_checkpoints(run.checkpoints, config.checkpoint.keep, keep_every, best=best_step)

                saver.save(write)
                saved_step, saved_at_s, is_best = trainer.step, time.monotonic(), False

        # ---------------------------------------------------------------------------------------- the loop
        with stop_on_signals(reporter.finishing, is_quiet=not group.is_main) as stop, reporter:
            # Fitted tokens are saved at once, so that a run killed early does not fit them again: k-means is
            # reproducible only on the same machine.
            if is_fitted_now:
                save()
            if trainer.step == 0:
                observe(at_start=True)
            elif not is_over():
                # Repeat the measurements that the last signal interrupted.
                if val is not None and "val" in trainer.interrupted:
                    validate(val)
                if "monitor" in trainer.interrupted:
                    observe()
                is_best = False  # a best found here already has a checkpoint: the one resumed from
            if group.is_main and keeping.step:  # a kill may have come between the checkpoint and best.json
                run.write("best.json", keeping.record())
            reporter.begin(trainer.step, total)  # the remaining time is estimated from here on
            step_iterator = iter(loader)
            is_stopping = group.any(stop)
            # A signal only sets `stop`: the current step is finished, then saved. All ranks exchange `stop`
            # at the end of each step, so they end after the same step.
            while not is_over() and not is_stopping:
                started_s = time.perf_counter()
                group.step = trainer.step + 1
                step = next(step_iterator)
                lr = lr_at(
                    step.index,
                    peak=config.optim.lr,
                    start=config.optim.start_lr,
                    end=config.optim.end_lr,
                    warmup_steps=warmup,
                    total_steps=total,
                )
                unreadable.clear()
                arrived = step._replace(micro_batches=arriving(step))
                outcome = trainer.train_step(arrived, lr, notes=notes, check=check)
                # A non-finite step changes no weight. One may be chance; several in a row will not recover.
                nonfinite = 0 if trainer.is_fine(outcome) else nonfinite + 1
                if nonfinite:
                    log.warning("step %d: loss %s, gradient norm %s; step skipped", step.index, *outcome[:2])
                if nonfinite >= config.train.nonfinite_limit:
                    names = ", ".join(source.name(sample) for sample in step.keys.samples[:5].tolist())
                    raise NonFiniteError(
                        f"loss {outcome.loss} and gradient norm {outcome.grad_norm} for {nonfinite} steps in "
                        f"a row, the last of them step {step.index}, whose first samples are {names}. "
                        f"{remedy()}, or look at those images"
                    )
                elapsed_s = time.perf_counter() - started_s
                trainer.window.add(outcome, waited_s=waited_s, elapsed_s=elapsed_s)

                # Progress and metrics. The window is part of the checkpoint, so a run that is interrupted
                # between two lines writes the same means.
                values = trainer.window.values()
                epoch = trainer.step / loader.steps_per_epoch
                num_bad = quarantine.count if quarantine is not None else 0
                measured = {name: latest[name] for name in SHOWN[1:] if name in latest}
                reporter.update(Tick(trainer.step, epoch, lr, values, num_bad, baselines, measured))
                if is_time(log_every):
                    seen = loader.order.seen(trainer.step) if len(source.parts) > 1 else ()
                    parts = zip(source.parts, seen, strict=False)
                    seen_by_part = {f"seen/{part.spec}": count for part, count in parts}
                    shown = {"epoch": epoch, "lr": lr, **values, "bad": num_bad, **seen_by_part}
                    used = device_use(device, values["images_per_s"], trainer.counted, group.size)
                    record("train", shown | used | (health := trainer.health()))
                    trainer.window = Window()
                    if (problem := collapsed(health, config)) is not None:
                        saved = f"the checkpoints in {run.checkpoints} are of earlier steps"
                        raise CollapseError(f"step {trainer.step}: {problem}; {saved}")
                    # Warn once until the loss falls below, and not during warm-up.
                    warning = not_learned({**values, **health}, baselines) if trainer.step > warmup else None
                    if warning is not None and not has_warned:
                        log.warning("step %d: %s", trainer.step, warning)
                    has_warned = warning is not None

                if val is not None and is_time(val_every):
                    validate(val)
                observe()

                # Checkpoint, but not after a non-finite step: that could prune the checkpoints before it.
                is_time_to_save |= trainer.step % save_every == 0
                if is_best or (is_time_to_save and not nonfinite):
                    save()
                is_stopping = group.any(stop)
            # The run is complete or was stopped by a signal.
            save()
            saver.wait()
        with group.together():
            if group.is_main and is_over():
                run.complete()
                if trainer.step < total:
                    reporter.note(f"{EARLY_STOP}: {stopping}")
        received = group.gather(stop.signal.name if stop.signal is not None else None)
        num_bad = group.broadcast(quarantine.count if quarantine else 0)
    stopped_by = next((name for name in received if name and not is_over()), None)
    return TrainResult(
        run_dir=out,
        step=trainer.step,
        total_steps=total,
        stopped_by=EARLY_STOP if is_over() and trainer.step < total else stopped_by,
        num_bad=num_bad,
        losses={name: latest[name] for name in SHOWN if name in latest},
        baselines=baselines,
    )
