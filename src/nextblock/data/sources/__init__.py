"""Where images are, behind one interface: a module for each kind of source, and what several of them need."""

from nextblock.data.sources.base import (
    SUBSET_HEADER,
    EncodedSource,
    Labels,
    Source,
    open_source,
    read_file,
)

__all__ = [
    "SUBSET_HEADER",
    "EncodedSource",
    "Labels",
    "Source",
    "open_source",
    "read_file",
]
