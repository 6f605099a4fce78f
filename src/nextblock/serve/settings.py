"""Settings of `serve`. Quick to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from nextblock.settings import Count, Natural, Positive, Rule, check_types

Port = Annotated[int, Rule(lambda n: 0 <= n <= 65_535, "from 0 to 65535")]


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Which model to look at, with which images, and where the page is."""

    model: str
    """A run (finished or still training), a checkpoint or weight file, hf:USER/NAME, or timm:NAME."""
    data: str | None = None
    """Images to choose from and to search for the nearest: a directory, `digits` or any other source."""
    host: str = "127.0.0.1"
    """Address to listen on. With another one, whoever reaches it can use the page: there is no password."""
    port: Port = 8000
    """Port of the page; 0: any free one."""
    open: bool = False
    """Open the page in a browser."""
    max_upload_mb: Positive = 20
    """Largest image file that is accepted, in MB."""
    num_heads: Count | None = None
    """Attention heads of the encoder; only for files that do not record them."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: CUDA, then MPS, then CPU."""
    workers: Natural = 0
    """Processes that decode --data while it is encoded; 0: none."""

    def __post_init__(self) -> None:
        check_types(self)
