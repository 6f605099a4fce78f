"""Write the features of a source to a file: parquet, which Embedding Atlas opens, or NumPy's npz.

X.parquet has the columns index, name, label, class, feature (flattened), thumbnail (PNG), projection_x and
projection_y, and neighbors (ids and cosine distances). X.npz has index, name, label and feature. `index` is
the image's index in the source; unreadable images have no row.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from einops import rearrange
from jaxtyping import Float, Int64, Shaped
from PIL import Image
from sklearn.decomposition import PCA

from nextblock.atomic import write_aside
from nextblock.data import Source, open_source
from nextblock.errors import UsageError
from nextblock.evaluate.evaluation import MODEL, Evaluation, evaluation
from nextblock.evaluate.files import about_parquet, pyarrow, write_parquet
from nextblock.evaluate.knn import nearest_neighbours
from nextblock.evaluate.layers import layer_choices
from nextblock.evaluate.results import differences
from nextblock.evaluate.settings import EmbedSettings
from nextblock.models.heads import FeatureConfig
from nextblock.settings import from_dict

log = logging.getLogger(__name__)

ROWS = 1024
"""Rows to write at a time."""


class Embeddings(NamedTuple):
    """Features of images, in the order of their source."""

    path: Path
    features: Float[np.ndarray, "n ..."]
    """One vector per image, or (tokens, d) without pooling; layers "each" adds a first dimension (layers)."""
    indices: Int64[np.ndarray, " n"]
    """Indices of the images in the source."""
    names: list[str]
    labels: Int64[np.ndarray, " n"] | None
    class_names: tuple[str, ...] | None
    about: Mapping[str, Any]
    """Identity of the features: settings, weights and images; also the number of unreadable images."""


def embed(**settings: Any) -> Embeddings:
    """Write the features of images to a file; `settings` are the fields of `EmbedSettings`.

    Repeating the call reads the file, or resumes. Raises `UsageError` if `out` is another file.
    """
    config = from_dict(EmbedSettings, settings)
    out = Path(config.out)
    if out.suffix == ".parquet":
        pyarrow()
    with evaluation(config) as opened:
        source = open_source(config.data, opened.data)
        identity = opened.identity({"data": source})
        with opened.group.together():
            is_written = out.exists() and not config.overwrite
            if is_written and (different := differences(_about(out), identity)):
                raise UsageError(
                    f"{out} holds other features ({'; '.join(different[:3])}); choose another --out, or "
                    "--overwrite"
                )
        if is_written:
            log.info("%s has these features already", out)
        else:
            _write(opened, config, source, identity, out)
        return read_embeddings(out)


def _write(
    opened: Evaluation, config: EmbedSettings, source: Source, identity: dict[str, Any], out: Path
) -> None:
    wanted = [
        FeatureConfig(
            layers=layers,
            norm_layers=config.norm,
            tokens=config.tokens,
            pooled=config.pool == "mean",
            attention=config.attention,
        )
        for layers in layer_choices(config.layers, opened.model.config.depth)
    ]
    with opened.working(out) as finish:
        table = opened.table("data", source, MODEL, wanted)
        indices = table.readable()

        def features(chosen: Int64[np.ndarray, " b"]) -> Float[np.ndarray, "b ..."]:
            kinds = [table.read(chosen, kind).numpy() for kind in range(len(wanted))]
            return np.stack(kinds, axis=1) if config.layers == "each" else kinds[0]

        shape = list(features(indices[:1]).shape[1:])
        names = list(source.class_names) if source.has_labels else None
        about = {**identity, "shape": shape, "class_names": names, "bad": len(table.bad)}
        with opened.group.together():
            if opened.group.is_main:
                opened.report_bad(None)
                if out.suffix == ".npz":
                    _write_npz(out, features(indices), indices, source, about)
                else:
                    extra = _map(features(indices).reshape(len(indices), -1), config.neighbors)
                    parts = _parquet(features, indices, source, extra, config.thumbnail_px)
                    write_parquet(out, parts, about)
                finish()


def _map(features: Float[np.ndarray, "n d"], neighbors: int) -> dict[str, np.ndarray]:
    """Project images to two dimensions with UMAP, or PCA if it is not installed; find nearest images."""
    normed = F.normalize(torch.from_numpy(features), dim=-1)
    try:
        from umap import UMAP  # type: ignore[import-not-found]

        plane = UMAP(random_state=0, n_jobs=1).fit_transform(features) if len(features) > 3 else None
    except ImportError:
        plane = None
    if plane is None:
        plane = np.zeros((len(features), 2))
        if len(features) > 1:
            some = PCA(min(2, *features.shape), random_state=0).fit_transform(features)
            plane[:, : some.shape[1]] = some
    columns = {"projection_x": plane[:, 0], "projection_y": plane[:, 1]}
    if neighbors and len(features) > 1:
        parts = [
            nearest_neighbours(normed[rows], normed, neighbors, itself=rows)
            for rows in torch.arange(len(features)).split(ROWS)
        ]
        columns["ids"] = torch.cat([part.rows for part in parts]).numpy()
        columns["distances"] = 1 - torch.cat([part.similarity for part in parts]).numpy()
    return columns


def _parquet(
    features: Any,
    indices: Int64[np.ndarray, " n"],
    source: Source,
    extra: Mapping[str, np.ndarray],
    thumbnail_px: int,
) -> Iterator[Any]:
    """Yield the file's rows as pyarrow tables."""
    pa = pyarrow()
    for start in range(0, len(indices), ROWS):
        rows = slice(start, start + ROWS)
        chosen = indices[rows]
        flat = features(chosen).reshape(len(chosen), -1)
        columns: dict[str, Any] = {
            "index": pa.array(chosen),
            "name": pa.array([source.name(index) for index in chosen.tolist()]),
        }
        if source.has_labels:
            labels = source.labels[chosen]
            columns["label"] = pa.array(labels)
            columns["class"] = pa.array([source.class_names[label] for label in labels])
        columns["feature"] = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
        for name in ("projection_x", "projection_y"):
            columns[name] = pa.array(extra[name][rows].astype("f4"))
        if "ids" in extra:
            pairs = zip(extra["ids"][rows].tolist(), extra["distances"][rows].tolist(), strict=True)
            columns["neighbors"] = pa.array([{"ids": ids, "distances": values} for ids, values in pairs])
        if thumbnail_px:
            pictures = (thumbnail(source, index, thumbnail_px) for index in chosen.tolist())
            columns["thumbnail"] = pa.array([{"bytes": picture} for picture in pictures])
        yield pa.table(columns)


def thumbnail(source: Source, index: int, longer_px: int) -> bytes:
    """Encode an image as a PNG with its longer side at most `longer_px`; only three channels are shown."""
    pixels = source.read(index)
    shown = pixels[: 3 if len(pixels) >= 3 else 1].expand(3, -1, -1)
    picture = Image.fromarray(rearrange(shown, "c h w -> h w c").contiguous().numpy())
    picture.thumbnail((longer_px, longer_px))
    with io.BytesIO() as file:
        picture.save(file, "png")
        return file.getvalue()


def _write_npz(
    out: Path,
    features: np.ndarray,
    indices: Int64[np.ndarray, " n"],
    source: Source,
    about: Mapping[str, Any],
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    values: dict[str, Shaped[np.ndarray, ...]] = {
        "index": indices,
        "name": np.array([source.name(index) for index in indices.tolist()]),
        "feature": features,
        "about": np.array(json.dumps(about)),
    }
    if source.has_labels:
        values["label"] = source.labels[indices]
    with write_aside(out) as aside, aside.open("wb") as file:
        np.savez(file, **values)  # type: ignore[arg-type]


def _about(path: Path) -> dict[str, Any]:
    """Read the identity of a file of features; `UsageError` for any other file."""
    try:
        if path.suffix == ".parquet":
            about = about_parquet(path)
        else:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"])) if "about" in arrays else None
    except (OSError, ValueError, TypeError, EOFError, KeyError, BadZipFile) as error:
        raise UsageError(f"{path} cannot be read as features: {error}; choose another --out") from error
    if about is None or "shape" not in about:
        raise UsageError(f"{path} was not written by `nextblock embed`; choose another --out, or --overwrite")
    return about


def read_embeddings(path: str | Path) -> Embeddings:
    """Read a file written by `embed` into main memory."""
    path = Path(path)
    about = _about(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            features, indices, names = file["feature"], file["index"], file["name"].tolist()
            labels = file.get("label")
    else:
        table = pyarrow().parquet.read_table(path, columns=None)
        flat = table["feature"].combine_chunks().flatten().to_numpy()
        features = flat.reshape(len(table), *about["shape"])
        indices, names = table["index"].to_numpy(), table["name"].to_pylist()
        labels = table["label"].to_numpy() if "label" in table.column_names else None
    classes = about["class_names"]
    return Embeddings(path, features, indices, names, labels, classes and tuple(classes), about)
