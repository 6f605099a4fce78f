"""Published top-1 accuracies in percent, to stand beside one's own: AIM's Table 6, and what is known of XTRA.

All are attentive probes on frozen encoders. None is a cell that could not be confirmed; of XTRA only two are
known, from its official repository, so its rows have no mean. AIM-0.6B's "ViT-H/14" stands in quotation
marks: it is that network's capacity; its shape is another, 1,536 wide and 24 layers deep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nextblock.evaluate.suite.benchmarks import FIFTEEN

__all__ = ["PUBLISHED", "Published", "mean_of"]


@dataclass(frozen=True)
class Published:
    """One row of the papers' table."""

    model: str
    architecture: str
    data: str
    top1: tuple[float | None, ...]
    """Percent, in the order of FIFTEEN."""
    mean: float | None
    """As printed, percent."""

    @property
    def by_name(self) -> dict[str, float | None]:
        """The cells by the benchmarks' names."""
        return dict(zip(FIFTEEN, self.top1, strict=True))


def mean_of(top1: Mapping[str, float | None]) -> float | None:
    """The mean over the fifteen; None where one of them is missing."""
    values = [top1.get(name) for name in FIFTEEN]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(FIFTEEN) else None


def _only_imagenet(top1: float) -> tuple[float | None, ...]:
    return (top1, *[None] * (len(FIFTEEN) - 1))


# fmt: off
PUBLISHED: tuple[Published, ...] = (
    Published("DINO", "ViT-B/8", "IN-1k",
        (80.1, 66.0, 97.8, 87.3, 89.5, 78.4, 92.3, 89.2, 58.5, 93.7, 90.2, 6.1, 98.2, 57.0, 41.1), 75.0),
    Published("iBOT", "ViT-L/16", "IN-21k",
        (83.5, 70.5, 99.2, 93.3, 93.5, 81.6, 92.8, 90.8, 61.8, 94.5, 90.0, 5.9, 98.0, 60.3, 47.7), 77.6),
    Published("DINOv2", "ViT-g/14 at 516 px", "LVD",
        (86.4, 84.5, 99.6, 95.2, 96.3, 86.3, 96.4, 95.6, 68.2, 96.5, 90.7, 8.0, 98.6, 66.7, 58.8), 81.9),
    Published("BEiT", "ViT-L/14", "IN-21k",
        (62.2, 44.4, 94.4, 78.7, 79.0, 64.0, 80.9, 69.5, 52.0, 92.8, 88.2, 4.2, 97.5, 47.7, 25.9), 65.4),
    Published("MAE", "ViT-H/14", "IN-1k",
        (80.9, 64.6, 97.1, 85.8, 90.2, 78.1, 95.0, 93.7, 58.1, 94.2, 89.8, 5.4, 98.1, 56.9, 42.2), 75.3),
    Published("MAE", "ViT-2B/14", "IG-3B",
        (82.2, 70.8, 97.5, 87.3, 93.4, 81.2, 95.1, 94.9, 57.8, 94.4, 90.3, 7.3, 98.2, 60.1, 50.2), 77.4),
    Published("AIM-0.6B", '"ViT-H/14"', "DFN-2B+",
        (78.5, 64.0, 97.2, 86.8, 90.1, 80.1, 93.0, 93.0, 57.9, 94.3, 90.0, 7.8, 98.4, 58.3, 45.2), 75.6),
    Published("AIM-1B", "ViT-1B/14", "DFN-2B+",
        (80.6, 67.2, 98.2, 88.3, 91.6, 81.8, 93.4, 93.9, 58.6, 94.5, 90.0, 9.0, 98.6, 59.8, 47.5), 76.9),
    Published("AIM-3B", "ViT-3B/14", "DFN-2B+",
        (82.2, 69.7, 98.4, 89.9, 92.7, 81.9, 94.1, 93.8, 58.8, 94.3, 90.4, 9.7, 98.5, 60.9, 48.9), 77.6),
    Published("AIM-7B", "ViT-7B/14", "DFN-2B+",
        (82.4, 70.9, 98.6, 90.0, 93.1, 82.3, 93.8, 92.1, 59.5, 93.6, 90.7, 10.1, 98.6, 61.7, 49.6), 77.8),
    Published("AIM-7B, 20th layer", "ViT-7B/14", "DFN-2B+",
        (84.0, 75.5, 98.9, 91.8, 94.1, 85.6, 95.4, 95.0, 61.4, 94.2, 90.5, 8.4, 98.5, 63.5, 57.7), 79.6),
    Published("XTRA, 100 epochs", "ViT-H/14", "IN-21k", _only_imagenet(80.9), None),
    Published("XTRA, 800 epochs", "ViT-B/16", "IN-1k", _only_imagenet(76.8), None),
)
# fmt: on
