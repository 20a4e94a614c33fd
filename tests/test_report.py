"""The report in headless Chromium, driven over WebDriver's HTTP protocol; and what needs no browser."""
import json
import re
import shutil
import subprocess
import time
import urllib.request
from html.parser import HTMLParser

import numpy as np
import pytest

import pictures
import report
import sample

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # chromedriver is on this machine, whatever the proxy
CLIPS = ["clip-10", "clip-9", "<i>&\"nasty\"</i>", "clip-2"]
ENTER, TAB = "\ue007", "\ue004"


class Browser:
    """A Chromium session: pages from disk, script in them, keys, the console."""

    def __init__(self, port: int, profile: str):
        self.root = f"http://127.0.0.1:{port}"
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        capabilities = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        self.root += "/session/" + self.post("/session", capabilities=capabilities)["sessionId"]

    def post(self, path: str, **body):
        request = urllib.request.Request(self.root + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with LOCAL.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path, width: int) -> None:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.post("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=size)
        self.post("/url", url=path.as_uri())

    def run(self, script: str):
        return self.post("/execute/sync", script=script, args=[])

    def press(self, key: str) -> None:
        strokes = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self.post("/actions", actions=[{"type": "key", "id": "keyboard", "actions": strokes}])

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of an element, as a reader would: what lies over it gets the click."""
        (element,) = self.post("/element", using="css selector", value=selector).values()
        self.post(f"/element/{element}/click")

    def console(self) -> list:
        return self.post("/se/log", type="browser")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not (chromium and shutil.which("chromedriver")):
        pytest.skip("no chromium and chromedriver on this machine: apt-get install chromium chromium-driver")
    log = tmp_path_factory.mktemp("driver") / "log.txt"
    with open(log, "w") as file:
        driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=file, stderr=subprocess.STDOUT)
    session = None
    try:
        deadline = time.monotonic() + 60
        while not (port := re.search(r"successfully on port (\d+)", log.read_text())):
            assert time.monotonic() < deadline and driver.poll() is None, log.read_text()
            time.sleep(0.1)
        session = Browser(int(port[1]), str(tmp_path_factory.mktemp("profile")))
        yield session
    finally:
        if session:
            LOCAL.open(urllib.request.Request(session.root, method="DELETE"), timeout=60).close()
        driver.terminate()
        driver.wait(30)


def invent(frames: int = 6) -> tuple[dict, list[dict], list[np.ndarray]]:
    """Return scores, rows and overlays of CLIPS: IoU grows along each clip; the last frame of the first has none; one F decay is None."""
    rows, images, per_clip = [], [], {}
    for position, clip in enumerate(CLIPS):
        video, masks = sample.make_clip(position, frames, 64, 111)
        for index in range(frames):
            iou = (index + position) / 10
            empty = position == 0 and index == frames - 1
            scores = {"iou": float("nan"), "J": 1.0, "F": 1.0} if empty else {"iou": iou, "J": iou, "F": iou}
            rows.append({"index": len(rows), "clip": clip, "frame": f"{index:05d}", **scores})
            images.append(pictures.overlay(video[index], masks[index - 1], masks[index]))
        per_clip[clip] = {"mean_iou": position / 10, "J_mean": [0.3, -0.0, 0.25, 0.1][position], "J_decay": -0.1 * position, "F_mean": 0.5,
                          "F_decay": None if clip == "clip-9" else 0.1 * position}
    scores = {"protocol": "all", "frames": len(rows), "mean_iou": 0.123456, "J_mean": 0.3, "J_recall": None, "per_clip": per_clip}
    return scores, rows, images


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Return the path of a report on CLIPS."""
    scores, rows, images = invent()
    path = tmp_path_factory.mktemp("report") / "report.html"
    facts = {"model": "<b>linear</b>", "parameters": 1234567, "command": "python evaluate.py --model " + "runs/a-long-name/" * 12}
    report.write_report(path, scores, rows, images.__getitem__, facts, title="A <report>")
    return path


def order(browser: Browser) -> list[str]:
    return browser.run("return [...document.querySelectorAll('#clips tbody th')].map(th => th.textContent)")


def test_click_on_a_heading_sorts_and_a_second_one_reverses(browser, page):
    browser.open(page, 1280)
    assert order(browser) == CLIPS
    browser.click("#clips th:nth-child(3) button")
    assert order(browser) == ["clip-9", "clip-2", CLIPS[2], "clip-10"]
    assert browser.run("return [...document.querySelectorAll('[aria-sort]')].map(th => [th.cellIndex, th.ariaSort])") == [[2, "ascending"]]
    browser.click("#clips th:nth-child(3) button")
    assert order(browser) == ["clip-10", CLIPS[2], "clip-2", "clip-9"]
    browser.click("#clips th:nth-child(1) button")
    assert [name for name in order(browser) if name in ("clip-2", "clip-9", "clip-10")] == ["clip-2", "clip-9", "clip-10"]
    assert browser.run("return document.querySelectorAll('#clips th[aria-sort]').length") == 1


def test_a_clip_without_a_value_stays_last(browser, page):
    browser.open(page, 1280)
    for expected in (["clip-10", CLIPS[2], "clip-2", "clip-9"], ["clip-2", CLIPS[2], "clip-10", "clip-9"]):
        browser.click("#clips th:nth-child(6) button")
        assert order(browser) == expected


def test_keyboard_alone_sorts(browser, page):
    browser.open(page, 1280)
    for _ in range(10):
        browser.press(TAB)
        if browser.run("return document.activeElement.textContent") == "J":
            break
    assert browser.run("return document.activeElement.closest('th').cellIndex") == 2
    browser.press(ENTER)
    assert order(browser) == ["clip-9", "clip-2", CLIPS[2], "clip-10"]
    browser.press(" ")
    assert order(browser) == ["clip-10", CLIPS[2], "clip-2", "clip-9"]


@pytest.mark.parametrize("width", [375, 1280])
def test_page_fits_and_every_picture_loads(browser, page, width):
    browser.open(page, width)
    assert browser.run("return innerWidth") == width
    assert browser.run("return document.documentElement.scrollWidth") <= width
    sizes = browser.run("return [...document.images].map(i => [i.complete, i.naturalWidth, i.width, i.alt.length])")
    assert len(sizes) == 3 * len(CLIPS)
    assert all(complete and natural == 111 and shown > 100 and words > 20 for complete, natural, shown, words in sizes)


def test_names_are_text_not_markup(browser, page):
    browser.open(page, 375)
    assert browser.run("return [document.title, document.querySelectorAll('i, b').length]") == ["A <report>", 0]
    assert browser.run("return document.querySelector('dd').textContent") == "<b>linear</b>"
    assert CLIPS[2] in browser.run("return document.images[6].alt")


def test_console_stays_empty_and_no_identifier_is_used_twice(browser, page):
    browser.console()  # what earlier pages left
    browser.open(page, 1280)
    browser.click("#clips th:nth-child(2) button")
    assert browser.console() == []
    browser.run("console.error('heard')")
    assert len(browser.console()) == 1  # so that silence means something
    ids = browser.run("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert browser.run("return [...document.querySelectorAll('a')].every(a => document.querySelector(a.getAttribute('href')))")


def test_report_without_annotations_shows_first_middle_and_last(browser, tmp_path):
    _, rows, images = invent(frames=5)
    bare = [{key: row[key] for key in ("index", "clip", "frame")} for row in rows]
    report.write_report(tmp_path / "report.html", None, bare, images.__getitem__, {"model": "linear"})
    browser.console()
    browser.open(tmp_path / "report.html", 375)
    captions = browser.run("return [...document.querySelectorAll('figcaption')].map(c => c.textContent)")
    assert [caption.strip() for caption in captions[:3]] == ["First: frame 00000", "Middle: frame 00002", "Last: frame 00004"]
    assert browser.run("return document.querySelectorAll('table').length") == 0
    assert "truth" not in browser.run("return document.body.innerText")
    assert browser.run("return document.documentElement.scrollWidth") <= 375
    assert browser.console() == []


def test_a_curves_drawing_opens_by_itself(browser, tmp_path):
    rows = [{"step": step, "loss": 1 / (step + 1), "seconds": step / 10} for step in range(11)] + [{"step": 10, "val_iou": 0.5}]
    pictures.write_curves(tmp_path / "curves.svg", rows, "A <run> & more")
    browser.console()
    browser.open(tmp_path / "curves.svg", 1280)
    assert browser.run("return document.querySelector('title').textContent") == "A <run> & more"
    measure = "const b = text.getBBox(); return [b.x, b.x + b.width, b.y + b.height]"
    boxes = browser.run(f"return [...document.querySelectorAll('text')].map(text => {{ {measure} }})")
    width, height = browser.run("const box = document.documentElement.viewBox.baseVal; return [box.width, box.height]")
    assert all(left >= 0 and right <= width and bottom <= height for left, right, bottom in boxes)
    assert browser.console() == []


# --- what needs no browser ---------------------------------------------------------------------


def row(iou: float | None, index: int = 0) -> dict:
    return {"index": index, "clip": "clip", "frame": f"{index:05d}", "iou": iou, "J": iou, "F": iou}


@pytest.mark.parametrize("ious, expected", [
    ([0.5, 0.1, 0.9], [("Worst", 1), ("Median", 0), ("Best", 2)]),
    ([0.5, None, 0.9, float("nan"), 0.7], [("Worst", 0), ("Median", 4), ("Best", 2)]),
    ([0.5, 0.4], [("Worst", 1), ("Best", 0)]),
    ([0.5], [("Worst", 0)]),
    ([None, None, None, None], [("First", 0), ("Middle", 2), ("Last", 3)]),
    ([None], [("First", 0)]),
])
def test_frames_chosen(ious, expected):
    rows = [row(iou, index) for index, iou in enumerate(ious)]
    assert [(word, chosen["index"]) for word, chosen in report.choose_frames(rows)] == expected


def test_sparkline_breaks_where_a_value_is_missing():
    drawn = report.sparkline([0.0, 1.0, None, 0.5, float("nan"), 0.5, 0.5])
    assert re.findall(r'polyline points="([^"]*)"', drawn) == ["0.5,30 1.5,2", "3.5,16 3.5,16", "5.5,16 6.5,16"]
    assert report.sparkline([None]) == report.NONE


def test_only_the_chosen_frames_are_drawn(tmp_path):
    scores, rows, images = invent()
    asked = []
    report.write_report(tmp_path / "report.html", scores, rows, lambda index: asked.append(index) or images[index], {})
    assert len(asked) == 3 * len(CLIPS) and asked[:3] == [0, 2, 4]


def test_twenty_clips_of_noise_stay_below_five_megabytes(tmp_path):
    """Noise is the worst that JPEG can meet, half of it already far beyond real frames."""
    rng = np.random.default_rng(0)
    image = (rng.integers(0, 128, (480, 854, 3)) + np.linspace(0, 127, 854)[:, None]).astype(np.uint8)
    rows = [{"index": 0, "clip": f"clip-{clip}", "frame": "0", "iou": 0.5, "J": 0.5, "F": 0.5} for clip in range(20) for _ in range(90)]
    per_clip = {f"clip-{clip}": {"J_mean": 0.5} for clip in range(20)}
    path = tmp_path / "report.html"
    report.write_report(path, {"per_clip": per_clip}, rows, lambda index: image, {})
    assert path.stat().st_size < 5_000_000


def test_report_fetches_nothing(tmp_path):
    scores, rows, images = invent()
    report.write_report(tmp_path / "report.html", scores, rows, images.__getitem__, {})
    links = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attributes):
            links.extend(value for name, value in attributes if name in ("src", "href", "data", "action", "srcset"))

    Links().feed((tmp_path / "report.html").read_text())
    assert len(links) > 3 * len(CLIPS) and all(link.startswith(("data:image/jpeg;base64,", "#clip-")) for link in links)
