"""A teacher at work for a cache: on a device, with the settings of its first run."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from kdcli.devices import device_errors
from kdcli.extract.outputs import Derived, OutputPlan
from kdcli.geometry import Render
from kdcli.models.teacher import TeacherRunner

if TYPE_CHECKING:
    from torch import Tensor

    from kdcli.extract.teachers import Teacher

FORWARD = "views_per_forward", "compile"
"""What a record says besides the batch size of how forwards run; left out where it is as on a processor."""


@final
@dataclass(frozen=True, slots=True)
class Worker:
    """A teacher ready to run, and what is kept of it.

    Attributes:
        runner: it.
        plan: what is kept.
        render: what it is shown.
        batch_size: rows in a forward.
        views_per_forward: training views of each row in a forward.
        columns: the plan's label columns, on the device.
        device: where it runs.
        made: how, for the records of what it computes.
    """

    runner: TeacherRunner
    plan: OutputPlan
    render: Render
    batch_size: int
    views_per_forward: int
    columns: "Tensor | None"
    device: str
    made: dict[str, Any]

    @classmethod
    def of(cls, teacher: "Teacher", compute: Mapping[str, Any], device: str) -> "Worker":
        """An opened teacher on a device, with recorded settings."""
        amp, compiled = teacher.record.amp, compute.get("compile", False)
        settings = {name: compute[name] for name in FORWARD if name in compute}
        return cls(
            TeacherRunner(teacher.model, device, amp, teacher.plan.outputs, compiled),
            teacher.plan,
            Render.of(teacher.model.preprocess),
            compute["batch_size"],
            compute.get("views_per_forward", 1),
            teacher.plan.columns_on(device),
            device,
            {"batch_size": compute["batch_size"], "device": device, "amp": amp, **settings},
        )

    def forwards(self, views: range, kept: Mapping[str, int]) -> Iterator[tuple[range, list[str]]]:
        """Which of a group's views go through in one forward, and what is kept of them.

        It follows from what is recorded alone, so that a resumed run gives the same bits. View 0 goes by itself: of
        it more may be kept than of the others, or be asked for alone.

        Args:
            views: of the group.
            kept: how many views each kind of output keeps, 1 or all.
        """
        first = views.start
        while first < views.stop:
            last = min(views.stop, first + (self.views_per_forward if first else 1))
            if kinds := [kind for kind, count in kept.items() if first < count]:
                yield range(first, last), kinds
            first = last

    def launch(
        self, pixels: "Tensor", labels: "Tensor", kinds: Collection[str]
    ) -> "tuple[Derived, Tensor | None]":
        """One forward and what is derived from it, without waiting for the device.

        Args:
            pixels: uint8 [views, b, h, w, 3] on the device.
            labels: int64 [b] on the device.
            kinds: names of the outputs wanted.

        Returns:
            What is to be stored, [views * b, ...]; and the raw logits, if there are any.

        Raises:
            DeviceError: out of memory, or the device fails.
        """
        raw = self.runner(pixels.flatten(0, 1), kinds)
        with device_errors(f"running '{self.runner.model.spec}'"):
            derived = self.plan.launch(raw, labels.repeat(len(pixels)), self.columns, kinds)
        return derived, raw.get("logits")
