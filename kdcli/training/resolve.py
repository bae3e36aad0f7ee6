"""From a configuration to a plan: everything is resolved and checked here, before a model is opened."""

from dataclasses import replace
from typing import final

import numpy as np
from jaxtyping import Int64

from kdcli.cache.needs import Needs as Reads
from kdcli.cache.shelf import Stage
from kdcli.cache.staging import stage
from kdcli.data.sources import ImageData
from kdcli.data.views import ViewSet
from kdcli.errors import CacheMissingError, UsageError
from kdcli.geometry import EvalGeometry
from kdcli.methods.base import Needs, Origin, Settings, Setup, find_method
from kdcli.models.arguments import parse_arguments
from kdcli.models.spec import ModelSpec, require_known_arguments
from kdcli.options.fields import absolute
from kdcli.precision import Precision
from kdcli.training.classes import Classes, classes_of, columns_of
from kdcli.training.config import StudentConfig
from kdcli.training.fidelity import judged_images
from kdcli.training.lower import Lower, choose_lower
from kdcli.training.plan import Pins, Plan, turns_of
from kdcli.training.readable import Readable
from kdcli.training.replay import Recording, ViewRule, require_partners
from kdcli.training.samplers import order_of
from kdcli.training.sets import (
    NamedSet,
    OpenData,
    labelled_only,
    open_sets,
    open_test,
    require_classes,
    require_labels,
    require_sets,
    require_unlabelled,
    train_specs,
)
from kdcli.training.settings import (
    fit_start,
    numbers_of,
    resolve_device,
    resolve_settings,
    settable,
    unused_by,
    without_unused,
)
from kdcli.training.sources import Sources
from kdcli.training.start import FRESH, NEAREST_SOURCE, UNTRAINED, Start, as_told, resolve_start
from kdcli.training.teachers import (
    Teachers,
    choose_teachers,
    ranked_records,
    require_options,
    require_within_labels,
)
from kdcli.training.validation import split_off
from kdcli.training.views import choose_geometry, choose_views
from kdcli.types import Ranking


def make_plan(
    config: StudentConfig,
    ranking: Ranking | None = None,
    pins: Pins | None = None,
    processes: int = 1,
    sources: Sources | None = None,
) -> Plan:
    """Resolve and check a configuration.

    Args:
        config: what the user asked for.
        ranking: what ``config.ranking`` holds, already read.
        pins: what a run begun earlier understood by all cached teachers and views.
        processes: that share each step.
        sources: what other plans opened already.

    Raises:
        UsageError: options that contradict each other or the method.
        NotFoundError: a model, data set or teacher that cannot be had.
        BadDataError: data that the method cannot use.
        CacheMissingError: arrays or rows that are not cached, with the command that fills the gap.
        IdentityError: a cache of other images, or a ranking of other teachers.
        DeviceError: no such device, or one that cannot run at this precision.
    """
    _require_one_run(config)
    draft = _Draft(config, ranking, pins or Pins(), processes, sources or Sources())
    draft.choose_teachers()
    draft.choose_start()
    draft.open_data()
    draft.find_rows()
    draft.choose_views()
    draft.ask_method()
    draft.choose_geometry()
    draft.require_outputs()
    draft.open_tests()
    return draft.plan()


def _require_one_run(config: StudentConfig) -> None:
    if config.lr_grid is not None:
        raise UsageError(
            "--lr-grid makes several runs, and this is one", "Call kdcli.training.lr_grid.train_grid."
        )
    if config.sequential is not None:
        raise UsageError(
            "--sequential makes several runs, and this is one",
            "Call kdcli.training.sequential.train_sequence; in a sweep, give each student one teacher.",
        )


@final
class _Draft:
    """A plan in the making. Each step needs what those before it decided.

    Args:
        config: what the user asked for.
        ranking: that was given.
        pins: see :func:`make_plan`.
        processes: likewise.
        sources: likewise.
    """

    start: Start
    lower: Lower | None
    rows: Int64[np.ndarray, " n"]
    rule: ViewRule
    strong: ViewSet | None
    everything: ImageData
    data: ImageData
    validation: ImageData | None
    setup: Setup
    test: ImageData | None
    geometry: EvalGeometry

    def __init__(
        self, config: StudentConfig, ranking: Ranking | None, pins: Pins, processes: int, sources: Sources
    ) -> None:
        self.method = method = find_method(config.method)
        config = without_unused(config, method)
        usual = (
            "same" if config.train_from else method.teacher_view
        )  # its maps are of the views that are cached
        self.config = config.model_copy(update={"teacher_view": config.teacher_view or usual})
        require_sets(self.config, method)
        self.given, self.ranking = ranking, ranking if method.ranked else None
        self.settings: Settings = resolve_settings(self.config, numbers_of(method, trained=True))
        require_options(self.config, method, self.ranking)
        self.device, amp = resolve_device(config.device, config.amp, processes, pins.identity.get("amp"))
        self.precision = Precision(amp, config.deterministic)
        self.pins, self.processes, self.sources = pins, processes, sources
        self.student = ModelSpec.parse(config.student)
        self.cache = sources.cache(config.cache, config) if self.config.cache else None
        self.teachers: Teachers | None = None
        self.recording: Recording | None = None
        self.sets: tuple[NamedSet, ...] = ()
        self.readable = Readable(sources.data, self._unreadable, self.pins.dropped)
        self.opened: OpenData = sources.data if config.bad_images == "fail" else self.readable

    def _unreadable(self, data: ImageData) -> dict[str, str]:
        return self.sources.unreadable(data, self.config.workers, self.cache)

    @property
    def main(self) -> str:
        """The first data set, as it was given."""
        return next(iter(train_specs(self.config).values()), self.config.first_data)

    @property
    def used(self) -> Ranking | None:
        """The ranking, if it decides anything: the teachers' weights, or what the student starts from."""
        return self.given if self.config.init == NEAREST_SOURCE else self.ranking

    @property
    def needs(self) -> Needs:
        """What the method needs with its options."""
        return self.method.needs_of(self.config.options)

    @property
    def split(self) -> bool:
        """Whether labelled and unlabelled images come in batches of their own."""
        return self.method.unlabelled_ratio(self.config.options) is not None

    def choose_teachers(self) -> None:
        """Which cached teachers are read, with which weight."""
        if self.cache is not None and self.needs.kinds:
            self.teachers = choose_teachers(
                self.config, self.method, self.cache, self.ranking, self.pins.teachers
            )

    def choose_start(self) -> None:
        """What the student starts from, and what of it stays so."""
        require_known_arguments(self.student, parse_arguments(self.config.model_arg))
        self.start = resolve_start(
            self.config.init,
            self.student,
            self.teachers.generalist if self.teachers is not None else None,
            lambda: ranked_records(self.given, self.cache, self.config),
        )
        self.settings = fit_start(self.config, self.method, self.settings, self.start.init)
        self.lower = choose_lower(self.config, self.start, self.cache)

    def choose_views(self) -> None:
        """Which views are shown."""
        self.rule = choose_views(self.config, self.method, self.cache, self.rows, self.pins.train_views)
        self.strong = self.method.strong_views(self.config.options, self.rule.views)

    def open_data(self) -> None:
        """The images to train on, and those set aside of them."""
        config, needs = self.config, self.needs
        self.everything = self.opened(
            self.main,
            data_root=config.data_root,
            download=config.download,
            exif=config.exif,
            stage=Stage.told(config.stage, config.stage_limit),
        )
        data = self.everything if needs.kinds or needs.unlabelled else labelled_only(self.everything)
        self.data, self.validation = split_off(config, self.method, data)
        self._require_learnable()

    def _require_learnable(self) -> None:
        if self.method.label_head(self.config.options) is not None:
            require_classes(self.data, self.main, self.method.spares.get("labels"))
            require_labels(self.data, self.config.multi_label)
        if self.split and not self.method.repeats_labelled(self.config.options):
            require_unlabelled(self.data, self.main)

    def find_rows(self) -> None:
        """Find the images to train on in the cache."""
        self.rows = np.zeros(0, np.int64)
        if self.cache is None:
            return
        if self.used is not None:
            require_within_labels(self.used, self.cache, self.everything, self.config)
        # The feed compares the bytes as it decodes them.
        self.rows = self.cache.rows_of(self.data, check_content=False)

    def ask_method(self) -> None:
        """The method's own checks and decisions."""
        config, teachers, cache = self.config, self.teachers, self.cache
        classes = classes_of(config, self.method, teachers, self.data)
        setup = Setup(
            options=config.options,
            settings=self.settings,
            weights={} if teachers is None else teachers.weights,
            teachers={} if teachers is None else teachers.records,
            asked=config.teacher,
            data=self.data,
            cache=cache,
            views=() if cache is None else self._views(),
            teacher_view=self.rule.teacher_view,
            mixes=self.rule.views.mixes,
            recipe=self.rule.views.rule,
            classes=classes.count,
            labels=Classes.of(self.data, config.multi_label).count,
            columns=columns_of(self.method.name, teachers, classes) if self.needs.classes else {},
            origin=self._origin(),
            before=self.pins.identity,
        )
        self.setup = self.method.check(setup)
        if teachers is not None:
            self.teachers = teachers.only(self.setup.weights)
        if cache is not None:  # log-probabilities come with logits
            arrays = self.method.arrays(self.setup)
            cache.require_kept(
                {name: [each for each in own if not each.startswith("logp_")] for name, own in arrays.items()}
            )

    def _origin(self) -> Origin:
        config, init = self.config, self.start.init
        return Origin(
            student=config.student,
            start=config.student if init in FRESH else as_told(init, self.student),
            trained=init not in UNTRAINED,
            image_size=config.image_size,
            arguments=parse_arguments(config.model_arg),
            freeze=config.freeze,
            train_from=config.train_from,
        )

    def _views(self) -> tuple[int, ...]:
        """Views that the teachers are asked about."""
        turns = turns_of(self.settings.epochs, self.rule, self.split or self.needs.sets)
        return tuple(sorted({self.rule.teacher(turn) for turn in range(turns)}))

    def choose_geometry(self) -> None:
        """How the student is evaluated."""
        read = [] if self.teachers is None else [self.teachers.records[name] for name in self.setup.weights]
        if self.lower is not None:
            read = [self.lower.teacher]
        self.geometry = choose_geometry(self.config, self.rule, read)

    def require_outputs(self) -> None:
        """Leave out the images that teachers have no outputs for."""
        config, cache, views = self.config, self.cache, self.setup.views
        if cache is None:
            return
        data, rows = self.data, self.rows
        reads = self.method.arrays(self.setup)
        if self.lower is not None:
            reads = self.lower.with_maps(reads)
        if config.stage is not None:
            stage(cache, Reads(reads, rows, views), config.stage, config.stage_limit)
        usable = cache.require(reads, rows, views, config.allow_partial)
        if not usable.any():
            raise CacheMissingError(
                f"none of the {len(data)} images of {config.first_data} has cached outputs",
                "Run kd cache-teachers to its end, then train again.",
            )
        if not usable.all():
            kept = np.flatnonzero(usable)
            self.data, rows = data.select(kept), rows[kept]
            self._require_learnable()
        self.recording = Recording(cache, rows, {})
        if self.rule.recorded:
            require_partners(self.recording, self.data, self.rule.views, [view for view in views if view])

    def open_tests(self) -> None:
        """The other data sets, and what is tested on."""
        joint = self.method.joint(self.config.options)
        self.sets = open_sets(self.config, self.data, joint, self.opened)
        for each, spec in zip(self.sets[1:], list(train_specs(self.config).values())[1:], strict=True):
            require_classes(each.data, spec)
            if self.lower is not None and self.cache is not None:
                rows = self.cache.rows_of(each.data, check_content=False)
                self.cache.require(self.lower.with_maps({}), rows, self.setup.views, False)
        if self.sets and joint:
            self.data = self.sets[0].data
        by_teachers = self.method.predicts(self.config.options)
        self.test = None if self.sets else open_test(self.config, not by_teachers, self.opened)
        if by_teachers and self.cache is not None:
            reads, held = self.method.arrays(self.setup), (self.test, self.validation)
            found = (each and judged_images(each, self.cache, reads, self.config) for each in held)
            self.test, self.validation = found

    def plan(self) -> Plan:
        """What was decided."""
        setup = replace(
            self.setup,
            options=self.method.fit(self.setup.options, self.data.labels),
            data=self.data,
            split=self.split or bool((self.data.labels < 0).any()),
            sets={each.name: each.classes for each in self.sets},
        )
        plan = Plan(
            config=self._resolved(setup),
            method=self.method,
            setup=setup,
            data=self.data,
            test=self.test,
            rule=self.rule,
            recording=self.recording,
            teachers=self.teachers,
            ranking=self.used,
            start=self.start,
            device=self.device,
            precision=self.precision,
            classes=classes_of(self.config, self.method, self.teachers, self.data),
            labels=Classes.of(self.data, self.config.multi_label),
            lower=self.lower,
            validation=self.validation,
            processes=self.processes,
            strong=self.strong,
            sets=self.sets,
            geometry=self.geometry,
            dropped=self.readable.dropped,
        )
        return replace(plan, setup=replace(setup, steps=order_of(plan).batches * self.settings.epochs))

    def _resolved(self, setup: Setup) -> StudentConfig:
        """The configuration as a run records it: every number that its method uses, absolute paths."""
        config, sets = self.config, self.sets
        numbers = settable() - unused_by(config, self.method)
        tests = tuple(f"{each.name}={each.test.location}" for each in sets if each.test)
        return config.model_copy(
            update={
                **{name: getattr(self.settings, name) for name in numbers},
                "options": setup.options,
                "amp": self.precision.amp,
                "data": tuple(f"{each.name}={each.data.location}" for each in sets)
                or self.everything.location,
                "test": (tests or None) if sets else self.test and self.test.location,
                "student": str(self.student),
                "init": NEAREST_SOURCE if config.init == NEAREST_SOURCE else self.start.init,
                "teacher": () if self.teachers is None else tuple(self.teachers.records),
                "recipe": self.rule.views.recipe,
                "cache": tuple(map(absolute, config.cache)),
                "out": config.out.absolute(),
                "data_root": None if config.data_root is None else config.data_root.absolute(),
            }
        )
