"""A real Chromium without a window, driven by its DevTools protocol over a pipe: no driver, no port."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_TIMEOUT_S = 20.0


class Browser:
    """One page.

    Attributes:
        requests: address of each request that the page made.
        faults: exceptions of its script, and what the browser calls an error, such as a request that it refused.
    """

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._buffer, self._last = send, receive, b"", 0
        self._session: dict[str, str] = {}
        self.requests, self.faults = list[str](), list[str]()
        target = self.call("Target.createTarget", url="about:blank")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=1000, height=900, deviceScaleFactor=1, mobile=False)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters, **self._session}
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._last:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + _TIMEOUT_S
        while b"\0" not in self._buffer:
            ready = select.select([self._receive], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, "Chromium does not answer"
            self._buffer += os.read(self._receive, 2**20)
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        match event:
            case {"method": "Network.requestWillBeSent", "params": {"request": {"url": str(url)}}}:
                self.requests.append(url)
            case {"method": "Runtime.exceptionThrown", "params": told}:
                self.faults.append(json.dumps(told))
            case {"method": "Log.entryAdded", "params": {"entry": {"level": "error"} as told}}:
                self.faults.append(json.dumps(told))

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, f"{script}: {done['exceptionDetails']}"
        return done["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not self.run(condition):
            assert time.monotonic() < deadline, f"{condition}: {self.run('document.body.innerText')} {self.faults}"
            time.sleep(0.02)

    def drag(self, selector: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse on an element, move it and let it go; places are shares of its width and height."""
        x, y, width, height = self._box(selector)
        for kind, share in (("mousePressed", 0), ("mouseMoved", 0.5), ("mouseMoved", 1), ("mouseReleased", 1)):
            across, down = (a + share * (b - a) for a, b in zip(start, end, strict=True))
            where = {"x": x + width * across, "y": y + height * down}
            self.call("Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1, **where)

    def _box(self, selector: str) -> list[float]:
        """x, y, width and height of an element that is brought into view."""
        return self.run(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: "center"}});
            const {{x, y, width, height}} = element.getBoundingClientRect();
            return [x, y, width, height];
        }})()""")

    def click(self, selector: str) -> None:
        """Click the middle of an element."""
        self.drag(selector, (0.5, 0.5), (0.5, 0.5))

    def choose_file(self, selector: str, file: Path) -> None:
        """Choose a file in a field."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def drop(self, selector: str, file: Path) -> None:
        """Drop a file onto an element."""
        x, y, width, height = self._box(selector)
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x + width / 2, y=y + height / 2, data=data)

    def screenshot(self) -> bytes:
        """The page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser with a new profile in `folder`; it can reach no other host than this one."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("Debian's chromium is not installed (.ci/run installs it)")
    pipes = [os.pipe(), os.pipe()]
    # Chromium reads from 3 and writes to 4, so these numbers must not be in use here.
    read, write = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (pipes[0][0], pipes[1][1]))
    options = [
        *["--headless", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run"],
        *["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"],
        *["--disable-background-networking", "--disable-component-update", "--disable-sync"],
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ]
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", program, *options],
        pass_fds=(read, write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for end in (read, write, pipes[0][0], pipes[1][1]):
        os.close(end)
    try:
        yield Browser(pipes[0][1], pipes[1][0])
    finally:
        os.close(pipes[0][1])  # it ends with its pipe
        os.close(pipes[1][0])
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
