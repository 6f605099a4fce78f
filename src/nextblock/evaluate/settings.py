"""Settings of evaluations. Quick to import."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal, NamedTuple, get_args

from nextblock.config import Attention
from nextblock.errors import UsageError
from nextblock.settings import Count, Natural, Positive, Rule, Share, check_types, listed, require

CPU_BATCH, GPU_BATCH = 16, 128
"""Larger batches on a CPU gain a few percent of speed and cost half a gigabyte; a GPU needs large ones."""

CROP_SCALE, CROP_RATIO = (0.08, 1.0), (0.75, 1.333)
"""Training crops of probes and fine-tuning, as in the official linear probe."""

LAYERS = re.compile(r"last([1-9]\d*)?|[1-9]\d*|layer\d+|\d+(\+\d+)+")
ONE_CHOICE = "last, last6 (or any number), layer7 or 3+4+5 (counted from 0)"


def check_layers(words: Sequence[str], *, several: Sequence[str] = ("each", "best")) -> None:
    """Raise `UsageError` for a word that does not name layers; `layer_choices` checks the encoder's depth.

    `several` are the words that the caller accepts besides those of `ONE_CHOICE`.
    """
    for word in words:
        known = ", ".join([ONE_CHOICE, *several])
        require(word in several or LAYERS.fullmatch(word) is not None, f"layers is {word!r}; use {known}")


def ends_in(*suffixes: str) -> Rule:
    """Return the rule of a file's name that ends in one of these."""
    return Rule(lambda name: name.endswith(suffixes), f"a file that ends in {listed(suffixes, 'or')}")


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Settings that every evaluation has."""

    model: str
    """A run directory, a weight file, hf:USER/NAME, or timm:NAME."""
    out: str | None = None
    """Directory for the result; none: print only."""
    num_heads: Count | None = None
    """Attention heads of the encoder, if its file does not record them."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision of the encoder; heads are trained in fp32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: CUDA, then MPS, then CPU."""
    workers: Natural | None = None
    """Processes that decode images; none: as many as the run used."""
    max_bad_fraction: Share | None = None
    """Stop if more than this share of the images is unreadable; none: the run's setting."""
    encode_batch_size: Count | None = None
    """Images encoded at a time; none: 16 on a CPU, 128 on a GPU."""
    cache: str | None = None
    """Directory to keep features in for later commands; none: delete them once the result is written."""
    overwrite: bool = False
    """Replace another result in out."""

    out_is_file = False
    """Whether `out` is a file, not a directory."""

    def __post_init__(self) -> None:
        check_types(self)

    def images_at_once(self, device_type: str) -> int:
        """Images per encoder batch."""
        return self.encode_batch_size or (CPU_BATCH if device_type == "cpu" else GPU_BATCH)


@dataclass(frozen=True, kw_only=True)
class FeatureSettings(EvalSettings):
    """Settings that select the features of an image."""

    layers: str = "last"
    """Encoder layers, averaged after the final norm: last, last6, layer7 or 3+4+5 (from 0)."""
    tokens: Literal["patches", "class", "joined", "all"] = "patches"
    """Mean patch, class token, both joined, or the mean of all tokens."""
    attention: Attention = "native"
    """native: as the checkpoint records; causal: the mask of pre-training; full: no mask."""

    more_layer_words = ()
    """What `layers` may be besides the usual words; a subclass may set it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers((self.layers,), several=self.more_layer_words)


@dataclass(frozen=True, kw_only=True)
class FrozenSettings(FeatureSettings):
    """Settings of evaluations that use one vector per image, and compare with baselines."""

    train: str
    """Labelled images to learn from."""
    baselines: bool = True
    """Also measure the same encoder untrained, images of 16x16 px, and a colour histogram."""
    seed: Natural = 0
    """Seed of the untrained encoder and of all random choices."""


DEFAULT_K, DEFAULT_TEMPERATURE = 20, 0.07
"""The kNN setting to report, fixed before anything is measured."""


@dataclass(frozen=True, kw_only=True)
class KnnSettings(FrozenSettings):
    """Nearest neighbours of a frozen encoder's features."""

    test: str | None = None
    """Labelled images to measure on; none: classify each image of train by all others (leave-one-out)."""
    k: tuple[Count, ...] = (1, 5, DEFAULT_K, 100)
    """Numbers of neighbours that vote; each is measured."""
    temperature: tuple[Positive, ...] = (DEFAULT_TEMPERATURE,)
    """A neighbour's vote weighs exp(cosine similarity / temperature)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distinct(self, "k", "temperature")


@dataclass(frozen=True, kw_only=True)
class FewshotSettings(FrozenSettings):
    """Logistic regression on a frozen encoder's features of few labelled images."""

    test: str
    """Labelled images to measure on."""
    shots: tuple[str, ...] = ("1", "5", "10")
    """Labels to learn from: a number of images per class, or a share of every class, such as 1%."""
    draws: Count = 5
    """Random draws for each number of labels; accuracies are the mean over draws."""
    folds: Annotated[int, Rule(lambda n: n >= 2, "from 2")] = 5
    """Folds of the cross-validation that chooses the penalty; fewer if the smallest class has fewer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "shots", tuple(",".join(self.shots).split(",")))
        check_distinct(self, "shots")
        for text in self.shots:
            Shots.parse(text)


@dataclass(frozen=True, kw_only=True)
class EmbedSettings(FeatureSettings):
    """Settings of `embed`, which writes features of images to a file."""

    data: str
    """Images: a directory, an image file, `torchvision:CIFAR10,root=DIR`, or `digits`."""
    out: Annotated[str, ends_in(".parquet", ".npz")] = field()  # required
    """File to write: .parquet, or .npz for NumPy."""
    layers: str = "last"
    """last, last6 (or any number), layer7 or 3+4+5 (from 0), averaged; each: every layer separately."""
    pool: Literal["mean", "none"] = "mean"
    """mean: the mean over tokens, one vector per image; none: every token."""
    norm: bool = True
    """Apply the encoder's final norm to each layer's output first."""
    neighbors: Natural = 10
    """parquet: number of nearest images to list for each image; 0: none."""
    thumbnail_px: Natural = 96
    """parquet: longer side of the thumbnails; 0: none."""

    out_is_file = True
    more_layer_words = ("each",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.pool == "mean" or self.tokens in ("patches", "all"),
            f"tokens {self.tokens} is one vector per image; pool none needs tokens patches or all",
        )


@dataclass(frozen=True, kw_only=True)
class SearchSettings(FeatureSettings):
    """Settings of `search`, which finds similar images."""

    data: str
    """Images to search: a directory, or any other source."""
    query: str
    """An image file, or a source of up to 64 images; search for images similar to these."""
    top: Count = 12
    """Images to find for each query."""


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(EvalSettings):
    """Settings of evaluations of a trained classifier."""

    head: str | None = None
    """The second file of an official AIM classifier."""
    probe_layers: Literal["last", "best"] | tuple[Natural, ...] | None = None
    """Layers that an official AIM head averages, if its file lacks them: last, best, or numbers from 0."""


Method = Literal["knn", "fewshot", "linear", "attentive", "ep"]


@dataclass(frozen=True, kw_only=True)
class CompareSettings(ScoreSettings):
    """Settings of `compare`, which measures one model or several in several ways."""

    model: tuple[str, ...]  # type: ignore[assignment]
    """Run directories, weight files, hf:USER/NAME, or timm:NAME; repeatable."""
    train: str | None = None
    """Labelled images to learn from; none: the model is a classifier, and nothing is trained."""
    test: str
    """Labelled images to measure on."""
    methods: tuple[Method, ...] = get_args(Method)
    """knn: 20 nearest neighbours; fewshot: logistic regression on few labels; the others: trained heads."""
    shots: str = "5"
    """Labels of fewshot: a number of images per class, or a share of each class, such as 1%."""
    epochs: Count | None = None
    """Epochs that heads are trained for; none: the probe's default."""
    baselines: bool = True
    """Also measure the same encoder untrained, images of 16x16 px, and a colour histogram."""
    classes: str | None = None
    """Without train: file with the names of the classifier's classes, one per line, in logit order."""
    seed: Natural = 0
    """Seed of all random choices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distinct(self, "model", "methods")
        Shots.parse(self.shots)
        given = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        wrong = sorted(given & {"methods", "shots", "epochs", "baselines"}) if self.train is None else []
        require(not wrong, f"{', '.join(wrong)} needs train; without it a classifier is measured as it is")
        wrong = sorted(given & {"head", "probe_layers", "classes"}) if self.train is not None else []
        require(not wrong, f"{', '.join(wrong)} is for a classifier, measured as it is; leave out train")


@dataclass(frozen=True, kw_only=True)
class ClassifySettings(ScoreSettings):
    """Settings of `classify`."""

    data: str
    """Images: a directory, an image file, or any other source; they need no labels."""
    out: Annotated[str, ends_in(".csv", ".json", ".parquet")] | None = None
    """File to write: .csv, .json or .parquet; none: print only."""
    top: Count = 5
    """Number of likeliest classes per image."""

    out_is_file = True


class Shots(NamedTuple):
    """A number of labels: images per class, or a share of every class."""

    per_class: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> Shots:
        """Parse "5" (images per class) or "1%" (of every class)."""
        match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", text)
        if match is not None and match[1] and int(match[1]) >= 1:
            return cls(per_class=int(match[1]))
        if match is not None and match[2] and 0 < float(match[2]) <= 100:
            return cls(share=float(match[2]) / 100)
        raise UsageError(
            f"shots is {text!r}; write images of every class, such as 5, or a share of each, such as 1%"
        )


def check_distinct(settings: object, *names: str) -> None:
    """Raise `UsageError` for a list that is empty or repeats a value."""
    for name in names:
        values = getattr(settings, name)
        require(
            values is None or 0 < len(values) == len(set(values)),
            f"{name} is {', '.join(map(str, values or ())) or 'empty'}; name at least one, each once",
        )
