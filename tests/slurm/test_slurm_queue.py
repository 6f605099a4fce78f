"""A real SLURM queue of one node, in which docs/slurm/pretrain.sbatch runs as it stands.

    apt-get install slurm-wlm munge
    NEXTBLOCK_SLURM=1 python -m pytest tests/slurm -m slow     as root, some minutes on two cores

The queue has its own daemons, ports and folder, which end with the tests.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from torch import Tensor

from tiny_runs import TINY_FLAGS, checkpoints, logged_steps, same, weights

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("NEXTBLOCK_SLURM") or not all(map(shutil.which, PROGRAMS)),
        reason="needs NEXTBLOCK_SLURM=1 and Debian's slurm-wlm and munge",
    ),
]

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm" / "pretrain.sbatch"

STEPS = 300
FLAGS = (*TINY_FLAGS, "--train.duration", f"{STEPS}st", "--data.workers", "1")

CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for as long as a credential lives, by default two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=bf_interval=2,sched_interval=5
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName=localhost CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES State=UP
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(condition: Callable[[], object], what: str, timeout_s: float = 300) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        time.sleep(0.2)


class Queue:
    """The commands of a queue, and what its jobs leave behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {
            **os.environ,
            "SLURM_CONF": f"{folder}/slurm.conf",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }

    def call(self, *command: object) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(
            words, env=self.env, cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, name: str, *flags: str) -> str:
        export = f"--export=ALL,DATA=digits:split=train,OUT={self.folder / name}"
        return self.call("sbatch", "--parsable", export, SCRIPT, *FLAGS, *flags).strip()

    def show(self, job: str) -> dict[str, str]:
        words = self.call("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until_state(self, job: str, *states: str) -> None:
        until(lambda: self.show(job)["JobState"] in states, f"job {job} to be {' or '.join(states)}")

    def steps_done(self, name: str) -> list[int]:
        run = self.folder / name
        return logged_steps(run) if (run / "metrics.jsonl").is_file() else []

    def log(self, job: str) -> str:
        return (self.folder / f"nextblock-{job}.out").read_text()


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Queue]:
    folder = tmp_path_factory.mktemp("queue")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    conf = CONF.format(folder=folder, ctld_port=free_port(), slurmd_port=free_port())
    (folder / "slurm.conf").write_text(conf)
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munged += [f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed"]
    queue = Queue(folder)
    with ExitStack() as stack:

        def start(*command: str) -> None:
            log = stack.enter_context((folder / f"{command[0]}.log").open("w"))
            daemon = subprocess.Popen(command, env=queue.env, stdout=log, stderr=log, start_new_session=True)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)

        start(*munged)
        until((folder / "munge.socket").exists, "munged", 30)
        start("slurmctld", "-D")
        start("slurmd", "-D", "-N", "localhost")
        until(lambda: "idle" in queue.call("sinfo", "--noheader"), "the node", 60)
        yield queue
        queue.call("scancel", "--signal=KILL", "--full", "--user=root")
        until(lambda: not queue.call("squeue", "--noheader"), "the end of all jobs", 60)


@pytest.fixture(scope="module")
def whole(queue: Queue) -> dict[str, Tensor]:
    """The weights of a run that nothing stopped."""
    job = queue.submit("whole")
    queue.until_state(job, "COMPLETED")
    assert "2 processes" in queue.log(job)
    return weights(queue.folder / "whole", STEPS)


@pytest.mark.parametrize("signal", ["USR1", "TERM"])
def test_a_job_that_is_sent_a_signal_saves_is_requeued_and_ends_as_if_never_stopped(
    queue: Queue, whole: dict[str, Tensor], signal: str
) -> None:
    job = queue.submit(signal)
    until(lambda: len(queue.steps_done(signal)) > 5, "six steps")
    queue.call("scancel", "-s", signal, job)
    queue.until_state(job, "PENDING")
    stopped_at = queue.steps_done(signal)[-1]
    assert f"stopped by SIG{signal} after step {stopped_at} of {STEPS}, saved" in queue.log(job)
    assert f"job {job} is back in the queue" in queue.log(job)
    assert checkpoints(queue.folder / signal) == [f"step_{stopped_at:08d}"]
    queue.until_state(job, "COMPLETED")
    assert queue.show(job)["Restarts"] == "1"
    assert queue.steps_done(signal) == list(range(1, STEPS + 1))
    assert same(weights(queue.folder / signal, STEPS), whole)


def test_a_job_that_is_cancelled_is_saved_and_stays_cancelled(queue: Queue) -> None:
    job = queue.submit("cancelled")
    until(lambda: len(queue.steps_done("cancelled")) > 5, "six steps")
    queue.call("scancel", job)
    queue.until_state(job, "CANCELLED")
    assert "saved; the same command resumes" in queue.log(job)
    assert "SLURM decides" in queue.log(job)


WORLDS = """
import os
from nextblock.launch import find_world
world = find_world()
if world.launcher is None:
    print(world.rank, world.size)
else:
    from nextblock.train.distributed import meeting_point
    print(world.rank, world.size, *meeting_point(world, os.environ))
"""


def test_what_a_step_tells_is_understood(queue: Queue) -> None:
    (queue.folder / "world.py").write_text(WORLDS)
    (queue.folder / "worlds.sh").write_text(
        f"""#!/bin/bash
        world="{sys.executable} world.py"
        echo shell; $world
        echo one; srun -n1 $world
        echo two; srun -n2 $world
        echo again; srun -n2 $world"""
    )
    job = queue.call("sbatch", "--parsable", "-n2", "--output=worlds.out", "worlds.sh").strip()
    queue.until_state(job, "COMPLETED")
    said: dict[str, list[list[str]]] = {}
    for line in (queue.folder / "worlds.out").read_text().splitlines():
        words = line.split()
        if len(words) == 1:
            said[words[0]] = []
        else:
            said[list(said)[-1]].append(words)
    # Neither a shell in an allocation of two tasks nor a step of one is a world of two.
    assert said["shell"] == said["one"] == [["0", "1"]]
    first, second = sorted(said["two"])
    assert first[:3] == ["0", "2", "localhost"]
    assert second == ["1", *first[1:]]
    assert said["again"][0][3:] != first[3:]  # two steps of a job do not meet each other
