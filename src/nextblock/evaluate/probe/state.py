"""What is done of a probe, kept on disk, so that the same command goes on where it stopped."""

from __future__ import annotations

import json
import pickle
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nextblock.atomic import write_aside
from nextblock.checkpoint import CheckpointError
from nextblock.data import BadSample
from nextblock.errors import UsageError
from nextblock.evaluate.probe.train_heads import Feed, Lesson
from nextblock.evaluate.results import differences
from nextblock.settings import Duration
from nextblock.train.runtime import StopRequest

__all__ = ["STATE_FILE", "ProbeStopped", "Progress", "is_begun"]

STATE_FILE = "state.pt"


class ProbeStopped(RuntimeError):  # noqa: N818 - nothing went wrong
    """A signal stopped the probe; what was done is saved."""

    def __init__(self, message: str, by: signal.Signals) -> None:
        super().__init__(message)
        self.signal = by


class Progress:
    """How far a probe has come: encoders that are finished, and the lesson in hand.

    Without a directory nothing is kept. Raises `ValueError` where `out` holds the state of another probe; to
    overwrite begins anew, whatever is there.
    """

    def __init__(
        self,
        out: Path | None,
        identity: Mapping[str, Any],
        *,
        save_every: str,
        stop: StopRequest,
        overwrite: bool = False,
    ) -> None:
        self._path = None if out is None else out / STATE_FILE
        self._stop = stop
        self._every = Duration.parse(save_every, allow=("min", "ep"))
        self._saved_at_s = time.monotonic()
        self._state: dict[str, Any] = {
            "identity": json.dumps(identity, sort_keys=True),
            "finished": [],
            "lesson": None,
        }
        self._again = "the same command again"
        if overwrite:
            self._again += ", without --overwrite,"
            self._save()
        elif self._path is not None and self._path.is_file():
            self._take_up(self._path)

    @property
    def finished(self) -> list[dict[str, Any]]:
        """What was found of each encoder that is finished, in order."""
        return self._state["finished"]

    def begin(self, lesson: Lesson, feed: Feed) -> tuple[int, float]:
        """Begin a lesson, or go on with the one that was saved: steps done, and the seconds they took."""
        lesson.begin()
        saved = self._state["lesson"]
        if saved is None:
            return 0, 0.0
        lesson.load_state_dict(saved["heads"])
        feed.bad.update({one[0]: BadSample(*one) for one in saved["bad"]})
        return saved["step"], saved["elapsed_s"]

    def after_step(self, step: int, lesson: Lesson, feed: Feed, elapsed_s: float) -> None:
        """Save what is due; raises `ProbeStopped`, saved, where a signal asked for it."""
        if self._stop or self._is_due(step, feed):
            self._state["lesson"] = {
                "heads": lesson.state_dict(),
                "bad": [tuple(one) for one in feed.bad.values()],
                "step": step,
                "elapsed_s": elapsed_s,
            }
            self._save()
        self.check_stop(f"after step {step} of {feed.steps}")

    def finish(self, found: Mapping[str, Any]) -> None:
        """Keep what was found of an encoder: tensors, numbers, strings, lists and dicts only."""
        self.finished.append(dict(found))
        self._state["lesson"] = None
        self._save()

    def check_stop(self, where: str) -> None:
        """Raise `ProbeStopped` where a signal asked for it."""
        if self._stop.signal is not None:
            kept = "" if self._path is None else f"; run {self._again} to go on from what is saved"
            raise ProbeStopped(f"stopped by {self._stop.signal.name} {where}{kept}", self._stop.signal)

    def remove(self) -> None:
        """Forget it all: the result is written."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _is_due(self, step: int, feed: Feed) -> bool:
        if step == feed.steps:  # what is left, measuring, may take long as well
            return True
        if self._every.unit == "minutes":
            return time.monotonic() - self._saved_at_s >= 60 * self._every.value
        steps = max(1, self._every.steps(batch_size=1, steps_per_epoch=feed.steps_per_epoch))
        return step % steps == 0

    def _save(self) -> None:
        self._saved_at_s = time.monotonic()
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with write_aside(self._path) as aside:
                torch.save(self._state, aside)

    def _take_up(self, path: Path) -> None:
        there = _read(path)
        different = differences(json.loads(there["identity"]), json.loads(self._state["identity"]))
        if different:
            raise UsageError(
                f"{path.parent} holds another probe, unfinished ({'; '.join(different[:3])}); give another "
                "--out, or --overwrite"
            )
        self._state = there


def is_begun(out: Path, identity: Mapping[str, Any]) -> bool:
    """Whether `out` holds the state of this very probe."""
    path = out / STATE_FILE
    return path.is_file() and not differences(json.loads(_read(path)["identity"]), identity)


def _read(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, LookupError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}); remove it to start over"
        ) from error
