"""When several students can eat the same batches."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kdcli.errors import UsageError
from kdcli.training.plan import Plan
from kdcli.training.samplers import Portion, order_of
from kdcli.types import Difference, differences


def require_one_stream(plans: Mapping[str, Plan]) -> dict[str, Plan]:
    """Refuse students that would see other images, other views or another order if they were alone.

    Args:
        plans: of the students, by name.

    Returns:
        The same plans, holding what they share only once.

    Raises:
        UsageError: naming two of them, and in what they differ.
    """
    names = list(plans)
    first = plans[names[0]]
    if len(plans) == 1:
        return dict(plans)
    known = _stream(first)
    for name in names[1:]:
        if found := differences(known, _stream(plans[name])):
            raise UsageError(
                f"students '{names[0]}' and '{name}' cannot share one stream of batches: "
                + "; ".join(_both(difference) for difference in found),
                "Give them the same --epochs, --batch-size, --teacher-view and data; or sweep them apart.",
            )
    return {
        name: replace(
            plan,
            data=first.data,
            recording=first.recording,
            test=first.test,
            sets=first.sets,
            setup=replace(plan.setup, data=first.data),
        )
        for name, plan in plans.items()
    }


def _both(difference: Difference) -> str:
    field = "order of the images" if difference.field == "order" else difference.field
    return f"{field} {difference.old} and {difference.new}"


def _stream(plan: Plan) -> dict[str, Any]:
    """What a stream of batches is made from, as JSON."""
    identity, order = plan.identity(), order_of(plan)
    digest = hashlib.sha256()
    for step in order:
        for portion in step if isinstance(step, tuple) else (Portion(0, step),):
            head = [portion.stream, portion.ticket.epoch, len(portion.ticket.positions)]
            digest.update(np.array([*head, *portion.ticket.positions], "<i8").tobytes())
    return {
        **{
            name: identity[name] for name in ("epochs", "batch_size", "data_seed", "data", "cache_id", "test")
        },
        **{name: identity[name] for name in ("views", "teacher_view", "amp", "multi_label")},
        **{name: identity.get(name) for name in ("strong_views", "sets", "label_space", "tests")},
        "cached views": plan.rule.cached,
        "device": plan.device,
        "batches": order.batches,
        "order": digest.hexdigest()[:12],
    }
