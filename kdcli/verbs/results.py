"""Results of commands whose steps give plain documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from kdcli.cells import fraction
from kdcli.results import Result, Table


@final
@dataclass(frozen=True, slots=True)
class FuseResult(Result):
    """What ``kd fuse-teachers`` gives.

    Attributes:
        joint: the result of each joint teacher by its name, as in its result.json.
    """

    bars: ClassVar = ("name", "test_top1")

    joint: Mapping[str, Mapping[str, Any]]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"joint": dict(self.joint)}

    def records(self) -> list[dict[str, Any]]:
        """A head of a joint teacher each."""
        return [
            {
                "name": name,
                "head": head,
                "spec": spec,
                "epoch": one["select"]["epoch"],
                "on_test": one["select"]["on_test"],
                "val_top1": one["metrics"].get(f"val_top1/{head}"),
                "test_top1": one["metrics"].get(f"test_top1/{head}"),
            }
            for name, one in self.joint.items()
            for head, spec in one["teachers"].items()
        ]

    def tables(self) -> Sequence[Table]:
        """See :class:`~kdcli.results.Result`."""
        rows = [
            [
                one["name"],
                one["head"],
                one["epoch"],
                fraction(one["val_top1"]),
                fraction(one["test_top1"]) + (" (selected on it)" if one["on_test"] else ""),
                one["spec"],
            ]
            for one in self.records()
        ]
        return (Table(("joint teacher", "head", "epoch", "validation top1", "test top1", "spec"), rows),)


@final
@dataclass(frozen=True, slots=True)
class SoupResult(Result):
    """What ``kd soup`` gives.

    Attributes:
        soup: the document that soup.json holds.
    """

    bars: ClassVar = ("spec", "share")

    soup: Mapping[str, Any]

    @property
    def spec(self) -> str:
        """Model string of the soup."""
        return str(self.soup["spec"])

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return dict(self.soup)

    def records(self) -> list[dict[str, Any]]:
        """A student that it is made of each."""
        return [dict(parent) for parent in self.soup["parents"]]

    def tables(self) -> Sequence[Table]:
        """See :class:`~kdcli.results.Result`."""
        test = self.soup["test"] or {}
        scores = {name: value for name, value in test.items() if name not in ("data", "images")}
        parents = [
            [each["spec"], f"{each['share']:.4g}", each["weights"][:12], *["-"] * len(scores)]
            for each in self.records()
        ]
        rows = [*parents, [self.spec, "soup", self.soup["sha256"][:12], *map(fraction, scores.values())]]
        return (Table(("student", "share", "weights", *(f"test {name}" for name in scores)), rows),)


@final
@dataclass(frozen=True, slots=True)
class Listed(Result):
    """Several things of one kind, each with its own fields.

    Attributes:
        name: of the list in the document.
        entries: documents.
        more: what else the document says.
        bars: see :class:`~kdcli.results.Result`.
    """

    bars: ClassVar = ("path", "bytes")

    name: str
    entries: tuple[Mapping[str, Any], ...]
    more: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {**self.more, self.name: [dict(entry) for entry in self.entries]}

    def records(self) -> Sequence[Mapping[str, Any]]:
        """An entry each."""
        return self.entries
