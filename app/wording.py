"""Numbers and long texts as people read them: "3,412 tokens", "5.6 MiB", "31 ms". Knows nothing of
records.
"""

from __future__ import annotations

MIB = 2**20


def shortened(value: object) -> str:
    """A parameter's value as a word or two; a record from a stranger may hold a book."""
    text = str(value)
    return text if len(text) <= 24 else f"{text[:23]}\u2026"


def ending(text: str, most: int) -> str:
    """The last characters of a text, an ellipsis before them where something is left out."""
    return text if len(text) <= most else f"\u2026{text[-most:]}"


def count(number: int, noun: str) -> str:
    """ "1 token", "3,412 tokens"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def percent(share: float) -> str:
    """A share with as many digits as it deserves: small ones keep one, so that a half tells."""
    value = 100 * share
    if value >= 99.95:
        return "100 %"
    if 0 < value < 0.1:
        return f"{value:.1g} %".replace("e-0", "e-")
    return f"{value:.0f} %" if value >= 20 else f"{value:.1f} %"


def mebibytes(size: float) -> str:
    """Bytes in MiB (2**20)."""
    value = size / MIB
    return (
        f"{value:,.0f} MiB"
        if value >= 100
        else f"{value:.1f} MiB"
        if value >= 1
        else f"{value:.2f} MiB"
    )


def seconds(value: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{value:.1f} s" if value >= 1 else milliseconds(value)


def duration(value: float) -> str:
    """Seconds; from two minutes on minutes, from two hours on hours."""
    if value < 120:
        return seconds(value)
    return f"{value / 60:.0f} minutes" if value < 7200 else f"{value / 3600:.1f} hours"


def milliseconds(value: float) -> str:
    """Milliseconds, two digits at least."""
    value *= 1000
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"
