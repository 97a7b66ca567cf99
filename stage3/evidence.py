"""What a detector's boxes say about a clip: each class is present, absent or unknown.

`clip_evidence` turns a clip's record, as stage3/detect_objects.py writes it, into the Evidence that captions are
checked against. Nothing here runs a detector or reads a file.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from stage3.vocabulary_config import COCO_NAMES, ROAD_CLASSES
from training.config import DetectorSettings

VEHICLE_BODIES = frozenset({"car", "truck", "bus"})  # detectors may give one vehicle two boxes with two of these names


LIGHTS = ("red", "amber", "green")
SIDES = ("left", "right", "unknown")
MOTIONS = ("approaches", "recedes", "left to right", "right to left", "stands", "unknown")


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


def iou(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes [x1, y1, x2, y2]."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0.0) * max(height, 0.0)
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
    fractions of the clip.
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
    return Evidence(frozenset(present), frozenset(unknown), frozenset(salient), times)


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
