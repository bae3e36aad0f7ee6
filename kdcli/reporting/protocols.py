"""Which results share a table: those of one protocol on one test set. Others are refused, or get their own tables."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kdcli.errors import BadDataError
from kdcli.metrics.transfer_summary import grouped
from kdcli.reporting.material import Run
from kdcli.types import differences

_SAMPLES = ("train", "test", "target", "classes", "folds")
"""Keys of a probe's protocol that name what was probed, not how."""


def by_test(runs: Sequence[Run], separate: bool) -> dict[str, list[Run]]:
    """Runs by what they were tested on; the first key is that of the first run that was tested.

    Runs without a test stand with the others where there is one test set only.

    Args:
        runs: of the report.
        separate: keep several test sets apart instead of refusing them.

    Raises:
        BadDataError: several test sets, and ``separate`` is off.
    """
    tested = [run for run in runs if _test_of(run) is not None]
    groups = grouped(tested, lambda run: json.dumps(_test_key(run), sort_keys=True))
    if len(groups) > 1 and not separate:
        first, second = (group[0] for group in list(groups.values())[:2])
        raise BadDataError(
            f"runs of {len(groups)} different test sets cannot stand in one table: {first.name} was tested on "
            f"{test_name(first)}, {second.name} on {test_name(second)}",
            "Give runs of one test set, or add --separate: a table for each.",
        )
    named = {test_name(group[0]): group for group in groups.values()}
    if len(named) < len(groups):  # two test sets of one name
        named = {f"{test_name(group[0])} ({place})": group for place, group in enumerate(groups.values(), 1)}
    others = [run for run in runs if _test_of(run) is None]
    if len(named) == 1:
        name = next(iter(named))
        return {name: list(runs)}
    return {**named, **({"": others} if others else {})}


def test_name(run: Run) -> str:
    """What a run was tested on, as its options call it."""
    test = _test_of(run)
    if isinstance(test, Mapping):
        return str(test.get("location") or ", ".join(map(str, test)))
    if isinstance(test, list | tuple):  # of several data sets, as they were given
        return ", ".join(map(str, test))
    return str(test) if test else ""


def _test_of(run: Run) -> Any:
    """The test data of a run: its identity, else its spec; of a printed result only that there was one."""
    found = run.identity.get("test") or run.config.get("test")
    if found:
        return found
    return "a test set that is not recorded" if run.result.get("test") else None


def _test_key(run: Run) -> Any:
    test = _test_of(run)
    if isinstance(test, Mapping) and "keys" in test:
        found = {"keys": test["keys"], "labels": test.get("labels")}
        several = run.identity.get("multi_label")  # judged by other scores
        return found if several is None else {**found, "multi_label": several}
    return test


def by_protocol(probes: Sequence[Mapping[str, Any]], separate: bool) -> list[list[Mapping[str, Any]]]:
    """Probes that were made the same way: of one protocol and, per target, on the same images.

    Raises:
        BadDataError: several protocols, and ``separate`` is off.
    """
    groups = list(grouped(probes, lambda probe: json.dumps(_how(probe), sort_keys=True)).values())
    parts = [part for group in groups for part in _by_images(group)]
    if len(parts) > 1 and not separate:
        first, second = parts[0][0], parts[1][0]
        found = differences(dict(_protocol(first)), dict(_protocol(second)))
        raise BadDataError(
            f"probes of {len(parts)} different protocols cannot stand in one table: {first['from']} and "
            f"{second['from']} differ in {'; '.join(map(str, found[:4]))}",
            "Probe all of them the same way, or add --separate: a table for each.",
        )
    return parts


def _by_images(group: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """A group in which each target means the same images; more than one where a name means several."""
    parts: list[tuple[dict[str, str], list[Mapping[str, Any]]]] = []
    for probe in group:
        target, images = str(probe.get("target")), json.dumps(_protocol(probe), sort_keys=True)
        for known, members in parts:
            if known.get(target, images) == images:
                known[target] = images
                members.append(probe)
                break
        else:
            parts.append(({target: images}, [probe]))
    return [members for _, members in parts]


def _protocol(probe: Mapping[str, Any]) -> Mapping[str, Any]:
    """The protocol of a probe; of a document without one, what it has of it."""
    found = probe.get("protocol")
    if isinstance(found, Mapping):
        return found
    return {key: probe[key] for key in ("shots", "draws", "classes") if key in probe}


def _how(probe: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _protocol(probe).items() if key not in _SAMPLES}


def protocol_text(probe: Mapping[str, Any]) -> str:
    """The protocol in one line."""
    plain = {key: value for key, value in _how(probe).items() if isinstance(value, str | int | float)}
    return ", ".join(f"{key} {value}" for key, value in plain.items())
