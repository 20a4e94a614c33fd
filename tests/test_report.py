"""The report in headless Chromium; and what needs none."""
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from vos import metrics, results
from vos.pictures import write_curves

CLIPS = ["clip-10", "clip-9", "<i>&\"nasty\"", "clip 2"]
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


def invent() -> tuple[list[dict], dict]:
    """Return rows of CLIPS, 6 frames each, and scores; the first frame of the first has no IoU."""
    rows: list[dict] = [{"index": index, "clip": CLIPS[index // 6], "frame": f"{index % 6:05d}",
                         "iou": (6 - index % 6) / 10 if index else None} for index in range(24)]
    per_clip = {clip: dict.fromkeys(metrics.MEASURES, 0.5) | {"mean_iou": iou, "J_decay": decay}
                for clip, iou, decay in zip(CLIPS, (0.3, 0.1, 0.25, 0.2), (0, None, -0.0, 0.3))}
    scores = dict.fromkeys(metrics.MEASURES, 0.5) | {"mean_iou": 0.2125}
    return rows, scores | {"protocol": "all", "frames": 24, "per_clip": per_clip}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Return the path of a report on CLIPS, whose overlays have different widths."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "overlays").mkdir()
    for number, clip in enumerate(CLIPS):
        Image.new("RGB", (40 + number, 30)).save(folder / f"overlays/{clip}.webp")
    facts = {"model": "<b>linear</b>", "command": "python evaluate.py " + "runs/long-name/" * 12}
    write_curves(folder / "curves.svg", [{"step": 0, "loss": 2}, {"step": 9, "loss": 1}])
    curve = (folder / "curves.svg").read_text()
    results.write_report(folder / "report.html", "A <report>", *invent(), facts, curve)
    assert curve in (folder / "report.html").read_text() and "polyline" in curve
    return folder / "report.html"


@pytest.mark.parametrize("width", [375, 1280])
def test_page_fits_and_shows_its_clips_the_worst_first(page, width):
    wide, images, title, markup, fact, captions, said = ask(page, width, """
        for (const image of document.images) image.scrollIntoView()
        await sleep(300)  // the lazy ones load
        return [document.documentElement.scrollWidth,
                [...document.images].map(image => [image.naturalWidth, image.alt]), document.title,
                document.querySelectorAll("i, b").length, document.querySelector("dd").innerText,
                [...document.querySelectorAll("figcaption")].map(each => each.innerText),
                document.querySelector(".scores").innerText]""")
    order = [1, 3, 2, 0]  # by mean IoU
    assert wide <= width
    assert images == [[40 + number, f"Overlay of {CLIPS[number]}"] for number in order]
    # names are text, not markup
    assert (title, markup, fact) == ("A <report>", 0, "<b>linear</b>")
    assert said.startswith("mean_iou 0.212, J_mean 0.500, ") and said.endswith(
        "; 24 frames, protocol all")
    assert captions[0].startswith("clip-9 6 frames; mean_iou 0.100, J_mean 0.500, J_recall 0.500, "
                                  "J_decay –, ")
    assert "J_decay 0.000" in captions[2]  # not -0
    assert captions[3].endswith("; worst: frame 00005, 0.100") and CLIPS[0] in captions[3]


def test_report_without_annotations_shows_no_scores(tmp_path):
    rows = [row | {"iou": None} for row in invent()[0]]
    results.write_report(tmp_path / "report.html", "Bare", rows, None, {})
    text = (tmp_path / "report.html").read_text()
    assert "No annotations" in text and text.count("</strong> 6 frames</figcaption>") == 4
    assert "worst: frame" not in text


def test_report_fetches_only_what_lies_beside_it(page):
    links = re.findall(r'(?:src|href|data)="([^"]*)"', page.read_text())
    assert len(links) == 4 and all(re.fullmatch(r"overlays/[\w%.-]+\.webp", link) for link in links)
