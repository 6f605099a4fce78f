"""Settings that every evaluation has: which model, on what device, how exactly. Quick to import."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal, NamedTuple

from nextblock.config import Attention
from nextblock.errors import UsageError
from nextblock.evaluate.layers import check_layers
from nextblock.settings import Count, Natural, Positive, Rule, Share, check_types, require

CPU_BATCH, GPU_BATCH = 16, 128
"""On a CPU more gain a few percent of speed and take half a gigabyte of memory; a GPU wants many."""

CROP_SCALE, CROP_RATIO = (0.08, 1.0), (0.75, 1.333)
"""Training crops of probes and fine-tuning, as of the official linear probe."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Which model is evaluated, and by what means."""

    model: str
    """A run directory, a file of weights, hf:USER/NAME, or timm:NAME."""
    out: str | None = None
    """Directory for the result; none: print only."""
    num_heads: Count | None = None
    """Attention heads of the encoder, if its file does not say."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision of the encoder; heads are trained in fp32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: CUDA, then MPS, then CPU."""
    workers: Natural | None = None
    """Processes that decode images; none: as many as the run used."""
    max_bad_fraction: Share | None = None
    """Stop if more than this share of the images is unreadable; none: what the run allowed."""
    encode_batch_size: Count | None = None
    """Images encoded at a time; none: 16 on a CPU, 128 on a GPU."""
    cache: str | None = None
    """Directory that keeps features for later commands; none: only until the result is written."""
    overwrite: bool = False
    """Replace another result in out."""

    def __post_init__(self) -> None:
        check_types(self)

    def images_at_once(self, device_type: str) -> int:
        """Images encoded at a time."""
        return self.encode_batch_size or (CPU_BATCH if device_type == "cpu" else GPU_BATCH)


@dataclass(frozen=True, kw_only=True)
class FrozenSettings(EvalSettings):
    """The same for evaluations of one vector an image, beside baselines."""

    train: str
    """Labelled images to learn from."""
    layers: str = "last"
    """Encoder layers, averaged after the final norm: last, last6, layer7 or 3+4+5 (from 0)."""
    tokens: Literal["patches", "class", "joined", "all"] = "patches"
    """Mean patch, class token, both joined, or the mean of all tokens."""
    attention: Attention = "native"
    """native: as the checkpoint records; causal: the mask of pre-training; full: no mask."""
    baselines: bool = True
    """Also measure the same encoder untrained, images of 16x16 px, and a colour histogram."""
    seed: Natural = 0
    """Seed of the untrained encoder and of all that is drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers((self.layers,), several=())


DEFAULT_K, DEFAULT_TEMPERATURE = 20, 0.07
"""kNN: the setting to report, fixed before anything is measured."""


@dataclass(frozen=True, kw_only=True)
class KnnSettings(FrozenSettings):
    """Nearest neighbours of a frozen encoder's features."""

    test: str | None = None
    """Labelled images to measure on; none: each image of train by all others (leave-one-out)."""
    k: tuple[Count, ...] = (1, 5, DEFAULT_K, 100)
    """Numbers of neighbours that vote."""
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
    """Labels to learn from: images of every class, or a share of every class, such as 1%."""
    draws: Count = 5
    """Draws of each number of labels; mean and standard deviation are over these."""
    folds: Annotated[int, Rule(lambda n: n >= 2, "from 2")] = 5
    """Folds of the cross-validation that chooses the penalty; fewer if the smallest class has fewer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "shots", tuple(",".join(self.shots).split(",")))
        check_distinct(self, "shots")
        for text in self.shots:
            Shots.parse(text)


@dataclass(frozen=True, kw_only=True)
class EmbedSettings(EvalSettings):
    """Features of images, in a file."""

    data: str
    """Images: a directory, an image file, `torchvision:CIFAR10,root=DIR`, or `digits`."""
    out: str = field()  # required
    """File to write: .parquet, or .npz for NumPy."""
    layers: str = "last"
    """last, last6 (or any number), layer7 or 3+4+5 (from 0), averaged; or each: every layer, kept apart."""
    tokens: Literal["patches", "class", "joined", "all"] = "patches"
    """Patches, class token, class token and mean patch joined, or all tokens."""
    pool: Literal["mean", "none"] = "mean"
    """The mean over the tokens, one vector an image; none: every token."""
    norm: bool = True
    """Apply the encoder's final norm to each layer's output first."""
    attention: Attention = "native"
    """native: as the checkpoint records; causal: the mask of pre-training; full: no mask."""
    neighbors: Natural = 10
    """parquet: nearest images listed for each image; 0: none."""
    thumbnail_px: Natural = 96
    """parquet: longer side of the thumbnails; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers((self.layers,), several=("each",))
        require(
            self.out.endswith((".parquet", ".npz")),
            f"out is {self.out}; name a file that ends in .parquet or .npz",
        )
        require(
            self.pool == "mean" or self.tokens in ("patches", "all"),
            f"tokens {self.tokens} is one vector an image; pool none needs tokens patches or all",
        )


@dataclass(frozen=True, kw_only=True)
class SearchSettings(EvalSettings):
    """The images that a model sees as most alike."""

    data: str
    """Images to search: a directory, or any other source."""
    query: str
    """An image file, or a source of up to 64 images, whose nearest images are found."""
    top: Count = 12
    """Images found for each query."""
    layers: str = "last"
    """Encoder layers, averaged after the final norm: last, last6, layer7 or 3+4+5 (from 0)."""
    tokens: Literal["patches", "class", "joined", "all"] = "patches"
    """Mean patch, class token, both joined, or the mean of all tokens."""
    attention: Attention = "native"
    """native: as the checkpoint records; causal: the mask of pre-training; full: no mask."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers((self.layers,), several=())


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(EvalSettings):
    """A trained classifier."""

    head: str | None = None
    """The second file of an official AIM classifier."""
    probe_layers: Literal["last", "best"] | tuple[Natural, ...] | None = None
    """Layers that an official AIM head averages, if its file does not say: last, best, or numbers from 0."""


@dataclass(frozen=True, kw_only=True)
class CompareSettings(ScoreSettings):
    """One model or several, measured in several ways."""

    model: tuple[str, ...]  # type: ignore[assignment]
    """Run directories, files of weights, hf:USER/NAME, or timm:NAME; repeatable."""
    train: str | None = None
    """Labelled images to learn from; none: the model is a classifier, and is measured as it is."""
    test: str
    """Labelled images to measure on."""
    methods: tuple[Literal["knn", "fewshot", "linear", "attentive", "ep"], ...] = (
        "knn",
        "fewshot",
        "linear",
        "attentive",
        "ep",
    )
    """knn: 20 nearest neighbours; fewshot: logistic regression on few labels; the others: trained heads."""
    shots: str = "5"
    """Labels of fewshot: images of every class, or a share of each, such as 1%."""
    epochs: Count | None = None
    """How often trained heads see every image; none: as the probe does."""
    baselines: bool = True
    """Also measure the same encoder untrained, images of 16x16 px, and a colour histogram."""
    classes: str | None = None
    """Without train: file with the names of the classifier's classes, one a line, in logit order."""
    seed: Natural = 0
    """Seed of all that is drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distinct(self, "model", "methods")
        Shots.parse(self.shots)
        given = {one.name for one in fields(self) if getattr(self, one.name) != one.default}
        wrong = sorted(given & {"methods", "shots", "epochs", "baselines"}) if self.train is None else []
        require(not wrong, f"{', '.join(wrong)} needs train; without it a classifier is measured as it is")
        wrong = sorted(given & {"head", "probe_layers", "classes"}) if self.train is not None else []
        require(not wrong, f"{', '.join(wrong)} is for a classifier, measured as it is; leave out train")


@dataclass(frozen=True, kw_only=True)
class ClassifySettings(ScoreSettings):
    """Classes of images by a trained classifier."""

    data: str
    """Images: a directory, an image file, or any other source; they need no labels."""
    out: str | None = None
    """File to write: .csv, .json or .parquet; none: print only."""
    top: Count = 5
    """Likeliest classes of each image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.out is None or self.out.endswith((".csv", ".json", ".parquet")),
            f"out is {self.out}; its name must end in .csv, .json or .parquet",
        )


class Shots(NamedTuple):
    """How many labels: images of every class, or a share of every class."""

    per_class: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> Shots:
        """Read "5" (images a class) or "1%" (of every class)."""
        match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", text)
        if match is not None and match[1] and int(match[1]) >= 1:
            return cls(per_class=int(match[1]))
        if match is not None and match[2] and 0 < float(match[2]) <= 100:
            return cls(share=float(match[2]) / 100)
        raise UsageError(
            f"shots is {text!r}; write images of every class, such as 5, or a share of each, such as 1%"
        )


def check_distinct(settings: object, *names: str) -> None:
    """Refuse lists of settings that are empty or name something twice."""
    for name in names:
        values = getattr(settings, name)
        require(
            values is None or 0 < len(values) == len(set(values)),
            f"{name} is {', '.join(map(str, values or ())) or 'empty'}; name at least one, each once",
        )
