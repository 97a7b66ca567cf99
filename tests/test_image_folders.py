"""Folders of images as clips: reading, times, what is refused, caches, rows, labels."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import images_of, write_clip, write_images
from PIL import Image
from test_dataset import write_movie
from transformers import AutoTokenizer

import dataset
from dataset import (
    Clip,
    ClipTensors,
    DataError,
    RowError,
    VideoError,
    VideoInstructDataset,
    cached_frames,
    clip_key,
    clip_seconds,
    clip_state,
    decode_frames,
    find_clips,
    frame_indices,
    is_clip,
    load_entries,
    load_split,
    read_frames,
    resolve_video,
    root_of_clips,
    sample_clip,
    spread_over_time,
    video_stem,
)

UPRIGHT = {1: (0, 0), 3: (1, 1), 6: (0, 1), 8: (1, 0)}  # EXIF orientation: corner to which it turns the upper left one


def make_frames(count=12, width=128, height=96, seed=0):
    """Pictures that all differ, uint8 [count, height, width, 3]; smooth, as scalers differ at edges."""
    rng, frames = np.random.default_rng(seed), []
    ramp = np.linspace(0, 100, width)[None, :, None] + np.linspace(0, 50, height)[:, None, None]
    for tint in rng.permuted(np.linspace(0, 100, 3 * count)).reshape(count, 3):
        frames.append((ramp + tint).astype(np.uint8))
    return np.stack(frames)


def failure(path):
    with pytest.raises(VideoError) as error:
        read_frames(path, 4, 96)
    return str(error.value)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_images_as_the_frames_of_a_clip(tmp_path):
    frames = make_frames()
    with Clip(write_images(tmp_path / "drive", frames)) as clip:
        assert clip.size == (128, 96) and clip.times.dtype == np.float32
        np.testing.assert_allclose(clip.times, np.arange(12) / 10, atol=1e-6)
        np.testing.assert_array_equal(clip.frames(range(12)), frames)
        np.testing.assert_array_equal(clip.frames([9, 0, 9]), frames[[9, 0, 9]])
        assert clip.choose(5).tolist() == frame_indices(12, 5).tolist()
        for index in (12, -1):
            with pytest.raises(VideoError, match=f"drive: frame {index} of 12"):
                clip.frames([index])
    assert clip_seconds(tmp_path / "drive") == pytest.approx(1.1)
    indices, times, chosen = sample_clip(tmp_path / "drive", 4)
    np.testing.assert_array_equal(chosen, frames[indices])
    np.testing.assert_allclose(times, indices / 11, atol=1e-6)
    np.testing.assert_array_equal(decode_frames(tmp_path / "drive", 3, 96), read_frames(tmp_path / "drive", 3, 96))


def test_numbers_in_names_decide_the_order(tmp_path):
    frames = make_frames(11)
    for name, start in (("{}.png", 1), ("cam2_{}.PNG", 5), ("a{}b7.png", 0)):
        folder = write_images(tmp_path / name[:4], frames, name, start)
        with Clip(folder) as clip:
            np.testing.assert_array_equal(clip.frames(range(11)), frames)
    write_images(tmp_path / "mixed", frames[:1], "1.png")
    write_images(tmp_path / "mixed", frames[1:2], "2.jpeg", start=2)
    write_images(tmp_path / "mixed", frames[2:3], "10.JPG", start=3)
    with Clip(tmp_path / "mixed") as clip:
        taken = clip.frames(range(3)).astype(int)
    np.testing.assert_array_equal(taken[0], frames[0])
    assert np.abs(taken - frames[:3]).mean() < 2  # JPEG
    (tmp_path / "mixed" / "labels.json").write_text("other files are not looked at")
    (tmp_path / "mixed" / "masks").mkdir()
    with Clip(tmp_path / "mixed") as clip:
        assert len(clip.times) == 3


@pytest.mark.parametrize("reader", ["decord", "pyav"])
def test_images_are_squashed_as_the_frames_of_a_video_are(tmp_path, monkeypatch, reader):
    monkeypatch.setenv("DRIVEVLM_VIDEO_READER", reader)
    write_movie(tmp_path / "clip.mp4", num_frames=8, size=(640, 352))
    with Clip(tmp_path / "clip.mp4") as clip:
        whole = clip.frames(range(8))
    write_images(tmp_path / "clip", whole)
    with Clip(tmp_path / "clip", (96, 64)) as clip:
        assert clip.size == (96, 64) and clip.frames([3]).shape == (1, 64, 96, 3)
    wanted = read_frames(tmp_path / "clip.mp4", 8, 96).astype(int)
    rough = [np.array(Image.fromarray(frame).resize((96, 96), Image.Resampling.BOX)) for frame in whole]
    difference = np.abs(read_frames(tmp_path / "clip", 8, 96) - wanted).mean()
    assert difference < 0.9 * np.abs(np.stack(rough) - wanted).mean()  # not equal: videos halve the size of colours


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation, corner", UPRIGHT.items())
def test_images_are_turned_upright(tmp_path, orientation, corner, suffix):
    frame = np.zeros((96, 128, 3), np.uint8)
    frame[:48, :64] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    write_images(tmp_path / "clip", [frame] * 2, "{}." + suffix, exif=exif)
    with Clip(tmp_path / "clip") as clip:
        assert clip.size == ((96, 128) if orientation in (6, 8) else (128, 96))
        height, width = clip.size[1] // 2, clip.size[0] // 2
        white = clip.frames([1])[0].reshape(2, height, 2, width, 3).mean((1, 3, 4))
    assert np.unravel_index(white.argmax(), (2, 2)) == corner
    squashed = read_frames(tmp_path / "clip", 2, 96)[0].reshape(2, 48, 2, 48, 3).mean((1, 3, 4))
    assert np.unravel_index(squashed.argmax(), (2, 2)) == corner


def test_grey_indexed_and_opaque_images_are_read(tmp_path):
    frame = make_frames(1)[0]
    opaque = np.dstack([frame, np.full(frame.shape[:2], 255, np.uint8)])
    for number, image in enumerate((Image.fromarray(frame), Image.fromarray(opaque), Image.fromarray(frame[..., 0]),
                                    Image.fromarray(frame).quantize(64))):
        folder = tmp_path / str(number)
        folder.mkdir()
        image.save(folder / "1.png")
        with Clip(folder) as clip:
            taken = clip.frames([0])[0].astype(int)
        wanted = np.repeat(frame[..., :1], 3, 2) if number == 2 else frame
        assert np.abs(taken - wanted).mean() < (4 if number == 3 else 1e-9)


# ---- times -----------------------------------------------------------------------------------------------------------


def test_times_come_from_times_txt_else_from_fps_txt_else_ten_a_second(tmp_path):
    folder = write_images(tmp_path / "drive", make_frames(6))
    (folder / "fps.txt").write_text("4\n")
    with Clip(folder) as clip:
        assert clip.times.tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25]
    times = [0, 0.1, 0.2, 0.3, 5, 10]
    (folder / "times.txt").write_text("\n".join(map(str, times)))
    with Clip(folder) as clip:
        np.testing.assert_allclose(clip.times, times, rtol=1e-6)
        assert clip.choose(3).tolist() == spread_over_time(np.array(times), 3).tolist() == [0, 4, 5]
    stamps = [1.7e9 + time for time in times]  # seconds of the clock: float32 alone would make them equal
    (folder / "times.txt").write_text("".join(f"{stamp:.3f}\r\n" for stamp in stamps))
    with Clip(folder) as clip:
        np.testing.assert_allclose(clip.times, times, atol=1e-3)
        with Clip(folder, (96, 96)) as squashed:
            np.testing.assert_array_equal(read_frames(folder, 2, 96, (4.0, 11.0)), squashed.frames([4, 5]))
    with pytest.raises(VideoError, match="no frame starts between 6 and 9 s"):
        read_frames(folder, 2, 96, (6.0, 9.0))


@pytest.mark.parametrize("name, text, words", [
    ("times.txt", "0\n1\n", "times.txt line 3: 2 lines for 3 images"),
    ("times.txt", "", "times.txt line 1: 0 lines for 3 images"),
    ("times.txt", "0\n1\n2\n3\n", "times.txt line 4: 4 lines for 3 images"),
    ("times.txt", "0\n\n2\n", "times.txt line 2: not a number: ''"),
    ("times.txt", "0\none\n2\n", "times.txt line 2: not a number: 'one'"),
    ("times.txt", "0\n1\nnan\n", "times.txt line 3: not a number: 'nan'"),
    ("times.txt", "0\n1\ninf\n", "times.txt line 3: not a number: 'inf'"),
    ("times.txt", "0\n2\n1\n", "times.txt line 3: 1 does not come after 2"),
    ("times.txt", "0\n1\n1\n", "times.txt line 3: 1 does not come after 1"),
    ("times.txt", b"0\n\xff\n2\n", "times.txt: not readable"),
    ("fps.txt", "", "fps.txt line 1: one number is expected"),
    ("fps.txt", "0", "fps.txt line 1: one number is expected"),
    ("fps.txt", "-5", "fps.txt line 1: one number is expected"),
    ("fps.txt", "10\n20", "fps.txt line 2: one number is expected"),
    ("fps.txt", "30 fps", "fps.txt line 1: not a number: '30 fps'"),
])
def test_wrong_times_are_named_with_file_and_line(tmp_path, name, text, words):
    folder = write_images(tmp_path / "drive", make_frames(3))
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert failure(folder).startswith(f"{folder}: {words}")


def test_times_that_are_a_lost_link_are_not_replaced_by_ten_a_second(tmp_path):
    folder = write_images(tmp_path / "drive", make_frames(3))
    (folder / "times.txt").symlink_to(folder / "gone.txt")
    assert failure(folder) == f"{folder}: times.txt: no such file"


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_folders_that_are_no_clip_say_why(tmp_path):
    (tmp_path / "empty").mkdir()
    assert failure(tmp_path / "empty") == f"{tmp_path / 'empty'}: empty folder"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no image")
    assert failure(tmp_path / "notes") == f"{tmp_path / 'notes'}: a folder without images (.jpeg, .jpg, .png)"
    both = write_images(tmp_path / "both", make_frames(2))
    (both / "x.MP4").write_bytes(b"")
    assert failure(both) == (f"{both}: holds images (000001.png) and video files (x.MP4): which of them are meant?")
    twice = write_images(tmp_path / "twice", make_frames(2))
    shutil.copy(twice / "000002.png", twice / "2.png")
    assert failure(twice) == f"{twice}: 000002.png and 2.png have the same place in the clip"
    assert not is_clip(tmp_path / "empty") and not is_clip(tmp_path / "notes") and is_clip(both)


def test_images_of_several_sizes_are_refused_whichever_frames_are_asked_for(tmp_path):
    folder = write_images(tmp_path / "drive", make_frames(5))
    for number in (3, 5):
        Image.fromarray(make_frames(1, 64, 64)[0]).save(folder / f"00000{number}.png")
    with pytest.raises(VideoError) as error:
        Clip(folder)
    assert str(error.value) == (f"{folder}: 000003.png: 64x64, but 000001.png is 128x96; "
                                "the images of a clip have one size")
    folder, exif = write_images(tmp_path / "turned", make_frames(3), "{}.jpg"), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(make_frames(1)[0]).save(folder / "2.jpg", exif=exif)  # of the same size before it is turned
    assert "2.jpg: 96x128, but 1.jpg is 128x96" in failure(folder)
    Image.fromarray(make_frames(1, 96, 128)[0]).save(folder / "2.jpg", exif=exif)
    with Clip(folder) as clip:
        assert clip.frames([1]).shape == (1, 96, 128, 3)


def test_an_image_that_turns_out_to_be_turned_is_refused_when_it_is_read(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "drive", make_frames(3))
    with Clip(folder) as clip:
        Image.fromarray(make_frames(1, 96, 128)[0]).save(folder / "000002.png")  # changed since the clip was opened
        with pytest.raises(VideoError, match="000002.png: 96x128, but 000001.png is 128x96"):
            clip.frames([1])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_broken_images_are_named(tmp_path, suffix):
    folder = write_images(tmp_path / "drive", make_frames(4), "{}." + suffix)
    whole = (folder / f"4.{suffix}").read_bytes()
    no_image, damaged = "not a readable JPEG or PNG image", "damaged or not readable: "
    for content, words in ((b"", no_image), (b"hello" * 99, no_image), (whole[: len(whole) * 2 // 3], damaged)):
        (folder / f"4.{suffix}").write_bytes(content)
        assert failure(folder).startswith(f"{folder}: 4.{suffix}: {words}")
    (folder / f"4.{suffix}").unlink()
    (folder / f"4.{suffix}").mkdir()
    assert failure(folder) == f"{folder}: 4.{suffix}: not a file"
    (folder / f"4.{suffix}").rmdir()
    (folder / f"4.{suffix}").symlink_to(folder / "gone")
    assert failure(folder) == f"{folder}: 4.{suffix}: no such file"


def test_pixels_whose_colour_is_not_known_are_refused(tmp_path):
    clear, deep = tmp_path / "clear", tmp_path / "deep"
    clear.mkdir()
    deep.mkdir()
    frame = np.dstack([make_frames(1)[0], np.full((96, 128), 254, np.uint8)])
    Image.fromarray(frame).save(clear / "1.png")
    assert failure(clear) == f"{clear}: 1.png: it has transparent pixels, whose colour is not known"
    Image.fromarray(np.arange(96 * 128, dtype=np.uint16).reshape(96, 128)).save(deep / "1.png")
    assert failure(deep).startswith(f"{deep}: 1.png: pixels of kind I;16")


def test_broken_images_are_named_where_a_detector_has_replaced_image_open(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "drive", make_frames(2))
    (folder / "000002.png").write_bytes(b"broken")
    monkeypatch.setattr(Image, "open", lambda *args, **options: pytest.fail("not the reader's"))
    assert "000002.png: not a readable JPEG or PNG image" in failure(folder)


# ---- caches ----------------------------------------------------------------------------------------------------------


def change_pixels(folder):
    Image.fromarray(255 - make_frames(1)[0]).save(folder / "000003.png")


def touch(folder):
    os.utime(folder / "000002.png", ns=(1, 1))


def write_times(folder):
    (folder / "times.txt").write_text("0\n1\n2\n3\n4\n")


CHANGES = {
    "pixels": change_pixels, "touched": touch, "one less": lambda folder: (folder / "000005.png").unlink(),
    "one more": lambda folder: shutil.copy(folder / "000005.png", folder / "000006.png"),
    "renamed": lambda folder: (folder / "000005.png").rename(folder / "000007.png"), "times": write_times,
    "fps": lambda folder: (folder / "fps.txt").write_text("20"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_folder_is_read_again(tmp_path, monkeypatch, change):
    calls, decode = [], dataset.decode_frames
    monkeypatch.setattr(dataset, "decode_frames", lambda *args: calls.append(args) or decode(*args))
    folder, cache = write_images(tmp_path / "drive", make_frames(5)), tmp_path / "cache"
    first = cached_frames(folder, 3, 96, cache)
    np.testing.assert_array_equal(cached_frames(folder, 3, 96, cache), first)
    (folder / "labels.json").write_text("not read, so it changes nothing")
    cached_frames(folder, 3, 96, cache)
    assert len(calls) == 1
    before = clip_state(folder)
    change(folder)
    assert clip_state(folder) != before
    np.testing.assert_array_equal(cached_frames(folder, 3, 96, cache), read_frames(folder, 3, 96))
    assert len(calls) == 2


def test_changed_times_are_part_of_the_state(tmp_path):
    folder = write_images(tmp_path / "drive", make_frames(5))
    write_times(folder)
    before = clip_state(folder)
    (folder / "times.txt").write_text("0\n1\n2\n3\n9\n")
    os.utime(folder / "times.txt", ns=(5, 5))
    assert clip_state(folder).size == before.size and clip_state(folder) != before


def test_the_video_reader_does_not_matter_to_images(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "drive", make_frames(5))
    for reader in ("decord", "pyav"):
        monkeypatch.setenv("DRIVEVLM_VIDEO_READER", reader)
        cached_frames(folder, 3, 96, tmp_path / "cache")
    assert len(list((tmp_path / "cache").rglob("*.frames"))) == 1


def test_the_state_of_a_file_is_what_it_was(tmp_path):
    """Caches that were made of files stay valid."""
    write_clip(tmp_path / "clip.mp4")
    found = (tmp_path / "clip.mp4").stat()
    assert tuple(clip_state(tmp_path / "clip.mp4")) == (found.st_size, found.st_mtime_ns)
    _, key = dataset._cache_place(tmp_path / "clip.mp4", 4, 96, tmp_path)
    assert json.loads(key)[1:3] == [found.st_size, found.st_mtime_ns]


def test_tensors_are_made_again_for_a_changed_folder(tmp_path):
    folder = write_images(tmp_path / "videos" / "drive", make_frames(5))
    tensors = ClipTensors(tmp_path / "cache", "tower", (3,), tmp_path / "videos", 3, 96, tmp_path / "frames")

    def brightness(frames):
        return frames.float().mean((2, 3, 4))

    first = tensors.make("drive", brightness)
    assert torch.equal(tensors.read("drive"), first)
    for change in (touch, change_pixels):
        change(folder)
        with pytest.raises(VideoError, match="holds nothing for it"):
            tensors.read("drive")
        second = tensors.make("drive", brightness)
    assert not torch.equal(second, first)


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_a_folder_stays_inside_the_video_root_with_all_its_images(tmp_path):
    root, outside = tmp_path / "videos", write_images(tmp_path / "outside", make_frames(3))
    folder = write_images(root / "drive", make_frames(3))
    assert resolve_video(root, "drive/") == folder and clip_key("./drive/", root) == "drive"
    (folder / "000004.png").symlink_to(folder / "000001.png")
    (folder / "labels.json").symlink_to(outside / "000001.png")  # not read
    assert resolve_video(root, "drive") == folder
    for name in ("000005.png", "times.txt"):
        (folder / name).symlink_to(outside / "000001.png")
        with pytest.raises(RowError, match=f"'drive' holds {name}, a link that leads out of the video root") as error:
            resolve_video(root, "drive")
        assert error.value.code == "path_escape"
        (folder / name).unlink()
    (root / "link").symlink_to(outside)
    for video in ("link", "../outside", "."):
        with pytest.raises(RowError, match="leads out of the video root"):
            resolve_video(root, video)


def test_folders_whose_names_hold_dots_have_ids_of_their_own():
    assert video_stem("a/drive.mp4") == "a/drive" and video_stem("a/b.c.MOV") == "a/b.c"
    assert video_stem("a/2024.01.05/") == "a/2024.01.05" != video_stem("a/2024.01.06")


def test_a_data_set_of_folders_equals_the_one_of_the_videos_that_they_were_made_of(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.llm)
    names = ["car", "bus", "walk"]
    rows = {"mp4": [], "png": []}
    (tmp_path / "mp4").mkdir()
    for seed, name in enumerate(names):
        write_clip(tmp_path / "mp4" / f"{name}.mp4", width=96, height=96, seed=seed)
        images_of(tmp_path / "mp4" / f"{name}.mp4", tmp_path / "png" / name)
        for kind, video in (("mp4", f"{name}.mp4"), ("png", name)):
            rows[kind].append({"video": video, "microscope": [f"A {name} stops."], "copilot": [name]})
    examples = {}
    for kind, content in rows.items():
        (tmp_path / f"{kind}.json").write_text(json.dumps(content))
        entries = load_entries(tmp_path / f"{kind}.json")
        data = VideoInstructDataset(entries, tokenizer, video_root=tmp_path / kind, num_frames=4, image_size=96,
                                    num_visual_tokens=8, max_text_tokens=200, cache_dir=tmp_path / "cache")
        examples[kind] = [data[(1, index)] for index in range(len(data))]
    for one, other in zip(examples["mp4"], examples["png"], strict=True):
        assert "error" not in other and one["id"] == other["id"] and one["labels"] == other["labels"]
        assert torch.equal(one["frames"], other["frames"])


def test_folders_are_split_as_clips(tmp_path):
    rows = [{"video": f"drive.{number}/", "copilot": [f"A car {number}."]} for number in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for number in range(6):
        write_images(tmp_path / "videos" / f"drive.{number}", make_frames(2, 64, 64, number))
    config = SimpleNamespace(data=tmp_path / "rows.json", val_data=None, default_mode=None, num_val_videos=2,
                             split_seed=1, video_root=tmp_path / "videos")
    train, held_out = load_split(config)
    assert len(train) == 4 and len(held_out) == 2 and len({entry.id for entry in train + held_out}) == 6


# ---- folders of clips ------------------------------------------------------------------------------------------------


def test_clips_in_a_folder_are_files_and_folders_of_images(tmp_path):
    write_images(tmp_path / "a" / "drive_2", make_frames(2))
    write_images(tmp_path / "a" / "drive_10", make_frames(2))
    write_images(tmp_path / "elsewhere", make_frames(2))
    for name in ("a/b/x.mp4", "z.mov"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a" / "empty").mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    assert find_clips(tmp_path / "a") == [tmp_path / "a" / name for name in ("b/x.mp4", "drive_10", "drive_2", "link")]
    assert find_clips(tmp_path / "a" / "drive_2") == [tmp_path / "a" / "drive_2"]
    assert find_clips(tmp_path / "a" / "empty") == []
    assert root_of_clips(tmp_path / "a" / "drive_2") == str(tmp_path / "a")
    assert root_of_clips(tmp_path / "a") == str(tmp_path / "a")


@pytest.mark.parametrize("inside", ["x.mp4", "more/x.mp4", "crops/1.png"])
def test_a_folder_of_images_and_clips_is_refused(tmp_path, inside):
    drive = write_images(tmp_path / "clips" / "drive", make_frames(2))
    (drive / inside).parent.mkdir(exist_ok=True)
    if inside.endswith("png"):
        shutil.copy(drive / "000001.png", drive / inside)
        inside = "crops"
    else:
        (drive / inside).write_bytes(b"x")
    for folder in (drive, tmp_path / "clips"):
        with pytest.raises(DataError) as error:
            find_clips(folder)
        assert f"{drive} holds images and clips ({inside}): which of them are meant?" in str(error.value)
