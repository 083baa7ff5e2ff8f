"""Usage records reach the ledger, each once, whatever happens on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from nearfield.core.errors import BadRequest, Unavailable
from nearfield.store import usage_writer
from nearfield.store.ports import Usage
from nearfield.store.sql import Store
from nearfield.store.usage_writer import UsageWriter

QUICK: dict[str, Any] = {"send_s": 0.01, "retry_s": 0.01, "adopt_s": 0.05}


def record(number: int, **fields: Any) -> Usage:
    made: dict[str, Any] = {
        "record_id": f"r{number}", "tenant": "acme", "product": None, "key_id": "k",
        "model": "chat", "version": "1", "region": "eu", "endpoint": "eu/chat@1/default",
        "operation": "chat", "outcome": "ok", "input_tokens": 1, "cached_tokens": 0,
        "output_tokens": 2, "started_s": 1e9, "duration_s": 0.5, **fields,
    }  # fmt: skip
    return Usage(**made)


def records(*numbers: int) -> list[Usage]:
    return [record(number) for number in numbers]


class Shelf:
    """A ledger in memory, that may be gone, slow, or choosy."""

    def __init__(self) -> None:
        self.kept: dict[str, Usage] = {}
        self.gone = False
        self.refuses: set[str] = set()
        self.tries = 0
        self.go_on = threading.Event()
        self.go_on.set()

    def append(self, given: Sequence[Usage]) -> int:
        self.tries += 1
        assert self.go_on.wait(20)
        if self.gone:
            raise Unavailable("gone")
        if self.refuses & {each.record_id for each in given}:
            raise ValueError("this one never")
        before = len(self.kept)
        self.kept |= {each.record_id: each for each in given}
        return len(self.kept) - before

    def totals(self, *_: Any, **__: Any) -> list[Any]:
        return []


@contextmanager
def writing(ledger: Any, folder: Path, **options: Any) -> Iterator[UsageWriter]:
    writer = UsageWriter(ledger, folder, **{**QUICK, **options})
    try:
        yield writer
    finally:
        writer.close(20)


def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.005)


def test_records_come_in_few_transactions(tmp_path: Path) -> None:
    shelf = Shelf()
    with writing(shelf, tmp_path, send_s=0.2) as writer:
        for number in range(1000):
            writer.put([record(number)])
        until(lambda: writer.written == 1000)
        assert shelf.tries <= 3
        assert writer.waiting == 0
    assert list(shelf.kept.values()) == records(*range(1000))
    assert list(tmp_path.iterdir()) == [], "a process that ends leaves nothing"


def test_the_end_waits_for_what_is_left(tmp_path: Path) -> None:
    shelf = Shelf()
    with writing(shelf, tmp_path, send_s=60.0) as writer:
        writer.put(records(1, 2))
    assert len(shelf.kept) == 2
    assert writer.written == 2


def test_while_the_ledger_is_gone_they_are_kept_and_then_sent(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.gone = True
    with writing(shelf, tmp_path, segment_records=10) as writer:
        for number in range(95):
            writer.put([record(number)])
        until(lambda: shelf.tries > 3 and writer.waiting == 95)
        shelf.gone = False
        until(lambda: writer.written == 95)
        writer.put([record(95)])
    assert set(shelf.kept.values()) == set(records(*range(96)))
    assert writer.lost == 0


def test_a_slow_ledger_does_not_keep_them_from_being_written_down(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.go_on.clear()
    with writing(shelf, tmp_path) as writer:
        writer.put([record(1)])
        until(lambda: shelf.tries)
        writer.put([record(2)])
        until(lambda: b'"r2"' in b"".join(f.read_bytes() for f in tmp_path.glob("*/*.jsonl")))
        shelf.go_on.set()
    assert len(shelf.kept) == 2


def test_what_a_process_leaves_the_next_one_sends(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.gone = True
    with writing(shelf, tmp_path) as writer:
        writer.put(records(1, 2, 3))
    assert writer.waiting == 3
    shelf.gone = False
    with writing(shelf, tmp_path) as following:
        until(lambda: following.written == 3)
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    assert set(shelf.kept.values()) == set(records(1, 2, 3))


KILLED = """
import sys, threading
from pathlib import Path
from nearfield.core.errors import Unavailable
from nearfield.store.usage_writer import UsageWriter
from tests.unit.test_usage_writer import records

class Gone:
    def append(self, _):
        raise Unavailable("gone")

writer = UsageWriter(Gone(), Path(sys.argv[1]), send_s=0.05, segment_records=10)
for start in range(0, 100, 5):
    writer.put(records(*range(start, start + 5)))
print("put", flush=True)
threading.Event().wait()
"""


def test_one_that_is_killed_loses_nothing_that_was_written_down(tmp_path: Path) -> None:
    """Also while another process that shares the folder lives; and a torn line harms no other."""
    shelf = Shelf()
    with writing(shelf, tmp_path) as other:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"put\n"
        lines = lambda: sum(  # noqa: E731
            path.read_bytes().count(b"\n") for path in tmp_path.glob(f"{process.pid}-*/*.jsonl")
        )
        until(lambda: lines() == 100)
        assert shelf.kept == {}, "its owner lives"
        newest = max(tmp_path.glob(f"{process.pid}-*/*.jsonl"))
        with newest.open("ab") as file:
            file.write(b'{"record_id": "torn')
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        until(lambda: len(shelf.kept) == 100)
        until(lambda: len(list(tmp_path.iterdir())) == 1)
        assert other.lost == 0
    assert set(shelf.kept.values()) == set(records(*range(100)))


def test_one_that_the_ledger_never_takes_stops_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = Shelf()
    shelf.refuses = {"r7"}
    with writing(shelf, tmp_path) as writer:
        writer.put(records(*range(20)))
        until(lambda: len(shelf.kept) == 19)
        assert (writer.written, writer.lost) == (19, 1)
        assert "refuses a usage record" in caplog.text
    (rejected,) = tmp_path.glob("*/rejected.jsonl")
    assert b'"r7"' in rejected.read_bytes()


def test_the_journal_is_bounded_and_says_what_it_loses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = Shelf()
    shelf.gone = True
    with writing(shelf, tmp_path, max_bytes=10_000, segment_records=5) as writer:
        for number in range(100):
            writer.put([record(number)])
        until(lambda: writer.lost > 50)  # what it has not looked at yet is waiting, too
        until(lambda: writer.waiting + writer.lost == 100)
        assert sum(f.stat().st_size for f in tmp_path.glob("*/*.jsonl")) <= 10_000
        assert caplog.text.count("no room for usage records") == 1
        shelf.gone = False
        until(lambda: writer.waiting == 0)
        writer.put([record(100)])
        until(lambda: "r100" in shelf.kept)
    assert len(shelf.kept) + writer.lost == 101


def test_a_disk_that_takes_nothing_loses_nothing_while_the_ledger_answers(tmp_path: Path) -> None:
    shelf = Shelf()
    with writing(shelf, tmp_path) as writer:
        for home in tmp_path.iterdir():
            shutil.rmtree(home)
        for number in range(50):
            writer.put([record(number)])
        until(lambda: writer.written == 50)
    assert len(shelf.kept) == 50
    assert writer.lost == 0


def test_without_a_disk_memory_is_bounded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf()
    shelf.gone = True
    monkeypatch.setattr(usage_writer.UsageWriter, "_write", lambda *_: False)
    with writing(shelf, tmp_path, segment_records=5) as writer:
        for number in range(100):
            writer.put([record(number)])
            until(lambda: not writer._incoming)
        until(lambda: writer.waiting + writer.lost == 100)
        assert writer.waiting == 20
        shelf.gone = False
        until(lambda: writer.waiting == 0)


def test_a_folder_that_cannot_be_used_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadRequest, match="cannot be kept in"):
        UsageWriter(Shelf(), tmp_path / "file" / "folder")


def test_a_record_that_is_there_already_is_not_added(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'store.sqlite3'}")
    store.ledger.append(records(0))
    with writing(store.ledger, tmp_path / "spool") as writer:
        writer.put(records(0, 1, 2))
        until(lambda: writer.waiting == 0)
    assert store.ledger.totals([])[0].requests == 3
    store.close()


def test_journals_are_their_owners_only(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.gone = True
    with writing(shelf, tmp_path / "spool") as writer:
        writer.put(records(1))
        until(lambda: list(tmp_path.glob("spool/*/*.jsonl")))
        assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700
        (home,) = (tmp_path / "spool").iterdir()
        assert home.stat().st_mode & 0o777 == 0o700
        assert home.stat().st_uid == os.geteuid()
