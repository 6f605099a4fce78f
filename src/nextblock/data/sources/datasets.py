"""Images of other libraries' datasets: scikit-learn's digits, torchvision's and Hugging Face's."""

from __future__ import annotations

import errno
import glob
import hashlib
import inspect
import logging
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import repeat
from PIL import Image
from torch import Tensor

from nextblock.config import DataConfig
from nextblock.data.decode import BadImageError, check_pixels, image_to_tensor, pillow_errors
from nextblock.data.random import keyed_permutation
from nextblock.data.sources.base import (
    DataError,
    Labels,
    Source,
    check_size,
    decode,
    digest,
    in_class_order,
    read_file,
    text,
)
from nextblock.data.sources.folder import local_path
from nextblock.errors import UsageError
from nextblock.logs import muted
from nextblock.settings import nearest_name

HF_OPTIONS = ("split", "config", "image", "label", "revision")
# Names of columns used as labels if the dataset does not declare one.
LABEL_NAMES = ("label", "labels", "class", "classes", "class_name", "category", "target", "fine_label")
LABEL_KINDS = ("ClassLabel", "int", "uint", "string", "bool", "whole float")
# Rows whose bytes enter the fingerprint, in addition to the sizes of all.
SAMPLED_ROWS = 64


class DigitsSource(Source):
    """scikit-learn's 1,797 handwritten digits, or a fixed stratified 80 % or 20 % of them.

    They are 8 x 8 px with values 0 to 16, scaled to 0 to 255 and repeated to `data.channels` channels.
    """

    in_memory = True

    def __init__(self, spec: str, split: str, data: DataConfig) -> None:
        from sklearn.datasets import load_digits

        values, classes = map(np.asarray, load_digits(return_X_y=True))
        # Every fifth of a shuffled list, stably sorted by class: always the same fifth of each class.
        shuffled = keyed_permutation(0, len(classes), "digits split")
        is_test = np.zeros(len(classes), dtype=bool)
        is_test[shuffled[np.argsort(classes[shuffled], kind="stable")][::5]] = True
        splits = {"all": is_test | True, "train": ~is_test, "test": is_test}
        if split not in splits:
            raise UsageError(f"{spec!r}: digits has no split {split!r}; {nearest_name(split, list(splits))}")
        self.spec, self._split = spec, split
        self._numbers = np.flatnonzero(splits[split])
        self._classes = classes[self._numbers].astype(np.int64)
        grey = np.rint(values[self._numbers].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self._images = repeat(torch.from_numpy(grey), "b h w -> b c h w", c=data.channels).contiguous()

    def __len__(self) -> int:
        return len(self._numbers)

    def _read(self, index: int) -> Tensor:
        return self._images[index]

    def _name(self, index: int) -> str:
        # The number among all digits, so that an image has the same name in every split.
        return f"digits[{self._numbers[index]}]"

    def _find_labels(self) -> Labels:
        return self._classes, tuple("0123456789")

    def _make_fingerprint(self) -> str:
        numbers = hashlib.blake2b(self._numbers.astype("<i8").tobytes(), digest_size=8)
        return f"digits-{self._split}-{len(self)}-{numbers.hexdigest()}"


class TorchvisionSource(Source):
    """Any torchvision dataset of pictures; its options are its constructor's arguments."""

    def __init__(self, spec: str, name: str, options: dict[str, str], data: DataConfig) -> None:
        self.spec, self._display_name, self._data = spec, name, data
        self._split = options.get("split", "default")
        self._dataset = _open_torchvision(spec, name, options)
        self.in_memory = isinstance(getattr(self._dataset, "data", None), np.ndarray | Tensor)
        # torchvision stores labels under three names; some datasets use one for boxes or captions.
        stored = (getattr(self._dataset, name, None) for name in ("targets", "_labels", "labels"))
        labels = (_class_numbers(values, len(self)) for values in stored)
        self._stated_labels = next((values for values in labels if values is not None), None)
        # Refuse datasets of videos, flow or patches here, but not a broken first image, for which a decoder
        # may raise anything: it is reported when it is read.
        try:
            first = self._dataset[0]
        except (AttributeError, ImportError, TypeError) as error:
            first = error
        except Exception:
            first = Path()
        picture, self._first_label = first[:2] if isinstance(first, tuple) else (first, None)
        if not isinstance(picture, Path | Image.Image):
            what = picture if isinstance(picture, Exception) else type(picture).__name__
            raise UsageError(f"{spec!r} yields no pictures but {what}; name a dataset of pictures")

    def __len__(self) -> int:
        return len(self._dataset)

    def _search_labels(self) -> bool:
        # Judge by the first image: checking all would decode the whole dataset.
        first = self._first_label
        return self._stated_labels is not None or (isinstance(first, int | np.integer) and int(first) >= 0)

    def _read(self, index: int) -> Tensor:
        data = self._data
        with pillow_errors():
            picture = self._dataset[index][0]
            if isinstance(picture, Image.Image):
                check_pixels(picture.size, data.max_pixels)
                return image_to_tensor(picture, data.channels, data.background)
        return decode(read_file(picture, data), data)

    def _name(self, index: int) -> str:
        samples = getattr(self._dataset, "samples", None)
        return f"{self._display_name}[{index}]" if samples is None else text(os.fsencode(samples[index][0]))

    def _find_labels(self) -> Labels:
        labels = self._stated_labels
        if labels is None and self.has_labels:
            try:
                with pillow_errors():
                    labels = _class_numbers([self._dataset[i][1] for i in range(len(self))], len(self))
            except BadImageError as error:
                problem = f"labels come with the images; one is bad: {error}"
                raise UsageError(f"{self.spec!r}: {problem}") from error
        if labels is None:
            where = "neither targets, _labels or labels nor what it yields are class numbers"
            raise UsageError(f"{self.spec!r} has no labels: {where}")
        # If `classes` has numbers or lacks some, as in some datasets, use the numbers as names.
        number = int(labels.max()) + 1
        names = getattr(self._dataset, "classes", None) or ()
        if len(names) < number or not all(isinstance(name, str) for name in names):
            names = map(str, range(number))
        return labels, tuple(names)

    def _make_fingerprint(self) -> str:
        # The library verifies the files of its datasets, so name, split and size identify them. A folder that
        # it reads (ImageFolder) may hold any files, so their names are needed too.
        parts = ["torchvision", self._display_name, self._split, str(len(self))]
        if isinstance(samples := getattr(self._dataset, "samples", None), list):
            names = (os.path.relpath(path, self._dataset.root) for path, *_ in samples)
            parts.append(digest("\n".join(names).encode("utf-8", "surrogateescape")))
        return "-".join(parts)


def _class_numbers(values: Any, length: int) -> np.ndarray | None:
    """Convert to one class number per image, int64 (n,); None if the values are something else."""
    if not isinstance(values, list | tuple | np.ndarray | Tensor) or len(values) != length:
        return None
    try:
        labels = np.asarray(values)
    except ValueError:  # lists of different lengths are annotations, not labels
        return None
    is_number = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer) and labels.min() >= 0
    return labels.astype(np.int64) if is_number else None


def _open_torchvision(spec: str, name: str, options: dict[str, str]) -> Any:
    """Construct a dataset, which yields paths instead of pictures if possible."""
    from torchvision import datasets

    exported = {key: getattr(datasets, key) for key in datasets.__all__ if key != "VisionDataset"}
    known = {key: value for key, value in exported.items() if isinstance(value, type)}
    if name not in known:
        nearest = nearest_name(name, sorted(known))
        raise UsageError(f"{spec!r}: torchvision has no dataset {name!r}; {nearest}")
    parameters = inspect.signature(known[name]).parameters
    # A dataset with a train flag has two splits: "val" must not silently mean "test".
    if "train" in parameters and "split" in options and "split" not in parameters:
        split, splits = options["split"], ["train", "test"]
        if split not in splits:
            raise UsageError(f"{spec!r}: {name} has no split {split!r}; {nearest_name(split, splits)}")
        options = {**options, "train": str(split == "train")}
        del options["split"]
    # Download only on request, although some datasets would by default.
    arguments: dict[str, Any] = {"download": False} if "download" in parameters else {}
    # The constructor checks its options. Their types follow from the written text, except for options whose
    # default is text: VOCDetection's year=2012, for example.
    for key, value in options.items():
        is_text = key == "root" or (key in parameters and isinstance(parameters[key].default, str))
        number = int(value) if value.isdecimal() and not is_text else value
        arguments[key] = value.lower() == "true" if value.lower() in ("true", "false") else number
    # Torchvision's loader decodes before the size can be checked, and drops alpha and 16 bits. With Path as
    # loader the dataset yields paths, so its files are decoded by the same rules as all others.
    if "loader" in parameters:
        arguments["loader"] = Path
    try:
        dataset = known[name](**arguments)
        length = len(dataset)  # a wrong argument may show only here
    except Exception as error:
        # A download can fail for the network or the disk. Otherwise something is missing or misspelt.
        is_failure = arguments.get("download") and isinstance(error, RuntimeError | OSError)
        raise (DataError if is_failure else UsageError)(f"{spec!r}: {error}") from error
    if not length:
        raise UsageError(f"{spec!r}: the dataset has no images")
    return dataset


class HuggingFaceSource(Source):
    """The rows of one split of a dataset, from the Hugging Face hub or from disk.

    Rows stay in memory-mapped Arrow files, so workers share them, and access to any row is fast. A row has an
    image's encoded bytes, or names its file.
    """

    def __init__(self, spec: str, name: str, options: dict[str, str], data: DataConfig) -> None:
        path = local_path(name)
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
            if isinstance(cause, OSError) and cause.errno in (errno.EROFS, errno.EACCES):
                reason += "; the library keeps copies in the folder that the variable HF_HOME names"
            # Wrong names and damaged files are the user's mistakes. Other errors, such as a lost connection
            # or a full disk, are failures.
            is_mistake = isinstance(cause, ValueError | TypeError | KeyError | FileNotFoundError)
            raise (UsageError if is_mistake else DataError)(reason) from error
        if not len(self):
            raise UsageError(f"{spec!r}: the dataset has no rows")
        self._kinds = {column: _kind(feature) for column, feature in self._rows.features.items()}
        # Tables turn integers with gaps into floats: whole numbers are classes, others are measurements.
        for column, kind in self._kinds.items():
            may_be_label = column == options.get("label") or column.lower() in LABEL_NAMES
            if may_be_label and kind.startswith("float"):
                values = self._column(column).drop_null().to_numpy()
                values = values[~np.isnan(values)]
                if np.isfinite(values).all() and (values == np.floor(values)).all():
                    self._kinds[column] = f"whole {kind}"
        # Without image=, the only column of images, else of bytes. A column of text must be named to be used
        # as paths: it may contain captions or addresses.
        of_kind = {k: [name for name, kind in self._kinds.items() if kind == k] for k in ("Image", "binary")}
        candidates = of_kind["Image"] or of_kind["binary"]
        self._image = self._choose("image", candidates, ("Image", "binary", "string"))
        if "label" in options:
            _ = self._label
        self._images = self._rows.select_columns([self._image])
        if self._kinds[self._image] == "Image":
            feature: Any = type(self._rows.features[self._image])
            self._images = self._images.cast_column(self._image, feature(decode=False))
        self._display_name = f"{path.name or name}[{self._rows.split or options.get('split', 'all')}]"

    def __len__(self) -> int:
        return len(self._rows)

    def _search_labels(self) -> str:
        return self._label  # reading them raises if a row has none

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

    @cached_property
    def _label(self) -> str:
        """The column of labels: as named, else the only one of class labels, else of `LABEL_NAMES`."""
        kinds = {name: kind for name, kind in self._kinds.items() if name != self._image}
        stated = [name for name, kind in kinds.items() if kind == "ClassLabel"]
        named = [
            name for name in kinds if name.lower() in LABEL_NAMES and kinds[name].startswith(LABEL_KINDS)
        ]
        return self._choose("label", stated or named, LABEL_KINDS)

    def _column(self, name: str) -> Any:
        table: Any = self._rows.select_columns([name]).with_format("arrow")[:]
        return table.column(name).combine_chunks()

    def _find_labels(self) -> Labels:
        """Class labels as declared; in other columns, the sorted distinct values are the classes."""
        name = self._label
        kind, values = self._kinds[name], self._column(name)
        if missing := values.is_null(nan_is_null=True).true_count:
            raise UsageError(f"{self.spec!r}: {missing} of {len(self)} rows have no {name}; drop them")
        if kind == "ClassLabel":
            # Test splits on the hub often hide labels, with -1 in every row.
            numbers, names = values.to_numpy().astype(np.int64), self._rows.features[name].names
            if len(outside := numbers[(numbers < 0) | (numbers >= len(names))]):
                what = f"{len(outside)} of {len(self)} rows have {name} {outside[0]}"
                raise UsageError(f"{self.spec!r}: {what}, which is no class; choose another split=")
            return numbers, tuple(names)
        # Arrow lists distinct values in order of appearance; `rank` sorts them.
        encoded = values.dictionary_encode()
        classes = [int(v) if kind.startswith("whole") else v for v in encoded.dictionary.to_pylist()]
        rank, names = in_class_order([text(str(name).encode()) for name in classes])
        return rank[encoded.indices.to_numpy()], names

    def _make_fingerprint(self) -> str:
        rows = self._rows
        stated = [rows.info.config_name, rows.split, rows.column_names, self._image, self._version()]
        hashed = digest("\n".join(map(str, stated)).encode())
        return f"hf-{len(self)}-{hashed}"

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
        parts = [sizes.digest(), names.digest()]
        for index in sorted({len(self) * i // SAMPLED_ROWS for i in range(SAMPLED_ROWS)}):
            value = self._images[index][self._image]
            value = value.get("bytes") if isinstance(value, dict) else value
            parts.append(hashlib.blake2b(value).digest() if isinstance(value, bytes) else b"none")
        return f"{split.num_examples}, {digest(*parts)}"


def _kind(feature: Any) -> str:
    """The kind of a column; bytes, alone or with a path, are "binary"."""
    if isinstance(feature, dict):
        return "binary" if _kind(feature.get("bytes")) == "binary" else "dict"
    name = type(feature).__name__
    return str(feature.dtype).removeprefix("large_") if name == "Value" else name


def _load(name: str, path: Path, options: dict[str, str]) -> tuple[Any, list[Path]]:
    """Open one split; returns it with the folders whose files its rows may name.

    An existing path is read from disk, any other name from the hub or the library's cache.
    """
    import datasets
    from datasets import config as library
    from huggingface_hub.constants import HF_HUB_CACHE

    # A string that cannot be a hub name is a path, and is never looked up there.
    is_name = re.fullmatch(r"(?i)[a-z0-9_][a-z0-9_.-]*(/[a-z0-9_.-]+)?(?<!\.parquet)", name)
    if not name or not (path.exists() or is_name):
        raise UsageError("no path and no name of a dataset; write hf:NAME,split=train or hf:PATH,split=train")
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
