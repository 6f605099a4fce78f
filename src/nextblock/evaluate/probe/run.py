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

from nextblock.atomic import make_directory, write_aside, write_text
from nextblock.checkpoint import save_classifier
from nextblock.data import BadSample, Batch, TrainLoader, eval_batches, keyed_seed, normalize, resolve_workers
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
    labelled_evaluation,
)
from nextblock.evaluate.features import attention_maps
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
from nextblock.evaluate.results import add_leads
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
from nextblock.models.heads import ImageClassifier, layer_words
from nextblock.settings import from_dict, require
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
REPORT_EVERY_S, SAVE_EVERY_S = 30.0, 600.0
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
        self.image_size = opened.model.config.image_size
        self.candidates = encoder_candidates(config, opened.model, len(self.class_names))
        self.train, self.choice, self.measured = self._parts()
        self.parts = [part for part in (self.train, self.choice, self.measured) if part is not None]
        self.schedule = config.schedule(len(self.train.numbers))
        self.states = None if config.out is None else Path(config.out) / "heads"
        self.winners: dict[HeadName, tuple[Trained, Measures]] = {}
        self.grid: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.rights: list[Bool[np.ndarray, " n"]] = []

    def _parts(self) -> tuple[_Part, _Part | None, _Part]:
        """Images to train on, to choose on, and to measure on; held out of train only if necessary."""
        config, labels = self.config, self.sources["train"].labels
        numbers = np.arange(len(labels))

        def part(purpose: str, name: str, seed: int, share: float) -> _Part:
            nonlocal numbers
            if purpose in self.sources:
                return _Part(purpose, purpose, np.arange(len(self.sources[purpose].labels)))
            kept, held = hold_out(labels[numbers], seed, share=share)
            require(
                len(held) > 0,
                f"{config.train} has no class of two images to hold one out; give --test and --val",
            )
            numbers, held = numbers[kept], numbers[held]
            return _Part(name, "train", held)

        measured, choice = part("test", "held-out", config.seed, 0.1), None
        kinds = [candidate.head for candidate in self.candidates]
        # A single candidate of each kind needs no choice, so no images are held out for it.
        if len(set(kinds)) < len(kinds):
            share = 0.1 if "test" in self.sources else 1 / 9  # of the remaining 90 %, so a tenth of all
            choice = part("val", "choice", keyed_seed(config.seed, "probe choice"), share)
        elif config.val is not None:
            log.info("each kind of head has one candidate, so val is not used")
        return _Part("train", "train", numbers), choice, measured

    # ------------------------------------------------------------------------------------------- the features

    def _start(self, encoder: str, candidates: Sequence[Candidate]) -> None:
        """Prepare the features that the candidates see, from this encoder or baseline.

        With augment none, all images are encoded now; otherwise each batch is encoded when it is needed.
        """
        opened, config = self.opened, self.config
        self.columns = list(dict.fromkeys(candidate.features for candidate in candidates))
        wanted = [column for column in self.columns if column is not None]
        self.extract, origins = opened.extract(encoder, wanted, config.seed)
        self.shapes = feature_shapes(self.extract, opened.data, self.image_size, opened.device)
        self.tables: dict[str, FeatureTable] = {}
        if config.augment != "none":
            return
        images = sum(len(self.sources[purpose].labels) for purpose in {part.purpose for part in self.parts})
        # The untrained encoder's features take as much again.
        gb = 4e-9 * images * sum(map(math.prod, self.shapes)) * (1 + config.baselines)
        require(
            encoder != MODEL or gb <= config.cache_gb,
            f"the features of {counted(images, 'image')} take {gb:.3g} GB, more than cache_gb "
            f"{config.cache_gb:g}; use --augment crop, which encodes images again in every epoch, or "
            "--heads linear, or raise --cache_gb",
        )
        for purpose, labelled in self.sources.items():
            if needed := [part.numbers for part in self.parts if part.purpose == purpose]:
                indices = np.sort(np.concatenate(needed))
                self.tables[purpose] = opened.fill(purpose, labelled.source, self.extract, origins, indices)

    def _read(self, purpose: str, batches: Iterable[np.ndarray]) -> Iterator[FeatureBatch]:
        """Read the features of batches of indices from a table, without unreadable images."""
        table = self.tables[purpose]
        for batch in batches:
            self.opened.check_stop()
            some = table.readable(batch)
            kinds = range(len(self.columns))
            yield tuple(table.read(some, kind).to(self.opened.device) for kind in kinds), some

    def _encode(
        self, purpose: str, batches: Iterable[Batch], numbers: Int64[np.ndarray, " n"]
    ) -> Iterator[FeatureBatch]:
        """Encode each rank's share of the batches, and give all ranks all features.

        `numbers` maps the batches' sample numbers to indices in the source.
        """
        opened, group = self.opened, self.opened.group
        for batch in batches:
            opened.check_stop()
            features = features_of_batch(batch, self.extract, opened.data, opened.device, self.image_size)
            features = [kind[: len(batch.samples)] for kind in features]
            shares = group.gather((batch.samples, batch.bad, non_finite(tuple(features), batch)))
            if failures := [failure for _, _, failure in shares if failure]:
                raise NonFiniteFeaturesError(failures[0])
            if group.size > 1:
                lengths = [len(samples) for samples, *_ in shares]
                for kind, own in enumerate(features):
                    # Broadcast rank by rank: shares differ in size, which not all backends can gather.
                    features[kind] = whole = own.new_empty(sum(lengths), *own.shape[1:])
                    for rank, rows in enumerate(whole.split(lengths)):
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
        """Training batches from step `start`."""
        opened, plan, numbers, seed = self.opened, self.schedule, self.train.numbers, self.config.seed
        if self.tables:
            order = VisitOrder(len(numbers), seed=seed, batch_size=plan.batch_size)
            return self._read("train", (numbers[order.keys(s).samples] for s in range(start, plan.steps)))
        source, group = self.sources["train"].source, opened.group
        if len(numbers) < len(source):
            source = SubsetSource(source.spec, source, numbers)
        data = replace(opened.data, crop_scale=CROP_SCALE, crop_ratio=CROP_RATIO)
        is_timm = self.config.augment == "timm"
        loader = TrainLoader(
            source,
            data,
            image_size=self.image_size,
            seed=seed,
            batch_size=plan.batch_size,
            start_step=start,
            workers=resolve_workers(data.workers, source, group.sharing_cores),
            rank=group.rank,
            world_size=group.size,
            crop=TimmCrop(data=data, image_size=self.image_size, seed=seed) if is_timm else None,
        )
        steps = islice(loader, plan.steps - start)
        return self._encode("train", (next(step.micro_batches) for step in steps), numbers)

    def _centre_crops(self, part: _Part) -> Iterator[FeatureBatch]:
        """Batches of all images of a part, centre-cropped."""
        opened, source, numbers = self.opened, self.sources[part.purpose].source, part.numbers
        if self.tables:
            return self._read(part.purpose, np.split(numbers, range(MEASURED, len(numbers), MEASURED)))
        data, group = opened.data, opened.group
        at_once = opened.settings.images_at_once(opened.device.type)
        workers = resolve_workers(data.workers, source, group.sharing_cores)
        batches = eval_batches(
            source, data, self.image_size, at_once, numbers, workers, group.rank, group.size
        )
        return self._encode(part.purpose, batches, np.arange(len(source)))

    # ---------------------------------------------------------------------------------------------- the heads

    def _train(self, encoder: str, candidates: Sequence[Candidate]) -> list[Trained]:
        """Train heads side by side, resuming from a saved state."""
        opened, config, plan, group = self.opened, self.config, self.schedule, self.opened.group
        columns = [self.columns.index(candidate.features) for candidate in candidates]
        heads = [
            candidate.create(self.shapes[column][-1], len(self.class_names), config.seed).to(opened.device)
            for candidate, column in zip(candidates, columns, strict=True)
        ]
        grid, path, state, step = Grid(heads, candidates, columns, config, plan), None, None, 0
        if self.states is not None and group.is_main:
            # The file name is a hash of everything that these heads depend on.
            key = [opened.identity(self.sources), encoder, [c.row() for c in candidates]]
            text = json.dumps(key, sort_keys=True).encode()
            path = self.states / f"{hashlib.blake2b(text, digest_size=8).hexdigest()}.pt"
        with group.together():
            if path is not None and path.is_file():
                state = torch.load(path, map_location="cpu", weights_only=True)
        state = group.broadcast(state)
        if state is not None:
            step = state["step"]
            grid.load_state_dict(state["heads"])
            grid.optimizer.load_state_dict(state["optimizer"])
            self._note_bad("train", (BadSample(*values) for values in state["bad"]))

        def save() -> None:
            if path is not None and step:
                make_directory(path.parent)
                state = {
                    "step": step,
                    "heads": grid.state_dict(),
                    "optimizer": grid.optimizer.state_dict(),
                    "bad": [tuple(sample) for sample in opened.bad.get("train", (None, ()))[1]],
                }
                with write_aside(path) as aside:
                    torch.save(state, aside)

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
                if now_s - saved_s >= SAVE_EVERY_S:
                    saved_s = now_s
                    save()
        except Stopped:
            save()
            raise
        save()
        grid.finish()
        return [Trained(candidate, head) for candidate, head in zip(candidates, heads, strict=True)]

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

    def _compete(self, encoder: str) -> None:
        """Train the heads of one encoder or baseline, choose the best of each kind, and measure these."""
        started_s, config = time.monotonic(), self.config
        new = self.candidates if encoder in (MODEL, UNTRAINED) else baseline_candidates(config)
        self._start(encoder, new)
        trained: list[Trained] = []
        winners: dict[HeadName, int] = {}
        for _ in range(ROUNDS + 1):  # the grid, then its extensions
            more = self._train(encoder, new)
            if self.choice is not None:
                for item, score in zip(more, self._measure(self.choice, more), strict=True):
                    item.score, item.is_diverged = score, score is None
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
        for winner, found in zip(best, measured, strict=True):
            if found is None:
                raise UsageError(diverged(encoder, [winner.candidate]))
            log.info("%s, %s: top-1 %.1f %%", encoder, winner.candidate.head, 100 * found.top1)
            row = {"encoder": encoder, **winner.candidate.row(), "split": self.measured.name, **found.row()}
            row |= {"epochs": self.schedule.epochs, "elapsed_s": time.monotonic() - started_s}
            self.rows.append(row)
            self.rights.append(found.right)
            if encoder == MODEL:
                self.winners[winner.candidate.head] = (winner, found)

    # --------------------------------------------------------------------------------------------- the result

    def measure(self) -> Result:
        """Probe the model and its baselines."""
        config, plan = self.config, self.schedule
        for encoder in (MODEL, *(BASELINES if config.baselines else ())):
            if encoder in (MODEL, UNTRAINED) or "linear" in config.heads:
                self._compete(encoder)
        verdict = add_leads(self.rows, self.rights, match=("head",))
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
            "bad_images": self.opened.bad_counts(),
            "chosen_on": self.choice and self.choice.name,
            "schedule": {**plan._asdict(), "betas": list(config.resolved().betas)},
            "attentive_heads": attentive[0] if attentive else None,
            "per_class": {name: found.per_class for name, (_, found) in self.winners.items()},
            "confusion": {n: found.confusion for n, (_, found) in self.winners.items() if is_written},
            "grid": self.grid,
        }
        notes = (about, *verdict, *rate_notes(self.grid, config.resolved().lr), *source_notes(self.sources))
        return Result(verb="probe", rows=tuple(self.rows), notes=notes, facts=facts, rights=self.rights)

    def _readable(self, part: _Part) -> Int64[np.ndarray, " n"]:
        # Unreadable images are numbered in their source, of which a part may be only some.
        bad = [sample.sample for sample in self.opened.bad.get(part.purpose, (None, ()))[1]]
        return part.numbers[~np.isin(part.numbers, bad)]

    def save(self, out: Path, result: Result) -> None:
        """Write the winners as classifiers, all candidates to grid.csv, and the pictures."""
        from nextblock.visualize.evaluation import draw_attention, draw_confusion, draw_grid

        opened, figures = self.opened, out / "figures"
        for name in ("figures", *get_args(HeadName)):  # delete those of a replaced result
            shutil.rmtree(out / name, ignore_errors=True)
        write_text(out / "grid.csv", write_csv(self.grid))
        draw_grid(self.grid, result.facts["chosen_on"], figures / "probe.png")
        for name, (winner, found) in self.winners.items():
            config = winner.candidate.config
            assert config is not None, "only baselines have none"
            classifier = ImageClassifier(opened.model, config, self.class_names, head=winner.head).eval()
            save_classifier(out / name, classifier, data=opened.data)
            if found.confusion is not None:
                title = f"{name} head, {self.measured.name}: top-1 {found.top1:.1%}"
                draw_confusion(found.confusion, self.class_names, title, figures / f"confusion-{name}.png")
            if name == "ep":
                source, readable = self.sources[self.measured.purpose].source, self._readable(self.measured)
                drawn = readable[np.linspace(0, len(readable) - 1, min(DRAWN, len(readable)), dtype=int)]
                (batch,) = eval_batches(source, opened.data, self.image_size, DRAWN, drawn)
                images = batch.images.to(opened.device)
                maps = attention_maps(classifier, normalize(images, opened.data.mean, opened.data.std))
                names = [source.class_names[source.labels[index]] for index in batch.samples.tolist()]
                pictures = images.permute(0, 2, 3, 1).cpu().numpy()
                draw_attention(pictures, maps.cpu().numpy(), figures / "attention-ep.png", names=names)
