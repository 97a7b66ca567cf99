"""Labels as evidence: Scalabel, COCO and YOLO files as their specifications have them, and files that are wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import write_images

from dataset import DataError, load_entries
from stage3 import import_boxes
from stage3.detect_objects import detect_clips, load_evidence, load_records
from stage3.grpo_reward_func import physics_aware_reward
from stage3.import_boxes import LabelledFrame, make_record, match_clips, split_name
from training.common import ConfigError
from training.config import DetectorSettings

CLASSES = {"pedestrian": "person", "car": "car", "bike": "bicycle", "traffic sign": "none"}
# Of car.mp4 and bus.mp4 (20 frames of 320 x 180 at 8 fps): {clip: {frame number: [(class, x1, y1, x2, y2), ...]}}
BOXES = {
    "car": {number: [] for number in (2, 6, 8, 12, 14, 16, 18)} | {
        0: [("car", 32, 18, 160, 90), ("traffic sign", 0, 0, 32, 18)], 4: [("car", 64, 18, 192, 90)],
        10: [("pedestrian", 160, 90, 192, 171)], 19: [("pedestrian", 160, 90, 192, 171)]},
    "bus": {4: [("bike", 0, 0, 64, 90)]},
}


def write_scalabel(path, by="name"):
    rows = []
    for clip, frames in BOXES.items():
        for number, boxes in frames.items():
            labels = [{"id": str(i), "category": name, "box2d": dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)),
                       "attributes": {"occluded": False}} for i, (name, *box) in enumerate(boxes)]
            row = {"name": f"{clip}-{number:07d}.jpg", "labels": labels or None}
            if by == "index":
                row |= {"name": f"{number}.jpg", "videoName": clip, "frameIndex": number}
            elif by == "timestamp":
                row |= {"name": f"{clip}.jpg", "timestamp": 1000 * number / 8}
            rows.append(row)
        rows[-1]["labels"] = [*(rows[-1]["labels"] or []), {"category": "lane/crosswalk", "poly2d": []}]
    path.write_text(json.dumps({"frames": rows, "config": {"imageSize": {"width": 320, "height": 180}}}))
    return path


def write_coco(path, videos=False):
    names = sorted(CLASSES)
    content = {"categories": [{"id": 10 + i, "name": name} for i, name in enumerate(names)], "images": [],
               "annotations": [], "videos": [{"id": i, "name": clip} for i, clip in enumerate(BOXES)]}
    for video_id, (clip, frames) in enumerate(BOXES.items()):
        for number, boxes in frames.items():
            image = {"id": len(content["images"]), "file_name": f"{clip}/{number:06d}.jpg", "width": 320, "height": 180}
            if videos:
                image |= {"file_name": f"{100 * number}.jpg", "video_id": video_id, "frame_id": number}
            content["images"].append(image)
            for name, x1, y1, x2, y2 in boxes:
                content["annotations"].append({
                    "id": len(content["annotations"]), "image_id": image["id"], "category_id": 10 + names.index(name),
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0})
    if not videos:
        del content["videos"]
    path.write_text(json.dumps(content))
    return path


def write_yolo(folder, names=True):
    folder.mkdir()
    order = sorted(CLASSES)
    if names:
        (folder / "classes.txt").write_text("\n".join(order) + "\n")
    for clip, frames in BOXES.items():
        for number, boxes in frames.items():
            lines = [f"{order.index(name)} {(x1 + x2) / 640:.6f} {(y1 + y2) / 360:.6f} {(x2 - x1) / 320:.6f} "
                     f"{(y2 - y1) / 180:.6f}" for name, x1, y1, x2, y2 in boxes]
            (folder / f"{clip}_{number}.txt").write_text("\n".join(lines))
    return folder


FORMS = {
    "names": ("scalabel", lambda path: write_scalabel(path / "labels.json")),
    "indices": ("scalabel", lambda path: write_scalabel(path / "labels.json", "index")),
    "timestamps": ("scalabel", lambda path: write_scalabel(path / "labels.json", "timestamp")),
    "coco": ("coco", lambda path: write_coco(path / "labels.json")),
    "coco videos": ("coco", lambda path: write_coco(path / "labels.json", videos=True)),
    "yolo": ("yolo", lambda path: write_yolo(path / "labels")),
    "yolo ids": ("yolo", lambda path: write_yolo(path / "labels", names=False)),
}


@pytest.fixture
def run(tiny, tmp_path):
    """Import `labels`; returns the settings that find them again."""

    def run(labels, form, *flags, classes=CLASSES):
        (tmp_path / "config.yaml").write_text(json.dumps({
            "data": str(tiny.data), "video_root": str(tiny.videos), "evidence_cache": str(tmp_path / "evidence"),
            "detector": {"weights": str(labels), "classes": classes}}))
        assert import_boxes.main(["--config", str(tmp_path / "config.yaml"), "--format", form, *flags]) == 0
        return DetectorSettings(weights=str(labels), classes=classes)

    return run


@pytest.mark.parametrize("kind", FORMS)
def test_labels_of_every_format_give_the_same_evidence(kind, run, tiny, tmp_path, capsys):
    form, write = FORMS[kind]
    classes = CLASSES if kind != "yolo ids" else {str(i): CLASSES[name] for i, name in enumerate(sorted(CLASSES))}
    settings = run(write(tmp_path), form, classes=classes)
    evidence = load_evidence(tmp_path / "evidence", load_entries(tiny.data), settings)
    car, bus = evidence["car.mp4"], evidence["bus.mp4"]
    assert car.present == car.salient == {"car", "person"} and "bicycle" not in car.unknown  # surely absent
    assert car.seen["car"] == pytest.approx((0.0, 4 / 19), abs=1e-3)
    assert car.seen["person"] == pytest.approx((10 / 19, 1.0), abs=1e-3)
    assert "bus" in car.unknown and "traffic light" in car.unknown  # the labels have no such class
    assert bus.present == {"bicycle"} and {"car", "person"} <= bus.unknown  # one moment says nothing of the others
    assert [video for video, clip in evidence.items() if clip is None] != []  # clips without labels
    record = load_records(tmp_path / "evidence", ["car.mp4"], settings)["car.mp4"]
    assert record["frames"][0]["boxes"] == [[2, 1.0, 0.1, 0.1, 0.5, 0.5]]
    said = capsys.readouterr().out
    assert "2 of 6 clips" in said and "1 clips have labels of single moments only" in said


def test_imported_labels_reward_what_they_show(run, tmp_path, tiny):
    settings = run(write_coco(tmp_path / "labels.json"), "coco")
    evidence = load_evidence(tmp_path / "evidence", load_entries(tiny.data), settings)["car.mp4"]
    true = physics_aware_reward("A car stops, then a pedestrian crosses.", evidence, "copilot")
    false = physics_aware_reward("A car stops, then a bicycle crosses.", evidence, "copilot")
    unknown = physics_aware_reward("A car stops, then a bus crosses.", evidence, "copilot")
    assert true.hallucination > false.hallucination and unknown.hallucination > false.hallucination


def test_the_light_colours_of_bdd100k_are_what_the_lights_show(run, tiny, tmp_path):
    """Rows as BDD100K's det_20 labels have them; https://doc.bdd100k.com/format.html: trafficLightColor is one of
    red, green, yellow, none (older files: NA)."""
    shown = {0: ("NA", "red"), 4: ("red", "none"), 8: ("green", "none"), 12: ("yellow", "NA"), 16: ("none", "NA"),
             19: ("red", "red")}
    rows = []
    for number, (first, second) in shown.items():
        labels = [{"id": f"{number}-{i}", "category": "traffic light", "manualShape": True, "manualAttributes": True,
                   "attributes": {"occluded": False, "truncated": False, "trafficLightColor": colour},
                   "box2d": {"x1": 32.0 + 64 * i, "y1": 18.0, "x2": 48.0 + 64 * i, "y2": 54.0}}
                  for i, colour in enumerate((first, second))]
        car = {"id": "1", "category": "car", "attributes": {"occluded": True, "trafficLightColor": "NA"},
               "box2d": {"x1": 160.0, "y1": 90.0, "x2": 320.0, "y2": 170.0}}
        sign = {"id": "2", "category": "traffic sign", "attributes": {"trafficLightColor": "green"},
                "box2d": {"x1": 0.0, "y1": 0.0, "x2": 32.0, "y2": 18.0}}
        rows.append({"name": f"car-{number:07d}.jpg", "attributes": {"weather": "clear", "timeofday": "night"},
                     "timestamp": 1000 * number / 8, "labels": [sign, car, *labels]})
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"frames": rows, "config": {"imageSize": {"width": 320, "height": 180}}}))
    classes = {"traffic light": "traffic light", "car": "car", "traffic sign": "none"}
    settings = run(path, "scalabel", classes=classes)
    record = load_records(tmp_path / "evidence", ["car.mp4"], settings)["car.mp4"]
    assert [frame["colours"] for frame in record["frames"]] == [
        [None, None, "red"], [None, "red", None], [None, "green", None], [None, "amber", None], [None] * 3,
        [None, "red", "red"]]
    evidence = load_evidence(tmp_path / "evidence", load_entries(tiny.data), settings)["car.mp4"]
    assert evidence.light == ("red", "unknown", "green", "amber", "red") or "unknown" in evidence.light
    assert [state for state in evidence.light if state != "unknown"] == ["red", "green", "amber", "red"]
    assert evidence.colours == {}  # of vehicles, the labels say nothing


def test_labels_without_colours_leave_them_unknown(run, tiny, tmp_path):
    settings = run(write_scalabel(tmp_path / "labels.json"), "scalabel")
    record = load_records(tmp_path / "evidence", ["car.mp4"], settings)["car.mp4"]
    assert all("colours" not in frame for frame in record["frames"])
    evidence = load_evidence(tmp_path / "evidence", load_entries(tiny.data), settings)
    assert evidence["car.mp4"].colours is None and evidence["car.mp4"].light is None
    assert evidence["car.mp4"].counts == {"car": 1}  # two people, or one with a gap of five frames
    assert evidence["bus.mp4"].counts is None and evidence["bus.mp4"].motion is None  # labels of a single moment


def test_frame_numbers_of_another_rate(run, tmp_path, tiny):
    """Labels at 4 per second of a clip of 8: number 3 is frame 6."""
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / "car_3.txt").write_text("0 0.5 0.5 0.2 0.2 0.9\n")
    settings = run(folder, "yolo", "--label_fps", "4", classes={"0": "car"})
    record = load_records(tmp_path / "evidence", ["car.mp4"], settings)["car.mp4"]
    frame, = record["frames"]
    assert frame["time"] == pytest.approx(6 / 19, abs=1e-3) and frame["boxes"] == [[2, 0.9, 0.4, 0.4, 0.6, 0.6]]


def broken(write, change):
    """A label file whose content has been changed."""

    def make(path):
        file = write(path / "labels.json")
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        return file

    return make


def first_frame(content):
    return next(row for row in content["frames"] if row["name"] == "car-0000000.jpg")


def first_box(content):
    return first_frame(content)["labels"][0]["box2d"]


@pytest.mark.parametrize("form, make, words", [
    ("scalabel", lambda path: path / "none.json", "no file or folder of labels at"),
    ("coco", lambda path: write_scalabel(path / "labels.json"), "is not coco: 'categories' is missing"),
    ("yolo", lambda path: write_scalabel(path / "labels.json"), "a folder of txt files is expected"),
    ("scalabel", broken(write_scalabel, lambda c: first_box(c).pop("x2")), "is not scalabel: 'x2' is missing"),
    ("scalabel", broken(write_scalabel, lambda c: first_box(c).update(x2=4000)),
     "frame car-0000000.jpg: the box [32.0, 18.0, 4000.0, 90.0] of a car (1.0) does not fit into a frame of 320 x 180"),
    ("scalabel", broken(write_scalabel, lambda c: first_frame(c).update(name="car-0000020.jpg")),
     "frame 20 of a clip of 20 frames (--label_fps N"),
    ("scalabel", broken(write_scalabel, lambda c: first_frame(c).update(name="car.jpg")),
     "frame car.jpg: no timestamp, and no frame number"),
    ("scalabel", broken(write_scalabel, lambda c: first_frame(c).update(name="car.jpg", timestamp=10_000)),
     "frame car.jpg: 10.0 s, in a clip of 2.4 s"),
    ("scalabel", broken(write_scalabel, lambda c: c.update(frames=[])), "none of the clips in"),
    ("coco", broken(write_coco, lambda c: c["annotations"][0].update(category_id=99)), "is not coco: 99 is missing"),
    ("coco", broken(write_coco, lambda c: c["categories"][1].update(name="Truck")),
     "classes that are not listed: Truck; say what each of its classes is in our words (none ignores one), as in "
     "classes: {Truck: truck, bike: bicycle, pedestrian: person, traffic sign: none}"),
])
def test_what_is_wrong_with_labels_is_said_and_nothing_is_written(form, make, words, run, tmp_path, capsys):
    with pytest.raises(ConfigError):
        run(make(tmp_path), form)
    assert words in capsys.readouterr().err and not (tmp_path / "evidence").exists()


def test_a_lost_clip_is_named(run, tiny, tmp_path, capsys):
    with pytest.raises(ConfigError):
        run(write_coco(tmp_path / "labels.json"), "coco", "--video_root", str(tmp_path))
    assert "car.mp4: no such file" in capsys.readouterr().err


def test_labels_are_not_run_as_a_detector(run, tiny, tmp_path):
    from stage3.detect_objects import evidence_problems

    entries, labels = load_entries(tiny.data), write_coco(tmp_path / "labels.json")
    settings = DetectorSettings(weights=str(labels), classes=CLASSES)
    problem, = evidence_problems(entries, settings, tmp_path / "evidence", "detector")
    assert "holds labels, not a detector" in problem and "python -m stage3.import_boxes" in problem
    run(labels, "coco")
    assert evidence_problems(entries, settings, tmp_path / "evidence", "detector") == []
    labels.write_text(labels.read_text() + " ")  # other labels than those that were imported
    assert evidence_problems(entries, settings, tmp_path / "evidence", "detector") != []
    assert detect_clips([], tiny.videos, replace(settings, weights=__file__), tmp_path / "other") == {}


@pytest.mark.parametrize("name, expected", [
    ("b1c66a42-6f7d68ca-0000012.jpg", ("b1c66a42-6f7d68ca", 12)),
    ("b1c66a42-6f7d68ca.jpg", ("b1c66a42-6f7d68ca", None)),
    ("00067cfb-53535423.jpg", ("00067cfb-53535423", None)), ("00067cfb-53535423-0000001.jpg", ("00067cfb-53535423", 1)),
    ("clips/a_b_7.txt", ("a_b", 7)), ("a_b/0007.jpg", ("a_b", 7)), ("0007.jpg", ("0007", None)),
    ("a.b_3.jpg", ("a.b", 3)),
])
def test_names_of_frames(name, expected):
    assert split_name(name) == expected


def test_labels_of_a_folder_of_images_go_by_the_numbers_in_the_names(tmp_path):
    frames = np.zeros((5, 64, 64, 3), np.uint8)
    folder = write_images(tmp_path / "drive", frames, "cam_{}.png", start=98)  # 98 .. 102
    labels = [LabelledFrame("drive", f"label {number}", [], number, named=True) for number in (98, 102)]
    labels += [LabelledFrame("drive", "an index", [], 1), LabelledFrame("drive", "a time", [], 7, 0.3, named=True)]
    record = make_record("drive", folder, labels, {}, None)
    assert [row["time"] for row in record["frames"]] == [0.0, 0.25, 0.75, 1.0]
    assert record["bytes"] == sum(file.stat().st_size for file in folder.iterdir()) and record["files"]
    with pytest.raises(DataError, match="label 5: 0 images in .*drive have the number 5"):
        make_record("drive", folder, [LabelledFrame("drive", "label 5", [], 5, named=True)], {}, None)
    record = make_record("drive", folder, labels[:1], {}, 490.0)  # numbers of a second, as of the video before
    assert record["frames"][0]["time"] == 0.5
    write_images(folder, frames[:1], "other_{}.png", start=98)
    with pytest.raises(DataError, match="label 98: 2 images in .*drive have the number 98"):
        make_record("drive", folder, labels[:1], {}, None)


def test_folders_whose_names_hold_dots_are_told_apart():
    frames = [LabelledFrame("2024.01.06", "x", []), LabelledFrame("drive.mov", "y", [])]
    assert list(match_clips(frames, ["a/2024.01.05", "a/2024.01.06", "drive.mp4"])) == ["a/2024.01.06", "drive.mp4"]
