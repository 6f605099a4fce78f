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
from jaxtyping import Float, Int64
from PIL import Image
from sklearn.decomposition import PCA

from nextblock.atomic import write_aside
from nextblock.data import Source
from nextblock.errors import UsageError
from nextblock.evaluate.evaluation import MODEL, evaluation
from nextblock.evaluate.features import layer_choices
from nextblock.evaluate.files import about_parquet, pyarrow, write_parquet
from nextblock.evaluate.knn import nearest_neighbours
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
        source = opened.open_source(config.data)
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
            return read_embeddings(out)
        with opened.locked():
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
            table = opened.table("data", source, MODEL, wanted)
            with opened.group.together():
                if opened.group.is_main:
                    opened.report_bad()
                    indices = table.readable()
                    kinds = [table.read(indices, kind).numpy() for kind in range(len(wanted))]
                    features = np.stack(kinds, axis=1) if config.layers == "each" else kinds[0]
                    shape, names = list(features.shape[1:]), source.class_names if source.has_labels else None
                    about = {**identity, "shape": shape, "class_names": names, "bad": len(table.bad)}
                    columns = {
                        "index": indices,
                        "name": np.array([source.name(index) for index in indices.tolist()]),
                        **({"label": source.labels[indices]} if source.has_labels else {}),
                    }
                    if out.suffix == ".parquet":
                        write_parquet(out, _parquet(config, source, columns, features), about)
                    else:
                        columns |= {"feature": features, "about": np.array(json.dumps(about))}
                        with write_aside(out) as aside, aside.open("wb") as file:
                            np.savez(file, **columns)  # type: ignore[arg-type]
                    opened.forget_features()
        return read_embeddings(out)


def _plane(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
    """Project images to two dimensions with UMAP, or PCA if it is not installed."""
    plane = np.zeros((len(features), 2), dtype=np.float32)
    try:
        from umap import UMAP  # type: ignore[import-not-found]
    except ImportError:
        UMAP = None  # noqa: N806 - a class
    if UMAP is not None and len(features) > 3:
        plane[:] = UMAP(random_state=0, n_jobs=1).fit_transform(features)
    elif len(features) > 1:
        some = PCA(min(2, *features.shape), random_state=0).fit_transform(features)
        plane[:, : some.shape[1]] = some
    return plane


def _parquet(
    config: EmbedSettings,
    source: Source,
    columns: Mapping[str, np.ndarray],
    features: Float[np.ndarray, "n ..."],
) -> Iterator[Any]:
    """Yield the rows of the file as pyarrow tables."""
    pa, flat = pyarrow(), features.reshape(len(features), -1)
    # Cosine distances, as in kNN; the projection sees the features as they are.
    plane, normed = _plane(flat), F.normalize(torch.from_numpy(flat), dim=-1)
    for rows in np.split(np.arange(len(flat)), range(ROWS, len(flat), ROWS)):
        some: dict[str, Any] = {name: values[rows] for name, values in columns.items()}
        if "label" in some:
            some["class"] = [source.class_names[label] for label in some["label"]]
        some["feature"] = pa.FixedSizeListArray.from_arrays(pa.array(flat[rows].ravel()), flat.shape[1])
        some |= {"projection_x": plane[rows, 0], "projection_y": plane[rows, 1]}
        if config.neighbors and len(flat) > 1:
            itself = torch.from_numpy(rows)
            found = nearest_neighbours(normed[itself], normed, config.neighbors, itself=itself)
            pairs = zip(found.rows.tolist(), (1 - found.similarity).tolist(), strict=True)
            some["neighbors"] = [{"ids": ids, "distances": distances} for ids, distances in pairs]
        if config.thumbnail_px:
            pictures = (thumbnail(source, index, config.thumbnail_px) for index in some["index"].tolist())
            some["thumbnail"] = [{"bytes": picture} for picture in pictures]
        yield pa.table(some)


def thumbnail(source: Source, index: int, longer_px: int) -> bytes:
    """Encode an image as a PNG with its longer side at most `longer_px`; only three channels are shown."""
    pixels = source.read(index)
    shown = pixels[: 3 if len(pixels) >= 3 else 1].expand(3, -1, -1)
    picture = Image.fromarray(rearrange(shown, "c h w -> h w c").contiguous().numpy())
    picture.thumbnail((longer_px, longer_px))
    with io.BytesIO() as file:
        picture.save(file, "png")
        return file.getvalue()


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
        table = pyarrow().parquet.read_table(path)
        flat = table["feature"].combine_chunks().flatten().to_numpy()
        features = flat.reshape(len(table), *about["shape"])
        indices, names = table["index"].to_numpy(), table["name"].to_pylist()
        labels = table["label"].to_numpy() if "label" in table.column_names else None
    classes = about["class_names"]
    return Embeddings(path, features, indices, names, labels, classes and tuple(classes), about)
