"""evaluation/hedging.py: what a clip adds to the words of an object, its calibration, and generate.py --hedge."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_clip

import generate
from dataset import MODES, encode_prompt
from evaluation.hedging import (
    FEWEST,
    LEAD,
    Judged,
    calibrate,
    calibration_of,
    check_on_halves,
    grey_clip,
    judge_gains,
    mark_unsure,
    mention_gains,
    probability,
    separation,
    weights_id,
)
from evaluation.report import calibration_tables
from evaluation.scoring import Truth
from model import DriveVLM
from training.common import ConfigError

TEXT = "The road is wet, while a pedestrian crosses and a red car waits. No bus is there."


@pytest.fixture(scope="module")
def model(tiny):
    return DriveVLM.from_base(tiny.vision, tiny.llm, num_frames=2, dtype="float32", seed=1)


def visual_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(model.num_visual_tokens, model.head_weight.shape[1], generator=generator)


def logps_by_hand(model, visual, text):
    """Log-probability of each token of the text, one forward pass of the plain model; [(logp, (start, end))]."""
    encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    prompt = encode_prompt(model.tokenizer, MODES["copilot"], model.num_visual_tokens)
    ids = torch.tensor([prompt + encoded["input_ids"]])
    with torch.no_grad():
        logits = model.causal_lm(inputs_embeds=model.embed(ids, visual[None])).logits[0].index_fill(
            1, model.banned_ids, float("-inf"))
    logps = logits.log_softmax(-1)[len(prompt) - 1:-1].gather(1, ids[0, len(prompt):, None])[:, 0]
    return list(zip(logps.tolist(), encoded["offset_mapping"], strict=True))


def test_a_gain_is_of_the_objects_words_and_of_those_that_lead_there(model):
    clips, grey = [visual_of(model, seed) for seed in (1, 2)], visual_of(model, 0)
    prompt = model.prompt_ids(MODES["copilot"])
    asked = [(prompt, clips[0], TEXT), (prompt, clips[1], "Nothing."), (prompt, clips[1], "Car ahead.")]
    found = mention_gains(model, asked, grey)
    assert [[mention.object for mention, _, _ in mentions] for mentions in found] == [["person", "car"], [], ["car"]]
    for clip, text, mentions in ((clips[0], TEXT, found[0]), (clips[1], "Car ahead.", found[2])):
        shown, unseen = logps_by_hand(model, clip, text), logps_by_hand(model, grey, text)
        for mention, gain, logp in mentions:
            own = [i for i, (_, (start, end)) in enumerate(shown) if start < mention.end and end > mention.start]
            span = range(max(0, own[0] - LEAD), own[-1] + 1)
            expected = sum(shown[i][0] - unseen[i][0] for i in span)
            assert gain == pytest.approx(expected, abs=2e-3) and abs(gain) > 0.01
            assert logp == pytest.approx(sum(shown[i][0] for i in own), abs=1e-3)


def test_a_clip_that_shows_nothing_adds_nothing(model):
    grey = grey_clip(model)
    assert grey.shape == (model.num_visual_tokens, model.head_weight.shape[1])
    [mentions] = mention_gains(model, [(model.prompt_ids(MODES["copilot"]), grey, TEXT)], grey)
    assert [gain for _, gain, _ in mentions] == pytest.approx([0.0, 0.0], abs=1e-3)


def test_steps_rise_and_a_few_mentions_promise_nothing():
    judged = [Judged("a", gain, right) for gain, right in (
        (0, False), (1, True), (2, False), (3, True), (3, True), (4, True), (5, False))]
    assert calibrate(judged) == [[0, 0.3333], [1, 0.5], [3, 0.6667]]  # worked out by hand
    assert calibrate([Judged("a", 3.0, False), Judged("b", 3.0, True)]) == [[3.0, 0.5]]  # one gain, one share
    assert calibrate([Judged("a", 1.0, True)]) == [[1.0, 0.6667]]
    assert calibrate([Judged("a", 1.0, True)] * 98) == [[1.0, 0.99]] and calibrate([]) == []
    steps = [[0, 0.2], [1, 0.5], [3, 0.9]]
    assert [probability(steps, gain) for gain in (-9, 0, 0.9, 1, 2.9, 3, 99)] == [0.2, 0.2, 0.2, 0.5, 0.5, 0.9, 0.9]


def test_gains_that_tell_are_found_and_the_promise_holds_on_the_other_half():
    rng = np.random.default_rng(0)
    judged = []
    for clip in range(400):
        right = bool(rng.random() < 0.7)
        judged.append(Judged(f"clip {clip}", float(rng.normal(2.0 if right else -1.0)), right))
    found = check_on_halves(judged)
    assert found["0.9"]["right"] >= 0.88 and found["0.9"]["told"] > 0.7
    useless = [Judged(one.clip, float(rng.normal()), one.right) for one in judged]
    assert check_on_halves(useless)["0.95"]["kept"] < 0.1  # nothing is promised where nothing is known


def test_what_captions_often_invent_is_counted_by_itself():
    """High gains are right, low ones half; of the low right ones, some are traps."""
    judged = []
    for clip in range(80):
        judged += [Judged(f"{clip:02}", 5.0, True), Judged(f"{clip:02}", 1.0, clip % 4 < 2, trap=clip % 4 < 2)]
    found = check_on_halves(judged)["0.9"]
    assert found == {"kept": 0.5, "right": 1.0, "told": 80 / 120, "traps_told": 0.0}
    assert check_on_halves([Judged(str(n), 1.0, True) for n in range(9)])["0.8"]["traps_told"] is None


def test_each_half_is_judged_by_the_other():
    """Gains that mean the opposite in the other half must not look good."""
    judged = []
    for clip in range(40):
        for k in range(10):
            judged.append(Judged(f"{clip:02}", float(k), (k >= 5) == (clip % 2 == 0)))
    assert check_on_halves(judged)["0.8"]["right"] in (None, 0.0)


def test_only_what_the_truth_can_judge_is_counted(model):
    rows = [{"video": clip, "mode": "copilot", "question": MODES["copilot"], "text": TEXT} for clip in ("a", "b", "c")]
    none = frozenset()
    truth = {"a": Truth(frozenset({"person", "car"}), none, traps=(("red light", "person", True),)),
             "b": Truth(frozenset({"person"}), none, unknown=frozenset({"car"})), "c": Truth(none, none)}
    judged = judge_gains(model, rows, truth, lambda clip: (visual_of(model, ord(clip)), None), size=2)
    assert [(one.clip, one.right) for one in judged["copilot"]] == [
        ("a", True), ("a", True), ("b", True), ("c", False), ("c", False)]
    assert [one.trap for one in judged["copilot"]] == [True, False, False, False, False]
    assert calibration_of(judged) == {}  # too few
    many = calibration_of({"copilot": judged["copilot"] * FEWEST})["copilot"]
    assert many["mentions"] == 5 * FEWEST and many["right"] == 0.6 and set(many["targets"]) == {"0.8", "0.9", "0.95"}


def test_what_parts_right_from_wrong_is_found():
    judged = [Judged("a", gain, right, logp=logp) for gain, right, logp in (
        (3.0, True, 0.0), (2.0, True, -1.0), (1.0, False, -1.0), (2.0, False, 0.0))]
    assert separation(judged, "gain") == (2 + 1 + 0.5) / 4 and separation(judged, "logp") == (0.5 + 1 + 0 + 0.5) / 4
    assert separation(judged[:2], "gain") is None and separation(judged[2:], "gain") is None


def test_the_table_says_what_each_promise_is_worth():
    shares = {"kept": 0.7, "right": None, "told": 0.5, "traps_told": 0.25}
    block = {"mentions": 40, "right": 0.75, "targets": {"0.9": shares}, "auc_logp": 0.5, "auc_gain": 0.975}
    metrics = {"words_in_range": {"copilot": [1, 2]}, "calibration": {"s2": {"modes": {"copilot": block}}}}
    assert calibration_tables(metrics) == [[
        ["Copilot, hedged", "objects", "right", "AUC of words", "AUC of gain", "0.9: kept", "0.9: right",
         "0.9: right ones kept", "0.9: companions there kept"],
        ["s2", "40", "0.75", "0.50", "0.97", "0.70", "–", "0.50", "0.25"]]]
    assert calibration_tables({"words_in_range": {"copilot": [1, 2]}}) == []


def test_unsure_objects_say_so():
    mentions = [{"end": 5, "unsure": True}, {"end": 15, "unsure": False}, {"end": 19, "unsure": True}]
    assert mark_unsure("A car and a bus dog.", mentions) == "A car (unsure) and a bus dog (unsure)."


# ---------------------------------------------------------------------------------------------------------------------
# generate.py --hedge


@pytest.fixture
def world(model, tmp_path):
    write_clip(tmp_path / "car.mp4", seed=3)
    folder = model.save_checkpoint(tmp_path / "stage1", stage=1)
    found = {"stage1": {"weights": weights_id(folder), "modes": {"copilot": {"steps": [[-999, 0.4], [999, 0.95]]}}}}
    (tmp_path / "metrics.json").write_text(json.dumps({"calibration": found}))
    return SimpleNamespace(folder=folder, root=tmp_path)


def run(world, *flags):
    return generate.main(["--checkpoint", str(world.folder), "--video", str(world.root / "car.mp4"), "--dtype",
                          "float32", "--calibration", str(world.root / "metrics.json"), "--hedge", "0.9", *flags])


def test_an_answer_marks_what_lies_under_the_precision(world, monkeypatch, capsys):
    monkeypatch.setattr(DriveVLM, "generate", lambda self, *args, **options: [generate_answer(TEXT)])
    assert run(world, "--mode", "copilot") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == TEXT.replace("pedestrian", "pedestrian (unsure)").replace("car", "car (unsure)")
    assert shown[1] == "  pedestrian (person): right with probability 0.40"
    assert run(world, "--mode", "copilot", "--json", "--output", str(world.root / "out.jsonl")) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["text"] == TEXT and row["hedged"].count("(unsure)") == 2
    assert [(m["what"], m["unsure"], m["probability"]) for m in row["mentions"]] == [
        ("person", True, 0.4), ("car", True, 0.4)]
    assert run(world, "--mode", "copilot", "--hedge", "0.3") == 0 and "unsure" not in capsys.readouterr().out


def generate_answer(text):
    from model import Answer

    return Answer(text, [1, 2], True)


@pytest.mark.parametrize("flags, words", [
    (["--mode", "microscope"], "microscope is not calibrated"),
    (["--mode", "both"], "microscope is not calibrated"),
    (["--mode", "copilot", "--calibration", "no.json"], "holds no calibration"),
    (["--hedge", "1.5"], r"--hedge must be in \(0, 1\)"),
    (["--question", "Why?"], "your own questions are not calibrated"),
])
def test_what_is_not_calibrated_is_refused(world, flags, words, capsys):
    with pytest.raises(ConfigError, match=words):
        run(world, *flags)
    capsys.readouterr()


def test_a_calibration_of_other_weights_is_refused(world, tiny, capsys):
    other = DriveVLM.from_base(tiny.vision, tiny.llm, num_frames=2, dtype="float32", seed=9)
    other.save_checkpoint(world.folder, stage=1)
    with pytest.raises(ConfigError, match="is of other weights"):
        run(world, "--mode", "copilot")
    capsys.readouterr()
