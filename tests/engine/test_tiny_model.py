from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from engine.lab import tiny_model

pytestmark = pytest.mark.vllm


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_same_seed_gives_the_same_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert files(tiny_model.make(tmp_path / "again")) == files(tiny_model_dir)
    other = files(tiny_model.make(tmp_path / "other", seed=1))
    assert other["model.safetensors"] != files(tiny_model_dir)["model.safetensors"]
    assert other["tokenizer.json"] == files(tiny_model_dir)["tokenizer.json"]


def test_what_is_there_is_kept(tiny_model_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_model_dir.iterdir()}
    assert tiny_model.make(tiny_model_dir) == tiny_model_dir
    assert {path: path.stat().st_mtime_ns for path in tiny_model_dir.iterdir()} == before


def test_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="something other"):
        tiny_model.make(tmp_path)
    assert files(tmp_path) == {"mine": b"precious"}


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    tiny_model.make(tmp_path / "empty")
    assert json.loads((tmp_path / "empty" / tiny_model.STAMP).read_text()) == {"format": 1, "seed": 0}


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(directory: Path, seed: int) -> None:
        (directory / "half").write_text("")
        raise RuntimeError("disk full")

    monkeypatch.setattr(tiny_model, "_write", broken)
    with pytest.raises(RuntimeError, match="disk full"):
        tiny_model.make(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_is_complete(tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    text = "Any byte: \x00 é 漢 🙂\n"
    assert len(tokenizer) == tiny_model.VOCABULARY
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|system|>\nBe brief.\n<|user|>\nHello\n<|assistant|>\n"


def test_the_command(tiny_model_dir: Path) -> None:
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "engine.lab.tiny_model", str(tiny_model_dir)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tiny_model_dir)


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    root = Path(__file__).parent.parent.parent
    code = "import engine.lab.tiny_model, engine.launcher, engine.compat, engine.link, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "vllm"} & set(done.stdout.split())
