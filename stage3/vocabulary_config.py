"""The driving vocabulary as plain data, and the parser that finds its objects in a text.

`find_mentions(text)` returns every COCO object that a text names, with negation. `read_text(text)` returns the same
and more: what the reward (stage3/grpo_reward_func.py) needs to know of each word. Words are compared with words,
never with substrings; the longest phrase wins. docs/reward.md tells how to add a class.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------------------------------
# Objects

COCO_NAMES = (  # in the order of the class ids 0..79
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)

# An invented one of these is what a driver must never be told: the hallucination part is strict about them.
SAFETY_CRITICAL = frozenset(
    {"person", "bicycle", "car", "motorcycle", "bus", "train", "truck", "traffic light", "stop sign"}
)

# class -> other words for it, in the singular. The class's own name is a word for it too; plurals are made below.
# Left out on purpose, because on the road they mean something else: driver, passenger and motorist (inside a car),
# walker, figure, family, coach, ship, jet.
SYNONYMS = {
    "person": (
        "pedestrian", "man", "woman", "child", "schoolchild", "kid", "boy", "girl", "guy", "lady", "gentleman", "adult",
        "teenager", "toddler", "baby", "passerby", "bystander", "onlooker", "jaywalker", "jogger", "runner", "worker",
        "policeman", "policewoman", "police officer", "traffic officer", "officer", "crossing guard", "flagger",
        "firefighter", "individual", "shopper", "tourist", "student", "crowd", "people", "somebody", "someone",
        "no one", "nobody", "anyone", "human", "human figure",
    ),
    "bicycle": ("bike", "cycle", "mountain bike", "road bike", "pushbike", "e bike", "ebike"),
    "car": (
        "sedan", "suv", "hatchback", "coupe", "convertible", "station wagon", "crossover", "limousine", "automobile",
        "taxi", "taxicab", "taxi cab", "cab", "jeep", "sports car", "police car", "patrol car", "squad car",
        "police cruiser", "passenger car", "sport utility vehicle", "compact car",
    ),
    "motorcycle": ("motorbike", "moped", "motor scooter", "motor bike", "dirt bike"),
    "airplane": ("plane", "aeroplane", "aircraft"),
    "bus": (
        "minibus", "coach bus", "school bus", "city bus", "double decker", "double decker bus", "transit bus",
        "shuttle bus", "autobus",
    ),
    "train": ("locomotive", "subway train", "freight train"),
    "truck": (
        "lorry", "semi", "semi truck", "semi trailer", "semi trailer truck", "tractor trailer", "eighteen wheeler",
        "18 wheeler", "box truck", "dump truck", "garbage truck", "trash truck", "delivery truck", "cargo truck",
        "tow truck", "tanker truck", "tanker", "cement truck", "cement mixer", "flatbed truck", "freight truck",
        "moving truck", "food truck",
    ),
    "boat": ("sailboat", "motorboat", "canoe", "kayak"),
    "traffic light": (
        "traffic signal", "stoplight", "stop light", "traffic signal light", "signal light", "stop signal",
        "traffic control light", "traffic control signal",
    ),
    "fire hydrant": ("hydrant",),
    "dog": ("puppy",),
    "cat": ("kitten",),
    "cow": ("cattle", "bull"),
    "horse": ("pony",),
    "bird": ("pigeon", "seagull"),
    "sheep": ("lamb",),
    "backpack": ("rucksack",),
    "handbag": ("purse",),
    "sports ball": ("ball", "soccer ball", "basketball"),
    "tv": ("television",),
    "couch": ("sofa",),
    "cell phone": ("phone", "smartphone", "mobile phone", "cellphone"),
    "refrigerator": ("fridge",),
    "hair drier": ("hair dryer", "hairdryer"),
    "donut": ("doughnut",),
    "potted plant": ("flower pot",),
    "dining table": ("table",),
}

# One word that says two classes at once.
SEVERAL = {
    "cyclist": ("bicycle", "person"), "bicyclist": ("bicycle", "person"), "bicycle rider": ("bicycle", "person"),
    "bike rider": ("bicycle", "person"), "motorcyclist": ("motorcycle", "person"),
    "motorcycle rider": ("motorcycle", "person"), "motorbike rider": ("motorcycle", "person"),
    "skateboarder": ("skateboard", "person"), "dog walker": ("dog", "person"),
}

# Words that any one of several classes satisfies. They are no mention of a class; the reward asks only that one of
# them is there, and gives half the recall of the first that the caption does not name otherwise.
ANY_OF = {
    "vehicle": ("car", "truck", "bus", "motorcycle"),
    "motor vehicle": ("car", "truck", "bus", "motorcycle"),
    "construction vehicle": ("truck", "car", "bus"),
    "van": ("car", "truck", "bus"), "minivan": ("car", "truck"), "delivery van": ("truck", "car", "bus"),
    "pickup": ("truck", "car"), "pickup truck": ("truck", "car"), "pick up truck": ("truck", "car"),
    "motorhome": ("truck", "bus", "car"), "motor home": ("truck", "bus", "car"), "rv": ("truck", "bus", "car"),
    "shuttle": ("bus", "car", "truck"), "camper": ("truck", "car", "bus"),
    "tram": ("train", "bus"), "streetcar": ("train", "bus"), "trolley": ("bus", "train"),
    "light rail": ("train", "bus"), "trolleybus": ("bus", "train"),
    "light rail train": ("train", "bus"), "light rail vehicle": ("train", "bus"),
    "scooter": ("motorcycle", "bicycle"), "biker": ("motorcycle", "bicycle"), "rider": ("motorcycle", "bicycle"),
    "two wheeler": ("motorcycle", "bicycle"),
}
WITH_PERSON = frozenset({"biker", "rider"})  # these say "person" as well

# Special vehicles whose kind a COCO detector cannot confirm. With the base class there they earn nothing and cost half
# an error; without it they are an error.
UNVERIFIABLE = {
    "fire truck": ("truck",), "firetruck": ("truck",), "fire engine": ("truck",),
    "ambulance": ("truck", "car", "bus"), "emergency vehicle": ("car", "truck", "bus"),
    "police van": ("truck", "car", "bus"), "police truck": ("truck",), "police vehicle": ("car", "truck"),
    "police motorcycle": ("motorcycle",),
}

IRREGULAR_PLURALS = {
    "person": ("people", "persons"), "people": (), "man": ("men",), "woman": ("women",), "child": ("children",),
    "schoolchild": ("schoolchildren",), "policeman": ("policemen",), "policewoman": ("policewomen",),
    "gentleman": ("gentlemen",), "passerby": ("passersby", "passerbys"), "aircraft": (), "cattle": (), "sheep": (),
    "skis": (), "scissors": (), "broccoli": (), "mouse": ("mice",), "knife": ("knives",),
    "somebody": (), "someone": (), "no one": (), "nobody": (), "anyone": (), "bus": ("buses", "busses"),
}

# COCO names that are more often another word on the road ("an orange car", "bear left", "a remote area", "the fork in
# the road"): a mention only as a plain noun, after a determiner and before a function word or a stop.
GUARDED = frozenset({
    "orange", "bear", "tie", "remote", "sink", "bed", "book", "mouse", "fork", "cycle", "adult", "clock", "table",
    "individual", "human", "student", "ball", "kite", "cake", "apple", "tanker", "cab", "bull", "semi", "tv",
})
GUARDED_VERBS = frozenset({"ties", "sinks", "books", "bears", "cycles", "forks"})  # no mention without a determiner

# Nouns after an object's name that turn it into a place, a sign or an idea: "bus stop", "bicycle shop", "pedestrian
# activity", "car dealership". "" holds for every word but traffic lights and stop signs; plurals are added.
COMPOUND_HEADS = {
    "": "sign symbol marking lane path pathway route trail rack station terminal shelter depot bay rank "
        "driver shop store dealership dealer rental repair wash area zone bridge overpass underpass tunnel traffic "
        "activity movement flow presence infrastructure safety access life viewpoint perspective interaction "
        "interference parking service restaurant place court field booth pole toll lot registration ramp "
        "logo engagement dynamic scene density heavy oriented focused",
    "pedestrian": "crossing crosswalk walkway sidewalk signal light button island refuge mall street barrier space "
                  "friendly stripe warning barricade",
    "train": "crossing track line platform rail structure stop",
    "bus": "line ad stand stop", "taxi": "stand stop", "truck": "bed stop", "tram": "line stop",
    "car": "park port pool seat horn radio stereo audio alarm mirror dashboard hood windshield window interior ride "
           "sharing garage",
    "vehicle": "dashboard hood windshield window interior",
    "dog": "park", "boat": "trailer ramp", "baby": "carriage stroller seat", "child": "seat", "cup": "holder",
    "children": "crossing", "phone": "line tower number box mount holder",
}

# Other phrases in which an object's name is no object. Plurals are made as for objects.
NEUTRAL = (
    "people mover", "men at work", "man made", "first person", "second person", "third person", "runner up",
    "pedestrian and vehicular traffic", "pedestrian and vehicular activity", "pedestrian and vehicle traffic",
    "pedestrian or vehicular activity", "pedestrian or vehicular traffic", "pedestrian and vehicle activity",
    "pedestrian or vehicle traffic", "pedestrian or vehicle activity", "pedestrian and vehicle movement",
    "pedestrian traffic light", "pedestrian traffic signal", "pedestrian walking sign",
    "cable car", "bus only lane", "auto repair shop",
    "streetlight", "street light", "street lamp", "brake light", "tail light", "taillight", "headlight", "head light",
    "turn signal", "turning signal", "hand signal", "hazard light", "indicator light", "rear light", "warning light",
    "red tail light", "red brake light", "red rear light", "red taillight", "walk signal", "crossing signal",
    "crossing light", "crosswalk signal", "railroad crossing signal", "railway signal", "emergency light",
    "police light", "light pole", "light post", "red light camera", "red light district", "stop line", "flood light",
    "neon light", "cell signal", "gps signal",
    "bird s eye view", "bird eye view", "birds eye view", "deer crossing", "cat s eye", "zebra crossing",
    "zebra stripe", "zebra marking", "bear left", "bear right", "fork in the road", "hot dog stand",
    "portable toilet", "horse drawn", "train of thought", "cattle guard", "cattle grid", "bull bar", "chair lift",
)

# The camera's own vehicle: it is not in the picture, so it is no mention; what it does may still be told.
EGO = (
    "ego", "we", "us", "driver", "camera", "dashcam", "dash cam", "dash camera", "viewer", "observer", "narrator",
)
EGO_OWNERS = (  # each before "vehicle" and "car"; "s" is what remains of a possessive
    "ego", "own", "our", "my", "camera", "camera equipped", "camera bearing", "camera carrying", "recording",
    "capturing", "filming", "observing", "viewing", "dashcam", "dash cam", "dashcam equipped", "host", "subject", "pov",
    "point of view", "primary", "test", "viewer s", "viewer s own", "observer s", "observer s own", "driver s",
    "camera s",
)
# "car" and "vehicle" are the camera's own after one of these ("from inside a moving car") ...
EGO_BEFORE = re.compile(
    r"\b(inside|within|aboard|interior of|interior|equipped|perspective of|viewpoint of|vantage point of|"
    r"view of someone in|point of view of|mounted in|mounted on|from)"
    r"(?: (?:a|an|the|another))?(?: (?P<state>moving|driving|stationary|travelling|traveling|stopped|parked))?$"
)
# "from the perspective of someone inside a vehicle": an eye, not a person in the picture.
EYE_BEFORE = re.compile(r"\b(perspective|viewpoint|vantage point|point of view) of(?: (?:a|an|the))?$")
# ... and before one of these ("the car's dashboard").
EGO_AFTER = frozenset(
    "dashboard hood windshield windscreen interior perspective viewpoint camera dashcam cabin bonnet equipped "
    "dash".split()
)

# ---------------------------------------------------------------------------------------------------------------------
# What a caption says about objects

# attribute category -> words. Categories are counted, not words: "red blue green" is one thing said.
ATTRIBUTES = {
    "colour": "red blue green white black silver gray grey yellow orange brown amber beige maroon golden gold purple "
              "pink tan dark bright colored coloured",
    "size": "large small big tall long compact tiny huge little oversized",
    "state": "parked stopped stationary moving oncoming standing idle flashing illuminated lit steady slow fast "
             "halted waiting seated empty crowded",
    "position": "ahead left right front behind opposite adjacent near nearby close distant distance roadside curb side "
                "center centre middle corner across background foreground beside alongside "
                "rightmost leftmost overhead directly",
    "number": "two three four five six seven eight nine ten several many multiple few single numerous another pair "
              "group dozen",
}

# scene category -> value -> words or phrases. What no COCO detector can check: it pays little and is capped.
SCENE = {
    "time": {
        "night": ("night", "nighttime", "night time", "nocturnal", "in the dark"),
        "day": ("day", "daytime", "daylight", "by day", "midday", "afternoon", "morning", "sunlight"),
        "dusk": ("dusk", "twilight", "sunset", "evening"), "dawn": ("dawn", "sunrise"),
    },
    "weather": {
        "clear": ("clear sky", "clear skies", "clear weather", "blue sky", "sunny"),
        "overcast": ("overcast", "cloudy", "clouds", "gray sky", "grey sky"),
        "rain": ("rain", "rainy", "raining", "raindrops", "drizzle"), "snow": ("snow", "snowy", "snowing", "snowfall"),
        "fog": ("fog", "foggy", "mist", "misty", "haze", "hazy"),
    },
    "surface": {"wet": ("wet", "puddle", "puddles", "slick", "damp"), "dry": ("dry",), "icy": ("ice", "icy")},
    "road": {
        "highway": ("highway", "freeway", "motorway", "expressway", "interstate"),
        "residential": ("residential", "suburban", "neighborhood", "neighbourhood"),
        "city": ("city", "urban", "downtown", "cityscape"),
        "country": ("rural", "country road", "countryside", "country", "road lined with trees"),
        "tunnel": ("tunnel",), "bridge": ("bridge", "overpass"),
    },
    "layout": {
        "intersection": ("intersection", "junction", "crossroads", "crossroad"), "roundabout": ("roundabout",),
        "crosswalk": ("crosswalk", "crosswalks", "pedestrian crossing", "pedestrian crossings", "zebra crossing"),
        "lanes": ("lane", "lanes", "lane marking", "lane markings", "median", "divider"),
        "bend": ("curve", "bend"),
    },
    "surroundings": {
        "buildings": ("building", "buildings", "storefront", "storefronts", "shop", "shops", "houses", "skyscrapers"),
        "trees": ("tree", "trees", "palm trees", "vegetation", "greenery"),
        "sidewalk": ("sidewalk", "sidewalks", "pavement"), "parking": ("parking lot", "parking lane"),
        "barrier": ("barrier", "barriers", "guardrail", "fence"),
        "signs": ("sign", "signs", "billboard", "signage"),
    },
    "lighting": {
        "lamps": ("streetlight", "streetlights", "street light", "street lights", "street lamp", "street lamps"),
        "neon": ("neon", "illuminated signs"), "glare": ("glare", "headlights", "reflections"),
    },
}
EXCLUSIVE = frozenset({"time", "weather", "surface"})  # two values of one of these contradict each other: no pay

# Verbs of motion and change, in the base form; the other forms are made below. Words of captions about captions
# (show, depict, indicate, suggest, capture) are not here: they say nothing about the road.
DYNAMIC_VERBS = tuple(
    "accelerate advance appear approach arrive board brake change clear creep cross cut cycle decelerate depart "
    "disappear drive emerge enter exit flow follow go halt hurry inch join jog leave make merge move navigate "
    "overtake pass pause proceed pull reach resume reverse ride roll run rush slow speed start step steer stop swerve "
    "switch transition travel traverse turn veer wait walk weave yield".split()
)
IRREGULAR_VERBS = {
    "drive": "drove driven", "go": "went gone", "leave": "", "run": "ran", "ride": "rode ridden", "cut": "cut",
    "speed": "sped", "make": "made", "creep": "crept",
}
DOUBLED = frozenset("cut jog run step stop".split())  # stop, stopping, stopped
NO_BARE_FORM = frozenset("make go leave clear change speed cycle".split())  # too often a noun, adjective or filler
NO_VERB = frozenset("left made clears clearing cleared makes making cycles".split())

CONNECTIVES = (
    "then", "next", "after", "afterwards", "afterward", "after that", "before", "while", "as", "when", "once", "until",
    "meanwhile", "subsequently", "finally", "later", "eventually", "soon", "soon after", "shortly after", "at first",
    "first", "initially", "because", "so", "since", "therefore", "thus", "due to", "as a result", "in response",
    "causing", "allowing", "leading to", "followed by", "at the same time", "suddenly", "gradually", "during",
    "moments later", "at last", "in the end", "in the beginning", "at the beginning", "simultaneously",
    "in turn", "thereafter", "before long", "by the end",
)
NO_CONNECTIVE = (
    "such as", "as well as", "as well", "as if", "as though", "so far", "same as", "next to", "the next", "the first",
    "the once", "so that", "not so", "as large as", "as long as", "as far as",
)

# ---------------------------------------------------------------------------------------------------------------------
# Grammar

DETERMINERS = frozenset("a an the this that its their his her our my some any each every another one no".split())
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = frozenset("two three four five six seven eight nine ten several many few multiple various numerous".split())
PREPOSITIONS = frozenset(
    "of in on at to from with by for into onto over under near behind between through along across toward towards past "
    "around against among beside beyond within inside outside off up down out about amid via upon above below".split()
)
AUXILIARIES = frozenset(
    "is are was were be been being has have had do does did can could will would may might must should isn't aren't "
    "wasn't weren't".split()
)
CONJUNCTIONS = frozenset(
    "and or nor but while as when where which who that than then because so if until before after although though "
    "however whereas since once yet except".split()
)
PRONOUNS = frozenset("it they he she we us them him there this these those both each you i its".split())
FUNCTION_WORDS = (
    DETERMINERS | PREPOSITIONS | AUXILIARIES | CONJUNCTIONS | PRONOUNS
    | frozenset("not also only just very too mostly instead still again".split())
)
BE = frozenset("is are was were be been being remain remains remained isn't aren't wasn't weren't".split())

# Negation
NEGATORS = ("no", "without", "neither", "nor", "zero", "lacks", "lacking")  # before the object
NEGATOR_PHRASES = (
    "not any", "not a", "not an", "not one", "lack of", "lacking in", "absence of", "devoid of", "free of", "free from",
    "clear of", "empty of", "absent of", "void of", "bare of", "none of",
)
SHOWING = frozenset(  # "does not show", "cannot see"
    "show shows showcase display present include includes contain contains see feature features depict reveal have "
    "involve encounter meet capture spot".split()
)
PSEUDO = (  # these look like a negation and are none
    "no longer", "not only", "not just", "not merely", "not simply", "no doubt", "no matter", "no sooner", "no fewer",
    "no less", "not far", "no different", "not without", "no time", "no wonder", "no fewer than", "no parking",
    "no entry", "no stopping", "no turn", "no left", "no right", "no u", "no standing", "no outlet", "no passing",
    "absence of the", "lack of the",
)
ABSTRACT = frozenset(  # "no movement from the cars": the cars are there
    "movement movements motion change changes activity sign signs delay collision contact interaction interactions "
    "threat obstruction obstructions interference conflict conflicts gap distance incident incidents impact difference "
    "reaction response space room way sound hesitation issue issues need reason pause disruption disruptions "
    "interruption interruptions shift shifts deviation indication adjustment adjustments".split()
)
CARRIERS = frozenset(  # "no sign of pedestrians": the pedestrians are not there
    "sign signs presence evidence trace traces visible indication sight view number lack glimpse hint".split()
)
POST_NEGATORS = BE | {"can", "cannot", "can't", "could", "couldn't"}
UNSEEN = frozenset("visible present seen detected observed there found evident noticeable apparent shown depicted "
                   "sighted discernible".split())
LIST_WORDS = frozenset("such like any a an other the or nor and single one".split())  # "no obstacles such as a car"
EXCEPTIONS = ("other than", "besides", "apart from", "aside from", "except", "except for", "but")
COLOURS_OF_LIGHT = frozenset("red green yellow amber".split())
CHANGING = frozenset(
    "turn turns turned turning change changes changed changing switch switches switched switching go goes went going "
    "is was becomes became stays stayed remains remained shows showing showed still to just now ahead then soon".split()
)


# ---------------------------------------------------------------------------------------------------------------------
# The lexicon: phrase -> entry, looked up by first word, longest first


class Entry(NamedTuple):
    kind: str  # "object", "any", "unverifiable", "neutral", "ego"
    classes: tuple[str, ...]


def plurals(phrase):
    """All forms of a singular phrase: ("city bus") -> {"city bus", "city buses", "city busses"}."""
    if phrase in IRREGULAR_PLURALS:
        return {phrase, *IRREGULAR_PLURALS[phrase]}
    head, _, last = phrase.rpartition(" ")
    if last in IRREGULAR_PLURALS:
        ends = IRREGULAR_PLURALS[last]
    elif re.search(r"(s|x|ch|sh)$", last):
        ends = (last + "es",)
    elif re.search(r"[^aeiou]y$", last):
        ends = (last[:-1] + "ies",)
    else:
        ends = (last + "s",)
    return {phrase, *(f"{head} {end}".strip() for end in ends)}


def verb_forms(base):
    """{"stop"} -> {"stop", "stops", "stopping", "stopped"} without the forms that are other words on the road."""
    stem = base[:-1] if base.endswith("e") else base + base[-1] if base in DOUBLED else base
    third = base + "es" if re.search(r"(s|x|ch|sh|o)$", base) else base + "s"
    if re.search(r"[^aeiou]y$", base):
        third, past = base[:-1] + "ies", base[:-1] + "ied"
    else:
        past = stem + "ed"
    forms = {third, stem + "ing", past, *IRREGULAR_VERBS.get(base, "").split()}
    return (forms if base in NO_BARE_FORM else forms | {base}) - NO_VERB


def _build_lexicon():
    entries = {}
    for phrase in NEUTRAL:
        entries |= dict.fromkeys(plurals(phrase), Entry("neutral", ()))
    for phrase in (*EGO, *(f"{owner} {noun}" for owner in EGO_OWNERS for noun in ("vehicle", "car"))):
        entries[phrase] = Entry("ego", ())
    for table, kind in ((ANY_OF, "any"), (UNVERIFIABLE, "unverifiable"), (SEVERAL, "object")):
        for phrase, classes in table.items():
            entries |= dict.fromkeys(plurals(phrase), Entry(kind, classes))
    for name in COCO_NAMES:
        for phrase in (name, *SYNONYMS.get(name, ())):
            entries |= dict.fromkeys(plurals(phrase), Entry("object", (name,)))
    return _by_first_word(entries)


def _by_first_word(entries):
    """{"bus stop": x} -> {"bus": [(("bus", "stop"), x), ...longest first]}."""
    index = {}
    for phrase, entry in entries.items():
        words = tuple(phrase.split())
        index.setdefault(words[0], []).append((words, entry))
    for group in index.values():
        group.sort(key=lambda item: -len(item[0]))
    return index


LEXICON = _build_lexicon()
SINGULAR = frozenset(
    phrase.split()[-1] for table in (COCO_NAMES, *SYNONYMS.values(), SEVERAL, ANY_OF, UNVERIFIABLE) for phrase in table
) - {"people", "skis", "scissors", "cattle"}
GUARDED_FORMS = frozenset(form for word in GUARDED for form in plurals(word))
HEADS = {word: frozenset(form for noun in nouns.split() for form in plurals(noun))
         for word, nouns in COMPOUND_HEADS.items()}
OTHER_VEHICLE = frozenset("ahead behind directly immediately beside that which parked".split())
CROSSING_WAYS = frozenset("the this from over safely slowly quickly hurriedly our his her their".split())
VERB_OF = {form: base for base in DYNAMIC_VERBS for form in verb_forms(base)}
ATTRIBUTE_OF = {word: name for name, words in ATTRIBUTES.items() for word in words.split()}
SCENE_INDEX = _by_first_word({
    phrase: (category, value) for category, values in SCENE.items() for value, phrases in values.items()
    for phrase in phrases
})
CONNECTIVE_WORDS = frozenset(phrase for phrase in CONNECTIVES if " " not in phrase)
CONNECTIVE_INDEX = _by_first_word(dict.fromkeys(CONNECTIVES, True) | dict.fromkeys(NO_CONNECTIVE, False))
NEGATOR_INDEX = _by_first_word(
    dict.fromkeys((*NEGATORS, *NEGATOR_PHRASES), "negates") | dict.fromkeys(PSEUDO, "pseudo")
)
EXCEPTION_INDEX = _by_first_word(dict.fromkeys(EXCEPTIONS, True))


# ---------------------------------------------------------------------------------------------------------------------
# Reading a text


class Mention(NamedTuple):
    """One object named by a text: object is a COCO name, text[start:end] the words that name it."""

    object: str
    negated: bool
    start: int
    end: int


class Claim(NamedTuple):
    """What one phrase says is there. kind: "object" (all of classes), "any" (one of classes), "unverifiable"."""

    kind: str
    classes: tuple[str, ...]
    negated: bool
    first: int  # index of the first word
    last: int  # index of the last word


NO_BREAK, HYPHEN, COMMA, STOP = range(4)  # what stands between a word and the one before it


@dataclass
class Reading:
    """A text in words. Lists are parallel: words[i] is text[starts[i]:ends[i]] in lower case."""

    words: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    breaks: list[int] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)  # "" or the entry kind of the phrase that holds the word
    claims: list[Claim] = field(default_factory=list)


WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+")
CONTRACTIONS = frozenset({"there's", "it's", "that's"})
SENTENCE_END = re.compile(r"[.!?;:…。]")


def _gap(text):
    """What kind of break the characters between two words make."""
    if text in (" ", ""):
        return NO_BREAK
    if SENTENCE_END.search(text):
        return STOP
    if text in ("-", "‐", "‑"):
        return HYPHEN
    return COMMA if text.strip(" \t\r\n\"'“”‘’*_#") else NO_BREAK


def _split_words(text):
    """Reading of the words of a text; "car's" becomes the two words "car" and "s"."""
    reading, previous = Reading(), 0
    for match in WORD.finditer(text):
        start, end = match.span()
        word = match.group().lower().replace("’", "'")
        gap, previous = _gap(text[previous:start]), end
        owner = len(word) - 2 if word.endswith("'s") and word not in CONTRACTIONS else len(word)
        for piece, first, stop in ((word[:owner], start, start + owner), (word[owner + 1:], end - 1, end)):
            if piece:
                reading.words.append(piece)
                reading.starts.append(first)
                reading.ends.append(stop)
                reading.breaks.append(gap if first == start else NO_BREAK)
    return reading


def match_phrase(index, reading, i):
    """The longest phrase of an index that starts at word i, as (length, entry); (0, None) if there is none."""
    words, breaks = reading.words, reading.breaks
    for phrase, entry in index.get(words[i], ()):
        end = i + len(phrase)
        if end <= len(words) and tuple(words[i:end]) == phrase and all(b < COMMA for b in breaks[i + 1:end]):
            return len(phrase), entry
    return 0, None


def _word(reading, i):
    """Word i, or "" past the ends."""
    return reading.words[i] if 0 <= i < len(reading.words) else ""


def _ends_clause(reading, i):
    """No word of the same clause stands at i."""
    return i >= len(reading.words) or reading.breaks[i] >= COMMA


def _is_compound(reading, first, head):
    """The object's name at first goes on with the noun at head to name something else ("bus stop", "bicycle shop").

    "A bus stops ahead" and "Pedestrian crossing." name an object and what it does, "bus stops line the street" and "a
    pedestrian crossing" a place: told apart by the words around.
    """
    if _ends_clause(reading, head):
        return False
    word, noun = reading.words[head - 1], reading.words[head]
    if noun not in HEADS.get(word, ()) and (noun not in HEADS[""] or word not in SINGULAR | HEADS[""]):
        return False
    before, after = _word(reading, first - 1), _word(reading, head + 1)
    if after in ("splitting", "changing", "changes"):  # "a motorcyclist lane-splitting"
        return False
    opens = first == 0 or reading.breaks[first] >= COMMA
    ends = _ends_clause(reading, head + 1)
    if noun in ("stops", "parks", "lines", "stands"):  # a verb, unless several are meant
        several = not opens and before in NUMBERS | PREPOSITIONS | {"these", "those", "some", "all", "other", "and"}
        return several or not ends and (after in AUXILIARIES or after in ("line", "dot", "appear"))
    if noun == "parking":
        return before not in ("a", "another", "one")  # "a car parking ahead"
    if noun == "crossing":
        crosses = not ends and after in CROSSING_WAYS
        return not (crosses or opens and (ends or after in ("ahead", "in", "left", "right", "while", "as", "and")))
    return True


def _is_plain_noun(reading, i):
    """A guarded word stands as a noun: "an orange lies there", not "an orange car", "bears left" or "in orange"."""
    word, after = reading.words[i], _word(reading, i + 1)
    before = reading.words[i - 1] if i and reading.breaks[i] < COMMA else ""
    if word not in GUARDED:  # a plural; of a verb, only after a determiner
        return word not in GUARDED_VERBS or before in DETERMINERS | NUMBERS
    if before not in DETERMINERS | NUMBERS and not (_word(reading, i - 2) in DETERMINERS and before in ATTRIBUTE_OF):
        return False
    if _ends_clause(reading, i + 1) or ATTRIBUTE_OF.get(after) == "position" or after in VERB_OF:
        return True
    return after in FUNCTION_WORDS and after not in ("and", "or", "one")


def _is_light(reading, i):
    """A bare "light" or "signal" is a traffic light if it has a signal's colour or changes to one."""
    word, after = reading.words[i], _word(reading, i + 1)
    before = reading.words[i - 1] if i and reading.breaks[i] < COMMA else ""
    if word == "signal":
        return before in ARTICLES | COLOURS_OF_LIGHT | {"this", "that", "each"}
    if word == "signals":
        return before in COLOURS_OF_LIGHT | {"the", "these", "through", "at", "overhead"}
    if before in COLOURS_OF_LIGHT:
        if word == "light":  # not "the red light from a shop"
            return after not in ("from", "of", "reflecting", "reflections")
        return after in ("ahead", "at", "turn", "change") or _word(reading, i - 2) == "at"  # not "red lights glow"
    if ATTRIBUTE_OF.get(before) == "colour":
        return False
    for j in range(i + 1, min(i + 6, len(reading.words))):
        if _ends_clause(reading, j):
            return False
        if reading.words[j] in COLOURS_OF_LIGHT:  # "light red" is one at the end of a clause
            return j > i + 1 or word == "light" and _ends_clause(reading, j + 1)
        if reading.words[j] not in CHANGING:
            return False
    return False


def _is_ego(reading, i, length, entry):
    """This "car" or "vehicle" is the one that carries the camera; this "someone" looks out of it."""
    if _word(reading, i + length - 1) not in SINGULAR:
        return False
    context = " ".join(reading.words[max(0, i - 6):i])
    if "person" in entry.classes:
        return EYE_BEFORE.search(context) is not None
    if entry.classes[0] != "car":
        return False
    match = EGO_BEFORE.search(context)
    if match and (match.group(1) != "from" or match.group("state") in ("moving", "driving", "travelling", "traveling")):
        return True
    after = i + length
    if _word(reading, after) == "s" and not _ends_clause(reading, after):
        after += 1
    return _word(reading, after) in EGO_AFTER and not _ends_clause(reading, after)


def _is_own_vehicle(reading, i, length):
    """ "The vehicle" alone is the camera's; "the vehicle ahead", "a vehicle" and "vehicles" are others."""
    if length != 1 or _word(reading, i) != "vehicle" or _word(reading, i - 1) not in ("the", "this"):
        return False
    after = _word(reading, i + 1), _word(reading, i + 2)
    return after[0] not in OTHER_VEHICLE and after not in (("in", "front"), ("on", "the"))


def _classify(reading, i):
    """(length, entry) of the phrase at word i after looking at its neighbours; (0, None) for a plain word."""
    length, entry = match_phrase(LEXICON, reading, i)
    word = reading.words[i]
    if not length:
        is_light = word in ("light", "lights", "signal", "signals") and _is_light(reading, i)
        return (1, Entry("object", ("traffic light",))) if is_light else (0, None)
    if entry.kind in ("neutral", "ego"):
        return length, entry
    if word in GUARDED_FORMS and length == 1 and not _is_plain_noun(reading, i):
        return 0, None
    if _is_ego(reading, i, length, entry) or entry.kind == "any" and _is_own_vehicle(reading, i, length):
        return length, Entry("ego", ())
    if entry.classes[0] not in ("traffic light", "stop sign"):
        head = i + length
        while _is_compound(reading, i, head):  # "pedestrian crossing sign"
            head += 1
        if head > i + length:
            return head - i, Entry("neutral", ())
    return length, entry


def read_text(text):
    """The words of a text and the claims that it makes. Linear in the text's length; no state."""
    reading = _split_words(text)
    reading.roles = [""] * len(reading.words)
    claims, i = [], 0
    while i < len(reading.words):
        length, entry = _classify(reading, i)
        if not length:
            i += 1
            continue
        reading.roles[i:i + length] = [entry.kind] * length
        if entry.kind in ("object", "any", "unverifiable"):
            claims.append(Claim(entry.kind, entry.classes, False, i, i + length - 1))
            if entry.kind == "any" and reading.words[i].rstrip("s") in WITH_PERSON:
                claims.append(Claim("object", ("person",), False, i, i + length - 1))
        i += length
    negated = _negated_words(reading, claims)
    reading.claims = [claim._replace(negated=claim.first in negated) for claim in claims]
    return reading


# ---------------------------------------------------------------------------------------------------------------------
# Negation


def _continues_list(reading, left, right, last):
    """The phrase right..last goes on with the list whose item ends at word left: "cars, trucks or buses"."""
    between, breaks = reading.words[left + 1:right], reading.breaks[left + 1:right + 1]
    joins = {word for word in between if word in ("or", "nor", "and")}
    others = {word for word in between if word not in joins}
    if len(between) > 4 or STOP in breaks or not joins and COMMA not in breaks:
        return False
    if any(word in VERB_OF and word not in ATTRIBUTE_OF for word in others):
        return False
    determined = not others.isdisjoint(FUNCTION_WORDS | NUMBERS)
    bare = others <= {"a", "an", "any", "other", "single"}
    if joins & {"or", "nor"}:
        return bare or not determined
    ends, after = _ends_clause(reading, last + 1), _word(reading, last + 1)
    if determined and (joins or not bare or after in BE):  # "no cars and a bus", "no cars, a bus is there"
        return False
    if not ends and after in VERB_OF and not reading.roles[last + 1]:  # "no cars and buses pass"
        return False
    return bool(joins) or ends or after in ("or", "and", "nor")


def _negate_list(reading, spans, start):
    """The words of the list of phrases that begins with spans[start]; each span is (first, last)."""
    found = {spans[start][0]}
    for (_, left), (first, last) in zip(spans[start:], spans[start + 1:], strict=False):
        if not _continues_list(reading, left, first, last):
            break
        found.add(first)
    return found


def _first_after(reading, spans, i):
    """Index in spans of the phrase that a negator ending before word i denies, or None."""
    starts = {first: number for number, (first, _) in enumerate(spans)}
    carried = False
    for j in range(i, min(i + 9, len(reading.words))):
        word = reading.words[j]
        if reading.breaks[j] == STOP or reading.breaks[j] == COMMA and word not in ("or", "nor"):
            return None
        if j in starts:
            return starts[j]
        if word == "without" or match_phrase(EXCEPTION_INDEX, reading, j)[0]:
            return None
        if j == i and word.endswith("ing") and word not in ("oncoming", "encountering", "seeing", "showing"):
            return None  # "without stopping for the bus"
        if word in LIST_WORDS or word == "of" and carried or word == "as" and _word(reading, j - 1) == "such":
            continue
        carried = carried or word in CARRIERS
        if word in FUNCTION_WORDS or word in ABSTRACT - CARRIERS or word in VERB_OF and word not in ATTRIBUTE_OF:
            return None
    return None


def _denied_before(reading, spans, i):
    """Index in spans of the subject of "... are not visible", whose verb stands at word i, or None."""
    lowest = i
    while lowest > 0 and i - lowest < 12:
        word = reading.words[lowest - 1]
        if reading.breaks[lowest] == STOP or word in VERB_OF and reading.roles[lowest - 1] == "":
            break
        if word in BE or word in ("while", "as", "but", "when", "although", "though", "where", "however", "so"):
            break
        lowest -= 1
    inside = [n for n, (first, last) in enumerate(spans) if lowest <= first and last < i]
    while len(inside) > 1 and any(b == COMMA for b in reading.breaks[spans[inside[0]][1] + 1:spans[inside[1]][0] + 1]):
        if _continues_list(reading, spans[inside[0]][1], *spans[inside[1]]):
            break
        inside.pop(0)
    return inside[0] if inside else None


def _post_negator(reading, i):
    """A phrase at word i denies its subject: "are not visible", "is absent", "is nowhere to be seen"."""
    rest = []
    for j in range(i + 1, min(i + 6, len(reading.words))):
        if reading.breaks[j] >= COMMA:
            break
        rest.append(reading.words[j])
    if any(word in ("longer", "only", "just", "yet") for word in rest):
        return False
    head = reading.words[i]
    if head in BE and any(word in ("absent", "missing", "nowhere") for word in rest[:2]):
        return True
    denied = head.endswith("n't") or head == "cannot" or any(word in ("not", "never") for word in rest[:2])
    return denied and any(word in UNSEEN for word in rest[:4])


def _is_double(reading, i):
    """The negator at word i takes another one back: "no road without a car", "it is not true that no car is there"."""
    before = reading.words[max(0, i - 5):i]
    if reading.words[i] == "without":
        return not {"no", "not", "never"}.isdisjoint(before)
    return "true that" in " ".join(before) and "not" in before or "false that" in " ".join(before)


def _denied_after(reading, spans, i):
    """Index in spans of the phrase that a negator at word i denies ("no cars", "does not show a car"), or None."""
    word, following = reading.words[i], _word(reading, i + 1)
    if reading.roles[i] == "object":  # "no one", "nobody"
        denies = word in ("no", "nobody")
        return next(n for n, (first, _) in enumerate(spans) if first == i) if denies else None
    length, verdict = match_phrase(NEGATOR_INDEX, reading, i)
    if verdict == "pseudo":  # "no parking", but "no parking meter"
        return _first_after(reading, spans, i + 1) if reading.roles[i + 1] == "object" else None
    if verdict == "negates":
        return None if _is_double(reading, i) else _first_after(reading, spans, i + length)
    if word in ("not", "cannot") or word.endswith("n't"):
        if following in SHOWING:
            return _first_after(reading, spans, i + 2)
        if following in ("any", "a", "an"):
            return _first_after(reading, spans, i + 1)
        if _word(reading, i + 2) == "any":  # "does not reveal any"
            return _first_after(reading, spans, i + 2)
    return None


def _negated_words(reading, claims):
    """First words of the phrases that the text denies."""
    spans = sorted({(claim.first, claim.last) for claim in claims})
    negated = set()
    if not spans:
        return negated
    for i, word in enumerate(reading.words):
        target = _denied_after(reading, spans, i)
        if target is None and word in POST_NEGATORS and _post_negator(reading, i):
            target = _denied_before(reading, spans, i)
        if target is not None:
            negated |= _negate_list(reading, spans, target)
        if word == "free" and reading.breaks[i] == HYPHEN:  # "car-free"
            negated |= {first for first, last in spans if last == i - 1}
    return negated


# ---------------------------------------------------------------------------------------------------------------------
# What other modules ask for


def find_mentions(text):
    """Every COCO object that the text names, in the order of the text -> list[Mention].

    "cyclist" gives two mentions of one span. Words that several classes satisfy ("vehicle", "van") and the camera's own
    vehicle give none. A hedged mention ("possibly a bus") is a mention.
    """
    reading = read_text(text)
    return [
        Mention(name, claim.negated, reading.starts[claim.first], reading.ends[claim.last])
        for claim in reading.claims if names_object(claim) for name in claim.classes
    ]


def names_object(claim):
    """The claim names its classes; "fire truck" names a truck, "ambulance" and "van" no one class."""
    return claim.kind == "object" or claim.kind == "unverifiable" and len(claim.classes) == 1


def mention_sets(text):
    """(classes that the text says are there, classes that it only denies), two frozensets of COCO names.

    A class that is named as there anywhere in the text is not denied ("later no pedestrians are visible").
    """
    mentions = find_mentions(text)
    named = frozenset(m.object for m in mentions if not m.negated)
    return named, frozenset(m.object for m in mentions) - named


def first_mentions(text):
    """The classes that the text says are there, in the order in which it first names them -> tuple of COCO names."""
    return tuple(dict.fromkeys(m.object for m in find_mentions(text) if not m.negated))
