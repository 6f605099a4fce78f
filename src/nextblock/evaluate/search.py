"""The images nearest to a query: cosine similarity of features, one vector an image, a batch at a time.

In memory are the queries' features, those of one batch, and the nearest found so far.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from jaxtyping import Float, Int64
from torch import Tensor

from nextblock.config import DataConfig
from nextblock.data import BadImageError, BadSample, Source, open_source
from nextblock.data.sources import EncodedSource, read_file
from nextblock.errors import UsageError
from nextblock.evaluate.directories import make_directory
from nextblock.evaluate.embed.config import FeatureSettings
from nextblock.evaluate.embed.files import Embeddings, iterate_features_of, read_embeddings
from nextblock.evaluate.embed.run import feature_configs
from nextblock.evaluate.features import (
    FeatureBatch,
    check_bad,
    collect_features,
    encoder_extract,
    iterate_features,
    open_model,
)
from nextblock.evaluate.results import differences, identity_of
from nextblock.evaluate.search_config import MAX_QUERIES, SearchConfig
from nextblock.models import EncoderModel
from nextblock.settings import flatten, to_dict
from nextblock.train.runtime import choose_device

__all__ = [
    "ImageFile",
    "Nearest",
    "Neighbour",
    "QueryResult",
    "SearchResult",
    "nearest",
    "search",
    "search_model",
]

ALIKE, SAME = 1 - 1e-3, 1 - 1e-6
"""From these similarities on an image may be the query itself, if its bytes are, or its name is."""
MOST_COPIES = 64
"""Copies of a query that are found besides its `top` neighbours; of more, some stand for neighbours."""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """An image that was found."""

    index: int
    """In the source that was searched."""
    name: str
    similarity: float
    class_name: str | None
    is_query: bool
    """Whether it is the query itself: the same bytes or pixels, or the same name and features."""


@dataclass(frozen=True, kw_only=True)
class QueryResult:
    """A query and the nearest images, nearest first: as many as asked for, and copies of it among them."""

    index: int
    """In the source of queries."""
    name: str
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What was found, with the two sources to look at."""

    queries: tuple[QueryResult, ...]
    source: Source
    query_source: Source
    searched: int
    """Images that the queries were compared with."""
    bad: tuple[BadSample, ...]
    """Unreadable images and queries, left out."""
    identity: Mapping[str, Any]


class Nearest(NamedTuple):
    """For each query the most similar images, most similar first."""

    similarity: Float[Tensor, "q k"]
    indices: Int64[Tensor, "q k"]


class ImageFile(EncodedSource):
    """One image file as a source of one image."""

    def __init__(self, path: Path, data: DataConfig) -> None:
        self.spec = str(path)
        self._path, self._data = path, data

    def __len__(self) -> int:
        return 1

    @property
    def has_labels(self) -> bool:
        """Never."""
        return False

    def _content(self, index: int) -> bytes:  # noqa: ARG002 - there is one
        return read_file(self._path, self._data)

    def _name(self, index: int) -> str:  # noqa: ARG002 - there is one
        return self._path.name

    def _find_labels(self) -> tuple[np.ndarray, tuple[str, ...]]:
        raise UsageError(f"{self.spec!r} is one image; it has no labels")

    def _make_fingerprint(self) -> str:
        return f"file-{self._path.absolute()}"


# ------------------------------------------------------------------------------------------------ searching


def search(config: SearchConfig) -> SearchResult:
    """Find the images nearest to each query.

    Raises `ValueError` where a file of features was made by another model or of other images, where `out`
    holds another search's sheet, and where there are more queries than a sheet can show.
    """
    make_directory(Path(config.out).parent)
    model, data = open_model(config)
    features = None if config.features is None else read_embeddings(config.features)
    source = _open_searched(config, features, data)
    return search_model(model, config, source, _open_queries(config.query, data), data, features)


def search_model(
    model: EncoderModel,
    config: SearchConfig,
    source: Source,
    queries: Source,
    data: DataConfig,
    features: Embeddings | None = None,
) -> SearchResult:
    """Search as `search` does with all opened; the model is moved, frozen and set to eval."""
    if len(queries) > MAX_QUERIES:
        raise UsageError(f"{queries.spec} has {len(queries)} images; give at most {MAX_QUERIES} queries")
    identity = identity_of(config, model, data, {"data": source, "query": queries})
    compared = _compared(config, features, identity)
    # There, what is null in the settings is told.
    asked_for = {name: v for name, v in identity["settings"].items() if name not in compared}
    identity |= {"settings": asked_for, "compared": compared}
    if not config.overwrite:
        _refuse_other_sheet(Path(config.out), identity)
    device = choose_device(config.device)
    encode = _encoder(model.to(device), compared, data, device, config.batch_size(device.type))
    asked = collect_features(encode(queries))
    bad: list[BadSample] = []
    parts = _parts_encoded(encode(source), bad) if features is None else _parts_of_file(features)
    found, searched = nearest(asked.features[0].to(device), parts, config.top + MOST_COPIES)
    check_bad(bad, source, data)
    rows = zip(asked.samples.tolist(), found.similarity.tolist(), found.indices.tolist(), strict=True)
    return SearchResult(
        queries=tuple(
            _query_result(query, list(zip(*one, strict=True)), queries, source, config.top)
            for query, *one in rows
        ),
        source=source,
        query_source=queries,
        searched=searched,
        bad=(*asked.bad, *bad),
        identity=identity,
    )


def _encoder(
    model: EncoderModel, compared: Mapping[str, Any], data: DataConfig, device: torch.device, batch_size: int
) -> Callable[[Source], Iterator[FeatureBatch]]:
    """What takes the features of a source's images, a batch at a time."""
    model = model.eval().requires_grad_(requires_grad=False)
    settings = FeatureSettings(**{name: compared[name] for name in FeatureSettings.__dataclass_fields__})
    (wanted,) = feature_configs(settings, model.config.depth)
    extract = encoder_extract(model, [wanted], precision=compared["precision"], chunk=batch_size)
    return lambda images: iterate_features(
        extract, images, data, model.config.image_size, batch_size=batch_size, device=device
    )


def nearest(
    queries: Float[Tensor, "q d"],
    parts: Iterable[tuple[Float[Tensor, "_ d"], Int64[Tensor, " _"]]],
    count: int,
) -> tuple[Nearest, int]:
    """The `count` images most similar to each query, of all parts (features and indices); and of how many.

    Of equally similar images those of the lower index come first.
    """
    normed = F.normalize(queries.float(), dim=-1)
    similarity, indices = normed.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    indices = indices.to(queries.device)
    searched = 0
    for features, samples in parts:
        searched += len(samples)
        new = normed @ F.normalize(features.to(queries.device).float(), dim=-1).T
        similarity = torch.cat([similarity, new], dim=1)
        indices = torch.cat([indices, samples.to(queries.device).expand(len(queries), -1)], dim=1)
        order = similarity.sort(dim=1, descending=True, stable=True).indices[:, :count]
        similarity, indices = similarity.gather(1, order), indices.gather(1, order)
    if not searched:
        raise UsageError("there are no images to search; none could be read")
    return Nearest(similarity.clamp(-1, 1).cpu(), indices.cpu()), searched


def _parts_encoded(batches: Iterable[FeatureBatch], bad: list[BadSample]) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        bad += batch.bad
        if batch.features:
            yield batch.features[0], batch.samples


def _parts_of_file(features: Embeddings) -> Iterator[tuple[Tensor, Tensor]]:
    indices, start = torch.from_numpy(features.indices), 0
    for part in iterate_features_of(features.path, features.origin):
        yield torch.from_numpy(np.array(part)), indices[start : start + len(part)]
        start += len(part)


def _compared(
    config: SearchConfig, features: Embeddings | None, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """How all features are taken: as those of the file were, or as asked for; `ValueError` as `search`."""
    if features is None:
        return {**to_dict(config.feature_settings), "dtype": "fp32", "precision": config.precision}
    _refuse_other_features(features, identity)
    there = features.origin.identity["settings"]
    if config.precision not in ("fp32", there["precision"]):
        raise UsageError(
            f"precision is {config.precision}, but {features.path} was made in {there['precision']}, and so "
            "queries are encoded; leave --precision out"
        )
    return {name: there[name] for name in (*FeatureSettings.__dataclass_fields__, "dtype", "precision")}


def _refuse_other_features(features: Embeddings, here: Mapping[str, Any]) -> None:
    """Raise `ValueError` where features are of another model or of other images, or no vectors."""
    there, path = features.origin.identity, features.path
    for what, names in (
        ("another version", ("format_version",)),
        ("another model", ("weights", "encoder")),
        ("images cut in another way", ("images",)),
        ("another source", ("sources.data.fingerprint",)),
        ("other images of the same names", ("sources.data.sample",)),
    ):
        different = differences(
            there, {name: v for name, v in flatten(here).items() if name.startswith(names)}
        )
        if different:
            told = "; ".join(different[:3])
            raise UsageError(f"{path} holds features of {what} ({told}); embed anew, or leave --features out")
    if len(features.origin.shape) != 1:
        shape = " x ".join(map(str, features.origin.shape))
        raise UsageError(
            f"{path} holds {shape} numbers an image; search needs one vector: embed with --pool mean and "
            "without --layers each"
        )


def _refuse_other_sheet(out: Path, identity: Mapping[str, Any]) -> None:
    """Raise `ValueError` where anything but this very search lies where sheet and lists are to go."""
    lists = out.with_suffix(".json")
    there = [path for path in (out, lists, out.with_suffix(".csv")) if path.exists()]
    if not there:
        return
    remedy = "give another --out, or --overwrite"
    try:
        old = json.loads(lists.read_text(encoding="utf-8"))["identity"]
        different = differences(old, identity)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{there[0]} is there already, of another search; {remedy}") from error
    if different:
        told = "; ".join(different[:3])
        raise UsageError(f"{there[0]} is there already, of another search ({told}); {remedy}")


# -------------------------------------------------------------------------------------------------- results


def _query_result(
    query: int, found: list[tuple[float, int]], queries: Source, source: Source, top: int
) -> QueryResult:
    """The first `top` of what was found, and the copies of the query before the last of them."""
    kept: list[Neighbour] = []
    others = 0
    for similarity, index in found:
        is_query = _is_same(queries, query, source, index, similarity)
        others += not is_query
        kept.append(
            Neighbour(
                index=index,
                name=source.name(index),
                similarity=similarity,
                class_name=_class_name(source, index),
                is_query=is_query,
            )
        )
        if others == top:
            break
    return QueryResult(index=query, name=queries.name(query), neighbours=tuple(kept))


def _class_name(source: Source, index: int) -> str | None:
    if not source.has_labels:
        return None
    return source.class_names[int(source.labels[index])]


def _is_same(queries: Source, query: int, source: Source, index: int, similarity: float) -> bool:
    """Whether an image is the query itself."""
    if similarity < ALIKE:
        return False
    if similarity > SAME and queries.name(query) == source.name(index):
        return True
    try:
        content = queries.content(query)
        if content is not None and content == source.content(index):
            return True
        return torch.equal(queries.read(query), source.read(index))
    except BadImageError:  # it could be read before, or its features be made: it has gone since
        return False


def _open_searched(config: SearchConfig, features: Embeddings | None, data: DataConfig) -> Source:
    """The images to search, or those that the features were made of."""
    if config.data is not None:
        return open_source(config.data, data)
    assert features is not None, "the config has one of both"
    try:
        return open_source(features.origin.identity["sources"]["data"]["spec"], data)
    except ValueError as error:
        raise UsageError(
            f"the images that {features.path} was made of: {error}; if they lie elsewhere now, give --data"
        ) from error


def _open_queries(spec: str, data: DataConfig) -> Source:
    """One image file, or a source."""
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix.lower() not in (".tar", ".zip", ".parquet"):
        return ImageFile(path, data)
    return open_source(spec, data)
