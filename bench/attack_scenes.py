"""Fourteen clips as evidence, each with two faithful captions (Microscope, Copilot) and with ways to make them wrong.

A line "family: words > other words" of `edits` makes either text that holds the words wrong in one way, which the
evidence contradicts or (time of day, weather, the camera's own actions) the faithful caption, which is the reference;
"words <> other words" exchanges the two. `misfits` names lines that fit no text.
"""

from dataclasses import dataclass

from stage3.grpo_reward_func import Evidence


@dataclass(frozen=True)
class Scene:
    name: str
    absent: str  # a safety-critical class that is not there
    evidence: Evidence
    microscope: str
    copilot: str
    edits: str


def edited(scene: Scene, family: str, text: str) -> list[str]:
    """`text` with each edit of a family that changes it."""
    texts = []
    for line in scene.edits.strip().splitlines():
        name, _, pair = line.strip().partition(": ")
        if name == family:
            old, sign, new = pair.partition(" <> ") if " <> " in pair else pair.partition(" > ")
            if sign == " <> ":
                made = text.replace(old, "\0").replace(new, old).replace("\0", new)
            else:
                made = text.replace(old, new)
            fits = old in text and (sign == " > " or new in text)
            texts += [made] if fits else []
    return texts


def misfits() -> list[str]:
    """Edits that change neither text of their scene; empty when the data is right."""
    wrong = []
    for scene in SCENES:
        for line in scene.edits.strip().splitlines():
            words = line.strip().partition(": ")[2].replace(" <> ", " > ").split(" > ")[0]
            if words not in scene.microscope and words not in scene.copilot:
                wrong.append(f"{scene.name}: {line.strip()}")
    return wrong


SCENES = (
    Scene(
        "crossing at night", "train",
        Evidence(
            {"car", "truck", "person", "traffic light"}, {"bicycle"},
            seen={"traffic light": (0.0, 0.8), "car": (0.0, 1.0), "person": (0.2, 0.5), "truck": (0.55, 0.8)},
            counts={"car": 1, "person": 1, "truck": 1}, sides={"person": {"left", "right"}, "truck": {"left"}},
            light=("red", "green"), colours={"car": {"white"}, "truck": {"unknown"}},
            motion={"car": {"stands", "recedes"}, "person": {"left to right"}, "truck": {"approaches"}}),
        "At night a white car waits ahead while the traffic light at a wet city intersection is red. A pedestrian in "
        "a dark coat crosses from the left. Then a large truck approaches in the opposite lane and passes on the "
        "left. Finally the light changes to green and the white car accelerates, so the ego vehicle follows it.",
        "Night, wet road: red light, white car ahead waits, pedestrian crosses from left, oncoming truck passes, "
        "stop.",
        """
        light: traffic light at a wet city intersection is red > traffic light at a wet city intersection is amber
        light: changes to green > changes to amber
        light: red light > amber light
        moment: traffic light at a wet city intersection is red > traffic light at a wet city intersection is green
        moment: changes to green > changes to red
        moment: red light > green light
        side: crosses from the left > crosses from the right
        side: passes on the left > passes on the right
        side: crosses from left > crosses from right
        count: a white car waits > three white cars wait
        count: A pedestrian in a dark coat crosses > Four pedestrians in dark coats cross
        count: pedestrian crosses > four pedestrians cross
        colour: white car > red car
        subtype: truck > fire truck
        subtype: white car > white police car
        action: car accelerates > car reverses
        action: car ahead waits > car ahead accelerates
        action: truck approaches in the opposite lane and passes > truck stands in the opposite lane and waits
        who: pedestrian in a dark coat <> large truck
        who: pedestrian <> oncoming truck
        ego: the ego vehicle follows it > the ego vehicle turns left before it
        ego: stop. > speed up.
        time: At night > At noon
        time: Night > Noon
        weather: wet > snowy
        weather: wet > dry
        """),
    Scene(
        "highway", "person",
        Evidence(
            {"car", "truck"}, seen={"truck": (0.0, 0.6), "car": (0.5, 1.0)}, counts={"car": 1, "truck": 1},
            sides={"truck": {"right"}, "car": {"right"}}, colours={"truck": {"white"}, "car": {"red"}},
            motion={"truck": {"approaches"}, "car": {"recedes", "right to left"}}),
        "By day the ego vehicle drives along a dry highway with three lanes behind a large white truck. The truck "
        "slows down, so the ego vehicle changes to the left lane and overtakes it. Then a red car merges from the "
        "right, and finally it accelerates away from the ego vehicle.",
        "Day, dry highway: large white truck ahead slows, red car merges from right, keep distance.",
        """
        side: merges from the right > merges from the left
        side: merges from right > merges from left
        count: a large white truck > two large white trucks
        count: a red car merges > three red cars merge
        count: red car merges > three red cars merge
        colour: white truck > green truck
        colour: red car > blue car
        subtype: white truck > white garbage truck
        subtype: red car > red ambulance
        action: truck slows down > truck accelerates
        action: truck ahead slows > truck ahead accelerates
        action: car merges from the right, and finally it accelerates > car stops on the right, and finally it reverses
        who: The truck slows > The red car slows
        who: a red car merges > a truck merges
        who: white truck <> red car
        ego: the ego vehicle changes to the left lane and overtakes it > the ego vehicle stops and turns around
        ego: keep distance > overtake right
        time: By day > At night
        time: Day > Night
        weather: dry > snowy
        weather: dry > flooded
        """),
    Scene(
        "bus stop at night", "traffic light",
        Evidence(
            {"car", "bus", "person"}, {"motorcycle"},
            seen={"bus": (0.0, 1.0), "person": (0.3, 0.6), "car": (0.45, 1.0)},
            counts={"bus": 1, "person": 2, "car": 1}, sides={"bus": {"right"}, "person": {"left", "right"}},
            colours={"bus": {"unknown"}, "car": {"black"}},
            motion={"bus": {"stands", "recedes"}, "person": {"left to right"}, "car": {"approaches"}}),
        "At night a bus stands at a stop on the right side of a wet city street. After that two pedestrians cross "
        "from the left, so a black car ahead brakes. Then the bus pulls out and the ego vehicle follows it through "
        "the intersection.",
        "Night, wet street: bus stands on right, two pedestrians cross from left, black car ahead brakes, slow down.",
        """
        side: a stop on the right side > a stop on the left side
        side: cross from the left > cross from the right
        side: bus stands on right > bus stands on left
        side: cross from left > cross from right
        count: a bus stands > three buses stand
        count: two pedestrians > five pedestrians
        count: bus stands > three buses stand
        colour: black car > yellow car
        subtype: a bus stands > a school bus stands
        subtype: black car > black police car
        action: car ahead brakes > car ahead accelerates
        action: the bus pulls out > the bus reverses
        action: two pedestrians cross from the left > two pedestrians stand on the left
        who: a bus stands > a black car stands
        who: black car <> bus
        ego: the ego vehicle follows it through > the ego vehicle turns right before
        ego: slow down > speed up
        time: At night > In the morning
        time: Night > Morning
        weather: wet > snowy
        weather: wet > dry
        """),
    Scene(
        "stop sign", "bus",
        Evidence(
            {"car", "stop sign", "bicycle", "person"}, {"dog"},
            seen={"stop sign": (0.0, 0.4), "bicycle": (0.3, 0.6), "person": (0.3, 0.6), "car": (0.6, 0.9)},
            counts={"car": 1, "stop sign": 1, "bicycle": 1, "person": 1},
            sides={"stop sign": {"right"}, "bicycle": {"left", "right"}, "person": {"left", "right"}, "car": {"left"}},
            colours={"car": {"blue"}},
            motion={"bicycle": {"right to left"}, "person": {"right to left"}, "car": {"approaches"}}),
        "On a sunny day the ego vehicle approaches a stop sign on the right of a residential intersection and stops. "
        "A man on a bicycle crosses from the right. After that a blue car passes on the left, and then the ego "
        "vehicle turns right because the road is clear.",
        "Sunny day: stop sign on right, man on bicycle crosses from right, blue car passes on left, stop.",
        """
        side: crosses from the right > crosses from the left
        side: car passes on the left > car passes on the right
        side: crosses from right > crosses from left
        side: passes on left > passes on right
        count: A man on a bicycle crosses > Three men on bicycles cross
        count: a blue car passes > four blue cars pass
        count: blue car passes > four blue cars pass
        colour: blue car > white car
        subtype: blue car > blue taxi
        subtype: blue car > blue police car
        action: car passes on the left > car waits on the left
        action: car passes on left > car waits on left
        who: man on a bicycle <> blue car
        who: man on bicycle <> blue car
        ego: turns right because > turns left because
        ego: intersection and stops > intersection and accelerates
        ego: left, stop > left, accelerate
        time: On a sunny day > On a clear night
        time: Sunny day > Clear night
        weather: sunny > snowy
        weather: Sunny > Snowy
        weather: Sunny > Foggy
        """),
    Scene(
        "country light", "person",
        Evidence({"traffic light"}, seen={"traffic light": (0.2, 0.9)}, counts={"traffic light": 1},
                 light=("red", "green"), sides={"traffic light": {"right"}}),
        "The ego vehicle travels on a dry country road at night. The traffic light ahead is red, so the ego vehicle "
        "slows down and stops. Then the light changes to green and the ego vehicle drives on across the "
        "intersection.",
        "Night, dry country road: red light ahead, stop, then green light, drive on.",
        """
        light: traffic light ahead is red > traffic light ahead is amber
        light: changes to green > changes to amber
        light: red light > amber light
        light: green light > amber light
        moment: traffic light ahead is red > traffic light ahead is green
        moment: changes to green > changes to red
        moment: red light ahead > green light ahead
        moment: then green light > then red light
        count: The traffic light ahead is > Four traffic lights ahead are
        ego: slows down and stops > accelerates
        ego: drives on across > turns left before
        ego: drive on > turn left
        time: at night > at noon
        time: Night > Noon
        weather: dry > snowy
        weather: dry > flooded
        """),
    Scene(
        "empty road", "car",
        Evidence(()),
        "The ego vehicle drives along a narrow country road in sunshine by day. At first the road bends to the left, "
        "then it climbs between trees, and finally the ego vehicle slows down and turns right at a junction beside a "
        "fence.",
        "Sunny day, country road: road bends left, ego slows, turns right.",
        """
        ego: turns right at > turns left at
        ego: slows down > accelerates
        ego: ego slows, turns right > ego accelerates, turns left
        time: by day > by night
        time: Sunny day > Clear night
        weather: in sunshine > in heavy snow
        weather: Sunny > Snowy
        """),
    Scene(
        "city", "stop sign",
        Evidence(
            {"car", "bus", "person", "traffic light", "bicycle", "backpack"}, {"train", "bench"},
            salient={"car", "bus", "person", "traffic light", "bicycle"},
            seen={"traffic light": (0.0, 0.6), "car": (0.0, 1.0), "person": (0.15, 1.0), "bus": (0.45, 0.7),
                  "bicycle": (0.75, 1.0), "backpack": (0.2, 0.3)},
            counts={"car": 3, "bus": 1, "bicycle": 1, "person": 4},
            sides={"person": {"left", "right"}, "bus": {"right"}, "bicycle": {"right"}},
            light=("red", "green"), colours={"bus": {"white"}, "car": {"silver", "yellow", "black"}},
            motion={"person": {"left to right", "recedes"}, "bus": {"right to left", "recedes"}, "bicycle": {"recedes"},
                    "car": {"stands", "recedes"}}),
        "On a cloudy day three cars wait at an intersection downtown because the traffic light ahead is red. "
        "Meanwhile four people cross from the left. Then the light turns green and a white bus turns in from the "
        "right. Finally a cyclist passes on the right while the ego vehicle waits.",
        "Cloudy day: red light, three cars wait, four people cross from left, white bus turns in from right, cyclist "
        "passes on right.",
        """
        light: traffic light ahead is red > traffic light ahead is amber
        light: turns green > turns amber
        light: red light > amber light
        moment: traffic light ahead is red > traffic light ahead is green
        moment: turns green > turns red
        moment: red light > green light
        side: cross from the left > cross from the right
        side: in from the right > in from the left
        side: passes on the right > passes on the left
        side: cross from left > cross from right
        side: in from right > in from left
        count: three cars > six cars
        count: four people > nine people
        count: a white bus turns > three white buses turn
        colour: white bus > red bus
        subtype: white bus > white school bus
        subtype: white bus > white trolleybus
        action: three cars wait > three cars accelerate
        action: four people cross from the left > four people wait on the left
        action: bus turns in from the right > bus parks on the right
        who: four people cross > a white bus crosses
        who: three cars <> four people
        who: a white bus turns > a cyclist turns
        ego: the ego vehicle waits > the ego vehicle turns left
        time: On a cloudy day > On a cloudy night
        time: Cloudy day > Cloudy night
        weather: cloudy > snowy
        weather: Cloudy > Snowy
        """),
    Scene(
        "level crossing", "traffic light",
        Evidence(
            {"train", "car"}, {"person"}, seen={"car": (0.0, 1.0), "train": (0.2, 0.7)}, counts={"train": 1, "car": 1},
            sides={"train": {"left", "right"}}, colours={"car": {"white"}},
            motion={"train": {"left to right"}, "car": {"stands", "recedes"}}),
        "On a clear day the ego vehicle stops behind a white car at a level crossing in a rural area. Then a long "
        "train crosses the road from the left. Once the train has passed, the car accelerates and the ego vehicle "
        "follows it across the tracks.",
        "Clear day: white car ahead waits, long train crosses from left, stop.",
        """
        side: from the left > from the right
        side: from left > from right
        count: a white car > four white cars
        count: a long train crosses > three long trains cross
        count: white car ahead waits > four white cars ahead wait
        colour: white car > red car
        subtype: white car > white taxi
        subtype: white car > white police car
        action: car accelerates > car reverses
        action: a long train crosses the road from > a long train stands beside the road on
        action: car ahead waits > car ahead turns
        who: long train <> white car
        ego: the ego vehicle follows it across > the ego vehicle turns back before
        ego: left, stop > left, accelerate
        time: On a clear day > On a clear night
        time: Clear day > Clear night
        weather: clear day > snowy day
        weather: Clear day > Foggy day
        """),
    Scene(
        "dog in snow", "bus",
        Evidence(
            {"dog", "person"}, {"car"}, seen={"dog": (0.1, 0.7), "person": (0.5, 0.9)}, counts={"dog": 1, "person": 1},
            sides={"dog": {"left", "right"}, "person": {"right"}},
            motion={"dog": {"right to left"}, "person": {"stands", "approaches"}}),
        "The ego vehicle drives along a snowy village street in the evening. A large dog runs across the road from "
        "the right, so the ego vehicle brakes and stops. After that a woman in a red jacket waits on the right, and "
        "finally the ego vehicle drives on slowly.",
        "Evening, snowy street: large dog runs across from right, woman waits on right, brake.",
        """
        side: the road from the right > the road from the left
        side: waits on the right > waits on the left
        side: across from right > across from left
        side: waits on right > waits on left
        count: A large dog runs > Three large dogs run
        count: a woman in a red jacket waits > four women in red jackets wait
        count: woman waits > four women wait
        action: dog runs across the road from the right > dog sits beside the road on the right
        action: woman in a red jacket waits on the right > woman in a red jacket crosses to the left
        action: woman waits on right > woman crosses to left
        who: large dog <> woman
        ego: brakes and stops > accelerates and turns left
        ego: right, brake > right, accelerate
        time: in the evening > at noon
        time: Evening > Noon
        weather: snowy > rainy
        weather: snowy > dry
        """),
    Scene(
        "motorcycle in the jam", "traffic light",
        Evidence(
            {"car", "motorcycle"}, {"truck", "person"}, salient={"car", "motorcycle"},
            seen={"car": (0.0, 1.0), "motorcycle": (0.4, 0.8)}, counts={"car": 5, "motorcycle": 1},
            sides={"motorcycle": {"left"}}, colours={"motorcycle": {"green"}, "car": {"unknown"}},
            motion={"car": {"approaches", "stands", "recedes"}, "motorcycle": {"recedes"}}),
        "In the afternoon five cars slow down on a busy motorway under a cloudy sky, so the ego vehicle brakes. Then "
        "a green motorcycle overtakes on the left between the lanes. After that the cars move forward again and the "
        "ego vehicle accelerates.",
        "Afternoon, cloudy motorway: five cars ahead slow, green motorcycle overtakes on left, brake.",
        """
        side: overtakes on the left > overtakes on the right
        side: overtakes on left > overtakes on right
        count: five cars > two cars
        count: a green motorcycle overtakes > three green motorcycles overtake
        count: green motorcycle overtakes > three green motorcycles overtake
        colour: green motorcycle > red motorcycle
        subtype: green motorcycle > green police motorcycle
        subtype: five cars > five police cars
        action: motorcycle overtakes > motorcycle parks
        action: cars ahead slow > cars ahead turn right
        action: the cars move forward again > the cars drive in reverse
        who: five cars > five motorcycles
        who: green motorcycle > green car
        ego: ego vehicle brakes > ego vehicle turns right
        ego: left, brake > left, speed up
        time: In the afternoon > At night
        time: Afternoon > Night
        weather: cloudy > snowy
        weather: cloudy > foggy
        """),
    Scene(
        "rain", "bus",
        Evidence(
            {"car", "truck"}, {"person"}, seen={"truck": (0.0, 1.0), "car": (0.4, 0.6)}, counts={"car": 1, "truck": 1},
            sides={"car": {"left"}}, colours={"truck": {"red"}, "car": {"silver"}},
            motion={"truck": {"approaches", "recedes"}, "car": {"approaches"}}),
        "In heavy rain at dusk a large red truck drives ahead on a country road, and the ego vehicle follows it. "
        "Then a silver car approaches and passes on the left. After that the truck accelerates, so the ego vehicle "
        "speeds up too.",
        "Dusk, heavy rain: red truck ahead, silver car approaches on left, keep distance.",
        """
        side: passes on the left > passes on the right
        side: approaches on left > approaches on right
        count: a large red truck drives > three large red trucks drive
        count: a silver car approaches > four silver cars approach
        count: silver car approaches > four silver cars approach
        colour: red truck > white truck
        colour: silver car > green car
        subtype: red truck > red fire truck
        subtype: silver car > silver taxi
        action: car approaches and passes > car stands and waits
        action: truck accelerates > truck reverses
        action: car approaches > car parks
        who: a silver car approaches > a red truck approaches
        who: red truck <> silver car
        who: the truck accelerates > the silver car accelerates
        ego: the ego vehicle follows it > the ego vehicle overtakes it
        ego: the ego vehicle speeds up too > the ego vehicle stops
        ego: keep distance > overtake
        time: at dusk > at noon
        time: Dusk > Noon
        weather: heavy rain > heavy snow
        weather: heavy rain > bright sunshine
        """),
    Scene(
        "school bus", "car",
        Evidence(
            {"bus", "person"}, {"backpack"}, seen={"bus": (0.0, 1.0), "person": (0.3, 0.8)},
            counts={"bus": 1, "person": 3}, sides={"bus": {"right"}, "person": {"left", "right"}},
            colours={"bus": {"yellow"}}, motion={"bus": {"stands", "recedes"}, "person": {"right to left"}}),
        "In the morning a yellow bus stands on the right side of a foggy suburban street, and the ego vehicle stops "
        "behind it. After that three children cross from the right. Then the bus pulls out and the ego vehicle "
        "follows slowly.",
        "Morning, fog: yellow bus stands on right, three children cross from right, stop.",
        """
        side: stands on the right side > stands on the left side
        side: cross from the right > cross from the left
        side: stands on right > stands on left
        side: cross from right > cross from left
        count: three children > eight children
        count: a yellow bus stands > two yellow buses stand
        count: yellow bus stands > two yellow buses stand
        colour: yellow bus > blue bus
        subtype: yellow bus > yellow trolleybus
        action: children cross from the right > children wait on the right
        action: the bus pulls out > the bus turns around
        action: yellow bus stands > yellow bus accelerates
        who: three children cross > a yellow bus crosses
        who: a yellow bus stands > a child stands
        ego: the ego vehicle stops behind > the ego vehicle overtakes
        ego: right, stop > right, overtake
        time: In the morning > At night
        time: Morning > Night
        weather: foggy > sunny
        weather: fog > snow
        """),
    Scene(
        "parking lot", "train",
        Evidence(
            {"car", "person"}, {"handbag"}, seen={"car": (0.0, 1.0), "person": (0.5, 0.8)}, counts={"person": 1},
            sides={"car": {"left", "right"}, "person": {"left", "right"}}, colours={"car": {"black", "blue"}},
            motion={"car": {"stands", "right to left"}, "person": {"left to right"}}),
        "On an overcast day the ego vehicle drives slowly across a parking lot between parked cars. A blue car on "
        "the right pulls out, so the ego vehicle brakes and stops. Then a woman with a trolley crosses from the "
        "left, and finally the ego vehicle turns left.",
        "Overcast day, parking lot: blue car pulls out on right, woman crosses from left, stop.",
        """
        side: crosses from the left > crosses from the right
        side: crosses from left > crosses from right
        count: a woman with a trolley crosses > six women with trolleys cross
        count: woman crosses > six women cross
        colour: blue car > red car
        subtype: blue car > blue police car
        subtype: blue car > blue taxi
        action: a woman with a trolley crosses from the left > a woman with a trolley waits on the left
        action: woman crosses from left > woman waits on left
        who: woman <> blue car
        ego: brakes and stops > accelerates
        ego: turns left > turns right
        ego: left, stop > left, accelerate
        time: On an overcast day > On an overcast night
        time: Overcast day > Overcast night
        weather: overcast > snowy
        weather: Overcast > Rainy
        """),
    Scene(
        "amber light", "bicycle",
        Evidence(
            {"traffic light", "car", "person"}, {"bus"},
            seen={"traffic light": (0.0, 1.0), "car": (0.35, 0.6), "person": (0.7, 1.0)},
            counts={"car": 1, "person": 2},
            sides={"car": {"left"}, "person": {"left", "right"}}, light=("amber", "red"), colours={"car": {"green"}},
            motion={"car": {"approaches"}, "person": {"right to left"}}),
        "On a sunny afternoon the traffic light at a wide intersection changes to amber, so the ego vehicle slows "
        "down. After that a green car approaches on the left. Then the light turns red, the ego vehicle stops, and "
        "two men cross from the right.",
        "Sunny afternoon: amber light ahead, green car approaches on left, then two men cross from right, stop.",
        """
        light: changes to amber > changes to green
        light: turns red > turns green
        light: amber light > green light
        moment: changes to amber > changes to red
        moment: turns red > turns amber
        side: approaches on the left > approaches on the right
        side: cross from the right > cross from the left
        side: approaches on left > approaches on right
        side: cross from right > cross from left
        count: a green car approaches > five green cars approach
        count: two men > seven men
        count: green car approaches > five green cars approach
        colour: green car > black car
        subtype: green car > green taxi
        subtype: green car > green police car
        action: car approaches > car parks
        action: two men cross from the right > two men stand on the right
        action: two men cross from right > two men stand on right
        who: two men cross > a green car crosses
        who: green car approaches > two men approach
        ego: ego vehicle slows down > ego vehicle accelerates
        ego: ego vehicle stops > ego vehicle drives on
        ego: right, stop > right, drive on
        time: On a sunny afternoon > On a clear night
        time: Sunny afternoon > Clear night
        weather: sunny > snowy
        weather: Sunny > Rainy
        """),
)
