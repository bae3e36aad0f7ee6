"""The output folder of a run: what is in it, who may write there, and what a rerun finds.

config.yaml         the configuration with all defaults filled in (--config reads it)
run.json            identity of the run and library versions; its presence marks the folder as kd's
ranking.json        the ranking, where one gave the weights
metrics.jsonl       one line per epoch, written as it goes
state/              the last checkpoint, until the run is finished
heads.safetensors   all heads of the student
adaptors.*          layers that predict teachers' outputs, where the method trains some (see kdcli.models.adaptors)
export/             the student as timm opens it
result.json         the result; its presence marks the run as finished
grid.json           with --lr-grid: its rates, and those that diverged; marks the folder as kd's, too
lr-RATE/            with --lr-grid: the run at that rate
stage-K-TEACHER/    with --sequential: the run of that stage; the files here are of all of them together
"""

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

from safetensors.torch import save

from kdcli.documents import from_document
from kdcli.errors import OutputExistsError
from kdcli.files import (
    atomic_write_bytes,
    atomic_write_text,
    storage_errors,
    write_json,
)
from kdcli.models.adaptors import RECORDS, TENSORS, write_adaptors
from kdcli.models.export import export_model
from kdcli.models.folder import CONFIG_FILE, WEIGHTS_FILE
from kdcli.models.student import LABEL_HEAD
from kdcli.options.resolving import to_yaml
from kdcli.reading import read_bytes, read_json, require_inside, require_name
from kdcli.runtime import versions
from kdcli.training.out import GRID
from kdcli.training.plan import Pins, Plan
from kdcli.training.student import Built
from kdcli.types import Difference, differences

_FILES = (
    "result.json",
    "config.yaml",
    "ranking.json",
    "metrics.jsonl",
    "heads.safetensors",
    RECORDS,
    TENSORS,
)
_EXPORT = (CONFIG_FILE, WEIGHTS_FILE)
_MAX_SHOWN = 8
_WEIGHT_BYTES = 2**40
_DIGEST = re.compile(r"[0-9a-f]{32,64}")


@final
@dataclass(frozen=True, slots=True)
class _Record:
    """run.json."""

    identity: dict[str, Any]
    versions: dict[str, Any] = field(default_factory=dict)
    bad_images: dict[str, dict[str, str]] = field(default_factory=dict)


def finished_result(out: Path) -> dict[str, Any] | None:
    """The result document of a finished run, None for one that is not finished."""
    path = out / "result.json"
    if not path.is_file():
        return None
    return from_document(dict[str, Any], read_json(path), path)


def identity_of(folder: Path) -> dict[str, Any]:
    """What run.json says that the run in a folder is; empty where there is none.

    Raises:
        BadDataError: it is no record of a run.
    """
    return _record_of(folder).identity


def _record_of(folder: Path) -> _Record:
    marker = folder / "run.json"
    return from_document(_Record, read_json(marker), marker) if marker.is_file() else _Record({})


def _section(kind: type[dict[str, Any]] | type[dict[str, str]], out: Path, name: str) -> dict[str, Any]:
    """A part of an identity that holds keys and values; empty where the run has none."""
    found = identity_of(out).get(name)
    return {} if found is None else from_document(kind, found, f"{out / 'run.json'}: identity.{name}")


def read_pins(out: Path) -> Pins:
    """What the run that ``out`` holds keeps to, when teachers or views are added to the cache later."""
    views = _section(dict[str, Any], out, "views").get("train_views")
    if views is not None:
        views = from_document(int, views, f"{out / 'run.json'}: identity.views.train_views")
    record = _record_of(out)
    return Pins(tuple(_section(dict[str, str], out, "teachers")), views, record.identity, record.bad_images)


def require_same_run(plan: Plan) -> None:
    """Refuse a folder that holds a run of another identity; one without a run is fine.

    Raises:
        OutputExistsError: naming the differing fields with their old and new values.
    """
    require_same_identity(plan.config.out, plan.identity())


def require_same_identity(out: Path, identity: Mapping[str, Any]) -> None:
    """:func:`require_same_run` for a run that is more than one plan."""
    if not (out / "run.json").is_file():
        return
    new = json.loads(json.dumps(identity))  # tuples become lists, as in what is read
    found = differences(identity_of(out), new)
    if found:
        shown = "; ".join(map(_told, found[:_MAX_SHOWN]))
        more = f"; and {len(found) - _MAX_SHOWN} more" if len(found) > _MAX_SHOWN else ""
        raise OutputExistsError(
            f"--out {out} holds another run: {shown}{more}",
            "Choose another --out, or add --overwrite to start anew.",
        )


def _told(difference: Difference) -> str:
    """A difference as a user reads it: digests say nothing."""
    head, _, leaf = difference.field.rpartition(".")
    if not any(_DIGEST.fullmatch(str(value)) for value in (difference.old, difference.new)):
        return str(difference)
    if leaf in ("keys", "labels"):
        return f"{head} has other {'images' if leaf == 'keys' else 'labels'} than then"
    return f"{difference.field.replace('.', ' ')} is another one"


def has_begun(out: Path) -> bool:
    """Whether there is anything in a run's folder that would be lost: an epoch, a checkpoint, what comes after."""
    kept = ("result.json", "heads.safetensors", "export", "state/*", "stage-*", "lr-*", GRID)
    metrics = out / "metrics.jsonl"
    return any(any(out.glob(each)) for each in kept) or (metrics.is_file() and metrics.stat().st_size > 0)


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
        atomic_write_text(out / "config.yaml", to_yaml(config.model_copy(update=changes)))


def forget_checkpoints(out: Path) -> None:
    """Remove the checkpoints of a finished run; also those of one that was killed when it had just finished."""
    with storage_errors(out), suppress(FileNotFoundError):  # every process of a run removes them
        if (out / "state").is_dir():
            shutil.rmtree(out / "state")


def stage_folder(out: Path, number: int, teacher: str) -> Path:
    """Where stage ``number`` (from 1) of a sequence is trained."""
    return out / f"stage-{number}-{teacher}"


def _stages(out: Path) -> list[Path]:
    """The folders of a sequence's stages; none of a lone run."""
    marker = out / "run.json"
    names = from_document(list[str], _section(dict[str, Any], out, "sequential").get("teachers", []), marker)
    return [
        require_inside(stage_folder(out, number, require_name(name, marker, "teachers")), out, marker)
        for number, name in enumerate(names, 1)
    ]


def remove_run(out: Path) -> None:
    """Remove what kd wrote, the marker last: a kill in between leaves a folder that is still kd's.

    Raises:
        BadDataError: its record or a link leads out of it; nothing is removed.
    """
    for own in ("state", "export"):
        require_inside(out / own, out, out)
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
    """Write the heads, adaptors, the export and, last of all, the result, which marks the run as finished."""
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
    if kept := built.objective.kept_adaptors():
        write_adaptors(out, kept)
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
            atomic_write_bytes(out / name, read_bytes(last / name, _WEIGHT_BYTES))
    write_json(out / "result.json", result)
