"""What kd does on a GPU, in nine minutes: one JSON line a stage, as soon as it is known, the most valuable first.

    python benchmarks/gpu.py [--seconds 540] [--device cuda] [--only STAGE,STAGE]
    python benchmarks/gpu.py --device cpu        # the same lines with tiny networks, three to four minutes

The last line has the form of all benchmarks: figures with goals, and the machine. A stage that would not end in the
seconds that are left is skipped, and its line says so; one that fails says what went wrong, and the next goes on:
exit code 1 at the end. Data and networks (8,192 JPEGs of 500 x 375, 16,384 images in memory; timm's resnet50 and
vit_base_patch16_224 with random weights, student resnet18) are made on the spot, in $TMPDIR.
"""

import faulthandler
import json
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import gpu_stages as stages
import gpu_students as students
import psutil
import torch
from gpu_place import FULL, SMALL, Place
from gpu_stages import Found
from measuring import Figures, machine, parser_of, reached

from kdcli.console import console
from kdcli.errors import StoppedEarly
from kdcli.runtime import step_of_a_job


@dataclass(frozen=True)
class Stage:
    """A stage, and the seconds that it is given on a GPU."""

    name: str
    seconds: float
    run: Callable[[Place], Found]


STAGES = (
    Stage("context", 15, stages.context),
    Stage("smoke", 50, stages.smoke),
    Stage("against_cpu", 30, stages.against_cpu),
    Stage("forward", 110, stages.forward),
    Stage("caching", 90, stages.caching),
    Stage("epochs", 80, students.epochs),
    Stage("resumed", 35, students.resumed),
    Stage("probe", 20, students.probe),
    Stage("two_processes", 35, students.two_processes),
)


class OutOfTime(BaseException):
    """The time is over in the middle of a stage; no handler of errors on the way takes it for one."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after so many seconds."""

    def over(_number: int, _frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_stage(stage: Stage, place: Place) -> tuple[dict[str, Any], Figures]:
    """The line of a stage, and its figures."""
    needed, left = stage.seconds * place.scale.share, max(0.0, place.left)
    if needed > left:
        return {"stage": stage.name, "skipped": f"needs {needed:.0f} s, and {left:.0f} s are left"}, {}
    start, line, figures = time.monotonic(), {"stage": stage.name}, Figures()
    try:
        with limited(left), step_of_a_job():
            found = stage.run(place)
        line, figures = {**line, **found.values}, found.figures
    except OutOfTime:
        line["error"] = f"not done when the time was over, {left:.0f} s after it began"
    except StoppedEarly:
        raise
    except Exception as error:
        line["error"] = f"{type(error).__name__}: {error}"
        line["where"] = traceback.format_exc().splitlines()[-8:]
    line["figures"] = {name: found["value"] for name, found in figures.items()}
    line["not_reached"] = [name for name, found in figures.items() if not reached(found)]
    return {**line, "seconds": round(time.monotonic() - start, 1)}, figures


def tell(line: dict[str, Any]) -> None:
    """Print a line at once, numbers with five digits."""
    print(json.dumps(rounded(line)), flush=True)


def rounded(value: Any) -> Any:
    """The same with floats of five digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _begun() -> float:
    """When this process was started, by the monotonic clock: importing torch is part of the time."""
    return time.monotonic() - (time.time() - psutil.Process().create_time())


def main() -> int:
    """Run the stages; the exit code."""
    parser = parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=540, help="for everything, the imports included")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="stages, with commas: " + ", ".join(stage.name for stage in STAGES))
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else [stage.name for stage in STAGES]
    if unknown := set(chosen) - {stage.name for stage in STAGES}:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    if options.device == "cpu":
        print("on the CPU: the same lines with tiny networks; of no device's speed", file=sys.stderr)
    console.quiet = True
    # A device that hangs hears no signal.
    faulthandler.dump_traceback_later(options.seconds + 60, exit=True, file=sys.__stderr__)
    scale = SMALL if options.device == "cpu" or options.quick else FULL
    conditions = {**machine(("torch", "timm", "pillow")), "device": options.device}
    root, failed, figures = Path(tempfile.mkdtemp(prefix="kd-gpu-")), False, Figures()
    place = Place(root, options.device, scale, _begun() + options.seconds)
    try:
        for stage in STAGES:
            if stage.name in chosen:
                line, found = run_stage(stage, place)
                failed |= "error" in line
                figures |= found
                tell(line)
    except StoppedEarly as stopped:
        tell({"stopped": stopped.message})
        return stopped.exit_code
    finally:
        shutil.rmtree(root, ignore_errors=True)
        faulthandler.cancel_dump_traceback_later()
    tell({"figures": figures, "machine": {**conditions, "name": stages.device_name(place)}})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
