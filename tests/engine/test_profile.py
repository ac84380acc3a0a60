"""Profiles: the line that they draw, and what is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from engine.lab.profile import SHIPPED, ProfileError, load_profile, shipped_profiles

GOOD = """
name = "mine"
description = "by hand"
constant_s = 1
per_prefill_token_s = 0.5
per_decode_s = 0.25
per_kv_token_s = 0.125
kv_blocks = 10
block_size = 16
max_num_seqs = 4
max_num_batched_tokens = 64
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.toml"


def test_a_step_is_the_sum_of_its_parts(file: Path) -> None:
    file.write_text(GOOD)
    profile = load_profile(str(file))
    assert profile.step_s(0, 0, 0) == 1
    assert profile.step_s(6, 4, 8) == 1 + 3 + 1 + 1
    assert (profile.kv_blocks, profile.block_size, profile.max_num_seqs, profile.max_num_batched_tokens) == (
        10,
        16,
        4,
        64,
    )
    assert profile.fit == {}


def test_facts_of_the_fit_are_kept(file: Path) -> None:
    file.write_text(GOOD + "[fit]\nsamples = 1200\nmedian_error = 0.03\n")
    assert load_profile(str(file)).fit == {"samples": 1200.0, "median_error": 0.03}


@pytest.mark.parametrize("name", shipped_profiles())
def test_shipped_profiles_load(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.description
    assert (SHIPPED / f"{name}.toml").is_file()


def test_the_calculated_one_says_so() -> None:
    profile = load_profile("llama-7b-a100")
    assert "not measured" in profile.description
    assert (profile.kv_blocks, profile.block_size) == (459, 16)
    # 30 sequences that fill its cache take a little more than the weights do.
    assert 0.014 < profile.step_s(0, 30, 459 * 16) < 0.020


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(ProfileError, match="llama-7b-a100"):
        load_profile("no-such")


@pytest.mark.parametrize(
    ("line", "instead", "complaint"),
    [
        ("kv_blocks = 10", "kv_blocks = 10\nspeed = 3", "unknown keys: speed"),
        ("kv_blocks = 10", "", "missing keys: kv_blocks"),
        ("kv_blocks = 10", "kv_blocks = 0", "kv_blocks = 0"),
        ("kv_blocks = 10", "kv_blocks = 1.5", "kv_blocks must be a whole number"),
        ("kv_blocks = 10", "kv_blocks = true", "kv_blocks must be a whole number"),
        ("constant_s = 1", "constant_s = -1", "constant_s = -1.0"),
        ("constant_s = 1", "constant_s = nan", "constant_s = nan"),
        ("constant_s = 1", "constant_s = inf", "constant_s = inf"),
        ("constant_s = 1", 'constant_s = "1"', "constant_s must be a number"),
        ('name = "mine"', "name = 1", "name must be a text"),
        ('name = "mine"', 'name = "mine"\nfit = 3', "fit must be a table"),
        ('name = "mine"', 'name = "mine"\nfit = { error = nan }', "fit.error = nan"),
        ('name = "mine"', 'name = "mine"\nfit = { error = "small" }', "fit.error must be a number"),
        ('name = "mine"', "name = ", "mine.toml"),
    ],
)
def test_nonsense_is_refused(file: Path, line: str, instead: str, complaint: str) -> None:
    assert line in GOOD
    file.write_text(GOOD.replace(line, instead))
    with pytest.raises(ProfileError, match=re.escape(complaint)):
        load_profile(str(file))


def test_iterations_must_take_time(file: Path) -> None:
    file.write_text(re.sub(r"_s = [\d.]+", "_s = 0.0", GOOD))
    with pytest.raises(ProfileError, match="no time"):
        load_profile(str(file))


def test_nothing_else_is_read(file: Path) -> None:
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError):
        load_profile(str(file))
    with pytest.raises(ProfileError):
        load_profile(str(file.parent))


def test_the_roofline_is_what_its_description_says() -> None:
    profile = load_profile("llama-7b-a100")
    bandwidth = 0.8 * 1.555e12
    assert math.isclose(profile.constant_s, 13.5e9 / bandwidth + 3.1e-3, rel_tol=0.01)
    assert math.isclose(profile.per_prefill_token_s, 2 * 6.7e9 / (0.55 * 312e12), rel_tol=0.01)
    assert math.isclose(profile.per_kv_token_s, 2 * 32 * 4096 * 2 / bandwidth, rel_tol=0.01)
