"""Sources of images, and the grammar of their names.

    DIR                                             searched recursively; classes: its first-level folders
    DIR of tars                                     one tar a class, as ImageNet-21k is distributed
    files:LIST.txt                                  one path a line; classes: after a tab
    X.jpg, X.png, ...                               one image
    X.tar, shards-{000000..000999}.tar              WebDataset's layout; classes: .cls, .json, or folders
    https://HOST/x-{0000..0009}.tar, s3:, gs:       such shards on a server, copied into the cache folder
    X.zip                                           classes: first-level folders
    hf:NAME-OR-PATH,split=train, X.parquet          rows of a Hugging Face dataset
    subset:LIST.txt                                 some images of another source
    torchvision:CIFAR10,root=DIR,split=train        with download=true it is fetched first
    digits, digits:split=train, digits:split=test   1,797 handwritten digits of 8 x 8 px

A path is a path: a keyword counts only if nothing of that name exists.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nextblock.config import DataConfig
from nextblock.data.sources.archives import TarSource, ZipSource, open_class_tars, open_tars
from nextblock.data.sources.base import EXTENSIONS, ConcatSource, DataError, Source, SubsetSource
from nextblock.data.sources.datasets import HF_OPTIONS, DigitsSource, HuggingFaceSource, TorchvisionSource
from nextblock.data.sources.folder import FilesSource, FolderSource, local_path, open_list
from nextblock.errors import UsageError
from nextblock.settings import nearest_name

__all__ = [
    "ConcatSource",
    "DataError",
    "Source",
    "SubsetSource",
    "absolute_spec",
    "open_source",
    "open_sources",
]

log = logging.getLogger(__name__)

KNOWN = (
    "a directory, files:LIST.txt, X.tar, shards-{000000..000999}.tar, https:, s3: or gs: before such shards, "
    "X.zip, torchvision:NAME,root=DIR,split=train, hf:NAME,split=train, X.parquet, subset:LIST.txt, digits, "
    "digits:split=train"
)
_KINDS = ["files", "torchvision", "hf", "digits", "subset", "https", "s3", "gs"]
# Compression of a tar as a whole: reading its last image means unpacking all of it.
_COMPRESSED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_URL = re.compile(r"(https?|s3|gs)://")
_KEYWORD = re.compile(r"[A-Za-z][A-Za-z0-9+]+:")


def open_source(spec: str, data: DataConfig, *, parents: tuple[Path, ...] = ()) -> Source:
    """Open the source that `spec` names (grammar above); raises `ValueError` if there is nothing to read.

    `parents` are the lists of images that name this source, each in the one before.
    """
    if not spec.strip():
        raise UsageError("the name of a source is empty; name a directory of images, or . for this one")
    path, (kind, _, rest) = local_path(spec), spec.partition(":")
    # A path comes first: a folder called digits must not silently become scikit-learn's. The warning says how
    # to write the keyword.
    if path.exists():
        if spec in _KINDS:
            keyword = "digits:split=all" if spec == "digits" else f"{spec}:..."
            how = f"write ./{spec} to say so, or {keyword} for the keyword"
            log.warning("%r is read as the path %s; %s", spec, path.absolute(), how)
        if path.is_dir():
            return open_class_tars(spec, path, data) or FolderSource(spec, path, data)
        ending = path.suffix.lower()
        if ending == ".zip":
            return ZipSource(spec, path, data)
        if ending == ".parquet":
            return HuggingFaceSource(spec, str(path), {}, data)
        if ending == ".tar":
            return TarSource(spec, [path], data)
        if ending.encode() in EXTENSIONS:
            return FilesSource(spec, path.parent, [os.fsencode(path.name)], [], data)
        problem = f"it is a file; give the directory that contains it, or files:{spec} if it lists images"
    else:
        # There is no such path, so it is a keyword, an address, or shards in braces.
        name, _, options = rest.partition(",")
        if kind == "digits":
            return DigitsSource(spec, read_options(spec, rest, ("split",)).get("split", "all"), data)
        if kind == "torchvision":
            return TorchvisionSource(spec, name, read_options(spec, options), data)
        if kind == "hf":
            return HuggingFaceSource(spec, name, read_options(spec, options, HF_OPTIONS), data)
        if kind == "files":
            return open_list(spec, local_path(rest), data)
        if kind == "subset":
            return _open_subset(spec, data, parents)
        if _URL.match(spec):
            from nextblock.data.sources.remote import RemoteTarSource

            return RemoteTarSource(spec, data)
        if spec.lower().endswith(".tar") and not _KEYWORD.match(spec):
            return open_tars(spec, data)
        problem = f"there is no such directory or file (searched {path.absolute()})"
        if _KEYWORD.match(spec):
            problem = f"there is no such path and no kind of source {kind!r}; {nearest_name(kind, _KINDS)}"
            if kind in _KINDS:
                problem = f"there is no such path; write an address as {kind}://HOST/X.tar"
    if _COMPRESSED_TAR.search(spec):
        problem = "images in a compressed tar cannot be read in random order; unpack it"
    raise UsageError(f"{spec!r}: {problem}; known sources: {KNOWN}")


def _open_subset(spec: str, data: DataConfig, parents: tuple[Path, ...]) -> SubsetSource:
    """Open `subset:LIST.txt` or `subset:LIST.txt,of=SPEC`; the rest after `of=` is the other source."""
    name, of = _list_and_source(spec)
    path = local_path(name)
    if not path.is_file():
        raise UsageError(f"{spec!r}: there is no list {str(path.absolute())!r}; write subset:LIST.txt")
    if (resolved := path.resolve()) in parents:
        raise UsageError(f"the list {str(path)!r} is its own source, perhaps through others; draw it again")
    # Lines of the head are "# key: value"; the first describes the file, and its key is ignored.
    head: dict[str, str] = {}
    numbers = []
    for place, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        number = line.partition("\t")[0].strip()  # the image's name may follow
        if line.startswith("#"):
            key, _, value = line.removeprefix("#").partition(":")
            head[key.strip()] = value.strip()
        elif number.isdecimal():
            numbers.append(min(int(number), 2**63 - 1))  # numpy's largest; refused as too large
        elif number:
            begin = f"line {place} of the list begins with {number[:40]!r}, not with the number of an image"
            raise UsageError(f"{spec!r}: {begin}; a list of paths is read as files:LIST.txt")
    if not numbers:
        raise UsageError(f"{spec!r}: the list names no image")
    of = of or head.get("of", "")
    if not of:
        raise UsageError(f"{spec!r}: the list names no source; write subset:{name},of=SPEC")
    try:
        source = open_source(of, data, parents=(*parents, resolved))
    except ValueError as error:
        remedy = f"if the list's source has moved, write subset:{name},of=SPEC"
        raise UsageError(f"{spec!r}: {error}; {remedy}") from error
    return SubsetSource(spec, source, np.array(numbers, dtype=np.int64), head.get("fingerprint"))


def _list_and_source(spec: str) -> tuple[str, str]:
    """The parts of `subset:LIST.txt,of=SPEC`; without `,of=` the second is empty."""
    rest = spec.removeprefix("subset:")
    if local_path(rest).is_file():  # a path may contain ,of= too
        return rest, ""
    # The first ,of= is this list's; any others belong to the other source.
    name, _, of = rest.partition(",of=")
    return name, of


def open_sources(specs: Sequence[str], data: DataConfig) -> Source:
    """Open one source as it is, or several different ones as a mixture."""
    # One directory may have two names, such as d and d/, so compare resolved paths.
    places = [str(local_path(spec).resolve()) if local_path(spec).exists() else spec for spec in specs]
    for number, spec in enumerate(specs):
        if places[number] in places[:number]:
            how = "name each source once, with a larger share in data.weights"
            raise UsageError(f"data.train names {spec!r} twice; {how}")
    parts = [open_source(spec, data) for spec in specs]
    return parts[0] if len(parts) == 1 else ConcatSource(parts)


def absolute_spec(spec: str) -> str:
    """Name the same source so that it works in any working directory."""
    kind, _, rest = spec.partition(":")
    # As in `open_source`, a path comes before a keyword.
    if not local_path(spec).exists():
        if kind == "digits" or _URL.match(spec):
            return spec
        if kind == "subset":
            path, of = _list_and_source(spec)
            return f"subset:{_absolute(path)}" + (f",of={absolute_spec(of)}" if of else "")
        if kind == "files":
            return f"files:{_absolute(rest)}"
        if kind == "hf":
            name, comma, options = rest.partition(",")
            return f"hf:{_absolute(name) if local_path(name).exists() else name}{comma}{options}"
        if kind == "torchvision":
            return re.sub(r"(?<=,root=)[^,]*", lambda root: _absolute(root[0]), spec)
    return _absolute(spec)


def _absolute(path: str) -> str:
    return str(local_path(path).absolute())


def read_options(spec: str, text: str, known: Sequence[str] = ()) -> dict[str, str]:
    """Parse `key=value,key=value`; if `known` keys are given, any other raises `ValueError`."""
    options = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if not key or not value:
            raise UsageError(f"{spec!r}: {item!r} is not an option; write key=value, such as split=train")
        if known and key not in known:
            raise UsageError(f"{spec!r}: there is no option {key!r}; {nearest_name(key, list(known))}")
        options[key] = value
    return options
