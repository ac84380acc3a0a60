"""Keys: only who has the secret comes in, nothing of it is on the disk, and of those that are added none is lost."""

from __future__ import annotations

import hmac
import json
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gateway.cli.keys import run_keys
from gateway.tenancy import keys as module
from gateway.tenancy.keys import Keys, KeysError, add_key, revoke_key, stamp_of

NOW = datetime(2026, 10, 1, 12, 30, tzinfo=UTC)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "keys.json"


def test_a_key_opens_for_its_tenant_and_for_nobody_else(path: Path) -> None:
    _, red = add_key(path, "red", "", NOW)
    _, blue = add_key(path, "blue", "", NOW)
    keys = Keys.load(path)
    assert keys.configured
    assert (keys.tenant_of(red), keys.tenant_of(blue)) == ("red", "blue")
    assert keys.tenants == {"red", "blue"}


def test_it_has_256_random_bits(path: Path) -> None:
    given = [add_key(path, "red", "", NOW)[1] for _ in range(20)]
    secrets = {key.split("_")[2] for key in given}
    assert len(secrets) == 20
    assert {len(bytes.fromhex(secret)) for secret in secrets} == {32}
    assert all(key.startswith("jk_") for key in given)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda key: "",
        lambda key: "sk-" + key,
        lambda key: key[:-1],
        lambda key: key + "0",
        lambda key: key.upper(),
        lambda key: key + "\n",
        lambda key: key[:-1] + ("0" if key[-1] != "0" else "1"),
        lambda key: "jk_00000000_" + key[12:],  # an id that is not known
        lambda key: "jk_" + key[3:11] + "_" + 64 * "0",
        lambda key: "jk_" + "ü" * 8 + key[11:],
        lambda key: key * 1000,
        lambda key: "\udcff",
    ],
)
def test_what_is_nearly_a_key_is_none(path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    _, key = add_key(path, "red", "", NOW)
    assert Keys.load(path).tenant_of(spoil(key)) is None


def test_an_unknown_id_is_hashed_and_compared_like_a_known_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, key = add_key(path, "red", "", NOW)
    keys = Keys.load(path)
    done: list[str] = []

    def compare(one: bytes, other: bytes) -> bool:
        done.append("compared")
        return compare_digest(one, other)

    def hashed(*given: object, **more: object) -> object:
        done.append("hashed")
        return blake2b(*given, **more)

    blake2b, compare_digest = module.blake2b, hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", compare)
    monkeypatch.setattr(module, "blake2b", hashed)
    for given in (key, "jk_00000000_" + key[12:]):
        keys.tenant_of(given)
    assert done == 2 * ["hashed", "compared"]


def test_a_revoked_key_opens_nothing_and_still_counts(path: Path) -> None:
    kept, key = add_key(path, "red", "", NOW)
    assert revoke_key(path, kept.id, NOW).revoked == NOW
    keys = Keys.load(path)
    assert keys.tenant_of(key) is None
    assert keys.configured, "or revoking the last key would let everybody in"
    later = datetime(2026, 10, 2, tzinfo=UTC)
    assert revoke_key(path, kept.id, later).revoked == NOW
    with pytest.raises(KeysError, match="no key 'ffffffff'"):
        revoke_key(path, "ffffffff", NOW)


def test_no_file_is_no_keys(path: Path) -> None:
    keys = Keys.load(path)
    assert not keys.configured and keys.stamp is None and stamp_of(path) is None
    assert keys.tenant_of("jk_00000000_" + 64 * "0") is None


def test_the_secret_is_not_in_the_file_nor_the_same_hash_twice(path: Path) -> None:
    _, key = add_key(path, "red", "", NOW)
    _, other = add_key(path, "red", "", NOW)
    text = path.read_text()
    for secret in (key.split("_")[2], other.split("_")[2]):
        assert secret not in text
    file = json.loads(text)
    # The same secret under another salt, or in another file, is another hash.
    first = file["keys"][0]
    file["keys"][1] |= {"hash": first["hash"]}
    path.write_text(json.dumps(file))
    moved = f"jk_{file['keys'][1]['id']}_{key.split('_')[2]}"
    assert Keys.load(path).tenant_of(moved) is None
    file["keys"][1] |= {"salt": first["salt"]}
    path.write_text(json.dumps(file))
    assert Keys.load(path).tenant_of(moved) == "red"
    path.write_text(json.dumps(file | {"hash_key": "A" * 43 + "="}))
    assert Keys.load(path).tenant_of(moved) is None


def test_the_file_and_its_lock_are_for_their_owner_alone(path: Path) -> None:
    before = os.umask(0)
    try:
        add_key(path, "red", "", NOW)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()} == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    add_key(path, "red", "", NOW)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_another_file_has_another_stamp(path: Path) -> None:
    add_key(path, "red", "", NOW)
    before = Keys.load(path)
    assert before.stamp == stamp_of(path)
    add_key(path, "red", "", NOW)
    assert before.stamp != stamp_of(path) == Keys.load(path).stamp


def test_what_a_killed_one_left_is_no_obstacle(path: Path) -> None:
    add_key(path, "red", "", NOW)
    left = path.with_name(".keys.json.x.tmp")
    left.write_text("half a fi")
    os.utime(left, (0, 0))
    add_key(path, "red", "", NOW)
    assert len(list(Keys.load(path))) == 2
    assert not left.exists()


def test_a_link_stays_one(path: Path, tmp_path: Path) -> None:
    real = tmp_path / "elsewhere.json"
    add_key(real, "red", "", NOW)
    path.parent.mkdir()
    path.symlink_to(real)
    add_key(path, "blue", "", NOW)
    assert path.is_symlink()
    assert Keys.load(real).tenants == {"red", "blue"}


@pytest.mark.wire
def test_of_many_that_add_at_once_none_is_lost(path: Path) -> None:
    code = (
        "import sys; from datetime import UTC, datetime; from pathlib import Path; from gateway.tenancy.keys import add_key\n"
        "for _ in range(20): print(add_key(Path(sys.argv[1]), sys.argv[2], '', datetime.now(UTC))[1])"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path), f"t{number}"], stdout=subprocess.PIPE, text=True)
        for number in range(6)
    ]
    given = {}
    for number, process in enumerate(processes):
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        given |= dict.fromkeys(said.split(), f"t{number}")
    keys = Keys.load(path)
    assert len(given) == len(list(keys)) == 120
    assert all(keys.tenant_of(key) == tenant for key, tenant in given.items())


def entry(**changed: object) -> dict[str, object]:
    return {
        "id": "0123abcd",
        "tenant": "red",
        "created": "2026-10-01T00:00:00Z",
        "salt": "A" * 22 + "==",
        "hash": "A" * 43 + "=",
        **changed,
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no file of keys"),
        ("{", "is no file of keys"),
        ("[]", "Expected `object`"),
        ("\udcff", "is no file of keys"),
        ('{"version": 1}', "hash_key"),
        (json.dumps({"version": 2, "hash_key": "A" * 43 + "=", "keys": []}), "its version is 2, not 1"),
        (json.dumps({"version": 1, "hash_key": "", "keys": []}), "`hash_key` has 0 bytes, not 32"),
        *(
            (json.dumps({"version": 1, "hash_key": "A" * 43 + "=", "keys": keys}), said)
            for keys, said in [
                ([entry(), entry()], "two keys have the same id"),
                ([entry(id="x")], "an id or a tenant"),
                ([entry(tenant="=cmd")], "an id or a tenant"),
                ([entry(tenant="a" * 65)], "an id or a tenant"),
                ([entry(salt="")], "a salt or a hash of the wrong length"),
                ([entry(created="2026-10-01T00:00:00")], "timezone"),
                ([entry(created="yesterday")], "RFC3339"),
                ([entry(unknown=1)], "unknown field"),
                ([entry(tenant=None)], "Expected `str`"),
            ]
        ),
    ],
)
def test_a_file_that_is_none_is_refused_by_its_name_and_let_be(path: Path, text: str, said: str) -> None:
    path.parent.mkdir()
    path.write_text(text, errors="surrogateescape")
    for act in (
        lambda: Keys.load(path),
        lambda: add_key(path, "red", "", NOW),
        lambda: revoke_key(path, "0123abcd", NOW),
    ):
        with pytest.raises(KeysError) as error:
            act()
        assert str(path) in str(error.value)
        assert said in str(error.value)
    assert path.read_text(errors="surrogateescape") == text


def test_what_cannot_be_read_or_written_is_said_so(path: Path, tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="cannot be read: Is a directory"):
        Keys.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(KeysError, match=r"cannot be changed: (Not a directory|File exists)"):
        add_key(tmp_path / "file" / "keys.json", "red", "", NOW)


@pytest.mark.parametrize("tenant", ["", "a b", "-a", ".a", "a/b", "a" * 65, "é", "a\n", "=1"])
def test_not_everything_is_a_tenants_name(path: Path, tenant: str) -> None:
    with pytest.raises(KeysError, match="is no tenant's name"):
        add_key(path, tenant, "", NOW)
    assert not path.exists()


@pytest.mark.parametrize("note", ["a\nb", "\x1b[31m", "x" * 201])
def test_a_note_is_one_line(path: Path, note: str) -> None:
    with pytest.raises(KeysError, match="a note is one line"):
        add_key(path, "red", note, NOW)


# The command


def keys(path: Path, *arguments: str) -> int:
    return run_keys([*arguments, "--keys", str(path)])


def test_the_command_prints_the_secret_once_alone(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys(path, "add", "red", "--name", "the [b]red[/b] team") == 0
    said = capsys.readouterr()
    secret = said.out.removesuffix("\n")
    assert Keys.load(path).tenant_of(secret) == "red"
    assert secret.split("_")[2] not in said.err
    assert "from now on, nobody is served without a key" in said.err
    assert keys(path, "add", "blue") == 0
    assert "the first one" not in capsys.readouterr().err
    assert keys(path, "list") == 0
    listed = capsys.readouterr()
    assert secret.split("_")[2] not in listed.out + listed.err
    lines = [line.split() for line in listed.out.splitlines() if line.strip()]
    assert lines[0] == ["id", "tenant", "note", "created", "revoked"]
    assert [line[1] for line in lines[2:]] == ["blue", "red"]
    assert "the [b]red[/b] team" in listed.out, "as it was given"


def test_the_command_revokes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys(path, "add", "red")
    secret = capsys.readouterr().out.strip()
    key_id = secret.split("_")[1]
    assert keys(path, "revoke", key_id) == 0
    assert f"key {key_id} of tenant red is revoked" in capsys.readouterr().err
    assert Keys.load(path).tenant_of(secret) is None
    assert keys(path, "revoke", key_id) == 0
    assert "was revoked already, 20" in capsys.readouterr().err
    assert keys(path, "revoke", "00000000") == 1
    assert "there is no key '00000000'" in capsys.readouterr().err
    assert keys(path, "list") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if key_id in line]
    assert len(line.split()) == 6, "two dates, of two words each"


def test_the_command_says_what_is_wrong(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys(path, "add", "no name") == 1
    assert "is no tenant's name" in capsys.readouterr().err
    assert keys(path, "list") == 0
    assert "no keys in" in capsys.readouterr().err
    assert run_keys(["fly"]) == 2
    assert "no command 'fly'" in capsys.readouterr().err
    assert run_keys([]) == 0
    path.parent.mkdir()
    path.write_text("{")
    assert keys(path, "list") == 1
    assert str(path) in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        keys(path, "revoke", "jk_0123abcd_secret")
    assert exit_.value.code == 2
    assert "secret" not in capsys.readouterr().err


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    for arguments, place in (
        ([], "home/justitia/keys.json"),
        (["--state", "memory:"], "home/justitia/keys.json"),
        (["--state", "redis://r"], "home/justitia/keys.json"),
        (["--state", f"sqlite:///{tmp_path}/other/state.db"], "other/keys.json"),
        (["--keys", str(tmp_path / "k.json"), "--state", "redis://r"], "k.json"),
    ):
        before = len(list(Keys.load(tmp_path / place)))
        assert run_keys(["add", "red", *arguments]) == 0
        assert len(list(Keys.load(tmp_path / place))) == before + 1
    monkeypatch.setenv("JUSTITIA_KEYS", str(tmp_path / "env.json"))
    assert run_keys(["add", "red"]) == 0
    assert Keys.load(tmp_path / "env.json").configured
    capsys.readouterr()
