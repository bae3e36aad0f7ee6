"""``kd distill``."""

from typing import TYPE_CHECKING

from kdcli.console import console

if TYPE_CHECKING:
    from kdcli.distilling.config import DistillConfig
    from kdcli.options.common import Common


def distill(config: "DistillConfig", common: "Common") -> None:
    """From a folder of images and a teacher to a student.

    Checks the images, splits a test set off where none is given, runs the teachers once, ranks them, trains the
    student and the same student from labels alone, compares the two, probes them and writes a report. Every step is
    printed as the command that does it alone. Killed, the same command goes on.

    \b
    Examples:
      kd distill photos/ --teacher resnet50.a1_in1k --student mobilenetv3_small_100
      kd distill photos/ --teacher local-dir:weights/lite0 --student resnet10t --image-size 96 --out runs/first
      kd distill train/ --test test/ --teacher a=resnet50 --teacher b=local-dir:runs/b/export --student resnet18
    """
    from kdcli.distilling.distill import distill as step

    result = step(config)
    if common.as_json:
        console.document(result.document())
        return
    console.note("")
    console.say(*result.verdict)
    console.finished(
        f"made the student {result.student} and the report {result.report}",
        f"open {result.report}",
        f"python -c \"import timm; timm.create_model('{result.student}', pretrained=True)\"",
        f"kd cache-teachers IMAGES --cache NEW.kd --teacher student={result.student}",
    )
