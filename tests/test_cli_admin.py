"""``kd doctor`` and ``kd methods`` as a stranger uses them from the shell."""

import json
from collections.abc import Callable

import pytest
from conftest import Shell

from kdcli.errors import UsageError

Kd = Callable[..., Shell]


def test_doctor_prints_one_document_and_works_without_a_gpu(kd: Kd) -> None:
    done = kd("doctor", "--json", env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.code == 0, done.err
    assert done.json["devices"][0]["name"] == "cpu"
    assert done.json["cuda"]["usable"] is False
    assert done.json["cuda"]["visible"] == ""
    for name, extra in done.json["extras"].items():
        assert extra["command"] == f"pip install 'kdcli[{name}]'"


def test_doctor_prints_plain_tables_and_reads_the_job(kd: Kd) -> None:
    done = kd(
        "doctor",
        env={
            "SLURM_ARRAY_TASK_ID": "7",
            "SLURM_ARRAY_TASK_COUNT": "8",
            "SLURM_PROCID": "3",
            "FORCE_COLOR": "1",
        },
    )
    assert done.code == 0, done.err
    assert done.err.endswith("      kd distill IMAGES --teacher SPEC --student ARCH\n")
    assert "\x1b" not in done.out + done.err
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert "array 7/8 SLURM_ARRAY_TASK_ID=7 SLURM_ARRAY_TASK_COUNT=8" in lines
    assert any(line.startswith("srun - SLURM_PROCID=3 (") and "SLURM_NTASKS" in line for line in lines)
    assert "torchrun - nothing that is set" in lines
    for section in ("version of is", "extra installed missing command", "problem what to do"):
        assert section in lines


def test_doctor_exits_0_and_says_what_is_wrong(kd: Kd) -> None:
    done = kd("doctor", env={"XDG_CACHE_HOME": "/proc"})
    assert done.code == 0, done.err
    assert "the cache folder /proc/kd cannot be written" in done.out


def test_methods_are_the_registry(kd: Kd) -> None:
    from kdcli.registry import METHODS

    done = kd("methods", "--json")
    assert done.code == 0, done.err
    listed = done.json["methods"]
    assert [method["name"] for method in listed] == list(METHODS)
    for method in listed:
        entry = METHODS[method["name"]]
        assert (method["paper"], method["equation"]) == (entry.paper, entry.equation)
        assert method["needs"]["cached"] == sorted(entry.needs.kinds)
        assert method["description"]
    by_name = {method["name"]: method["needs"] for method in listed}
    assert by_name["labels-only"] == {"cached": [], "labels": True, "ranking": False, "generalist": False}
    assert by_name["consolidation"] == {
        "cached": ["logits"], "labels": False, "ranking": False, "generalist": True,
    }  # fmt: skip


def test_methods_is_a_table_of_80_columns(kd: Kd) -> None:
    from kdcli.registry import METHODS

    done = kd("methods")
    assert done.code == 0, done.err
    head, *lines = done.out.splitlines()
    assert head.split() == ["method", "paper", "what", "it", "learns", "from"]
    assert [line.split()[0] for line in lines if line[0] != " "] == list(METHODS)
    assert max(map(len, done.out.splitlines())) <= 80
    words = " ".join(done.out.split())
    assert all(METHODS[name].summary in words for name in ("labels-only", "distill-nearest", "topk-kl"))


def test_a_method_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    from kdcli.cli.app import app
    from kdcli.registry import METHODS

    def shown(*words: str) -> str:
        app(["methods", *words], prog_name="kd", standalone_mode=False)
        return capsys.readouterr().out

    for name in METHODS:
        body, _, example = shown(name).partition("\nexample\n")
        assert example.strip() == METHODS[name].example
        assert max(map(len, body.splitlines())) <= 80
        words = " ".join(body.split())
        for part in (METHODS[name].summary, METHODS[name].paper, METHODS[name].equation):
            assert part in words
        for option in METHODS[name].Options.model_fields:
            assert f"--{option.replace('_', '-')}" in words
    said = " ".join(shown("consolidation").split())
    assert "needs cached logits, --generalist" in said
    assert "lr 0.01" in said
    assert (
        "--generalist-weight X Weight of the generalist (P1's lambda_0); all weights sum to 2. [default: 1]"
        in said
    )
    (told,) = json.loads(shown("consolidation", "--json"))["methods"]
    assert told["options"]["temperature"]["default"] == 2.0
    with pytest.raises(UsageError, match="Did you mean 'consolidation'"):
        shown("consolidaton")


@pytest.mark.parametrize("command", ["doctor", "methods"])
def test_an_unknown_option_is_a_usage_error(kd: Kd, command: str) -> None:
    kd(command, "--jsn").refused(2, "--jsn")
