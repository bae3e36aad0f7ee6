"""Where the data sets and models of a paper are on this machine."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

from kdcli import open_data
from kdcli.errors import ConfigError, NotFoundError, UsageError, nearest
from kdcli.models.grammar import ModelSpec
from kdcli.options.resolving import yaml_of
from lab.images import drawn
from lab.settings import Settings, fits

_TOLERANCE = 0.02  # a share of each class is rounded
_FIELDS: dict[str, list[Any]] = {
    "source": ["", None], "train": ["", None], "test": ["", None], "where": [""],
    "images": [{"train": 1, "test": 1}], "classes": [1], "frames": [1],
}  # fmt: skip
"""Of a data set, with values of the kinds that they take."""


@final
@dataclass(frozen=True, slots=True)
class DataSet:
    """A setting ``data.NAME``, and what the user said of it.

    Attributes:
        name: in the recipe.
        source: of kd, without the part; None where nobody has said one yet.
        train, test: modifiers that take one part of it; None where the paper needs no such part.
        images: how many each part has, as far as it is known; what ``--cost`` counts with.
        classes: how many there are.
        frames: of a drawn clip that stands in; 0: samples are images.
        where: what to point to, for messages.
    """

    name: str
    source: str | None
    train: str | None = "split=train"
    test: str | None = "split=test"
    images: Mapping[str, int] = field(default_factory=dict)
    classes: int = 0
    frames: int = 0
    where: str = ""

    def part(self, split: str, *more: str) -> str:
        """The data string of ``train`` or ``test``, with more modifiers behind it.

        Raises:
            NotFoundError: nobody has said where the data set is.
        """
        if self.source is None:
            raise missing([self])
        modifiers = [text for text in ({"train": self.train, "test": self.test}[split], *more) if text]
        if not modifiers:
            return self.source
        return f"{self.source}{',' if '@' in self.source else '@'}{','.join(modifiers)}"


def missing(sets: Iterable[DataSet]) -> NotFoundError:
    """What to say of data sets that nobody pointed to."""
    lacking = list(sets)
    told = " ".join(f"--data {each.name}=SOURCE ({each.where});" for each in lacking).rstrip(";")
    return NotFoundError(
        f"nobody said where these data sets are: {', '.join(each.name for each in lacking)}",
        f"{told}. SOURCE is a source string of kd: folder/PATH, hfds/ORG/NAME, tar/PATH, csv/FILE, torch/NAME.",
    )


@final
@dataclass(frozen=True, slots=True)
class Places:
    """Data sets and models by their names in the recipe.

    Attributes:
        sets: data sets.
        models: specs of networks in place of those that the recipe would train.
        root: of ``--data-root``.
        download: of ``--download``.
    """

    sets: Mapping[str, DataSet]
    models: Mapping[str, str] = field(default_factory=dict)
    root: Path | None = None
    download: bool = False

    def __getitem__(self, name: str) -> DataSet:
        if name not in self.sets:
            raise _unknown(name, self.sets)
        return self.sets[name]

    def stand_ins(self, missing: bool = False) -> "Places":
        """Data sets of as many drawn images in as many classes: enough to count, and to check commands.

        Args:
            missing: only in place of those that nobody pointed to.
        """
        kept = {name: each for name, each in self.sets.items() if missing and each.source is not None}
        return replace(self, sets={name: _drawn(each) for name, each in self.sets.items()} | kept)

    def look(self, names: Iterable[str]) -> list[str]:
        """Open the data sets, and look for the models; gives a line for each set of other counts than the recipe.

        Raises:
            NotFoundError: nobody has said where some of them are, or one is not there; a model is not there.
        """
        for name, text in self.models.items():
            file = ModelSpec.parse(text).file
            if file is not None and not file.exists():
                raise NotFoundError(f"--model {name}={text}: there is no {file}", "Check the path.")
        used = [self.sets[name] for name in dict.fromkeys(names)]
        if lacking := [each for each in used if each.source is None]:
            raise missing(lacking)
        told = []
        for each in used:
            for split, wanted in each.images.items():
                found = len(open_data(each.part(split), data_root=self.root, download=self.download))
                if abs(found - wanted) > _TOLERANCE * wanted:
                    told.append(f"{each.name}, {split}: {found} images, where the recipe has {wanted}")
        return told


def places_of(settings: Settings, data: Mapping[str, Any] | None = None) -> Places:
    """The data sets of a recipe, its settings ``data.NAME``.

    Args:
        settings: of the recipe.
        data: what the user says of some: a source, or fields of the setting.

    Raises:
        UsageError: the recipe has no such data set.
    """
    known = settings.group("data")
    for name, said in (data or {}).items():
        if name not in known:
            raise _unknown(name, known)
        known[name] = known[name] | (said if isinstance(said, dict) else {"source": said})
    return Places({name: _data_set(name, fields) for name, fields in known.items()})


def read_places(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """``data.yaml``: ``data:`` (NAME: SOURCE, or its fields) and ``models:`` (NAME: SPEC)."""
    document = yaml_of(file, "--data-file")
    if not fits(document, _FILES) or set(document) - _FILES[0].keys():
        raise ConfigError(
            f"{file} is not understood",
            "It has 'data:' (NAME: SOURCE, or the fields of a data set) and 'models:' (NAME: SPEC).",
        )
    return dict(document.get("data") or {}), dict(document.get("models") or {})


_FILES: list[dict[str, Any]] = [
    {"data": {"NAME": "SOURCE", "OTHER": {}}, "models": {"NAME": "SPEC"}},
    {"data": None, "models": None},
]
"""Of such kinds is what it holds."""


def _unknown(name: str, known: Iterable[str]) -> UsageError:
    return UsageError(
        f"the recipe has no data set '{name}'.{nearest(name, known)}", f"It has {', '.join(known)}."
    )


def _data_set(name: str, fields: Mapping[str, Any]) -> DataSet:
    if unknown := set(fields) - _FIELDS.keys():
        raise ConfigError(
            f"data set '{name}' has no '{min(unknown)}'", f"It has {', '.join(sorted(_FIELDS))}."
        )
    wrong = [each for each, value in fields.items() if not fits(value, _FIELDS[each])]
    if not wrong and set(fields.get("images", ())) - {"train", "test"}:
        wrong = ["images"]
    if wrong:
        raise ConfigError(
            f"data set '{name}': its {wrong[0]} cannot be {json.dumps(fields[wrong[0]])}",
            "source, train, test, where are texts, classes and frames numbers, images {train: NUMBER, test: NUMBER}.",
        )
    return DataSet(name, **fields)


def _drawn(data: DataSet) -> DataSet:
    counts = (data.images.get("train", 0), data.images.get("test", 0), data.classes, data.frames)
    return DataSet(
        data.name, drawn(data.name, *counts), images=data.images, classes=data.classes, frames=data.frames
    )
