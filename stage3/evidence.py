"""What a detector's boxes say about a clip: each class is present, absent or unknown.

`clip_evidence` turns a clip's record, as stage3/detect_objects.py writes it, into the Evidence that captions are
checked against. Nothing here runs a detector or reads a file.

What is said beyond a class's presence (counts, sides, motion, colours) follows from tracks: the boxes of one object
over the frames. Whatever leaves a doubt about one of a class's objects adds "unknown" to what is said of the class.
"""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from stage3.vocabulary_config import COCO_NAMES, ROAD_CLASSES
from training.config import DetectorSettings

VEHICLE_BODIES = frozenset({"car", "truck", "bus"})  # detectors may give one vehicle two boxes with two of these names


LIGHTS = ("red", "amber", "green")
SIDES = ("left", "right", "unknown")
MOTIONS = ("approaches", "recedes", "left to right", "right to left", "stands", "unknown")
STATIC = frozenset({"traffic light", "stop sign", "fire hydrant", "parking meter", "bench"})
MOVABLE = frozenset(ROAD_CLASSES) - STATIC

# Linking boxes to tracks. Distances are in sizes of the object (square root of its area), pictures taken as 16:9.
ASPECT = 16 / 9
REACH = 1.5  # how far from where its motion leads an object may be found again, per frame
FIRST_REACH = 2.5  # the same for its second box, when its motion is not known yet
MAX_GAP = 2  # frames from one box of a track to its next: one may be missed
MAX_GROWTH = 2.5  # by this factor the size may change from box to box
RIVAL = 1.0  # another box that is nearly as close (distance + RIVAL) makes it unsure which of them is the object
TWIN_COVER = 0.6  # of two boxes of one class, one covers so much of the smaller that they may be one object
SAME_IOU = 0.5  # a weak box that overlaps a sure one of its class so much is the same object, seen twice
INSIDE = 0.85  # a vehicle's box that lies so far within a more confident one of another kind may be a part of it
CLOSE_COVER = 0.15  # boxes of a class that cover more of each other may be a pair with a false box across it
SURE_BOXES = 2  # a single box, however sure, may be a false one: it makes a class present, but tells no more of it

# Sides: centres this far from the middle, as shares of the picture's width, are beside it; between the two, unknown.
BESIDE, PERHAPS_BESIDE = 0.09, 0.05
# Motion: factors by which the size surely, or perhaps, changed. An object that crosses goes from one side to the other.
GROWS, PERHAPS_GROWS = 1.45, 1.12
SHIFTS = 0.15  # a shift of the centre by this share of the width that ends on no other side is unknown, not standing
STAYS, STAYS_FACTOR = 0.02, 1.08  # what stands beside a traffic light that stands in the picture, stands
EDGE = 0.015  # a box this close to the picture's edge is cut off
# Colours and lights: readings that it takes, and by how much the first must outnumber the second.
COLOUR_READINGS, COLOUR_MARGIN = 2, 3.0
LIGHT_HEIGHT = 0.03  # share of the picture's height from which a light should be readable


@dataclass(frozen=True)
class Evidence:
    """What the detector saw in one clip, by COCO name. Every class in neither `present` nor `unknown` is absent.

    present: classes that were surely seen. unknown: classes that were perhaps seen; naming them neither raises nor
    lowers the reward (a name in both sets is present). salient: the part of `present` that a good caption names
    (default: all of it). seen: class -> (first, last) time at which it was seen, as fractions of the clip, where known.

    What the detector knows of a class beyond that it is there; a class (or all, with None) that is missing is unknown:
    counts: class -> most at one time, where the clip does not show more of them one after the other. sides: class ->
    the sides ("left", "right") on which it enters, passes or leaves. colours: class -> colours of its vehicles.
    motion: class -> its MOTIONS, across the picture and towards or from the camera. light: colours that the traffic
    lights show, in the order of time. "unknown" among the values of a class means that there may be others than those
    listed: without it, what is not listed is wrong.

    Raises ValueError for a name that COCO lacks, for times that are not 0 <= first <= last <= 1, for a count below 1
    and for sides, motions and lights that are none.
    """

    present: frozenset[str]
    unknown: frozenset[str] = frozenset()
    salient: frozenset[str] | None = None
    seen: Mapping[str, tuple[float, float]] | None = field(default=None, hash=False)
    counts: Mapping[str, int] | None = field(default=None, hash=False)
    sides: Mapping[str, Set[str]] | None = field(default=None, hash=False)
    light: tuple[str, ...] | None = None
    colours: Mapping[str, Set[str]] | None = field(default=None, hash=False)
    motion: Mapping[str, Set[str]] | None = field(default=None, hash=False)

    def __post_init__(self):
        present = frozenset(self.present)
        salient = present if self.salient is None else frozenset(self.salient)
        named = present | frozenset(self.unknown) | salient
        for facts in (self.seen, self.counts, self.sides, self.colours, self.motion):
            named |= frozenset(facts or ())
        if strange := sorted(map(str, named - frozenset(COCO_NAMES))):
            raise ValueError(f"evidence names classes that COCO does not have: {', '.join(strange)}")
        for name, (first, last) in (self.seen or {}).items():
            if not 0 <= first <= last <= 1:
                raise ValueError(f"{name} was seen from {first} to {last}: not fractions of the clip, first to last")
        for name, count in (self.counts or {}).items():
            if count < 1:
                raise ValueError(f"{name} is counted {count} times: leave out a class that is not there")
        object.__setattr__(self, "present", present)
        object.__setattr__(self, "unknown", frozenset(self.unknown) - present)
        object.__setattr__(self, "salient", salient & present)
        if self.seen is not None:
            object.__setattr__(self, "seen", {name: tuple(times) for name, times in self.seen.items()})
        self._check_values()

    def _check_values(self):
        """Values as sets (one string is one value), and `light` as a tuple; ValueError for one that is none."""
        for key, known in (("sides", SIDES), ("colours", None), ("motion", MOTIONS)):
            if (facts := getattr(self, key)) is None:
                continue
            values = {name: frozenset([value] if isinstance(value, str) else value) for name, value in facts.items()}
            if known and (strange := sorted(frozenset().union(*values.values()) - set(known))):
                raise ValueError(f"{key} {', '.join(strange)}: none of {', '.join(known)}")
            object.__setattr__(self, key, values)
        if self.light is not None:
            light = (self.light,) if isinstance(self.light, str) else tuple(self.light)
            light = tuple("amber" if colour == "yellow" else colour for colour in light)
            if strange := sorted(set(light) - {*LIGHTS, "unknown"}):
                raise ValueError(f"light {', '.join(strange)}: none of {', '.join(LIGHTS)}, unknown")
            object.__setattr__(self, "light", light)


@dataclass
class Sightings:
    """One class in one clip."""

    confidence: float = 0.0  # highest
    times: list[float] = field(default_factory=list)  # of the frames with present_confidence or more, in 0..1
    area: float = 0.0  # largest share of the frame at present_confidence or more


def intersection_area(a: list[float], b: list[float]) -> float:
    """Area that two boxes [x1, y1, x2, y2] share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def iou(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes [x1, y1, x2, y2]."""
    intersection = intersection_area(a, b)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0


def merge_bodies(boxes: list[list[float]], merge_iou: float) -> list[tuple[str, float, list[float], bool]]:
    """Boxes of one frame as (name, confidence, [x1, y1, x2, y2], whole), most confident first.

    A car, truck or bus box is not whole where a more confident one with another of these names covers the same body:
    the detector has seen one vehicle and is unsure what to call it.
    """
    merged, bodies = [], []
    for class_id, confidence, *box in sorted(boxes, key=lambda row: -row[1]):
        name, whole = COCO_NAMES[class_id], True
        if name in VEHICLE_BODIES:
            whole = not any(other != name and iou(box, body) >= merge_iou for other, body in bodies)
            if whole:
                bodies.append((name, box))
        merged.append((name, confidence, box, whole))
    return merged


def clip_sightings(record: dict, settings: DetectorSettings) -> dict[str, Sightings]:
    """Sightings of each class that has a box in any frame of a clip's record."""
    classes: dict[str, Sightings] = {}
    for frame in record["frames"]:
        for name, confidence, box, whole in merge_bodies(frame["boxes"], settings.merge_iou):
            seen = classes.setdefault(name, Sightings())
            if not whole:  # can make the class unknown, never present
                seen.confidence = max(seen.confidence, min(confidence, settings.absent_confidence))
                continue
            seen.confidence = max(seen.confidence, confidence)
            if confidence >= settings.present_confidence:
                seen.area = max(seen.area, (box[2] - box[0]) * (box[3] - box[1]))
                if not seen.times or seen.times[-1] != frame["time"]:
                    seen.times.append(frame["time"])
    return classes


def clip_evidence(record: dict, settings: DetectorSettings) -> Evidence | None:
    """The evidence of one clip; None if its detection failed.

    present: at present_confidence in present_frames frames, or at strong_confidence in one. unknown: not present, but
    at absent_confidence or more, or a class that the detector does not know. salient: present, one of ROAD_CLASSES, and
    so large or so long in view that a caption must tell it. seen: first and last frame at present_confidence, as
    fractions of the clip. The other fields: `clip_facts`.
    """
    if "error" in record:
        return None
    present, unknown, salient, times = set(), set(), set(), {}
    for name, seen in clip_sightings(record, settings).items():
        if len(seen.times) >= settings.present_frames or seen.confidence >= settings.strong_confidence:
            present.add(name)
            times[name] = (seen.times[0], seen.times[-1])
            large = seen.area >= settings.salient_area or len(seen.times) >= settings.salient_frames
            if large and name in ROAD_CLASSES:
                salient.add(name)
        elif seen.confidence >= settings.absent_confidence:
            unknown.add(name)
    # Only what was looked for can be absent: the classes that the detector knows, all along the clip.
    known = set(settings.classes.values()) or set(COCO_NAMES)
    unknown |= set(COCO_NAMES) - (set() if record.get("sparse") else known)
    facts = clip_facts(record, settings, present)
    return Evidence(frozenset(present), frozenset(unknown), frozenset(salient), times, **facts)


# ---- tracks: the boxes of one object over the frames -----------------------------------------------------------------


class Step(NamedTuple):
    """One box of a track."""

    frame: int  # number in the record
    confidence: float  # 0 if the box may be another object's
    box: list[float]  # [x1, y1, x2, y2] in 0..1
    colour: str | None  # reading of its pixels, if any

    @property
    def centre(self) -> float:
        return (self.box[0] + self.box[2]) / 2

    @property
    def area(self) -> float:
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


@dataclass
class Track:
    """One object. tangled: it came so close to another of its class that the two may be exchanged."""

    steps: list[Step]
    sure: bool = False
    tangled: bool = False

    def velocity(self) -> tuple[float, float]:
        """Shift of the centre per frame, (x, y) in shares of the picture; (0, 0) for a single box."""
        if len(self.steps) < 2:
            return 0.0, 0.0
        before, last = self.steps[-2:]
        frames = last.frame - before.frame
        down = sum(last.box[1::2]) - sum(before.box[1::2])
        return (last.centre - before.centre) / frames, down / 2 / frames

    def distance(self, step: Step) -> float:
        """How far a box is from where the object should be, in sizes of the two; infinite if it is too far."""
        last = self.steps[-1]
        frames = step.frame - last.frame
        size, other = (max(math.sqrt(thing.area), 1e-6) for thing in (last, step))
        if frames > MAX_GAP or max(size, other) > MAX_GROWTH * min(size, other):
            return math.inf
        right, down = (speed * frames for speed in self.velocity())
        x = step.centre - last.centre - right
        y = (sum(step.box[1::2]) - sum(last.box[1::2])) / 2 - down
        away = math.hypot(x * math.sqrt(ASPECT), y / math.sqrt(ASPECT)) / math.sqrt(size * other)
        return away if away <= (FIRST_REACH if len(self.steps) == 1 else REACH) * frames else math.inf


def link_tracks(record: dict, settings: DetectorSettings) -> dict[str, list[Track]]:
    """The tracks of each class, of boxes from absent_confidence on.

    In each frame, boxes are given to the tracks to which they are closest, sure boxes before weak ones; a box that fits
    no track begins one. A track is sure with SURE_BOXES boxes of present_confidence (present_frames, if that is more).
    Boxes that may be a part, or a second sight, of a better box count as weak.
    """
    tracks: dict[str, list[Track]] = {}
    for number, frame in enumerate(record["frames"]):
        for name, steps in _frame_steps(number, frame, settings).items():
            _link(tracks.setdefault(name, []), steps, settings.present_confidence)
    for group in tracks.values():
        for track in group:
            sure = sum(step.confidence >= settings.present_confidence for step in track.steps)
            track.sure = sure >= max(SURE_BOXES, settings.present_frames)
    return tracks


def cover(a: list[float], b: list[float]) -> float:
    """Share of the smaller of two boxes [x1, y1, x2, y2] that the other covers."""
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return intersection_area(a, b) / smaller if smaller > 0 else 0.0


def _frame_steps(number: int, frame: dict, settings: DetectorSettings) -> dict[str, list[Step]]:
    """{class: steps of one frame}, most confident first."""
    boxes = frame["boxes"]
    colours = frame.get("colours") or [None] * len(boxes)
    order = sorted(range(len(boxes)), key=lambda index: -boxes[index][1])  # as merge_bodies sorts them
    found: dict[str, list[Step]] = {}
    bodies: list[tuple[str, list[float]]] = []
    for (name, confidence, box, whole), index in zip(merge_bodies(boxes, settings.merge_iou), order, strict=True):
        if confidence < settings.absent_confidence:
            continue
        steps = found.setdefault(name, [])
        if confidence < settings.present_confidence and any(iou(box, step.box) >= SAME_IOU for step in steps):
            continue
        doubtful = not whole or any(cover(box, step.box) >= TWIN_COVER for step in steps)
        if name in VEHICLE_BODIES:
            doubtful |= any(other != name and cover(box, body) >= INSIDE for other, body in bodies)
            bodies.append((name, box))
        steps.append(Step(number, 0.0 if doubtful else confidence, box, colours[index]))
    return found


def _link(tracks: list[Track], steps: list[Step], sure_confidence: float) -> None:
    """Give each step of one frame to the track that it continues, or begin a new one."""
    pairs = []
    for step in steps:
        for track in tracks:
            distance = track.distance(step)
            if distance < math.inf:
                pairs.append((step.confidence < sure_confidence, distance, step, track))
    pairs.sort(key=lambda pair: pair[:2])
    begun = list(steps)
    for _, distance, step, track in pairs:
        if track.steps[-1].frame < step.frame and step in begun:
            rivals = [other for _, near, other, rival in pairs if near < distance + RIVAL
                      and (other is step) != (rival is track)]
            track.tangled |= bool(rivals)
            begun.remove(step)
            track.steps.append(step)
    tracks += [Track([step]) for step in begun]


# ---- what the tracks say ---------------------------------------------------------------------------------------------


def clip_facts(record: dict, settings: DetectorSettings, present: Set[str]) -> dict:
    """Evidence's counts, sides, light, colours and motion of the present classes; a kind that the record cannot know
    is missing: counts and motion where labels are of single moments, light and colours without readings."""
    sparse, last = bool(record.get("sparse")), len(record["frames"]) - 1
    tracks = link_tracks(record, settings)
    facts: dict = {"sides": {}, "colours": {}} if sparse else {"sides": {}, "colours": {}, "counts": {}, "motion": {}}
    still = {number for track in tracks.get("traffic light", []) + tracks.get("stop sign", []) if stays(track.steps)
             for number in range(track.steps[0].frame, track.steps[-1].frame + 1)}
    for name in sorted(present):
        sure = [track for track in tracks[name] if track.sure]
        doubt = {"unknown"} if sparse or len(sure) < len(tracks[name]) or not sure else set()
        most = most_at_once(sure, settings.present_confidence)
        if not sparse and not doubt and most == len(sure):
            facts["counts"][name] = most
        values = {"sides": doubt.union(*(track_sides(track, last) for track in sure))}
        if name in MOVABLE:
            values["motion"] = doubt.union(*(track_motion(track, still) for track in sure))
        if name in VEHICLE_BODIES:
            values["colours"] = doubt.union(*(track_colours(track, settings.present_confidence) for track in sure))
        for kind, found in values.items():
            if kind in facts and found - {"unknown"}:  # nothing but doubt says nothing
                facts[kind][name] = found
    if not any("colours" in frame for frame in record["frames"]):
        del facts["colours"]
    elif "traffic light" in present:
        facts["light"] = light_states(record, settings)
    return facts


def most_at_once(tracks: list[Track], confidence: float) -> int:
    """The most boxes of these tracks that one frame has side by side, with this confidence or more; 0 if none has.

    Frames in which the boxes overlap are left out: where two objects meet, detectors see a third between them.
    """
    frames: dict[int, list[Step]] = {}
    for track in tracks:
        for step in track.steps:
            frames.setdefault(step.frame, []).append(step)
    most = 0
    for steps in frames.values():
        apart = all(cover(a.box, b.box) < CLOSE_COVER for a, b in itertools.combinations(steps, 2))
        if apart:
            most = max(most, sum(step.confidence >= confidence for step in steps))
    return most


def side_of(centre: float) -> set[str]:
    """{"left"}, {"right"}, {"unknown"} on the verge of a side, or nothing in the middle; centre: 0 left .. 1 right."""
    away = abs(centre - 0.5)
    if away < PERHAPS_BESIDE:
        return set()
    return {"unknown" if away < BESIDE else "left" if centre < 0.5 else "right"}


def track_sides(track: Track, last: int) -> set[str]:
    """Sides on which the object enters, is largest and leaves. "unknown" where it may have been on another side between
    its first or last box and the next frame, if there is one; `last`: number of the clip's last frame."""
    steps = track.steps
    largest = max(steps, key=lambda step: step.area)
    sides = set().union(*(side_of(step.centre) for step in (steps[0], largest, steps[-1])))
    if len(steps) > 1:
        before = steps[0].centre - (steps[1].centre - steps[0].centre) / (steps[1].frame - steps[0].frame)
        after = steps[-1].centre + track.velocity()[0]
        beyond = [centre for centre, open_end in ((before, steps[0].frame > 0), (after, steps[-1].frame < last))
                  if open_end]
        if set().union(*map(side_of, beyond)) - sides:
            sides.add("unknown")
    return sides


def track_motion(track: Track, still: Set[int]) -> set[str]:
    """MOTIONS of one object, as the camera sees them: it approaches if it grows, whoever moves.

    still: frames in which something that cannot move (a traffic light) stays in its place in the picture, so that the
    camera stands. Only there can an object be said to stand; elsewhere one that stays in its place moves with us.
    """
    steps = track.steps
    if track.tangled or len(steps) < 3:
        return {"unknown"}
    grows, shrinks = growth(steps)
    moves = {move for move, factor in (("approaches", grows), ("recedes", shrinks)) if factor >= GROWS}
    if any(PERHAPS_GROWS <= factor < GROWS for factor in (grows, shrinks)):
        moves.add("unknown")
    entered, left = side_of(steps[0].centre), side_of(steps[-1].centre)
    if entered | left == {"left", "right"}:
        moves.add("left to right" if entered == {"left"} else "right to left")
    elif abs(steps[-1].centre - steps[0].centre) >= SHIFTS:
        moves.add("unknown")  # it may go on to the other side, or be about to leave on its own
    if not moves:
        known = stays(steps) and still.issuperset(range(steps[0].frame, steps[-1].frame + 1))
        moves.add("stands" if known else "unknown")
    return moves


def growth(steps: list[Step]) -> tuple[float, float]:
    """(largest factor by which an object grows, by which it shrinks) from one of its boxes to a later one; 1: not at
    all. Heights are compared, of boxes that the picture's edge does not cut off if there are enough, else widths."""
    whole = [step.box for step in steps if min(step.box) > EDGE and max(step.box) < 1 - EDGE]
    sizes = [box[3] - box[1] for box in whole]
    if len(sizes) < 3:  # cut off at one side of the picture, it still has the other side's length
        sizes = [step.box[3] - step.box[1] for step in steps if step.box[1] > EDGE and step.box[3] < 1 - EDGE]
    if len(sizes) < 3:
        sizes = [step.box[2] - step.box[0] for step in steps if step.box[0] > EDGE and step.box[2] < 1 - EDGE]
    grows = shrinks = 1.0
    for index, size in enumerate(sizes):
        grows = max(grows, max(sizes[index:]) / max(size, 1e-6))
        shrinks = max(shrinks, size / max(min(sizes[index:]), 1e-6))
    return grows, shrinks


def stays(steps: list[Step]) -> bool:
    """True if the boxes, at least three, keep their place and their size."""
    centres = [step.centre for step in steps]
    grows, shrinks = growth(steps)
    return len(steps) >= 3 and max(centres) - min(centres) <= STAYS and max(grows, shrinks) <= STAYS_FACTOR


def track_colours(track: Track, confidence: float) -> set[str]:
    """The colour that the readings in boxes of this confidence or more agree on, or "unknown"; both where some of the
    boxes may be another object's, whose colour was not read."""
    votes = Counter(step.colour for step in track.steps if step.colour and step.confidence >= confidence)
    (first, most), (_, next_most) = [*votes.most_common(2), ("unknown", 0), ("unknown", 0)][:2]
    if most < max(COLOUR_READINGS, COLOUR_MARGIN * next_most):
        return {"unknown"}
    return {first, "unknown"} if track.tangled else {first}


def light_states(record: dict, settings: DetectorSettings) -> tuple[str, ...] | None:
    """Colours of the traffic lights in the order of time, repeats merged; "unknown" for frames in which a light that is
    large enough could not be read, or in which one that may be none shows another colour. None if none was read."""
    # For each frame, (True if the box is sure, reading or None) of each light that should be readable. A box with a lit
    # lamp where a light has one is worth a doubt at any confidence.
    frames = []
    for frame in record["frames"]:
        colours = frame.get("colours") or [None] * len(frame["boxes"])
        frames.append([(confidence >= settings.present_confidence, colour)
                       for (class_id, confidence, _, y1, _, y2), colour in zip(frame["boxes"], colours, strict=True)
                       if COCO_NAMES[class_id] == "traffic light" and (
                           colour or confidence >= settings.absent_confidence and y2 - y1 >= LIGHT_HEIGHT)])
    read = {colour for lights in frames for sure, colour in lights if sure and colour}
    states: list[str] = []
    before: set[str] = set()
    for lights in frames:
        shown = {colour if sure and colour else "unknown" for sure, colour in lights if sure or colour not in read}
        states += [state for state in (*LIGHTS, "unknown") if state in shown - before and states[-1:] != [state]]
        before = shown
    if record.get("sparse"):
        states.append("unknown")
    return tuple(states) if set(states) - {"unknown"} else None


def evidence_dict(evidence: Evidence) -> dict:
    """Evidence as a JSON-serialisable dict; `Evidence(**evidence_dict(evidence)) == evidence`."""
    facts = {key: sorted(getattr(evidence, key)) for key in ("present", "unknown", "salient")}
    facts["seen"] = {name: list(times) for name, times in (evidence.seen or {}).items()}
    if evidence.counts is not None:
        facts["counts"] = dict(evidence.counts)
    if evidence.light is not None:
        facts["light"] = list(evidence.light)
    for key in ("sides", "colours", "motion"):
        if (values := getattr(evidence, key)) is not None:
            facts[key] = {name: sorted(value) for name, value in values.items()}
    return facts
