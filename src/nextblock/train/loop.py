"""The training loop, in the order in which things happen.

Exactness comes from having nothing to save but weights, optimizer and the number of the step: the order of
samples is f(seed, visit), a crop and a prefix length f(seed, visit, sample), a block order f(seed, step), and
drop path takes numbers that are f(seed, visit, sample). So a monitor can disturb nothing, and a run that was
cut goes on bit for bit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nextblock.checkpoint import prune_checkpoints, save_checkpoint
from nextblock.config import IMAGENET_MEAN, IMAGENET_STD, RunConfig
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
from nextblock.models.next_block import check_predicts, masks_leak
from nextblock.train.device import autocast, choose_device, make_deterministic
from nextblock.train.memory import keep_freed_memory
from nextblock.train.metrics import MetricsLog
from nextblock.train.monitor import Monitor, MonitorEvent
from nextblock.train.progress import Reporter, Tick
from nextblock.train.run_dir import RunDir
from nextblock.train.schedule import Schedule
from nextblock.train.signals import stop_on_signals
from nextblock.train.trainer import StepOutcome, Trainer, Window

__all__ = ["NonFiniteError", "TrainResult", "train"]

log = logging.getLogger(__name__)

BASELINE_IMAGES = 256


class NonFiniteError(RuntimeError):
    """The loss or its gradient was not finite for several steps in a row."""


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


def train(
    config: RunConfig,
    out: Path,
    sources: dict[str, Source],
    *,
    monitors: Sequence[Monitor] = (),
    reporter: Reporter,
    overwrite: bool = False,
) -> TrainResult:
    """Train on `sources["train"]` into the run directory `out`, or go on where it stopped.

    `sources["val"]`, if there, is validated on. Raises `RunDirError` where `out` holds something else,
    `TooManyBadImages`, `NonFiniteError`, and `WriteError` where a disk is full; the last checkpoint stays.
    """
    run, is_tokenizer_new = _prepared(config, out, sources, monitors, reporter, overwrite=overwrite)
    trainer = run.trainer
    with stop_on_signals() as stop, reporter, run:
        steps = iter(run.loader)
        if is_tokenizer_new:
            run.write_checkpoint()  # if the run ends here, it goes on with the same tokens
        if trainer.step == 0:
            run.observe(at_start=True)
        try:
            while trainer.step < run.schedule.total and not stop:
                started_s = time.perf_counter()
                step = next(steps)
                lr = run.schedule.lr(step.index, config.optim)
                outcome = trainer.train_step(step._replace(micro_batches=run.arriving(step)), lr)
                run.check_finite(outcome, step)
                elapsed_s = time.perf_counter() - started_s
                trainer.window.add(outcome, waited_s=run.waited_s, elapsed_s=elapsed_s)
                run.log(lr)
                run.validate()
                run.observe()
                run.save_if_due()
        except DataError:  # a step that lacks images has changed no weight: those before it are saved
            run.save()
            if trainer.step:
                reporter.note(f"step {trainer.step} is saved; the same command resumes after it")
            raise
        run.save()
    return TrainResult(
        run_dir=out,
        step=trainer.step,
        total_steps=run.schedule.total,
        stopped_by=stop.signal.name if stop.signal is not None else None,
        num_bad=run.quarantine.count,
    )


def _prepared(
    config: RunConfig,
    out: Path,
    sources: dict[str, Source],
    monitors: Sequence[Monitor],
    reporter: Reporter,
    *,
    overwrite: bool,
) -> tuple[Run, bool]:
    """All that a run needs, as its last checkpoint left it; and whether its tokenizer was fitted just now."""
    _check_trainable(config)
    device = choose_device(config.train.device)
    autocast(device, config.train)  # refuses what the device cannot do, before anything is built
    if device.type == "cpu":
        keep_freed_memory()
    if config.train.deterministic:
        make_deterministic()
    run_dir = RunDir.open(out, config, sources, overwrite=overwrite)
    checkpoint = run_dir.latest()
    trainer = Trainer(config, device, checkpoint)
    loader = _train_loader(trainer, sources["train"])
    is_tokenizer_new = trainer.prepare_tokenizer(sources["train"])
    run_dir.begin(config, sources, device)
    run_dir.cut_metrics(trainer.step or -1)  # what is written before the first step is written again
    return Run(run_dir, trainer, loader, sources, monitors, reporter), is_tokenizer_new


def _check_trainable(config: RunConfig) -> None:
    """Refuse settings by which nothing can be learned, or not what they say, from any source."""
    model, data = config.model, config.data
    check_predicts(model, leaks=masks_leak(model))
    if data.normalize == "auto" and (data.mean, data.std) == (IMAGENET_MEAN, IMAGENET_STD):
        raise ValueError(
            "data.normalize is auto, but data.mean and data.std were not measured; nextblock.pretrain does "
            "that, or set them to those of nextblock.data.statistics.measure_pixels"
        )
    if not len(data.mean) == data.channels == model.in_chans:
        raise ValueError(
            f"data.mean has {len(data.mean)} channels, data.channels is {data.channels} and model.in_chans "
            f"{model.in_chans}; make them equal"
        )


def _train_loader(trainer: Trainer, source: Source) -> TrainLoader:
    config = trainer.config
    return TrainLoader(
        source,
        config.data,
        image_size=config.model.image_size,
        seed=config.seed,
        batch_size=config.train.batch_size,
        micro_batch_size=config.train.micro_batch_size,
        start_step=trainer.step,
        workers=resolve_workers(config.data.workers, source),
        pin_memory=trainer.device.type == "cuda",
        # Two for each layer: attention and MLP.
        drop_path_draws=2 * config.model.depth if config.model.drop_path else 0,
    )


class Run:
    """What surrounds the trainer: the loader, the records, the monitors. Entered while the loop runs."""

    def __init__(
        self,
        run_dir: RunDir,
        trainer: Trainer,
        loader: TrainLoader,
        sources: dict[str, Source],
        monitors: Sequence[Monitor],
        reporter: Reporter,
    ) -> None:
        config = trainer.config
        self.dir, self.trainer, self.loader, self.config = run_dir, trainer, loader, config
        self.sources, self.monitors, self.reporter = sources, monitors, reporter
        self.schedule = Schedule.of(
            config, monitors, batch_size=self.loader.batch_size, steps_per_epoch=self.loader.steps_per_epoch
        )
        self.quarantine = QuarantineLog(
            run_dir.quarantine, len(sources["train"]), config.data.max_bad_fraction
        )
        if self.schedule.warmup >= self.schedule.total:
            log.warning(
                "optim.warmup %s is %d steps, train.duration %s only %d: the rate never reaches its peak",
                config.optim.warmup,
                self.schedule.warmup,
                config.train.duration,
                self.schedule.total,
            )
        self._baselines = run_dir.baselines() or {}
        self.waited_s = 0.0
        """How long the last step waited for images."""
        self._nonfinite = 0
        self._saved_step, self._saved_at_s = trainer.step, time.monotonic()

    def __enter__(self) -> Run:
        tensorboard = self.dir.path / "tensorboard" if self.config.monitor.tensorboard else None
        self._metrics = MetricsLog(self.dir.metrics, tensorboard, start_step=self.trainer.step)
        self.reporter.begin(self.trainer.step, self.schedule.total)
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()

    def arriving(self, step: Step) -> Iterator[Batch]:
        """The step's micro-batches as they arrive; lists what is unreadable, and measures the wait.

        Too many unreadable images stop the run. Of the run's first images the baselines are measured.
        """
        self.waited_s = 0.0
        while True:
            started_s = time.perf_counter()
            batch = next(step.micro_batches, None)
            self.waited_s += time.perf_counter() - started_s
            if batch is None:
                return
            for bad in batch.bad:
                self.quarantine.add(bad)
            if not self._baselines and len(batch.images):
                self._baselines = self.trainer.baselines(batch.images[:BASELINE_IMAGES])
                self.dir.write_baselines(self._baselines)
            yield batch

    def check_finite(self, outcome: StepOutcome, step: Step) -> None:
        """Count steps that are not finite; too many in a row stop the run."""
        scaler = self.trainer.scaler
        # A scaler lowers its scale until gradients are finite; below 1 the scale is not what is wrong.
        if outcome.is_finite(scaled=scaler.is_enabled() and scaler.get_scale() >= 1):
            self._nonfinite = 0
            return
        self._nonfinite += 1
        limit = self.config.train.nonfinite_limit
        log.warning("step %d: loss %s, gradient norm %s; weights left as they are", step.index, *outcome[:2])
        if self._nonfinite >= limit:
            names = [self.sources["train"].name(sample) for sample in step.keys.samples[:5].tolist()]
            latest = self.dir.latest()
            saved = (
                "No checkpoint was written yet"
                if latest is None
                else f"The last checkpoint, {latest}, is intact"
            )
            raise NonFiniteError(
                f"loss {outcome.loss} and gradient norm {outcome.grad_norm} for {limit} steps in a row, the "
                f"last of them step {step.index}, whose first samples are {', '.join(names)}. "
                f"{saved}. Try a lower optim.lr, a longer optim.warmup, train.precision bf16 or fp32, "
                "or look at those images"
            )

    def log(self, lr: float) -> None:
        """Tell the reporter, and write a line of metrics if it is time."""
        trainer, values = self.trainer, self.trainer.window.values()
        epoch = trainer.step / self.loader.steps_per_epoch
        self.reporter.update(
            Tick(
                step=trainer.step,
                total_steps=self.schedule.total,
                epoch=epoch,
                loss=values["loss"],
                baselines=self._baselines,
                lr=lr,
                images_per_s=values["images_per_s"],
                data_wait=values["data_wait"],
                num_bad=self.quarantine.count,
            )
        )
        if trainer.step % self.schedule.log == 0 or trainer.step == self.schedule.total:
            values = {"epoch": epoch, "lr": lr, **values, "bad": self.quarantine.count, **self._seen()}
            self._metrics.write("train", trainer.step, values)
            trainer.window = Window()

    def _seen(self) -> dict[str, float]:
        """How many samples of each source of a mixture have been drawn since the run began."""
        parts = self.sources["train"].parts
        if len(parts) == 1:
            return {}
        counts = self.loader.order.seen(self.trainer.step)
        return {f"seen/{part.spec}": count for part, count in zip(parts, counts, strict=True)}

    def validate(self) -> None:
        """Measure the validation loss if it is time and there are images for it."""
        source = self.sources.get("val")
        if source is None or not self._is_time(self.schedule.val):
            return
        batches = eval_batches(
            source,
            self.config.data,
            self.config.model.image_size,
            self.config.train.micro_batch_size or self.loader.batch_size,
            workers=resolve_workers(self.config.data.workers, source),
        )
        loss, bad = self.trainer.validation_loss(batches)
        if bad:
            log.warning("%d validation images cannot be read, such as %s: %s", len(bad), *bad[0][1:])
        self._metrics.write("val", self.trainer.step, {"val_loss": loss, "val_bad": len(bad)})

    def observe(self, *, at_start: bool = False) -> None:
        """Call the monitors whose time it is; all of them before the first step."""
        event = MonitorEvent(self.trainer.step, self.dir.path, self.trainer.device)
        for monitor, every in zip(self.monitors, self.schedule.monitors, strict=True):
            if at_start or self._is_time(every):
                with self.trainer.looking() as model:
                    values = monitor(model, event)
                self._metrics.write("monitor", self.trainer.step, values)

    def save_if_due(self) -> None:
        """Save if it is time, unless the run is in trouble: what came before it must not be pruned away."""
        since_last_s = time.monotonic() - self._saved_at_s
        if not self._nonfinite and self.schedule.must_save(self.trainer.step, since_last_s):
            self.save()

    def save(self) -> None:
        """Write a checkpoint of the steps done, unless they are saved already."""
        if self.trainer.step != self._saved_step:
            self.write_checkpoint()

    def write_checkpoint(self) -> None:
        """Write a checkpoint and remove old ones."""
        trainer, data = self.trainer, self.config.data
        save_checkpoint(self.dir.checkpoints, trainer.model, trainer.state(), trainer.step, data=data)
        prune_checkpoints(self.dir.checkpoints, self.config.checkpoint.keep, self.schedule.keeps_for_good)
        self._saved_step, self._saved_at_s = self.trainer.step, time.monotonic()

    def _is_time(self, every: int) -> bool:
        return self.trainer.step % every == 0 or self.trainer.step == self.schedule.total
