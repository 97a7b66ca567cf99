"""check_dataset.py: every planted fault is reported under its code; odd but sound data passes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT, images_of, write_clip
from test_dataset import set_rotation, write_ramp
from transformers import AutoTokenizer

import check_dataset
import dataset
from dataset import IGNORE_INDEX, MODE_TABLE, MODES, Mode, load_entries, split_by_video
from training import workers
from training.workers import in_processes

LONG = "The car ahead stops at the light while a pedestrian crosses the road and the truck waits behind it. " * 6


@pytest.fixture
def check(tiny, tmp_path):
    """Run the check on rows; returns (exit code, report)."""

    def run(rows, *flags, video_root=tiny.videos, llm=tiny.llm, vision=tiny.vision):
        data = tmp_path / "rows.json"
        data.write_text(json.dumps(rows), encoding="utf-8")
        code = check_dataset.main([
            "--data", data, "--video_root", video_root, "--output_dir", tmp_path / "out", "--language_model", llm,
            "--vision_model", vision, "--num_frames", 2, "--num_val_videos", 2, "--num_workers", 2, "--examples", 1,
            "--frame_cache", tmp_path / "cache", *flags,
        ])
        return code, json.loads((tmp_path / "out" / "check_dataset" / "report.json").read_text(encoding="utf-8"))

    return run


def codes(report, level=None):
    return Counter(p["code"] for p in report["problems"] if level in (None, p["level"]))


def row(video, text=None, mode="copilot", **more):
    number = sum(map(ord, video))
    return {"video": video, "q": MODES[mode], "a": text or f"A car number {number} stops.", **more}


def both(video, text="A car"):
    return {"video": video, "microscope": [f"{text} stops in {video}."], "copilot": [f"{text}, {video}."]}


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def test_faults_of_rows_and_texts_are_found(tiny, check):
    names = sorted(clip.name for clip in tiny.videos.glob("*.mp4"))
    car = names[0]
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    faults = [
        ({"clip": "x", "caption": "y"}, "unknown_format"),
        (["x"], "unknown_format"),
        ({"video": car, "conversations": turns * 2}, "multi_turn"),
        ({"video": car, "q": "What?", "a": "A car."}, "unknown_mode"),
        ({"video": car, "q": "", "a": "A car."}, "empty_question"),
        (row(car, " "), "empty_caption"),
        ({"video": car, "copilot": []}, "empty_caption"),
        ({"video": car, "copilot": [None]}, "empty_caption"),
        ({"video": car, "copilot": ["bad \ufffd"]}, "bad_unicode"),
        ({"video": car, "copilot": ["bad \ud800"]}, "bad_unicode"),
        (row(car, "A car.<|im_end|>"), "control_token"),
        (row(car, "<think>A car."), "control_token"),
        ({"video": car, "q": "What <|video_pad|>?", "mode": "copilot", "a": "A car."}, "control_token"),
        (row("../videos/../../x.mp4"), "path_escape"),
        (row("/etc/passwd"), "path_escape"),
        (row("~/x.mp4"), "path_escape"),
        (row("https://host/x.mp4"), "path_escape"),
        (row(names[1], "Same text."), None),
        (row(names[1], "Same text."), "duplicate_entry"),
        ({"video": names[2], "q": MODES["microscope"], "mode": "copilot", "a": "A bus."}, "ambiguous_prompt"),
        ({"video": car, "q": "Why? " * 99, "mode": "copilot", "a": "Because."}, "prompt_too_long"),
    ]
    rows = [both(name) for name in names] + [fault for fault, _ in faults]
    exit_code, report = check(rows, "--no-video", "--max_text_tokens", 150)
    assert exit_code == 1 and report["ok"] is False
    errors = [p for p in report["problems"] if p["level"] == "error"]
    for number, (fault, code) in enumerate(faults, start=len(names) + 1):
        where = [p["code"] for p in errors if p["where"].rstrip(")").endswith(f"rows.json row {number}")]
        assert where == ([code] if code else []), (number, fault)
    assert codes(report, "error") == Counter(code for _, code in faults if code)
    assert report["counts"]["errors"] == len(errors) and set(codes(report)) <= set(check_dataset.CODES)


def test_control_tokens_are_found_in_every_caption_and_in_questions_of_no_mode(tiny, check):
    rows = [both(clip.name) for clip in tiny.videos.glob("*.mp4")]
    car = rows[0]["video"]
    rows.append({"video": car, "q": "What <|video_pad|>?", "a": "A car."})
    rows.append({"video": car, "q": "What?", "mode": "poem", "captions": ["A car.", "A <|im_end|>."]})
    rows.append({"video": car, "q": "What?", "captions": ["A car.", ""]})
    rows.append({"video": car, "copilot": ["A.", "B.", "C <|im_end|>."]})
    exit_code, report = check(rows, "--no-video")
    found = [(p["code"], p["message"]) for p in report["problems"] if p["level"] == "error"]
    assert exit_code == 1 and [code for code, _ in found] == [
        "unknown_mode", "control_token", "unknown_mode", "control_token", "unknown_mode", "empty_caption",
        "control_token"]
    assert [text for code, text in found if code == "control_token"] == [
        "the question contains <|video_pad|>", "caption 2 contains <|im_end|>", "caption 3 contains <|im_end|>"]


def test_broken_json_is_reported_with_its_line(check, tmp_path):
    one = json.dumps([row("a.mp4")], indent=1)
    for text, place in ((f"{one}\n{one}", f"line {one.count(chr(10)) + 2} column 1"),
                        (f"{one}\n# the end", f"line {one.count(chr(10)) + 2} column 1"),
                        (one.replace('"a"', "a"), "line 5 column 3")):
        (tmp_path / "broken.json").write_text(text)
        exit_code, report = check([], "--no-video", "--data", tmp_path / "broken.json")
        problem, = [p for p in report["problems"] if p["level"] == "error"]
        assert exit_code == 1 and problem["code"] == "unknown_format" and place in problem["message"]


def test_a_file_that_is_not_json_is_a_problem_of_the_data(check, tmp_path):
    exit_code, report = check([], "--no-video")
    assert exit_code == 1 and codes(report) == {"no_rows": 1}
    (tmp_path / "broken.json").write_text('[{"video": ')
    exit_code, report = check([], "--no-video", "--data", tmp_path / "broken.json")
    assert exit_code == 1 and codes(report)["unknown_format"] == 1
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(row("a.mp4", "caf_")).replace("_", "é").encode("latin-1"))
    exit_code, report = check([], "--no-video", "--data", tmp_path / "latin.jsonl")
    assert exit_code == 1 and codes(report)["bad_unicode"] == 1


def test_faults_of_clips_are_found(tiny, check, tmp_path, monkeypatch):
    videos = tmp_path / "videos"
    shutil.copytree(tiny.videos, videos)
    write_clip(videos / "whole.mp4", num_frames=120, codec="libx264")
    whole = (videos / "whole.mp4").read_bytes()
    middle = len(whole) // 2
    noise = random.Random(0).randbytes(len(whole) // 6)
    broken = {
        "empty.mp4": b"", "text.mp4": b"not a clip", "truncated.mp4": whole[:middle],
        "noise.mp4": whole[: middle - len(noise) // 2] + noise + whole[middle + len(noise) // 2 :],
        "hangs.mp4": whole, "crashes.mp4": whole,
    }
    for name, content in broken.items():
        (videos / name).write_bytes(content)
    (videos / "folder.mp4").mkdir()
    (tmp_path / "outside.mp4").write_bytes(whole)
    (videos / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    real = check_dataset.check_clip

    def check_clip(path, *args):
        if path.name == "hangs.mp4":
            time.sleep(1000)
        if path.name == "crashes.mp4":
            os._exit(139)  # like a segmentation fault in the decoder
        return real(path, *args)

    monkeypatch.setattr(check_dataset, "check_clip", check_clip)
    names = [*broken, "folder.mp4", "link.mp4", "nowhere.mp4", *(c.name for c in tiny.videos.glob("*.mp4"))]
    sound = tmp_path / "sound" / "rows.jsonl"
    exit_code, report = check([both(name) for name in names], "--clip_timeout", 5, "--drop_bad", sound,
                              video_root=videos)
    assert exit_code == 1
    found = {p["where"].split(" ")[0]: p["code"] for p in report["problems"] if p["level"] == "error"}
    link = found.pop("rows.json")
    assert link == "path_escape"
    assert found == {
        "empty.mp4": "corrupt_video", "text.mp4": "corrupt_video", "truncated.mp4": "corrupt_video",
        "noise.mp4": "corrupt_video", "crashes.mp4": "corrupt_video", "hangs.mp4": "hung_video",
        "folder.mp4": "missing_video", "nowhere.mp4": "missing_video",
    }
    assert report["counts"]["sound_clips"] == 6 and report["counts"]["clips"] == 14
    kept = load_entries(sound)
    assert {e.video for e in kept} == {c.name for c in tiny.videos.glob("*.mp4")} and len(kept) == 12


def test_damage_that_decord_would_hide_is_found(tiny, check, tmp_path):
    """Packets without a picture: decord repeats the previous frame unless its fault tolerance is set."""
    import av

    videos = tmp_path / "videos"
    shutil.copytree(tiny.videos, videos)
    with av.open(str(videos / "lost.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        packets = []
        for i in range(30):
            packets += stream.encode(av.VideoFrame.from_ndarray(np.full((180, 320, 3), 8 * i, np.uint8), "rgb24"))
        packets += stream.encode()
        end, base = packets[-1].pts, packets[-1].time_base
        for packet in packets:
            out.mux(packet)
        for k in range(1, 16):
            packet = av.Packet(bytes.fromhex("000001b65000"))  # a picture header that says "nothing coded"
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, base, end + k, end + k
            out.mux(packet)
    rows = [both(clip.name) for clip in videos.glob("*.mp4")]
    exit_code, report = check(rows, video_root=videos)
    errors = [p["where"].split()[0] for p in report["problems"] if p["level"] == "error"]
    assert exit_code == 1 and errors == ["lost.mp4"]


def seed_that_parts(rows, one, other, tmp_path):
    data = tmp_path / "probe.json"
    data.write_text(json.dumps(rows))
    for seed in range(100):
        val = {e.video for e in split_by_video(load_entries(data), 2, seed)[1]}
        if (one in val) != (other in val):
            return seed


def seed_that_joins(rows, one, other, tmp_path):
    data = tmp_path / "probe.json"
    data.write_text(json.dumps(rows))
    for seed in range(100):
        val = {e.video for e in split_by_video(load_entries(data), 2, seed)[1]}
        if one not in val and other not in val:
            return seed


def test_leaks_across_the_split_are_found(tiny, check, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(tiny.videos, videos)
    (videos / "sub").mkdir()
    shutil.copy(videos / "car.mp4", videos / "sub" / "car.mp4")  # the same clip under another path
    write_ramp(videos / "sub" / "bus.mp4", np.arange(20) / 8)  # another clip of the same name
    names = [str(clip.relative_to(videos)) for clip in sorted(videos.rglob("*.mp4"))]
    rows = [both(name) for name in names]
    seed = seed_that_parts(rows, "car.mp4", "sub/car.mp4", tmp_path)
    exit_code, report = check(rows, "--split_seed", seed, video_root=videos)
    leak, = [p for p in report["problems"] if p["level"] == "error"]
    assert exit_code == 1 and leak["code"] == "split_leak" and leak["where"].split()[0] == "sub/car.mp4"
    assert "the same file as car.mp4 (rows.json row 2)" in leak["message"] and "duplicate_clip" not in codes(report)
    seed = seed_that_parts(rows, "bus.mp4", "sub/bus.mp4", tmp_path)
    for flags in ([], ["--no-video"]):  # their name says nothing
        report = check(rows, "--split_seed", seed, *flags, video_root=videos)[1]
        assert not [p for p in report["problems"] if "bus" in p["where"] and p["code"] != "caption_length"]

    rows = [both(name) for name in names if "sub" not in name]
    rows[0]["microscope"] = rows[1]["microscope"] = [LONG]
    rows[2]["copilot"] = rows[3]["copilot"] = ["Car stops."]
    for one, other, code in ((0, 1, "split_leak"), (2, 3, "same_caption")):
        seed = seed_that_parts(rows, rows[one]["video"], rows[other]["video"], tmp_path)
        assert code in codes(check(rows, "--split_seed", seed, "--no-video")[1])


@pytest.mark.parametrize("num_same, warned", [(2, False), (3, True)])
def test_short_captions_may_coincide_now_and_then(check, num_same, warned):
    """Of 20 held-out clips with two entries each, two short lines are 5%."""
    rows = [both(f"{i}.mp4") for i in range(60)]
    entries = [entry for row in rows for entry in dataset.parse_row(row)]
    held_out = {entry.video for entry in dataset.split_by_video(entries, 20, 42)[1]}
    trained = next(row for row in rows if row["video"] not in held_out)
    for row in [row for row in rows if row["video"] in held_out][:num_same]:
        row["copilot"] = trained["copilot"]
    report = check(rows, "--num_val_videos", 20, "--split_seed", 42, "--no-video")[1]
    assert codes(report).get("same_caption", 0) == (num_same if warned else 0)


def test_a_worker_that_its_pool_can_end_starts_no_child():
    def is_here(item):
        return workers.in_child(os.getpid, 10)[0] == os.getpid()

    for timeout, expected in ((60, True), (None, False)):
        (_, result, failure), = workers.in_processes(is_here, [1], 1, timeout=timeout)
        assert (result, failure) == (expected, None)


def test_copies_of_a_clip_are_found_by_their_whole_content(check, tmp_path):
    """Different clips of one name, size and beginning are no copies; copies under other names are."""
    videos = tmp_path / "videos"
    names = ["day/am/sub-0.mp4", "night/sub-0.mp4", *(f"{i}.mp4" for i in range(6))]
    for seed, name in enumerate(names):
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        write_clip(videos / name, seed=seed)
    content = (videos / "0.mp4").read_bytes() + bytes(1 << 20)  # decoders ignore what follows
    (videos / "0.mp4").write_bytes(content + b"one")
    (videos / "1.mp4").write_bytes(content + b"two")
    (videos / "copy.mp4").write_bytes(content + b"two")
    rows = [both(name) for name in [*names, "copy.mp4"]]
    for one, other, code in (("day/am/sub-0.mp4", "night/sub-0.mp4", None), ("0.mp4", "1.mp4", None),
                             ("1.mp4", "copy.mp4", "split_leak")):
        seed = seed_that_parts(rows, one, other, tmp_path)
        report = check(rows, "--split_seed", seed, video_root=videos)[1]
        leaks = [p for p in report["problems"] if p["code"] == "split_leak"]
        if code:
            leak, = leaks
            assert leak["level"] == "error" and leak["where"].startswith(other) and one in leak["message"]
        assert all("copy.mp4" in leak["where"] for leak in leaks)
    seed = seed_that_joins(rows, "1.mp4", "copy.mp4", tmp_path)
    report = check(rows, "--split_seed", seed, video_root=videos)[1]
    assert codes(report, "error") == {} and codes(report)["duplicate_clip"] == 1


def test_a_clip_that_was_encoded_twice_is_a_warning(tiny, check, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(tiny.videos, videos)
    write_clip(videos / "car.mov", seed=0, codec="libx264")  # the scene of car.mp4
    rows = [both(clip.name) for clip in sorted(videos.iterdir())]
    seed = seed_that_parts(rows, "car.mp4", "car.mov", tmp_path)
    exit_code, report = check(rows, "--split_seed", seed, video_root=videos)
    assert exit_code == 0 and codes(report)["similar_clip"] == 1


def test_folders_of_images_are_checked_as_clips(tiny, check, tmp_path):
    videos = tmp_path / "videos"
    for clip in tiny.videos.glob("*.mp4"):
        images_of(clip, videos / clip.stem)
    names = sorted(folder.name for folder in videos.iterdir())
    exit_code, report = check([both(name) for name in names], "--build-cache", video_root=videos)
    assert exit_code == 0 and set(codes(report)) == {"small_video", "caption_length"}
    assert report["counts"]["sound_clips"] == 6 and report["counts"]["fps"]["median"] == 10
    assert len(list((tmp_path / "cache").rglob("*.frames"))) == 6
    assert "data:image/jpeg" in (tmp_path / "out" / "check_dataset" / "report.html").read_text()

    (videos / "empty").mkdir()
    (videos / "leads").mkdir()
    (videos / "leads" / "1.png").symlink_to(tiny.data)
    (videos / "car" / "000007.png").write_bytes((videos / "car" / "000007.png").read_bytes()[:99])
    (videos / "bus" / "times.txt").write_text("0\n1\n")
    exit_code, report = check([both(name) for name in [*names, "empty", "leads", "none"]], video_root=videos)
    found = {p["where"].split(" ")[0]: (p["code"], p["message"]) for p in report["problems"] if p["level"] == "error"}
    assert {where: code for where, (code, _) in found.items()} == {
        "car": "corrupt_video", "bus": "corrupt_video", "empty": "missing_video", "none": "missing_video",
        "rows.json": "path_escape"}
    assert found["car"][1].startswith("000007.png: damaged or not readable")
    assert found["bus"][1] == "times.txt line 3: 2 lines for 20 images"
    assert found["empty"][1] == f"neither a file nor a folder of images: {videos / 'empty'}"


def test_copies_of_a_folder_of_images_are_found_whatever_names_they_have(tiny, check, tmp_path):
    videos = tmp_path / "videos"
    for clip in tiny.videos.glob("*.mp4"):
        images_of(clip, videos / clip.stem, compress_level=0)  # so that all images have one size in bytes
    images_of(tiny.videos / "car.mp4", videos / "copy.1", name="frame-{}.png", start=100, compress_level=0)
    (videos / "copy.1" / "fps.txt").write_text("5")
    shutil.copytree(videos / "car", videos / "copy.2")  # one image differs behind the first: another clip
    shutil.copy(videos / "bus" / "000009.png", videos / "copy.2" / "000009.png")
    rows = [both(folder.name) for folder in sorted(videos.iterdir())]
    seed = seed_that_parts(rows, "car", "copy.1", tmp_path)
    exit_code, report = check(rows, "--split_seed", seed, video_root=videos)
    leak, = [p for p in report["problems"] if p["code"] == "split_leak"]
    assert exit_code == 1 and leak["where"].startswith("copy.1") and "the same images as car " in leak["message"]
    assert "duplicate_clip" not in codes(report)
    seed = seed_that_joins(rows, "car", "copy.1", tmp_path)
    report = check(rows, "--split_seed", seed, video_root=videos)[1]
    assert codes(report)["duplicate_clip"] == 1 and "split_leak" not in codes(report)


def test_images_of_a_video_on_the_other_side_are_a_warning(tiny, check, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(tiny.videos, videos)
    (images_of(videos / "car.mp4", videos / "more" / "car") / "fps.txt").write_text("8")
    rows = [both(name) for name in [*sorted(clip.name for clip in videos.glob("*.mp4")), "more/car"]]
    seed = seed_that_parts(rows, "car.mp4", "more/car", tmp_path)
    exit_code, report = check(rows, "--split_seed", seed, video_root=videos)
    assert exit_code == 0 and codes(report)["similar_clip"] == 1


@pytest.mark.parametrize("flags", [[], ["--no-video"]])
def test_a_path_that_is_too_long_is_a_problem_of_its_row(tiny, check, flags):
    rows = [both(clip.name) for clip in tiny.videos.glob("*.mp4")]
    for video in ("x" * 300 + ".mp4", "long/" * 1000 + "x.mp4", "é" * 200 + ".mp4"):
        exit_code, report = check([*rows, both(video)], *flags)
        problem, = [p for p in report["problems"] if p["level"] == "error"]
        assert exit_code == 1 and problem["code"] == "missing_video" and problem["where"] == "rows.json row 7"
        assert len(problem["message"]) < 200


def test_a_clip_held_out_here_but_trained_on_by_another_stage_is_found(check, tiny, tmp_path):
    names = sorted(path.name for path in tiny.videos.glob("*.mp4"))
    rows = [both(name) for name in names]
    other = tmp_path / "stage1.json"
    other.write_text(json.dumps(rows), encoding="utf-8")
    assert "split_leak" not in codes(check(rows, "--no-video", "--other_data", other)[1])  # the same split
    for suffix in (".mov", ".mp4"):  # more clips, so another split: what is held out here is trained on there
        more = [both(Path(name).stem + suffix) for name in names] + [both(f"more{i}.mp4") for i in range(40)]
        other.write_text(json.dumps(more), encoding="utf-8")
        exit_code, report = check(rows, "--no-video", "--other_data", other)
        leaks = [p for p in report["problems"] if p["code"] == "split_leak"]
        assert exit_code == 1 and leaks and all(str(other) in p["message"] for p in leaks)
    more = [both(f"elsewhere/{name}") for name in names] + [both(f"more{i}.mp4") for i in range(40)]
    other.write_text(json.dumps(more), encoding="utf-8")
    assert "split_leak" in codes(check(rows, "--no-video", "--other_data", other)[1])  # `rows` names no folders
    here = [both(f"here/{name}") for name in names]
    assert "split_leak" not in codes(check(here, "--no-video", "--other_data", other)[1])
    other.write_text("{}", encoding="utf-8")
    assert "unknown_format" in codes(check(rows, "--no-video", "--other_data", other)[1])


def test_val_data_is_checked_and_held_out(tiny, check, tmp_path):
    names = sorted(path.name for path in tiny.videos.glob("*.mp4"))
    rows = [both(name) for name in names]

    def run(train, val, *flags):
        (tmp_path / "val.json").write_text(json.dumps(val), encoding="utf-8")
        return check(train, "--val_data", tmp_path / "val.json", "--num_val_videos", 40, "--no-video", *flags)

    exit_code, report = run(rows[:4], rows[4:])
    counts = report["counts"]
    assert exit_code == 0 and (counts["train_clips"], counts["held_out_clips"], counts["rows"]) == (4, 2, 6)
    assert counts["modes"]["copilot"] == {"train": 4, "held_out": 2}
    exit_code, report = run(rows[:4], [*rows[4:], {"video": names[5], "copilot": [" "]}])
    assert exit_code == 1 and codes(report, "error") == {"empty_caption": 1}
    assert report["problems"][0]["where"] == "val.json row 3"
    other = {"video": f"./{names[1]}", "copilot": ["Other words."]}  # a clip that both files hold
    sound = tmp_path / "sound.jsonl"
    exit_code, report = run(rows[:4], [*rows[4:], other], "--drop-bad", sound)
    leak, = [p for p in report["problems"] if p["level"] == "error"]
    assert exit_code == 1 and leak["code"] == "split_leak" and leak["where"] == f"{names[1]} (rows.json row 2)"
    assert leak["message"] == "trained on, but also held out by val.json row 3"
    kept = {entry.video for entry in load_entries(sound)}
    assert kept == {names[0], names[2], names[3]}  # rows of `data` only: val_data stays as it is
    exit_code, report = run(rows[:4], [])
    assert exit_code == 1 and codes(report, "error") == {"no_rows": 1}
    (tmp_path / "stage1.json").write_text(json.dumps(rows[5:]), encoding="utf-8")  # all of it would be trained on
    exit_code, report = run(rows[:4], rows[4:], "--other_data", tmp_path / "stage1.json")
    leak, = [p for p in report["problems"] if p["level"] == "error"]
    assert leak["code"] == "split_leak" and leak["where"] == Path(names[5]).stem


RENDERERS = {  # a broken renderer, and the code under which it must be found
    "end_token_lost": lambda ids, labels, n, end, pad, video: (ids[:-1], labels[:-1]),
    "end_token_repeated": lambda ids, labels, n, end, pad, video: (ids + [end], labels + [end]),
    "prompt_supervised": lambda ids, labels, n, end, pad, video: (ids, [*labels[: n - 1], ids[n - 1], *labels[n:]]),
    "pad_supervised": lambda ids, labels, n, end, pad, video: (ids[:-1] + [pad, end], labels[:-1] + [pad, end]),
    "video_token_supervised": lambda ids, labels, n, end, pad, video: (ids, [ids[i] if ids[i] == video else label
                                                                             for i, label in enumerate(labels)]),
    "visual_token_count": lambda ids, labels, n, end, pad, video: (ids[:2] + [video] + ids[2:], labels[:2] +
                                                                   [IGNORE_INDEX] + labels[2:]),
    "nothing_supervised": lambda ids, labels, n, end, pad, video: (ids, [IGNORE_INDEX] * (len(labels) - 1) + [end]),
    "label_mismatch": lambda ids, labels, n, end, pad, video: (ids[:n] + ids[n + 1 :], labels[:n] + labels[n + 1 :]),
}


@pytest.mark.parametrize("code", RENDERERS)
def test_a_broken_renderer_is_found(tiny, monkeypatch, code):
    tokenizer = AutoTokenizer.from_pretrained(tiny.llm)
    entry = load_entries(tiny.data)[0]
    assert check_dataset.check_entry(tokenizer, entry, 8, 200)[0] == []
    encode = dataset.encode_example
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])

    def broken(*args):
        example = encode(*args)
        prompt = example["labels"].count(IGNORE_INDEX)
        ids, labels = RENDERERS[code](example["input_ids"], example["labels"], prompt, end, pad,
                                      dataset.placeholder_id(tokenizer))
        return {"input_ids": ids, "labels": labels}

    monkeypatch.setattr(dataset, "encode_example", broken)
    problems, _ = check_dataset.check_entry(tokenizer, entry, 8, 200)
    assert code in {found for level, found, _ in problems if level == "error"}


def test_a_broken_collator_is_found(tiny, check, monkeypatch):
    rows = json.loads(tiny.data.read_text())
    collate = dataset.collate

    def left(examples, pad):
        batch = collate(examples, pad)
        return batch | {"attention_mask": batch["attention_mask"].flip(1)}

    monkeypatch.setattr(dataset, "collate", left)
    exit_code, report = check(rows, "--no-video")
    assert exit_code == 1 and "batch_broken" in codes(report, "error")


# ---------------------------------------------------------------------------------------------------------------------
# Sound data


def test_odd_but_sound_data_passes(tiny, check, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(tiny.videos, videos)
    write_ramp(videos / "one.mp4", [0])
    write_ramp(videos / "short.mp4", [0, 0.2, 0.4])
    write_ramp(videos / "uneven.mp4", [*np.arange(0, 1, 0.05), *np.arange(1, 6, 1.0)])
    write_ramp(videos / "turned.mp4", np.arange(20) / 8)
    set_rotation(videos / "turned.mp4", 90)
    nfd = unicodedata.normalize("NFD", "café 🚗.mp4")
    shutil.copy(videos / "car.mp4", videos / nfd)
    write_clip(videos / "00721168-56efa5c2.mov", num_frames=16, seed=9)
    rows = [both(str(clip.relative_to(videos)), "Naïve “user” at the café, assistant 🚗") for clip in videos.iterdir()]
    rows[0]["copilot"] = ["Twice.", "Twice."]
    rows.append({"video": "one.mp4", "q": MODES["copilot"], "captions": ["Another text."], "a": "An older one."})
    exit_code, report = check(rows, "--num_frames", 4, video_root=videos)
    assert exit_code == 0 and report["ok"] is True and report["counts"]["errors"] == 0
    named = {(p["code"], p["where"].split(".mp4")[0].split(".mov")[0]) for p in report["problems"]}
    assert {("short_video", "one"), ("short_video", "short"), ("variable_frame_rate", "uneven"),
            ("portrait_video", "turned"), ("odd_duration", "00721168-56efa5c2")} <= named
    assert {"small_video", "duplicate_clip", "repeated_caption", "answer_ignored", "repeated_id",
            "caption_length"} <= set(codes(report))
    assert check(rows, "--num_frames", 4, "--strict", "--no-video")[0] == 1


def test_modes_and_split_are_counted(tiny, check):
    rows = [{"video": clip.name, "copilot": ["A car."]} for clip in tiny.videos.glob("*.mp4")]
    exit_code, report = check(rows, "--no-video")
    assert exit_code == 0 and codes(report)["mode_missing"] == 1
    assert report["counts"]["modes"] == {"microscope": {"train": 0, "held_out": 0},
                                         "copilot": {"train": 4, "held_out": 2}}
    exit_code, report = check(rows, "--no-video", "--num_val_videos", 40)
    assert exit_code == 0 and codes(report)["split_too_small"] == 1


def test_cut_captions_are_counted_and_keep_their_end(tiny, check):
    rows = [both(clip.name) for clip in tiny.videos.glob("*.mp4")]
    rows[3]["microscope"] = [LONG]
    exit_code, report = check(rows, "--no-video", "--max_text_tokens", 120)
    tokens = report["counts"]["text_tokens"]
    assert exit_code == 0 and codes(report)["caption_cut"] == 1 == tokens["cut"]
    assert tokens["max_text_tokens_that_keeps_99_percent"] == tokens["max"] > 120
    assert "caption_cut" not in codes(check(rows, "--no-video", "--max_text_tokens", int(tokens["max"]))[1])


def test_modes_come_from_the_table(tiny, check, monkeypatch, tmp_path):
    monkeypatch.setitem(MODE_TABLE, "hazards", Mode("List the hazards.", wordings=("Dangers?",), word_range=(1, 3)))
    monkeypatch.setitem(MODES, "hazards", "List the hazards.")
    rows = [both(clip.name) for clip in tiny.videos.glob("*.mp4")]
    assert [p["message"] for p in check(rows, "--no-video")[1]["problems"] if p["code"] == "mode_missing"] == [
        "no hazards entries"]
    for line in rows:
        line["hazards"] = [f"A child in {line['video']}."]
    rows[0]["hazards"] = ["A child runs behind the bus."]
    exit_code, report = check(rows, "--no-video")
    assert exit_code == 0 and report["counts"]["modes"]["hazards"] == {"train": 4, "held_out": 2}
    lengths = {p["where"]: p["message"] for p in report["problems"] if p["code"] == "caption_length"}
    assert lengths["6 of 6 hazards captions"] == "4 to 6 words, expected 1 to 3"
    assert "hazards" in (tmp_path / "out" / "check_dataset" / "report.html").read_text(encoding="utf-8")
    rows.append({"video": rows[0]["video"], "q": "Dangers?", "mode": "copilot", "a": "None."})
    assert codes(check(rows, "--no-video")[1], "error") == {"ambiguous_prompt": 1}
    rows.pop()
    config = tmp_path / "check.yaml"
    config.write_text("word_range: {hazards: [1, 9], copilot: [1, 9], microscope: [1, 9]}")
    assert codes(check(rows, "--no-video", "--config", config)[1]) == {}


def test_lengths_are_those_with_the_longest_wording(tiny, check, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny.llm)
    wordings = ("Well?", "What does the driver have to know about the road? " * 4, "Or?")
    monkeypatch.setitem(MODE_TABLE, "copilot", replace(MODE_TABLE["copilot"], wordings=wordings))
    rows = [{"video": clip.name, "q": "And now?", "mode": "copilot", "a": f"A car in {clip.name} stops."}
            for clip in tiny.videos.glob("*.mp4")]

    def most(question):
        texts = [dataset.encode_example(tokenizer, question, line["a"], 0, 1024) for line in rows]
        return max(len(text["input_ids"]) for text in texts)

    report = check(rows, "--no-video", "--max_text_tokens", 1024)[1]  # rows with their own question
    assert (report["counts"]["own_questions"], report["counts"]["text_tokens"]["max"]) == (6, most("And now?"))
    for line in rows:
        line["q"] = MODES["copilot"]
    limit = most(wordings[1])
    report = check(rows, "--no-video", "--max_text_tokens", limit)[1]
    assert (report["counts"]["own_questions"], report["counts"]["text_tokens"]["max"]) == (0, limit)
    assert "caption_cut" not in codes(report) and limit > most(MODES["copilot"]) + 50
    assert codes(check(rows, "--no-video", "--max_text_tokens", limit - 1)[1])["caption_cut"] >= 1


def test_control_tokens_in_wordings_are_errors_where_they_are_asked(tiny, check, monkeypatch):
    wordings = ("Well <|im_end|>?", "Or?")
    monkeypatch.setitem(MODE_TABLE, "copilot", replace(MODE_TABLE["copilot"], wordings=wordings))
    rows = [both(clip.name) for clip in tiny.videos.glob("*.mp4")]
    exit_code, report = check(rows, "--no-video")
    found = [problem for problem in report["problems"] if problem["level"] == "error"]
    assert exit_code == 1 and [(p["code"], p["where"], p["message"]) for p in found] == [
        ("control_token", "dataset.MODE_TABLE, copilot", "'Well <|im_end|>?' contains <|im_end|>")]
    for row in rows:
        row |= {"q": "And now?", "mode": "copilot", "a": row.pop("copilot")[0]}
        del row["microscope"]
    assert "control_token" not in codes(check(rows, "--no-video")[1])


def test_the_real_captions_pass(shared, check, tiny):
    data, tokenizer = shared / "bdd_captions_300.json", shared / "qwen3_tokenizer"
    exit_code, report = check([], "--data", data, "--no-video", "--num_val_videos", 40, "--num_frames", 16,
                              "--max_text_tokens", 1024, llm=tokenizer, vision="google/siglip2-so400m-patch14-384")
    tokens = report["counts"]["text_tokens"]
    assert exit_code == 0 and codes(report) == {"mode_missing": 1}
    assert 0.18 < tokens["share_over_512"] < 0.3 and tokens["cut"] == 0
    assert 700 < tokens["max_text_tokens_that_keeps_99_percent"] < 760
    assert report["counts"]["held_out_clips"] == 40 and report["counts"]["rows"] == 300


# ---------------------------------------------------------------------------------------------------------------------
# Usage, cache, reports


@pytest.mark.parametrize("flags, text", [
    (["--data", "nowhere.json"], "nowhere.json"),
    (["--video_root", "nowhere"], "nowhere"),
    (["--language_model", "./nowhere"], "nowhere"),
    (["--sorcery", "1"], "sorcery"),
    (["--num_frames", "many"], "num_frames"),
    (["--build_cache", "--no_video"], "exclude each other"),
    (["--clip_timeout", "0"], "clip_timeout"),
    (["--val_data", "nowhere.json"], "val_data: no file or folder nowhere.json"),
    (["--other_data", "nowhere.json"], "other_data: no file or folder nowhere.json"),
    (["--default_mode", "poem"], "default_mode: no mode 'poem'; modes are microscope, copilot"),
    (["--pooling", "5"], "vision_model: "),
])
def test_usage_errors_exit_2(tiny, check, capsys, flags, text):
    with pytest.raises(SystemExit) as error:
        check(json.loads(tiny.data.read_text()), *flags)
    assert error.value.code == 2 and text in capsys.readouterr().err


def test_a_data_file_is_never_overwritten(tiny, check, tmp_path, capsys):
    rows = json.loads(tiny.data.read_text())
    for flags in (["--drop-bad", tmp_path / "rows.json"], ["--drop-bad", tiny.data, "--val_data", tiny.data]):
        with pytest.raises(SystemExit) as error:
            check(rows, *flags)
        assert error.value.code == 2 and "would be overwritten" in capsys.readouterr().err


def test_all_missing_inputs_are_in_one_message(check, capsys):
    with pytest.raises(SystemExit):
        check([], "--data", "none.json", "--other_data", "other.json", video_root="nowhere", llm="./no_model")
    message = capsys.readouterr().err
    assert all(name in message for name in ("4 problems", "none.json", "other.json", "nowhere", "no_model"))


def test_help_and_mistyped_flags_are_answered_before_the_slow_imports():
    code = ("import runpy, sys\nsys.argv = ['check_dataset.py', *sys.argv[1:]]\n"
            "try:\n    runpy.run_path('check_dataset.py', run_name='__main__')\n"
            "finally:\n    assert 'torch' not in sys.modules and 'pebble' not in sys.modules")
    for flag, status, text in (("--help", 0, "--clip_timeout"), ("--sorcery", 2, "sorcery")):
        done = subprocess.run([sys.executable, "-c", code, flag], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status and text in done.stdout + done.stderr, done.stderr


def test_a_tokenizer_without_a_chat_template_is_refused(tiny, check, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny.llm)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(SystemExit) as error:
        check(json.loads(tiny.data.read_text()), "--no-video", llm=tmp_path / "plain")
    assert error.value.code == 2 and "no chat template" in capsys.readouterr().err


def test_build_cache_decodes_every_clip_once(tiny, check, tmp_path, monkeypatch):
    rows = json.loads(tiny.data.read_text())
    exit_code, report = check(rows, "--build-cache")
    assert exit_code == 0 and len(list((tmp_path / "cache").rglob("*.frames"))) == 6
    monkeypatch.setattr(dataset, "read_frames", None)
    for clip in tiny.videos.glob("*.mp4"):
        assert dataset.cached_frames(clip, 2, 96, tmp_path / "cache").shape == (2, 96, 96, 3)


def test_a_cache_that_cannot_be_written_is_one_error_and_no_fault_of_the_clips(tiny, check, tmp_path):
    rows = json.loads(tiny.data.read_text())
    (tmp_path / "cache").write_text("a file where the folder should be")
    exit_code, report = check(rows, "--build-cache", "--drop-bad", tmp_path / "sound.jsonl")
    assert exit_code == 1
    problem, = [problem for problem in report["problems"] if problem["level"] == "error"]
    assert (problem["code"], problem["where"]) == ("cache_not_written", "6 clips")
    assert problem["message"].endswith("cache: Not a directory")
    assert len((tmp_path / "sound.jsonl").read_text().splitlines()) == len(rows)


def test_reports_hold_counts_problems_and_coloured_tokens(tiny, check, tmp_path, capsys):
    rows = [both(clip.name, "A <b>car</b>") for clip in tiny.videos.glob("*.mp4")]
    rows += [{"video": f"lost_{i}.mp4", "copilot": [f"Car {i}."]} for i in range(30)]
    _, report = check(rows, "--json", tmp_path / "sub" / "copy.json")
    assert json.loads((tmp_path / "sub" / "copy.json").read_text()) == report
    assert set(report) == {"ok", "counts", "problems"}
    assert set(report["problems"][0]) == {"level", "code", "where", "message"}
    page = (tmp_path / "out" / "check_dataset" / "report.html").read_text(encoding="utf-8")
    assert page.count("tokens supervised") == 2 and page.count("data:image/jpeg;base64,") == 4
    assert "http" not in page and "<b>car" not in page and "<b>" not in page.split("What the loss sees")[1]
    assert page.count('<span class="t end">&lt;|im_end|&gt;</span>') == 2
    assert "&lt;|video_pad|&gt; × 32</span>" in page  # 2 frames x 16 tokens, folded
    assert "22 more in report.json" in page and page.count("lost_29.mp4") == 0
    out = capsys.readouterr().out
    assert "missing_video: 30" in out and "not sound" in out


def test_every_code_is_explained():
    source = open(check_dataset.__file__, encoding="utf-8").read() + open(dataset.__file__, encoding="utf-8").read()
    used = set(re.findall(r'RowError\(\s*"([a-z_]+)"', source))
    used |= set(re.findall(r'yield "([a-z_]+)"', source)) | set(re.findall(r'"(?:error|warning)", "([a-z_]+)"', source))
    used |= set(re.findall(r'"code": "([a-z_]+)"', source))
    assert used == set(check_dataset.CODES)


# ---------------------------------------------------------------------------------------------------------------------
# Worker processes


def test_workers_that_hang_or_die_are_replaced():
    def work(item):
        if item % 5 == 1:
            os._exit(139)  # like a segmentation fault in the decoder
        if item % 5 == 2:
            time.sleep(1000)
        return os.getpid(), 10 * item

    results = {item: (answer, failure) for item, answer, failure in in_processes(work, range(10), 2, timeout=1.0)}
    assert sorted(results) == list(range(10))
    for item, (answer, failure) in results.items():
        assert failure == {1: "died", 2: "hung"}.get(item % 5)
        assert answer is None if failure else (answer[0] != os.getpid() and answer[1] == 10 * item)
    assert not psutil.Process().children()


def test_an_error_in_a_worker_is_raised_with_its_trace():
    def broken(item):
        raise KeyError(f"item {item}")

    with pytest.raises(KeyError, match="item \\d") as error:
        list(in_processes(broken, range(3), 1))
    assert "in broken" in str(error.value.__cause__)
    assert not psutil.Process().children()


def test_workers_end_with_their_parent():
    """A parent killed with SIGKILL cannot clean up: idle workers must notice at once, and busy ones eventually."""
    code = """
import os, sys, time
from training.workers import in_processes
def work(item):
    os.write(1, b"%d\\n" % os.getpid())  # at once: both workers write to one pipe
    time.sleep(item)
for _ in in_processes(work, [0.01, 0.01, 2, 2], 2, timeout=60): pass
time.sleep(100)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    running = [psutil.Process(int(parent.stdout.readline())) for _ in range(4)]
    parent.kill()
    _, alive = psutil.wait_procs(set(running), timeout=15)
    assert not alive


def test_a_hung_worker_ends_without_its_parent(monkeypatch):
    """A hung worker runs no Python code and cannot notice; the alarm that was set beforehand ends it."""
    alarms = []
    monkeypatch.setattr(signal, "alarm", alarms.append)
    workers._start_worker.__globals__.update(_function=lambda item: alarms.append(item), _timeout=120.0)
    workers._work_on("decoding")
    assert alarms == [300, "decoding", 0]
