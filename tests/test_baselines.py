"""What stage 3 is compared with: rewards that evidence has no say in, and evidence of other clips.

Run: `python -m pytest tests/test_baselines.py -q`
"""

import json

import pytest

from bench.baselines import FIXED_TEXTS, chair_alone, fixed_text, main, style_alone, swap_records
from dataset import load_split
from stage3.detect_objects import cache_folder, clip_file, evidence_problems, fingerprint, load_evidence, load_records
from stage3.evidence import Evidence
from stage3.grpo_reward_func import physics_aware_reward
from stage3.rollout import load_reward
from stage3.vocabulary_config import COCO_NAMES
from training.common import ConfigError, load_config, write_json
from training.config import DetectorSettings, Stage3Config

TOLD = ("At first, a white car ahead brakes, so the ego vehicle slows down. Then, the traffic light ahead turns red "
        "while a pedestrian crosses the road.")
SEEN = Evidence({"car", "traffic light", "person"}, seen={"car": (0.0, 0.2), "person": (0.6, 0.9)})


def test_style_alone_is_our_style_where_all_is_true():
    ours = physics_aware_reward(TOLD, Evidence({"car", "traffic light", "person"}), "microscope")
    style = style_alone(TOLD, SEEN, "microscope")
    assert (style.temporal, style.detail) == (ours.temporal, ours.detail) and min(ours.temporal, ours.detail) > 0.25


@pytest.mark.parametrize("evidence", [
    Evidence(frozenset()), Evidence({"bus", "train"}), Evidence({"car"}, light=("green",), colours={"car": {"black"}})])
def test_style_alone_sees_neither_evidence_nor_reference(evidence):
    assert style_alone(TOLD, evidence, "microscope", "It is night.") == style_alone(TOLD, SEEN, "microscope", TOLD)
    invented = TOLD.replace("pedestrian", "bicycle")
    assert style_alone(invented, evidence, "microscope") == style_alone(TOLD, evidence, "microscope")
    ours = physics_aware_reward(TOLD, evidence, "microscope", TOLD)
    assert ours.temporal < style_alone(TOLD, evidence, "microscope").temporal  # which weights of 0 would not remove


def test_style_alone_still_needs_language():
    shuffled = style_alone(" ".join(sorted(TOLD.split())), SEEN, "microscope")
    assert shuffled.temporal < 0.2 and style_alone("", SEEN, "copilot").temporal == 0.0
    vague = style_alone(TOLD.replace("white car", "white van"), SEEN, "microscope")
    assert vague.temporal > 0.6  # it might be a car or a truck, so it is no invention (which would leave 0.44)
    denial = style_alone("No buses are visible. " + TOLD, SEEN, "microscope")
    assert denial.temporal >= style_alone(TOLD, SEEN, "microscope").temporal  # and is no false denial


def test_fixed_text_pays_for_one_text():
    text = FIXED_TEXTS["copilot"]
    assert fixed_text(text.upper(), SEEN, "copilot").likeness == 1.0
    half = " ".join(text.split()[:7])  # 6 of the 12 pairs, and no other
    assert fixed_text(half, SEEN, "copilot").likeness == pytest.approx(2 * 6 / (6 + 12))
    assert fixed_text("", SEEN, "copilot").likeness == 0.0 < fixed_text(TOLD, SEEN, "copilot").likeness < 0.1


@pytest.mark.parametrize("text, chair", [
    ("A car brakes. The car stops. A bus passes.", 2 / 3),  # each mention counts
    ("A bicycle waits, and a car brakes.", 1.0),  # unknown
    ("A bus passes and a truck waits.", 0.0),
    ("No cars are visible.", 1.0),  # a denial is no mention
    ("The road is wet.", 1.0),
])
def test_chair_alone_is_one_minus_chair_i(text, chair):
    evidence = Evidence({"car", "person"}, unknown={"bicycle"})
    assert chair_alone(text, evidence, "microscope").chair == pytest.approx(chair)


@pytest.mark.parametrize("name, weights", [
    ("style_alone", {"temporal": 0.25, "detail": 0.2}), ("chair_alone", {"chair": 1}),
    ("fixed_text", {"likeness": 1})])
def test_the_rewards_are_accepted_by_stage_3(name, weights):
    function, problem = load_reward(Stage3Config(reward=f"bench.baselines:{name}", reward_weights=weights), "copilot")
    assert function and problem is None


# ---------------------------------------------------------------------------------------------------------------------
# Evidence of other clips

CLASSES = {"car.mp4": 2, "bus.mp4": 5, "walk.mp4": 0, "truck.mp4": 7, "night.mp4": 1, "stop.mp4": 11}


def record_of(video, class_id):
    frames = [{"index": i, "time": i / 2, "boxes": [[class_id, 0.9, 0.1, 0.3, 0.4, 0.6]], "colours": [None]}
              for i in range(3)]
    return {"video": video, "bytes": 1, "frames": frames}


def test_each_clip_gets_the_boxes_of_another_one():
    records = {video: record_of(video, class_id) for video, class_id in CLASSES.items()}
    records["bus.mp4"] = {"video": "bus.mp4", "error": "broken"}
    videos = ["car.mp4", "bus.mp4", "walk.mp4", "truck.mp4", "night.mp4"]
    swapped = swap_records(records, videos, 1)
    moved = {"car.mp4", "walk.mp4", "truck.mp4", "night.mp4"}
    assert {swapped[video]["boxes_of"] for video in moved} == moved  # each clip's boxes are used once
    for video in moved:
        other = swapped[video]["boxes_of"]
        assert other != video and swapped[video] == record_of(video, CLASSES[other]) | {"boxes_of": other}
    assert swapped["bus.mp4"] == records["bus.mp4"] and swapped["stop.mp4"] == records["stop.mp4"]
    assert swapped == swap_records(records, videos[::-1], 1)
    assert any(swap_records(records, videos, seed) != swapped for seed in range(2, 6))


@pytest.fixture
def recipe(tiny, tmp_path):
    """A stage-3 YAML whose clips have evidence: one class each."""
    settings = DetectorSettings(weights="none.pt", num_frames=3)
    made_by = fingerprint(settings)
    folder = cache_folder(tmp_path / "evidence", made_by)
    folder.mkdir(parents=True)
    write_json(folder / "settings.json", {"made_by": made_by, "ultralytics": "test"})
    for video, class_id in CLASSES.items():
        write_json(clip_file(folder, video), record_of(video, class_id) | {"made_by": made_by})
    config = {"data": str(tiny.data), "video_root": str(tiny.videos), "num_frames": 2, "num_val_videos": 2,
              "evidence_cache": str(tmp_path / "evidence"), "detector": {"weights": "none.pt", "num_frames": 3}}
    (tmp_path / "stage3.yaml").write_text(json.dumps(config))
    return tmp_path / "stage3.yaml"


def test_the_swapped_evidence_is_found_by_its_own_yaml_alone(recipe, tmp_path, capsys):
    assert main(["--config", str(recipe), "--output_dir", str(tmp_path / "swapped")]) == 0
    assert "4 of 4 training clips have the boxes of another clip; in 4 of them other" in capsys.readouterr().out
    own, swapped = (load_config(Stage3Config, ["--config", str(file)]) for file in (
        recipe, tmp_path / "swapped" / "stage3.yaml"))
    train, held_out = load_split(swapped)
    assert evidence_problems([*train, *held_out], swapped.detector, swapped.evidence_cache, "detector") == []
    before = load_evidence(own.evidence_cache, [*train, *held_out], own.detector)
    after = load_evidence(swapped.evidence_cache, [*train, *held_out], swapped.detector)
    for entry in train:
        assert before[entry.video].present == {COCO_NAMES[CLASSES[entry.video]]} != after[entry.video].present
    assert all(before[entry.video] == after[entry.video] for entry in held_out)
    videos = sorted({entry.video for entry in train})
    assert all("boxes_of" in record for record in load_records(
        swapped.evidence_cache, videos, swapped.detector).values())
    assert {key for key, value in vars(own).items() if value != getattr(swapped, key)} == {
        "evidence_cache", "detector", "output_dir"}
    about = json.loads((tmp_path / "swapped" / "swapped.json").read_text())
    assert about["seed"] == 42 and about["swapped"] == videos and about["boxes_of"]["ultralytics"] == "test"


def test_a_folder_with_other_boxes_is_refused(recipe, tmp_path, capsys):
    main(["--config", str(recipe), "--output_dir", str(tmp_path / "swapped")])
    main(["--config", str(recipe), "--output_dir", str(tmp_path / "swapped")])  # the same again
    for flags, message in ((["--output_dir", str(tmp_path / "swapped"), "--seed", "7"], "holds other boxes"),
                           (["--output_dir", str(tmp_path / "evidence")], "holds the detector's own boxes")):
        with pytest.raises(ConfigError):
            main(["--config", str(recipe), *flags])
        assert message in capsys.readouterr().err
