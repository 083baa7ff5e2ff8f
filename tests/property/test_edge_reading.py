"""The forwarding path's readers: the same whatever the cuts, and any bytes are read or refused."""

from __future__ import annotations

import contextlib
import itertools

from hypothesis import example, given
from hypothesis import strategies as st
from nearfield.edge.proxy.events import MAX_EVENT_BYTES, EventStream
from nearfield.edge.proxy.frames import PREFACE, Flood, Frames
from nearfield.edge.proxy.head import Bad
from nearfield.edge.proxy.limits import Limits
from nearfield.edge.proxy.reading import COMPLETE, HEAD, Reader

LIMITS = Limits(max_body_bytes=100_000)
Seen = tuple[bytes, bytes, dict[bytes, bytes], bytes]

tokens = st.text("abcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+-.^_`|~", min_size=1, max_size=12)
values = st.text(
    st.characters(min_codepoint=33, max_codepoint=255, exclude_characters="\x7f"), max_size=30
)
bodies = st.binary(max_size=300)


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, Seen]:
    """A well-formed request, and what is to be read of it."""
    method = draw(st.sampled_from([b"GET", b"POST", b"PUT"]))
    target = b"/" + draw(tokens).replace("#", "").encode()
    fields = {f"x-{name}": value for name, value in draw(st.dictionaries(tokens, values)).items()}
    headers = {b"host": b"a:1"}
    headers |= {name.encode(): value.strip().encode("latin-1") for name, value in fields.items()}
    body = draw(bodies)
    pieces = draw(st.lists(st.integers(1, 50), max_size=5))
    raw_body = body
    if method == b"POST" and pieces:
        headers[b"transfer-encoding"] = b"chunked"
        raw_body, at = b"", 0
        for size in [*pieces, len(body)]:
            if part := body[at : at + size]:
                raw_body += b"%x\r\n%b\r\n" % (len(part), part)
                at += size
        raw_body += b"0\r\n\r\n"
    elif body:
        headers[b"content-length"] = b"%d" % len(body)
    lines = b"".join(b"%b: %b\r\n" % field for field in headers.items())
    raw = b"%b %b HTTP/1.1\r\n%b\r\n%b" % (method, target, lines, raw_body)
    return raw, (method, target, headers, body)


def read(parts: list[bytes]) -> list[Seen]:
    """All requests of one connection that gets these parts."""
    reader, found = Reader(LIMITS), []
    for part in parts:
        data = part
        while data:
            step = reader.feed(data)
            data = b""
            if step == HEAD:
                head = (reader.method, reader.target, dict(reader.headers))
                step = reader.read_body()
            if step == COMPLETE:
                found.append((*head, reader.body))
                data, reader.ahead = reader.ahead, b""
                reader.restart()
    return found


def read_or_refused(parts: list[bytes]) -> list[Seen]:
    try:
        return read(parts)
    except Bad:
        return []


def cut(raw: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(raw), *(each % (len(raw) + 1) for each in cuts)})
    return [raw[a:b] for a, b in itertools.pairwise(places)]


@given(requests(), st.lists(st.integers(0, 5000), max_size=12))
def test_a_request_is_the_same_whatever_the_cuts(
    request: tuple[bytes, Seen], cuts: list[int]
) -> None:
    raw, expected = request
    assert read(cut(raw, cuts)) == [expected]


@given(st.lists(requests(), max_size=4), st.lists(st.integers(0, 5000), max_size=12))
def test_pipelined_requests_are_the_same_whatever_the_cuts(
    several: list[tuple[bytes, Seen]], cuts: list[int]
) -> None:
    sized = [each for each in several if b"transfer-encoding" not in each[1][2]]
    raw = b"".join(raw for raw, _ in sized)
    assert read(cut(raw, cuts)) == [expected for _, expected in sized]


@given(requests(), st.integers(0, 5000), st.binary(max_size=3), st.integers(0, 3))
@example((b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", (b"GET", b"/", {}, b"")), 0, b"\0", 0)
def test_a_damaged_request_is_read_or_refused(
    request: tuple[bytes, Seen], place: int, put: bytes, cut_out: int
) -> None:
    raw, _ = request
    at = place % len(raw)
    damaged = raw[:at] + put + raw[at + cut_out :]
    for _, target, headers, _ in read_or_refused([damaged]):
        assert target.startswith(b"/")
        assert not [v for v in headers.values() if set(v) & {0, 10, 13}]
        assert headers[b"host"]


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=4))
def test_any_bytes_are_read_or_refused(raw: bytes, cuts: list[int]) -> None:
    for _, target, _, _ in read_or_refused(cut(raw, cuts)):
        assert target.startswith(b"/")


# ---- HTTP/2's frames ----------------------------------------------------------------------------

frames = st.lists(
    st.tuples(st.sampled_from([0, 1, 2, 4, 6, 7, 8, 250]), st.binary(max_size=40)), max_size=20
)


@example([(7, b"bye"), (0, b"data")], [len(PREFACE) + 9, len(PREFACE) + 22])
@given(frames, st.lists(st.integers(0, 2000), max_size=12))
def test_all_frames_pass_but_goodbyes_whatever_the_cuts(
    several: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    written = [
        len(body).to_bytes(3, "big") + bytes([kind, 4]) + b"\0\0\0\1" + body
        for kind, body in several
    ]
    guard = Frames(1000)
    parts = cut(PREFACE + b"".join(written), cuts)
    passed = b"".join([guard.read(part) for part in parts])
    kept = [raw for raw, (kind, _) in zip(written, several, strict=True) if kind != 7]
    assert passed == PREFACE + b"".join(kept)
    assert guard.leaving == (len(kept) < len(written))


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=4))
def test_any_frames_are_read_or_refused(raw: bytes, cuts: list[int]) -> None:
    guard = Frames(1000)
    with contextlib.suppress(Flood):
        assert len(b"".join([guard.read(part) for part in cut(raw, cuts)])) <= len(raw)


# ---- server-sent events -------------------------------------------------------------------------

events = st.lists(
    st.tuples(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")),
              st.sampled_from([b"\n\n", b"\r\n\r\n"])),
    max_size=6,
)  # fmt: skip


@given(events, st.binary(max_size=5), st.lists(st.integers(0, 200), max_size=8))
def test_only_whole_events_pass(
    whole: list[tuple[bytes, bytes]], tail: bytes, cuts: list[int]
) -> None:
    raw = b"".join(b"data: " + data + end for data, end in whole) + b"data: " + tail
    stream = EventStream()
    sent = b""
    for part in cut(raw, cuts):
        sent += stream.take(part)
        assert raw.startswith(sent)
        assert not sent or sent.endswith((b"\n\n", b"\r\n\r\n"))
    assert stream.last_words(b"{}") == b"data: {}\n\n"
    assert sent == raw[: len(sent)]


@given(events, st.binary(max_size=5), st.lists(st.integers(0, 200), max_size=8))
def test_a_stream_that_ends_well_is_unchanged(
    whole: list[tuple[bytes, bytes]], tail: bytes, cuts: list[int]
) -> None:
    raw = b"".join(b"data: " + data + end for data, end in whole) + tail
    stream = EventStream()
    sent = b"".join([stream.take(part) for part in cut(raw, cuts)]) + stream.rest()
    assert sent == raw


def test_a_huge_event_passes_in_parts() -> None:
    stream = EventStream()
    assert stream.take(b"data: ") == b""
    half = b"x" * MAX_EVENT_BYTES
    assert stream.take(half) == b"data: " + half
    assert stream.take(b"more") == b"more"
    assert stream.last_words(b"{}") is None
    assert stream.take(b"end\n\ndata: ") == b"end\n\n"
    assert stream.last_words(b"{}") == b"data: {}\n\n"
