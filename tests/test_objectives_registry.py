import re

from kdcli.methods.base import find_method
from kdcli.options.fields import mark
from kdcli.registry import METHODS
from kdcli.training.config import StudentConfig


def test_every_entry_says_what_it_is() -> None:
    for name in METHODS:
        method = find_method(name)
        assert method.name == name
        assert re.match(r"P\d|.+ (19|20)\d\d$", method.paper), method.paper  # one of four, or with its year
        assert method.equation
        assert method.summary.endswith(".")
        assert "\n" not in method.summary
        assert f"--method {name}" in method.example


def test_no_option_of_a_method_is_one_of_every_run_too() -> None:
    for name in METHODS:
        options = find_method(name).Options
        assert not set(options.model_fields) & set(StudentConfig.model_fields)
        for field in options.model_fields:
            assert options.model_fields[field].description
            assert mark(options, field, "panel") == "Method"
