"""The report in headless Chromium; and what needs none."""
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vos import pictures, results

CLIPS = ["clip-10", "clip-9", "<i>&\"nasty\"</i>", "clip-2"]
# a page around the report's: it asks the report once loaded, and holds the answer
AROUND = """<iframe src="{name}" width="{width}" height="800"></iframe><pre></pre><script>
onload = async () => {{
  const document = frames[0].document, sleep = ms => new Promise(done => setTimeout(done, ms))
  const answer = await (async () => {{ {script} }})()
  window.document.querySelector("pre").textContent = JSON.stringify(answer)
}}</script>"""


def ask(page: Path, width: int, script: str):
    """Return what a script returns in a page that is `width` wide; nothing may be complained of."""
    if not shutil.which("chromium"):
        pytest.skip("needs chromium: apt-get install chromium")
    around = page.with_name("around.html")
    around.write_text(AROUND.format(name=page.name, width=width, script=script))
    command = ["chromium", "--headless", "--no-sandbox", "--allow-file-access-from-files",
               "--window-size=1400,900", "--enable-logging=stderr", "--virtual-time-budget=5000",
               f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", around.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(html.unescape(re.search("<pre>(.*)</pre>", done.stdout, re.DOTALL)[1]))


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


def test_click_on_a_heading_sorts_and_a_second_one_reverses(page):
    found = ask(page, 1280, """
        const order = () => [...document.querySelectorAll("tbody a")].map(a => a.innerText)
        const click = n => document.querySelector(`#clips th:nth-child(${n}) button`).click()
        return [order(), ...[3, 1, 6, 6].map(column => (click(column), order()))]""")
    given, by_j, by_name, *by_decay = found
    assert given == CLIPS and by_j == ["clip-9", "clip-2", CLIPS[2], "clip-10"]
    assert [name for name in by_name if "<" not in name] == ["clip-2", "clip-9", "clip-10"]
    assert by_decay == [["clip-10", CLIPS[2], "clip-2", "clip-9"],
                        ["clip-2", CLIPS[2], "clip-10", "clip-9"]]  # without a value: last


@pytest.mark.parametrize("width", [375, 1280])
def test_page_fits_shows_its_pictures_and_names_and_says_when_a_table_scrolls(page, width):
    wide, sizes, hint, title, markup, fact, alt = ask(page, width, """
        document.querySelector(".videos").scrollIntoView()
        await sleep(300)  // the lazy ones load
        const images = [...document.images], hint = document.querySelector(".hint")
        return [document.documentElement.scrollWidth,
                images.map(image => [image.naturalWidth, image.alt.length > 9]),
                document.defaultView.getComputedStyle(hint).display, document.title,
                document.querySelectorAll("i, b").length, document.querySelector("dd").innerText,
                images[6].alt]""")
    assert wide <= width and sizes == [[111, True]] * 12 + [[40, True]]
    assert (hint == "none") == (width == 1280)
    # names are text, not markup
    assert (title, markup, fact) == ("A <report>", 0, "<b>linear</b>") and CLIPS[2] in alt


def test_report_without_annotations_shows_no_scores_and_no_truth(tmp_path):
    results.write_report(tmp_path / "report.html", "Bare", *invent(scored=False), picture, {})
    text = ask(tmp_path / "report.html", 375, "return document.body.innerText")
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
