"Headless Chromium over its own protocol."
import itertools
import json
import shutil
import subprocess
import time
import urllib.request

import pytest
import websocket  # jupyter brings it

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = {"desktop": (1400, 1000), "phone": (390, 844)}


def until(ready, what="what was waited for", seconds=120):
    "What `ready` gives once it gives something."
    end = time.time() + seconds
    while time.time() < end:
        try:
            if found := ready(): return found
        except OSError: pass
        time.sleep(0.05)
    raise TimeoutError(f"{what}: nothing in {seconds} s")


class Browser:
    "One page of a browser of its own."
    def __init__(self, folder):
        if CHROMIUM is None: pytest.skip("Chromium is not installed")
        self.process = subprocess.Popen([CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0", "--remote-allow-origins=*",
                                         "--disable-background-networking", "--no-first-run", f"--user-data-dir={folder}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = until(lambda: (folder / "DevToolsActivePort").exists() and (folder / "DevToolsActivePort").read_text().split("\n")[0], "Chromium")
        pages = until(lambda: [p for p in json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list")) if p["type"] == "page"], "Chromium's page")
        self.socket = websocket.create_connection(pages[0]["webSocketDebuggerUrl"], timeout=120)
        self.ids, self.events = itertools.count(1), []
        for domain in ("Page", "Runtime", "Log", "Network"): self.call(f"{domain}.enable")
        self.window("desktop")

    def call(self, method, **parameters):
        number = next(self.ids)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def js(self, expression):
        "The value of an expression."
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression, what, seconds=120):
        "What an expression's promise is fulfilled with. The page holds it and is asked for it: one that only a call of the protocol waits for may be collected before its time."
        name = f"asked{next(self.ids)}"
        self.js("void (window.%s = {promise: (async () => %s)().then(value => [true, value ?? null], error => [false, String(error?.stack ?? error)]).then(result => { window.%s.result = result })})" % (name, expression, name))
        end = time.time() + seconds
        while (result := self.js(f"window.{name} ? window.{name}.result ?? null : 'lost'")) is None:
            assert time.time() < end, f"{what} did not end in {seconds} s"
            time.sleep(0.1)
        assert result != "lost", f"{what}: the page was left before it ended"
        assert result[0], f"{what} failed: {result[1]}"
        self.js(f"void delete window.{name}")
        return result[1]

    def window(self, size, dark=False):
        "A window of one of the two sizes."
        width, height = SIZES[size]
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=size == "phone")
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def open(self, url, size="desktop", dark=False):
        "Go to a page, and wait for its images and its maths."
        self.window(size, dark)
        self.events.clear()
        self.call("Page.navigate", url=url)
        until(lambda: self.js("document.readyState") == "complete" and self.js("location.href") == url, url)
        self.wait("window.MathJax?.startup?.promise?.then(() => true)", f"the maths of {url}")
        until(lambda: self.js("[...document.images].every(i => i.complete)"), f"the images of {url}")

    def errors(self):
        "What the console holds against the page, and what it asked the network for."
        told = []
        for event in self.events:
            p = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown": told.append(p["exceptionDetails"])
            if event.get("method") == "Runtime.consoleAPICalled" and p["type"] in ("error", "assert"): told.append(p["args"])
            if event.get("method") == "Log.entryAdded" and p["entry"]["level"] == "error": told.append(p["entry"])
            if event.get("method") == "Network.requestWillBeSent" and p["request"]["url"].split(":")[0] in ("http", "https"): told.append(p["request"]["url"])
        return told

    def sideways(self):
        "What of the page's frame is wider than the window, so that the page would scroll sideways; the theme lets its content scroll on a phone."
        return self.js("[document.scrollingElement, ...document.querySelectorAll('.page, .main, .content, article')].filter(e => e.scrollWidth > Math.min(innerWidth, e.clientWidth) + 1)"
                       ".map(e => [e.tagName, e.className, e.scrollWidth, e.clientWidth])")

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(60)
