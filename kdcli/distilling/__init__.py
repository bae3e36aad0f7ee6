"""``kd distill``: from a folder of images to a student, by the other commands."""

from kdcli.distilling.distill import distill as distill
from kdcli.distilling.result import DistillResult as DistillResult
