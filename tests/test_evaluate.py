"""Evaluation: metrics by hand, the prior, the controls, resumed predictions, the page; and generate.py."""

import json
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

import evaluate as evaluation
import generate
from dataset import MODES, Entry, load_entries, split_by_video
from evaluate import (
    EvaluateConfig,
    Truth,
    cell,
    change_frames,
    coloured,
    constant_caption,
    evaluate,
    score,
    score_text,
    table,
)
from model import DriveVLM
from stage3.grpo_reward_func import Evidence

RANGES = {"microscope": [5, 100], "copilot": [2, 6]}
TRUTH = Truth(frozenset({"car", "person"}), frozenset({"car", "person"}), frozenset({"bus"}), ("person", "car"))


def row(text, mode="copilot", video="a.mp4", ended=True, sample=0):
    return {"system": "x", "key": "", "id": f"{video}#{mode}", "video": video, "mode": mode, "sample": sample,
            "text": text, "tokens": 10, "ended": ended, "seconds": 0.5}


def test_counts_of_a_text():
    counts = score_text("A person crosses, then a car, a car and a truck pass; perhaps a bus.", TRUTH, [5, 20])
    expected = {"hit": 2, "named": 3, "told": 2, "due": 2, "mentions": 4, "invented": 1, "inventing": True,
                "pairs": 1, "agreeing": 1, "in_range": True, "words": 15}
    assert {key: counts[key] for key in expected} == expected
    assert counts["hit", "car"] == 1 and counts["false", "truck"] == 1 and ("false", "bus") not in counts


def test_order_and_negation():
    assert score_text("A car, then a person.", TRUTH, [0, 9])["agreeing"] == 0
    assert score_text("A car is there.", TRUTH, [0, 9])["pairs"] == 0
    counts = score_text("No trucks are visible.", TRUTH, [0, 9])
    assert counts["mentions"] == counts["named"] == 0


def test_metrics_by_hand():
    truth = {"a.mp4": TRUTH, "b.mp4": Truth(frozenset({"car"}), frozenset({"car"}))}
    rows = [
        row("A car and a truck."), row("A car waits.", video="b.mp4", ended=False),
        row("A car drives on and a car follows it.", "microscope"), row("A dog.", "microscope", video="b.mp4"),
    ]
    block = score(rows, truth, RANGES)
    copilot, microscope = block["copilot"], block["microscope"]
    for key in ("precision", "recall", "f1_micro"):
        assert copilot[key] == pytest.approx(2 / 3, abs=1e-4)
    assert copilot["f1_macro"] == pytest.approx((1.0 + 0.0) / 2)  # car 1, person 0; truck is nowhere in the truth
    assert copilot["chair_i"] == pytest.approx(1 / 3, abs=1e-4) and copilot["chair_s"] == 0.5
    assert copilot["ended"] == 0.5 and copilot["words"] == 4 and copilot["tokens_per_second"] == 20
    assert microscope["chair_i"] == pytest.approx(1 / 3, abs=1e-4)  # two mentions of the car, one of the dog
    assert microscope["in_range"] == 0.5 and block["mode_accuracy"] == 0.5


def test_intervals_are_seeded_and_hold_the_value():
    rng = np.random.default_rng(0)
    truth = {f"{i}.mp4": TRUTH for i in range(20)}
    rows = [row(text, mode, video) for video in truth for mode in MODES
            for text in [str(rng.choice(["A car.", "A truck.", "A person and a car."]))]]
    block = score(rows, truth, RANGES)
    assert block == score(list(reversed(rows)), truth, RANGES)
    low, high = block["copilot"]["interval"]["precision"]
    assert low < block["copilot"]["precision"] < high
    same = score([row("A car.", mode, video) for video in truth for mode in MODES], truth, RANGES)
    assert same["copilot"]["interval"]["precision"] == [1.0, 1.0]


def test_macro_average_leaves_out_what_a_draw_lacks():
    truth = {f"{i}.mp4": TRUTH if i else Truth(frozenset({"dog"}), frozenset({"dog"})) for i in range(5)}
    texts = {video: " and ".join(f"a {name}" for name in sorted(t.present)) for video, t in truth.items()}
    block = score([row(text, mode, video) for video, text in texts.items() for mode in MODES], truth, RANGES)
    assert block["copilot"]["f1_macro"] == 1 and block["copilot"]["interval"]["f1_macro"] == [1, 1]


def test_truth_of_nothing():
    nothing = {"a.mp4": Truth(frozenset(), frozenset())}
    block = score([row("A car.", mode) for mode in MODES], nothing, RANGES)["copilot"]
    assert block["f1_macro"] == block["recall"] == 0 and block["chair_i"] == 1


def test_nothing_said_scores_nothing():
    block = score([row("", mode) for mode in MODES], {"a.mp4": TRUTH}, RANGES)["copilot"]
    assert block["precision"] == block["recall"] == block["f1_micro"] == block["chair_i"] == 0
    assert cell(block, "chair_i", 2) == "–" and cell(block, "recall", 2) == "0.00 ±.00"


def test_repetition():
    counts = score_text("the car goes on the car goes on", TRUTH, [0, 99])
    assert counts["grams"] == 5 and counts["repeated"] == 1


def entry(video, *captions, mode="copilot"):
    return Entry(f"{video}#{mode}", video, mode, MODES[mode], captions)


def test_prior_takes_the_best_constant_set():
    captions = {"1": "A car and a truck.", "2": "A car and a bus.", "3": "A car.", "4": "A car."}
    train = [entry(video, caption) for video, caption in captions.items()]
    assert constant_caption(train, {}) == ("Car.", pytest.approx(2 * 1.0 * (4 / 6) / (1 + 4 / 6)))
    both = frozenset({"car", "truck"})  # the truth of the training clips decides how many classes, if it is known
    assert constant_caption(train, dict.fromkeys("1234", Truth(both, both))) == ("Car, truck.", 1.0)


def test_controls():
    frames = np.arange(3 * 4 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 4, 2, 2, 3)
    assert change_frames(frames, "") is frames
    assert (change_frames(frames, "blank") == 128).all()
    assert (change_frames(frames, "reversed")[:, 0] == frames[:, -1]).all()
    swapped = change_frames(frames, "swapped")
    assert all((swapped[i] != frames[i]).any() for i in range(3)) and sorted(swapped.sum((1, 2, 3, 4))) == sorted(
        frames.sum((1, 2, 3, 4)))


def test_colours():
    page = coloured("A <car>, a truck, a bus; no person. A cyclist.", TRUTH)
    assert '&lt;<mark class="yes">car</mark>&gt;' in page and '<mark class="no">truck</mark>' in page
    assert '<mark class="unknown">bus</mark>' in page and '<mark class="negated">person</mark>' in page
    assert '<mark class="no">cyclist</mark>' in page  # the person is there, the bicycle is not


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """Two run folders: a stage 1 and a stage 2 of random weights."""
    root = tmp_path_factory.mktemp("runs")
    model = DriveVLM.from_base(tiny.vision, tiny.llm, num_frames=3, dtype="float32", seed=1)
    model.save_checkpoint(root / "stage1" / "model", stage=1)
    model.add_lora(4, 8, 0.0, seed=1)
    model.save_checkpoint(root / "stage2" / "model", stage=2)
    return root


@pytest.fixture
def config(tiny, folders, tmp_path):
    truth = {video: {"present": ["car"], "order": ["car", "bus"]}
             for video in (r["video"] for r in json.loads(tiny.data.read_text()))}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    return EvaluateConfig(
        data=str(tiny.data), video_root=str(tiny.videos), output_dir=str(tmp_path / "out"), dtype="float32",
        num_val_videos=3, truth=str(tmp_path / "truth.json"), frame_cache=str(tmp_path / "cache"),
        checkpoint=[f"stage1={folders / 'stage1'}", f"stage2={folders / 'stage2'}"], eval_batch_size=2,
        microscope_tokens=6, copilot_tokens=4, microscope_words=[5, 100], copilot_words=[1, 10],
    )


def test_run_writes_the_contract(config, tmp_path, monkeypatch):
    metrics = evaluate(config)
    out = tmp_path / "out"
    assert list(metrics["systems"]) == ["prior", "blank", "swapped", "reversed", "stage1", "stage2", "reference"]
    assert metrics == json.loads((out / "metrics.json").read_text())
    keys = {"words", "in_range", "ended", "precision", "recall", "f1_micro", "f1_macro", "chair_i", "chair_s"}
    for block in metrics["systems"].values():
        assert 0 <= block["mode_accuracy"] <= 1
        assert all(keys <= set(block[mode]) for mode in MODES)
    assert metrics["systems"]["reference"]["copilot"]["ended"] == 1
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert Counter(r["system"] for r in rows) == dict.fromkeys(metrics["systems"], 6)
    assert len({r["video"] for r in rows}) == 3
    assert (out / "table.md").read_text() == table(metrics)
    page = (out / "report.html").read_text()
    assert page.count("<section>") == 4 and page.count("data:image/jpeg") == 3 * 8 and "%(" not in page

    # Once more: every answer stands. With a checkpoint added, only its answers are asked for.
    asked = []
    monkeypatch.setattr(evaluation, "ask", lambda model, system, *rest: asked.append(system.name) or [
        {**r, "system": system.name, "key": rest[0]} for r in rows if r["system"] == "stage1"])
    assert evaluate(config) == metrics and asked == []
    config.checkpoint.append(config.checkpoint[0].replace("stage1=", "again="))
    config.control = "stage2"
    assert evaluate(config)["systems"]["again"] == metrics["systems"]["stage1"] and asked == ["again"]
    config.copilot_tokens = 5
    evaluate(config)
    assert asked == ["again", "blank", "swapped", "reversed", "stage1", "stage2", "again"]


def test_sampled_rows(config):
    config.num_samples, config.temperature, config.checkpoint = 3, 2.0, config.checkpoint[1:]
    metrics = evaluate(config)
    assert list(metrics["systems"])[-3:] == ["stage2", "stage2 T=2", "reference"]
    rows = [json.loads(line) for line in open(f"{config.output_dir}/predictions.jsonl")]
    sampled = [r for r in rows if r["system"] == "stage2 T=2"]
    assert len(sampled) == 3 * 6 and {r["sample"] for r in sampled} == {0, 1, 2}
    assert len({r["text"] for r in sampled}) > 6


def test_unreadable_clip_is_left_out_for_all(config, tiny, tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    for file in tiny.videos.iterdir():
        (videos / file.name).write_bytes(file.read_bytes())
    config.video_root, config.checkpoint = str(videos), config.checkpoint[:1]
    bad = split_by_video(load_entries(config.data), 3, config.seed)[1][0].video
    (videos / bad).write_bytes(b"broken")
    metrics = evaluate(config)
    assert metrics["clips"] == 2 and set(metrics["left_out"]) == {bad}
    assert bad in capsys.readouterr().err


def test_judge_takes_the_place_of_exact_truth(config, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation, "detect_clips", lambda videos, *rest: asked.extend(videos) or {})
    monkeypatch.setattr(evaluation, "load_evidence", lambda cache, entries, settings: {
        video: Evidence(frozenset({"car", "bus"}), frozenset({"dog"}), frozenset({"car"})) if i else None
        for i, video in enumerate(sorted({e.video for e in entries}))})
    config.truth, config.checkpoint = "", config.checkpoint[:1]
    metrics = evaluate(config)
    assert len(asked) == 3 and metrics["clips"] == 2 and len(metrics["left_out"]) == 1
    assert "reversed" not in metrics["systems"] and "judge" in metrics["truth"]
    rows = [row("A car, a bus and a dog."), row("A car.", "microscope")]
    truth = {"a.mp4": Truth(frozenset({"car", "bus"}), frozenset({"car"}), frozenset({"dog"}))}
    block = score(rows, truth, RANGES)
    assert block["copilot"]["precision"] == block["microscope"]["recall"] == 1 and block["copilot"]["chair_i"] == 0


def test_problems_come_together(tmp_path, folders):
    config = EvaluateConfig(checkpoint=["x", "prior=y", f"a={tmp_path}", f"b={folders / 'stage1'}"], control="c",
                            truth="no.json", copilot_words=[60, 10], temperature=0.0)
    text = "\n".join(config.problems())
    for part in ("'x' is not NAME=FOLDER", "'prior' is taken", "holds no drivevlm.json", "no checkpoint is called 'c'",
                 "no.json", "copilot_words", "temperature", "data/captions.json"):
        assert part in text
    assert "none given" in "\n".join(EvaluateConfig().problems())
    assert "training run's folder" in "\n".join(EvaluateConfig(output_dir=str(folders / "stage1")).problems())


def test_generate_prints_the_answer(folders, tiny, capsys):
    flags = ["--checkpoint", str(folders / "stage2"), "--video", str(tiny.videos / "car.mp4"), "--max_new_tokens", "5"]
    assert generate.main([*flags, "--mode", "copilot", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["mode"] == "copilot" and answer["question"] == MODES["copilot"] and answer["frames"] == 3
    assert isinstance(answer["text"], str) and isinstance(answer["ended"], bool)
    assert generate.main([*flags, "--mode", "copilot"]) == 0
    assert capsys.readouterr().out.strip() == answer["text"]
    assert generate.main([*flags, "--question", "Red car?", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["question"] == "Red car?"


def test_generate_names_what_is_missing(tmp_path):
    done = subprocess.run(
        [sys.executable, "generate.py", "--checkpoint", str(tmp_path / "none"), "--video", str(tmp_path / "no.mp4")],
        capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "2 problems" in done.stderr
    assert re.search("no.mp4", done.stderr) and re.search("no checkpoint folder", done.stderr)


def test_generate_on_a_real_street(folders, shared, capsys):
    assert generate.main(["--checkpoint", str(folders / "stage1"), "--video", str(shared / "real_street.mp4"),
                          "--max_new_tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] <= 4
