"""A job's images on the dashboard, in a real browser: with their seeds and settings, and again with another seed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_operations import Client
from tests.pages import browser as browsers
from tests.pages.test_dashboard import ATTACK, PROGRAM, browser, pytestmark  # noqa: F401 - fixtures and marks
from tests.pipelines.conftest import sdxl, sdxl_folder, vae, vae_folder  # noqa: F401 - fixtures
from tests.support.stack import RunningStack

OPEN = "document.getElementById('details').open"
CAPTIONS = "[...document.querySelectorAll('#details figcaption')].map((caption) => caption.textContent)"
#: The largest difference between two pixels of the first image that is shown: an empty canvas has none.
CONTRAST = """(() => {
  const canvas = document.querySelector('#details canvas');
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const red = [...data].filter((_, index) => index % 4 === 0);
  return Math.max(...red) - Math.min(...red);
})()"""


@pytest.fixture(scope="module")
def client(stack: RunningStack, sdxl_folder: Path) -> Iterator[Client]:  # noqa: F811
    shutil.copytree(sdxl_folder, stack.folder / "models" / "tiny-sdxl")
    with Client(stack.http_url) as made:
        made.result(made.inference.load_model("tiny", "tiny-sdxl", model_type="sdxl"))
        yield made


def show(browser: browsers.Browser, stack: RunningStack, job_id: str) -> None:  # noqa: F811
    browser.open(stack.http_url)
    row = f"document.querySelector('#jobs tr[data-key=\"{job_id}\"] button.link')"
    browser.wait(f"{row} !== null")
    browser.evaluate(f"{row}.click()")
    browser.wait(OPEN)


@pytest.mark.slow
def test_a_jobs_images_are_shown_with_what_made_them_and_again_with_another_seed(
    stack: RunningStack,
    client: Client,
    browser: browsers.Browser,  # noqa: F811
) -> None:
    options = {"width": 32, "height": 32, "steps": 2, "seed": 7, "images": 2, "negative_prompt": ATTACK}
    job = client.images.submit("a cat", model_name="tiny", options=options, wait=30)
    show(browser, stack, job.job_id)
    assert browser.evaluate(CAPTIONS) == ["seed 7", "seed 8"]
    browser.wait(f"{CONTRAST} > 20")
    settings = browser.evaluate("document.querySelector('#details .settings').innerText")
    assert "a cat" in settings and "euler" in settings and ATTACK in settings
    assert browser.evaluate("document.querySelectorAll('dialog img, dialog script').length") == 0
    browser.evaluate("document.querySelector('#details button.quiet').click()")
    browser.wait(f"JSON.parse(document.getElementById('details-json').textContent).job_id !== '{job.job_id}'")
    again = json.loads(browser.evaluate("document.getElementById('details-json').textContent"))
    assert again["retried_from"] == job.job_id
    done = client.wait(again["job_id"], timeout=30)
    assert done.result is not None
    assert done.result["seed"] != 7
    show(browser, stack, done.job_id)
    assert browser.evaluate(CAPTIONS) == [f"seed {done.result['seed'] + number}" for number in range(2)]
    assert browser.complaints == []


def test_a_job_that_made_no_image_shows_none(stack: RunningStack, client: Client, browser: browsers.Browser) -> None:  # noqa: F811
    job = next(iter(client.jobs(kind="inference.load_model")))
    show(browser, stack, job.job_id)
    assert browser.evaluate("document.querySelectorAll('#details canvas, #details .settings').length") == 0
