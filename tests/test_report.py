"""The report in headless Chromium, driven over WebDriver's HTTP protocol; and what needs none."""
import json
import re
import shutil
import subprocess
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from vos import pictures, results

CLIPS = ["clip-10", "clip-9", "<i>&\"nasty\"</i>", "clip-2"]
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever the proxy


class Browser:
    """A Chromium session: pages from disk, script in them, the mouse, the console."""

    def __init__(self, port: str, profile: str):
        options = {"args": ["--headless", "--no-sandbox", f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options,
                  "goog:loggingPrefs": {"browser": "ALL"}}
        self.root = f"http://127.0.0.1:{port}/session"
        self.root += "/" + self.post("", capabilities={"alwaysMatch": wanted})["sessionId"]

    def post(self, path: str, **body):
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.root + path, json.dumps(body).encode(), kind)
        with LOCAL.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path, width: int) -> None:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.post("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=size)
        self.post("/url", url=path.as_uri())

    def run(self, script: str):
        return self.post("/execute/sync", script=script, args=[])

    def click(self, column: int) -> None:
        selector = f"#clips th:nth-child({column}) button"
        (element,) = self.post("/element", using="css selector", value=selector).values()
        self.post(f"/element/{element}/click")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    log = tmp_path_factory.mktemp("driver") / "log.txt"
    with open(log, "w") as file:
        driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=file, stderr=file)
    session = None
    try:
        while not (port := re.search(r"successfully on port (\d+)", log.read_text())):
            assert driver.poll() is None, log.read_text()
            time.sleep(0.1)
        session = Browser(port[1], str(tmp_path_factory.mktemp("profile")))
        yield session
    finally:
        if session:
            LOCAL.open(urllib.request.Request(session.root, method="DELETE")).close()
        driver.terminate()
        driver.wait(30)


def invent(scored: bool = True) -> tuple[dict | None, list[dict]]:
    """Return scores and rows of CLIPS, 6 frames each; the last frame of the first has no IoU."""
    rows: list[dict] = [{"index": index, "clip": CLIPS[index // 6], "frame": f"{index % 6:05d}"}
                        for index in range(24)]
    if not scored:
        return None, rows
    for index, row in enumerate(rows):
        row |= {"iou": None if index == 5 else (index % 6) / 10, "J": 0.5, "F": 0.5}
    per_clip = {clip: {"mean_iou": 0.5, "J_mean": J, "F_mean": 0.5, "F_decay": decay}
                for clip, J, decay in zip(CLIPS, (0.3, -0.0, 0.25, 0.1), (0, None, 0.2, 0.3))}
    return {"protocol": "all", "frames": 24, "mean_iou": 0.1, "per_clip": per_clip}, rows


def picture(index: int) -> np.ndarray:
    return np.full((64, 111, 3), 9 * index, np.uint8)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Return the path of a report on CLIPS, with a video of each kind and a curve."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "overlays").mkdir()
    Image.new("RGB", (40, 30)).save(folder / "overlays/a & b.gif")
    pictures.write_curves(folder / "curves.svg", [{"step": 0, "loss": 1}, {"step": 9, "loss": 0.5}])
    facts = {"model": "<b>linear</b>", "command": "python evaluate.py " + "runs/long-name/" * 12}
    results.write_report(folder / "report.html", "A <report>", *invent(), picture, facts,
                        ["overlays/a & b.gif", "overlays/c.mp4"],
                        (folder / "curves.svg").read_text())
    return folder / "report.html"


def test_click_on_a_heading_sorts_and_a_second_one_reverses(browser, page):
    def order() -> list[str]:
        return browser.run("return [...document.querySelectorAll('tbody a')].map(a => a.innerText)")

    browser.open(page, 1280)
    assert order() == CLIPS
    browser.click(3)
    assert order() == ["clip-9", "clip-2", CLIPS[2], "clip-10"]
    browser.click(1)
    assert [name for name in order() if "<" not in name] == ["clip-2", "clip-9", "clip-10"]
    for expected in (["clip-10", CLIPS[2], "clip-2", "clip-9"],
                     ["clip-2", CLIPS[2], "clip-10", "clip-9"]):  # without a value: last
        browser.click(6)
        assert order() == expected


@pytest.mark.parametrize("width", [375, 1280])
def test_page_fits_shows_its_pictures_and_names_and_says_when_a_table_scrolls(browser, page, width):
    browser.post("/se/log", type="browser")  # what earlier pages left
    browser.open(page, width)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    browser.run("document.querySelector('.videos').scrollIntoView()")
    time.sleep(0.3)  # the lazy ones load
    sizes = browser.run("return [...document.images].map(i => [i.naturalWidth, i.alt.length > 9])")
    assert sizes == [[111, True]] * 12 + [[40, True]]
    hidden = browser.run("return getComputedStyle(document.querySelector('.hint')).display")
    assert (hidden == "none") == (width == 1280)
    said = [entry["message"] for entry in browser.post("/se/log", type="browser")]
    assert [message for message in said if "c.mp4" not in message] == []

    # names are text, not markup
    found = browser.run("return [document.title, document.querySelectorAll('i, b').length]")
    assert found == ["A <report>", 0]
    assert browser.run("return document.querySelector('dd').innerText") == "<b>linear</b>"
    assert CLIPS[2] in browser.run("return document.images[6].alt")


def test_report_without_annotations_shows_no_scores_and_no_truth(browser, tmp_path):
    results.write_report(tmp_path / "report.html", "Bare", *invent(scored=False), picture, {})
    browser.open(tmp_path / "report.html", 375)
    text = browser.run("return document.body.innerText")
    assert "No annotations" in text and "First: frame 00000" in text
    assert not re.search("truth|mean IoU|Recall|Videos|Training", text)


@pytest.mark.parametrize("ious, expected", [
    ([0.5, None, 0.9, float("nan"), 0.7], [("Worst", 0), ("Median", 4), ("Best", 2)]),
    ([0.5, 0.4], [("Worst", 1), ("Best", 0)]),
    ([0.5], [("Best", 0)]),
    ([None, None, None, None], [("First", 0), ("Middle", 2), ("Last", 3)]),
])
def test_frames_chosen(ious, expected):
    rows = [{"index": index, "frame": index, "iou": iou} for index, iou in enumerate(ious)]
    section = results.clip_section("a", rows, picture)
    found = re.findall(r"<figcaption>(\w+): frame (\d)", section)
    assert [(word, int(index)) for word, index in found] == expected


def test_report_fetches_only_what_lies_beside_it(page):
    links = re.findall(r'(?:src|href|data)="([^"]*)"', page.read_text())
    pattern = r"data:image/jpeg;base64,.*|#clip-\d+|overlays/a%20%26%20b.gif|overlays/c.mp4"
    assert len(links) == 12 + 4 + 4 and all(re.fullmatch(pattern, link) for link in links)
