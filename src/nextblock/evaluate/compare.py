"""Measure one model or several with kNN, few labels and trained heads, in one table.

For each model, each source is encoded once for all methods. With `out`, each method has its own directory,
OUT/MODEL/knn and so on (OUT/MODEL/score for a classifier), which repeating the command reads.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import numpy as np

from nextblock.atomic import exclusive
from nextblock.checkpoint import digest_of
from nextblock.config import pair
from nextblock.evaluate.classify import measure_logits
from nextblock.evaluate.evaluation import NOT_SAVED, Stopped, evaluation, labelled_evaluation
from nextblock.evaluate.features import pooled
from nextblock.evaluate.fewshot import TooFewImagesError, fewshot
from nextblock.evaluate.knn import knn
from nextblock.evaluate.metrics import paired
from nextblock.evaluate.probe.heads import encoder_candidates
from nextblock.evaluate.probe.run import probe
from nextblock.evaluate.probe.settings import HeadName, ProbeSettings
from nextblock.evaluate.results import (
    FORMAT_VERSION,
    FREE_SETTINGS,
    MODEL,
    NOT_BETTER,
    SATURATED,
    UNTRAINED,
    Result,
    not_better,
    read_result,
)
from nextblock.evaluate.settings import DEFAULT_K, CompareSettings, EvalSettings, KnnSettings, ScoreSettings
from nextblock.evaluate.splits import classifier_labels
from nextblock.launch import find_world
from nextblock.logs import counted, label_words
from nextblock.settings import from_dict, require, to_dict, typed
from nextblock.tables import Column, difference, end_of, lead, share

log = logging.getLogger(__name__)

COLUMNS = (
    Column("model", "model", lambda name, _: end_of(name or "", 32)),
    Column("encoder", "features"),
    Column("method", "method"),
    share("top1", "top-1 %"),
    share("top5", "top-5 %"),
    share("balanced", "balanced %"),
    lead("the model's lead"),
    difference("to_first", "lead over the first model"),
)
SHARED = tuple(EvalSettings.__dataclass_fields__.keys() - {"model", "out", "cache"})


def compare(**settings: Any) -> Result:
    """Measure one model or several; `settings` are the fields of `CompareSettings`.

    Rows: model, encoder ("model" or a baseline), method, top1 and its standard error, top5, balanced, lead
    (of the model over a baseline), to_first (paired difference to the first model). Without `train`, each
    model must be a classifier; its accuracy on `test` is measured and nothing is trained.
    """
    config = from_dict(CompareSettings, settings)
    require(
        config.train is None or config.out is not None or find_world().size == 1,
        "several processes share features through files; give --out on a disk that all of them see",
    )
    # The number keeps two models with the same last name apart.
    names = [
        f"{number}-{re.sub('[^A-Za-z0-9._-]+', '-', Path(model).name)}"
        for number, model in enumerate(config.model)
    ]
    # Each method checks weights and images in its own directory, so names and settings suffice here.
    settings = {name: value for name, value in to_dict(config).items() if name not in FREE_SETTINGS}
    identity = {"format_version": FORMAT_VERSION, "settings": settings, "models": names}
    if config.out is not None:
        read_result(Path(config.out), "eval", identity, overwrite=config.overwrite)
    rows: list[dict[str, Any]] = []
    verdicts: list[str] = []
    notes: list[str] = []
    num_classes = 0
    first: dict[str, np.ndarray] = {}  # by method, how the first model does on each image
    with ExitStack() as stack:
        is_main = find_world().rank == 0
        if config.out is not None and is_main:
            stack.enter_context(exclusive(Path(config.out)))
        scratch = config.out or stack.enter_context(tempfile.TemporaryDirectory(prefix="nextblock-"))
        for model, name in zip(config.model, names, strict=True):
            measure = _score if config.train is None else _measure
            try:
                results = measure(config, model, Path(scratch) / name)
            except Stopped as error:
                if config.out is None and config.cache is None:  # scratch does not last
                    raise Stopped(error.signal, f"stopped by {error.signal.name}; {NOT_SAVED}") from error
                raise
            own = [row for result in results for row in result.rows]
            rights = [right for result in results for right in result.rights]
            for row, right in zip(own, rights, strict=True):
                if row["encoder"] == MODEL:
                    # The first model is entered here; each later one is compared with it.
                    other = first.setdefault(row["method"], right)
                    if other is not right and len(other) == len(right):
                        row["to_first"], row["to_first_se"] = paired(right, other)
            verdict = _verdict(own)
            if len(config.model) > 1:
                own = [{"model": model, **row} for row in own]
                verdict = [note.replace("The model", model, 1) for note in verdict]
            rows += own
            verdicts += verdict
            for result in results:
                num_classes = max(num_classes, result.facts.get("num_classes", 0))
                notes += [note for note in result.notes if not note.startswith((NOT_BETTER, SATURATED))]
        result = Result(
            verb="eval",
            rows=tuple(rows),
            notes=tuple(dict.fromkeys([*verdicts, *notes])),
            facts={"num_classes": num_classes},
            identity=identity,
            columns=COLUMNS,
        )
        if config.out is not None and is_main:
            result.write(Path(config.out))
    return result


def _verdict(rows: list[dict[str, Any]]) -> list[str]:
    """The sentence about baselines that a model does not beat by two standard errors, if there are any."""
    unbeaten: dict[str, str] = {}
    for row in rows:
        if "lead" in row and row["lead"] <= 2 * row["lead_se"]:
            before = f"{unbeaten[row['encoder']]}, " if row["encoder"] in unbeaten else ""
            unbeaten[row["encoder"]] = f"{before}{row['method']} {100 * row['lead']:+.1f}"
    return not_better(unbeaten, is_saturated=all(row["top1"] == 1 for row in rows))


def _measure(config: CompareSettings, model: str, out: Path) -> list[Result]:
    """Measure one model with all methods; each result has the rows that `compare` shows."""
    common = {name: getattr(config, name) for name in (*SHARED, "train", "test", "baselines", "seed")}
    common |= {"model": model, "cache": config.cache or str(out / "features")}
    # One probe trains all heads, in the place of the first of them.
    heads: tuple[Any, ...] = tuple(method for method in config.methods if method in get_args(HeadName))
    parts = [method for method in config.methods if method not in heads[1:]]
    places = {method: out / ("probe" if method in heads else method) for method in parts}
    # Few-shot may be impossible and then leaves no file; it encodes missing features itself.
    files = [place / f"{place.name}.json" for method, place in places.items() if method != "fewshot"]
    if not all(file.is_file() for file in files):
        _encode(common, heads)
    results = []
    for number, (method, place) in enumerate(places.items(), start=1):
        what = ", ".join(heads) if method in heads else method
        log.info("%s: %s (part %d of %d)", model, what, number, len(parts))
        common["out"] = str(place)
        if method == "knn":
            result = knn(**common, k=(DEFAULT_K,))
            names = [f"kNN, k {row['k']}" for row in result.rows]
        elif method == "fewshot":
            try:
                result = fewshot(**common, shots=(config.shots,))
            except TooFewImagesError as error:
                if config.methods == ("fewshot",):
                    raise
                results.append(Result(verb=method, rows=(), notes=(str(error),)))
                continue
            names = [label_words(row["shots"]) for row in result.rows]
        else:
            result = probe(**common, heads=heads, epochs=config.epochs)
            names = [row["head"] for row in result.rows]
        rows = [{**row, "method": name} for row, name in zip(result.rows, names, strict=True)]
        # A probe's rows come encoder by encoder; the table groups them by head.
        order = sorted(range(len(rows)), key=lambda i: (*heads, None).index(rows[i].get("head")))
        sources = result.identity["sources"].items()
        images = ", ".join(counted(source["images"], f"{name} image") for name, source in sources)
        results.append(
            Result(
                verb=method,
                rows=tuple(rows[i] for i in order),
                notes=(f"{images}.", *result.notes[1:]),
                facts={"num_classes": result.facts["num_classes"]},
                rights=[result.rights[i] for i in order],
            )
        )
    if config.cache is None:
        shutil.rmtree(out / "features", ignore_errors=True)
    return results


def _encode(common: dict[str, Any], heads: tuple[Any, ...]) -> None:
    """Encode all images once, into the cache that the methods share."""
    settings = KnnSettings(**common)
    with labelled_evaluation(settings) as (opened, sources):
        wanted = {pooled(settings, opened.model.config.depth): None}
        if heads:
            grid, names = ProbeSettings(**common, heads=heads), sources["train"].source.class_names
            candidates = encoder_candidates(grid, opened.model, len(names))
            wanted |= {one.features: None for one in candidates if one.features is not None}
        for encoder in (MODEL, UNTRAINED) if settings.baselines else (MODEL,):
            for purpose, labelled in sources.items():
                opened.table(purpose, labelled.source, encoder, list(wanted), seed=settings.seed)


def _score(config: CompareSettings, model: str, out: Path) -> list[Result]:
    """Measure the accuracy of a trained classifier."""
    common = {name: getattr(config, name) for name in (*SHARED, "head", "probe_layers", "cache")}
    place = config.out and str(out / "score")
    with evaluation(ScoreSettings(**common, model=model, out=place)) as opened:
        source, classifier = opened.open_source(config.test), opened.classifier
        assert classifier is not None, "score settings open one"
        num_classes = classifier.head_config.num_classes
        labels = classifier_labels(source, classifier.class_names, num_classes, config.classes)

        def measure() -> Result:
            measures = measure_logits(opened.logits("test", source), labels, num_classes)
            row = {"encoder": MODEL, "method": "its own classifier", **measures.row()}
            size, cut = pair(opened.model.config.image_size), opened.data
            note = (
                f"{counted(measures.images, 'image')} of {source.spec}; nothing was trained. Preprocessing: "
                f"resize to {cut.resize_px(size)} px (bicubic), {cut.val_crop} crop {size[0]}x{size[1]} px, "
                f"mean {typed(cut.mean)}, std {typed(cut.std)}."
            )
            facts = {"num_classes": num_classes}
            return Result(verb="score", rows=(row,), notes=(note,), facts=facts, rights=(measures.right,))

        classes = hashlib.sha256(labels.tobytes()).hexdigest()[:16]
        made_from = {"classifier": digest_of(classifier), "classes": classes}
        return [opened.result("score", {"test": source}, COLUMNS, measure, made_from=made_from)]
