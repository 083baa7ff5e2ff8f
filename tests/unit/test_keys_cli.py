"""`nearfield tenants`, `keys` and `usage`: from nothing to a first key, with no gateway."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from nearfield.api.keys import KeyTable, load_keys
from nearfield.api.passport import PassportKeys
from nearfield.cli.main import main
from nearfield.core.errors import NearfieldError
from nearfield.store.administration import read_pepper
from nearfield.store.ports import Usage
from nearfield.store.sql import Store

SECRET = re.compile(r"nf_([a-z2-7]{12})_[A-Za-z0-9]{43}")
GROUPS = {
    "tenants": ["create", "list", "change", "suspend", "resume", "add-product", "change-product",
                "products"],
    "keys": ["create", "list", "revoke", "rotate", "export", "passports"],
}  # fmt: skip
COMMANDS = [[group, command] for group, commands in GROUPS.items() for command in commands]


class Shell:
    """Runs commands against a store of their own."""

    def __init__(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.home = home
        self._capsys = capsys

    def __call__(self, *words: str, code: int = 0) -> str:
        """What a command says on stdout."""
        assert main(words) == code, self._capsys.readouterr()
        said = self._capsys.readouterr()
        self.error = said.err
        return said.out

    def json(self, *words: str, code: int = 0) -> Any:
        return json.loads(self(*words, "--json", code=code))

    def table(self) -> KeyTable:
        """What a gateway would know now."""
        store = Store(f"sqlite:///{self.home / 'nearfield.sqlite3'}")
        table = KeyTable(read_pepper(self.home / "key-pepper"))
        table.apply(store.directory.changes(0))
        store.close()
        return table

    def refusal(self, presented: str, now_s: float | None = None) -> str | None:
        """Why a gateway would refuse this key; None: it would not."""
        try:
            self.table().authenticate(b"Bearer " + presented.encode(), now_s or time.time())
        except NearfieldError as error:
            return error.code
        return None


@pytest.fixture
def shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    monkeypatch.setenv("NEARFIELD_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NEARFIELD_DATABASE_URL", raising=False)
    monkeypatch.delenv("NEARFIELD_KEY_PEPPER_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path / "home", capsys)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_teaches(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.count(f"nearfield {' '.join(words)}") >= 2, "usage, and at least one example"
    assert "--json" in text


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_alone_shows_its_commands(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([group]) == 0
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in GROUPS[group])


def test_from_nothing_to_a_first_key(shell: Shell) -> None:
    shell("keys", "create", "--tenant", "acme", code=1)
    assert "Create it: nearfield tenants create acme" in shell.error
    shell("tenants", "create", "acme", "--jurisdiction", "eu", "--requests-per-minute", "60")
    out = shell("keys", "create", "--tenant", "acme", "--label", "first")
    assert SECRET.fullmatch(out.strip()), "stdout is the key and nothing else"
    assert "not shown again" in shell.error
    principal = shell.table().authenticate(b"Bearer " + out.strip().encode(), time.time())
    assert (principal.tenant, principal.scopes) == ("acme", {"inference"})
    assert principal.jurisdictions == {"eu"}
    listed = shell("keys", "list")
    assert "first" in listed
    assert not SECRET.search(listed)
    assert out.strip()[16:] not in (shell.home / "nearfield.sqlite3").read_bytes().decode("latin-1")


def test_a_key_has_what_it_is_given(shell: Shell) -> None:
    shell("tenants", "create", "acme")
    shell("keys", "create", "--tenant", "acme", "--product", "web", code=1)
    assert "nearfield tenants add-product acme web" in shell.error
    shell("tenants", "add-product", "acme", "web", "--concurrent-streams", "3")
    made = shell.json(
        "keys", "create", "--tenant", "acme", "--product", "web", "--scope", "admin", "--scope",
        "inference", "--model", "chat", "--expires-in", "2h", "--tokens-per-minute", "1000",
    )  # fmt: skip
    assert made.items() >= {
        "tenant": "acme", "product": "web", "scopes": ["admin", "inference"], "models": ["chat"],
        "state": "active",
        "limits": {
            "requests_per_minute": None, "tokens_per_minute": 1000, "concurrent_streams": None
        },
    }.items()  # fmt: skip
    assert made["expires_s"] == pytest.approx(time.time() + 7200, abs=60)
    assert shell.refusal(made["key"], time.time() + 7300) == "key_expired"
    (listed,) = shell.json("keys", "list", "--tenant", "acme")["keys"]
    assert listed == {name: value for name, value in made.items() if name != "key"}


def test_rotation_and_revocation(shell: Shell) -> None:
    shell("tenants", "create", "acme")
    first = shell("keys", "create", "--tenant", "acme").strip()
    found = SECRET.fullmatch(first)
    assert found is not None
    second = shell("keys", "rotate", found[1], "--grace", "1h").strip()
    assert "former secret is good until" in shell.error
    assert [shell.refusal(key) for key in (first, second)] == [None, None]
    assert shell.refusal(first, time.time() + 3700) == "key_replaced"
    third = shell("keys", "rotate", found[1], "--grace", "0").strip()
    assert shell.refusal(second) == "key_replaced"
    assert shell("keys", "revoke", third).startswith(f"Key {found[1]} of acme"), "pasted whole"
    assert shell.refusal(third) == "key_revoked"
    shell("keys", "rotate", found[1], code=1)
    assert "create another" in shell.error
    shell("keys", "revoke", "nosuchkey", code=1)
    shell("keys", "revoke", f"nf_aaaaaaaaaaaa_{'s' * 43}", code=1)
    assert "sss" not in shell.error, "a secret is not repeated"


def test_tenants_change(shell: Shell) -> None:
    shell("tenants", "create", "acme", "--jurisdiction", "eu", "--requests-per-minute", "60")
    key = shell("keys", "create", "--tenant", "acme").strip()
    changed = shell.json("tenants", "change", "acme", "--tokens-per-minute", "9")
    assert changed["limits"] == {
        "requests_per_minute": 60, "tokens_per_minute": 9, "concurrent_streams": None
    }  # fmt: skip
    assert changed["jurisdictions"] == ["eu"]
    changed = shell.json("tenants", "change", "acme", "--requests-per-minute", "none", "--anywhere")
    assert changed["limits"]["requests_per_minute"] is None
    assert changed["jurisdictions"] is None
    shell("tenants", "suspend", "acme")
    assert shell.refusal(key) == "tenant_suspended"
    assert "suspended" in shell("tenants", "list")
    shell("tenants", "resume", "acme")
    assert shell.refusal(key) is None
    shell("tenants", "change", "acme", "--anywhere", "--jurisdiction", "eu", code=2)
    shell("tenants", "create", "acme", code=1)
    assert "There is a tenant 'acme' already." in shell.error
    shell("tenants", "add-product", "acme", "web")
    changed = shell.json("tenants", "change-product", "acme", "web", "--concurrent-streams", "2")
    assert shell.json("tenants", "products")["products"] == [changed]
    assert "acme" in shell("tenants", "products", "acme")
    shell("tenants", "products", "none", code=1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tenants", "create", "../x"], "name"),
        (["tenants", "create", "x", "--jurisdiction", "EU!"], "jurisdictions"),
        (["tenants", "create", "x", "--requests-per-minute", "-1"], "neither a whole number"),
        (["tenants", "create", "x", "--requests-per-minute", "9" * 20], "requests_per_minute"),
        (["keys", "create", "--tenant", "x", "--expires-in", "soon"], "write 90d, 12h"),
        (["keys", "create", "--tenant", "x", "--scope", "root"], "root"),
        (["keys", "create"], "--tenant"),
        (["usage", "--by", "colour"], "--by is 'colour'"),
        (["usage", "--since", "soon"], "--since is 'soon'"),
        (["keys", "list", "--store", "mysql://x"], "must be sqlite:////absolute/path"),
        (["keys", "list", "--store", "sqlite:///relative"], "must be sqlite:////absolute/path"),
    ],
)
def test_what_is_wrong_is_named(shell: Shell, words: list[str], said: str) -> None:
    shell(*words, code=2)
    assert said in shell.error
    assert "Traceback" not in shell.error


def test_another_store_is_named_by_its_url(shell: Shell, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'there.sqlite3'}"
    shell("tenants", "create", "there", "--store", url)
    assert [one["name"] for one in shell.json("tenants", "list", "--store", url)["tenants"]] == [
        "there"
    ]
    assert "No tenants yet" in shell("tenants", "list")
    assert "No keys yet" in shell("keys", "list")


def test_a_database_that_is_gone_is_told(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    shell("keys", "list", "--store", f"sqlite:///{tmp_path / 'folder'}", code=1)
    assert "The database cannot be reached" in shell.error


def test_export_is_what_a_region_reads(shell: Shell) -> None:
    shell("tenants", "create", "acme")
    good = shell("keys", "create", "--tenant", "acme").strip()
    revoked = shell.json("keys", "create", "--tenant", "acme")["id"]
    shell("keys", "revoke", revoked)
    assert shell.json("keys", "export", "keys.json") == {"file": "keys.json", "keys": 1}
    assert Path("keys.json").stat().st_mode & 0o777 == 0o600
    snapshot, pepper = load_keys(Path("keys.json").absolute())
    assert pepper is not None
    table = KeyTable(pepper)
    table.apply(snapshot)
    assert table.authenticate(b"Bearer " + good.encode(), time.time()).tenant == "acme"
    shell("keys", "export", "no/such/folder.json", code=2)


def test_passport_secrets_are_made_and_rotated(shell: Shell) -> None:
    file = "passports.json"
    shell("keys", "passports", file)
    assert Path(file).stat().st_mode & 0o777 == 0o600
    shell("keys", "passports", file, code=1)
    assert "nothing is overwritten" in shell.error
    for step in ("--promote", "--retire"):
        shell("keys", "passports", file, step, code=1)
        assert "not begun: --next" in shell.error
    first = PassportKeys.load(Path(file).absolute()).signing
    shell("keys", "passports", file, "--next")
    shell("keys", "passports", file, "--retire", code=1)
    assert "--promote first" in shell.error
    told = shell.json("keys", "passports", file, "--promote")
    assert told["signing"] != first
    shell("keys", "passports", file, "--next", code=1)
    shell("keys", "passports", file, "--retire")
    left = PassportKeys.load(Path(file).absolute())
    assert left.kids == (told["signing"],)
    assert left.signing == told["signing"]


def test_usage_is_summed(shell: Shell) -> None:
    assert "Nothing was used" in shell("usage")
    shell("tenants", "create", "acme")
    store = Store(f"sqlite:///{shell.home / 'nearfield.sqlite3'}")
    store.ledger.append(
        [
            Usage(
                f"r{n}", "acme", None, "k", model, "1", "eu", "e", "chat", "ok", 10, 1, 5, 1e9, 0.5,
                model == "embed",
            )
            for n, model in enumerate(["chat", "chat", "embed"])
        ]
    )  # fmt: skip
    store.close()
    assert shell("usage").splitlines()[1].split() == ["acme", "chat", "2", "20", "2", "10", "1.0"]
    told = shell.json("usage", "--by", "product", "--tenant", "acme", "--since", "2001-09-09")
    assert told == {
        "by": ["product"],
        "usage": [
            {"product": None, "requests": 3, "guessed_requests": 1, "input_tokens": 30,
             "cached_tokens": 3, "output_tokens": 15, "duration_s": 1.5},
        ],
    }  # fmt: skip
    assert "Nothing was used" in shell("usage", "--until", "2001-09-09")
    shell("usage", "--tenant", "none", code=1)
