"""Parquet files of evaluations, whose metadata records how they were made."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nextblock.atomic import make_directory, write_aside
from nextblock.errors import UsageError

KEY = b"nextblock"


def pyarrow() -> Any:
    """Import pyarrow with its module `parquet`; `UsageError` if it is not installed."""
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UsageError(
            "parquet files need pyarrow: pip install pyarrow; or write another format"
        ) from error
    return importlib.import_module("pyarrow")


def write_parquet(path: Path, tables: Iterable[Any], about: Mapping[str, Any]) -> None:
    """Write pyarrow tables of one schema, one after the other; store `about` as JSON in the metadata."""
    pa = pyarrow()
    make_directory(path.parent)
    with write_aside(path) as aside:
        writer = None
        for table in tables:
            labelled = table.replace_schema_metadata({KEY: json.dumps(about).encode()})
            writer = writer or pa.parquet.ParquetWriter(aside, labelled.schema)
            writer.write_table(labelled)
        assert writer is not None, "there must be at least one table"
        writer.close()


def about_parquet(path: Path) -> dict[str, Any] | None:
    """Read the `about` that `write_parquet` stored in a file; None if there is none."""
    metadata = pyarrow().parquet.read_schema(path).metadata or {}
    return json.loads(metadata[KEY]) if KEY in metadata else None
