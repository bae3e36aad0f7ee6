from typing import get_args

from kdcli.methods.registry import METHODS
from kdcli.training.config import MethodName, StudentConfig


def test_the_registry_and_the_command_line_know_the_same_methods() -> None:
    assert tuple(METHODS) == get_args(MethodName)


def test_every_entry_says_what_it_is() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.paper.startswith("P")
        assert method.equation.startswith("Eq.")
        assert method.description.endswith(".")
        assert "\n" not in method.description


def test_options_of_methods_are_options_of_the_configuration() -> None:
    for method in METHODS.values():
        assert method.options <= set(StudentConfig.model_fields)
        assert not method.needs.kinds or "teacher" in method.options
        assert not method.needs.ranking or "ranking" in method.options
        assert not method.needs.generalist or "generalist" in method.options
