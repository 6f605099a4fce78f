"""How good features are with few labels: logistic regression on several draws of k images a class, or 1 %.

The features are computed once. An encoder, its untrained twin and the raw pixels learn from the same images,
so that their differences are not those of the draw.
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.preprocessing import StandardScaler

from nextblock.data import Source, keyed_seed
from nextblock.data.subsets import draw_per_class, split
from nextblock.errors import UsageError
from nextblock.evaluate.features import Features
from nextblock.evaluate.fewshot_config import (
    C_GRID,
    DEFAULT_C,
    FewshotConfig,
    FewshotResult,
    FewshotRow,
    Shots,
)
from nextblock.evaluate.frozen import (
    Opened,
    Subject,
    feature_config,
    markdown_table,
    measured,
    open_all,
    subjects,
)
from nextblock.evaluate.measures import Measures, Tally
from nextblock.evaluate.probe.config import EncoderName

__all__ = ["Regression", "comparison", "draw_shots", "fewshot", "fewshot_opened", "regress", "summary"]

log = logging.getLogger(__name__)

MAX_ITERATIONS = 1000
TEST_ROWS = 4096
"""So many images of the test at a time are widened to fp64."""


# ---------------------------------------------------------------------------------------------- regression


class Regression(NamedTuple):
    """A logistic regression on standardised features, ready to tell log-probabilities."""

    scaler: StandardScaler
    basis: Float64[np.ndarray, "d r"] | None
    """Orthonormal directions that the labelled images span, where they are fewer than the channels."""
    model: LogisticRegression
    chosen: bool
    """Whether C was chosen by cross-validation."""

    @property
    def c(self) -> float:
        """Inverse strength of the penalty."""
        return float(self.model.C)

    @property
    def converged(self) -> bool:
        """Whether the solver stopped by itself."""
        return int(self.model.n_iter_.max()) < MAX_ITERATIONS

    def log_p(self, features: Float64[np.ndarray, "q d"]) -> Float64[np.ndarray, "q classes"]:
        """Log-probabilities of the classes that were learned, in rising order."""
        standard = np.asarray(self.scaler.transform(features))
        margin = self.model.decision_function(standard if self.basis is None else standard @ self.basis)
        # scikit-learn gives two classes one number, and its own logarithm of a probability of 0 warns.
        logits = np.stack([np.zeros_like(margin), margin], axis=1) if margin.ndim == 1 else margin
        return torch.from_numpy(logits).log_softmax(dim=1).numpy()


def regress(
    features: Float64[np.ndarray, "n d"], labels: Int64[np.ndarray, " n"], folds: int, seed: int
) -> Regression:
    """Learn from few labelled images; C by cross-validation where every class has two, else `DEFAULT_C`.

    The features are standardised by these images' own mean and deviation. Where there are fewer images than
    channels, the regression runs in the span of the images, which holds the solution of an L2 penalty: the
    same function, sooner. Of equally good penalties the strongest is taken.
    """
    scaler = StandardScaler().fit(features)
    standard, basis = np.asarray(scaler.transform(features)), None
    if len(features) < features.shape[1]:
        basis = np.linalg.qr(standard.T).Q
        standard = standard @ basis
    _, numbers = np.unique(labels, return_counts=True)
    model = LogisticRegression(C=DEFAULT_C, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told by `converged`
        if numbers.min() < 2:
            return Regression(scaler, basis, model.fit(standard, labels), chosen=False)
        parts = StratifiedKFold(min(folds, int(numbers.min())), shuffle=True, random_state=seed)
        search = GridSearchCV(model, {"C": list(C_GRID)}, cv=parts).fit(standard, labels)
    return Regression(scaler, basis, search.best_estimator_, chosen=True)


# ------------------------------------------------------------------------------------------------ the draws


def draw_shots(source: Source, shots: Shots, seed: int) -> Int64[np.ndarray, " n"]:
    """Draw so many images of every class, or such a share of each, in rising order.

    Raises `ValueError` where a class has too few.
    """
    if shots.per_class is not None:
        return draw_per_class(source, shots.per_class, seed)
    assert shots.share is not None
    drawn = split(source, {"few": shots.share}, seed, stratify=True)["few"]
    number = np.bincount(source.labels[drawn], minlength=len(source.class_names))
    missing = [name for name, count in zip(source.class_names, number, strict=True) if not count]
    if missing:
        raise UsageError(
            f"{shots.share:.4%} of {source.spec} leaves {len(missing)} of its {len(number)} classes without "
            f"an image ({', '.join(missing[:3])}); use a larger share, or images per class, such as 1"
        )
    return drawn


def _draws(source: Source, config: FewshotConfig) -> dict[str, list[Int64[np.ndarray, " n"]]]:
    """By shots, the images of each of the draws."""
    seeds = [keyed_seed(config.seed, "few-shot draw", number) for number in range(config.seeds)]
    return {text: [draw_shots(source, Shots.parse(text), seed) for seed in seeds] for text in config.shots}


# ------------------------------------------------------------------------------------------- the evaluation


def fewshot(config: FewshotConfig) -> FewshotResult:
    """Measure a model with few labels; write fewshot.json, fewshot.csv and fewshot.md where `out` is given.

    Raises `ValueError` where `out` holds another result, labels are missing, the classes differ, or a class
    has too few images.
    """
    opened = open_all(config, {"test": config.test})
    return measured(opened, config, "fewshot", fewshot_opened, _markdown)


def fewshot_opened(opened: Opened, config: FewshotConfig) -> FewshotResult:
    """Measure an open model on open sources, "train" and "test"."""
    started_at_s = time.perf_counter()
    draws = _draws(opened.sources["train"], config)
    drawn = np.unique(np.concatenate([numbers for of_shots in draws.values() for numbers in of_shots]))
    rows: list[FewshotRow] = []
    features: dict[str, Features] = {}
    for subject in subjects(opened, config, {"train": drawn}):
        features = subject.features
        rows += [_row(subject, text, of_shots, opened, config) for text, of_shots in draws.items()]
    return FewshotResult(
        rows=tuple(rows),
        num_classes=len(opened.sources["train"].class_names),
        measured_images=len(features["test"].samples),
        layers=feature_config(config, opened.model.config).layers,
        bad_images={purpose: len(found.bad) for purpose, found in features.items()},
        elapsed_s=time.perf_counter() - started_at_s,
    )


def _row(
    subject: Subject,
    shots: str,
    draws: list[Int64[np.ndarray, " n"]],
    opened: Opened,
    config: FewshotConfig,
) -> FewshotRow:
    """Learn from every draw, and sum up what that gave."""
    known, source = subject.features["train"], opened.sources["train"]
    fits, found, numbers = [], [], []
    for number, drawn in enumerate(draws):
        rows = np.flatnonzero(np.isin(known.samples.numpy(), drawn))
        labels = source.labels[known.samples[rows].numpy()]
        _check_classes(labels, source, shots)
        few = known.features[0][rows].double().numpy()
        fits.append(regress(few, labels, config.folds, keyed_seed(config.seed, "folds", number) % 2**32))
        found.append(_measure(fits[-1], subject.features["test"], opened.sources["test"]))
        numbers.append(len(rows))
    top1 = tuple(one.top1 for one in found)
    log.info("%s, shots %s: top-1 %.2f %%", subject.encoder, shots, 100 * statistics.fmean(top1))
    return FewshotRow(
        encoder=subject.encoder,
        shots=shots,
        train_images=statistics.fmean(numbers),
        top1=statistics.fmean(top1),
        top1_std=statistics.stdev(top1) if len(top1) > 1 else None,
        top5=statistics.fmean(one.top5 for one in found),
        balanced=statistics.fmean(one.balanced for one in found),
        draws=top1,
        c=tuple(fit.c for fit in fits),
        chosen=all(fit.chosen for fit in fits),
        unconverged=sum(not fit.converged for fit in fits),
    )


def _check_classes(labels: Int64[np.ndarray, " n"], source: Source, shots: str) -> None:
    """Refuse a draw of which a class could not be read at all."""
    missing = sorted(set(range(len(source.class_names))) - set(labels.tolist()))
    if missing:
        names = ", ".join(source.class_names[label] for label in missing[:3])
        raise UsageError(
            f"shots {shots}: of {len(missing)} classes ({names}) no drawn image of {source.spec} could be "
            "read; repair or remove the unreadable ones, use more shots, or another --seed"
        )


def _measure(fit: Regression, features: Features, source: Source) -> Measures:
    tally = Tally(len(source.class_names), confusion=False)
    truth = torch.from_numpy(source.labels)[features.samples]
    for some, labels in zip(features.features[0].split(TEST_ROWS), truth.split(TEST_ROWS), strict=True):
        tally.add(torch.from_numpy(fit.log_p(some.double().numpy())), labels)
    return tally.measures()


# --------------------------------------------------------------------------------------------- what is said


def summary(result: FewshotResult) -> str:
    """Say what the numbers are, and what they rest on."""
    first = [row for row in result.rows if row.encoder == result.rows[0].encoder]
    number = len(first[0].draws)
    spread = f"mean and standard deviation over {number} draws" if number > 1 else "of one draw"
    unchosen = sorted({row.shots for row in result.rows if not row.chosen})
    fixed = (
        f" With shots {', '.join(unchosen)} some class has one image to learn from: there the penalty is not "
        f"chosen but C {DEFAULT_C:g}."
        if unchosen
        else ""
    )
    unconverged = sum(row.unconverged for row in result.rows)
    short = f" {unconverged} regressions stopped at {MAX_ITERATIONS} iterations." if unconverged else ""
    return (
        f"Top-1 of logistic regression, {spread}, the same draws for all encoders; measured on "
        f"{result.measured_images} images, {result.num_classes} classes. The L2 penalty is chosen by "
        f"cross-validation within the few labels.{fixed}{short}"
    )


def comparison(result: FewshotResult) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a table: a line for each number of labels, top-1 of every encoder in %."""
    encoders: list[EncoderName] = list(dict.fromkeys(row.encoder for row in result.rows))
    first = [row for row in result.rows if row.encoder == encoders[0]]
    lines = [
        [
            row.shots if row.shots.endswith("%") else f"{row.shots} a class",
            f"{row.train_images:g}",
            *(_told(result.row(encoder, row.shots)) for encoder in encoders),
        ]
        for row in first
    ]
    return ["shots", "images", *encoders], lines


def _told(row: FewshotRow) -> str:
    spread = "" if row.top1_std is None else f" ± {100 * row.top1_std:.2f}"
    return f"{100 * row.top1:.2f}{spread}"


def _markdown(result: FewshotResult, identity: Mapping[str, Any]) -> str:
    settings, sources = identity["settings"], identity["sources"]
    return "\n".join(
        [
            f"# Few labels: {settings['model']}",
            "",
            f"Train {sources['train']['spec']}, test {sources['test']['spec']}. {summary(result)}",
            "",
            f"Top-1 in %. Features: tokens {settings['tokens']}, layers {', '.join(map(str, result.layers))} "
            f"after the final norm, attention {settings['attention']}; unreadable images "
            f"left out: {sum(result.bad_images.values())}. Encoder weights {identity['weights']}.",
            "",
            *markdown_table(*comparison(result)),
            "",
        ]
    )
