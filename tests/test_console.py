import gc
import shlex
import sys

import pytest

from raylm import console


def test_a_printed_command_can_be_pasted_whatever_the_name_of_a_directory():
    told = console.command("train", "--config", "/my runs/it's/experiment.yaml", "train.seed=7")
    assert shlex.split(told) == [
        sys.executable, "-m", "raylm.train", "--config", "/my runs/it's/experiment.yaml", "train.seed=7"
    ]  # fmt: skip
    assert console.command("report", "/runs/a").endswith("-m raylm.report /runs/a"), "no quotes where none are needed"


def test_numbers_and_sizes_as_people_write_them():
    numbers = {4_516_284: "4,516,284", 22070.4: "22,070", 0.00512345: "0.005123", True: "True", "x": "x"}
    assert {value: console.format_number(value) for value in numbers} == numbers
    sizes = {49_900: "49.9 KB", 512: "512 bytes", 999_960: "1.0 MB", 3e9: "3.0 GB"}
    assert {value: console.format_size(value) for value in sizes} == sizes


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (53.2345, 47.71, 59.68, "53.2 [47.7, 59.7]"),
        (2.14159, 2.1, 2.19, "2.142 [2.100, 2.190]"),
        (1543.2, 1312.0, 1772.0, "1,540 [1,310, 1,770]"),
        (0.0142, 0.0119, 0.0165, "0.0142 [0.0119, 0.0165]"),
        (302.5, 0.53, 172_000.0, "300 [0, 172,000]"),
        (53.2345, None, None, "53.23"),
        (1.0, 1.0, 1.0, "1"),
    ],
)
def test_a_number_with_an_interval_has_no_more_digits_than_it_tells(value, low, high, expected):
    assert console.format_estimate(value, low, high) == expected


def test_what_a_command_has_loaded_is_frozen_and_what_a_program_has_is_not(monkeypatch):
    gc.unfreeze()
    try:
        with console.loading():
            assert not gc.isenabled()
        assert (gc.isenabled(), gc.get_freeze_count()) == (True, 0)
        monkeypatch.setattr(console, "is_command", True)
        with console.loading():
            pass
        assert gc.isenabled()
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()
