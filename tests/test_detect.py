"""Evidence: three values from boxes, one JSON a clip that is resumed and never mixed; the toy detector assembled."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from dataset import Entry, frame_indices
from demo.assemble_detector import BASE, assemble, build_network
from demo.base_detector import IMAGE_SIZE, measure
from stage3 import detect_objects
from stage3.detect_objects import (
    DetectionError,
    DetectorSettings,
    check_settings,
    clip_evidence,
    detect_clips,
    detect_frames,
    frequency_table,
    load_detector,
    load_evidence,
    load_records,
    merge_bodies,
    read_clip,
)
from stage3.vocabulary_config import COCO_NAMES

IDS = {name: index for index, name in enumerate(COCO_NAMES)}
SETTINGS = DetectorSettings(weights="none.pt")
SMALL, LARGE = (0.1, 0.1, 0.12, 0.12), (0.3, 0.3, 0.6, 0.6)


def box(name, confidence, where=LARGE):
    return [IDS[name], confidence, *where]


def clip(*frames):
    """A clip's record from the boxes of its frames, spread evenly over its time."""
    last = max(len(frames) - 1, 1)
    return {"frames": [{"index": i, "time": i / last, "boxes": list(boxes)} for i, boxes in enumerate(frames)]}


@pytest.mark.parametrize(
    ("confidences", "value"),
    [
        ([0.55, 0.50], "present"),  # two frames
        ([0.71], "present"),  # one strong frame
        ([0.69], "unknown"),  # one weak frame
        ([0.49, 0.49, 0.49, 0.49], "unknown"),  # often, never sure
        ([0.25], "unknown"),
        ([0.24, 0.24, 0.24], "absent"),
        ([], "absent"),
    ],
)
def test_three_values(confidences, value):
    evidence = clip_evidence(clip(*[[box("bus", c)] for c in confidences], []), SETTINGS)
    assert ("bus" in evidence.present, "bus" in evidence.unknown) == (value == "present", value == "unknown")


def test_two_boxes_of_one_frame_are_one_sighting():
    evidence = clip_evidence(clip([box("person", 0.6), box("person", 0.6, SMALL)], []), SETTINGS)
    assert evidence.present == frozenset() and evidence.unknown == {"person"}


def test_salient_by_area_or_by_duration():
    small, large = [box("person", 0.6, SMALL)], [box("car", 0.6)]
    assert clip_evidence(clip(small, small, large, large), SETTINGS).salient == {"car"}
    assert clip_evidence(clip(small, small, small, small), SETTINGS).salient == {"person"}
    assert clip_evidence(clip(small, small), SETTINGS).present == {"person"}


def test_seen_gives_first_and_last_time():
    record = clip([box("car", 0.3)], [box("car", 0.6)], [], [box("car", 0.6)], [box("bus", 0.9)])
    assert clip_evidence(record, SETTINGS).seen == {"car": (0.25, 0.75), "bus": (1.0, 1.0)}


def test_overlapping_car_and_truck_are_one_body():
    shifted = (0.31, 0.3, 0.61, 0.6)
    frame = [box("truck", 0.6), box("car", 0.8, shifted)]
    assert [(name, whole) for name, *_, whole in merge_bodies(frame, 0.7)] == [("car", True), ("truck", False)]
    evidence = clip_evidence(clip(frame, frame, frame), SETTINGS)
    assert evidence.present == {"car"} and evidence.unknown == {"truck"}
    apart = [box("truck", 0.6), box("car", 0.8, (0.6, 0.6, 0.9, 0.9))]
    assert clip_evidence(clip(apart, apart), SETTINGS).present == {"car", "truck"}
    rider = [box("person", 0.8), box("motorcycle", 0.8, shifted)]  # two things may well overlap
    assert clip_evidence(clip(rider, rider), SETTINGS).present == {"person", "motorcycle"}


def test_failed_clip_has_no_evidence():
    assert clip_evidence({"error": "x.mp4: not a readable video"}, SETTINGS) is None


@pytest.mark.parametrize("total", [31, 40, 97, 250, 1200, 1201])
def test_own_frames_are_looked_at(total):
    assert set(frame_indices(total, 16)) <= set(frame_indices(total, SETTINGS.num_frames))


def test_settings_problems_come_together():
    found = check_settings(DetectorSettings("nowhere/yolo.pt", batch_size=0, absent_confidence=0.6), "judge", 16)
    assert len(found) == 3 and all(text.startswith("judge") for text in found)
    assert "nowhere/yolo.pt" in found[0]
    assert check_settings(DetectorSettings("yolov8x.pt"), model_frames=16) == []
    assert "16, 31, 46" in check_settings(DetectorSettings("yolov8x.pt", num_frames=32), model_frames=16)[0]


# ----------------------------------------------------------------------------------------------------------------------
# The detector itself


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A random YOLOv8 of a sixteenth of its width with COCO's first twelve classes, by way of the shipped format."""
    import yaml
    from safetensors.torch import save_file
    from ultralytics.utils import ROOT

    folder = tmp_path_factory.mktemp("detector")
    shape = yaml.safe_load((ROOT / "cfg/models/v8/yolov8.yaml").read_text())
    shape |= {"nc": 12, "scales": {"n": [0.33, 0.0625, 256]}, "scale": "n"}
    about = {"yaml": shape, "names": list(COCO_NAMES[:12]), "image_size": 64}
    (folder / "detector.json").write_text(json.dumps(about))
    torch.manual_seed(0)
    network = build_network(about)
    for head in network.model[-1].cv3:  # enough confidence for boxes to be there
        head[-1].bias.data.fill_(0.0)
    save_file({name: value.clone() for name, value in network.state_dict().items()}, folder / "detector.safetensors")
    return assemble(folder, folder / "detector.pt")


@pytest.fixture
def settings(weights):
    return DetectorSettings(weights=str(weights), image_size=64, num_frames=5, batch_size=2)


@pytest.fixture
def entries(tiny):
    rows = json.loads(tiny.data.read_text())
    return [Entry(f"{row['video'][:-4]}#copilot", row["video"], "copilot", "q", ("a",)) for row in rows]


def test_assembly_is_reproducible(weights, tmp_path):
    again = assemble(weights.parent, tmp_path / "other" / "name.pt")
    assert again.read_bytes() == weights.read_bytes()


def test_the_shipped_detector_knows_the_toy_world(tmp_path):
    assert {file.suffix for file in BASE.iterdir()} <= {".safetensors", ".json", ""}  # no pickle
    measured, table = measure(BASE, 8, DetectorSettings(weights="", image_size=IMAGE_SIZE, num_frames=15))
    assert measured["all"]["precision"] >= 0.9 and measured["all"]["recall"] >= 0.85, table
    shipped = json.loads((BASE / "detector.json").read_text())["measured"]
    assert shipped["all"]["precision"] >= 0.9 and shipped["all"]["recall"] >= 0.85
    assert len(shipped) == 9 and all(row["recall"] >= 0.7 for row in shipped.values())


def test_frames_reach_the_detector_as_bgr(settings):
    class Spy:
        def predict(self, batch, **options):
            self.batches = [*getattr(self, "batches", []), batch]
            return []

    spy, red = Spy(), np.zeros((3, 8, 8, 3), np.uint8)
    red[..., 0] = 255
    detect_frames(spy, red, settings, "cpu")
    assert [len(batch) for batch in spy.batches] == [2, 1]
    assert spy.batches[0][0][0, 0].tolist() == [0, 0, 255]


def test_cache_is_made_resumed_and_loaded(tiny, entries, settings, tmp_path, monkeypatch):
    videos = [entry.video for entry in entries]
    assert detect_clips(videos, tiny.videos, settings, tmp_path) == {}
    records = load_records(tmp_path, videos, settings)
    record = records["car.mp4"]
    assert record["ultralytics"] and len(record["made_by"]["weights_sha256"]) == 64
    assert [frame["index"] for frame in record["frames"]] == frame_indices(20, 5).tolist()
    assert [frame["time"] for frame in record["frames"]][::4] == [0.0, 1.0]
    found = [row for frame in record["frames"] for row in frame["boxes"]]
    assert found and all(0.1 <= row[1] <= 1 and 0 <= min(row[2:]) and max(row[2:]) <= 1 for row in found)
    evidence = load_evidence(tmp_path, entries * 2, settings)
    assert set(evidence) == set(videos)
    assert "clips with evidence" in frequency_table(records, settings)

    monkeypatch.setattr(detect_objects, "load_detector", lambda *_: pytest.fail("nothing was left to do"))
    assert detect_clips(videos, tiny.videos, settings, tmp_path) == {}
    assert detect_clips(videos, tiny.videos, replace(settings, absent_confidence=0.3), tmp_path) == {}  # boxes stand


def test_resume_does_only_what_is_missing(tiny, entries, settings, tmp_path):
    videos = [entry.video for entry in entries]
    detect_clips(videos[:2], tiny.videos, settings, tmp_path)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/*-*.json")}
    assert len(files) == 2
    with pytest.raises(DetectionError, match="no evidence yet for 4 of 6 clips"):
        load_evidence(tmp_path, entries, settings)
    detect_clips(videos, tiny.videos, settings, tmp_path)
    assert len(list(tmp_path.glob("*/*-*.json"))) == 6
    assert all(file.stat().st_mtime_ns == made for file, made in files.items())


def test_a_changed_clip_is_looked_at_again(tiny, settings, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(tiny.videos / "car.mp4", videos / "clip.mp4")
    detect_clips(["clip.mp4"], videos, settings, tmp_path / "cache")
    before = load_records(tmp_path / "cache", ["clip.mp4"], settings)
    shutil.copy(tiny.videos / "bus.mp4", videos / "clip.mp4")
    detect_clips(["clip.mp4"], videos, settings, tmp_path / "cache")
    assert load_records(tmp_path / "cache", ["clip.mp4"], settings) != before


def test_other_settings_are_refused(tiny, entries, settings, tmp_path):
    detect_clips([entry.video for entry in entries], tiny.videos, settings, tmp_path)
    with pytest.raises(DetectionError, match="image_size 64, not 96"):
        load_evidence(tmp_path, entries, replace(settings, image_size=96))
    other = tmp_path / "other.pt"
    other.write_bytes(b"another detector")
    with pytest.raises(DetectionError, match="weights_sha256"):
        load_evidence(tmp_path, entries, replace(settings, weights=str(other)))
    with pytest.raises(DetectionError, match="nothing"):
        load_evidence(tmp_path / "empty", entries, settings)


def test_evidence_travels_without_the_weights(tiny, entries, settings, tmp_path):
    detect_clips([entry.video for entry in entries], tiny.videos, settings, tmp_path)
    gone = replace(settings, weights="elsewhere/detector.pt")
    assert load_evidence(tmp_path, entries, gone) == load_evidence(tmp_path, entries, settings)
    with pytest.raises(DetectionError, match="weights detector.pt, not yolo.pt"):
        load_evidence(tmp_path, entries, replace(settings, weights="elsewhere/yolo.pt"))


def test_another_ultralytics_is_not_mixed_in(tiny, entries, settings, tmp_path, monkeypatch):
    detect_clips(["car.mp4"], tiny.videos, settings, tmp_path)
    monkeypatch.setattr(detect_objects.importlib.metadata, "version", lambda name: "9.0.0")
    with pytest.raises(DetectionError, match="9.0.0"):
        detect_clips(["bus.mp4"], tiny.videos, settings, tmp_path)


def test_ranks_share_the_clips(tiny, entries, settings, tmp_path):
    videos = [entry.video for entry in entries]
    detect_clips(videos, tiny.videos, settings, tmp_path, rank=0, world_size=2)
    assert len(list(tmp_path.glob("*/*-*.json"))) == 3
    detect_clips(videos, tiny.videos, settings, tmp_path, rank=1, world_size=2)
    assert len(load_records(tmp_path, videos, settings)) == 6


def test_a_broken_clip_has_no_evidence_and_is_tried_again(tiny, settings, tmp_path):
    videos, cache = tmp_path / "videos", tmp_path / "cache"
    videos.mkdir()
    (videos / "bad.mp4").write_bytes(b"no video")
    shutil.copy(tiny.videos / "car.mp4", videos / "good.mp4")
    names = ["bad.mp4", "good.mp4", "gone.mp4"]
    failed = detect_clips(names, videos, settings, cache)
    assert set(failed) == {"bad.mp4", "gone.mp4"} and "no such file" in failed["gone.mp4"]
    entries = [Entry(name, name, "copilot", "q", ("a",)) for name in names]
    evidence = load_evidence(cache, entries, settings)
    assert evidence["bad.mp4"] is None and evidence["gone.mp4"] is None and evidence["good.mp4"] is not None
    assert "1 clips with evidence, 2 failed" in frequency_table(load_records(cache, names, settings), settings)
    shutil.copy(tiny.videos / "car.mp4", videos / "bad.mp4")
    assert set(detect_clips(names, videos, settings, cache)) == {"gone.mp4"}
    assert load_evidence(cache, entries, settings)["bad.mp4"] is not None


def test_clips_of_one_name_do_not_collide(tiny, settings, tmp_path):
    for folder, name in (("a", "car.mp4"), ("b", "bus.mp4")):
        (tmp_path / "videos" / folder).mkdir(parents=True)
        shutil.copy(tiny.videos / name, tmp_path / "videos" / folder / "clip.mp4")
    names = ["a/clip.mp4", "b/clip.mp4"]
    detect_clips(names, tmp_path / "videos", settings, tmp_path / "cache")
    records = load_records(tmp_path / "cache", names, settings)
    assert records["a/clip.mp4"]["frames"] != records["b/clip.mp4"]["frames"]


def test_a_detector_of_other_classes_is_refused(weights, tmp_path):
    folder = tmp_path / "detector"
    folder.mkdir()
    about = json.loads((weights.parent / "detector.json").read_text())
    about["names"][2] = "rickshaw"
    (folder / "detector.json").write_text(json.dumps(about))
    shutil.copy(weights.parent / "detector.safetensors", folder)
    path = assemble(folder, folder / "detector.pt")
    with pytest.raises(DetectionError, match="class 2 is 'rickshaw', but COCO's is 'car'"):
        load_detector(DetectorSettings(weights=str(path)))


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(DetectionError, match="no such file: .*nothing.pt"):
        detect_clips(["a.mp4"], tmp_path, DetectorSettings(weights=str(tmp_path / "nothing.pt")), tmp_path)


def test_command_line(tiny, settings, tmp_path, capsys):
    flags = ["--data", tiny.data, "--video_root", tiny.videos, "--evidence_cache", tmp_path, "--num_frames", "3",
             "--num_val_videos", "2"]
    (tmp_path / "none.yaml").write_text("seed: 42\n")
    flags += ["--config", tmp_path / "none.yaml", "--detector", settings.weights, "--detector.image_size", "64"]
    assert detect_objects.main([*flags, "--detector.num_frames", "5"]) == 0
    assert "6 clips with evidence, 0 failed" in capsys.readouterr().out
    judge = ["--which", "judge", "--judge", settings.weights, "--judge.image_size", "96", "--judge.num_frames", "4"]
    assert detect_objects.main([*flags, *judge]) == 0
    assert "2 clips with evidence, 0 failed" in capsys.readouterr().out  # the held-out ones
    with pytest.raises(SystemExit) as stop:
        detect_objects.main([*flags, "--detector.num_frames", "4", "--detector", "gone.pt"])
    assert stop.value.code == 2 and "2 problems" in (text := capsys.readouterr().err)
    assert "gone.pt" in text and "use 3, 5, 7" in text


def test_native_aspect(tiny):
    indices, times, frames = read_clip(tiny.videos / "car.mp4", 31)
    assert frames.shape == (20, 180, 320, 3)  # 20 frames there, none twice
    assert indices.tolist() == list(range(20)) and times[0] == 0 and times[-1] == 1


def test_real_street(shared, settings, tmp_path):
    settings = replace(settings, num_frames=3)
    assert detect_clips(["real_street.mp4"], shared, settings, tmp_path) == {}
    assert len(load_records(tmp_path, ["real_street.mp4"], settings)["real_street.mp4"]["frames"]) == 3
