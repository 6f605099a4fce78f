"""Rows of a Hugging Face dataset, from the hub or from disk, or of a parquet file."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from nextblock.config import DataConfig
from nextblock.data.decode import BadImageError
from nextblock.data.sources.base import DataError, EncodedSource, Labels, check_size, read_file
from nextblock.data.sources.folder import any_unicode_form
from nextblock.data.sources.names import in_class_order, text
from nextblock.errors import UsageError
from nextblock.logs import muted
from nextblock.settings import nearest_name

HF_OPTIONS = ("split", "config", "image", "label", "revision")
# Names of columns used as labels if the dataset does not declare one.
LABEL_NAMES = ("label", "labels", "class", "classes", "class_name", "category", "target", "fine_label")
LABEL_KINDS = ("ClassLabel", "int", "uint", "string", "bool", "float")
# Rows whose bytes enter the fingerprint, in addition to the sizes of all.
SAMPLED_ROWS = 64


class HuggingFaceSource(EncodedSource):
    """The rows of one split of a dataset, from the Hugging Face hub or from disk.

    Rows stay in memory-mapped Arrow files, so workers share them, and access to any row is fast. A row has an
    image's encoded bytes, or names its file.
    """

    def __init__(self, spec: str, name: str, options: dict[str, str], data: DataConfig) -> None:
        path = any_unicode_form(Path(name).expanduser())
        self.spec, self._data, self._options = spec, data, options
        try:
            with muted(logging.CRITICAL, "datasets", "huggingface_hub"):
                self._rows, self._folders = _load(name, path, options)
        except ImportError as error:
            raise DataError(f"{spec!r} needs a package: pip install datasets") from error
        except Exception as error:  # the library and its dependencies raise anything
            cause = error.__cause__ if type(error).__name__.startswith("DatasetGeneration") else error
            reason = f"{spec!r}: {' '.join(str(cause).split()).rstrip('.') or type(cause).__name__}"
            reason += "" if path.exists() else f"; there is no file or folder {path.absolute()}"
            # Wrong names and damaged files are the user's mistakes. Other errors, such as a lost connection
            # or a full disk, are failures.
            is_mistake = isinstance(cause, ValueError | TypeError | KeyError | FileNotFoundError)
            raise (ValueError if is_mistake else DataError)(reason) from error
        if not len(self):
            raise UsageError(f"{spec!r}: the dataset has no rows")
        self._kinds = {column: _kind(feature) for column, feature in self._rows.features.items()}
        self._image = self._image_column()
        if "label" in options:
            self._label_column()
        self._images = self._rows.select_columns([self._image])
        if self._kinds[self._image] == "Image":
            feature: Any = type(self._rows.features[self._image])
            self._images = self._images.cast_column(self._image, feature(decode=False))
        self._display_name = f"{path.name or name}[{self._rows.split or options.get('split', 'all')}]"

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def has_labels(self) -> bool:
        """Whether one column contains labels; reading them raises if a row has none."""
        try:
            return bool(self._label_column())
        except ValueError:
            return False

    def _content(self, index: int) -> bytes:
        value = self._images[index][self._image]
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if value is None:
            raise BadImageError("the row contains no image")
        if isinstance(value, bytes):
            check_size(len(value), self._data)
            return value
        # Rows are untrusted: read only the dataset's own files, and those that the library fetched.
        path = Path(os.path.normpath(self._folders[0] / value))
        if "\0" in value or not any(path.is_relative_to(folder) for folder in self._folders):
            raise BadImageError(f"the row names {text(value.encode())}, a file not below {self._folders[0]}")
        return read_file(path, self._data)

    def _name(self, index: int) -> str:
        return text(os.fsencode(f"{self._display_name}[{index}]"))

    def _choose(self, option: str, candidates: list[str], kinds: tuple[str, ...]) -> str:
        """The column named by the option, or the only candidate; `ValueError` unless its kind fits."""
        named = self._options.get(option)
        fits = [named] if named else candidates
        if len(fits) == 1 and self._kinds.get(fits[0], "?").startswith(kinds):
            return fits[0]
        reason = f"{option}={named} does not fit" if named else f"{', '.join(fits) or 'none'} could hold it"
        columns = ", ".join(f"{name} ({kind})" for name, kind in self._kinds.items())
        raise UsageError(
            f"{self.spec!r}: no single column for the {option} ({reason}); choose by {option}=COLUMN of "
            f"{' or '.join(kinds)}; the columns are {columns}"
        )

    def _image_column(self) -> str:
        """The column of images: as named, else the only one of image features, else of bytes."""
        of_kind = {k: [name for name, kind in self._kinds.items() if kind == k] for k in ("Image", "binary")}
        # A column of text must be named to be used as paths: it may contain captions or addresses.
        return self._choose("image", of_kind["Image"] or of_kind["binary"], ("Image", "binary", "string"))

    def _label_column(self) -> str:
        """The column of labels: as named, else the only one of class labels, else of `LABEL_NAMES`."""
        others = [name for name in self._kinds if name != self._image]
        stated = [name for name in others if self._kinds[name] == "ClassLabel"]
        named = [n for n in others if n.lower() in LABEL_NAMES and self._kinds[n].startswith(LABEL_KINDS)]
        # Tables turn integers with gaps into floats: whole ones are classes, others are measurements.
        whole = [name for name in named if not self._is_measurement(name)]
        name = self._choose("label", stated or whole, LABEL_KINDS)
        if self._is_measurement(name):
            raise UsageError(f"{self.spec!r}: the column {name} holds {self._kinds[name]} that are not whole")
        return name

    def _is_measurement(self, name: str) -> bool:
        if not self._kinds[name].startswith("float"):
            return False
        values = self._column(name).to_numpy(zero_copy_only=False)
        values = values[~np.isnan(values)]
        return not (np.isfinite(values).all() and (values == np.floor(values)).all())

    def _column(self, name: str) -> Any:
        table: Any = self._rows.select_columns([name]).with_format("arrow")[:]
        return table.column(name).combine_chunks()

    def _find_labels(self) -> Labels:
        """Class labels as declared; in other columns, the sorted distinct values are the classes."""
        name = self._label_column()
        kind, values = self._kinds[name], self._column(name)
        missing = values.is_null(nan_is_null=True).true_count
        if missing:
            raise UsageError(f"{self.spec!r}: {missing} of {len(self)} rows have no {name}; drop them")
        if kind == "ClassLabel":
            # Test splits on the hub often hide labels, with -1 in every row.
            numbers, names = values.to_numpy().astype(np.int64), self._rows.features[name].names
            outside = numbers[(numbers < 0) | (numbers >= len(names))]
            if len(outside):
                what = f"{len(outside)} of {len(self)} rows have {name} {outside[0]}"
                raise UsageError(f"{self.spec!r}: {what}, which is no class; choose another split=")
            return numbers, tuple(names)
        # Arrow lists distinct values in order of appearance; `rank` sorts them.
        encoded = values.dictionary_encode()
        classes = [int(v) if kind.startswith("float") else v for v in encoded.dictionary.to_pylist()]
        rank, names = in_class_order([text(str(name).encode()) for name in classes])
        return rank[encoded.indices.to_numpy()], names

    def _make_fingerprint(self) -> str:
        rows = self._rows
        stated = [rows.info.config_name, rows.split, rows.column_names, self._image, self._version()]
        digest = hashlib.blake2b("\n".join(map(str, stated)).encode(), digest_size=16)
        return f"hf-{len(self)}-{digest.hexdigest()}"

    def _version(self) -> str:
        """Identifies this state of the dataset, wherever it is stored and whichever process asks."""
        split = (self._rows.info.splits or {}).get(str(self._rows.split).partition("[")[0])
        if split is None:  # save_to_disk stores the dataset's own fingerprint
            return str(self._rows._fingerprint)
        # The library's fingerprint depends on its cache and version, so hash all sizes and file names in
        # order, and the bytes of some rows. Sizes come from the column's offsets: no other image is read.
        import pyarrow.compute as pc

        sizes, names = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
        images: Any = self._images if self._images._indices is None else self._images.flatten_indices()
        for part in images.data.column(self._image).chunks:
            for values in part.flatten() if str(part.type).startswith("struct") else [part]:
                if str(values.type).endswith("binary"):
                    lengths = pc.fill_null(pc.call_function("binary_length", [values]), -1)
                    sizes.update(lengths.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
                else:
                    for value in values.to_pylist():
                        names.update((value or "").rpartition("/")[2].encode() + b"\0")
        digest = hashlib.blake2b(sizes.digest() + names.digest(), digest_size=16)
        for index in sorted({len(self) * i // SAMPLED_ROWS for i in range(SAMPLED_ROWS)}):
            value = self._images[index][self._image]
            value = value.get("bytes") if isinstance(value, dict) else value
            digest.update(hashlib.blake2b(value).digest() if isinstance(value, bytes) else b"none")
        return f"{split.num_examples}, {digest.hexdigest()}"


def _kind(feature: Any) -> str:
    """The kind of a column in words; bytes, alone or with a path, are "binary"."""
    if isinstance(feature, dict):
        return "binary" if _kind(feature.get("bytes")) == "binary" else f"structs of {', '.join(feature)}"
    name = type(feature).__name__
    if name in ("List", "LargeList", "Sequence"):
        return f"lists of {_kind(feature.feature)}"
    return str(feature.dtype).removeprefix("large_") if name == "Value" else name


def _load(name: str, path: Path, options: dict[str, str]) -> tuple[Any, list[Path]]:
    """Open one split; returns it with the folders whose files its rows may name.

    An existing path is read from disk, any other name from the hub or the library's cache.
    """
    import datasets
    from datasets import config as library
    from huggingface_hub.constants import HF_HUB_CACHE

    # A string that cannot be a hub name is a path, and is never looked up there.
    is_name = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]+)?", name)
    if not name or (not path.exists() and (not is_name or name.lower().endswith(".parquet"))):
        raise UsageError("write hf:NAME,split=train or hf:PATH,split=train")
    # Images that the library fetched are in its caches. Allow each folder with and without links resolved, as
    # the library uses both forms.
    place, folders = name, [library.HF_DATASETS_CACHE, Path(HF_HUB_CACHE)]
    if path.exists():
        place, folders = str(path), [path if path.is_dir() else path.parent, *folders]
    folders = [form for folder in folders for form in (folder.resolve(), folder.absolute())]
    split, config, revision = map(options.get, ("split", "config", "revision"))
    is_saved = any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))
    if (is_saved or path.is_file()) and (config or revision):
        raise UsageError("it has no config or revision to choose; leave that out")
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise UsageError(f"{path.name} is no parquet file; give one, or a folder of them")
        # One file is one split. Its name must agree with the requested one: test must not mean train.
        if split not in (None, "train", *re.split(r"[^A-Za-z0-9]+", path.stem)):
            raise UsageError(f"the name of this one file does not say {split}; leave split= out")
        # The library treats file names as patterns, so escape brackets.
        files = {split or "train": glob.escape(place)}
        return datasets.load_dataset("parquet", data_files=files, split=split or "train"), folders
    # List splits before loading: without a split the library would fetch them all.
    saved: Any = datasets.load_from_disk(place) if is_saved else {}
    if isinstance(saved, datasets.Dataset):
        saved = {str(saved.split): saved}
    elif not is_saved and split is None:
        saved = datasets.get_dataset_split_names(place, config, revision=revision)
    splits = list(saved) or [str(split)]
    if split is None and len(splits) > 1:
        raise UsageError(f"there are several splits ({', '.join(splits)}); choose one by split=NAME")
    if split not in (None, *splits):
        raise UsageError(f"there is no split {split!r}; {nearest_name(split, splits)}")
    if is_saved:
        return saved[splits[0] if split is None else split], folders
    return datasets.load_dataset(place, config, split=splits[0], revision=revision), folders
