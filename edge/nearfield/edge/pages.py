"""The page table: which requests this gateway answers by itself.

A table has a method and a pattern for each page (`/v1/models/{model}`); a name in braces stands for
any one segment, and a segment that is written out comes before it. Every request is looked up here
first, so the table is a tree: what is no page is known after a step or two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nearfield.core.errors import NearfieldError
from nearfield.edge.proxy.answers import refusal
from nearfield.edge.proxy.ports import Answer, Page, Request

Routes = Mapping[tuple[str, str], Page]


class MethodNotAllowed(NearfieldError):
    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class _Node:
    """One segment of a path."""

    __slots__ = ("any", "below", "pages", "refuse")

    def __init__(self) -> None:
        self.below: dict[bytes, _Node] = {}
        self.any: _Node | None = None
        self.pages: dict[bytes, Page] = {}
        self.refuse: Page | None = None


class PageTable:
    """Finds pages. See `ports.Pages`."""

    def __init__(self, tables: Iterable[Routes]) -> None:
        """
        Raises:
            ValueError: two tables have a page for the same requests.
        """
        self._root = _Node()
        self.routes: dict[tuple[str, str], Page] = {}
        for table in tables:
            for (method, pattern), page in table.items():
                self._add(method, pattern, page)

    def find(self, request: Request) -> Page | None:
        # As sent first: `/admin/v1/keys` looks like `/v1/keys` of a model called admin.
        if request.path != request.target:
            page = self._find(request.target, request.method)
            if page is not None:
                return page
        return self._find(request.path, request.method)

    def _find(self, path: bytes, method: bytes) -> Page | None:
        if b"?" in path:
            path = path.partition(b"?")[0]
        node = self._root
        for segment in path.split(b"/"):
            found = node.below.get(segment)
            if found is None:
                found = node.any
                if found is None or not segment:
                    return None
            node = found
        return node.pages.get(method, node.refuse)

    def _add(self, method: str, pattern: str, page: Page) -> None:
        node = self._root
        for segment in pattern.split("/"):
            if segment.startswith("{"):
                node.any = node = node.any or _Node()
            else:
                node = node.below.setdefault(segment.encode("ascii"), _Node())
        if method.encode("ascii") in node.pages:
            raise ValueError(f"two pages for {method} {pattern}")
        self.routes[method, pattern] = page
        node.pages[method.encode("ascii")] = page
        if method == "GET":
            node.pages.setdefault(b"HEAD", page)
        node.refuse = _refuse(node.pages)


def _refuse(pages: Mapping[bytes, Page]) -> Page:
    """A page's path, asked for by another method."""
    allowed = b", ".join(sorted(pages))

    def page(request: Request) -> Answer:
        error = MethodNotAllowed(f"This path takes {allowed.decode('ascii')} only.")
        answer = refusal(error, request.dialect)
        answer.headers = [*answer.headers, (b"allow", allowed)]
        return answer

    return page
