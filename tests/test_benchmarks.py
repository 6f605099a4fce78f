"""The benchmarks run, report what they promise, and compare equals; no time is asserted."""

import importlib
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch

from nextblock.config import OptimConfig
from nextblock.models import NextBlockModel
from nextblock.optim import build_optimizer
from toy import tiny_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import common  # noqa: E402
import step  # noqa: E402
from plain import PlainModel, plain_optimizer  # noqa: E402

CONFIG = tiny_config(block_size=(2, 3))

# A machine with one core is warned of a worker.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def check(name, output):
    """Check what all benchmarks print with --quick --json; return the object of the last line."""
    found = json.loads(output.splitlines()[-1])
    assert (found["bench"], found["quick"], found["torch"]) == (name, True, torch.__version__)
    found["budgets"] = [row["budget"] for row in found["rows"] if row["budget"]]
    for row in found["rows"]:
        assert min(row["ours"], row["against"], row["ratio"]) > 0
        assert f"\n{row['what']}" in output
    return found


@pytest.fixture
def quick(monkeypatch, capsys):
    """Runs a script in this process: importing torch takes longer than it does."""

    def run(name):
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setattr(sys, "argv", [name, "--quick", "--json"])
        importlib.import_module(name).main()
        return check(name, capsys.readouterr().out)

    return run


def test_a_step_has_the_loss_of_the_plain_one(quick):
    found = quick("step")
    assert found["budgets"] == ["at least 1.15", "at least 1.25", "at least 0.80", "at least 1.00"]
    assert found["losses"] == pytest.approx(found["plain_losses"], rel=1e-5)
    assert found["losses"][-1] < found["losses"][0]


def test_our_crops_have_the_pixels_of_plain_ones(quick):
    found = quick("data")
    assert [row["unit"] for row in found["rows"]] == [*6 * ["images/s"], "s"]
    # Pillow and torch round the resized bytes differently, by one or two of 255.
    assert 0 < found["largest_pixel_difference"] < 2.5


def test_heads_in_one_probe_have_the_accuracies_of_a_probe_each(quick):
    found = quick("probe")
    assert found["budgets"] == ["at least 8.0"]
    assert found["accuracies"] == found["accuracies_alone"]
    assert list(found["accuracies"]) == ["attentive 0.0001", "attentive 0.01", "linear 0.0001", "linear 0.01"]
    assert len(set(found["accuracies"].values())) > 1


def test_a_loaded_model_has_the_weights_of_its_file_and_the_script_runs_by_itself():
    command = [sys.executable, str(BENCHMARKS / "load.py"), "--quick", "--json"]
    found = check("load", subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["budgets"] == ["at most 0.5 s"]
    assert found["same_weights"]


def test_losses_that_differ_at_the_first_step_give_no_ratio():
    assert step.loss_difference([{"losses": [1.0, 0.5]}, {"losses": [1.0, 0.75]}]) == 0.25
    for wrong in (1.1, math.nan):
        with pytest.raises(SystemExit, match="no ratio"):
            step.loss_difference([{"losses": [1.0]}, {"losses": [wrong]}])


def test_variants_take_turns_in_processes_of_their_own():
    variants = {"one": partial(os.getpid), "other": partial(os.getpid)}
    found = common.take_turns(variants, Namespace(quick=False, rounds=2))
    assert len({*found["one"], *found["other"], os.getpid()}) == 5


def test_the_plain_model_has_our_gradients_and_its_optimizers_make_our_steps():
    torch.manual_seed(0)
    ours, *plain = NextBlockModel(CONFIG), PlainModel(CONFIG), PlainModel(CONFIG)
    optim, images = OptimConfig(), torch.randn(3, 3, 16, 24)
    settings = (optim.lr, optim.weight_decay, optim.betas, optim.eps)
    trained: list[tuple[torch.nn.Module, torch.optim.Optimizer]] = [(ours, build_optimizer(ours, optim))]
    for model, fused in zip(plain, (False, True), strict=True):
        model.load_state_dict(ours.state_dict())
        trained.append((model, plain_optimizer(model, *settings, fused=fused)))
    for model, optimizer in trained:
        for _ in range(2):
            optimizer.zero_grad()
            out = model(images)
            (out if isinstance(out, torch.Tensor) else out.loss).backward()
            optimizer.step()
    for model in plain:
        theirs = dict(model.named_parameters())
        assert theirs.keys() == dict(ours.named_parameters()).keys()
        for name, mine in ours.named_parameters():
            for one, other in ((theirs[name], mine), (theirs[name].grad, mine.grad)):
                torch.testing.assert_close(one, other, msg=lambda m, n=name: f"{n}: {m}")
