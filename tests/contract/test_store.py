"""What every store does: the same tests on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import msgspec
import pytest
from nearfield.api.keys import Key, Product, Snapshot, Tenant
from nearfield.core.errors import Conflict, NotFound, Unavailable
from nearfield.policy.quota import LEASE_S, Claim, Dimension, Limits
from nearfield.store import migrations, schema
from nearfield.store.database import Database
from nearfield.store.idempotency import DOUBT_S
from nearfield.store.ports import Answered, Claimed, InFlight, OtherRequest, Usage
from nearfield.store.sql import Store
from sqlalchemy import exc, inspect, text

from tests.support.databases import Postgres

LEASE: dict[str, Any] = {"fingerprint": "f", "owner": "g1", "lease_s": 30.0}


def key(key_id: str = "k1", **fields: Any) -> Key:
    scopes = frozenset({"inference"})
    made: dict[str, Any] = {
        "id": key_id,
        "tenant": "acme",
        "product": None,
        "label": "",
        "scopes": scopes,
        "models": None,
        "digest": "00" * 32,
        **fields,
    }
    return Key(**made)


# ---- the schema ---------------------------------------------------------------------------------


def test_the_migrations_make_what_the_code_expects(url: str) -> None:
    database = Database(url)
    with database.reading() as connection:
        inspector = inspect(connection)
        assert set(inspector.get_table_names()) == set(schema.metadata.tables)
        for name, table in schema.metadata.tables.items():
            # SQLite thinks that a primary key of text may be NULL; PostgreSQL is asked, too.
            primary = {column.name for column in table.primary_key.columns}
            made = {
                column["name"]: (
                    column["type"].python_type,
                    column["nullable"] and column["name"] not in primary,
                )
                for column in inspector.get_columns(name)
            }
            assert made == {
                column.name: (column.type.python_type, column.nullable) for column in table.columns
            }
            found = inspector.get_pk_constraint(name)["constrained_columns"]
            assert found == [column.name for column in table.primary_key.columns]
            indexes = {index["name"] for index in inspector.get_indexes(name)}
            assert indexes == {index.name for index in table.indexes}
            foreign = {tuple(k["constrained_columns"]) for k in inspector.get_foreign_keys(name)}
            assert foreign == {
                tuple(constraint.column_keys) for constraint in table.foreign_key_constraints
            }
    database.close()


def test_gateways_that_start_at_once_migrate_once(url: str) -> None:
    stores = [Store(url) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        revisions = list(threads.map(lambda one: one.directory.revision(), stores))
    assert revisions == [1] * 4
    for one in stores:
        one.close()


def test_a_database_is_upgraded_step_by_step(url: str) -> None:
    database = Database(url)
    database._ready = True  # its own migration is not wanted here
    steps = migrations.MIGRATIONS
    with database.writing() as connection:
        assert migrations.migrate(connection, steps[:1]) == 1
    more = (*steps, "CREATE TABLE later (name TEXT PRIMARY KEY)")
    for expected in (len(steps), 0):
        with database.writing() as connection:
            assert migrations.migrate(connection, more) == expected
    with database.writing() as connection, pytest.raises(Unavailable, match="newer nearfield"):
        migrations.migrate(connection)
    database.close()


def test_a_migration_that_fails_leaves_nothing_behind(url: str) -> None:
    database = Database(url)
    database._ready = True
    broken = ("CREATE TABLE one (name TEXT PRIMARY KEY); CREATE TABLE one (name TEXT)",)
    with (
        pytest.raises((Unavailable, exc.ProgrammingError)),
        database.writing() as connection,
    ):
        migrations.migrate(connection, broken)
    with database.reading() as connection:
        assert inspect(connection).get_table_names() == []
    database.close()


# ---- tenants, products, keys --------------------------------------------------------------------


def test_tenants(store: Store) -> None:
    directory = store.directory
    acme = Tenant("acme", frozenset({"eu", "ch"}), False, Limits(1, 2, 3), created_s=5.5)
    directory.add_tenant(acme)
    directory.add_tenant(Tenant("Zeta", None))
    assert directory.tenant("acme") == acme
    assert {tenant.name for tenant in directory.tenants()} == {"acme", "Zeta"}
    with pytest.raises(Conflict, match="There is a tenant 'acme' already"):
        directory.add_tenant(acme)
    changed = replace(acme, jurisdictions=frozenset(), suspended=True, limits=Limits(None, 7))
    assert directory.change_tenant("acme", lambda _: changed) == changed
    assert directory.tenant("acme") == changed
    directory.change_tenant("acme", lambda t: replace(t, limits=Limits()))
    assert directory.tenant("acme").limits == Limits()
    with pytest.raises(NotFound, match="There is no tenant 'nobody'"):
        directory.tenant("nobody")
    with pytest.raises(NotFound):
        directory.change_tenant("nobody", lambda t: t)


def test_products(store: Store) -> None:
    directory = store.directory
    for name in ("acme", "zeta"):
        directory.add_tenant(Tenant(name))
    web = Product("acme", "web", Limits(tokens_per_minute=10**12), 1.0)
    directory.add_product(web)
    directory.add_product(Product("zeta", "web"))
    assert directory.product("acme", "web") == web
    assert directory.products("acme") == [web]
    assert len(directory.products()) == 2
    directory.change_product("acme", "web", lambda p: replace(p, limits=Limits(9)))
    assert directory.product("acme", "web").limits == Limits(9)
    assert directory.product("zeta", "web").limits == Limits()
    with pytest.raises(Conflict, match="'acme/web' already"):
        directory.add_product(web)
    with pytest.raises(NotFound, match="tenant"):
        directory.add_product(Product("nobody", "web"))
    for action in (
        lambda: directory.change_product("acme", "app", lambda p: p),
        lambda: directory.product("acme", "app"),
    ):
        with pytest.raises(NotFound, match="no product 'acme/app'"):
            action()


def test_keys(store: Store) -> None:
    directory = store.directory
    directory.add_tenant(Tenant("acme"))
    directory.add_product(Product("acme", "web"))
    full = key(
        product="web",
        label="CI's",
        scopes=frozenset({"inference", "admin"}),
        models=frozenset({"chat", "embed"}),
        limits=Limits(concurrent_streams=0),
        created_s=3.25,
        expires_s=99.0,
    )
    directory.add_key(full)
    directory.add_key(key("k2", models=frozenset(), created_s=9.0))
    assert directory.key("k1") == full
    assert [each.id for each in directory.keys(None)] == ["k1", "k2"]
    assert directory.keys("other") == []
    assert directory.key("k2").models == frozenset()
    with pytest.raises(NotFound, match="tenant"):
        directory.add_key(key("k3", tenant="nobody"))
    with pytest.raises(NotFound, match="product 'acme/app'"):
        directory.add_key(key("k3", product="app"))
    with pytest.raises(NotFound, match="no key 'k9'"):
        directory.key("k9")


def test_lists_come_in_pages(store: Store) -> None:
    directory = store.directory
    names = [f"t{n}" for n in range(5)]
    for name in reversed(names):
        directory.add_tenant(Tenant(name))
        directory.add_product(Product("t4", name))
    for n in range(6):  # two of one moment each
        directory.add_key(key(f"k{n}", tenant=f"t{n % 2}", created_s=float(n // 2)))
    directory.add_key(key("a9", tenant="t0", created_s=99.125))
    assert [t.name for t in directory.tenants(after="t1", limit=2)] == ["t2", "t3"]
    assert [p.name for p in directory.products("t4", after="t3")] == ["t4"]
    assert [p.name for p in directory.products("t4", limit=1)] == ["t0"]
    ids = [each.id for each in directory.keys(None)]
    assert ids == ["k0", "k1", "k2", "k3", "k4", "k5", "a9"]
    for at, after in enumerate(ids):
        assert [k.id for k in directory.keys(after=after, limit=2)] == ids[at + 1 : at + 3]
    assert [k.id for k in directory.keys("t0", after="k2")] == ["k4", "a9"]
    for tenant, after in ((None, "k9"), ("t0", "k1")):
        with pytest.raises(NotFound, match=f"no key '{after}'"):
            directory.keys(tenant, after=after)


def test_keys_are_rotated_and_revoked(store: Store) -> None:
    directory = store.directory
    directory.add_tenant(Tenant("acme"))
    directory.add_key(key(digest="aa" * 32))
    rotated = directory.rotate_key("k1", "bb" * 32, now_s=100.0, grace_s=50.0)
    assert rotated == directory.key("k1")
    assert (rotated.digest, rotated.previous_digest) == ("bb" * 32, "aa" * 32)
    assert (rotated.rotated_s, rotated.previous_until_s) == (100.0, 150.0)
    again = directory.rotate_key("k1", "cc" * 32, now_s=110.0, grace_s=50.0)
    assert again.previous_digest == "bb" * 32, "the one before is gone at once"
    revoked = directory.revoke_key("k1", now_s=200.0)
    assert revoked.revoked_s == 200.0
    assert directory.revoke_key("k1", now_s=300.0) == revoked == directory.key("k1")
    with pytest.raises(Conflict, match="revoked"):
        directory.rotate_key("k1", "dd" * 32, now_s=400.0, grace_s=50.0)
    for action in (
        lambda: directory.revoke_key("k9", now_s=1.0),
        lambda: directory.rotate_key("k9", "", now_s=1.0, grace_s=1.0),
    ):
        with pytest.raises(NotFound):
            action()


def test_whoever_follows_sees_every_change_once(store: Store) -> None:
    directory = store.directory
    assert directory.changes(0) == Snapshot(directory.revision())
    steps: list[tuple[Callable[[], Any], tuple[int, int, int]]] = [
        (lambda: directory.add_tenant(Tenant("acme")), (1, 0, 0)),
        (lambda: directory.add_product(Product("acme", "web")), (0, 1, 0)),
        (lambda: directory.add_key(key()), (0, 0, 1)),
        (lambda: directory.change_tenant("acme", lambda t: replace(t, suspended=True)), (1, 0, 0)),
        (
            lambda: directory.change_product("acme", "web", lambda p: replace(p, limits=Limits(1))),
            (0, 1, 0),
        ),
        (lambda: directory.rotate_key("k1", "bb", now_s=1.0, grace_s=1.0), (0, 0, 1)),
        (lambda: directory.revoke_key("k1", now_s=1.0), (0, 0, 1)),
    ]
    for change, expected in steps:
        before = directory.revision()
        change()
        seen = directory.changes(before)
        assert (len(seen.tenants), len(seen.products), len(seen.keys)) == expected
        assert seen.revision == directory.revision() > before
        assert directory.changes(seen.revision) == Snapshot(seen.revision)
    everything = directory.changes(0)
    assert everything.keys[0].revoked_s == 1.0
    assert everything.products[0].limits == Limits(1)


def test_a_refused_change_is_none(store: Store) -> None:
    store.directory.add_tenant(Tenant("acme"))
    before = store.directory.revision()
    with pytest.raises(Conflict):
        store.directory.add_tenant(Tenant("acme", suspended=True))
    with pytest.raises(NotFound):
        store.directory.change_product("acme", "web", lambda p: replace(p, limits=Limits(1)))
    assert store.directory.revision() == before
    assert store.directory.tenant("acme").suspended is False


def test_no_change_slips_past_a_follower_while_many_write(store: Store) -> None:
    """Revisions become visible in order: a follower never skips one that commits late."""
    store.directory.add_tenant(Tenant("acme"))
    seen: set[str] = set()
    done = threading.Event()

    def follow() -> None:
        revision = 0
        while True:
            last = done.is_set()
            snapshot = store.directory.changes(revision)
            revision = snapshot.revision
            seen.update(each.id for each in snapshot.keys)
            if last:
                return

    with ThreadPoolExecutor(5) as threads:
        follower = threads.submit(follow)
        list(threads.map(lambda n: store.directory.add_key(key(f"k{n}")), range(60)))
        done.set()
        follower.result()
    assert seen == {f"k{n}" for n in range(60)}


def test_names_are_data_whatever_they_say(store: Store) -> None:
    name = "x'); DROP TABLE keys; --%s\\"
    store.directory.add_tenant(Tenant(name, jurisdictions=frozenset({'"\u2028é'})))
    assert store.directory.tenant(name).jurisdictions == {'"\u2028é'}
    assert store.directory.keys(name) == []


# ---- quotas -------------------------------------------------------------------------------------


def claim(subject: str, holder: str, wanted: int, dimension: Dimension = "requests") -> Claim:
    return Claim(subject, dimension, holder, wanted=wanted, least=1)


def test_quotas_are_shared(store: Store) -> None:
    store.directory.add_tenant(Tenant("acme", limits=Limits(requests_per_minute=50)))
    (first,) = store.quotas.renew([claim("tenant:acme", "g1", 30)])
    assert (first.granted, first.sharers) == (30, 1)
    (second,) = store.quotas.renew([claim("tenant:acme", "g2", 30)])
    assert (second.granted, second.sharers) == (10, 2)
    (rest,) = store.quotas.renew([Claim("tenant:acme", "requests", "g2", wanted=30, least=1)])
    assert first.granted + rest.granted <= 50
    back = Claim("tenant:acme", "requests", "g1", spent=5, returned=25)
    store.quotas.renew([back])
    store.quotas.renew([back])
    (more,) = store.quotas.renew([Claim("tenant:acme", "requests", "g2", wanted=60, least=26)])
    assert more.granted >= 40


def test_what_has_no_limit_is_told_so(store: Store) -> None:
    limited = Tenant("acme", limits=Limits(tokens_per_minute=100))
    store.directory.add_tenant(limited)
    claims = [
        claim("tenant:acme", "a", 5, "tokens"),
        claim("tenant:acme", "b", 5, "requests"),
        claim("key:none", "c", 5, "streams"),
    ]
    tokens, requests, streams = store.quotas.renew(claims)
    assert tokens.granted == 5
    assert requests.limit is None
    assert streams.limit is None
    doubled = Limits(tokens_per_minute=200)
    store.directory.change_tenant("acme", lambda t: replace(t, limits=doubled))
    (grant,) = store.quotas.renew([claim("tenant:acme", "a", 1, "tokens")])
    assert grant.limit is not None
    assert grant.limit.capacity == 200


def test_many_claims_at_once_each_get_their_answer(store: Store) -> None:
    count = 450  # more than one transaction's
    store.directory.add_tenant(Tenant("acme"))
    for number in range(count):
        bound = Limits(requests_per_minute=number + 1)
        store.directory.add_key(key(f"k{number}", limits=bound))
    claims = [claim(f"key:k{number}", "g", 10**6) for number in reversed(range(count))]
    grants = store.quotas.renew(claims)
    assert [grant.subject for grant in grants] == [each.subject for each in claims]
    assert [grant.granted for grant in grants] == list(reversed(range(1, count + 1)))


def test_parallel_gateways_never_get_more_than_there_is(store: Store) -> None:
    """Each holder is a gateway with a thread of its own; the subjects come in different orders."""
    subjects = [f"tenant:t{n}" for n in range(4)]
    for n in range(4):
        store.directory.add_tenant(Tenant(f"t{n}", limits=Limits(concurrent_streams=100)))

    def gateway(number: int) -> dict[str, int]:
        order = subjects[number % 4 :] + subjects[: number % 4]
        held: dict[str, int] = {}
        for _ in range(5):
            claims = [claim(subject, f"g{number}", 7, "streams") for subject in order]
            held = {grant.subject: grant.granted for grant in store.quotas.renew(claims)}
        return held

    started_s = time.monotonic()
    with ThreadPoolExecutor(6) as threads:
        holdings = list(threads.map(gateway, range(6)))
    assert time.monotonic() - started_s < LEASE_S, "else leases expired, and this proves nothing"
    for subject in subjects:
        assert 90 <= sum(held[subject] for held in holdings) <= 100


def test_old_leases_are_swept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.directory.add_tenant(Tenant("acme", limits=Limits(requests_per_minute=50)))
    store.quotas.renew([claim("tenant:acme", "g1", 30)])
    assert store.quotas.sweep() == 0
    monkeypatch.setattr("nearfield.store.quotas.SWEEP_AFTER_S", -2 * LEASE_S)
    assert store.quotas.sweep() == 1


# ---- usage --------------------------------------------------------------------------------------


def usage(record_id: str, **fields: Any) -> Usage:
    made: dict[str, Any] = {
        "record_id": record_id,
        "tenant": "acme",
        "product": "web",
        "key_id": "k1",
        "model": "chat",
        "version": "1",
        "region": "eu-west",
        "endpoint": "eu-west/chat/cpu",
        "operation": "chat",
        "outcome": "ok",
        "input_tokens": 10,
        "cached_tokens": 4,
        "output_tokens": 5,
        "started_s": 1_800_000_000.0,
        "duration_s": 0.5,
        **fields,
    }
    return Usage(**made)


def test_a_request_is_recorded_once(store: Store) -> None:
    ledger = store.ledger
    assert ledger.append([]) == 0
    assert ledger.append([usage("a"), usage("b"), usage("a", output_tokens=99)]) == 2
    assert ledger.append([usage("b", output_tokens=99), usage("c")]) == 1
    (total,) = ledger.totals([])
    assert (total.requests, total.output_tokens, total.input_tokens) == (3, 15, 30)


def test_a_large_batch_of_records(store: Store) -> None:
    assert store.ledger.append([usage(f"r{n}") for n in range(1234)]) == 1234
    assert store.ledger.totals([])[0].requests == 1234


def test_usage_is_summed_by_what_one_asks(store: Store) -> None:
    day_s = 86400.0
    store.ledger.append(
        [
            usage("a"),
            usage("b", model="embed", output_tokens=0, product=None),
            usage("c", tenant="zeta", region="us-east", started_s=1_800_000_000.0 + day_s),
            usage("d", outcome="deadline_exceeded", output_tokens=2**40),
        ]
    )
    totals = store.ledger.totals
    assert [(t.group, t.requests) for t in totals(["tenant"])] == [(("acme",), 3), (("zeta",), 1)]
    by_model = totals(["model", "outcome"], tenant="acme")
    assert {t.group for t in by_model} == {
        ("chat", "ok"),
        ("chat", "deadline_exceeded"),
        ("embed", "ok"),
    }
    assert [t.group for t in totals(["day"])] == [("2027-01-15",), ("2027-01-16",)]
    assert {t.group for t in totals(["product"], tenant="acme")} == {("web",), (None,)}
    assert totals([], since_s=1_800_000_000.0 + 1)[0].requests == 1
    assert totals([], until_s=1_800_000_000.0) == []
    assert totals([], tenant="acme")[0].output_tokens == 5 + 2**40
    for name in ("key", "region", "endpoint", "outcome"):
        assert totals([name])  # type: ignore[list-item]


def test_estimated_tokens_are_told_from_counted_ones(store: Store) -> None:
    store.ledger.append([usage("a"), usage("b", guessed=True), usage("c", tenant="zeta")])
    totals = store.ledger.totals(["tenant"])
    assert [(t.group, t.requests, t.guessed_requests) for t in totals] == [
        (("acme",), 2, 1), (("zeta",), 1, 0)
    ]  # fmt: skip


def test_records_of_before_count_as_told(url: str) -> None:
    database = Database(url)
    database._ready = True  # as an older program left it
    record = msgspec.structs.asdict(usage("old"))
    del record["guessed"]
    names, marks = ", ".join(record), ", ".join(f":{name}" for name in record)
    with database.writing() as connection:
        migrations.migrate(connection, migrations.MIGRATIONS[:2])
        connection.execute(text(f"INSERT INTO usage ({names}) VALUES ({marks})"), record)
    database.close()
    store = Store(url)
    store.ledger.append([usage("new", guessed=True), usage("old", guessed=True)])
    (total,) = store.ledger.totals([])
    assert (total.requests, total.guessed_requests) == (2, 1)
    store.close()


def test_sums_come_in_pages(store: Store) -> None:
    store.ledger.append([usage(f"r{n}", model=f"m{n % 5}", product=None) for n in range(9)])
    whole = store.ledger.totals(["model", "product"])
    assert len(whole) == 5
    assert store.ledger.totals(["model", "product"], skip=3, limit=9) == whole[3:]
    assert store.ledger.totals(["model", "product"], limit=2) == whole[:2]
    assert store.ledger.totals(["model", "product"], skip=5) == []


@pytest.mark.parametrize("statement", ["UPDATE usage SET output_tokens = 0", "DELETE FROM usage"])
def test_a_record_is_never_changed(url: str, store: Store, statement: str) -> None:
    store.ledger.append([usage("a")])
    database = Database(url)
    with pytest.raises(exc.DBAPIError), database.writing() as connection:
        connection.execute(text(statement))
    database.close()
    assert asdict(store.ledger.totals([])[0])["output_tokens"] == 5


# ---- idempotency --------------------------------------------------------------------------------


ANSWER = Answered(200, (("content-type", "application/json"),), b"\x00\xff{}")


def test_a_request_is_executed_once_and_answered_again(store: Store) -> None:
    idempotency = store.idempotency
    assert idempotency.claim("acme", "i1", **LEASE) == Claimed(1, orphaned=False)
    waiting = idempotency.claim("acme", "i1", **{**LEASE, "owner": "g2"})
    assert isinstance(waiting, InFlight)
    assert 25 < waiting.lease_left_s <= 30
    assert idempotency.complete("acme", "i1", 1, ANSWER, keep_s=60.0)
    assert idempotency.claim("acme", "i1", **LEASE) == ANSWER
    assert idempotency.claim("acme", "i1", **{**LEASE, "fingerprint": "g"}) == OtherRequest()
    assert idempotency.claim("zeta", "i1", **LEASE) == Claimed(1, orphaned=False), "another tenant"
    assert not idempotency.complete("acme", "i1", 1, ANSWER, keep_s=60.0)


def test_many_at_once_get_one_execution(store: Store) -> None:
    with ThreadPoolExecutor(8) as threads:
        outcomes = list(
            threads.map(lambda _: store.idempotency.claim("a", "i", **LEASE), range(24))
        )
    assert sum(isinstance(outcome, Claimed) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, InFlight) for outcome in outcomes) == 23


DYING: dict[str, Any] = {**LEASE, "lease_s": 0.0, "owner": "dead"}


def test_a_dead_owner_is_succeeded_and_cannot_come_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    idempotency = store.idempotency
    idempotency.claim("a", "i", **DYING)
    assert idempotency.claim("a", "i", **LEASE) == InFlight(DOUBT_S), "it is only doubted yet"
    monkeypatch.setattr("nearfield.store.idempotency.DOUBT_S", 0.0)
    assert idempotency.claim("a", "i", **LEASE) == Claimed(2, orphaned=True)
    assert not idempotency.complete("a", "i", 1, ANSWER, keep_s=60.0)
    assert not idempotency.abandon("a", "i", 1)
    assert not idempotency.release("a", "i", 1)
    assert idempotency.complete("a", "i", 2, ANSWER, keep_s=60.0)


def test_who_says_that_it_lives_keeps_all_its_claims(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also who could not say so for a while, since nobody could reach the database."""
    idempotency = store.idempotency
    for name in ("i1", "i2"):
        idempotency.claim("a", name, **DYING)
    assert isinstance(idempotency.claim("a", "i1", **LEASE), InFlight)
    idempotency.lives("dead", lease_s=0.0)
    monkeypatch.setattr("nearfield.store.idempotency.DOUBT_S", 100.0)
    assert idempotency.claim("a", "i1", **LEASE) == InFlight(100.0), "a new doubt"
    idempotency.lives("dead", lease_s=30.0)
    for name in ("i1", "i2"):
        waiting = idempotency.claim("a", name, **LEASE)
        assert isinstance(waiting, InFlight)
        assert 25 < waiting.lease_left_s <= 30


def test_what_came_to_nobody_knows_what_is_orphaned_at_once(store: Store) -> None:
    idempotency = store.idempotency
    idempotency.claim("a", "i", **LEASE)
    assert idempotency.abandon("a", "i", 1)
    assert idempotency.claim("a", "i", **LEASE) == Claimed(2, orphaned=True)


def test_what_was_not_executed_may_be_at_once(store: Store) -> None:
    idempotency = store.idempotency
    idempotency.claim("a", "i", **LEASE)
    assert idempotency.release("a", "i", 1)
    assert idempotency.claim("a", "i", **LEASE) == Claimed(2, orphaned=False)


def test_answers_are_forgotten_in_time(store: Store) -> None:
    idempotency = store.idempotency
    for name in ("i1", "i2", "i3"):
        idempotency.claim("a", name, **LEASE)
    for name in ("i1", "i2"):
        idempotency.complete("a", name, 1, ANSWER, keep_s=0.0)
    assert idempotency.claim("a", "i1", **LEASE) == Claimed(1, orphaned=False)
    assert idempotency.sweep() == 1
    assert isinstance(idempotency.claim("a", "i3", **LEASE), InFlight)


# ---- facts, and the database gone ---------------------------------------------------------------


def test_a_fact_is_settled_by_whoever_is_first(store: Store) -> None:
    with ThreadPoolExecutor(4) as threads:
        settled = set(threads.map(lambda n: store.settle_fact("pepper", f"v{n}"), range(8)))
    assert len(settled) == 1
    assert store.settle_fact("pepper", "other") in settled
    assert store.settle_fact("another", "") == ""


@pytest.mark.parametrize(
    "gone",
    ["sqlite:////proc/nearfield/none.sqlite3", "postgresql://x:secret@/y?host=/nonexistent"],
)
def test_a_database_that_is_not_there(gone: str, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(gone)
    for action in (
        store.directory.revision,
        lambda: store.directory.add_tenant(Tenant("a")),
        lambda: store.ledger.append([usage("a")]),
        lambda: store.quotas.renew([claim("key:k", "g", 1)]),
    ):
        with pytest.raises(Unavailable) as error:
            action()
        assert error.value.code == "database_unavailable"
        assert "secret" not in error.value.message + caplog.text
    store.close()


def test_it_comes_back_by_itself(server: Postgres | None) -> None:
    if server is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    store = Store(server.create("comes_back"))
    store.directory.add_tenant(Tenant("acme"))
    server.stop()
    with pytest.raises(Unavailable):
        store.directory.revision()
    server.start()
    assert [tenant.name for tenant in store.directory.tenants()] == ["acme"]
    store.close()


def test_two_who_change_a_tenant_at_once_lose_nothing(store: Store) -> None:
    store.directory.add_tenant(Tenant("acme", limits=Limits(0)))

    def once_more(_: int) -> None:
        store.directory.change_tenant(
            "acme",
            lambda t: replace(t, limits=Limits((t.limits.requests_per_minute or 0) + 1)),
        )

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(once_more, range(20)))
    assert store.directory.tenant("acme").limits == Limits(20)
