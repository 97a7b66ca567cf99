"""Evaluation: metrics worked out by hand, prior, controls, resumed predictions, page; and generate.py."""

import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import images_of

import evaluate as program
import evaluation.best_of
import evaluation.hedging
import generate
from dataset import MODE_TABLE, MODES, Entry, encode_example, load_split, read_frames, root_of_clips
from evaluate import change_frames, constant_caption, evaluate, in_unseen_wordings
from evaluation.best_of import BestOf
from evaluation.captions import add_bleu, add_caption_scores
from evaluation.hedging import weights_id
from evaluation.judges import agreed_truth, agreement, kappa
from evaluation.report import cell, differences_of_mode, marked, table
from evaluation.scoring import (
    Truth,
    count_claims,
    difference,
    draw_clips,
    equal_lengths,
    is_broken,
    score,
    score_slice,
    score_text,
    score_wordings,
    share_right,
    slices_of,
    tally,
    values_of,
    worse_than,
)
from model import Answer, DriveVLM
from stage3.grpo_reward_func import Evidence
from training.common import ConfigError
from training.config import DetectorSettings, EvaluateConfig, GenerateConfig

RANGES = {"microscope": [5, 100], "copilot": [2, 6]}
TRUTH = Truth(frozenset({"car", "person"}), frozenset({"car", "person"}), frozenset({"bus"}), ("person", "car"))


def row(text, mode="copilot", video="a.mp4", ended=True, sample=0):
    return {"system": "x", "key": "", "id": f"{video}#{mode}", "video": video, "mode": mode, "sample": sample,
            "text": text, "tokens": 10, "ended": ended, "seconds": 0.5}


def test_counts_of_a_text_are_as_worked_out_by_hand():
    counts = score_text("A person crosses, then a car, a car and a truck pass; perhaps a bus.", TRUTH, [5, 20])
    expected = {"hit": 2, "named": 3, "recalled": 2, "salient": 2, "mentions": 4, "invented": 1, "inventing": True,
                "pairs": 1, "agreeing": 1, "in_range": True, "words": 15}
    assert {key: counts[key] for key in expected} == expected
    assert counts["hit", "car"] == 1 and counts["false", "truck"] == 1 and ("false", "bus") not in counts


def test_order_counts_first_mentions_and_skips_negated_ones():
    assert score_text("A car, then a person.", TRUTH, [0, 9])["agreeing"] == 0
    assert score_text("A car is there.", TRUTH, [0, 9])["pairs"] == 0
    counts = score_text("No trucks are visible.", TRUTH, [0, 9])
    assert counts["mentions"] == counts["named"] == 0


def test_metrics_are_as_worked_out_by_hand():
    truth = {"a.mp4": TRUTH, "b.mp4": Truth(frozenset({"car"}), frozenset({"car"}))}
    rows = [
        row("A car and a truck."), row("A car waits.", video="b.mp4", ended=False),
        row("A car drives on and a car follows it.", "microscope"), row("A dog.", "microscope", video="b.mp4"),
    ]
    block = score(rows, truth, RANGES)
    copilot, microscope = block["copilot"], block["microscope"]
    for key in ("precision", "recall", "f1_micro"):
        assert copilot[key] == pytest.approx(2 / 3, abs=1e-4)
    assert copilot["f1_macro"] == pytest.approx((1.0 + 0.0) / 2)  # car 1, person 0; no clip's truth has a truck
    assert copilot["chair_i"] == pytest.approx(1 / 3, abs=1e-4) and copilot["chair_s"] == 0.5
    assert copilot["ended"] == 0.5 and copilot["words"] == 4 and copilot["tokens_per_second"] == 20
    assert microscope["chair_i"] == pytest.approx(1 / 3, abs=1e-4)  # two mentions of the car, one of the dog
    assert microscope["in_range"] == 0.5 and block["mode_accuracy"] == 0.5


def test_intervals_are_seeded_and_contain_the_value():
    rng = np.random.default_rng(0)
    truth = {f"{i}.mp4": TRUTH for i in range(20)}
    texts = ["A car.", "A truck.", "A person and a car."]
    rows = [row(str(rng.choice(texts)), mode, video) for video in truth for mode in MODES]
    block = score(rows, truth, RANGES)
    assert block == score(list(reversed(rows)), truth, RANGES)
    low, high = block["copilot"]["interval"]["precision"]
    assert low < block["copilot"]["precision"] < high
    same = score([row("A car.", mode, video) for video in truth for mode in MODES], truth, RANGES)
    assert same["copilot"]["interval"]["precision"] == [1.0, 1.0]


def test_the_macro_average_leaves_out_classes_that_a_draw_lacks():
    truth = {f"{i}.mp4": TRUTH if i else Truth(frozenset({"dog"}), frozenset({"dog"})) for i in range(5)}
    texts = {video: "A " + " and a ".join(sorted(clip.present)) for video, clip in truth.items()}
    block = score([row(text, mode, video) for video, text in texts.items() for mode in MODES], truth, RANGES)
    assert block["copilot"]["f1_macro"] == 1 and block["copilot"]["interval"]["f1_macro"] == [1, 1]


def test_an_empty_truth_can_be_scored():
    nothing = {"a.mp4": Truth(frozenset(), frozenset())}
    block = score([row("A car.", mode) for mode in MODES], nothing, RANGES)["copilot"]
    assert block["f1_macro"] == block["recall"] == 0 and block["chair_i"] == 1


def test_an_empty_answer_scores_0():
    block = score([row("", mode) for mode in MODES], {"a.mp4": TRUTH}, RANGES)["copilot"]
    assert block["precision"] == block["recall"] == block["f1_micro"] == block["chair_i"] == 0
    assert cell(block, "chair_i") == "–" and cell(block, "recall") == "0.00 ±.00"


def test_repetition_is_the_share_of_repeated_four_word_sequences():
    counts = score_text("the car goes on the car goes on", TRUTH, [0, 99])
    assert counts["grams"] == 5 and counts["repeated"] == 1


def test_answers_to_unseen_wordings_are_counted_as_worked_out_by_hand():
    """In range: 2 to 6 words (copilot), 5 to 100 (microscope)."""
    loop = "the car goes on the car goes on the car"  # 7 four-word sequences, of which 3 are repeats
    answers = [  # question, mode, text, ended, right, broken
        ("Short?", "copilot", "A car waits.", True, True, False),
        ("Short?", "copilot", "A car.", False, False, True),  # the length is right, but it was cut off
        ("Short?", "copilot", "A car waits at the red light.", True, False, False),  # 7 words
        ("Brief?", "copilot", "A", True, False, False),
        ("Long?", "microscope", "A car waits at the red light.", True, True, False),
        ("Long?", "microscope", loop, True, False, True),
        ("Long?", "microscope", "a b c d e f g a b c d e", True, False, True),  # 2 of 9: over a fifth
        ("Long?", "microscope", "a b c d e f g h a b c d e", True, True, False),  # 2 of 10: a fifth, not more
        ("Long?", "microscope", "a b c d e f a b c d", True, True, False),  # 1 of 7
    ]
    rows = [{**row(text, mode, ended=ended), "question": question}
            for question, mode, text, ended, _, _ in answers]
    assert [is_broken(line) for line in rows] == [broken for *_, broken in answers]
    wordings = score_wordings(rows, RANGES)
    assert wordings == {"copilot": {"Short?": {"asked": 3, "right": 1, "broken": 1},
                                    "Brief?": {"asked": 1, "right": 0, "broken": 0}},
                        "microscope": {"Long?": {"asked": 5, "right": 3, "broken": 2}}}
    assert share_right(wordings) == 0.4444  # 4 of 9


def test_unseen_wordings_take_turns():
    entries = [Entry(f"{i}#{mode}", f"{i}", mode, question, ("A car.",))
               for i in range(20) for mode, question in (("microscope", MODES["microscope"]), ("copilot", "And now?"))]
    asked = in_unseen_wordings(entries)
    assert [replace(one, question="") for one in asked] == [replace(one, question="") for one in entries]
    for mode in MODES:
        number = Counter(one.question for one in asked if one.mode == mode)
        assert set(number) == set(MODE_TABLE[mode].unseen) and set(number.values()) == {2, 3}


def entry(video, *captions, mode="copilot"):
    return Entry(f"{video}#{mode}", video, mode, MODES[mode], captions)


def test_the_prior_is_the_best_constant_set_of_classes():
    captions = {"1": "A car and a truck.", "2": "A car and a bus.", "3": "A car.", "4": "A car."}
    train = [entry(video, caption) for video, caption in captions.items()]
    assert constant_caption(train, {}) == ("Car.", pytest.approx(2 * 1.0 * (4 / 6) / (1 + 4 / 6)))
    both = frozenset({"car", "truck"})  # the truth of the training clips decides how many classes, if it is known
    assert constant_caption(train, dict.fromkeys("1234", Truth(both, both))) == ("Car, truck.", 1.0)


def test_controls_change_the_frames_as_named():
    frames = np.arange(3 * 4 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 4, 2, 2, 3)
    assert change_frames(frames, "") is frames
    assert (change_frames(frames, "blank") == 128).all()
    assert (change_frames(frames, "reversed")[:, 0] == frames[:, -1]).all()
    assert (change_frames(frames, "middle") == frames[:, 2:3]).all()
    shuffled = change_frames(frames, "shuffled")
    assert all((shuffled[:, i] != frames[:, i]).any() for i in range(4))  # no frame stays
    assert sorted(shuffled[0].reshape(4, -1).tolist()) == sorted(frames[0].reshape(4, -1).tolist())
    assert change_frames(np.full((1, 2, 2, 2, 3), 200, dtype=np.uint8), "dark").max() == 30
    swapped = change_frames(frames, "swapped")
    assert all((swapped[i] != frames[i]).any() for i in range(3)) and sorted(swapped.sum((1, 2, 3, 4))) == sorted(
        frames.sum((1, 2, 3, 4)))


def test_mentions_are_coloured_by_the_truth():
    page = marked("A <car>, a truck, a bus; no person. A cyclist.", TRUTH)
    assert '&lt;<mark class="supported" title="car: supported">car</mark>&gt;' in page
    assert '<mark class="unsupported" title="truck: unsupported">truck</mark>' in page
    assert '<mark class="unknown" title="bus: unknown">bus</mark>' in page
    assert '<mark class="negated" title="person: negated">person</mark>' in page
    assert re.search('<mark class="unsupported" [^>]+>cyclist</mark>', page)  # the person is there, the bicycle is not


def of_classes(*present, **known):
    return Truth(frozenset(present), frozenset(present), **known)


def test_recall_of_safety_critical_classes_leaves_out_what_is_not_critical():
    """There: a person, a car and a dog. Told: the car and the dog. Of the two that matter for safety, one."""
    truth = {"a": of_classes("person", "car", "dog")}
    block = score([row("A car and a dog.", mode, "a") for mode in MODES], truth, RANGES)["copilot"]
    assert block["safety_recall"] == 0.5 and block["safety_classes"] == 2
    assert block["recall"] == pytest.approx(2 / 3, abs=1e-4)
    assert block["classes"] == {"person": {"told": [0, 1], "invented": 0}, "car": {"told": [1, 1], "invented": 0},
                                "dog": {"told": [1, 1], "invented": 0}}
    dogs = score([row("A dog.", mode, "a") for mode in MODES], {"a": of_classes("dog")}, RANGES)["copilot"]
    assert cell(dogs, "safety_recall") == "–"


def test_what_is_told_and_what_is_invented_in_traps_are_counted_apart():
    """Four clips with a red light: in two a person crosses, of which one is told; in two nobody does, and one answer
    invents a person. The fifth has no trap."""
    light = ("light_red", "person")
    truth = {name: of_classes("traffic light", "person", traps=((*light, True),)) for name in "ab"}
    truth |= {name: of_classes("traffic light", traps=((*light, False),)) for name in "cd"}
    truth["e"] = of_classes("car")
    texts = {"a": "A person crosses at the red light.", "b": "A red light.", "c": "A person crosses.", "d": "A light.",
             "e": "A person and a car."}
    block = score([row(text, mode, name) for name, text in texts.items() for mode in MODES], truth, RANGES)["copilot"]
    assert (block["trap_told"], block["traps_there"]) == (0.5, 2)
    assert (block["trap_invented"], block["traps_absent"]) == (0.5, 2)
    assert block["traps"] == {"light_red: person": {"told": [1, 2], "invented": [1, 2]}}
    assert block["chair_i"] == pytest.approx(2 / 6, abs=1e-4)  # persons of c and e, of 6 mentions
    # a class of a trap that is there for another reason is neither told nor invented by the trap
    other = {"a": of_classes("person", traps=((*light, False),))}
    assert score([row("A person.", mode, "a") for mode in MODES], other, RANGES)["copilot"]["traps_absent"] == 0


def test_at_equal_length_only_the_first_words_count():
    """The shorter answer has 4 words. Of the longer one's first 4, "a car and a", one mention counts, a right one."""
    truth = {"a": of_classes("car", "bus")}
    rows_of = {"long": [row("A car and a truck, then a bus.", mode, "a") for mode in MODES],
               "short": [row("A truck turns off.", mode, "a") for mode in MODES],
               "empty": [row("", mode, "a") for mode in MODES]}
    equal = equal_lengths(rows_of, ["long", "short", "empty"])
    assert equal == {(mode, "a"): 4 for mode in MODES}
    long, short = (score(rows_of[name], truth, RANGES, equal_words=equal)["copilot"] for name in ("long", "short"))
    assert (long["chair_i"], long["chair_i_equal"], long["recall_equal"]) == (0.3333, 0, 0.5)
    assert (short["chair_i"], short["chair_i_equal"], short["recall_equal"]) == (1, 1, 0)
    assert cell(score(rows_of["long"], truth, RANGES)["copilot"], "chair_i_equal") == "–"  # nothing to compare with


def test_paired_differences_are_of_the_same_draws():
    """One system invents in every clip where the other does, and in one of ten more. By itself each varies widely over
    clips; their difference in each draw is the number of times that one clip was drawn, divided by 10."""
    truth = {f"{i}": of_classes("car") for i in range(10)}
    before = [row("A truck." if i < 5 else "A car.", mode, f"{i}") for i in range(10) for mode in MODES]
    after = [row("A truck." if i < 6 else "A car.", mode, f"{i}") for i in range(10) for mode in MODES]
    videos = sorted(truth)
    values = [values_of(tally(rows, truth, RANGES), RANGES, videos, truth, 42) for rows in (before, after)]
    change, low, high = difference(*values)["copilot"]["chair_i"]
    assert change == 0.1 and low == 0 and high == 0.3
    draws = draw_clips(10, 42)
    assert (values[1]["copilot"]["chair_i"] - values[0]["copilot"]["chair_i"]) == pytest.approx(draws[:, 5] / 10)
    assert difference(values[0], values[0])["copilot"]["recall"] == [0, 0, 0]


def test_a_difference_is_bold_where_its_interval_leaves_out_0():
    changes = {"words": [-1, -2.0, -0.5], "recall": [0.1, 0.05, 0.2], "chair_i": [0.1, 0, 0.2],
               "wrong_claims": [0.5, 0.4, 0.6]}
    changes |= {key: [0, 0, 0] for key in ("safety_recall", "order")}
    sums = {"mentions": 3, "safety_classes": 0, "order_pairs": 0}
    systems = {"a": {"copilot": sums | {"claims": 3}}, "b": {"copilot": sums | {"claims": 0}}}
    metrics = {"systems": systems, "differences": [{"before": "a", "after": "b", "copilot": changes}]}
    head, row = differences_of_mode(metrics, "copilot")
    assert head == ["Copilot, change", "words", "R", "CHAIRi", "wrong"]
    assert row == ["a → b", "**-1.0 [-2.0, -0.5]**", "**+0.10 [+0.05, +0.20]**", "+0.10 [+0.00, +0.20]", "–"]


def test_slices_are_parts_of_the_clips():
    truth = {f"{i:02}": of_classes("car") if i % 2 else of_classes("car", "bus") for i in range(16)}
    attributes = {video: {"night": i < 8, "weather": "rain", "boxes": [1]} for i, video in enumerate(sorted(truth))}
    attributes["00"] = {"night": True}  # of weather, nothing is known here
    parts = slices_of(attributes, truth)
    assert {name: len(videos) for name, videos in parts.items()} == {
        "night": 8, "not night": 8, "weather: rain": 15, "with bus": 8, "with car": 16}
    rows = [row("A car." if i < 8 else "A car and a truck.", "copilot", video) for i, video in enumerate(sorted(truth))]
    counts = tally(rows, truth, RANGES)
    night, day = (score_slice(counts, ["copilot"], parts[part], truth, 42)["copilot"]
                  for part in ("night", "not night"))
    assert night["chair_i"] == 0 and day["chair_i"] == 0.5 and night["interval"]["chair_i"] == [0, 0]
    assert night["recall"] == pytest.approx(8 / 12, abs=1e-4)
    few = {video: clip for video, clip in truth.items() if video < "07"}
    assert slices_of(attributes, few) == {}  # seven clips say nothing


def test_the_baseline_names_what_got_worse_beyond_its_interval():
    def metrics(recall, chair, interval=(0.4, 0.6)):
        block = {"interval": {key: list(interval) for key in ("recall", "chair_i")}, "recall": recall, "chair_i": chair,
                 "safety_recall": 0, "wrong_claims": 1, "ended": 0}  # without an interval: not compared
        return {"systems": {"stage3": {"copilot": block}}, "words_in_range": {"copilot": [1, 2]},
                "slices": {"night": {"clips": 9, "systems": {"stage3": {"copilot": block}}}}}

    assert worse_than(metrics(0.5, 0.5), metrics(0.4, 0.6)) == []
    assert worse_than(metrics(0.5, 0.5), metrics(0.9, 0.1)) == []
    lines = worse_than(metrics(0.5, 0.5), metrics(0.39, 0.61))
    assert len(lines) == 4 and lines[0] == "stage3, copilot, all clips: R 0.500 [0.400, 0.600] -> 0.390"
    assert "night: CHAIRi 0.500 [0.400, 0.600] -> 0.610" in lines[3]
    assert worse_than(metrics(0.5, 0.5) | {"systems": {}}, metrics(0.1, 0.9) | {"slices": {}}) == []


def test_planted_policies_get_the_numbers_that_they_must():
    """Blind: the same text whatever is shown. All: every class. Perfect: what is there. Without people: perfect but for
    people. Half of the clips show a person at a red light, all a traffic light."""
    light = ("light_red", "person")
    truth = {f"{i}": of_classes("traffic light", "person", traps=((*light, True),)) if i % 2 else
             of_classes("traffic light", traps=((*light, False),)) for i in range(10)}
    texts = {"blind": lambda clip: "A person crosses at a traffic light.",
             "all": lambda clip: "A person, a car, a bus, a truck, a bicycle and a traffic light.",
             "perfect": lambda clip: " ".join(f"A {name}." for name in sorted(clip.present)),
             "without people": lambda clip: "A traffic light."}
    blocks = {}
    for name, say in texts.items():
        rows = [row(say(clip), mode, video) for video, clip in truth.items() for mode in MODES]
        blocks[name] = score(rows, truth, RANGES)["copilot"]
    keys = ("chair_i", "recall", "safety_recall", "trap_told", "trap_invented")
    assert {name: [block[key] for key in keys] for name, block in blocks.items()} == {
        "blind": [0.25, 1, 1, 1, 1],  # 5 of 20 mentions
        "all": [0.75, 1, 1, 1, 1],  # 45 of 60
        "perfect": [0, 1, 1, 1, 0],
        "without people": [0, 0.6667, 0.6667, 0, 0],  # the best CHAIRi, and no person told: 10 of 15
    }


def test_two_judges_agree_as_worked_out_by_hand():
    """Clips a, b, c. Car: both, both, first only; bus: neither, second only, unsure (left out)."""
    first = {"a": of_classes("car"), "b": of_classes("car"), "c": of_classes("car")}
    second = {"a": of_classes("car"), "b": of_classes("car", "bus"), "c": Truth(frozenset(), frozenset(), {"bus"})}
    found = agreement(first, second)
    assert found["classes"] == {"car": {"both": 2, "only_first": 1, "only_second": 0, "neither": 0},
                                "bus": {"both": 0, "only_first": 0, "only_second": 1, "neither": 1}}
    assert (found["clips"], found["pairs"], found["agreeing"]) == (3, 5, 0.6)
    # by chance: both yes 3/5 * 3/5, both no 2/5 * 2/5: 0.52; (0.6 - 0.52) / (1 - 0.52)
    assert found["kappa"] == pytest.approx(1 / 6, abs=1e-4)
    agreed = agreed_truth(first, second)
    assert agreed["a"].present == {"car"} and not agreed["a"].unknown
    assert agreed["b"].unknown == {"bus"} and agreed["c"].present == set() and agreed["c"].unknown == {"car", "bus"}
    assert kappa(3, 0, 0, 0) is None and kappa(1, 0, 0, 1) == 1 and kappa(0, 1, 1, 0) == -1
    assert kappa(0, 0, 0, 0) is None


def test_caption_metrics_are_those_of_their_packages():
    references = {"a#copilot": ("A red car turns left at the light.", "The red car turns."),
                  "b#copilot": ("One truck waits in rain.",)}  # words of all clips' captions weigh nothing in CIDEr
    rows = [row("A red car turns left at the light.", video="a"), row("Dog.", video="b")]
    same, other = add_caption_scores(rows, references)
    assert same["rouge_l"] == 1 and other["rouge_l"] == 0 and same["cider"] > other["cider"] == 0
    # ROUGE-L of "a bus" and "a red bus": common 2, precision 1, recall 2/3
    [third] = add_caption_scores([row("a bus", video="a")], {"a#copilot": ("a red bus",)})
    assert third["rouge_l"] == pytest.approx(0.8)
    truth = {name: of_classes("car") for name in "ab"}
    block = {"copilot": score([same, other], truth, {"copilot": [1, 99]})["copilot"]}
    assert block["copilot"]["rouge_l"] == 0.5 and block["copilot"]["captioned"] == 2
    add_bleu(block, [same, same])
    assert block["copilot"]["bleu"] == 100 and block["copilot"]["interval"]["bleu"] == [100, 100]
    assert "rouge_l" not in rows[0]  # what was asked is left as it was


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """Two run folders with random weights: of stage 1 and of stage 2."""
    root = tmp_path_factory.mktemp("runs")
    model = DriveVLM.from_base(tiny.vision, tiny.llm, num_frames=3, dtype="float32", seed=1)
    model.save_checkpoint(root / "stage1" / "model", stage=1)
    model.add_lora(4, 8, 0.0, seed=1)
    model.save_checkpoint(root / "stage2" / "model", stage=2)
    return root


@pytest.fixture
def config(tiny, folders, tmp_path):
    rows = json.loads(tiny.data.read_text())
    truth = {row["video"]: {"present": ["car"], "order": ["car", "bus"]} for row in rows}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    return EvaluateConfig(
        data=str(tiny.data), video_root=str(tiny.videos), output_dir=str(tmp_path / "out"), dtype="float32",
        num_val_videos=3, truth=str(tmp_path / "truth.json"), frame_cache=str(tmp_path / "cache"),
        checkpoint=[f"stage1={folders / 'stage1'}", f"stage2={folders / 'stage2'}"], eval_batch_size=2,
        eval_max_new_tokens={"microscope": 6, "copilot": 4}, word_range={"microscope": [5, 100]},
    )


def test_a_run_writes_the_agreed_files_and_keys(config, tmp_path, monkeypatch):
    metrics = evaluate(config)
    out = tmp_path / "out"
    assert list(metrics["systems"]) == ["prior", "blank", "swapped", "reversed", "stage1", "stage2", "reference"]
    assert metrics == json.loads((out / "metrics.json").read_text())
    keys = {"words", "in_range", "ended", "precision", "recall", "f1_micro", "f1_macro", "chair_i", "chair_s"}
    for block in metrics["systems"].values():
        assert 0 <= block["mode_accuracy"] <= 1
        assert all(keys <= set(block[mode]) for mode in MODES)
    assert metrics["systems"]["reference"]["copilot"]["ended"] == 1
    assert metrics["words_in_range"] == {"microscope": [5, 100], "copilot": list(MODE_TABLE["copilot"].word_range)}
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert Counter(r["system"] for r in rows) == dict.fromkeys(metrics["systems"], 6)
    assert len({r["video"] for r in rows}) == 3
    assert (out / "table.md").read_text() == table(metrics)
    page = (out / "report.html").read_text()
    assert page.count('<section class="card">') == 4 and page.count("data:image/jpeg") == 3 * 8
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)

    rows_of_unseen = [json.loads(line) for line in (out / "unseen.jsonl").read_text().splitlines()]
    assert Counter(r["system"] for r in rows_of_unseen) == {"stage1": 6, "stage2": 6}
    for name in ("stage1", "stage2"):  # three clips: the first three wordings of each mode
        wordings = metrics["unseen_wordings"][name]
        assert {mode: tuple(counts) for mode, counts in wordings.items()} == {
            mode: MODE_TABLE[mode].unseen[:3] for mode in MODES}
        assert metrics["systems"][name]["mode_accuracy_unseen"] == share_right(wordings)
    assert "mode_accuracy_unseen" not in metrics["systems"]["blank"]
    assert {r["question"] for r in rows} == set(MODES.values())

    # Run again, it keeps every answer. With a checkpoint added, only that one is asked.
    asked = []
    monkeypatch.setattr(program, "ask", lambda model, system, *rest: asked.append(system.name) or [
        {**r, "system": system.name, "key": rest[0]} for r in rows if r["system"] == "stage1"])
    assert evaluate(config) == metrics and asked == []
    config.checkpoint.append(config.checkpoint[0].replace("stage1=", "again="))
    config.control = "stage2"
    assert evaluate(config)["systems"]["again"] == metrics["systems"]["stage1"] and asked == ["again"] * 2
    config.eval_max_new_tokens["copilot"] = 5
    evaluate(config)
    systems = ["stage1", "stage2", "again"]
    assert asked == ["again", "again", "blank", "swapped", "reversed", *systems, *systems]


def test_num_samples_adds_rows_of_sampled_answers(config):
    config.num_samples, config.temperature, config.checkpoint = 3, 2.0, config.checkpoint[1:]
    metrics = evaluate(config)
    assert list(metrics["systems"])[-3:] == ["stage2", "stage2 T=2", "reference"]
    rows = [json.loads(line) for line in open(f"{config.output_dir}/predictions.jsonl")]
    sampled = [r for r in rows if r["system"] == "stage2 T=2"]
    assert len(sampled) == 3 * 6 and {r["sample"] for r in sampled} == {0, 1, 2}
    assert len({r["text"] for r in sampled}) > 6


def test_controls_of_every_checkpoint_and_their_differences(config, monkeypatch):
    config.controls, config.compare = ["middle", "blank", "dark"], ["blank:stage2", "stage1:stage1/dark"]
    metrics = evaluate(config)
    names = ["prior", "blank", "swapped", "middle", "reversed", "dark", "stage1", "stage1/blank", "stage1/middle",
             "stage1/dark", "stage2", "reference"]
    assert list(metrics["systems"]) == names
    assert [(pair["before"], pair["after"]) for pair in metrics["differences"]] == [
        ("blank", "stage2"), ("stage1", "stage1/dark")]
    texts = {}
    for r in map(json.loads, open(f"{config.output_dir}/predictions.jsonl")):
        texts.setdefault(r["system"], []).append((r["id"], r["text"]))
    blank = dict(texts["blank"])
    assert len({blank[name] for name in blank if name.endswith("copilot")}) == 1  # all grey clips are alike
    assert metrics["nll_under"] == "stage2"
    assert metrics["systems"]["prior"]["copilot"]["nll_tokens"] and metrics["systems"]["prior"]["copilot"]["nll"] > 0
    page = open(f"{config.output_dir}/report.html").read()
    assert "Microscope, change" in page and "stage1 → stage1/dark" in page


def test_the_nll_is_the_one_of_the_loss(config):
    """A row's NLL is what the model's own forward pass gives for the same answer."""
    metrics = evaluate(config)
    rows = [json.loads(line) for line in open(f"{config.output_dir}/predictions.jsonl")]
    entry = load_split(config)[1][0]
    [row] = [r for r in rows if r["system"] == "reference" and r["id"] == entry.id]
    model = DriveVLM.from_checkpoint(config.checkpoint[1].split("=")[1], dtype="float32")
    example = encode_example(model.tokenizer, entry.question, entry.captions[0], model.num_visual_tokens, 4096)
    ids, labels = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))
    frames = torch.from_numpy(read_frames(f"{config.video_root}/{entry.video}", 3, model.image_size))[None]
    out = model(frames, ids, torch.ones_like(ids), labels)
    assert row["nll_tokens"] == out["num_tokens"]
    # without the banned ids, the forward pass gives every token a little less
    assert row["nll"] == pytest.approx(out["loss_sum"].item(), rel=0.02) and row["nll"] <= out["loss_sum"].item() + 1e-3
    assert metrics["systems"]["reference"][entry.mode]["nll"] > 0
    whole, cut = (program.answer_ids(model, entry.question, {"text": "A car.", "ended": ended})
                  for ended in (True, False))
    assert whole[:-1] == cut and whole[-1] in model.end_ids  # an answer that was cut off has no end token


def test_clips_without_captions_are_asked_about(config, tiny, tmp_path):
    config.clips, config.data, config.checkpoint = str(tiny.videos), "no.json", config.checkpoint[1:]
    config.truth = ""
    config.judge.weights = "no.pt"
    with pytest.raises(ConfigError) as error:
        evaluate(config)
    assert "judge.weights" in error.value.text and "no.json" not in error.value.text
    names = sorted(path.name for path in tiny.videos.iterdir())
    (tmp_path / "truth.json").write_text(json.dumps({name: {"present": ["car"]} for name in names}))
    config.truth = str(tmp_path / "truth.json")
    metrics = evaluate(config)
    assert list(metrics["systems"]) == ["blank", "swapped", "stage2"] and metrics["prior"] == {}
    assert metrics["clips"] == len(names)
    assert "The prior" not in open(f"{config.output_dir}/report.html").read()
    drive = images_of(tiny.videos / "car.mp4", tmp_path / "drives" / "drive.1")
    images_of(tiny.videos / "bus.mp4", tmp_path / "drives" / "drive.2")
    (tmp_path / "truth.json").write_text(json.dumps({f"drive.{k}": {"present": ["car"]} for k in (1, 2)}))
    config.clips, config.output_dir = str(drive.parent), str(tmp_path / "folders")
    assert evaluate(config)["clips"] == 2
    assert '"drive.1#copilot"' in (tmp_path / "folders" / "predictions.jsonl").read_text()
    config.clips = str(drive)  # one clip: its name is found, though two are needed for an evaluation
    with pytest.raises(ConfigError, match="1 held-out clips can be used; swapping clips needs two"):
        evaluate(config)
    _, entries = program.uncaptioned(replace(config, video_root=root_of_clips(drive)))
    assert [entry.id for entry in entries] == [f"drive.1#{mode}" for mode in MODES]
    (drive / "x.mp4").write_bytes(b"x")
    with pytest.raises(ConfigError, match="clips: .*drive.1 holds images and clips"):
        evaluate(config)
    (tmp_path / "nothing").mkdir()
    config.clips = str(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="clips: no clip in"):
        evaluate(config)


@dataclasses.dataclass
class Long:
    share: float


def likes_length(caption, evidence, mode, reference):
    """A reward that must not be shown any reference."""
    assert reference is None
    return Long(min(1.0, len(caption) / 1000))


@pytest.fixture
def evidence(monkeypatch):
    """{clip: what the reward's detector saw in it}: a bus in all of them, where the truth knows none."""
    seen = {}

    def get_evidence(entries, root, settings, cache):
        assert settings.weights == "reward.pt"
        return {entry.video: seen.get(entry.video, Evidence({"bus"})) for entry in entries}

    monkeypatch.setattr(evaluation.best_of, "get_evidence", get_evidence)
    monkeypatch.setattr(evaluation.best_of, "evidence_problems", lambda *rest: [])
    return seen


def test_the_best_answer_is_chosen_by_the_rewards_own_evidence(evidence):
    """Which sees a bus: neither truth nor captions have a say."""
    config = EvaluateConfig(best_of=3, detector=DetectorSettings(weights="reward.pt"))
    best_of = BestOf(config, [entry("a.mp4", "A car stops."), entry("b.mp4", "A car stops.")])
    rows = [row("A car stops."), row("A bus stops."), row("A bus stops.", sample=2),
            row("A bus stops.", video="b.mp4", ended=False), row("A car stops.", video="b.mp4")]
    rows[2]["tokens"] = 11  # the first of equals
    first, second = best_of.choose(rows)
    assert (first["text"], first["id"], first["sample"], first["tokens"]) == ("A bus stops.", "a.mp4#copilot", 0, 10)
    assert first["seconds"] == 1.5 and first["reward"] > 0.5  # three answers were made for it
    assert second["text"] == "A car stops." and second["seconds"] == 1.0  # a whole answer before one that was cut off
    assert best_of.choose(rows[3:4])[0]["text"] == "A bus stops."


def test_choices_are_made_again_when_what_they_depend_on_has_changed(evidence):
    config = EvaluateConfig(best_of=3, detector=DetectorSettings(weights="reward.pt"))
    entries, keys = [entry("a.mp4"), entry("b.mp4")], set()
    keys.add(BestOf(config, entries).key(entries))
    assert BestOf(config, entries).key(entries) in keys
    evidence["b.mp4"] = Evidence({"car"})
    keys.add(BestOf(config, entries).key(entries))
    config.reward_weights = config.reward_weights | {"detail": 0.0}
    keys.add(BestOf(config, entries).key(entries))
    config.reward = "stage3.grpo_reward_func:Reward"
    keys.add(BestOf(config, entries).key(entries))
    config.reward = "test_evaluate:likes_length"  # its code is another
    keys.add(BestOf(config, entries).key(entries))
    assert len(keys) == 5


def test_calibrations_are_of_each_checkpoints_own_answers(config, folders, monkeypatch):
    config.calibrate, config.unseen_wordings = True, False
    monkeypatch.setattr(evaluation.hedging, "FEWEST", 1)
    said = {"stage1": "A car ahead. A bus.", "stage2": "A car."}
    monkeypatch.setattr(DriveVLM, "generate", lambda model, frames, questions, **options: [
        Answer(said[f"stage{model.stage}"], [1], True) for _ in questions])
    metrics = evaluate(config)
    found = metrics["calibration"]
    assert {name: (block["modes"]["copilot"]["mentions"], block["modes"]["copilot"]["right"])
            for name, block in found.items()} == {"stage1": (6, 0.5), "stage2": (3, 1.0)}  # cars are there, buses not
    for name, block in found.items():
        assert block["weights"] == weights_id(folders / name / "model")
    assert "| Copilot, hedged |" in Path(config.output_dir, "table.md").read_text()


def test_best_of_n_is_a_row_of_its_own(config, evidence, monkeypatch):
    config.best_of, config.num_samples, config.compare = 4, 4, ["stage2:best-of-4"]
    config.reward, config.reward_weights = "test_evaluate:likes_length", {"share": 1.0}
    config.detector.weights = "reward.pt"
    metrics = evaluate(config)
    assert list(metrics["systems"])[-4:] == ["stage1 T=1", "stage2 T=1", "best-of-4", "reference"]
    assert metrics["differences"][0]["after"] == "best-of-4"
    rows = [json.loads(line) for line in open(f"{config.output_dir}/predictions.jsonl")]
    chosen = {r["id"]: r for r in rows if r["system"] == "best-of-4"}
    assert len(chosen) == 6 and all(r["sample"] == 0 for r in chosen.values())
    for name, kept in chosen.items():  # the same samples as those of the row above
        samples = [r for r in rows if r["system"] == "stage2 T=1" and r["id"] == name]
        whole = [r for r in samples if r["ended"]] or samples
        assert len(kept["text"]) == max(len(r["text"]) for r in whole) and len(samples) == 4
    monkeypatch.setattr(program, "ask", None)  # run again, it keeps every answer
    assert evaluate(config) == metrics
    config.reward_weights = {"share": 0.5}
    with pytest.raises(TypeError):
        evaluate(config)


def test_best_of_another_checkpoint_and_clips_without_evidence(config, evidence):
    config.best_of, config.best_of_checkpoint, config.detector.weights = 2, "stage1", "reward.pt"
    video = load_split(config)[1][0].video
    evidence[video] = None
    metrics = evaluate(config)
    assert metrics["left_out"] == {video: "the reward's detector has no evidence"} and metrics["clips"] == 2
    rows = [json.loads(line) for line in open(f"{config.output_dir}/predictions.jsonl")]
    assert video not in {r["video"] for r in rows}
    keys = {r["system"]: r["key"] for r in rows}
    stage1, stage2 = (program.System("best-of-2", Path(text.split("=")[1]) / "model", num_samples=2, best_of=True)
                      for text in config.checkpoint)
    entries = [e for e in load_split(config)[1] if e.video != video]
    limits = {"microscope": 6, "copilot": 4}
    assert keys["best-of-2"].startswith(program.answers_key(stage1, entries, config, limits))
    assert not keys["best-of-2"].startswith(program.answers_key(stage2, entries, config, limits))


def test_a_best_of_that_cannot_work_is_refused(config):
    config.best_of, config.best_of_checkpoint, config.detector.weights = 2, "stage9", "no.pt"
    config.reward_weights = {"objects": 1.0}
    with pytest.raises(ConfigError) as error:
        evaluate(config)
    for words in ("best_of_checkpoint: no checkpoint is called 'stage9'", "detector.weights: no such file",
                  "reward_weights: has objects, but the parts"):
        assert words in error.value.text
    config.best_of_checkpoint, config.reward = "", "test_evaluate:no_such_reward"
    with pytest.raises(ConfigError, match="reward: test_evaluate:no_such_reward does not work"):
        evaluate(config)
    assert EvaluateConfig(best_of=1).problems()[0].startswith("best_of: the best of one answer")
    assert "best_of must be at least 0" in EvaluateConfig(best_of=-1).problems()[0]
    assert any("detector.num_frames" in line for line in EvaluateConfig(
        best_of=2, detector=DetectorSettings(num_frames=0)).problems())
    config.checkpoint[0] = config.checkpoint[0].replace("stage1=", "best-of-2=")
    with pytest.raises(ConfigError, match="the name 'best-of-2' is taken"):
        evaluate(config)


def test_a_second_judge_and_what_both_say(config, monkeypatch):
    def get_evidence(entries, root, settings, cache):
        assert settings.weights == "other.pt"
        return {video: Evidence({"bus"}) for video in sorted({entry.video for entry in entries})[:2]}

    monkeypatch.setattr(program, "get_evidence", get_evidence)
    monkeypatch.setattr(program, "evidence_problems", lambda *rest: [])
    config.second_judge.weights, config.checkpoint = "other.pt", config.checkpoint[1:]
    metrics = evaluate(config)
    found = metrics["agreed"]["agreement"]
    assert (found["clips"], found["pairs"], found["agreeing"]) == (2, 4, 0)  # a car by the truth, a bus by the judge
    classes = metrics["agreed"]["systems"]["reference"]["copilot"]["classes"].values()
    assert all(counts["told"] == [0, 0] for counts in classes)  # no class is there by both
    assert "Two judges agree on 0.0%" in open(f"{config.output_dir}/table.md").read()
    assert "Two judges" in open(f"{config.output_dir}/report.html").read()


def test_a_worse_run_exits_with_1(config, tmp_path, monkeypatch, capsys):
    config.checkpoint = config.checkpoint[1:]
    monkeypatch.setattr(program, "load_config", lambda *rest, **named: config)
    assert program.main([]) == 0
    file = tmp_path / "out" / "metrics.json"
    config.baseline = str(file)
    assert program.main([]) == 0  # the same run is not worse
    before = json.loads(file.read_text())
    before["systems"]["reference"]["copilot"]["interval"]["recall"] = [1.5, 2.0]
    (tmp_path / "before.json").write_text(json.dumps(before))
    config.baseline = str(tmp_path / "before.json")
    assert program.main([]) == 1
    assert "reference, copilot, all clips: R" in capsys.readouterr().err
    (tmp_path / "before.json").write_text("{}")
    with pytest.raises(ConfigError, match="baseline: .*before.json is no metrics.json"):
        program.main([])


def test_wrong_names_of_systems_are_told_together(config):
    config.controls, config.compare, config.nll_under = ["grey"], ["stage1", "stage2:prior", "stage2:x"], "stage9"
    config.slices = "no.json"
    with pytest.raises(ConfigError) as error:
        evaluate(config)
    for part in ("controls: 'grey' is none of blank, swapped, middle", "nll_under: no checkpoint is called 'stage9'",
                 "compare: 'stage1' is not", "compare: 'stage2:x' is not", "slices: not found: no.json"):
        assert part in error.value.text
    assert "stage2:prior" not in error.value.text


def test_an_unreadable_clip_is_left_out_for_all_systems(config, tiny, tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    for file in tiny.videos.iterdir():
        (videos / file.name).write_bytes(file.read_bytes())
    config.video_root, config.checkpoint = str(videos), config.checkpoint[:1]
    bad = load_split(config)[1][0].video
    (videos / bad).write_bytes(b"broken")
    metrics = evaluate(config)
    assert metrics["clips"] == 2 and set(metrics["left_out"]) == {bad}
    assert bad in capsys.readouterr().err


def test_without_exact_truth_the_judge_is_used(config, monkeypatch):
    asked = []

    def get_evidence(entries, *rest):
        failed, *others = sorted({entry.video for entry in entries})
        asked.extend([failed, *others])
        seen = Evidence(frozenset({"car", "bus"}), frozenset({"dog"}), frozenset({"car"}))
        return {failed: None, **dict.fromkeys(others, seen)}

    monkeypatch.setattr(program, "get_evidence", get_evidence)
    config.truth, config.checkpoint = "", config.checkpoint[:1]
    metrics = evaluate(config)
    assert len(asked) == 3 and metrics["clips"] == 2 and len(metrics["left_out"]) == 1
    assert "reversed" not in metrics["systems"] and "judge" in metrics["truth"]
    rows = [row("A car, a bus and a dog."), row("A car.", "microscope")]
    truth = {"a.mp4": Truth(frozenset({"car", "bus"}), frozenset({"car"}), frozenset({"dog"}))}
    block = score(rows, truth, RANGES)
    assert block["copilot"]["precision"] == block["microscope"]["recall"] == 1 and block["copilot"]["chair_i"] == 0


def test_all_problems_are_in_one_message(config, tmp_path, folders, capsys):
    broken = EvaluateConfig(
        checkpoint=["x", "prior=y", f"a={tmp_path}", f"b={folders / 'stage1'}"], control="c", truth="no.json",
        val_data="no_val.json", video_root="no_videos", word_range={"essay": [1, 2]},
        output_dir=str(folders / "stage1"))
    with pytest.raises(ConfigError) as error:
        evaluate(broken)
    assert error.value.exit_code == 2
    for part in ("'x' is not NAME=FOLDER", "'prior' is taken", f"{tmp_path} is not a checkpoint folder",
                 "drivevlm.json", "no checkpoint is called 'c'", "truth: not found: no.json",
                 "data: not found: data/captions.json",
                 "val_data: not found: no_val.json", "video_root: not found: no_videos", "word_range: there is no mode "
                 "'essay'", "training run's folder"):
        assert part in error.value.text

    empty = EvaluateConfig(data=config.data, video_root=config.video_root, num_val_videos=0)
    empty.judge.weights = "no.pt"
    with pytest.raises(ConfigError) as error:
        evaluate(empty)
    for part in ("none given", "judge.weights", "no held-out clips in"):
        assert part in error.value.text

    values = EvaluateConfig(word_range={"copilot": [60, 10]}, temperature=0.0, eval_max_new_tokens={"copilot": 0})
    assert len(values.problems()) == 3


def test_a_truth_file_that_does_not_fit_is_refused(config, tmp_path):
    rows = json.loads((tmp_path / "truth.json").read_text())
    left_out = load_split(config)[1][0].video
    for row in rows.values():
        row["present"].append("unicorn")
    del rows[left_out]
    (tmp_path / "truth.json").write_text(json.dumps(rows))
    with pytest.raises(ConfigError) as error:
        evaluate(config)
    assert f"lacks 1 of 3 clips ({left_out}" in error.value.text and "not COCO's: unicorn" in error.value.text


def test_moved_base_models_are_passed_to_the_checkpoint(config, folders, tiny, tmp_path, monkeypatch):
    """vision_model and language_model are passed on, by evaluate.py and by generate.py."""
    received = []

    def refuse(folder, **settings):
        received.append((settings["vision_model"], settings["language_model"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(DriveVLM, "from_checkpoint", refuse)
    config.vision_model, config.language_model = str(tmp_path / "vision"), str(tmp_path / "llm")
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    with pytest.raises(KeyboardInterrupt):
        generate.main(["--checkpoint", str(folders / "stage2"), "--video", str(tiny.videos / "car.mp4"),
                       "--vision_model", str(tmp_path / "vision"), "--language-model", str(tmp_path / "llm")])
    assert received == [(str(tmp_path / "vision"), str(tmp_path / "llm"))] * 2
    config.vision_model = "org/another"
    with pytest.raises(ConfigError, match="vision_model: org/another, but .* was trained with"):
        evaluate(config)


@pytest.mark.parametrize("program", ["evaluate.py", "generate.py"])
def test_help_does_not_load_torch(program):
    code = f"import runpy, sys; sys.argv = ['{program}', '--help']; runpy.run_path('{program}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--checkpoint" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "training.config" in loaded and not loaded & {"torch", "transformers", "dataset", "model"}


def test_generate_prints_the_answer(folders, tiny, capsys):
    flags = ["--checkpoint", str(folders / "stage2"), "--video", str(tiny.videos / "car.mp4"), "--max_new_tokens", "5"]
    assert generate.main([*flags, "--mode", "copilot", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["mode"] == "copilot" and answer["question"] == MODES["copilot"] and answer["frames"] == 3
    assert isinstance(answer["text"], str) and isinstance(answer["ended"], bool)
    assert generate.main([*flags, "--mode", "copilot"]) == 0
    assert capsys.readouterr().out.strip() == answer["text"]
    assert generate.main([*flags, "--question", "Red car?", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["question"] == "Red car?" and answer["mode"] is None
    assert GenerateConfig().max_new_tokens is None  # the mode's own limit, unless a flag says otherwise


def test_generate_names_what_is_missing(tmp_path):
    done = subprocess.run(
        [sys.executable, "generate.py", "--checkpoint", str(tmp_path / "none"), "--video", str(tmp_path / "no.mp4"),
         "--mode", "essay"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "3 problems" in done.stderr
    assert re.search("no.mp4", done.stderr) and re.search("no checkpoint folder", done.stderr)
    assert "'essay' is none of microscope, copilot" in done.stderr


def test_generate_answers_about_a_real_street(folders, shared, capsys):
    assert generate.main(["--checkpoint", str(folders / "stage1"), "--video", str(shared / "real_street.mp4"),
                          "--max_new_tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] <= 4


def test_wrong_claims_are_counted_of_those_that_the_truth_decides():
    """Said: colour right, count wrong, side right (from), event right; light wrong, its event right; the bus's colour
    undecided, its event wrong. Nothing is said of what is not there."""
    evidence = Evidence({"car", "person", "traffic light", "bus"}, counts={"person": 1}, sides={"person": {"left"}},
                        light=("red",), colours={"car": {"white"}, "bus": {"unknown"}})
    truth = Truth(evidence.present, evidence.present, evidence=evidence, actions={
        "car": ["brake"], "person": ["cross"], "traffic light": ["change"], "bus": ["approach", "pass"]})
    text = ("A white car ahead brakes. Two pedestrians cross from the left. The light turns green. A red bus merges. "
            "A blue truck stops.")
    counts = count_claims(text, truth)
    assert {key: value for key, value in counts.items() if value} == {
        "decided": 8, "wrong": 3, "decided_colour": 1, "decided_event": 4, "wrong_event": 1, "decided_count": 1,
        "wrong_count": 1, "decided_side": 1, "decided_light": 1, "wrong_light": 1}
    assert count_claims(text, Truth(evidence.present, evidence.present)) == {}
    row = {"mode": "copilot", "video": "a", "id": "a#copilot", "text": text, "sample": 0, "ended": True, "tokens": 9,
           "seconds": 1.0}
    block = score([row], {"a": truth}, {"copilot": [1, 99]})["copilot"]
    assert block["wrong_claims"] == pytest.approx(3 / 8, abs=1e-4) and block["claims"] == 8
    assert block["wrong_light"] == 1 and block["wrong_event"] == 0.25 and block["wrong_motion"] == 0
    nothing = score([row | {"text": "A bus."}], {"a": truth}, {"copilot": [1, 99]})["copilot"]
    assert cell(nothing, "wrong_claims") == "–"
