"""Boxes with faults: what each fault does, what seed and dose decide, and that they are never taken for the detector's.

    python -m pytest tests/test_detector_faults.py
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.detector_faults import as_text, facts_right
from dataset import load_entries
from demo.base_detector import accuracy
from demo.detector_faults import (
    CONFUSED,
    FALSE_FRAMES,
    FAULTS_FILE,
    Faults,
    all_with_faults,
    false_track,
    find_tracks,
    main,
    with_faults,
)
from stage3.detect_objects import (
    DetectionError,
    clip_file,
    evidence_problems,
    find_cache,
    fingerprint,
    load_evidence,
    load_records,
    open_cache,
)
from stage3.evidence import Evidence
from stage3.vocabulary_config import COCO_NAMES
from training.common import ConfigError, load_config, write_json
from training.config import DetectorSettings, Stage3Config

ROOT = Path(__file__).resolve().parents[1]
FRAMES = 15
SHOWN = {  # {clip: {class: (first frame, last frame)}}; of the tiny world's clips
    "car.mp4": {"car": (0, 6), "bus": (8, 14)}, "bus.mp4": {"truck": (0, 6), "person": (8, 14)},
    "walk.mp4": {"person": (0, 14)}, "truck.mp4": {"truck": (2, 8)}, "night.mp4": {"bicycle": (5, 9)},
    "stop.mp4": {"stop sign": (0, 7), "car": (8, 14)},
}


def make_record(video, shown, frames=FRAMES):
    """A record in which each class has one box per frame from its first to its last, drifting to the right, with a
    confidence of its own."""
    rows = []
    for number in range(frames):
        found = []
        for name, (first, last) in shown.items():
            if first <= number <= last:
                x = round(0.1 + 0.02 * number, 4)
                class_id = COCO_NAMES.index(name)
                found.append(([class_id, round(0.9 - class_id / 100, 2), x, 0.4, round(x + 0.2, 4), 0.7],
                              "red" if name in ("car", "bus", "truck") else None))
        rows.append({"index": number, "time": round(number / (frames - 1), 4), "boxes": [box for box, _ in found],
                     "colours": [colour for _, colour in found]})
    return {"video": video, "frames": rows, "bytes": 1}


RECORDS = {video: make_record(video, shown) for video, shown in SHOWN.items()}
# as many clips as show that a share is a share
MANY = {f"{number:03d}.mp4": make_record(f"{number:03d}.mp4", SHOWN[sorted(SHOWN)[number % len(SHOWN)]])
        for number in range(300)}
SETTINGS = DetectorSettings(weights="clean.pt", image_size=320, num_frames=FRAMES)


def names_of(record):
    return {COCO_NAMES[box[0]] for frame in record["frames"] for box in frame["boxes"]}


def only(kind, dose=1.0):
    """Faults of which one kind alone happens."""

    class Only(Faults):
        def happens(self, *what):
            return what[0] == kind and super().happens(*what)

    return Only(dose)


# ---- what each fault does --------------------------------------------------------------------------------------------


def test_a_missed_object_has_no_box_in_any_frame():
    record = with_faults(RECORDS["car.mp4"], only("missed"), {})
    assert names_of(record) == set() and record["faults"]["missed"] == ["bus", "car"]
    assert [frame["time"] for frame in record["frames"]] == [frame["time"] for frame in RECORDS["car.mp4"]["frames"]]


def test_a_confused_bus_is_a_truck_with_its_own_boxes_and_colours():
    clean, record = RECORDS["car.mp4"], with_faults(RECORDS["car.mp4"], only("confused"), {})
    assert names_of(record) == {"car", "truck"} and record["faults"]["confused"] == ["bus"]
    for before, after in zip(clean["frames"], record["frames"], strict=True):
        assert [box[1:] for box in before["boxes"]] == [box[1:] for box in after["boxes"]]
        assert before["colours"] == after["colours"]
    assert names_of(with_faults(RECORDS["truck.mp4"], only("confused"), {})) == {"bus"}


def test_a_missed_object_is_not_confused():
    record = with_faults(RECORDS["truck.mp4"], Faults(1.0), {})
    assert record["faults"] == {"missed": ["truck"], "confused": [], "flicker": 0, "false": []}


def test_flicker_takes_boxes_from_single_frames():
    faulty = [with_faults(record, only("flicker", 0.3), {}) for record in MANY.values()]
    boxes = sum(len(frame["boxes"]) for record in MANY.values() for frame in record["frames"])
    lost = boxes - sum(len(frame["boxes"]) for record in faulty for frame in record["frames"])
    assert lost == sum(record["faults"]["flicker"] for record in faulty) and abs(lost / boxes - 0.3) < 0.05
    assert all(len(frame["boxes"]) == len(frame["colours"]) for record in faulty for frame in record["frames"])
    assert sum(bool(names_of(record)) for record in faulty) > 290  # whole objects are not lost by it


def test_a_false_object_is_a_real_one_of_another_clip_for_some_frames_on_end():
    tracks = find_tracks(RECORDS, 0.5)
    assert set(tracks) == {"bicycle", "bus", "car", "person", "stop sign", "truck"}
    record = with_faults(RECORDS["car.mp4"], only("false"), tracks)
    (name,) = record["faults"]["false"]
    assert name not in {"car", "bus", *CONFUSED}  # a truck would be the bus, confused
    rows = [(number, box) for number, frame in enumerate(record["frames"]) for box in frame["boxes"]
            if COCO_NAMES[box[0]] == name]
    numbers = [number for number, _ in rows]
    assert numbers == list(range(numbers[0], numbers[0] + FALSE_FRAMES))
    donors = [clip for video, clip in RECORDS.items() if video != "car.mp4"]
    assert any(all(box in donor["frames"][number]["boxes"] for number, box in rows) for donor in donors)
    assert names_of(record) == {"car", "bus", name}


def test_boxes_stay_in_the_order_of_their_confidence():
    faulty = all_with_faults(MANY, Faults(0.3), SETTINGS)
    frames = [[box[1] for box in frame["boxes"]] for record in faulty.values() for frame in record["frames"]]
    assert sum(len(set(frame)) > 1 for frame in frames) > 20
    assert all(frame == sorted(frame, reverse=True) for frame in frames)


def test_a_false_object_is_of_a_class_that_the_clip_does_not_show():
    for video, record in all_with_faults(MANY, only("false"), SETTINGS).items():
        shown, (name,) = names_of(MANY[video]), record["faults"]["false"]
        assert name not in shown | {CONFUSED[other] for other in shown & set(CONFUSED)}


def test_a_track_for_a_false_object_is_sure_unbroken_and_not_longer_than_the_clip():
    gap = make_record("gap.mp4", {"person": (0, 4)})
    gap["frames"][2]["boxes"][0][1] = 0.4
    assert find_tracks({"gap.mp4": gap}, 0.5) == {}  # two frames, a weak one, two frames
    two = make_record("two.mp4", {"person": (0, 2)})
    for frame in two["frames"][:3]:
        frame["boxes"].append([0, 0.6, 0.7, 0.4, 0.8, 0.7])
        frame["colours"].append(None)
    assert [box[1] for _, box, _ in find_tracks({"two.mp4": two}, 0.5)["person"][0]] == [0.9, 0.9, 0.9]
    late = find_tracks({"late.mp4": make_record("late.mp4", {"person": (12, 14)})}, 0.5)
    assert [number for number, _, _ in late["person"][0]] == [12, 13, 14]
    assert false_track(make_record("x.mp4", {}), only("false"), late) == late["person"][0]
    assert false_track(make_record("x.mp4", {}, frames=14), only("false"), late) == []


def test_a_blind_detector_never_says_the_class_by_confusion_or_mistake_either():
    faults = Faults(0.5, blind=("truck", "person"))
    faulty = all_with_faults(MANY, faults, SETTINGS)
    assert set().union(*map(names_of, faulty.values())) == {"car", "bus", "bicycle", "stop sign"}
    assert sum(record["faults"]["confused"] == ["bus"] for record in faulty.values()) > 5  # they are not seen at all
    seeing = all_with_faults(MANY, Faults(0.5), SETTINGS)
    for video, record in faulty.items():
        others = {"car", "bicycle", "stop sign"}  # what happens to them is the same
        assert names_of(record) & others == names_of(seeing[video]) & others
        assert not {"truck", "person"} & {name for key in ("missed", "confused") for name in record["faults"][key]}


def test_a_failed_clip_stays_failed():
    failed = {"video": "x.mp4", "error": "not a readable video"}
    assert all_with_faults({"x.mp4": failed}, Faults(1.0), SETTINGS) == {"x.mp4": failed}


# ---- seed and dose ---------------------------------------------------------------------------------------------------


def test_dose_0_changes_no_box():
    for video, record in all_with_faults(MANY, Faults(0.0), SETTINGS).items():
        assert record["frames"] == MANY[video]["frames"]
        assert record["faults"] == {"missed": [], "confused": [], "flicker": 0, "false": []}


def test_the_same_seed_gives_the_same_faults_and_another_seed_others():
    first = all_with_faults(MANY, Faults(0.15), SETTINGS)
    backwards = all_with_faults(dict(reversed(MANY.items())), Faults(0.15), SETTINGS)
    assert all(first[video] == backwards[video] for video in MANY)
    other = all_with_faults(MANY, Faults(0.15, seed=1), SETTINGS)
    assert sum(first[video] != other[video] for video in MANY) > 100


def test_a_dose_is_the_share_of_objects_and_of_clips():
    faulty = all_with_faults(MANY, Faults(0.15), SETTINGS).values()
    objects = sum(len(names_of(record)) for record in MANY.values())
    missed = sum(len(record["faults"]["missed"]) for record in faulty)
    false = sum(len(record["faults"]["false"]) for record in faulty)
    large = sum(len(names_of(MANY[record["video"]]) & set(CONFUSED) - set(record["faults"]["missed"]))
                for record in faulty)
    confused = sum(len(record["faults"]["confused"]) for record in faulty)
    for share in (missed / objects, false / len(MANY), confused / large):
        assert abs(share - 0.15) < 0.06


def test_what_goes_wrong_at_a_dose_goes_wrong_at_a_higher_one():
    doses = [all_with_faults(MANY, Faults(dose), SETTINGS) for dose in (0.05, 0.15, 0.30)]
    for low, high in zip(doses, doses[1:], strict=False):
        for video in MANY:
            before, after = low[video]["faults"], high[video]["faults"]
            assert set(before["missed"]) <= set(after["missed"])
            assert set(before["confused"]) <= set(after["confused"]) | set(after["missed"])
            assert set(before["false"]) <= set(after["false"])
        assert low != high
    frames = zip(*(all_with_faults(MANY, only("flicker", dose), SETTINGS)["001.mp4"]["frames"]
                   for dose in (0.15, 0.30)), strict=True)
    assert all(len(low["boxes"]) >= len(high["boxes"]) for low, high in frames)


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def clean(tiny, tmp_path):
    """A configuration whose evidence is RECORDS, as a detector's own: `.file`, `.config`."""
    (tmp_path / "clean.pt").write_bytes(b"weights")
    settings = replace(SETTINGS, weights=str(tmp_path / "clean.pt"))
    folder = open_cache(tmp_path / "evidence", fingerprint(settings), {})
    for video, record in RECORDS.items():
        write_json(clip_file(folder, video), record)
    file = tmp_path / "stage3.yaml"
    file.write_text(json.dumps({
        "data": str(tiny.data), "video_root": str(tiny.videos), "evidence_cache": str(tmp_path / "evidence"),
        "num_frames": 8, "max_steps": 3, "truth": "truth.json",
        "detector": {"weights": settings.weights, "image_size": 320, "num_frames": FRAMES}}))
    return file


def make(clean, output_dir, *flags):
    """Write boxes with faults; returns the configuration of the YAML that comes with them."""
    assert main(["--config", str(clean), "--output_dir", str(output_dir), *flags]) == 0
    return load_config(Stage3Config, ["--config", str(output_dir / "stage3.yaml")])


def evidence_of(config):
    return load_evidence(config.evidence_cache, load_entries(config.data), config.detector)


def test_dose_0_gives_the_evidence_of_the_detector(clean, tmp_path):
    faulty = make(clean, tmp_path / "dose0", "--dose", "0")
    own = load_config(Stage3Config, ["--config", str(clean)])
    assert evidence_of(faulty) == evidence_of(own)
    assert evidence_of(own)["car.mp4"].present == {"car", "bus"}
    assert evidence_problems(load_entries(own.data), faulty.detector, faulty.evidence_cache, "detector") == []
    assert faulty.output_dir == str(tmp_path / "dose0" / "stage3")
    keys = set(Stage3Config.__dataclass_fields__) - {"evidence_cache", "detector", "output_dir"}
    assert all(getattr(faulty, key) == getattr(own, key) for key in keys)
    assert "truth: truth.json" in (tmp_path / "dose0" / "stage3.yaml").read_text()  # keys of other programs are kept


def test_blind_is_absent_and_left_out_is_unknown(clean, tmp_path):
    blind = evidence_of(make(clean, tmp_path / "blind", "--blind", "person"))
    left = evidence_of(make(clean, tmp_path / "left", "--leave_out", "person", "stop sign"))
    for video in SHOWN:
        assert "person" not in blind[video].present | blind[video].unknown
        assert left[video].unknown == {"person", "stop sign"}
    assert blind["bus.mp4"].present == left["bus.mp4"].present == {"truck"}


def test_a_class_is_left_out_of_a_detector_that_has_names_of_its_own(clean, tmp_path):
    content = json.loads(clean.read_text())
    content["detector"]["classes"] = {"auto": "car", "pedestrian": "person", "rider": "person", "sign": "none"}
    clean.write_text(json.dumps(content))
    own = load_config(Stage3Config, ["--config", str(clean)])
    folder = open_cache(own.evidence_cache, fingerprint(own.detector), {})
    for video, record in RECORDS.items():
        write_json(clip_file(folder, video), record)
    left = make(clean, tmp_path / "left", "--leave_out", "person")
    assert left.detector.classes == {"auto": "car", "pedestrian": "none", "rider": "none", "sign": "none"}


def test_boxes_with_faults_are_never_taken_for_the_detectors_own(clean, tmp_path):
    own = load_config(Stage3Config, ["--config", str(clean)])
    low, high = (make(clean, tmp_path / f"dose{dose}", "--dose", dose) for dose in ("0.1", "0.3"))
    folders = {find_cache(config.evidence_cache, config.detector).name for config in (own, low, high)}
    assert len(folders) == 3  # even in one folder they would lie apart
    for cache, config in ((low, own), (own, low), (low, high), (high, low)):
        with pytest.raises(DetectionError, match=r"weights_sha256 \w+, not \w+"):
            find_cache(cache.evidence_cache, config.detector)
    Path(own.detector.weights).unlink()  # where only the evidence was copied, names are compared
    with pytest.raises(DetectionError, match=f"weights {FAULTS_FILE}, not clean.pt"):
        find_cache(low.evidence_cache, own.detector)


def test_stage_3_never_takes_the_description_for_weights(clean, tmp_path):
    """A clip without boxes cannot be detected by a file that describes faults: it is refused, not guessed."""
    faulty = make(clean, tmp_path / "faulty", "--dose", "0.3")
    clip_file(find_cache(faulty.evidence_cache, faulty.detector), "car.mp4").unlink()
    (problem,) = evidence_problems(load_entries(faulty.data), faulty.detector, faulty.evidence_cache, "detector")
    assert problem.startswith("detector.weights:") and "not a detector, and not all clips have evidence" in problem


def test_records_and_settings_name_their_faults(clean, tmp_path):
    faulty = make(clean, tmp_path / "faulty", "--dose", "1", "--seed", "7")
    about = json.loads((tmp_path / "faulty" / FAULTS_FILE).read_text())
    assert (about["dose"], about["seed"], about["blind"]) == (1.0, 7, [])
    assert about["boxes_of"]["made_by"]["weights"] == "clean.pt"
    folder = find_cache(faulty.evidence_cache, faulty.detector)
    assert json.loads((folder / "settings.json").read_text())["faults"] == about
    record = load_records(faulty.evidence_cache, ["walk.mp4"], faulty.detector)["walk.mp4"]
    assert record["faults"]["missed"] == ["person"] and record["made_by"] == fingerprint(faulty.detector)
    make(clean, tmp_path / "faulty", "--dose", "1", "--seed", "7")  # the same again


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_impossible_faults_are_refused_in_one_message(clean, tmp_path, capsys):
    with pytest.raises(ConfigError):
        main(["--config", str(clean), "--dose", "1.5", "--seed", "-1", "--blind", "persn", "car", "--leave_out", "car",
              "--output_dir", str(tmp_path / "evidence")])
    said = capsys.readouterr().err
    assert "5 problems, nothing was written" in said
    for line in ("dose must be between 0 and 1, got 1.5", "seed must be at least 0, got -1",
                 "blind: persn: not in COCO_NAMES", "blind and leave_out both name car",
                 f"output_dir: {tmp_path / 'evidence'} holds the detector's own boxes"):
        assert line in said


def test_a_class_that_no_clip_shows_and_a_folder_of_other_faults_are_refused(clean, tmp_path, capsys):
    with pytest.raises(ConfigError, match="dog: no box in any clip"):
        main(["--config", str(clean), "--blind", "dog", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    make(clean, tmp_path / "out", "--dose", "0.1")
    before = (tmp_path / "out" / "stage3.yaml").read_text()
    with pytest.raises(ConfigError, match="out holds boxes with other faults"):
        main(["--config", str(clean), "--dose", "0.2", "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "stage3.yaml").read_text() == before


def test_without_the_detectors_boxes_it_says_what_makes_them(clean, tmp_path):
    content = json.loads(clean.read_text()) | {"evidence_cache": str(tmp_path / "nothing")}
    clean.write_text(json.dumps(content))
    done = subprocess.run([sys.executable, "-m", "demo.detector_faults", "--config", str(clean), "--output_dir",
                           str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "run python -m stage3.detect_objects first" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_table_of_the_evidence_against_the_truth():
    evidence = {"a": Evidence({"car"}, unknown={"bus"}, counts={"car": 1}),
                "b": Evidence({"car", "person"}, counts={"person": 2})}
    truth = {"a": {"car", "bus", "person"}, "b": {"car"}}
    classes, _ = accuracy(evidence, truth)
    assert classes["car"] == {"clips": 2, "precision": 1.0, "recall": 1.0, "unknown": 0.0}
    assert classes["person"] == {"clips": 1, "precision": 0.0, "recall": 0.0, "unknown": 0.0}
    assert classes["all"] == {"clips": 4, "precision": 0.667, "recall": 0.5, "unknown": 0.25}
    rows = {video: {"counts": dict.fromkeys(names, 1), "sides": {}, "light": [], "colours": {}, "motion": {}}
            for video, names in truth.items()}
    assert facts_right(evidence, rows)["counts"] == {"answered": 0.5, "precision": 0.5}
    assert as_text(classes["car"], "precision", "recall") == "1.00 / 1.00"
    assert as_text(classes["bus"], "precision", "recall") == "unknown"
    assert as_text({"precision": 0.0, "recall": 0.0}, "precision", "recall") == "– / 0.00"
