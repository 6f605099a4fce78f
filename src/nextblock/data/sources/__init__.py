"""Where images are, and how to name it.

    DIR                                             searched recursively; classes: its first-level folders
    DIR of tars                                     one tar a class, as ImageNet-21k is distributed
    files:LIST.txt                                  one path a line; classes: after a tab
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
import re
from collections.abc import Sequence
from pathlib import Path

from nextblock.config import DataConfig
from nextblock.data.sources.base import Damage, DataError, EncodedSource, Labels, Source, read_file
from nextblock.data.sources.datasets import DigitsSource, TorchvisionSource
from nextblock.data.sources.folder import FilesSource, FolderSource, local_path
from nextblock.data.sources.huggingface import HF_OPTIONS, HuggingFaceSource
from nextblock.data.sources.remote import open_remote
from nextblock.data.sources.subset import ConcatSource, SubsetSource, read_subset_list
from nextblock.data.sources.tar import TarSource, open_class_tars, open_tars
from nextblock.data.sources.zip import ZipSource
from nextblock.settings import nearest_name

__all__ = [
    "ConcatSource",
    "Damage",
    "DataError",
    "EncodedSource",
    "Labels",
    "Source",
    "SubsetSource",
    "absolute_spec",
    "open_source",
    "open_sources",
    "read_file",
]

log = logging.getLogger(__name__)

KNOWN = (
    "a directory, files:LIST.txt, X.tar, shards-{000000..000999}.tar, https:, s3: or gs: before such shards, "
    "X.zip, torchvision:NAME,root=DIR,split=train, hf:NAME,split=train, X.parquet, subset:LIST.txt, digits"
)
_KINDS = ("files", "torchvision", "hf", "digits", "subset", "https", "s3", "gs")
_COMPRESSED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


def open_source(spec: str, data: DataConfig) -> Source:
    """Open what `spec` names (see the grammar above); `ValueError` if there is nothing to read."""
    if not spec.strip():
        raise ValueError("the name of a source is empty; name a directory of images, or . for this one")
    path = local_path(spec)
    kind, _, rest = spec.partition(":")
    # A path comes first: a folder called digits must not silently become scikit-learn's.
    if path.exists():
        if kind in _KINDS and not rest:
            keyword = "digits:split=all" if kind == "digits" else f"{kind}:..."
            log.warning(
                "%r is read as the path %s; write ./%s to say so, or %s for the keyword",
                spec,
                path.absolute(),
                spec,
                keyword,
            )
        return _open_path(spec, path, data)
    if kind == "digits":
        return DigitsSource(spec, read_options(spec, rest, known=("split",)).get("split", "all"), data)
    if kind == "torchvision":
        name, _, rest = rest.partition(",")
        return TorchvisionSource(spec, name, read_options(spec, rest), data)
    if kind == "hf":
        name, _, rest = rest.partition(",")
        return HuggingFaceSource(spec, name, read_options(spec, rest, known=HF_OPTIONS), data)
    if kind == "files":
        return FilesSource(spec, local_path(rest), data)
    if kind == "subset":
        return _open_subset(spec, data)
    if _is_url(spec):
        return open_remote(spec, data)
    if spec.lower().endswith(".tar") and not _has_unknown_kind(spec):
        return open_tars(spec, data)
    raise ValueError(_why_not(spec, path))


def _open_path(spec: str, path: Path, data: DataConfig) -> Source:
    """What exists under this path, by what it is and how its name ends."""
    if path.is_dir():
        return open_class_tars(spec, path, data) or FolderSource(spec, path, data)
    ending = path.suffix.lower()
    if ending == ".zip":
        return ZipSource(spec, path, data)
    if ending == ".parquet":
        return HuggingFaceSource(spec, str(path), {}, data)
    if ending == ".tar":
        return TarSource(spec, [path], data)
    raise ValueError(_why_not(spec, path))


def _open_subset(spec: str, data: DataConfig) -> SubsetSource:
    """Open `subset:LIST.txt` or `subset:LIST.txt,of=SPEC`; all that follows `of=` is the other source."""
    # Of several ,of= the first is this list's; the rest belongs to the other source.
    text, _, of = spec.removeprefix("subset:").partition(",of=")
    path = local_path(text)
    head, numbers = read_subset_list(spec, path)
    of = of or head.get("of", "")
    if not of:
        raise ValueError(f"{spec!r}: the list names no source; write subset:{text},of=SPEC")
    try:
        source = open_source(of, data)
    except ValueError as error:
        raise ValueError(
            f"{spec!r}: cannot open the source that the list {str(path)!r} was drawn from: {error}; if it "
            f"has moved, write subset:{text},of=SPEC"
        ) from error
    return SubsetSource(spec, source, numbers, head.get("fingerprint"))


def open_sources(specs: Sequence[str], data: DataConfig) -> Source:
    """Open what the specs name: one source as it is, several as a mixture; none of them twice."""
    # One directory may have two names, such as d and d/.
    places = [str(local_path(spec).resolve()) if local_path(spec).exists() else spec for spec in specs]
    twice = next((spec for i, spec in enumerate(specs) if places[i] in places[:i]), None)
    if twice is not None:
        raise ValueError(
            f"data.train names {twice!r} twice; name each source once, with a larger share in data.weights"
        )
    parts = [open_source(spec, data) for spec in specs]
    return parts[0] if len(parts) == 1 else ConcatSource(parts)


def absolute_spec(spec: str) -> str:
    """The same source under a name that works in any working directory."""
    if local_path(spec).exists():
        return _absolute(spec)
    kind, _, rest = spec.partition(":")
    if kind == "digits" or _is_url(spec):
        return spec
    if kind == "subset":
        path, comma, of = rest.partition(",of=")
        return f"subset:{_absolute(path)}{comma}{absolute_spec(of) if of else ''}"
    if kind == "files":
        return f"files:{_absolute(rest)}"
    if kind == "hf":
        name, comma, options = rest.partition(",")
        return f"hf:{_absolute(name) if local_path(name).exists() else name}{comma}{options}"
    if kind == "torchvision":
        options = (option.partition("=") for option in rest.split(","))
        return "torchvision:" + ",".join(
            key + sign + (_absolute(value) if key == "root" else value) for key, sign, value in options
        )
    return _absolute(spec)


def _absolute(path: str) -> str:
    return str(local_path(path).absolute())


def read_options(spec: str, text: str, known: tuple[str, ...] | None = None) -> dict[str, str]:
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


def _is_url(spec: str) -> bool:
    return re.match(r"(https?|s3|gs)://", spec) is not None


def _has_unknown_kind(spec: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+]+:", spec) is not None


def _why_not(spec: str, path: Path) -> str:
    """Why a spec that names no source names none, and what to write."""
    # The likeliest slips first, each with what to type instead.
    if _COMPRESSED_TAR.search(spec):
        return (
            f"{spec!r}: images in a compressed tar cannot be read in random order; unpack it (gunzip, unxz, "
            "zstd -d) to a plain tar, or to a directory"
        )
    if path.exists():
        remedy = f"give the directory that holds it, or files:{spec} if it lists images"
        return f"{spec!r} is a file; {remedy}; known sources: {KNOWN}"
    if spec.startswith("digits,"):
        return f"{spec!r}: the options of digits follow a colon; write digits:{spec.removeprefix('digits,')}"
    if spec.startswith("["):
        return (
            f"{spec!r}: there is no such directory; to train on several sources name them one by one: "
            "--data.train A --data.train B, or doctor A B"
        )
    if _has_unknown_kind(spec):
        kind = spec.partition(":")[0]
        return (
            f"{spec!r}: there is no such path and no kind of source {kind!r}; "
            f"{nearest_name(kind, list(_KINDS))}; known: {KNOWN}"
        )
    if path.suffix.lower() in (".zip", ".parquet"):
        return f"{spec!r}: there is no such file (searched {path.absolute()})"
    return f"{spec!r}: there is no such directory (searched {path.absolute()}); known sources: {KNOWN}"
