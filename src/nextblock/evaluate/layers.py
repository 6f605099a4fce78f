"""Names of encoder layers on the command line: last, last6, layer7, 3+4+5, each, best."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence

from nextblock.errors import UsageError

log = logging.getLogger(__name__)

WORDS = re.compile(r"last([1-9]\d*)?|[1-9]\d*|layer\d+|\d+(\+\d+)+|each|best")
ONE_CHOICE = "last, last6 (or any number), layer7 or 3+4+5 (counted from 0)"


def check_layers(words: Sequence[str], *, several: Sequence[str] = ("each", "best")) -> None:
    """Raise `UsageError` for a word that does not name layers; `layer_choices` checks the encoder's depth.

    `several` are the words that the caller accepts besides those of `ONE_CHOICE`.
    """
    for word in words:
        is_excluded = word in ("each", "best") and word not in several
        if WORDS.fullmatch(word) is None or is_excluded:
            known = ", ".join([ONE_CHOICE, *several])
            raise UsageError(f"layers is {word!r}; use {known}")


@functools.lru_cache  # so that a note on layers comes once, not once for each head
def layer_choices(word: str, depth: int, best: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], ...]:
    """Resolve a word to layers, counted from 0; only "each" gives several choices.

    A bare number n means the last n layers, or all if there are fewer. `best` are the layers for "best".
    Raises `UsageError` for layers that the encoder lacks.
    """
    if word == "each":
        return tuple((layer,) for layer in range(depth))
    if word == "best":
        assert best is not None, "callers accept `best` only if they know the layers"
        return (best,)
    if word.startswith("layer") or "+" in word:
        chosen = sorted(int(number) for number in word.removeprefix("layer").split("+"))
        if chosen[-1] >= depth or len(set(chosen)) < len(chosen):
            raise UsageError(
                f"layers is {word}, but the encoder has {depth} layers; name each once, among 0 to "
                f"{depth - 1}"
            )
        return (tuple(chosen),)
    count = int(word.removeprefix("last") or 1)
    if count > depth:
        log.info("the encoder has %d layers: using all of them, not %d", depth, count)
    return (tuple(range(max(0, depth - count), depth)),)
