"""How much is measured. The default takes some three minutes, the quick one is only to see that it works."""

from __future__ import annotations

from dataclasses import dataclass

ROWS = ("latency", "throughput", "flood", "single", "paced", "leaving", "waiting", "memory")


@dataclass(frozen=True, slots=True)
class SpeedSettings:
    """rows: of `ROWS`, in any order. Seconds are for each way in a round; what comes before they begin is not counted."""

    rows: tuple[str, ...] = ROWS
    rounds: int = 3
    requests: int = 300  # of each kind and way in a round, one at a time
    warm_up: int = 100
    settle_s: float = 0.5  # that streams run before they are looked at
    concurrency: int = 64
    throughput_s: float = 2.0
    streams: int = 256
    flood_s: float = 2.0
    paced_s: float = 3.0
    interval_ms: int = 20  # between the events of a stream
    clients_leaving: int = 10  # of each kind and way in a round
    agents_waiting: int = 2000
    in_flight: int = 200
    slots_per_s: int = 400  # freed, while agents wait
    waiting_s: float = 3.0
    open_streams: int = 1000
    pin: bool = True  # engine and clients on one core, the relay on another, where there are two


QUICK = SpeedSettings(
    rounds=1,
    requests=10,
    warm_up=5,
    settle_s=0.1,
    concurrency=8,
    throughput_s=0.3,
    streams=16,
    flood_s=0.3,
    paced_s=0.5,
    clients_leaving=2,
    agents_waiting=100,
    in_flight=20,
    slots_per_s=100,
    waiting_s=0.5,
    open_streams=50,
)
