"""A headless Chromium that is installed on the machine, over the DevTools protocol's pipe.

    with chromium.started(tmp_path) as browser:
        page = browser.page("http://127.0.0.1:8000/")
        page.type("words"); page.press("Enter"); page.until("document.title != ''")

Input goes through the browser as a person's does. What the page asks for, and what it complains
about, is kept. Nothing is downloaded; other hosts than 127.0.0.1 are not found.

    python tests/chromium.py http://127.0.0.1:8000/ "a query" docs [picture.png ...]

takes the pictures of docs/serve.md from a server that runs: serve.png, serve-dark.png and
serve-narrow.png.
"""

import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # containers run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
# The browser expects its pipes at 3 and 4.
_START = """\
import os, sys
kept = [os.dup(int(number)) for number in sys.argv[1:3]]
for kept, number in zip(kept, (3, 4)):
    os.dup2(kept, number)
    os.set_inheritable(number, True)
os.execv(sys.argv[3], sys.argv[3:])
"""
_KEYS = {"Enter": 13, "Tab": 9, "Escape": 27, " ": 32, "ArrowLeft": 37, "ArrowRight": 39}


def find() -> str | None:
    """The program; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def started(folder: pathlib.Path) -> Iterator["Browser"]:
    """A browser with a profile of its own in a folder; gone at the end of the block."""
    to_child, to_browser = os.pipe()
    from_browser, from_child = os.pipe()

    process = subprocess.Popen(
        [sys.executable, "-c", _START, str(to_child), str(from_child), find(), *_FLAGS]
        + [f"--user-data-dir={folder / 'profile'}"],
        pass_fds=(to_child, from_child),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(to_child)
    os.close(from_child)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        os.close(to_browser)
        os.close(from_browser)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


class Browser:
    """See `started`."""

    def __init__(self, write: int, read: int):
        self._write, self._read = write, read
        self._number, self._left = 0, b""
        self._pages: dict[str, Page] = {}

    def page(self, url: str, width: int = 1000, height: int = 800) -> "Page":
        """A new tab."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log", "DOM", "Accessibility"):
            page.call(f"{domain}.enable")
        page.size(width, height)
        page.go(url)
        return page

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """The result of a command.

        Raises:
            AssertionError: it failed.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive(30)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next message; events are kept by their pages."""
        end = time.monotonic() + seconds
        while b"\0" not in self._left:
            assert select.select([self._read], [], [], max(0, end - time.monotonic()))[0]
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has gone"
            self._left += part
        text, _, self._left = self._left.partition(b"\0")
        message = json.loads(text)
        if message.get("sessionId") in self._pages and "method" in message:
            self._pages[message["sessionId"]].note(message["method"], message["params"])
        return message


class Page:
    """A tab.

    Attributes:
        requests: URLs that it has asked for.
        complaints: errors and warnings of scripts, of the network, and of what the policy forbids.
    """

    def __init__(self, browser: Browser, session: str):
        self._browser, self._session = browser, session
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def call(self, method: str, **parameters: Any) -> Any:
        """See `Browser.call`."""
        return self._browser.call(method, self._session, **parameters)

    def note(self, method: str, said: dict[str, Any]) -> None:
        """Keeps an event."""
        if method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(said["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning"):
            self.complaints.append(json.dumps(said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.complaints.append(json.dumps(said["entry"]))

    def go(self, url: str) -> None:
        """Loads a page."""
        self.call("Page.navigate", url=url)
        self.until("document.readyState == 'complete' && location.href != 'about:blank'")

    def size(self, width: int, height: int, scale: float = 1) -> None:
        """Pixels of the window."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )

    def prefer(self, **features: str) -> None:
        """Media features: color_scheme="dark", reduced_motion="reduce"."""
        listed = [
            {"name": f"prefers-{name.replace('_', '-')}", "value": value}
            for name, value in features.items()
        ]
        self.call("Emulation.setEmulatedMedia", features=listed)

    def value(self, expression: str) -> Any:
        """What JavaScript says."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 30) -> None:
        """Waits for JavaScript to say yes.

        Raises:
            AssertionError: it does not in time.
        """
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, f"not in {seconds} s: {expression}; {self.complaints}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Clicks the middle of an element, which must be there to be seen."""
        box = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2, r.width * r.height]; })()"
        )
        assert box[2] > 0, f"{selector} is not shown"
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=box[0],
                y=box[1],
                button="left",
                clickCount=1,
            )

    def type(self, text: str) -> None:
        """Types where the focus is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """Presses a key."""
        code, text = _KEYS[key], {"Enter": "\r", " ": " "}.get(key)
        common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        shown = {"text": text} if text else {}
        kind = "keyDown" if text else "rawKeyDown"
        self.call("Input.dispatchKeyEvent", type=kind, code=key, **common, **shown)
        self.call("Input.dispatchKeyEvent", type="keyUp", code=key, **common)

    def upload(self, selector: str, files: Sequence[pathlib.Path]) -> None:
        """Chooses files."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in files])

    def tree(self) -> list[dict[str, Any]]:
        """What assistive technology is given: role, name and properties of each node."""
        nodes = []
        for node in self.call("Accessibility.getFullAXTree")["nodes"]:
            if not node.get("ignored"):
                properties = {
                    p["name"]: p["value"].get("value") for p in node.get("properties", [])
                }
                role, name = (node.get(k, {}).get("value", "") for k in ("role", "name"))
                nodes.append({"role": role, "name": name, **properties})
        return nodes

    def screenshot(self, path: pathlib.Path, whole: bool = True) -> None:
        """Writes a PNG of the page."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(taken["data"]))


def _main(url: str, query: str, folder: str, *pictures: str) -> None:
    with tempfile.TemporaryDirectory() as profile, started(pathlib.Path(profile)) as browser:
        page = browser.page(url, 1040, 760)
        page.until("!document.querySelector('#model').hidden")
        if pictures:
            page.upload("#files", [pathlib.Path(picture).resolve() for picture in pictures])
            page.until(f"document.querySelectorAll('.pictures img').length == {len(pictures)}")
        page.click("#text")
        page.type(query)
        page.press("Enter")
        page.until("!document.querySelector('#results').hidden")
        page.until("[...document.images].every((image) => image.complete)")
        for name, scheme, width, height in (
            ("serve", "light", 1040, 760),
            ("serve-dark", "dark", 1040, 760),
            ("serve-narrow", "light", 400, 760),
        ):
            page.prefer(color_scheme=scheme)
            page.size(width, height)
            page.screenshot(pathlib.Path(folder) / f"{name}.png", whole=False)


if __name__ == "__main__":
    _main(*sys.argv[1:])
