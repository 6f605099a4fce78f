"""Where images are: directories, lists, archives, datasets and scikit-learn's digits, behind one interface.

    DIR                                             searched recursively; classes: its first-level folders
    files:LIST.txt                                  one path a line; classes: after a tab
    X.tar, shards-{000000..000999}.tar              WebDataset's layout; classes: .cls, .json, or folders
    https://HOST/x-{0000..0009}.tar, s3:, gs:       such shards on a server, copied into the cache folder
    X.zip                                           classes: first-level folders
    hf:NAME-OR-PATH,split=train, X.parquet          rows of a Hugging Face dataset
    subset:LIST.txt                                 some images of another source
    torchvision:CIFAR10,root=DIR,split=train        with download=true it is fetched first
    digits, digits:split=train, digits:split=test   1,797 handwritten digits of 8 x 8 px

A source knows names and labels; it opens an image only when asked for it.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
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
from nextblock.data.sources.listing import in_class_order, list_images
from nextblock.data.sources.remote import is_remote
from nextblock.settings import nearest_name

__all__ = [
    "SUBSET_HEADER",
    "DigitsSource",
    "EncodedSource",
    "FolderSource",
    "Labels",
    "Source",
    "in_class_order",
    "open_source",
    "read_file",
]

SUBSET_HEADER = b"# images of a source of nextblock; read it as subset:THIS_FILE"
"""The first line of a list of numbers, by which it is told from a list of files."""

KNOWN = (
    "a directory, files:LIST.txt, X.tar, shards-{000000..000999}.tar, https:, s3: or gs: before such shards, "
    "X.zip, torchvision:NAME,root=DIR,split=train, hf:NAME,split=train, X.parquet, "
    "subset:LIST.txt, digits"
)
_KINDS = ("files", "torchvision", "hf", "digits", "subset", "https", "s3", "gs")
_COMPRESSED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)

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

    def read(self, index: int) -> UInt8[Tensor, "c h w"]:
        """The image's pixels, RGB unless data.channels says otherwise; `BadImageError` where unreadable."""
        self._check(index)
        return self._read(index)

    def content(self, index: int) -> bytes | None:  # noqa: ARG002 - sources of files override it
        """The encoded file as it lies, None where images are no files; `BadImageError` where unreadable."""
        return None

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
        return DigitsSource(spec, _options(spec, rest, known=("split",)).get("split", "all"), data.channels)
    if kind == "torchvision":
        from nextblock.data.sources.torchvision_sets import TorchvisionSource

        name, _, rest = rest.partition(",")
        return TorchvisionSource(spec, name, _options(spec, rest), data)
    if is_remote(spec):
        from nextblock.data.sources.remote_tar import open_remote

        return open_remote(spec, data)
    if kind == "subset":
        from nextblock.data.sources.subsets import open_subset

        return open_subset(spec, data)
    if kind == "files":
        from nextblock.data.sources.files import FilesSource

        return FilesSource(spec, Path(rest).expanduser(), data)
    if kind == "hf" or spec.lower().endswith(".parquet"):
        from nextblock.data.sources.hf import open_dataset

        return open_dataset(spec, data)
    return _open_path(spec, kind, data)


def _open_path(spec: str, kind: str, data: DataConfig) -> Source:
    path = Path(spec).expanduser()
    if path.is_dir():
        return FolderSource(spec, path, data)
    if spec.lower().endswith(".zip") and path.is_file():
        from nextblock.data.sources.zip import ZipSource

        return ZipSource(spec, path, data)
    if spec.lower().endswith(".tar") and not _has_unknown_kind(spec):
        from nextblock.data.sources.tar import open_tar

        return open_tar(spec, data)
    raise ValueError(_why_not(spec, kind, path))


def _has_unknown_kind(spec: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+]+:", spec) is not None and not Path(spec).exists()


def _why_not(spec: str, kind: str, path: Path) -> str:
    if _COMPRESSED_TAR.search(spec):
        return (
            f"{spec!r}: a tar that is compressed as a whole cannot be read in any order; unpack it (gunzip, "
            "unxz, zstd -d) to a plain tar, or to a directory"
        )
    if path.exists():
        remedy = f"give the directory that holds it, or files:{spec} if it lists images"
        return f"{spec!r} is a file; {remedy}; known sources: {KNOWN}"
    if spec.startswith("digits,"):
        return f"{spec!r}: the options of digits follow a colon; write digits:{spec.removeprefix('digits,')}"
    if spec.startswith("["):
        return (
            f"{spec!r}: there is no such directory; name several sources to train on one by one: "
            "--data.train A --data.train B, or doctor A B"
        )
    if _has_unknown_kind(spec):
        nearest = nearest_name(kind, list(_KINDS))
        return f"{spec!r}: there is no kind of source {kind!r}; {nearest}; known: {KNOWN}"
    if spec.lower().endswith(".zip"):
        return f"{spec!r}: there is no such file (searched {path.absolute()})"
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


def read_file(path: Path) -> bytes:
    """A file's content; `BadImageError` where it cannot be read, or is a pipe or a device."""
    try:
        # Without waiting: a pipe that nobody writes to would stop the worker for ever.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadImageError("cannot be read: it is no regular file")
            return file.read()
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror or error}") from error


class EncodedSource(Source):
    """A source of encoded files, wherever they lie."""

    in_memory = False
    _data: DataConfig

    def content(self, index: int) -> bytes:
        """The encoded file as it lies; `BadImageError` where it cannot be read."""
        self._check(index)
        return self._content(index)

    @abstractmethod
    def _content(self, index: int) -> bytes: ...

    def _read(self, index: int) -> Tensor:
        return decode_image(
            self._content(index),
            decoder=self._data.decoder,
            max_pixels=self._data.max_pixels,
            channels=self._data.channels,
        )


class FolderSource(EncodedSource):
    """The images below a directory, in the order of their paths."""

    def __init__(self, spec: str, root: Path, data: DataConfig) -> None:
        self.spec = spec
        self._data = data
        self._files = list_images(root, data)

    def __len__(self) -> int:
        return len(self._files)

    @property
    def has_labels(self) -> bool:
        """Whether every image lies in a folder of the directory."""
        return self._files.number_in_root == 0

    def path(self, index: int) -> Path:
        """Where the file lies."""
        self._check(index)
        return self._files.path(index)

    def _content(self, index: int) -> bytes:
        return read_file(self._files.path(index))

    def _name(self, index: int) -> str:
        return self._files.names.text(index)

    def _find_labels(self) -> Labels:
        if not self.has_labels:
            raise ValueError(
                f"{self.spec!r} has no labels: they are its first-level folders, but "
                f"{self._files.number_in_root} of its {len(self)} images lie directly in it; move every "
                "image into a folder named after its class"
            )
        return self._files.names.first_folders()

    def _make_fingerprint(self) -> str:
        return f"folder-{len(self)}-{self._files.names.digest()}"


class DigitsSource(Source):
    """The 1,797 handwritten digits that scikit-learn carries, or a fixed stratified 80 % or 20 % of them.

    They are 8 x 8 px with values 0 to 16, here scaled to 0 to 255 and repeated to three channels, or as many.
    """

    in_memory = True

    def __init__(self, spec: str, split: str, channels: int = 3) -> None:
        from sklearn.datasets import load_digits

        values, classes = load_digits(return_X_y=True)
        is_test = _stratified_fifth(np.asarray(classes))
        kept = {"all": np.full_like(is_test, fill_value=True), "train": ~is_test, "test": is_test}
        if split not in kept:
            raise ValueError(f"{spec!r}: digits has no split {split!r}; {nearest_name(split, list(kept))}")
        self.spec = spec
        self._split = split
        self._numbers = np.flatnonzero(kept[split])
        self._classes = np.asarray(classes)[self._numbers].astype(np.int64)
        grey = np.rint(values[self._numbers].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self._images = repeat(torch.from_numpy(grey), "b h w -> b c h w", c=channels).contiguous()

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
