"""The dashboard's files and headers, without a browser."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

import api_gateway
from tests.support.stack import RunningStack

STATIC = Path(api_gateway.__file__).parent / "static"
FILES = sorted(path.name for path in STATIC.iterdir())


def test_the_page_is_at_the_root_and_needs_no_key(stack: RunningStack) -> None:
    answer = httpx.get(stack.http_url + "/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "<title>device-operations</title>" in answer.text


@pytest.mark.parametrize("path", ["/", *(f"/static/{name}" for name in FILES)])
def test_every_file_is_served_with_a_strict_policy(stack: RunningStack, path: str) -> None:
    answer = stack.client.get(path)
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200 and answer.content
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "*" not in policy and "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_a_file_that_did_not_change_is_not_sent_again(stack: RunningStack) -> None:
    first = stack.client.get("/static/dashboard.js")
    again = stack.client.get("/static/dashboard.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert stack.client.get("/static/dashboard.js", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize("name", ["nothing.js", "..%2fpages.py", "%2e%2e/pages.py", "....//pages.py", ".hidden"])
def test_nothing_else_is_served_from_there(stack: RunningStack, name: str) -> None:
    answer = stack.client.get(f"/static/{name}")
    assert answer.status_code == 404 and answer.json()["code"] == "not_found"


def test_the_page_loads_nothing_from_elsewhere_and_holds_no_inline_script_or_style() -> None:
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!/)', page) == []
    assert re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", page) is None
    for name in FILES:
        text = (STATIC / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text, name


def test_no_script_puts_data_down_as_markup() -> None:
    for path in STATIC.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text) is None


def test_every_state_and_kind_of_the_contract_can_be_filtered_for() -> None:
    from device_operations import Kind, State

    views = (STATIC / "views.js").read_text(encoding="utf-8")
    assert [name for name in [*Kind, *State] if f'"{name}"' not in views] == []
