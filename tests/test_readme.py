"""Every command of the README and of `make demo` runs: shortened here, whole where marked slow."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from nextblock.checkpoint import save_model
from nextblock.cli import main
from nextblock.config import ModelConfig
from nextblock.models import NextBlockModel

pytestmark = pytest.mark.usefixtures("coarse_pictures")
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

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
    "eval": ["--epochs", "1", "--shots", "1"],
}


def commands_of_the_readme() -> list[str]:
    """Lines of its `sh` blocks, comments left out."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def commands_of_the_demo() -> list[str]:
    listed = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = listed.stdout.replace("\\\n", " ").splitlines()
    return [line[line.index("nextblock ") :] for line in lines if ".venv/bin/nextblock " in line]


def tiny_of_the_command_line() -> ModelConfig:
    """The model that `TINY_MODEL` makes of XTRA's defaults."""
    words = TINY_MODEL[: TINY_MODEL.index("--data.val_resize_px")]
    names = [word.removeprefix("--model.") for word in words[::2]]
    settings: dict[str, Any] = dict(zip(names, map(int, words[1::2]), strict=True))
    return ModelConfig(**settings)


@pytest.fixture
def places(tmp_path) -> dict[str, str]:
    """What the capital words of the README stand for."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(8):
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    train, val = str(tmp_path / "train"), str(tmp_path / "val")
    checkpoint = tmp_path / "checkpoint.safetensors"
    save_model(checkpoint, NextBlockModel(tiny_of_the_command_line()))
    return {
        "DIR": train,
        "DFN2B": val,
        "SHARDS": str(tmp_path / "shards"),
        "CHECKPOINT": str(checkpoint),
        "ENCODER": str(tmp_path / "encoder"),
        "IMAGENET/train": train,
        "IMAGENET/val": val,
        "TRAIN": train,
        "VAL": val,
        "RUN": str(tmp_path / "run"),
        "RUN/probe": str(tmp_path / "run" / "probe"),
        "RUN/probe/attentive": str(tmp_path / "run" / "probe" / "attentive"),
        "RUN/eval": str(tmp_path / "run" / "eval"),
        "RUN/predictions": str(tmp_path / "run" / "predictions"),
        "RUN/completions": str(tmp_path / "run" / "completions"),
        "RUN/surprise": str(tmp_path / "run" / "surprise"),
        "RUN/features": str(tmp_path / "run" / "features"),
        "RUN/finetuned": str(tmp_path / "run" / "finetuned"),
        "IMAGE": str(tmp_path / "train" / "cat" / "0.png"),
        "classes.csv": str(tmp_path / "classes.csv"),
        "features.parquet": str(tmp_path / "features.parquet"),
        "nearest": str(tmp_path / "nearest"),
        "runs/demo": str(tmp_path / "demo"),
        "runs/demo/probe": str(tmp_path / "demo" / "probe"),
        "runs/demo/predictions": str(tmp_path / "demo" / "predictions"),
    }


def run_shortened(command: str, places: dict[str, str]) -> None:
    # Eight processes are more than there may be cores.
    command = command.replace("--devices 8", "--devices 1")
    words = [places.get(word, word) for word in shlex.split(command)[1:]]
    shorter = SHORTENED.get(words[0], [])
    asks_for_help = "--help" in words
    with pytest.MonkeyPatch.context() as patch:
        if words[0] == "serve":  # Ctrl-C, once it serves
            patch.setattr("nextblock.serve.session.Session.index", Mock(side_effect=KeyboardInterrupt))
            shorter = ["--port", "0"]
        code = main(words if asks_for_help else words + shorter)
    assert code == (130 if words[0] == "serve" else 0), f"{command} ended with {code}"


def test_every_nextblock_command_of_the_readme_runs_in_the_order_in_which_it_stands(places, capsys):
    commands = [command for command in commands_of_the_readme() if command.startswith("nextblock ")]
    assert len(commands) >= 8
    for command in commands:
        if " pretrain " in command:
            shutil.rmtree(places["RUN"], ignore_errors=True)
        run_shortened(command, places)


def test_the_readme_has_no_command_but_these_kinds():
    kinds = {command.split()[0] for command in commands_of_the_readme()}
    assert kinds == {"make", "pip", "nextblock"}


def test_the_demo_shortened(places, capsys):
    commands = commands_of_the_demo()
    assert [command.split()[1] for command in commands] == ["pretrain", "probe", "predict", "report"]
    for command in commands:
        run_shortened(command, places)
    assert "Report of" in capsys.readouterr().out


def test_the_readme_is_finished_and_its_pictures_and_links_exist():
    assert "<!--" not in README
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_python_of_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(code, {})


def test_the_table_of_presets_in_the_readme_is_that_of_the_registry():
    from nextblock.plan import count_parameters
    from nextblock.presets import PRESETS

    for name in ("xtra-b16-in1k", "xtra-h14-in21k", "aim-600m-in1k"):
        preset = PRESETS[name]
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}`")]
        assert f"{count_parameters(preset.config.model).encoder / 1e6:.1f} M" in row
        assert preset.published is not None
        assert preset.published[:6] in row


@pytest.mark.slow
def test_the_demo_whole_beats_the_untrained_encoder(tmp_path):
    done = subprocess.run(
        ["make", "demo", f"DEMO={tmp_path / 'demo'}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    import json

    rows = json.loads((tmp_path / "demo" / "probe" / "probe.json").read_text())["rows"]
    top1 = {(row["encoder"], row["head"]): row["top1"] for row in rows}
    for head in ("linear", "attentive"):
        assert top1["trained", head] > top1["untrained", head] + 0.03


@pytest.mark.slow
def test_pip_installs_the_package(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(tmp_path), "."]
    done = subprocess.run(install, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "nextblock" / "py.typed").is_file()
