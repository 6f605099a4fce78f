"""Probes: train a grid of heads on a frozen encoder's features, and measure the best.

Each image is encoded once, and all heads learn from the same features. The best head of each kind is chosen
on other images than those it is measured on, and measured once. The same encoder untrained, tiny images and
colour histograms are probed the same way, as baselines.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Int64
from torch import Tensor

from nextblock.atomic import write_aside, write_text
from nextblock.checkpoint import save_classifier
from nextblock.data import (
    BadSample,
    Batch,
    TrainLoader,
    eval_batches,
    keyed_seed,
    normalize,
    resolve_workers,
)
from nextblock.data.augment import TimmCrop
from nextblock.data.order import VisitOrder
from nextblock.data.sources import SubsetSource
from nextblock.errors import UsageError
from nextblock.evaluate.evaluation import (
    BASELINES,
    MODEL,
    UNTRAINED,
    Evaluation,
    Result,
    Stopped,
    add_leads,
    labelled_evaluation,
)
from nextblock.evaluate.features import attention_maps, seeded
from nextblock.evaluate.metrics import Measures, Tally
from nextblock.evaluate.probe.heads import (
    Candidate,
    Grid,
    Trained,
    baseline_candidates,
    beyond,
    choose,
    diverged,
    encoder_candidates,
    rate_notes,
)
from nextblock.evaluate.probe.settings import HeadName, ProbeSettings
from nextblock.evaluate.settings import CROP_RATIO, CROP_SCALE
from nextblock.evaluate.splits import Labelled, hold_out, source_notes
from nextblock.evaluate.table import (
    FeatureTable,
    NonFiniteFeaturesError,
    check_bad,
    feature_shapes,
    features_of_batch,
    non_finite,
)
from nextblock.logs import counted
from nextblock.models.heads import FeatureConfig, Head, ImageClassifier, layer_words
from nextblock.settings import Duration, from_dict
from nextblock.tables import Column, lead, number, share, write_csv

log = logging.getLogger(__name__)

COLUMNS = (
    Column("encoder", "features"),
    Column("head", "head"),
    share("top1", "top-1 %"),
    share("top5", "top-5 %"),
    share("balanced", "balanced %"),
    share("calibration_error", "ECE %"),
    lead("the model's lead"),
    number("lr", "lr"),
    number("weight_decay", "decay"),
    Column("layers", "layers", lambda layers, _: layer_words(layers)),
)

ROUNDS = 3
"""How often a grid may be extended, if its best learning rate is the smallest or largest."""
MEASURED = 128
"""Images of a feature table to measure at a time."""
MAX_WRITTEN_CLASSES = 100
"""Confusions of more classes are drawn but not written."""
REPORT_EVERY_S = 30.0
DRAWN = 4


def probe(**settings: Any) -> Result:
    """Train heads on a model's features and measure them; `settings` are the fields of `ProbeSettings`.

    Rows: encoder, head, split ("test" or "held-out"), images, top1 and its standard error, top5, balanced,
    calibration_error, loss, lr, weight_decay, layers, attention, tokens. Raises `UsageError` if `out` has
    another result, labels are missing, another source has classes that train lacks, or all heads of a kind
    diverged; `Stopped` after a signal.
    """
    config = from_dict(ProbeSettings, settings)
    with labelled_evaluation(config) as (opened, sources):
        run = _Probe(opened, config, sources)
        result = opened.result("probe", sources, COLUMNS, run.measure, save=run.save)
        if run.states is not None and opened.group.is_main:
            shutil.rmtree(run.states, ignore_errors=True)
        return result


class _Part(NamedTuple):
    """A selection of images: its name in results, the purpose of its source, and indices in that source."""

    name: str
    purpose: str
    numbers: Int64[np.ndarray, " n"]


FeatureBatch = tuple[tuple[Tensor, ...], np.ndarray]
"""Features of images, one tensor per `FeatureConfig`, and the images' indices in their source."""


class _Probe:
    """A probe of an open model on open sources."""

    def __init__(self, opened: Evaluation, config: ProbeSettings, sources: dict[str, Labelled]) -> None:
        self.opened, self.config, self.sources = opened, config, sources
        self.class_names = sources["train"].source.class_names
        self.candidates = encoder_candidates(config, opened.model, len(self.class_names))
        self.train, self.choice, self.measured = self._parts()
        self.parts = [part for part in (self.train, self.choice, self.measured) if part is not None]
        self.schedule = config.schedule(len(self.train.numbers))
        self.states = None if config.out is None else Path(config.out) / "heads"
        self.winners: dict[HeadName, tuple[Trained, Measures]] = {}
        self.grid: list[dict[str, Any]] = []

    def _parts(self) -> tuple[_Part, _Part | None, _Part]:
        """Images to train on, to choose on, and to measure on; held out of train only if necessary."""
        config, labels = self.config, self.sources["train"].labels
        numbers = np.arange(len(labels))

        def part(purpose: str, name: str, seed: int, share: float) -> _Part:
            nonlocal numbers
            if purpose in self.sources:
                return _Part(purpose, purpose, np.arange(len(self.sources[purpose].labels)))
            kept, held = hold_out(labels[numbers], seed, share=share)
            if not len(held):
                raise UsageError(
                    f"{config.train} has no class of two images to hold one out; give --test and --val"
                )
            numbers, held = numbers[kept], numbers[held]
            return _Part(name, "train", held)

        measured, choice = part("test", "held-out", config.seed, 0.1), None
        kinds = [candidate.head for candidate in self.candidates]
        if len(set(kinds)) < len(kinds):
            share = 0.1 if "test" in self.sources else 1 / 9  # of the remaining 90 %, so a tenth of all
            choice = part("val", "choice", keyed_seed(config.seed, "probe choice"), share)
        elif config.val is not None:
            log.info("each kind of head has one candidate, so val is not used")
        return _Part("train", "train", numbers), choice, measured

    # ------------------------------------------------------------------------------------------- the features

    def _start(self, encoder: str, candidates: Sequence[Candidate]) -> None:
        """Prepare to extract the features that the candidates see, from this encoder or baseline."""
        self.columns = list(dict.fromkeys(candidate.features for candidate in candidates))
        wanted: list[FeatureConfig] = [column for column in self.columns if column is not None]
        self.extract, self.origins = self.opened.extract(encoder, wanted, self.config.seed)
        size = self.opened.model.config.image_size
        self.shapes = feature_shapes(self.extract, self.opened.data, size, self.opened.device)
        self.tables: dict[str, FeatureTable] = {}

    def _from_table(self, part: _Part, batches: Iterable[np.ndarray]) -> Iterator[FeatureBatch]:
        """Read the features of batches of indices; the first call encodes the source for all parts."""
        if part.purpose not in self.tables:
            needed = np.concatenate([other.numbers for other in self.parts if other.purpose == part.purpose])
            source, indices = self.sources[part.purpose].source, np.sort(needed)
            table = self.opened.fill(part.purpose, source, self.extract, self.origins, indices)
            self.tables[part.purpose] = table
        table, device = self.tables[part.purpose], self.opened.device
        for batch in batches:
            self.opened.check_stop()
            some = table.readable(batch)
            yield tuple(table.read(some, kind).to(device) for kind in range(len(self.columns))), some

    def _encoded(
        self, purpose: str, batches: Iterable[Batch], numbers: Int64[np.ndarray, " n"]
    ) -> Iterator[FeatureBatch]:
        """Encode each rank's share of the batches without a table, and give all ranks all features.

        `numbers` maps the batches' sample numbers to indices in the source.
        """
        opened, group = self.opened, self.opened.group
        for batch in batches:
            opened.check_stop()
            size = opened.model.config.image_size
            features = features_of_batch(batch, self.extract, opened.data, opened.device, size)
            features = [kind[: len(batch.samples)] for kind in features]
            shares = group.gather((batch.samples, batch.bad, non_finite(tuple(features), batch)))
            if failures := [failure for _, _, failure in shares if failure]:
                raise NonFiniteFeaturesError(failures[0])
            if group.size > 1:
                for kind, own in enumerate(features):
                    # Broadcast rank by rank: shares differ in size, which not all backends can gather.
                    features[kind] = whole = own.new_empty(
                        sum(len(samples) for samples, *_ in shares), *own.shape[1:]
                    )
                    for rank, rows in enumerate(whole.split([len(samples) for samples, *_ in shares])):
                        if rank == group.rank:
                            rows.copy_(own)
                        if len(rows):
                            dist.broadcast(rows, src=rank, group=group.processes)
            bad = [sample for _, of_rank, _ in shares for sample in of_rank]
            self._note_bad(purpose, [sample._replace(sample=int(numbers[sample.sample])) for sample in bad])
            yield tuple(features), numbers[torch.cat([samples for samples, *_ in shares]).numpy()]

    def _note_bad(self, purpose: str, bad: Iterable[BadSample]) -> None:
        source, known = self.opened.bad.get(purpose, (self.sources[purpose].source, ()))
        by_number = {sample.sample: sample for sample in (*known, *bad)}
        merged = tuple(by_number[sample] for sample in sorted(by_number))
        check_bad(merged, source, self.opened.data)
        self.opened.bad[purpose] = (source, merged)

    def _train_batches(self, start: int) -> Iterator[FeatureBatch]:
        """Training batches from step `start`, without unreadable images."""
        opened, plan, numbers, seed = self.opened, self.schedule, self.train.numbers, self.config.seed
        if self.config.augment == "none":
            order = VisitOrder(len(numbers), seed=seed, batch_size=plan.batch_size)
            batches = (numbers[order.keys(step).samples] for step in range(start, plan.steps))
            return self._from_table(self.train, batches)
        source, size = self.sources["train"].source, opened.model.config.image_size
        if len(numbers) < len(source):
            source = SubsetSource(source.spec, source, numbers)
        data = replace(opened.data, crop_scale=CROP_SCALE, crop_ratio=CROP_RATIO)
        loader = TrainLoader(
            source,
            data,
            image_size=size,
            seed=seed,
            batch_size=plan.batch_size,
            start_step=start,
            workers=resolve_workers(data.workers, source, opened.group.sharing_cores),
            rank=opened.group.rank,
            world_size=opened.group.size,
            crop=TimmCrop(data=data, image_size=size, seed=seed) if self.config.augment == "timm" else None,
        )
        steps = islice(loader, plan.steps - start)
        return self._encoded("train", (next(step.micro_batches) for step in steps), numbers)

    def _centre_crops(self, part: _Part) -> Iterator[FeatureBatch]:
        """Batches of all readable images of a part, centre-cropped."""
        opened, source, numbers = self.opened, self.sources[part.purpose].source, part.numbers
        if self.config.augment == "none":
            return self._from_table(part, np.split(numbers, range(MEASURED, len(numbers), MEASURED)))
        data, group, size = opened.data, opened.group, opened.model.config.image_size
        at_once, workers = opened.settings.images_at_once(opened.device.type), opened.data.workers
        workers = resolve_workers(workers, source, group.sharing_cores)
        batches = eval_batches(source, data, size, at_once, numbers, workers, group.rank, group.size)
        return self._encoded(part.purpose, batches, np.arange(len(source)))

    # ---------------------------------------------------------------------------------------------- the heads

    def _train(self, encoder: str, candidates: Sequence[Candidate]) -> list[Head]:
        """Train heads side by side, resuming from a saved state."""
        opened, config, plan = self.opened, self.config, self.schedule
        columns = [self.columns.index(candidate.features) for candidate in candidates]
        heads = [
            candidate.create(self.shapes[column][-1], len(self.class_names), config.seed).to(opened.device)
            for candidate, column in zip(candidates, columns, strict=True)
        ]
        grid, place, state, step = Grid(heads, candidates, columns, config, plan), None, None, 0
        if self.states is not None and opened.group.is_main:
            # The file name is a hash of everything that these heads depend on.
            key = json.dumps(
                [opened.identity(self.sources), encoder, [c.row() for c in candidates]], sort_keys=True
            )
            place = self.states / f"{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.pt"
        with opened.group.together():
            if place is not None and place.is_file():
                state = torch.load(place, map_location="cpu", weights_only=True)
        state = opened.group.broadcast(state)
        if state is not None:
            step = state["step"]
            grid.load_state_dict(state["heads"])
            if "optimizer" in state:
                grid.optimizer.load_state_dict(state["optimizer"])
            self._note_bad("train", (BadSample(*values) for values in state["bad"]))

        def save() -> None:
            if place is not None and step:
                place.parent.mkdir(parents=True, exist_ok=True)
                bad = [tuple(sample) for sample in opened.bad.get("train", (None, ()))[1]]
                checkpoint = {"heads": grid.state_dict(), "step": step, "bad": bad}
                if step < plan.steps:
                    checkpoint["optimizer"] = grid.optimizer.state_dict()
                with write_aside(place) as aside:
                    torch.save(checkpoint, aside)

        every = Duration.parse(config.save_every, allow=("min", "ep"))
        is_timed = every.unit == "minutes"
        save_s = 60 * every.value if is_timed else math.inf
        save_steps = plan.steps + 1 if is_timed else max(1, round(every.value * plan.steps_per_epoch))
        saved_s = shown_s = time.monotonic()
        log.info("%s: training %s, %s", encoder, counted(len(heads), "head"), counted(plan.steps, "step"))
        labels = torch.from_numpy(self.sources["train"].labels)
        try:
            for features, numbers in self._train_batches(step):
                if len(numbers) < 2:  # a batch norm needs two images
                    log.warning("step %d skipped: it has fewer than 2 readable images", step)
                else:
                    grid.learn(features, labels[numbers].to(opened.device), step)
                step, now_s = step + 1, time.monotonic()
                if now_s - shown_s >= REPORT_EVERY_S:
                    shown_s = now_s
                    log.info("%s: step %d of %d", encoder, step, plan.steps)
                if now_s - saved_s >= save_s or step % save_steps == 0:
                    saved_s = now_s
                    save()
        except Stopped:
            save()
            raise
        save()
        grid.finish()
        return heads

    def _measure(
        self, part: _Part, trained: Sequence[Trained], *, confusion: bool = False
    ) -> list[Measures | None]:
        """Measure heads on a part; None for a head with NaN or infinite weights or logits."""
        labels = torch.from_numpy(self.sources[part.purpose].labels)
        tallies: list[Tally | None] = [
            None if t.is_diverged else Tally(len(self.class_names), confusion=confusion) for t in trained
        ]
        with torch.no_grad():
            for features, numbers in self._centre_crops(part):
                for i, (item, tally) in enumerate(zip(trained, tallies, strict=True)):
                    if tally is None or not len(numbers):
                        continue
                    logits = item.head(features[self.columns.index(item.candidate.features)])
                    if logits.isfinite().all():
                        tally.add(logits, labels[numbers])
                    else:
                        tallies[i] = None
        return [tally and tally.measures() for tally in tallies]

    def _encoder(self, encoder: str) -> tuple[list[dict[str, Any]], list[Measures]]:
        """Train the heads of one encoder, choose the best and measure them; return rows and measures."""
        started_s, config = time.monotonic(), self.config
        new = self.candidates if encoder in (MODEL, UNTRAINED) else baseline_candidates(config)
        self._start(encoder, new)
        trained: list[Trained] = []
        winners: dict[HeadName, int] = {}
        for _ in range(ROUNDS + 1):  # the grid, then its extensions
            heads = self._train(encoder, new)
            finite = [all(t.isfinite().all() for t in head.state_dict().values()) for head in heads]
            more = [Trained(c, head, not ok) for c, head, ok in zip(new, heads, finite, strict=True)]
            if self.choice is not None:
                scores = self._measure(self.choice, more)
                more = [replace(a, score=b, is_diverged=b is None) for a, b in zip(more, scores, strict=True)]
            trained += more
            # GPUs of several ranks may round differently: rank 0 chooses for all.
            winners = self.opened.group.broadcast(choose(encoder, trained))
            new = beyond(trained, winners, config)
            if not new:
                break
        for i, item in enumerate(trained):
            score = {name: item.score and getattr(item.score, name) for name in ("top1", "top5", "loss")}
            row = {"encoder": encoder, **item.candidate.row(), **score}
            self.grid.append({**row, "is_winner": i in winners.values(), "is_diverged": item.is_diverged})
        best = [trained[i] for i in winners.values()]
        # Confusions are only drawn for the model.
        measured = self._measure(self.measured, best, confusion=encoder == MODEL)
        rows, sound = [], []
        for winner, found in zip(best, measured, strict=True):
            if found is None:
                raise UsageError(diverged(encoder, [winner.candidate]))
            log.info("%s, %s: top-1 %.1f %%", encoder, winner.candidate.head, 100 * found.top1)
            row = {"encoder": encoder, **winner.candidate.row(), "split": self.measured.name, **found.row()}
            rows.append({**row, "epochs": self.schedule.epochs, "elapsed_s": time.monotonic() - started_s})
            sound.append(found)
            if encoder == MODEL:
                self.winners[winner.candidate.head] = (winner, found)
        return rows, sound

    # --------------------------------------------------------------------------------------------- the result

    def measure(self) -> Result:
        """Probe the model and its baselines."""
        config, plan, opened = self.config, self.schedule, self.opened
        self._start(MODEL, self.candidates)
        images = sum(len(self.sources[purpose].labels) for purpose in {part.purpose for part in self.parts})
        gb = 4e-9 * images * sum(map(math.prod, self.shapes)) * (1 + config.baselines)
        if config.augment == "none" and gb > config.cache_gb:
            raise UsageError(
                f"the features of {counted(images, 'image')} take {gb:.3g} GB, more than cache_gb "
                f"{config.cache_gb:g}; use --augment crop, which encodes images again in every epoch, or "
                "--heads linear, or raise --cache_gb"
            )
        rows: list[dict[str, Any]] = []
        rights: list[Bool[np.ndarray, " n"]] = []
        baselines = [baseline for baseline in BASELINES if baseline == UNTRAINED or "linear" in config.heads]
        for encoder in (MODEL, *(baselines if config.baselines else ())):
            new_rows, measured = self._encoder(encoder)
            rows += new_rows
            rights += [measures.right for measures in measured]
        verdict = add_leads(rows, rights, match=("head",))
        counts = {part.name: len(self._readable(part)) for part in self.parts}

        def images_of(part: _Part) -> str:
            of = "held out of train" if part.purpose == "train" else f"of {part.purpose}"
            return f"{counted(counts[part.name], 'image')} {of}"

        chosen = self.choice and f". The best of each kind was chosen on {images_of(self.choice)}"
        about = (
            f"Heads were trained on {counted(counts['train'], 'image')} of train for "
            f"{counted(plan.epochs, 'epoch')} of {counted(plan.steps_per_epoch, 'step')}, batch "
            f"{plan.batch_size}{chosen or ''}, and measured once on {images_of(self.measured)}."
        )
        attentive = [c.config.num_heads for c in self.candidates if c.config and c.head == "attentive"]
        is_written = len(self.class_names) <= MAX_WRITTEN_CLASSES
        facts = {
            "num_classes": len(self.class_names),
            "class_names": list(self.class_names),
            "split_images": counts,
            "bad_images": opened.bad_counts(),
            "chosen_on": self.choice and self.choice.name,
            "schedule": {**plan._asdict(), "betas": list(config.resolved().betas)},
            "attentive_heads": attentive[0] if attentive else None,
            "per_class": {name: found.per_class for name, (_, found) in self.winners.items()},
            "confusion": {n: found.confusion for n, (_, found) in self.winners.items() if is_written},
            "grid": self.grid,
        }
        notes = (about, *verdict, *rate_notes(self.grid, config.resolved().lr), *source_notes(self.sources))
        return Result(verb="probe", rows=tuple(rows), notes=notes, facts=facts, rights=rights)

    def _readable(self, part: _Part) -> Int64[np.ndarray, " n"]:
        bad = [sample.sample for sample in self.opened.bad.get(part.purpose, (None, ()))[1]]
        return part.numbers[~np.isin(part.numbers, bad)]

    def save(self, out: Path, result: Result) -> None:
        """Write the winners as classifiers, all candidates to grid.csv, and the pictures."""
        from nextblock.visualize.evaluation import draw_attention, draw_confusion, draw_grid

        drawn, data = out / "figures", self.opened.data
        for name in ("figures", *get_args(HeadName)):  # delete those of a replaced result
            shutil.rmtree(out / name, ignore_errors=True)
        write_text(out / "grid.csv", write_csv(self.grid))
        draw_grid(self.grid, result.facts["chosen_on"], drawn / "probe.png")
        for name, (winner, found) in self.winners.items():
            assert winner.candidate.config is not None
            with seeded(0):  # the new head is replaced on the next line
                classifier = ImageClassifier(self.opened.model, winner.candidate.config, self.class_names)
            classifier.head = winner.head
            classifier.eval()
            save_classifier(out / name, classifier, data=data)
            if found.confusion is not None:
                title = f"{name} head, {self.measured.name}: top-1 {found.top1:.1%}"
                draw_confusion(found.confusion, self.class_names, title, drawn / f"confusion-{name}.png")
            if name == "ep":
                images, maps, names = self._attention(classifier)
                draw_attention(images, maps, drawn / "attention-ep.png", names=names)

    def _attention(self, classifier: ImageClassifier) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Images (b h w c), the attention maps of the ep head's queries (b q rows columns), class names."""
        data, size, readable = (
            self.opened.data,
            self.opened.model.config.image_size,
            self._readable(self.measured),
        )
        source = self.sources[self.measured.purpose].source
        chosen = readable[np.linspace(0, len(readable) - 1, min(DRAWN, len(readable)), dtype=int)]
        (batch,) = eval_batches(source, data, size, DRAWN, chosen)
        images = batch.images.to(self.opened.device)
        maps = attention_maps(classifier, normalize(images, data.mean, data.std))
        names = [source.class_names[source.labels[index]] for index in batch.samples.tolist()]
        return images.permute(0, 2, 3, 1).cpu().numpy(), maps.cpu().numpy(), names
