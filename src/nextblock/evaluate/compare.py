"""Measure one model or several with kNN, few labels and trained heads, in one table.

For each model, each source is encoded once for all methods. With `out`, each method has its own directory,
OUT/MODEL/knn and so on, which repeating the command reads.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from nextblock.atomic import exclusive
from nextblock.config import pair
from nextblock.data import open_source
from nextblock.evaluate.evaluation import (
    MODEL,
    NOT_BETTER,
    NOT_SAVED,
    SATURATED,
    UNTRAINED,
    WHAT_TO_TRY,
    Result,
    Stopped,
    evaluation,
)
from nextblock.evaluate.features import pooled
from nextblock.evaluate.fewshot import TooFewImagesError, fewshot
from nextblock.evaluate.knn import knn
from nextblock.evaluate.metrics import Tally, paired
from nextblock.evaluate.probe.heads import encoder_candidates
from nextblock.evaluate.probe.run import probe
from nextblock.evaluate.probe.settings import HeadName, ProbeSettings
from nextblock.evaluate.settings import (
    DEFAULT_K,
    CompareSettings,
    EvalSettings,
    KnnSettings,
    ScoreSettings,
)
from nextblock.evaluate.splits import numbered, open_labelled
from nextblock.launch import find_world
from nextblock.logs import counted
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
    rows: list[dict[str, Any]] = []
    rights: list[np.ndarray] = []
    notes: list[str] = []
    num_classes = 0
    with ExitStack() as stack:
        is_main = find_world().rank == 0
        if config.out is not None and is_main:
            stack.enter_context(exclusive(Path(config.out)))
        scratch = config.out or stack.enter_context(tempfile.TemporaryDirectory(prefix="nextblock-"))
        for number, model in enumerate(config.model):
            # The number keeps two models with the same last name apart.
            name = f"{number}-{re.sub('[^A-Za-z0-9._-]+', '-', Path(model).name)}"
            measure = _score if config.train is None else _measure
            try:
                results = measure(config, model, Path(scratch) / name)
            except Stopped as error:
                if config.out is None and config.cache is None:  # scratch does not last
                    raise Stopped(error.signal, f"stopped by {error.signal.name}; {NOT_SAVED}") from error
                raise
            for result in results:
                num_classes = max(num_classes, result.facts.get("num_classes", 0))
                names = {"model": model} if len(config.model) > 1 else {}
                rows += [{**names, **row} for row in result.rows]
                rights += result.rights
                notes += [note for note in result.notes if not note.startswith((NOT_BETTER, SATURATED))]
        _compare_with_first(rows, rights, next(iter(config.model)))
        notes = [*_not_better(rows), *notes]
        result = Result(
            verb="eval",
            rows=tuple(rows),
            notes=tuple(dict.fromkeys(notes)),
            facts={"num_classes": num_classes},
            identity={"settings": to_dict(config)},
            columns=COLUMNS,
        )
        if config.out is not None and is_main:
            result.write(Path(config.out))
    return result


def _measure(config: CompareSettings, model: str, out: Path) -> list[Result]:
    """Measure one model with all methods; each result has the rows that `compare` shows."""
    common = {name: getattr(config, name) for name in SHARED if name not in ("layers", "tokens")}
    common |= {"model": model, "train": config.train, "baselines": config.baselines, "seed": config.seed}
    common["cache"] = config.cache or str(out / "features")
    heads: tuple[Any, ...] = tuple(method for method in config.methods if method in get_args(HeadName))
    # Few-shot may be impossible and then leaves no file; it encodes missing features itself.
    verbs = {"probe" if method in heads else method for method in config.methods} - {"fewshot"}
    files = {f"{verb}/{verb}.json" for verb in verbs}
    if not all((out / file).is_file() for file in files):
        _encode(config, common, heads)
    results = []
    parts = [method for method in config.methods if method not in heads[1:]]
    for method in config.methods:
        if method in parts:
            what = ", ".join(heads) if method in heads else method
            log.info("%s: %s (part %d of %d)", model, what, 1 + parts.index(method), len(parts))
        place = {"out": str(out / ("probe" if method in heads else method))}
        if method == "knn":
            result = knn(**common, **place, test=config.test, k=(DEFAULT_K,))
            rows = [{**row, "method": f"kNN, k {row['k']}"} for row in result.rows]
        elif method == "fewshot":
            try:
                result = fewshot(**common, **place, test=config.test, shots=(config.shots,))
            except TooFewImagesError as error:
                if config.methods == ("fewshot",):
                    raise
                results.append(Result(verb=method, rows=(), notes=(str(error),)))
                continue
            rows = [{**row, "method": f"{row['shots']} labels a class"} for row in result.rows]
        elif method in heads[:1]:
            result = probe(**common, **place, test=config.test, heads=heads, epochs=config.epochs)
            rows = [{**row, "method": row["head"]} for row in result.rows]
        else:
            continue
        numbers = {name: source["images"] for name, source in result.identity["sources"].items()}
        images = ", ".join(counted(number, f"{name} image") for name, number in numbers.items())
        # One probe trains all heads, encoder by encoder; the table groups its rows by head.
        order = sorted(range(len(rows)), key=lambda i: [*heads, None].index(rows[i].get("head")))
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


def _encode(config: CompareSettings, common: dict[str, Any], heads: tuple[Any, ...]) -> None:
    """Encode all images once, into the cache that the methods share."""
    settings = KnnSettings(**common)
    with evaluation(settings) as opened:
        wanted = [pooled(settings, opened.model.config.depth)]
        sources = open_labelled({"train": config.train, "test": config.test}, opened.data)
        if heads:
            grid = ProbeSettings(**common, heads=heads)
            names = sources["train"].source.class_names
            of_heads = [c.features for c in encoder_candidates(grid, opened.model, len(names))]
            wanted += [f for f in dict.fromkeys(of_heads) if f is not None and f not in wanted]
        for encoder in (MODEL, UNTRAINED) if config.baselines else (MODEL,):
            for purpose, labelled in sources.items():
                opened.table(purpose, labelled.source, encoder, wanted, seed=config.seed)


def _score(config: CompareSettings, model: str, out: Path) -> list[Result]:
    """Measure the accuracy of a trained classifier."""
    common = {name: getattr(config, name) for name in SHARED}
    cache = config.cache or (config.out and str(out / "features"))
    settings = ScoreSettings(
        model=model, head=config.head, probe_layers=config.probe_layers, cache=cache, **common
    )
    with evaluation(settings, classifier=True) as opened:
        source = open_source(config.test, opened.data)
        classifier = opened.classifier
        assert classifier is not None, "classifier=True opens one"
        num_classes = classifier.head_config.num_classes
        truth = numbered(source, classifier.class_names, num_classes, config.classes)
        table = opened.logits("test", source)
        indices = table.readable()
        tally = Tally(num_classes, confusion=False)
        for some in np.split(indices, range(4096, len(indices), 4096)):
            tally.add(table.read(some), torch.from_numpy(truth[some]))
        opened.report_bad(None)
    if config.cache is None:
        shutil.rmtree(out, ignore_errors=True)  # it contains only features
    measures = tally.measures()
    row = {"encoder": "model", "method": "its own classifier", **measures.row()}
    size, cut = pair(opened.model.config.image_size), opened.data
    note = (
        f"{counted(len(indices), 'image')} of {source.spec}; nothing was trained. Preprocessing: resize to "
        f"{cut.resize_px(size)} px (bicubic), {cut.val_crop} crop {size[0]}x{size[1]} px, mean "
        f"{typed(cut.mean)}, std {typed(cut.std)}."
    )
    facts = {"num_classes": num_classes}
    return [Result(verb="eval", rows=(row,), notes=(note,), facts=facts, rights=(measures.right,))]


def _not_better(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a sentence per model about the baselines that it does not beat by two standard errors."""
    for model in dict.fromkeys(row.get("model") for row in rows):
        unbeaten: dict[str, list[str]] = {}
        for row in rows:
            if row.get("model") == model and "lead" in row and row["lead"] <= 2 * row["lead_se"]:
                unbeaten.setdefault(row["encoder"], []).append(f"{row['method']} {100 * row['lead']:+.1f}")
        if unbeaten:
            which = " or ".join(f"{encoder} ({', '.join(points)})" for encoder, points in unbeaten.items())
            is_saturated = all(row["top1"] == 1 for row in rows if row.get("model") == model)
            note = SATURATED if is_saturated else f"{NOT_BETTER} {which}{WHAT_TO_TRY}"
            yield note if model is None else note.replace("The model", model, 1)


def _compare_with_first(rows: list[dict[str, Any]], rights: list[np.ndarray], first: str) -> None:
    """Add each model's paired difference to the first model with the same method to its rows."""
    models = [(row, right) for row, right in zip(rows, rights, strict=True) if row["encoder"] == MODEL]
    reference = {row["method"]: right for row, right in models if row.get("model", first) == first}
    for row, right in models:
        other = reference.get(row["method"])
        if row.get("model", first) != first and other is not None and len(other) == len(right):
            row["to_first"], row["to_first_se"] = paired(right, other)
