"""Who is told where the replicas are."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from nearfield.api.keys import Key, Scope, Snapshot, Tenant, key_mac, new_key, new_key_id, save_keys
from nearfield.api.load import gateways_passport
from nearfield.api.passport import Passport, PassportExpired, PassportKeys
from nearfield.control.entry import Entry
from nearfield.core.errors import BadRequest, Forbidden, Unauthenticated
from nearfield.core.settings import Settings

PEPPER = b"p" * 32


def settings(home: Path, *, passports: Path | None = None, keys: Path | None = None) -> Settings:
    return Settings(home, "sqlite://", home / "pepper", passports, keys)


def signed(keys: PassportKeys, **facts: object) -> str:
    passport = gateways_passport("q", now_ms=int(time.time() * 1000), timeout_ms=1000)
    named = {name: getattr(passport, name) for name in Passport.__slots__}
    return keys.sign(Passport(**{**named, **facts})).decode()


def a_key(*scopes: Scope) -> tuple[Snapshot, str]:
    key_id = new_key_id()
    presented = new_key(key_id)
    digest = key_mac(PEPPER)(presented.encode()).hex()
    key = Key(key_id, "t", None, "", frozenset(scopes), None, digest)
    return Snapshot(1, (Tenant("t"),), (), (key,)), f"Bearer {presented}"


def test_without_secrets_anybody_is_told(tmp_path: Path) -> None:
    Entry(settings(tmp_path)).admit(None, None)


def test_with_passports_only_gateways_are(tmp_path: Path) -> None:
    file, keys = tmp_path / "passports", PassportKeys.generate()
    keys.save(file)
    entry = Entry(settings(tmp_path, passports=file))
    entry.admit(signed(keys), None)
    with pytest.raises(Unauthenticated):
        entry.admit(None, "Bearer x")
    with pytest.raises(Forbidden):
        entry.admit(signed(keys, tenant="t"), None)
    with pytest.raises(Unauthenticated):
        entry.admit(signed(PassportKeys.generate()), None)
    with pytest.raises(PassportExpired):
        entry.admit(signed(keys, expires_ms=1), None)


def test_with_keys_platform_administrators_are(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    snapshot, presented = a_key("platform")
    save_keys(file, snapshot, pepper=PEPPER)
    entry = Entry(settings(tmp_path, keys=file))
    entry.admit(None, presented)
    with pytest.raises(Unauthenticated):
        entry.admit(None, None)
    snapshot, presented = a_key("inference")
    save_keys(file, snapshot, pepper=PEPPER)
    entry.refresh()
    with pytest.raises(Forbidden):
        entry.admit(None, presented)


def test_secrets_that_were_replaced_hold_and_broken_ones_change_nothing(tmp_path: Path) -> None:
    file, keys = tmp_path / "passports", PassportKeys.generate()
    keys.save(file)
    entry = Entry(settings(tmp_path, passports=file))
    newer = keys.with_next().promoted()
    newer.save(file)
    os.utime(file, (1, 1))  # whatever the clock's resolution, it is another file
    entry.refresh()
    entry.admit(signed(newer), None)
    for broken in (b"{}", None):
        if broken is None:
            file.unlink()
        else:
            file.write_bytes(broken)
            os.utime(file, (2, 2))
        entry.refresh()
        entry.admit(signed(newer), None)


def test_a_region_that_should_be_closed_does_not_open(tmp_path: Path) -> None:
    with pytest.raises(BadRequest):
        Entry(settings(tmp_path, passports=tmp_path / "none"))
    snapshot, _ = a_key("platform")
    save_keys(tmp_path / "keys", snapshot, pepper=None)
    with pytest.raises(BadRequest):
        Entry(settings(tmp_path, keys=tmp_path / "keys"))
