"""Train the encoder of when_it_pays.py by lightly-train's SimCLR or DINO, and write its weights.

    DIR/lightly-env/bin/python benchmarks/lightly_rival.py SETTINGS.json

An environment of its own with lightly-train 0.18.0 runs this; nothing here is of nextblock.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"

import lightly_train  # type: ignore[import-not-found]
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

PX = 64


def train(
    out: str, images: str, method: str, steps: int, seed: int, batch_size: int = 128, **given: Any
) -> None:
    """Train for so many steps; `given`: mean, std, and optim, lr, method_args if not the method's own."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    encoder = VisionTransformer(
        img_size=PX, patch_size=8, embed_dim=128, depth=4, num_heads=4, num_classes=0,
        class_token=False, global_pool="avg", fc_norm=False, dynamic_img_size=True,
    )  # fmt: skip
    setattr(encoder, "pretrained_cfg", {})  # noqa: B010 - lightly-train asks for it at the end
    transforms: dict[str, Any] = {
        "image_size": (PX, PX),
        "normalize": {"mean": tuple(given["mean"]), "std": tuple(given["std"])},
    }
    if method == "dino":
        # 96 of 224 px officially; 32 of 64 are whole patches.
        transforms["local_view"] = {"view_size": (32, 32)}
    per_epoch = sum(1 for _ in Path(images).iterdir()) // batch_size
    started_s = time.process_time()
    lightly_train.pretrain(
        out=f"{out}/run", data=images, model=encoder, method=method, method_args=given.get("method_args"),
        epochs=-(-steps // per_epoch), trainer_args={"max_steps": steps}, batch_size=batch_size, seed=seed,
        optim=given.get("optim", "auto"), optim_args=None if given.get("lr") is None else {"lr": given["lr"]},
        transform_args=transforms, num_workers=0, devices=1, accelerator="cpu", precision="32-true",
        loggers={"tensorboard": None}, overwrite=True,
    )  # fmt: skip
    cpu_s = time.process_time() - started_s
    save_file(
        {name: value.contiguous() for name, value in encoder.state_dict().items()},
        f"{out}/encoder.safetensors",
    )
    parameters = sum(p.numel() for p in encoder.parameters())
    facts = {"cpu_s": cpu_s, "steps": steps, "parameters": parameters, "batch": batch_size}
    Path(out, "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    train(**json.loads(Path(sys.argv[1]).read_text()))
