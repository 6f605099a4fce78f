"""What launchers tell a process, where processes meet, and a job that goes back into its queue."""

import os
import signal
from pathlib import Path

import pytest

from nextblock.launch import LaunchError, World, find_world, launch, requeue_job
from nextblock.train.distributed import DistributedError, meeting_point
from ranks import run_ranks
from tiny_runs import After, Quiet, settings, write_images


def variables(words: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words.split())


TORCHRUN = variables(
    "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 MASTER_ADDR=node1 MASTER_PORT=29500 TORCHELASTIC_RUN_ID=none"
)
ALLOCATION = variables("SLURM_JOB_ID=7 SLURM_JOB_NODELIST=gpu[07-09] SLURM_NTASKS=6 SLURM_PROCID=0")
STEP = ALLOCATION | variables(
    "SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=6 SLURM_STEP_NODELIST=gpu[07-09]"
)
RANK_2_OF_8 = "OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_RANK=2"
MPI = variables(f"{RANK_2_OF_8} OMPI_COMM_WORLD_LOCAL_SIZE=4 PMIX_NAMESPACE=334299137")
LSF = {**MPI, "LSB_JOBID": "9", "LSB_MCPU_HOSTS": "batch5 1 c1 4 c2 4"}


@pytest.mark.parametrize(
    ("env", "changes", "world"),
    [
        ({}, "", World()),
        (TORCHRUN, "", World(3, 4, 1, "torchrun")),
        (TORCHRUN, "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0", World(0, 1, 0, "torchrun")),
        ({}, "RANK=3", World()),
        (STEP, "", World(5, 6, 1, "slurm")),
        (ALLOCATION, "", World()),  # a shell of sbatch or salloc
        (STEP, "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1", World()),  # srun -n1
        (STEP | TORCHRUN, "", World(3, 4, 1, "torchrun")),
        (MPI, "", World(2, 8, 2, "mpi")),
        (STEP | MPI, "", World(2, 8, 2, "mpi")),  # mpirun's daemon on another node is a step's task
        (MPI, "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1", World()),
    ],
)
def test_the_world_is_what_the_innermost_launcher_says(env, changes, world) -> None:
    assert find_world(env | variables(changes)) == world


@pytest.mark.parametrize("rank", ["2", ""])
def test_numbers_that_contradict_each_other_are_refused(rank) -> None:
    with pytest.raises(LaunchError):
        find_world({"RANK": rank, "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("env", "changes", "host"),
    [
        (TORCHRUN, "", "node1"),
        (STEP, "", "gpu07"),
        (STEP, "SLURM_STEP_NODELIST=big1,gpu[07-09]", "big1"),
        (STEP, "SLURM_STEP_NODELIST=rack[0-1]node[0-3]", "rack0node0"),
        (STEP, "MASTER_ADDR=10.0.0.1", "10.0.0.1"),
        (LSF, "", "batch5"),
        (LSF, "JSM_NAMESPACE_RANK=2", "c1"),
        (MPI, "OMPI_COMM_WORLD_SIZE=4", "localhost"),
    ],
)
def test_processes_meet_on_the_host_of_rank_0(env, changes, host) -> None:
    env = env | variables(changes)
    assert meeting_point(find_world(env), env)[0] == host


def test_without_a_known_host_of_rank_0_it_is_asked_for() -> None:
    with pytest.raises(DistributedError, match="MASTER_ADDR"):
        meeting_point(find_world(MPI), MPI)
    with pytest.raises(DistributedError, match="MASTER_PORT is 'any'; set it to the number"):
        meeting_point(find_world(MPI), {**MPI, "MASTER_ADDR": "here", "MASTER_PORT": "any"})


@pytest.mark.parametrize(
    ("env", "change"),
    [(STEP, "SLURM_STEP_ID=1"), (STEP, "SLURM_RESTART_COUNT=1"), (LSF, "PMIX_NAMESPACE=334299138")],
)
def test_ranks_agree_on_a_port_that_another_launch_does_not_take(env, change) -> None:
    world = find_world(env)
    _, port, name = meeting_point(world, env)
    assert meeting_point(world._replace(rank=0, local_rank=0), env)[1:] == (port, name)
    assert not {port, name} & {*meeting_point(world, env | variables(change))}
    assert meeting_point(world, {**env, "MASTER_PORT": "29500"})[1] == 29500


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands that note what they are asked, and answer what the files `state` and `error` hold."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("scontrol", "squeue"):
        program = folder / name
        program.write_text(
            f'#!/bin/sh\necho {name} "$@" >> {folder}/calls\n'
            f"if [ {name} = squeue ]; then cat {folder}/state; "
            f"elif [ -s {folder}/error ]; then cat {folder}/error >&2; exit 1; fi\n"
        )
        program.chmod(0o755)
    (folder / "state").write_text("RUNNING None\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize(
    ("state", "is_requeued"),
    [("RUNNING None", True), ("COMPLETING TimeLimit", True), ("COMPLETING None", False)],  # the last: scancel
)
def test_a_job_is_requeued_unless_it_was_cancelled(slurm, state, is_requeued) -> None:
    (slurm / "state").write_text(f"{state}\n")
    assert ("back in the queue" in requeue_job({"SLURM_JOB_ID": "7"})) == is_requeued
    assert ("scontrol requeue 7" in (slurm / "calls").read_text().splitlines()) == is_requeued


def test_a_job_that_cannot_be_requeued_is_a_warning(slurm, monkeypatch) -> None:
    (slurm / "error").write_text("Requested operation is presently disabled\n")
    assert "WARNING: job 7 is not back in the queue: Requested" in requeue_job({"SLURM_JOB_ID": "7"})
    monkeypatch.setenv("PATH", str(slurm.parent))
    assert "WARNING" in requeue_job({"SLURM_JOB_ID": "7"})
    assert "not a SLURM job" in requeue_job({})


def _pretrain_until_a_signal(out: Path, images: Path, requeue: bool) -> tuple[int, list[str], str | None]:
    from nextblock import pretraining

    reporter = Quiet()
    stop = After(2, lambda _, event: event.group.rank == 1 and os.kill(os.getpid(), signal.SIGUSR1))
    pretraining._monitors = lambda *_: [stop]
    changes = {"data.train": str(images), "checkpoint.requeue": requeue}
    result = pretraining.pretrain(settings(changes), out=out, reporter=reporter)
    os.kill(os.getpid(), signal.SIGTERM) if requeue else None  # as SLURM does
    return result.step, reporter.notes, result.stopped_by


@pytest.mark.parametrize("requeue", [True, False])
def test_rank_0_requeues_once_all_have_saved_if_asked(slurm, tmp_path: Path, requeue: bool) -> None:
    write_images(tmp_path / "images", 16)
    env = {"SLURM_JOB_ID": "7", "PATH": os.environ["PATH"]}
    ends = run_ranks(2, _pretrain_until_a_signal, tmp_path / "run", tmp_path / "images", requeue, env=env)
    assert [(end[0], end[2]) for end in ends] == [(2, "SIGUSR1")] * 2
    assert [end[1][-1].startswith("job 7 is back") for end in ends] == [requeue, False]
    calls = (slurm / "calls").read_text() if requeue else "scontrol requeue 7"
    assert calls.count("scontrol requeue 7") == 1


def test_a_launcher_that_has_ended_leaves_the_signal_handlers_as_they_were():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    assert launch("presets", [], devices=1, device="cpu") == 0
    assert [signal.getsignal(number) for number in numbers] == before
