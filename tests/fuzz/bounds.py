"""How long the fuzzers run. In the suite each runs the same few examples every time, so that a red run can be had again.

FUZZ_TIMES=50 runs fifty times as many, and others each time: what fails is printed as an example to reproduce it.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings

TIMES = int(os.environ.get("FUZZ_TIMES", "1"))


def bounded(examples: int, **options: Any) -> settings:
    return settings(
        max_examples=examples * TIMES,
        database=None,
        deadline=None,
        print_blob=True,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        **options,
    )
