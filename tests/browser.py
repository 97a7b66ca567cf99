"""Pages in a browser: Debian's chromium, driven through its debugging pipe."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")
PATIENCE = 120  # seconds that the browser gets for one command
START = "import os, sys; _, there, back, *argv = sys.argv; os.dup2(int(there), 3); os.dup2(int(back), 4); " \
        "os.execv(argv[0], argv)"


class Browser:
    """A page in headless chromium. Commands of the DevTools protocol go through file descriptors 3 and 4, each message
    ended by a zero byte."""

    def __init__(self, profile: Path):
        there, self.write = os.pipe()
        self.read, back = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (there, back)]  # not 3 or 4 themselves
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
                 f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen([sys.executable, "-c", START, *map(str, ends), CHROMIUM, *flags], pass_fds=ends,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (there, back, *ends):
            os.close(end)
        self.left, self.number, self.session, self.events = b"", 0, None, []
        pages = [target for target in self("Target.getTargets")["targetInfos"] if target["type"] == "page"]
        self.session = self("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **values) -> dict:
        """Sends one command and returns its result; events that come meanwhile are kept in `events`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": values}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            message = self.receive(until)
            if message.get("id") == self.number:
                assert "error" not in message, message["error"]
                return message["result"]
            self.events.append(message)
        raise TimeoutError(method)

    def receive(self, until: float) -> dict:
        while b"\0" not in self.left:
            if not select.select([self.read], [], [], max(until - time.monotonic(), 0))[0]:
                raise TimeoutError("chromium does not answer")
            self.left += os.read(self.read, 1 << 16)
        message, _, self.left = self.left.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        self("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def js(self, expression: str):
        """The value of an expression in the page."""
        done = self("Runtime.evaluate", expression=expression, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, condition: str) -> None:
        until = time.monotonic() + PATIENCE
        while not self.js(condition):
            assert time.monotonic() < until, condition
            time.sleep(0.05)

    def press(self, key: str, code: str = "", shift: bool = False) -> None:
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=code, modifiers=8 * shift, **text)

    def size(self, width: int, height: int) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)

    def screenshot(self, file: Path, **values) -> None:
        file.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png", **values)["data"]))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)
