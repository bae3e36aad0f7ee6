"""``kd distill``: check, cache, rank, train, compare, probe, report; each step is a command of its own.

OUT/distill.json   which job this folder is of
OUT/exclude.txt    keys of images that are left out: unreadable, copies, images of the test set
OUT/cache.kd       the teachers' outputs; OUT/test.kd those of the test images, for the report
OUT/ranking.json   which teacher suits the task, where there are several
OUT/students.yaml  how the students differ; OUT/students/NAME are their runs
OUT/compared, OUT/probe.json, OUT/report.html

Killed at any time, the same call goes on: every step finds what it made before.
"""

import time

from kdcli.console import console, counted
from kdcli.data.spec import DataSpec
from kdcli.distilling.choose import (
    LEAST_TEST,
    MOST_ANSWERED,
    choose_sizes,
    folders_of,
    given_parts,
    one_class_too_few,
    set_aside,
)
from kdcli.distilling.config import DistillConfig
from kdcli.distilling.job import STUDENT, Job
from kdcli.distilling.result import DistillResult
from kdcli.distilling.steps import Steps
from kdcli.errors import UsageError
from kdcli.extract.teachers import name_teachers
from kdcli.models.spec import ModelSpec, architecture_name
from kdcli.registry import METHODS


def distill(config: DistillConfig) -> DistillResult:
    """Make a student of the teachers for some images, and say what that is worth.

    Args:
        config: images, teachers, student; what is not given is chosen, and said.

    Raises:
        UsageError: a method that learns from no cached teacher, or no test set and none to be split off.
        OutputExistsError: the folder holds something else.
        KdError: as the steps do.
    """
    start = time.perf_counter()
    architecture_name(ModelSpec.parse(config.student))
    for spec in name_teachers(config.teacher).values():
        ModelSpec.parse(spec)
    if (asked := config.chosen_method) is not None and not METHODS.find(asked).needs.kinds:
        raise UsageError(
            f"--method {asked} learns from no cached teacher", f"kd train-student --method {asked}"
        )
    job = Job(config, Steps())
    folders = folders_of(DataSpec.parse(config.data))
    given = given_parts(config, folders)
    data = job.open(given.train if given else config.data)
    if data.class_names is not None and len(data.class_names) < 2:
        raise one_class_too_few(config.data, data.class_names[0], folders)
    parts = given or set_aside(config, data.class_names is not None)
    job.require_fitting(parts)
    if parts.test is not None and (count := len(job.open(parts.test))) < LEAST_TEST:
        console.warn(f"{counted(count, 'test images')}: far too few to tell two students apart")
    job.begin()
    parts = job.check(parts)
    train = job.open(parts.train)
    choice = job.choose(train)
    sizes = choose_sizes(config, len(train), METHODS.find(choice.method))
    views = f"eval+train:{sizes.views}" if sizes.views else "eval"
    job.cache_teachers("The teachers run once", parts.train, "cache.kd", views)
    if parts.test is not None and len(job.open(parts.test)) <= MOST_ANSWERED:
        job.cache_teachers("What they say of the test images, for the report", parts.test, "test.kd", "eval")
    job.rank(choice, train)
    students = job.train(parts, choice, sizes)
    against = job.compare(parts, students)
    probes = job.probe(parts, train, students)
    result = students.students[STUDENT]
    spec = f"local-dir:{result.out}/export"
    accuracy = None if result.test is None else next(iter(result.test.values()))
    verdict = job.verdict(against, accuracy, probes, train)
    page = job.report(f"Learnt by {choice.method}; {choice.why}. {'; '.join(verdict)}.")
    return DistillResult(
        student=spec,
        method=choice.method,
        why=choice.why,
        out=str(config.out.absolute()),
        accuracy=accuracy,
        against=against,
        probes=probes,
        report=str(page),
        seconds=time.perf_counter() - start,
        commands=tuple(job.steps.commands),
        verdict=verdict,
    )
