"""Evidence: three values from boxes; one JSON per clip, resumed and never mixed; the shipped and other detectors."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import images_of

from dataset import Entry, frame_indices, sample_clip
from demo import world
from demo.assemble_detector import BASE, assemble, build_network
from demo.base_detector import IMAGE_SIZE, measure
from stage3 import detect_objects
from stage3.detect_objects import (
    BOX_FLOOR,
    DetectionError,
    Detector,
    clip_file,
    detect_clips,
    find_cache,
    fingerprint,
    frames_problems,
    frequency_table,
    is_up_to_date,
    load_evidence,
    load_records,
    weights_problems,
)
from stage3.evidence import clip_evidence, evidence_dict, merge_bodies
from stage3.grpo_reward_func import physics_aware_reward
from stage3.vocabulary_config import COCO_NAMES
from training.config import DetectorSettings

ROOT = Path(__file__).resolve().parents[1]
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
        ([0.49, 0.49, 0.49, 0.49], "unknown"),  # often seen, never with enough confidence
        ([0.25], "unknown"),
        ([0.24, 0.24, 0.24], "absent"),
        ([], "absent"),
    ],
)
def test_a_class_is_present_unknown_or_absent_by_its_confidences(confidences, value):
    evidence = clip_evidence(clip(*[[box("bus", c)] for c in confidences], []), SETTINGS)
    assert ("bus" in evidence.present, "bus" in evidence.unknown) == (value == "present", value == "unknown")


def test_two_boxes_of_one_frame_are_one_sighting():
    evidence = clip_evidence(clip([box("person", 0.6), box("person", 0.6, SMALL)], []), SETTINGS)
    assert evidence.present == frozenset() and evidence.unknown == {"person"}


def test_only_classes_of_the_road_are_salient():
    """A handbag may be told, and must not be."""
    record = clip(*[[[IDS[name], 0.9, 0.1, 0.1, 0.6, 0.6] for name in ("handbag", "bench", "person", "dog")]] * 6)
    evidence = clip_evidence(record, SETTINGS)
    assert evidence.present == {"handbag", "bench", "person", "dog"} and evidence.salient == {"person", "dog"}


def test_a_class_is_salient_by_area_or_by_duration():
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
    rider = [box("person", 0.8), box("motorcycle", 0.8, shifted)]  # two objects may overlap
    assert clip_evidence(clip(rider, rider), SETTINGS).present == {"person", "motorcycle"}


def test_only_other_names_of_one_body_become_unknown():
    twins = [box("car", 0.9), box("car", 0.8)]
    assert [whole for *_, whole in merge_bodies(twins, 0.7)] == [True, True]
    queue = [box(name, confidence, (0.3 + shift, 0.3, 0.6 + shift, 0.6))
             for name, confidence, shift in (("truck", 0.9, 0.0), ("car", 0.8, 0.05), ("bus", 0.7, 0.1))]
    assert [whole for *_, whole in merge_bodies(queue, 0.7)] == [True, False, True]  # the bus is not on the truck


def test_a_clip_whose_detection_failed_has_no_evidence():
    assert clip_evidence({"error": "x.mp4: not a readable video"}, SETTINGS) is None


@pytest.mark.parametrize("total", [31, 40, 97, 250, 1200, 1201])
def test_the_frames_of_the_model_are_among_those_of_the_detector(total):
    assert set(frame_indices(total, 16)) <= set(frame_indices(total, SETTINGS.num_frames))


def test_settings_that_cannot_work_are_named():
    missing = DetectorSettings("nowhere/yolo.pt", batch_size=0, absent_confidence=0.6)
    found = weights_problems(missing, "judge") + missing.problems("judge")
    assert len(found) == 3 and all(text.startswith("judge") for text in found)
    assert "nowhere/yolo.pt" in found[0]
    known = DetectorSettings("yolov8x.pt")
    assert weights_problems(known, "detector") + known.problems("detector") == []
    assert weights_problems(DetectorSettings(__file__), "detector") == []  # any file is accepted until it is loaded


def test_the_detector_must_see_the_frames_of_the_model():
    for frames in (16, 31, 46):
        assert frames_problems(DetectorSettings(num_frames=frames), "detector", 16) == []
    found = frames_problems(DetectorSettings(num_frames=32), "detector", 16)
    assert len(found) == 1 and found[0].startswith("detector.num_frames: 32") and "16, 31, 46" in found[0]
    assert frames_problems(DetectorSettings(num_frames=32), "detector", 1) == []  # the first frame is in any


def test_thresholds_reach_down_to_the_lowest_confidence_that_is_kept():
    assert DetectorSettings(absent_confidence=BOX_FLOOR).problems("detector") == []
    assert len(DetectorSettings(absent_confidence=BOX_FLOOR - 0.001).problems("detector")) == 1


def test_evidence_can_be_written_as_json():
    evidence = clip_evidence(clip([box("car", 0.8), box("bus", 0.3)], [box("car", 0.8), box("bus", 0.3)]), SETTINGS)
    assert json.loads(json.dumps(evidence_dict(evidence))) == {
        "present": ["car"], "unknown": ["bus"], "salient": ["car"], "seen": {"car": [0.0, 1.0]}, "counts": {"car": 1},
        "sides": {}, "motion": {}}


# ----------------------------------------------------------------------------------------------------------------------
# The detector itself


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A random YOLOv8 at a sixteenth of its width with COCO's first twelve classes, made from the shipped format."""
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
    for head in network.model[-1].cv3:  # enough confidence that there are boxes
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
    assert {file.suffix for file in BASE.iterdir()} <= {".safetensors", ".json", ""}  # no pickles
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
    detector = Detector(settings, "cpu")
    detector.network = spy
    detector.detect(red)
    assert [len(batch) for batch in spy.batches] == [2, 1]
    assert spy.batches[0][0][0, 0].tolist() == [0, 0, 255]


def test_boxes_of_a_frame_are_sorted_and_rounded(settings):
    found = SimpleNamespace(cls=torch.tensor([2.0, 0.0]), conf=torch.tensor([0.3, 0.8]),
                            xyxyn=torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.123456, 0.2, 0.3, 0.4]]))
    detector = Detector(settings, "cpu")
    detector.network = SimpleNamespace(names={0: "person", 2: "car"},
                                       predict=lambda batch, **options: [SimpleNamespace(boxes=found)])
    boxes = detector.detect(np.zeros((1, 8, 8, 3), np.uint8))
    assert boxes == [[[0, 0.8, 0.1235, 0.2, 0.3, 0.4], [2, 0.3, 0.1, 0.2, 0.3, 0.4]]]
    assert all(type(row[0]) is int for row in boxes[0])


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    """The toy world's detector with its classes in another order and under other names, and as it is, with three clips:
    `.plain .other` (settings), `.videos .folder`."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("renamed")
    about, state = json.loads((BASE / "detector.json").read_text()), load_file(BASE / "detector.safetensors")
    order = [5, 0, 11, 3, 2, 1, 4, 6, 10, 8, 9, 7]
    ours = {f"kind-{name}": name for name in about["names"]}
    about["names"] = [f"kind-{about['names'][old]}" for old in order]
    heads = [name for name, value in state.items() if ".cv3." in name and value.shape[:1] == (12,)]
    assert len(heads) == 6  # weight and bias at three scales
    save_file(state | {name: state[name][order].clone() for name in heads}, folder / "detector.safetensors")
    (folder / "detector.json").write_text(json.dumps(about))
    videos = [f"{i}.mp4" for i in range(3)]
    for i, video in enumerate(videos):
        world.write_video(folder / video, world.make_clip((7, i)).frames)
    common = DetectorSettings(image_size=320, num_frames=5)
    return SimpleNamespace(
        plain=replace(common, weights=str(assemble(BASE, folder / "plain.pt")),
                      classes={name: name for name in ours.values()}),
        other=replace(common, weights=str(assemble(folder, folder / "detector.pt")), classes=ours),
        videos=videos, folder=folder, entries=[SimpleNamespace(video=video) for video in videos])


def test_a_detector_with_other_names_and_ids_gives_equal_evidence_and_rewards(renamed, tmp_path):
    for settings in (renamed.plain, renamed.other):
        assert detect_clips(renamed.videos, renamed.folder, settings, tmp_path) == {}
    one, two = (load_evidence(tmp_path, renamed.entries, each) for each in (renamed.plain, renamed.other))
    assert one == two and all(len(evidence.present) > 1 for evidence in one.values())
    text = "The light turns green, then a car passes a bus while a person crosses."
    for video in renamed.videos:
        assert physics_aware_reward(text, one[video], "copilot") == physics_aware_reward(text, two[video], "copilot")
    unknown = set(COCO_NAMES) - set(renamed.plain.classes)  # what it was never taught
    assert all(unknown <= evidence.unknown for evidence in one.values())

    ignored = next(name for name in sorted(one["0.mp4"].present))
    without = replace(renamed.other, classes={**renamed.other.classes, f"kind-{ignored}": "none"})
    assert detect_clips(renamed.videos, renamed.folder, without, tmp_path) == {}  # other boxes, so another folder
    evidence = load_evidence(tmp_path, renamed.entries, without)
    assert all(ignored in each.unknown and ignored not in each.present for each in evidence.values())
    with pytest.raises(DetectionError, match="classes {'kind-airplane'.*, not None"):
        load_evidence(tmp_path, renamed.entries, replace(renamed.other, classes={}, weights="elsewhere/detector.pt"))


def test_classes_that_are_not_listed_or_not_ours_are_named(renamed):
    ours = renamed.other.classes
    for classes, words in (({}, ", ".join(sorted(ours))),
                           ({name: our for name, our in ours.items() if name != "kind-bus"}, "kind-bus")):
        detector = Detector(replace(renamed.other, classes=classes), "cpu")
        with pytest.raises(DetectionError, match=f"has classes that are not listed: {words}; say what each"):
            assert detector.class_ids
    assert Detector(renamed.other, "cpu").class_ids[0] == COCO_NAMES.index("bus")
    found = weights_problems(replace(renamed.other, classes={"kind-car": "auto", "kind-bus": "none"}), "judge")
    assert len(found) == 1 and found[0].startswith("judge.classes: auto: neither a class of COCO_NAMES")


def test_the_cache_is_made_resumed_and_loaded(tiny, entries, settings, tmp_path, monkeypatch):
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

    monkeypatch.setattr(Detector, "network", property(lambda self: pytest.fail("nothing was left to do")))
    assert detect_clips(videos, tiny.videos, settings, tmp_path) == {}
    assert detect_clips(videos, tiny.videos, replace(settings, absent_confidence=0.3), tmp_path) == {}  # the same boxes


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


def test_a_changed_clip_is_detected_again(tiny, settings, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(tiny.videos / "car.mp4", videos / "clip.mp4")
    detect_clips(["clip.mp4"], videos, settings, tmp_path / "cache")
    before = load_records(tmp_path / "cache", ["clip.mp4"], settings)
    shutil.copy(tiny.videos / "bus.mp4", videos / "clip.mp4")
    detect_clips(["clip.mp4"], videos, settings, tmp_path / "cache")
    assert load_records(tmp_path / "cache", ["clip.mp4"], settings) != before


def test_a_folder_of_images_has_the_boxes_of_its_video_until_it_changes(tiny, settings, tmp_path):
    videos, cache = tmp_path / "videos", tmp_path / "cache"
    videos.mkdir()
    shutil.copy(tiny.videos / "car.mp4", videos)
    folder, names = images_of(videos / "car.mp4", videos / "car.1"), ["car.1", "car.mp4"]
    assert detect_clips(names, videos, settings, cache) == {}
    records = load_records(cache, names, settings)
    assert records["car.1"]["frames"] == records["car.mp4"]["frames"] and "files" not in records["car.mp4"]
    assert records["car.1"]["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    file = clip_file(find_cache(cache, settings), "car.1")
    (folder / "notes.txt").write_text("not read")
    for image in folder.glob("*.png"):
        os.utime(image, (1, 1))  # as a copy of evidence and clips on another machine
    assert is_up_to_date(file, folder)

    def swap_images():
        (folder / "000001.png").rename(folder / "x")
        (folder / "000020.png").rename(folder / "000001.png")
        (folder / "x").rename(folder / "000020.png")

    def say_times(fps):
        (folder / "fps.txt").write_text(fps)

    for change in (swap_images, lambda: say_times("12"), lambda: say_times("13"), (folder / "000020.png").unlink):
        change()
        assert not is_up_to_date(file, folder)
        assert detect_clips(names, videos, settings, cache) == {} and is_up_to_date(file, folder)
    folder.rename(videos / "away")
    assert not is_up_to_date(file, folder)
    folder.mkdir()
    assert not is_up_to_date(file, folder)
    folder.rmdir()
    (videos / "away").rename(folder)
    assert is_up_to_date(file, folder)
    (folder / "000002.png").write_bytes(b"broken")
    failed = detect_clips(names, videos, settings, cache)
    assert failed == {"car.1": f"{folder}: 000002.png: not a readable JPEG or PNG image"}
    shutil.rmtree(folder)
    assert not is_up_to_date(file, folder) and "no such file" in detect_clips(names, videos, settings, cache)["car.1"]


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


def test_evidence_can_be_used_without_the_weights(tiny, entries, settings, tmp_path):
    detect_clips([entry.video for entry in entries], tiny.videos, settings, tmp_path)
    gone = replace(settings, weights="elsewhere/detector.pt")
    assert load_evidence(tmp_path, entries, gone) == load_evidence(tmp_path, entries, settings)
    with pytest.raises(DetectionError, match="weights detector.pt, not yolo.pt"):
        load_evidence(tmp_path, entries, replace(settings, weights="elsewhere/yolo.pt"))


def test_caches_of_one_name_differ_by_the_hash_of_the_weights(tiny, tmp_path):
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "weights.pt").write_text(folder)
        settings = DetectorSettings(weights=str(tmp_path / folder / "weights.pt"), num_frames=3)
        detect_clips(["car.mp4"], tiny.videos, settings, tmp_path / "cache", detector=OneCar(settings))
    load_records(tmp_path / "cache", ["car.mp4"], settings)
    with pytest.raises(DetectionError, match="several caches"):
        load_records(tmp_path / "cache", ["car.mp4"], replace(settings, weights="elsewhere/weights.pt"))


def test_boxes_of_another_ultralytics_version_are_not_mixed_in(tiny, entries, settings, tmp_path, monkeypatch):
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


def test_clips_with_the_same_name_do_not_collide(tiny, settings, tmp_path):
    for folder, name in (("a", "car.mp4"), ("b", "bus.mp4")):
        (tmp_path / "videos" / folder).mkdir(parents=True)
        shutil.copy(tiny.videos / name, tmp_path / "videos" / folder / "clip.mp4")
    names = ["a/clip.mp4", "b/clip.mp4"]
    detect_clips(names, tmp_path / "videos", settings, tmp_path / "cache")
    records = load_records(tmp_path / "cache", names, settings)
    assert records["a/clip.mp4"]["frames"] != records["b/clip.mp4"]["frames"]


def test_a_detector_with_other_classes_is_refused(weights, tmp_path):
    folder = tmp_path / "detector"
    folder.mkdir()
    about = json.loads((weights.parent / "detector.json").read_text())
    about["names"][2] = "rickshaw"
    (folder / "detector.json").write_text(json.dumps(about))
    shutil.copy(weights.parent / "detector.safetensors", folder)
    path = assemble(folder, folder / "detector.pt")
    with pytest.raises(DetectionError, match="has classes that are not listed: rickshaw; say what each"):
        Detector(DetectorSettings(weights=str(path), image_size=64), "cpu").detect(np.zeros((1, 64, 64, 3), np.uint8))


class OneCar:
    """All that a detector needs: fingerprint and detect. It always finds one car, in the right half."""

    def __init__(self, settings, version="1.0"):
        self.settings, self.version, self.shapes = settings, version, []

    def fingerprint(self):
        return {**fingerprint(self.settings), "onecar": self.version}

    def detect(self, frames):
        self.shapes.append(frames.shape)
        return [[box("car", 0.9, (0.5, 0.2, 1.0, 0.8))] for _ in frames]


def test_another_detector_needs_only_two_methods(tiny, entries, tmp_path):
    videos, settings = [entry.video for entry in entries], DetectorSettings(weights="some-hub/one-car", num_frames=5)
    detector = OneCar(settings)
    assert detect_clips(videos, tiny.videos, settings, tmp_path, detector=detector) == {}
    assert detector.shapes == [(5, 180, 320, 3)] * 6
    evidence = load_evidence(tmp_path, entries, settings)
    assert all(found.present == {"car"} and found.seen == {"car": (0.0, 1.0)} for found in evidence.values())
    record = load_records(tmp_path, videos, settings)["car.mp4"]
    assert record["onecar"] == "1.0" and "ultralytics" not in record
    detect_clips(videos, tiny.videos, settings, tmp_path, detector=detector)
    assert len(detector.shapes) == 6  # every clip had a record
    with pytest.raises(DetectionError, match="onecar 1.0, not 2.0"):
        detect_clips(videos, tiny.videos, settings, tmp_path, detector=OneCar(settings, "2.0"))


def test_detectors_without_a_weights_file_differ_by_name(tiny, entries, tmp_path):
    small, large = (DetectorSettings(weights=f"some-hub/{name}", num_frames=5) for name in ("small", "large"))
    detect_clips(["car.mp4"], tiny.videos, small, tmp_path, detector=OneCar(small))
    other = OneCar(large)
    detect_clips(["car.mp4"], tiny.videos, large, tmp_path, detector=other)
    assert len(other.shapes) == 1
    for settings, name in ((small, "small"), (large, "large")):
        assert load_records(tmp_path, ["car.mp4"], settings)["car.mp4"]["made_by"]["weights"] == name


def test_boxes_in_pixels_are_refused(tiny, settings, tmp_path):
    detector = OneCar(settings)
    for wrong in (box("car", 0.9, (160, 20, 320, 80)), [80, 0.9, *LARGE], [2, 0.9], ["car", 0.9, *LARGE]):
        detector.detect = lambda frames, wrong=wrong: [[wrong] for _ in frames]
        with pytest.raises(DetectionError, match="car.mp4: boxes must be"):
            detect_clips(["car.mp4"], tiny.videos, settings, tmp_path, detector=detector)


def damaged(record):
    """Texts that a clip's file may hold after a crash, on a full disk or after editing."""
    text, frames = json.dumps(record), record["frames"]
    yield from ("", text[: len(text) // 2], "[]", "null", '"error"', "7", "\x00" * 100)
    yield json.dumps({key: value for key, value in record.items() if key != "frames"})
    yield json.dumps({key: value for key, value in record.items() if key != "bytes"})
    yield json.dumps({**record, "frames": []})
    yield json.dumps({**record, "frames": [5]})
    yield json.dumps({**record, "frames": [{**frames[0], "time": 1.5}]})
    for bad in ([], [2], [80, 0.9, 0, 0, 1, 1], [2.0, 0.9, 0, 0, 1, 1], [2, 0.9, 0, 0, 64, 1], [2, "x", 0, 0, 1, 1]):
        yield json.dumps({**record, "frames": [{**frames[0], "boxes": [bad]}]})
    for bad in (["red"], ["red", None, None], ["mauve", None], [[], None], 2):  # of two boxes
        two = [[2, 0.9, 0, 0, 1, 1], [9, 0.9, 0, 0, 1, 1]]
        yield json.dumps({**record, "frames": [{**frames[0], "boxes": two, "colours": bad}]})


def test_a_damaged_record_is_replaced(tiny, tmp_path):
    settings = DetectorSettings(weights="one-car", num_frames=3)
    detector = OneCar(settings)
    detect_clips(["car.mp4", "bus.mp4"], tiny.videos, settings, tmp_path, detector=detector)
    whole = load_records(tmp_path, ["car.mp4", "bus.mp4"], settings)
    file, = tmp_path.glob("*/car-*.json")
    for times, text in enumerate(damaged(whole["car.mp4"]), start=1):
        file.write_text(text)
        with pytest.raises(DetectionError, match="no evidence yet for 1 of 2 clips"):
            load_records(tmp_path, list(whole), settings)
        assert detect_clips(list(whole), tiny.videos, settings, tmp_path, detector=detector) == {}
        assert load_records(tmp_path, list(whole), settings) == whole, text
        assert len(detector.shapes) == 2 + times  # the other clip's record was left alone


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(DetectionError, match="no such file: .*nothing.pt"):
        detect_clips(["a.mp4"], tmp_path, DetectorSettings(weights=str(tmp_path / "nothing.pt")), tmp_path)


def test_the_command_detects_and_prints_a_table(tiny, settings, tmp_path, capsys):
    flags = ["--data", tiny.data, "--video_root", tiny.videos, "--evidence_cache", tmp_path, "--num_frames", "3",
             "--num_val_videos", "2"]
    (tmp_path / "none.yaml").write_text("seed: 42\n")
    flags += ["--config", tmp_path / "none.yaml", "--detector", settings.weights, "--detector.image_size", "64"]
    assert detect_objects.main([*flags, "--detector.num_frames", "5"]) == 0
    assert "6 clips with evidence, 0 failed" in capsys.readouterr().out
    judge = ["--which", "judge", "--judge", settings.weights, "--judge.image_size", "96", "--judge.num_frames", "4"]
    assert detect_objects.main([*flags, *judge]) == 0
    assert "2 clips with evidence, 0 failed" in capsys.readouterr().out  # the held-out ones


def test_all_that_is_missing_is_in_one_message(tiny, tmp_path, capsys):
    def problems_of(*more):
        flags = ["--config", tmp_path / "none.yaml", "--data", tiny.data, "--video_root", tiny.videos]
        with pytest.raises(SystemExit) as stop:
            detect_objects.main([*flags, "--num_val_videos", "2", "--evidence_cache", tmp_path / "cache", *more])
        assert stop.value.code == 2 and not (tmp_path / "cache").exists()
        return capsys.readouterr().err

    (tmp_path / "none.yaml").write_text("seed: 42\n")
    text = problems_of("--num_frames", "3", "--detector.num_frames", "4", "--detector", "gone.pt")
    assert "2 problems" in text and "gone.pt" in text and "use 3, 5, 7" in text
    (tmp_path / "bad.json").write_text(json.dumps([{"video": "a.mp4"}, {"video": "../b.mp4", "q": "?", "a": "x"}]))
    text = problems_of("--data", tmp_path / "bad.json", "--video_root", "no/videos", "--detector", "gone.pt")
    assert "3 problems" in text and "2 bad rows" in text and "no/videos" in text and "gone.pt" in text
    text = problems_of("--data", "no.json", "--val_data", "nor.json", "--video_root", "no/videos")
    assert "3 problems" in text and "no.json" in text and "nor.json" in text
    (tmp_path / "out.json").write_text(json.dumps([{"video": "../b.mp4", "copilot": ["x"]}]))
    assert "leads out of the video root" in problems_of("--data", tmp_path / "out.json")


def test_clips_of_val_data_are_detected_too(tiny, settings, tmp_path, capsys):
    """The reward's detector runs on them too; the judge runs on nothing else."""
    rows = json.loads(tiny.data.read_text())
    for name, part in (("train.json", rows[:2]), ("val.json", rows[2:3])):
        (tmp_path / name).write_text(json.dumps(part))
    (tmp_path / "none.yaml").write_text("seed: 42\n")
    flags = ["--config", tmp_path / "none.yaml", "--data", tmp_path / "train.json", "--val_data", tmp_path / "val.json",
             "--video_root", tiny.videos, "--evidence_cache", tmp_path, "--num_frames", "3"]
    for which, count in (("detector", 3), ("judge", 1)):
        look = [f"--{which}", settings.weights, f"--{which}.image_size", "64", f"--{which}.num_frames", "3"]
        assert detect_objects.main([*flags, *look, "--which", which]) == 0
        assert f"{count} clips with evidence, 0 failed" in capsys.readouterr().out
        for path in tmp_path.glob("64px*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_help_does_not_import_torch():
    """`--help` and a mistyped flag are answered before anything heavy is imported."""
    code = """
import runpy, sys
sys.argv = ["detect_objects", *sys.argv[1:]]
try:
    runpy.run_module("stage3.detect_objects", run_name="__main__")
finally:
    print(sorted({"torch", "ultralytics", "decord", "dataset"} & set(sys.modules)))
"""
    for flag, status in (("--help", 0), ("--imagesize=3", 2)):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == status, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"
        assert status or ("--evidence_cache" in done.stdout and "detector.weights" in done.stdout)


def test_frames_keep_their_size_and_are_not_repeated(tiny):
    indices, times, frames = sample_clip(tiny.videos / "car.mp4", 31)
    assert frames.shape == (20, 180, 320, 3)  # the clip has 20 frames, each is used once
    assert indices.tolist() == list(range(20)) and times[0] == 0 and times[-1] == 1


def test_a_real_street_can_be_detected(shared, settings, tmp_path):
    settings = replace(settings, num_frames=3)
    assert detect_clips(["real_street.mp4"], shared, settings, tmp_path) == {}
    assert len(load_records(tmp_path, ["real_street.mp4"], settings)["real_street.mp4"]["frames"]) == 3
