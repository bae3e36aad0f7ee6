"""The commands of ``kd cache``. Torch is imported by those only that run or open models and images."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kdcli.cache.admin.config import (
    DiffConfig,
    ExtendConfig,
    GcConfig,
    InfoConfig,
    LsConfig,
    MergeConfig,
    PackConfig,
    PullConfig,
    PushConfig,
    RepairConfig,
    RmConfig,
    UnpackConfig,
    VerifyConfig,
)
from kdcli.errors import KdError, UsageError
from kdcli.verbs.results import Listed

if TYPE_CHECKING:
    from kdcli.cache.admin.diff import CacheDiff
    from kdcli.cache.admin.inventory import CacheInfo, CacheSummary, Unreadable
    from kdcli.cache.admin.moving import Moved
    from kdcli.cache.admin.remove import Removal
    from kdcli.cache.stores.push import Pushed
    from kdcli.extract.config import PlanConfig
    from kdcli.extract.costs import CachePlan
    from kdcli.extract.extend import ExtendResult
    from kdcli.extract.repair import RepairResult


def caches_of(config: LsConfig) -> "list[CacheSummary | Unreadable]":
    """What :func:`cache_ls` lists: those in and below folders, then those in stores."""
    from kdcli.cache.admin.inventory import Unreadable, find_caches, summarise
    from kdcli.cache.stores.mirror import mirrored

    folders = [each for each in config.paths or (Path(),) if isinstance(each, Path)]
    found = [summarise(path) for path in find_caches(folders)]
    for url in (each for each in config.paths if isinstance(each, str)):
        try:
            found.append(replace(summarise(mirrored(url)), path=url))
        except KdError as error:
            found.append(Unreadable(url, error))
    return found


def cache_ls(config: LsConfig) -> Listed:
    """List the caches in and below folders; one that cannot be read with the reason."""
    return Listed("caches", tuple(each.document() for each in caches_of(config)), {})


def cache_info(config: InfoConfig) -> "CacheInfo":
    """Look at a cache: what it holds, and how far its writers are.

    Raises:
        UsageError: ``watch`` draws on a terminal.
    """
    if config.watch or config.every is not None:
        raise UsageError(
            "watch= follows writers on a terminal", "Call it again; or: kd cache info CACHE --watch"
        )
    return info_of(config)


def info_of(config: InfoConfig) -> "CacheInfo":
    """What there is to say about a cache, once."""
    from kdcli.cache.admin.inventory import inspect_cache
    from kdcli.cache.stores.mirror import mirrored

    return replace(inspect_cache(mirrored(config.cache)), path=config.cache)


def cache_diff(config: DiffConfig) -> "CacheDiff":
    """Say in which values two caches differ."""
    from kdcli.cache.admin.diff import compare_caches

    return compare_caches(config.a, config.b)


def cache_gc(config: GcConfig) -> Listed:
    """Remove what dead writers left behind."""
    from kdcli.cache.admin.inventory import open_store
    from kdcli.cache.garbage import collect_garbage

    for cache in config.caches:
        open_store(cache)  # all names are right before the first file goes
    reports = {cache: collect_garbage(cache, dry_run=config.dry_run) for cache in config.caches}
    entries = [
        {"path": str(cache), "files": found.files, "bytes": found.bytes, "paths": list(found.paths)}
        for cache, found in reports.items()
    ]
    return Listed("caches", tuple(entries), {"dry_run": config.dry_run})


def removal(config: RmConfig) -> "Removal":
    """What :func:`cache_rm` removes.

    Raises:
        ClaimedError: somebody writes it, and not ``force``.
    """
    from kdcli.cache.admin.remove import plan_cache_removal, plan_output_removal, require_no_writers

    cache, teacher = config.cache, config.teacher
    plan = plan_cache_removal(cache) if teacher is None else plan_output_removal(cache, teacher)
    if not config.force:
        require_no_writers(plan)
    return plan


def cache_rm(config: RmConfig) -> "Removal":
    """Remove a cache, or a teacher in it.

    Raises:
        UsageError: without ``yes=True``.
    """
    from kdcli.cache.admin.remove import remove

    plan = removal(config)
    if not config.yes:
        raise UsageError(
            f"nobody confirms removing {plan.root} ({plan.files} files)", "Add yes=True to remove it."
        )
    return remove(plan, config.force)


def cache_verify(config: VerifyConfig) -> Listed:
    """Check every byte of a cache against its records.

    Returns:
        A value whose records are what is damaged.

    Raises:
        IdentityError: with ``live``, a teacher gives other outputs than those cached.
    """
    from kdcli.cache.admin.audit import audit
    from kdcli.cache.stores.mirror import mirrored
    from kdcli.extract.canary import require_close, run_canary
    from kdcli.extract.rerun import Sources
    from kdcli.extract.teachers import name_teachers

    moved = name_teachers([text for text in config.teacher if "=" in text])
    names = [*(text for text in config.teacher if "=" not in text), *moved]
    root = mirrored(config.cache)
    found = audit(root, names)
    more = found.document()
    damages = more.pop("damages")
    if config.live and found.ok:
        compared = run_canary(root, Sources(config.data, moved, config.data_root, config.device), names)
        require_close(root, compared)
        more["live"] = [comparison.document() for comparison in compared]
    return Listed("damages", tuple(damages), more)


def cache_repair(config: RepairConfig) -> "RepairResult":
    """Compute again what is damaged, and nothing else; what could not be repaired is in the result."""
    from kdcli.extract.repair import repair_cache
    from kdcli.extract.rerun import Sources
    from kdcli.extract.teachers import name_teachers

    specs = name_teachers(config.teacher)
    sources = Sources(config.data, specs, config.data_root, config.device, config.workers)
    return repair_cache(config.cache, sources, config.accept)


def cache_plan(config: "PlanConfig") -> "CachePlan":
    """Say what ``cache_teachers`` would write, and with ``measure`` how long."""
    from kdcli.extract.costs import plan_cache

    return plan_cache(config.step, measured=config.measure)


def cache_extend(config: ExtendConfig) -> "ExtendResult":
    """Make room in a cache for more images or views."""
    from kdcli.data.sources import open_told
    from kdcli.extract.extend import extend_cache
    from kdcli.extract.places import opened

    images = None
    if config.data is not None:
        images = open_told(config.data, config)
    with opened(config.cache) as place:
        with place.growing(images is not None, config.dry_run):
            done = extend_cache(place.root, images, config.views, config.dry_run)
        return replace(done, fill=done.fill and place.named(done.fill))


def cache_pack(config: PackConfig) -> "Moved":
    """Write a cache into one file that other tools read."""
    from kdcli.cache.admin import pack as packing

    return packing.pack(config.cache, config.to, config.teacher, config.compress, config.overwrite)


def cache_unpack(config: UnpackConfig) -> "Moved":
    """Make a cache of a packed one, bit by bit the same."""
    from kdcli.cache.admin import pack as packing

    return packing.unpack(config.packed, config.to, config.backend)


def cache_push(config: PushConfig) -> "Pushed":
    """Copy a cache to a store, or to a data set of the hub."""
    from kdcli.cache.stores.push import push
    from kdcli.cache.stores.sharing import Sharing
    from kdcli.cards import Licence
    from kdcli.exporting.data_card import data_card

    if config.licence is None:
        if config.private:
            raise UsageError("--private is for hf://, which takes a licence, too", "Add --licence ID.")
        return push(config.cache, config.to)
    licence = Licence.parse(config.licence)
    card = partial(data_card, licence=licence)
    return push(config.cache, config.to, Sharing(config.private, card))


def cache_pull(config: PullConfig) -> "Moved":
    """Copy a cache, or a part of it, from a store."""
    from kdcli.cache.stores.pull import Choice, pull

    return pull(config.source, config.to, Choice(config.teacher, config.keep, config.views))


def cache_merge(config: MergeConfig) -> "Moved":
    """Make one cache of several of the same data."""
    from kdcli.cache.admin import merge as merging

    return merging.merge(config.caches, config.to)
