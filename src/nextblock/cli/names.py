"""Names of images in tables: their end, which is the file's name, where the whole is too long."""

from __future__ import annotations

__all__ = ["end_of"]


def end_of(name: str, letters: int) -> str:
    """At most `letters` of a name, its last ones, an ellipsis standing for what is left out."""
    return name if len(name) <= letters else f"…{name[len(name) - letters + 1 :]}"
