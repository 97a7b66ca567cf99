"""The driving vocabulary: word tables only. stage3/mentions.py reads texts with them.

docs/reward.md explains how to add a word or a class.
"""

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

# What other data sets call a class of ours, to suggest a detector's `classes`; "none" is a class to ignore.
NAMES_ELSEWHERE = {
    "pedestrian": "person", "rider": "person", "motor": "motorcycle", "motorbike": "motorcycle", "bike": "bicycle",
    "traffic sign": "none", "trailer": "truck", "other vehicle": "none", "other person": "person",
}

# Inventing or denying one of these could mislead a driver, so R_hall is strict about them.
SAFETY_CRITICAL = frozenset(
    {"person", "bicycle", "car", "motorcycle", "bus", "train", "truck", "traffic light", "stop sign"}
)

# Only these can be salient: classes that a good caption must tell. A bench or a handbag may be told and never must.
ROAD_CLASSES = SAFETY_CRITICAL | {"dog", "cat", "horse", "sheep", "cow"}

# class -> other words for it, in the singular (mentions.py adds the class's own name and the plurals).
# Left out on purpose, because in road scenes they usually mean something else: driver, passenger and motorist (inside
# a car), walker, figure, family, coach, ship, jet.
SYNONYMS = {
    "person": (
        "pedestrian", "man", "woman", "child", "schoolchild", "kid", "boy", "girl", "guy", "lady", "gentleman", "adult",
        "teenager", "toddler", "baby", "passerby", "bystander", "onlooker", "jaywalker", "jogger", "runner", "worker",
        "policeman", "policewoman", "police officer", "cop", "ped", "walker",
        "passengers getting", "passengers boarding", "passengers waiting", "passengers alighting",
        "traffic officer", "officer", "crossing guard", "flagger",
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
        "minibus", "coach", "coach bus", "tour bus", "double decker tour bus",
        "school bus", "city bus", "double decker", "double decker bus", "transit bus",
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

# Words that name two classes at once.
SEVERAL = {
    "cyclist": ("bicycle", "person"), "bicyclist": ("bicycle", "person"), "bicycle rider": ("bicycle", "person"),
    "bike rider": ("bicycle", "person"), "motorcyclist": ("motorcycle", "person"),
    "motorcycle rider": ("motorcycle", "person"), "motorbike rider": ("motorcycle", "person"),
    "skateboarder": ("skateboard", "person"), "dog walker": ("dog", "person"),
}

# Words that any one of several classes satisfies. They mention no class. They are wrong if none of their classes is
# present; otherwise they give half recall for the first class that is present, if the caption names none of them.
ANY_OF = {
    "vehicle": ("car", "truck", "bus", "motorcycle"),
    "motor vehicle": ("car", "truck", "bus", "motorcycle"),
    "construction vehicle": ("truck", "car", "bus"),
    "van": ("car", "truck", "bus"), "minivan": ("car", "truck"), "delivery van": ("truck", "car", "bus"),
    "pickup": ("truck", "car"), "pick up": ("truck", "car"),
    "pickup truck": ("truck", "car"), "pick up truck": ("truck", "car"),
    "motorhome": ("truck", "bus", "car"), "motor home": ("truck", "bus", "car"), "rv": ("truck", "bus", "car"),
    "shuttle": ("bus", "car", "truck"), "camper": ("truck", "car", "bus"),
    "tram": ("train", "bus"), "streetcar": ("train", "bus"), "trolley": ("bus", "train"),
    "light rail": ("train", "bus"), "trolleybus": ("bus", "train"),
    "light rail train": ("train", "bus"), "light rail vehicle": ("train", "bus"),
    "scooter": ("motorcycle", "bicycle"), "biker": ("motorcycle", "bicycle"), "rider": ("motorcycle", "bicycle"),
    "two wheeler": ("motorcycle", "bicycle"),
}
# Makes and models: one names a car or a truck, unless a vehicle's name follows it ("a Toyota truck"). Left out are
# those that usually mean something else: Lincoln, Mini, Focus, Golf, Explorer, Escape, Accord, Pilot, Ram.
BRANDS = frozenset("acura audi bmw buick cadillac camry cherokee chevrolet chevy chrysler civic corolla corvette dodge "
                   "ferrari fiat ford gmc highlander honda hyundai infiniti jaguar jetta kia lexus mazda mercedes "
                   "mitsubishi mustang nissan passat peugeot pontiac porsche prius renault silverado subaru tacoma "
                   "tahoe tesla toyota volkswagen volvo vw wrangler altima sentra camaro".split())
BRAND_CLASSES = ("car", "truck")
WITH_PERSON = frozenset({"biker", "rider"})  # these also mention a person

# Special vehicles whose kind a COCO detector cannot confirm: half an error if one of these classes is present (and no
# recall), a whole error if none is.
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

# Words that usually mean something else in road scenes ("an orange car", "bear left", "a remote area", "the fork in the
# road"). A mention only as a plain noun: after a determiner, and before a function word, a verb or the clause's end.
GUARDED = frozenset({
    "orange", "bear", "tie", "remote", "sink", "bed", "book", "mouse", "fork", "cycle", "adult", "clock", "table",
    "individual", "human", "student", "ball", "kite", "cake", "apple", "tanker", "cab", "bull", "semi", "tv", "coach",
})
GUARDED_VERBS = frozenset({"ties", "sinks", "books", "bears", "cycles", "forks"})  # mentions after a determiner

# Nouns that turn the object's name before them into a place, a sign or an idea: "bus stop", "bicycle shop", "pedestrian
# activity". The nouns of "" follow any object except traffic lights and stop signs; mentions.py adds plurals.
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

# Other phrases in which an object's name (or "light") is not that object, in the singular.
NEUTRAL = (
    "unseen vehicle", "unseen car", "unseen pedestrian",
    "people mover", "men at work", "with trolley", "with a trolley", "shopping trolley",
    "at phone", "on phone", "on the phone", "at her phone", "at his phone", "at their phone", "on her phone",
    "on his phone", "on their phone", "at a phone",
    "man made", "first person", "second person", "third person", "runner up",
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

# The camera's own vehicle is not in the picture, so it is not a mention. Its motion still counts in R_temp.
EGO = (
    "ego", "we", "us", "driver", "camera", "dashcam", "dash cam", "dash camera", "viewer", "observer", "narrator",
)
EGO_OWNERS = (  # followed by "vehicle" or "car"; "viewer s" is how "viewer's" is split
    "ego", "own", "our", "my", "camera", "camera equipped", "camera bearing", "camera carrying", "recording",
    "capturing", "filming", "observing", "viewing", "dashcam", "dash cam", "dashcam equipped", "host", "subject", "pov",
    "point of view", "primary", "test", "viewer s", "viewer s own", "observer s", "observer s own", "driver s",
    "camera s",
)
# "Car" and "vehicle" before one of these are the camera's own ("the car's dashboard").
EGO_AFTER = frozenset("dashboard hood windshield windscreen interior perspective viewpoint camera dashcam "
                      "cabin bonnet equipped dash".split())
OTHER_VEHICLE = frozenset("ahead behind directly immediately beside that which parked".split())  # "the vehicle ahead"

# ---------------------------------------------------------------------------------------------------------------------
# What a caption says about objects

# attribute category -> words. R_detail counts categories, not words: "red blue green" counts once.
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

# scene category -> value -> words or phrases. No COCO detector can check these, so R_detail caps them.
SCENE = {
    "time": {
        "night": ("night", "nighttime", "night time", "nocturnal", "in the dark"),
        "day": ("day", "daytime", "daylight", "by day", "midday", "noon", "afternoon", "morning", "sunlight"),
        "dusk": ("dusk", "twilight", "sunset", "evening"), "dawn": ("dawn", "sunrise"),
    },
    "weather": {
        "clear": ("clear sky", "clear skies", "clear weather", "clear day", "clear night", "clear morning", "blue sky",
                  "sunny", "sunshine"),
        "overcast": ("overcast", "cloudy", "clouds", "gray sky", "grey sky"),
        "rain": ("rain", "rainy", "raining", "raindrops", "drizzle"), "snow": ("snow", "snowy", "snowing", "snowfall"),
        "fog": ("fog", "foggy", "mist", "misty", "haze", "hazy"),
    },
    "surface": {
        "wet": ("wet", "puddle", "puddles", "slick", "damp", "flooded"), "dry": ("dry",), "icy": ("ice", "icy"),
    },
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
EXCLUSIVE = frozenset({"time", "weather", "surface"})  # two values of one of these contradict
NEAR_SCENES = frozenset(map(frozenset, (  # except for these, which pass into one another
    ("dusk", "night"), ("dusk", "day"), ("dawn", "day"), ("dawn", "night"), ("dusk", "dawn"), ("overcast", "rain"),
    ("overcast", "snow"), ("overcast", "fog"), ("rain", "fog"), ("snow", "fog"), ("wet", "icy"),
)))

# Words that say the same of an object, so that a caption may use another one than the reference.
SAME_ATTRIBUTE = (
    "ahead front", "gray grey silver", "big large tall oversized huge", "small little compact tiny",
    "parked stopped stationary halted waiting standing idle", "near nearby close adjacent beside alongside",
    "distant distance background", "several many multiple numerous group", "opposite oncoming", "roadside curb side",
    "pair two", "center centre middle", "slow steady", "dark black",
)
SAME_VERB = (
    "brake slow decelerate stop halt wait yield pause creep", "accelerate speed start resume proceed",
    "move go travel roll drive depart", "turn veer steer swerve weave", "merge join switch cut pull change make",
    "pass overtake", "approach advance inch", "appear enter emerge arrive reach", "disappear exit leave",
    "cross traverse walk jog run rush hurry", "ride cycle",
)
LIGHT_VERBS = "turn change switch transition go"  # of a traffic light these all say that its colour changes

# Not objects, but what is said of them is said of the road.
PLACES = frozenset("road street traffic way lane highway intersection junction crosswalk".split())

# Advice to the driver, as the first word of a clause: "keep distance", "hold lane". Elsewhere these say nothing.
COMMANDS = frozenset("keep hold ease check watch give reduce crawl maintain mind cover look prepare back stay let "
                     "expect anticipate adjust monitor continue scan beware".split())

# Verbs of events that a driver must not be told of in vain, beside the verbs of motion: forms are made as for those.
EVENT_VERBS = tuple("crash collide hit strike smash explode burn fall flip overturn skid spin jump fly land chase "
                    "fight attack shoot slip stumble wave dance block honk hover hang leap catch sink".split())
PHRASE_VERBS = {  # phrases that say what a verb of motion says
    "stop": ("come to a stop", "comes to a stop", "come to a full stop", "comes to a full stop", "came to a stop",
             "come to a halt", "comes to a halt", "comes to a complete stop", "come to a complete stop",
             "coming to a stop", "coming to a halt", "came to a halt"),
    "approach": ("come closer", "comes closer", "coming closer", "comes towards", "comes toward", "coming towards",
                 "coming toward"),
}

# Words for a special kind of a class; the class itself and "man", "bike" or "lorry" say nothing more than the class.
SUBTYPES = {
    "car": "sedan suv hatchback coupe convertible wagon crossover limousine taxi taxicab cab jeep cruiser",
    "truck": "semi trailer wheeler tanker mixer flatbed", "bus": "minibus coach decker shuttle",
    "person": "child children schoolchild kid boy girl teenager toddler baby jogger runner worker workers policeman "
              "policewoman officer guard flagger firefighter tourist student jaywalker",
}
# The word before the class's name that makes it a special kind: "police car", "dump truck", "school bus".
SUBTYPE_MARKS = frozenset("police patrol squad sports compact utility box dump garbage trash delivery cargo tow cement "
                          "freight moving food school city transit".split())

# Colours of vehicles as the evidence names them, and pairs that cameras confuse: neither proves the other wrong.
VEHICLE_COLOURS = {
    "red": "red", "maroon": "red", "blue": "blue", "green": "green", "white": "white", "black": "black",
    "grey": "grey", "gray": "grey", "silver": "grey", "yellow": "yellow", "gold": "yellow", "golden": "yellow",
    "orange": "orange", "brown": "brown", "beige": "brown", "tan": "brown", "purple": "purple", "pink": "pink",
}
SIMILAR_COLOURS = frozenset(map(frozenset, (
    ("grey", "white"), ("grey", "black"), ("grey", "blue"), ("black", "blue"), ("black", "brown"),
    ("red", "orange"), ("red", "brown"), ("red", "pink"), ("orange", "yellow"), ("orange", "brown"),
    ("yellow", "brown"), ("yellow", "white"), ("white", "brown"), ("purple", "blue"), ("purple", "red"),
    ("purple", "pink"), ("grey", "brown"),
)))
COUNTS = {word: number for number, word in enumerate("two three four five six seven eight nine ten".split(), start=2)}
COUNTS |= {"pair": 2, "couple": 2} | dict.fromkeys("several many multiple numerous group crowd dozen".split(), 0)

# A denial with one of these says more than that the class is nowhere: "no cars in the left lane", "no other trucks".
DENIAL_LIMITS = frozenset("other further additional else more longer yet anymore now immediate immediately direct "
                          "another crossing turning approaching passing coming following blocking lane lanes sidewalk "
                          "crosswalk intersection path way front side at near from initial frames "
                          "themselves where absence".split())

# An answer that says these instead of what it sees.
HEDGES = frozenset("possibly perhaps maybe probably presumably apparently seemingly might potentially likely".split())
# What a video does is no event on the road: "the video starts", "the scene changes".
VIDEO_WORDS = frozenset("video clip footage scene view camera frame image recording sequence perspective".split())

# Verbs of motion and change, in the base form (mentions.py makes the others). Verbs about the video (show, depict,
# indicate, suggest, capture) are left out: they say nothing about the road.
DYNAMIC_VERBS = tuple("accelerate advance appear approach arrive board brake change clear creep cross cut "
                      "cycle decelerate depart disappear drive emerge enter exit filter flow follow go halt hurry "
                      "inch join jog leave make merge move navigate overtake pass pause proceed pull reach "
                      "resume reverse ride roll run rush slow speed start step steer stop swerve switch "
                      "park transition travel traverse turn veer wait walk weave yield".split())
IRREGULAR_VERBS = {
    "drive": "drove driven", "go": "went gone", "leave": "", "run": "ran", "ride": "rode ridden", "cut": "cut",
    "speed": "sped", "make": "made", "creep": "crept",
}
DOUBLED = frozenset("cut jog run step stop".split())  # "stopping", "stopped"
NO_BARE_FORM = frozenset("make go leave clear change speed cycle".split())  # too often a noun, adjective or filler
# After these a bare form is a noun: "heavy traffic flow", "in reverse", "a slow turn".
NOUN_BEFORE = frozenset("in of with for by at from traffic full sharp slow slight gradual sudden brief next".split())
NOT_VERBS = frozenset("left made clears clearing cleared makes making cycles parked parking".split())  # seldom a verb

CONNECTIVES = (
    "then", "next", "after", "afterwards", "afterward", "after that", "before", "while", "as", "when", "once", "until",
    "meanwhile", "subsequently", "finally", "later", "eventually", "soon", "soon after", "shortly after", "at first",
    "first", "initially", "because", "so", "since", "therefore", "thus", "due to", "as a result", "in response",
    "causing", "allowing", "leading to", "followed by", "at the same time", "suddenly", "gradually", "during",
    "moments later", "at last", "in the end", "in the beginning", "at the beginning", "simultaneously",
    "in turn", "thereafter", "before long", "by the end",
)
NOT_CONNECTIVES = (  # phrases whose words are no connectives
    "such as", "as well as", "as well", "as if", "as though", "so far", "same as", "next to", "the next", "the first",
    "the once", "so that", "not so", "as large as", "as long as", "as far as",
)

# ---------------------------------------------------------------------------------------------------------------------
# Grammar and negation

DETERMINERS = frozenset("a an the this that its their his her our my some any each every another one no".split())
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = frozenset("two three four five six seven eight nine ten several many few multiple various numerous".split())
PREPOSITIONS = frozenset("of in on at to from with by for into onto over under near behind between through "
                         "along across toward towards past around against among beside beyond within inside "
                         "outside off up down out about amid via upon above below".split())
AUXILIARIES = frozenset("is are was were be been being has have had do does did can could will would may might "
                        "must should isn't aren't wasn't weren't".split())
CONJUNCTIONS = frozenset("and or nor but while as when where which who that than then because so if until "
                         "before after although though however whereas since once yet except".split())
PRONOUNS = frozenset("it they he she we us them him there this these those both each you i its".split())
FUNCTION_WORDS = (
    DETERMINERS | PREPOSITIONS | AUXILIARIES | CONJUNCTIONS | PRONOUNS
    | frozenset("not also only just very too mostly instead still again".split())
)
BE = frozenset("is are was were be been being remain remains remained isn't aren't wasn't weren't".split())
# Words that begin a clause.
CLAUSE_WORDS = frozenset("while as when then before after until because but where whereas although though once "
                         "since so followed".split())
SIMULTANEOUS = frozenset("while as when where whereas because since so although though but".split())  # join two clauses
CONTINUING = frozenset("it they he she this both these".split())  # a sentence that begins so continues the one before
# After "crossing", these show that it is a verb.
CROSSING_WAYS = frozenset("the this from over safely slowly quickly hurriedly our his her their".split())

NEGATORS = (  # before the object that they deny
    "no", "without", "neither", "nor", "zero", "lacks", "lacking",
    "not any", "not a", "not an", "not one", "lack of", "lacking in", "absence of", "devoid of", "free of", "free from",
    "clear of", "empty of", "absent of", "void of", "bare of", "none of",
)
# Verbs of "does not show", "cannot see".
SHOWING = frozenset("show shows showcase display present include includes contain contains see feature "
                    "features depict reveal have involve encounter meet capture spot".split())
PSEUDO_NEGATIONS = (  # these look like a negation but are not
    "no longer", "not only", "not just", "not merely", "not simply", "no doubt", "no matter", "no sooner", "no fewer",
    "no less", "not far", "no different", "not without", "no time", "no wonder", "no fewer than", "no parking",
    "no entry", "no stopping", "no turn", "no left", "no right", "no u", "no standing", "no outlet", "no passing",
    "absence of the", "lack of the",
)
# "No movement from the cars": the cars are present.
ABSTRACT = frozenset("movement movements motion change changes activity sign signs delay collision contact "
                     "interaction interactions threat obstruction obstructions interference conflict conflicts "
                     "gap distance incident incidents impact difference reaction response space room way sound "
                     "hesitation issue issues need reason pause disruption disruptions interruption "
                     "interruptions shift shifts deviation indication adjustment adjustments".split())
# "No sign of pedestrians": the pedestrians are absent.
CARRIERS = frozenset("sign signs presence evidence trace traces visible indication sight view number lack "
                     "glimpse hint".split())
# "Are not visible", "cannot be seen": the verb, and the words of which one must follow.
POST_NEGATORS = BE | {"can", "cannot", "can't", "could", "couldn't"}
VISIBLE = frozenset("visible present seen detected observed there found evident noticeable apparent shown depicted "
                   "sighted discernible".split())
LIST_WORDS = frozenset("such like any a an other the or nor and single one".split())  # "no obstacles such as a car"
EXCEPTIONS = ("other than", "besides", "apart from", "aside from", "except", "except for", "but")
COLOURS_OF_LIGHT = frozenset("red green yellow amber".split())
# Words that may come between "light" and its colour.
CHANGING = frozenset("turn turns turned turning change changes changed changing switch switches switched has have "
                     "switching go goes went going is was becomes became stays stayed remains remained shows "
                     "showing showed transition transitions transitioned transitioning "
                     "still from to just now ahead then soon".split())
