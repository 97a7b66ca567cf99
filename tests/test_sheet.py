"""The sheet for people: what is drawn, what the page hides, what the key holds; ratings worked out by hand, and raters
and detectors of known error."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluation.sheet as sheet
from evaluate import main
from evaluation.ratings import (
    agreement,
    cohens_kappa,
    draw_clips,
    estimate,
    majority,
    read_ratings,
    read_sheet,
    results,
    rogan_gladen,
)
from evaluation.sheet import Item, comparable_clips, draw_items, find_answers, key_of_items, make_sheet, numbered
from stage3.evidence import Evidence
from training.common import ConfigError
from training.config import EvaluateConfig

ROOT = Path(__file__).resolve().parents[1]
NAN = float("nan")

# ---- estimates by hand -----------------------------------------------------------------------------------------------


def test_cohens_kappa_is_as_worked_out_by_hand():
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert cohens_kappa(pairs) == pytest.approx((0.7 - 0.5) / (1 - 0.5))  # chance: .5 x .6 + .5 x .4
    assert cohens_kappa([("y", "y"), ("n", "n"), ("y", "y")]) == 1
    assert cohens_kappa([("y", "n"), ("n", "y")]) == -1
    assert cohens_kappa([("y", "y"), ("y", "n")]) == 0  # the first rater always says the same
    assert cohens_kappa([("y", "y")] * 3) is None and cohens_kappa([]) is None
    assert cohens_kappa([("y", "n")] * 3) == 0
    three = [("a", "a")] * 2 + [("b", "b")] * 2 + [("c", "a")]
    assert cohens_kappa(three) == pytest.approx((4 / 5 - 10 / 25) / (1 - 10 / 25))


def test_agreement_is_the_mean_over_pairs_and_of_common_questions_only():
    anna = {1: "there", 2: "there", 3: "not there", 4: "not there"}
    ben = {1: "there", 2: "not there", 3: "not there", 4: "there"}
    two = agreement([anna, ben])
    assert two["statistic"] == "Cohen's kappa" and two["kappa"] == 0 and two["equal"] == 0.5 and two["compared"] == 4
    cleo = {1: "there", 2: "there", 9: "cannot tell"}  # with anna one and the same answer: no kappa
    three = agreement([anna, ben, cleo])
    assert three["statistic"].startswith("mean of Cohen's kappa") and three["pairs"] == 3
    assert three["pairs_without_kappa"] == 1 and three["compared"] == 8 and three["equal"] == pytest.approx(5 / 8)
    assert three["kappa"] == 0  # anna-ben 0, ben-cleo 0
    assert agreement([anna])["kappa"] is None and agreement([anna])["equal"] is None


def test_rogan_gladen_is_as_worked_out_by_hand():
    def corrected(apparent, false_alarm, miss):
        return float(rogan_gladen(np.array([apparent]), np.array([false_alarm]), np.array([miss]))[0])

    assert corrected(0.3, 0.1, 0.2) == pytest.approx(0.2 / 0.7)
    assert corrected(0.3, 0.0, 0.0) == pytest.approx(0.3)
    assert corrected(0.05, 0.1, 0.2) == 0 and corrected(0.95, 0.0, 0.2) == 1  # clamped
    for false_alarm, miss in ((0.5, 0.5), (0.7, 0.3), (0.7, 0.6), (NAN, 0.1), (0.1, NAN)):
        assert np.isnan(corrected(0.3, false_alarm, miss))
    assert np.isnan(corrected(NAN, 0.1, 0.1))


def test_an_estimate_leaves_undefined_draws_out_and_counts_them():
    assert estimate(np.array([0.5, 0.1, NAN, 0.3])) == {"value": 0.5, "interval": [0.105, 0.295], "undefined_draws": 1}
    assert estimate(np.array([NAN, 0.1])) == {"value": None, "interval": None, "undefined_draws": 0}
    assert estimate(np.array([0.5, NAN])) == {"value": None, "interval": None, "undefined_draws": 1}
    draws = draw_clips(5, np.random.default_rng(0))
    assert draws.shape == (1001, 5) and (draws.sum(1) == 5).all() and (draws[0] == 1).all()
    assert draw_clips(0, np.random.default_rng(0)).shape == (1001, 0)


def test_the_majority_decides_and_a_draw_does_not():
    assert majority(["there"]) == "there" and majority(["not there", "there", "not there"]) == "not there"
    assert majority(["there", "not there"]) == majority(["cannot tell"]) == majority([]) == "cannot tell"
    assert majority(["cannot tell", "cannot tell", "there"]) == "there"


def mention(question, system, verdict, name="car"):
    return {"question": question, "system": system, "object": name, "verdicts": {"truth": verdict}}


def small_key():
    """Three clips in one mode; the third item's answers are equal. Invented by the truth: all mentions of buses."""
    items = [
        {"video": "1", "mode": "copilot", "A": "old", "B": "new", "equal": False, "mentions": [
            mention("A1", "old", "supported"), mention("A2", "old", "unsupported", "bus"),
            mention("B1", "new", "supported")]},
        {"video": "2", "mode": "copilot", "A": "new", "B": "old", "equal": False, "mentions": [
            mention("A1", "new", "unknown", "dog"), mention("B1", "old", "unsupported", "bus"),
            mention("B2", "old", "supported")]},
        {"video": "3", "mode": "copilot", "A": "old", "B": "new", "equal": True, "mentions": [
            mention("A1", "old", "supported"), mention("A1", "new", "supported")]},
    ]
    counts = {"truth": {"old": {"copilot": {"1": [1, 2], "2": [1, 2], "3": [0, 1], "4": [3, 6]}},
                        "new": {"copilot": {"1": [0, 1], "2": [0, 0], "3": [0, 1], "4": [0, 2]}}}}
    return {"sheet": "sheet-1", "systems": ["old", "new"], "modes": ["copilot"], "clips": ["1", "2", "3", "4"],
            "items": items, "counts": counts}


def ratings_of(**marks):
    """q1="A", q1A2="there" as a rater's {(item, mention): answer}."""
    return {(name[1], name[2:]): answer for name, answer in marks.items()}


def test_results_are_as_worked_out_by_hand():
    anna = ratings_of(q1="B", q2="A", q1A1="there", q1A2="not there", q1B1="there", q2A1="there", q2B1="there",
                      q2B2="not there", q3A1="there")
    ben = ratings_of(q1="A", q2="same", q1A1="there", q1A2="not there")
    found = results(small_key(), {"anna": anna, "ben": ben}, seed=1)
    assert found["questions"] == {"preferences": 2, "mentions": 7}
    assert found["raters"] == {"anna": {"preferences": 2, "mentions": 7}, "ben": {"preferences": 2, "mentions": 2}}
    block = found["preference"]["all"]  # new: won twice (anna), lost once (ben), the same once (ben), equal for both
    assert (block["won"], block["lost"], block["ties"]) == (2, 1, 3)
    assert block["win_rate"]["value"] == pytest.approx((2 + 3 / 2) / 6, abs=1e-4)
    assert block == found["preference"]["copilot"]
    assert found["agreement"]["preferences"]["equal"] == 0 and found["agreement"]["mentions"]["equal"] == 1

    both = found["error"]["truth"]["both"]  # there: q1A1, q1B1, q2B1 (alarm), q3A1 of both; not there: q1A2, q2B2
    assert (both["there"], both["false_alarms"], both["not_there"], both["misses"]) == (5, 1, 2, 1)
    assert both["false_alarm_rate"]["value"] == 0.2 and both["miss_rate"]["value"] == 0.5 and both["undecided"] == 1
    new = found["error"]["truth"]["new"]
    assert (new["there"], new["not_there"], new["miss_rate"]["value"]) == (2, 0, None)

    old = found["chair_i"]["old"]["copilot"]
    assert old["people"]["not_there"] == 2 and old["people"]["decided"] == 5
    assert old["people"]["chair_i"]["value"] == 0.4
    apparent = 5 / 11  # over all four clips
    assert old["truth"]["apparent"]["value"] == pytest.approx(apparent, abs=1e-4)
    assert old["truth"]["corrected"]["value"] == pytest.approx((apparent - 0.2) / (1 - 0.2 - 0.5), abs=1e-4)
    own = (apparent - 1 / 3) / (1 - 1 / 3 - 1 / 2)
    assert old["truth"]["corrected_by_own_rates"]["value"] == pytest.approx(own, abs=1e-4)
    new = found["chair_i"]["new"]["copilot"]
    assert new["truth"]["apparent"]["value"] == new["truth"]["corrected"]["value"] == 0
    assert new["truth"]["corrected_by_own_rates"]["value"] is None and new["people"]["chair_i"]["value"] == 0


def test_results_are_seeded_and_survive_no_ratings_of_a_kind():
    ratings = {"anna": ratings_of(q1="B"), "ben": ratings_of(q2A1="cannot tell")}
    assert results(small_key(), ratings, 3) == results(small_key(), ratings, 3)
    found = results(small_key(), ratings, 3)
    both = found["error"]["truth"]["both"]
    assert both["false_alarm_rate"]["value"] is None and both["undecided"] == 1  # what nobody has marked is not counted
    assert found["chair_i"]["old"]["copilot"]["truth"]["corrected"]["value"] is None
    assert found["agreement"]["preferences"]["kappa"] is None and json.dumps(found, allow_nan=False)


# ---- raters and detectors of known error -----------------------------------------------------------------------------

FALSE_ALARM, MISS, INVENTED = 0.1, 0.2, {"old": 0.3, "new": 0.1}


def simulated(num_clips, rng, asked=10):
    """(key, {question: what is really there}): `num_clips` clips on the sheet and as many that are not. Each answer has
    `asked` mentions, of which the share INVENTED is not there; the detector errs as FALSE_ALARM and MISS say."""
    items, real, counts = [], {}, {system: {"copilot": {}} for system in INVENTED}
    for clip in range(2 * num_clips):
        order = rng.sample(list(INVENTED), 2)
        item = {"video": str(clip), "mode": "copilot", "A": order[0], "B": order[1], "equal": False, "mentions": []}
        for side, system in zip("AB", order, strict=True):
            for k in range(asked):
                there = rng.random() >= INVENTED[system]
                wrong = rng.random() < (FALSE_ALARM if there else MISS)
                verdict = "supported" if there != wrong else "unsupported"
                item["mentions"].append(mention(f"{side}{k}", system, verdict))
                real[str(clip + 1), f"{side}{k}"] = there
            verdicts = [m["verdicts"]["truth"] for m in item["mentions"] if m["system"] == system]
            counts[system]["copilot"][str(clip)] = [verdicts.count("unsupported"), asked]
        items.append(item)
    key = {"sheet": "sheet-1", "systems": list(INVENTED), "modes": ["copilot"], "items": items[:num_clips],
           "clips": [item["video"] for item in items], "counts": {"truth": counts}}
    return key, real


def simulated_rater(key, real, rng, flips, prefers_new):
    """A rater who flips each mention's mark with a probability, and prefers the new system with another."""
    ratings = {}
    for number, item in enumerate(key["items"], 1):
        new = "A" if item["A"] == "new" else "B"
        ratings[str(number), ""] = new if rng.random() < prefers_new else "AB".replace(new, "")
        for asked in item["mentions"]:
            question = (str(number), asked["question"])
            there = real[question] != (rng.random() < flips)
            ratings[question] = "there" if there else "not there"
    return ratings


def test_the_detectors_error_and_the_real_chair_are_found_again():
    rng = random.Random(0)
    key, real = simulated(150, rng)
    ratings = {name: simulated_rater(key, real, rng, 0.04, 0.7) for name in ("anna", "ben", "cleo")}
    found = results(key, ratings, 0)
    error = found["error"]["truth"]["both"]
    assert error["false_alarm_rate"]["value"] == pytest.approx(FALSE_ALARM, abs=0.02)
    assert error["miss_rate"]["value"] == pytest.approx(MISS, abs=0.03)
    for system, real_share in INVENTED.items():
        block = found["chair_i"][system]["copilot"]
        apparent = real_share * (1 - MISS) + (1 - real_share) * FALSE_ALARM
        assert block["truth"]["apparent"]["value"] == pytest.approx(apparent, abs=0.02)
        for name in ("corrected", "corrected_by_own_rates"):
            corrected = block["truth"][name]
            assert corrected["value"] == pytest.approx(real_share, abs=0.03)
            assert corrected["interval"][0] < real_share < corrected["interval"][1]
        assert block["people"]["chair_i"]["value"] == pytest.approx(real_share, abs=0.03)
    win_rate = found["preference"]["all"]["win_rate"]
    assert win_rate["interval"][0] < 0.7 < win_rate["interval"][1] and win_rate["value"] == pytest.approx(0.7, abs=0.05)


def test_a_single_raters_own_error_is_counted_as_the_detectors():
    """What docs/evaluation.md warns of: with one rater who flips 15%, the rates are those of detector and rater."""
    rng, flips = random.Random(1), 0.15
    key, real = simulated(300, rng)
    error = results(key, {"anna": simulated_rater(key, real, rng, flips, 0.5)}, 0)["error"]["truth"]["both"]
    invented = sum(INVENTED.values()) / 2
    alarm_there, alarm_not = (1 - invented) * FALSE_ALARM, invented * (1 - MISS)
    said_there = (1 - invented) * (1 - flips) + invented * flips
    expected = (alarm_there * (1 - flips) + alarm_not * flips) / said_there
    assert error["false_alarm_rate"]["value"] == pytest.approx(expected, abs=0.02) and expected > FALSE_ALARM + 0.02


def test_kappa_of_simulated_raters_is_what_their_error_gives():
    rng, flips = random.Random(2), 0.1
    key, real = simulated(150, rng)
    ratings = {name: simulated_rater(key, real, rng, flips, 0.5) for name in ("anna", "ben")}
    found = results(key, ratings, 0)["agreement"]
    equal = (1 - flips) ** 2 + flips**2
    said_there = 0.8 * (1 - flips) + 0.2 * flips
    chance = said_there**2 + (1 - said_there) ** 2
    assert found["mentions"]["equal"] == pytest.approx(equal, abs=0.02)
    assert found["mentions"]["kappa"] == pytest.approx((equal - chance) / (1 - chance), abs=0.04)
    assert found["preferences"]["kappa"] == pytest.approx(0, abs=0.2)  # they choose by coin


# ---- what is drawn, and what the page hides --------------------------------------------------------------------------


def row(system, video, mode, text, sample=0):
    return {"system": system, "video": video, "mode": mode, "text": text, "sample": sample}


def test_clips_and_sides_are_drawn_by_seed():
    predictions = [row(system, f"{i}.mp4", mode, f"{system} {i} {mode}") for system in ("old", "new", "other")
                   for i in range(30) for mode in ("microscope", "copilot")]
    predictions += [row("old", "30.mp4", mode, "a car") for mode in ("microscope", "copilot")]  # by one system only
    predictions += [row("new", "0.mp4", "copilot", "sampled", sample=1)]
    answers = find_answers(predictions, ["old", "new"])
    assert len(comparable_clips(answers, ["microscope", "copilot"])) == 30
    items = draw_items(answers, ["old", "new"], ["microscope", "copilot"], 20, seed=1)
    assert items == draw_items(answers, ["old", "new"], ["microscope", "copilot"], 20, seed=1)
    other = draw_items(answers, ["old", "new"], ["microscope", "copilot"], 20, seed=2)
    assert {item.video for item in items} != {item.video for item in other} and len(items) == len(other) == 40
    assert [item.mode for item in items] == ["microscope", "copilot"] * 20
    assert len({item.video for item in items}) == 20 and items[0].video == items[1].video
    assert 10 < sum(item.systems == ("old", "new") for item in items) < 30
    for item in items:
        assert item.texts == tuple(f"{system} {item.video[:-4]} {item.mode}" for system in item.systems)


def test_mentions_are_numbered_where_they_stand_and_denied_ones_are_not_asked():
    text = "A <cyclist> and a car; no bus. Another car."
    page = numbered(text, ["a", "b", "c", "d"])
    assert page == ('A &lt;<mark data-questions="a b">cyclist<sup>1, 2</sup></mark>&gt; and a '
                    '<mark data-questions="c">car<sup>3</sup></mark>; no bus. Another '
                    '<mark data-questions="d">car<sup>4</sup></mark>.')
    assert re.sub("<sup>.*?</sup>|<.*?>", "", page) == text.replace("<", "&lt;").replace(">", "&gt;")
    assert numbered("", []) == ""


ITEMS = [Item("a.mp4", "copilot", ("zebra-old", "zebra-new"), ("A car.", "A car and a bus.")),
         Item("b.mp4", "copilot", ("zebra-new", "zebra-old"), ("A dog.", "A dog."))]
PICTURES = {"a.mp4": [{"uri": "data:image/jpeg;base64,AA==", "label": "0%"}],
            "b.mp4": [{"uri": "data:image/jpeg;base64,BB==", "label": "0%"}]}


def test_the_page_is_the_same_whoever_gave_the_answers(tmp_path):
    pages = []
    for names in (("zebra-old", "zebra-new"), ("zebra-new", "zebra-old"), ("p", "q")):
        items = [Item(item.video, item.mode, names, item.texts) for item in ITEMS]
        sheet.write_page(tmp_path / "sheet.html", items, PICTURES)
        pages.append((tmp_path / "sheet.html").read_bytes())
    assert pages[0] == pages[1] == pages[2] and b"zebra" not in pages[0]
    assert b"a.mp4" not in pages[0]  # nor the clip's name, which may tell what is in it


def test_the_page_loads_nothing_and_runs_only_its_own_script(tmp_path):
    sheet.write_page(tmp_path / "sheet.html", ITEMS, PICTURES)
    page = (tmp_path / "sheet.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)|url\(|@import|https?://| on[a-z]+="| style="', page)
    assert page.count("<script>") == 1 and "default-src 'none'; img-src data:;" in page
    assert "eval(" not in page and "innerHTML" not in page


def test_the_key_knows_whose_answer_is_whose():
    truths = {"truth": {video: sheet.Truth(frozenset({"car"}), frozenset({"car"}), frozenset({"dog"}))
                        for video in ("a.mp4", "b.mp4")}}
    first, second = key_of_items(ITEMS, truths)
    assert (first["A"], first["B"], first["equal"]) == ("zebra-old", "zebra-new", False)
    assert [(m["question"], m["system"], m["verdicts"]["truth"]) for m in first["mentions"]] == [
        ("A1", "zebra-old", "supported"), ("B1", "zebra-new", "supported"), ("B2", "zebra-new", "unsupported")]
    assert second["equal"] and [(m["question"], m["system"], m["verdicts"]["truth"]) for m in second["mentions"]] == [
        ("A1", "zebra-new", "unknown"), ("A1", "zebra-old", "unknown")]


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tiny, tmp_path, monkeypatch):
    """Answers of two systems about three clips, exact truth, and a detector that sees a car and cannot read bus.mp4."""
    videos, rows = ["car.mp4", "bus.mp4", "walk.mp4"], []
    for video in videos:
        rows += [row("stage2", video, "microscope", "A car, a bus and a dog."), row("stage2", video, "copilot", "Car."),
                 row("stage3", video, "microscope", "A car."), row("stage3", video, "copilot", "Car.")]
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    truth = {video: {"present": ["bus"] if video == "bus.mp4" else ["car"]} for video in videos}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    monkeypatch.setattr(sheet, "evidence_problems", lambda *rest: [])
    seen = Evidence(frozenset({"car"}), frozenset({"dog"}))
    monkeypatch.setattr(sheet, "get_evidence", lambda clips, root, settings, cache: {
        clip.video: None if clip.video == "bus.mp4" else seen for clip in clips})
    return EvaluateConfig(output_dir=str(out), video_root=str(tiny.videos), truth=str(tmp_path / "truth.json"), sheet=2)


def test_a_sheet_and_its_key_are_written(config, tmp_path, capsys):
    assert make_sheet(config) == 0
    page, key = (tmp_path / "out/sheet.html").read_text(), json.loads((tmp_path / "out/sheet_key.json").read_text())
    assert "not for raters" in capsys.readouterr().out
    assert "stage2" not in page and "stage3" not in page
    assert page.count('<section class="card clip"') == 2 and page.count('src="data:image/jpeg') == 2 * 16
    assert key["systems"] == ["stage2", "stage3"] and key["modes"] == ["microscope", "copilot"]
    assert len(key["items"]) == 4 and sum(item["equal"] for item in key["items"]) == 2
    assert set(key["counts"]) == {"truth", "detector"}
    assert key["counts"]["truth"]["stage2"]["microscope"] == {
        "car.mp4": [2, 3], "bus.mp4": [2, 3], "walk.mp4": [2, 3]}  # every clip, not only those of the sheet
    assert key["counts"]["detector"]["stage2"]["microscope"] == {
        "car.mp4": [1, 2], "bus.mp4": [0, 0], "walk.mp4": [1, 2]}  # the dog is unknown, and so is all of bus.mp4
    assert key["counts"]["truth"]["stage3"]["copilot"] == {"car.mp4": [0, 1], "bus.mp4": [1, 1], "walk.mp4": [0, 1]}

    assert key["clips"] == ["bus.mp4", "car.mp4", "walk.mp4"]

    before = page
    assert make_sheet(config) == 0 and (tmp_path / "out/sheet.html").read_text() == before
    config.sheet = 3
    with pytest.raises(ConfigError, match="key of another sheet"):
        make_sheet(config)
    assert (tmp_path / "out/sheet.html").read_text() == before


def test_without_exact_truth_the_judge_and_the_reward_are_compared_with_people(config, tmp_path):
    config.truth, config.sheet_modes = "", ["microscope"]
    assert main(["--output_dir", config.output_dir, "--video_root", config.video_root, "--sheet", "2", "--sheet_modes",
                 "microscope", "--sheet_systems", "stage3", "stage2"]) == 0
    key = json.loads((tmp_path / "out/sheet_key.json").read_text())
    assert set(key["counts"]) == {"judge", "detector"} and key["systems"] == ["stage3", "stage2"]
    assert {item["mode"] for item in key["items"]} == {"microscope"} and len(key["items"]) == 2


def test_clips_without_captions_are_read_from_their_folder(config, tmp_path):
    config.clips, config.video_root = config.video_root, "nowhere"
    assert make_sheet(config) == 0 and (tmp_path / "out/sheet.html").exists()


def test_all_problems_of_a_sheet_are_in_one_message(config, tmp_path):
    config.sheet_systems, config.video_root, config.truth, config.sheet_modes = ["stage1", "stage3"], "no", "no.json", [
        "essay"]
    with pytest.raises(ConfigError) as error:
        make_sheet(config)
    assert error.value.exit_code == 2
    for part in ("no answers of 'stage1'", "there are stage2, stage3", "video_root: not found: no",
                 "truth: not found: no.json", "no answers in mode 'essay'"):
        assert part in error.value.text
    config.output_dir = str(tmp_path)
    with pytest.raises(ConfigError, match="no answers in .*predictions.jsonl; run evaluate.py"):
        make_sheet(config)
    few = EvaluateConfig(output_dir=str(tmp_path / "out"), video_root=str(tmp_path), truth=str(tmp_path / "truth.json"),
                         sheet=9)
    with pytest.raises(ConfigError, match="9 clips asked for, but both systems have answered about 3"):
        make_sheet(few)
    values = EvaluateConfig(sheet=-1, sheet_systems=["a", "a"], sheet_modes=["copilot", "copilot"], read_sheet=["x"])
    assert len(values.problems()) == 4


HEAD = "sheet,rater,item,mention,answer\n"


@pytest.fixture
def rated(tmp_path):
    """A folder with small_key() and one rater's file."""
    (tmp_path / "sheet_key.json").write_text(json.dumps(small_key()))
    lines = ["sheet-1,anna,1,,B", "sheet-1,anna,1,A2,not there", "sheet-1,anna,2,,same", "sheet-1,anna,3,A1,there"]
    (tmp_path / "anna.csv").write_text("\ufeff" + HEAD + "".join(f"{line}\r\n" for line in lines))
    return EvaluateConfig(output_dir=str(tmp_path), read_sheet=[str(tmp_path / "anna.csv")])


def test_ratings_are_read_printed_and_written(rated, tmp_path, capsys):
    (tmp_path / "ben.csv").write_text(HEAD + "sheet-1,ben,1,,A\nsheet-1,ben,1,A2,there\n")
    rated.read_sheet.append(str(tmp_path / "ben.csv"))
    assert read_sheet(rated) == 0
    text, found = capsys.readouterr().out, json.loads((tmp_path / "sheet_ratings.json").read_text())
    assert found["raters"] == {"anna": {"preferences": 2, "mentions": 2}, "ben": {"preferences": 1, "mentions": 1}}
    assert "new against old" in text and "Rogan-Gladen" in text and "| anna  | 2 of 2" in text
    ratings = read_ratings(rated.read_sheet, small_key(), [])
    assert found == results(small_key(), ratings, rated.seed)
    assert found["preference"]["all"]["won"] == found["preference"]["all"]["lost"] == 1


def test_all_problems_of_the_ratings_are_in_one_message(rated, tmp_path):
    files = {
        "columns.csv": "sheet,rater,item\nsheet-1,a,1\n", "empty.csv": "", "head.csv": HEAD,
        "wrong.csv": HEAD + "sheet-1,ben,9,,A\nsheet-1,ben,1,B9,there\nsheet-1,ben,3,,same\nsheet-1,ben,1,,there\n"
                     "sheet-1,ben,1,A1,yes\nsheet-1,,1,A1,there\nsheet-1,ben,2,,A\nsheet-1,ben,2,,A\n",
        "other.csv": HEAD + "sheet-2,ben,1,,A\nsheet-2,ben,2,,A\nsheet-2,ben,3,,A\n", "short.csv": HEAD + "sheet-1\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "picture.csv").write_bytes(b"\xff\xd8\xff\xe0")
    names = [*files, "picture.csv", "gone.csv", "anna.csv"]
    rated.read_sheet += [str(tmp_path / name) for name in names]
    with pytest.raises(ConfigError) as error:
        read_sheet(rated)
    assert error.value.exit_code == 2
    for part in (
            "columns.csv lacks the columns mention, answer", "begins with nothing", "head.csv holds no answers",
            "empty.csv lacks the columns sheet, rater, item", "short.csv, line 2: no name of a rater",
            "wrong.csv, line 2: the sheet has no item '9' with mention ''", "gone.csv: No such file",
            "line 3: the sheet has no item '1' with mention 'B9'", "no item '3' with mention ''",
            "line 5: answer 'there' is none of A, B, same", "'yes' is none of there, not there, cannot tell",
            "wrong.csv: 2 more problems", "other.csv, 3 lines from line 2 on: of another sheet, sheet-2",
            "picture.csv is no CSV file",
            "anna.csv, 4 lines from line 2 on: anna has answered this question before"):
        assert part in error.value.text, part
    assert not (tmp_path / "sheet_ratings.json").exists()
    (tmp_path / "sheet_key.json").unlink()
    with pytest.raises(ConfigError, match="(?s)no .*sheet_key.json.*gone.csv: No such file"):
        read_sheet(rated)
    (tmp_path / "sheet_key.json").write_text('{"sheet": 1}')
    with pytest.raises(ConfigError, match="is no key of a sheet"):
        read_sheet(rated)


def test_ratings_are_read_without_torch(rated, tmp_path):
    """torch is replaced by a module that cannot be imported."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    run = [sys.executable, str(ROOT / "evaluate.py"), "--output_dir", str(tmp_path), "--read_sheet"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*run, str(tmp_path / "anna.csv")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "| new against old" in done.stdout, done.stderr
    done = subprocess.run([*run, "gone.csv"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "1 problem, nothing was written" in done.stderr
