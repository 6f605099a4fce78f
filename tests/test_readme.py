"""The README and `make demo` run: shortened here; whole, and from a wheel, where marked slow. One version."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest

import nextblock
from commands import commands_of, make_places, run_shortened
from nextblock.plan import count_parameters
from nextblock.presets import PRESETS

pytestmark = pytest.mark.usefixtures("coarse_pictures")
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ONE_PROCESS = [("--devices 8", "--devices 1")]  # eight are more than there may be cores


def run(*words: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commands_of_the_demo() -> list[str]:
    lines = run("make", "-n", "demo").replace("\\\n", " ").splitlines()
    return [line[line.index("nextblock ") :] for line in lines if ".venv/bin/nextblock " in line]


@pytest.fixture
def places(tmp_path, monkeypatch):
    make_places(tmp_path)
    monkeypatch.chdir(tmp_path)


def test_every_nextblock_command_of_the_readme_runs_in_the_order_in_which_it_stands(places, capsys):
    commands = [command for command in commands_of(README) if command.startswith("nextblock ")]
    assert len(commands) >= 8
    for command in commands:
        run_shortened(command, ONE_PROCESS)


def test_the_demo_shortened(places, capsys):
    commands = commands_of_the_demo()
    assert [command.split()[1] for command in commands] == ["pretrain", "probe", "predict", "report"]
    for command in commands:
        run_shortened(command, [("digits:split=train", "TRAIN"), ("digits:split=test", "TEST")])
    assert "Report of" in capsys.readouterr().out


def test_the_table_of_presets_in_the_readme_is_that_of_the_registry():
    for name in ("xtra-b16-in1k", "xtra-h14-in21k", "aim-600m-in1k"):
        preset = PRESETS[name]
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}`")]
        assert f"{count_parameters(preset.config.model).encoder / 1e6:.1f} M" in row
        assert preset.published is not None
        assert preset.published[:6] in row


def test_the_version_is_the_same_everywhere():
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    newest, *_ = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert nextblock.__version__ == cited == newest


@pytest.mark.slow
def test_the_demo_whole_beats_the_untrained_encoder(tmp_path):
    run("make", "demo", f"DEMO={tmp_path / 'demo'}")
    rows = json.loads((tmp_path / "demo" / "probe" / "probe.json").read_text())["rows"]
    top1 = {(row["encoder"], row["head"]): row["top1"] for row in rows}
    for head in ("linear", "attentive"):
        assert top1["model", head] > top1["untrained", head] + 0.03


@pytest.mark.slow
def test_the_wheel_without_extras_trains_probes_and_draws_in_an_empty_environment(tmp_path):
    within = partial(run, cwd=tmp_path)
    (tmp_path / "tree").mkdir()
    # A copy: setuptools would pack what an old build/ holds, and leave one.
    for part in ("src", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / "tree" / part)
    within(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, tmp_path / "tree")
    (wheel,) = tmp_path.glob("nextblock-*.whl")
    assert "nextblock/py.typed" in zipfile.ZipFile(wheel).namelist()
    assert wheel.name == f"nextblock-{nextblock.__version__}-py3-none-any.whl"
    within(sys.executable, "-m", "venv", tmp_path / "empty")
    same_torch = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "torchvision")]
    within(tmp_path / "empty/bin/python", "-m", "pip", "install", wheel, *same_torch)
    names = within(tmp_path / "empty/bin/python", "-m", "pip", "list", "--format=freeze")
    assert not re.search(r"^(onnx|datasets|peft|pytest|ipywidgets)==", names, flags=re.MULTILINE)

    shorter = {"pretrain": ["--train.duration", "2ep"], "probe": ["--epochs", "2"]}
    for command in commands_of_the_demo():
        words = command.split()[1:]
        within(tmp_path / "empty/bin/nextblock", *words, *shorter.get(words[0], []))
    assert list((tmp_path / "runs/demo/checkpoints").glob("*/model.safetensors"))
    for made in ("probe/probe.json", "predictions/predictions.png", "report.html"):
        assert (tmp_path / "runs/demo" / made).is_file(), made
