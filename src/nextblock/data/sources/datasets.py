"""Images of other libraries' datasets: scikit-learn's digits and torchvision's."""

from __future__ import annotations

import hashlib
import inspect
import os
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
from nextblock.data.sources.base import DataError, Labels, Source, decode, read_file
from nextblock.data.sources.names import text
from nextblock.errors import UsageError
from nextblock.settings import nearest_name


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
        # Refuse datasets of videos, flow or patches here, but not a broken first image, for which a decoder
        # may raise anything: it is reported when it is read.
        try:
            first = self._dataset[0]
        except (AttributeError, ImportError, TypeError) as error:
            raise UsageError(f"{spec!r} yields no pictures: {error}; name a dataset of pictures") from error
        except Exception:
            first = (Path(), None)
        picture, self._first_label = first[:2] if isinstance(first, tuple) else (first, None)
        if not isinstance(picture, Path | Image.Image):
            problem = f"yields no pictures but {type(picture).__name__}; name a dataset of pictures"
            raise UsageError(f"{spec!r} {problem}")

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def has_labels(self) -> bool:
        """Whether the dataset stores or yields one class number per image."""
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
                raise UsageError(
                    f"{self.spec!r}: labels come with the images; one is bad: {error}"
                ) from error
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
        # The library verifies the files of its datasets, so name, split and size identify them.
        return f"torchvision-{self._display_name}-{self._split}-{len(self)}"

    @cached_property
    def _stated_labels(self) -> np.ndarray | None:
        # torchvision stores labels under three names; some datasets use one for boxes or captions.
        stored = (getattr(self._dataset, name, None) for name in ("targets", "_labels", "labels"))
        labels = (_class_numbers(values, len(self)) for values in stored)
        return next((values for values in labels if values is not None), None)


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
        options = {key: value for key, value in options.items() if key != "split"}
        options["train"] = str(split == "train")
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
        is_empty = not len(dataset)  # a wrong argument may show only here
    except Exception as error:
        # A download can fail for the network or the disk. Otherwise something is missing or misspelt.
        is_failure = arguments.get("download") and isinstance(error, RuntimeError | OSError)
        raise (DataError if is_failure else ValueError)(f"{spec!r}: {error}") from error
    if is_empty:
        raise UsageError(f"{spec!r}: the dataset has no images")
    return dataset
