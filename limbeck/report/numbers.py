"""Numbers as people read them."""

from __future__ import annotations

import math

ABSENT = "n/a"
_COUNTS = ("", " k", " M", " G", " T")
_BYTES = (" B", " KiB", " MiB", " GiB", " TiB")


def finite(value: object) -> float | None:
    """The value as a float, or None if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def digits(value: float | None, significant: int = 3) -> str:
    """``significant`` digits without an exponent where that stays short: 0.517, 12.3, 1,234, 3.1e-06."""
    if value is None or not math.isfinite(value):
        return ABSENT
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e9 or size < 1e-4:
        return f"{value:.{significant - 1}e}"
    if size >= 10**significant:
        return f"{value:,.0f}"
    return f"{value:.{max(0, significant - 1 - math.floor(math.log10(size)))}f}"


def human_count(value: float | None) -> str:
    """A count with a decimal prefix: 438, 2.1 k, 94.2 k, 25.6 M."""
    return _scaled(value, 1000, _COUNTS)


def human_bytes(value: float | None) -> str:
    """A size with a binary prefix: 512 B, 1.82 KiB, 480 MiB."""
    return _scaled(value, 1024, _BYTES)


def human_seconds(value: float | None) -> str:
    """A duration: 0.73 ms, 1.16 s, 2 min 05 s, 1 h 02 min, 3 d 4 h."""
    if value is None or not math.isfinite(value):
        return ABSENT
    size = abs(value)
    if size == 0:
        return "0 s"
    if size < 1e-3:
        return f"{digits(value * 1e6)} µs"
    if size < 1:
        return f"{digits(value * 1e3)} ms"
    if size < 60:
        return f"{digits(value)} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def percent(value: float | None) -> str:
    """A fraction in percent with one decimal: 0.962 -> 96.2 %."""
    return ABSENT if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def times(ratio: float) -> str:
    """A factor of at least 1, short: 1.3, 4.1, 55."""
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:,.0f}"


def _scaled(value: float | None, base: int, units: tuple[str, ...]) -> str:
    if value is None or not math.isfinite(value):
        return ABSENT
    power = 0
    while power < len(units) - 1 and abs(value) / base**power >= 999.5:
        power += 1
    scaled = value / base**power
    if power == 0:
        return f"{scaled:.4g}{units[0]}"
    text = f"{scaled:.3g}" if abs(scaled) < 999.5 else f"{scaled:,.0f}"
    return f"{text}{units[power]}"
