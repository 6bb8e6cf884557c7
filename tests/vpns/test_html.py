"""Does the page of a report stand alone: no network, no script, a picture in every section, all escaped?"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.vpns.report_runs import VAL_IMAGES, make_bench, make_images, make_network, make_run
from vpns import cli
from vpns.config import DataConfig, ModelConfig, RunConfig
from vpns.files import write_json
from vpns.report import write_report
from vpns.report.arms import group_arms, read_runs
from vpns.report.blocks import Section, Table
from vpns.report.html import render_html
from vpns.report.several import compare_folders

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>alert('x')</script>\"&[a](javascript:alert(1))"
PICTURES = {
    "single": ["curves", "prompt", "density", "times"],
    "several": ["arms", "over_density", "over_time"],
}
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-background-networking",
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of one run, and one of eight runs, two densities by two methods by two seeds."""
    folder = tmp_path_factory.mktemp("pages")
    write_report(make_run(folder / "run"), make_images(VAL_IMAGES))
    runs = []
    for number, method in enumerate(("vpns", "hydra")):
        for density, wrong in ((0.2, 60), (0.1, 90)):
            for seed in (7, 9):
                stretch = slice(0, wrong + 20 * number + seed * (2 - number))
                config = RunConfig(method=method, density=density, seed=seed, pattern="block:2x2")
                planted = {"sparse_wrong": stretch, "prompted_wrong": stretch}
                bench = make_bench(make_network(32, 0.25 / density, 0.2 / density))
                runs.append(make_run(folder / f"{method}-{density}-{seed}", config, bench=bench, **planted))
    return {"single": folder / "run/report/report.html", "several": compare_folders(runs, folder / "several")}


class Reader(HTMLParser):
    """Tags and attributes of a page; every tag that is opened must be closed, in order."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("kind", ["single", "several"])
def test_a_page_needs_nothing_but_itself(pages: dict[str, Path], kind: str) -> None:
    found = Reader(pages[kind].read_text()).found
    assert not [tag for tag, _ in found if tag in ("script", "iframe", "object", "embed")]
    for tag, attributes in found:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            target = attributes.get(name) or ""
            if tag == "a" and name == "href":
                is_near = target.startswith("#") or not re.match(r"[a-z]+:|//", target)
            else:
                is_near = target.startswith(("#", "data:")) or not target
            assert is_near, (tag, target)
    ids = [attributes["id"] for _, attributes in found if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("kind", ["single", "several"])
def test_every_link_of_a_page_leads_somewhere(pages: dict[str, Path], kind: str) -> None:
    found = Reader(pages[kind].read_text()).found
    ids = {attributes.get("id") for _, attributes in found}
    links = [attributes["href"] or "" for tag, attributes in found if tag == "a" and "href" in attributes]
    assert len(links) > 8
    for link in links:
        assert link[1:] in ids if link.startswith("#") else (pages[kind].parent / link).is_file(), link


def browse(page: Path, folder: Path, *flags: str) -> tuple[str, list[str], int]:
    """The page as Chromium understands it, what its console says, and how often it asked the network."""
    assert CHROMIUM is not None
    log = folder / "net.json"
    own = ("--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}")
    command = [CHROMIUM, *FLAGS, *own, *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    # The browser itself asks for its own ends; what it does is "not an origin".
    asked = len(re.findall(r'"initiator":"(?!not an origin)', log.read_text()))
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], asked


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
def test_chromium_shows_pages_without_an_error_a_request_or_an_empty_picture(
    pages: dict[str, Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://127.0.0.1:50999/x.png'><script>console.error('so')</script>")
    _, console, asked = browse(bad, tmp_path, "--dump-dom")
    assert (len(console), asked) == (1, 1)
    for kind, page in pages.items():
        dumped, console, asked = browse(page, tmp_path, "--dump-dom")
        assert (console, asked) == ([], 0)
        figures = re.findall(r'<figure id="figure-(\w+)">(.*?)</figure>', dumped, re.DOTALL)
        assert [name for name, _ in figures] == PICTURES[kind]
        assert all(len(re.findall("<(?:path|image|use) ", drawing)) > 3 for _, drawing in figures)
    for width in (1200, 420):
        shot = tmp_path / f"{width}.png"
        browse(pages["single"], tmp_path, f"--window-size={width},2500", f"--screenshot={shot}")
        with Image.open(shot) as picture:
            colors = picture.convert("RGB").getcolors(maxcolors=1 << 24)
            assert colors is not None
            assert len(colors) > 50


def test_words_from_outside_are_escaped(tmp_path: Path) -> None:
    config = RunConfig(data=DataConfig(HOSTILE), model=ModelConfig(HOSTILE), pattern="block:2x2")
    folder = make_run(tmp_path / "a'b<i>", config)
    write_report(folder, make_images(VAL_IMAGES))
    text = (folder / "report" / "report.html").read_text()
    found = Reader(text).found
    assert not [tag for tag, _ in found if tag in ("script", "i")]
    assert not [attributes for _, attributes in found if "javascript" in (attributes.get("href") or "")]
    assert "&lt;script&gt;" in text
    sections = [Section(HOSTILE, [HOSTILE], 1), Section(HOSTILE, [Table([HOSTILE], [[HOSTILE]])])]
    tags = [tag for tag, _ in Reader(render_html(sections, {})).found]
    assert "script" not in tags
    # The table of contents has one.
    assert tags.count("a") == 1


def test_runs_are_compared_from_the_command_line_and_a_missing_one_is_named(
    pages: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(path) for path in sorted(pages["single"].parents[2].glob("*-0.1-*"))]
    output = tmp_path / "out"
    assert cli.main(["report", *runs, "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output / "report.html")
    with (output / "differences.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["first"], row["second"], row["pairs"]) == ("hydra", "vpns", "2")
    assert float(row["difference"]) == pytest.approx(100 * (20 - 8) / 2000, abs=1)
    assert cli.main(["report", runs[0], str(tmp_path / "none")]) == 2
    assert "expected a run folder with run.json" in capsys.readouterr().err


def test_a_sweep_is_compared_by_the_choices_of_its_grid(tmp_path: Path) -> None:
    runs = {}
    for seed in (1, 2):
        for arm, method in (("with", "vpns"), ("without", "hydra")):
            config = RunConfig(method=method, seed=seed, pattern="block:2x2")
            make_run(tmp_path / "runs" / f"{arm}-{seed}", config)
            choices = {"arm": arm, "seed": str(seed)}
            runs[f"{arm}-{seed}"] = {"choices": choices, "settings": config.to_dict()}
    # One that has not been done yet.
    runs["with-3"] = {"choices": {"arm": "with", "seed": "3"}, "settings": {}}
    write_json(tmp_path / "sweep.json", {"schema_version": 1, "runs": runs})
    assert cli.main(["report", str(tmp_path)]) == 0
    content = (tmp_path / "report" / "report.md").read_text()
    assert "4 runs in 2 arms of up to 2 seeds" in content
    assert "| without against with | 2 |" in content


def test_arms_hold_the_runs_that_differ_in_their_seed_alone(pages: dict[str, Path]) -> None:
    folders = sorted(pages["single"].parents[2].glob("*-0.*"))
    arms = group_arms(read_runs(folders))
    assert [arm.name for arm in arms] == [
        "hydra, density 0.1",
        "hydra, density 0.2",
        "vpns, density 0.1",
        "vpns, density 0.2",
    ]
    assert [[run.config.seed for run in arm.runs] for arm in arms] == [[7, 9]] * 4
    interval = arms[0].interval
    mean = arms[0].mean("accuracy")
    assert interval is not None
    assert mean is not None
    assert interval[0] < mean < interval[1]
    assert json.dumps([arm.series for arm in arms]) == '["hydra", "hydra", "vpns", "vpns"]'


def test_runs_that_differ_in_where_they_ran_are_one_arm(tmp_path: Path) -> None:
    places = (RunConfig(), RunConfig(seed=9, threads=2, data=DataConfig(cache=str(tmp_path))))
    runs = [make_run(tmp_path / str(number), config) for number, config in enumerate(places)]
    (arm,) = group_arms(read_runs(runs))
    assert [run.config.seed for run in arm.runs] == [7, 9]
