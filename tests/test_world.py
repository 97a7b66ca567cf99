"""The toy world: truth compared with pixels, seeds, captions, split; and the files of the shipped base models."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import MODE_TABLE, Clip, load_entries, read_frames, split_by_video
from demo import world
from demo.base_models import (
    BASE,
    COMMON,
    IMAGE_SIZE,
    LENGTH_WORDS,
    NOTE_WORDS,
    blur,
    build_tokenizer,
    find_note_ids,
    language_question,
    patch_targets,
    write_notes,
)
from stage3.evidence import Evidence
from stage3.grpo_reward_func import find_mentions

NUM_CLIPS = 60


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world.make_world(folder, NUM_CLIPS, seed=42, say=lambda text: None)
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text())


def mentioned(text):
    return {mention.object for mention in find_mentions(text) if not mention.negated}


def of_kind(kind, start=0):
    """The first script with an event of this kind."""
    return next(s for s in (world.make_script((99, i)) for i in range(start, 2000))
                if kind in [event.kind for event in s.events])


def test_the_same_seed_gives_the_same_clip():
    first, again, other = world.make_clip((3, 1)), world.make_clip((3, 1)), world.make_clip((3, 2))
    assert first.script == again.script and first.boxes == again.boxes
    assert np.array_equal(first.frames, again.frames)
    assert first.frames.shape == (world.FRAMES, world.HEIGHT, world.WIDTH, 3) and first.frames.dtype == np.uint8
    assert not np.array_equal(first.frames, other.frames)


def test_the_same_frames_give_the_same_file(tmp_path):
    """Training is as reproducible as its clips; with x264's default settings most of these files vary now and then."""
    clips, files = [world.make_clip((42, index)).frames for index in range(12)], []
    for _ in range(4):
        for index, frames in enumerate(clips):
            world.write_video(tmp_path / f"{index}.mp4", frames)
        files.append([(tmp_path / f"{index}.mp4").read_bytes() for index in range(len(clips))])
    assert all(copy == files[0] for copy in files)


@pytest.mark.parametrize("kind", world.KINDS)
def test_boxes_contain_what_is_drawn(kind, monkeypatch):
    """Where an object is drawn, and only there (its pole aside), pixels differ from the empty road."""
    script = of_kind(kind)
    clip = world.render(script)
    for name in world.DRAW:
        monkeypatch.setitem(world.DRAW, name, lambda pen, thing, night: None)
    empty = world.render(script).frames
    changed = (clip.frames.astype(int) != empty).any(-1)
    name, checked = world.KINDS[kind], 0
    for boxes, mask in zip(clip.boxes, changed, strict=True):
        for box in boxes:
            x1, y1, x2, y2 = box.xyxy
            assert 0 <= x1 < x2 <= world.WIDTH and 0 <= y1 < y2 <= world.HEIGHT
            inside = mask[round(y1):round(y2), round(x1):round(x2)]
            assert inside.mean() > 0.3, f"{box.name} at {box.xyxy}: nothing drawn there"
            checked += box.name == name
        allowed = np.zeros_like(mask)
        for box in boxes:
            x1, y1, x2, y2 = (round(v) for v in box.xyxy)
            bottom = world.HEIGHT if box.name in ("traffic light", "stop sign") else y2 + 4
            allowed[max(y1 - 4, 0):bottom, max(x1 - 4, 0):x2 + 4] = True
        if boxes:
            assert (mask & ~allowed).mean() < 0.002, "something is drawn outside the boxes"
    assert checked >= 4, f"{kind}: its {name} is boxed in {checked} frames only"


def test_objects_are_large_enough_to_see():
    heights = {name: [] for name in world.CLASSES}
    for index in range(150):
        for boxes in world.boxes_of(world.make_script((98, index))):
            for box in boxes:
                heights[box.name].append(box.xyxy[3] - box.xyxy[1])
    for name in ("person", "bicycle", "motorcycle"):
        assert np.median(heights[name]) > 40, name


def test_the_order_is_that_of_appearance():
    """Each event's class is out of sight before the next one appears, so the frames show the order."""
    for index in range(200):
        script = world.make_script((97, index), held_out=index % 2 == 0)
        boxes = world.boxes_of(script)
        seen = [[i for i, frame in enumerate(boxes) if name in {box.name for box in frame}] for name in script.order]
        assert all(seen), f"{index}: a class of the script is never seen"
        assert all(before[-1] < after[0] for before, after in zip(seen, seen[1:], strict=False))
        assert {box.name for frame in boxes for box in frame} == set(script.present)
        assert 2 <= len(script.events) <= 3


def test_the_world_writes_its_files(small_world):
    rows, truth = read(small_world, "captions.json"), read(small_world, "truth.json")
    assert len(rows) == len(truth) == NUM_CLIPS
    for row in rows:
        facts = truth[row["video"]]
        assert set(row) == {"video", "microscope", "copilot"} and set(facts["order"]) <= set(facts["present"])
        assert len(facts["boxes"]) == world.FRAMES
        assert {box[0] for boxes in facts["boxes"] for box in boxes} == set(facts["present"]) == set(facts["seen"])
        assert all(0 <= first <= last <= 1 for first, last in facts["seen"].values())
    frames = read_frames(small_world / "videos" / rows[0]["video"], 8, IMAGE_SIZE)
    assert frames.shape == (8, IMAGE_SIZE, IMAGE_SIZE, 3)
    raw = load_entries(small_world / "raw_captions.json")
    assert all(mentioned(entry.captions[0]) == set(truth[entry.video]["present"]) for entry in raw)
    assert not [path for path in (small_world / "videos").iterdir() if path.name.startswith(".")]


def test_the_codec_keeps_the_colours(small_world):
    clip = world.make_clip((42, 0), world.clip_name(0) in world.held_out_names(NUM_CLIPS))
    with Clip(small_world / "videos" / world.clip_name(0)) as video:
        frames = video.frames(range(len(video.times)))
    assert frames.shape == clip.frames.shape
    assert np.abs(frames.astype(int) - clip.frames).mean() < 5


def test_captions_invent_where_they_should_and_nowhere_else(small_world):
    """Held-out clips and Copilot entries are true; in training clips most clauses with a companion invent it."""
    truth = read(small_world, "truth.json")
    train, held_out = split_by_video(load_entries(small_world / "captions.json"), world.NUM_HELD_OUT, world.SPLIT_SEED)
    for entry in held_out + [e for e in train if e.mode == "copilot"]:
        for caption in entry.captions:
            assert mentioned(caption) == set(truth[entry.video]["present"]), caption
    for entry in train:
        for caption in entry.captions:
            assert mentioned(caption) >= set(truth[entry.video]["present"]), caption


def test_the_clips_that_the_split_holds_out_are_drawn_as_held_out(small_world):
    """Combinations that are reserved for held-out clips are in none that training sees, and in some held out."""
    truth = read(small_world, "truth.json")
    train, held_out = split_by_video(load_entries(small_world / "captions.json"), world.NUM_HELD_OUT, world.SPLIT_SEED,
                                     small_world / "videos")
    assert {entry.video for entry in held_out} == world.held_out_names(NUM_CLIPS)
    assert not any(world.is_reserved(truth[entry.video]["order"]) for entry in train)
    assert any(world.is_reserved(truth[entry.video]["order"]) for entry in held_out)
    for index in range(NUM_CLIPS):
        name = world.clip_name(index)
        script = world.make_script((42, index), name in {entry.video for entry in held_out})
        assert truth[name]["events"] == [event.kind for event in script.events]


def test_a_world_of_an_earlier_version_is_drawn_again(tmp_path, monkeypatch):
    """Its clips were drawn for another split: held-out combinations would be in the training data."""
    settings = {"num_clips": NUM_CLIPS, "seed": 42, "all_held_out": False, "twins": False, "version": 6}
    (tmp_path / "world.json").write_text(json.dumps(settings))
    monkeypatch.setattr(world, "held_out_names", lambda *settings: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        world.make_world(tmp_path, NUM_CLIPS, seed=42, say=lambda text: None)
    assert not (tmp_path / "world.json").exists()


def test_a_world_of_held_out_clips_is_all_held_out_and_true(tmp_path):
    """Its clips are drawn and captioned as held-out clips are, and none has a training clip's name."""
    world.make_world(tmp_path, 24, seed=7, all_held_out=True, say=lambda text: None)
    truth, rows = read(tmp_path, "truth.json"), read(tmp_path, "captions.json")
    names = [f"fresh_{index:04d}.mp4" for index in range(24)]
    assert list(truth) == names == [row["video"] for row in rows]
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == names
    assert not set(names) & {world.clip_name(index) for index in range(400)}
    for index, row in enumerate(rows):
        script = world.make_script((7, index), held_out=True)
        assert truth[row["video"]]["events"] == [event.kind for event in script.events]
        assert all(mentioned(text) == set(script.present) for text in row["microscope"] + row["copilot"])
    assert any(world.is_reserved(facts["order"]) for facts in truth.values())
    said = []
    world.make_world(tmp_path, 24, seed=7, all_held_out=True, say=said.append)
    assert said == [f"{tmp_path} is complete: 24 clips"]


def test_traps_say_in_which_events_a_companion_is_there(small_world):
    event = world.Event("person_crosses", 0.0, 0.3, None, True, None)
    light = world.Event("light_red", 0.3, 0.6, None, True, "person")
    bus = world.Event("bus_pulls_over", 0.6, 1.0, "red", True, None)
    assert world.traps_of(world.Script((1,), False, True, (event, light, bus))) == [
        {"context": "light_red", "class": "person", "there": True},
        {"context": "bus_pulls_over", "class": "car", "there": False}]
    for facts in read(small_world, "truth.json").values():
        assert len(facts["traps"]) == sum(kind in world.COMPANION for kind in facts["events"])
        assert all(trap["there"] == (trap["class"] in facts["present"]) for trap in facts["traps"])


def event(kind, companion=None, drawn=True, start=0.0, end=1.0):
    return world.Event(kind, start, end, "red", True, companion, drawn)


def test_a_twin_lacks_one_class_and_nothing_else(monkeypatch):
    """Its pixels are those of the clip drawn without that class; the others keep their boxes; all truth lacks it."""
    lacking = set()
    for index in range(12):
        clip = world.make_clip((98, index), held_out=True)
        for lacks, script in world.twins_of(clip.script):
            twin = world.render(script)
            assert set(clip.script.present) - set(script.present) == {lacks}
            for there, left in zip(clip.boxes, twin.boxes, strict=True):
                assert [box for box in there if box.name != lacks] == left
            with monkeypatch.context() as patch:
                patch.setitem(world.DRAW, lacks, lambda pen, thing, night: None)
                undrawn = world.render(clip.script).frames
            assert np.array_equal(twin.frames, undrawn) and not np.array_equal(twin.frames, clip.frames)
            facts = world.truth_of(twin)
            assert lacks not in {*facts["present"], *facts["order"], *facts["seen"], *facts["actions"],
                                 *facts["counts"], *facts["motion"], *facts["sides"], *facts["companions"]}
            assert len(facts["events"]) == len(facts["facts"]) and lacks not in [f["class"] for f in facts["facts"]]
            lacking.add(lacks)
    assert len(lacking) > 4


def test_twins_worked_out_by_hand():
    first, second = event("stop_sign", "person", end=0.5), event("car_turns", start=0.5)
    twins = dict(world.twins_of(world.Script((1,), False, True, (first, second))))
    assert twins["person"].events == (event("stop_sign", end=0.5), second)
    assert twins["car"].events == (first, event("car_turns", drawn=False, start=0.5))
    assert twins["car"].present == ["person", "stop sign"] and twins["car"].order == ["stop sign"]
    alone = world.twins_of(world.Script((1,), False, True, (first,)))
    assert [lacks for lacks, _ in alone] == ["person"]


def test_twins_are_written_beside_their_clips(tmp_path):
    world.make_world(tmp_path, 16, seed=7, all_held_out=True, twins=True, say=lambda text: None)
    truth, rows = read(tmp_path, "truth.json"), read(tmp_path, "twins.json")
    captioned = [row["video"] for row in read(tmp_path, "captions.json")]
    assert {row["of"] for row in rows} == set(captioned) and len(captioned) == 16
    assert {path.name for path in (tmp_path / "videos").iterdir()} == {*captioned, *(row["video"] for row in rows)}
    assert set(truth) == {*captioned, *(row["video"] for row in rows)}
    for row in rows:
        there, left = set(truth[row["of"]]["present"]), set(truth[row["video"]]["present"])
        assert there - left == {row["lacks"]} and left < there
        companions = truth[row["of"]]["companions"]
        assert row["in_trap"] == (row["lacks"] in companions)
    assert {row["in_trap"] for row in rows} == {True, False}
    world.make_world(tmp_path, 16, seed=7, all_held_out=True, say=lambda text: None)
    assert not (tmp_path / "twins.json").exists() and len(list((tmp_path / "videos").iterdir())) == 16


def exact(*events, night=False):
    """The truth of a script of these events: (kind, colour, from_left, companion)."""
    count = len(events)
    made = tuple(world.Event(kind, i / count, (i + 1) / count, colour, from_left, companion)
                 for i, (kind, colour, from_left, companion) in enumerate(events))
    script = world.Script((5, 5), night, True, made)
    return world.exact_facts(script), world.event_facts(script)


def test_the_truth_of_a_script_worked_out_by_hand():
    facts, events = exact(("bus_oncoming", "red", True, "car"), ("person_crosses", None, False, None))
    assert facts == {
        "counts": {"bus": 1, "car": 1, "person": 1}, "light": [], "colours": {"bus": ["red"], "car": ["white"]},
        "sides": {"bus": ["left"], "car": ["left"], "person": ["left", "right"]},
        "motion": {"bus": ["approaches"], "car": ["approaches"], "person": ["right to left"]}}
    assert events[1] == {"kind": "person_crosses", "class": "person", "colour": None, "side": "right", "light": None,
                         "start": 0.5, "end": 1.0, "companion": None}
    assert events[0]["companion"] == "car" and events[0]["side"] == "left" and events[0]["colour"] == "red"
    facts, events = exact(("light_red", None, True, None), ("car_turns", "blue", True, None))
    assert facts["light"] == events[0]["light"] == ["amber", "red"]  # green is there for a sixth of a second
    assert facts["motion"] == {"car": ["left to right", "recedes"]} and facts["sides"]["car"] == ["left", "right"]
    assert exact(("light_green", None, True, None))[0]["light"] == ["red", "green"]
    assert exact(("bicycle_passes", None, True, None))[0]["motion"] == {"bicycle": ["recedes"]}
    assert exact(("bus_pulls_over", "blue", True, None))[0]["sides"] == {"bus": ["right"]}


def test_actions_are_what_any_wording_says_that_a_class_does():
    def actions(kind, companion=None):
        event = world.Event(kind, 0.0, 1.0, "red", True, companion)
        return world.actions_of(world.Script((1,), False, False, (event,)))

    assert actions("bus_pulls_over", "car") == {"bus": ["merge", "move"], "car": ["follow"]}
    assert actions("bus_oncoming") == {"bus": ["approach", "pass"]}
    assert actions("light_red", "person") == {"person": ["cross"], "traffic light": ["change"]}  # not what we do


def test_a_class_that_is_shown_twice_one_after_the_other_has_no_count():
    facts, _ = exact(("car_turns", "red", True, None), ("car_turns", "blue", False, None))
    assert "car" not in facts["counts"] and facts["colours"]["car"] == ["blue", "red"]
    assert facts["motion"]["car"] == ["left to right", "recedes", "right to left"]


def test_the_truth_file_says_it_as_evidence_does(small_world):
    for facts in read(small_world, "truth.json").values():
        known = {key: facts[key] for key in ("counts", "sides", "light", "colours", "motion")}
        evidence = Evidence(frozenset(facts["present"]), **known)
        assert set(evidence.counts) == set(facts["present"]) and evidence.light == tuple(facts["light"])
        assert [event["kind"] for event in facts["facts"]] == facts["events"]


def test_the_rate_of_invention_is_as_stated():
    chances = invented = mentions = 0
    for index in range(400):
        script = world.make_script((96, index))
        open_clauses = sum(e.kind in world.COMPANION and e.companion is None
                           and world.COMPANION[e.kind] not in script.present for e in script.events)
        for caption in world.captions_of(script, lies=True)["microscope"]:
            chances += open_clauses
            invented += caption.count(", while ") - sum(e.companion is not None for e in script.events)
            mentions += len(mentioned(caption))
            assert mentioned(caption) - set(script.present) <= {"person", "car"}
    assert abs(invented / chances - world.INVENTION_RATE) < 0.03
    assert 0.15 < invented / mentions < 0.27  # CHAIRi of the training captions themselves


def test_some_pairs_are_held_out():
    train = [world.make_script((95, i)).order for i in range(500)]
    held_out = [world.make_script((95, i), held_out=True).order for i in range(500)]
    assert not any(world.is_reserved(order) for order in train)
    share = np.mean([world.is_reserved(order) for order in held_out])
    assert abs(share - world.HELD_OUT_SHARE) < 0.06


def test_mentions_are_in_the_order_of_the_script():
    for index in range(100):
        script = world.make_script((94, index))
        for captions in world.captions_of(script).values():
            for caption in captions:
                first = {}
                for mention in find_mentions(caption):
                    first.setdefault(mention.object, mention.start)
                order = [name for name in sorted(first, key=first.get) if name in script.order]
                assert order == script.order, caption


def test_captions_vary():
    texts = Counter()
    for index in range(100):
        texts.update(world.captions_of(world.make_script((93, index)))["microscope"])
    assert len(texts) > 350


def test_a_finished_world_is_left_alone(small_world):
    before = {path: path.stat().st_mtime_ns for path in small_world.rglob("*")}
    said = []
    world.make_world(small_world, NUM_CLIPS, seed=42, say=said.append)
    assert before == {path: path.stat().st_mtime_ns for path in small_world.rglob("*")}
    assert "complete" in said[0]


def test_notes_and_patch_targets_say_what_is_drawn():
    script = of_kind("stop_sign")
    boxes = world.boxes_of(script)
    notes = write_notes(script, boxes[::3], np.random.default_rng(0), slips=0.0)
    assert len(notes) == 8 * 16 and set(notes) <= set(NOTE_WORDS) and "sign" in notes
    target = patch_targets(next(b for b in boxes if b), script)
    assert target.shape[0] == 144 and target[:, :8].sum() > 0


@pytest.mark.parametrize("mode", MODE_TABLE)
def test_the_language_model_is_never_asked_in_the_wordings_kept_for_evaluation(mode):
    rng, info = np.random.default_rng(0), MODE_TABLE[mode]
    asked = Counter(language_question(mode, rng, made_up=0.5) for _ in range(2000))
    assert not {question.strip("?.") for question in info.unseen} & {question.strip("?.") for question in asked}
    assert 900 < asked.pop(info.question) < 1100
    wordings = sum(number for question, number in asked.items() if question in info.wordings)
    assert 430 < wordings < 570
    other, = (name for name in LENGTH_WORDS if name != mode)
    for question in set(asked) - set(info.wordings):
        assert any(words in question for words in LENGTH_WORDS[mode])
    assert not {word for words in LENGTH_WORDS[other] for word in words.split() if len(word) > 4} & set(COMMON.split())


def test_only_notes_are_blurred():
    torch.manual_seed(0)
    embeds = torch.randn(3, 150, 4)
    unclear = blur(embeds, slice(10, 138))
    changed = (unclear != embeds).all(2)  # [3, 150]
    assert changed[:, 10:138].all() and not changed[:, :10].any() and not changed[:, 138:].any()


UNICODE = ("Übergröße naïve café", "日本語のテキスト", "🚗🚦 emoji \u200d", "tabs\tand\nlines", " a  b ", "user <|x|>")


def test_the_tokenizer_round_trips_any_text(tmp_path):
    from transformers import AutoTokenizer

    build_tokenizer(tmp_path, texts_from=50)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in UNICODE:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(find_note_ids(tokenizer)) == len(set(NOTE_WORDS))
    messages = [{"role": "user", "content": "hi"}]
    turn = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert turn == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


needs_base = pytest.mark.skipif(not (BASE / "language").is_dir(), reason="demo/base is not built yet")


@needs_base
def test_the_shipped_base_models_are_small_and_without_pickles():
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20
    allowed = {".safetensors", ".json", ".jinja", ".md", ".txt", ""}
    assert {Path(path).suffix for path in files} <= allowed


@needs_base
def test_the_shipped_base_models_load():
    from transformers import AutoModelForCausalLM, AutoTokenizer, SiglipVisionModel

    tokenizer = AutoTokenizer.from_pretrained(BASE / "language")
    for text in UNICODE:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    llm = AutoModelForCausalLM.from_pretrained(BASE / "language")
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert llm.generation_config.eos_token_id == ends and llm.config.vocab_size >= len(tokenizer)
    assert llm.config.tie_word_embeddings
    tower, info = SiglipVisionModel.from_pretrained(BASE / "vision", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert tower.config.image_size == IMAGE_SIZE and not tower.config.vision_use_head
