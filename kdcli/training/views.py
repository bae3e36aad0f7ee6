"""Which views a run shows: the cache's, or live ones of a recipe."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int64

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.pixels import as_pixels, require_same_pixels
from kdcli.cache.provenance import TeacherRecord
from kdcli.console import console
from kdcli.data.views import ViewSet
from kdcli.errors import UsageError
from kdcli.geometry import OWN, WHOLE, EvalGeometry
from kdcli.methods.base import Method
from kdcli.training.config import StudentConfig
from kdcli.training.plan import DEFAULT_RECIPE
from kdcli.training.replay import ViewRule


def choose_views(
    config: StudentConfig,
    method: Method,
    cache: CacheSet | None,
    rows: Int64[np.ndarray, " n"],
    pinned: int | None,
) -> ViewRule:
    """Which view each epoch shows.

    Args:
        config: names the recipe, and what the teachers saw.
        method: has a recipe of its own where there is no cache.
        cache: whose views are shown.
        rows: of the images that are trained on; what holds none of them, such as a cache of test images, has no say.
        pinned: how many training views a run that was begun earlier cycles through.

    Raises:
        UsageError: another recipe than the cache's, or one that mixes images which the teachers saw unmixed.
        IdentityError: this kd draws other pixels than the one that cached them, or caches have different recipes.
    """
    if cache is None:
        return ViewRule(ViewSet(0, config.recipe or method.recipe or DEFAULT_RECIPE), None)
    views = ViewSet.from_document(cache.views_of(rows))
    if pinned is not None and pinned <= views.train_views:
        views = replace(views, train_views=pinned)
    recipe = config.recipe
    if recipe is None and config.teacher_view == method.teacher_view == "eval":
        recipe = method.recipe
    asked = views if recipe is None else replace(views, recipe=recipe)
    if config.teacher_view == "eval":
        if method.needs_of(config.options).kinds:
            _require_unmixed(asked)
        return ViewRule(asked, views.train_views, "eval")
    if asked != views:
        raise UsageError(
            f"--recipe {config.recipe}, but the cached views are of recipe {views.recipe}",
            "Leave --recipe out, or take the teachers' clean view for augmented images: --teacher-view eval",
        )
    return replayed(cache, rows, views)


def replayed(cache: CacheSet, rows: Int64[np.ndarray, " n"], views: ViewSet) -> ViewRule:
    """The cached views of some rows as the teachers saw them, epoch by epoch.

    Raises:
        IdentityError: this kd draws other pixels than the one that cached them.
    """
    holders = cache.holders(rows)
    for member in holders:
        require_same_pixels(member.manifest.view_pixels, as_pixels(views.pixels()), member.layout.root)
    if views.decode == "scaled":
        console.note(
            "views are drawn of photos decoded at a reduced scale, as the cache's were (--decode scaled)"
        )
    if not views.train_views:
        poor = [str(member.layout.root) for member in holders if member.manifest.views == 1]
        where = "the cache" if len(cache.members) == 1 else " and ".join(poor)
        console.warn(
            f"{where} has only the eval view: every epoch shows the same pixels; "
            "cache --views eval+train:K, or use --teacher-view eval"
        )
    return ViewRule(views, views.train_views)


def choose_geometry(config: StudentConfig, rule: ViewRule, records: Sequence[TeacherRecord]) -> EvalGeometry:
    """How the student is tested and exported, and what view 0 shows it.

    That is ``--eval-geometry``; without it, of a student trained on view 0 its teachers', and the whole image of one
    whose recipe shows the whole image. All others have their own.

    Args:
        config: the run.
        rule: which views are shown.
        records: the teachers whose outputs it is trained on, or whose maps it continues.
    """
    if config.eval_geometry is not None:
        return EvalGeometry.parse(config.eval_geometry)
    if rule.recorded and rule.cached == 0 and records:
        found = {record.name: EvalGeometry.of(record.preprocess) for record in records}
        first = next(iter(found))
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{name} {geometry}" for name, geometry in found.items())
            console.warn(
                f"the teachers saw the images in different ways ({listed}); the student sees them as '{first}' did. "
                "kd cache-teachers --eval-geometry shared (or whole) shows all of them the same"
            )
        return found[first]
    if not (rule.recorded and rule.cached == 0) and rule.views.rule.scale is None:
        return WHOLE
    return OWN


def _require_unmixed(views: ViewSet) -> None:
    """Only a mixture that the teachers saw too has outputs to learn from."""
    if views.mixes:
        raise UsageError(
            f"recipe {views.recipe} mixes images, and with --teacher-view eval the teachers saw them unmixed",
            "Cache the mixed views (kd cache-teachers --views eval+train:K --recipe ...) and use "
            "--teacher-view same, or add --recipe imagenet here.",
        )
