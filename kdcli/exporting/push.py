"""``kd export push``: a student on the hub, as ``timm.create_model("hf-hub:ORG/NAME")`` opens it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from kdcli.cards import CARD, Licence, is_ours
from kdcli.documents import to_document
from kdcli.errors import BadDataError, NotFoundError, UsageError
from kdcli.exporting.card import Student, card_of
from kdcli.exporting.config import ExportPushConfig
from kdcli.hub import Address, Repository
from kdcli.models.folder import CONFIG_FILE, WEIGHTS_FILE
from kdcli.models.timm_models import read_config
from kdcli.reading import DOCUMENT_BYTES, read_bytes, require_inside
from kdcli.reporting.inputs import read_inputs
from kdcli.reporting.material import Run
from kdcli.results import Result

_KINDS: Final = "kd export push takes OUT of kd train-student."


@final
@dataclass(frozen=True, slots=True)
class Exported(Result):
    """What is on the hub now.

    Attributes:
        to: its address.
        model: as timm and kd call it.
        architecture: of timm.
        bytes: of the weights.
    """

    to: str
    model: str
    architecture: str
    bytes: int

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return to_document(self, "to", "model", "architecture", "bytes")


def push_student(config: ExportPushConfig) -> Exported:
    """Put a finished student on the hub: its export as it is, and a card; all with one commit.

    Raises:
        UsageError: the address is none of a model, or there is no licence.
        NotFoundError: there is no student, or several.
        BadDataError: it has not ended, or timm has no such architecture.
        StorageError: the hub refuses, or does not answer.
    """
    if not config.to.startswith("hf://"):
        raise UsageError(f"'{config.to}' is no address of a model on the hub", "Give hf://ORG/NAME.")
    address = Address.parse(config.to, "model")
    if address.path:
        raise UsageError("a model of the hub is a whole repository", "Give hf://ORG/NAME.")
    if config.licence is None:
        raise UsageError(
            "a model of the hub says what others may do with it",
            "Add --licence ID, by the hub's identifiers (such as apache-2.0), or --licence other:NAME.",
        )
    licence = Licence.parse(config.licence)
    student = read_student(config.run)
    repository = Repository(address, config.private)
    weights = student.folder / WEIGHTS_FILE
    repository.write(WEIGHTS_FILE, weights)
    repository.write(CONFIG_FILE, read_bytes(student.folder / CONFIG_FILE, DOCUMENT_BYTES))
    if is_ours(repository.read, str(address)):
        repository.write(CARD, card_of(student, address, licence))
    repository.commit()
    architecture = str(student.document["architecture"])
    return Exported(str(address), f"hf-hub:{address.name}", architecture, weights.stat().st_size)


def read_student(folder: Path) -> Student:
    """The student of a finished run that timm can build.

    Raises:
        NotFoundError, BadDataError: see :func:`push_student`.
    """
    run = _run_at(folder)
    if not run.finished:
        raise BadDataError(f"{folder} has not ended", "Give its kd train-student command again; it goes on.")
    export = require_inside(folder / "export", folder, folder)
    document = read_config(export)
    name = str(document.get("architecture", ""))
    from timm.models import is_model

    if not is_model(name):
        raise BadDataError(
            f"timm has no architecture '{name}', so timm.create_model cannot open {export}",
            f"Share the folder itself: kd opens it as local-dir:{export}.",
        )
    return Student(export, document, run)


def _run_at(folder: Path) -> Run:
    if (folder / "fused.json").exists():
        raise BadDataError(f"{folder} is a joint teacher, which timm cannot build", _KINDS)
    if folder.name == "export" and (folder / CONFIG_FILE).is_file():
        raise NotFoundError(
            f"{folder} is the model of a run, whose data and accuracy the card tells",
            f"Give {folder.parent}.",
        )
    runs = read_inputs((folder,)).runs
    if len(runs) != 1 or runs[0].folder is None:
        found = ", ".join(str(run.folder) for run in runs[:3])
        raise NotFoundError(
            f"{folder} holds {len(runs) or 'no'} students of kd train-student",
            f"Give one of them: {found}." if found else _KINDS,
        )
    if runs[0].folder != folder:
        raise NotFoundError(f"{folder} is no student itself", f"Give {runs[0].folder}.")
    return runs[0]
