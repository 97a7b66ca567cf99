"""generate.py: several clips, folders, both modes, stretches of a clip, answers in a file, streaming."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import images_of, write_clip

import dataset
import generate
from dataset import MODES, Clip, VideoError, read_frames
from model import DriveVLM
from stage3 import receipts
from training.common import ConfigError


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """A checkpoint, and a folder with two clips and a text."""
    root = tmp_path_factory.mktemp("generate")
    model = DriveVLM.from_base(tiny.vision, tiny.llm, num_frames=2, dtype="float32", seed=1)
    model.save_checkpoint(root / "stage1", stage=1)
    (root / "clips" / "more").mkdir(parents=True)
    for name in ("car.mp4", "more/bus.mp4"):
        write_clip(root / "clips" / name, num_frames=20, seed=len(name))  # at 8 frames a second
    (root / "clips" / "notes.txt").write_text("not a clip")
    return SimpleNamespace(checkpoint=root / "stage1", clips=root / "clips")


def run(world, *flags):
    settings = [f"--checkpoint={world.checkpoint}", "--dtype=float32", "--max_new_tokens=4"]
    return generate.main([*settings, *map(str, flags)])


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_folder_is_asked_in_both_modes(world, capsys):
    assert run(world, "--video", world.clips, "--mode", "both", "--json") == 0
    rows = rows_of(capsys.readouterr().out)
    assert [(row["video"], row["mode"]) for row in rows] == [
        (str(world.clips / name), mode) for name in ("car.mp4", "more/bus.mp4") for mode in MODES]
    assert all(row["question"] == MODES[row["mode"]] and 0 < row["tokens"] <= 4 for row in rows)
    run(world, "--video", world.clips / "more/bus.mp4", world.clips / "car.mp4", "--question", "Red car?")
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith(str(world.clips))] == [
        f"{world.clips / name} | Red car?" for name in ("more/bus.mp4", "car.mp4")]


def test_answers_in_a_file_are_not_asked_again(world, tmp_path, capsys, monkeypatch):
    out, asked, generate_of_model = tmp_path / "new" / "answers.jsonl", [], DriveVLM.generate

    def count(model, frames, questions, **options):
        asked.append(questions)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return generate_of_model(model, frames, questions, **options)

    monkeypatch.setattr(DriveVLM, "generate", count)
    flags = ("--video", world.clips, "--mode", "both", "--output", out)
    with pytest.raises(KeyboardInterrupt):
        run(world, *flags)
    first = rows_of(out.read_text())
    assert len(first) == 2
    assert run(world, *flags) == 0 and len(asked) == 5
    rows = rows_of(out.read_text())
    assert rows[:2] == first and len({(row["video"], row["mode"]) for row in rows}) == 4
    assert run(world, *flags) == 0 and len(asked) == 5 and rows_of(out.read_text()) == rows
    assert "holds 4 answers already" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="4 of 4 answers in .* are of another checkpoint or other settings"):
        run(world, *flags, "--temperature", 1)
    assert run(world, "--video", world.clips, "--question", "Red car?", "--output", out) == 0  # more of the same
    assert len(rows_of(out.read_text())) == 6


def test_stretches_of_a_clip_are_asked_one_after_another(world, capsys, monkeypatch):
    decode, decoded = generate.decode_frames, []
    monkeypatch.setattr(generate, "decode_frames", lambda *args: decoded.append(args[-1]) or decode(*args))
    flags = ("--video", world.clips / "car.mp4", "--mode", "copilot", "--window", 1, "--stride", 0.75)
    run(world, *flags, "--json")
    rows = rows_of(capsys.readouterr().out)
    assert [(row["begin"], row["end"]) for row in rows] == [(0.0, 1.0), (0.75, 1.75), (1.375, 2.375)]
    assert decoded == [(row["begin"], row["end"]) for row in rows]
    run(world, *flags)
    shown = capsys.readouterr().out.splitlines()
    assert f"{world.clips / 'car.mp4'} | 0:00.8-0:01.8 | copilot" in shown


@pytest.mark.parametrize("seconds, window, stride, starts", [
    (25.0, 10.0, None, [0.0, 10.0, 15.0]), (20.0, 10.0, None, [0.0, 10.0]), (20.0, 10.0, 5.0, [0.0, 5.0, 10.0]),
    (7.0, 10.0, None, [0.0]), (30.0, 5.0, 20.0, [0.0, 20.0, 25.0]), (0.3, 0.1, 0.1, [0.0, 0.1, 0.2])])
def test_stretches_cover_the_clip_and_end_with_it(seconds, window, stride, starts):
    found = generate.stretches(seconds, window, stride)
    assert [begin for begin, _ in found] == starts
    assert all(end - begin == pytest.approx(window) for begin, end in found)


def test_a_stretch_holds_frames_that_start_in_it(world):
    path = world.clips / "car.mp4"
    with Clip(path, (96, 96)) as clip:
        times, frames = clip.times - clip.times[0], clip.frames(range(20))
    taken = read_frames(path, 3, 96, (0.5, 1.0))
    inside = [i for i in range(20) if 0.5 <= times[i] < 1.0]
    assert len(inside) == 4
    for frame, index in zip(taken, (inside[0], inside[2], inside[3]), strict=True):
        np.testing.assert_array_equal(frame, frames[index])
    with pytest.raises(VideoError, match="no frame starts between 9 and 10 s"):
        dataset.decode_frames(path, 3, 96, (9.0, 10.0))


def test_a_broken_clip_is_named_and_the_others_are_answered(world, tmp_path, capsys):
    folder = tmp_path / "clips"
    shutil.copytree(world.clips, folder)
    (folder / "a.mp4").write_bytes(b"broken")
    assert run(world, "--video", folder, "--mode", "copilot", "--json") == 1
    said = capsys.readouterr()
    assert len(rows_of(said.out)) == 2 and f"generate: {folder / 'a.mp4'}: " in said.err


@pytest.fixture
def drives(world, tmp_path):
    """A folder with two folders of images, of the frames of car.mp4, in whole and in its second half."""
    drive = images_of(world.clips / "car.mp4", tmp_path / "drives" / "drive_1")
    half = tmp_path / "drives" / "drive_2"
    half.mkdir()
    for number in range(11, 21):
        shutil.copy(drive / f"{number:06d}.png", half)
    return drive.parent


def test_a_folder_of_images_is_one_clip_and_a_folder_of_such_folders_one_of_clips(world, drives, capsys):
    assert run(world, "--video", drives, "--mode", "copilot", "--json") == 0
    several = rows_of(capsys.readouterr().out)
    assert [row["video"] for row in several] == [str(drives / "drive_1"), str(drives / "drive_2")]
    assert run(world, "--video", drives / "drive_1", "--mode", "copilot", "--json") == 0
    one, = rows_of(capsys.readouterr().out)
    assert (one["video"], one["text"]) == (several[0]["video"], several[0]["text"])
    shutil.copy(world.clips / "car.mp4", drives)  # beside the folders it is one more clip
    assert run(world, "--video", drives, "--mode", "copilot", "--json") == 0
    assert len(rows_of(capsys.readouterr().out)) == 3


def test_stretches_of_a_folder_of_images_follow_its_times(world, drives, capsys):
    drive = drives / "drive_1"  # 20 images, ten a second
    for fps, begins in ((None, [0.0, 0.9]), ("5", [0.0, 1.0, 2.0, 2.8])):
        if fps:
            (drive / "fps.txt").write_text(fps)
        assert run(world, "--video", drive, "--mode", "copilot", "--window", 1, "--json") == 0
        assert [row["begin"] for row in rows_of(capsys.readouterr().out)] == begins


def test_folders_that_are_not_clear_are_refused_and_broken_ones_named(world, drives, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    both = drives / "drive_2"
    shutil.copy(world.clips / "car.mp4", both)
    with pytest.raises(ConfigError) as error:
        run(world, "--video", both, drives, tmp_path / "empty")
    assert str(error.value).count(f"{both} holds images and clips (car.mp4): which of them are meant?") == 2
    assert f"--video: no clip in {tmp_path / 'empty'} (.avi, .jpeg, .jpg" in str(error.value)
    (both / "car.mp4").unlink()
    (both / "000015.png").write_bytes(b"broken")
    assert run(world, "--video", drives, "--mode", "copilot", "--json") == 1
    said = capsys.readouterr()
    assert len(rows_of(said.out)) == 1
    assert f"generate: {both}: 000015.png: not a readable JPEG or PNG image" in said.err


def test_the_detector_looks_at_a_folder_of_images_from_inside_it(drives, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(receipts, "detect_clips",
                        lambda videos, root, *rest, **more: seen.append((videos, str(root))) or {})
    monkeypatch.setattr(receipts, "load_records", lambda cache, videos, settings: dict.fromkeys(videos, "record"))
    monkeypatch.chdir(drives / "drive_1")
    for clip in (drives / "drive_1", Path(".")):
        assert receipts.look(clip, None, tmp_path, None) == "record"
    assert seen == [(["drive_1"], str(drives))] * 2


def test_one_answer_is_streamed_to_a_terminal(world, capsys, monkeypatch):
    flags = ("--video", world.clips / "car.mp4", "--mode", "copilot")
    run(world, *flags)
    plain = capsys.readouterr().out
    written = []
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    generate_of_model = DriveVLM.generate

    def watch(model, *args, streamer, **options):
        put = streamer.put
        monkeypatch.setattr(streamer, "put", lambda ids: written.append(ids) or put(ids))
        return generate_of_model(model, *args, streamer=streamer, **options)

    monkeypatch.setattr(DriveVLM, "generate", watch)
    run(world, *flags)
    assert capsys.readouterr().out.strip() == plain.strip()
    assert len(written) >= 4 and all(isinstance(ids, torch.Tensor) for ids in written)


def test_problems_are_listed_together(world, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as error:
        run(world, "--video", tmp_path / "empty", tmp_path / "no.mp4", "--mode", "poem", "--stride", 2)
    for text in ("no clip in", "no such file", "'poem' is none of microscope, copilot, both", "of which --window?"):
        assert text in str(error.value), text
    with pytest.raises(ConfigError, match="window must be above 0"):
        run(world, "--video", world.clips, "--window", 0)
