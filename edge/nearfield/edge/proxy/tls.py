"""TLS for clients, with certificates that can be renewed under running connections.

A client that resumes a session that began before a renewal is not shown the new certificate: it
asks for none. Connections and sessions outlive the certificate they began with; handshakes do not.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("nearfield.edge.proxy")

ALPN = ("h2", "http/1.1")
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2: what RFC 9113 (9.2.2 and appendix A) leaves of it. TLS 1.3 has its own."""
LOOK_S = 10.0
"""How often the files are looked at. Reading their times costs two system calls."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM files: the chain, leaf first, and its key."""

    chain: Path
    key: Path

    def changed_ns(self) -> tuple[int, int, int, int]:
        """Tells two states of the files apart.

        Raises:
            OSError: one of them cannot be read.
        """
        chain, key = self.chain.stat(), self.key.stat()
        return chain.st_mtime_ns, chain.st_ino, key.st_mtime_ns, key.st_ino


class Certificates:
    """The context that a listener uses, and the newest one behind it.

    New handshakes are handed to the newest context; connections that are open keep theirs. A
    renewal that cannot be loaded changes nothing.
    """

    def __init__(self, certificate: Certificate, alpn: tuple[str, ...] = ALPN) -> None:
        """
        Raises:
            OSError, ssl.SSLError: the files cannot be read, or do not belong together.
        """
        self._certificate = certificate
        self._alpn = alpn
        self._seen = certificate.changed_ns()
        self._newest = self._load()
        self.context = self._load()
        self.context.sni_callback = self._hand_over

    def reload(self) -> bool:
        """Load the files again if they changed; whether they did.

        Raises:
            OSError, ssl.SSLError: the new ones cannot be used. The old ones still are.
        """
        seen = self._certificate.changed_ns()
        if seen == self._seen:
            return False
        self._newest = self._load()
        self._seen = seen
        return True

    async def follow(self, every_s: float = LOOK_S) -> None:
        """Reload whenever the files change, until cancelled. What cannot be used is logged."""
        complaint = ""
        while True:
            await asyncio.sleep(every_s)
            try:
                if self.reload():
                    log.info("the certificate %s was renewed", self._certificate.chain)
                complaint = ""
            except OSError as error:  # ssl.SSLError is one
                # Once, and not at every look: a chain is often there before its key.
                if str(error) != complaint:
                    complaint = str(error)
                    log.warning("the renewed certificate cannot be used yet: %s", error)

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_ciphers(CIPHERS)
        context.set_alpn_protocols(list(self._alpn))
        context.load_cert_chain(self._certificate.chain, self._certificate.key)
        return context

    def _hand_over(
        self, connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, _: ssl.SSLContext
    ) -> None:
        # Called in every handshake, whether the client names a server or not.
        connection.context = self._newest
