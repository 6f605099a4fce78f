"""What evaluations without training an encoder share: its features, and those of its two baselines.

An untrained encoder of the same shape and the raw pixels stand beside every encoder: without those two
numbers the third says little.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int64

from nextblock.atomic import write_text
from nextblock.config import DataConfig, ModelConfig, pair
from nextblock.data import Source, keyed_seed
from nextblock.evaluate.directories import make_directory
from nextblock.evaluate.features import (
    Extract,
    Features,
    check_bad,
    collect_features,
    encoder_extract,
    iterate_features,
    open_model,
    pixel_extract,
    untrained,
)
from nextblock.evaluate.fewshot_config import FewshotConfig, FewshotResult
from nextblock.evaluate.knn_config import KnnConfig, KnnResult
from nextblock.evaluate.layers import layer_choices
from nextblock.evaluate.probe.config import EncoderName
from nextblock.evaluate.results import identity_of, refuse_other_result
from nextblock.evaluate.sources import open_labelled
from nextblock.evaluate.unreadable import QUARANTINE, report_unreadable
from nextblock.models import EncoderModel
from nextblock.models.heads import FeatureConfig
from nextblock.models.timm_encoder import TimmConfig
from nextblock.settings import to_dict
from nextblock.train.runtime import choose_device

__all__ = ["Opened", "Subject", "feature_config", "markdown_table", "measured", "open_all", "subjects"]

log = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", KnnConfig, FewshotConfig)
ResultT = TypeVar("ResultT", KnnResult, FewshotResult)


class Opened(NamedTuple):
    """A model, how its images are cut, and labelled sources of the same classes."""

    model: EncoderModel
    data: DataConfig
    sources: dict[str, Source]


class Subject(NamedTuple):
    """An encoder, or the pixels, and its features (b d) of every source, in main memory."""

    encoder: EncoderName
    features: dict[str, Features]


def open_all(
    config: KnnConfig | FewshotConfig, others: Mapping[str, str | None], *, advice: str = ""
) -> Opened:
    """Open the config's model, its source "train", and by purpose the others that are given.

    The advice is given where one of these is the images of train. Raises `ValueError` where a source has no
    labels, one class only, or other classes than train.
    """
    model, data = open_model(config)
    train, opened = open_labelled(config.train, others, data, advice=advice)
    return Opened(model, data, {"train": train, **opened})


def feature_config(config: KnnConfig | FewshotConfig, encoder: ModelConfig | TimmConfig) -> FeatureConfig:
    """One vector an image: by default the mean patch of the last layer, after the final norm."""
    (layers,) = layer_choices(config.layers, encoder.depth)
    return FeatureConfig(layers=layers, norm_layers=True, tokens=config.tokens, attention=config.attention)


def subjects(
    opened: Opened,
    config: KnnConfig | FewshotConfig,
    indices: Mapping[str, Int64[np.ndarray, " n"]] | None = None,
) -> Iterator[Subject]:
    """Yield the features of the encoder, of the same one untrained, and the raw pixels, one after another.

    Of each source all images are taken, or those of `indices` under its purpose. The model is frozen and
    moved to the device. Images that cannot be read are told, and listed where the result goes. Raises
    `ValueError` where features are no numbers.
    """
    model = opened.model.to(choose_device(config.device)).eval().requires_grad_(requires_grad=False)
    features = _collect(_extract(model, config), opened, config, indices)
    bad = {purpose: (opened.sources[purpose], found.bad) for purpose, found in features.items()}
    report_unreadable(None if config.out is None else Path(config.out), bad)
    yield Subject("trained", features)
    if not config.baselines:
        return
    fresh = untrained(model, keyed_seed(config.seed, "untrained encoder"))
    yield Subject("untrained", _collect(_extract(fresh, config), opened, config, indices))
    height, width = pair(model.config.image_size)
    numbers = [len((indices or {}).get(purpose, source)) for purpose, source in opened.sources.items()]
    pixels_gb = 4 * model.config.in_chans * height * width * sum(numbers) / 1e9
    if pixels_gb > config.pixels_gb:
        log.info(
            "raw pixels are left out: those of %d images take %.1f GB, and pixels_gb is %g",
            sum(numbers),
            pixels_gb,
            config.pixels_gb,
        )
        return
    yield Subject("raw pixels", _collect(pixel_extract, opened, config, indices))


def _extract(model: EncoderModel, config: KnnConfig | FewshotConfig) -> Extract:
    wanted = feature_config(config, model.config)
    return encoder_extract(model, [wanted], precision=config.precision, chunk=config.encode_batch_size)


def _collect(
    extract: Extract,
    opened: Opened,
    config: KnnConfig | FewshotConfig,
    indices: Mapping[str, Int64[np.ndarray, " n"]] | None,
) -> dict[str, Features]:
    found = {}
    for purpose, source in opened.sources.items():
        batches = iterate_features(
            extract,
            source,
            opened.data,
            pair(opened.model.config.image_size),
            batch_size=config.encode_batch_size,
            indices=(indices or {}).get(purpose),
            device=next(opened.model.parameters()).device,
        )
        found[purpose] = collect_features(batches)
        check_bad(found[purpose].bad, source, opened.data)
    return found


# ------------------------------------------------------------------------------------------ what is written


def measured(
    opened: Opened,
    config: ConfigT,
    verb: str,
    measure: Callable[[Opened, ConfigT], ResultT],
    markdown: Callable[[ResultT, Mapping[str, Any]], str],
) -> ResultT:
    """Measure, and write VERB.csv, VERB.md and VERB.json where the config's `out` is given.

    `markdown` takes the result and its identity. Raises `ValueError` before anything is measured where `out`
    holds another result.
    """
    if config.out is None:
        return measure(opened, config)
    out, identity = Path(config.out), identity_of(config, opened.model, opened.data, opened.sources)
    ours = (f"{verb}.csv", f"{verb}.md", QUARANTINE)
    refuse_other_result(out, f"{verb}.json", identity, ours, overwrite=config.overwrite)
    result = measure(opened, config)
    _write(out, verb, identity, result, markdown(result, identity))
    return result


def _write(
    out: Path, verb: str, identity: Mapping[str, Any], result: KnnResult | FewshotResult, markdown: str
) -> None:
    """Write a result's rows as OUT/VERB.csv, its text as .md, and last the whole of it as .json."""
    make_directory(out)
    values = to_dict(result)
    assert not identity.keys() & values.keys(), "one would hide the other"
    with io.StringIO(newline="") as text:
        table = csv.DictWriter(text, fieldnames=list(values["rows"][0]), lineterminator="\n")
        table.writeheader()
        table.writerows(values["rows"])
        write_text(out / f"{verb}.csv", text.getvalue())
    write_text(out / f"{verb}.md", markdown)
    write_text(out / f"{verb}.json", json.dumps({**identity, **values}, indent=2) + "\n")


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return [f"| {' | '.join(row)} |" for row in rows]
