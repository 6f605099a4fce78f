"""`nextblock.predict`: how a model predicts each next block of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextblock.look.settings import PredictSettings
from nextblock.settings import from_dict

if TYPE_CHECKING:
    from nextblock.visualize import PredictResult


def predict(**settings: Any) -> PredictResult:
    """Draw predictions as `nextblock predict` does; `settings` are the fields of `PredictSettings`.

    Paths may stand for strings.
    """
    config = from_dict(PredictSettings, settings)  # first: torch takes seconds, a wrong setting none
    from nextblock.look.opened import open_look
    from nextblock.visualize import predict as predict_images

    model, source, data, device = open_look(config)
    return predict_images(
        model,
        source,
        data,
        Path(config.out),
        num_images=config.num_images,
        device=device,
        distance=config.distance,
        unpredicted=config.unpredicted,
        each_image=config.each_image,
    )
