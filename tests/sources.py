"""Images told apart by their red, archives of them, and what a source says of them."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from nextblock.config import DataConfig
from nextblock.data import Source, open_source


def png(red: int = 0) -> bytes:
    """An image of 6 x 4 pixels."""
    content = io.BytesIO()
    Image.new("RGB", (6, 4), (red, 100, 200)).save(content, "PNG")
    return content.getvalue()


def archive(path: Path, members: Mapping[str, bytes | str], form: int | None = None, mode: Any = "w") -> Path:
    """Write a tar or a zip, whichever the name says; `form` is a tar's format or a zip's method."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, mode, form or zipfile.ZIP_STORED) as file:
            for name, content in members.items():
                file.writestr(name, content)
        return path
    with tarfile.open(path, mode, format=form, errors="surrogateescape") as file:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def opened(spec: object, **settings: Any) -> Source:
    return open_source(str(spec), DataConfig(**{"workers": 0, **settings}))


def names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def reds(source: Source) -> list[int]:
    return [int(source.read(index)[0, 0, 0]) for index in range(len(source))]


def classes(source: Source) -> list[str]:
    return [source.class_names[label] for label in source.labels]
