"""The toy driving world: short dash-cam clips drawn from a script, so that their truth is known exactly.

    python -m demo.world --output_dir output/demo/world --num_clips 400 --seed 42

writes `videos/*.mp4` (320x180, 24 frames, H.264), `captions.json` (Microscope and Copilot entries), `raw_captions.json`
(one plain caption per clip) and `truth.json` (classes, order, times, boxes; numbers, sides, colours, motions and states
of lights). In every clip, two or three events follow one another; each has its own time span, its own class of object,
and a cause or a consequence.

    python -m demo.world --output_dir output/demo/fresh --num_clips 300 --seed 7 --held_out true

writes more clips for evaluation, all of them drawn and captioned as held-out clips are, under names that no training
clip has. `--twins true` adds twins of the held-out clips, which differ from them in one object that is not drawn, and
`twins.json`, which says of which clip each is the twin and what it lacks.

Some captions are wrong on purpose, like captions written by language models: in the training clips' Microscope entries,
most clauses about a red light or a stop sign say that a pedestrian crosses, and most about a bus say that a car follows
it, whether or not that is so (`COMPANION`, `INVENTION_RATE`). Copilot entries and all captions of held-out
clips are true. Some pairs of events (`HELD_OUT_PAIRS`) occur in held-out clips only.

"bicycle" and "motorcycle" include the rider; "person" is somebody on foot.
"""

import argparse
import json
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np

from demo.grammar import SHORT, SHORT_WHILE, SO, WHAT, WHILE, copilot_caption, fill, microscope_caption, raw_caption
from stage3.mentions import read_caption
from training.common import cpu_count, run_main, write_json

WIDTH, HEIGHT, FRAMES, FPS = 320, 180, 24, 6
# COCO's names and ids, so that the same code and tables serve this world and real clips.
CLASSES = {
    "person": 0, "bicycle": 1, "car": 2, "motorcycle": 3, "bus": 5, "truck": 7, "traffic light": 9, "stop sign": 11,
}
COLOURS = {
    "car": ("red", "blue", "white", "black"), "bus": ("yellow", "red", "blue"), "truck": ("white", "orange", "green"),
}
RGB = {
    "red": (200, 35, 35), "blue": (40, 80, 205), "white": (232, 232, 228), "black": (28, 28, 32),
    "yellow": (235, 190, 30), "orange": (235, 125, 25), "green": (35, 135, 65),
}
KINDS = {  # kind of event -> class of its object
    "light_red": "traffic light", "light_green": "traffic light", "stop_sign": "stop sign",
    "car_brakes": "car", "car_turns": "car", "person_crosses": "person",
    "bicycle_passes": "bicycle", "motorcycle_passes": "motorcycle",
    "bus_oncoming": "bus", "bus_pulls_over": "bus", "truck_oncoming": "truck", "truck_merges": "truck",
}
CONTROLS = {"light_red": 0.46, "stop_sign": 0.30, "light_green": 0.10, None: 0.14}  # at most one per clip
OTHERS = {
    "car_brakes": 0.8, "car_turns": 0.8, "person_crosses": 2.6, "bicycle_passes": 1.3, "motorcycle_passes": 1.3,
    "bus_oncoming": 0.9, "bus_pulls_over": 0.6, "truck_oncoming": 0.7, "truck_merges": 0.7,
}
# The second object of an event. It is there in a share COMPANION_RATE of these events; where it is not (and the clip
# does not show its class), a training clip's Microscope caption invents it with probability INVENTION_RATE.
COMPANION = {"light_red": "person", "stop_sign": "person", "bus_oncoming": "car", "bus_pulls_over": "car"}
COMPANION_RATE = 0.22
INVENTION_RATE = 0.88
HELD_OUT_PAIRS = (("bus", "bicycle"), ("truck", "motorcycle"), ("stop sign", "truck"))  # classes, in either order
HELD_OUT_SHARE = 0.25  # share of the held-out clips with such a pair
NUM_HELD_OUT = 40
SPLIT_SEED = 42
VARIANTS = 4
NEAR = 2.2  # metres: nothing closer is drawn


@dataclass(frozen=True)
class Event:
    kind: str
    start: float          # in clip time, 0 to 1
    end: float
    colour: str | None    # of a car, bus or truck
    from_left: bool       # side that the object comes from
    companion: str | None  # class of the second object, if it is really there
    drawn: bool = True    # False in a twin: everything moves as if its object were there, but it is not

    @property
    def name(self):
        return KINDS[self.kind]


@dataclass(frozen=True)
class Script:
    seed: tuple
    night: bool
    city: bool
    events: tuple[Event, ...]

    @property
    def shown(self):
        """The events whose object is drawn: all, but in twins."""
        return [event for event in self.events if event.drawn]

    @property
    def present(self):
        """Names of the classes that the clip shows, in the order of CLASSES."""
        seen = {event.name for event in self.shown} | {event.companion for event in self.events}
        return [name for name in CLASSES if name in seen]

    @property
    def order(self):
        """The events' classes in the order of time; each is out of sight before the next appears."""
        return [event.name for event in self.shown]

    def things(self, number, s):
        """The objects at the share s, 0 <= s < 1, of the time of event `number`; always in the same order."""
        return things_at(self.events[number], s)


@dataclass(frozen=True)
class Box:
    name: str
    xyxy: tuple[float, float, float, float]  # pixels, inside the frame
    attribute: str | None = None             # colour of a car, bus or truck; state of a traffic light


@dataclass
class Clip:
    script: Script
    frames: np.ndarray                        # uint8 [24, 180, 320, 3] RGB
    boxes: list[list[Box]] = field(default_factory=list)  # one list per frame, nearest object last


# ------------------------------------------------------------------------------------------------------- the script


def choose(rng, weights):
    """One key of a dict of weights."""
    keys = list(weights)
    p = np.array([weights[key] for key in keys], dtype=float)
    return keys[rng.choice(len(keys), p=p / p.sum())]


def is_reserved(names):
    return any(first in names and second in names for first, second in HELD_OUT_PAIRS)


def fits(kinds):
    """True if no class has two events and no companion's class has an event, so that the order is unambiguous."""
    names = [KINDS[kind] for kind in kinds]
    companions = {COMPANION[kind] for kind in kinds if kind in COMPANION}
    return len(set(names)) == len(names) and not companions & set(names)


def draw_kinds(rng):
    count = 2 + int(rng.random() < 0.55)
    control = choose(rng, CONTROLS)
    kinds = [control] if control else []
    while len(kinds) < count:
        kind = choose(rng, OTHERS)
        if fits([*kinds, kind]):
            kinds.append(kind)
    rng.shuffle(kinds)
    return kinds


def make_script(seed, held_out=False):
    """Draw what happens in a clip. seed: an int or a tuple of ints; the same seed gives the same script."""
    seed = tuple(np.atleast_1d(seed).tolist())
    rng = np.random.default_rng([*seed, int(held_out)])
    wants_reserved = held_out and rng.random() < HELD_OUT_SHARE
    while True:
        kinds = draw_kinds(rng)
        reserved = is_reserved([KINDS[kind] for kind in kinds])
        if reserved == wants_reserved or (held_out and not wants_reserved and not reserved):
            break
    night, city = bool(rng.random() < 0.4), bool(rng.random() < 0.55)
    events = []
    for index, kind in enumerate(kinds):
        colours = COLOURS.get(KINDS[kind])
        colour = str(rng.choice(colours)) if colours else None
        companion = COMPANION.get(kind) if rng.random() < COMPANION_RATE else None
        events.append(Event(
            kind, index / len(kinds), (index + 1) / len(kinds), colour, bool(rng.random() < 0.5), companion,
        ))
    return Script(seed, night, city, tuple(events))


# ------------------------------------------------------------------------------------------------------- the camera


def between(knots, s):
    """Piecewise linear interpolation; knots: ((s, value), ...)."""
    return float(np.interp(s, [k[0] for k in knots], [k[1] for k in knots]))


@dataclass(frozen=True)
class Camera:
    centre: float     # column of the vanishing point
    horizon: float    # row of the vanishing point
    focal: float = 190.0
    height: float = 1.5  # metres above the road

    def point(self, x, y, z):
        """Metres right, up from the road, ahead -> pixels."""
        return self.centre + self.focal * x / z, self.horizon + self.focal * (self.height - y) / z

    def box(self, x, bottom, z, width, height):
        """Pixels (x1, y1, x2, y2) of an upright object at (x, z) whose lower edge is `bottom` metres above the road."""
        x1, y1 = self.point(x - width / 2, bottom + height, z)
        x2, y2 = self.point(x + width / 2, bottom, z)
        return x1, y1, x2, y2


@dataclass(frozen=True)
class Thing:
    """One object in one frame."""

    name: str
    x: float
    z: float
    width: float
    height: float
    bottom: float = 0.0
    attribute: str | None = None
    front: bool = False     # its front is visible (it comes towards us)
    phase: float = 0.0      # of legs and pedals
    braking: bool = False
    mirrored: bool = False


# Metres driven since the event began, by the share of its time; where the value stays the same, the ego vehicle stops.
EGO = {
    "light_red": ((0, 0), (0.4, 10), (0.88, 10), (1, 19)),
    "light_green": ((0, 0), (0.45, 0), (1, 11)),
    "stop_sign": ((0, 0), (0.5, 11), (0.8, 11), (1, 16)),
    "car_brakes": ((0, 0), (0.4, 10), (0.8, 12), (1, 18)),
    "car_turns": ((0, 0), (0.3, 6), (0.7, 8), (1, 16)),
    "person_crosses": ((0, 0), (0.25, 5), (0.85, 5), (1, 9)),
    "bicycle_passes": ((0, 0), (1, 8)),
    "motorcycle_passes": ((0, 0), (1, 12)),
    "bus_oncoming": ((0, 0), (1, 20)),
    "bus_pulls_over": ((0, 0), (1, 14)),
    "truck_oncoming": ((0, 0), (1, 20)),
    "truck_merges": ((0, 0), (0.5, 12), (1, 18)),
}


def walker(event, s, begin, end):
    """A person who crosses the road from share `begin` to share `end` of the event's time."""
    side = -1 if event.from_left else 1
    x = between(((begin, 5.6 * side), (end, -5.6 * side)), s)
    return Thing("person", x, 7.0, 1.0, 2.2, phase=s * 14, mirrored=not event.from_left)


def things_at(event, s):
    """The objects of an event at the share s of its time, 0 <= s < 1."""
    side = -1 if event.from_left else 1
    ahead = between(EGO[event.kind], s)
    out = []
    if event.kind == "light_red":
        state = "amber" if s < 0.15 else "red" if s < 0.9 else "green"
        out = [Thing("traffic light", 1.6, 23 - ahead, 1.25, 2.9, 3.0, state)]
    elif event.kind == "light_green":
        out = [Thing("traffic light", 1.6, 14 - ahead, 1.25, 2.9, 3.0, "red" if s < 0.35 else "green")]
    elif event.kind == "stop_sign":
        out = [Thing("stop sign", 3.3, 19 - ahead, 1.6, 1.6, 1.7)]
    elif event.kind == "car_brakes":
        z = between(((0, 20), (0.35, 9), (0.85, 8), (1, 11)), s)
        out = [Thing("car", between(((0, 0), (0.85, 0), (1, 9)), s), z, 2.1, 1.7, 0, event.colour, braking=s > 0.25)]
    elif event.kind == "car_turns":
        x = between(((0, 8 * side), (0.5, 0.8 * side), (1, -9 * side)), s)
        out = [Thing("car", x, between(((0, 10), (0.5, 8), (1, 11)), s), 2.1, 1.7, 0, event.colour)]
    elif event.kind == "person_crosses":
        out = [walker(event, s, 0.0, 1.0)]
    elif event.kind in ("bicycle_passes", "motorcycle_passes"):
        x = between(((0, 2.3 * side), (0.7, 1.5 * side), (1, 2.4 * side)), s)
        z = between(((0, 4.2), (0.7, 7), (1, 10)), s)
        out = [Thing(event.name, x, z, 2.3, 2.2, 0, phase=s * 9)]
    elif event.kind.endswith("oncoming"):
        z = between(((0, 24), (0.5, 12), (1, 4.5)), s)
        out = [Thing(event.name, -3.4, z, 2.6, 3.2, 0, event.colour, front=True)]
        if event.companion:
            out.append(Thing("car", -0.9, z + 4.5, 2.1, 1.7, 0, "white", front=True))
    elif event.kind == "bus_pulls_over":
        x = between(((0, 0.3), (0.4, 2.2), (1, 4.6)), s)
        z = between(((0, 14), (0.6, 9), (1, 5.5)), s)
        out = [Thing("bus", x, z, 2.6, 3.2, 0, event.colour, braking=True)]
        if event.companion:
            out.append(Thing("car", x - 1.9, z - 1.5, 2.1, 1.7, 0, "white"))
    elif event.kind == "truck_merges":
        x = between(((0, 7 * side), (0.35, 0), (0.85, 0), (1, -7 * side)), s)
        out = [Thing("truck", x, between(((0, 11), (0.5, 9), (1, 13)), s), 2.6, 3.2, 0, event.colour)]
    if event.companion == "person" and 0.3 <= s < 0.98:
        out.append(walker(event, s, 0.3, 0.98))
    return out if event.drawn else out[1:]


# ------------------------------------------------------------------------------------------------------- drawing


class Pen:
    """Draws inside one object's box: (0, 0) is its upper left corner, (1, 1) its lower right."""

    SHIFT = 4  # cv2's fixed-point bits: positions move by sixteenths of a pixel

    def __init__(self, image, box, dim=1.0, mirrored=False):
        self.image, self.dim, self.mirrored = image, dim, mirrored
        self.x, self.y, x2, y2 = box
        self.w, self.h = x2 - self.x, y2 - self.y

    def at(self, points):
        points = np.asarray(points, dtype=float)
        u = 1 - points[:, 0] if self.mirrored else points[:, 0]
        pixels = np.stack([self.x + u * self.w, self.y + points[:, 1] * self.h], axis=1)
        return np.round(np.clip(pixels, -4000, 4000) * (1 << self.SHIFT)).astype(np.int32)

    def paint(self, colour, lit):
        return tuple(colour) if lit else tuple(int(c * self.dim) for c in colour)

    def poly(self, colour, points, lit=False):
        cv2.fillPoly(self.image, [self.at(points)], self.paint(colour, lit), cv2.LINE_AA, self.SHIFT)

    def rect(self, colour, u1, v1, u2, v2, lit=False):
        self.poly(colour, ((u1, v1), (u2, v1), (u2, v2), (u1, v2)), lit)

    def oval(self, colour, u, v, ru, rv, lit=False, thickness=-1):
        centre = self.at([(u, v)])[0]
        scale = 1 << self.SHIFT
        axes = (max(1, int(ru * self.w * scale)), max(1, int(rv * self.h * scale)))
        cv2.ellipse(self.image, tuple(int(c) for c in centre), axes, 0, 0, 360, self.paint(colour, lit), thickness,
                    cv2.LINE_AA, self.SHIFT)

    def line(self, colour, points, width=0.04, lit=False):
        """width: as a share of the box's height."""
        cv2.polylines(self.image, [self.at(points)], False, self.paint(colour, lit), max(1, round(width * self.h)),
                      cv2.LINE_AA, self.SHIFT)


def draw_person(pen, thing, night):
    swing = 0.3 * np.sin(thing.phase)
    pen.line((40, 42, 80), ((0.5, 0.55), (0.5 + swing, 0.98)), 0.11)
    pen.line((52, 54, 100), ((0.5, 0.55), (0.5 - swing, 0.98)), 0.11)
    pen.rect((225, 90, 160), 0.28, 0.2, 0.72, 0.6)
    pen.line((235, 195, 165), ((0.42, 0.26), (0.5 + swing * 1.3, 0.55)), 0.06)
    pen.oval((240, 200, 170), 0.5, 0.1, 0.21, 0.1)


def draw_bicycle(pen, thing, night):
    tyre, frame = (15, 15, 15), (20, 190, 175)
    for u in (0.2, 0.8):
        pen.oval(tyre, u, 0.78, 0.19, 0.2, thickness=max(1, round(pen.h * 0.035)))
    pen.line(frame, ((0.2, 0.78), (0.38, 0.5), (0.72, 0.5), (0.8, 0.78)), 0.05)
    pen.line(frame, ((0.38, 0.5), (0.5, 0.78), (0.72, 0.5)), 0.05)
    pen.line((60, 60, 70), ((0.42, 0.48), (0.52 + 0.05 * np.sin(thing.phase), 0.82)), 0.08)
    pen.poly((120, 215, 60), ((0.34, 0.48), (0.48, 0.48), (0.66, 0.22), (0.5, 0.16)))
    pen.line((235, 195, 165), ((0.58, 0.26), (0.74, 0.46)), 0.05)
    pen.oval((240, 200, 170), 0.6, 0.1, 0.085, 0.1)


def draw_motorcycle(pen, thing, night):
    for u in (0.2, 0.8):
        pen.oval((12, 12, 14), u, 0.8, 0.19, 0.2)
        pen.oval((150, 150, 155), u, 0.8, 0.08, 0.085)
    tank = (0.12, 0.5), (0.4, 0.55), (0.6, 0.42), (0.82, 0.45), (0.88, 0.6), (0.62, 0.85), (0.3, 0.85)
    pen.poly((150, 60, 190), tank)
    pen.poly((35, 35, 42), ((0.3, 0.55), (0.48, 0.55), (0.72, 0.26), (0.52, 0.14), (0.36, 0.3)))
    pen.line((35, 35, 42), ((0.58, 0.28), (0.8, 0.44)), 0.08)
    pen.oval((245, 245, 245), 0.62, 0.11, 0.1, 0.11)
    pen.rect((30, 30, 40), 0.64, 0.08, 0.73, 0.14)


def draw_car(pen, thing, night):
    body = RGB[thing.attribute]
    pen.rect((10, 10, 10), 0.06, 0.8, 0.24, 1.0)
    pen.rect((10, 10, 10), 0.76, 0.8, 0.94, 1.0)
    pen.poly(body, ((0.2, 0.02), (0.8, 0.02), (0.92, 0.42), (1, 0.5), (1, 0.88), (0, 0.88), (0, 0.5), (0.08, 0.42)))
    pen.poly((75, 95, 115), ((0.24, 0.09), (0.76, 0.09), (0.85, 0.42), (0.15, 0.42)))
    pen.rect((60, 60, 64), 0.02, 0.74, 0.98, 0.88)
    lamp = (255, 250, 210) if thing.front else (255, 25, 20) if thing.braking else (130, 15, 15)
    for u in (0.14, 0.86):
        pen.oval(lamp, u, 0.6, 0.1 if thing.braking else 0.08, 0.09, lit=thing.front or thing.braking or night)


def draw_bus(pen, thing, night):
    body = RGB[thing.attribute]
    pen.rect((10, 10, 10), 0.08, 0.9, 0.26, 1.0)
    pen.rect((10, 10, 10), 0.74, 0.9, 0.92, 1.0)
    pen.rect(body, 0, 0, 1, 0.94)
    pen.rect((25, 25, 25), 0.12, 0.03, 0.88, 0.13)
    pen.rect((255, 170, 40), 0.22, 0.055, 0.78, 0.105, lit=True)
    pen.rect((70, 100, 125), 0.05, 0.17, 0.95, 0.6)
    pen.line((30, 35, 40), ((0.5, 0.17), (0.5, 0.6)), 0.015)
    lamp = (255, 250, 210) if thing.front else (255, 25, 20)
    for u in (0.15, 0.85):
        pen.oval(lamp, u, 0.78, 0.08, 0.05, lit=True)


def draw_truck(pen, thing, night):
    body = RGB[thing.attribute]
    pen.rect((10, 10, 10), 0.05, 0.86, 0.25, 1.0)
    pen.rect((10, 10, 10), 0.75, 0.86, 0.95, 1.0)
    pen.rect((188, 180, 165), 0, 0, 1, 0.86)
    for v in (0.1, 0.2, 0.3):
        pen.line((120, 112, 100), ((0.04, v), (0.96, v)), 0.012)
    if thing.front:
        pen.rect(body, 0.1, 0.36, 0.9, 0.94)
        pen.rect((60, 85, 105), 0.17, 0.42, 0.83, 0.63)
        pen.rect((50, 50, 55), 0.25, 0.7, 0.75, 0.84)
    else:
        pen.rect(body, 0.0, 0.5, 1, 0.86)
        pen.line((60, 55, 50), ((0.5, 0.04), (0.5, 0.84)), 0.02)
        pen.rect((45, 45, 48), 0.06, 0.86, 0.94, 0.92)
    lamp = (255, 250, 210) if thing.front else (220, 20, 20)
    for u in (0.16, 0.84):
        pen.oval(lamp, u, 0.88 if thing.front else 0.8, 0.06, 0.045, lit=thing.front or night)


def draw_traffic_light(pen, thing, night):
    pen.rect((60, 62, 66), 0.46, 1.0, 0.54, 2.0)
    pen.rect((22, 24, 24), 0, 0, 1, 1)
    lamps = {"red": (0.19, (255, 30, 25)), "amber": (0.5, (255, 190, 30)), "green": (0.81, (40, 245, 110))}
    for state, (v, colour) in lamps.items():
        on = state == thing.attribute
        pen.oval(colour if on else (62, 62, 58), 0.5, v, 0.36, 0.145, lit=on)


def draw_stop_sign(pen, thing, night):
    angles = np.pi / 8 + np.arange(8) * np.pi / 4
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1) / np.cos(np.pi / 8)
    pen.rect((130, 130, 130), 0.46, 1.0, 0.54, 2.05)
    dim, pen.dim = pen.dim, max(pen.dim, 0.85)  # lit by the headlights
    pen.poly((245, 245, 245), 0.5 + 0.5 * ring)
    pen.poly((200, 15, 25), 0.5 + 0.43 * ring)
    pen.rect((245, 245, 245), 0.2, 0.41, 0.8, 0.59)
    for u in (0.35, 0.5, 0.65):
        pen.line((200, 15, 25), ((u, 0.41), (u, 0.59)), 0.03)
    pen.dim = dim


DRAW = {
    "person": draw_person, "bicycle": draw_bicycle, "car": draw_car, "motorcycle": draw_motorcycle, "bus": draw_bus,
    "truck": draw_truck, "traffic light": draw_traffic_light, "stop sign": draw_stop_sign,
}


def draw_ground(image, camera, script, dim):
    """Sky, ground, road and its edges; the same in all frames of a clip."""
    top, low = ((10, 12, 32), (32, 34, 60)) if script.night else ((110, 165, 225), (205, 225, 240))
    horizon = int(camera.horizon)
    ramp = np.linspace(0, 1, horizon)[:, None, None]
    image[:horizon] = np.array(top) * (1 - ramp) + np.array(low) * ramp
    image[horizon:] = [int(c * dim) for c in ((128, 124, 118) if script.city else (92, 132, 62))]
    pen = Pen(image, (0, 0, 1, 1), dim)
    near, far = 2.0, 200.0

    def strip(colour, left, right):
        corners = (left, near), (right, near), (right, far), (left, far)
        pen.poly(colour, [camera.point(x, 0, z) for x, z in corners])

    strip((78, 78, 82), -5.3, 1.9)
    strip((215, 215, 205), 1.55, 1.72)
    strip((215, 215, 205), -5.12, -4.95)
    if script.night:  # the ego car's headlights
        glow = np.zeros((HEIGHT, WIDTH), np.float32)
        corners = [(-2.2, 2.2), (2.2, 2.2), (2.6, 14), (-2.6, 14)]
        points = np.array([camera.point(x, 0, z) for x, z in corners], dtype=np.float32)
        cv2.fillConvexPoly(glow, points.round().astype(np.int32), 1.0)
        glow = cv2.GaussianBlur(glow, (0, 0), 7)[..., None]
        image[:] = np.clip(image * (1 + 0.7 * glow), 0, 255)


def roadside(script):
    """Houses or trees beside the road: (side, metres along it, size, shade); they repeat every 120 metres."""
    rng = np.random.default_rng([*script.seed, 7])
    return [
        (side, place + rng.uniform(-2, 2), rng.uniform(0.7, 1.3), rng.uniform(0.75, 1.1))
        for side in (-1, 1) for place in range(0, 120, 10)
    ]


def draw_roadside(image, camera, script, items, driven, dim):
    placed = sorted((((place - driven) % 120, side, size, shade) for side, place, size, shade in items), reverse=True)
    for z, side, size, shade in placed:
        if not 5 < z < 75:
            continue
        if script.city:
            pen = Pen(image, camera.box(side * 13.0 - 1.5, 0, z, 9, 9 * size), dim * shade)
            pen.rect((150, 118, 100) if size > 1 else (128, 132, 140), 0, 0, 1, 1)
            lit = script.night and shade > 0.9
            for v in (0.15, 0.45, 0.75):
                for u in (0.15, 0.45, 0.75):
                    pen.rect((250, 215, 130) if lit else (72, 82, 92), u, v, u + 0.13, v + 0.14, lit=lit)
        else:
            pen = Pen(image, camera.box(side * 10.5 - 1.5, 0, z, 4.5, 7 * size), dim * shade)
            pen.rect((92, 66, 44), 0.43, 0.55, 0.57, 1.0)
            pen.oval((48, 112, 52), 0.5, 0.35, 0.5, 0.36)


def draw_lane_marks(image, camera, driven, dim):
    pen = Pen(image, (0, 0, 1, 1), dim)
    for k in range(14):
        z1 = k * 6 - driven % 6 + 1
        z2 = z1 + 2.6
        if z2 < 2.1:
            continue
        z1 = max(z1, 2.1)
        corners = (-1.85, z1), (-1.7, z1), (-1.7, z2), (-1.85, z2)
        pen.poly((225, 222, 200), [camera.point(x, 0, z) for x, z in corners])


def label(camera, thing):
    """The Box of an object; None if too little of it is visible."""
    if thing.z < NEAR:
        return None
    full = camera.box(thing.x, thing.bottom, thing.z, thing.width, thing.height)
    x1, y1, x2, y2 = max(full[0], 0), max(full[1], 0), min(full[2], WIDTH), min(full[3], HEIGHT)
    if x2 - x1 < 5 or y2 - y1 < 8:
        return None
    if (x2 - x1) * (y2 - y1) < 0.35 * (full[2] - full[0]) * (full[3] - full[1]):
        return None
    return Box(thing.name, (x1, y1, x2, y2), thing.attribute)


def camera_of(script):
    """(camera, brightness) of a clip; each clip has its own."""
    rng = np.random.default_rng([*script.seed, 3])
    light = rng.uniform(0.42, 0.55) if script.night else rng.uniform(0.85, 1.0)
    return Camera(WIDTH / 2 + rng.uniform(-10, 10), 72 + rng.uniform(-4, 4)), light


def event_at(script, index):
    """(number of the event that a frame shows, share of the event's time)."""
    time = index / FRAMES
    number = sum(event.end <= time + 1e-9 for event in script.events)
    event = script.events[number]
    return number, (time - event.start) / (event.end - event.start)


def moments(script):
    """For each frame: (metres driven, objects from far to near)."""
    begun = np.random.default_rng([*script.seed, 5]).uniform(0, 100)
    for index in range(FRAMES):
        number, s = event_at(script, index)
        driven = begun + sum(EGO[e.kind][-1][1] for e in script.events[:number])
        driven += between(EGO[script.events[number].kind], s)
        yield driven, sorted(script.things(number, s), key=lambda thing: -thing.z)


def boxes_of(script):
    """One list of Box per frame, without drawing anything."""
    camera, _ = camera_of(script)
    frames = []
    for _, things in moments(script):
        boxes = [label(camera, thing) for thing in things]
        frames.append([box for box in boxes if box])
    return frames


def render(script):
    """Draw a script. Returns a Clip."""
    camera, light = camera_of(script)
    base = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    draw_ground(base, camera, script, light)
    items = roadside(script)
    frames = np.repeat(base[None], FRAMES, axis=0)
    for image, (driven, things) in zip(frames, moments(script), strict=True):
        draw_roadside(image, camera, script, items, driven, light)
        draw_lane_marks(image, camera, driven, light)
        for thing in things:
            if thing.z >= NEAR:
                box = camera.box(thing.x, thing.bottom, thing.z, thing.width, thing.height)
                DRAW[thing.name](Pen(image, box, light, thing.mirrored), thing, script.night)
    return Clip(script, frames, boxes_of(script))


def make_clip(seed, held_out=False):
    """The clip of a seed (int or tuple of ints): the same seed gives the same pixels, boxes and script."""
    return render(make_script(seed, held_out))


# ------------------------------------------------------------------------------------------------------- the files


def write_video(path, frames):
    """Encode uint8 RGB frames [T, H, W, 3] as H.264; same frames, same bytes. The file is complete or absent."""
    path = Path(path)
    partial_path = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    with av.open(str(partial_path), "w") as container:
        # mbtree=0: with it, x264 encodes the same frames differently from one run to the next
        options = {"crf": "18", "preset": "veryfast", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    os.replace(partial_path, path)


def rounded(values, digits):
    return [round(value, digits) for value in values]


SIDE_FROM, NEAR_FACTOR = 0.07, 1.3  # what is left or right of the middle; what approaches or recedes: see exact_facts
FIXED_SIDES = {"bus_oncoming": "left", "truck_oncoming": "left", "bus_pulls_over": "right", "stop_sign": "right"}
SIDED = ("car_turns", "person_crosses", "bicycle_passes", "motorcycle_passes", "truck_merges")


def visible_things(script):
    """{(number of its event, place in the event): [(frame, Thing, Box), ...]} of each object, where it is visible."""
    camera, _ = camera_of(script)
    seen = {}
    for index in range(FRAMES):
        number, s = event_at(script, index)
        for place, thing in enumerate(script.things(number, s)):
            if box := label(camera, thing):
                seen.setdefault((number, place), []).append((index, thing, box))
    return seen


def sides_of(steps):
    """Sides of the middle of the picture on which an object enters, is largest or leaves: a set of "left", "right"."""
    areas = [(box.xyxy[2] - box.xyxy[0]) * (box.xyxy[3] - box.xyxy[1]) for _, _, box in steps]
    sides = set()
    for place in (0, int(np.argmax(areas)), -1):
        x1, _, x2, _ = steps[place][2].xyxy
        centre = (x1 + x2) / 2 / WIDTH
        if abs(centre - 0.5) > SIDE_FROM:
            sides.add("left" if centre < 0.5 else "right")
    return sides


def motions_of(steps):
    """Motions of an object, as stage3.evidence.MOTIONS names them. It crosses if it enters on one side of the picture
    and leaves on the other; it approaches (recedes) if its distance shrinks (grows) by NEAR_FACTOR at any time."""
    entered, left = sides_of(steps[:1]), sides_of(steps[-1:])
    moves = set()
    if entered and left and entered != left:
        moves.add("left to right" if entered == {"left"} else "right to left")
    distances = [thing.z for _, thing, _ in steps]
    for index, z in enumerate(distances):
        if z >= NEAR_FACTOR * min(distances[index:]):
            moves.add("approaches")
        if NEAR_FACTOR * z <= max(distances[index:]):
            moves.add("recedes")
    return moves


def states_of(steps, least=2):
    """States of the traffic lights in the order of time, each time one comes up. A state that is shown in fewer than
    `least` frames on end is left out: at 6 frames a second, nobody tells what is there for one of them."""
    frames = [set() for _ in range(FRAMES)]
    for index, _, box in steps:
        frames[index].add(box.attribute)
    states = []
    for index, shown in enumerate(frames):
        before = frames[index - 1] if index else set()
        for state in sorted(shown - before):
            following = frames[index:index + least]
            if len(following) == least and all(state in later for later in following):
                states.append(state)
    return [state for index, state in enumerate(states) if index == 0 or state != states[index - 1]]


def exact_facts(script):
    """What stage3.evidence.Evidence says of counts, sides, light, colours and motion, exactly, as JSON.

    Times and places are those of the frames: an object that is out of the picture has none. A class that is shown more
    often than at one time has no count; traffic lights and stop signs have no motion.
    """
    seen = visible_things(script)
    frames, things = {}, {}
    facts = {"counts": {}, "sides": {}, "light": [], "colours": {}, "motion": {}}
    for key, steps in sorted(seen.items(), key=lambda item: item[1][0][0]):
        name = steps[0][1].name
        things.setdefault(name, set()).add(key)
        for index, _, _ in steps:
            frames[name, index] = frames.get((name, index), 0) + 1
        values = {"sides": sides_of(steps)}
        if name in COLOURS:
            values["colours"] = {steps[0][2].attribute}
        if name not in ("traffic light", "stop sign"):
            values["motion"] = motions_of(steps)
        for kind, found in values.items():
            facts[kind][name] = sorted({*facts[kind].get(name, ()), *found})
    for name, keys in things.items():
        most = max(count for (other, _), count in frames.items() if other == name)
        if most == len(keys):
            facts["counts"][name] = most
    lights = [step for steps in seen.values() if steps[0][1].name == "traffic light" for step in steps]
    facts["light"] = states_of(lights)
    return facts


def event_facts(script):
    """One dict per event: what it shows, from which side, in which colour or states of a light, and when."""
    seen, facts = visible_things(script), []
    for number, event in enumerate(script.events):
        if not event.drawn:
            continue
        side = FIXED_SIDES.get(event.kind)
        if event.kind in SIDED:
            side = "left" if event.from_left else "right"
        facts.append({
            "kind": event.kind, "class": event.name, "colour": event.colour, "side": side,
            "light": states_of(seen[number, 0]) if event.name == "traffic light" else None,
            "start": round(event.start, 3), "end": round(event.end, 3), "companion": event.companion,
        })
    return facts


def traps_of(script):
    """One dict per event in whose context training captions invent a class: is that class really there?"""
    return [{"context": event.kind, "class": COMPANION[event.kind], "there": event.companion is not None}
            for event in script.shown if event.kind in COMPANION]


def truth_of(clip):
    """Exact truth of a clip, as `evaluate.py --truth` reads it; times are fractions of the clip."""
    seen, frames = {}, []
    for index, boxes in enumerate(clip.boxes):
        frames.append([[box.name, *rounded(box.xyxy, 1)] for box in boxes])
        for box in boxes:
            first, _ = seen.get(box.name, (index, index))
            seen[box.name] = (first, index)
    script = clip.script
    times = {}
    for name in script.present:
        times[name] = rounded([index / (FRAMES - 1) for index in seen[name]], 3)
    return {
        "present": script.present,
        "order": script.order,
        "seen": times,
        "events": [event.kind for event in script.shown],
        "companions": [event.companion for event in script.shown],
        "traps": traps_of(script),
        "facts": event_facts(script),
        **exact_facts(script),
        "actions": actions_of(script),
        "night": script.night,
        "city": script.city,
        "boxes": frames,
    }


def actions_of(script):
    """class -> the verbs by which any wording of its events says what it does, as stage3/mentions.py reads them."""
    actions = {}
    for event in script.shown:
        texts = [what + so for what in WHAT[event.kind] for so in SO[event.kind]] + list(SHORT[event.kind])
        if event.companion:
            texts += [*WHILE[event.companion], SHORT_WHILE[event.companion]]
        for text in texts:
            for statement in read_caption(fill(text, event).strip(" ,")).statements:
                if statement.kind == "verb" and statement.subject != ("ego",):
                    for name in statement.subject:
                        actions.setdefault(name, set()).add(statement.value)
    return {name: sorted(values) for name, values in sorted(actions.items())}


def distinct(draw):
    """VARIANTS different texts, or fewer where 50 draws do not give as many."""
    texts = {}  # in the order in which they were drawn
    for _ in range(50):
        if len(texts) < VARIANTS:
            texts[draw()] = None
    return list(texts)


def captions_of(script, lies=False):
    """The Microscope and Copilot captions of a script. lies: Microscope captions may invent companions."""
    rng = np.random.default_rng([*script.seed, 11])
    rate = INVENTION_RATE if lies else 0.0
    invented = {kind: name for kind, name in COMPANION.items() if name not in script.present}
    return {
        "microscope": distinct(lambda: microscope_caption(script, rng, invented, rate)),
        "copilot": distinct(lambda: copilot_caption(script, rng)),
    }


def clip_name(index, all_held_out=False):
    return f"{'fresh' if all_held_out else 'clip'}_{index:04d}.mp4"


def held_out_names(num_clips, all_held_out=False):
    """The clips that training holds out: `split_by_video` with NUM_HELD_OUT and SPLIT_SEED, or all."""
    from dataset import MODES, Entry, split_by_video

    if all_held_out:
        return {clip_name(index, all_held_out) for index in range(num_clips)}

    entries = [
        Entry(f"{Path(clip_name(index)).stem}#{mode}", clip_name(index), mode, question, ("x",))
        for index in range(num_clips) for mode, question in MODES.items()
    ]
    _, held_out = split_by_video(entries, NUM_HELD_OUT, SPLIT_SEED)
    return {entry.video for entry in held_out}


def twins_of(script):
    """[(class that the twin lacks, the twin's script), ...]: one twin without each companion that is there, and one
    without the object of an event that has no companion, chosen by the script's seed, if there is one.

    Everything else of a twin is as in the clip: the camera brakes for the light that is not drawn.
    """
    twins, alone = [], []
    for index, event in enumerate(script.events):
        lacking = replace(event, companion=None) if event.companion else replace(event, drawn=False)
        twin = replace(script, events=(*script.events[:index], lacking, *script.events[index + 1:]))
        if event.companion:
            twins.append((event.companion, twin))
        else:
            alone.append((event.name, twin))
    if alone:
        twins.append(alone[np.random.default_rng([*script.seed, 13]).integers(len(alone))])
    return twins


def make_twins(script, name, folder):
    """Render and write the twins of the clip `name`; returns their rows of twins.json and {twin: its truth}."""
    rows, truth = [], {}
    for lacks, twin in twins_of(script):
        video = f"{Path(name).stem}_no_{lacks.replace(' ', '_')}.mp4"
        clip = render(twin)
        write_video(folder / video, clip.frames)
        truth[video] = truth_of(clip)
        in_trap = lacks in {trap["class"] for trap in truth[video]["traps"]}
        rows.append({"video": video, "of": name, "lacks": lacks, "in_trap": in_trap})
    return rows, truth


def make_one(index, seed, held_out, folder, all_held_out, twins):
    """Render and write one clip and its twins; returns its row, raw row, {clip: truth} and rows of twins.json."""
    name = clip_name(index, all_held_out)
    clip = make_clip((seed, index), name in held_out)
    write_video(folder / name, clip.frames)
    row = {"video": name, **captions_of(clip.script, lies=name not in held_out)}
    raw = {"video": name, "q": "Describe the video in detail.", "a": raw_caption(clip.script)}
    twin_rows, twin_truth = make_twins(clip.script, name, folder) if twins and name in held_out else ([], {})
    return row, raw, {name: truth_of(clip), **twin_truth}, twin_rows


def make_world(output_dir, num_clips=400, seed=42, all_held_out=False, twins=False, workers=None, say=print):
    """Write the data set, unless a finished one with the same settings exists. Returns its folder."""
    output_dir = Path(output_dir)
    settings = {"num_clips": num_clips, "seed": seed, "all_held_out": all_held_out, "twins": twins, "version": 7}
    stamp = output_dir / "world.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == settings:
        say(f"{output_dir} is complete: {num_clips} clips")
        return output_dir
    videos = output_dir / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    for old in videos.iterdir():  # clips made with other settings, or left by a run that was stopped
        old.unlink()
    held_out = held_out_names(num_clips, all_held_out)
    work = partial(make_one, seed=seed, held_out=held_out, folder=videos, all_held_out=all_held_out, twins=twins)
    rows, raws, truth, twin_rows = [], [], {}, []
    workers = workers or min(cpu_count(), 8)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the processes that start now: Ctrl-C is this one's
    drawn = pool.map(work, range(num_clips), chunksize=4)
    signal.signal(signal.SIGINT, handler)
    try:
        for row, raw, facts, lacking in drawn:
            rows.append(row)
            raws.append(raw)
            truth |= facts
            twin_rows += lacking
            if len(rows) % 100 == 0:
                say(f"drawn {len(rows)} of {num_clips} clips")
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, no more clips are drawn
    write_json(output_dir / "captions.json", rows, indent=1)
    write_json(output_dir / "raw_captions.json", raws, indent=1)
    write_json(output_dir / "truth.json", truth, indent=1)
    (output_dir / "twins.json").unlink(missing_ok=True)
    if twins:
        write_json(output_dir / "twins.json", twin_rows, indent=1)
    write_json(stamp, settings, indent=1)
    say(f"{output_dir}: {num_clips} clips, {len(held_out)} of them held out"
        + (f", and {len(twin_rows)} twins" if twins else ""))
    return output_dir


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m demo.world", description="Draw the toy driving world.")
    parser.add_argument("--output_dir", "--output-dir", default="output/demo/world", help="folder of the data set")
    parser.add_argument("--num_clips", "--num-clips", type=int, default=400, help="clips, including those held out")
    parser.add_argument("--seed", type=int, default=42, help="decides everything in the world")
    parser.add_argument("--held_out", "--held-out", choices=("true", "false"), default="false",
                        help="true: all clips are held-out clips, under names of their own")
    parser.add_argument("--twins", choices=("true", "false"), default="false",
                        help="true: also the held-out clips without one of their objects, and twins.json")
    args = parser.parse_args(argv)
    all_held_out = args.held_out == "true"
    least = 1 if all_held_out else NUM_HELD_OUT + 1
    if args.num_clips < least:
        parser.error(f"--num_clips must be at least {least}; of a training world's clips {NUM_HELD_OUT} are held out")
    cv2.setNumThreads(1)
    make_world(args.output_dir, args.num_clips, args.seed, all_held_out, args.twins == "true")
    return 0


if __name__ == "__main__":
    run_main(main)
