"""From a plan to what its steps eat: one batch a step, or one of every stream."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int64
from torch.utils.data import Dataset

from kdcli.data.views import Render
from kdcli.errors import DeviceError, KdError
from kdcli.training.batches import EpochOrder, Feed, FeedBatch, Order, ViewRule
from kdcli.training.plan import Plan
from kdcli.training.replay import Recording
from kdcli.training.samplers import JointFeed, StreamOrder, ratio_shares
from kdcli.types import Preprocess


def order_of(plan: Plan, rank: int = 0, world: int = 1) -> Order:
    """Which images each step of the run takes.

    Raises:
        UsageError: the batch size leaves no room for every kind of image.
    """
    numbers, seed = plan.settings, plan.config.data_seed
    if plan.sets:
        members = [np.arange(len(each.data)) for each in plan.sets]
        return StreamOrder(members, [numbers.batch_size] * len(members), seed, rank, world)
    if plan.split:
        shares = ratio_shares(numbers.batch_size, numbers.unlabelled_ratio or 1.0)
        return StreamOrder(_split(plan), shares, seed, rank, world)
    labels = plan.data.labels if plan.method.needs.labels else np.zeros(len(plan.data), np.int64)
    return EpochOrder(labels, numbers.batch_size, seed, rank, world, numbers.accumulate)


def feed_of(
    plan: Plan,
    preprocess: Preprocess,
    recording: Recording | None,
    decoded: bool = True,
    further: Sequence[Render] = (),
) -> Dataset[FeedBatch | KdError]:
    """What makes the batches of :func:`order_of`.

    Args:
        plan: the run.
        preprocess: the student's.
        recording: the cached side, as the workers read it.
        decoded: see :class:`~kdcli.training.batches.Feed`.
        further: likewise.

    Raises:
        DeviceError: outputs of several data sets cannot be held on the training device.
    """
    if plan.sets:
        if plan.config.resident == "gpu":
            raise DeviceError(
                "--resident gpu holds the outputs of one data set, and there are several",
                "Use --resident ram.",
            )
        live = ViewRule(replace(plan.rule.views, train_views=0), None)
        feeds = [Feed(each.data, preprocess, live, further=further) for each in plan.sets]
        feeds[0] = Feed(plan.data, preprocess, plan.rule, recording, further=further)
        labelled = [plan.method.needs.labels, *[True] * (len(feeds) - 1)]
        offsets = np.cumsum([0, *(len(each.data) for each in plan.sets[:-1])]).tolist()
        return JointFeed(feeds, labelled, offsets)
    if plan.split:
        # The teachers say nothing about the labelled batch; a cut student still needs its maps.
        maps = {} if plan.lower is None else plan.lower.with_maps({})
        silent = None if recording is None else replace(recording, reads=maps)
        return JointFeed(
            [
                Feed(plan.data, preprocess, plan.rule, silent, decoded, further),
                Feed(plan.data, preprocess, plan.rule, recording, decoded, further, plan.strong),
            ],
            labelled=[True, False],
            offsets=[0, 0],
        )
    return Feed(plan.data, preprocess, plan.rule, recording, decoded, further)


def stream_sizes(plan: Plan) -> tuple[int, int]:
    """Numbers of images in the labelled and in the unlabelled batches of an epoch's first pass."""
    labelled, unlabelled = _split(plan)
    return len(labelled), len(unlabelled)


def _split(plan: Plan) -> tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " m"]]:
    labels = plan.data.labels
    chosen = np.flatnonzero(labels < 0)
    if plan.settings.unlabelled_includes_labelled:
        chosen = np.arange(len(labels))
    return np.flatnonzero(labels >= 0), chosen
