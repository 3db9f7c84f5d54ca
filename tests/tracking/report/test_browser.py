"""The report in a real browser: it draws, its own script runs, nothing else does, and it fits a phone.

Needs Chromium (`apt-get install chromium`); without one these tests are skipped.
"""

import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from rlhf.tracking.report.page import write_report
from tests.tracking.report.test_report import PROMPTS, run  # noqa: F401 (a fixture)

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-quic"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
)
USE = """
const search = document.getElementById("search");
const seen = { before: document.getElementById("count").value };
search.value = "PROMPT 3";
search.dispatchEvent(new Event("input", { bubbles: true }));
seen.after = document.getElementById("count").value;
const order = document.getElementById("order");
search.value = "";
order.value = "gain";
order.dispatchEvent(new Event("input", { bubbles: true }));
seen.best = document.querySelector("#pairs h3").textContent;
for (const details of document.querySelectorAll("details")) details.open = true;
seen.rows = Array.from(document.querySelectorAll("#results tbody tr"), (row) => row.offsetHeight);
seen.wide = document.documentElement.scrollWidth;
seen.window = window.innerWidth;
document.title = JSON.stringify(seen);
"""


def browse(path, *options, profile):
    command = [BROWSER, *QUIET, f"--user-data-dir={profile}", *options, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done


def complaints(done):
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture
def report(run):  # noqa: F811 (the fixture)
    return write_report(run)


def test_nothing_is_wrong_with_the_page_and_its_script_has_run(report, tmp_path):
    done = browse(report, "--dump-dom", profile=tmp_path / "browser")
    assert complaints(done) == []
    assert '<form id="controls">' in done.stdout  # the page has it hidden, for browsers without scripts
    (count,) = re.findall(r'<output id="count">([^<]*)', done.stdout)
    assert count == f"{len(PROMPTS)} shown"


def test_a_script_that_got_into_the_page_would_be_stopped_and_seen(report, tmp_path):
    report.write_text(report.read_text().replace("</main>", "<script>document.title = 'taken'</script></main>"))
    done = browse(report, "--dump-dom", profile=tmp_path / "browser")
    assert "Content Security Policy" in complaints(done)[0]
    assert "<title>taken" not in done.stdout


@pytest.mark.parametrize("width", [390, 1200])
def test_search_and_order_work_and_the_page_fits(report, tmp_path, width):
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text(encoding="utf-8"))
    report.write_text(page.replace("</body>", f"<script>{USE}</script></body>"), encoding="utf-8")
    done = browse(report, "--dump-dom", f"--window-size={width},800", profile=tmp_path / "browser")
    seen = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    assert (seen["before"], seen["after"]) == (f"{len(PROMPTS)} shown", "1 shown")
    assert seen["best"].startswith("prompt 0")  # all gain alike; the order is stable
    assert seen["wide"] <= seen["window"]
    assert max(seen["rows"]) < (40 if width < 500 else 90)  # one line each on a phone, whatever is out of its sight


@pytest.mark.parametrize(("options", "is_dark"), [((), False), (("--force-dark-mode",), True)])
def test_it_is_drawn_light_or_dark_as_the_reader_likes(report, tmp_path, options, is_dark):
    picture = tmp_path / "page.png"
    browse(report, f"--screenshot={picture}", "--window-size=1200,1600", *options, profile=tmp_path / "browser")
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(1 << 20)
        corner = image.convert("RGB").getpixel((1, 1))
    assert (max(corner) < 64) == is_dark
    series = (111, 177, 255) if is_dark else (11, 98, 196)  # --series-0 of the style sheet
    assert [count for count, colour in colours if colour == series], "no curve is drawn"
