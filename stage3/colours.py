"""Which colour a vehicle's body has, and which lamp of a traffic light is lit, from the pixels of a detector's box.

Both questions are answered only where the pixels leave little doubt: a wrong colour would make stage 3 punish a true
caption, a missing one costs nothing. Pixels are uint8 RGB [H, W, 3].
"""

import numpy as np

from stage3.evidence import LIGHTS, VEHICLE_BODIES
from stage3.vocabulary_config import COCO_NAMES

BODY_COLOURS = ("red", "orange", "yellow", "green", "blue", "brown", "white", "grey", "black")
MIN_VEHICLE_SIDE = 16  # pixels: below, video compression has smeared the body's colour into the road's
MIN_LIGHT_SIZE = (5, 10)  # pixels, width and height: below, a lamp is one or two pixels
MAX_PIXELS = 96  # pixels per side that are looked at; larger boxes are thinned out
DAYLIGHT = 90  # mean of the brightest channel over the frame; below, only colours that lamps do not fake are named
MAX_COVERED = 0.3  # a body band covered more than this by nearer boxes shows their colour

# Hues in degrees, with gaps between neighbours: what lies in a gap has no name.
BODY_HUES = {"red": (342, 372), "orange": (17, 36), "yellow": (41, 66), "green": (85, 170), "blue": (195, 258)}
LAMP_HUES = {"red": (335, 381), "amber": (27, 60), "green": (90, 190)}
MIN_CHROMA = 45  # brightest channel - darkest channel: below, a pixel is white, grey or black
MIN_SATURATION = 0.42  # chroma / brightest channel; windows and shaded white paint reflect the sky with less
MAX_GREY_CHROMA = 28
NIGHT_COLOURS = ("red", "green", "blue")  # sodium lamps paint everything yellow, orange or brown
NIGHT_SATURATION = 0.55
NIGHT_BRIGHTNESS = 45
NIGHT_CHROMA = 30
NIGHT_LAMP = 180  # brightest channel from which a pixel of a dark frame belongs to a lamp

# Shares of the band. Windows, tyres and shadows are dark on any vehicle, and a road in the box is grey.
BODY_SHARE = {"white": 0.35, "grey": 0.6, "black": 0.6}
CHROMATIC_SHARE = 0.35
MAX_ON_BLACK = {"red": 0.2}  # a black body may have red lamps; of any other colour, no more than OTHER_ON_BLACK
OTHER_ON_BLACK = 0.1
MARGIN = 2.0  # the second colour must be this many times rarer
LAMP_SHARE = 0.025  # of the box's pixels
LAMP_BRIGHTNESS = 140
LAMP_PLACES = {"red": (0.0, 0.5), "amber": (0.3, 0.7), "green": (0.5, 1.0)}  # of the height of an upright light


def vehicle_colour(pixels: np.ndarray, daylight: bool = True) -> str | None:
    """The body's colour, one of BODY_COLOURS (silver is grey), or None: too small, too dark, or several colours.

    pixels: the vehicle's box. The band below the windows is looked at, where cars, vans, cabs and buses are painted.
    daylight: False for a dark frame, in which white, grey, black and everything near orange are not told apart.
    """
    if min(pixels.shape[:2]) < MIN_VEHICLE_SIDE:
        return None
    height, width = pixels.shape[:2]
    band = _thinned(pixels[int(0.5 * height):int(0.86 * height), int(0.12 * width):int(0.88 * width)])
    hue, saturation, brightest, chroma = _hue_saturation(band)
    least, dark = (MIN_SATURATION, 60) if daylight else (NIGHT_SATURATION, NIGHT_BRIGHTNESS)
    coloured = (saturation >= least) & (brightest >= dark)
    coloured &= (chroma >= MIN_CHROMA) if daylight else (chroma >= NIGHT_CHROMA) & (brightest < NIGHT_LAMP)
    shares = {name: float((coloured & _between(hue, hues)).mean()) for name, hues in BODY_HUES.items()}
    if daylight:
        # dark orange and dark yellow are brown; a little brighter they could be either
        earthy = coloured & _between(hue, (12, 50)) & (brightest < 150)
        shares["brown"] = float((earthy & (brightest < 120)).mean())
        for name in ("orange", "yellow"):
            shares[name] = float((coloured & _between(hue, BODY_HUES[name]) & (brightest >= 150)).mean())
        neutral = (chroma <= MAX_GREY_CHROMA) | (saturation < 0.13)
        shares["white"] = float((neutral & (brightest >= 180)).mean())
        shares["grey"] = float((neutral & (brightest >= 85) & (brightest < 160)).mean())
        shares["black"] = float((brightest < 70).mean())
    return _clear_winner(shares, daylight)


def _clear_winner(shares: dict[str, float], daylight: bool) -> str | None:
    """The colour with the largest share, if that is large enough and no other comes near."""
    rivals = {name: share for name, share in shares.items() if name != "black"}  # every vehicle has dark parts
    if shares.get("black", 0.0) >= BODY_SHARE["black"]:
        clean = all(share <= MAX_ON_BLACK.get(name, OTHER_ON_BLACK) for name, share in rivals.items())
        return "black" if clean else None
    first, second = sorted(rivals, key=lambda name: -rivals[name])[:2]
    if rivals[first] < BODY_SHARE.get(first, CHROMATIC_SHARE) or rivals[first] < MARGIN * rivals[second]:
        return None
    return first if daylight or first in NIGHT_COLOURS else None


def light_colour(pixels: np.ndarray) -> str | None:
    """The lit lamp of a traffic light: "red", "amber" or "green"; None if the box is small or does not show one lamp.

    pixels: the light's box. Lit lamps are bright and saturated; in an upright light, red must be in its upper half,
    green in its lower half, which leaves out leaves, brake lights and shop signs behind it.
    """
    height, width = pixels.shape[:2]
    if width < MIN_LIGHT_SIZE[0] or height < MIN_LIGHT_SIZE[1]:
        return None
    inner = _thinned(pixels[:, int(0.1 * width):max(int(np.ceil(0.9 * width)), 1)])
    hue, saturation, brightest, chroma = _hue_saturation(inner)
    lit = (saturation >= 0.5) & (brightest >= LAMP_BRIGHTNESS) & (chroma >= 80)
    masks = {name: lit & _between(hue, LAMP_HUES[name]) for name in LIGHTS}
    shares = {name: float(mask.mean()) for name, mask in masks.items()}
    first, second = sorted(shares, key=lambda name: -shares[name])[:2]
    if shares[first] < LAMP_SHARE or shares[first] < 3 * shares[second]:
        return None
    if height >= 1.5 * width:
        place = (float(np.nonzero(masks[first])[0].mean()) + 0.5) / inner.shape[0]
        low, high = LAMP_PLACES[first]
        if not low <= place <= high:
            return None
    return first


def frame_colours(frame: np.ndarray, boxes: list[list[float]]) -> list[str | None]:
    """For each box [class id, confidence, x1, y1, x2, y2] (x, y in 0..1) of a frame: the colour of a car, truck or bus,
    the lit lamp of a traffic light, or None."""
    height, width = frame.shape[:2]
    daylight = float(frame[::4, ::4].max(axis=-1).mean()) >= DAYLIGHT
    found: list[str | None] = []
    for row in boxes:
        name, box = COCO_NAMES[int(row[0])], row[2:]
        x1, x2 = (round(x * width) for x in (box[0], box[2]))
        y1, y2 = (round(y * height) for y in (box[1], box[3]))
        pixels, colour = frame[y1:y2, x1:x2], None
        if min(pixels.shape[:2]) > 0 and name == "traffic light":
            colour = light_colour(pixels)
        elif min(pixels.shape[:2]) > 0 and name in VEHICLE_BODIES and _covered(row, boxes) <= MAX_COVERED:
            if y1 > 0 and y2 < height:  # cut off above or below, a dark bumper is where the body should be
                colour = vehicle_colour(pixels, daylight)
        found.append(colour)
    return found


def _covered(row: list[float], boxes: list[list[float]]) -> float:
    """Largest share of a vehicle's lower half that a nearer road user's box covers. Nearer: it ends lower."""
    x1, y1, x2, y2 = row[2:]
    y1 = (y1 + y2) / 2
    most, area = 0.0, max((x2 - x1) * (y2 - y1), 1e-9)
    for class_id, confidence, *other in boxes:
        nearer = other[3] > y2 and class_id < 9 and confidence >= 0.25
        across, down = min(x2, other[2]) - max(x1, other[0]), min(y2, other[3]) - max(y1, other[1])
        if nearer and across > 0 and down > 0:
            most = max(most, across * down / area)
    return most


def _thinned(pixels: np.ndarray) -> np.ndarray:
    """Every n-th row and column, so that a large box costs no more time than a small one."""
    steps = [max(1, side // MAX_PIXELS) for side in pixels.shape[:2]]
    return pixels[::steps[0], ::steps[1]]


def _hue_saturation(pixels: np.ndarray):
    """(hue in degrees 0..360, saturation 0..1, brightest channel 0..255, chroma 0..255), each [H, W]."""
    red, green, blue = (pixels[..., channel].astype(np.float32) for channel in range(3))
    brightest, darkest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    chroma = brightest - darkest
    safe = np.maximum(chroma, 1e-6)
    hue = np.where(brightest == red, (green - blue) / safe % 6,
                   np.where(brightest == green, (blue - red) / safe + 2, (red - green) / safe + 4)) * 60
    return hue, chroma / np.maximum(brightest, 1), brightest, chroma


def _between(hue: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """True where the hue lies between two angles; the second may pass 360."""
    low, high = limits
    return ((hue >= low) & (hue <= high)) | (hue + 360 <= high)
