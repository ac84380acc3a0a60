"""Which model serves: whoever says so in the registry, and never one that cannot be used."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from gateway.learning.accuracy import Accuracy
from gateway.learning.serving import Learning
from gateway.telemetry.metrics import Metrics
from predictor.learned import Learned
from predictor.model import Settings
from predictor.registry import PROMOTED, Registry
from predictor.train import train
from tests.predictor.made import Gateway


@pytest.fixture(scope="module")
def model() -> bytes:
    settings = Settings(rounds=10)
    return train(
        Gateway().serve(120), settings=settings, nthread=1, created="2025-06-01T12:00:00+00:00"
    ).model.encoded()


class Scene:
    def __init__(self, models: Path) -> None:
        self.models, self.metrics = Registry(models), CollectorRegistry()
        self.predictor = Learned()
        metrics = Metrics(self.metrics)
        self.learning = Learning(self.predictor, models, metrics, poll_s=0.01)
        metrics.learning.reads(Accuracy(), self.learning)

    @property
    def name(self) -> str | None:
        return None if self.predictor.model is None else self.predictor.model.name

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.get_sample_value(f"justitia_{name}", labels)


async def test_what_is_promoted_serves_and_what_is_rolled_back_does_not(tmp_path: Path, model: bytes) -> None:
    scene = Scene(tmp_path / "models")
    await scene.learning.look()
    assert scene.name is None
    for version in (1, 2):
        assert scene.models.add(model) == version
        scene.models.promote(version)
        await scene.learning.look()
        assert scene.name == f"xgboost-00000{version}"
        assert scene.metric("model_version") == version
    assert scene.metric("model_created_timestamp_seconds") == 1748779200
    assert 0 < (scene.metric("model_validation_error") or math.nan) < 1
    loaded = scene.predictor.model
    await scene.learning.look()
    assert scene.predictor.model is loaded, "nothing has changed"
    scene.models.rollback()
    await scene.learning.look()
    assert scene.name == "xgboost-000001"


async def test_the_watch_looks_by_itself(tmp_path: Path, model: bytes) -> None:
    scene = Scene(tmp_path)
    watch = asyncio.create_task(scene.learning.watch())
    scene.models.promote(scene.models.add(model))
    async with asyncio.timeout(20):
        while scene.name is None:
            await asyncio.sleep(0.01)
    watch.cancel()
    await asyncio.wait((watch,))


async def test_a_model_that_cannot_be_loaded_is_refused_by_name_and_the_one_before_serves(
    tmp_path: Path, model: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(tmp_path)
    damaged = model[:-10] + bytes(10)
    scene.models.promote(scene.models.add(damaged))
    with caplog.at_level(logging.WARNING):
        await scene.learning.look()
    assert "000001.model" in caplog.text
    assert "the ladder serves on" in caplog.text
    assert (scene.name, scene.metric("model_version")) == (None, 0)
    scene.models.promote(scene.models.add(model))
    await scene.learning.look()
    scene.models.promote(scene.models.add(damaged))
    for _ in range(3):
        await scene.learning.look()
    assert scene.name == "xgboost-000002"
    assert "xgboost-000002 serves on" in caplog.text
    assert scene.metric("models_refused_total") == 2, "once each"
    assert scene.metric("model_version") == 2
    assert scene.learning.serves is not None
    assert scene.learning.serves.name == "xgboost-000002"


async def test_a_model_that_cannot_be_read_for_now_is_tried_again(
    tmp_path: Path, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path)
    scene.models.promote(scene.models.add(model))

    def too_many(path: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", too_many)
        for _ in range(3):
            await scene.learning.look()
    assert (scene.name, scene.metric("models_refused_total")) == (None, 1)
    await scene.learning.look()
    assert scene.name == "xgboost-000001"


async def test_a_damaged_model_is_not_read_again(tmp_path: Path, model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path)
    scene.models.promote(scene.models.add(model[:-10] + bytes(10)))
    await scene.learning.look()
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("it was read again"))
    await scene.learning.look()
    assert scene.metric("models_refused_total") == 1


async def test_a_registry_that_cannot_be_read_changes_nothing_and_is_said_once(
    tmp_path: Path, model: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(tmp_path)
    scene.models.promote(scene.models.add(model))
    await scene.learning.look()
    (tmp_path / PROMOTED).write_text("nonsense\n")
    for _ in range(3):
        await scene.learning.look()
    assert scene.name == "xgboost-000001"
    assert scene.metric("models_refused_total") == 1
    assert caplog.text.count("'nonsense' is no version") == 1


async def test_who_takes_no_models_gets_none(tmp_path: Path, model: bytes) -> None:
    registry = Registry(tmp_path)
    registry.promote(registry.add(model))
    for predictor, models in ((Learned(), None), (object(), tmp_path)):
        learning = Learning(predictor, models, Metrics(CollectorRegistry()))  # type: ignore[arg-type]
        await learning.look()
        assert (learning.serves, learning.failures) == (None, 0)


async def test_failures_of_models_are_told_as_they_grow(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.predictor.failures = 3
    assert scene.metric("predictor_failures_total", part="model") == 3
