"""A trained model: boosted trees that correct the ladder, and the file that holds them.

XGBoost grows them (`train`); here they are asked (`trees`). They answer both questions at once: of an agent, log(1 + cost),
and of a task, log(1 + decode length), each as the difference to the ladder's guess, which is in the row. Where they know
nothing the model says what the ladder says. Squared errors of logarithms make both medians.

`cost_p90` is the median times a factor: the ninth decile of truth / median over agents that the model had not seen (conformal
prediction; Vovk et al., 2005), for the first task and for later ones apart. A booster for the ninth decile itself was worse:
from a thousand agents it learned the tail's noise. `decode_tokens` is the median times the mean of truths over that of
medians: lengths are added up to what the engine will hold, and medians would add up to less.

    [format, version, SHA-256 of the contents, contents: a `_Contents` as MessagePack]
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from predictor.features import COLUMN, COLUMNS, SCHEMA, Row
from predictor.learned import Answer
from predictor.trees import Forest, Rows, Trees

FORMAT, FORMAT_VERSION = "justitia-model", 1

OUTPUTS = 2
_GUESSES = [COLUMN["agent_guess"], COLUMN["decode_guess"]]
_TASKS_ARRIVED = COLUMN["tasks_arrived"]
_FIRST_TASK = math.log1p(1.5)  # `tasks_arrived` below it
# Of what is added to a guess: a factor of e^20, beyond which no guess can be wrong.
_LARGEST_CORRECTION = 20.0


class ModelError(ValueError):
    """A file that is no model that could be used: which, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class Settings(msgspec.Struct, frozen=True):
    """Of training. On 900 agents of nine classes whose texts decide what they cost, other depths and shares, or twice the
    rounds, change the median error by a hundredth; where only the class is known, deeper trees at a higher rate learn noise."""

    rounds: int = 300
    depth: int = 3
    learning_rate: float = 0.04
    rows_share: float = 0.7
    columns_share: float = 0.3


class Calibration(msgspec.Struct, frozen=True):
    """Natural logarithms of factors on medians: for the ninth decile of an agent's cost at its first task, and at a later
    one; for the mean of a decode length."""

    cost_p90_first: float = 0.0
    cost_p90_later: float = 0.0
    decode_mean: float = 0.0


class Told(msgspec.Struct, frozen=True):
    """What a model file tells beside the model. created: RFC 3339, or "" if nobody said; metrics: by name, of its training."""

    agents: int
    rows: int
    created: str = ""
    settings: Settings = Settings()
    calibration: Calibration = Calibration()
    metrics: dict[str, float] = msgspec.field(default_factory=dict)


class _Contents(msgspec.Struct, frozen=True):
    schema: str
    told: Told
    trees: Trees


class _File(msgspec.Struct, frozen=True, array_like=True):
    format: str
    version: int
    sha256: bytes
    contents: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode_file = msgspec.msgpack.Decoder(_File).decode
_decode_contents = msgspec.msgpack.Decoder(_Contents).decode
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Boosted:
    """A `learned.Model`. Raises ValueError for trees that cannot be asked."""

    def __init__(self, trees: Trees, told: Told, name: str = "xgboost") -> None:
        self._forest = Forest(trees, len(COLUMNS))
        if trees.outputs != OUTPUTS:
            raise ValueError(f"{trees.outputs} outputs instead of {OUTPUTS}")
        if not all(map(math.isfinite, msgspec.structs.astuple(told.calibration))):
            raise ValueError("a calibration that is no number")
        self.trees = trees
        self.told = told
        self.name = name

    def predict(self, row: Row) -> Answer:
        """Raises ValueError for a row of another size, or whose guesses are not finite."""
        if row.shape != (len(COLUMNS),):
            raise ValueError(f"a row of shape {row.shape}, not ({len(COLUMNS)},)")
        cost, decode = self._forest.one(row)
        log_cost = float(row[_GUESSES[0]]) + _bounded(cost)
        log_decode = float(row[_GUESSES[1]]) + _bounded(decode)
        calibration = self.told.calibration
        p90 = calibration.cost_p90_first if row[_TASKS_ARRIVED] < _FIRST_TASK else calibration.cost_p90_later
        if not (math.isfinite(log_cost) and math.isfinite(log_decode)):
            raise ValueError(f"the guesses of the row are {row[_GUESSES]}")
        return Answer(_tokens(log_cost), _tokens(log_cost + p90), _tokens(log_decode + calibration.decode_mean))

    def medians(self, rows: Rows) -> NDArray[np.float64]:
        """log(1 + x) of an agent's cost, and of a sequence's tokens. rows: shape (n, len(COLUMNS)). Shape (n, OUTPUTS)."""
        return guesses(rows) + np.clip(self._forest.many(rows), -_LARGEST_CORRECTION, _LARGEST_CORRECTION)

    def encoded(self) -> bytes:
        """What `decoded` reads."""
        contents = _encode(_Contents(SCHEMA, self.told, self.trees))
        return _encode(_File(FORMAT, FORMAT_VERSION, hashlib.sha256(contents).digest(), contents))


def guesses(rows: Rows) -> NDArray[np.float64]:
    """The ladder's, as `Boosted.medians`. Shape (n, OUTPUTS)."""
    return rows[:, _GUESSES].astype(np.float64)


def load(path: Path) -> Boosted:
    """Raises `ModelError`, whatever is wrong with the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(path, f"cannot be read: {error.strerror or error}") from error
    return decoded(data, path)


def decoded(data: bytes, path: Path) -> Boosted:
    """path: where they come from. Raises `ModelError`."""
    try:
        file = _decode_file(data)
    except _UNREADABLE as error:
        raise ModelError(path, "no model, or damaged") from error
    if file.format != FORMAT:
        raise ModelError(path, f"of the format {file.format[:40]!r}, not {FORMAT!r}")
    if file.version != FORMAT_VERSION:
        raise ModelError(path, f"format version {file.version}; this program reads {FORMAT_VERSION}")
    if hashlib.sha256(file.contents).digest() != file.sha256:
        raise ModelError(path, "damaged: its contents are not those that its checksum is of")
    try:
        contents = _decode_contents(file.contents)
    except _UNREADABLE as error:
        raise ModelError(path, f"its contents cannot be read: {error}") from error
    if contents.schema != SCHEMA:
        raise ModelError(path, f"made for rows of schema {contents.schema[:40]}; this program makes {SCHEMA}")
    try:
        return Boosted(contents.trees, contents.told, f"xgboost-{path.stem}")
    except ValueError as error:
        raise ModelError(path, f"its trees cannot be asked: {error}") from error


def _tokens(log: float) -> float:
    """Of log(1 + x); finite, as 1 + x is at most some e^(69 + 2 · 20)."""
    return max(0.0, math.expm1(min(log, 200.0)))


def _bounded(correction: float) -> float:
    return min(max(correction, -_LARGEST_CORRECTION), _LARGEST_CORRECTION)
