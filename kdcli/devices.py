"""What the processor and the graphics cards of this machine are and can do."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

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
