"""What a preset is."""

from __future__ import annotations

from dataclasses import dataclass

from nextblock.config import RunConfig

__all__ = ["Preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named run."""

    name: str
    config: RunConfig
    about: str
    """What it is, and where its settings come from."""
    published: str | None = None
    """The result it was published to reach, where one is confirmed."""
    encoder_params_m: float
    """Trainable parameters of the encoder, in millions."""
    total_params_m: float
    """Trainable parameters of encoder and predictor, in millions."""

    @property
    def command(self) -> str:
        """The command that runs it."""
        weights = self.config.data.weights
        if self.name.endswith("-tiny"):
            sources = ["digits:split=train"]
        else:
            sources = ["DIR"] if weights is None else [f"DIR{i + 1}" for i in range(len(weights))]
        named = " ".join(f"--data.train {source}" for source in sources)
        return f"nextblock pretrain --preset {self.name} {named} --out RUN"
