"""Units: how bytes, counts, rates and durations are written, the same everywhere.

MiB is 2**20 bytes, MB is 10**6 bytes; the two differ by 4.9 % and are never mixed silently.
"""

from __future__ import annotations

KIB, MIB, GIB = 2**10, 2**20, 2**30
KB, MB, GB = 10**3, 10**6, 10**9


def format_bytes(n_bytes: float) -> str:
    """Write a number of bytes in binary units: 1536 -> ``1.5 KiB``."""
    return _scaled(n_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def format_count(n: float) -> str:
    """Write a count with a decimal suffix: 1234567 -> ``1.23 M``."""
    return _scaled(n, 1000, ("", "k", "M", "G", "T", "P")).strip()


def format_rate(per_s: float, unit: str) -> str:
    """Write a rate: (1234.5, "docs") -> ``1.23 kdocs/s``."""
    number, _, suffix = format_count(per_s).partition(" ")
    return f"{number} {suffix}{unit}/s"


def format_duration(seconds: float) -> str:
    """Write a duration: 3725.2 -> ``1 h 02 min``, 75 -> ``1 min 15 s``, 0.0123 -> ``12.3 ms``."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def _scaled(value: float, base: int, suffixes: tuple[str, ...]) -> str:
    magnitude = abs(value)
    index = 0
    while magnitude >= base and index < len(suffixes) - 1:
        magnitude /= base
        index += 1
    scaled = value / base**index
    text = f"{scaled:.0f}" if index == 0 and float(value).is_integer() else f"{scaled:.3g}"
    if index and magnitude >= 1000:  # 1000..1023 of a binary unit: no exponent
        text = f"{scaled:.0f}"
    return f"{text} {suffixes[index]}"
