"""Few-shot evaluation: logistic regression on several random draws of k images per class, or of 1 %.

The model and its baselines learn from the same draws, so the choice of images does not favour either.
"""

from __future__ import annotations

import logging
import statistics
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from nextblock.data import Source, keyed_seed
from nextblock.data.subsets import draw_per_class, named, split
from nextblock.errors import UsageError
from nextblock.evaluate.evaluation import Evaluation, frozen_tables, labelled_evaluation
from nextblock.evaluate.metrics import accuracies
from nextblock.evaluate.results import Result, add_leads
from nextblock.evaluate.settings import FewshotSettings, Shots
from nextblock.evaluate.splits import Labelled, count_classes, source_notes
from nextblock.logs import counted
from nextblock.settings import from_dict
from nextblock.tables import Column, lead, number, share

log = logging.getLogger(__name__)

C_GRID, DEFAULT_C = (1e-3, 1e-2, 1e-1, 1.0, 10.0), 1.0
"""Inverse strengths of the L2 penalty to choose among, and the one used without cross-validation."""
MAX_ITERATIONS = 1000
MIN_THREADED_PRODUCTS = 10**9
"""Products of an iteration from which several threads are used."""


class TooFewImagesError(UsageError):
    """Some class has too few images for every requested number of labels."""


COLUMNS = (
    Column("encoder", "features"),
    Column("shots", "labels", lambda shots, _: shots if shots.endswith("%") else f"{shots} per class"),
    number("train_images", "images"),
    share("top1", "top-1 %"),
    share("balanced", "balanced %"),
    lead("the model's lead"),
)


def regress(
    features: Float[np.ndarray, "n d"], labels: Int64[np.ndarray, " n"], folds: int, seed: int
) -> Pipeline:
    """Fit a regression; choose C by cross-validation if every class has two images, else use `DEFAULT_C`.

    Features are standardised with the statistics of the images that each fit learns from.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(C=DEFAULT_C, max_iter=MAX_ITERATIONS))
    per_class = np.unique(labels, return_counts=True)[1]
    fewest = int(per_class.min())
    # Threads that wait for each other take most of the time of small products.
    threads = 1 if features.size * len(per_class) < MIN_THREADED_PRODUCTS else None
    with warnings.catch_warnings(), threadpool_limits(threads, user_api="blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)  # the caller counts these
        if fewest < 2:
            return model.fit(features, labels)
        # Each fold needs an image of every class. The search then fits the best C once more, on all images.
        parts = StratifiedKFold(min(folds, fewest), shuffle=True, random_state=seed)
        search = GridSearchCV(model, {"logisticregression__C": list(C_GRID)}, cv=parts)
        return search.fit(features, labels).best_estimator_


def draw_shots(source: Source, shots: Shots, seed: int) -> Int64[np.ndarray, " n"]:
    """Draw images of every class, or a share of each, sorted; `UsageError` if a class has too few."""
    of_all = len(source.class_names)
    if absent := _missing_classes(source, np.arange(len(source))):
        what = f"no image of {len(absent)} of its {of_all} classes ({named(absent, 3)})"
        raise UsageError(f"{source.spec!r} has {what}; use images of every class")
    if shots.per_class is not None:
        return draw_per_class(source, shots.per_class, seed)
    assert shots.share is not None
    part = f"{100 * shots.share:g}%"
    drawn = split(source, {part: shots.share}, seed, stratify=True)[part]
    if missing := _missing_classes(source, drawn):
        raise UsageError(
            f"{part} of {source.spec} leaves {len(missing)} of its {of_all} classes without an image "
            f"({named(missing, 3)}); use a larger share, or images of every class, such as 1"
        )
    return drawn


def _missing_classes(source: Source, drawn: Int64[np.ndarray, " n"]) -> list[str]:
    """Names of the classes without an image among those drawn."""
    present = set(source.labels[drawn].tolist())
    return [name for number, name in enumerate(source.class_names) if number not in present]


def fewshot(**settings: Any) -> Result:
    """Measure a model's features with few labels; `settings` are the fields of `FewshotSettings`.

    Rows: encoder, shots, train_images, top1 (mean over draws) and its standard error, balanced,
    draws (top-1 of each), top1_std (over draws), c (penalties), unconverged. The notes list skipped `shots`,
    for which a class has too few images. Raises `UsageError` if none is left, and like `knn`.
    """
    config = from_dict(FewshotSettings, settings)
    with labelled_evaluation(config) as (opened, sources):
        return opened.result("fewshot", sources, COLUMNS, lambda: _measure(opened, config, sources))


def _measure(opened: Evaluation, config: FewshotSettings, sources: Mapping[str, Labelled]) -> Result:
    train, test = sources["train"], sources["test"]
    seeds = [keyed_seed(config.seed, "few-shot draw", number) for number in range(config.draws)]
    draws, lacking = {}, []
    for text in config.shots:
        try:
            draws[text] = [draw_shots(train.source, Shots.parse(text), seed) for seed in seeds]
        except UsageError as error:
            fewest = np.bincount(train.labels, minlength=len(train.source.class_names)).min()
            most = "" if "%" in text or not fewest else f" (--shots {fewest})"
            lacking.append(f"Labels {text} not measured: {error}{most}")
    if not draws:
        raise TooFewImagesError("; ".join(lacking))
    drawn = np.unique(np.concatenate([indices for of_shots in draws.values() for indices in of_shots]))
    rows, rights, images = [], [], 0
    for encoder, tables in frozen_tables(opened, config, sources, train=drawn):
        train_table, table = tables["train"], tables["test"]
        readable = table.readable()
        queries, truth, images = table.read(readable).double().numpy(), test.labels[readable], len(readable)
        for text, of_shots in draws.items():
            fits, right, learned = [], [], []
            for draw, indices in enumerate(of_shots):
                opened.check_stop()
                few = train_table.readable(indices)
                if missing := _missing_classes(train.source, few):
                    raise UsageError(
                        f"labels {text}: no drawn image of {count_classes(missing)} of {config.train} is "
                        f"readable ({named(missing, 3)}); repair or remove unreadable images, use more "
                        "labels, or another --seed"
                    )
                # scikit-learn takes seeds of 32 bits.
                seed = keyed_seed(config.seed, "folds", draw) % 2**32
                fit = regress(train_table.read(few).double().numpy(), train.labels[few], config.folds, seed)
                fits.append(fit[-1])
                right.append(fit.predict(queries) == truth)
                learned.append(len(few))
            measured = [accuracies(of_draw, truth) for of_draw in right]
            top1 = [of_draw["top1"] for of_draw in measured]
            spread = statistics.stdev(top1) if len(top1) > 1 else None
            log.info("%s, labels %s: top-1 %.1f %%", encoder, text, 100 * statistics.fmean(top1))
            # Averaged over draws before they are paired, as the draws share their test images.
            rights.append(np.mean(right, axis=0))
            rows.append(
                {
                    "encoder": encoder,
                    "shots": text,
                    "train_images": statistics.mean(learned),
                    "top1": statistics.fmean(top1),
                    # The error of drawing labelled images; the test images are the same in all draws.
                    "top1_se": None if spread is None else spread / len(top1) ** 0.5,
                    "top1_std": spread,
                    "balanced": statistics.fmean(of_draw["balanced"] for of_draw in measured),
                    "draws": top1,
                    "c": [float(fit.C) for fit in fits],
                    "unconverged": sum(int(fit.n_iter_.max()) >= MAX_ITERATIONS for fit in fits),
                }
            )
    verdict = add_leads(rows, rights, match=("shots",))
    has_single = any(1 in np.bincount(train.labels[some]) for of_shots in draws.values() for some in of_shots)
    spread = f"mean of {config.draws} draws ± its standard error" if config.draws > 1 else "one draw"
    unconverged = sum(row["unconverged"] for row in rows)
    about = (
        f"Logistic regression: {spread}, on {counted(images, 'test image')}. The L2 penalty is chosen by "
        "cross-validation within the labelled images"
        + (f"; if a class has only one, C is {DEFAULT_C:g}." if has_single else ".")
        + (f" {counted(unconverged, 'fit')} stopped at {MAX_ITERATIONS:,} iterations." if unconverged else "")
    )
    facts = {
        "num_classes": len(train.source.class_names),
        "num_images": {"test": images},
        "bad_images": opened.bad_counts(),
    }
    notes = (about, *verdict, *lacking, *source_notes(sources))
    return Result(verb="fewshot", rows=tuple(rows), notes=notes, facts=facts, rights=rights)
