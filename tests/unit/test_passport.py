"""Passports: what was signed is what is granted, for a short while, and nothing else is."""

from __future__ import annotations

import base64
import hmac
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nearfield.api.passport import (
    CLOCK_SKEW_MS,
    MAX_BYTES,
    Passport,
    PassportError,
    PassportExpired,
    PassportForged,
    PassportKeys,
    PassportKeyUnknown,
    PassportMalformed,
    PassportNotYetValid,
)
from nearfield.api.signing import Mac
from nearfield.core.errors import BadRequest, Forbidden, Unauthenticated

NOW_MS = 1_800_000_000_000
PASSPORT = Passport(
    tenant="acme",
    product="web",
    key_id="abcdefgh2345",
    models=("chat", "embed"),
    jurisdictions=("eu",),
    request_id="req-1",
    criticality="default",
    issued_ms=NOW_MS,
    expires_ms=NOW_MS + 60_000,
    deadline_ms=NOW_MS + 120_000,
)
KEYS = PassportKeys.generate()
names = st.text(max_size=40)


@given(
    st.builds(
        Passport,
        tenant=names,
        product=st.none() | names,
        key_id=names,
        models=st.none() | st.lists(names, max_size=5).map(tuple),
        jurisdictions=st.none() | st.lists(names, max_size=3).map(tuple),
        request_id=names,
        criticality=st.sampled_from(["critical", "default", "sheddable"]),
        issued_ms=st.just(NOW_MS),
        expires_ms=st.integers(NOW_MS, 2**53),
        deadline_ms=st.integers(0, 2**53),
    )
)
def test_what_was_signed_is_what_is_read(passport: Passport) -> None:
    header = KEYS.sign(passport)
    assert KEYS.verify(header, now_ms=NOW_MS) == passport
    assert all(0x21 <= byte <= 0x7E and byte not in b'",;' for byte in header), "fits any header"


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_bit_of_it_can_be_changed(position: int, change: int) -> None:
    header = bytearray(KEYS.sign(PASSPORT))
    header[position % len(header)] ^= change
    with pytest.raises(PassportError):
        KEYS.verify(bytes(header), now_ms=NOW_MS)


@given(st.binary(max_size=200))
def test_rubbish_is_refused_in_so_many_words(header: bytes) -> None:
    with pytest.raises(PassportError):
        KEYS.verify(header, now_ms=NOW_MS)


def test_the_signature_is_an_hmac_that_anybody_can_compute() -> None:
    """The format is a contract with gateways and regions of another version."""
    secret = bytes(range(32))
    keys = PassportKeys({"k1": secret}, "k1")
    version, kid, payload, mac = keys.sign(PASSPORT).split(b".")
    assert (version, kid) == (b"1", b"k1")
    signed = b"nearfield passport\n1.k1." + payload
    expected = base64.urlsafe_b64encode(hmac.digest(secret, signed, "sha256")).rstrip(b"=")
    assert mac == expected
    assert json.loads(base64.urlsafe_b64decode(payload + b"=="))[:6] == [
        "acme",
        "web",
        "abcdefgh2345",
        ["chat", "embed"],
        ["eu"],
        "req-1",
    ]


def test_it_expires_with_an_allowance_for_clocks() -> None:
    header = KEYS.sign(PASSPORT)
    last_ms = PASSPORT.expires_ms + CLOCK_SKEW_MS
    assert KEYS.verify(header, now_ms=last_ms)
    with pytest.raises(PassportExpired):
        KEYS.verify(header, now_ms=last_ms + 1)
    first_ms = PASSPORT.issued_ms - CLOCK_SKEW_MS
    assert KEYS.verify(header, now_ms=first_ms)
    with pytest.raises(PassportNotYetValid):
        KEYS.verify(header, now_ms=first_ms - 1)


def test_errors_tell_what_is_wrong_and_are_all_401() -> None:
    header = KEYS.sign(PASSPORT)
    other = PassportKeys.generate()
    with pytest.raises(PassportKeyUnknown) as unknown:
        other.verify(header, now_ms=NOW_MS)
    forged = PassportKeys({KEYS.signing: b"x" * 32}, KEYS.signing).sign(PASSPORT)
    with pytest.raises(PassportForged) as wrong:
        KEYS.verify(forged, now_ms=NOW_MS)
    with pytest.raises(PassportMalformed):
        KEYS.verify(b"2" + header[1:], now_ms=NOW_MS)
    with pytest.raises(PassportMalformed):
        KEYS.verify(header + b"A" * MAX_BYTES, now_ms=NOW_MS)
    for error in (unknown.value, wrong.value):
        assert isinstance(error, Unauthenticated)
        assert error.status == 401
        assert error.code is not None
        assert error.code.startswith("passport_")
        assert type(pickle.loads(pickle.dumps(error))) is type(error)


def test_a_passport_of_another_version_of_the_payload_is_malformed() -> None:
    secret = b"s" * 32
    keys = PassportKeys({"k": secret}, "k")
    for content in (["acme"], {"a": 1}, 7, [None] * 40, ["a", None, "b", 3, None]):
        payload = base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=")
        signed = b"1.k." + payload
        mac = hmac.digest(secret, b"nearfield passport\n" + signed, "sha256")
        header = signed + b"." + base64.urlsafe_b64encode(mac).rstrip(b"=")
        with pytest.raises(PassportMalformed):
            keys.verify(header, now_ms=NOW_MS)


def test_models_and_jurisdictions_are_bounds() -> None:
    PASSPORT.require_model("chat")
    PASSPORT.require_jurisdiction("eu")
    with pytest.raises(Forbidden, match="other models"):
        PASSPORT.require_model("other")
    with pytest.raises(Forbidden, match=r"may not leave eu, and this region is in us"):
        PASSPORT.require_jurisdiction("us")
    anything = replace(PASSPORT, models=None, jurisdictions=None)
    anything.require_model("other")
    anything.require_jurisdiction("us")
    nothing = replace(PASSPORT, models=(), jurisdictions=())
    with pytest.raises(Forbidden):
        nothing.require_model("chat")
    with pytest.raises(Forbidden):
        nothing.require_jurisdiction("eu")


def test_time_left_is_of_one_clock() -> None:
    assert PASSPORT.timeout_s == 120.0


class TestRotation:
    def test_no_step_needs_everybody_to_take_it_at_once(self) -> None:
        """Gateways and regions are each at one of two neighbouring steps."""
        old = PassportKeys.generate()
        both = old.with_next()
        promoted = both.promoted()
        new = promoted.without_previous()
        for earlier, later in ((old, both), (both, promoted)):
            for signer in (earlier, later):
                for verifier in (earlier, later):
                    assert verifier.verify(signer.sign(PASSPORT), now_ms=NOW_MS)
        assert old.signing == both.signing != promoted.signing == new.signing
        assert new.verify(promoted.sign(PASSPORT), now_ms=NOW_MS)
        with pytest.raises(PassportKeyUnknown):
            new.verify(old.sign(PASSPORT), now_ms=NOW_MS)

    def test_there_are_never_more_than_two(self) -> None:
        assert len(KEYS.with_next().with_next().with_next().kids) == 2


class TestFile:
    def test_it_is_private_and_complete(self, tmp_path: Path) -> None:
        path = tmp_path / "passport-keys.json"
        both = KEYS.with_next()
        both.save(path)
        assert path.stat().st_mode & 0o777 == 0o600
        read = PassportKeys.load(path)
        assert read.kids == both.kids
        assert read.signing == both.signing
        assert read.verify(both.promoted().sign(PASSPORT), now_ms=NOW_MS) == PASSPORT
        assert [file.name for file in tmp_path.iterdir()] == [path.name]

    def test_one_that_others_may_read_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "keys.json"
        KEYS.save(path)
        path.chmod(0o640)
        with pytest.raises(BadRequest, match=r"can be read by others \(mode 0640\): chmod 600"):
            PassportKeys.load(path)

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("", "is not JSON"),
            ("[]", "malformed"),
            ('{"signing": "k", "keys": {"k": "!"}}', "malformed"),
            ('{"signing": "k", "keys": {"k": 3}}', "malformed"),
            ('{"signing": "k", "keys": {"k": "c2hvcnQ="}}', "at least 32 bytes, not 5"),
            ('{"signing": "k", "keys": {}}', "1 to 2 passport keys, not 0"),
            ('{"signing": "x", "keys": {"k": "%s"}}' % ("A" * 44), "'x' is not among"),
            ('{"signing": "a.b", "keys": {"a.b": "%s"}}' % ("A" * 44), "must match"),
        ],
    )
    def test_what_is_wrong_with_one_is_told(self, tmp_path: Path, content: str, says: str) -> None:
        path = tmp_path / "keys.json"
        path.touch(mode=0o600)
        path.write_text(content)
        with pytest.raises(BadRequest, match=says):
            PassportKeys.load(path)

    def test_one_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(BadRequest, match="cannot be read"):
            PassportKeys.load(tmp_path / "none")


@given(st.binary(min_size=32, max_size=200), st.binary(max_size=100), st.binary(max_size=300))
def test_the_mac_is_the_standard_one(key: bytes, domain: bytes, message: bytes) -> None:
    assert Mac(key, domain)(message) == hmac.digest(key, domain + message, "sha256")


def test_a_short_secret_is_none() -> None:
    with pytest.raises(ValueError, match="at least 32 bytes"):
        Mac(b"short")
