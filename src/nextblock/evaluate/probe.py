"""Probes: what a frozen encoder's features are worth to a linear and an attentive head.

The encoder runs once per batch and feeds every head. Each head has its own optimizer and clipping, so heads
trained together are the heads trained alone. An untrained encoder and the raw pixels are probed alongside:
without those two numbers the third says little.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import nn

from nextblock.checkpoint import save_classifier
from nextblock.config import DataConfig, ModelConfig, OptimConfig, pair
from nextblock.data import Source, keyed_seed, open_source
from nextblock.data.subsets import SubsetSource
from nextblock.evaluate.features import (
    Extract,
    check_bad,
    check_same_classes,
    encoder_extract,
    evaluation_data,
    iterate_features,
    pixel_extract,
    seeded,
    untrained,
)
from nextblock.evaluate.probe_config import EncoderName, HeadName, ProbeConfig, ProbeResult, ProbeRow, Split
from nextblock.evaluate.results import identity_of, refuse_other_result, write_text
from nextblock.evaluate.train_heads import Accuracy, Feed, Measured, Student, hold_out, measure, train_heads
from nextblock.interop import open_encoder
from nextblock.models import EncoderModel
from nextblock.models.classifier import ImageClassifier, TimmClassifier, create_classifier
from nextblock.models.features import last_layers
from nextblock.models.heads import HeadConfig, LinearHead
from nextblock.models.timm_encoder import TimmConfig
from nextblock.settings import to_dict
from nextblock.train.device import choose_device

__all__ = ["Probed", "probe", "probe_model"]

log = logging.getLogger(__name__)

CROP_SCALE, CROP_RATIO = (0.08, 1.0), (0.75, 1.333)
"""Training crops of the official linear probe."""


class Probed(NamedTuple):
    """A result, and the classifiers made of the probed encoder and its heads."""

    result: ProbeResult
    classifiers: dict[HeadName, ImageClassifier | TimmClassifier]


def probe(config: ProbeConfig) -> ProbeResult:
    """Train the heads, measure them, and write probe.json, probe.md and the trained heads to `config.out`.

    Each head of the probed encoder is written as a classifier in a directory of its name. Raises `ValueError`
    where `out` holds another result, where labels are missing, or where the sources' classes differ.
    """
    model = open_encoder(config.model, num_heads=config.num_heads)
    data = evaluation_data(config.model, model.config)
    if config.workers is not None:
        data = replace(data, workers=config.workers)
    train, measured = _open_sources(config, data)
    identity = identity_of(config, model, data, {"train": train, **measured})
    out = Path(config.out)
    if not config.overwrite:
        refuse_other_result(out, "probe.json", identity, ("probe.md", *get_args(HeadName)))
    found = probe_model(model, config, train, measured, data)
    out.mkdir(parents=True, exist_ok=True)
    for name, classifier in found.classifiers.items():
        save_classifier(out / name, classifier, data=data)
    write_text(out / "probe.md", _markdown(found.result, identity))
    write_text(out / "probe.json", json.dumps({**identity, **to_dict(found.result)}, indent=2) + "\n")
    return found.result


def probe_model(
    model: EncoderModel,
    config: ProbeConfig,
    train: Source,
    measured: Mapping[Split, Source],
    data: DataConfig,
) -> Probed:
    """Probe a model on open sources, without writing. The model is frozen and moved to the device."""
    for source in measured.values():
        check_same_classes(train, source)
    device = choose_device(config.device)
    model.to(device).eval().requires_grad_(requires_grad=False)
    rows: list[ProbeRow] = []
    bad: dict[str, int] = {}
    classifiers: dict[HeadName, ImageClassifier | TimmClassifier] = {}
    for subject in _subjects(model, config, train.class_names):
        if subject.encoder == "trained":
            classifiers = subject.classifiers
        found = _probe_subject(subject, config, train, measured, data, pair(model.config.image_size), device)
        rows += found.rows
        bad = found.bad
    return Probed(
        ProbeResult(
            rows=tuple(rows),
            num_classes=len(train.class_names),
            train_images=len(train) - bad["train"],
            bad_images=bad,
        ),
        classifiers,
    )


# ------------------------------------------------------------------------------------------ what is probed


class _Subject(NamedTuple):
    """An encoder, or the pixels, and the heads to train on it."""

    encoder: EncoderName
    extract: Extract
    heads: dict[HeadName, nn.Module]
    classifiers: dict[HeadName, ImageClassifier | TimmClassifier]
    """Empty for raw pixels."""


class _Found(NamedTuple):
    rows: list[ProbeRow]
    bad: dict[str, int]


def _subjects(model: EncoderModel, config: ProbeConfig, class_names: tuple[str, ...]) -> Iterator[_Subject]:
    yield _encoder_subject("trained", model, config, class_names)
    if not config.baselines:
        return
    fresh = untrained(model, keyed_seed(config.seed, "untrained encoder"))
    yield _encoder_subject("untrained", fresh, config, class_names)
    if "linear" in config.heads:
        height, width = pair(model.config.image_size)
        with seeded(_head_seed(config, "linear")):
            head = LinearHead(model.config.in_chans * height * width, len(class_names))
        yield _Subject("raw pixels", pixel_extract, {"linear": head}, {})


def _encoder_subject(
    encoder: EncoderName, model: EncoderModel, config: ProbeConfig, class_names: tuple[str, ...]
) -> _Subject:
    head_configs = _head_configs(config, model.config, len(class_names))
    extract = encoder_extract(
        model,
        [head.features for head in head_configs.values()],
        precision=config.precision,
        chunk=config.encode_batch_size,
    )
    classifiers = {}
    for name, head_config in head_configs.items():
        with seeded(_head_seed(config, name)):
            classifiers[name] = create_classifier(model, head_config, class_names).eval()
    return _Subject(encoder, extract, {name: c.head for name, c in classifiers.items()}, classifiers)


def _head_configs(
    config: ProbeConfig, encoder: ModelConfig | TimmConfig, num_classes: int
) -> dict[HeadName, HeadConfig]:
    depth, width = encoder.depth, encoder.embed_dim
    if "attentive" in config.heads and width % config.attentive_heads != 0:
        fitting = max(n for n in range(1, config.attentive_heads) if width % n == 0)
        raise ValueError(
            f"an attentive head {width} channels wide cannot have {config.attentive_heads} attention heads; "
            f"set attentive_heads (--attentive_heads) to a divisor, such as {fitting}"
        )
    count = min(config.layers, depth)
    if count < config.layers and "attentive" in config.heads:
        log.info("the encoder has %d layers: all of them are averaged, not %d", depth, config.layers)
    make = partial(
        HeadConfig,
        num_classes=num_classes,
        num_heads=config.attentive_heads,
        num_queries=config.attentive_queries,
        attention=config.attention,
    )
    layers: dict[HeadName, tuple[int, ...]] = {
        "attentive": last_layers(count, depth),
        "linear": last_layers(1, depth),
    }
    return {name: make(kind=name, layers=layers[name]) for name in config.heads}


def _head_seed(config: ProbeConfig, head: HeadName) -> int:
    return keyed_seed(config.seed, "probe head", get_args(HeadName).index(head))


def _probe_subject(
    subject: _Subject,
    config: ProbeConfig,
    train: Source,
    measured: Mapping[Split, Source],
    data: DataConfig,
    image_size: tuple[int, int],
    device: torch.device,
) -> _Found:
    """Train all heads of a subject side by side, and measure them."""
    started_at_s = time.perf_counter()
    feed = _feed(subject.extract, config, train, data, image_size, device)
    students: dict[HeadName, Student] = {
        name: _student(head.to(device), column, name, config, feed)
        for column, (name, head) in enumerate(subject.heads.items())
    }
    train_heads(list(students.values()), feed)
    bad = {"train": len(feed.bad)}
    measurements: dict[Split, Measured] = {}
    for split, source in measured.items():
        batches = iterate_features(
            subject.extract, source, data, image_size, batch_size=config.encode_batch_size, device=device
        )
        measurements[split] = measure(list(students.values()), batches, source)
        check_bad(measurements[split].bad, source, data)
        bad[split] = len(measurements[split].bad)
    elapsed_s = time.perf_counter() - started_at_s
    rows = [
        _row(subject, name, split, accuracy, measurement.images, config, elapsed_s)
        for split, measurement in measurements.items()
        for name, accuracy in zip(students, measurement.accuracies, strict=True)
    ]
    return _Found(rows, bad)


def _feed(
    extract: Extract,
    config: ProbeConfig,
    train: Source,
    data: DataConfig,
    image_size: tuple[int, int],
    device: torch.device,
) -> Feed:
    return Feed(
        extract=extract,
        source=train,
        data=replace(data, crop_scale=CROP_SCALE, crop_ratio=CROP_RATIO),
        image_size=image_size,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        device=device,
        augment=config.augment,
        cache_gb=config.cache_gb,
    )


def _student(head: nn.Module, column: int, name: HeadName, config: ProbeConfig, feed: Feed) -> Student:
    optim = OptimConfig(
        lr=config.lr,
        start_lr=config.lr / 10,
        end_lr=config.end_lr,
        weight_decay=config.decay(name),
        betas=config.betas,
        clip_grad=config.clip_grad,
    )
    warmup_steps = round(config.warmup * feed.steps_per_epoch)
    return Student(head, column, optim, warmup_steps=warmup_steps, total_steps=feed.steps)


def _row(
    subject: _Subject,
    name: HeadName,
    split: Split,
    accuracy: Accuracy,
    images: int,
    config: ProbeConfig,
    elapsed_s: float,
) -> ProbeRow:
    log.info("%s, %s head, %s: top-1 %.2f %%", subject.encoder, name, split, 100 * accuracy.top1)
    classifier = subject.classifiers.get(name)
    return ProbeRow(
        encoder=subject.encoder,
        head=name,
        split=split,
        top1=accuracy.top1,
        top5=accuracy.top5,
        images=images,
        lr=config.lr,
        weight_decay=config.decay(name),
        layers=() if classifier is None else classifier.head_config.layers,
        attention=None if classifier is None else config.attention,
        epochs=config.epochs,
        elapsed_s=elapsed_s,
    )


# ------------------------------------------------------------------------------------ what it was made from


def _open_sources(config: ProbeConfig, data: DataConfig) -> tuple[Source, dict[Split, Source]]:
    """The images to train on, and by split those to measure on; without labels there is nothing to do."""
    train = open_source(config.train, data)
    labels = train.labels
    specs: dict[Split, str | None] = {"val": config.val, "test": config.test}
    measured: dict[Split, Source] = {
        split: open_source(spec, data) for split, spec in specs.items() if spec is not None
    }
    if measured:
        return train, measured
    kept, held = hold_out(labels, config.seed)
    log.info(
        "neither val nor test was given: %d of %d images of %s are held out, a tenth of every class",
        len(held),
        len(labels),
        config.train,
    )
    subsets = [SubsetSource(train.spec, train, numbers) for numbers in (kept, held)]
    return subsets[0], {"held-out": subsets[1]}


def _markdown(result: ProbeResult, identity: Mapping[str, Any]) -> str:
    sources, settings = identity["sources"], identity["settings"]
    bad = sum(result.bad_images.values())
    lines = [
        f"# Probe of {settings['model']}",
        "",
        f"Heads trained on {result.train_images} images of {sources['train']['spec']}, "
        f"{result.num_classes} classes, {settings['epochs']} epochs, seed {settings['seed']}; "
        f"{bad} unreadable images left out. Encoder weights {identity['weights']}.",
        "",
        "| encoder | head | split | images | top-1 % | top-5 % | layers | attention | lr | weight decay |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.encoder} | {row.head} | {row.split} | {row.images} "
        f"| {100 * row.top1:.2f} | {100 * row.top5:.2f} "
        f"| {', '.join(map(str, row.layers)) or '-'} | {row.attention or '-'} "
        f"| {row.lr:g} | {row.weight_decay:g} |"
        for row in result.rows
    ]
    return "\n".join(lines) + "\n"
