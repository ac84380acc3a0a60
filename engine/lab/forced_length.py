"""Forced output lengths, for demonstrations and benchmarks: `--logits-processors engine.lab.forced_length:ForcedLength`.

A replayed trace has the length of each answer, and random or greedy text has another. `max_tokens` would force the length
too, and reveal it to every predictor in front of the engine. So a request carries an opaque key in
`vllm_xargs`, and only the engine holds the table from key to length:

    {"vllm_xargs": {"forced_length_key": "a17/m1"}}      and in the table      {"a17/m1": 180}

The answer then has exactly that many tokens, the end-of-sequence token included: it is masked before, and forced at the
end. The table is a JSON file, `additional_config["justitia"]["forced_lengths"]`, and is read again when a key is
missing and the file has changed, so that it can grow while the engine runs. Replace it whole (write, then rename). A
request without a key is left alone.

A request's own `max_tokens` and stop strings still end it sooner, and so does the model's longest context.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm import SamplingParams
from vllm.logger import init_logger
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY_XARG = "forced_length_key"
# vLLM asks a class, not an instance, whether a request's parameters are valid, in the process of the API server, and
# gives it no configuration. The launcher names the table there too.
TABLE_ENVIRONMENT = "JUSTITIA_FORCED_LENGTHS"

logger = init_logger(__name__)


class LengthTable:
    """A JSON file `{key: length in tokens}`, read when it is first needed and again when it may have grown."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lengths: dict[str, int] = {}
        self._read_at: tuple[int, int] | None = None

    def length(self, key: str) -> int | None:
        """Tokens, or None for a key that the file lacks too. Raises `ValueError` for a file that is no such table."""
        if key not in self._lengths:
            self._read_if_changed()
        return self._lengths.get(key)

    def _read_if_changed(self) -> None:
        try:
            status = self.path.stat()
            version = (status.st_mtime_ns, status.st_ino)
            if version == self._read_at:
                return
            lengths = json.loads(self.path.read_text())
        except OSError as error:
            raise ValueError(f"the table of forced lengths cannot be read: {error}") from error
        if not isinstance(lengths, dict) or not all(type(n) is int and n > 0 for n in lengths.values()):
            raise ValueError(f"{self.path} is no JSON object of positive lengths")
        self._lengths, self._read_at = lengths, version


class _Row(NamedTuple):
    """A row of the batch whose answer has a forced length."""

    length: int
    output: list[int]  # what has been put out so far: vLLM's own list, which grows
    end: int  # the token that is forced
    ends: list[int]  # the tokens that are masked until then


class ForcedLength(LogitsProcessor):  # type: ignore[misc, unused-ignore]  # Any, where mypy skips vLLM
    """For vLLM's first model runner (`VLLM_USE_V2_MODEL_RUNNER=0`): the second has an interface of its own."""

    # One table for all requests that this process validates; see `TABLE_ENVIRONMENT`.
    _admission_table: LengthTable | None = None

    def __init__(self, vllm_config: VllmConfig, _device: torch.device, _is_pin_memory: bool) -> None:
        path = table_path(vllm_config.additional_config)
        if path is None:
            raise ValueError('forced lengths need additional_config["justitia"]["forced_lengths"]')
        self._table = LengthTable(path)
        self._rows: dict[int, _Row] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuses a request with a key that the table does not have, with status 400."""
        key = (sampling_params.extra_args or {}).get(KEY_XARG)
        path = os.environ.get(TABLE_ENVIRONMENT)
        if key is None or path is None:
            return
        if sampling_params.ignore_eos and not sampling_params.stop_token_ids:
            raise ValueError(f"{KEY_XARG} needs a token that ends the answer, and ignore_eos leaves none")
        if cls._admission_table is None or cls._admission_table.path != Path(path):
            cls._admission_table = LengthTable(Path(path))
        if not isinstance(key, str) or cls._admission_table.length(key) is None:
            raise ValueError(f"no forced length is known for {KEY_XARG} {key!r}")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, self._row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        # With async scheduling the last tokens put out may still be placeholders here. Their number is right all the
        # same.
        early_rows: list[int] = []
        early_ends: list[int] = []
        for index, row in self._rows.items():
            if len(row.output) + 1 < row.length:
                early_rows += [index] * len(row.ends)
                early_ends += row.ends
            else:
                logits[index] = -torch.inf
                logits[index, row.end] = 0.0
        if early_rows:
            logits[early_rows, early_ends] = -torch.inf
        return logits

    def _row(self, params: SamplingParams, _prompt: list[int] | None, output: list[int]) -> _Row | None:
        key = (params.extra_args or {}).get(KEY_XARG)
        if not isinstance(key, str):
            return None
        # What is wrong below was refused at admission, where the API server knows the table. Here an error would stop
        # the engine for all requests.
        try:
            length = self._table.length(key)
        except ValueError as error:
            length = None
            logger.warning("%s", error)
        end = params.eos_token_id if params.eos_token_id is not None else next(iter(params.stop_token_ids or ()), None)
        if length is None or end is None:
            logger.warning("the length of %r is not forced: %s, end token %s", key, length, end)
            return None
        return _Row(length, output, end, sorted(params.all_stop_token_ids))


def table_path(additional_config: Any) -> Path | None:
    """`additional_config["justitia"]["forced_lengths"]`, or None."""
    justitia = additional_config.get("justitia") if isinstance(additional_config, dict) else None
    path = justitia.get("forced_lengths") if isinstance(justitia, dict) else None
    return Path(path) if path else None
