"""Checks of single settings: the message names the setting, the value and what would work."""


def whole(setting: str, value: object, least: int) -> int:
    """Return `value` if it is an int of at least `least`, else raise a ValueError that names `setting`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{setting}={value!r} must be a whole number of at least {least}")
    return value


def fraction(setting: str, value: object, *, ends: bool) -> float:
    """Return `value` if it is a number from 0 to 1 (with `ends`, also 0 and 1), else raise a ValueError."""
    if not isinstance(value, bool) and isinstance(value, int | float):
        number = float(value)
        if (0.0 <= number <= 1.0) if ends else (0.0 < number < 1.0):
            return number
    raise ValueError(f"{setting}={value!r} must be a number {'from 0 to 1' if ends else 'between 0 and 1'}")


def switch(setting: str, value: object) -> bool:
    """Return `value` if it is a bool, else raise a ValueError that names `setting`."""
    if not isinstance(value, bool):
        raise ValueError(f"{setting}={value!r} must be true or false")
    return value
