"""Two processes of one run (gloo), against one process and against themselves."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_place import Place, make_place

from kdcli.devices import Visible
from kdcli.errors import DeviceError, OutputExistsError
from kdcli.training.config import StudentConfig
from kdcli.training.distributed import how_to_talk, join_ranks
from kdcli.training.train import train_student

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@dataclass(frozen=True)
class Pair:
    """What both processes of each scenario reported."""

    place: Place
    configs: dict[str, StudentConfig]
    results: dict[str, tuple[dict[str, Any], dict[str, Any]]]
    stderr: str
    threads: tuple[list[str], list[str]]
    """Of each process when Python ends."""


def make_configs(place: Place) -> dict[str, StudentConfig]:
    partly = f"{place.data}@labelled=0.3"
    exact = {"bn": "frozen", "optimizer": "sgd", "lr": 0.05, "test": place.test, "data": partly}
    one_path = {
        "method": "distill-equal",
        "label_weight": 0.0,
        "bn": "frozen",
        "optimizer": "sgd",
        "lr": 0.05,
    }
    broken = place.root / "broken"
    for source in sorted(Path(place.data).rglob("*.png")):
        target = broken / source.relative_to(place.data)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    next(iter(sorted(broken.rglob("*.png")))).write_bytes(b"\x89PNG\r\n\x1a\n no more")
    return {
        "exact": place.config("exact2", "distill-equal", **exact),
        "unread": place.config("unread2", epochs=1, accumulate=2, **one_path),
        "whole": place.config("whole2", ema=0.9, clip_norm=1.0),
        "stopped": place.config("stopped2", ema=0.9, clip_norm=1.0),
        "resumed": place.config("stopped2", ema=0.9, clip_norm=1.0),
        "explodes": place.config("explodes2"),
        "refused": place.config("refused2"),
        "bad_image": place.config("bad2", data=str(broken)),
        "finished": place.config("whole2", ema=0.9, clip_norm=1.0),
    }


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    place = make_place(tmp_path_factory.mktemp("ranks"))
    configs = make_configs(place)
    scenarios: dict[str, dict[str, Any]] = {
        name: {"config": config.model_dump(mode="json")} for name, config in configs.items()
    }
    scenarios["stopped"]["signal_at"] = 4
    scenarios["explodes"]["explode_at"] = 5
    scenarios["refused"]["rank1"] = {"optimizer": "sgdd"}
    (place.root / "scenarios.json").write_text(json.dumps(scenarios))
    results = place.root / "results"
    results.mkdir()
    script = Path(__file__).with_name("ranks_script.py")
    done = subprocess.run(
        [sys.executable, *LAUNCH, str(script), str(place.root / "scenarios.json"), str(results)],
        env=environment(), capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {
        name: tuple(json.loads((results / f"{name}.{rank}.json").read_text()) for rank in (0, 1))
        for name in scenarios
    }
    threads = tuple(json.loads((results / f"threads.{rank}.json").read_text()) for rank in (0, 1))
    return Pair(place, configs, found, done.stderr, threads)  # type: ignore[arg-type]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {**load_file(out / "heads.safetensors"), **load_file(out / "export" / "model.safetensors")}


def test_no_thread_of_gloo_outlives_the_run(pair: Pair) -> None:
    """One that frees a tensor while Python ends takes the process with it: SIGABRT after everything was done."""
    assert [name for names in pair.threads for name in names if "gloo" in name] == []


def test_processes_send_one_message_a_step_besides_the_gradients(pair: Pair) -> None:
    """Losses, and of the next batch errors, signals and counts; more is said where an epoch ends and one begins."""
    for name in ("exact", "whole"):
        counts = [result["messages"] for result in pair.results[name]]
        assert counts[0] == counts[1]
        steps = pair.results[name][0]["outcome"]["history"][0]["steps"]
        within = [count for number, count in enumerate(counts[0], 1) if number % steps]
        assert len(within) >= 4
        assert set(within) == {1}, counts


def test_two_processes_take_the_steps_of_one(pair: Pair) -> None:
    """Labelled and unlabelled images are shared out unequally, yet every mean is that over the whole batch."""
    config = pair.configs["exact"]
    alone = train_student(config.model_copy(update={"out": pair.place.root / "exact1"}))
    together = pair.results["exact"][0]["outcome"]
    assert any(
        a != b
        for a, b in zip(pair.results["exact"][0]["images"], pair.results["exact"][1]["images"], strict=True)
    )
    for one, two in zip(alone.history, together["history"], strict=True):
        for part in ("loss", "label", "distill", "distill/gen", "distill/exp", "lr"):
            assert two[part] == pytest.approx(one[part], rel=1e-5), part
    assert together["test"] == alone.test
    mine, theirs = weights(pair.place.root / "exact1"), weights(config.out)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-6)


def test_a_mean_over_each_process_s_own_images_would_be_another_one(pair: Pair) -> None:
    """The test above would notice: in some batch the processes have unequal numbers of labelled images."""
    from kdcli.data.sources import open_data
    from kdcli.training.samplers import EpochOrder

    config = pair.configs["exact"]
    labels = open_data(config.data).labels
    shares = [
        [int((labels[ticket.positions] >= 0).sum()) for ticket in EpochOrder(labels, 8, 0, rank, 2)]
        for rank in (0, 1)
    ]
    assert shares[0] != shares[1]


def test_heads_that_no_loss_reads_do_not_hold_the_processes_up(pair: Pair) -> None:
    config = pair.configs["unread"]
    train_student(config.model_copy(update={"out": pair.place.root / "unread1", "accumulate": 1}))
    mine, theirs = weights(pair.place.root / "unread1"), weights(config.out)
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-6)


def test_a_signal_to_one_process_stops_both_at_the_same_step_and_they_go_on_to_the_same_bits(
    pair: Pair,
) -> None:
    first, second = pair.results["stopped"]
    assert first["outcome"]["error"] == second["outcome"]["error"]
    assert first["outcome"]["error"]["code"] == 75
    assert len(first["draws"]) == len(second["draws"]) >= 4
    assert (first["outcome"]["told"], second["outcome"]["told"]) == (False, False)
    whole, resumed = pair.configs["whole"].out, pair.configs["resumed"].out
    for file in ("heads.safetensors", "export/model.safetensors"):
        assert (whole / file).read_bytes() == (resumed / file).read_bytes()
    for rank in (0, 1):  # random numbers of each process go on where they were
        drawn = pair.results["stopped"][rank]["draws"] + pair.results["resumed"][rank]["draws"]
        assert drawn == pair.results["whole"][rank]["draws"]
    assert pair.results["whole"][0]["draws"] != pair.results["whole"][1]["draws"]


def test_a_loss_that_explodes_in_one_process_ends_both_with_the_same_error(pair: Pair) -> None:
    first, second = (result["outcome"]["error"] for result in pair.results["explodes"])
    assert first == second
    assert first["code"] == 40
    assert "step 5" in first["message"]
    assert "'label' is inf" in first["message"]


def test_what_one_process_refuses_all_refuse(pair: Pair) -> None:
    first, second = (result["outcome"] for result in pair.results["refused"])
    assert first["error"] == second["error"]
    assert first["error"]["code"] == 2
    assert "unknown optimizer 'sgdd'" in first["error"]["message"]
    assert (first["told"], second["told"]) == (False, True)
    assert not pair.configs["refused"].out.exists()


def test_an_image_that_one_process_cannot_read_ends_both(pair: Pair) -> None:
    first, second = (result["outcome"]["error"] for result in pair.results["bad_image"])
    assert first == second
    assert first["code"] == 12


def test_only_the_first_process_speaks_and_all_have_the_result(pair: Pair) -> None:
    assert pair.stderr.count("is finished; nothing to do") == 1
    results = [pair.results[name][rank]["outcome"] for name in ("whole", "finished") for rank in (0, 1)]
    assert results[0] == results[1] == results[2] == results[3]
    assert results[0]["processes"] == 2
    assert results[0]["history"][0]["steps"] == 3


def test_a_run_of_two_processes_does_not_go_on_alone(pair: Pair) -> None:
    with pytest.raises(OutputExistsError, match="processes was 2, is 1"):
        train_student(pair.configs["whole"])


@pytest.mark.slow
def test_torchrun_prints_one_document(pair: Pair) -> None:
    config = pair.configs["whole"]
    done = subprocess.run(
        [
            sys.executable, *LAUNCH, "-m", "kdcli", "train-student", config.data, "--method", "labels-only",
            "--student", config.student, "--image-size", "32", "--epochs", "1", "--batch-size", "8", "--device",
            "cpu", "--workers", "0", "--out", str(pair.place.root / "shell"), "--json",
        ],
        env=environment(), capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["processes"] == 2
    assert np.isfinite(document["history"][0]["loss"])


@pytest.mark.slow
def test_two_nodes_of_one_process_take_the_steps_of_one(tmp_path: Path) -> None:
    """Each starts its own torchrun and has local rank 0, as on machines of a card each; here both are this one."""
    place = make_place(tmp_path, views="eval")
    config = place.config("nodes", bn="frozen", optimizer="sgd", lr=0.05, test=place.test, epochs=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr",
        "127.0.0.1", "--master-port", str(port), "--node-rank",
    ]  # fmt: skip
    told = [
        "-m", "kdcli", "train-student", config.data, "--method", "labels-only", "--student", config.student,
        "--image-size", "32", "--epochs", "2", "--batch-size", "8", "--bn", "frozen", "--optimizer", "sgd", "--lr",
        "0.05", "--test", place.test, "--device", "cpu", "--workers", "0", "--out", str(config.out), "--json",
    ]  # fmt: skip
    nodes = [
        subprocess.Popen(
            [*line, rank, *told], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    (first, error), (second, other) = (node.communicate(timeout=240) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], error + other
    assert second == ""
    together, alone = json.loads(first), train_student(config.model_copy(update={"out": tmp_path / "alone"}))
    assert together["processes"] == 2
    assert together["test"] == alone.test
    for one, two in zip(alone.history, together["history"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    mine, theirs = weights(tmp_path / "alone"), weights(config.out)
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("device", "machine", "expected"),
    [
        ("cpu", Visible(4, "", {"LOCAL_RANK": "1"}), {"backend": "gloo"}),
        ("auto", Visible(0, "", {"LOCAL_RANK": "1"}), {"backend": "gloo"}),
        ("auto", Visible(2, "", {"LOCAL_RANK": "1"}), "cuda:1"),
        ("auto", Visible(1, "", {"LOCAL_RANK": "1"}), "cuda:0"),
        ("auto", Visible(2, "", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}), DeviceError),
    ],
)
def test_processes_talk_by_gloo_and_cards_by_nccl(
    device: str, machine: Visible, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    if expected is DeviceError:
        with pytest.raises(DeviceError, match="4 processes of one run"):
            how_to_talk(device, machine)
        assert not taken
        return
    found = how_to_talk(device, machine)
    if isinstance(expected, str):
        assert taken == [expected]
        expected = {"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device(expected)}
    assert found == expected


def test_srun_alone_makes_no_run_of_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_ranks("cpu") as ranks:
        assert (ranks.rank, ranks.world) == (0, 1)
    assert "srun started 4 tasks, and each trains by itself" in capsys.readouterr().err
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")  # the batch script itself has the other variables, too
    with join_ranks("cpu"):
        pass
    assert "srun" not in capsys.readouterr().err
