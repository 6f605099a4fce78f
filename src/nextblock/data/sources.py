"""Where images are: a directory, a torchvision dataset, or scikit-learn's digits, behind one interface.

    DIR                                             searched recursively; classes: its first-level folders
    torchvision:CIFAR10,root=DIR,split=train        with download=true it is fetched first
    digits, digits:split=train, digits:split=test   1,797 handwritten digits of 8 x 8 px

A source knows names and labels; it opens an image only when asked for it.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from einops import repeat
from jaxtyping import UInt8
from torch import Tensor

from nextblock.config import DataConfig
from nextblock.data.decode import BadImageError, decode_image
from nextblock.data.keyed import keyed_permutation
from nextblock.data.listing import list_images
from nextblock.settings import nearest_name

__all__ = ["DigitsSource", "FolderSource", "Labels", "Source", "open_source"]

KNOWN = "a directory, torchvision:NAME,root=DIR,split=train, digits, digits:split=train, digits:split=test"
_LATER = ("files", "hf")
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")

Labels = tuple[np.ndarray, tuple[str, ...]]
"""The class of every image, int64 (n,), and the classes' names."""


class Source(ABC):
    """A numbered list of images, the same at every opening."""

    spec: str
    """What it was opened from."""
    in_memory: bool
    """Whether reading an image costs next to nothing, so that worker processes would not help."""

    @abstractmethod
    def __len__(self) -> int: ...

    def read(self, index: int) -> UInt8[Tensor, "3 h w"]:
        """The image's RGB pixels; raises `BadImageError` where it cannot be read."""
        self._check(index)
        return self._read(index)

    def name(self, index: int) -> str:
        """What to call the image in a message: its path below the directory, or its number."""
        self._check(index)
        return self._name(index)

    @property
    def labels(self) -> np.ndarray:
        """The class of every image, int64 (n,); `ValueError` saying what was searched where there is none."""
        return self._labels[0]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers; `ValueError` like `labels`."""
        return self._labels[1]

    @property
    @abstractmethod
    def has_labels(self) -> bool:
        """Whether `labels` gives any."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal lists: the number of images and a hash of their names, not of their contents."""
        return self._fingerprint

    @abstractmethod
    def _read(self, index: int) -> Tensor: ...

    @abstractmethod
    def _name(self, index: int) -> str: ...

    @abstractmethod
    def _find_labels(self) -> Labels: ...

    @abstractmethod
    def _make_fingerprint(self) -> str: ...

    @cached_property
    def _labels(self) -> Labels:
        return self._find_labels()

    @cached_property
    def _fingerprint(self) -> str:
        return self._make_fingerprint()

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}; the numbers are 0 to {len(self) - 1}")


def open_source(spec: str, data: DataConfig) -> Source:
    """Open what `spec` names (see the grammar above); `ValueError` where there is nothing to read."""
    kind, _, rest = spec.partition(":")
    if kind == "digits":
        return DigitsSource(spec, _options(spec, rest, known=("split",)).get("split", "all"))
    if kind == "torchvision":
        from nextblock.data.torchvision_source import TorchvisionSource

        name, _, rest = rest.partition(",")
        return TorchvisionSource(spec, name, _options(spec, rest), data)
    path = Path(spec).expanduser()
    if path.is_dir():
        return FolderSource(spec, path, data)
    raise ValueError(_why_not(spec, kind, path))


def _why_not(spec: str, kind: str, path: Path) -> str:
    if kind in _LATER or spec.lower().endswith(_ARCHIVES):
        return f"{spec!r}: this kind of source is not supported by this version; known: {KNOWN}"
    if path.exists():
        return f"{spec!r} is a file; give the directory that holds it; known sources: {KNOWN}"
    if re.match(r"[A-Za-z][A-Za-z0-9+]+:", spec):
        nearest = nearest_name(kind, ["torchvision", "digits"])
        return f"{spec!r}: there is no kind of source {kind!r}; {nearest}; known: {KNOWN}"
    return f"{spec!r}: there is no such directory (searched {path.absolute()}); known sources: {KNOWN}"


def _options(spec: str, text: str, known: tuple[str, ...] | None = None) -> dict[str, str]:
    """Read `key=value,key=value`."""
    options = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if not key or not value:
            raise ValueError(f"{spec!r}: {item!r} is no option; write key=value, such as split=train")
        if known is not None and key not in known:
            raise ValueError(f"{spec!r}: there is no option {key!r}; {nearest_name(key, list(known))}")
        options[key] = value
    return options


class FolderSource(Source):
    """The images below a directory, in the order of their paths."""

    in_memory = False

    def __init__(self, spec: str, root: Path, data: DataConfig) -> None:
        self.spec = spec
        self._data = data
        self._files = list_images(root)

    def __len__(self) -> int:
        return len(self._files)

    @property
    def has_labels(self) -> bool:
        """Whether every image lies in a folder of the directory."""
        return self._files.number_in_root == 0

    def _read(self, index: int) -> Tensor:
        try:
            content = self._files.path(index).read_bytes()
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror or error}") from error
        return decode_image(content, decoder=self._data.decoder, max_pixels=self._data.max_pixels)

    def _name(self, index: int) -> str:
        return self._files.name(index)

    def _find_labels(self) -> Labels:
        if not self.has_labels:
            raise ValueError(
                f"{self.spec!r} has no labels: they are its first-level folders, but "
                f"{self._files.number_in_root} of its {len(self)} images lie directly in it; move every "
                "image into a folder named after its class"
            )
        return self._files.first_folders()

    def _make_fingerprint(self) -> str:
        return f"folder-{len(self)}-{self._files.digest()}"


class DigitsSource(Source):
    """The 1,797 handwritten digits that scikit-learn carries, or a fixed stratified 80 % or 20 % of them.

    They are 8 x 8 px with values 0 to 16, here scaled to 0 to 255 and repeated to three channels.
    """

    in_memory = True

    def __init__(self, spec: str, split: str) -> None:
        from sklearn.datasets import load_digits

        values, classes = load_digits(return_X_y=True)
        is_test = _stratified_fifth(classes)
        kept = {"all": np.full_like(is_test, fill_value=True), "train": ~is_test, "test": is_test}
        if split not in kept:
            raise ValueError(f"{spec!r}: digits has no split {split!r}; {nearest_name(split, list(kept))}")
        self.spec = spec
        self._split = split
        self._numbers = np.flatnonzero(kept[split])
        self._classes = classes[self._numbers].astype(np.int64)
        grey = np.rint(values[self._numbers].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self._images = repeat(torch.from_numpy(grey), "b h w -> b c h w", c=3).contiguous()

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def has_labels(self) -> bool:
        """Always: the digits 0 to 9."""
        return True

    def _read(self, index: int) -> Tensor:
        return self._images[index]

    def _name(self, index: int) -> str:
        return f"digits[{self._numbers[index]}]"

    def _find_labels(self) -> Labels:
        return self._classes, tuple("0123456789")

    def _make_fingerprint(self) -> str:
        numbers = hashlib.blake2b(self._numbers.astype("<i8").tobytes(), digest_size=8)
        return f"digits-{self._split}-{len(self)}-{numbers.hexdigest()}"


def _stratified_fifth(labels: np.ndarray) -> np.ndarray:
    """Mark a fifth of every class, drawn once and for all: every fifth of a shuffled list sorted by class."""
    shuffled = keyed_permutation(0, len(labels), "digits split")
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    marked = np.zeros(len(labels), dtype=bool)
    marked[by_class[::5]] = True
    return marked
