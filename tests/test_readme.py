"""Every command of the README and of `make demo` runs: shortened here, whole where marked slow."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from commands import blocks_of, commands_of, make_places, run_shortened

pytestmark = pytest.mark.usefixtures("coarse_pictures")
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ONE_PROCESS = [("--devices 8", "--devices 1")]  # eight are more than there may be cores


def commands_of_the_demo() -> list[str]:
    listed = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = listed.stdout.replace("\\\n", " ").splitlines()
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


def test_the_readme_has_no_command_but_these_kinds():
    kinds = {command.split()[0] for command in commands_of(README)}
    assert kinds == {"make", "pip", "nextblock"}


def test_the_demo_shortened(places, capsys):
    commands = commands_of_the_demo()
    assert [command.split()[1] for command in commands] == ["pretrain", "probe", "predict", "report"]
    for command in commands:
        run_shortened(command, [("digits:split=train", "TRAIN"), ("digits:split=test", "TEST")])
    assert "Report of" in capsys.readouterr().out


def test_the_readme_is_finished_and_its_pictures_and_links_exist():
    assert "<!--" not in README
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_python_of_the_readme_runs():
    (code,) = blocks_of(README, "python")
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
