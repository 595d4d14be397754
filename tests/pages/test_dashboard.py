"""The dashboard in a real browser, against a whole stack."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from device_operations import Client, State
from tests.pages import browser as browsers
from tests.support import graphs
from tests.support.stack import RunningStack

PROGRAM = browsers.find()
pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed here (apt-get install chromium)"),
    pytest.mark.skipif(sys.platform == "win32", reason="the browser's pipe is handed over by POSIX file descriptors"),
]

ROWS = "document.querySelectorAll('#jobs tbody tr:not(.empty)').length"
ATTACK = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\"'><svg/onload=alert(1)>"
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[browsers.Browser]:
    assert PROGRAM is not None
    with browsers.Browser(PROGRAM, tmp_path / "profile") as opened:
        opened.look(1300, 900)
        yield opened


@pytest.fixture(scope="module")
def client(stack: RunningStack) -> Iterator[Client]:
    graphs.tiny(stack.folder / "models" / "tiny.onnx")
    graphs.slow(stack.folder / "models" / "slow.onnx")
    with Client(stack.http_url) as made:
        for name in ("tiny", "slow"):
            made.result(made.inference.load_model(name, f"{name}.onnx"))
        yield made


def run(client: Client, **labels: str) -> str:
    inputs = {"x": np.ones((1, 4), np.float32)}
    return client.inference.submit_run(inputs, model_name="tiny", job={"labels": labels}, wait=20).job_id


def slow(client: Client) -> str:
    inputs = {"x": np.zeros((256, 256), np.float32), "rounds": np.array(10**8)}
    return client.inference.submit_run(inputs, model_name="slow").job_id


def test_devices_jobs_models_and_sessions_are_shown(
    stack: RunningStack, client: Client, browser: browsers.Browser
) -> None:
    run(client, team="vision")
    allocation = client.memory.allocate(2**20)
    opened = client.inference.open_session(
        model_name="tiny", state={"y": "x"}, initial={"x": np.ones((1, 4), np.float32)}
    )
    try:
        client.wait(allocation, timeout=20)
        browser.open(stack.http_url)
        browser.wait(f"{ROWS} >= 4")
        assert browser.evaluate("document.getElementById('health').textContent") == "ready"
        device = browser.evaluate("document.querySelector('#devices .card').innerText")
        assert "cpu_0" in device and "online" in device and "allocations 1.0 MiB" in device
        assert browser.evaluate("document.querySelector('.part.allocations').getBoundingClientRect().width") >= 3
        jobs = browser.evaluate("document.getElementById('jobs').innerText")
        assert "memory.allocate" in jobs and "team: vision" in jobs and "succeeded" in jobs
        assert "tiny:1" in browser.evaluate("document.getElementById('models').innerText")
        assert opened["session_id"][-8:] in browser.evaluate("document.getElementById('sessions').innerText")
        assert browser.complaints == []
    finally:
        client.inference.close_session(opened["session_id"])
        client.memory.deallocate(allocation.resource.id)  # type: ignore[union-attr]


def test_what_attackers_write_into_labels_and_names_stays_text(
    stack: RunningStack, client: Client, browser: browsers.Browser
) -> None:
    attack = ATTACK[:190]
    job_id = run(client, **{attack: attack})
    browser.open(stack.http_url)
    browser.wait(f"document.getElementById('jobs').innerText.includes({json.dumps('onerror')})")
    shown = browser.evaluate("[...document.querySelectorAll('#jobs .label')].map((label) => label.textContent)")
    assert f"{attack}: {attack}" in shown
    browser.evaluate(f"document.querySelector('#jobs tr[data-key=\"{job_id}\"] button.link').click()")
    browser.wait("document.getElementById('details').open")
    assert attack in json.loads(browser.evaluate("document.getElementById('details-json').textContent"))["labels"]
    assert (
        browser.evaluate("document.querySelectorAll('main script, main img, main svg[onload], dialog img').length") == 0
    )
    assert browser.evaluate("document.title") == "device-operations"
    assert browser.complaints == []


def test_the_policy_stops_a_script_that_came_in_all_the_same(
    stack: RunningStack, client: Client, browser: browsers.Browser
) -> None:
    browser.open(stack.http_url)
    browser.wait(f"{ROWS} >= 1")
    for smuggled in (
        "const b = document.createElement('script'); b.textContent = 'document.title = \"owned\"'",
        "const b = document.createElement('b'); b.setAttribute('onclick', 'document.title = \"owned\"')",
        "const b = document.createElement('div'); b.innerHTML = '<img src=x onerror=\"document.title=1\">'",
        "const b = document.createElement('script'); b.src = 'data:text/javascript,document.title=1'",
    ):
        put = f"{smuggled}; document.body.append(b); b.click()"
        assert (
            browser.evaluate(f"(() => {{ try {{ {put}; return 'put'; }} catch {{ return 'refused'; }} }})()")
            == "refused"
        )
    page = httpx.get(stack.http_url)
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert browser.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'stopped')") == "stopped"
    assert browser.evaluate("document.title") == "device-operations"
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)


def test_a_job_is_cancelled_by_its_button_while_the_list_goes_on(
    stack: RunningStack, client: Client, browser: browsers.Browser
) -> None:
    browser.open(stack.http_url)
    browser.wait(f"{ROWS} >= 1")
    job_id = slow(client)
    row = f"document.querySelector('#jobs tr[data-key=\"{job_id}\"]')"
    browser.wait(f"{row}?.innerText.includes('running')")
    browser.evaluate(f"{row}.querySelector('button.danger').click()")
    assert client.wait(job_id, timeout=20).state is State.CANCELLED
    browser.wait(f"{row}.innerText.includes('cancelled') && !{row}.querySelector('button.danger')")


def test_filters_narrow_the_list_and_older_jobs_are_shown_when_asked_for(
    stack: RunningStack, client: Client, browser: browsers.Browser
) -> None:
    label = str(uuid.uuid4())
    request = {"model_name": "tiny", "inputs": {"x": graphs.tensor(np.ones((1, 4), np.float32))}}
    jobs = client.submit_many([("inference.run", request | {"job": {"labels": {"set": label}}})] * 60)
    for job in jobs:
        client.wait(job, timeout=30)
    browser.open(stack.http_url)
    browser.wait(f"{ROWS} === 50 && !document.getElementById('more').hidden")
    browser.evaluate(
        f"{{ const box = document.querySelector('#filters [name=label]'); box.value = 'set:{label}'; "
        "box.dispatchEvent(new Event('change', {bubbles: true})); 0 }"
    )
    browser.wait(
        f"{ROWS} === 50 && [...document.querySelectorAll('#jobs tbody tr')].every((r) => r.innerText.includes('{label}'))"
    )
    browser.evaluate("document.getElementById('more').click()")
    browser.wait(f"{ROWS} === 60 && document.getElementById('more').hidden")
    browser.evaluate(
        "{ const box = document.querySelector('#filters [name=state]'); box.value = 'failed'; "
        "box.dispatchEvent(new Event('change', {bubbles: true})); 0 }"
    )
    browser.wait("document.querySelector('#jobs tr.empty')?.innerText === 'No jobs.'")


def test_a_key_is_asked_for_used_and_kept_in_the_tab_only(
    start_stack: Callable[..., RunningStack], browser: browsers.Browser
) -> None:
    stack = start_stack(API_KEYS="ada:secret-of-ada:admin")
    browser.open(stack.http_url)
    browser.wait("document.getElementById('health').textContent === 'key needed'")
    assert "API key" in browser.evaluate("document.getElementById('notice').innerText")
    browser.evaluate(
        "{ document.getElementById('key').value = 'secret-of-ada'; "
        "document.getElementById('key-form').requestSubmit(); 0 }"
    )
    browser.wait("document.getElementById('health').textContent === 'ready'")
    browser.wait("document.querySelector('#devices .card')")
    assert browser.evaluate("localStorage.length + document.cookie.length") == 0
    assert (
        browser.evaluate("document.getElementById('notice').hidden && document.getElementById('key').type")
        == "password"
    )


def test_a_gateway_that_is_gone_is_told_and_found_again(
    start_stack: Callable[..., RunningStack], browser: browsers.Browser
) -> None:
    stack = start_stack()
    browser.open(stack.http_url)
    browser.wait("document.getElementById('health').textContent === 'ready'")
    stack.kill("gateway")
    browser.wait("document.getElementById('health').textContent === 'no answer'")
    stack.start("gateway")
    browser.wait("document.getElementById('health').textContent === 'ready'", 60)


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1300, True)])
def test_the_page_fits_its_window_and_keeps_its_contrast(
    stack: RunningStack, client: Client, browser: browsers.Browser, width: int, dark: bool
) -> None:
    run(client, **{"a-long-label": "x" * 200})
    browser.look(width, 844, dark=dark)
    browser.open(stack.http_url)
    browser.wait(f"{ROWS} >= 1")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    contrast = browser.evaluate(
        """(() => {
          const light = (colour) => {
            const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map((v) => v / 255)
              .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const card = light(getComputedStyle(document.querySelector('.card')).backgroundColor);
          return Math.min(...[...document.querySelectorAll('h3, .subtle, .legend li, #jobs td, #jobs .link')].map((e) => {
            const text = light(getComputedStyle(e).color);
            return (Math.max(text, card) + 0.05) / (Math.min(text, card) + 0.05);
          }));
        })()"""
    )
    assert contrast >= 4.5
