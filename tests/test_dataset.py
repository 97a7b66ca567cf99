"""Rows, split, renderer, clips, cache, dataset and collate, on small clips and tokenizers."""

import ctypes
import errno
import faulthandler
import functools
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch
from conftest import ROOT, write_clip
from transformers import AutoTokenizer

import dataset
from dataset import (
    IGNORE_INDEX,
    MODE_TABLE,
    MODES,
    NOBODY,
    PREFIX,
    Clip,
    ClipTensors,
    DataError,
    Entry,
    Mode,
    VideoError,
    VideoInstructDataset,
    cached_frames,
    chat_pieces,
    collate,
    draw_question,
    encode_example,
    encode_prompt,
    fill_forms,
    find_bad_texts,
    fit_answer,
    frame_indices,
    load_entries,
    load_split,
    placeholder_id,
    read_frames,
    resolve_video,
    sample_clip,
    split_by_video,
    spread_over_time,
)
from training.workers import in_child


def write_ramp(path, times, width=128, height=96, codec="mpeg4"):
    """A clip whose frame i, shown at times[i] seconds, has grey level 6 i and a white upper left quarter."""
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 4_000_000
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i, seconds in enumerate(times):
            pixels = np.full((height, width, 3), 6 * i, np.uint8)
            pixels[: height // 2, : width // 2] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(seconds * 1000), stream.time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def levels(frames):
    """Index of each frame of `write_ramp`, read from its lower right quarter."""
    height, width = frames.shape[1:3]
    return (frames[:, height * 3 // 4 :, width * 3 // 4 :].mean((1, 2, 3)) / 6).round().astype(int).tolist()


def set_rotation(path, degrees):
    """Write a rotation into the track header of an mp4 file, as phones and dash cams do."""
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def write_rows(path, rows):
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def qwen(tiny):
    return AutoTokenizer.from_pretrained(tiny.llm)


@pytest.fixture(scope="module")
def llama(tiny):
    return AutoTokenizer.from_pretrained(tiny.llm_plain)


# ---------------------------------------------------------------------------------------------------------------------
# Rows

ANSWER = "The car stops because the light is red. It waits."
CONVERSATION = [("human", "from", "value"), ("user", "role", "content")]
SAME = [
    {"video": "d/x.mov", "q": MODES["copilot"], "a": ANSWER},
    {"video": "d/x.mov", "q": f" {MODES['copilot']}\n", "a": f"  {ANSWER}\n"},
    {"video": "d/x.mov", "q": MODES["copilot"], "captions": [ANSWER]},
    {"video": "d/x.mov", "q": MODES["copilot"], "a": "an older text", "captions": [ANSWER], "id": 7, "meta": {}},
    {"video": "d/x.mov", "copilot": [ANSWER]},
    {"video": "d/x.mov", "conversations": [{"from": "human", "value": "<video>\n" + MODES["copilot"]},
                                           {"from": "gpt", "value": ANSWER}]},
    {"video": "d/x.mov", "conversations": [{"role": "user", "content": "<image>" + MODES["copilot"]},
                                           {"role": "assistant", "content": ANSWER}]},
    {"video": "d/x.mov", "messages": [{"role": "user", "content": MODES["copilot"]},
                                      {"role": "assistant", "content": ANSWER}]},
]


@pytest.mark.parametrize("row", SAME)
def test_every_form_gives_the_same_entry(tmp_path, row):
    entry = Entry("d/x#copilot", "d/x.mov", "copilot", MODES["copilot"], (ANSWER,))
    assert load_entries(write_rows(tmp_path / "rows.json", [row])) == [entry]
    lines = tmp_path / "rows.jsonl"
    lines.write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\n\n" + json.dumps(row).encode())
    assert load_entries(lines) == [entry, entry]


def test_bddx_csv_gives_the_same_entry(tmp_path):
    file = tmp_path / "BDD-X.csv"
    file.write_text(
        "Index,Input.Video,Answer.1start,Answer.1end,Answer.1action,Answer.1justification,"
        "Answer.2start,Answer.2end,Answer.2action,Answer.2justification,Answer.3start,Answer.3action\n"
        "0,https://host/videos/x.mov,12,20,It waits.,,0,12,The car stops,because the light is red,,\n",
        encoding="utf-8-sig",
    )
    assert load_entries(file) == [Entry("x#copilot", "x.mov", "copilot", MODES["copilot"], (ANSWER,))]


def test_a_row_may_hold_both_modes_and_a_folder_may_hold_several_files(tmp_path):
    write_rows(tmp_path / "b.json", [{"video": "1.mp4", "microscope": ["A.", "B."], "copilot": ["C."]}])
    (tmp_path / "a.jsonl").write_text(json.dumps({"video": "0.mp4", "q": "?", "a": "x", "mode": "copilot"}))
    (tmp_path / "notes.txt").write_text("no rows")
    entries = load_entries(tmp_path)
    assert [e.id for e in entries] == ["0#copilot", "1#microscope", "1#copilot"]
    assert entries[0].question == "?" and entries[1].captions == ("A.", "B.")


def test_text_is_nfc_and_the_file_name_stays_as_given(tmp_path):
    nfd = unicodedata.normalize("NFD", "café")
    entry, = load_entries(write_rows(tmp_path / "r.json", [{"video": f"{nfd}.mp4", "copilot": [f"A {nfd}"]}]))
    assert entry.captions == ("A café",) and entry.video == f"{nfd}.mp4" and entry.id == "café#copilot"


def test_default_mode_is_used_for_unknown_questions(tmp_path):
    file = write_rows(tmp_path / "r.json", [{"video": "x.mp4", "q": "What happens?", "a": "A car stops."}])
    with pytest.raises(DataError, match="r.json row 1.*is not a known question"):
        load_entries(file)
    assert load_entries(file, default_mode="copilot")[0].mode == "copilot"
    with pytest.raises(DataError, match="default_mode is 'poem'; modes are microscope, copilot"):
        load_entries(file, default_mode="poem")


def test_wordings_of_a_mode_are_recognised(monkeypatch):
    row = {"video": "x.mp4", "q": "Give a short summary.", "a": "A car stops."}
    with pytest.raises(dataset.RowError):
        dataset.parse_row(row)
    changed = replace(MODE_TABLE["copilot"], wordings=("What happens?", "Give a short summary."))
    monkeypatch.setitem(MODE_TABLE, "copilot", changed)
    entry, = dataset.parse_row(row, default_mode="microscope")
    assert (entry.mode, entry.question) == ("copilot", MODES["copilot"])  # and asked in the words of today
    standard, = dataset.parse_row({**row, "q": MODES["copilot"]})
    assert standard.mode == "copilot"


def plain(question):
    """A question without differences of case, punctuation and white space."""
    return "".join(letter for letter in question.lower() if letter.isalnum())


def test_no_question_of_the_table_is_used_twice():
    """No unseen wording is ever a training wording, of its own mode or of another."""
    questions = [plain(question) for mode in MODE_TABLE.values() for question in mode.known]
    assert len(set(questions)) == len(questions)
    for name, mode in MODE_TABLE.items():
        assert len(mode.wordings) == 3 * 6 * 6 * 6 and len(mode.unseen) == 8 and MODES[name] == mode.question
        assert mode.known == {mode.question, *mode.wordings, *mode.unseen}
    for twice in ({"wordings": ("Dangers?", "Dangers?")}, {"wordings": ("List the hazards.",)},
                  {"wordings": ("Dangers?",), "unseen": ("Dangers?",)}):
        with pytest.raises(ValueError, match="a mode has a question twice: 'List the hazards.', its"):
            Mode("List the hazards.", **twice)


def test_training_draws_wordings_and_never_an_unseen_one():
    drawn = Counter()
    for number in range(1600):
        entry = Entry(f"{number}#copilot", "x.mp4", "copilot", MODES["copilot"], ("A car.",))
        drawn[draw_question(entry, 42, 0)] += 1
    assert set(drawn) <= {MODES["copilot"], *MODE_TABLE["copilot"].wordings}
    assert 730 < drawn.pop(MODES["copilot"]) < 870  # half of 1600, give or take 3.5 standard deviations
    assert max(drawn.values()) < 9 and len(drawn) > 400  # of 648 wordings for the other half
    assert len({draw_question(entry, 42, epoch) for epoch in range(9)}) > 3
    assert len({draw_question(entry, seed, 0) for seed in range(9)}) > 3
    own = replace(entry, question="And now?")
    assert {draw_question(own, 42, epoch) for epoch in range(9)} == {"And now?"}


def test_the_drawn_wording_depends_on_seed_epoch_and_id_alone():
    entry = Entry("day/x#copilot", "day/x.mp4", "copilot", MODES["copilot"], ("A car.",))
    number = int.from_bytes(hashlib.sha256(b"question/42/4/day/x#copilot").digest()[:8], "big") >> 1
    assert number % 1000 < 500  # not the standard question, then
    expected = MODE_TABLE["copilot"].wordings[number // 1000 % 648]
    assert draw_question(entry, 42, 4) == expected  # the same on every rank, machine and Python
    shares = {share: draw_question(entry, 42, 4, share) for share in (0.0, number % 1000 / 1000, 1.0)}
    assert list(shares.values()) == [MODES["copilot"], MODES["copilot"], expected]
    assert draw_question(replace(entry, video="y.mp4", captions=("A bus.", "Buses.")), 42, 4) == expected


def test_forms_are_filled_with_every_text_for_every_name_of_the_clip():
    wordings = fill_forms(adjective=("long", "full"), sentence=("Be brief.",))
    assert len(wordings) == len(set(wordings)) == (6 * 2 + 6) * 6
    assert wordings[:2] == ("Write a long report on the video.", "Write a long report on this clip.")
    assert {"Full caption for the scene:", "Be brief. What does the footage show?"} <= set(wordings)


@pytest.mark.parametrize("question", [
    MODES["microscope"], MODE_TABLE["microscope"].wordings[0], MODE_TABLE["microscope"].wordings[-1],
    *MODE_TABLE["microscope"].unseen])
def test_a_known_question_of_a_data_file_is_asked_as_the_standard_one(question):
    entry, = dataset.parse_row({"video": "x.mp4", "q": f" {question}\n", "a": "A car stops."}, default_mode="copilot")
    assert (entry.mode, entry.question) == ("microscope", MODES["microscope"])


def test_a_third_mode_is_read_once_it_is_in_the_tables(monkeypatch):
    row = {"video": "x.mp4", "hazards": ["A child runs."], "copilot": ["Brake."]}
    assert [entry.mode for entry in dataset.parse_row(row)] == ["copilot"]
    monkeypatch.setitem(MODE_TABLE, "hazards", Mode("List the hazards."))
    monkeypatch.setitem(MODES, "hazards", "List the hazards.")
    copilot, hazards = dataset.parse_row(row)
    assert hazards == Entry("x#hazards", "x.mp4", "hazards", "List the hazards.", ("A child runs.",))
    assert dataset.parse_row({"video": "x.mp4", "hazards": ["A child runs."]}) == [hazards]
    assert dataset.parse_row({"video": "x.mp4", "q": "List the hazards.", "a": "A child runs."}) == [hazards]
    with pytest.raises(dataset.RowError, match="modes are microscope, copilot, hazards"):
        dataset.parse_row({"video": "x.mp4", "q": "?", "a": "!"})


BAD = [
    ({"clip": "x.mp4", "caption": "hi"}, "unknown_format", "keys seen: caption, clip"),
    ({"video": "x.mp4", "text": "hi"}, "unknown_format", "keys seen: text, video"),
    ({"video": 3, "q": "?", "a": "!"}, "unknown_format", 'no "video"'),
    (["x.mp4", "hi"], "unknown_format", "must be an object"),
    ({"video": "x.mp4", "q": "?", "a": "!", "mode": "poem"}, "unknown_mode", "'poem'"),
    ({"video": "x.mp4", "q": "?", "a": "!"}, "unknown_mode", "microscope, copilot"),
    ({"video": "x.mp4", "q": " ", "a": "!"}, "empty_question", "question"),
    ({"video": "x.mp4", "q": MODES["copilot"], "a": "  "}, "empty_caption", "caption"),
    ({"video": "x.mp4", "q": MODES["copilot"], "a": None}, "empty_caption", "caption"),
    ({"video": "x.mp4", "q": MODES["copilot"], "captions": []}, "empty_caption", "empty list"),
    ({"video": "x.mp4", "microscope": "text"}, "empty_caption", "list"),
    ({"video": "x.mp4", "copilot": ["good", 3]}, "empty_caption", "caption 2"),
    ({"video": "x.mp4", "copilot": ["broken \ufffd"]}, "bad_unicode", "U.FFFD"),
    ({"video": "x.mp4", "copilot": ["broken \ud800"]}, "bad_unicode", "U.FFFD"),
    ({"video": "x.mp4", "conversations": [{"from": "gpt", "value": "!"}]}, "unknown_format", "turns must be"),
    ({"video": "x.mp4", "conversations": [{"from": "human", "value": "<video><image>?"},
                                          {"from": "gpt", "value": "!"}]},
     "unknown_format", "more than one"),
    ({"video": "x.mp4", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}] * 2},
     "multi_turn", "4 turns"),
    ({"Input.Video": "http://h/x.mov", "Answer.1action": "", "Answer.1start": ""}, "empty_caption", "caption"),
]


@pytest.mark.parametrize("row, code, text", BAD)
def test_bad_rows_have_a_code_and_say_what_is_wrong(row, code, text):
    with pytest.raises(dataset.RowError, match=text) as error:
        dataset.parse_row(row)
    assert error.value.code == code


@pytest.mark.parametrize("text, count, problem", [
    ("[]", 0, None), (" [\n ] \n", 0, None), ("", 0, None),
    ('[{"video": "a"} , {"video": "b"}\n]', 2, None), ('[{"video": "a]["}]', 1, None),
    ('[{"video": "a"} {"video": "b"}]', 0, "Expecting"), ('[{"video": "a"}', 0, "Expecting"),
    ('[{"video": "a"}, ]', 0, "not valid JSON"), ('[{"video": "a', 0, "Unterminated"), ("[{]", 0, "Expecting"),
    ('[{"video": "a"}]\n[{"video": "b"}]', 0, "Extra data: line 2"), ('[{"video": "a"}] and more', 0, "Extra data"),
    ('{"video": "a"}\n\n{"video":\u2028"b"}', 1, "not valid"), ('{"video": "a\\u2028"}\n{"video": "b\u2028"}', 2, None),
])
def test_a_list_is_parsed_as_a_whole_and_json_lines_one_by_one(tmp_path, text, count, problem):
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    rows = [row for _, row in dataset.read_rows(tmp_path / "r.json")]
    errors = [row for row in rows if isinstance(row, DataError)]
    assert len(rows) - len(errors) == count
    assert [row["video"][0] for row in rows if isinstance(row, dict)] == list("ab")[:count]
    assert len(errors) == bool(problem)
    assert all(problem in str(error) and error.code == "unknown_format" for error in errors)
    if problem:
        with pytest.raises(DataError, match=f"bad rows?\n(.*\n)?  r.json row .*{problem}"):
            load_entries(tmp_path / "r.json")


def test_all_bad_rows_are_named_in_one_message(tmp_path):
    good = {"video": "x.mp4", "copilot": ["A car."]}
    with pytest.raises(DataError) as error:
        load_entries(write_rows(tmp_path / "r.json", [good, {"video": "a"}, good, {"q": "b"}]))
    assert "2 bad rows" in str(error.value) and "row 2" in str(error.value) and "row 4" in str(error.value)
    with pytest.raises(DataError, match="r.json row 1: .* not UTF-8 text"):
        (tmp_path / "r.json").write_bytes(b'[{"video": "caf\xe9"}]')
        load_entries(tmp_path / "r.json")
    with pytest.raises(DataError, match="not valid JSON"):
        (tmp_path / "r.json").write_text("[{]")
        load_entries(tmp_path / "r.json")
    with pytest.raises(DataError, match="r.jsonl row 2: not valid JSON"):
        (tmp_path / "r.jsonl").write_text(json.dumps(good) + "\n{oops\n")
        load_entries(tmp_path / "r.jsonl")
    with pytest.raises(DataError, match="r.jsonl row 2: not valid JSON: .*: line 4 column 2$"):
        (tmp_path / "r.jsonl").write_text(json.dumps(good) + "\n\n\n{oops\n")
        load_entries(tmp_path / "r.jsonl")
    with pytest.raises(DataError, match="r.json row 1: the file is not valid JSON: Extra data: line 3 column 1"):
        (tmp_path / "r.json").write_text(json.dumps([good], indent=None) + "\n\n" + json.dumps([good]))
        load_entries(tmp_path / "r.json")
    with pytest.raises(DataError, match="no such data file"):
        load_entries(tmp_path / "missing.json")


# ---------------------------------------------------------------------------------------------------------------------
# Split and paths


def both(video):
    return [Entry(f"{video[:-4]}#{mode}", video, mode, MODES[mode], ("A car.",)) for mode in MODES]


def test_split_keeps_a_clip_on_one_side_whatever_the_order_of_rows():
    entries = [entry for i in range(50) for entry in both(f"{i:02}.mp4")]
    train, val = split_by_video(entries, 10, seed=42)
    assert len(val) == 20 and len(train) == 80
    assert not {e.video for e in train} & {e.video for e in val}
    again = split_by_video(entries[::-1], 10, seed=42)[1]
    assert {e.id for e in again} == {e.id for e in val}
    assert {e.id for e in split_by_video(entries, 10, seed=43)[1]} != {e.id for e in val}
    assert split_by_video(entries, 0)[1] == []
    with pytest.raises(DataError, match="none left"):
        split_by_video(entries, 50)


def held_out(names, num_val_videos, seed):
    return {entry.video for entry in split_by_video([both(name)[0] for name in names], num_val_videos, seed)[1]}


@pytest.mark.parametrize("seed", range(30))
def test_dropping_or_adding_clips_moves_no_more_held_out_clips_than_that(seed):
    draw = np.random.default_rng(seed)
    names = [f"{'ab'[i % 2]}/{i:08x}.mov" for i in range(446)]
    before = held_out(names, 40, seed)
    for k in (1, 3, 40, 200):
        dropped = set(draw.choice(names, k, replace=False))
        after = held_out([name for name in names if name not in dropped], 40, seed)
        assert len(before - after) == len(after - before) <= k
        assert not (after - before) & dropped and before - dropped <= after  # held out clips that are there stay so
        more = held_out([*names, *(f"c/{i}.mov" for i in range(k))], 40, seed)
        assert len(more - before) <= k


def test_the_split_is_the_same_in_every_release():
    """Results of two versions of this code can be compared only if they hold out the same clips."""
    assert held_out([f"{i}.mov" for i in range(100)], 5, 42) == {"14.mov", "26.mov", "68.mov", "82.mov", "84.mov"}


def test_split_treats_links_and_other_spellings_as_one_clip(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.mp4").write_bytes(b"clip")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "0.mp4")
    entries = [*both("0.mp4"), *both("./1.mp4"), *both("link.mp4"), *both("1.mp4"), *both("2.mp4"), *both("3.mp4")]
    for seed in range(10):
        train, val = split_by_video(entries, 2, seed, video_root=tmp_path)
        trained = {dataset.clip_key(entry.video, tmp_path) for entry in train}
        held_out = {dataset.clip_key(entry.video, tmp_path) for entry in val}
        assert not trained & held_out and len(held_out) == 2
    plain = [entry for i in range(6) for entry in both(f"{i}.mp4")]
    assert split_by_video(plain, 2, 1, video_root=tmp_path) == split_by_video(plain, 2, 1)


def split_config(tmp_path, rows, val_rows=None, **changes):
    (tmp_path / "videos").mkdir(exist_ok=True)
    config = SimpleNamespace(data=write_rows(tmp_path / "train.json", rows), val_data=None, default_mode=None,
                             video_root=tmp_path / "videos", num_val_videos=2, split_seed=1)
    if val_rows is not None:
        config.val_data = write_rows(tmp_path / "val.json", val_rows)
    return SimpleNamespace(**vars(config) | changes)


def test_load_split_splits_data_where_there_is_no_val_data(tmp_path):
    config = split_config(tmp_path, [{"video": f"{i}.mp4", "copilot": [f"Car {i}."]} for i in range(6)])
    assert load_split(config) == split_by_video(load_entries(config.data), 2, 1, config.video_root)
    with pytest.raises(DataError, match="none left"):
        load_split(split_config(tmp_path, [{"video": "0.mp4", "copilot": ["Car."]}]))


def test_val_data_is_the_held_out_side(tmp_path):
    rows = [{"video": f"{i}.mp4", "copilot": [f"Car {i}."]} for i in range(6)]
    config = split_config(tmp_path, rows[:4], rows[4:], num_val_videos=40)
    train, val = load_split(config)
    assert train == load_entries(config.data) and val == load_entries(config.val_data)
    (tmp_path / "videos" / "2.mp4").write_bytes(b"clip")
    (tmp_path / "videos" / "link.mp4").symlink_to(tmp_path / "videos" / "2.mp4")
    for video in ("1.mp4", "./1.mp4", "link.mp4"):  # however it is spelled
        with pytest.raises(DataError, match="1 of its clips are also in .*train.json: " + video):
            load_split(split_config(tmp_path, rows[:4], [*rows[4:], {**rows[0], "video": video}]))
    with pytest.raises(DataError, match="1 of its clips are also in .*train.json: 2.mp4"):
        load_split(split_config(tmp_path, [{**rows[0], "video": "link.mp4"}], [rows[2]]))


def test_paths_stay_inside_the_video_root(tmp_path):
    root = tmp_path / "videos"
    (root / "d").mkdir(parents=True)
    (root / "d" / "x.mp4").write_bytes(b"clip")
    (tmp_path / "secret.mp4").write_bytes(b"clip")
    (tmp_path / "videos2").mkdir()
    (root / "out.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "in.mp4").symlink_to(root / "d" / "x.mp4")
    assert resolve_video(root, "d/../d/x.mp4") == resolve_video(root, "in.mp4") == (root / "d" / "x.mp4").resolve()
    for video in ("../secret.mp4", "../videos2/x.mp4", ".",
                  "d/../../secret.mp4", "out.mp4", str(tmp_path / "secret.mp4"), "~/x.mp4",
                  "https://host/x.mp4", "file:///etc/passwd", "d\\x.mp4", "x\0.mp4"):
        with pytest.raises(DataError) as error:
            resolve_video(root, video)
        assert error.value.code == "path_escape"
    link = tmp_path / "link"
    link.symlink_to(root)
    assert resolve_video(link, "d/x.mp4").name == "x.mp4"
    (root / unicodedata.normalize("NFD", "é.mp4")).write_bytes(b"clip")
    assert resolve_video(root, "é.mp4").exists()


def test_a_path_that_is_too_long_is_an_error_of_its_row(tmp_path):
    long = Entry("x#copilot", "x" * 300 + ".mp4", "copilot", MODES["copilot"], ("A car.",))
    with pytest.raises(dataset.RowError, match="too long") as error:
        resolve_video(tmp_path, long.video)
    assert error.value.code == "missing_video"
    with pytest.raises(DataError, match="no such file: 'xxx.*too long"):
        split_by_video([long, *both("a.mp4")], 1, video_root=tmp_path)
    for read in (Clip, lambda path: read_frames(path, 2, 96), lambda path: cached_frames(path, 2, 96, tmp_path)):
        with pytest.raises(VideoError, match="File name too long"):
            read(tmp_path / long.video)


# ---------------------------------------------------------------------------------------------------------------------
# The renderer


def test_the_prompt_of_the_real_qwen3_tokenizer_is_as_expected(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "qwen3_tokenizer")
    head, start, video, end = [151644, 872, 198], [151652], [151656] * 3, [151653]
    question = [74785, 279, 2766, 304, 7716, 13]
    tail = [151645, 198, 151644, 77091, 198]
    assert encode_prompt(tokenizer, MODES["microscope"], 3) == head + start + video + end + question + tail
    question = [9190, 5612, 551, 279, 9842, 6109, 3529, 974, 285, 974, 13]
    text = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Summarize the driving scene concisely."
    ids = encode_prompt(tokenizer, MODES["copilot"], 1)
    assert tokenizer.decode(ids) == text + "<|im_end|>\n<|im_start|>assistant\n"
    assert ids == tokenizer.encode(text + "<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)


def test_the_prompt_omits_missing_vision_tokens_and_the_system_turn(llama):
    pieces = chat_pieces(llama)
    assert llama.decode(pieces.before_user) == "<s>[INST] " and llama.decode(pieces.after_user) == " [/INST]"
    assert llama.decode(pieces.turn_end) == "</s>" and pieces.vision_start == pieces.vision_end == ()
    assert placeholder_id(llama) == llama.convert_tokens_to_ids("<extra_1>")
    assert llama.decode(encode_prompt(llama, "What?", 2)) == "<s>[INST] <extra_1><extra_1>What? [/INST]"


TEMPLATES = {  # template, and what must be around "Q" with turn end E
    "gemma": (
        "<s>{% for m in messages %}<start>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}E\n"
        "{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}",
        "<s><start>user\n", "E\n<start>model\n"),
    "bos in every turn": (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} E{% endif %}{% endfor %}",
        "<s>[INST] ", " [/INST]"),
    "end of text behind the last turn": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}E\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|end|>{% endif %}",
        "<|user|>\n", "E\n<|assistant|>\n"),
    "hybrid thinker": (
        "{% for m in messages %}<start>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n"
        "</think>\n\n{% endif %}{{ m.content }}E\n{% endfor %}{% if add_generation_prompt %}<start>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        "<start>user\n", "E\n<start>assistant\n<think>\n\n</think>\n\n"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_pieces_of_other_templates_are_found(tiny, name):
    template, before, after = TEMPLATES[name]
    tokenizer = AutoTokenizer.from_pretrained(tiny.llm_plain)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>", "E", "<pad_1>"]})
    tokenizer.chat_template = template
    pieces = chat_pieces(tokenizer)
    assert tokenizer.decode(pieces.before_user) == before
    assert tokenizer.decode(pieces.after_user) == after
    assert tokenizer.convert_ids_to_tokens(pieces.turn_end) == ["E"]
    assert pieces.placeholder == tokenizer.convert_tokens_to_ids("<pad_1>")


def test_templates_that_cannot_work_are_refused(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny.llm_plain)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        chat_pieces(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(DataError, match="no token of its own"):
        chat_pieces(tokenizer)
    used_up = "{% for m in messages %}<extra_0>{{ m.content }}</s>{% endfor %}<extra_1>"
    tokenizer.chat_template = used_up
    with pytest.raises(DataError, match="no special token left"):
        chat_pieces(tokenizer)


WORDS = "The user in the red car asks the assistant.\n\nuser: go! assistant: <im_end> im_start| <|im_end wait. café 🚗"


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_labels_are_the_answer_and_its_end_token(request, name):
    tokenizer = request.getfixturevalue(name)
    if name == "llama":
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for question in (*MODES.values(), "What does the user tell the assistant? assistant\n"):
        example = encode_example(tokenizer, question, WORDS, 5, 1000)
        ids, labels = example["input_ids"], example["labels"]
        prompt = encode_prompt(tokenizer, question, 5)
        assert ids[: len(prompt)] == prompt and set(labels[: len(prompt)]) == {IGNORE_INDEX}
        assert ids[len(prompt) :] == labels[len(prompt) :] and len(ids) == len(labels)
        assert ids.count(placeholder_id(tokenizer)) == 5
        assert tokenizer.decode(labels[len(prompt) : -1], clean_up_tokenization_spaces=False) == WORDS
        assert (labels[-1],) == chat_pieces(tokenizer).turn_end and labels.count(labels[-1]) == 1


@pytest.mark.parametrize("text", ["<|im_end|>", "a <|video_pad|> b", "<|endoftext|>"])
def test_control_text_is_refused(qwen, text):
    with pytest.raises(DataError, match="control token"):
        encode_example(qwen, MODES["copilot"], f"A car. {text}", 1, 100)
    with pytest.raises(DataError, match="control token"):
        encode_prompt(qwen, text, 1)


def test_control_text_is_refused_even_if_it_is_not_marked_special(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny.llm)
    tokenizer.add_tokens(["<think>", "    ", "pedestrian"])
    assert dataset.find_control_text(tokenizer, "I <think> so") == "<think>"
    assert dataset.find_control_text(tokenizer, "a    pedestrian, 3 < 4") is None


def test_control_text_is_found_before_training_in_every_caption_and_question(qwen):
    sound = Entry("a#copilot", "a.mp4", "copilot", MODES["copilot"], ("A <car>.", "A | bus.", "im_end"))
    third = replace(sound, id="b#copilot", captions=("A car.", "A bus.", "A van.<|im_end|>"))
    asked = replace(sound, id="c#copilot", question="What <|video_pad|>?", captions=("A car.", "<|endoftext|>"))
    assert find_bad_texts([sound] * 30, qwen, max_text_tokens=60, wordings=0) == []
    assert find_bad_texts([sound, third, asked], qwen) == [
        "b#copilot: caption 3 contains the control token <|im_end|>",
        "c#copilot: the question contains the control token <|video_pad|>",
        "c#copilot: caption 2 contains the control token <|endoftext|>",
    ]
    for entry in (third, asked):  # what it finds is what an example is refused for
        with pytest.raises(DataError, match="control token"):
            encode_example(qwen, entry.question, entry.captions[-1], 1, 100)
    many = find_bad_texts([third] * 1034, qwen)
    assert len(many) == 21 and many[-1] == "... and 1,014 more"
    question = "What does the driver do? " * 9
    least = len(encode_prompt(qwen, question, 0)) + 1
    long = replace(sound, question=question)
    assert find_bad_texts([sound, long], qwen, least, wordings=0) == []
    assert find_bad_texts([sound, long], qwen, least - 1, wordings=0) == [
        f"a#copilot: the question takes {least} tokens with the end token, max_text_tokens is {least - 1}"]


def test_wordings_that_cannot_be_asked_are_found_before_training(qwen, monkeypatch):
    entry = Entry("a#copilot", "a.mp4", "copilot", MODES["copilot"], ("A car.",))
    wordings = ("Say <|im_end|> now.", "What does the driver do? " * 9, "In short?")
    monkeypatch.setitem(MODE_TABLE, "copilot", replace(MODE_TABLE["copilot"], wordings=wordings))
    least = len(encode_prompt(qwen, wordings[1], 0)) + 1
    control = "MODE_TABLE: 'Say <|im_end|> now.' (copilot) contains the control token <|im_end|>"
    assert find_bad_texts([entry, entry], qwen, least) == [control]
    assert find_bad_texts([entry, entry], qwen, least - 1) == [
        control, f"MODE_TABLE: {wordings[1]!r} (copilot) takes {least} tokens with the end token, max_text_tokens is "
        f"{least - 1}"]
    own = replace(entry, question="And now?")  # is asked as it is
    assert find_bad_texts([own], qwen, least - 1) == []
    assert find_bad_texts([entry], qwen, least - 1, wordings=0) == []  # none is drawn


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_the_end_token_is_never_lost(request, name):
    tokenizer = request.getfixturevalue(name)
    answer = "A red car stops. The light (at 3.5 m) turns green! Then \"it drives on.\" All wait for the last bus"
    prompt = encode_prompt(tokenizer, MODES["copilot"], 7)
    least = len(prompt) - 7 + 1
    full = len(tokenizer.encode(answer))
    seen = set()
    for limit in range(least, least + full + 3):
        example = encode_example(tokenizer, MODES["copilot"], answer, 7, limit)
        supervised = example["labels"][len(prompt) :]
        assert len(example["input_ids"]) - 7 <= limit and tuple(supervised[-1:]) == chat_pieces(tokenizer).turn_end
        seen.add(tokenizer.decode(supervised[:-1]))
    assert answer in seen and "" in seen and "A red car stops." in seen and "A red" in seen
    assert "A red car stops. The light (at 3.5 m) turns green! Then \"it drives on.\"" in seen
    assert all(answer.startswith(text) for text in seen)
    assert not {"A red car stops. The", "A red car stops. The light (at 3.", "A re"} & seen
    with pytest.raises(DataError, match="max_text_tokens"):
        encode_example(tokenizer, MODES["copilot"], answer, 7, least - 1)


def test_fit_answer_reports_a_cut(qwen):
    assert fit_answer(qwen, "A car.", 100) == (qwen.encode("A car."), False)
    ids, cut = fit_answer(qwen, "A car. " * 30, 20)
    assert cut and len(ids) <= 20 and qwen.decode(ids).endswith("car.")


# ---------------------------------------------------------------------------------------------------------------------
# Frames


def test_frame_indices_are_even_and_include_both_ends():
    assert frame_indices(100, 4).tolist() == [0, 33, 66, 99]
    assert frame_indices(3, 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert frame_indices(1, 3).tolist() == [0, 0, 0] and frame_indices(9, 1).tolist() == [0]
    with pytest.raises(DataError):
        frame_indices(0, 4)


@pytest.fixture(params=["decord", "pyav"])
def each_reader(request, monkeypatch):
    """Runs a test with each of the two video readers."""
    if importlib.util.find_spec(request.param.replace("pyav", "av")) is None:
        pytest.skip(f"{request.param} is not installed")
    monkeypatch.setenv("DRIVEVLM_VIDEO_READER", request.param)
    return request.param


def test_uneven_frames_are_chosen_evenly_over_time():
    even = np.arange(40) / 8
    assert spread_over_time(even, 7).tolist() == frame_indices(40, 7).tolist()
    uneven = np.concatenate([np.arange(20) / 20, 1 + np.arange(5)])  # 20 frames in the first of 5 s
    chosen = spread_over_time(uneven, 6)
    assert np.abs(uneven[chosen] - np.linspace(0, 5, 6)).max() <= 0.5 and chosen[0] == 0 and chosen[-1] == 24


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_read_frames_includes_both_ends(each_reader, tmp_path, codec):
    write_ramp(tmp_path / "clip.mp4", np.arange(40) / 8, codec=codec)
    frames = read_frames(tmp_path / "clip.mp4", 8, 96)
    assert frames.shape == (8, 96, 96, 3) and frames.dtype == np.uint8
    assert levels(frames) == frame_indices(40, 8).tolist()
    write_ramp(tmp_path / "short.mp4", np.arange(3) / 8, codec=codec)
    assert levels(read_frames(tmp_path / "short.mp4", 8, 96)) == frame_indices(3, 8).tolist()
    write_ramp(tmp_path / "one.mp4", [0], codec=codec)
    assert levels(read_frames(tmp_path / "one.mp4", 2, 96)) == [0, 0]


def test_variable_frame_rate_is_sampled_by_time(each_reader, tmp_path):
    times = [*np.arange(0, 1, 0.05), *np.arange(1, 6, 1.0)]  # 25 frames, 20 of them in the first second
    write_ramp(tmp_path / "clip.mp4", times)
    assert levels(read_frames(tmp_path / "clip.mp4", 6, 96)) == [0, 20, 21, 22, 23, 24]


@pytest.mark.parametrize("degrees, corner", [(0, (0, 0)), (90, (0, 1)), (180, (1, 1)), (270, (1, 0))])
def test_rotation_tags_are_respected(each_reader, tmp_path, degrees, corner):
    write_ramp(tmp_path / "clip.mp4", np.arange(10) / 8)
    set_rotation(tmp_path / "clip.mp4", degrees)
    frames = read_frames(tmp_path / "clip.mp4", 2, 96)
    white = frames[0].reshape(2, 48, 2, 48, 3).mean((1, 3, 4))
    assert np.unravel_index(white.argmax(), (2, 2)) == corner
    with Clip(tmp_path / "clip.mp4") as clip:
        assert clip.size == ((96, 128) if degrees in (90, 270) else (128, 96))


def test_a_clip_gives_its_size_times_and_frames(each_reader, tmp_path):
    write_clip(tmp_path / "seconds.mp4", num_frames=20)
    with Clip(tmp_path / "seconds.mp4") as clip:
        assert clip.size == (320, 180) and clip.times.tolist() == (np.arange(20) / 8).tolist()
    write_ramp(tmp_path / "clip.mp4", np.arange(40) / 8)
    with Clip(tmp_path / "clip.mp4") as clip:
        assert clip.size == (128, 96)
        assert clip.choose(8).tolist() == frame_indices(40, 8).tolist()
        frames = clip.frames([9, 0, 39, 9])
        assert frames.shape == (4, 96, 128, 3) and frames.dtype == np.uint8 and levels(frames) == [9, 0, 39, 9]
        with pytest.raises(VideoError, match="clip.mp4"):
            clip.frames([40])
    with Clip(tmp_path / "clip.mp4", (64, 80)) as clip:
        assert clip.size == (64, 80) and clip.frames([0]).shape == (1, 80, 64, 3)
    (tmp_path / "text.mp4").write_bytes(b"hello" * 99)
    with pytest.raises(VideoError, match="not a readable video"):
        Clip(tmp_path / "text.mp4")


def test_an_error_of_the_caller_is_not_reported_as_one_of_the_clip(each_reader, tmp_path):
    write_ramp(tmp_path / "clip.mp4", np.arange(4) / 8)
    with pytest.raises(RuntimeError, match="mine") as error, Clip(tmp_path / "clip.mp4"):
        raise RuntimeError("mine")
    assert not isinstance(error.value, VideoError)


def test_sample_clip_returns_the_frames_of_training_without_repeats(each_reader, tmp_path):
    write_ramp(tmp_path / "clip.mp4", np.arange(40) / 8)
    indices, times, frames = sample_clip(tmp_path / "clip.mp4", 5)
    assert indices.tolist() == levels(frames) == frame_indices(40, 5).tolist() and frames.shape[1:] == (96, 128, 3)
    assert np.allclose(times, indices / 39, atol=0.01)
    write_ramp(tmp_path / "short.mp4", np.arange(3) / 8)
    indices, times, frames = sample_clip(tmp_path / "short.mp4", 5)
    assert indices.tolist() == levels(frames) == [0, 1, 2] and np.allclose(times, [0, 0.5, 1], atol=0.05)
    write_ramp(tmp_path / "one.mp4", [0])
    assert [part.tolist() for part in sample_clip(tmp_path / "one.mp4", 5)[:2]] == [[0], [0]]


def test_unreadable_clips_say_why(each_reader, tmp_path):
    write_ramp(tmp_path / "whole.mp4", np.arange(40) / 8)
    whole = (tmp_path / "whole.mp4").read_bytes()
    broken = {"empty.mp4": (b"", "0 bytes"), "text.mp4": (b"hello" * 99, "not a readable video"),
              "half.mp4": (whole[: len(whole) // 2], "not a readable video")}
    for name, (content, reason) in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoError, match=f"{name}: .*{reason}"):
            read_frames(tmp_path / name, 4, 96)
    with pytest.raises(VideoError, match="no such file"):
        read_frames(tmp_path / "none.mp4", 4, 96)
    with pytest.raises(VideoError, match=r"a folder without images \(.jpeg, .jpg, .png\)"):
        read_frames(tmp_path, 4, 96)
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match="pipe.mp4: not a file"):
        read_frames(tmp_path / "pipe.mp4", 4, 96)
    with pytest.raises(DataError, match="56 px"):
        read_frames(tmp_path / "whole.mp4", 4, 48)


def write_movie(path, codec="libx264", sound_first=False, num_frames=90, size=(320, 176), **options):
    """A clip of moving noise with B-frames (x264's default); optionally with an audio track before the video track."""
    import av

    rng, (width, height) = np.random.default_rng(0), size
    noise = rng.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    with av.open(str(path), "w", options=options) as out:
        if sound_first:
            sound = out.add_stream("aac", rate=44100)
        stream = out.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if sound_first:
            for i in range(40):
                silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
                silence.sample_rate, silence.pts = 44100, 1024 * i
                out.mux(sound.encode(silence))
            out.mux(sound.encode())
        for i in range(num_frames):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(noise, 4 * i, axis=1), format="rgb24")))
        out.mux(stream.encode())


@pytest.fixture(scope="module")
def movies(tiny, tmp_path_factory):
    """Clips of many kinds: those of the other tests, rotations, uneven times, B-frames, sound first, a late start."""
    folder = tmp_path_factory.mktemp("movies")
    shutil.copytree(tiny.videos, folder, dirs_exist_ok=True)
    write_ramp(folder / "uneven.mp4", [*np.arange(0, 1, 0.05), *np.arange(1, 6, 1.0)])
    write_ramp(folder / "late.mp4", 3 + np.arange(20) / 8, codec="libx264")
    for degrees in (90, 180, 270):
        write_ramp(folder / f"turned{degrees}.mp4", np.arange(10) / 8)
        set_rotation(folder / f"turned{degrees}.mp4", degrees)
    for name in ("b.mp4", "b.mov", "b.mkv"):
        write_movie(folder / name)
    write_movie(folder / "sound.mp4", sound_first=True)
    write_movie(folder / "odd.mp4", size=(322, 182))
    write_movie(folder / "front.mp4", movflags="faststart")
    return folder


def test_both_readers_give_the_same_frames(movies, monkeypatch):
    """Indices, times and sizes are equal, frames of native size to the bit; scaled ones differ by rounding only."""
    pytest.importorskip("decord")
    assert len(list(movies.iterdir())) == 17
    for path in movies.iterdir():
        seen = []
        for reader in ("decord", "pyav"):
            monkeypatch.setenv("DRIVEVLM_VIDEO_READER", reader)
            with Clip(path) as clip:
                chosen = clip.choose(8)
                seen.append((clip.size, clip.times, chosen, clip.frames(chosen), read_frames(path, 8, 96)))
        (size, times, chosen, frames, scaled), other = seen
        assert size == other[0] and np.array_equal(chosen, other[2]), path.name
        np.testing.assert_allclose(times, other[1], atol=1e-4, err_msg=path.name)
        np.testing.assert_array_equal(frames, other[3], err_msg=path.name)
        apart = np.abs(scaled.astype(int) - other[4])
        assert apart.mean() < 4 and apart.max() < 32, f"{path.name}: {apart.mean()}, {apart.max()}"


def test_damage_is_named_alike_by_both_readers(movies, each_reader, tmp_path):
    whole = (movies / "front.mp4").read_bytes()
    middle, noise = len(whole) // 2, random.Random(0).randbytes(len(whole) // 6)
    broken = {
        "cut.mp4": (whole[:middle], "cut off: the file ends before its last frame"),
        "noise.mp4": (whole[:middle - len(noise) // 2] + noise + whole[middle + len(noise) // 2:], "damaged: "),
        "headless.mp4": (whole[100:], "not a readable video"), "empty.mp4": (b"", "empty file"),
    }
    for name, (content, reason) in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoError, match=f"{name}: {reason}"), Clip(tmp_path / name) as clip:
            clip.frames(range(len(clip.times)))


def test_earlier_frames_can_be_read_after_later_ones(movies, each_reader):
    with Clip(movies / "b.mp4") as clip:
        frames = clip.frames([80, 3, 80, 41])
        assert np.array_equal(frames[0], frames[2]) and np.array_equal(clip.frames([3])[0], frames[1])
        assert np.array_equal(clip.frames([41, 42])[0], frames[3])


@pytest.mark.parametrize("system, machine, reader", [
    ("Linux", "x86_64", "decord"), ("Windows", "AMD64", "decord"), ("Linux", "aarch64", "pyav"),
    ("Darwin", "arm64", "pyav"), ("Darwin", "x86_64", "pyav"), ("Windows", "ARM64", "pyav"),
])
def test_the_reader_follows_the_platform(system, machine, reader, monkeypatch):
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.delenv("DRIVEVLM_VIDEO_READER", raising=False)
    assert dataset.video_reader() == reader == os.environ["DRIVEVLM_VIDEO_READER"]
    assert dataset.choose_video_reader("pyav") == "pyav" == dataset.video_reader()


def test_a_reader_that_is_not_installed_is_an_error_and_not_replaced(monkeypatch):
    monkeypatch.setenv("DRIVEVLM_VIDEO_READER", "pyav")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = SimpleNamespace(video_reader="decord")
    problem, = dataset.video_reader_problems(config)
    assert problem.startswith("video_reader: decord is not installed here; pip install decord, or choose") and \
        config.video_reader == "decord"


def test_frames_of_the_other_reader_are_not_taken_from_the_cache(tiny, tmp_path, monkeypatch, decodes):
    for reader in ("pyav", "decord", "pyav"):
        monkeypatch.setenv("DRIVEVLM_VIDEO_READER", reader)
        cached_frames(tiny.videos / "car.mp4", 2, 96, tmp_path)
    assert len(decodes) == 2 == len(cache_files(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# The frame cache


@pytest.fixture
def decodes(monkeypatch):
    """Records every decoding of a clip for this process."""
    count = []
    decode = dataset.decode_frames
    monkeypatch.setattr(dataset, "decode_frames", lambda *args: count.append(args) or decode(*args))
    return count


def cache_files(folder):
    return sorted(folder.rglob("*.frames"))


def test_a_clip_is_decoded_once(tiny, tmp_path, decodes):
    clip = tiny.videos / "car.mp4"
    plain = cached_frames(clip, 4, 96, None)
    first, second = cached_frames(clip, 4, 96, tmp_path), cached_frames(clip, 4, 96, tmp_path)
    assert len(decodes) == 2 and len(cache_files(tmp_path)) == 1
    np.testing.assert_array_equal(plain, first)
    np.testing.assert_array_equal(plain, second)
    cached_frames(clip, 4, 64, tmp_path)
    cached_frames(clip, 5, 96, tmp_path)
    assert len(cache_files(tmp_path)) == 3
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_changed_clip_is_decoded_again(tmp_path, decodes):
    write_ramp(tmp_path / "clip.mp4", np.arange(20) / 8)
    cached_frames(tmp_path / "clip.mp4", 2, 96, tmp_path / "cache")
    write_ramp(tmp_path / "clip.mp4", np.arange(30) / 8)
    assert levels(cached_frames(tmp_path / "clip.mp4", 2, 96, tmp_path / "cache")) == [0, 29]
    os.utime(tmp_path / "clip.mp4", ns=(1, 1))
    cached_frames(tmp_path / "clip.mp4", 2, 96, tmp_path / "cache")
    assert len(decodes) == 3


def test_damaged_and_foreign_cache_files_are_replaced(tiny, tmp_path, decodes):
    whole = cached_frames(tiny.videos / "car.mp4", 4, 96, tmp_path)
    file, = cache_files(tmp_path)
    sound = file.read_bytes()
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 1
    cached_frames(tiny.videos / "bus.mp4", 4, 96, tmp_path / "other")
    other, = cache_files(tmp_path / "other")
    damages = [b"", sound[:50], sound[: len(sound) // 2], flipped, sound + b"x", b"\n" + sound, other.read_bytes()]
    for count, damage in enumerate(damages, start=3):
        file.write_bytes(damage)
        np.testing.assert_array_equal(cached_frames(tiny.videos / "car.mp4", 4, 96, tmp_path), whole)
        assert len(decodes) == count and file.read_bytes() == sound


def raise_disk_full(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("part", ["mkdir", "open", "write", "replace"])
def test_a_full_disk_is_said_once_and_clips_are_decoded(tiny, tmp_path, monkeypatch, decodes, capsys, part):
    class Full(io.BytesIO):
        write = raise_disk_full

    def open_full(path, mode="r", *args):
        if "w" not in mode:
            return open(path, mode, *args)
        Path(path).write_bytes(b"begun")
        return raise_disk_full() if part == "open" else Full()

    monkeypatch.setattr(dataset, "_warned_of_cache", set())
    if part in ("open", "write"):
        monkeypatch.setattr(dataset, "open", open_full, raising=False)
    else:
        monkeypatch.setattr(*(Path, "mkdir") if part == "mkdir" else (os, "replace"), raise_disk_full)
    for clip in ("car.mp4", "bus.mp4", "car.mp4"):
        frames = cached_frames(tiny.videos / clip, 4, 96, tmp_path / "cache")
        np.testing.assert_array_equal(frames, read_frames(tiny.videos / clip, 4, 96))
    assert len(decodes) == 3 and not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert capsys.readouterr().out == (f"frame_cache: cannot write {tmp_path / 'cache'}: No space left on device; "
                                       "clips are decoded each time\n")


def test_a_cache_that_cannot_be_read_is_said_once_and_clips_are_decoded(tiny, tmp_path, monkeypatch, decodes, capsys):
    def forbid(path, mode="r", *args):
        if ".frames" in str(path) and "r" in mode:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open(path, mode, *args)

    whole = cached_frames(tiny.videos / "car.mp4", 4, 96, tmp_path)
    monkeypatch.setattr(dataset, "_warned_of_cache", set())
    monkeypatch.setattr(dataset, "open", forbid, raising=False)
    for _ in range(2):
        np.testing.assert_array_equal(cached_frames(tiny.videos / "car.mp4", 4, 96, tmp_path), whole)
    assert len(decodes) == 3
    assert capsys.readouterr().out == f"frame_cache: cannot read {tmp_path}: Permission denied; clips are decoded " \
                                      "each time\n"
    monkeypatch.undo()
    (tmp_path / "file").write_text("no folder")
    np.testing.assert_array_equal(cached_frames(tiny.videos / "car.mp4", 4, 96, tmp_path / "file"), whole)


@pytest.mark.parametrize("umask, file_mode, folder_mode", [(0o022, 0o644, 0o755), (0o002, 0o664, 0o775)])
def test_the_cache_obeys_the_umask(tiny, tmp_path, umask, file_mode, folder_mode):
    """So that a group can share a cache."""
    before = os.umask(umask)
    try:
        cached_frames(tiny.videos / "car.mp4", 2, 96, tmp_path / "cache")
    finally:
        os.umask(before)
    file, = cache_files(tmp_path / "cache")
    assert file.stat().st_mode & 0o777 == file_mode
    assert [folder.stat().st_mode & 0o777 for folder in (file.parent, tmp_path / "cache")] == [folder_mode] * 2


def test_an_unreadable_clip_leaves_nothing_in_the_cache(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    for _ in range(2):
        with pytest.raises(VideoError):
            cached_frames(tmp_path / "bad.mp4", 4, 96, tmp_path / "cache")
    with pytest.raises(VideoError):
        cached_frames(tmp_path / "none.mp4", 4, 96, tmp_path / "cache")
    assert not cache_files(tmp_path / "cache")


def _fill_cache(videos, cache, together):
    replace_file = os.replace

    def replace_together(*paths):
        together.wait(60)  # until all processes have decoded this clip and written their temporary file
        replace_file(*paths)

    dataset.os.replace = replace_together
    for clip in sorted(videos.glob("*.mp4")):
        np.testing.assert_array_equal(cached_frames(clip, 8, 96, cache), read_frames(clip, 8, 96))


def test_processes_share_a_cache(tiny, tmp_path, decodes):
    """Processes may decode one clip at the same time: each gets complete frames; one sound file per clip remains."""
    context = multiprocessing.get_context("fork")
    together = context.Barrier(3)
    arguments = (tiny.videos, tmp_path / "cache", together)
    processes = [context.Process(target=_fill_cache, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    clips = sorted(tiny.videos.glob("*.mp4"))
    assert len(cache_files(tmp_path / "cache")) == len(clips) and not list((tmp_path / "cache").rglob("*.tmp"))
    for clip in clips:
        np.testing.assert_array_equal(cached_frames(clip, 8, 96, tmp_path / "cache"), read_frames(clip, 8, 96))
    assert not decodes  # read from the cache


# ---------------------------------------------------------------------------------------------------------------------
# Clips that hang or crash the decoder

REASONS = {
    "hangs.mp4": "decoding did not finish within 2 s and was stopped",
    "crashes.mp4": "decoding crashed (SIGSEGV)",
    "exits.mp4": "decoding ended with exit code 3",
    "raises.mp4": "damaged",
}


@pytest.fixture
def bad_decoder(monkeypatch):
    """A decoder that hangs, crashes or fails on clips of these names."""
    decode = dataset.read_frames

    def read(path, *args):
        if path.name == "hangs.mp4":
            ctypes.PyDLL(None).sleep(1000)  # holds Python's lock, as decord does
        if path.name == "crashes.mp4":
            faulthandler.disable()  # pytest's would print a trace
            os.kill(os.getpid(), signal.SIGSEGV)
        if path.name == "exits.mp4":
            os._exit(3)
        if path.name == "raises.mp4":
            raise VideoError(path, "damaged")
        return decode(path, *args)

    monkeypatch.setattr(dataset, "read_frames", read)
    monkeypatch.setattr(dataset, "DECODE_TIMEOUT", 2.0)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", REASONS)
def test_a_clip_that_hangs_or_crashes_the_decoder_is_named(tmp_path, bad_decoder, name, cache):
    (tmp_path / name).write_bytes(b"clip")
    begin = time.monotonic()
    with pytest.raises(VideoError) as error:
        cached_frames(tmp_path / name, 4, 96, tmp_path / "cache" if cache else None)
    assert str(error.value) == f"{tmp_path / name}: {REASONS[name]}" and time.monotonic() - begin < 30
    assert not psutil.Process().children() and not cache_files(tmp_path)


def test_failed_decodings_leave_no_process_and_no_open_file(tmp_path, bad_decoder, monkeypatch):
    for name in REASONS:
        (tmp_path / name).write_bytes(b"clip")
    monkeypatch.setattr(dataset, "DECODE_TIMEOUT", 0.1)
    before = psutil.Process().num_fds()
    for _ in range(4):
        for name in REASONS:
            with pytest.raises(VideoError):
                cached_frames(tmp_path / name, 4, 96, tmp_path / "cache")
    monkeypatch.setattr(os, "fork", raise_disk_full)
    with pytest.raises(OSError, match="No space"):
        cached_frames(tmp_path / "hangs.mp4", 4, 96, None)
    assert psutil.Process().num_fds() == before and not psutil.Process().children()


def test_an_interrupted_decoding_is_ended(bad_decoder, tmp_path, monkeypatch):
    (tmp_path / "hangs.mp4").write_bytes(b"clip")
    monkeypatch.setattr(dataset, "DECODE_TIMEOUT", 60)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    begin = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            cached_frames(tmp_path / "hangs.mp4", 4, 96, None)
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert time.monotonic() - begin < 10 and not psutil.Process().children()


def test_an_error_in_the_decoding_process_is_raised_with_its_trace():
    def fail():
        raise KeyError("mine")

    class Stubborn(Exception):  # local: cannot be pickled
        pass

    def fail_stubbornly():
        raise Stubborn("mine too")

    with pytest.raises(KeyError, match="mine") as error:
        in_child(fail, 10)
    assert "in fail" in error.value.__notes__[0]
    with pytest.raises(RuntimeError, match="in fail_stubbornly(.|\n)*mine too"):
        in_child(fail_stubbornly, 10)
    assert in_child(lambda: "fine", 10) == ("fine", None)


def test_frames_of_the_decoding_process_can_be_changed(tiny):
    frames = cached_frames(tiny.videos / "car.mp4", 4, 96, None)
    assert frames.flags.writeable and np.array_equal(frames, read_frames(tiny.videos / "car.mp4", 4, 96))


def test_a_decoding_ends_without_its_parent():
    """A hung child runs no Python code and cannot notice that its parent was killed; the alarm ends it."""
    code = """
import ctypes, os, signal
from training.workers import in_child
alarm = signal.alarm
signal.alarm = lambda seconds: alarm(1 if seconds == 160 else 1000)
def hang():
    print(os.getpid(), flush=True)
    ctypes.PyDLL(None).sleep(1000)
in_child(hang, 100)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait(15)
    child.wait(15)


# ---------------------------------------------------------------------------------------------------------------------
# Dataset and collate


@pytest.fixture
def make_dataset(tiny, qwen):
    def make(entries=None, **changes):
        settings = dict(video_root=tiny.videos, num_frames=4, image_size=96, num_visual_tokens=8, max_text_tokens=200)
        return VideoInstructDataset(entries or load_entries(tiny.data), qwen, **(settings | changes))

    return make


def test_examples_hold_frames_ids_and_labels(make_dataset, qwen, tiny):
    ds = make_dataset(train=False)
    assert len(ds) == 12
    example = ds[3]
    entry = load_entries(tiny.data)[3]
    assert example["id"] == entry.id and "error" not in example
    assert example["frames"].shape == (4, 96, 96, 3) and example["frames"].dtype == torch.uint8
    assert qwen.decode([i for i in example["labels"] if i != IGNORE_INDEX]) == entry.captions[0] + "<|im_end|>"
    np.testing.assert_array_equal(example["frames"], read_frames(tiny.videos / entry.video, 4, 96))


def test_variant_and_augmentation_depend_on_seed_epoch_and_id_alone(make_dataset, tiny, tmp_path):
    make_dataset = functools.partial(make_dataset, cache_dir=tmp_path)
    variants = tuple(f"A red car number {i} stops." for i in range(20))
    entries = [replace(e, captions=variants) for e in load_entries(tiny.data)]
    one, other = make_dataset(entries), make_dataset(entries[::-1])
    for epoch in range(3):
        a, b = one[(epoch, 2)], other[(epoch, len(entries) - 3)]
        assert a["id"] == b["id"] and a["labels"] == b["labels"] and torch.equal(a["frames"], b["frames"])
    assert len({tuple(one[(epoch, 2)]["labels"]) for epoch in range(12)}) > 4
    assert not torch.equal(one[(0, 2)]["frames"], one[(1, 2)]["frames"])
    plain = make_dataset(entries, augment=False)
    assert torch.equal(plain[(0, 2)]["frames"], plain[(1, 2)]["frames"])
    assert len({tuple(make_dataset(entries, seed=s)[2]["labels"]) for s in range(12)}) > 4
    calm = make_dataset(entries, train=False)
    assert calm[(0, 2)]["labels"] == calm[(5, 2)]["labels"] and torch.equal(calm[0]["frames"], calm[(9, 0)]["frames"])


def test_a_shared_row_holds_all_entries_of_its_clip(make_dataset, qwen, tiny, tmp_path):
    entries = load_entries(tiny.data)
    alone = replace(entries[0], id="alone#copilot", video=entries[-1].video)
    entries = [*entries[:-2], alone]  # five clips with two entries each, and one with one
    shared, plain = (make_dataset(entries, shared_prefix=on, seed=3, cache_dir=tmp_path) for on in (True, False))
    assert len(plain) == 11 and len(shared) == 6
    by_id = {plain[(2, i)]["id"]: plain[(2, i)] for i in range(11)}
    prompt = encode_prompt(qwen, "", 8)
    prefix = len(prompt) - prompt[::-1].index(placeholder_id(qwen))
    for row in (shared[(2, i)] for i in range(6)):
        parts = [by_id[name] for name in row["id"].split(", ")]
        owner = torch.tensor(row["owner"])
        assert (owner[:prefix] == PREFIX).all() and (owner == PREFIX).sum() == prefix
        assert torch.equal(row["frames"], parts[0]["frames"])  # augmented as the first is
        for k, part in enumerate(parts):
            for key in ("input_ids", "labels"):
                own = [value for value, who in zip(row[key], row["owner"], strict=True) if who in (PREFIX, k)]
                assert own == part[key]
        assert owner.max() == len(parts) - 1
    batch = collate([shared[0], shared[5]], qwen.pad_token_id)
    assert (batch["owner"] == NOBODY).equal(batch["attention_mask"] == 0) and (batch["owner"] == NOBODY).any()


def test_a_shared_row_counts_its_cut_answers_and_fails_as_a_whole(make_dataset, tiny, qwen):
    short = load_entries(tiny.data)[1]
    long = replace(short, id="long#copilot", captions=("The car stops at the light. " * 30,))
    lost = [replace(entry, id=f"lost {entry.id}", video="lost.mp4") for entry in (short, long)]
    ds = make_dataset([short, long, replace(long, id="again"), *lost], max_text_tokens=120, shared_prefix=True)
    assert [row["cut"] for row in (ds[0], ds[1])] == [2, 0] and "lost.mp4" in ds[1]["error"]
    assert set(ds[1]["labels"]) == {IGNORE_INDEX} and ds[1]["id"] == ", ".join(entry.id for entry in lost)
    batch = collate([ds[0], ds[1]], qwen.pad_token_id)
    assert batch["num_cut"] == 2 and len(batch["ids"]) == 1 and len(batch["errors"]) == 1


def test_training_asks_the_drawn_wording_and_evaluation_the_standard_question(make_dataset, qwen, tiny, tmp_path):
    entries = load_entries(tiny.data)
    asked = replace(entries[1], id="asked#copilot", question="And now?")
    sets = {train: make_dataset([*entries, asked], seed=5, train=train, cache_dir=tmp_path) for train in (True, False)}
    for epoch in range(3):
        for number, entry in enumerate(sets[True].entries):
            for train, question in ((True, draw_question(entry, 5, epoch)), (False, entry.question)):
                example = sets[train][(epoch, number)]
                prompt = [i for i, label in zip(*map(example.get, ("input_ids", "labels")), strict=True)
                          if label == IGNORE_INDEX]
                assert prompt == encode_prompt(qwen, question, sets[train].num_visual_tokens)


def test_augmentation_keeps_the_facts():
    import random

    frames = np.zeros((3, 64, 64, 3), np.uint8)
    frames[:, :, :32] = (200, 30, 30)  # a red left half
    frames[:, :, 32:] = (30, 30, 200)
    for seed in range(50):
        changed = dataset.augment(frames, random.Random(seed)).astype(int)
        assert changed.dtype == int and (changed[0] == changed[1]).all()
        assert (changed[:, :, :32, 0] > changed[:, :, :32, 2] + 100).all()  # red stays red, left stays left
        assert (changed[:, :, 32:, 2] > changed[:, :, 32:, 0] + 100).all()
        assert np.abs(changed - frames).max() <= 50


def test_a_broken_clip_is_reported_and_never_replaced(make_dataset, tiny, tmp_path, qwen):
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "car.mp4").write_bytes((tiny.videos / "car.mp4").read_bytes())
    (videos / "bus.mp4").write_bytes(b"no clip")
    ds = make_dataset(video_root=videos)
    good, bad, missing = ds[0], ds[2], ds[4]
    assert bad["id"] == "bus#microscope" and bad["error"] == f"{videos / 'bus.mp4'}: not a readable video"
    assert missing["error"].endswith("walk.mp4: no such file")
    batch = collate([bad, good, missing], qwen.pad_token_id)
    assert batch["ids"] == ["car#microscope"] and batch["errors"] == [bad["error"], missing["error"]]
    assert torch.equal(batch["frames"][0], good["frames"])
    batch = collate([bad, missing], qwen.pad_token_id)
    assert batch["frames"].shape == (1, 4, 96, 96, 3) and len(batch["errors"]) == 2
    assert (batch["labels"] == IGNORE_INDEX).all()
    assert (batch["input_ids"] == placeholder_id(qwen)).sum() == 8


def test_answers_that_were_cut_are_counted(make_dataset, tiny, qwen, tmp_path):
    short = load_entries(tiny.data)[1]
    long = replace(short, id="long#copilot", captions=("The car stops at the light. " * 30,))
    lost = replace(long, id="lost#copilot", video="lost.mp4")
    ds = make_dataset([short, long, lost, long], max_text_tokens=120)
    assert [ds[i]["cut"] for i in range(4)] == [False, True, False, True]
    batch = collate([ds[i] for i in range(4)], qwen.pad_token_id)
    assert batch["num_cut"] == 2 and len(batch["ids"]) == 3
    assert collate([ds[2]], qwen.pad_token_id)["num_cut"] == 0
    assert set(encode_example(qwen, long.question, long.captions[0], 1, 60)) == {"input_ids", "labels"}


def test_collate_pads_to_the_longest_and_masks_by_position(make_dataset, tiny, llama):
    ds = make_dataset()
    ds.tokenizer = llama  # pads with its eos
    examples = [ds[i] for i in range(4)]
    batch = collate(examples, llama.pad_token_id)
    lengths = [len(e["input_ids"]) for e in examples]
    assert batch["input_ids"].shape == batch["labels"].shape == (4, max(lengths)) and len(set(lengths)) > 1
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        assert batch["input_ids"][row, :length].tolist() == example["input_ids"]
        assert batch["labels"][row, :length].tolist() == example["labels"]
        assert (batch["input_ids"][row, length:] == llama.pad_token_id).all()
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
        assert batch["labels"][row, length - 1] == llama.eos_token_id
        assert batch["attention_mask"][row, :length].all()


def test_a_loader_with_workers_gives_every_example(make_dataset, qwen):
    ds = make_dataset()
    order = [(0, index) for index in np.random.default_rng(0).permutation(12).tolist()]
    loader = torch.utils.data.DataLoader(
        ds, batch_size=4, sampler=order, num_workers=2, collate_fn=lambda rows: collate(rows, qwen.pad_token_id)
    )
    batches = list(loader)
    ids = [i for batch in batches for i in batch["ids"]]
    assert ids == [ds.entries[index].id for _, index in order]
    assert torch.equal(batches[0]["frames"][0], ds[order[0]]["frames"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_names_clips_that_hang_or_crash_the_decoder(make_dataset, qwen, tiny, tmp_path, bad_decoder,
                                                            num_workers):
    for name in ("hangs.mp4", "crashes.mp4", "raises.mp4", "exits.mp4"):
        shutil.copy(tiny.videos / "car.mp4", tmp_path / name)
    shutil.copy(tiny.videos / "bus.mp4", tmp_path / "bus.mp4")
    ds = make_dataset([both(name)[0] for name in (*REASONS, "bus.mp4")], video_root=tmp_path)
    loader = torch.utils.data.DataLoader(ds, batch_size=5, num_workers=num_workers,
                                         collate_fn=lambda rows: collate(rows, qwen.pad_token_id))
    batch, = list(loader)
    assert batch["ids"] == ["bus#microscope"]
    assert batch["errors"] == [f"{tmp_path / name}: {reason}" for name, reason in REASONS.items()]


# ---- one tensor per clip ---------------------------------------------------------------------------------------------


def brightness(frames):
    """A model's frozen part that is easy to check: [1, T, S, S, 3] -> [1, T]."""
    return frames.float().mean((2, 3, 4))


def test_tensors_of_clips_are_made_once_and_again_where_clip_or_maker_changed(tiny, tmp_path):
    shutil.copytree(tiny.videos, tmp_path / "videos")
    clip, calls = tmp_path / "videos" / "car.mp4", []

    def maker(made_by="tower 1", shape=(4,)):
        return ClipTensors(tmp_path / "cache", made_by, shape, tmp_path / "videos", 4, 96, None)

    def compute(frames):
        calls.append(frames.shape)
        return brightness(frames)

    first = maker().make("car.mp4", compute)
    expected = torch.from_numpy(read_frames(clip, 4, 96)[None])
    assert torch.equal(first, brightness(expected)[0]) and calls == [(1, 4, 96, 96, 3)]
    assert torch.equal(maker().make("car.mp4", compute), first) and len(calls) == 1
    assert torch.equal(maker().read("car.mp4"), first)
    maker("tower 2").make("car.mp4", compute)
    assert len(calls) == 2
    os.utime(clip, (1, 1))
    with pytest.raises(VideoError, match="holds nothing for it: unreadable at the start, or changed since"):
        maker().read("car.mp4")
    maker().make("car.mp4", compute)
    assert len(calls) == 3
    assert not list((tmp_path / "cache").rglob(".*"))


def test_damaged_tensors_are_made_again_and_clips_that_cannot_be_read_have_none(tiny, tmp_path):
    tensors = ClipTensors(tmp_path / "cache", "tower", (4,), tiny.videos, 4, 96, None)
    whole = tensors.make("car.mp4", brightness)
    file, = (tmp_path / "cache").rglob("*.safetensors")
    for damage in (b"", file.read_bytes()[:40], safetensors.torch.save({"tensor": torch.zeros(3)})):
        file.write_bytes(damage)
        with pytest.raises(VideoError, match="holds nothing for it"):
            tensors.read("car.mp4")
        assert torch.equal(tensors.make("car.mp4", brightness), whole)
    for use in (tensors.read, lambda video: tensors.make(video, brightness)):
        with pytest.raises(VideoError, match="no such file"):
            use("none.mp4")


def test_bfloat16_survives_the_file(tiny, tmp_path):
    tensors = ClipTensors(tmp_path / "cache", "tower", (4,), tiny.videos, 4, 96, None)
    made = tensors.make("car.mp4", lambda frames: brightness(frames).bfloat16())
    assert made.dtype == torch.bfloat16 and torch.equal(tensors.read("car.mp4"), made)
