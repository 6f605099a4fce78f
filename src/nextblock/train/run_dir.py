"""The run directory: what belongs to one training, and whether a directory is the same run.

RUN/config.yaml        all settings, resolved
    source.json        what was trained on: number of images and fingerprint of their list, also of each part
                       of a mixture
    environment.json   versions, device, git commit, command
    baselines.json     what predicting without a model would cost on this data
    metrics.jsonl      one JSON object a line
    quarantine.jsonl   images that could not be read
    checkpoints/       step_00001234/{model.safetensors, state.pt}
    pictures/  tensorboard/
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from nextblock.atomic import OUTPUT_MARK, mark_output, write_aside
from nextblock.checkpoint import latest_checkpoint
from nextblock.config import DataConfig, RunConfig
from nextblock.data import Source, jpeg_decoder
from nextblock.settings import from_dict, to_dict
from nextblock.train.device import device_name

__all__ = ["RunDir", "RunDirError", "recorded_config"]

PACKAGES = (
    *("nextblock", "torch", "torchvision", "timm", "torchcodec", "numpy", "pillow"),
    "safetensors",
)
FIRST_FILES = ("source.json", "environment.json")
"""Written, in this order, before `config.yaml`, which makes a directory a run."""


class RunDirError(ValueError):
    """`--out` holds something else than this run."""


class RunDir:
    """Paths and records of a run: `open` checks the directory and writes nothing, `begin` writes."""

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.path = path
        self.overwrite = overwrite
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.quarantine = path / "quarantine.jsonl"

    @classmethod
    def open(cls, path: Path, config: RunConfig, sources: dict[str, Source], *, overwrite: bool) -> RunDir:
        """Check that the directory is free for a new run, or holds this very one.

        Another run there is refused unless `overwrite`, so is the same run on other images; other files are
        refused always.
        """
        run = cls(path, overwrite=overwrite)
        if run.is_run():
            if not overwrite:
                run._check_same(config, sources)
        elif path.exists() and not run._is_free():
            raise RunDirError(f"{path} exists and is no run; choose another --out, or empty it")
        return run

    def begin(self, config: RunConfig, sources: dict[str, Source], device: torch.device) -> None:
        """Make the directory (with `overwrite`, in place of the run that is there) and write what it is."""
        if self.overwrite and self.is_run():
            shutil.rmtree(self.path)
        self.overwrite = False  # what is there from now on is this run's own
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirError(
                f"cannot make the directory {self.path}: {error.strerror}; choose another --out"
            ) from error
        mark_output(self.path)
        self._write("source.json", json.dumps(describe(sources, config.data), indent=1))
        self._write("environment.json", json.dumps(environment(device), indent=1))
        self._write("config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))

    def is_run(self) -> bool:
        """Whether a run was begun here: by three files, as other projects have a config.yaml as well."""
        return all((self.path / name).is_file() for name in (*FIRST_FILES, "config.yaml"))

    def _is_free(self) -> bool:
        """Whether nothing is here but, perhaps, the first files of a run killed at its very start."""
        if not self.path.is_dir():
            return False
        return all(
            p.name.startswith((".writing-", OUTPUT_MARK)) or p.name in FIRST_FILES
            for p in self.path.iterdir()
        )

    def latest(self) -> Path | None:
        """The whole checkpoint to go on from, the latest; None where the run begins anew."""
        return None if self.overwrite else latest_checkpoint(self.checkpoints)

    def cut_metrics(self, step: int) -> None:
        """Drop the lines of metrics after `step`, and a last line that was cut off."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        self._write(self.metrics.name, "".join(kept))

    def baselines(self) -> dict[str, float] | None:
        """What was measured when the run began."""
        path = self.path / "baselines.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write_baselines(self, values: dict[str, float]) -> None:
        """Keep the baselines for later starts and for reports."""
        self._write("baselines.json", json.dumps(values, indent=1))

    def _check_same(self, config: RunConfig, sources: dict[str, Source]) -> None:
        try:
            there = from_dict(RunConfig, yaml.safe_load((self.path / "config.yaml").read_text()))
        except ValueError as error:
            raise RunDirError(
                f"{self.path}/config.yaml is not of this version of nextblock: {error}; choose another --out"
            ) from error
        differences = config.differences(there)
        if differences:
            listed = "; ".join(
                f"{name}: {old!r} there, {new!r} now" for name, (new, old) in differences.items()
            )
            raise RunDirError(
                f"{self.path} holds another run ({listed}); choose another --out, the same settings to go "
                "on, or --overwrite to begin anew"
            )
        recorded = json.loads((self.path / "source.json").read_text())
        decoder = jpeg_decoder(config.data.decoder)
        if recorded.get("decoder", decoder) != decoder:
            raise RunDirError(
                f"{self.path} was decoding JPEG with {recorded['decoder']}, this installation would with "
                f"{decoder}, and some pixels would differ; install what it had, or "
                "begin a new run with another --out"
            )
        for kind, source in sources.items():
            changed = _changed(source, recorded.get(kind, {}))
            if changed is not None:
                part, then = changed
                raise RunDirError(
                    f"data.{kind} {part.spec!r} has changed since this run began: "
                    f"{then.get('num_images')} images then, {len(part)} now, or other "
                    "names; the order of samples would not be the same. Restore the images, or begin "
                    "a new run with another --out"
                )

    def _write(self, name: str, text: str) -> None:
        with write_aside(self.path / name) as aside:
            aside.write_text(text)


def recorded_config(path: Path) -> RunConfig | None:
    """The settings of the run in a directory; None where none was begun, or by another version."""
    if not RunDir(path).is_run():
        return None
    try:
        return from_dict(RunConfig, yaml.safe_load((path / "config.yaml").read_text()))
    except ValueError:
        return None  # `RunDir.open` says what is wrong


def describe(sources: dict[str, Source], data: DataConfig) -> dict[str, Any]:
    """What makes sources the same sources, and their pixels the same pixels."""
    told: dict[str, Any] = {kind: _describe(source) for kind, source in sources.items()}
    return {**told, "decoder": jpeg_decoder(data.decoder)}


def _describe(source: Source) -> dict[str, Any]:
    told = {"spec": source.spec, "num_images": len(source), "fingerprint": source.fingerprint}
    parts = source.parts
    return told if len(parts) == 1 else {**told, "parts": [_describe(part) for part in parts]}


def _changed(source: Source, recorded: dict[str, Any]) -> tuple[Source, dict[str, Any]] | None:
    """A source that is not what was recorded, or the first such part of a mixture, and what was recorded."""
    if recorded.get("fingerprint") == source.fingerprint:
        return None
    for part, then in zip(source.parts, recorded.get("parts", []), strict=False):
        if part.fingerprint != then["fingerprint"]:
            return part, then
    return source, recorded


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, git commit of the working directory, and the command."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": device_name(device),
        "git_commit": _git_commit(),
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
