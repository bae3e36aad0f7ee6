"""What the processor and the graphics cards of this machine are and can do, which one to take, how they fail."""

import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, final

from kdcli.errors import DeviceError, KdError, UsageError

Support = Literal["yes", "emulated", "no", "unknown"]


@final
@dataclass(frozen=True, slots=True)
class Device:
    """One device that ``--device`` can name.

    Attributes:
        name: ``cpu`` or ``cuda:N``.
        title: what the driver calls it.
        memory_gb: all of it, for the processor that of the machine; None where unknown.
        free_gb: of it; None where unknown.
        precisions: bf16, fp16, tf32: done by the hardware (yes), by slower means (emulated), or not at all.
    """

    name: str
    title: str
    memory_gb: float | None
    free_gb: float | None
    precisions: Mapping[str, Support]


def processor() -> Device:
    """The processor, with the memory of the machine."""
    flags = _flags_of_processor()
    memory = _memory()
    return Device(
        "cpu",
        flags.get("model name", "processor"),
        memory.get("MemTotal"),
        memory.get("MemAvailable"),
        {
            "bf16": _hardware(flags, "avx512_bf16", "amx_bf16", "bf16"),
            "fp16": _hardware(flags, "avx512_fp16", "amx_fp16", "asimdhp"),
            "tf32": "no",
        },
    )


def _hardware(flags: Mapping[str, str], *names: str) -> Support:
    if not flags:
        return "unknown"
    known = set(flags.get("flags", flags.get("Features", "")).split())
    return "yes" if known.intersection(names) else "emulated"


def _flags_of_processor() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines[: lines.index("") if "" in lines else None])
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory() -> dict[str, float]:
    """GB by name in /proc/meminfo; empty where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {words[0].rstrip(":"): round(int(words[1]) * 1024 / 1e9, 1) for words in pairs if len(words) > 2}


def graphics(index: int) -> Device:
    """A CUDA device by its number."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    try:
        free: float | None = round(torch.cuda.mem_get_info(index)[0] / 1e9, 1)
    except RuntimeError:  # in exclusive use by another process
        free = None
    version = (properties.major, properties.minor)
    return Device(
        f"cuda:{index}",
        properties.name,
        round(properties.total_memory / 1e9, 1),
        free,
        {
            "bf16": "yes" if version >= (8, 0) or torch.version.hip is not None else "emulated",
            "fp16": "yes" if version >= (5, 3) else "emulated",
            "tf32": "yes" if version >= (8, 0) and torch.version.hip is None else "no",
        },
    )


# --- which one --------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Visible:
    """What this process sees of graphics cards: all that choosing one depends on.

    Attributes:
        cards: how many CUDA devices there are; a slice of a card (MIG) is one.
        reason: why there is none though the machine has a card; empty where nothing is amiss.
        environment: of the process.
    """

    cards: int
    reason: str
    environment: Mapping[str, str]

    @property
    def local_rank(self) -> int | None:
        """Number of this process among those that torchrun or srun started on this machine."""
        for name in ("LOCAL_RANK", "SLURM_LOCALID"):
            if (text := self.environment.get(name, "")).isdecimal():
                return int(text)
        return None

    @property
    def local_world(self) -> int:
        """How many processes of a run there are on this machine at least, as far as it can be told."""
        text = self.environment.get("LOCAL_WORLD_SIZE", "")
        return max(int(text) if text.isdecimal() else 1, (self.local_rank or 0) + 1)

    @property
    def shown(self) -> str:
        """The cards, as an error names them."""
        only = self.environment.get("CUDA_VISIBLE_DEVICES")
        named = "" if only is None else f" (CUDA_VISIBLE_DEVICES={only})"
        return {0: f"no CUDA device{named}", 1: f"one CUDA device{named}"}.get(
            self.cards, f"{self.cards} CUDA devices{named}"
        )


def visible() -> Visible:
    """Look at the cards, without starting CUDA."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    reason = ""
    if not cards and os.environ.get("CUDA_VISIBLE_DEVICES") is None and _driver_cards():
        told = [str(each.message).partition(". ")[0].partition(" (Triggered")[0] for each in caught]
        built = torch.version.cuda or torch.version.hip
        reason = " ".join((told[0] if told else "its driver gives none to CUDA").split())
        if built is None:
            reason = f"the torch installed here ({torch.__version__}) is made for processors only"
    return Visible(cards, reason, os.environ)


def _driver_cards() -> bool:
    """Whether NVIDIA's driver knows of a card here."""
    folder = Path("/proc/driver/nvidia/gpus")
    return folder.is_dir() and any(folder.iterdir())


def choose(name: str, seen: Visible) -> str:
    """The device that ``--device`` means.

    ``auto`` is a card where there is one: of several processes on a machine, each takes the one of its number,
    and starts anew at the first where there are fewer (independent jobs share a card; one run must not, see
    :func:`require_own_card`). Where the scheduler shows each process one card, that is cuda:0 for all of them.

    Raises:
        UsageError: it is no name of a device.
        DeviceError: there is no such device.
    """
    if name == "auto":
        if not seen.cards:
            return "cpu"
        return "cuda" if seen.local_rank is None else f"cuda:{seen.local_rank % seen.cards}"
    if name == "cpu":
        return name
    found = re.fullmatch(r"cuda(?::([0-9]{1,4}))?", name, re.ASCII)
    if found is None:
        raise UsageError(f"--device {name} is none of auto, cpu, cuda and cuda:N", "Use --device auto.")
    if int(found[1] or 0) < seen.cards:
        return name
    there = f"cuda:0 to cuda:{seen.cards - 1}" if seen.cards > 1 else "cuda" if seen.cards else "cpu"
    why = f": {seen.reason}" if seen.reason else ""
    raise DeviceError(
        f"there is no device '{name}': this process sees {seen.shown}{why}", f"Use --device {there}, or auto."
    )


def require_own_card(seen: Visible) -> None:
    """Refuse several processes of one run on one card, which NCCL cannot do. All of a machine see it alike.

    One card and a higher number is right under srun where each task is shown its own; torchrun shows all to all.

    Raises:
        DeviceError: there are fewer cards than processes.
    """
    each_its_own = seen.cards == 1 and "TORCHELASTIC_RUN_ID" not in seen.environment
    if seen.cards and seen.local_world > seen.cards and not each_its_own:
        raise DeviceError(
            f"{seen.local_world} processes of one run on this machine, which shows {seen.shown}: each needs its own",
            f"Start as many as there are cards (torchrun --nproc-per-node {seen.cards}) with --accumulate for as many "
            "images a step, or train on processors: --device cpu.",
        )


# --- when it fails ----------------------------------------------------------------------------

_SMALLER: Final = "Use a smaller --batch-size."
_FAILURES: Final[tuple[tuple[tuple[str, ...], str, str], ...]] = (
    (("out of memory", "ALLOC_FAILED", "allocate memory"), "out of memory", ""),
    (
        ("busy or unavailable",),
        "the device is another process's alone (exclusive mode)",
        "nvidia-smi shows whose. Wait for it, or use another one: --device cuda:N.",
    ),
    (
        ("Duplicate GPU detected",),
        "two processes of one run share a card, which NCCL cannot",
        "Start as many processes on a machine as it has cards.",
    ),
    (
        ("does not have a deterministic implementation",),
        "--deterministic: an operation has no form that gives the same bits again",
        "Leave --deterministic out, or use another method or student; with --device cpu it is not needed.",
    ),
    (
        ("no kernel image",),
        "the torch installed here is not made for this card",
        "Install one that is (pytorch.org/get-started), or use --device cpu.",
    ),
    (
        (
            "CUDA error",
            "CUDA driver error",
            "cuDNN error",
            "CUBLAS_STATUS_",
            "CUDNN_STATUS_",
            "NCCL",
            "HIP error",
        ),
        "the device failed",
        "Run the same command again: it goes on from what is saved. nvidia-smi and dmesg (Xid) tell why it failed.",
    ),
)
"""Words of torch's messages, what they mean, what to do; the first that fits counts. Programs' mistakes are none."""


def device_error(error: BaseException, what: str, smaller: str = _SMALLER) -> DeviceError | None:
    """An error of torch as the user's: the device is out of memory, in use, gone, or cannot do it.

    Args:
        error: anything that was raised.
        what: what was going on, as in ``training``.
        smaller: what to do about memory.

    Returns:
        None where it is of another kind: kd's own, of other processes that ended, or a mistake in a program.
    """
    torch, text = sys.modules.get("torch"), str(error)
    if torch is None or not isinstance(error, RuntimeError) or isinstance(error, KdError):
        return None
    lost = torch.distributed.is_available() and isinstance(error, torch.distributed.DistError)
    if "device-side assert" in text or (lost and "Duplicate GPU" not in text):
        return None
    first = text.partition("\n")[0].partition(", but you set")[0] or type(error).__name__
    for words, meaning, hint in _FAILURES:
        if any(word in text for word in words):
            return DeviceError(f"{meaning} ({what}): {first}", hint or smaller)
    if isinstance(error, torch.AcceleratorError):
        return DeviceError(f"{_FAILURES[-1][1]} ({what}): {first}", _FAILURES[-1][2])
    return None


@contextmanager
def device_errors(what: str, smaller: str = _SMALLER) -> Iterator[None]:
    """Raise what the device does as the user's error; see :func:`device_error`.

    Raises:
        DeviceError: it did.
    """
    try:
        yield
    except RuntimeError as error:
        told = device_error(error, what, smaller)
        if told is None:
            raise
        raise told from error
