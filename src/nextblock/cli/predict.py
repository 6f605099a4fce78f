"""`nextblock predict`: draw how a model predicts the blocks of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nextblock.cli.output import end_with_json, say
from nextblock.settings import check_types, from_dict

if TYPE_CHECKING:
    from rich.table import Table

    from nextblock.visualize import PredictResult


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """What to draw."""

    model: str
    """A run directory or a file of weights with a predictor."""
    num_heads: int | None = None
    """Attention heads of the encoder, where a foreign file does not tell."""
    data: str
    """Images: a directory, `torchvision:CIFAR10,root=DIR`, or `digits`."""
    out: str
    """Directory for predictions.png and predictions.json."""
    num_images: int = 8
    """How many images, evenly spaced over the source."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: CUDA, then MPS, then CPU."""

    def __post_init__(self) -> None:
        check_types(self)


def run(argv: Sequence[str]) -> int:
    """Parse the words, draw, print a table of losses."""
    from rich.console import Console

    from nextblock.cli.arguments import Parser, parse_settings

    parser = Parser("predict", "Draw how a model predicts the next blocks of images.")
    values, is_json = parse_settings(parser, PredictConfig, argv)
    result = predict(**values)
    console = Console()
    console.print(_table(result))
    say(f"picture: {result.picture}")
    if result.bad:
        say(_unreadable(result))
    if is_json:
        end_with_json(_as_json(result))
    return 0


def predict(**settings: Any) -> PredictResult:
    """Draw predictions as `nextblock predict` does; `settings` are the fields of `PredictConfig`.

    Paths may stand for strings.
    """
    from nextblock.data import open_source
    from nextblock.evaluate.features import evaluation_data
    from nextblock.interop import load_model
    from nextblock.train.runtime import choose_device
    from nextblock.visualize import predict as predict_images

    config = from_dict(PredictConfig, settings)
    model = load_model(config.model, num_heads=config.num_heads)
    data = evaluation_data(config.model, model.config)
    return predict_images(
        model,
        open_source(config.data, data),
        data,
        Path(config.out),
        num_images=config.num_images,
        device=choose_device(config.device),
    )


def _as_json(result: PredictResult) -> dict[str, Any]:
    return {
        "picture": str(result.picture),
        "mean_loss": result.mean_loss,
        "rows": [row.as_dict() for row in result.rows],
        "bad": [{"name": sample.name, "reason": sample.reason} for sample in result.bad],
    }


def _unreadable(result: PredictResult) -> str:
    """One line that counts the images left out and names the first three."""
    chosen = len(result.rows) + len(result.bad)
    named = [" ".join(f"{sample.name}: {sample.reason}".split()) for sample in result.bad[:3]]
    more = ["..."] if len(result.bad) > len(named) else []
    return f"{len(result.bad)} of {chosen} images could not be read: " + "; ".join(named + more)


def _table(result: PredictResult) -> Table:
    from rich.table import Table

    from nextblock.visualize.words import BASELINE_WORDS

    table = Table("image", "loss", *(BASELINE_WORDS[name] for name in result.rows[0].baselines))
    for row in result.rows:
        table.add_row(row.name, *(f"{value:.3f}" for value in (row.loss, *row.baselines.values())))
    return table
