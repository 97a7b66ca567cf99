"""Probes and twins: worked out by hand; planted policies get the numbers that they must; the model's likelihoods."""

import json
import re

import numpy as np
import pytest
import torch

import evaluate as program
from dataset import MODES, Entry, encode_prompt, load_split
from evaluate import evaluate
from evaluation import probes
from evaluation.probes import (
    KINDS,
    Probe,
    affirmed,
    ask_statements,
    classes_asked,
    draw_probes,
    draw_statements,
    log_likelihoods,
    margins,
    read_twins,
    score_probes,
    score_twins,
    sentences,
    separation,
    told_by,
    twin_entries,
)
from evaluation.report import probe_tables, share_cell, twin_tables
from evaluation.scoring import Truth
from model import DriveVLM
from training.common import ConfigError
from training.config import EvaluateConfig


def entry(video, *captions, mode="microscope"):
    return Entry(f"{video}#{mode}", video, mode, MODES[mode], captions)


def shows(*names, unknown=()):
    return Truth(frozenset(names), frozenset(names), frozenset(unknown))


# ---- what is asked


def test_a_caption_falls_into_its_sentences():
    assert sentences("Day, city: a bus stops; then go. It rains!  Ok") == ["Day, city:", "a bus stops;", "then go.",
                                                                       "It rains!", "Ok"]


def test_statements_are_sentences_that_name_one_class_and_open_no_caption():
    train = [entry("a", "A bus passes. Then a car stops. A car and a bus wait. No truck is seen. A car, no dog."),
             entry("b", "A day. A red car turns. A car turns. The car brakes. A car waits. It is wet."),
             entry("b", "Night: bus ahead; truck left.", mode="copilot")]
    drawn = draw_statements(train, seed=1)
    assert set(drawn) == {"microscope", "copilot"} and set(drawn["microscope"]) == {"car"}
    cars = {"Then a car stops.", "A red car turns.", "A car turns.", "The car brakes.", "A car waits."}
    assert len(set(drawn["microscope"]["car"])) == probes.STATEMENTS and set(drawn["microscope"]["car"]) < cars
    assert drawn["copilot"] == {"bus": ["bus ahead;"], "truck": ["truck left."]}
    assert draw_statements(train[::-1], seed=1) == drawn
    assert any(draw_statements(train, seed)["microscope"] != drawn["microscope"] for seed in range(2, 9))


CLASSES = {"car", "bus", "person", "truck", "dog"}
TRAIN = [entry(str(number), caption) for number, caption in enumerate([
    "A person. A person and a car.", "A person and a car.", "A person.", "A person.", "A car.",
    "A truck and a bus.", "A truck and a bus and a car.", "A dog."])]  # person 4, car 4, truck 2, bus 2, dog 1


def test_absent_classes_are_chosen_as_worked_out_by_hand():
    truth = {"a": shows("bus"), "b": shows("bus", "truck", unknown=["car"]), "c": shows("dog", "car"),
             "d": shows("cat"), "e": shows(*CLASSES), "f": shows("bus", "person")}
    found = draw_probes(TRAIN, truth, CLASSES, seed=0)
    absent = {(probe.video, probe.kind): probe.absent for probe in found}
    assert {video for video, _ in absent} == {"a", "b", "c", "f"}  # d shows no such class, e lacks none
    assert absent["a", "popular"] == "car"  # as often as "person": the first of the alphabet
    assert absent["a", "adversarial"] == "truck"  # 2 of 2 captions with a bus, the car 1 of 2
    assert absent["b", "popular"] == "person" and absent["c", "popular"] == "person"
    assert absent["c", "adversarial"] == "person"  # 2 of 4 captions with a car; truck and bus 1 of 4
    assert absent["f", "adversarial"] == "truck"  # 2 of 2 with a bus; the car 2 of 4 with a person
    for probe in found:
        assert probe.present in truth[probe.video].present and probe.absent not in truth[probe.video].present
        assert probe.absent not in truth[probe.video].unknown
    assert len({probe.present for probe in found if probe.video == "b"}) == 1
    drawn = [draw_probes(TRAIN, truth, CLASSES, seed) for seed in range(20)]
    assert drawn[0] == found and {p[0].absent for p in drawn} == CLASSES - {"bus"}
    assert {p.present for each in drawn for p in each if p.video == "b"} == {"bus", "truck"}
    assert classes_asked(found)["a"] == sorted({"bus", "car", "truck", absent["a", "random"]})


# ---- planted policies


def planted(number=40):
    """Clips that show two of five classes, and their probes."""
    rng = np.random.default_rng(3)
    truth = {f"{i:02d}": shows(*rng.choice(sorted(CLASSES), 2, replace=False)) for i in range(number)}
    return truth, draw_probes(TRAIN, truth, CLASSES, seed=5)


def right(block):
    return [block[kind]["right"][0] for kind in KINDS]


def test_planted_policies_get_the_numbers_that_they_must():
    truth, asked = planted()
    seen = {video: set(clip.present) for video, clip in truth.items()}
    assert right(score_probes(asked, seen, 0)) == [1, 1, 1]
    everything, nothing = dict.fromkeys(truth, CLASSES), dict.fromkeys(truth, set())
    for policy, share in ((everything, 1), (nothing, 0)):
        block = score_probes(asked, policy, 0)
        assert right(block) == [0, 0, 0]
        assert all(block[kind]["yes_present"][0] == block[kind]["yes_absent"][0] == share for kind in KINDS)
        assert block["random"]["right"][1:] == [0, 0]
    companions = {video: names | {p.absent for p in asked if p.video == video and p.kind == "adversarial"}
                  for video, names in seen.items()}
    block = score_probes(asked, companions, 0)
    assert block["adversarial"]["right"][0] == 0 and 0 < block["random"]["right"][0] < 1
    assert block["random"]["probes"] == 40


def test_a_coin_gets_a_quarter_and_a_constant_answer_what_it_must():
    truth, asked = planted(2000)
    rng = np.random.default_rng(0)
    coin = {video: {name for name in sorted(CLASSES) if rng.random() < 0.5} for video in truth}
    assert right(score_probes(asked, coin, 0)) == pytest.approx([0.25] * 3, abs=0.04)
    blind = score_probes(asked, dict.fromkeys(truth, {"person"}), 0)  # the answer never looks
    expected = np.mean([p.present == "person" for p in asked if p.kind == "random"])
    assert right(blind) == pytest.approx([expected] * 3, abs=1e-4)


def test_probes_of_one_clip_worked_out_by_hand():
    asked = [Probe("a", "random", "car", "bus"), Probe("b", "random", "car", "dog"), Probe("c", "random", "car", "dog"),
             Probe("d", "random", "dog", "car"), Probe("a", "popular", "car", "person")]
    block = score_probes(asked, {"a": {"car"}, "b": {"car", "dog"}, "c": set()}, seed=1)
    assert set(block) == {"random", "popular"} and block["popular"]["right"][0] == 1
    random = block["random"]  # d has no answer
    assert random["probes"] == 3 and random["right"][0] == random["yes_absent"][0] == 0.3333
    assert random["yes_present"][0] == 0.6667
    low, high = random["right"][1:]
    assert low == 0 and 0.6 < high <= 1
    assert score_probes(asked, {}, seed=1) == {}


TWINS = [{"video": "a1", "of": "a", "lacks": "person", "in_trap": True},
         {"video": "a2", "of": "a", "lacks": "bus", "in_trap": False},
         {"video": "b1", "of": "b", "lacks": "car", "in_trap": False},
         {"video": "c1", "of": "c", "lacks": "person", "in_trap": True}]


def told(a, a1, a2, b, b1, c, c1):
    return {"a": a, "a1": a1, "a2": a2, "b": b, "b1": b1, "c": c, "c1": c1}


def shares(block, key):
    return [block[part][key][0] for part in ("all", "traps", "others")]


def test_twins_of_planted_policies():
    everything = {"person", "bus", "car"}
    blind = score_twins(TWINS, told(*[everything] * 7), 0)
    assert shares(blind, "told") == shares(blind, "still_told") == [1, 1, 1] and shares(blind, "right") == [0, 0, 0]
    seeing = told({"person", "bus"}, {"bus"}, {"person"}, {"car"}, set(), {"person", "car"}, {"car"})
    block = score_twins(TWINS, seeing, 0)
    assert shares(block, "told") == shares(block, "right") == [1, 1, 1] and shares(block, "still_told") == [0, 0, 0]
    assert [block[part]["twins"] for part in ("all", "traps", "others")] == [4, 2, 2]
    by_context = score_twins(TWINS, seeing | {"a1": {"bus", "person"}, "c1": {"person"}}, 0)
    assert shares(by_context, "still_told") == [0.5, 1, 0] and shares(by_context, "right") == [0.5, 0, 1]
    silent = score_twins(TWINS, told(*[set()] * 7), 0)
    assert shares(silent, "told") == shares(silent, "still_told") == shares(silent, "right") == [0, 0, 0]


def test_twins_of_one_clip_are_drawn_together():
    many = [{"video": f"a{k}", "of": "a", "lacks": "car", "in_trap": False} for k in range(50)]
    answers = {"a": {"car"}, **{f"a{k}": {"car"} if k % 2 else set() for k in range(50)}}
    assert score_twins(many, answers, 0)["all"]["still_told"] == [0.5, 0.5, 0.5]
    assert "traps" not in score_twins(many, answers, 0)
    assert score_twins(many, {"b": set()}, 0) == {}  # the clip was not asked about


def test_told_is_what_the_first_answer_in_the_mode_names():
    rows = [{"video": "a", "mode": "copilot", "sample": 0, "text": "Bus ahead, no car."},
            {"video": "a", "mode": "copilot", "sample": 1, "text": "A truck."},
            {"video": "a", "mode": "microscope", "sample": 0, "text": "A dog."}]
    assert told_by(rows, "copilot") == {"a": {"bus"}}


# ---- likelihoods


def test_margins_worked_out_by_hand():
    shown, grey = np.log([0.2, 0.4, 0.1]), np.log([0.1, 0.2, 0.3])
    found = margins(shown, grey, {"car": ["x", "y"], "bus": ["z"]})
    assert found == {"car": pytest.approx(np.log(2), abs=1e-4), "bus": pytest.approx(-np.log(3), abs=1e-4)}
    rows = [{"video": "a", "mode": "copilot", "shown": "clip", "margins": found | {"dog": 0.0}},
            {"video": "a", "mode": "copilot", "shown": "swapped", "margins": {"bus": 1.0}}]
    assert affirmed(rows, "copilot", "clip") == {"a": {"car"}}
    assert affirmed(rows, "copilot", "swapped") == {"a": {"bus"}} and affirmed(rows, "microscope", "clip") == {}


@pytest.fixture(scope="module")
def model(tiny):
    model = DriveVLM.from_base(tiny.vision, tiny.llm, num_frames=3, dtype="float32", seed=1)
    model.eval()
    return model


def visual_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (1, model.num_frames, model.image_size, model.image_size, 3)
    with torch.no_grad():
        return model.encode_video(torch.randint(0, 255, shape, generator=generator, dtype=torch.uint8))[0]


def plain_logp(model, question, begun, text, visual):
    """Log-probability of `text` after the words `begun` of an answer, one token at a time."""
    prompt = encode_prompt(model.tokenizer, question, model.num_visual_tokens)
    prompt += model.tokenizer.encode(begun, add_special_tokens=False)
    total = 0.0
    for token in model.tokenizer.encode(text, add_special_tokens=False):
        ids = torch.tensor([prompt])
        hidden = model.hidden_states(model.embed(ids, visual[None]), torch.ones_like(ids))[0, -1]
        logits = hidden @ model.head_weight.T
        logits[model.banned_ids] = -torch.inf
        total += float(logits.log_softmax(-1)[token])
        prompt = [*prompt, token]
    return total


@pytest.mark.parametrize("shared", [True, False])
def test_likelihoods_are_those_of_going_on_with_the_caption(model, monkeypatch, shared):
    monkeypatch.setattr(probes, "can_share_prefix", lambda llm: shared)
    caption = "A red car. It stops. Then the light turns green. Go."
    one, texts = entry("a", caption, "Another caption."), ["A bus passes.", "A truck."]
    visuals = [visual_of(model, 1), visual_of(model, 2)]
    with torch.no_grad():
        values = log_likelihoods(model, one, texts, visuals, batch_size=2)
        begun = ["A red car.", "A red car. It stops.", "A red car. It stops. Then the light turns green."]
        for row, visual in zip(values, visuals, strict=True):
            for value, text in zip(row, texts, strict=True):
                places = [plain_logp(model, one.question, words, f" {text}", visual) for words in begun]
                assert value == pytest.approx(np.log(np.mean(np.exp(places))), abs=1e-3)
    assert (values[0] != values[1]).all()


def test_a_long_caption_has_few_places_and_a_short_one_its_end(model, monkeypatch):
    asked = []

    def no_logps(model, groups, shared_prefix):
        asked.extend(len(group.prompt_ids) for group in groups)
        return torch.zeros(sum(len(group.completion_ids) for group in groups), 1), None, None

    monkeypatch.setattr(probes, "completion_logps", no_logps)
    log_likelihoods(model, entry("a", "Car. " * 30), ["A bus."], [None], 99)
    assert len(asked) == probes.PLACES and max(asked) - min(asked) == 28 * (asked[1] - asked[0]) // 9
    asked.clear()
    log_likelihoods(model, entry("a", "Car"), ["A bus."], [None, None], 99)
    assert len(asked) == 2


def test_a_model_that_ignores_the_video_has_margins_of_0(model, monkeypatch):
    weights = {name: value.clone() for name, value in model.projector.state_dict().items()}
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.zero_()
    try:
        rows = asked_of(model)
    finally:
        model.projector.load_state_dict(weights)
    assert len(rows) == 2 * 2 * 4 and {value for row in rows for value in row["margins"].values()} == {0.0}
    assert {value for row in asked_of(model) for value in row["margins"].values()} != {0.0}


def asked_of(model):
    entries = [entry(video, "A day. A car.", mode=mode) for video in "abcd" for mode in MODES]
    statements = {mode: {"car": ["A car."], "bus": ["A bus.", "Bus."]} for mode in MODES}
    shape = (1, model.num_frames, model.image_size, model.image_size, 3)
    frames = {video: torch.full(shape, 40 * number, dtype=torch.uint8) for number, video in enumerate("abcd")}
    return ask_statements(model, frames.__getitem__, entries, statements, dict.fromkeys("abcd", ["bus", "car"]), 4)


class Planted:
    """A model whose visual tokens are what its clip shows."""

    def __init__(self, truth):
        self.truth, self.videos = truth, sorted(truth)

    def read(self, video):
        return torch.tensor([[self.videos.index(video)]])

    def encode_video(self, frames):
        number = int(frames[0, 0])
        return [set() if number == probes.GREY else self.truth[self.videos[number]].present]


def test_a_model_that_sees_answers_all_probes_and_shown_other_clips_it_does_not(monkeypatch):
    truth, asked = planted()

    def seeing(model, entry, texts, visuals, batch_size):
        return np.array([[0.0 if set(text.split()) & visual else -1.0 for text in texts] for visual in visuals])

    monkeypatch.setattr(probes, "log_likelihoods", seeing)
    statements = {"copilot": {name: [f"a {name} there", name] for name in CLASSES}}
    planted_model = Planted(truth)
    rows = ask_statements(planted_model, planted_model.read, [entry(video, "x", mode="copilot") for video in truth],
                          statements, classes_asked(asked), 8)
    assert right(score_probes(asked, affirmed(rows, "copilot", "clip"), 0)) == [1, 1, 1]
    swapped = affirmed(rows, "copilot", "swapped")
    shown = {video: truth[f"{(int(video) + 20) % 40:02d}"].present for video in truth}
    assert swapped == {video: set(classes_asked(asked)[video]) & shown[video] for video in truth}
    assert max(right(score_probes(asked, swapped, 0))) < 0.5


def test_separation_worked_out_by_hand():
    """The car: margins 2 and 1 with it, 1 and 0 without: 3.5 of 4. The bus: 0 of 1. The dog is always there."""
    truth = {"a": shows("car", "bus", "dog"), "b": shows("car"), "c": shows(), "d": shows("dog")}
    margin = {"a": {"car": 2.0, "bus": -1.0, "dog": 9.0}, "b": {"car": 1.0, "bus": 0.0}, "c": {"car": 1.0},
              "d": {"car": 0.0, "dog": 1.0}}
    rows = [{"video": video, "mode": "copilot", "shown": "clip", "margins": margin[video]} for video in "dabc"]
    value, low, high = separation(rows, "copilot", "clip", truth, seed=0)
    assert value == pytest.approx((3.5 / 4 + 0) / 2, abs=1e-4) and low == 0 and high == 1
    assert separation(rows[1:2], "copilot", "clip", truth, seed=0) is None
    blind = [row | {"margins": dict.fromkeys(row["margins"], 0.0)} for row in rows]
    assert separation(blind, "copilot", "clip", truth, seed=0) == [0.5, 0.5, 0.5]
    other = [{"video": "a", "mode": "copilot", "shown": "swapped", "margins": {"car": -9.0}},
             {"video": "a", "mode": "microscope", "shown": "clip", "margins": {"car": -9.0}}]
    assert separation(rows + other, "copilot", "clip", truth, seed=0)[0] == value


# ---- files and runs


def test_a_twins_file_that_does_not_fit_is_refused(tmp_path, tiny):
    good = {"video": "car.mp4", "of": "bus.mp4", "lacks": "bus", "in_trap": False}
    file, problems = tmp_path / "twins.json", []
    file.write_text(json.dumps([good]))
    assert read_twins(file, str(tiny.videos), {"bus.mp4"}, problems) == [good] and problems == []
    wrong = ({"of": "walk.mp4"}, {"lacks": "unicorn"}, {"video": "no.mp4"}, {"video": "../x.mp4"})
    file.write_text(json.dumps([good, *(good | change for change in wrong)]))
    read_twins(file, str(tiny.videos), {"bus.mp4"}, problems)
    text = "\n".join(problems)
    for part in ("1 that are not twins of held-out clips: walk.mp4", "1 that are not COCO's classes: unicorn",
                 "1 that are not there: no.mp4", "'../x.mp4' leads out of"):
        assert part in text
    for content in ("{", '[{"video": "a"}]', "[1]"):
        problems.clear()
        file.write_text(content)
        assert read_twins(file, str(tiny.videos), set(), problems) == [] and "is no list of twins" in problems[0]


def test_twins_are_asked_each_mode_s_question():
    found = twin_entries(TWINS[:1], ["microscope", "copilot"])
    assert [(e.id, e.question) for e in found] == [(f"a1#{mode}", MODES[mode]) for mode in MODES]


def test_cells():
    assert share_cell({"right": [0.5, 0.4, 0.66]}, "right") == "0.50 ±.13" and share_cell(None) == "–"
    assert share_cell([1.0, 0.0, 1.0]) == "1.00 ±.50"


@pytest.fixture
def config(tiny, tmp_path):
    model = DriveVLM.from_base(tiny.vision, tiny.llm, num_frames=3, dtype="float32", seed=1)
    model.save_checkpoint(tmp_path / "stage1", stage=1)
    rows = json.loads(tiny.data.read_text())
    for row in rows:  # a sentence of its own for each class, after an opening
        row["microscope"], row["copilot"] = ["A road. A car stops. A bus."], ["Day: car stops; bus."]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    (tmp_path / "truth.json").write_text(json.dumps({row["video"]: {"present": ["car"]} for row in rows}))
    _, held_out = load_split(EvaluateConfig(data=str(tmp_path / "captions.json"), num_val_videos=3))
    videos = sorted({e.video for e in held_out})
    others = sorted({row["video"] for row in rows} - set(videos))
    twins = [{"video": twin, "of": of, "lacks": "car", "in_trap": twin == others[0]}
             for twin, of in zip(others, videos, strict=True)]
    (tmp_path / "twins.json").write_text(json.dumps(twins))
    return EvaluateConfig(
        data=str(tmp_path / "captions.json"), video_root=str(tiny.videos), output_dir=str(tmp_path / "out"),
        num_val_videos=3, truth=str(tmp_path / "truth.json"), frame_cache=None, dtype="float32",
        checkpoint=[f"stage1={tmp_path / 'stage1'}"], eval_max_new_tokens={"microscope": 3, "copilot": 3},
        probes=True, twins=str(tmp_path / "twins.json"))


def test_a_run_asks_probes_and_twins_once(config, tmp_path, monkeypatch):
    metrics = evaluate(config)
    systems = metrics["systems"]
    for mode in MODES:
        for name, block in systems.items():
            assert block[mode]["probes"]["told"]["random"]["probes"] == 3
            assert ("statement" in block[mode]["probes"]) == ("swapped" in block[mode]["probes"]) == (name == "stage1")
            assert ("twins" in block[mode]) == (name in ("prior", "stage1"))
        assert systems["reference"][mode]["probes"]["told"]["popular"]["right"][0] == 0  # they name the bus, too
        assert systems["prior"][mode]["twins"]["all"]["still_told"][0] == 1
        assert [systems["stage1"][mode]["twins"][part]["twins"] for part in ("all", "traps", "others")] == [3, 1, 2]
    for how in ("statement", "swapped"):  # the car is in every clip, the bus in none
        assert systems["stage1"]["copilot"]["probes"][how]["auc"] is None
    rows = [json.loads(line) for line in (tmp_path / "out" / "probes.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 2 * 2 and all(set(row["margins"]) == {"bus", "car"} for row in rows)
    assert len((tmp_path / "out" / "twins.jsonl").read_text().splitlines()) == 3 * 2
    heads = [rows[0][0] for rows in probe_tables(metrics) + twin_tables(metrics)]
    assert heads == ["Microscope, probes", "Copilot, probes", "Microscope, twins", "Copilot, twins"]
    assert "Copilot, twins" in (tmp_path / "out" / "table.md").read_text()
    assert re.search("Copilot, probes", (tmp_path / "out" / "report.html").read_text())

    monkeypatch.setattr(program, "open_model", None)  # run again, it asks nothing
    assert evaluate(config) == metrics
    rows = json.loads((tmp_path / "captions.json").read_text())
    for row in rows:  # statements are tried after other words
        row["copilot"] = ["Night: car stops; bus."]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    with pytest.raises(TypeError):
        evaluate(config)


def test_a_twin_that_cannot_be_read_is_left_out(config, tiny, tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    for file in tiny.videos.iterdir():
        (videos / file.name).write_bytes(file.read_bytes())
    config.video_root, config.probes = str(videos), False
    bad = json.loads((tmp_path / "twins.json").read_text())[0]["video"]
    (videos / bad).write_bytes(b"broken")
    metrics = evaluate(config)
    assert set(metrics["left_out"]) == {bad} and metrics["clips"] == 3
    assert metrics["systems"]["stage1"]["copilot"]["twins"]["all"]["twins"] == 2
    assert "probes" not in metrics["systems"]["stage1"]["copilot"] and probe_tables(metrics) == []


def test_what_cannot_be_asked_is_an_error_before_anything_slow(config, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "open_model", None)
    config.twins = str(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="twins: not found"):
        evaluate(config)
    (tmp_path / "none.json").write_text("[{}]")
    with pytest.raises(ConfigError, match="no list of twins"):
        evaluate(config)
    config.twins, rows = "", json.loads((tmp_path / "captions.json").read_text())
    for row in rows:
        row["copilot"] = ["Car and bus."]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match="probes: no held-out clip"):
        evaluate(config)
    assert EvaluateConfig(clips="x", probes=True, truth="t").problems() == [
        "probes: needs captions, and the clips of --clips have none"]
