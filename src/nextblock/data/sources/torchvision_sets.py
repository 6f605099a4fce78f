"""A torchvision dataset as a source: `torchvision:CIFAR10,root=DIR,split=train`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from nextblock.config import DataConfig
from nextblock.data.decode import check_pixels, image_to_tensor, pillow_errors
from nextblock.data.sources.base import Labels, Source
from nextblock.settings import nearest_name

__all__ = ["TorchvisionSource"]

_NOT_OPTIONS = ("transform", "target_transform", "transforms", "loader", "is_valid_file", "kwargs")
_TRAIN = {"train": True, "test": False, "val": False}
_FLAGS = {"true": True, "false": False}


class TorchvisionSource(Source):
    """Any torchvision dataset that yields pictures; its options are its constructor's arguments."""

    def __init__(self, spec: str, name: str, options: dict[str, str], data: DataConfig) -> None:
        self.spec = spec
        self._dataset_name = name
        self._split = options.get("split", "default")
        self._max_pixels, self._channels = data.max_pixels, data.channels
        self._dataset = _construct(spec, name, options)
        self.in_memory = isinstance(getattr(self._dataset, "data", None), np.ndarray | Tensor)
        if not len(self):
            raise ValueError(f"{spec!r}: the dataset has no images")

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def has_labels(self) -> bool:
        """Whether the dataset states one class number per image, or yields them."""
        return self._stated_labels is not None or isinstance(self._dataset[0][1], int | np.integer)

    def _read(self, index: int) -> Tensor:
        with pillow_errors():
            picture = self._dataset[index][0]
            if isinstance(picture, Image.Image):
                check_pixels(picture.size, self._max_pixels)
                return image_to_tensor(picture, self._channels)
        kind = type(picture).__name__
        raise ValueError(f"{self.spec!r} yields no pictures but {kind}; give a dataset of pictures")

    def _name(self, index: int) -> str:
        samples = getattr(self._dataset, "samples", None)
        return str(samples[index][0]) if samples is not None else f"{self._dataset_name}[{index}]"

    def _find_labels(self) -> Labels:
        labels = self._stated_labels
        if labels is None and self.has_labels:
            labels = _as_labels([self._dataset[index][1] for index in range(len(self))], len(self))
        if labels is None:
            raise ValueError(
                f"{self.spec!r} has no labels: searched the dataset's targets, _labels, labels and samples, "
                "and what it yields, for one class number per image"
            )
        number = int(labels.max()) + 1
        names = getattr(self._dataset, "classes", None) or ()
        if len(names) < number or not all(isinstance(name, str) for name in names):
            names = map(str, range(number))
        return labels, tuple(names)

    def _make_fingerprint(self) -> str:
        return f"torchvision-{self._dataset_name}-{self._split}-{len(self)}"

    @cached_property
    def _stated_labels(self) -> np.ndarray | None:
        found = [getattr(self._dataset, name, None) for name in ("targets", "_labels", "labels")]
        samples = getattr(self._dataset, "samples", None)
        if isinstance(samples, list):
            found.append([sample[1] for sample in samples])
        labels = (_as_labels(values, len(self)) for values in found)
        return next((values for values in labels if values is not None), None)


def _construct(spec: str, name: str, options: dict[str, str]) -> Any:
    """The dataset, with the constructor's complaints as `ValueError`s that name the remedy."""
    known = _datasets()
    if name not in known:
        raise ValueError(
            f"{spec!r}: torchvision has no dataset {name!r}; {nearest_name(name, sorted(known))}"
        )
    parameters = inspect.signature(known[name]).parameters
    arguments = _arguments(spec, name, options, parameters)
    try:
        return known[name](**arguments)
    except (RuntimeError, OSError) as error:
        can_download = "download" in parameters or "kwargs" in parameters
        remedy = (
            "add download=true to fetch it" if can_download else "torchvision cannot fetch it: put it there"
        )
        where = options.get("root", "its root")
        raise ValueError(
            f"{spec!r}: not found in {where}: {error} (here: {remedy}, or give another root=)"
        ) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{spec!r}: {error}") from error


def _datasets() -> dict[str, Any]:
    from torchvision import datasets

    classes = {name: getattr(datasets, name) for name in datasets.__all__}
    return {
        name: cls
        for name, cls in classes.items()
        if isinstance(cls, type) and issubclass(cls, datasets.VisionDataset)
    }


def _arguments(
    spec: str, name: str, options: dict[str, str], parameters: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    """The constructor's arguments; split= becomes train= where the constructor speaks of that."""
    arguments: dict[str, Any] = {"download": False} if "download" in parameters else {}
    known = [key for key in parameters if key not in _NOT_OPTIONS]
    if "kwargs" in parameters:
        known += ["train", "download"]  # EMNIST and QMNIST hand these on to MNIST
    if "train" in known and "split" not in known:
        known.append("split")
    for key, text in options.items():
        if key not in known:
            raise ValueError(f"{spec!r}: {name} has no option {key!r}; {nearest_name(key, known)}")
        if key == "split" and "split" not in parameters:
            if text not in _TRAIN:
                raise ValueError(
                    f"{spec!r}: {name} has no split {text!r}; {nearest_name(text, list(_TRAIN))}"
                )
            arguments["train"] = _TRAIN[text]
        else:
            arguments[key] = _value(text) if key != "root" else text
    missing = [
        f"{key}=..."
        for key in known
        if key not in arguments and key in parameters and parameters[key].default is inspect.Parameter.empty
    ]
    if missing:
        raise ValueError(f"{spec!r}: {name} needs {' and '.join(missing)}; write it after a comma")
    return arguments


def _value(text: str) -> bool | int | str:
    if text.lower() in _FLAGS:
        return _FLAGS[text.lower()]
    return int(text) if text.isdecimal() else text


def _as_labels(values: Any, length: int) -> np.ndarray | None:
    """One class number per image as int64 (n,), or None where these values are something else."""
    if not isinstance(values, list | tuple | np.ndarray | Tensor) or len(values) != length:
        return None
    try:
        labels = np.asarray(values)
    except ValueError:  # lists of different lengths are annotations, not labels
        return None
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        return None
    return labels.astype(np.int64)
