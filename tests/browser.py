"""A page in headless Chromium (Qt WebEngine): `python -m tests.browser FILE WIDTH [SHOT.png]`, JSON on stdout.

A process of its own, for Chromium forks and keeps threads. What it does: load FILE from disk, measure it, click the
first picture as a mouse does, press Escape, move over the first plot.
"""

import json
import os
import sys

os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": "--no-sandbox --disable-gpu"}

from PySide6.QtCore import QEventLoop, QPoint, Qt, QTimer, QUrl
from PySide6.QtTest import QTest
from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineUrlRequestInterceptor
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

PAGE = """({
  inner: innerWidth, width: document.documentElement.scrollWidth,
  pictures: [...document.images].map((i) => i.complete && i.naturalWidth > 0),
  tables: [...document.querySelectorAll(".scroll")].map((t) => t.getBoundingClientRect().right <= innerWidth),
  script: document.querySelector(".plot svg")?.tabIndex === 0,
})"""
FIRST = """(() => {
  const large = document.querySelector("figure:target"), all = document.images;
  const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height] };
  return {picture: box(all[0]), target: large?.id ?? null, overlay: large ? box(large) : null,
          focus: document.activeElement.className, height: innerHeight};
})()"""
PLOT = """(() => {
  const plot = document.querySelector(".plot"), svg = plot.querySelector("svg");
  const r = svg.getBoundingClientRect(), at = plot.querySelector(".at").textContent;
  const values = [...plot.querySelectorAll("output")].map((o) => o.value);
  return {box: [r.left, r.top, r.width, r.height], at, values};
})()"""


class Page(QWebEnginePage):
    def __init__(self, parent, console):
        super().__init__(parent)
        self.console = console

    def javaScriptConsoleMessage(self, level, message, line, source):
        self.console.append(f"{level.name} {message} ({source}:{line})")


class Requests(QWebEngineUrlRequestInterceptor):
    """Every address the page asks for, data: and the file itself too."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def interceptRequest(self, info):
        self.seen.append(info.requestUrl().toString()[:60])


def main(file, width, shot=None):
    app = QApplication([])
    console, requests = [], []
    view = QWebEngineView()
    page, seen = Page(view, console), Requests(requests)
    page.setUrlRequestInterceptor(seen)
    view.setPage(page)
    view.resize(width, 900)
    view.show()

    def wait(start, limit=20_000):
        loop, got = QEventLoop(), []
        QTimer.singleShot(limit, loop.quit)
        start(lambda *value: (got.append(value), loop.quit()))
        loop.exec()
        assert got, "the page did not answer"
        return got[0][0] if got[0] else None

    def ask(script):
        return json.loads(wait(lambda done: page.runJavaScript(f"JSON.stringify({script})", done)))

    def pause(milliseconds=300):
        wait(lambda done: QTimer.singleShot(milliseconds, done))

    def load(done):
        page.loadFinished.connect(done)
        view.load(QUrl.fromLocalFile(os.path.abspath(file)))

    loaded = wait(load)
    pause()
    found = {"loaded": loaded, "page": ask(PAGE)}
    wait(lambda done: page.runJavaScript("document.images[0]?.scrollIntoView({block: 'center'}), 1", done))
    pause()
    found["before"] = ask(FIRST)
    left, top, across, down = found["before"]["picture"]
    middle = QPoint(round(left + across / 2), round(top + down / 2))
    QTest.mouseClick(view.focusProxy(), Qt.MouseButton.LeftButton, pos=middle)
    pause()
    found["clicked"] = ask(FIRST)
    if shot:
        view.grab().save(shot)
    for key in (Qt.Key.Key_Right, Qt.Key.Key_Escape):
        QTest.keyClick(view.focusProxy(), key)
        pause()
        found[f"after {key.name}"] = ask(FIRST)
    wait(lambda done: page.runJavaScript("document.querySelector('.plot').scrollIntoView({block: 'center'}), 1", done))
    pause()
    found["plot"] = ask(PLOT)
    left, top, across, down = found["plot"]["box"]
    for share in (0.5, 0.25):
        QTest.mouseMove(view.focusProxy(), QPoint(round(left + across * share), round(top + down / 2)))
        pause()
    found["over"] = ask(PLOT)
    print(json.dumps(found | {"console": console, "requests": requests}), flush=True)
    app.quit()
    os._exit(0)  # Qt tears its profile and its pages down in an order of its own


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
