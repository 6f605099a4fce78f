"""A Hugging Face dataset as a source: `hf:NAME-OR-PATH,split=train`, or a parquet file.

The rows stay in Arrow files that are mapped into memory, so workers share them and any row is read at once.
Images are taken as their encoded bytes and decoded like every other file.

The image column is the one whose feature is an image; where none is, the one that holds bytes, or bytes and a
path. The label column is the one of class labels; where none is, the one of LABEL_NAMES that holds numbers or
text. Where several would do, `image=COLUMN` and `label=COLUMN` choose.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from nextblock.config import DataConfig
from nextblock.data.decode import BadImageError
from nextblock.data.sources.base import EncodedSource, Labels, read_file
from nextblock.data.sources.base import _options as read_options
from nextblock.data.sources.listing import in_class_order
from nextblock.logs import held_back
from nextblock.settings import nearest_name

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["LABEL_NAMES", "DatasetError", "HuggingFaceSource", "open_dataset"]

LABEL_NAMES = ("label", "labels", "class", "classes", "class_name", "category", "target", "fine_label")
"""What a column of labels that does not say so itself may be called, in small or capital letters."""

SAMPLED_ROWS = 64
"""The fingerprint is made of the sizes of all images, and of the bytes of this many."""

OPTIONS = ("split", "config", "image", "label", "revision")


class DatasetError(RuntimeError):
    """A dataset that is there cannot be fetched or read."""


def open_dataset(spec: str, data: DataConfig) -> HuggingFaceSource:
    """Open `hf:NAME-OR-PATH,split=train` or `X.parquet`."""
    if not spec.startswith("hf:"):
        return HuggingFaceSource(spec, spec, {}, data)
    name, _, rest = spec.removeprefix("hf:").partition(",")
    return HuggingFaceSource(spec, name, read_options(spec, rest, known=OPTIONS), data)


class HuggingFaceSource(EncodedSource):
    """The rows of one split of a dataset of the Hugging Face hub, or of one on disk."""

    def __init__(self, spec: str, name: str, options: dict[str, str], data: DataConfig) -> None:
        self.spec = spec
        self._data = data
        self._folder = Path(name).expanduser()
        dataset = _load(spec, name, options)
        if not len(dataset):
            raise ValueError(f"{spec!r}: the dataset has no rows")
        self._image = _image_column(spec, dataset, options.get("image"))
        self._label_candidates = _label_columns(spec, dataset, options.get("label"), self._image)
        self._rows = dataset
        self._images = _undecoded(dataset, self._image)
        self._called = f"{self._folder.name or name}[{dataset.split or options.get('split', 'all')}]"

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def has_labels(self) -> bool:
        """Whether there is one column of labels."""
        return len(self._label_candidates) == 1

    def _content(self, index: int) -> bytes:
        value = self._images[index][self._image]
        if isinstance(value, dict):
            content, path = value.get("bytes"), value.get("path")
            value = content if content is not None else path
        if value is None:
            raise BadImageError("the row holds no image")
        if isinstance(value, bytes):
            return value
        # A path: as it is, or below the dataset's folder.
        path = Path(value)
        beside = self._folder if self._folder.is_dir() else self._folder.parent
        return read_file(path if path.is_absolute() else beside / path)

    def _name(self, index: int) -> str:
        return f"{self._called}[{index}]"

    def _find_labels(self) -> Labels:
        if len(self._label_candidates) > 1:
            raise ValueError(
                f"{self.spec!r}: several columns hold labels ({', '.join(self._label_candidates)}); choose "
                "one by label=COLUMN"
            )
        if not self._label_candidates:
            raise ValueError(
                f"{self.spec!r} has no labels: none of its columns {_columns(self._rows)} is one of class "
                f"labels, or is called {' or '.join(LABEL_NAMES)}; name one by label=COLUMN"
            )
        return _labels(self.spec, self._rows, self._label_candidates[0])

    def _make_fingerprint(self) -> str:
        rows = self._rows
        info = rows.info
        told = [str(info.config_name), str(rows.split), str(rows.column_names), self._image, self._version()]
        digest = hashlib.blake2b("\n".join(told).encode(), digest_size=16)
        return f"hf-{len(self)}-{digest.hexdigest()}"

    def _version(self) -> str:
        """What tells this state of the dataset from another, wherever it lies and whichever process asks."""
        split = (self._rows.info.splits or {}).get(str(self._rows.split).partition("[")[0])
        if split is None:  # written by save_to_disk, which keeps the dataset's own fingerprint
            return str(self._rows._fingerprint)
        digest = hashlib.blake2b(_sizes_and_names(self._images, self._image), digest_size=16)
        for index in sorted({len(self) * i // SAMPLED_ROWS for i in range(SAMPLED_ROWS)}):
            value = self._images[index][self._image]
            value = value.get("bytes") if isinstance(value, dict) else value
            digest.update(hashlib.blake2b(value).digest() if isinstance(value, bytes) else b"none")
        return f"{split.num_examples}, {digest.hexdigest()}"


# -------------------------------------------------------------------------------------------------- loading


def _datasets(spec: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise DatasetError(
            f"{spec!r} needs the package datasets: pip install 'nextblock[datasets]'"
        ) from error
    return datasets


def _load(spec: str, name: str, options: dict[str, str]) -> Dataset:
    """Open a dataset, from disk where there is such a path, else from the hub or its cache."""
    datasets = _datasets(spec)
    path = Path(name).expanduser()
    if not name:
        raise ValueError(f"{spec!r} names no dataset; write hf:NAME,split=train or hf:PATH,split=train")
    if name.startswith((".", "/", "~")) and not path.exists():
        raise ValueError(f"{spec!r}: there is no {path.absolute()}")
    if "[" in options.get("split", ""):
        raise ValueError(
            f"{spec!r}: slices of a split are not read; name the whole split, split="
            f"{options['split'].partition('[')[0]}, and draw a part of it with `nextblock data sample`"
        )
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _load_saved(spec, path, options)
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise ValueError(f"{spec!r}: {path.name} is no parquet file; give one, or a folder of them")
        split = options.get("split", "train")
        if split != "train" and split not in re.split(r"[^A-Za-z0-9]+", path.stem):
            raise ValueError(
                f"{spec!r}: one parquet file is one split, and the name {path.name} does not say {split}; "
                "leave split= out, or name the file of that split"
            )
        arguments = {"path": "parquet", "data_files": {split: str(path)}}
        return _complaints(spec, datasets, lambda: datasets.load_dataset(**arguments, split=split))
    place = str(path) if path.exists() else name
    arguments = {"name": options.get("config"), "revision": options.get("revision")}
    if "split" in options:
        load = lambda: datasets.load_dataset(place, split=options["split"], **arguments)  # noqa: E731
        return _complaints(spec, datasets, load)
    splits = _complaints(
        spec,
        datasets,
        lambda: datasets.get_dataset_split_names(
            place, config_name=arguments["name"], revision=arguments["revision"]
        ),
    )
    split = _the_split(spec, list(splits), None)
    return _complaints(spec, datasets, lambda: datasets.load_dataset(place, split=split, **arguments))


def _load_saved(spec: str, path: Path, options: dict[str, str]) -> Dataset:
    """What `save_to_disk` wrote: one split or several."""
    datasets = _datasets(spec)
    for option in ("config", "revision"):
        if option in options:
            raise ValueError(f"{spec!r}: a dataset written by save_to_disk has no {option}; leave that out")
    saved = _complaints(spec, datasets, lambda: datasets.load_from_disk(str(path)))
    if isinstance(saved, datasets.DatasetDict):
        return saved[_the_split(spec, list(saved), options.get("split"))]
    if "split" in options and saved.split is not None and str(saved.split) != options["split"]:
        raise ValueError(f"{spec!r}: the folder holds the split {saved.split}; write split={saved.split}")
    return saved


def _the_split(spec: str, splits: list[str], asked: str | None) -> str:
    if asked in splits:
        return str(asked)
    if asked is not None:
        raise ValueError(f"{spec!r}: there is no split {asked!r}; {nearest_name(asked, splits)}")
    if len(splits) == 1:
        return splits[0]
    raise ValueError(f"{spec!r} has several splits ({', '.join(splits)}); choose one by split=NAME")


def _complaints(spec: str, datasets: ModuleType, load: Callable[[], Any]) -> Any:
    """Call, with what the library complains about in one line that names the source and a remedy."""
    try:
        with held_back(logging.CRITICAL, "datasets"):
            return load()
    except datasets.exceptions.DatasetGenerationError as error:
        raise _unreadable(spec, error.__cause__ or error) from error
    except ConnectionError as error:
        raise DatasetError(
            f"{spec!r} cannot be fetched: {_one_line(error)}; go online (unset HF_HUB_OFFLINE and "
            "HF_DATASETS_OFFLINE) once, whereupon it is kept, or give a dataset on disk: hf:PATH"
        ) from error
    except FileNotFoundError as error:  # also the library's own "not found", which derives from it
        raise ValueError(
            f"{spec!r}: {_one_line(error)}; name one of the hub (hf auth login where it is not public) or "
            "a folder of parquet files or pictures, or one that save_to_disk wrote: hf:PATH"
        ) from error
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        if isinstance(error, OSError) or type(error).__module__.startswith("pyarrow"):
            raise _unreadable(spec, error) from error
        raise ValueError(f"{spec!r}: {_one_line(error)}") from error


def _unreadable(spec: str, reason: BaseException) -> DatasetError | ValueError:
    """A failure where the system or the network says so; else a damaged file, as a bad zip is."""
    of_arrow = type(reason).__module__.startswith("pyarrow")
    is_damage = of_arrow or (type(reason) is OSError and reason.errno is None)
    kind = ValueError if is_damage else DatasetError
    return kind(f"{spec!r} cannot be read: {_one_line(reason)}; fetch or write it anew")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


# -------------------------------------------------------------------------------------------------- columns


def _columns(rows: Dataset) -> str:
    return ", ".join(rows.column_names)


def _image_column(spec: str, rows: Dataset, asked: str | None) -> str:
    """The column of images; `ValueError` where there is none, or more than one."""
    from datasets import Image

    if asked is not None:
        _check_column(spec, rows, "image", asked)
        return asked
    found = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    found = found or [name for name, feature in rows.features.items() if _holds_bytes(feature)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{spec!r}: several columns hold images ({', '.join(found)}); choose one by image=COLUMN"
        )
    raise ValueError(
        f"{spec!r}: no column holds images or bytes; its columns are {_columns(rows)}; where one holds paths "
        "of images, name it by image=COLUMN"
    )


def _holds_bytes(feature: Any) -> bool:
    if isinstance(feature, dict):
        return _holds_bytes(feature.get("bytes"))
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _undecoded(rows: Dataset, column: str) -> Dataset:
    """The column alone, its images as bytes or paths."""
    from datasets import Image

    images = rows.select_columns([column])
    if isinstance(rows.features[column], Image):
        return images.cast_column(column, Image(decode=False))
    return images


def _sizes_and_names(images: Dataset, column: str) -> bytes:
    """A hash of every row's number of bytes, and of the file's name where there is a path, in their order.

    The sizes are read from the column's offsets; the images themselves are not touched.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    sizes, names = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    rows: Any = images if images._indices is None else images.flatten_indices()
    for part in rows.data.column(column).chunks:
        for values in part.flatten() if pa.types.is_struct(part.type) else [part]:
            if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
                lengths = pc.fill_null(pc.call_function("binary_length", [values]), -1)
                sizes.update(lengths.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
                for value in values.to_pylist():
                    names.update((value or "").rpartition("/")[2].encode() + b"\0")
    return sizes.digest() + names.digest()


def _label_columns(spec: str, rows: Dataset, asked: str | None, image: str) -> list[str]:
    """The columns that labels could be meant by."""
    from datasets import ClassLabel

    if asked is not None:
        _check_column(spec, rows, "label", asked)
        return [asked]
    others = {name: feature for name, feature in rows.features.items() if name != image}
    found = [name for name, feature in others.items() if isinstance(feature, ClassLabel)]
    return found or [
        name for name, feature in others.items() if name.lower() in LABEL_NAMES and _holds_classes(feature)
    ]


def _holds_classes(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint", "string", "large_string", "bool"))


def _check_column(spec: str, rows: Dataset, option: str, asked: str) -> None:
    if asked not in rows.column_names:
        raise ValueError(
            f"{spec!r}: {option}={asked} is no column; {nearest_name(asked, list(rows.column_names))}"
        )


def _labels(spec: str, rows: Dataset, column: str) -> Labels:
    """Class labels as they are; of other columns the distinct values, sorted, are the classes."""
    from datasets import ClassLabel

    feature = rows.features[column]
    table: Any = rows.select_columns([column]).with_format("arrow")[:]
    values = table.column(column)
    if values.null_count:
        raise ValueError(f"{spec!r}: {values.null_count} of {len(rows)} rows have no {column}; remove those")
    if isinstance(feature, ClassLabel):
        numbers = values.to_numpy().astype(np.int64)
        if numbers.min() < 0:
            raise ValueError(
                f"{spec!r}: {int((numbers < 0).sum())} of {len(rows)} rows have {column} -1, which is none; "
                "choose another split or label=COLUMN"
            )
        return numbers, tuple(feature.names)
    if not _holds_classes(feature):
        raise ValueError(f"{spec!r}: the column {column} holds {feature}, not a class; choose another")
    classes, numbers = np.unique(np.asarray(values.to_pylist()), return_inverse=True)
    rank, names = in_class_order(list(map(str, classes)))
    return rank[numbers.reshape(-1)], names
