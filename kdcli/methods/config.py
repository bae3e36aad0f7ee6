"""What ``kd methods`` can be told."""

from typing import ClassVar, final

from kdcli.options.fields import StepConfig, option


@final
class MethodsConfig(StepConfig):
    """``kd methods``."""

    command: ClassVar[str] = "methods"

    name: str | None = option(
        None, "Method to explain; default: a table of all.",
        panel="Method", positional=True, complete="method",
    )  # fmt: skip
