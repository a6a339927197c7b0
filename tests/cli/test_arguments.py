from __future__ import annotations

import re

import pytest

from grasp.cli import arguments


@pytest.mark.parametrize(
    ("text", "layers"), [("3", (3,)), ("3,12-15, 17", (3, 12, 13, 14, 15, 17)), ("2-2", (2,)), ("5,1", (5, 1))]
)
def test_layers_are_numbers_and_ranges(text: str, layers: tuple[int, ...]) -> None:
    assert arguments.parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "3-", "5-3", "-1", "1,,2", "1.5"])
def test_other_layers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"such as 3,12-17, got {text!r}")):
        arguments.parse_layers(text)


@pytest.mark.parametrize("text", ["0-99999999999", "10000", "1,9999-10000"])
def test_numbers_beyond_any_model_are_refused_before_ranges_are_written_out(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"layers must be below 10000, got {text!r}")):
        arguments.parse_layers(text)


@pytest.mark.parametrize(
    ("text", "number"), [("12", 12), ("200MB", 200_000_000), ("1.5 GiB", 3 << 29), ("7kb", 7000), ("8B", 8)]
)
def test_bytes_have_decimal_or_binary_units(text: str, number: int) -> None:
    assert arguments.parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "MB", "-1", "1 M", "2e9", "1XB"])
def test_bytes_without_a_number_or_with_another_unit_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="bytes must be a number such as"):
        arguments.parse_bytes(text)


@pytest.mark.parametrize("digits", ["9" * 10, "9" * 400, "9" * 5000])
def test_numbers_of_any_length_are_refused_with_the_limit(digits: str) -> None:
    for parse, text in (
        (arguments.parse_layers, digits),
        (arguments.parse_layers, f"1-{digits}"),
        (arguments.parse_counts, f"1,{digits}"),
        (arguments.parse_batch_size, digits),
        (arguments.parse_bytes, f"{digits}GB"),
    ):
        with pytest.raises(ValueError, match=r"must be (below|at most) 10+"):
            parse(text)


@pytest.mark.parametrize("text", ["١", "1_0", "²"])
def test_only_ascii_digits_are_numbers(text: str) -> None:
    for parse in (arguments.parse_layers, arguments.parse_counts, arguments.parse_batch_size, arguments.parse_bytes):
        with pytest.raises(ValueError, match="must be"):
            parse(text)


@pytest.mark.parametrize("given", [["evaluate", "m", "--text", ""], ["evaluate", "m", "--text="], ["inspect", ""]])
def test_empty_arguments_are_refused(given: list[str]) -> None:
    arguments.require_values(["evaluate", "m", "--json"])
    with pytest.raises(ValueError, match=r"^(--text|an argument) has an empty value"):
        arguments.require_values(given)
