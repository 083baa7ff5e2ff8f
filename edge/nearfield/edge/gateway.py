"""One gateway in one event loop: everything that stands in its place, from its files.

    async with Gateway(files, place) as gateway:
        await gateway.listen(sockets)
        ...
        await gateway.drain(30.0)

    store ──→ keys, limits, idempotency ──→ Gate ─┐
    World ←── Follower                            ├─→ Proxy ←── Listener ←── clients
      └────→ Router ──→ limiter, Retries ─────────┤
    Recorder, pages ──────────────────────────────┘

Here is the only place that knows all parts. It decides nothing else: how a process starts, is
replaced and ends is `supervisor`'s and `worker`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from nearfield.api.keys import KeyTable
from nearfield.api.passport import PassportKeys
from nearfield.core.errors import BadRequest
from nearfield.core.settings import Settings
from nearfield.core.watched_file import WatchedFile
from nearfield.edge.files import Files
from nearfield.edge.follow import Follower
from nearfield.edge.gate import KeyGate
from nearfield.edge.limiter import LimitedRouter
from nearfield.edge.pages import PageTable, Routes
from nearfield.edge.pages_admin import AdminPages, metrics_routes
from nearfield.edge.pages_console import Console, Here, KeyAccess, LocalAccess
from nearfield.edge.pages_models import ModelPages
from nearfield.edge.proxy.limits import Limits
from nearfield.edge.proxy.listener import Listener
from nearfield.edge.proxy.ports import Attempt, Calls, Grant, Request, Router
from nearfield.edge.proxy.proxy import Proxy
from nearfield.edge.proxy.tls import Certificate, Certificates
from nearfield.edge.recorder import STANDARD_ERROR, GatewayRecorder
from nearfield.edge.retries import BudgetRetries
from nearfield.edge.router import WorldRouter
from nearfield.edge.site import Site
from nearfield.edge.suspects import Suspects
from nearfield.edge.world import World

if TYPE_CHECKING:
    from nearfield.edge.accounts import Accounts

log = logging.getLogger("nearfield.edge")

PASSPORTS_S = 1.0
"""How often the file with the passport keys is looked at: as often as replicas look at theirs."""
KEYS_FILE, WORLD_FILE, USAGE_FOLDER = "keys.json", "world.json", "usage"


@dataclass(frozen=True, slots=True)
class Place:
    """The process that a gateway runs in.

    Attributes:
        state: a folder of its own for what outlives it: the last good state, usage on its way.
        settings: where the pepper of the keys is.
        environ: the OTEL_* variables.
        workers: processes that share its port, this one among them.
        limits: of the forwarding path.
        log_to: a file descriptor for one line a request; None: none.
    """

    state: Path
    settings: Settings
    environ: Mapping[str, str]
    workers: int = 1
    limits: Limits = field(default_factory=Limits)
    log_to: int | None = STANDARD_ERROR


class Gateway:
    """See the module. Entering it takes as long as the first answers from regions and store.

    Attributes:
        world, recorder, proxy: its parts, once it is entered.
        pages: what it answers by itself, with all routes.
    """

    world: World
    recorder: GatewayRecorder
    proxy: Proxy
    pages: PageTable

    def __init__(self, files: Files, place: Place) -> None:
        self._files = files
        self._place = place
        self._stack = AsyncExitStack()
        self._certificates: Certificates | None = None

    async def __aenter__(self) -> Self:
        """
        Raises:
            BadRequest, Conflict: a file that it needs cannot be used.
            Unavailable: the store does not answer, and nothing is known of former times.
        """
        try:
            await self._build()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Write down what is left. Drain first."""
        await self._stack.aclose()

    async def listen(self, sockets: Sequence[socket.socket]) -> None:
        """Accept on these from now on."""
        tls = None if self._certificates is None else self._certificates.context
        await self._listener.open(sockets, tls)

    async def drain(self, within_s: float) -> int:
        """Finish what was accepted and accept no more; how many requests had to be cut off.

        May be cancelled, and called again with less time.
        """
        self.world.draining = True  # readiness probes and other gateways look elsewhere
        self._console.close()
        return await self._listener.drain(within_s)

    # ---- putting it together ----------------------------------------------------------------

    async def _build(self) -> None:
        place, files = self._place, self._files
        enter = self._stack.enter_async_context
        watched = self._open_passports()
        passports = None if watched is None else watched.content
        self._certificates = self._load_certificates()
        accounts = await self._open_accounts()
        table = None if accounts is None else accounts.table
        self.recorder = await enter(
            GatewayRecorder(
                files.gateway.gateway,
                place.environ,
                ledger=None if accounts is None else accounts.ledger,
                spool=None if accounts is None else place.state / USAGE_FOLDER,
                log_to=place.log_to,
            )
        )
        site = Site.of(
            files.gateway,
            files.regions,
            passports=passports,
            last_good=place.state / WORLD_FILE,
        )
        self.world = World(site)
        await enter(Follower(self.world))
        gate, retries, router = self._ports(passports, accounts)
        self._console = await enter(self._open_console(table))
        self.pages = PageTable(self._tables(table, accounts))
        self.proxy = Proxy(
            gate,
            router,
            retries,
            self.recorder,
            pages=self.pages,
            calls=self._calls(),
            limits=place.limits,
            sample_ratio=self.recorder.sample_ratio,
        )
        self.world.abandon = self.proxy.abandon
        self._stack.callback(self.proxy.close)
        self._listener = Listener(self.proxy)
        if self._certificates is not None:
            self._attend(self._certificates.follow())
        if watched is not None:
            self._attend(self._follow_passports(watched, gate))

    def _ports(
        self, passports: PassportKeys | None, accounts: Accounts | None
    ) -> tuple[KeyGate, BudgetRetries, LimitedRouter]:
        world, suspects = self.world, Suspects()
        router = WorldRouter(world)

        def wait_s(request: Request, grant: Grant, attempts: Sequence[Attempt]) -> float | None:
            prospect = router.prospect(request, grant, attempts)
            return None if prospect is None else prospect.wait_s

        retries = BudgetRetries(suspects, region_lost=world.is_lost, wait_s=wait_s)
        gate = KeyGate(
            suspects,
            table=None if accounts is None else accounts.table,
            shares=None if accounts is None else accounts.shares,
            keyed=None if accounts is None else accounts.keyed,
            passports=passports,
        )
        return gate, retries, LimitedRouter(cast(Router, router), retries)

    def _calls(self) -> Calls | None:
        if self._files.gateway.listen.grpc_port is None:
            return None
        from nearfield.edge.grpc import OpenInference  # brings protobuf

        return OpenInference(self._place.limits)

    def _tables(self, table: KeyTable | None, accounts: Accounts | None) -> list[Routes]:
        tables: list[Routes] = [
            ModelPages(self.world, table).routes(),
            metrics_routes(self.recorder, table),
            self._console.routes(),
        ]
        if accounts is not None:
            admin = AdminPages(accounts.table, accounts.administration, self.recorder)
            self._stack.callback(admin.close)
            tables.append(admin.routes())
        return tables

    def _open_console(self, table: KeyTable | None) -> Console:
        file = self._files.gateway
        here = Here.of(file, self._files.regions, version("nearfield"), self._place.workers)
        if table is not None:
            return Console(here, self.world, self.recorder.recent, KeyAccess(table))
        access = LocalAccess(anybody=file.console == "anybody")
        return Console(here, self.world, self.recorder.recent, access)

    async def _open_accounts(self) -> Accounts | None:
        url, place = self._files.gateway.store, self._place
        if url is None:
            return None
        # SQL takes half a second to import: only where it is needed.
        from nearfield.edge.accounts import Accounts

        owner = f"{self._files.gateway.gateway}-{os.getpid()}"
        pepper = place.settings.key_pepper_file
        return await self._stack.enter_async_context(
            Accounts(url, pepper, last_good=place.state / KEYS_FILE, owner=owner)
        )

    def _load_certificates(self) -> Certificates | None:
        tls = self._files.gateway.listen.tls
        if tls is None:
            return None
        chain, key = self._files.beside(tls.certificate), self._files.beside(tls.key)
        try:
            return Certificates(Certificate(chain, key))
        except OSError as error:  # ssl.SSLError is one
            raise BadRequest(
                f"listen.tls: {chain} and {key} cannot be used: {error}", param="listen.tls"
            ) from None

    # ---- secrets ----------------------------------------------------------------------------

    def _open_passports(self) -> WatchedFile[PassportKeys] | None:
        name = self._files.gateway.passport_keys
        if name is None:
            return None
        return WatchedFile(self._files.beside(name), PassportKeys.load, log)

    async def _follow_passports(self, watched: WatchedFile[PassportKeys], gate: KeyGate) -> None:
        """Take over new secrets when the file changes. What cannot be used changes nothing."""
        while True:
            await asyncio.sleep(PASSPORTS_S)
            keys = watched.refresh()
            if keys is not gate.passports:
                gate.passports = self.world.passports = keys
                log.info("new passport keys: %s", ", ".join(keys.kids))

    def _attend(self, work: Coroutine[Any, Any, None]) -> None:
        """Run beside the gateway until its end."""
        task = asyncio.create_task(work)

        async def end() -> None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

        self._stack.push_async_callback(end)
