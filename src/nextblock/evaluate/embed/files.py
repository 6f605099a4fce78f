"""Files of features: parquet, npy, safetensors; a row for each image that could be read, in source order.

    X.parquet      columns index, name, label, class, feature (a list of fixed length, the feature flattened)
    X.npy          the features alone; beside it X.npy.names.csv (row, index, name, label, class), X.npy.json
    X.safetensors  features, index and, where the source has classes, label; X.safetensors.names.csv

`index` is the image's number in the source. What the features are (`Origin`) stands as JSON under the key
"nextblock" in the metadata of parquet and safetensors, and in X.npy.json. Unreadable images have no row; they
are listed in X.FORMAT.quarantine.jsonl, which is there only if there are any.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nextblock.atomic import write_aside, write_text
from nextblock.data import Source
from nextblock.errors import UsageError
from nextblock.evaluate.directories import make_directory

__all__ = [
    "Embeddings",
    "EmbeddingsError",
    "Origin",
    "Rows",
    "check_writable",
    "finish_npy",
    "iterate_features_of",
    "npy_layout",
    "open_origin",
    "read_embeddings",
    "read_origin",
    "sidecars",
    "start_npy",
    "write",
]

KEY = "nextblock"
ROWS = 4096
"""Rows that are held in memory at a time, of usual features."""


class EmbeddingsError(RuntimeError):
    """A file of features cannot be written or read; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What features are, and what they were made from."""

    identity: Mapping[str, Any]
    """Settings, weights, cut of the images, source; see `results.identity_of`."""
    shape: tuple[int, ...]
    """Of one image's feature: ([layers,] [tokens,] channels)."""
    rows: int
    bad: int
    """Unreadable images, which have no row."""
    class_names: tuple[str, ...] | None
    """In the order of the labels; None where the source has no classes."""

    def to_json(self) -> str:
        """As it stands in the file."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Origin:
        """What `to_json` wrote."""
        values = json.loads(text)
        names = values["class_names"]
        return cls(
            identity=values["identity"],
            shape=tuple(values["shape"]),
            rows=values["rows"],
            bad=values["bad"],
            class_names=None if names is None else tuple(names),
        )


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What lies beside the features, taken from their source."""

    source: Source
    indices: Int64[np.ndarray, " n"]

    @cached_property
    def labels(self) -> Int64[np.ndarray, " n"] | None:
        """The images' classes, if the source has any."""
        if not self.source.has_labels:
            return None
        return np.asarray(self.source.labels, dtype=np.int64)[self.indices]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes."""
        return None if self.labels is None else tuple(self.source.class_names)

    def names(self, rows: slice = slice(None)) -> list[str]:
        """Names of some of the images."""
        return [self.source.name(index) for index in self.indices[rows].tolist()]

    def classes(self, rows: slice = slice(None)) -> list[tuple[int | None, str | None]]:
        """Label and class of some of the images."""
        if self.labels is None or self.class_names is None:
            return [(None, None)] * len(self.indices[rows])
        return [(label, self.class_names[label]) for label in self.labels[rows].tolist()]


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """A finished file of features; what it holds is read when it is asked for."""

    path: Path
    origin: Origin

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, in the order of the labels."""
        return self.origin.class_names

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the features, which stay unread."""
        return (self.origin.rows, *self.origin.shape)

    @cached_property
    def features(self) -> Shaped[np.ndarray, "n *feature d"]:
        """fp32 or fp16, in main memory; of npy a memory map, which reads what is used of it."""
        if self.path.suffix == ".npy":
            found = np.load(self.path, mmap_mode="r")
        else:
            found = np.concatenate(list(iterate_features_of(self.path, self.origin)))
        self._check_rows(len(found))
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """What the source calls the images."""
        return tuple(self._beside[0])

    @property
    def labels(self) -> Int64[np.ndarray, " n"] | None:
        """The images' classes; None where the source has none."""
        return None if self.class_names is None else np.array(self._beside[1], dtype=np.int64)

    @property
    def indices(self) -> Int64[np.ndarray, " n"]:
        """The images' numbers in the source."""
        return np.array(self._beside[2], dtype=np.int64)

    @cached_property
    def _beside(self) -> tuple[list[str], list[int], list[int]]:
        """Names, labels and indices."""
        if self.path.suffix == ".parquet":
            columns = ["name", "label", "index"]
            table = parquet_package("pyarrow.parquet").read_table(self.path, columns=columns)
            names, labels, indices = (table[column].drop_null().to_pylist() for column in columns)
        else:
            names, labels, indices = _read_names(sidecars(self.path)["names"])
        self._check_rows(len(names))
        return names, labels, indices

    def _check_rows(self, count: int) -> None:
        if count != self.origin.rows:
            raise EmbeddingsError(
                f"{self.path} or what lies beside it has {count} rows, but was made with {self.origin.rows}; "
                "make it anew with --overwrite"
            )


def sidecars(out: Path) -> dict[str, Path]:
    """What may lie beside a file of features: names, origin, quarantine."""
    return {
        "names": out.with_name(f"{out.name}.names.csv"),
        "origin": out.with_name(f"{out.name}.json"),
        "quarantine": out.with_name(f"{out.name}.quarantine.jsonl"),
    }


# ------------------------------------------------------------------------------------------------- writing


def check_writable(out: Path) -> None:
    """Raise `ValueError` before any work where the file cannot be written."""
    if out.suffix == ".parquet":
        parquet_package("pyarrow")
    make_directory(out.parent)


def write(
    out: Path, features: Shaped[np.ndarray, "n *feature d"], rows: Rows, origin: Origin, quarantine: str
) -> None:
    """Write a file of features and what belongs beside it, the file itself last: it is whole or not there.

    npy is not written but renamed: see `finish_npy`.
    """
    beside = sidecars(out)
    if quarantine:
        write_text(beside["quarantine"], quarantine)
    else:
        beside["quarantine"].unlink(missing_ok=True)
    if out.suffix == ".parquet":
        _write_parquet(out, features, rows, origin)
        return
    _write_names(beside["names"], rows)
    if out.suffix == ".npy":
        write_text(beside["origin"], origin.to_json() + "\n")
        return
    tensors = {"features": np.ascontiguousarray(features), "index": rows.indices}
    if rows.labels is not None:
        tensors["label"] = rows.labels
    with write_aside(out) as aside:
        save_file(tensors, aside, metadata={KEY: origin.to_json()})


def _write_names(path: Path, rows: Rows) -> None:
    with write_aside(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("row", "index", "name", "label", "class"))
        for part in _parts(len(rows.indices), ROWS):
            for row, index, name, classes in zip(
                range(part.start, part.stop),
                rows.indices[part].tolist(),
                rows.names(part),
                rows.classes(part),
                strict=True,
            ):
                writer.writerow((row, index, name, *("" if value is None else value for value in classes)))


def _write_parquet(
    out: Path, features: Shaped[np.ndarray, "n *feature d"], rows: Rows, origin: Origin
) -> None:
    pa, parquet = parquet_package("pyarrow"), parquet_package("pyarrow.parquet")
    length = int(np.prod(origin.shape))
    number = pa.from_numpy_dtype(features.dtype)
    schema = pa.schema(
        [
            ("index", pa.int64()),
            ("name", pa.string()),
            ("label", pa.int64()),
            ("class", pa.string()),
            ("feature", pa.list_(number, length)),
        ],
        metadata={KEY: origin.to_json()},
    )
    at_a_time = _at_a_time(features)
    with (
        write_aside(out) as aside,
        parquet.ParquetWriter(aside, schema, use_dictionary=["class"], compression="none") as writer,
    ):
        for part in _parts(len(features), at_a_time):
            labels, classes = zip(*rows.classes(part), strict=True)
            flat = pa.array(np.ascontiguousarray(features[part]).reshape(-1))
            columns = [
                pa.array(rows.indices[part]),
                pa.array(rows.names(part), pa.string()),
                pa.array(labels, pa.int64()),
                pa.array(classes, pa.string()),
                pa.FixedSizeListArray.from_arrays(flat, length),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def parquet_package(name: str) -> Any:
    """A module of pyarrow; `ValueError` with the remedy where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            "a .parquet file needs the package pyarrow: pip install pyarrow; or write .npy or .safetensors"
        ) from error


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _at_a_time(features: Shaped[np.ndarray, "n *feature d"]) -> int:
    """Rows of about 16 MB, but at most `ROWS`."""
    bytes_each = max(1, features.itemsize * int(np.prod(features.shape[1:])))
    return min(ROWS, max(1, 16_000_000 // bytes_each))


# ------------------------------------------------------------------------------------------------- reading


def read_origin(path: Path) -> Origin | None:
    """What a file of features says that it is; None where it says nothing, or is no such file."""
    try:
        if path.suffix == ".npy":
            beside = sidecars(path)["origin"]
            return Origin.from_json(beside.read_text(encoding="utf-8")) if beside.is_file() else None
        if path.suffix == ".parquet":
            metadata = parquet_package("pyarrow.parquet").read_schema(path).metadata or {}
            text = metadata.get(KEY.encode())
            return None if text is None else Origin.from_json(text.decode())
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(KEY)
        return None if text is None else Origin.from_json(text)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ValueError) and "pyarrow" in str(error):
            raise
        return None


def open_origin(path: Path) -> Origin:
    """What a file of features is; `EmbeddingsError` where it is none."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}; `nextblock embed` writes one")
    origin = read_origin(path)
    if origin is None:
        raise EmbeddingsError(f"{path} holds no features written by `nextblock embed`; make them anew")
    if path.suffix == ".npy" and not _is_whole_npy(path, origin):
        raise EmbeddingsError(
            f"{path} is not the whole file of {origin.rows} rows that it was; make it anew with --overwrite"
        )
    return origin


def _is_whole_npy(path: Path, origin: Origin) -> bool:
    """Whether the file has all the rows, by its length: the other formats cannot be opened else."""
    try:
        header_bytes, shape, dtype = npy_layout(path)
    except ValueError:
        return False
    bytes_there = path.stat().st_size - header_bytes
    return shape == (origin.rows, *origin.shape) and bytes_there == dtype.itemsize * math.prod(shape)


def read_embeddings(path: str | Path) -> Embeddings:
    """Open a file that `nextblock embed` wrote; `EmbeddingsError` where it is none."""
    return Embeddings(path=Path(path), origin=open_origin(Path(path)))


def _read_names(path: Path) -> tuple[list[str], list[int], list[int]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise EmbeddingsError(
            f"{path} cannot be read ({error.strerror}); it belongs to the features: make them anew with "
            "--overwrite"
        ) from error
    labels = [int(row["label"]) for row in rows if row["label"]]
    return [row["name"] for row in rows], labels, [int(row["index"]) for row in rows]


def iterate_features_of(path: Path, origin: Origin) -> Iterator[Shaped[np.ndarray, "n *feature d"]]:
    """The features of a file in their order, a few thousand rows at a time."""
    if path.suffix == ".parquet":
        file = parquet_package("pyarrow.parquet").ParquetFile(path)
        for group in range(file.num_row_groups):
            yield _parquet_features(file.read_row_group(group, columns=["feature"]), origin)
    elif path.suffix == ".npy":
        features = np.load(path, mmap_mode="r")
        for part in _parts(len(features), _at_a_time(features)):
            yield np.array(features[part])
    else:
        with safe_open(path, framework="np") as file:
            features = file.get_slice("features")
            for part in _parts(features.get_shape()[0], ROWS):
                yield features[part]


def _parquet_features(table: Any, origin: Origin) -> Shaped[np.ndarray, "n *feature d"]:
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table["feature"].chunks]
    return np.concatenate(chunks).reshape(-1, *origin.shape)


def finish_npy(working: Path, out: Path, rows: int) -> None:
    """Make of a working file, whose header counts more rows, the finished npy of `rows` rows."""
    header_bytes, shape, dtype = npy_layout(working)
    if (rows, *shape[1:]) != shape:
        with working.open("r+b") as file:
            np.lib.format.write_array_header_1_0(file, _header((rows, *shape[1:]), dtype))
            # numpy leaves room in a header for the first axis to grow, so that all lengths fit in as much.
            assert file.tell() == header_bytes, "numpy's header has another length"
    working.replace(out)


def start_npy(working: Path, shape: Sequence[int], dtype: np.dtype) -> None:
    """Begin a working file with a header that counts all rows there may be."""
    with working.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, _header(tuple(shape), dtype))


def npy_layout(path: Path) -> tuple[int, tuple[int, ...], np.dtype]:
    """How long an npy file's header is, the shape it tells, and the kind of number."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return file.tell(), tuple(shape), dtype


def _header(shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    return {"shape": shape, "fortran_order": False, "descr": np.lib.format.dtype_to_descr(dtype)}
