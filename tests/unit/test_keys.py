"""API keys: who is let in, as whom, and what the others are told."""

from __future__ import annotations

import random
import re
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nearfield.api.keys import (
    Key,
    KeyTable,
    Product,
    Scope,
    Snapshot,
    Tenant,
    key_mac,
    load_keys,
    new_key,
    new_key_id,
    save_keys,
    usable,
)
from nearfield.core.errors import (
    BadRequest,
    Forbidden,
    NearfieldError,
    Unauthenticated,
    Unavailable,
)
from nearfield.policy.quota import Limits

PEPPER = b"p" * 32
NOW_S = 1_800_000_000.0
ACME = Tenant("acme", jurisdictions=frozenset({"eu"}), limits=Limits(requests_per_minute=100))
WEB = Product("acme", "web", limits=Limits(tokens_per_minute=1000))


def made(**fields: Any) -> tuple[Key, str]:
    """A key of acme's, and what its owner holds."""
    key_id = fields.pop("id", None) or new_key_id()
    presented = new_key(key_id)
    scopes: frozenset[Scope] = frozenset({"inference"})
    key = Key(
        **{
            "id": key_id,
            "tenant": "acme",
            "product": None,
            "label": "",
            "scopes": scopes,
            "models": None,
            "digest": digest(presented),
            **fields,
        }
    )
    return key, presented


def digest(presented: str) -> str:
    return key_mac(PEPPER)(presented.encode()).hex()


def table(*keys: Key, tenant: Tenant = ACME) -> KeyTable:
    made_table = KeyTable(PEPPER)
    made_table.apply(Snapshot(1, (tenant,), (WEB,), keys))
    return made_table


def bearer(presented: str) -> bytes:
    return b"Bearer " + presented.encode()


def refused(keys: KeyTable, authorization: bytes | None, now_s: float = NOW_S) -> NearfieldError:
    with pytest.raises(NearfieldError) as error:
        keys.authenticate(authorization, now_s)
    return error.value


def test_a_key_looks_as_it_should() -> None:
    key, presented = made()
    assert re.fullmatch(r"nf_[a-z2-7]{12}_[A-Za-z0-9]{43}", presented)
    assert presented.split("_")[1] == key.id
    assert new_key(key.id) != presented
    assert presented not in repr(key)
    assert key.digest not in repr(key)


def test_its_owner_is_let_in() -> None:
    key, presented = made(product="web", models=frozenset({"chat"}))
    principal = table(key).authenticate(bearer(presented), NOW_S)
    assert (principal.tenant, principal.product, principal.key_id) == ("acme", "web", key.id)
    assert principal.jurisdictions == {"eu"}
    principal.require_scope("inference")
    principal.require_model("chat")
    with pytest.raises(Forbidden, match="would need that scope"):
        principal.require_scope("admin")
    with pytest.raises(Forbidden, match="other models"):
        principal.require_model("embed")


def test_limits_are_those_of_key_product_and_tenant() -> None:
    key, presented = made(product="web", limits=Limits(concurrent_streams=3))
    principal = table(key).authenticate(bearer(presented), NOW_S)
    assert principal.limits == (
        (f"key:{key.id}", Limits(concurrent_streams=3)),
        ("product:acme/web", WEB.limits),
        ("tenant:acme", ACME.limits),
    )
    without, presented = made()
    principal = table(without, tenant=Tenant("acme")).authenticate(bearer(presented), NOW_S)
    assert principal.limits == ()


@pytest.mark.parametrize("scheme", ["bearer ", "BEARER  ", " Bearer ", "Bearer  "])
def test_the_scheme_is_read_as_http_says(scheme: str) -> None:
    key, presented = made()
    assert table(key).authenticate(f"{scheme}{presented} ".encode(), NOW_S).key_id == key.id


@pytest.mark.parametrize("authorization", [None, b"", b"Bearer", b"Bearer ", b"Basic bmY6eA=="])
def test_without_a_key(authorization: bytes | None) -> None:
    error = refused(table(), authorization)
    assert (error.status, error.code) == (401, "missing_api_key")


def test_a_wrong_secret_and_an_unknown_id_look_the_same() -> None:
    key, presented = made()
    keys = table(key)
    told = {
        (type(error), error.message, error.code)
        for error in (
            refused(keys, bearer(new_key(key.id))),
            refused(keys, bearer(new_key(new_key_id()))),
            refused(keys, bearer(presented[:-1])),
            refused(keys, bearer(presented + "x")),
            refused(keys, bearer(f"nf_{key.id}_")),
            refused(keys, bearer(presented.replace("nf_", "sk-"))),
            refused(keys, bearer("none")),
            refused(keys, bearer("' OR '1'='1")),
            refused(keys, b"Bearer \xff\x00\r\n"),
            refused(keys, bearer("x" * 100_000)),
        )
    }
    assert told == {
        (
            Unauthenticated,
            "The API key is not valid: check that it was copied whole.",
            "invalid_api_key",
        )
    }


def test_an_expired_key() -> None:
    key, presented = made(expires_s=NOW_S)
    keys = table(key)
    assert keys.authenticate(bearer(presented), NOW_S - 0.001)
    assert refused(keys, bearer(presented)).code == "key_expired"


def test_a_revoked_key_whatever_the_clock_says() -> None:
    key, presented = made(revoked_s=NOW_S)
    assert refused(table(key), bearer(presented), now_s=NOW_S - 86400).code == "key_revoked"


def test_only_its_owner_learns_that_it_was_revoked() -> None:
    key, _ = made(revoked_s=NOW_S)
    assert refused(table(key), bearer(new_key(key.id))).code == "invalid_api_key"


def test_a_rotated_key_has_two_secrets_for_a_while() -> None:
    key, former = made()
    current = new_key(key.id)
    rotated = replace(
        key, digest=digest(current), previous_digest=key.digest, previous_until_s=NOW_S
    )
    keys = table(rotated)
    assert keys.authenticate(bearer(current), NOW_S).key_id == key.id
    assert keys.authenticate(bearer(former), NOW_S - 1).key_id == key.id
    assert refused(keys, bearer(former)).code == "key_replaced"
    revoked = table(replace(rotated, revoked_s=NOW_S - 2))
    for presented in (current, former):
        assert refused(revoked, bearer(presented), NOW_S - 1).code == "key_revoked"


def test_a_suspended_tenant() -> None:
    key, presented = made()
    error = refused(table(key, tenant=replace(ACME, suspended=True)), bearer(presented))
    assert (error.status, error.code) == (403, "tenant_suspended")


def test_a_key_whose_tenant_is_not_known_is_not_let_in() -> None:
    key, presented = made(tenant="nobody")
    assert refused(table(key), bearer(presented)).code == "tenant_suspended"


def test_another_pepper_lets_nobody_in() -> None:
    key, presented = made()
    other = KeyTable(b"q" * 32)
    other.apply(Snapshot(1, (ACME,), (), (key,)))
    assert refused(other, bearer(presented)).code == "invalid_api_key"


def test_what_changes_is_taken_over() -> None:
    key, presented = made(product="web")
    keys = table(key)
    keys.apply(Snapshot(2, tenants=(replace(ACME, jurisdictions=frozenset({"us"})),)))
    assert keys.authenticate(bearer(presented), NOW_S).jurisdictions == {"us"}
    keys.apply(Snapshot(3, products=(replace(WEB, limits=Limits(tokens_per_minute=7)),)))
    limits = dict(keys.authenticate(bearer(presented), NOW_S).limits)
    assert limits["product:acme/web"].tokens_per_minute == 7
    keys.apply(Snapshot(4, tenants=(replace(ACME, suspended=True),)))
    assert refused(keys, bearer(presented)).status == 403
    keys.apply(Snapshot(5, tenants=(ACME,)))
    assert keys.authenticate(bearer(presented), NOW_S)
    keys.apply(Snapshot(6, keys=(replace(key, revoked_s=NOW_S),)))
    assert refused(keys, bearer(presented)).code == "key_revoked"
    assert (keys.revision, len(keys)) == (6, 1)


def test_a_closed_table_lets_nobody_in_and_says_why() -> None:
    key, presented = made()
    keys = table(key)
    keys.closed = True
    error = refused(keys, bearer(presented))
    assert isinstance(error, Unavailable)
    assert error.retry_after_s is not None
    assert refused(keys, bearer(new_key(key.id))).status == 401


def test_errors_do_not_repeat_what_was_presented() -> None:
    key, presented = made(revoked_s=NOW_S)
    for text in (presented, new_key(key.id)):
        assert text not in refused(table(key), bearer(text)).message


class TestFile:
    def test_what_was_written_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "keys.json"
        key, presented = made(
            product="web",
            models=frozenset({"chat", "embed"}),
            scopes=frozenset({"inference", "admin"}),
            expires_s=NOW_S + 5,
            limits=Limits(1, 2, 3),
        )
        snapshot = Snapshot(9, (ACME,), (WEB,), (key,))
        save_keys(path, snapshot, pepper=PEPPER)
        assert path.stat().st_mode & 0o777 == 0o600
        assert load_keys(path) == (snapshot, PEPPER)
        assert presented.split("_")[2] not in path.read_text()
        save_keys(path, snapshot, pepper=None)
        assert load_keys(path) == (snapshot, None)

    def test_what_nobody_can_use_is_left_out(self) -> None:
        good, revoked, expired = (
            made()[0],
            made(revoked_s=NOW_S - 9)[0],
            made(expires_s=NOW_S)[0],
        )
        assert usable(Snapshot(1, keys=(good, revoked, expired)), NOW_S).keys == (good,)

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("{", "is not JSON"),
            ("[]", "another version"),
            ('{"version": 2}', "another version"),
            ('{"version": 1, "keys": [{"id": 1}]}', "malformed"),
            ('{"version": 1, "pepper": "xyz"}', "malformed"),
        ],
    )
    def test_what_is_wrong_is_told(self, tmp_path: Path, content: str, says: str) -> None:
        path = tmp_path / "keys.json"
        path.touch(mode=0o600)
        path.write_text(content)
        with pytest.raises(BadRequest, match=says):
            load_keys(path)

    def test_one_that_others_may_read_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "keys.json"
        save_keys(path, Snapshot(), pepper=PEPPER)
        path.chmod(0o604)
        with pytest.raises(BadRequest, match="chmod 600"):
            load_keys(path)


def test_time_does_not_tell_how_much_of_a_key_is_right() -> None:
    """20,000 refusals of two kinds, interleaved: the first characters of the secret right, or none
    (Welch's t). The best of three: a busy machine is noise, a leak is not."""
    key, presented = made()
    keys = table(key)
    wrong = presented[:16] + new_key(key.id)[16:]
    close = presented[:-1] + ("x" if presented[-1] != "x" else "y")
    assert min(abs(_welch(keys, bearer(wrong), bearer(close))) for _ in range(3)) < 4.5


def _welch(keys: KeyTable, *candidates: bytes) -> float:
    times_ns: tuple[list[int], list[int]] = ([], [])
    order = [0, 1] * 10_000
    random.Random(1).shuffle(order)
    for which in order:
        candidate = candidates[which]
        started_ns = time.perf_counter_ns()
        try:
            keys.authenticate(candidate, NOW_S)
        except Unauthenticated:
            times_ns[which].append(time.perf_counter_ns() - started_ns)
    trimmed = [sorted(times)[: int(len(times) * 0.9)] for times in times_ns]  # without interrupts
    means = [statistics.fmean(times) for times in trimmed]
    errors = [statistics.variance(times) / len(times) for times in trimmed]
    return float((means[0] - means[1]) / sum(errors) ** 0.5)
