"""Several processes train one model: the same losses on any world, exact resume, and an end for all."""

import random
import re
import shutil
import signal
import socket
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from nextblock.train import TrainResult
from nextblock.train.state import find_intact
from ranks import (
    RankFailed,
    SignalRank,
    run_ranks,
    train_and_die,
    train_and_draw,
    train_in_turn,
    train_otherwise,
    train_together,
)
from tiny_runs import (
    EMBEDDING,
    MASKED,
    TOKENS,
    call_cli,
    loss_lines,
    metrics,
    refused,
    same,
    weights,
    write_teacher,
)
from toy import ToySource

BASE = {
    "train.batch_size": 10,
    "train.micro_batch_size": 3,
    "model.drop_path": 0.3,
    "model.embed_dim": 20,  # parts of unequal size on 3 and 4 ranks
    "monitor.val_every": "3st",
}
KINDS = {
    "xtra": {"model.order": "random"},
    "aim": {"model.prefix": True, "model.num_predicted_blocks": 2},
    "tokens": {**TOKENS, "train.activation_checkpointing": True},
    "embedding": {**EMBEDDING, "model.num_heads": 5},
    "features": {"model.predict_visible": True},
    "masked": MASKED,
}
QUICK = [("xtra", 2, "ddp"), ("aim", 3, "fsdp"), ("embedding", 2, "fsdp"), ("features", 2, "ddp")]


@pytest.fixture(scope="module", autouse=True)
def teacher(tmp_path_factory):
    KINDS["features"] |= write_teacher(tmp_path_factory.mktemp("teacher") / "model.safetensors")


def sources() -> dict[str, ToySource]:
    """One training image cannot be read: a hole in some rank's share."""
    return {"train": ToySource(40, bad=[7]), "val": ToySource(11, seed=1)}


def together(world, strategy, kind, *turns):
    """Train in the directories of `turns`, each with its monitors; gives the last result of each rank."""
    changes = {**BASE, **KINDS[kind], "train.strategy": strategy}
    if world == 1:
        return [train_in_turn(turns, changes, sources())[-1]]
    results = run_ranks(world, train_in_turn, turns, changes, sources())
    assert not [one for one in results if isinstance(one, RankFailed | int)], results
    return [turned[-1] for turned in results]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`runs(kind, world, strategy)`: a folder of runs made once.

    `whole` was not interrupted; of several ranks, `cut` was stopped by a signal to the last one, and resumed.
    """

    @cache
    def make(kind: str, world: int = 1, strategy: str = "auto") -> Path:
        folder = tmp_path_factory.mktemp(f"{kind}-{world}-{strategy}")
        if world == 1:
            together(world, strategy, kind, (folder / "whole", ()))
            return folder
        stop = SignalRank(3, rank=world - 1, number=signal.SIGUSR1)
        stopped = together(world, strategy, kind, (folder / "whole", ()), (folder / "cut", (stop,)))
        assert [(one.step, one.stopped_by) for one in stopped] == [(3, "SIGUSR1")] * world
        together(world, strategy, kind, (folder / "cut", ()))
        return folder

    return make


def curve(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)] + [line["val_loss"] for line in metrics(run, "val")]


@pytest.mark.parametrize(
    ("kind", "world", "strategy"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in product(KINDS, (2, 3, 4), ("ddp", "fsdp"))
    ],
)
def test_several_ranks_have_the_losses_of_one_and_resume_exactly_after_a_signal_to_one_of_them(
    kind, world, strategy, runs
):
    several, alone = runs(kind, world, strategy), runs(kind) / "whole"
    whole, cut = several / "whole", several / "cut"
    assert curve(whole) == pytest.approx(curve(alone), abs=1e-6)
    if kind == "xtra":
        assert (whole / "baselines.json").read_bytes() == (alone / "baselines.json").read_bytes()
    assert same(weights(cut, 7), weights(whole, 7))
    assert loss_lines(cut) == loss_lines(whole)


@pytest.mark.parametrize(
    "worlds",
    [
        [(2, "ddp"), (3, "fsdp"), (1, "auto")],
        pytest.param([(1, "auto"), (4, "fsdp"), (2, "ddp")], marks=pytest.mark.slow),
        pytest.param([(3, "fsdp"), (2, "fsdp")], marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_on_another_world_and_strategy_with_the_same_samples(worlds, runs, tmp_path):
    *earlier, last = worlds
    for step, world in zip((2, 4), earlier, strict=False):
        together(*world, "xtra", (tmp_path / "run", (SignalRank(step, rank=0, number=signal.SIGTERM),)))
    together(*last, "xtra", (tmp_path / "run", ()))
    assert curve(tmp_path / "run") == pytest.approx(curve(runs("xtra") / "whole"), abs=1e-6)


PLACES = {
    "in a step": "nextblock.train.trainer.combine",
    "inside a checkpoint": "nextblock.train.state.checksum",
    "before the last rename": "nextblock.train.state.save_model",
    "inside a resume": "nextblock.train.learner.load_state",
}


@pytest.mark.parametrize(
    ("trials", "seed", "cases"),
    [
        (2, 29, QUICK[:2]),
        pytest.param(50, 1, [*product(["xtra"], (2, 3), ("ddp", "fsdp"))], marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_the_run_ends_as_if_it_had_not_been(trials, seed, cases, runs, tmp_path):
    draw, killed = random.Random(seed), 0
    for trial in range(trials):
        (kind, world, strategy), place = draw.choice(cases), list(PLACES)[trial % len(PLACES)]
        expected, run = runs(kind, world, strategy) / "whole", tmp_path / f"{trial}"
        changes = {**BASE, **KINDS[kind], "train.strategy": strategy, "checkpoint.every": "2st"}
        victims = draw.choice([-1, draw.randrange(world)])
        changes["checkpoint.in_background"] = draw.random() < 0.5
        if is_resume := place == "inside a resume":
            together(world, strategy, kind, (run, (SignalRank(3, rank=0, number=signal.SIGINT),)))
        after = 1 if is_resume else draw.randrange(1, 9)
        results = run_ranks(world, train_and_die, run, changes, sources(), PLACES[place], victims, after)
        described = (trial, place, kind, world, strategy, victims, after, results)
        # A place that is on another rank, or not visited so often, kills nobody.
        if not all(isinstance(one, TrainResult) for one in results):
            assert -signal.SIGKILL in results, described
            killed += 1
            together(world, strategy, kind, (run, ()))
        assert same(weights(run, 7), weights(expected, 7)), described
        # An unreadable image that was listed before the kill stays listed: its count is ahead of the curve.
        curves = ([{**line, "bad": 0} for line in loss_lines(one)] for one in (run, expected))
        assert next(curves) == next(curves), described
    assert killed >= trials // 2


@pytest.mark.parametrize(
    ("what", "message", "saved"),
    [
        (
            "settings",
            r"rank 1 on \S+ has optim.lr 1.0, rank 0 on \S+ has 0.001; all processes .* the same",
            [],
        ),
        ("out", r"rank 1 on \S+ has --out '\S+/other', rank 0 on \S+ has '\S+/run'", []),
        ("version", r"rank 1 on \S+ has nextblock 0.0.1, rank 0 on \S+ has .*install the same", []),
        ("size", r"rank 1 on \S+ was started as one of 4 processes, rank 0 on \S+ as one of 3", []),
        ("images", r"rank 1 on \S+ has data.train 'toy-5-40', rank 0 on \S+ has 'toy-0-40'", []),
        ("batch", "a batch of 2 cannot be divided among 3 processes; start fewer, or raise train.batch", []),
        ("disk", r"rank 1 on \S+: the disk is gone", ["step_00000004"]),
        ("bug", r"rank 1 on \S+, step 3: 'surprise'", []),
    ],
)
def test_what_is_wrong_with_one_rank_ends_all_and_names_it(what, message, saved, tmp_path):
    results = run_ranks(3, train_otherwise, tmp_path / "run", what)
    assert all(isinstance(one, RankFailed) for one in results)
    assert re.search(message, str(results[0]))
    assert [path.name for path in tmp_path.glob("run/checkpoints/step_*")] == saved
    assert what in ("disk", "bug") or not [*tmp_path.iterdir()]
    # The launcher may end rank 0 before it has spoken: a rank with an error of its own speaks for itself.
    assert results[2].is_reported == (what not in ("version", "size"))
    assert what != "bug" or not results[1].is_reported


def test_pictures_are_drawn_by_one_rank(tmp_path):
    first, second = run_ranks(2, train_and_draw, tmp_path / "run")
    assert first == [f"step_{step:08d}.png" for step in (0, 2, 4)]
    assert second == []


def test_a_rank_that_is_killed_is_named_by_the_others(tmp_path):
    killer = SignalRank(3, rank=1, number=signal.SIGKILL)
    results = run_ranks(3, train_together, tmp_path / "run", {"train.batch_size": 10}, None, (killer,))
    assert results[1] == -signal.SIGKILL
    for rank in (0, 2):
        assert re.search(r"rank 1 on \S+ died or hangs; it was last heard of in step \d", str(results[rank]))


def test_a_missing_part_of_a_checkpoint_is_named_and_the_one_before_used(runs, tmp_path, caplog):
    run = shutil.copytree(runs("aim", 3, "fsdp") / "cut", tmp_path / "run")
    (run / "checkpoints" / "step_00000007" / "optimizer" / "__2_0.distcp").unlink()
    with caplog.at_level("WARNING"):
        assert find_intact(run / "checkpoints") == run / "checkpoints" / "step_00000003"
    assert "__2_0.distcp" in caplog.text
    assert (run / "checkpoints" / "damaged_step_00000007").is_dir()


def test_a_port_in_use_is_told_with_the_remedy(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        env = {"MASTER_PORT": str(listener.getsockname()[1])}
        (result,) = run_ranks(1, train_together, tmp_path / "run", {"train.strategy": "fsdp"}, env=env)
    assert re.search(r"port \d+ of 127.0.0.1 is in use, perhaps by another run; set MASTER_PORT", str(result))


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({}, r"--devices 9999, but \S+ has \d+ CPU cores?; use at most"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "--devices 9999 starts processes, but torchrun has done so"),
    ],
)
def test_devices_are_refused_if_there_are_fewer_or_a_launcher_gave_them(
    env, message, capsys, tmp_path, monkeypatch
):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    words = ("pretrain", "--data.train", "digits", "--out", tmp_path / "run", "--train.device", "cpu")
    assert re.search(message, refused(call_cli(capsys, *words, "--devices", "9999")))
    assert not (tmp_path / "run").exists()
