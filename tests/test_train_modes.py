"""Compiled and deterministic runs, each in a process of its own: both change torch for good."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tiny_runs import metrics

TINY_RUN = [
    *("--preset", "xtra-tiny", "--data.train", "digits:split=test", "--train.duration", "4st"),
    *(
        "--train.batch_size",
        "8",
        "--train.device",
        "cpu",
        "--monitor.log_every",
        "1st",
        "--optim.warmup",
        "1st",
    ),
    *("--monitor.pictures_every", "null", "--model.drop_path", "0.2", "--model.embed_dim", "32"),
]


def losses(run, *flags):
    command = [sys.executable, "-m", "nextblock", "pretrain", *TINY_RUN, "--out", str(run), *flags]
    environment = {**os.environ, "JAXTYPING_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [line["loss"] for line in metrics(run)]


@pytest.mark.slow
def test_a_deterministic_run_on_a_cpu_is_the_run_that_it_is_anyhow(tmp_path):
    plain = losses(tmp_path / "plain")
    assert losses(tmp_path / "deterministic", "--train.deterministic", "true") == plain


@pytest.mark.slow
def test_a_compiled_run_has_the_same_losses(tmp_path):
    plain = losses(tmp_path / "plain", "--model.drop_path", "0")
    compiled = losses(tmp_path / "compiled", "--model.drop_path", "0", "--train.compile", "true")
    assert compiled == pytest.approx(plain, abs=1e-5)
