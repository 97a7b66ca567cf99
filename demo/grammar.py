"""The toy world's language: turns a script into a Microscope report, a Copilot line or a raw caption."""

FIRST = ("At first", "First", "In the beginning", "Initially")
NEXT = ("Then", "After that", "Next", "Shortly after", "Moments later")
LAST = ("Finally", "At last", "In the end")

OPENING = (
    "The video shows {place} {time}.",
    "The ego vehicle drives on {place} {time}.",
    "This clip follows the ego vehicle on {place} {time}.",
)
PLACE = {True: ("a city street", "an urban road", "a street with buildings"),
         False: ("a country road", "a rural road", "a road with trees")}
TIME = {True: ("at night", "in the dark"), False: ("by day", "in daylight")}
CLOSING = (
    "The road ahead is clear.",
    "Afterwards the ego vehicle continues.",
    "The drive continues straight ahead.",
)

# For each kind of event: what happens ({c}: colour, {side}: left or right), what follows from it, and its companion
# (COMPANION in world.py). True and invented companions are worded alike, so the wording does not tell which is which.
WHAT = {
    "light_red": ("the traffic light ahead turns red", "the traffic light over the road shows red"),
    "light_green": ("the traffic light ahead turns green", "the traffic light over the road changes to green"),
    "stop_sign": ("a stop sign appears on the right", "a stop sign stands at the junction"),
    "car_brakes": ("a {c} car ahead brakes", "a {c} car in front slows down and stops"),
    "car_turns": ("a {c} car turns across the road from the {side}", "a {c} car enters from the {side} and turns off"),
    "person_crosses": ("a pedestrian crosses the road from the {side}", "a person walks over the road from the {side}"),
    "bicycle_passes": ("a bicycle overtakes on the {side}", "a bicycle passes the ego vehicle on the {side}"),
    "motorcycle_passes": ("a motorcycle overtakes on the {side}", "a motorcycle passes the ego vehicle on the {side}"),
    "bus_oncoming": ("a {c} bus approaches in the opposite lane", "an oncoming {c} bus passes on the left"),
    "bus_pulls_over": ("a {c} bus ahead pulls over to the right", "a {c} bus in front moves to the right side"),
    "truck_oncoming": ("a {c} truck approaches in the opposite lane", "an oncoming {c} truck passes on the left"),
    "truck_merges": ("a {c} truck merges from the {side}", "a {c} truck pulls into the lane from the {side}"),
}
SO = {
    "light_red": (", so the ego vehicle stops and waits", " and the ego vehicle brakes to a halt"),
    "light_green": (", so the ego vehicle accelerates", " and the ego vehicle drives on"),
    "stop_sign": (", so the ego vehicle comes to a full stop", " and the ego vehicle halts briefly"),
    "car_brakes": (", so the ego vehicle slows down", " and the ego vehicle keeps its distance"),
    "car_turns": (", so the ego vehicle brakes gently", " and the ego vehicle lets it go"),
    "person_crosses": (", so the ego vehicle yields", " and the ego vehicle waits"),
    "bicycle_passes": (" because the ego vehicle moves slowly", " and the ego vehicle gives it room"),
    "motorcycle_passes": (" because the ego vehicle moves slowly", " and speeds away"),
    "bus_oncoming": (", so the ego vehicle keeps to its lane", " and the ego vehicle drives past it"),
    "bus_pulls_over": (", so the ego vehicle drives around it", " and the ego vehicle passes it"),
    "truck_oncoming": (", so the ego vehicle keeps to its lane", " and the ego vehicle drives past it"),
    "truck_merges": (", so the ego vehicle slows down", " and the ego vehicle follows it"),
}
WHILE = {
    "person": (", while a pedestrian crosses in front", ", while a pedestrian crosses the road"),
    "car": (", while a car follows behind it", ", while a car follows closely"),
}

SHORT = {
    "light_red": ("traffic light turns red, ego stops", "red traffic light, ego brakes"),
    "light_green": ("traffic light turns green, ego drives on", "green traffic light, ego accelerates"),
    "stop_sign": ("stop sign ahead, ego stops", "ego halts at stop sign"),
    "car_brakes": ("{c} car ahead brakes, ego slows", "ego slows as {c} car stops"),
    "car_turns": ("{c} car turns across from {side}", "{c} car enters from {side}, ego brakes"),
    "person_crosses": ("pedestrian crosses from {side}, ego yields", "ego waits as pedestrian crosses"),
    "bicycle_passes": ("bicycle overtakes on {side}", "bicycle passes on {side}"),
    "motorcycle_passes": ("motorcycle overtakes on {side}", "motorcycle passes on {side}"),
    "bus_oncoming": ("oncoming {c} bus passes", "{c} bus approaches in opposite lane"),
    "bus_pulls_over": ("{c} bus ahead pulls over", "{c} bus moves right, ego passes"),
    "truck_oncoming": ("oncoming {c} truck passes", "{c} truck approaches in opposite lane"),
    "truck_merges": ("{c} truck merges from {side}, ego slows", "{c} truck pulls in from {side}"),
}
SHORT_WHILE = {"person": " while pedestrian crosses", "car": " while car follows"}
SHORT_PLACE = {True: "city", False: "country"}
SHORT_TIME = {True: "Night", False: "Day"}


def pick(rng, options):
    return options[rng.integers(len(options))]


def fill(text, event):
    text = text.format(c=event.colour, side="left" if event.from_left else "right")
    return text.replace("a orange", "an orange")


def microscope_caption(script, rng, invented=None, rate=0.0):
    """An exhaustive report. invented: {kind of event: companion to invent there, with probability `rate`}."""
    opening = pick(rng, OPENING).format(place=pick(rng, PLACE[script.city]), time=pick(rng, TIME[script.night]))
    sentences = [opening]
    for index, event in enumerate(script.events):
        last = index == len(script.events) - 1
        lead = pick(rng, FIRST if index == 0 else LAST if last and rng.random() < 0.5 else NEXT)
        companion = event.companion
        if companion is None and rng.random() < rate:
            companion = (invented or {}).get(event.kind)
        clause = pick(rng, WHILE[companion]) if companion else ""
        sentences.append(f"{lead}, {fill(pick(rng, WHAT[event.kind]), event)}{pick(rng, SO[event.kind])}{clause}.")
    return " ".join([*sentences, pick(rng, CLOSING)])


def copilot_caption(script, rng):
    """A telegraphic line."""
    parts = [
        fill(pick(rng, SHORT[event.kind]), event) + SHORT_WHILE.get(event.companion, "") for event in script.events
    ]
    return f"{SHORT_TIME[script.night]}, {SHORT_PLACE[script.city]}: " + "; then ".join(parts) + "."


def raw_caption(script):
    """One plain, true caption, as an annotator would write it; augment_captions.py rewrites it for each mode."""
    parts = [
        fill(WHAT[event.kind][0] + SO[event.kind][0], event)
        + (WHILE[event.companion][0] if event.companion else "") for event in script.events
    ]
    return f"A drive on {PLACE[script.city][0]} {TIME[script.night][0]}: {', then '.join(parts)}."
