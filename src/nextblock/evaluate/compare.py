"""Several ways to measure a model, or several models, in one table: kNN, few labels, trained heads.

Each source is encoded once for each model, for all methods together. With `out`, each method has a directory
of its own below it, OUT/MODEL/knn and so on: the same command again reads what is there.
"""

from __future__ import annotations

import re
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextblock.atomic import exclusive, write_text
from nextblock.data import open_source
from nextblock.evaluate.evaluation import MODEL, UNTRAINED, Result, evaluation
from nextblock.evaluate.features import pooled
from nextblock.evaluate.fewshot import fewshot
from nextblock.evaluate.knn import knn
from nextblock.evaluate.metrics import Tally, paired
from nextblock.evaluate.probe.heads import encoder_candidates
from nextblock.evaluate.probe.run import probe
from nextblock.evaluate.probe.settings import ProbeSettings
from nextblock.evaluate.settings import (
    DEFAULT_K,
    CompareSettings,
    EvalSettings,
    KnnSettings,
    ScoreSettings,
)
from nextblock.evaluate.splits import numbered, open_labelled
from nextblock.evaluate.tables import Column, count, difference, lead, share, write_csv
from nextblock.launch import find_world
from nextblock.settings import from_dict, to_dict

COLUMNS = (
    Column("model", "model"),
    Column("encoder", "features"),
    Column("method", "method"),
    share("top1", "top-1 %"),
    share("top5", "top-5 %"),
    share("balanced", "balanced %"),
    lead("the model's lead"),
    difference("to_first", "to the first model"),
)
SHARED = tuple(EvalSettings.__dataclass_fields__.keys() - {"model", "out", "cache"})


def compare(**settings: Any) -> Result:
    """Measure one model or several; `settings` are the fields of `CompareSettings`.

    Rows: model, encoder ("model" or a baseline), method, top1 and its standard error, top5, balanced, lead
    (of the model over a baseline), to_first (paired difference to the first model). Without `train` each
    model must be a classifier, whose accuracy on `test` is measured as it is.
    """
    config = from_dict(CompareSettings, settings)
    rows: list[dict[str, Any]] = []
    rights: list[np.ndarray] = []
    notes: list[str] = []
    with ExitStack() as stack:
        is_main = find_world().rank == 0
        if config.out is not None and is_main:
            stack.enter_context(exclusive(Path(config.out)))
        scratch = config.out or stack.enter_context(tempfile.TemporaryDirectory(prefix="nextblock-"))
        for number, model in enumerate(config.model):
            # Two models may end in the same name.
            name = f"{number}-{re.sub('[^A-Za-z0-9._-]+', '-', model)[-60:]}"
            out = Path(config.out) / name if config.out is not None else None
            found = _score(config, model) if config.train is None else _measure(config, model, out, scratch)
            for result in found:
                names = {"model": model} if len(config.model) > 1 else {}
                rows += [{**names, **row} for row in result.rows]
                rights += result.rights
                notes += result.notes
        _compare_with_first(rows, rights, config.model[0])
        result = Result(
            verb="eval",
            rows=tuple(rows),
            notes=tuple(dict.fromkeys(notes)),
            identity={"settings": to_dict(config)},
            columns=COLUMNS,
        )
        if config.out is not None and is_main:
            write_text(Path(config.out) / "eval.csv", write_csv(rows))
            write_text(Path(config.out) / "eval.md", result.markdown())
    return result


def _measure(config: CompareSettings, model: str, out: Path | None, scratch: str) -> list[Result]:
    """The results of all methods for one model, each with the rows that `compare` shows."""
    common = {name: getattr(config, name) for name in SHARED if name not in ("layers", "tokens")}
    common |= {"model": model, "train": config.train, "baselines": config.baselines, "seed": config.seed}
    common["cache"] = config.cache or f"{scratch}/features"
    heads = tuple(method for method in config.methods if method in ("linear", "attentive", "ep"))
    _encode(config, common, heads)
    found = []
    for method in config.methods:
        place = {"out": None if out is None else str(out / method)}
        if method == "knn":
            result = knn(**common, **place, test=config.test, k=(DEFAULT_K,))
            rows = [{**row, "method": f"kNN, k {row['k']}"} for row in result.rows]
        elif method == "fewshot":
            assert config.test is not None, "the settings are checked"
            result = fewshot(**common, **place, test=config.test, shots=(config.shots,))
            rows = [{**row, "method": f"{row['shots']} labels a class"} for row in result.rows]
        elif method == heads[0]:
            place = {"out": str((Path(scratch) if out is None else out) / "probe")}
            result = probe(**common, **place, test=config.test, heads=heads, epochs=config.epochs)
            rows = [{**row, "method": row["head"]} for row in result.rows]
        else:
            continue
        found.append(Result(verb=method, rows=tuple(rows), notes=result.notes[1:], rights=result.rights))
    return found


def _encode(config: CompareSettings, common: dict[str, Any], heads: tuple[str, ...]) -> None:
    """Encode all images once, for all methods together, into the cache that they share."""
    settings = KnnSettings(**common)
    with evaluation(settings) as opened:
        wanted = [pooled(settings, opened.model.config.depth)]
        sources = open_labelled({"train": config.train, "test": config.test}, opened.data)
        if heads:
            grid = ProbeSettings(**common, heads=heads)
            names = sources["train"].source.class_names
            of_heads = [one.features for one in encoder_candidates(grid, opened.model, len(names))]
            wanted += [one for one in dict.fromkeys(of_heads) if one is not None and one not in wanted]
        for encoder in (MODEL, UNTRAINED) if config.baselines else (MODEL,):
            for purpose, labelled in sources.items():
                opened.table(purpose, labelled.source, encoder, wanted, seed=config.seed)


def _score(config: CompareSettings, model: str) -> list[Result]:
    """The accuracy of a trained classifier as it is."""
    common = {name: getattr(config, name) for name in SHARED}
    settings = ScoreSettings(
        model=model, head=config.head, probe_layers=config.probe_layers, cache=config.cache, **common
    )
    assert config.test is not None, "the settings are checked"
    with evaluation(settings, classifier=True) as opened:
        source = open_source(config.test, opened.data)
        classifier = opened.classifier
        assert classifier is not None, "asked for"
        num_classes = classifier.head_config.num_classes
        truth = numbered(source, classifier.class_names, num_classes, config.classes)
        table = opened.logits("test", source)
        indices = table.readable()
        tally = Tally(num_classes, confusion=False)
        for some in np.split(indices, range(4096, len(indices), 4096)):
            tally.add(table.read(some), torch.from_numpy(truth[some]))
        opened.report_bad(None)
    measures = tally.measures()
    row = {"encoder": "model", "method": "its own classifier", **measures.row()}
    note = f"{count(len(indices), 'image')} of {source.spec}, as the classifier is: nothing was trained."
    return [Result(verb="eval", rows=(row,), notes=(note,), rights=(measures.right,))]


def _compare_with_first(rows: list[dict[str, Any]], rights: list[np.ndarray], first: str) -> None:
    """Give the rows of other models their paired difference to the first one's with the same method."""
    models = [(row, right) for row, right in zip(rows, rights, strict=True) if row["encoder"] == MODEL]
    theirs = {row["method"]: right for row, right in models if row.get("model", first) == first}
    for row, right in models:
        other = theirs.get(row["method"])
        if row.get("model", first) != first and other is not None and len(other) == len(right):
            row["to_first"], row["to_first_se"] = paired(right, other)
