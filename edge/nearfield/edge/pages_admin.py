"""The admin API: tenants, products, keys and usage of the store, and the last requests.

    /admin/v1/tenants[/{tenant}]                      platform; a tenant's admin: its own, to read
    /admin/v1/tenants/{tenant}/products[/{product}]   platform; a tenant's admin: its own
    /admin/v1/keys[/{key}[/rotate|/revoke]]           likewise
    /admin/v1/usage, /admin/v1/requests[/{request}]   likewise, to read
    /metrics                                          platform

A key of scope `platform` administers all tenants; one of scope `admin` its own, of which it can
neither lift the limits nor move the data. What belongs to others is not there: the answer is the
same 404 as for what does not exist.

The store is asked in a thread. Without it the answer is a 503, and what is in memory still works.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar
from urllib.parse import parse_qsl

import msgspec
from nearfield.api.keys import Key, KeyTable, Principal
from nearfield.core.errors import (
    BadRequest,
    Forbidden,
    NearfieldError,
    NotFound,
    PayloadTooLarge,
    Unavailable,
    UnsupportedMedia,
)
from nearfield.edge.proxy.answers import refusal
from nearfield.edge.proxy.ports import Answer, Page, Request
from nearfield.edge.recorder import GatewayRecorder
from nearfield.store.documents import (
    Document,
    key_document,
    product_document,
    tenant_document,
    usage_document,
)
from nearfield.store.forms import (
    Form,
    NewKey,
    NewProduct,
    NewTenant,
    ProductChange,
    Rotation,
    TenantChange,
    groups,
    moment_s,
    parse,
)

if TYPE_CHECKING:
    from nearfield.store.administration import Administration  # brings SQL: half a second

log = logging.getLogger("nearfield.audit")

PAGE_ITEMS: Final = 100
MAX_PAGE_ITEMS: Final = 1000
MAX_BODY_BYTES: Final = 256 * 1024
"""A key for a thousand models is a tenth of it."""
THREADS: Final = 4
MOST_AT_ONCE: Final = 32
"""Calls that use the store or wait for it; one more is refused. Administrators are few."""

_SECRET_FIELDS: Final = ((b"cache-control", b"no-store"),)
_NAME: Final = r"([A-Za-z0-9._-]{1,128})"
_A_NAME: Final = re.compile(_NAME)
_encode = msgspec.json.Encoder().encode

Routes: TypeAlias = "dict[tuple[str, str], Page]"
"""By method and pattern of the path (`/admin/v1/keys/{key}`)."""


class _NoBody(Form):
    """Nothing may be said."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One request of somebody who may administer at all.

    Attributes:
        names: what stands in the path, in its order.
    """

    principal: Principal
    names: Sequence[str]
    query: Mapping[str, str]
    body: bytes
    content_type: bytes

    @property
    def platform(self) -> bool:
        return "platform" in self.principal.scopes

    @property
    def tenant(self) -> str | None:
        """Whose things it may see; None: everybody's."""
        return None if self.platform else self.principal.tenant

    def require_platform(self) -> None:
        """
        Raises:
            Forbidden: it is for its own tenant only.
        """
        self.principal.require_scope("platform")

    def require_tenant(self, name: str) -> None:
        """
        Raises:
            NotFound: it is for another tenant only.
        """
        if self.tenant not in (None, name):
            raise _missing("tenant", name)

    def form(self, kind: type[_Kind]) -> _Kind:
        """The body.

        Raises:
            BadRequest: it is not what is asked for.
        """
        if not self.body and kind is _NoBody:
            return kind()
        if len(self.body) > MAX_BODY_BYTES:
            raise PayloadTooLarge(f"The body is larger than {MAX_BODY_BYTES} bytes.")
        if self.content_type.partition(b";")[0].strip().lower() != b"application/json":
            raise UnsupportedMedia("Send application/json.", param="content-type")
        try:
            data = msgspec.json.decode(self.body)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise BadRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
        return parse(kind, data)

    def only(self, *known: str) -> None:
        """
        Raises:
            BadRequest: the query says something else.
        """
        for name in self.query:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                there = f"There are {', '.join(known)}." if known else "There are none."
                remedy = f"Did you mean {close[0]}?" if close else there
                raise BadRequest(
                    f"Unknown parameter {name[:60]}. {remedy}",
                    param=name[:60],
                    code="unknown_parameter",
                )


_Kind = TypeVar("_Kind", bound=Form)
_Handler: TypeAlias = "Callable[[_Call], tuple[int, Document]]"


class AdminPages:
    """See the module."""

    def __init__(
        self, keys: KeyTable, administration: Administration, recorder: GatewayRecorder
    ) -> None:
        """
        Args:
            keys: who may call. It follows the store: what is changed here counts a second later.
        """
        self._keys = keys
        self._store = administration
        self._recorder = recorder
        self._threads = ThreadPoolExecutor(THREADS, "nearfield-admin")
        self._places = threading.Semaphore(MOST_AT_ONCE)

    def routes(self) -> Routes:
        """The table."""
        tenant, product = "/admin/v1/tenants/{tenant}", "/products/{product}"
        key = "/admin/v1/keys/{key}"
        stored: list[tuple[str, str, _Handler]] = [
            ("GET", "/admin/v1/tenants", self._tenants),
            ("POST", "/admin/v1/tenants", self._create_tenant),
            ("GET", tenant, self._tenant),
            ("PATCH", tenant, self._change_tenant),
            ("GET", f"{tenant}/products", self._products),
            ("POST", f"{tenant}/products", self._create_product),
            ("GET", tenant + product, self._product),
            ("PATCH", tenant + product, self._change_product),
            ("GET", "/admin/v1/keys", self._all_keys),
            ("POST", "/admin/v1/keys", self._create_key),
            ("GET", key, self._key),
            ("POST", f"{key}/rotate", self._rotate_key),
            ("POST", f"{key}/revoke", self._revoke_key),
            ("GET", "/admin/v1/usage", self._usage),
        ]
        remembered: list[tuple[str, str, _Handler]] = [
            ("GET", "/admin/v1/requests", self._requests),
            ("GET", "/admin/v1/requests/{request}", self._request),
        ]
        table: Routes = {}
        for rows, answer in ((stored, self._in_thread), (remembered, self._at_once)):
            for method, pattern, handler in rows:
                page = partial(self._page, pattern, _compiled(pattern), handler, answer)
                table[method, pattern] = page
        return table

    def close(self) -> None:
        """Take no more calls."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ---- a call -----------------------------------------------------------------------------

    def _page(
        self,
        pattern: str,
        path: re.Pattern[str],
        handler: _Handler,
        answer: Callable[[Callable[[], Answer]], Answer | asyncio.Future[Any]],
        request: Request,
    ) -> Answer | asyncio.Future[Any]:
        try:
            principal = administrator(self._keys, request)
            call = _read(principal, path, request)
        except NearfieldError as error:
            return refusal(error, "openai")
        method = request.method.decode("ascii")
        return answer(partial(_answered, method, pattern, handler, call))

    def _at_once(self, work: Callable[[], Answer]) -> Answer:
        return work()

    def _in_thread(self, work: Callable[[], Answer]) -> Answer | asyncio.Future[Any]:
        if not self._places.acquire(blocking=False):
            busy = Unavailable(
                "Too many administrators at once. Send the request again.", retry_after_s=1.0
            )
            return refusal(busy, "openai")
        job = self._threads.submit(work)
        job.add_done_callback(lambda _: self._places.release())
        return asyncio.wrap_future(job)

    # ---- tenants and products ---------------------------------------------------------------

    def _tenants(self, call: _Call) -> tuple[int, Document]:
        call.only("limit", "after")
        limit, after, own = _limit(call), _after(call), call.tenant
        if own is None:
            found = self._store.tenants(after=after, limit=limit + 1)
        else:
            found = [self._store.tenant(own)] if after is None or own > after else []
        return 200, _listed(call, [tenant_document(tenant) for tenant in found], "name")

    def _create_tenant(self, call: _Call) -> tuple[int, Document]:
        call.require_platform()
        return 201, tenant_document(self._store.create_tenant(call.form(NewTenant)))

    def _tenant(self, call: _Call) -> tuple[int, Document]:
        (name,) = call.names
        call.require_tenant(name)
        return 200, tenant_document(self._store.tenant(name))

    def _change_tenant(self, call: _Call) -> tuple[int, Document]:
        (name,) = call.names
        call.require_tenant(name)
        call.require_platform()  # nobody lifts the limits that they are held to
        return 200, tenant_document(self._store.change_tenant(name, call.form(TenantChange)))

    def _products(self, call: _Call) -> tuple[int, Document]:
        call.only("limit", "after")
        (tenant,) = call.names
        call.require_tenant(tenant)
        self._store.tenant(tenant)
        after, limit = _after(call), _limit(call)
        found = self._store.products(tenant, after=after, limit=limit + 1)
        return 200, _listed(call, [product_document(product) for product in found], "name")

    def _create_product(self, call: _Call) -> tuple[int, Document]:
        (tenant,) = call.names
        call.require_tenant(tenant)
        return 201, product_document(self._store.create_product(tenant, call.form(NewProduct)))

    def _product(self, call: _Call) -> tuple[int, Document]:
        tenant, name = call.names
        call.require_tenant(tenant)
        return 200, product_document(self._store.product(tenant, name))

    def _change_product(self, call: _Call) -> tuple[int, Document]:
        tenant, name = call.names
        call.require_tenant(tenant)
        change = call.form(ProductChange)
        return 200, product_document(self._store.change_product(tenant, name, change))

    # ---- keys -------------------------------------------------------------------------------

    def _all_keys(self, call: _Call) -> tuple[int, Document]:
        call.only("limit", "after", "tenant")
        tenant = self._asked_tenant(call)
        after, limit, now_s = _after(call), _limit(call), time.time()
        try:
            found = self._store.keys(tenant, after=after, limit=limit + 1)
        except NotFound:
            raise _bad_after(call) from None
        return 200, _listed(call, [key_document(key, now_s) for key in found], "id")

    def _create_key(self, call: _Call) -> tuple[int, Document]:
        form = call.form(NewKey)
        call.require_tenant(form.tenant)
        _require_no_more(call, form.scopes)
        key, presented = self._store.create_key(form)
        return 201, key_document(key, time.time(), presented=presented)

    def _key(self, call: _Call) -> tuple[int, Document]:
        return 200, key_document(self._owned_key(call), time.time())

    def _rotate_key(self, call: _Call) -> tuple[int, Document]:
        form = call.form(Rotation)
        key = self._owned_key(call)
        _require_no_more(call, key.scopes)  # a new secret is the whole key
        rotated, presented = self._store.rotate_key(key.id, form)
        return 200, key_document(rotated, time.time(), presented=presented)

    def _revoke_key(self, call: _Call) -> tuple[int, Document]:
        call.form(_NoBody)
        key = self._owned_key(call)
        _require_no_more(call, key.scopes)
        return 200, key_document(self._store.revoke_key(key.id), time.time())

    def _owned_key(self, call: _Call) -> Key:
        (key_id,) = call.names
        key = self._store.key(key_id)
        if call.tenant not in (None, key.tenant):
            raise _missing("key", key_id)
        return key

    def _asked_tenant(self, call: _Call) -> str | None:
        """The tenant that the query names, or all that the caller may see."""
        tenant = call.query.get("tenant")
        if tenant is None:
            return call.tenant
        call.require_tenant(tenant)
        if _A_NAME.fullmatch(tenant) is None:
            raise _missing("tenant", tenant[:60])
        self._store.tenant(tenant)
        return tenant

    # ---- usage and requests -----------------------------------------------------------------

    def _usage(self, call: _Call) -> tuple[int, Document]:
        call.only("by", "tenant", "since", "until", "limit", "after")
        by = groups(call.query.get("by", "model").split(","), "by")
        since, until = call.query.get("since"), call.query.get("until")
        since_s = None if since is None else moment_s(since, "since")
        until_s = None if until is None else moment_s(until, "until")
        tenant = self._asked_tenant(call)
        skip, limit = _rows_before(call), _limit(call)
        totals = self._store.usage(
            by, tenant=tenant, since_s=since_s, until_s=until_s, skip=skip, limit=limit + 1
        )
        rows = [
            {"row": str(number), **usage_document(total, by)}
            for number, total in enumerate(totals, skip)
        ]
        return 200, _listed(call, rows, "row")

    def _requests(self, call: _Call) -> tuple[int, Document]:
        call.only("limit", "notable")
        notable = call.query.get("notable", "false")
        if notable not in ("true", "false"):
            raise BadRequest(
                f"notable is {notable[:60]!r}: send true, for requests that failed or needed "
                "more than one try, or false.",
                param="notable",
            )
        entries = self._recorder.recent.latest(
            _limit(call), tenant=call.tenant, notable=notable == "true"
        )
        return 200, {"object": "list", "data": [entry.to_json() for entry in entries]}

    def _request(self, call: _Call) -> tuple[int, Document]:
        call.only()
        (request_id,) = call.names
        entry = self._recorder.recent.find(request_id, tenant=call.tenant)
        if entry is None:
            raise NotFound(
                f"There is no request {request_id!r} here: this process remembers only the last "
                "ones that it answered itself.",
                code="request_not_found",
            )
        # The decision tells of every region's queues: that is the platform's business.
        return 200, entry.to_json(explained=call.platform)


def metrics_routes(recorder: GatewayRecorder, keys: KeyTable | None) -> Routes:
    """The gateway's metrics as Prometheus text.

    Args:
        keys: then it takes one of scope `platform`; None: anybody may call this gateway.
    """

    def page(request: Request) -> Answer:
        if keys is not None:
            try:
                administrator(keys, request).require_scope("platform")
            except NearfieldError as error:
                return refusal(error, "openai")
        text = recorder.prometheus_page()
        return Answer(200, text, b"text/plain; version=0.0.4; charset=utf-8")

    return {("GET", "/metrics"): page}


def administrator(keys: KeyTable, request: Request) -> Principal:
    """Who calls, if they may administer anything.

    Raises:
        Unauthenticated, Forbidden, Unavailable: they may not.
    """
    principal = keys.authenticate(request.headers.get(b"authorization"), time.time())
    if principal.scopes.isdisjoint(("admin", "platform")):
        raise Forbidden(
            "This API key is for inference: it would need the scope admin or platform.",
            code="scope_missing",
        )
    return principal


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{\w+\\}", lambda _: _NAME, re.escape(pattern)))


def _read(principal: Principal, path: re.Pattern[str], request: Request) -> _Call:
    """
    Raises:
        BadRequest: the query is none. NotFound: a name in the path is none.
    """
    where, _, query = request.target.decode("ascii").partition("?")
    found = path.fullmatch(where)
    if found is None:
        raise NotFound("A name in a path is of letters, digits, '.', '_' and '-'.")
    try:
        pairs = parse_qsl(
            query, keep_blank_values=True, strict_parsing=bool(query), errors="strict"
        )
    except ValueError:
        raise BadRequest("The query is malformed.", code="malformed_query") from None
    given = dict(pairs)
    if len(given) != len(pairs):
        raise BadRequest("The query says something twice.", code="malformed_query")
    kind = request.headers.get(b"content-type", b"")
    return _Call(principal, found.groups(), given, request.body, kind)


def _answered(method: str, pattern: str, handler: _Handler, call: _Call) -> Answer:
    """Do it, and note who did. In a thread, where the store is asked."""
    try:
        status, document = handler(call)
        answer = Answer(status, _encode(document), headers=_SECRET_FIELDS)
    except NearfieldError as error:
        answer = refusal(error, "openai")
    if method != "GET":
        who = call.principal
        named = " ".join(call.names)
        log.info(
            "%s %s %s by key %s of %s: %d",
            method, pattern, named, who.key_id, who.tenant, answer.status,
        )  # fmt: skip
    return answer


def _require_no_more(call: _Call, scopes: Sequence[str] | frozenset[str]) -> None:
    """
    Raises:
        Forbidden: the key in question may do more than whoever asks.
    """
    if "platform" in scopes:
        call.require_platform()


def _limit(call: _Call) -> int:
    text = call.query.get("limit", str(PAGE_ITEMS))
    if not (text.isascii() and text.isdigit() and len(text) < 6) or not (
        1 <= int(text) <= MAX_PAGE_ITEMS
    ):
        raise BadRequest(
            f"limit is {text[:60]!r}: send a whole number from 1 to {MAX_PAGE_ITEMS}.",
            param="limit",
        )
    return int(text)


def _after(call: _Call) -> str | None:
    """What a page comes after.

    Raises:
        BadRequest: it can be nothing's name.
    """
    after = call.query.get("after")
    if after is not None and _A_NAME.fullmatch(after) is None:
        raise _bad_after(call)
    return after


def _rows_before(call: _Call) -> int:
    """Of a list whose rows are numbered: how many stand before this page."""
    after = _after(call)
    if after is None:
        return 0
    if not after.isdigit() or len(after) > 9:
        raise _bad_after(call)
    return int(after) + 1


def _bad_after(call: _Call) -> BadRequest:
    after = call.query["after"]
    return BadRequest(
        f"after is {after[:60]!r}: send the last_id of the page before.", param="after"
    )


def _listed(call: _Call, found: Sequence[Document], identity: str) -> Document:
    """A page of a list, as OpenAI's clients know them: go on with `after` its `last_id`.

    Args:
        found: what comes after `after`, up to one more than the page holds.
    """
    limit = _limit(call)
    shown = found[:limit]
    return {
        "object": "list",
        "data": shown,
        "has_more": len(found) > limit,
        "last_id": shown[-1][identity] if shown else None,
    }


def _missing(what: str, name: str) -> NotFound:
    """As the store says it of what does not exist."""
    return NotFound(f"There is no {what} {name!r}.", code=f"{what}_not_found")
