"""A headless Chromium that tests drive over its debugging pipe: no package and no driver stands between."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The browser's program, if this machine has one."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One browser with one page. `evaluate` runs script in it; what the page complained of is in `complaints`."""

    def __init__(self, program: str, profile: Path) -> None:
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        arguments = [
            program, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run",
            "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--no-sandbox",
            "--disable-extensions", "--mute-audio", "--hide-scrollbars", "about:blank",
        ]  # fmt: skip
        # The browser reads commands from file descriptor 3 and answers on 4.
        shell = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", shell, "bash", *arguments],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer."""
        self._number += 1
        number = self._number
        sent: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            sent["sessionId"] = self._session
        os.write(self._to, json.dumps(sent).encode() + b"\0")
        while True:
            heard = self._hear()
            if heard.get("id") == number:
                assert "error" not in heard, f"{method}: {heard['error']}"
                result: dict[str, Any] = heard["result"]
                return result
            self._note(heard)

    def open(self, url: str) -> None:
        """Goes to an address."""
        self.command("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page; awaits it where it is a promise."""
        told = self.command("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, script: str, seconds: float = 20) -> Any:
        """Polls until an expression is true, and gives its value; fails with what the page shows.

        An expression that fails, since the page is still loading, is not true yet.
        """
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(f"(() => {{ try {{ return {script}; }} catch {{ return null; }} }})()")):
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"not so within {seconds:g} s: {script}\n{self.evaluate('document.body.innerText')[:3000]}\n"
                    f"{self.complaints}"
                )
            time.sleep(0.05)
        return value

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """Sets the window's size and the preferred colours."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> Path:
        """A picture of the whole page."""
        told = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))
        return path

    def close(self) -> None:
        """Ends the browser."""
        os.close(self._to)
        os.close(self._from)
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hear(self, seconds: float = 60) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._from], [], [], seconds)[0], "the browser does not answer"
            read = os.read(self._from, 2**20)
            assert read, "the browser has ended"
            self._buffer += read
        text, _, self._buffer = self._buffer.partition(b"\0")
        heard: dict[str, Any] = json.loads(text)
        return heard

    def _note(self, heard: dict[str, Any]) -> None:
        params = heard.get("params", {})
        if heard.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif heard.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif heard.get("method") == "Page.javascriptDialogOpening":
            self.complaints.append(f"dialog: {params['message']}")
            os.write(
                self._to,
                json.dumps(
                    {
                        "id": 0,
                        "method": "Page.handleJavaScriptDialog",
                        "params": {"accept": True},
                        "sessionId": self._session,
                    }
                ).encode()
                + b"\0",
            )
