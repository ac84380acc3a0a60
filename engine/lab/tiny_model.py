"""A tiny Llama with random weights, made on the spot: `python -m engine.lab.tiny_model DIR`.

The real engine then runs on any machine, without a GPU and without a model hub. Its text is noise; its memory, its
scheduling and its API are vLLM's own. About 0.4 MB, in a few seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

VOCABULARY = 512
HIDDEN = 64
LAYERS = 2
HEADS = 2  # of 32, the smallest that vLLM's CPU attention takes
MAX_POSITIONS = 8192
END = "<|end|>"
# The last file that is written: with it there, the model is complete and made by this module.
STAMP = "justitia-tiny-model.json"
FORMAT = 1

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# What the byte-level BPE learns its merges from. Ours, so that nothing is downloaded and nothing is licensed.
TEXT = (
    "The gateway holds a queue of tasks, and every task belongs to an agent.",
    "A small agent that comes late should not wait behind a big one that came early.",
    "Each block of the cache holds the keys and the values of a few tokens.",
    "When the memory is full, a running task gives back its blocks and is computed again later.",
    "Summarise the following section of the report in three sentences.",
    "You are a helpful assistant. Answer the question, and say so when you do not know.",
    "def add(a: int, b: int) -> int:\n    return a + b\n",
    '{"name": "search", "arguments": {"query": "weather tomorrow", "limit": 10}}',
    "0123456789 10 20 30 40 50 100 200 500 1000 and so on, until the numbers end.",
    "system user assistant tool\n",
)


def make(directory: Path, seed: int = 0) -> Path:
    """Makes the model unless it is there already, and returns its directory.

    The same seed gives the same weights. The directory appears whole or not at all, also when two processes make it at
    once. Raises `FileExistsError` when something else lies at `directory`, `ImportError` without torch and
    transformers.
    """
    if _is_made(directory, seed):
        return directory
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} exists and holds something other than this tiny model (seed {seed})")
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _write(building, seed)
        (building / STAMP).write_text(json.dumps({"format": FORMAT, "seed": seed}))
        # Temporary directories and safetensors' files are the owner's alone: an engine of another user must read them.
        building.chmod(0o755)
        for file in building.iterdir():
            file.chmod(0o644)
        try:
            building.rename(directory)
        except OSError:
            # Another process was first. Its model is as good as ours.
            if not _is_made(directory, seed):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return directory


def _is_made(directory: Path, seed: int) -> bool:
    try:
        return bool(json.loads((directory / STAMP).read_text()) == {"format": FORMAT, "seed": seed})
    except (OSError, ValueError):
        return False


def _write(directory: Path, seed: int) -> None:
    # Heavy, and absent where only the gateway is installed: hence in here.
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call, unused-ignore]  # transformers' own
        tokenizer_object=bpe, eos_token=END, pad_token=END, model_max_length=MAX_POSITIONS, chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(directory)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(  # type: ignore[no-untyped-call, unused-ignore]  # likewise
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=HIDDEN,
                intermediate_size=2 * HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=HEADS,
                max_position_embeddings=MAX_POSITIONS,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                tie_word_embeddings=True,
                dtype="float32",
            )
        )
    model.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m engine.lab.tiny_model", description="Make a tiny Llama.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        sys.stdout.write(f"{make(options.directory, options.seed)}\n")
    except FileExistsError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
