"""What a number may be that somebody sets: checked where it is said, not at the request that it ruins.

NaN is the reason for asking what is allowed rather than what is not: it is neither below nor above anything.
"""

from typing import Final

HOUR_S: Final = 3_600.0
DAY_S: Final = 86_400.0
MONTH_S: Final = 30 * DAY_S

MOST: Final = (1 << 31) - 1


def whole(name: str, value: object, *, least: int = 1, most: int = MOST) -> int:
    """`value` as it is, where it is an int (never a bool) within the bounds.

    Raises:
        ValueError: It is not; the text has the number's name, and what is allowed.
    """
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    raise ValueError(f"{name} must be a whole number from {least:,} to {most:,}; this is {_shown(value)}")


def number(name: str, value: object, *, most: float, zero: bool = False) -> float:
    """`value` as it is, where it is an int or a float (never a bool) above 0 and not beyond `most`.

    Args:
        zero: Whether 0 will do, too.

    Raises:
        ValueError: It is not; likewise.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and (0 < value <= most or (zero and value == 0)):
        return value
    allowed = f"from 0 to {most:,.0f}" if zero else f"above 0, and {most:,.0f} at the most"
    raise ValueError(f"{name} must be {allowed}; this is {_shown(value)}")


def _shown(value: object) -> str:
    # Of anything else only the type: what stands in the wrong place may be a secret. A long int has no text.
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 64):
        return repr(value)
    return type(value).__name__ if not isinstance(value, int) else "far from it"
