"""Pages: escaping, marks, film strips, no outside references, every template with little and much data."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError
from markupsafe import Markup
from PIL import Image

import stage3.report
from dataset import MODE_TABLE
from pages.render import FRAME_WIDTH, data_uri, film_strip, highlight, jpeg_uri, page_file, render
from stage3.report import boxes_at, chosen_groups, evenly, groups_by_step, main, reward_progress, write_report
from training.common import ConfigError, DriveVLMError
from training.config import CheckConfig, DetectorSettings, Stage3Config

PAGES = Path(__file__).resolve().parents[1] / "pages"
SCRIPT = "<script>alert('x')</script>\"&"
OUTSIDE = re.compile(r'(?:src|href)="(?!data:|#)|url\(|@import|https?://')
PIXEL = data_uri(b"png", "image/png")


def picture_of(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))


def strip(text="50%"):
    boxes = [[("present", text, 0.1, 0.05, 0.3, 0.2), ("unknown", text, 0.8, 0.5, 0.9, 0.7)], []]
    return film_strip(np.zeros((2, 90, 160, 3), np.uint8), [text, text], boxes)


# ---------------------------------------------------------------------------------------------------------------------
# Values of the pages


def rollouts(text, full=True):
    answer = {"reward": 0.5, "advantage": 0.7, "tokens": 9, "ended": True, "objects": 0.4, "temporal": 1.0,
              "text": text, "marked": highlight(text, [(0, 1, "unsupported", text)] if text else [])}
    cut = {**answer, "ended": False, "advantage": -0.7}
    group = {"video": text, "mode": "copilot", "colour": "#000", "question": text,
             "frames": strip(text) if full else [],
             "no_picture": text, "evidence": {"present": [text] if full else [], "unknown": [text] if full else []},
             "answers": [answer, answer, cut] if full else [answer]}
    return {"folder": Path(text), "num_steps": 1, "steps": [{"number": 3, "groups": [group]}], "reward": text,
            "progress": [("copilot", 0.1, 0.2)] if full else [], "weights": {"objects": 0.6, "temporal": 0.4},
            "curves": PIXEL if full else "", "best": text if full else "",
            "evaluations": [["step", text], ["0", "0.500"]] if full else [["step", text]]}


def evaluation(text, full=True):
    clip = {"video": text, "frames": strip(text), "present": [text], "unknown": [text],
            "answers": {text: {"copilot": highlight(text, [])}}}
    metrics = {"clips": 2, "truth": text, "prior": {"caption": text}, "checkpoints": {text: text},
               "words_in_range": {"copilot": [1, 2], "microscope": [1, 2]}}
    bars = [{"name": text, "value": 0.25, "low": 0.2, "high": 0.4},
            {"name": "prior", "value": None, "low": 0, "high": 0}]
    rows = [[text, "P"], [text, "0.50 ±.05"], ["blank", "–"]]
    if full:
        metrics["agreed"] = {"agreement": {"pairs": 9, "agreeing": 0.5, "kappa": None}}
    return {"metrics": metrics, "clips": [clip] if full else [], "charts": {text: (bars, bars)} if full else {},
            "tables": [rows] if full else [], "slices": [rows] if full else [], "agreed": [rows] if full else []}


def check(text, full=True):
    problem = {"level": "error", "code": text, "where": text, "message": text}
    example = {"id": text, "mode": "copilot", "colour": "#000", "where": text, "supervised": 1, "total": 3,
               "frames": strip(text), "spans": [("masked", text + "\n"), ("supervised", text), ("end", text)]}
    counts = dict.fromkeys(("rows", "entries", "clips", "captions", "errors", "warnings"), 1234)
    counts |= {"modes": {text: {"train": 3, "held_out": 1}}, "words": {text: {"min": 1, "median": 2, "max": 9}}}
    counts["text_tokens"] = {"histogram": [0, 3, 1], "histogram_top": 90, "limit": 80,
                             "max_text_tokens_that_keeps_99_percent": 40}
    if not full:
        counts |= {"modes": {}, "words": {}, "text_tokens": {}}
    return {"config": CheckConfig(data=text, video_root=text, language_model=text), "verdict": text,
            "report": {"ok": not full, "counts": counts}, "totals": [(text, text)], "meanings": {text: text},
            "groups": [("error", text, [problem] * 10)] if full else [], "examples": [example] if full else []}


SHEET_SCRIPT = page_file("sheet.js")  # the only script that a page has


def sheet(text, full=True):
    mention = {"id": "q1A1", "mention": "A1", "number": 1, "object": text, "words": text}
    sides = [{"name": "A", "text": highlight(text, []), "mentions": [mention, mention]},
             {"name": "B", "text": "", "mentions": []}]
    answers = [{"number": 1, "question": text, "sides": sides}, {"number": 2, "question": text, "sides": sides[:1]}]
    clip = {"frames": strip(text), "answers": answers}
    return {"sheet": text, "questions": 3, "clips": [clip] if full else [], "script": Markup(SHEET_SCRIPT),
            "script_hash": "sha256-0"}


def app_clip(text, full=True):
    seen = {"present": [text], "unknown": [text]} if full else None
    return {"name": text, "seconds": 3.8, "seen": seen, "frames": strip(text)}


def app_answer(text, full=True):
    return {"name": text, "text": highlight(text, [(0, 1, "unknown", text)] if full else []), "done": full,
            "lines": [text] if full else [], "note": text}


VALUES = {"rollouts.html": rollouts, "evaluation.html": evaluation, "check.html": check, "sheet.html": sheet}
PARTS = {"app_clip.html": app_clip, "app_answer.html": app_answer,  # of app.py's page
         "app_problem.html": lambda text, full=True: {"text": text}}


def rendered(template, text, full):
    """A page without its own script, which is not made of values."""
    page = render(template, **(VALUES | PARTS)[template](text, full))
    return page.replace(f"<script>{SHEET_SCRIPT}</script>", "") if template == "sheet.html" else page


def test_every_page_is_tested():
    pages = {path.name for path in PAGES.glob("*.html")}
    assert pages == {*VALUES, *PARTS, "app_head.html", "base.html", "macros.html"}


@pytest.mark.parametrize("template", [*VALUES, *PARTS])
@pytest.mark.parametrize("full", [True, False])
def test_text_is_escaped_in_every_field(template, full):
    page = rendered(template, SCRIPT, full)
    assert "<script" not in page and "&lt;script&gt;" in page
    harmless = rendered(template, "text", full)
    tags = re.compile(r"<[a-z!/][^<>]*>")
    assert len(tags.findall(page)) == len(tags.findall(harmless))  # no text has become a tag or ended an attribute


@pytest.mark.parametrize("template", VALUES)
@pytest.mark.parametrize("full", [True, False])
def test_a_page_has_no_outside_references(template, full):
    page = rendered(template, "a car", full)
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert not OUTSIDE.search(page) and "<link" not in page and "{{" not in page and "{%" not in page
    assert 'name="viewport"' in page and "--good:" in page
    for tag in ("div", "section", "table", "details", "p", "span", "mark"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


def test_a_missing_value_is_an_error():
    values = rollouts("a car")
    del values["progress"]
    with pytest.raises(UndefinedError, match="progress"):
        render("rollouts.html", **values)


def test_every_colour_is_a_variable_that_exists():
    style = (PAGES / "style.css").read_text()
    used, known = set(re.findall(r"var\((--[\w-]+)\)", style)), set(re.findall(r"(--[\w-]+):", style))
    assert used <= known and known <= used


# ---------------------------------------------------------------------------------------------------------------------
# Marks and pictures


def test_mentions_are_coloured_and_text_is_escaped():
    text = "A <car> & a cyclist; no bus."
    spans = [(3, 6, "supported", "car: supported"), (12, 19, "unknown", "bicycle: unknown"),
             (12, 19, "unsupported", "person: unsupported"), (24, 27, "negated", "bus: negated")]
    expected = ('A &lt;<mark class="supported" title="car: supported">car</mark>&gt; &amp; a '
                '<mark class="unsupported" title="bicycle: unknown; person: unsupported">cyclist</mark>; no '
                '<mark class="negated" title="bus: negated">bus</mark>.')
    assert highlight(text, spans) == expected
    assert highlight(text, [*reversed(spans[:1]), spans[3], *spans[1:3]]) == expected  # in any order
    assert highlight("<b>", []) == "&lt;b&gt;" and highlight("", []) == ""


def test_overlapping_spans_are_skipped():
    assert highlight("fire truck ahead", [(0, 10, "supported", "truck"), (5, 10, "unsupported", "truck")]) == (
        '<mark class="supported" title="truck">fire truck</mark> ahead')


def test_a_title_cannot_end_its_attribute():
    assert highlight("car", [(0, 3, "unknown", '"><b>')]) == (
        '<mark class="unknown" title="&#34;&gt;&lt;b&gt;">car</mark>')


def test_pictures_keep_their_aspect_and_are_not_enlarged():
    wide, small = np.zeros((90, 1600, 3), np.uint8), np.full((40, 30, 3), 200, np.uint8)
    assert picture_of(jpeg_uri(wide)).size == (FRAME_WIDTH, 18)
    assert picture_of(jpeg_uri(small)).size == (30, 40) and picture_of(jpeg_uri(small, 15)).size == (15, 20)
    assert abs(int(np.asarray(picture_of(jpeg_uri(small))).mean()) - 200) <= 2


def test_boxes_are_where_the_detector_saw_them():
    page = render("evaluation.html", **evaluation("car 0.90"))
    assert 'class="box present low" style="left:10.00%;top:5.00%;width:20.00%;height:15.00%"><b>car 0.90</b>' in page
    assert 'class="box unknown edge" style="left:80.00%;top:50.00%;width:10.00%;height:20.00%"' in page


def test_the_evaluation_opens_with_bars_and_their_intervals():
    page = render("evaluation.html", **evaluation("stage2"))
    assert page.index('class="bars"') < page.index("<table")
    bar = '<i class="bad" style="width:25.00%"></i>\n<u style="left:20.00%;width:20.00%"></u></div>\n<span>0.25</span>'
    assert bar in page and bar.replace("bad", "good") in page
    assert '<div class="track"></div><span>–</span>' in page  # a system that names nothing invents no share of it


# ---------------------------------------------------------------------------------------------------------------------
# The report of stage 3


def record(step, slot, k, reward, mode="copilot", video="car.mp4", text="A car and a truck."):
    return {"step": step, "slot": slot, "k": k, "id": f"{video}#{mode}", "video": video, "mode": mode, "text": text,
            "tokens": 7, "ended": k != 1, "reward": reward, "advantage": reward - 0.5, "style": reward, "facts": 0.25,
            "objects": 0.5, "temporal": 0.5, "detail": 0.5, "hallucination": 0.5,
            "mentions": [["car", "supported", 2, 5], ["truck", "unsupported", 12, 17]],
            "evidence": {"present": ["car"], "unknown": ["truck"], "salient": ["car"], "seen": {"car": [0.0, 1.0]}}}


@pytest.fixture
def run_folder(tiny, tmp_path, monkeypatch):
    """(run folder, its config): a run of two steps, and a detector's boxes for one of its clips."""
    boxes = [[2, 0.9, 0.1, 0.3, 0.4, 0.6], [7, 0.3, 0.5, 0.05, 0.8, 0.5], [0, 0.12, 0.7, 0.5, 0.75, 0.8]]

    def load_records(cache, videos, settings):
        if videos != ["car.mp4"]:
            raise DriveVLMError(f"no evidence yet for {videos[0]}")
        return {"car.mp4": {"frames": [{"time": 0.0, "boxes": boxes}, {"time": 1.0, "boxes": boxes[:1]}]}}

    monkeypatch.setattr(stage3.report, "load_records", load_records)
    folder = tmp_path / "run"
    folder.mkdir()
    records = [record(1, 0, k, reward, "microscope") for k, reward in enumerate((0.2, 0.8, 0.4, 0.3))]
    records += [record(1, 1, k, reward) for k, reward in enumerate((0.5, 0.6))]
    records += [record(1, 2, k, reward, text=SCRIPT) for k, reward in enumerate((0.1, 0.9))]
    records += [record(2, 0, 0, 0.7, video="gone.mp4", text="")]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 3, "slo')
    metrics = [{"step": s, "reward/copilot": s / 10, "reward/microscope": None} for s in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    (folder / "curves.png").write_bytes(b"a picture")
    config = Stage3Config(video_root=str(tiny.videos), num_frames=6, reward="house.rules:score",
                          reward_weights={"style": 0.7, "facts": 0.3})
    return folder, config


def test_the_report_shows_the_groups_that_differ_most(run_folder):
    folder, config = run_folder
    assert write_report(folder, config) == folder / "report.html"
    page = (folder / "report.html").read_text()
    assert not OUTSIDE.search(page) and "<script" not in page
    assert data_uri(b"a picture", "image/png") in page and "<svg" not in page
    assert page.count("data:image/jpeg") == 2 * 4  # two groups of step 1; the clip of step 2 is gone
    assert "no picture: no evidence yet for gone.mp4" in page and "(empty)" in page and "[cut off]" in page
    assert page.count('class="box present') == 2 * 4 and page.count('class="box unknown') == 2 * 2
    assert "person" not in page  # its confidence is too low even for "unknown"
    assert "Reward = 0.70 style + 0.30 facts" in page and "house.rules:score" in page
    assert page.count("the other 2") == 1 and 'id="step1"' in page and 'id="step2"' in page and "step3" not in page
    assert '<mark class="unsupported" title="truck: unsupported">truck</mark>' in page
    assert "<b>0.150 → 1.950</b>" in page and MODE_TABLE["copilot"].colour in page
    assert "0.600" not in page  # the copilot group whose rewards hardly differ is not shown
    assert not list(folder.glob(".*"))


def test_the_report_colours_claims_and_shows_what_the_language_is_worth(run_folder):
    folder, config = run_folder
    answers = [record(1, 0, k, reward, text="A red car waits.") | {
        "mentions": [], "claims": [["car colour red", verdict, 2, 5]], "nll": 0.4, "worst_nll": 5.25, "language": 0.75}
        for k, (reward, verdict) in enumerate(((0.9, "supported"), (0.1, "contradicted"), (0.5, "unknown")))]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    page = write_report(folder, config).read_text()
    for kind, verdict in (("supported", "supported"), ("unsupported", "contradicted"), ("unknown", "unknown")):
        assert f'<mark class="{kind}" title="car colour red: {verdict}">red</mark>' in page
    assert page.count("language 0.75") == 3 and "worst tokens under stage 2: 5.25 nats, mean 0.40" in page


def test_the_report_can_be_written_without_curves_and_metrics(run_folder):
    folder, config = run_folder
    (folder / "curves.png").unlink()
    (folder / "metrics.jsonl").unlink()
    page = write_report(folder, config).read_text()
    assert "Curves" not in page and "first and of the last tenth" not in page


def test_the_report_of_a_run_without_rollouts_is_refused(tmp_path):
    with pytest.raises(DriveVLMError, match="no rollouts yet"):
        write_report(tmp_path, Stage3Config())
    with pytest.raises(ConfigError, match="usage"):
        main([str(tmp_path)])


def test_the_report_can_be_written_by_a_command(run_folder, capsys):
    from omegaconf import OmegaConf

    folder, config = run_folder
    config.reward_weights = Stage3Config().reward_weights
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    assert main([str(folder)]) == 0 and capsys.readouterr().out.strip() == str(folder / "report.html")


def test_the_report_spreads_steps_evenly_and_shows_groups_that_differ_most():
    assert evenly(range(70), 8) == [0, 10, 20, 30, 39, 49, 59, 69] and evenly([5, 7], 8) == [5, 7]
    groups = groups_by_step([record(1, 1, 0, 0.1), record(1, 0, 0, 0.5), record(1, 1, 1, 0.2), record(0, 1, 0, 0.3)])
    assert list(groups) == [0, 1] and [len(group) for group in groups[1]] == [1, 2]
    assert [group[0]["slot"] for group in chosen_groups(groups[1])] == [1]
    assert reward_progress([{"reward/copilot": 0.5}, {"reward/copilot": None}]) == [("copilot", 0.5, 0.5)]


def test_boxes_are_those_of_the_nearest_frame():
    frames = [{"time": time, "boxes": [[2, 0.9, time, 0, 1, 1]]} for time in (0.0, 0.4, 1.0)]
    evidence = {"present": [], "unknown": ["car"]}
    assert boxes_at(0.6, {"frames": frames}, evidence, DetectorSettings()) == [("unknown", "car 0.90", 0.4, 0, 1, 1)]
