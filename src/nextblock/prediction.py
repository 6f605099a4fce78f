"""`nextblock.predict`: a model from anywhere draws its predictions of images from anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nextblock.settings import Count, Natural, check_types, from_dict

if TYPE_CHECKING:
    from nextblock.visualize import PredictResult


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """What to draw."""

    model: str
    """Run, checkpoint or weight file with a predictor, or hf:USER/NAME."""
    num_heads: Count | None = None
    """Attention heads of the encoder; only for files that do not record them."""
    data: str
    """Images: a directory, a tar, `torchvision:CIFAR10,root=DIR`, `digits` or any other source."""
    out: str
    """Directory for predictions.png and predictions.json."""
    num_images: Count = 8
    """Number of images, evenly spaced over the source."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: CUDA, then MPS, then CPU."""
    workers: Natural | None = None
    """Processes that decode; auto: as in pre-training."""

    def __post_init__(self) -> None:
        check_types(self)


def predict(**settings: Any) -> PredictResult:
    """Draw predictions as `nextblock predict` does; `settings` are the fields of `PredictConfig`.

    Paths may stand for strings.
    """
    config = from_dict(PredictConfig, settings)  # first: torch takes seconds, a wrong setting none
    from nextblock.data import open_source
    from nextblock.evaluate.features import evaluation_data
    from nextblock.interop import attach_teacher, load_model
    from nextblock.train.runtime import choose_device
    from nextblock.visualize import predict as predict_images

    model = load_model(config.model, num_heads=config.num_heads)
    data = evaluation_data(config.model, model.config, workers=config.workers)
    source, device = open_source(config.data, data), choose_device(config.device)
    attach_teacher(model, data.mean, data.std, device)
    return predict_images(model, source, data, Path(config.out), num_images=config.num_images, device=device)
