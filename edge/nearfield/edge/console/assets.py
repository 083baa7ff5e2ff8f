"""The page's files: read once, told apart by what they hold, and fenced in by their headers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from nearfield.edge.proxy.ports import Answer, Fields, Page, Request

TYPES: Final = {
    "html": b"text/html; charset=utf-8",
    "css": b"text/css; charset=utf-8",
    "js": b"text/javascript; charset=utf-8",
    "json": b"application/json",
    "svg": b"image/svg+xml",
}
INDEX: Final = "index.html"

# Names of models, tenants and jobs come from callers. They are only ever set as text; should that
# be forgotten somewhere, the browser itself refuses to run what is in them, or to parse it.
POLICY: Final = (
    b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    b"object-src 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
FENCE: Final[Fields] = (
    (b"content-security-policy", POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


@dataclass(frozen=True, slots=True)
class Asset:
    """One file, ready to be sent. Kept by browsers, but asked about each time: after an upgrade
    nobody runs half of the former page."""

    body: bytes
    content_type: bytes
    headers: Fields
    etag: bytes

    def page(self, request: Request) -> Answer:
        """It, or that it has not changed."""
        if _matches(request.headers.get(b"if-none-match"), self.etag):
            return Answer(304, b"", self.content_type, self.headers)
        return Answer(200, self.body, self.content_type, self.headers)


def load() -> dict[str, Asset]:
    """All files, by name."""
    found: dict[str, Asset] = {}
    for path in (files("nearfield.edge") / "console" / "static").iterdir():
        body = path.read_bytes()
        etag = b'"%b"' % hashlib.sha256(body).hexdigest()[:32].encode("ascii")
        headers = (*FENCE, (b"etag", etag), (b"cache-control", b"no-cache"))
        kind = TYPES[path.name.rpartition(".")[2]]
        found[path.name] = Asset(body, kind, headers, etag)
    return found


def pages(assets: dict[str, Asset], root: str) -> dict[tuple[str, str], Page]:
    """The page at `root`, its other files below."""
    table: dict[tuple[str, str], Page] = {}
    for name, asset in assets.items():
        table["GET", root if name == INDEX else f"{root}/{name}"] = asset.page
    return table


def _matches(header: bytes | None, etag: bytes) -> bool:
    """Whether `If-None-Match` names it; by weak comparison, as RFC 9110 has it for this header."""
    if header is None:
        return False
    named = [each.strip().removeprefix(b"W/") for each in header.split(b",")]
    return etag in named or named == [b"*"]
