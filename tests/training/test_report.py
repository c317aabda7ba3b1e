"""A page of several runs: it parses, holds every run, escapes their names and needs nothing from outside."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from typer.testing import CliRunner

from dd_core.errors import RecipeError
from training.cli import app, main
from training.diagnose.finding import judged
from training.recipes.named import get_recipe
from training.report.page import write_report

HOSTILE = '_<img src=x onerror=alert(1)> & "b" $x_1$'
_VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The elements of a page with their attributes, and its texts; every element must be closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def images(self, kind: str) -> list[bytes]:
        head = f"data:image/{kind};base64,"
        found = [attrs["src"] or "" for tag, attrs in self.tags if tag == "img"]
        return [base64.b64decode(src.removeprefix(head)) for src in found if src.startswith(head)]


def _run(folder: Path, *overrides: str, fid: float | None = None, named: str = "") -> Path:
    """A run folder with two logged lines of its teacher; `fid` adds an evaluation and a diagnosis."""
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(asdict(get_recipe("tiny", overrides))))
    lines = [
        {"step": s, "per_s": 2.0, "images": 8 * s, "epochs": 0.1, "memory_gb": 1.2, "cross_entropy": 4 / s}
        for s in (2, 4)
    ]
    (folder / "teacher.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if fid is not None:
        Image.new("RGB", (4, 4), (200, 10, 10)).save(folder / "teacher-samples.png")
        row = {"name": named or "dd-1", "fid": fid, "precision": 0.5, "images": 5000}
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "evaluation.json").write_text(json.dumps({"rows": [row]}))
        finding = judged("positions", "<b>bold</b>", {"by_block": {"step 0": [0.5, 0.25, None]}}, True)
        (folder / "diagnosis.json").write_text(json.dumps({"findings": [vars(finding)]}))
    return folder


@pytest.fixture
def page(tmp_path: Path) -> Page:
    runs = [
        _run(tmp_path / HOSTILE, fid=55.91, named="<i>plan</i>"),
        _run(tmp_path / "second", "teacher.lr=0.25", fid=60.5, named="<i>plan</i>"),
        _run(tmp_path / "begun"),
    ]
    write_report(runs, tmp_path / "report.html")
    return Page(tmp_path / "report.html")


def test_it_holds_every_run_and_escapes_what_they_are_called(page: Page) -> None:
    for name in (HOSTILE, "second", "begun"):
        assert page.texts.count(name) >= 4  # of progress, diagnosis, evaluation, differences
    assert not {"script", "i", "b"} & {tag for tag, _ in page.tags}
    assert "<i>plan</i>" in page.texts and any("<b>bold</b>" in text for text in page.texts)
    assert all(attrs["src"].startswith("data:image/") for tag, attrs in page.tags if tag == "img")


def test_it_needs_nothing_from_outside(page: Page) -> None:
    [policy] = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert not [a for _, a in page.tags if "href" in a or "srcset" in a]
    assert not re.search(r"url\(|@import", "".join(page.texts))


def test_tables_show_progress_figures_and_the_settings_that_differ(page: Page) -> None:
    text = " ".join(page.texts)
    assert "4 of 6 steps, 32 images, 0.10 epochs, 2.00 steps/s, 1.2 GB" in text
    assert "55.91" in text and "60.50" in text and "5,000" in text
    at = page.texts.index("teacher.lr")
    assert [t for t in page.texts[at : at + 8] if t.strip()][:4] == ["teacher.lr", "0.001", "0.25", "0.001"]
    assert "teacher.batch" not in page.texts
    assert [a.get("class") for tag, a in page.tags if tag == "td" and a.get("class")] == ["best"]


def test_a_curve_has_a_line_for_each_run(page: Page) -> None:
    """The teacher's cross entropy of three runs; accuracy by block of the two that were diagnosed."""
    figures = [ElementTree.fromstring(svg) for svg in page.images("svg+xml")]
    words = [[e.text for e in svg.iter("{http://www.w3.org/2000/svg}text")] for svg in figures]
    [curves] = [each for each in words if "cross_entropy" in each]
    shown = [str(word).lstrip("\N{ZERO WIDTH SPACE}") for word in curves]
    assert {HOSTILE, "second", "begun"} <= set(shown)
    assert sum("accuracy on fresh pairs" in each for each in words) == 2
    assert len(page.images("png")) == 2


@pytest.mark.parametrize("name", ["teacher.jsonl", "diagnosis.json", "recipe.json"])
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", fid=1.0)
    (run / name).write_text("{]\n")
    with pytest.raises(RecipeError, match=re.escape(str(run / name))) as caught:
        write_report([run], tmp_path / "report.html")
    assert "\n" not in caught.value.message


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = []
    for parent in ("one", "two"):
        (tmp_path / parent).mkdir()
        runs.append(_run(tmp_path / parent / "run"))
    write_report(runs, tmp_path / "report.html")
    texts = Page(tmp_path / "report.html").texts
    assert {str(run) for run in runs} <= set(texts) and "run" not in texts
    with pytest.raises(RecipeError, match="named twice"):
        write_report([runs[0], runs[0].parent / "../one/run"], tmp_path / "report.html")


def test_a_run_from_before_images_were_logged_is_shown(tmp_path: Path) -> None:
    run = _run(tmp_path / "old")
    (run / "teacher.jsonl").write_text('{"step": 3, "per_s": 1.5, "cross_entropy": 4.0}\n{"step": 4, "per')
    page = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", str(run), "--to", str(page)])
    assert result.exit_code == 0 and "MiB" in result.output
    texts = Page(page).texts
    assert "3 of 6 steps, 1.50 steps/s" in texts
    assert "Differences of the recipes" not in texts


def test_a_folder_that_is_no_run_gets_one_line_and_no_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "report.html"
    monkeypatch.setattr("sys.argv", ["dd-train", "report", str(tmp_path), "--to", str(page)])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and "is no run folder" in said
    assert not page.exists()
