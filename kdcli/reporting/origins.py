"""How the results of a report came about: the exact commands, and the versions that made them."""

from collections.abc import Sequence

from kdcli.cache.admin.inventory import CacheInfo
from kdcli.reporting.document import Command, Commands, Facts, Fold, Part, Section
from kdcli.reporting.material import Material
from kdcli.reporting.students import run_commands
from kdcli.reporting.studies import cache_commands
from kdcli.runtime import versions

_FEW_COMMANDS = 6


def commands_section(material: Material, caches: Sequence[CacheInfo]) -> Section | None:
    """The command of each result that is known, once each: caches, rankings and other documents, runs."""
    recorded = [Command(origin.title, origin.command) for origin in material.origins]
    once: dict[str, Command] = {}
    for command in (*cache_commands(caches), *recorded, *run_commands(material.runs)):
        once.setdefault(command.line, command)
    commands = tuple(once.values())
    if not commands:
        return None
    few, left = commands[:_FEW_COMMANDS], commands[_FEW_COMMANDS:]
    parts: list[Part] = [Commands(few)]
    if left:
        parts.append(Fold(f"{len(left)} more commands", (Commands(left),)))
    return Section("Commands", tuple(parts))


def versions_section(material: Material, caches: Sequence[CacheInfo]) -> Section:
    """Versions that the results recorded, where they differ with how many; of this report where none did."""
    recorded: dict[str, dict[str, int]] = {}
    for each in (*material.versions, *(info.manifest.created.get("versions", {}) for info in caches)):
        for name, version in each.items():
            counts = recorded.setdefault(name, {})
            counts[str(version)] = counts.get(str(version), 0) + 1
    if not recorded:
        return Section("Versions", (Facts(tuple(versions().items())),))
    pairs = tuple(
        (name, next(iter(c)) if len(c) == 1 else ", ".join(f"{v} ({n} results)" for v, n in c.items()))
        for name, c in recorded.items()
    )
    return Section("Versions", (Facts(pairs),))
