"""Messages of a run: its opening lines, and warnings if it does not learn, collapses or diverges."""

from __future__ import annotations

import math

from nextblock.checkpoint import latest_checkpoint
from nextblock.config import RunConfig
from nextblock.data import TrainLoader
from nextblock.logs import counted
from nextblock.train.learner import Learner
from nextblock.train.run_dir import RunDir
from nextblock.train.runtime import device_name


def opening_lines(
    config: RunConfig,
    micro: int | None,
    trainer: Learner,
    loader: TrainLoader,
    images: int,
    total_steps: int,
    run: RunDir,
) -> list[str]:
    """Summarise in a few lines what a run will do."""
    model, batch_size = trainer.model, loader.batch_size
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    moments = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)  # AdamW's two, fp32
    in_parts = f" (micro-batches of {micro})" if micro is not None and micro < batch_size else ""
    group = trainer.group
    processes = f"{group.size} processes ({trainer.strategy}), each on " if group.size > 1 else ""
    parts, image = trainer.describe()
    lines = [
        f"{processes}{device_name(trainer.device)} · {config.train.precision} · {parts}",
        image,
        f"{counted(images, 'image')}, batch {batch_size:,}{in_parts} -> "
        f"{counted(loader.steps_per_epoch, 'step')} an epoch, "
        f"{counted(total_steps, 'step')} in {total_steps / loader.steps_per_epoch:,.4g} epochs",
        f"a checkpoint of {(weights + moments) / 1e6:,.1f} MB every {config.checkpoint.every} in "
        f"{run.checkpoints}, keeping the latest {config.checkpoint.keep}",
    ]
    return [*lines, f"resuming at step {trainer.step:,}"] if trainer.step else lines


def not_learned(losses: dict[str, float], references: dict[str, float]) -> str | None:
    """Cause and remedy if the loss is not below that of a constant prediction; else None."""
    # Visible blocks have another loss, so compare the next-block loss. If targets change, so does their mean.
    loss = losses.get("loss_next", losses.get("loss", math.nan))
    references = references | ({"mean": losses["mean_loss"]} if "mean_loss" in losses else {})
    words = {"zero": "zero", "uniform": "all alike", "chance": "all classes alike", "mean": "the mean vector"}
    known = [(value, words[name]) for name, value in references.items() if name in words]
    if not known or loss < known[0][0]:
        return None
    return (
        f"the loss {loss:.4f} is not below {known[0][0]:.4f}, that of predicting {known[0][1]}: nothing is "
        "learned so far. Train longer, try another learning rate, or look at the images"
    )


class CollapseError(RuntimeError):
    """All targets are nearly the same vector, which is easy to predict and teaches nothing."""


def refuse_collapse(health: dict[str, float], step: int, run: RunDir, config: RunConfig) -> None:
    """Raise `CollapseError` with a remedy if the targets have collapsed."""
    variance, limit = health.get("target_variance", math.inf), config.monitor.collapse
    if limit is not None and variance < limit:
        raise CollapseError(
            f"step {step}: the targets have collapsed. Their variance {variance:.2g} is below "
            f"monitor.collapse {limit:g}: patch embeddings are nearly on one line, so the low loss means "
            f"nothing. Try a lower {config.flag('optim.lr')}, a longer {config.flag('optim.warmup')}, or "
            f"model.target pixels; the checkpoints in {run.checkpoints} are of earlier steps"
        )


def remedy(run: RunDir, config: RunConfig) -> str:
    """Remedy for weights or losses that are not finite."""
    latest = latest_checkpoint(run.checkpoints)
    saved = f"The last checkpoint, {latest}, is intact" if latest else "No checkpoint was written yet"
    lr, warmup, precision = map(config.flag, ("optim.lr", "optim.warmup", "train.precision"))
    return f"{saved}. Try a lower {lr}, a longer {warmup}, {precision} bf16 or fp32"
