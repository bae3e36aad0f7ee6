"""Degenerate labels and features are refused by name."""

import numpy as np
import pytest

from kdcli.errors import BadDataError
from kdcli.metrics.checks import check_classes, check_finite, check_rows_vary


def test_a_class_is_called_by_its_name_and_the_hint_leaves_it_out() -> None:
    with pytest.raises(BadDataError, match=r"class 'bee' has 1 image \(and 1 more such classes\)") as error:
        check_classes(np.array([0, 0, 1, 2]), ("ant", "bee", "cow"))
    assert "DATA@classes=except:bee" in error.value.hint


def test_no_label_at_all_is_named() -> None:
    with pytest.raises(BadDataError, match="none of the images has a label"):
        check_classes(np.array([], np.int64))


def test_how_many_rows_are_concerned_is_said() -> None:
    features = np.array([[1, 2], [np.nan, 5], [3, 3], [np.inf, 1]], np.float16)
    with pytest.raises(BadDataError, match=r"row 1 holds NaN or inf \(2 of 4 rows do\)"):
        check_finite(features)
    with pytest.raises(BadDataError, match=r"row 2 is constant: all 2 features are 3 \(1 of 4 rows"):
        check_rows_vary(np.nan_to_num(features, posinf=9))


def test_sound_input_passes() -> None:
    check_classes(np.array([3, 3, 5, 5]))
    check_rows_vary(np.eye(3))
    check_finite(np.eye(3))
