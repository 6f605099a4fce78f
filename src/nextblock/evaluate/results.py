"""Results: rows and notes, the leads over baselines, and what identifies a result.

Files: OUT/VERB.json (everything), VERB.md (the table), VERB.csv (all rows). If OUT is itself a file, the JSON
is OUT.about.json.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from nextblock.atomic import OUTPUT_MARK, RUN_FILES, write_aside, write_text
from nextblock.checkpoint import digest_of
from nextblock.config import DataConfig, ModelConfig
from nextblock.data import BadImageError, Source
from nextblock.errors import UsageError
from nextblock.evaluate.metrics import paired
from nextblock.models import EncoderModel
from nextblock.settings import flatten, to_dict
from nextblock.tables import Column, Shown, Table, escape_markdown, finite, write_csv

MODEL, UNTRAINED, PIXELS, HISTOGRAM = "model", "untrained", "pixels 16x16", "colour histogram"
"""Names of encoders in the rows of tables."""
BASELINES = (UNTRAINED, PIXELS, HISTOGRAM)
NOT_BETTER = "The model is not clearly better than"
WHAT_TO_TRY = (
    ": train it longer, on more images, or start from another model's weights (pretrain --model.init)."
)
SATURATED = (
    "The model and its baselines are all at 100 %: the test is too easy or too small to tell them apart."
)
TOP = 5
RIGHTS = "right.npz"

FREE_SETTINGS = {
    *("out", "overwrite", "cache", "cache_gb", "save_every", "root", "only"),
    *("device", "workers", "max_bad_fraction", "encode_batch_size"),
}
"""Settings that do not change a result."""

_PATHS = ("model", "train", "val", "test", "data", "features", "query", "classes")

CUT_SETTINGS = ("mean", "std", "channels", "val_resize_px", "val_crop", "decoder", "max_pixels")
"""Settings of images that decide the pixels an encoder sees, and which images can be read."""

FORMAT_VERSION = 2
SAMPLED = 8
"""Images of a source whose pixels are hashed to recognise it."""


@dataclass(frozen=True, kw_only=True)
class Result(Shown):
    """Result of an evaluation: rows of plain values, one per encoder, head, or setting."""

    verb: str
    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()
    """Sentences below the table."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Values shared by all rows: classes, numbers of images, unreadable images."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Settings, weights, and images that the result depends on."""
    rights: Sequence[np.ndarray] = field(default=(), repr=False, compare=False)
    """Per row, how often each test image was classified correctly, 0 to 1; used for paired differences."""
    columns: Sequence[Column] = field(default=(), repr=False, compare=False)
    """Columns of the table."""
    all_rows: Sequence[dict[str, Any]] = field(default=(), repr=False, compare=False)
    """Rows of VERB.csv, if it has more than `rows`."""
    picture: Path | None = field(default=None, repr=False, compare=False)
    """Picture that `show` displays in a notebook."""
    brief: Table | None = field(default=None, repr=False, compare=False)
    """Table for the terminal, in place of the whole one."""

    def row(self, **values: Any) -> dict[str, Any]:
        """The first row that has these values."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in values.items()):
                return row
        raise LookupError(f"no row of {self.verb} has {values}")

    @property
    def table(self) -> Table:
        """The table of the rows, without top-5 if there are at most five classes."""
        has_top5 = self.facts.get("num_classes", TOP + 1) > TOP
        return Table(self.rows, [column for column in self.columns if column.key != "top5" or has_top5])

    def as_dict(self) -> dict[str, Any]:
        """All values, ready for JSON."""
        assert not self.identity.keys() & self.facts.keys(), "a fact would override the identity"
        own = {"verb": self.verb, "rows": list(self.rows), "notes": list(self.notes)}
        return finite({**self.identity, **self.facts, **own})

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return (self.brief or self.table)._repr_html_() + notes

    def markdown(self) -> str:
        """Title, table and notes in Markdown."""
        notes = "".join(f"\n{note}\n" for note in self.notes)
        model = self.identity["settings"]["model"]
        title = model if isinstance(model, str) else ", ".join(model)
        return f"# {self.verb} of {escape_markdown(title)}\n\n{self.table.markdown()}{notes}"

    def write(self, out: Path, *, is_file: bool = False) -> None:
        """Write VERB.csv, VERB.md, `rights` and, last, VERB.json; only OUT.about.json if `out` is a file."""
        if not is_file:
            write_text(out / f"{self.verb}.csv", write_csv(self.all_rows or self.rows))
            write_text(out / f"{self.verb}.md", self.markdown())
            if self.rights:
                with write_aside(out / RIGHTS) as aside, aside.open("wb") as file:
                    np.savez_compressed(file, *self.rights)
        text = json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"
        write_text(result_file(out, self.verb, is_file=is_file), text)


def result_file(out: Path, verb: str, *, is_file: bool = False) -> Path:
    """The JSON file of a result whose `out` is a directory or a single file."""
    return out.with_name(f"{out.name}.about.json") if is_file else out / f"{verb}.json"


def add_leads(
    rows: Sequence[dict[str, Any]],
    rights: Sequence[Bool[np.ndarray, " n"] | Float[np.ndarray, " n"]],
    match: Sequence[str],
) -> list[str]:
    """Add the model's lead over each baseline to the baseline's row; return a warning if it beats not all.

    `rights` contain, per row, how often each image was classified correctly. Rows with equal `match` are
    compared. "lead" gets its paired standard error "lead_se". If rows are marked "is_default", the warning
    considers only those.
    """

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in match)

    pairs = list(zip(rows, rights, strict=True))
    ours = {key(row): right for row, right in pairs if row["encoder"] == MODEL}
    best: dict[str, tuple[float, float, float]] = {}
    is_marked = any(row.get("is_default") for row in rows)
    for row, right in pairs:
        if row["encoder"] == MODEL:
            continue
        row["lead"], row["lead_se"] = paired(ours[key(row)], right)
        if is_marked and not row["is_default"]:
            continue
        # The row in which the lead is clearest counts: a baseline is unbeaten only if no row shows a clear
        # lead.
        lead = (row["lead"] - 2 * row["lead_se"], row["lead"], row["lead_se"])
        best[row["encoder"]] = max(lead, best.get(row["encoder"], lead))
    unbeaten = {
        encoder: f"{100 * lead:+.1f} ± {100 * error:.1f} points"
        for encoder, (least, lead, error) in best.items()
        if least <= 0
    }
    compared = [right for row, right in pairs if not is_marked or row["is_default"]]
    return not_better(unbeaten, is_saturated=all((right == 1).all() for right in compared))


def not_better(unbeaten: Mapping[str, str], *, is_saturated: bool) -> list[str]:
    """The sentence about baselines that the model does not clearly beat, with its leads over them."""
    which = " or ".join(f"{encoder} ({leads})" for encoder, leads in unbeaten.items())
    note = SATURATED if is_saturated else f"{NOT_BETTER} {which}{WHAT_TO_TRY}"
    return [note] if unbeaten else []


def identity_of(
    config: Any, model: EncoderModel, data: DataConfig, sources: Mapping[str, Source]
) -> dict[str, Any]:
    """Everything that a result depends on, ready for JSON: equal identities give equal results.

    `config` is the verb's dataclass of settings; the keys of `sources` are purposes such as "train".
    """
    is_augmented = getattr(config, "augment", "none") != "none"
    return {
        "format_version": FORMAT_VERSION,
        "settings": {name: v for name, v in to_dict(config).items() if name not in FREE_SETTINGS},
        **encoder_of(model),
        # The flip matters only with augmentation.
        "images": {**cut_of(data), **({"flip": data.flip} if is_augmented else {})},
        "sources": {
            purpose: {
                "spec": source.spec,
                "fingerprint": source.fingerprint,
                "images": len(source),
                "sample": images_digest(source),
                "labels": labels_digest(source) if source.has_labels else None,
            }
            for purpose, source in sources.items()
        },
    }


def cut_of(data: DataConfig) -> dict[str, Any]:
    """Settings that decide the pixels an encoder sees, ready for JSON."""
    cut = to_dict(data)
    return {name: cut[name] for name in CUT_SETTINGS}


def encoder_of(model: EncoderModel) -> dict[str, Any]:
    """Identity of an encoder, ready for JSON: its weights, and settings such as its attention."""
    config = model.config
    if isinstance(config, ModelConfig):  # exporting a model without its predictor keeps the identity
        config = config.encoder_alone()
    else:  # `cut_of` records how images are cut
        config = replace(
            config, mean=None, std=None, crop_pct=None, crop_mode="center", interpolation="bicubic"
        )
    return {"weights": digest_of(model.encoder), "encoder": to_dict(config)}


def images_digest(source: Source) -> str | None:
    """Hash the pixels of a few images spread over a source; None if it is in memory.

    A folder's fingerprint covers only names, and 0001.jpg in two folders may be two images.
    """
    if source.in_memory:  # its fingerprint covers the pixels
        return None
    digest = hashlib.sha256()
    for number in np.unique(np.linspace(0, len(source) - 1, SAMPLED, dtype=np.int64)).tolist():
        try:
            digest.update(source.read(number).contiguous().numpy().tobytes())
        except BadImageError as error:
            digest.update(str(error).encode())
    return digest.hexdigest()[:16]


def labels_digest(source: Source) -> str:
    """Hash the classes of all images, in which two lists of the same files may differ."""
    names = "\n".join(source.class_names).encode()
    return hashlib.sha256(names + source.labels.tobytes()).hexdigest()[:16]


def differences(stored: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """Describe each entry of `identity` that `stored` lacks, or has with another value.

    Paths of models and images are ignored: digests and fingerprints identify them.
    """
    # Through JSON and back, as the stored one was: tuples become lists.
    old, new = flatten(stored), flatten(json.loads(json.dumps(identity)))
    if old.get("format_version") != new.get("format_version", old.get("format_version")):
        return ["written by another version of nextblock"]
    paths = re.compile(rf"settings\.(.*\.)?({'|'.join(_PATHS)})|sources\..*\.spec")
    return [
        f"{name}: {old.get(name)} there, {value} here"
        for name, value in new.items()
        if old.get(name) != value and not paths.fullmatch(name)
    ]


def read_result(
    out: Path, verb: str, identity: Mapping[str, Any], *, overwrite: bool, is_file: bool = False
) -> Result | None:
    """Read this evaluation's result from `out`, or None; `UsageError` if `out` contains anything else."""
    path = result_file(out, verb, is_file=is_file)
    # The refusals protect files of others, so they come first and hold with overwrite too.
    if any((out / name).is_file() for name in RUN_FILES):
        raise UsageError(f"{out} is a training run; choose another --out, such as {out / verb}")
    if not path.is_file() and out.is_dir() and not (out / OUTPUT_MARK).is_file():
        foreign = sorted(path.name for path in out.iterdir())
        if foreign:
            raise UsageError(f"{out} holds other files ({', '.join(foreign[:3])}); choose another --out")
    if overwrite or not (out if is_file else path).exists():
        return None
    if not path.is_file():
        raise UsageError(f"{out} exists; choose another --out, or give --overwrite")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        different = differences(values, identity)
        own = {"verb": verb, "rows": tuple(values["rows"]), "notes": tuple(values["notes"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged ({error}); remove it, or give --overwrite") from error
    if different:
        raise UsageError(
            f"{path} holds another result ({'; '.join(different[:3])}); choose another --out, or --overwrite"
        )
    facts = {name: value for name, value in values.items() if name not in {*identity, *own}}
    rights: list[np.ndarray] = []
    if not is_file and (out / RIGHTS).is_file():
        with np.load(out / RIGHTS, allow_pickle=False) as file:
            rights = [file[name] for name in file.files]
    return Result(**own, facts=facts, identity=dict(identity), rights=rights)
