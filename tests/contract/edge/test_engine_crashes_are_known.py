"""A body that an engine dies of: from a replica, in both protocols, to a gateway's suspects."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from nearfield.edge.gate import KeyGate
from nearfield.edge.proxy.ports import Target
from nearfield.edge.suspects import Suspects

from tests.support.edge import Forwarding, forwarding, post
from tests.support.hosting import PROGRAMS
from tests.support.serving import Served, served, spec_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

CRASHED = "engine_crashed"
CODE = "x-nearfield-error-code"
OIP = "/v2/models/test"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def replica() -> AsyncIterator[Served]:
    async with served(spec_of(PROGRAMS)) as running:
        yield running


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that died is started again before its request is given up."""
    monkeypatch.setattr("tests.support.edge.SOON_S", 50.0)


def before(replica: Served, suspects: Suspects) -> Any:
    """A gateway in front of it."""
    return forwarding([Target(*replica.address)], gate=KeyGate(suspects))


def chat(program: str, **fields: Any) -> bytes:
    messages = [{"role": "user", "content": program}]
    return post({"model": "test", "messages": messages, **fields})


def generate(program: str, path: str = "generate") -> bytes:
    return post({"text_input": program}, f"{OIP}/{path}")


@pytest.mark.parametrize("asked", [chat("exit:7"), generate("exit:7")], ids=["openai", "oip"])
async def test_in_place_of_an_answer_the_header_tells(replica: Served, asked: bytes) -> None:
    suspects = Suspects()
    async with before(replica, suspects) as running:
        found = await running.ask(asked)
    assert (found.status, found.headers[CODE]) == (500, CRASHED)
    assert suspects.any
    if b"/v2/" in asked[:40]:
        assert set(found.json()) == {"error"}, "the protocol's bodies are what they were"


@pytest.mark.parametrize(
    "asked",
    [chat("say:a exit:7", stream=True), generate("say:a exit:7", "generate_stream")],
    ids=["openai", "oip"],
)
async def test_in_a_stream_its_last_event_tells(replica: Served, asked: bytes) -> None:
    suspects = Suspects()
    async with before(replica, suspects) as running:
        found = await running.ask(asked)
        assert running.outcome.error == CRASHED
    assert (found.status, found.complete) == (200, True)
    assert CODE not in found.headers
    last = json.loads(found.body.rstrip().rpartition(b"\n\n")[2].removeprefix(b"data: "))
    told = last if isinstance(last["error"], str) else last["error"]
    assert told["code"] == CRASHED
    assert suspects.any


async def test_after_the_second_no_replica_has_it_again(replica: Served) -> None:
    suspects = Suspects()

    async def ask(running: Forwarding) -> tuple[int, str]:
        found = await running.ask(generate("touch:/dev/null exit:7"))
        return found.status, found.headers[CODE]

    async with before(replica, suspects) as running:
        assert await ask(running) == (500, CRASHED)
        assert await ask(running) == (500, CRASHED)
        crashes = replica.service.host.crashes
        assert await ask(running) == (422, "request_quarantined")
        assert replica.service.host.crashes == crashes
        harmless = await running.ask(generate("say:fine"))
    assert harmless.json()["text_output"] == "fine"
