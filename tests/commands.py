"""Commands and snippets of a page: read from its text, and run on small things in the working directory."""

from __future__ import annotations

import re
import shlex
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from nextblock.checkpoint import save_model
from nextblock.cli import main
from nextblock.cli.arguments import Parser
from nextblock.config import ModelConfig
from nextblock.models import NextBlockModel

TINY_MODEL = [
    *("--model.image_size", "32", "--model.patch_size", "8", "--model.block_size", "2"),
    *("--model.embed_dim", "32", "--model.depth", "1", "--model.num_heads", "2"),
    *("--model.projection_dim", "16"),
    *("--model.predictor_dim", "16", "--model.predictor_depth", "1", "--model.predictor_heads", "2"),
    *("--model.block_mlp_dim", "16", "--data.val_resize_px", "32", "--data.workers", "0"),
]
SHORT_RUN = [*("--train.duration", "2st", "--train.batch_size", "8", "--train.micro_batch_size", "8")]
SHORTENED = {
    "pretrain": [*TINY_MODEL, *SHORT_RUN, "--train.precision", "fp32", "--optim.warmup", "1st"],
    "probe": ["--epochs", "1", "--batch_size", "512"],
    "finetune": ["--epochs", "2", "--batch_size", "8", "--warmup", "1ep"],
    "fewshot": ["--draws", "2"],
    "eval": ["--epochs", "1", "--shots", "1"],  # if it trains heads
}
FOLDERS = "DIR DIR2 TRAIN VAL TEST SCANS SCENES DFN2B IMAGENET/train IMAGENET/val".split()  # noqa: SIM905


def blocks_of(text: str, language: str) -> list[str]:
    """The code blocks of a Markdown page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands_of(text: str) -> list[str]:
    """Lines of a page's `sh` blocks, continued lines joined, comments left out."""
    lines = "".join(blocks_of(text, "sh")).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def tiny_of_the_command_line() -> ModelConfig:
    """The model that `TINY_MODEL` makes of XTRA's defaults."""
    words = TINY_MODEL[: TINY_MODEL.index("--data.val_resize_px")]
    names = [word.removeprefix("--model.") for word in words[::2]]
    settings: dict[str, Any] = dict(zip(names, map(int, words[1::2]), strict=True))
    return ModelConfig(**settings)


def make_places(folder: Path) -> None:
    """What the capital words of a page stand for, under these names."""
    rng = np.random.default_rng(0)
    for name in FOLDERS:
        for kind in ("cat", "dog"):
            (folder / name / kind).mkdir(parents=True)
            for i in range(8):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name / kind / f"{i}.png")
    shutil.copy(folder / "DIR" / "cat" / "0.png", folder / "IMAGE.png")
    shutil.copy(folder / "DIR" / "cat" / "0.png", folder / "photo.jpg")
    save_model(folder / "CHECKPOINT", NextBlockModel(tiny_of_the_command_line()))


def run_shortened(command: str, changes: Sequence[tuple[str, str]] = ()) -> None:
    """Run a command of `nextblock` in the working directory, on less and for a shorter time."""
    for old, new in [(r"\bIMAGE\b", "IMAGE.png"), *changes]:
        command = re.sub(old, new, command)
    words = shlex.split(command)[1:]
    words = [one for word in words for one in (map(str, Path().glob(word)) if "*" in word else [word])]
    out = words[words.index("--out") + 1] if "--out" in words else ""
    if "--data.train" in words or words[0] == "finetune":  # another run than the one there
        shutil.rmtree(out, ignore_errors=True)
    is_whole = "--help" in words or (words[0] == "eval" and "--train" not in words)
    shorter = [] if is_whole else SHORTENED.get(words[0], [])
    with pytest.MonkeyPatch.context() as patch:
        if words[0] == "serve":  # Ctrl-C, once it serves
            patch.setattr("nextblock.serve.session.Session.index", Mock(side_effect=KeyboardInterrupt))
            shorter = ["--port", "0"]
        code = main([*words, *shorter])
    assert code == (130 if words[0] == "serve" else 0), f"{command} ended with {code}"


def parse(command: str) -> None:
    """Read a command's words as its parser does, check the settings if it has any, and stop."""
    parse_words = Parser.parse

    def stop(parser: Parser, argv: Sequence[str]) -> Namespace:
        options = parse_words(parser, argv)
        if not hasattr(options, "print_config"):
            raise SystemExit(0)
        options.print_config = True
        return options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse", stop)
        assert main(shlex.split(command)[1:]) == 0, command
