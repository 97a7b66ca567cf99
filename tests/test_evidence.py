"""What evidence knows beyond names: colours from pixels; counts, sides and motion from tracks; lights over time."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.evidence_truth import KINDS_OF_FACT, compare, items, make_crowd
from dataset import frame_indices
from demo import world
from stage3.colours import BODY_COLOURS, frame_colours, light_colour, vehicle_colour
from stage3.detect_objects import Detector, detect_clips, load_records
from stage3.evidence import Evidence, clip_evidence, evidence_dict, link_tracks
from stage3.vocabulary_config import COCO_NAMES
from training.config import DetectorSettings

IDS = {name: index for index, name in enumerate(COCO_NAMES)}
SETTINGS = DetectorSettings(weights="none.pt")
PAINT = {"red": (190, 30, 35), "blue": (40, 80, 205), "white": (225, 225, 222), "black": (28, 28, 32),
         "grey": (120, 122, 125), "yellow": (235, 190, 30), "orange": (235, 115, 20), "green": (35, 135, 65),
         "brown": (95, 55, 25)}
LAMPS = {"red": (255, 40, 30), "amber": (255, 180, 30), "green": (40, 240, 130)}


# ----------------------------------------------------------------------------------------------------------------------
# Pixels


def car(paint, size=40, dim=1.0):
    """A car from behind: body, window, dark bumper and lamps."""
    pixels = np.zeros((size, size, 3))
    pixels[:int(0.88 * size)] = paint
    pixels[int(0.1 * size):int(0.42 * size), int(0.15 * size):int(0.85 * size)] = (75, 95, 115)
    pixels[int(0.76 * size):int(0.88 * size)] = (50, 50, 54)
    pixels[int(0.55 * size):int(0.66 * size), :int(0.2 * size)] = (130, 15, 15)
    noise = np.random.default_rng(0).normal(0, 4, pixels.shape)
    return np.clip(pixels * dim + noise, 0, 255).astype(np.uint8)


def light(state, size=(12, 28), at=None):
    """An upright traffic light; at: where its lamp is lit, in shares of the height (default: where it belongs)."""
    width, height = size
    pixels = np.full((height, width, 3), 24, np.uint8)
    for name, place in (("red", 0.19), ("amber", 0.5), ("green", 0.81)):
        row = int(height * (at if at is not None and name == state else place))
        side = max(1, round(width * 0.3))
        pixels[max(row - side, 0):row + side, width // 2 - side:width // 2 + side] = (
            LAMPS[name] if name == state else (62, 62, 58))
    return pixels


@pytest.mark.parametrize("name", PAINT)
def test_a_painted_body_has_its_colour_by_day(name):
    assert name in BODY_COLOURS and vehicle_colour(car(PAINT[name])) == name
    assert vehicle_colour(car(PAINT[name], size=150, dim=0.9)) == name


@pytest.mark.parametrize("name", PAINT)
def test_in_the_dark_a_colour_is_right_or_none(name):
    said = vehicle_colour(car(PAINT[name], dim=0.48), daylight=False)
    assert said == (name if name in ("red", "green", "blue") else None)


def test_small_dark_and_two_coloured_bodies_have_no_colour():
    assert vehicle_colour(car(PAINT["red"])[:15]) is None and vehicle_colour(car(PAINT["red"])[:, :15]) is None
    assert vehicle_colour(car(PAINT["blue"], dim=0.15), daylight=False) is None
    assert vehicle_colour(car((135, 75, 25))) is None  # orange in the shade, or brown in the sun
    half = np.concatenate([car(PAINT["red"])[:, :20], car(PAINT["blue"])[:, 20:]], axis=1)
    assert vehicle_colour(half) is None
    assert vehicle_colour(np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)) is None


@pytest.mark.parametrize("state", LAMPS)
def test_the_lit_lamp_is_read(state):
    assert light_colour(light(state)) == state
    assert light_colour((light(state) * 0.8).astype(np.uint8)) == state


def test_black_is_no_stripe_and_lamps_are_no_body():
    striped = car(PAINT["black"])
    striped[20:25] = PAINT["green"]
    assert vehicle_colour(striped) is None
    braking = car(PAINT["black"], dim=0.48)
    braking[20:29] = (255, 25, 20)
    assert vehicle_colour(braking, daylight=False) is None


def test_a_light_that_cannot_be_read_has_no_colour():
    spot = light(None, size=(20, 44))
    spot[8:10, 9:11] = LAMPS["red"]
    assert light_colour(spot) is None  # a rear lamp far behind it
    assert light_colour(light(None)) is None  # none lit
    assert light_colour(light("red")[:, :4]) is None and light_colour(light("red")[:9]) is None
    assert light_colour(light("red", at=0.8)) is None and light_colour(light("green", at=0.2)) is None
    assert light_colour(np.maximum(light("red"), light("green"))) is None
    assert light_colour((light("red") * 0.4).astype(np.uint8)) is None


def street(daylight=True):
    """A frame of 200 x 100 with a red car at (20, 30) .. (60, 70)."""
    frame = np.full((100, 200, 3), 140 if daylight else 30, np.uint8)
    frame[30:70, 20:60] = car(PAINT["red"])
    return frame


def test_colours_of_a_frame_stand_beside_its_boxes():
    frame = street()
    frame[10:38, 100:112] = light("green")
    boxes = [[IDS["car"], 0.9, 0.1, 0.3, 0.3, 0.7], [IDS["traffic light"], 0.8, 0.5, 0.1, 0.56, 0.38],
             [IDS["person"], 0.8, 0.1, 0.3, 0.3, 0.7], [IDS["car"], 0.7, 0.5, 0.5, 0.5, 0.5]]
    assert frame_colours(frame, boxes) == ["red", "green", None, None]
    assert frame_colours(frame, []) == []


def test_a_covered_or_cut_body_has_no_colour():
    box = [IDS["car"], 0.9, 0.1, 0.3, 0.3, 0.7]
    nearer = [IDS["person"], 0.9, 0.1, 0.3, 0.2, 0.75]
    assert frame_colours(street(), [box]) == ["red"] and frame_colours(street(), [nearer, box]) == [None, None]
    behind = [IDS["person"], 0.9, 0.1, 0.3, 0.2, 0.65]
    assert frame_colours(street(), [box, behind])[0] == "red"
    assert frame_colours(street()[30:], [[IDS["car"], 0.9, 0.1, 0.0, 0.3, 4 / 7]]) == [None]
    assert frame_colours(street()[:70], [[IDS["car"], 0.9, 0.1, 3 / 7, 0.3, 1.0]]) == [None]


def test_the_frame_decides_whether_it_is_dark():
    frame = np.full((100, 200, 3), 30, np.uint8)
    frame[30:70, 20:60] = car(PAINT["white"], dim=0.5)
    box = [IDS["car"], 0.9, 0.1, 0.3, 0.3, 0.7]
    assert frame_colours(frame, [box]) == [None] and vehicle_colour(frame[30:70, 20:60]) == "grey"


# ----------------------------------------------------------------------------------------------------------------------
# Tracks, from records made by hand


def at(x, y=0.5, width=0.1, height=0.2, name="car", confidence=0.9):
    return [IDS[name], confidence, round(x - width / 2, 4), round(y - height / 2, 4), round(x + width / 2, 4),
            round(y + height / 2, 4)]


def record(*frames, colours=None, **more):
    """A clip's record; colours: for each frame the readings of its boxes."""
    last = max(len(frames) - 1, 1)
    rows = [{"index": i, "time": i / last, "boxes": list(boxes)} for i, boxes in enumerate(frames)]
    for row, readings in zip(rows, colours or [], strict=False):
        row["colours"] = list(readings)
    return {"frames": rows, **more}


def evidence_of(*frames, **more):
    return clip_evidence(record(*frames, **more), SETTINGS)


def moves(xs, sizes=None, **more):
    """The motion of a car with these centres and heights."""
    sizes = sizes or [0.2] * len(xs)
    frames = [[at(x, height=size, width=size / 2, **more)] for x, size in zip(xs, sizes, strict=True)]
    return set((evidence_of(*frames).motion or {}).get("car", ()))


def test_boxes_are_linked_to_the_object_that_they_continue():
    frames = [[at(0.1 + 0.1 * i), at(0.9 - 0.1 * i, 0.8)] for i in range(8)]
    tracks = link_tracks(record(*frames), SETTINGS)["car"]
    assert sorted(len(track.steps) for track in tracks) == [8, 8] and all(track.sure for track in tracks)
    assert [round(step.centre, 1) for step in tracks[0].steps] == [round(0.1 + 0.1 * i, 1) for i in range(8)]
    assert len(link_tracks(record([at(0.1)], [at(0.9)]), SETTINGS)["car"]) == 2  # too far
    assert len(link_tracks(record([at(0.1)], [], [at(0.12)]), SETTINGS)["car"]) == 1  # missed once
    assert len(link_tracks(record([at(0.1)], [], [], [at(0.12)]), SETTINGS)["car"]) == 2
    grown = record([at(0.5, width=0.02, height=0.04)], [at(0.5, width=0.2, height=0.4)])
    assert len(link_tracks(grown, SETTINGS)["car"]) == 2


def test_sure_boxes_are_linked_before_weak_ones():
    """A weak box that is nearer to where the object was does not take its track."""
    frames = [[at(0.3)], [at(0.3)], [at(0.38), at(0.3, 0.62, confidence=0.4)], [at(0.38)]]
    longest = max(link_tracks(record(*frames), SETTINGS)["car"], key=lambda track: len(track.steps))
    assert [step.confidence for step in longest.steps] == [0.9] * 4


def test_counts_are_given_only_where_they_are_exact():
    two = [at(0.2), at(0.8)]
    assert evidence_of(*[two] * 3).counts == {"car": 2}
    assert evidence_of([at(0.2)], two, two, [at(0.8)]).counts == {"car": 2}
    assert evidence_of(*[[at(0.2)]] * 2, [], [], [], *[[at(0.8)]] * 2).counts == {}  # one after the other, or the same
    weak = at(0.8, confidence=0.4)
    assert evidence_of(*[[at(0.2), weak]] * 3).counts == {}
    assert evidence_of(*[[at(0.2), at(0.8, confidence=0.2)]] * 3).counts == {"car": 1}  # below absent_confidence
    assert evidence_of([at(0.2)], [at(0.2, confidence=0.4)], [at(0.2)]).counts == {"car": 1}  # weak for a moment
    assert evidence_of(*[[at(0.2), at(0.205, confidence=0.3)]] * 3).counts == {"car": 1}  # one object, seen twice
    assert evidence_of(*[[at(0.2), at(0.22)]] * 3).counts == {}  # one object, or one before the other
    assert evidence_of(*[[at(0.2), at(0.26), at(0.32)]] * 3).counts == {}  # two, and a box across them?
    assert evidence_of([at(0.2)], [at(0.2)], two).counts == {}  # a single box, however sure
    truck = at(0.2, name="truck", confidence=0.6)
    assert evidence_of(*[[at(0.2), truck, at(0.8)]] * 3).counts == {"car": 2}  # the truck is the car
    trucks = [at(0.205, name="truck", confidence=0.6), at(0.8, name="truck")]
    assert evidence_of(*[[at(0.2), *trucks]] * 3).counts == {"car": 1}  # one truck or two
    trucks[0] = at(0.225, name="truck", confidence=0.6)
    loose = replace(SETTINGS, merge_iou=0.5)
    assert clip_evidence(record(*[[at(0.2), *trucks]] * 3), loose).counts == {"car": 1}
    assert clip_evidence(record(*[[at(0.2), *trucks]] * 3), SETTINGS).counts == {"car": 1, "truck": 2}


def test_a_box_across_another_of_its_class_is_weak():
    """A detector sees a third object where two meet; or a second where one is."""
    frames = [[at(0.2), at(0.23, 0.52, 0.06, 0.14)]] * 3  # most of the smaller is within the larger
    tracks = link_tracks(record(*frames), SETTINGS)["car"]
    assert [track.sure for track in tracks] == [True, False]
    assert evidence_of(*frames, colours=[["red", "blue"]] * 3).colours == {"car": {"red", "unknown"}}


def test_a_part_of_a_larger_vehicle_is_no_further_one():
    bus, part = at(0.5, width=0.4, height=0.5, name="bus", confidence=0.95), at(0.45, 0.6)
    evidence = evidence_of(*[[bus, part]] * 3)
    assert evidence.present == {"bus", "car"} and evidence.counts == {"bus": 1} and "car" not in evidence.sides


def test_sides_are_where_it_enters_is_nearest_and_leaves():
    assert evidence_of(*[[at(0.2)]] * 3).sides == {"car": {"left"}}
    assert evidence_of(*[[at(0.8)]] * 3).sides == {"car": {"right"}}
    assert evidence_of(*[[at(0.5)]] * 3).sides == {}  # in the middle
    assert evidence_of(*[[at(0.43)]] * 3).sides == {}  # on the verge
    assert evidence_of(*[[at(0.2 + 0.1 * i)] for i in range(7)]).sides == {"car": {"left", "right"}}
    swerves = [(0.5, 0.2), (0.42, 0.25), (0.38, 0.3), (0.36, 0.32), (0.38, 0.3), (0.42, 0.25), (0.5, 0.2)]
    assert evidence_of(*[[at(x, height=height)] for x, height in swerves]).sides == {"car": {"left"}}
    weak = at(0.8, confidence=0.4)
    assert evidence_of(*[[at(0.2), weak]] * 3).sides == {"car": {"left", "unknown"}}


def test_what_leaves_between_two_frames_may_have_been_on_another_side():
    frames = [[at(0.2)], [at(0.3)], [at(0.5)], []]  # the next would be at 0.7
    assert evidence_of(*frames).sides == {"car": {"left", "unknown"}}
    assert evidence_of(*frames[:3]).sides == {"car": {"left"}}  # the clip ends with it
    assert evidence_of([], *reversed(frames[:3])).sides == {"car": {"left", "unknown"}}


def test_motion_across_the_picture():
    assert moves([0.15, 0.3, 0.45, 0.6, 0.75]) == {"left to right"}
    assert moves([0.75, 0.6, 0.45, 0.3, 0.15]) == {"right to left"}
    assert moves([0.5, 0.6, 0.7, 0.8]) == set()  # it may go on, or be passed by: unknown, so it is left out
    assert moves([0.35, 0.65], [0.4] * 2) == set()  # two boxes make no motion
    crossing = [[at(0.15 + 0.15 * i), at(0.9, 0.9, confidence=0.4)] for i in range(5)]
    assert evidence_of(*crossing).motion == {"car": {"left to right", "unknown"}}


def test_what_grows_approaches_and_what_shrinks_recedes():
    assert moves([0.3] * 4, [0.1, 0.13, 0.16, 0.2]) == {"approaches"}
    assert moves([0.3] * 4, [0.2, 0.16, 0.13, 0.1]) == {"recedes"}
    assert moves([0.3] * 5, [0.1, 0.14, 0.2, 0.14, 0.1]) == {"approaches", "recedes"}
    assert moves([0.3] * 4, [0.2, 0.22, 0.24, 0.26]) == set()  # perhaps
    assert moves([0.5, 0.6, 0.7, 0.8], [0.1, 0.13, 0.16, 0.2]) == {"approaches", "unknown"}  # and perhaps crosses
    assert moves([0.15, 0.3, 0.45, 0.6, 0.75], [0.2, 0.21, 0.22, 0.24, 0.25]) == {"left to right", "unknown"}


def test_a_box_that_the_edge_cuts_off_does_not_grow_by_coming_in():
    wide = [[IDS["car"], 0.9, 0.0, 0.4, x2, 0.6] for x2 in (0.05, 0.08, 0.1, 0.1)]
    assert evidence_of(*[[box] for box in wide]).motion == {}
    part = [IDS["car"], 0.9, 0.0, 0.43, 0.06, 0.56]  # detectors see less of the height, too
    assert evidence_of([part], *[[at(0.15 + 0.15 * i)] for i in range(5)]).motion == {"car": {"left to right"}}
    assert evidence_of(*[[at(0.15 + 0.15 * i)] for i in range(5)], [[IDS["car"], 0.9, 0.85, 0.43, 0.99, 0.56]]
                       ).motion == {"car": {"left to right"}}


def test_only_beside_something_that_stands_can_a_vehicle_be_said_to_stand():
    lamp = at(0.6, 0.2, 0.03, 0.1, "traffic light")
    assert moves([0.3] * 4) == set()  # it may drive as we do
    assert evidence_of(*[[at(0.3), lamp]] * 4).motion == {"car": {"stands"}}
    assert evidence_of(*[[at(0.3 + 0.03 * i), lamp] for i in range(4)]).motion == {}  # it moves a little
    growing = [at(0.6, 0.2, 0.03 * f, 0.1 * f, "traffic light") for f in (1, 1.2, 1.4, 1.6)]
    assert evidence_of(*[[at(0.3), lamp] for lamp in growing]).motion == {}  # we drive
    assert evidence_of(*[[at(0.3), lamp]] * 3, [at(0.3)]).motion == {}  # the light is not there all the time


def test_two_that_meet_may_be_exchanged():
    frames = [[at(0.2 + 0.1 * i), at(0.8 - 0.1 * i)] for i in range(7)]
    assert evidence_of(*frames).motion == {}
    assert evidence_of(*frames, colours=[["red", "blue"]] * 7).colours in (
        {"car": {"red", "blue", "unknown"}}, {"car": {"red", "unknown"}}, {"car": {"blue", "unknown"}}, {})
    passing = [[at(0.3 + 0.05 * i), at(0.4 + 0.05 * i, 0.7)] for i in range(5)]
    assert evidence_of(*passing, colours=[["red", "red"]] * 5).colours == {"car": {"red", "unknown"}}
    apart = [[at(0.2 + 0.1 * i, 0.2), at(0.8 - 0.1 * i, 0.8)] for i in range(7)]
    assert evidence_of(*apart).motion == {"car": {"left to right", "right to left"}}


def test_a_vehicle_has_the_colour_that_its_readings_agree_on():
    def colours(*readings, **more):
        return evidence_of(*[[at(0.3, **more)]] * len(readings), colours=[[r] for r in readings]).colours

    assert colours("red", None, "red", None) == {"car": {"red"}}
    assert colours("red", None, None) == {}  # a single reading
    assert colours("red", "red", "blue") == {} and colours(*["red"] * 6, "blue") == {"car": {"red"}}
    assert colours("red", "red", "red", name="motorcycle") == {}
    two = [at(0.2), at(0.8)]
    assert evidence_of(*[two] * 3, colours=[["red", "blue"]] * 3).colours == {"car": {"red", "blue"}}
    assert evidence_of(*[two] * 3, colours=[["red", None]] * 3).colours == {"car": {"red", "unknown"}}
    weak = at(0.2, confidence=0.4)
    assert evidence_of([at(0.2)], [at(0.2)], [weak], [weak], colours=[[None], [None], ["red"], ["red"]]).colours == {}


def lights(*readings, height=0.1, confidences=()):
    """`light` of a clip with one traffic light per frame and these readings."""
    confidences = confidences or [0.9] * len(readings)
    frames = [[at(0.6, 0.2, 0.04, height, "traffic light", c)] for c in confidences]
    return evidence_of(*frames, colours=[[reading] for reading in readings]).light


def test_lights_are_told_in_the_order_of_time():
    assert lights("red", "red", "green", "green") == ("red", "green")
    assert lights("green", "amber", "red", "green") == ("green", "amber", "red", "green")
    assert lights("red", None, "green") == ("red", "unknown", "green")
    assert lights("red", None, "red", height=0.02) == ("red",)  # too small to be read
    assert lights(None, None) is None
    assert lights("red", "red", "green", confidences=(0.9, 0.9, 0.4)) == ("red", "unknown")
    assert lights("red", "red", "red", confidences=(0.9, 0.9, 0.4)) == ("red",)
    assert lights("red", "red", "green", confidences=(0.9, 0.9, 0.12)) == ("red", "unknown")
    assert lights("red", "red", None, confidences=(0.9, 0.9, 0.12)) == ("red",)
    assert lights("red", "red", None, confidences=(0.9, 0.9, 0.3)) == ("red", "unknown")
    both = [at(0.3, 0.2, 0.04, 0.1, "traffic light"), at(0.7, 0.2, 0.04, 0.1, "traffic light")]
    assert evidence_of(*[both] * 3, colours=[["red", "green"]] * 3).light == ("red", "green")
    assert evidence_of(*[both] * 3, colours=[["red", None]] * 3).light == ("red", "unknown")


def test_a_record_without_colours_knows_none():
    frames = [[at(0.2), at(0.6, 0.2, 0.04, 0.1, "traffic light")]] * 3
    evidence = evidence_of(*frames)
    assert evidence.colours is None and evidence.light is None and evidence.counts == {"car": 1, "traffic light": 1}
    assert evidence_of(*frames, colours=[[None, None]] * 3).colours == {}


def test_labels_of_single_moments_know_no_counts_and_no_motion():
    frames, readings = [[at(0.15 + 0.15 * i)] for i in range(5)], [["red"]] * 5
    evidence = evidence_of(*frames, colours=readings, sparse=True)
    assert evidence.counts is None and evidence.motion is None
    assert evidence.colours == {"car": {"red", "unknown"}} and "unknown" in evidence.sides["car"]
    assert evidence_of(*frames, colours=readings).counts == {"car": 1}


def test_only_present_classes_have_facts():
    evidence = evidence_of(*[[at(0.2, confidence=0.4)]] * 3, colours=[["red"]] * 3)
    assert evidence.unknown == {"car"}
    assert not evidence.counts and not evidence.sides and not evidence.motion and not evidence.colours


def test_evidence_goes_through_json_and_back():
    lamp = at(0.6, 0.2, 0.04, 0.1, "traffic light")
    frames = [[at(0.15 + 0.15 * i), lamp] for i in range(5)]
    for colours in (None, [["red", "green"]] * 5):
        evidence = evidence_of(*frames, colours=colours)
        assert Evidence(**evidence_dict(evidence)) == evidence
    assert evidence.light == ("green",) and evidence.motion == {"car": {"left to right"}}


# ----------------------------------------------------------------------------------------------------------------------
# From a clip's frames on


class Fake(Detector):
    """ultralytics' network replaced by one that finds the boxes of a toy clip, by class names of its own."""

    def __init__(self, settings, names, boxes):
        super().__init__(settings, "cpu")
        self.fake, self.boxes = names, boxes

    def fingerprint(self):
        return {**super().fingerprint(), "names": self.fake}

    @property
    def network(self):
        ids = {name: index for index, name in enumerate(self.fake)}

        def predict(frames, **settings):
            results = []
            for boxes in self.boxes:
                scale = torch.tensor([world.WIDTH, world.HEIGHT] * 2)
                results.append(SimpleNamespace(boxes=SimpleNamespace(
                    cls=torch.tensor([float(ids[self.called[box.name]]) for box in boxes]),
                    conf=torch.full((len(boxes),), 0.9),
                    xyxyn=torch.tensor([box.xyxy for box in boxes]).reshape(-1, 4) / scale)))
            return results

        return SimpleNamespace(names=dict(enumerate(self.fake)), predict=predict)


def test_other_names_and_ids_of_a_detector_give_the_same_evidence(tmp_path):
    script = next(s for s in (world.make_script((71, i)) for i in range(500))
                  if not s.night and [e.kind for e in s.events] == ["light_red", "car_turns"])
    clip, found = world.render(script), []
    world.write_video(tmp_path / "clip.mp4", clip.frames)
    (tmp_path / "weights.pt").write_bytes(b"none")
    for renamed in (False, True):
        called = {name: f"my {name}" if renamed else name for name in world.CLASSES}
        names = sorted(called.values(), reverse=renamed)
        settings = DetectorSettings(weights=str(tmp_path / "weights.pt"), image_size=320, num_frames=15, batch_size=32,
                                    classes={mine: name for name, mine in called.items()})
        detector = Fake(settings, names, [clip.boxes[i] for i in frame_indices(world.FRAMES, 15)])
        detector.called = called
        detect_clips(["clip.mp4"], tmp_path, settings, tmp_path / "cache", detector=detector)
        found.append(clip_evidence(load_records(tmp_path / "cache", ["clip.mp4"], settings)["clip.mp4"], settings))
    assert found[0] == found[1] and evidence_dict(found[0]) == evidence_dict(found[1])
    assert found[0].light == ("amber", "red") and found[0].colours["car"] == {script.events[1].colour}
    assert found[0].counts == {"car": 1, "traffic light": 1}


def exact_record(clip):
    """What a perfect detector would write of a toy clip."""
    frames = []
    for index in frame_indices(world.FRAMES, 15):
        size = [world.WIDTH, world.HEIGHT] * 2
        boxes = [[IDS[box.name], 0.9, *(np.array(box.xyxy) / size).tolist()] for box in clip.boxes[index]]
        frames.append({"index": int(index), "time": float(index / (world.FRAMES - 1)), "boxes": boxes,
                       "colours": frame_colours(clip.frames[index], boxes)})
    return {"frames": frames}


def test_what_is_said_of_toy_clips_is_true():
    said = {kind: 0 for kind in KINDS_OF_FACT}
    for index in range(18):
        script = make_crowd((81, index)) if index % 3 == 2 else world.make_script((81, index))
        evidence = clip_evidence(exact_record(world.render(script)), replace(SETTINGS, num_frames=15))
        facts = world.exact_facts(script)
        for kind in KINDS_OF_FACT:
            for name, values, true in items(kind, evidence, facts):
                verdict = compare(values, true, ("red", "amber", "green") if kind == "light" else ())
                said[kind] += verdict == "right"
                assert verdict in ("right", "silent"), (index, kind, name, values, true)
    assert said["counts"] > 30 and said["sides"] > 30 and said["motion"] > 15
    assert said["light"] >= 5 and said["colours"] >= 8


def test_answers_are_judged_by_their_values():
    assert compare({"red"}, {"red"}) == "right" and compare({"red", "unknown"}, {"red", "blue"}) == "right"
    assert compare({"red"}, {"red", "blue"}) == "incomplete" and compare({"red"}, {"blue"}) == "invented"
    assert compare({"unknown"}, {"red"}) == compare(None, {"red"}) == "silent"
    assert compare(("red", "green"), ["red"], brief=["red", "green"]) == "right"
