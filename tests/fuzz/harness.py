"""What the harnesses share: atheris with our seeds, a dictionary, and a place for what it finds.

`python -m tests.fuzz.atheris_bodies [options of libFuzzer] [a directory that keeps what reaches new code]`
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import atheris

SEEDS = Path(__file__).resolve().parent / "corpus"


def fuzz(name: str, one: Callable[[bytes], None], words: Iterable[str]) -> None:
    """name: of the seeds. Ends the process: with 0 after `-runs` or `-max_total_time`, else with what failed, in Base64."""
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    kept = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    scratch = Path(tempfile.mkdtemp(prefix="justitia-fuzz-"))
    new = scratch / "new"
    new.mkdir()
    dictionary = scratch / "dictionary"
    dictionary.write_text("".join(f'"{_escaped(word)}"\n' for word in words))
    arguments = [f"-dict={dictionary}", f"-artifact_prefix={scratch}/", *options, *(kept or [str(new)])]
    atheris.Setup([sys.argv[0], *arguments, str(SEEDS / name)], one)
    atheris.Fuzz()


def _escaped(word: str) -> str:
    return "".join(f"\\x{byte:02x}" if byte in b'"\\' or byte < 0x20 else chr(byte) for byte in word.encode("latin-1"))
