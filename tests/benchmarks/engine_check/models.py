"""The models of the check, made on the spot from the tiny one, without torch: the client stays light.

The tiny model's weights are so small that its next token follows from its last one, whatever came before: an engine that
mixed up its cache would put out the same. With the matrices of its layers enlarged every earlier token counts.
"""

from __future__ import annotations

import array
import json
import random
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

from gateway.demo.processes import run_once

# Attention and MLP then outweigh the embedding of the last token by far, and attention is neither flat nor a maximum.
LAYER_FACTOR = 8.0
LORA_RANK = 8
# Of a Llama of 7 billion parameters, 32 layers of 4096; the tokenizer's own ids are the first of the 32000.
SIZE_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
# As tiny as the tiny one, and with more ids than its tokenizer too.
SIZE_REHEARSAL = {"vocab_size": 32000}
WEIGHTS = "model.safetensors"

Tensor = tuple[list[int], "array.array[float]"]  # shape and float32 values


async def make_all(directory: Path) -> dict[str, Path]:
    """By name: tiny, lively, adapter, another adapter, and those of `SIZES`. Raises `ServerFailed`."""
    tiny = directory / "tiny"
    command = [sys.executable, "-m", "engine.lab.tiny_model", str(tiny)]
    await run_once("making the tiny model", command, log=directory / "model.log")
    return {
        "tiny": tiny,
        "lively": lively(directory / "lively", tiny),
        "adapter": lora(directory / "adapter", tiny),
        "another adapter": lora(directory / "another-adapter", tiny, seed=1),
        "7b": of_size(directory / "7b", tiny, SIZE_7B),
        "rehearsal": of_size(directory / "rehearsal", tiny, SIZE_REHEARSAL),
    }


def lively(directory: Path, tiny: Path, factor: float = LAYER_FACTOR) -> Path:
    """A copy of the tiny model at `tiny`, the matrices of its layers multiplied."""
    shutil.copytree(tiny, directory, dirs_exist_ok=True)
    tensors = read_tensors(tiny / WEIGHTS)
    for name, (shape, values) in tensors.items():
        if ".layers." in name and len(shape) == 2:
            values[:] = array.array("f", [factor * value for value in values])
    write_tensors(directory / WEIGHTS, tensors)
    return directory


def lora(directory: Path, model: Path, seed: int = 0) -> Path:
    """A LoRA adapter with random weights for the attention of the model, about as strong as that itself."""
    config = json.loads((model / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    values = random.Random(seed)
    tensors: dict[str, Tensor] = {}
    for layer in range(layers):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{part}"
            for side, shape in (("A", [LORA_RANK, hidden]), ("B", [hidden, LORA_RANK])):
                drawn = array.array("f", [values.gauss(0, 0.2) for _ in range(hidden * LORA_RANK)])
                tensors[f"{name}.lora_{side}.weight"] = (shape, drawn)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / "adapter_model.safetensors", tensors)
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": LORA_RANK,
        "lora_alpha": LORA_RANK,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    return directory


def of_size(directory: Path, tiny: Path, size: dict[str, Any]) -> Path:
    """The tiny model's tokenizer and a configuration of another size, without weights: for `--load-format dummy`."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in tiny.iterdir():
        if file.is_file() and file.name != WEIGHTS:
            shutil.copy(file, directory)
    config = json.loads((tiny / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | size, indent=2))
    return directory


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Of a safetensors file. Raises `ValueError` for other numbers than float32."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors: dict[str, Tensor] = {}
    for name, entry in header.items():
        if entry["dtype"] != "F32":
            raise ValueError(f"{file}: {name} is {entry['dtype']}, not F32")
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = (entry["shape"], array.array("f", data[start:end]))
    return tensors


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = bytearray()
    for name, (shape, values) in tensors.items():
        start = len(body)
        body += values.tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, len(body)]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)
