"""The output folder of a run: what is in it, who may write there, and what a rerun finds.

config.yaml         the configuration with all defaults filled in (--config reads it)
run.json            identity of the run and library versions; its presence marks the folder as kd's
ranking.json        the ranking, where one gave the weights
metrics.jsonl       one line per epoch, written as it goes
state/              the last checkpoint, until the run is finished
heads.safetensors   all heads of the student
export/             the student as timm opens it
result.json         the result; its presence marks the run as finished
grid.json           with --lr-grid: its rates, and those that diverged; marks the folder as kd's, too
lr-RATE/            with --lr-grid: the run at that rate
stage-K-TEACHER/    with --sequential: the run of that stage; the files here are of all of them together
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save

from kdcli.errors import OutputExistsError, StorageError
from kdcli.files import (
    atomic_write_bytes,
    atomic_write_text,
    holds_files,
    storage_errors,
    write_json,
)
from kdcli.models.declared import WEIGHTS_FILE
from kdcli.models.export import export_model
from kdcli.models.student import LABEL_HEAD
from kdcli.models.timm_models import CONFIG_FILE
from kdcli.reading import read_json
from kdcli.runtime import versions
from kdcli.training.plan import Pins, Plan
from kdcli.training.student import Built
from kdcli.types import differences

_FILES = ("result.json", "config.yaml", "ranking.json", "metrics.jsonl", "heads.safetensors")
GRID = "grid.json"
_EXPORT = (CONFIG_FILE, WEIGHTS_FILE)
_MAX_SHOWN = 8


def require_folder(out: Path) -> None:
    """Refuse an output that is no place for a run, before anything is opened.

    Raises:
        StorageError: it is a file, or cannot be written.
        OutputExistsError: it holds something else; kd never removes what it did not make.
    """
    if out.exists() and not out.is_dir():
        raise StorageError(f"--out {out} is a file", "Give a folder; it is created when it is not there.")
    place = out
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise StorageError(f"--out {out} cannot be a folder: {place} is a file", "Choose another --out.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise StorageError(
            f"--out {out} cannot be written: no permission in {place}", "Choose another --out."
        )
    with storage_errors(out):
        marked = any((out / marker).is_file() for marker in ("run.json", GRID))
        foreign = out.is_dir() and not marked and holds_files(out)
    if foreign:
        raise OutputExistsError(
            f"--out {out} is not empty and holds no kd run",
            "Choose another folder; kd removes only its own files.",
        )


def finished_result(out: Path) -> dict[str, Any] | None:
    """The result document of a finished run, None for one that is not finished."""
    path = out / "result.json"
    if not path.is_file():
        return None
    document: dict[str, Any] = read_json(path)
    return document


def read_pins(out: Path) -> Pins:
    """What the run that ``out`` holds keeps to, when teachers or views are added to the cache later."""
    marker = out / "run.json"
    if not marker.is_file():
        return Pins()
    document = read_json(marker)
    identity = document.get("identity", {})
    return Pins(
        tuple(identity.get("teachers", {})),
        identity.get("views", {}).get("train_views"),
        identity,
        document.get("bad_images", {}),
    )


def require_same_run(plan: Plan) -> None:
    """Refuse a folder that holds a run of another identity; one without a run is fine.

    Raises:
        OutputExistsError: naming the differing fields with their old and new values.
    """
    require_same_identity(plan.config.out, plan.identity())


def require_same_identity(out: Path, identity: Mapping[str, Any]) -> None:
    """:func:`require_same_run` for a run that is more than one plan."""
    marker = out / "run.json"
    if not marker.is_file():
        return
    new = json.loads(json.dumps(identity))  # tuples become lists, as in what is read
    found = differences(read_json(marker).get("identity", {}), new)
    if found:
        if not _saved_something(out):
            raise OutputExistsError(
                f"--out {out} holds a run of other {found[0].field.partition('.')[0]} that has saved nothing yet",
                "If it is not running any more, add --overwrite: nothing is lost. Else choose another --out.",
            )
        shown = "; ".join(str(difference) for difference in found[:_MAX_SHOWN])
        more = f"; and {len(found) - _MAX_SHOWN} more" if len(found) > _MAX_SHOWN else ""
        raise OutputExistsError(
            f"--out {out} holds another run: {shown}{more}",
            "Choose another --out, or add --overwrite to start anew.",
        )


def _saved_something(out: Path) -> bool:
    """Whether a run has a checkpoint or a result; stages and rates of a grid are runs of their own."""
    own = ("result.json", "state/*", "stage-*", "lr-*", "trackers")
    return any(True for name in own for _ in out.glob(name))


def withdraw(out: Path) -> None:
    """Take back a run that ended before it saved anything, so that its folder is free for another."""
    if not _saved_something(out):
        remove_run(out)


def begin(plan: Plan, identity: Mapping[str, Any] | None = None) -> None:
    """Make the folder this run's, or go on in it where it is already.

    Args:
        plan: of the run.
        identity: of a run that is more than its plan.

    Raises:
        StorageError, NoSpaceError: it cannot be written.
    """
    out, config = plan.config.out, plan.config
    if config.overwrite and (out / "run.json").is_file():
        remove_run(out)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    if not (out / "run.json").is_file():  # first of all files: it says whose folder this is
        document = {"identity": identity or plan.identity(), "versions": versions()}
        if plan.dropped:
            document["bad_images"] = plan.dropped
        write_json(out / "run.json", document)
    if not (out / "config.yaml").is_file():
        changes: dict[str, Any] = {"overwrite": False}  # of this call, not of the run
        if plan.ranking is not None:
            write_json(out / "ranking.json", asdict(plan.ranking))
            changes["ranking"] = str(out / "ranking.json")
        document = config.model_copy(update=changes).model_dump(mode="json")
        atomic_write_text(out / "config.yaml", yaml.safe_dump(document, sort_keys=False))


def forget_checkpoints(out: Path) -> None:
    """Remove the checkpoints of a finished run."""
    with storage_errors(out):
        if (out / "state").is_dir():
            shutil.rmtree(out / "state")


def stage_folder(out: Path, number: int, teacher: str) -> Path:
    """Where stage ``number`` (from 1) of a sequence is trained."""
    return out / f"stage-{number}-{teacher}"


def _stages(out: Path) -> list[Path]:
    """The folders of a sequence's stages; none of a lone run."""
    marker = out / "run.json"
    identity = read_json(marker).get("identity", {}) if marker.is_file() else {}
    names = (identity.get("sequential") or {}).get("teachers", [])
    return [stage_folder(out, number, name) for number, name in enumerate(names, 1)]


def remove_run(out: Path) -> None:
    """Remove what kd wrote, the marker last: a kill in between leaves a folder that is still kd's."""
    for stage in _stages(out):
        remove_run(stage)
        if stage.is_dir() and not any(stage.iterdir()):
            stage.rmdir()
    forget_checkpoints(out)
    with storage_errors(out):
        for name in (*_FILES, *(f"export/{file}" for file in _EXPORT)):
            (out / name).unlink(missing_ok=True)
        export = out / "export"
        if export.is_dir() and not any(export.iterdir()):
            export.rmdir()
        (out / "run.json").unlink(missing_ok=True)


def finish(plan: Plan, built: Built, result: Mapping[str, Any]) -> None:
    """Write the heads, the export and, last of all, the result, which marks the run as finished."""
    out = plan.config.out
    own = LABEL_HEAD
    if plan.teachers and plan.teachers.generalist:
        own = plan.teachers.generalist.name
    elif plan.sets and not plan.joint:
        own = plan.sets[0].name
    tensors = {
        f"{own if name == LABEL_HEAD else name}.{key}": tensor.detach().cpu().contiguous().clone()
        for name, head in built.student.heads.items()
        if name != LABEL_HEAD or built.model.network.linear  # one of several layers is in the export alone
        for key, tensor in head.state_dict().items()
    }
    atomic_write_bytes(out / "heads.safetensors", save(tensors))
    export_model(built.model, out / "export", plan.classes.names)
    write_json(out / "result.json", result)
    forget_checkpoints(out)


def adopt(out: Path, last: Path, result: Mapping[str, Any]) -> None:
    """End a sequence: its student is that of its last stage. The result is written last of all.

    Args:
        out: the folder of the sequence.
        last: the folder of its last stage, finished.
        result: of the sequence.
    """
    with storage_errors(out):
        (out / "export").mkdir(parents=True, exist_ok=True)
        (out / "export" / CONFIG_FILE).unlink(missing_ok=True)
        for name in ("heads.safetensors", f"export/{WEIGHTS_FILE}", f"export/{CONFIG_FILE}"):
            atomic_write_bytes(out / name, (last / name).read_bytes())
    write_json(out / "result.json", result)
