"""The pages in docs/: what they name exists, what they quote is said, links lead somewhere, what is made is current."""

import re
from functools import cache
from pathlib import Path

import pytest

from benchmarks.memory_examples import GB
from benchmarks.memory_picture import SETTINGS, bars_of
from rlhf.config.run_config import STAGES, USES
from rlhf.tracking import metrics_page
from rlhf.tracking.metric_registry import METRICS, metric
from stages.setup.command_line import known_keys
from stages.setup.settings_page import page

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
PEERS = r"https://(github\.com|arxiv\.org|huggingface\.co)/\S+"
GROUPS = ("engine", "data", "model", "launch", "tracking", "checkpoint", "memory", *STAGES, *USES)


@cache
def sources():
    """The texts of the program, with strings that go over several lines joined."""
    files = [file for room in ("rlhf", "stages", "data") for file in (ROOT / room).rglob("*.py")]
    text = "\n".join(file.read_text() for file in files)
    return " ".join(re.sub(r'"\s*\n\s*f?"', "", text).replace("`", "").split())


def anchors(file):
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", [ROOT / "README.md", *PAGES], ids=lambda file: file.name)
def test_every_link_leads_somewhere(file):
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", file.read_text()):
        if target.startswith("http"):
            assert re.fullmatch(PEERS, target), target
            continue
        path, _, anchor = target.partition("#")
        place = (file.parent / path) if path else file
        assert place.exists(), f"{text}: {target}"
        assert not anchor or anchor in anchors(place), f"{text}: {target}"


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"docs/(\w+)\.md", (ROOT / "README.md").read_text()))
    for name in linked.copy():
        linked |= set(re.findall(r"\]\((\w+)\.md", (ROOT / f"docs/{name}.md").read_text()))
    assert {file.stem for file in PAGES} <= linked


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_every_setting_that_a_page_names_is_one(file):
    known = set(known_keys())
    for name in re.findall(rf"[`'\s]((?:{'|'.join(GROUPS)})(?:\.\w+)+)(?=[`=\s'])", file.read_text()):
        is_file = name.rpartition(".")[2] in {"md", "py", "json", "yaml", "jsonl", "svg", "html"}
        stands_for_others = name != name.lower()  # data.STAGE.train, data.gold.NAME
        assert is_file or stands_for_others or name in known, name


def test_what_troubleshooting_quotes_is_said():
    for cell in re.findall(r"^\| (`.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE):
        for quoted in re.findall(r"`([^`]+)`", cell):
            for part in re.split(r"\.\.\.|\d+|\b[A-Z]{4,}\b|'NAME.*", quoted):
                words = part.strip(" ,.?()[]'=")
                assert words.lower() in sources().lower(), f"{quoted}: {words!r}"


def test_the_page_of_settings_is_the_one_that_is_made():
    assert (ROOT / "docs/configuration.md").read_text() == page()


def test_the_page_of_metrics_is_the_one_that_is_made():
    assert (ROOT / "docs/metrics.md").read_text() == metrics_page.page(), "python -m rlhf.tracking.metrics_page"


def test_metrics_that_pages_name_are_logged():
    sections = {name.partition("/")[0] for name in METRICS} - {"memory", "ptx"}
    for file in PAGES:
        for name in re.findall(rf"`((?:{'|'.join(sections)})/[a-z_0-9/]+[a-z_0-9])`", file.read_text()):
            assert metric(name), f"{file.name}: {name}"


def test_every_setting_has_its_meaning_on_the_page():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*) \|$", page(), re.MULTILINE)
    assert len(rows) > 150
    assert [name for name, values, default, meaning in rows if not (values and default and meaning)] == []


def test_the_picture_of_memory_shows_the_plan(tmp_path):
    for name in ("ZeRO 2", "ZeRO 3, everything on NVMe"):
        drawn = (ROOT / "docs/memory.svg").read_text().partition(f">{name}<")[2]
        shown = [float(number) for number in re.findall(r">([\d,.]+)(?: host, disk)?<", drawn)]
        planned = [round(bar.total() / GB, 1) for bar in bars_of(SETTINGS[name], folder=tmp_path)]
        assert shown[: sum(map(bool, planned))] == [number for number in planned if number]
