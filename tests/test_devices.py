"""Which device is taken, and what its failures are called: the logic, on machines that are described."""

import re

import pytest
import torch

from kdcli.devices import Visible, choose, device_error, device_errors, require_own_card
from kdcli.errors import BadDataError, DeviceError, UsageError
from kdcli.runtime import pick_device

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}


def seen(cards: int, reason: str = "", **environment: object) -> Visible:
    return Visible(cards, reason, {name: str(value) for name, value in environment.items()})


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (seen(0), "cpu"),
        (seen(0, CUDA_VISIBLE_DEVICES=""), "cpu"),
        (seen(0, LOCAL_RANK=3), "cpu"),
        (seen(0, "The driver is too old"), "cpu"),
        (seen(1), "cuda"),
        (seen(1, CUDA_VISIBLE_DEVICES="MIG-4b9d0c1e"), "cuda"),
        (seen(4, LOCAL_RANK=3), "cuda:3"),
        (seen(1, LOCAL_RANK=3), "cuda:0"),  # srun shows each task its own card
        (seen(1, SLURM_LOCALID=3), "cuda:0"),
        (seen(4, SLURM_LOCALID=2), "cuda:2"),  # srun shows all tasks all cards
        (seen(4, LOCAL_RANK=1, SLURM_LOCALID=2), "cuda:1"),  # torchrun inside of srun
        (seen(2, LOCAL_RANK=5), "cuda:1"),  # independent jobs share cards
        (seen(2, LOCAL_RANK="x"), "cuda"),
    ],
)
def test_auto(machine: Visible, expected: str) -> None:
    assert choose("auto", machine) == expected


@pytest.mark.parametrize(
    ("name", "machine", "said"),
    [
        ("cuda:3", seen(2, CUDA_VISIBLE_DEVICES="0,1"), ["2 CUDA devices (CUDA_VISIBLE_DEVICES=0,1)", "0 to cuda:1"]),
        ("cuda:1", seen(1), ["one CUDA device", "Use --device cuda, or auto"]),
        ("cuda", seen(0, CUDA_VISIBLE_DEVICES=""), ["no CUDA device (CUDA_VISIBLE_DEVICES=)", "Use --device cpu"]),
        ("cuda:0", seen(0, "The driver is too old"), ["The driver is too old", "Use --device cpu"]),
    ],
)  # fmt: skip
def test_a_card_that_is_not_there_is_refused_with_what_is(
    name: str, machine: Visible, said: list[str]
) -> None:
    with pytest.raises(DeviceError) as caught:
        choose(name, machine)
    for text in said:
        assert text in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize(
    "name", ["mps", "meta", "tpu", "cpu:1", "cuda:x", "cuda:-1", "cuda:", "", "CUDA", "gpu"]
)
def test_what_is_no_name_of_a_device_is_refused_in_words(name: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"--device {name} is none of auto, cpu, cuda and cuda:N")):
        choose(name, seen(2))


@pytest.mark.parametrize("name", ["cuda:0", "cuda:1", "cuda"])
def test_a_card_that_is_there_is_taken_as_named(name: str) -> None:
    assert choose(name, seen(2)) == name


@pytest.mark.parametrize(
    ("machine", "fits"),
    [
        (seen(4, LOCAL_RANK=3, LOCAL_WORLD_SIZE=4, **TORCHRUN), True),
        (seen(2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=4, **TORCHRUN), False),  # rank 0 sees it as rank 3 does
        (seen(1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2, **TORCHRUN), False),
        (seen(1, LOCAL_RANK=1), True),  # one card a task
        (seen(2, LOCAL_RANK=2), False),
        (seen(0, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, **TORCHRUN), True),  # on processors there is no limit
    ],
)
def test_processes_of_one_run_take_a_card_each(machine: Visible, fits: bool) -> None:
    if fits:
        require_own_card(machine)
        return
    with pytest.raises(DeviceError, match="processes of one run") as caught:
        require_own_card(machine)
    assert f"--nproc-per-node {machine.cards}" in caught.value.hint


def test_the_real_machine_has_a_processor() -> None:
    assert pick_device("cpu") == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a card")
def test_the_real_machine_without_a_card() -> None:
    assert pick_device("auto") == "cpu"
    with pytest.raises(DeviceError, match="no CUDA device"):
        pick_device("cuda:7")


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "out of memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (torch.AcceleratorError("CUDA error: all CUDA-capable devices are busy or unavailable"), "exclusive mode"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "the device failed"),
        (torch.AcceleratorError("something new"), "the device failed"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm"), "the device failed"),
        (RuntimeError("NCCL Error 2: unhandled system error"), "the device failed"),
        (torch.distributed.DistBackendError("NCCL error: Duplicate GPU detected : rank 0 and rank 1"), "share a card"),
        (RuntimeError("no kernel image is available for execution on the device"), "not made for this card"),
    ],
)  # fmt: skip
def test_failures_of_a_device_are_told_in_words(error: RuntimeError, meaning: str) -> None:
    with pytest.raises(DeviceError) as caught, device_errors("training"):
        raise error
    assert meaning in caught.value.message
    assert "training" in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 30
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),  # a mistake in a program
        torch.distributed.DistBackendError("NCCL error: remote process exited"),  # of another process
        BadDataError("an image that says CUDA error"),
        ValueError("CUDA error"),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert device_error(error, "training") is None
    with pytest.raises(type(error)) as caught, device_errors("training"):
        raise error
    assert caught.value is error


def test_an_operation_without_a_deterministic_form_is_named() -> None:
    """The message is torch's own, provoked."""
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(DeviceError, match="put_") as caught, device_errors("training"):
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert "--deterministic" in caught.value.hint
