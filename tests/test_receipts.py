"""What stands behind each object that an answer names; generate.py --detect."""

import json

import pytest
from test_generate import run, world  # noqa: F401  the fixture

import generate
import stage3.detect_objects
from stage3.receipts import lines, paint, receipts
from stage3.vocabulary_config import COCO_NAMES
from training.common import ConfigError
from training.config import DetectorSettings

PERSON, CAR, BUS, DOG = (COCO_NAMES.index(name) for name in ("person", "car", "bus", "dog"))
TEXT = "A red car and a bus wait. No truck is there. A pedestrian crosses."


def record_of(*frames):
    """Frames as lists of [class, confidence, x1, y1, x2, y2]; the colour of each box is red."""
    return {"video": "a.mp4", "frames": [
        {"index": i, "time": i / (len(frames) - 1), "boxes": boxes, "colours": ["red"] * len(boxes)}
        for i, boxes in enumerate(frames)]}


SEEN = record_of(
    [[CAR, 0.6, 0.1, 0.5, 0.3, 0.7]], [[CAR, 0.9, 0.2, 0.5, 0.4, 0.7], [CAR, 0.8, 0.6, 0.5, 0.7, 0.6]],
    [[CAR, 0.4, 0.3, 0.5, 0.5, 0.7], [PERSON, 0.4, 0.8, 0.5, 0.9, 0.9]], [[DOG, 0.95, 0, 0, 0.1, 0.1]],
    [[CAR, 0.7, 0.3, 0.4, 0.5, 0.7]])


def test_each_object_has_its_frames_its_time_and_its_best_box():
    found = {row["what"]: row for row in receipts(TEXT, SEEN, DetectorSettings(), 8.0)}
    assert {what: row["verdict"] for what, row in found.items()} == {
        "car": "supported", "car colour red": "supported", "bus": "unsupported", "truck": "negated",
        "person": "unknown"}
    car = found["car"]
    assert (car["words"], TEXT[car["start"]:car["end"]]) == ("car", "car")
    # in the frames at 0, 2 and 8 s; at 4 s it is below present_confidence
    assert (car["frames"], car["of"], car["first"], car["last"]) == (3, 5, 0.0, 8.0)
    assert car["best"] == {"second": 2.0, "confidence": 0.9, "box": [0.2, 0.5, 0.4, 0.7]}
    assert all("best" not in row for what, row in found.items() if what != "car")


def test_lines_and_colours_say_the_verdicts():
    rows = receipts(TEXT, SEEN, DetectorSettings(), 8.0)
    assert lines(rows)[:3] == [
        "  red (car colour red): seen",
        "  car: seen in 3 of 5 frames, 0 to 8 s; best at 2 s, confidence 0.90, x 0.20-0.40, y 0.50-0.70",
        "  bus: not seen"]
    painted = paint(TEXT, rows)
    for words, colour in (("car", 32), ("bus", 31), ("truck", 36), ("pedestrian", 33)):
        assert f"\033[{colour}m{words}\033[0m" in painted
    plain = painted
    for colour in (31, 32, 33, 36):
        plain = plain.replace(f"\033[{colour}m", "")
    assert plain.replace("\033[0m", "") == TEXT
    assert paint(TEXT, []) == TEXT


def test_a_clip_that_the_detector_could_not_read_has_no_receipts():
    assert receipts(TEXT, {"video": "a.mp4", "error": "broken", "frames": []}, DetectorSettings(), 8.0) == []


class Seer:
    """Sees a car in every frame."""

    def __init__(self, settings):
        self.settings = settings

    def fingerprint(self):
        return {**stage3.detect_objects.fingerprint(self.settings), "ultralytics": "0"}

    def detect(self, frames):
        return [[[CAR, 0.9, 0.1, 0.1, 0.4, 0.4]] for _ in frames]


@pytest.fixture
def seer(monkeypatch, tmp_path):
    weights = tmp_path / "x.pt"
    weights.write_bytes(b"x")
    monkeypatch.setattr(generate, "make_detector", Seer)
    return ["--detect", "true", "--detector.weights", weights, "--detector.num_frames", 3, "--evidence_cache",
            tmp_path / "evidence"]


def test_generate_shows_when_and_where_the_detector_sees_what_is_named(world, seer, capsys, monkeypatch):  # noqa: F811
    answer = generate.answer
    monkeypatch.setattr(generate, "answer", lambda *args: answer(*args) | {"text": "A car waits. A bus passes."})
    assert run(world, "--video", world.clips / "car.mp4", "--mode", "copilot", *seer) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "A car waits. A bus passes."
    assert any(line.startswith("  car: seen in 3 of 3 frames, 0 to 2.38 s") for line in shown)
    assert "  bus: not seen" in shown
    run(world, "--video", world.clips / "car.mp4", "--mode", "copilot", "--json", *seer)
    row = json.loads(capsys.readouterr().out)
    assert [(found["what"], found["verdict"]) for found in row["receipts"] if found["what"] in ("car", "bus")] == [
        ("car", "supported"), ("bus", "unsupported")]


def test_a_detector_that_is_missing_is_said_first(world, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="detector.weights"):
        run(world, "--video", world.clips, "--detect", "true", "--detector.weights", tmp_path / "no.pt")
    with pytest.raises(ConfigError, match="--detect looks at whole clips, so it goes without --window"):
        run(world, "--video", world.clips, "--detect", "true", "--window", 2)
