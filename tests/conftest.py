"""What all tests share: the examples that Hypothesis draws, a home without the user's keys, and short paths."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from engine.lab import tiny_model
from tests.fuzz.bounds import TIMES
from tests.loop_thread import LoopThread

pytest_plugins = ["tests.kinds", "tests.engine.live"]

# The same examples each time, unless more of them are asked for. No deadline: a busy machine is no defect of the code.
hypothesis.settings.register_profile("seeded", derandomize=TIMES == 1, deadline=None)
hypothesis.settings.load_profile("seeded")


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A gateway of the user's own may have keys: no test is to ask for them, or to change them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def session_dir() -> Iterator[Path]:
    """A short path: pytest's own are too long for Unix sockets."""
    directory = Path(tempfile.mkdtemp(prefix="justitia-", dir="/tmp"))
    yield directory
    if "JUSTITIA_KEEP" not in os.environ:  # set it to read the engine's log afterwards
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model_dir(session_dir: Path) -> Path:
    return tiny_model.make(session_dir / "model")


@pytest.fixture(scope="session")
def loop_thread() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()
