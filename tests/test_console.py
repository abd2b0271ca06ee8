"""What a person reads: numbers in three digits, times in words, a clock that tells when it ended."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functional_lm import console

SUFFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@given(number=st.integers(-(10**14), 10**14) | st.floats(-1e14, 1e14))
def test_a_count_has_three_digits_and_is_right_to_half_a_percent(number: float) -> None:
    text = console.count(number)
    digits, suffix = re.fullmatch(r"(-?[\d.]+)([kMBT]?)", text).groups()
    assert float(digits) * SUFFIXES[suffix] == pytest.approx(number, rel=0.005, abs=0.5)
    assert len(digits.lstrip("-").replace(".", "").lstrip("0")) <= 3


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (1234567, "1.23M"), (999499, "999k"), (999500, "1M"), (2e12, "2T")],
)
def test_counts(number: float, text: str) -> None:
    assert console.count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (75, "1 min 15 s"), (3599.6, "1 h 0 min"), (7265, "2 h 1 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0000123, "0.0123 ms"),
        (0.1434, "143 ms"),
        (0.9996, "1 s"),
        (2.44, "2.44 s"),
        (59.9, "59.9 s"),
        (59.96, "1 min 0 s"),
    ],
)
def test_moments(seconds: float, text: str) -> None:
    assert console.moment(seconds) == text


def test_an_announcement_is_there_before_the_work_and_its_time_behind_it() -> None:
    file = io.StringIO()
    with console.announced("working", file=file) as clock:
        assert file.getvalue() == "working ... "
        assert clock.seconds == 0
    assert re.fullmatch(r"working \.\.\. \d+\.\d s\n", file.getvalue())
    assert clock.seconds > 0


def test_an_announcement_of_what_fails_ends_its_line() -> None:
    file = io.StringIO()
    with pytest.raises(ValueError, match="no"), console.announced("working", file=file):
        raise ValueError("no")
    assert file.getvalue().endswith(" s\n")


def test_a_quiet_announcement_measures_and_says_nothing() -> None:
    file = io.StringIO()
    with console.announced("working", quiet=True, file=file) as clock:
        pass
    assert file.getvalue() == ""
    assert clock.seconds > 0
