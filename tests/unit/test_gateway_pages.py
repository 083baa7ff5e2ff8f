"""The page table: which page a request is for."""

from __future__ import annotations

import json

import pytest
from nearfield.edge.pages import PageTable
from nearfield.edge.proxy.ports import Answer, Page, Request

from tests.support.gates import request_of


def page(name: str) -> Page:
    def answer(request: Request) -> Answer:
        return Answer(200, name.encode())

    return answer


TABLE = PageTable(
    [
        {("GET", "/v1/models"): page("list"), ("GET", "/v1/models/{model}"): page("one")},
        {
            ("GET", "/v2/models/{model}/ready"): page("ready"),
            ("POST", "/keys"): page("create"),
            ("GET", "/keys"): page("keys"),
            ("GET", "/console/{file}"): page("file"),
            ("GET", "/console/data"): page("data"),
        },
    ]
)


def found(method: str, path: str) -> str | None:
    request = request_of(path=path.encode(), method=method.encode())
    at = TABLE.find(request)
    if at is None:
        return None
    answer = at(request)
    assert isinstance(answer, Answer)
    return answer.body.decode() if answer.status == 200 else str(answer.status)


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/v1/models", "list"),
        ("GET", "/v1/models?limit=3", "list"),
        ("HEAD", "/v1/models", "list"),
        ("GET", "/v1/models/chat", "one"),
        ("GET", "/v1/models/", None),
        ("GET", "/v1/models/chat/more", None),
        ("GET", "/v2/models/chat/ready", "ready"),
        ("GET", "/v2/models/chat", None),
        ("POST", "/v2/models/chat/infer", None),
        ("POST", "/v1/chat/completions", None),
        ("POST", "/keys", "create"),
        ("DELETE", "/keys", "405"),
        ("GET", "/console/data", "data"),
        ("GET", "/console/x.js", "file"),
        ("GET", "/", None),
        ("GET", "//v1/models", None),
    ],
)
def test_a_request_finds_its_page(method: str, path: str, expected: str | None) -> None:
    assert found(method, path) == expected


def test_another_method_is_told_which_there_are() -> None:
    request = request_of(path=b"/keys", method=b"DELETE")
    at = TABLE.find(request)
    assert at is not None
    answer = at(request)
    assert isinstance(answer, Answer)
    assert (b"allow", b"GET, HEAD, POST") in answer.headers
    assert json.loads(answer.body)["error"]["code"] == "method_not_allowed"


def test_no_two_pages_for_one_request() -> None:
    with pytest.raises(ValueError, match="two pages for GET /a/"):
        PageTable([{("GET", "/a/{x}"): page("1")}, {("GET", "/a/{y}"): page("2")}])
