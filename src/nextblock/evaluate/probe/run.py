"""Probes: what a frozen encoder's features are worth to heads trained on them, honestly chosen.

Every image is encoded once; all heads of the grid are trained on the same features. The best of each kind is
chosen on images that it is not measured on, and measured once. The same encoder untrained, tiny images and a
colour histogram are probed the same way: without these numbers the first says little.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from nextblock.atomic import write_aside, write_text
from nextblock.checkpoint import save_classifier
from nextblock.config import pair
from nextblock.data import BadSample, TrainLoader, eval_batches, keyed_seed, normalize, resolve_workers
from nextblock.data.order import VisitOrder
from nextblock.data.sources import SubsetSource
from nextblock.data.transforms import TimmCrop
from nextblock.errors import UsageError
from nextblock.evaluate.evaluation import (
    BASELINES,
    MODEL,
    UNTRAINED,
    Evaluation,
    Result,
    Stopped,
    add_leads,
    evaluation,
)
from nextblock.evaluate.features import seeded
from nextblock.evaluate.metrics import Measures, Tally
from nextblock.evaluate.probe.heads import (
    Candidate,
    Grid,
    baseline_candidates,
    encoded,
    encoder_candidates,
    is_finite,
)
from nextblock.evaluate.probe.settings import HeadName, ProbeSettings
from nextblock.evaluate.results import identity_of
from nextblock.evaluate.settings import CROP_RATIO, CROP_SCALE
from nextblock.evaluate.splits import Labelled, hold_out, missing_note, open_labelled
from nextblock.evaluate.table import FeatureTable, check_bad, table_gb
from nextblock.evaluate.tables import Column, count, lead, number, share, write_csv
from nextblock.models.heads import Head, ImageClassifier, layer_words
from nextblock.settings import Duration, from_dict

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

STEP_OUT, ROUNDS = 2.0, 3
"""A grid whose best learning rate is at its end is extended by two rates, up to so many times."""
MAX_WRITTEN_CLASSES = 100
"""Confusions of more classes are drawn, and not written."""
LONG_S = 60.0
"""Heads that took longer than this to train are kept until the result is written."""
DRAWN = 4


def probe(**settings: Any) -> Result:
    """Train heads on a model's features and measure them; `settings` are the fields of `ProbeSettings`.

    Rows: encoder, head, split ("test" or "held-out"), images, top1 and its standard error, top5, balanced,
    calibration_error, loss, lr, weight_decay, layers, attention, tokens. Raises `UsageError` if `out` holds
    another result, labels are missing, another source has classes that train lacks, or all heads of a kind
    diverged; `Stopped` after a signal.
    """
    config = from_dict(ProbeSettings, settings)
    with evaluation(config) as opened:
        specs = {"train": config.train, "val": config.val, "test": config.test}
        sources = open_labelled(specs, opened.data)
        run = _Probe(opened, config, sources)
        of = {purpose: one.source for purpose, one in sources.items()}
        result = opened.result("probe", of, COLUMNS, run.measure, save=run.save)
        if run.states is not None and opened.group.is_main:
            shutil.rmtree(run.states, ignore_errors=True)
        return result


class _Part(NamedTuple):
    """Some images of a source, and what they are for."""

    name: str
    purpose: str
    numbers: Int64[np.ndarray, " n"]


class _Trained(NamedTuple):
    """Heads of one encoder that were trained, and how good each is on the images to choose on."""

    candidates: list[Candidate]
    heads: list[Head]
    scores: dict[int, Measures | None]
    """By the number of the head; None if there was nothing to choose. Diverged heads are missing."""


class _Probe:
    """A probe of open sources."""

    def __init__(self, opened: Evaluation, config: ProbeSettings, sources: dict[str, Labelled]) -> None:
        self.opened, self.config, self.sources = opened, config, sources
        self.class_names = sources["train"].source.class_names
        self.candidates = encoder_candidates(config, opened.model, len(self.class_names))
        self._divide()
        self.schedule = config.schedule(len(self.train.numbers))
        self.states = None if config.out is None else Path(config.out) / "heads"
        self.winners: dict[HeadName, tuple[Candidate, Head]] = {}
        self.confusions: dict[str, Sequence[Sequence[int]]] = {}
        self.grid: list[dict[str, Any]] = []
        self._tables: dict[str, FeatureTable] = {}
        self._bad: dict[str, dict[int, BadSample]] = {}

    # --------------------------------------------------------------------------------------------- the images

    def _divide(self) -> None:
        """Which images to train on, to choose on, and to measure on; none is held out without need."""
        config, train = self.config, self.sources["train"]
        numbers = np.arange(len(train.labels))

        def held_out(name: str, seed: int, share: float) -> _Part:
            nonlocal numbers
            kept, held = hold_out(train.labels[numbers], seed, share=share)
            if not len(held):
                raise UsageError(
                    f"no class of {config.train} has two images, so none can be held out; give --test and --val"
                )
            part = _Part(name, "train", numbers[held])
            numbers = numbers[kept]
            return part

        def given(purpose: str) -> _Part:
            return _Part(purpose, purpose, np.arange(len(self.sources[purpose].labels)))

        has_test = "test" in self.sources
        self.measured = given("test") if has_test else held_out("held-out", config.seed, 0.1)
        kinds = [one.head for one in self.candidates]
        self.choice: _Part | None = None
        if len(set(kinds)) == len(kinds):
            log.info("one candidate of each head: nothing to choose%s", ", val is not used" * bool(config.val))
        elif config.val is not None:
            self.choice = given("val")
        else:
            share = 0.1 if has_test else 1 / 9  # of what is left a tenth of all
            self.choice = held_out("choice", keyed_seed(config.seed, "probe choice"), share)
        self.train = _Part("train", "train", numbers)

    @property
    def _parts(self) -> list[_Part]:
        return [part for part in (self.train, self.choice, self.measured) if part is not None]

    def _note_bad(self, purpose: str, bad: Sequence[BadSample]) -> None:
        source, known = self.sources[purpose].source, self._bad.setdefault(purpose, {})
        known |= {one.sample: one for one in bad}
        found = tuple(known[sample] for sample in sorted(known))
        check_bad(found, source, self.opened.data)
        self.opened.bad[purpose] = (source, found)

    # ------------------------------------------------------------------------------------------- the features

    def _columns(self, candidates: Sequence[Candidate]) -> list[Any]:
        """The distinct features that heads see."""
        return list(dict.fromkeys(one.features for one in candidates))

    def _check_size(self) -> None:
        """Refuse to keep features that take more than `cache_gb`."""
        opened, config = self.opened, self.config
        extract, _ = opened.extract(MODEL, self._columns(self.candidates), config.seed)
        blank = torch.zeros(1, opened.data.channels, *pair(opened.model.config.image_size))
        with torch.no_grad():
            shapes = [tuple(one.shape[1:]) for one in extract(blank.to(opened.device))]
        images = sum(len(self.sources[purpose].labels) for purpose in {part.purpose for part in self._parts})
        gb = table_gb(shapes, images) * (2 if config.baselines else 1)
        if gb > config.cache_gb:
            raise UsageError(
                f"the features of {count(images, 'image')} would take {gb:.3g} GB, more than cache_gb "
                f"{config.cache_gb:g}; use --augment crop, which keeps none and encodes every epoch, or "
                "--heads linear --baselines false, or raise --cache_gb"
            )

    def _table(self, purpose: str, encoder: str, columns: list[Any]) -> FeatureTable:
        if purpose not in self._tables:
            numbers = [part.numbers for part in self._parts if part.purpose == purpose]
            self._tables[purpose] = self.opened.table(
                purpose,
                self.sources[purpose].source,
                encoder,
                columns,
                indices=np.sort(np.concatenate(numbers)),
                seed=self.config.seed,
            )
        return self._tables[purpose]

    def _lessons(
        self, encoder: str, columns: list[Any], start: int
    ) -> Iterator[tuple[tuple[Float[Tensor, "b ..."], ...], Int64[Tensor, " b"]]]:
        """Features and labels of training batches from a step on; unreadable images are left out."""
        opened, plan, numbers = self.opened, self.schedule, self.train.numbers
        labels = torch.from_numpy(self.sources["train"].labels)
        if self.config.augment == "none":
            table = self._table("train", encoder, columns)
            order = VisitOrder(len(numbers), seed=self.config.seed, batch_size=plan.batch_size)
            for step in range(start, plan.steps):
                opened.check_stop()
                some = table.readable(numbers[order.keys(step).samples])
                features = (table.read(some, kind) for kind in range(len(columns)))
                yield tuple(one.to(opened.device) for one in features), labels[some].to(opened.device)
            return
        source = self.sources["train"].source
        if len(numbers) < len(source):
            source = SubsetSource(source.spec, source, numbers)
        data = replace(opened.data, crop_scale=CROP_SCALE, crop_ratio=CROP_RATIO)
        size, seed = opened.model.config.image_size, self.config.seed
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
        extract, _ = opened.extract(encoder, columns, seed)
        batches = (next(step.micro_batches) for step in islice(loader, plan.steps - start))
        for features, samples, bad in encoded(opened, batches, extract):
            self._note_bad("train", [one._replace(sample=int(numbers[one.sample])) for one in bad])
            yield features, labels[numbers[samples.numpy()]].to(opened.device)

    def _features(
        self, part: _Part, encoder: str, columns: list[Any]
    ) -> Iterator[tuple[tuple[Float[Tensor, "b ..."], ...], Int64[np.ndarray, " b"]]]:
        """Features of the centre crops of a part's readable images, batch by batch, and their numbers."""
        opened = self.opened
        size = opened.settings.images_at_once(opened.device.type)
        if self.config.augment == "none":
            table = self._table(part.purpose, encoder, columns)
            numbers = table.readable(part.numbers)
            for start in range(0, len(numbers), size):
                some = numbers[start : start + size]
                yield tuple(table.read(some, k).to(opened.device) for k in range(len(columns))), some
            return
        source, group = self.sources[part.purpose].source, opened.group
        extract, _ = opened.extract(encoder, columns, self.config.seed)
        batches = eval_batches(
            source,
            opened.data,
            opened.model.config.image_size,
            size,
            part.numbers,
            resolve_workers(opened.data.workers, source, group.sharing_cores),
            group.rank,
            group.size,
        )
        for features, samples, bad in encoded(opened, batches, extract):
            self._note_bad(part.purpose, bad)
            yield features, samples.numpy()

    # ---------------------------------------------------------------------------------------------- the heads

    def _train(self, encoder: str, candidates: Sequence[Candidate], columns: list[Any], name: str) -> list[Head]:
        """Train heads side by side, from where a stopped probe left them."""
        opened, config, plan = self.opened, self.config, self.schedule
        dim = opened.model.config.embed_dim
        if candidates[0].config is None:
            extract, _ = opened.extract(encoder, (), config.seed)
            blank = torch.zeros(1, opened.data.channels, *pair(opened.model.config.image_size))
            dim = extract(blank)[0].shape[1]
        heads = [one.create(dim, len(self.class_names), config.seed).to(opened.device) for one in candidates]
        grid = Grid(heads, candidates, [columns.index(one.features) for one in candidates], config, plan)
        state, every = self._read_state(name), Duration.parse(config.save_every, allow=("min", "ep"))
        start = 0
        if state is not None:
            grid.load_state_dict(state["grid"])
            start = state["step"]
            for sample in state["bad"]:
                self._note_bad("train", [BadSample(*sample)])
        started_s = saved_s = time.monotonic()
        step = start
        try:
            for features, labels in self._lessons(encoder, columns, start):
                opened.group.step = step
                if len(labels) < 2:
                    log.warning("step %d skipped: fewer than 2 readable images, too few for batch norm", step)
                else:
                    grid.learn(features, labels, step)
                step += 1
                now_s = time.monotonic()
                is_due = (
                    now_s - saved_s >= 60 * every.value
                    if every.unit == "minutes"
                    else step % max(1, round(every.value * plan.steps_per_epoch)) == 0
                )
                if is_due and step < plan.steps:
                    saved_s = now_s
                    self._write_state(name, grid, step)
                    log.info("%s: step %d of %d of %s", encoder, step, plan.steps, count(len(heads), "head"))
        except Stopped:
            self._write_state(name, grid, step)
            raise
        if config.augment != "none" or time.monotonic() - started_s > LONG_S:
            self._write_state(name, grid, step)
        grid.finish()
        return heads

    def _state_key(self) -> str:
        of = {purpose: one.source for purpose, one in self.sources.items()}
        return json.dumps(identity_of(self.config, self.opened.model, self.opened.data, of), sort_keys=True)

    def _write_state(self, name: str, grid: Grid, step: int) -> None:
        if self.states is None or not self.opened.group.is_main:
            return
        self.states.mkdir(parents=True, exist_ok=True)
        learned = grid.state_dict(is_done=step == self.schedule.steps)
        bad = [tuple(one) for one in self._bad.get("train", {}).values()]
        state = {"key": self._state_key(), "grid": learned, "step": step, "bad": bad}
        with write_aside(self.states / name) as aside:
            torch.save(state, aside)

    def _read_state(self, name: str) -> dict[str, Any] | None:
        """What a stopped probe of the same identity left, on all ranks."""
        state = None
        with self.opened.group.together():
            if self.states is not None and self.opened.group.is_main and (self.states / name).is_file():
                state = torch.load(self.states / name, map_location="cpu", weights_only=True)
                if state["key"] != self._state_key() or self.config.overwrite:
                    state = None
        return self.opened.group.broadcast(state)

    def _measure(
        self,
        part: _Part,
        encoder: str,
        candidates: Sequence[Candidate],
        heads: Sequence[Head],
        columns: list[Any],
        *,
        confusion: bool,
    ) -> list[Measures | None]:
        """Measure heads on a part; None for one whose logits are not finite."""
        labels = torch.from_numpy(self.sources[part.purpose].labels)
        tallies: list[Tally | None] = [Tally(len(self.class_names), confusion=confusion) for _ in heads]
        with torch.no_grad():
            for features, numbers in self._features(part, encoder, columns):
                for i, (one, head, tally) in enumerate(zip(candidates, heads, tallies, strict=True)):
                    if tally is None or not len(numbers):
                        continue
                    logits = head(features[columns.index(one.features)])
                    if logits.isfinite().all():
                        tally.add(logits, labels[numbers])
                    else:
                        tallies[i] = None
        return [tally and tally.measures() for tally in tallies]

    def _compete(
        self, encoder: str, candidates: Sequence[Candidate], columns: list[Any], name: str
    ) -> _Trained:
        heads = self._train(encoder, candidates, columns, name)
        alive = [i for i, head in enumerate(heads) if is_finite(head)]
        if self.choice is None or not alive:
            return _Trained(list(candidates), heads, dict.fromkeys(alive))
        some = [candidates[i] for i in alive], [heads[i] for i in alive]
        found = self._measure(self.choice, encoder, *some, columns, confusion=False)
        scores = {i: one for i, one in zip(alive, found, strict=True) if one is not None}
        return _Trained(list(candidates), heads, scores)

    def _encoder(self, encoder: str, notes: list[str]) -> tuple[list[dict[str, Any]], list[Measures]]:
        """Train the heads of one encoder, choose the best, measure them: their rows."""
        started_s, config, self._tables = time.monotonic(), self.config, {}
        is_encoder = encoder in (MODEL, UNTRAINED)
        candidates = self.candidates if is_encoder else baseline_candidates(config)
        columns, slug = self._columns(candidates), encoder.replace(" ", "-")
        trained = self._compete(encoder, candidates, columns, f"{slug}.pt")
        # As many of the ranks' GPUs may round otherwise, rank 0 chooses for all.
        winners = self.opened.group.broadcast(choose(encoder, trained))
        for number in range(1, ROUNDS + 1):
            further = beyond(trained, winners, config) if config.lr is None else []
            if not further:
                break
            more = self._compete(encoder, further, columns, f"{slug}-{number}.pt")
            before = len(trained.candidates)
            trained.candidates.extend(more.candidates)
            trained.heads.extend(more.heads)
            trained.scores.update({before + i: score for i, score in more.scores.items()})
            winners = self.opened.group.broadcast(choose(encoder, trained))
        notes += _rate_notes(encoder, trained, winners, config)
        for i, one in enumerate(trained.candidates):
            score = trained.scores.get(i)
            values = {name: score and getattr(score, name) for name in ("top1", "top5", "loss")}
            states = {"is_winner": i in winners.values(), "is_diverged": i not in trained.scores}
            self.grid.append({"encoder": encoder, **one.row(), **values, **states})
        best = [trained.candidates[i] for i in winners.values()], [trained.heads[i] for i in winners.values()]
        measured = self._measure(self.measured, encoder, *best, columns, confusion=encoder == MODEL)
        rows = []
        for one, head, found in zip(*best, measured, strict=True):
            if found is None:
                raise UsageError(f"{_diverged(one.head, [one.lr])} on {self.measured.name}; use a lower --lr")
            log.info("%s, %s: top-1 %.1f %%", encoder, one.head, 100 * found.top1)
            rows.append({"encoder": encoder, **one.row(), "split": self.measured.name, **found.row()})
            rows[-1] |= {"epochs": self.schedule.epochs, "elapsed_s": time.monotonic() - started_s}
            if encoder == MODEL:
                self.winners[one.head] = (one, head)
                if found.confusion is not None:
                    self.confusions[one.head] = found.confusion
        return rows, [found for found in measured if found is not None]

    # --------------------------------------------------------------------------------------------- the result

    def measure(self) -> Result:
        """All encoders and baselines."""
        if self.config.augment == "none":
            self._check_size()
        baselines = [one for one in BASELINES if one == UNTRAINED or "linear" in self.config.heads]
        rows: list[dict[str, Any]] = []
        rights: list[Bool[np.ndarray, " n"]] = []
        notes: list[str] = []
        per_class: dict[str, Any] = {}
        for encoder in (MODEL, *(baselines if self.config.baselines else ())):
            found, measured = self._encoder(encoder, notes)
            rows += found
            rights += [one.right for one in measured]
            if encoder == MODEL:
                per_class = {
                    row["head"]: list(one.per_class) for row, one in zip(found, measured, strict=True)
                }
        verdict = add_leads(rows, rights, match=("head",))
        bad = {purpose: [one.sample for one in of] for purpose, (_, of) in self.opened.bad.items()}
        images = {
            part.name: int((~np.isin(part.numbers, bad.get(part.purpose, []))).sum()) for part in self._parts
        }
        plan, recipe = self.schedule, self.config.resolved()
        is_small = len(self.class_names) <= MAX_WRITTEN_CLASSES
        attentive = (one.config.num_heads for one in self.candidates if one.config and one.head == "attentive")
        facts = {
            "num_classes": len(self.class_names),
            "class_names": list(self.class_names),
            "images": images,
            "bad_images": self.opened.bad_counts(),
            "chosen_on": self.choice and self.choice.name,
            "resolved": {
                **plan._asdict(),
                "betas": list(recipe.betas),
                "bias": recipe.bias,
                "attentive_heads": next(attentive, None),
            },
            "per_class": per_class,
            "confusion": {k: [list(row) for row in v] for k, v in self.confusions.items()} if is_small else {},
            "grid": self.grid,
        }
        about = (
            f"Heads trained on {count(images['train'], 'image')} of train: {count(plan.epochs, 'epoch')} of "
            f"{count(plan.steps_per_epoch, 'step')}, batches of {plan.batch_size}. "
        )
        if self.choice is not None:
            of = "held out of train" if self.choice.name == "choice" else "of val"
            each = len(self.candidates) if self.config.lr else f"{len(self.candidates)} or more"
            about += f"The best of {each} was chosen on {count(images[self.choice.name], 'image')} {of}. "
        of = "of test" if self.measured.name == "test" else "held out of train"
        about += f"Measured once, on {count(images[self.measured.name], 'image')} {of}."
        return Result(
            verb="probe",
            rows=tuple(rows),
            notes=(about, *verdict, *notes, *missing_note(self.sources)),
            facts=facts,
        )

    def save(self, out: Path, result: Result) -> None:
        """Write the winners as classifiers, every candidate as grid.csv, and the pictures."""
        from nextblock.visualize.evaluation import draw_attention, draw_confusion, draw_grid

        drawn = out / "figures"
        shutil.rmtree(drawn, ignore_errors=True)
        for name in get_args(HeadName):
            shutil.rmtree(out / name, ignore_errors=True)
        write_text(out / "grid.csv", write_csv(self.grid))
        draw_grid(self.grid, result.facts["chosen_on"], drawn / "probe.png")
        for name, (one, head) in self.winners.items():
            assert one.config is not None
            with seeded(0):  # its own head is thrown away
                classifier = ImageClassifier(self.opened.model, one.config, self.class_names)
            classifier.head = head
            classifier.eval()
            save_classifier(out / name, classifier, data=self.opened.data)
            row = result.row(encoder=MODEL, head=name)
            if name in self.confusions:
                title = f"{name} head, {row['split']}: top-1 {row['top1']:.1%}"
                path = drawn / f"confusion-{name}.png"
                draw_confusion(self.confusions[name], self.class_names, title, path)
            if name == "ep":
                images, attention = self._attention(classifier)
                draw_attention(images, attention, drawn / "attention-ep.png")

    def _attention(self, classifier: ImageClassifier) -> tuple[Float[np.ndarray, "b h w c"], np.ndarray]:
        """A few measured images, and how each query of the ep head weighs their patches (b q rows columns)."""
        opened, part = self.opened, self.measured
        data, size = opened.data, pair(opened.model.config.image_size)
        source = self.sources[part.purpose].source
        bad = [one.sample for one in opened.bad.get(part.purpose, (None, ()))[1]]
        readable = part.numbers[~np.isin(part.numbers, bad)]
        chosen = readable[np.linspace(0, len(readable) - 1, min(DRAWN, len(readable)), dtype=int)]
        (batch,) = eval_batches(source, data, size, DRAWN, chosen)
        images = batch.images.to(opened.device)
        with torch.no_grad():
            # Of tokens "all" the head also weighs the class token; the picture shows the patches alone.
            classifier.head_config = replace(classifier.head_config, tokens="patches")
            weights = classifier.head.attention(  # type: ignore[operator]
                classifier.features(normalize(images, data.mean, data.std))
            )
        rows = round((weights.shape[-1] * size[0] / size[1]) ** 0.5)
        maps = weights.unflatten(-1, (rows, -1)).cpu().numpy()
        return images.permute(0, 2, 3, 1).cpu().numpy(), maps


def choose(encoder: str, trained: _Trained) -> dict[HeadName, int]:
    """The best candidate of each kind, by its number: highest top-1, then lowest loss, then the first.

    Raises `UsageError` if all heads of a kind diverged.
    """
    found: dict[HeadName, int] = {}
    for head in dict.fromkeys(one.head for one in trained.candidates):
        of_kind = [i for i, one in enumerate(trained.candidates) if one.head == head]
        alive = [i for i in of_kind if i in trained.scores]
        if not alive:
            rates = [trained.candidates[i].lr for i in of_kind]
            raise UsageError(f"{encoder}: {_diverged(head, rates)}; use a lower --lr")

        def rank(i: int) -> tuple[float, float]:
            score = trained.scores[i]
            return (0.0, 0.0) if score is None else (score.top1, -score.loss)

        found[head] = max(alive, key=rank)
    return found


def _diverged(head: str, rates: Sequence[float]) -> str:
    return f"the {head} head diverged at learning rate {', '.join(f'{lr:g}' for lr in dict.fromkeys(rates))}"


def beyond(
    trained: _Trained, winners: dict[HeadName, int], config: ProbeSettings
) -> list[Candidate]:
    """Two more learning rates for each winner whose rate is the smallest or largest that was tried."""
    further = []
    for head, i in winners.items():
        best, score = trained.candidates[i], trained.scores[i]
        if score is None or score.top1 == 1:
            continue
        rates = _rates(trained, head)
        new = []
        if best.lr == rates[-1]:
            new = [best.lr * STEP_OUT, best.lr * STEP_OUT**2]
        elif best.lr == rates[0]:
            new = [lr for lr in (best.lr / STEP_OUT, best.lr / STEP_OUT**2) if lr > config.end_lr]
        further += [replace(best, lr=lr) for lr in new]
    return further


def _rates(trained: _Trained, head: HeadName) -> list[float]:
    return sorted({one.lr for one in trained.candidates if one.head == head})


def _rate_notes(
    encoder: str, trained: _Trained, winners: dict[HeadName, int], config: ProbeSettings
) -> list[str]:
    """What to know about the learning rates of an encoder: extended, at the end of the grid, diverged."""
    notes, given = [], config.resolved().lr
    for head, i in winners.items():
        best, rates = trained.candidates[i].lr, _rates(trained, head)
        if len(rates) > len(given):
            notes.append(
                f"{encoder}, {head}: the best learning rate was at an end of the grid, which was extended to "
                f"{rates[0]:g} … {rates[-1]:g}; the best is {best:g}."
            )
        if len(rates) > 1 and best in (rates[0], rates[-1]):
            end, way = ("largest", "larger") if best == rates[-1] else ("smallest", "smaller")
            notes.append(
                f"{encoder}, {head}: the best learning rate, {best:g}, is the {end} tried; a {way} one may "
                "be better (--lr)."
            )
    diverged = [one for i, one in enumerate(trained.candidates) if i not in trained.scores]
    if diverged:
        rates = ", ".join(f"{lr:g}" for lr in sorted({one.lr for one in diverged}))
        notes.append(f"{encoder}: {count(len(diverged), 'head')} diverged, at learning rates {rates}.")
    return notes
