"""Which views a run shows: the cache's, or live ones of a recipe."""

from dataclasses import dataclass, replace
from typing import Literal, final

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.provenance import as_pixels, require_same_pixels
from kdcli.console import console
from kdcli.data.views import ViewSet
from kdcli.errors import UsageError
from kdcli.methods.base import Method
from kdcli.training.config import StudentConfig


@final
@dataclass(frozen=True, slots=True)
class ViewRule:
    """Which view of an image an epoch shows, to the student and to the teachers.

    Attributes:
        views: the cache's view set, or the live one.
        cached: number K of training views in the cache; None where nothing is cached.
        teacher_view: ``same``: the teachers' outputs are of the student's view, so epoch e shows view
            1 + e mod K, or view 0 where K is 0. ``eval``: they are of view 0, and the student's views
            never repeat.
    """

    views: ViewSet
    cached: int | None = None
    teacher_view: Literal["same", "eval"] = "same"

    def student(self, epoch: int) -> int:
        """View that the student sees in ``epoch`` (from 0)."""
        if self.cached is None or self.teacher_view == "eval":
            return 1 + epoch
        return 1 + epoch % self.cached if self.cached else 0

    @property
    def recorded(self) -> bool:
        """Whether the student's views are those of the cache, with their parameters recorded there."""
        return self.cached is not None and self.teacher_view == "same"

    def teacher(self, epoch: int) -> int:
        """View whose cached outputs are read in ``epoch`` (from 0)."""
        return 0 if self.teacher_view == "eval" else self.student(epoch)


def choose_views(
    config: StudentConfig, method: Method, cache: CacheSet | None, pinned: int | None
) -> ViewRule:
    """Which view each epoch shows.

    Args:
        config: names the recipe, and what the teachers saw.
        method: has a recipe of its own where there is no cache.
        cache: whose views are shown.
        pinned: how many training views a run that was begun earlier cycles through.

    Raises:
        UsageError: another recipe than the cache's, or one that mixes images which the teachers saw unmixed.
        IdentityError: this kd draws other pixels than the one that cached them.
    """
    if cache is None:
        return ViewRule(ViewSet(0, 1.0, config.recipe or method.recipe), None)
    views = ViewSet.from_document(cache.view_set)
    cached = cache.view_count - 1
    if pinned is not None and pinned <= cached:
        cached = pinned
    views = replace(views, train_views=cached)
    recipe = config.recipe
    if recipe is None and config.teacher_view == method.teacher_view == "eval":
        recipe = method.recipe
    asked = views if recipe is None else replace(views, recipe=recipe)
    if config.teacher_view == "eval":
        _require_unmixed(asked)
        return ViewRule(asked, cached, "eval")
    if asked != views:
        raise UsageError(
            f"--recipe {config.recipe}, but the cached views are of recipe {views.recipe}",
            "Leave --recipe out, or take the teachers' clean view for augmented images: --teacher-view eval",
        )
    for member in cache.members:
        require_same_pixels(member.manifest.view_pixels, as_pixels(views.pixels()), member.layout.root)
    if cached == 0:
        console.warn(
            "the cache has only the eval view: every epoch shows the same pixels; "
            "cache --views eval+train:K, or use --teacher-view eval"
        )
    return ViewRule(views, cached)


def _require_unmixed(views: ViewSet) -> None:
    """Only a mixture that the teachers saw too has outputs to learn from."""
    if views.mixes:
        raise UsageError(
            f"recipe {views.recipe} mixes images, and with --teacher-view eval the teachers saw them unmixed",
            "Cache the mixed views (kd cache-teachers --views eval+train:K --recipe ...) and use "
            "--teacher-view same, or add --recipe imagenet here.",
        )
