"""Means and percentiles, and the colours and sizes of every picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Two colours that all readers can distinguish, by lightness too (Okabe and Ito).
BASELINE_COLOUR, RUN_COLOUR = "#D55E00", "#0072B2"
INK, GREY, BAND = "#24292f", "#8c959f", "#f1f4f7"
# Inches at 100 dots each: 900 pixels wide, saved with twice the dots.
WIDTH, HEIGHT, DPI = 9.0, 4.4, 200


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest ranks, `share` from 0 to 1. NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return sum(values) / len(values) if values else math.nan
