"""Fine-tuning: encoder and head trained together on labels, whole or by adapters.

OUT/settings.json        what this result is made from, written first
    state/state.pt       what is needed to go on; removed at the end
    metrics.jsonl        one JSON object an epoch, and one of each measuring on val
    quarantine.jsonl     images that could not be read; while it trains, those to train on
    classifier/          the classifier, as `nextblock.load` reads it
    finetune.md, .json   the result, written last
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nextblock.atomic import write_aside, write_text
from nextblock.checkpoint import STATE_FILE, load_state, save_classifier
from nextblock.config import DataConfig, pair
from nextblock.data import (
    BadSample,
    QuarantineLog,
    Source,
    Step,
    TooManyBadImages,
    TrainLoader,
    resolve_workers,
)
from nextblock.data.transforms import Crop, EvalCrop, TimmCrop
from nextblock.evaluate.directories import make_directory
from nextblock.evaluate.features import check_bad, open_model
from nextblock.evaluate.finetune.config import FinetuneConfig
from nextblock.evaluate.finetune.model import build_classifier, images_for
from nextblock.evaluate.finetune.report import (
    FinetuneResult,
    FinetuneRow,
    Split,
    WeightsName,
    finetune_markdown,
    result_from_dict,
)
from nextblock.evaluate.finetune.train import FineTuner, Measured, measure_classifier
from nextblock.evaluate.results import identity_of, refuse_other_result
from nextblock.evaluate.sources import check_classes, hold_out_test, open_labelled, part_of
from nextblock.evaluate.unreadable import QUARANTINE, in_whole, report_unreadable, whole_of
from nextblock.models import EncoderModel
from nextblock.models.heads import ImageClassifier
from nextblock.settings import Duration, to_dict
from nextblock.train import NonFiniteError, Reporter, RunDir, Tick
from nextblock.train.logging import MetricsLog, StepOutcome, Window
from nextblock.train.runtime import autocast, choose_device, process_settings, stop_on_signals

__all__ = ["finetune", "finetune_model"]

log = logging.getLogger(__name__)

SETTINGS, RESULT, STATE, CLASSIFIER = "settings.json", "finetune.json", "state", "classifier"
CONFUSION = "confusion.png"
"""Drawn by who has the result."""
OURS = (RESULT, STATE, CLASSIFIER, CONFUSION, "finetune.md", "metrics.jsonl", QUARANTINE)
"""What may lie in OUT besides `SETTINGS`, and without it is not of fine-tuning."""
NONFINITE_LIMIT = 5
"""Steps in a row whose loss or gradient is not finite, after which training stops."""


class Sources(NamedTuple):
    """Images to train on, and those to measure on, by split, test the last."""

    train: Source
    measured: dict[Split, Source]


def finetune(config: FinetuneConfig, reporter: Reporter) -> FinetuneResult:
    """Fine-tune as the settings say, or go on where the same command stopped; the result stands in `out`.

    Raises `ValueError` where `out` holds another result, where labels are missing, where the sources' classes
    differ, or where the encoder cannot do what is asked; `TooManyBadImages`, `NonFiniteError`.
    """
    model, data = open_model(config)
    return finetune_model(model, config, _open_sources(config, data), data, reporter)


def finetune_model(
    model: EncoderModel, config: FinetuneConfig, sources: Sources, data: DataConfig, reporter: Reporter
) -> FinetuneResult:
    """The same of an open model and open sources; `data` says how images were cut for the model."""
    device = choose_device(config.device)
    autocast(device, config.precision)  # refuses what the device cannot do
    check_classes(sources.train, sources.measured.values())
    out = Path(config.out)
    identity = identity_of(config, model, data, {"train": sources.train, **sources.measured})
    ours = OURS if (out / SETTINGS).is_file() else ()
    refuse_other_result(out, SETTINGS, identity, ours, overwrite=config.overwrite)
    if (out / RESULT).is_file() and not config.overwrite:
        reporter.note(f"{out} is complete; --overwrite does it again")
        return result_from_dict(json.loads((out / RESULT).read_text(encoding="utf-8")))
    with process_settings(device, deterministic=config.deterministic):
        classifier = build_classifier(model, config, sources.train.class_names)
        data = images_for(data, model.config, classifier.encoder_model.config, config)
        loop = _Loop(out, classifier, config, sources, data, device, anew=config.overwrite)
        _begin(out, identity, overwrite=config.overwrite)
        stopped_by = loop.run(reporter)
        if stopped_by is not None:
            return loop.result((), {}, stopped_by)
        return _conclude(loop, identity)


def _begin(out: Path, identity: dict[str, Any], *, overwrite: bool) -> None:
    """Write what the result is made from; with `overwrite`, once the other one is removed."""
    for name in (SETTINGS, *OURS) if overwrite else ():
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    make_directory(out)
    write_text(out / SETTINGS, json.dumps(identity, indent=2) + "\n")


def _conclude(loop: _Loop, identity: dict[str, Any]) -> FinetuneResult:
    """Measure what was trained, and write it with its result."""
    out, kept = loop.out, loop.tuner.finish()
    rows: list[FinetuneRow] = []
    bad: dict[str, tuple[Source, tuple[BadSample, ...]]] = {}
    # Merged adapters round otherwise than those that were measured in the last epoch.
    known = {} if loop.config.uses_lora else loop.last_watched
    for split, source in loop.sources.measured.items():
        for weights, classifier in kept.items():
            found = known.get(weights) if source is loop.watched else None
            found = found or loop.measure(classifier, source)
            rows.append(FinetuneRow(split=split, weights=weights, measures=found.measures))
            bad[split] = (source, found.bad)
    result = loop.result(tuple(rows), {split: len(found) for split, (_, found) in bad.items()}, None)
    save_classifier(out / CLASSIFIER, list(kept.values())[-1], data=loop.data)
    page = finetune_markdown(result, identity, out / CLASSIFIER, batch_size=loop.loader.batch_size)
    write_text(out / "finetune.md", page)
    write_text(out / RESULT, json.dumps({**identity, **to_dict(result)}, indent=2) + "\n")
    # Not before: who goes on takes what the list names for images to train on.
    report_unreadable(out, {"train": (whole_of(loop.sources.train), loop.quarantine.bad), **bad})
    shutil.rmtree(out / STATE, ignore_errors=True)
    return result


def _open_sources(config: FinetuneConfig, data: DataConfig) -> Sources:
    """What to train and to measure on; without labels there is nothing to do."""
    others: dict[Split, str | None] = {"val": config.val, "test": config.test}
    train, given = open_labelled(config.train, others, data)
    if given:
        return Sources(train, given)
    kept, held = hold_out_test(train, config.seed)
    return Sources(part_of(train, kept), {"held-out": part_of(train, held)})


class _Loop:
    """Training and what surrounds it: the loader, the records, the state on disk."""

    def __init__(
        self,
        out: Path,
        classifier: ImageClassifier,
        config: FinetuneConfig,
        sources: Sources,
        data: DataConfig,
        device: torch.device,
        *,
        anew: bool,
    ) -> None:
        self.out, self.config, self.sources, self.data = out, config, sources, data
        self.image_size = pair(classifier.encoder_model.config.image_size)
        self.trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
        self.parameters = sum(p.numel() for name, p in classifier.named_parameters() if "lora_" not in name)
        self.labels = torch.from_numpy(sources.train.labels)
        watched = [source for split, source in sources.measured.items() if split != "test"]
        self.watched = watched[0] if watched else None
        """What is measured on after epochs."""
        self.last_watched: dict[WeightsName, Measured] = {}
        """What was found there the last time."""
        saved = load_state(out / STATE) if (out / STATE).is_dir() and not anew else None
        self.loader = self._loader(0 if saved is None else saved["step"], device)
        self.tuner = FineTuner(
            classifier, config, data, steps_per_epoch=self.loader.steps_per_epoch, device=device
        )
        if saved is not None:
            self.tuner.restore(saved)
        self._nonfinite = 0
        self._saved_step, self._saved_at_s = self.tuner.step, time.monotonic()
        saving = Duration.parse(config.save_every, allow=("ep", "st", "sa", "min"))
        self._save_s = saving.value * 60 if saving.unit == "minutes" else None
        self._save_steps = None if self._save_s is not None else max(1, self._steps(saving))

    def run(self, reporter: Reporter) -> str | None:
        """Train to the end; gives the signal that asked to stop before it, if one did."""
        tuner = self.tuner
        records = RunDir(self.out)
        records.cut_metrics(tuner.step or -1)  # what was written after the state will be written again
        self.quarantine = QuarantineLog(
            records.quarantine, len(whole_of(self.sources.train)), self.data.max_bad_fraction
        )
        with (
            stop_on_signals() as stop,
            reporter,
            MetricsLog(records.metrics, None) as metrics,
        ):
            reporter.begin(tuner.step, tuner.total_steps)
            steps = iter(self.loader)
            while tuner.step < tuner.total_steps and not stop:
                started_s = time.perf_counter()
                step = next(steps)
                waited_s = time.perf_counter() - started_s
                lr = tuner.lr
                outcome = self._learn(step)
                tuner.window.add(outcome, waited_s=waited_s, elapsed_s=time.perf_counter() - started_s)
                reporter.update(self._tick(lr))
                if tuner.step % self.loader.steps_per_epoch == 0:
                    self._end_epoch(metrics, lr)
                self._save_if_due()
            self._save()
        is_cut = tuner.step < tuner.total_steps
        return stop.signal.name if stop.signal is not None and is_cut else None

    def measure(self, classifier: ImageClassifier, source: Source) -> Measured:
        """Measure on a source; `TooManyBadImages` where too many of it cannot be read."""
        found = measure_classifier(
            classifier,
            source,
            self.data,
            image_size=self.image_size,
            batch_size=self.config.encode_batch_size,
            precision=self.config.precision,
        )
        of_train = self.quarantine.count if whole_of(source) is whole_of(self.sources.train) else 0
        check_bad(found.bad, source, self.data, besides=of_train)
        return found

    def result(
        self, rows: tuple[FinetuneRow, ...], bad: dict[str, int], stopped_by: str | None
    ) -> FinetuneResult:
        """What was found so far."""
        return FinetuneResult(
            rows=rows,
            class_names=self.sources.train.class_names,
            train_images=len(self.sources.train),
            bad_images={"train": self.quarantine.count, **bad},
            step=self.tuner.step,
            total_steps=self.tuner.total_steps,
            trained_parameters=self.trained,
            parameters=self.parameters,
            stopped_by=stopped_by,
        )

    # --------------------------------------------------------------------------------------------- its parts

    def _learn(self, step: Step) -> StepOutcome:
        (batch,) = step.micro_batches  # the tuner cuts it, once images are mixed over the whole batch
        for bad in batch.bad:
            self._note_bad(bad)
        outcome = self.tuner.learn(batch.images, self.labels[batch.samples])
        scaler = self.tuner.scaler
        if outcome.is_finite(scaled=scaler.is_enabled() and scaler.get_scale() >= 1):
            self._nonfinite = 0
            return outcome
        self._nonfinite += 1
        log.warning("step %d: loss %s, gradient norm %s; weights left as they are", step.index, *outcome[:2])
        if self._nonfinite >= NONFINITE_LIMIT:
            raise NonFiniteError(
                f"loss {outcome.loss} and gradient norm {outcome.grad_norm} for {NONFINITE_LIMIT} steps in a "
                f"row, the last of them step {step.index}; try a lower lr, a longer warmup_epochs, or "
                "precision bf16 or fp32; if it was so from the first step, look at the model's weights"
            )
        return outcome

    def _note_bad(self, bad: BadSample) -> None:
        try:
            self.quarantine.add(in_whole(bad, self.sources.train))
        except TooManyBadImages as error:  # the same, by the settings of this command
            told = str(error).replace("raise data.max_bad_fraction", "allow more by --max_bad_fraction")
            raise TooManyBadImages(told.replace("data.max_bad_fraction", "max_bad_fraction")) from error

    def _end_epoch(self, metrics: MetricsLog, lr: float) -> None:
        tuner = self.tuner
        epoch = tuner.step // self.loader.steps_per_epoch
        values = {"epoch": epoch, "lr": lr, **tuner.window.values(), "bad": self.quarantine.count}
        metrics.write("train", tuner.step, values)
        tuner.window = Window()
        if self.watched and (epoch % self.config.val_every == 0 or epoch == self.config.epochs):
            found: dict[str, float] = {"epoch": epoch}
            for weights, classifier in tuner.networks().items():
                self.last_watched[weights] = self.measure(classifier, self.watched)
                measures = self.last_watched[weights].measures
                prefix = "" if weights == "last" else f"{weights}/"
                names = ("top1", "top5", "balanced", "loss", "calibration_error")
                found |= {f"{prefix}{name}": getattr(measures, name) for name in names}
            metrics.write("val", tuner.step, found)
            log.info("epoch %d: top-1 %.2f %% on %s", epoch, 100 * found["top1"], self.watched.spec)

    def _tick(self, lr: float) -> Tick:
        return Tick(
            step=self.tuner.step,
            epoch=self.tuner.step / self.loader.steps_per_epoch,
            lr=lr,
            values=self.tuner.window.values(),
            num_bad=self.quarantine.count,
        )

    def _loader(self, start_step: int, device: torch.device) -> TrainLoader:
        config, source = self.config, self.sources.train
        return TrainLoader(
            source,
            self.data,
            image_size=self.image_size,
            seed=config.seed,
            batch_size=config.batch_size,
            start_step=start_step,
            workers=resolve_workers(self.data.workers, source),
            pin_memory=device.type == "cuda",
            crop=self._crop(),
        )

    def _crop(self) -> Crop | None:
        """What cuts the images; None: the loader's own random crop."""
        if self.config.augment == "timm":
            return TimmCrop(data=self.data, image_size=self.image_size, seed=self.config.seed)
        if self.config.augment == "none":
            return EvalCrop(data=self.data, image_size=self.image_size)
        return None

    def _steps(self, duration: Duration) -> int:
        return duration.steps(batch_size=self.loader.batch_size, steps_per_epoch=self.loader.steps_per_epoch)

    def _save_if_due(self) -> None:
        """Save if it is time, unless steps are not finite: what came before must stay."""
        if self._save_steps is not None:
            is_due = self.tuner.step % self._save_steps == 0
        else:
            is_due = self._save_s is not None and time.monotonic() - self._saved_at_s >= self._save_s
        if is_due and not self._nonfinite:
            self._save()

    def _save(self) -> None:
        """Write the state, unless it is saved already."""
        if self.tuner.step == self._saved_step:
            return
        with write_aside(self.out / STATE) as aside:
            aside.mkdir()
            torch.save(self.tuner.state(), aside / STATE_FILE)
        self._saved_step, self._saved_at_s = self.tuner.step, time.monotonic()
