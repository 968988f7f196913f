"""What a launch runs, as words and text: torchrun lines, variables, the Slurm script."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from kinema.cluster import environment, plan, slurm
from kinema.cluster.hostfile import Host
from kinema.cluster.preflight import differences, processes_on
from kinema.config.errors import KinemaError

JOB = plan.Job(
    train=("train", "tiny/smoke", "--data-path", "a clip's.csv"),
    name="job-1",
    folder="/work dir",
    python="/env/bin/python",
    environment={"NCCL_DEBUG": "INFO", "WORDS": "two words"},
)
NODES = [plan.Node(Host("node1"), 8, 96, "10.0.0.1"), plan.Node(Host("node2"), 4, 96, "10.0.0.2")]
MEETING = plan.Meeting("10.0.0.1", 29400)


def test_each_node_gets_its_own_torchrun() -> None:
    first, second = (plan.torchrun(JOB, NODES, index, MEETING, logs="/logs") for index in range(2))
    assert first[:3] == ["/env/bin/python", "-m", "torch.distributed.run"]
    for word in ("--nnodes=2", "--rdzv-endpoint=10.0.0.1:29400", "--rdzv-id=job-1", "--tee=3"):
        assert word in first
        assert word in second
    assert {"--nproc-per-node=8", "--rdzv-conf=is_host=true", "--local-addr=10.0.0.1"} <= {*first}
    assert {"--nproc-per-node=4", "--rdzv-conf=is_host=false", "--local-addr=10.0.0.2"} <= {*second}
    sixth = plan.torchrun(JOB, NODES, 0, plan.Meeting("fd00::1", 29400), logs=None)
    assert "--rdzv-endpoint=[fd00::1]:29400" in sixth
    assert first[-6:] == ["--no-python", "/env/bin/kinema", *JOB.train]


def test_the_text_is_what_a_shell_understands() -> None:
    text = plan.as_text(JOB, NODES, MEETING)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) == 2
    words = shlex.split(lines[1])
    assert words[:3] == ["cd", "/work dir", "&&"]
    assert "WORDS=two words" in words
    assert "KINEMA_LAUNCH_HOST=node2" in words
    assert words[-1] == "a clip's.csv"


def test_cores_are_shared_out_and_what_a_person_sets_wins() -> None:
    variables = plan.environment(JOB, NODES[0])
    assert variables["OMP_NUM_THREADS"] == "12"
    assert plan.environment(JOB, NODES[1])["OMP_NUM_THREADS"] == "24"
    assert variables["TOKENIZERS_PARALLELISM"] == "false"
    assert variables["NCCL_DEBUG"] == "INFO"
    own = plan.Job(**{**vars(JOB), "environment": {"OMP_NUM_THREADS": "1", "KINEMA_LAUNCH": "x"}})
    assert plan.environment(own, NODES[0])["OMP_NUM_THREADS"] == "1"
    assert plan.environment(own, NODES[0])["KINEMA_LAUNCH"] == "job-1"  # the mark is ours
    assert environment.threads(2, 8) == "1"


def test_adapters_are_matched_exactly() -> None:
    assert environment.network("mlx5_0,mlx5_1", None) == {"NCCL_IB_HCA": "=mlx5_0,mlx5_1"}
    assert environment.network("=mlx5_0:1", None) == {"NCCL_IB_HCA": "=mlx5_0:1"}
    assert environment.network(None, "eth0") == {
        "NCCL_SOCKET_IFNAME": "eth0",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    with pytest.raises(KinemaError, match="are no adapters"):
        environment.network("mlx5_0 mlx5_1", None)
    with pytest.raises(KinemaError, match="is no interface"):
        environment.network(None, "eth0;reboot")


def test_variables_that_are_none_are_refused() -> None:
    assert environment.asked_for(["A=b=c", "D="]) == {"A": "b=c", "D": ""}
    with pytest.raises(KinemaError, match="'NCCL_DEBUG' sets nothing"):
        environment.asked_for(["NCCL_DEBUG"])
    with pytest.raises(KinemaError, match="is no name of an environment variable"):
        environment.checked({"A B": "c"}, "the recipe")


def test_a_recipe_loads_no_code() -> None:
    fine = {"NCCL_DEBUG": "INFO", "PYTHONUNBUFFERED": "1", "PYTORCH_ALLOC_CONF": "x"}
    assert environment.of_recipe(fine) == fine
    for name in ("LD_PRELOAD", "PATH", "PYTHONPATH", "BASH_ENV", "NCCL_NET_PLUGIN"):
        with pytest.raises(KinemaError, match=f"{name} decides what programs load"):
            environment.of_recipe({name: "x"})
        assert environment.asked_for([f"{name}=x"]) == {name: "x"}
    with pytest.raises(KinemaError, match="zero byte"):
        environment.of_recipe({"A": "b\0c"})


def test_processes_as_asked_else_slots_else_gpus() -> None:
    hosts = [Host("a", 2), Host("b")]
    found = [{"gpus": 8, "cores": 4}] * 2
    assert [n.processes for n in processes_on(hosts, found, None)] == [2, 8]
    assert [n.processes for n in processes_on(hosts, found, 3)] == [3, 3]
    with pytest.raises(KinemaError, match="1 of 2 hosts would run nothing:\n  b: has no GPU"):
        processes_on(hosts, [{"gpus": 0, "cores": 4}] * 2, None)


def test_the_host_that_differs_is_named() -> None:
    usual = {"python": "3.11.7", "versions": {"torch": "2.13.0", "kinema": "0.1.0"}, "code": "abc"}
    older = usual | {"versions": {"torch": "2.11.0", "kinema": "0.1.0"}}
    edited = usual | {"code": "def"}
    problems = differences({"a": usual, "b": older, "c": usual, "d": edited, "e": usual})
    assert {name: str(problem) for name, problem in problems.items()} == {
        "b": "torch is 2.11.0; most have 2.13.0; kinema cluster setup",
        "d": "kinema's code is def; most have abc; kinema cluster setup",
    }


def test_the_slurm_script_is_bash_and_starts_each_node_once(tmp_path: Path) -> None:
    text = slurm.script(JOB, nodes=2, processes=1, time_limit="1-00:00:00", partition="gpu")
    file = tmp_path / "job.sh"
    file.write_text(text)
    subprocess.run(["bash", "-n", str(file)], check=True)
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --mem=0",
        "#SBATCH --time=1-00:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@300",
    ):
        assert line in text.splitlines()
    without = slurm.script(JOB, nodes=2, processes=1, time_limit=None, partition=None)
    assert "--time" not in without
    assert "--partition" not in without
    with pytest.raises(KinemaError, match=r"--partition: .* is nothing for Slurm"):
        slurm.script(JOB, nodes=2, processes=1, time_limit=None, partition="gpu\nreboot")
    with pytest.raises(KinemaError, match="--time: "):
        slurm.script(JOB, nodes=2, processes=1, time_limit="1 # x", partition=None)


@pytest.fixture
def slurm_machine(tmp_path: Path) -> Path:
    """Stand-ins of Slurm's programs: `srun` runs its command for two nodes at once."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(
        f'#!/bin/bash\n[ "$1" = show ] && printf "n1\\nn2\\n" || echo "$@" >> {tmp_path}/asked\n'
    )
    (programs / "srun").write_text(
        "#!/bin/bash\nshift 2\ntrap 'kill $(jobs -p)' TERM\n"
        'for node in 0 1; do SLURM_NODEID=$node "$@" & done\n'
        "code=0; for one in $(jobs -p); do wait $one || code=$?; done\n"
        'while [ -n "$(jobs -rp)" ]; do wait; done; exit $code\n'
    )
    (programs / "python").write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/words-$SLURM_NODEID\n'
        f'echo "$NCCL_DEBUG $WORDS $OMP_NUM_THREADS $KINEMA_LAUNCH" >> {tmp_path}/variables\n'
        "case $WORDS in wait) trap 'kill $!; exit 0' TERM; sleep 60 & wait;; fail) exit 7;; esac\n"
    )
    for file in programs.iterdir():
        file.chmod(0o755)
    return tmp_path


def run_script(machine: Path, words: str, *more: str, restarts: int = 0) -> subprocess.Popen[str]:
    job = plan.Job(
        ("train", "tiny/smoke", *more, "--data-path", "a clip's.csv"),
        "unused",
        str(machine),
        str(machine / "bin/python"),
        {"NCCL_DEBUG": "INFO", "WORDS": words},
    )
    (machine / "job.sh").write_text(
        slurm.script(job, nodes=2, processes=2, time_limit=None, partition=None)
    )
    variables = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_ON_NODE": "6"}
    variables["SLURM_RESTART_COUNT"] = str(restarts)
    return subprocess.Popen(
        ["bash", str(machine / "job.sh")],
        env={**variables, "PATH": f"{machine / 'bin'}:/usr/bin:/bin"},
        start_new_session=True,
        text=True,
    )


def test_the_slurm_script_runs_torchrun_on_every_node(slurm_machine: Path) -> None:
    assert run_script(slurm_machine, "two words").wait(30) == 0
    for node, is_host in ((0, "true"), (1, "false")):
        words = (slurm_machine / f"words-{node}").read_text().splitlines()
        assert words[:2] == ["-m", "torch.distributed.run"]
        assert f"--rdzv-conf=is_host={is_host}" in words
        assert "--rdzv-endpoint=n1:20042" in words
        assert "--rdzv-id=42" in words
        assert words[-1] == "a clip's.csv"
    variables = (slurm_machine / "variables").read_text().splitlines()
    assert variables == ["INFO two words 3 slurm-42"] * 2
    # Queued again it goes on, unless it was told with what.
    assert run_script(slurm_machine, "x", restarts=1).wait(30) == 0
    assert (slurm_machine / "words-1").read_text().endswith("a clip's.csv\n--continue\n")
    for load in (("--load", "run"), ("--load=run",)):
        assert run_script(slurm_machine, "x", *load, restarts=1).wait(30) == 0
        assert (slurm_machine / "words-1").read_text().endswith("a clip's.csv\n")
    assert run_script(slurm_machine, "fail").wait(30) == 7
    assert not (slurm_machine / "asked").exists()


def test_before_its_time_limit_the_slurm_job_saves_and_queues_again(slurm_machine: Path) -> None:
    process = run_script(slurm_machine, "wait")
    try:
        for _ in range(300):
            if len(list(slurm_machine.glob("words-*"))) == 2:
                break
            time.sleep(0.05)
        time.sleep(0.2)  # until both wait under their traps
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (slurm_machine / "asked").read_text() == "requeue 42\n"
