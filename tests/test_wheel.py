"""The package as users get it: one version everywhere, and a wheel that needs nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import nextblock

ROOT = Path(__file__).parent.parent


def test_the_version_is_the_same_everywhere():
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    newest = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest is not None
    assert nextblock.__version__ == cited == newest[1]


@pytest.mark.slow
def test_the_wheel_without_extras_trains_probes_and_draws_in_an_empty_environment(tmp_path):
    (tmp_path / "tree").mkdir()

    def run(*words: str | Path) -> str:
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # A copy: setuptools would pack what an old build/ holds, and leave one.
    for part in ("src", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / "tree" / part)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, tmp_path / "tree")
    (wheel,) = tmp_path.glob("nextblock-*.whl")
    assert "nextblock/py.typed" in zipfile.ZipFile(wheel).namelist()
    assert wheel.name == f"nextblock-{nextblock.__version__}-py3-none-any.whl"
    run(sys.executable, "-m", "venv", tmp_path / "empty")
    same_torch = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "torchvision")]
    run(tmp_path / "empty/bin/python", "-m", "pip", "install", wheel, *same_torch)
    names = run(tmp_path / "empty/bin/python", "-m", "pip", "list", "--format=freeze")
    assert not re.search(r"^(onnx|datasets|peft|pytest|ipywidgets)==", names, flags=re.MULTILINE)

    # `make demo`, with two epochs instead of 24.
    listed = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    for line in listed.stdout.replace("\\\n", " ").splitlines():
        if "nextblock " in line:
            words = line.split()[1:]
            shorter = {"pretrain": ["--train.duration", "2ep"], "probe": ["--epochs", "2"]}.get(words[0], [])
            run(tmp_path / "empty/bin/nextblock", *words, *shorter)
    assert list((tmp_path / "runs/demo/checkpoints").glob("*/model.safetensors"))
    for made in ("probe/probe.json", "predictions/predictions.png", "report.html"):
        assert (tmp_path / "runs/demo" / made).is_file(), made
