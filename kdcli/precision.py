"""At which precision networks compute: ``--amp`` decided once, applied to torch, recorded.

off     float32, exactly: cards that would round the factors of products to TF32 are told not to
tf32    float32; cards that can may round the factors of matrix products and convolutions to 10 bits
bf16    torch's autocast to bfloat16; what autocast leaves in float32 is exact
fp16    likewise to float16
auto    bf16 where a graphics card does it in hardware, else off

What a cache or a run has recorded is what ``auto`` goes on with: it never makes another teacher or run of one.
torch's own defaults are half of each (exact matrix products, TF32 in cuDNN's convolutions), so both are set. By
``allow_tf32``: of torch's two ways it is the one after which either can still be read, which torch.compile does.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast, final, get_args

from kdcli.devices import Device, graphics, processor, visible
from kdcli.errors import DeviceError
from kdcli.runtime import pick_device
from kdcli.types import AmpChoice, AmpName

if TYPE_CHECKING:
    import torch

TOLERANCE: Final[dict[AmpName, float]] = {"off": 3e-3, "tf32": 1e-2, "fp16": 1e-2, "bf16": 6e-2}
"""How far outputs computed anew may be apart, as a share of the largest value of a row. float16 alone, as which
they are stored, rounds by up to 1e-3 of it, twice."""
_WORKSPACE: Final = "CUBLAS_WORKSPACE_CONFIG"
_REPEATABLE: Final = (":4096:8", ":16:8")
"""Values of it with which cuBLAS gives the same bits again."""


def resolve_amp(asked: AmpChoice, device: str, recorded: object = None) -> AmpName:
    """What ``--amp`` stands for.

    Args:
        asked: the option.
        device: as :func:`~kdcli.runtime.pick_device` gives it.
        recorded: of the teacher or the run that is gone on with; anything else than a precision is no record.

    Raises:
        DeviceError: the device has not what was asked for by name.
    """
    if recorded in get_args(AmpName) and asked in ("auto", recorded):
        return cast("AmpName", recorded)
    return amp_on(asked, device_of(device))


def device_of(name: str) -> Device:
    """What a device is and can do, by its name."""
    kind, _, index = name.partition(":")
    return processor() if kind == "cpu" else graphics(int(index or 0))


def amp_on(asked: AmpChoice, device: Device) -> AmpName:
    """:func:`resolve_amp` where nothing is recorded.

    bf16 on a processor runs everywhere, if slowly; on an old card it would be slower than float32, and is refused.
    tf32 is a permission to round: a device without it computes in float32, and that is what it is then.

    Raises:
        DeviceError: see there.
    """
    card = device.name != "cpu"
    able = device.precisions["bf16"] == "yes"
    if asked == "auto":
        return "bf16" if card and able else "off"
    if asked == "tf32" and device.precisions["tf32"] != "yes":
        return "off"
    if asked == "bf16" and card and not able:
        raise DeviceError(
            f"--amp bf16: {device.name} ({device.title}) has no bfloat16", "Use --amp fp16 or off, or auto."
        )
    return asked


def told(device: str, *amps: AmpName) -> str:
    """Where and how something computes, to be said at its start; and why on no card where there is one."""
    words = ", ".join(dict.fromkeys("float32" if amp == "off" else amp for amp in amps))
    reason = visible().reason if device == "cpu" else ""
    return f"on {device} in {words}" + (f" (no card is used: {reason})" if reason else "")


def tolerance(amp: AmpName, compute: dict[str, Any]) -> float:
    """How far a recorded teacher's outputs may be from those it gives now, wherever it runs now.

    It runs at the recorded precision where the device has it, else at a finer one (of TF32: in float32), so
    what was recorded bounds the difference. Records that say ``tf32`` apart are from before convolutions were told:
    on a card these were in TF32, whatever the record says of matrix products.

    Args:
        amp: recorded.
        compute: recorded, how it ran.
    """
    rounded = compute.get("tf32", False) or ("tf32" in compute and compute["device"] == "cuda")
    return max(TOLERANCE[amp], TOLERANCE["tf32"] if rounded else 0.0)


@final
@dataclass(frozen=True, slots=True)
class Precision:
    """How a run computes.

    Attributes:
        amp: the precision.
        deterministic: only by operations that give the same bits again.
    """

    amp: AmpName
    deterministic: bool = False

    @classmethod
    def resolve(
        cls, asked: AmpChoice, device_name: str, recorded: object = None, deterministic: bool = False
    ) -> "Precision":
        """From options; see :func:`resolve_amp`."""
        return cls(resolve_amp(asked, pick_device(device_name), recorded), deterministic)

    def document(self) -> dict[str, Any]:
        """For records: what was decided, the usual left out."""
        return {"amp": self.amp, **({"deterministic": True} if self.deterministic else {})}

    @contextmanager
    def applied(self, device: str) -> Iterator[None]:
        """Set torch so for a whole run; autocast is the business of each forward. Afterwards all is as it was.

        Raises:
            DeviceError: see :func:`require_repeatable`.
        """
        with ExitStack() as stack:
            stack.enter_context(_products(self.amp == "tf32"))
            if self.deterministic:
                require_repeatable(device)
                stack.enter_context(_repeatable())
            yield


def computing(device: str, amp: AmpName) -> AbstractContextManager[object]:
    """The context of a forward at a precision."""
    import torch

    stack, kind = ExitStack(), torch.device(device).type
    if kind != "cpu":  # whose products this does not touch
        stack.enter_context(_products(amp == "tf32"))
    if (dtype := half_of(amp)) is not None:
        stack.enter_context(torch.autocast(kind, dtype=dtype))
    return stack


def half_of(amp: AmpName) -> "torch.dtype | None":
    """The type in half precision that autocast takes; None where it is not used."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


@contextmanager
def _products(tf32: bool) -> Iterator[None]:
    """Matrix products and convolutions on graphics cards in TF32, or none of them."""
    import torch

    parts: list[Any] = [
        torch.backends.cuda.matmul,
        *(getattr(torch.backends.cudnn, n) for n in ("conv", "rnn")),
    ]
    before = [part.fp32_precision for part in parts]  # can always be read, whoever set it how
    _set_products(parts, ["tf32" if tf32 else "ieee"] * 3)
    try:
        yield
    finally:
        _set_products(parts, before)


def _set_products(parts: list[Any], values: list[str]) -> None:
    """Torch's older names first, which then can be read; then the newer: they alone override its general switch."""
    import torch

    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = (v == "tf32" for v in values[:2])
    for part, value in zip(parts, values, strict=True):
        if part.fp32_precision != value:
            part.fp32_precision = value


@contextmanager
def _repeatable() -> Iterator[None]:
    import torch

    cudnn = torch.backends.cudnn
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    own = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = own


def require_repeatable(device: str) -> None:
    """Let cuBLAS give the same bits again; to be called before the process uses a card.

    Raises:
        DeviceError: it has used one already, or the user's own setting contradicts.
    """
    if device.startswith("cpu") or os.environ.get(_WORKSPACE) in _REPEATABLE:
        return
    import torch

    if _WORKSPACE in os.environ or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        now = (
            f"is '{os.environ[_WORKSPACE]}'" if _WORKSPACE in os.environ else "was not set when CUDA started"
        )
        raise DeviceError(
            f"--deterministic: {_WORKSPACE} {now}, with which matrix products differ from run to run",
            f"Start the process with {_WORKSPACE}={_REPEATABLE[0]}.",
        )
    os.environ[_WORKSPACE] = _REPEATABLE[0]
