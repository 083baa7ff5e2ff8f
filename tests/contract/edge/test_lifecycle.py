"""Starting, stopping, replacing a forwarding process, and renewing its certificate."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import sys
import time
import warnings
from pathlib import Path

import pytest
from cryptography import x509
from nearfield.core.standstill import LATE_S, TICK_S
from nearfield.edge.proxy.handover import Offer, inherit
from nearfield.edge.proxy.limits import Limits
from nearfield.edge.proxy.listener import bind
from nearfield.edge.proxy.ports import Target
from nearfield.edge.proxy.tls import Certificates

from tests.support.certificates import trusting_nobody, write_certificate
from tests.support.edge import (
    STREAM,
    Client,
    Forwarding,
    Heard,
    Upstream,
    chunk,
    closed_port,
    forwarding,
    get,
    post,
)
from tests.support.hosting import until

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


async def serving(upstream: Upstream) -> Target:
    await upstream.start()
    return upstream.target


# ---- draining ---------------------------------------------------------------------------------


async def test_draining_finishes_what_was_accepted() -> None:
    go_on = asyncio.Event()

    async def slow(heard: Heard, reader: Reader, writer: Writer) -> None:
        await go_on.wait()
        await upstream.echo(heard, reader, writer)

    upstream = Upstream(slow)
    async with forwarding([await serving(upstream)], limits=Limits(drain_idle_s=5)) as proxy:
        running, idle = await proxy.client(), await proxy.client()
        running.send(post())
        await until(lambda: len(upstream.heard) == 1)
        await until(lambda: len(proxy.proxy.clients) == 2)
        drained = asyncio.ensure_future(proxy.listener.drain(5))
        await asyncio.sleep(0.05)
        with pytest.raises(ConnectionRefusedError):
            await proxy.client()
        idle.send(post())  # a last one on a connection that was there before
        await until(lambda: len(upstream.heard) == 2)
        go_on.set()
        for client in (running, idle):
            found = await client.answer()
            assert (found.status, found.headers["connection"]) == (200, "close")
            assert await client.rest() == b""
        assert await drained == 0
    await upstream.close()


async def test_who_left_while_the_process_stood_still_is_not_served() -> None:
    upstream = Upstream()
    async with forwarding([await serving(upstream)]) as proxy:
        client = await proxy.client()
        with socket.create_connection(proxy.address) as left:
            left.sendall(post({"model": "chat", "prompt": "left"}))
        client.send(post({"model": "chat", "prompt": "stays"}))
        time.sleep(TICK_S + LATE_S + 0.1)  # noqa: ASYNC251 (everything stands still)
        assert (await client.answer()).status == 200
        assert [b"stays" in heard.body for heard in upstream.heard] == [True]
    await upstream.close()


async def test_idle_connections_do_not_hold_up_draining() -> None:
    async with forwarding(
        [Target("127.0.0.1", closed_port())], limits=Limits(drain_idle_s=0.1)
    ) as proxy:
        client = await proxy.client()
        await until(lambda: bool(proxy.proxy.clients))
        async with asyncio.timeout(2):
            assert await proxy.listener.drain(30) == 0
        assert await client.rest() == b""


async def test_draining_takes_no_longer_than_it_may() -> None:
    async def endless(heard: Heard, reader: Reader, writer: Writer) -> None:
        if heard.target == "/v1/stream":
            writer.write(STREAM + chunk(b"data: 1\n\n"))
        await upstream.gone(reader)

    upstream = Upstream(endless)
    async with forwarding([await serving(upstream)]) as proxy:
        streaming, waiting = await proxy.client(), await proxy.client()
        streaming.send(post(target="/v1/stream"))
        waiting.send(post())
        await until(lambda: len(upstream.heard) == 2)
        assert await proxy.listener.drain(0.1) == 2
        assert b'data: {"error":' in await streaming.rest()
        assert b"503" in await waiting.rest()
    await upstream.close()


# ---- handing over -----------------------------------------------------------------------------


async def test_sockets_are_handed_over(tmp_path: Path) -> None:
    path = tmp_path / "handover"
    assert inherit(path) is None
    gone: list[str] = []
    first = bind("127.0.0.1", 0)
    offer = Offer(path, [first], lambda: gone.append("first"))
    assert path.stat().st_mode & 0o777 == 0o600
    taken = await asyncio.get_running_loop().run_in_executor(None, inherit, path)
    assert taken is not None
    (second,) = taken.sockets
    assert second.getsockname() == first.getsockname()
    second_offer = Offer(path, [second], lambda: gone.append("second"))
    await asyncio.sleep(0.02)
    assert gone == []
    taken.ready()
    await until(lambda: gone == ["first"])
    offer.close()
    assert path.exists()  # it is the second one's now
    second_offer.close()
    assert not path.exists()
    first.close()
    second.close()


async def test_a_process_that_dies_while_taking_over_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "handover"
    gone: list[str] = []
    with bind("127.0.0.1", 0) as first:
        offer = Offer(path, [first], lambda: gone.append("first"))
        loop = asyncio.get_running_loop()
        for _ in range(2):
            taken = await loop.run_in_executor(None, inherit, path)
            assert taken is not None
            for each in taken.sockets:
                each.close()
            taken._other.close()
        await asyncio.sleep(0.02)
        assert gone == []
        offer.close()


async def test_a_path_may_be_longer_than_an_address(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    assert inherit(folder / "handover") is None
    folder.mkdir()
    with bind("127.0.0.1", 0) as first:
        offer = Offer(folder / "handover", [first], lambda: None)
        loop = asyncio.get_running_loop()
        taken = await loop.run_in_executor(None, inherit, folder / "handover")
        assert taken is not None
        assert [each.getsockname() for each in taken.sockets] == [first.getsockname()]
        for each in taken.sockets:
            each.close()
        taken._other.close()
        offer.close()
        assert list(folder.iterdir()) == []


async def test_a_path_that_nobody_listens_at_any_more(tmp_path: Path) -> None:
    path = tmp_path / "handover"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert inherit(path) is None


async def test_nothing_is_lost_when_the_listening_process_changes(tmp_path: Path) -> None:
    """Two proxies in turn on one socket, under load on new connections."""
    upstream = Upstream()
    target = await serving(upstream)
    statuses: list[int] = []
    stop = asyncio.Event()

    async def load(proxy: Forwarding) -> None:
        while not stop.is_set():
            client = Client(*await asyncio.open_connection(*proxy.address))
            client.send(post(connection="close"))
            statuses.append((await client.answer()).status)
            client.close()

    async with forwarding([target]) as first:
        listening = first.sockets[0]
        loaded = [asyncio.ensure_future(load(first)) for _ in range(8)]
        await until(lambda: len(statuses) > 100)
        again = socket.socket(fileno=os.dup(listening.fileno()))
        async with forwarding([target], sockets=[again]) as second:
            assert await first.listener.drain(5) == 0
            before = len(second.recorder.outcomes)
            await until(lambda: len(second.recorder.outcomes) > before + 100)
            stop.set()
            await asyncio.gather(*loaded)
    assert set(statuses) == {200}
    await upstream.close()


async def test_the_process() -> None:
    """`python -m nearfield.edge.proxy`: forwards, drains at SIGTERM, ends with 0."""
    upstream = Upstream()
    target = await serving(upstream)
    port = closed_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "nearfield.edge.proxy", "--port", str(port)),
        *("--upstream", f"http://127.0.0.1:{target.port}/prefix"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    line = await process.stdout.readline()
    assert line.decode() == f"forwarding http://127.0.0.1:{port}\n"
    client = Client(*await asyncio.open_connection("127.0.0.1", port))
    client.send(get())
    assert (await client.answer("GET")).json()["target"] == "/prefix/v1/models"
    client.close()
    process.terminate()
    assert await process.wait() == 0
    await upstream.close()


# ---- TLS --------------------------------------------------------------------------------------


def name_of(client: Client) -> str:
    """The common name that the server showed."""
    shown = client.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    name = x509.load_der_x509_certificate(shown).subject.rfc4514_string()
    return name.removeprefix("CN=")


async def test_tls_and_a_new_certificate(tmp_path: Path) -> None:
    certificates = Certificates(write_certificate(tmp_path, "first"))
    upstream = Upstream()
    async with forwarding([await serving(upstream)], tls=certificates.context) as proxy:
        before = await proxy.client(ssl=trusting_nobody(), server_hostname="localhost")
        assert name_of(before) == "first"
        assert not certificates.reload()  # nothing has changed
        write_certificate(tmp_path, "second")
        assert certificates.reload()
        for options in ({"server_hostname": "localhost"}, {"server_hostname": ""}):
            after = await proxy.client(ssl=trusting_nobody(), **options)
            assert name_of(after) == "second"
            after.send(post())
            assert (await after.answer()).status == 200
        for _ in range(2):  # the old connection is as good as before
            before.send(post())
            assert (await before.answer()).status == 200
        assert before.writer.get_extra_info("ssl_object").selected_alpn_protocol() is None
        (tmp_path / "key.pem").write_text("broken")
        with pytest.raises(ssl.SSLError):
            certificates.reload()
        still = await proxy.client(ssl=trusting_nobody())
        assert name_of(still) == "second"
    await upstream.close()


async def test_certificates_are_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also over a moment in which chain and key do not belong together; that is told once."""
    files = write_certificate(tmp_path, "first")
    key = files.key.read_bytes()
    certificates = Certificates(files)
    following = asyncio.ensure_future(certificates.follow(every_s=0.01))
    async with forwarding([], tls=certificates.context) as proxy:
        write_certificate(tmp_path, "second")
        new_key = files.key.read_bytes()
        files.key.write_bytes(key)
        await until(lambda: "cannot be used yet" in caplog.text)
        assert name_of(await proxy.client(ssl=trusting_nobody())) in ("first", "second")
        files.key.unlink()
        await until(lambda: "No such file" in caplog.text)
        files.key.write_bytes(new_key)

        async def shown() -> str:
            return name_of(await proxy.client(ssl=trusting_nobody()))

        async with asyncio.timeout(5):
            while await shown() != "second":
                pass
        assert caplog.text.count("No such file") == 1
        following.cancel()


@pytest.mark.parametrize(
    ("version", "ciphers", "taken"),
    [
        (ssl.TLSVersion.TLSv1_3, None, True),
        (ssl.TLSVersion.TLSv1_2, "ECDHE+AESGCM", True),
        (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES256-SHA384:@SECLEVEL=0", False),
        (ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0", False),
    ],
)
async def test_old_tls_is_refused(
    tmp_path: Path, version: ssl.TLSVersion, ciphers: str | None, taken: bool
) -> None:
    certificates = Certificates(write_certificate(tmp_path, "only"))
    context = trusting_nobody()
    if ciphers is not None:
        context.set_ciphers(ciphers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # for what is tried here
        context.minimum_version = context.maximum_version = version
    async with forwarding([], tls=certificates.context) as proxy:
        if taken:
            assert name_of(await proxy.client(ssl=context)) == "only"
        else:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await proxy.client(ssl=context)


async def test_a_handshake_that_is_not_finished(tmp_path: Path) -> None:
    certificates = Certificates(write_certificate(tmp_path, "only"))
    async with forwarding([], tls=certificates.context, limits=Limits(head_s=0.2)) as proxy:
        client = await proxy.client()
        client.send(b"\x16\x03\x01")
        assert await client.rest() == b""


async def test_tls_refuses_and_closes(tmp_path: Path) -> None:
    certificates = Certificates(write_certificate(tmp_path, "only"))
    limits = Limits(linger_s=0.2)
    async with forwarding(
        [Target("127.0.0.1", closed_port())], tls=certificates.context, limits=limits
    ) as proxy:
        client = await proxy.client(ssl=trusting_nobody())
        client.send(b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n")
        assert (await client.answer("GET")).status == 400
        assert await client.rest() == b""
        assert certificates.context.minimum_version == ssl.TLSVersion.TLSv1_2


async def test_an_upstream_behind_tls(tmp_path: Path) -> None:
    files = write_certificate(tmp_path, "upstream")
    upstream = Upstream()
    await upstream.start(ssl=Certificates(files).context)
    port = upstream.target.port
    trusted = ssl.create_default_context(cafile=str(files.chain))
    good = Target("127.0.0.1", port, tls=trusted, server_name="localhost")
    other = Target("127.0.0.1", port, tls=trusted, server_name="elsewhere")
    async with forwarding([good]) as proxy:
        found = await proxy.ask(post())
        assert found.json()["headers"]["host"] == f"localhost:{port}"
    async with forwarding([other]) as proxy:
        assert (await proxy.ask(post())).status == 503
        assert proxy.outcome.attempts[0].failure == "refused"
    await upstream.close()
