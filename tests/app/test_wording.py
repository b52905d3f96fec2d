"""Numbers read well."""

from __future__ import annotations

from app.wording import MIB, count, duration, mebibytes, percent, seconds


def test_a_small_share_tells_from_its_half() -> None:
    assert [percent(x) for x in (0.0014, 0.0007, 0.0002, 0.0001, 4e-7, 0.0)] == [
        "0.1 %",
        "0.07 %",
        "0.02 %",
        "0.01 %",
        "4e-5 %",
        "0.0 %",
    ]


def test_numbers_read_well() -> None:
    assert [percent(x) for x in (0.0371, 0.5, 1.0, 0.9996)] == [
        "3.7 %",
        "50 %",
        "100 %",
        "100 %",
    ]
    assert [mebibytes(x * MIB) for x in (0.25, 5.61, 241)] == [
        "0.25 MiB",
        "5.6 MiB",
        "241 MiB",
    ]
    assert [seconds(x) for x in (6.34, 0.0042, 0.031)] == ["6.3 s", "4.2 ms", "31 ms"]
    said = [duration(x) for x in (0.031, 119.9, 120, 7199, 14114.7)]
    assert said == ["31 ms", "119.9 s", "2 minutes", "120 minutes", "3.9 hours"]
    assert count(1, "token") == "1 token"
