"""Probes: what a frozen encoder's features are worth to heads trained on them, honestly chosen.

The encoder runs once per batch and attention and feeds every head of the grid. Each head has its own
optimizer and clipping, so heads trained together are the heads trained alone. An untrained encoder and the
raw pixels are probed alongside: without those two numbers the third says little.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from nextblock.atomic import write_text
from nextblock.checkpoint import save_classifier
from nextblock.config import DataConfig, pair
from nextblock.data import BadSample, Source, keyed_seed
from nextblock.errors import UsageError
from nextblock.evaluate.directories import make_directory
from nextblock.evaluate.features import (
    Extract,
    encoder_extract,
    open_model,
    pixel_extract,
    seeded,
    untrained,
)
from nextblock.evaluate.probe.competition import Arena, Division, Found, Subject, compete
from nextblock.evaluate.probe.config import (
    EncoderName,
    HeadName,
    ProbeCandidate,
    ProbeConfig,
    ProbeResult,
    Split,
    recipe_of,
    result_from_dict,
    row_from_dict,
    warmup_epochs,
)
from nextblock.evaluate.probe.feature_cache import ABOUT_FILE, FILLING
from nextblock.evaluate.probe.grid import Candidate, encoder_candidates, has_choice, pixel_candidates
from nextblock.evaluate.probe.state import STATE_FILE, Progress, is_begun
from nextblock.evaluate.probe.tables import grid_csv, markdown
from nextblock.evaluate.results import differences, encoder_of, identity_of, refuse_other_result
from nextblock.evaluate.sources import (
    are_same_images,
    check_classes,
    hold_out,
    hold_out_test,
    open_labelled,
    part_of,
)
from nextblock.evaluate.unreadable import QUARANTINE, report_unreadable
from nextblock.models import EncoderModel
from nextblock.models.heads import FeatureConfig, ImageClassifier
from nextblock.settings import from_dict, to_dict
from nextblock.train.runtime import StopRequest, choose_device, stop_on_signals

__all__ = ["FIGURES_DIR", "Probed", "probe", "probe_model"]

log = logging.getLogger(__name__)

FIGURES_DIR = "figures"
"""Where in a probe's directory its pictures lie, drawn by who has the result."""
FEATURES_DIR = "features"
OURS = ("probe.md", "probe.csv", QUARANTINE, STATE_FILE, FIGURES_DIR, FEATURES_DIR, *get_args(HeadName))
BEGUN = (STATE_FILE, f"{FEATURES_DIR}/*/{ABOUT_FILE}", f"{FEATURES_DIR}/{FILLING}*")
"""What tells a probe that has no result yet."""
MAX_INDENTED_CLASSES = 100

Classifiers = dict[HeadName, ImageClassifier]


class Probed(NamedTuple):
    """A result, and the classifiers made of the probed encoder and its best heads."""

    result: ProbeResult
    classifiers: Classifiers
    bad: Mapping[str, tuple[BadSample, ...]]
    """Images that could not be read, by what their source is for."""


def probe(config: ProbeConfig) -> ProbeResult:
    """Train the heads, choose and measure the best, and write the result and their classifiers to `out`.

    A result that is there already is read, and one that was cut off is gone on with: `ProbeStopped` says that
    a signal did that. Raises `ValueError` where `out` holds another result, where labels are missing, or
    where the sources' classes differ.
    """
    model, data = open_model(config)
    others: dict[Split, str | None] = {"val": config.val, "test": config.test}
    train, given = open_labelled(config.train, others, data)
    candidates = encoder_candidates(config, model, len(train.class_names))
    division = _divide(config, candidates, train, given)
    identity = identity_of(config, model, data, division.sources)
    out = Path(config.out)
    if config.overwrite or not is_begun(out, identity):
        # What one with --overwrite was about to replace stays until that is done.
        refuse_other_result(out, "probe.json", identity, OURS, begun=BEGUN, overwrite=config.overwrite)
    if not config.overwrite and (there := _result_of(out, identity)):
        log.info("%s holds this very result", out)
        (out / STATE_FILE).unlink(missing_ok=True)  # of one that was killed just after writing
        return there
    with stop_on_signals() as stop:
        progress = Progress(
            out, identity, save_every=config.save_every, stop=stop, overwrite=config.overwrite
        )
        found = _probe(model, config, candidates, division, data, progress, out / FEATURES_DIR)
    report_unreadable(out, {name: (division.sources[name], bad) for name, bad in found.bad.items()})
    _write(out, found, data, identity)
    progress.remove()
    scratch = out / FEATURES_DIR
    if config.cache is None or not Path(config.cache).resolve().is_relative_to(scratch.resolve()):
        shutil.rmtree(scratch, ignore_errors=True)  # of one that was stopped, and went on with --cache
    return found.result


def _result_of(out: Path, identity: Mapping[str, Any]) -> ProbeResult | None:
    """The result of this very probe, if `out` holds it."""
    if not (out / "probe.json").is_file():
        return None
    values = json.loads((out / "probe.json").read_text(encoding="utf-8"))
    return None if differences(values, identity) else result_from_dict(values)


def probe_model(
    model: EncoderModel,
    config: ProbeConfig,
    train: Source,
    measured: Mapping[Split, Source],
    data: DataConfig,
) -> Probed:
    """Probe a model on open sources, without writing. The model is frozen and moved to the device."""
    candidates = encoder_candidates(config, model, len(train.class_names))
    division = _divide(config, candidates, train, measured)
    progress = Progress(None, {}, save_every=config.save_every, stop=StopRequest())
    with tempfile.TemporaryDirectory(prefix="nextblock-") as scratch:
        return _probe(model, config, candidates, division, data, progress, Path(scratch) / FEATURES_DIR)


# ------------------------------------------------------------------------------------------------ the images


def _divide(
    config: ProbeConfig, candidates: Sequence[Candidate], train: Source, given: Mapping[Split, Source]
) -> Division:
    """Which images to train on, to choose on, to measure on; nothing is held out that is not needed."""
    check_classes(train, given.values())
    numbers, measured = np.arange(len(train)), dict(given)
    if not given:
        numbers, held = hold_out_test(train, config.seed)
        measured["held-out"] = part_of(train, held)
    choice: tuple[Split, Source] | None = None
    if has_choice(candidates) and "val" in given and "test" in given:
        if are_same_images(given["val"], given["test"]):
            raise UsageError(
                f"val {given['val'].spec} and test {given['test'].spec} are the same images: the winner "
                "would be measured on the images it is chosen on; leave --val out"
            )
        choice = ("val", measured.pop("val"))
    elif has_choice(candidates):
        seed, share = keyed_seed(config.seed, "probe choice"), 0.1 if given else 1 / 9
        kept, held = hold_out(train.labels[numbers], seed, share=share)
        choice = ("choice", part_of(train, numbers[held]))
        numbers = numbers[kept]
        log.info(
            "%d images of %s are held out to choose among %d heads on, a tenth of every class",
            len(held),
            train.spec,
            len(candidates),
        )
    is_whole = len(numbers) == len(train)
    return Division(train if is_whole else part_of(train, numbers), choice, measured)


# ------------------------------------------------------------------------------------------------ the heads


def _probe(
    model: EncoderModel,
    config: ProbeConfig,
    candidates: tuple[Candidate, ...],
    division: Division,
    data: DataConfig,
    progress: Progress,
    scratch: Path,
) -> Probed:
    arena = Arena(
        config=config,
        division=division,
        data=data,
        image_size=pair(model.config.image_size),
        device=choose_device(config.device),
        progress=progress,
        scratch=scratch,
    )
    model.to(arena.device).eval().requires_grad_(requires_grad=False)
    found: list[Found] = []
    for number, subject in enumerate(_subjects(model, config, candidates, len(division.train.class_names))):
        if number < len(progress.finished):
            found.append(_found_before(progress.finished[number], subject))
            continue
        found.append(compete(subject, arena))
        progress.finish(_as_state(found[-1]))
    classifiers: Classifiers = {}
    for name, (number, head) in found[0].winners.items():
        head_config = candidates[number].config
        assert head_config is not None
        with seeded(0):  # its own head is thrown away
            classifier = ImageClassifier(model, head_config, division.train.class_names)
        classifier.head = head
        classifiers[name] = classifier.to(arena.device).eval()
    return Probed(_result(config, candidates, division, found), classifiers, found[-1].bad)


def _subjects(
    model: EncoderModel, config: ProbeConfig, candidates: tuple[Candidate, ...], num_classes: int
) -> Iterator[Subject]:
    yield _encoder_subject("trained", model, config, candidates, num_classes)
    if not config.baselines:
        return
    fresh = untrained(model, keyed_seed(config.seed, "untrained encoder"))
    yield _encoder_subject("untrained", fresh, config, candidates, num_classes)
    if "linear" in config.heads:
        height, width = pair(model.config.image_size)
        yield Subject(
            encoder="raw pixels",
            candidates=pixel_candidates(config),
            extract=lambda _: pixel_extract,
            origin=lambda: {"pixels": True},
            embed_dim=model.config.in_chans * height * width,
            num_classes=num_classes,
        )


def _encoder_subject(
    encoder: EncoderName,
    model: EncoderModel,
    config: ProbeConfig,
    candidates: tuple[Candidate, ...],
    num_classes: int,
) -> Subject:
    def extract(columns: Sequence[FeatureConfig | None]) -> Extract:
        wanted = [column for column in columns if column is not None]
        return encoder_extract(model, wanted, precision=config.precision, chunk=config.encode_batch_size)

    return Subject(
        encoder=encoder,
        candidates=candidates,
        extract=extract,
        origin=partial(encoder_of, model),
        embed_dim=model.config.embed_dim,
        num_classes=num_classes,
    )


# ----------------------------------------------------------------------------------------------- the result


def _result(
    config: ProbeConfig, candidates: Sequence[Candidate], division: Division, found: Sequence[Found]
) -> ProbeResult:
    train, bad = division.train, {name: len(of) for name, of in found[-1].bad.items()}
    attentive = (one.config for one in candidates if one.head == "attentive" and one.config is not None)
    resolved = {
        **to_dict(recipe_of(config)),
        "warmup_epochs": warmup_epochs(config),
        "official_warmup_trap": config.official_warmup_trap,
        "attentive_heads": next((one.num_heads for one in attentive), None),
    }
    return ProbeResult(
        rows=tuple(row for one in found for row in one.rows),
        grid=tuple(candidate for one in found for candidate in one.grid),
        num_classes=len(train.class_names),
        class_names=tuple(train.class_names),
        train_images=len(train) - bad["train"],
        split_images={name: len(source) for name, source in division.sources.items()},
        bad_images=bad,
        resolved=json.loads(json.dumps(resolved)),
    )


def _as_state(found: Found) -> dict[str, Any]:
    """What a state file may hold of what was found: text and tensors."""
    numbers = {
        "rows": list(map(to_dict, found.rows)),
        "grid": list(map(to_dict, found.grid)),
        "bad": found.bad,
    }
    heads = {name: (number, head.state_dict()) for name, (number, head) in found.winners.items()}
    return {"numbers": json.dumps(numbers), "heads": heads}


def _found_before(state: Mapping[str, Any], subject: Subject) -> Found:
    numbers = json.loads(state["numbers"])
    winners = {}
    for name, (number, weights) in state["heads"].items():
        head = subject.head(subject.candidates[number], seed=0)
        head.load_state_dict(weights)
        winners[name] = (number, head.eval())
    return Found(
        rows=tuple(map(row_from_dict, numbers["rows"])),
        grid=tuple(from_dict(ProbeCandidate, one) for one in numbers["grid"]),
        bad={name: tuple(BadSample(*one) for one in of) for name, of in numbers["bad"].items()},
        winners=winners,
    )


def _write(out: Path, found: Probed, data: DataConfig, identity: Mapping[str, Any]) -> None:
    make_directory(out)
    for name in get_args(HeadName):  # of an earlier result that is overwritten
        if name not in found.classifiers:
            shutil.rmtree(out / name, ignore_errors=True)
    for name, classifier in found.classifiers.items():
        save_classifier(out / name, classifier, data=data)
    write_text(out / "probe.md", markdown(found.result, identity))
    write_text(out / "probe.csv", grid_csv(found.result))
    indent = 2 if found.result.num_classes <= MAX_INDENTED_CLASSES else None
    text = json.dumps({**identity, **to_dict(found.result)}, indent=indent)
    write_text(out / "probe.json", text + "\n")
