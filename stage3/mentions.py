"""The parser: which objects a caption names or denies, and what it says about them.

`find_mentions(text)` returns every COCO object that a text names, with negation. `read_text(text)` returns the words
and the claims about objects behind those mentions. `read_caption(text)` adds what the reward needs: clauses, verbs,
attributes, scene facts and connectives. Whole words are compared, never substrings, and the longest phrase wins.

English only. All functions are pure, and their time is linear in the length of the text.
"""

import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from stage3 import vocabulary_config as vocab

# ---------------------------------------------------------------------------------------------------------------------
# The lexicon: phrases of the vocabulary with their plurals and verb forms, indexed by first word


class Entry(NamedTuple):
    kind: str  # "object", "any", "unverifiable" (see Claim), "neutral" (not an object) or "ego" (the camera's vehicle)
    classes: tuple[str, ...]


def plurals(phrase):
    """All forms of a singular phrase: "city bus" -> {"city bus", "city buses", "city busses"}."""
    if phrase in vocab.IRREGULAR_PLURALS:
        return {phrase, *vocab.IRREGULAR_PLURALS[phrase]}
    head, _, last = phrase.rpartition(" ")
    if last in vocab.IRREGULAR_PLURALS:
        ends = vocab.IRREGULAR_PLURALS[last]
    elif re.search(r"(s|x|ch|sh)$", last):
        ends = (last + "es",)
    elif re.search(r"[^aeiou]y$", last):
        ends = (last[:-1] + "ies",)
    else:
        ends = (last + "s",)
    return {phrase, *(f"{head} {end}".strip() for end in ends)}


def verb_forms(base):
    """Forms of a verb, without those that are usually other words: "stop" -> {"stop", "stops", "stopping", ...}."""
    third = base + ("es" if re.search(r"(s|x|ch|sh|o)$", base) else "s")
    stem = base + base[-1] if base in vocab.DOUBLED else base.removesuffix("e")
    past = stem + "ed"
    if re.search(r"[^aeiou]y$", base):
        third, past = base[:-1] + "ies", base[:-1] + "ied"
    forms = {third, stem + "ing", past, *vocab.IRREGULAR_VERBS.get(base, "").split()}
    if base not in vocab.NO_BARE_FORM:
        forms.add(base)
    return forms - vocab.NOT_VERBS


def _all_plurals(phrases):
    return frozenset(form for phrase in phrases for form in plurals(phrase))


def _index(meanings):
    """{"bus stop": x} -> {"bus": [(("bus", "stop"), x), ...]}, longest phrase first, for match_phrase."""
    index = {}
    for phrase, meaning in meanings.items():
        words = tuple(phrase.split())
        index.setdefault(words[0], []).append((words, meaning))
    for group in index.values():
        group.sort(key=lambda item: -len(item[0]))
    return index


def _build_lexicon():
    entries = dict.fromkeys(_all_plurals(vocab.NEUTRAL), Entry("neutral", ()))
    entries |= dict.fromkeys(vocab.EGO, Entry("ego", ()))
    entries |= dict.fromkeys(_all_plurals(vocab.BRANDS), Entry("any", vocab.BRAND_CLASSES))
    for owner in vocab.EGO_OWNERS:
        entries |= dict.fromkeys((f"{owner} vehicle", f"{owner} car"), Entry("ego", ()))
    for table, kind in ((vocab.ANY_OF, "any"), (vocab.UNVERIFIABLE, "unverifiable"), (vocab.SEVERAL, "object")):
        for phrase, classes in table.items():
            entries |= dict.fromkeys(plurals(phrase), Entry(kind, classes))
    for name in vocab.COCO_NAMES:
        phrases = (name, *vocab.SYNONYMS.get(name, ()))
        entries |= dict.fromkeys(_all_plurals(phrases), Entry("object", (name,)))
    return _index(entries)


def _build_scene_index():
    facts = {}
    for category, values in vocab.SCENE.items():
        for value, phrases in values.items():
            facts |= dict.fromkeys(phrases, (category, value))
    return _index(facts)


IRREGULAR_FORMS = frozenset(word for forms in vocab.IRREGULAR_VERBS.values() for word in forms.split())
_OBJECT_TABLES = (vocab.COCO_NAMES, *vocab.SYNONYMS.values(), vocab.SEVERAL, vocab.ANY_OF, vocab.UNVERIFIABLE)

LEXICON = _build_lexicon()
SINGULAR = frozenset(phrase.split()[-1] for table in _OBJECT_TABLES for phrase in table) - {
    "people", "skis", "scissors", "cattle"}
BRAND_FORMS = _all_plurals(vocab.BRANDS)
GUARDED_FORMS = _all_plurals(vocab.GUARDED)
HEADS = {word: _all_plurals(nouns.split()) for word, nouns in vocab.COMPOUND_HEADS.items()}
VERB_OF = {form: base for base in vocab.DYNAMIC_VERBS for form in verb_forms(base)}
EVENT_OF = {form: base for base in vocab.EVENT_VERBS for form in verb_forms(base)}
ATTRIBUTE_OF = {word: category for category, words in vocab.ATTRIBUTES.items() for word in words.split()}
SCENE_INDEX = _build_scene_index()
SAME = {word: group.split()[0] for table in (vocab.SAME_ATTRIBUTE, vocab.SAME_VERB) for group in table
        for word in group.split()}  # a word -> the word that stands for all that say the same
SUBTYPE_WORDS = frozenset().union(*(_all_plurals(words.split()) for words in vocab.SUBTYPES.values()))
CONNECTIVE_WORDS = frozenset(phrase for phrase in vocab.CONNECTIVES if " " not in phrase)
CONNECTIVE_INDEX = _index(
    dict.fromkeys(vocab.CONNECTIVES, "connective") | dict.fromkeys(vocab.NOT_CONNECTIVES, "other"))
NEGATOR_INDEX = _index(dict.fromkeys(vocab.NEGATORS, "negation") | dict.fromkeys(vocab.PSEUDO_NEGATIONS, "pseudo"))
LIGHT_VERBS = frozenset(vocab.LIGHT_VERBS.split())
VEHICLES = frozenset({"car", "truck", "bus", "motorcycle"})
SIDE_KINDS = {"from": "from", "on": "side", "in": "side", "at": "side", "to": "to", "towards": "to", "toward": "to",
              "into": "to"}
BEFORE_SIDE = frozenset("the our its my his her their far near".split())
MOTION_WORDS = {
    "oncoming": "approaches", "approach": "approaches", "approaches": "approaches", "approaching": "approaches",
    "recede": "recedes", "recedes": "recedes", "receding": "recedes", "cross": "crosses", "crosses": "crosses",
    "crossing": "crosses", "crossed": "crosses", "parked": "stands", "stationary": "stands",
}
PHRASE_INDEX = _index({phrase: verb for verb, phrases in vocab.PHRASE_VERBS.items() for phrase in phrases})
EXCEPTION_INDEX = _index(dict.fromkeys(vocab.EXCEPTIONS, "exception"))

# ---------------------------------------------------------------------------------------------------------------------
# What the parser returns


class Mention(NamedTuple):
    """One object named by a text. object is a COCO name, text[start:end] the words that name it."""

    object: str
    negated: bool
    start: int
    end: int


class Claim(NamedTuple):
    """What one phrase says is present, or, if negated, absent.

    kind: "object" (all of classes), "any" (one of classes: "van"), "unverifiable" (a special kind of one of classes:
    "ambulance").
    """

    kind: str
    classes: tuple[str, ...]
    negated: bool
    first: int  # index of the first word
    last: int  # index of the last word
    flat: bool = False  # a denial without limits: "no cars anywhere", not "no cars in the left lane"


class Fact(NamedTuple):
    """What a text says of a class that it names and that evidence can decide.

    kind and value: "colour" (of a vehicle; "red|white" for either), "light" (red, amber, green), "count" (a number, 0
    for several), "side" (left, right: where it is), "from" and "to" (left, right: where it comes from or goes),
    "motion" ("approaches", "recedes", "crosses", "stands").
    """

    classes: tuple[str, ...]  # any one of them
    kind: str
    value: str | int
    first: int  # index of the first word
    last: int  # index of the last word


class Statement(NamedTuple):
    """A verb or an attribute and what it is said of, to be compared with what a reference caption says.

    subject: classes, ("ego",) for the camera's own vehicle, or () where the text names nothing that we know. kind: a
    key of vocab.ATTRIBUTES, "verb", "event" (vocab.EVENT_VERBS) or "subtype". value: the word, or the one in SAME that
    stands for it.
    """

    subject: tuple[str, ...]
    kind: str
    value: str
    word: int  # index


@dataclass
class Reading:
    """The words of a text. Lists are parallel: words[i] is text[starts[i]:ends[i]] in lower case."""

    words: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    breaks: list[int] = field(default_factory=list)  # what separates the word from the one before: NO_BREAK .. STOP
    roles: list[str] = field(default_factory=list)  # the kind of the phrase that the word belongs to, or ""
    claims: list[Claim] = field(default_factory=list)  # in the order of the text
    one_sentence: bool = True
    first_car: int | None = None  # index of the first "car" or "cars"


@dataclass
class Clause:
    """The words [first, stop) of a caption, from one comma, stop or clause word to the next."""

    first: int
    stop: int
    claims: list[Claim]
    ego: bool  # names the camera's own vehicle
    verbs: list[str]  # base forms of its verbs of motion
    # Set by the reward's mark_clauses. "object": names something present and nothing absent; "ego": the camera's own
    # motion; "false": names something absent or denies something present; "": none of these.
    truth: str = ""

    @property
    def span(self):
        return range(self.first, self.stop)

    @property
    def is_true(self):
        return self.truth in ("object", "ego")


@dataclass
class Caption(Reading):
    """A text as the reward reads it. Lists are parallel to words, except sentences."""

    verbs: list[str] = field(default_factory=list)  # base form of a verb of motion, or ""
    attributes: list[str] = field(default_factory=list)  # category of an attribute, or ""
    scenes: list[tuple[str, str] | None] = field(default_factory=list)  # (category, value) of the scene fact here
    connectives: list[str] = field(default_factory=list)  # the connective that begins here, or ""
    sentences: list[list[Clause]] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)

    @property
    def clauses(self):
        return [clause for sentence in self.sentences for clause in sentence]


# ---------------------------------------------------------------------------------------------------------------------
# Words

NO_BREAK, HYPHEN, COMMA, STOP = range(4)
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+(?:[.,]\d+)*")
CONTRACTIONS = frozenset({"there's", "it's", "that's"})  # their "'s" is a verb, not an owner
SENTENCE_END = re.compile(r"[.!?;:…。]")


def _break_of(gap):
    """The kind of break that the characters between two words make."""
    if gap in (" ", ""):
        return NO_BREAK
    if SENTENCE_END.search(gap):
        return STOP
    if gap in ("-", "‐", "‑"):
        return HYPHEN
    return COMMA if gap.strip().strip("\"'“”‘’*_#").strip() else NO_BREAK  # any white space, of any width


def _split_words(text):
    """Reading of a text with words and breaks only. "car's" becomes the two words "car" and "s"."""
    reading, previous_end = Reading(), 0
    for match in WORD.finditer(text):
        start, end = match.span()
        word = match.group().lower().replace("’", "'")
        gap = _break_of(text[previous_end:start])
        pieces = [(word, start, end, gap)]
        if word.endswith("'s") and word not in CONTRACTIONS:
            pieces = [(word[:-2], start, end - 2, gap), ("s", end - 1, end, NO_BREAK)]
        for piece, first, last, break_before in pieces:
            reading.words.append(piece)
            reading.starts.append(first)
            reading.ends.append(last)
            reading.breaks.append(break_before)
        previous_end = end
    reading.roles = [""] * len(reading.words)
    reading.one_sentence = STOP not in reading.breaks[1:]
    reading.first_car = next((i for i, word in enumerate(reading.words) if word in ("car", "cars")), None)
    return reading


def match_phrase(index, reading, i):
    """(length, meaning) of the longest phrase of an index that starts at word i; (0, None) if there is none."""
    words, breaks = reading.words, reading.breaks
    for phrase, meaning in index.get(words[i], ()):
        end = i + len(phrase)
        if tuple(words[i:end]) == phrase and max(breaks[i + 1:end], default=NO_BREAK) < COMMA:
            return len(phrase), meaning
    return 0, None


def _word(reading, i):
    """Word i, or "" outside the text."""
    return reading.words[i] if 0 <= i < len(reading.words) else ""


def _word_before(reading, i):
    """The word before word i in its clause, or ""."""
    return reading.words[i - 1] if i and reading.breaks[i] < COMMA else ""


def _ends_clause(reading, i):
    """Word i begins a new clause or is past the end of the text."""
    return i >= len(reading.words) or reading.breaks[i] >= COMMA


# ---------------------------------------------------------------------------------------------------------------------
# Phrases that depend on their neighbours

# "from inside a moving car": the camera's own car comes after one of these.
EGO_BEFORE = re.compile(
    r"\b(inside|within|aboard|interior of|interior|equipped|perspective of|viewpoint of|vantage point of|"
    r"view of someone in|point of view of|mounted in|mounted on|windshield of|windscreen of|dashboard of|hood of|from)"
    r"(?: (?:a|an|the|another))?(?: (?P<state>moving|driving|stationary|travelling|traveling|stopped|parked))?$"
)
# "from the perspective of someone inside a vehicle": someone who looks, not a person in the picture.
VIEW_WORDS = frozenset("inside within aboard interior equipped perspective viewpoint point view mounted windshield "
                       "windscreen dashboard hood from".split())  # each match of these patterns has one
VIEWER_BEFORE = re.compile(r"\b(perspective|viewpoint|vantage point|point of view) of(?: (?:a|an|the))?$")


def _is_compound(reading, first, head):
    """The object's name at word first and the noun at word head name something else ("bus stop", "bicycle shop").

    "A bus stops ahead" and "Pedestrian crossing." name an object and what it does; "bus stops line the street" and "a
    pedestrian crossing" name a place. The neighbouring words decide.
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
    if noun in ("stops", "parks", "lines", "stands"):  # a verb, unless it is the plural of a place
        plural_before = vocab.NUMBERS | vocab.PREPOSITIONS | {"these", "those", "some", "all", "other", "and"}
        if not opens and before in plural_before:
            return True
        return not ends and (after in vocab.AUXILIARIES or after in ("line", "dot", "appear"))
    if noun == "parking":
        return before not in ("a", "another", "one")  # "a car parking ahead"
    if noun == "crossing":
        if before in ("brief", "quick", "slow", "hurried", "sudden"):  # "a brief pedestrian crossing": an event
            return False
        if not ends and after in vocab.CROSSING_WAYS:  # "pedestrians crossing the road"
            return False
        return not opens or not (ends or after in ("ahead", "in", "left", "right", "while", "as", "and"))
    return True


def _is_plain_noun(reading, i):
    """A guarded word is a noun here: "an orange is there", not "an orange car", "bears left" or "in orange"."""
    word, before, after = reading.words[i], _word_before(reading, i), _word(reading, i + 1)
    determined = before in vocab.DETERMINERS | vocab.NUMBERS
    if word in ("semi", "coach", "tanker", "cab") and before in ("", "and"):
        return ATTRIBUTE_OF.get(after) == "position" or after in VERB_OF
    if word not in vocab.GUARDED:  # a plural; if it may be a verb, only after a determiner
        return determined or word not in vocab.GUARDED_VERBS
    if not determined and not (_word(reading, i - 2) in vocab.DETERMINERS and before in ATTRIBUTE_OF):
        return False
    if _ends_clause(reading, i + 1) or ATTRIBUTE_OF.get(after) == "position" or after in VERB_OF:
        return True
    return after in vocab.FUNCTION_WORDS and after not in ("and", "or", "one")


def _is_light(reading, i):
    """A bare "light" or "signal" is a traffic light if it has a signal's colour or changes to one."""
    word, before, after = reading.words[i], _word_before(reading, i), _word(reading, i + 1)
    if before == "at" and word != "signal" or before == "the" and _word(reading, i - 2) == "at" and word == "lights":
        return _ends_clause(reading, i + 1)  # "wait at light", "queue at the lights"
    if word in ("signal", "lights") and after in vocab.COLOURS_OF_LIGHT and _ends_clause(reading, i + 2):
        return True  # "lights green", "Signal: red."
    if word == "signal" and not before and after in ("out", "ahead", "dark"):
        return True
    if word == "signal":
        return before in vocab.ARTICLES | vocab.COLOURS_OF_LIGHT | {"this", "that", "each"}
    if word == "signals":
        return before in vocab.COLOURS_OF_LIGHT | {"the", "these", "through", "at", "overhead"}
    if before in vocab.COLOURS_OF_LIGHT:
        if word == "light":  # not "the red light from a shop"
            return after not in ("from", "of", "reflecting", "reflections")
        return after in ("ahead", "at", "turn", "change") or _word(reading, i - 2) == "at"  # not "red lights glow"
    if ATTRIBUTE_OF.get(before) == "colour":
        return False
    for j in range(i + 1, i + 6):
        if _ends_clause(reading, j):
            return False
        if reading.words[j] in vocab.COLOURS_OF_LIGHT:  # right after "light", only at a clause's end: "light red, stop"
            return j > i + 1 or word == "light" and _ends_clause(reading, j + 1)
        if reading.words[j] not in vocab.CHANGING:
            return False
    return False


def _is_ego(reading, i, length, entry):
    """This "car" or "vehicle" carries the camera, or this "someone" looks out of it."""
    if _word(reading, i + length - 1) not in SINGULAR:
        return False
    before = reading.words[max(0, i - 6):i]
    context = "" if VIEW_WORDS.isdisjoint(before) else " ".join(before)
    if "person" in entry.classes:
        return VIEWER_BEFORE.search(context) is not None
    if entry.classes[0] != "car":
        return False
    match = EGO_BEFORE.search(context)
    if match and (match.group(1) != "from" or match.group("state") in ("moving", "driving", "travelling", "traveling")):
        return True
    after = i + length
    if _word(reading, after) == "s" and not _ends_clause(reading, after):
        after += 1
    return _word(reading, after) in vocab.EGO_AFTER and not _ends_clause(reading, after)


def _is_own_vehicle(reading, i, length):
    """ "The vehicle" alone is the camera's; "the vehicle ahead", "a vehicle" and "vehicles" are others."""
    if length != 1 or _word(reading, i) != "vehicle" or _word(reading, i - 1) not in ("the", "this"):
        return False
    after = _word(reading, i + 1), _word(reading, i + 2)
    return after[0] not in vocab.OTHER_VEHICLE and after not in (("in", "front"), ("on", "the"))


def _describes_vehicle(reading, i):
    """A vehicle's name follows the make at word i: "a Toyota truck", "a Toyota Highlander SUV"."""
    for j in range(i + 1, min(i + 4, len(reading.words))):
        if reading.breaks[j] >= COMMA or reading.words[j] in vocab.FUNCTION_WORDS:
            return False
        if reading.words[j] in BRAND_FORMS or LEXICON.get(reading.words[j]) and match_phrase(LEXICON, reading, j)[0]:
            return True
    return False


def _is_recorders_car(reading, i, length):
    """ "The car" at the beginning of a text of one sentence, or after "so", is the camera's own, as in reports of what
    the driver did: "The car slows down because the light is red." Not "the car ahead", nor "the car moves ahead"."""
    words = reading.words
    if length != 1 or words[i] != "car" or i < 1 or words[i - 1] != "the" or _ends_clause(reading, i + 1):
        return False
    if i > 1 and words[i - 2] != "so" or not reading.one_sentence or reading.first_car < i:
        return False
    if {"ahead", "front"} & set(words[i:i + 6]):
        return False
    after = words[i + 1]
    return after in VERB_OF or after in ("was", "had") or after.endswith("s") and after not in ("s", "does")


def _classify(reading, i):
    """(length, entry) of the phrase at word i, considering its neighbours; (0, None) if word i is a plain word."""
    length, entry = match_phrase(LEXICON, reading, i)
    word = reading.words[i]
    if not length:
        is_light = word in ("light", "lights", "signal", "signals") and _is_light(reading, i)
        return (1, Entry("object", ("traffic light",))) if is_light else (0, None)
    if entry.kind in ("neutral", "ego"):
        return length, entry
    if word in BRAND_FORMS and _describes_vehicle(reading, i):
        return 0, None
    if length == 2 and word == "pick" and reading.breaks[i + 1] != HYPHEN and not (
            _word_before(reading, i) in vocab.DETERMINERS or _word_before(reading, i) in ATTRIBUTE_OF):
        return 0, None  # "pick up passengers"
    if word in GUARDED_FORMS and length == 1 and not _is_plain_noun(reading, i):
        return 0, None
    own = entry.kind == "any" and _is_own_vehicle(reading, i, length) or _is_recorders_car(reading, i, length)
    if own or _is_ego(reading, i, length, entry):
        return length, Entry("ego", ())
    if entry.classes[0] not in ("traffic light", "stop sign"):
        head = i + length
        while _is_compound(reading, i, head):  # "pedestrian crossing sign" has two head nouns
            head += 1
        if head > i + length:
            return head - i, Entry("neutral", ())
    return length, entry


# ---------------------------------------------------------------------------------------------------------------------
# Negation. `phrases` maps the first word of each claim's phrase to its last word, in the order of the text.


def _continues_list(reading, left, first, last):
    """The phrase first..last continues the list whose previous item ends at word left: "cars, trucks or buses"."""
    between, breaks = reading.words[left + 1:first], reading.breaks[left + 1:first + 1]
    joins = {word for word in between if word in ("or", "nor", "and")}
    others = {word for word in between if word not in joins}
    if len(between) > 4 or STOP in breaks or not joins and COMMA not in breaks:
        return False
    if any(word in VERB_OF and word not in ATTRIBUTE_OF for word in others):
        return False
    determined = not others.isdisjoint(vocab.FUNCTION_WORDS | vocab.NUMBERS)
    bare = others <= {"a", "an", "any", "other", "single"}
    if joins & {"or", "nor"}:
        return bare or not determined
    ends, after = _ends_clause(reading, last + 1), _word(reading, last + 1)
    if determined and (joins or not bare or after in vocab.BE):  # "no cars and a bus", "no cars, a bus is there"
        return False
    if not ends and after in VERB_OF and not reading.roles[last + 1]:  # "no cars and buses pass"
        return False
    return bool(joins) or ends or after in ("or", "and", "nor")


def _phrase_after(reading, phrases, i):
    """First word of the phrase denied by a negator that ends before word i, or None."""
    carried = False
    for j in range(i, min(i + 9, len(reading.words))):
        word = reading.words[j]
        if reading.breaks[j] == STOP or reading.breaks[j] == COMMA and word not in ("or", "nor"):
            return None
        if j in phrases:
            return j
        if word == "without" or match_phrase(EXCEPTION_INDEX, reading, j)[0]:
            return None
        if j == i and word.endswith("ing") and word not in ("oncoming", "encountering", "seeing", "showing"):
            return None  # "without stopping for the bus"
        if word in vocab.LIST_WORDS or word == "of" and carried or word == "as" and _word(reading, j - 1) == "such":
            continue
        carried = carried or word in vocab.CARRIERS
        is_verb = word in VERB_OF and word not in ATTRIBUTE_OF
        if word in vocab.FUNCTION_WORDS or word in vocab.ABSTRACT - vocab.CARRIERS or is_verb:
            return None
    return None


def _subject_before(reading, phrases, i):
    """First word of the phrase that is the subject of "are not visible", whose verb is word i, or None."""
    lowest = i
    while lowest > 0 and i - lowest < 12:
        word = reading.words[lowest - 1]
        if reading.breaks[lowest] == STOP or word in VERB_OF and reading.roles[lowest - 1] == "":
            break
        if word in vocab.BE or word in ("while", "as", "but", "when", "although", "though", "where", "however", "so"):
            break
        lowest -= 1
    candidates = [first for first in range(lowest, i) if first in phrases and phrases[first] < i]
    for subject, following in pairwise(candidates):  # "as the car turns, pedestrians are not visible": not the car
        last = phrases[subject]
        if COMMA not in reading.breaks[last + 1:following + 1]:
            return subject
        if _continues_list(reading, last, following, phrases[following]):
            return subject
    return candidates[-1] if candidates else None


def _denies_subject(reading, i):
    """The verb at word i begins a denial of its subject: "are not visible", "is absent", "is nowhere to be seen"."""
    rest = []
    for j in range(i + 1, i + 6):
        if _ends_clause(reading, j):
            break
        rest.append(reading.words[j])
    if not {"longer", "only", "just", "yet", "always", "fully", "entirely", "completely"}.isdisjoint(rest):
        return False
    verb = reading.words[i]
    if verb in vocab.BE and not {"absent", "missing", "nowhere"}.isdisjoint(rest[:2]):
        return True
    negative = verb.endswith("n't") or verb == "cannot" or not {"not", "never"}.isdisjoint(rest[:2])
    return negative and not vocab.VISIBLE.isdisjoint(rest[:4])


def _is_double(reading, i):
    """The negator at word i is cancelled: "no road without a car", "it is not true that no car is there"."""
    before = reading.words[max(0, i - 5):i]
    if reading.words[i] == "without":
        return not {"no", "not", "never"}.isdisjoint(before)
    return "true that" in " ".join(before) and "not" in before or "false that" in " ".join(before)


def _denied_after(reading, phrases, i):
    """First word of the phrase denied by the negator at word i ("no cars", "does not show a car"), or None."""
    word, following = reading.words[i], _word(reading, i + 1)
    if reading.roles[i] == "object":
        return i if word in ("no", "nobody") else None  # "no one", "nobody"
    length, kind = match_phrase(NEGATOR_INDEX, reading, i)
    if kind == "pseudo":  # "no parking", but "no parking meter"
        return _phrase_after(reading, phrases, i + 1) if reading.roles[i + 1] == "object" else None
    if kind == "negation":
        return None if _is_double(reading, i) else _phrase_after(reading, phrases, i + length)
    if word in ("not", "cannot") or word.endswith("n't"):
        if following in vocab.SHOWING:
            return _phrase_after(reading, phrases, i + 2)
        if following in ("any", "a", "an"):
            return _phrase_after(reading, phrases, i + 1)
        if _word(reading, i + 2) == "any":  # "does not reveal any"
            return _phrase_after(reading, phrases, i + 2)
    return None


def _denied_phrases(reading, phrases):
    """First words of the phrases that the text denies."""
    denied = set()
    if not phrases:
        return denied
    for i, word in enumerate(reading.words):
        target = _denied_after(reading, phrases, i)
        if target is None and word in vocab.POST_NEGATORS and _denies_subject(reading, i):
            target = _subject_before(reading, phrases, i)
        if target is not None:
            denied.add(target)
    for previous, first in pairwise(phrases):  # the rest of a list whose first item is denied
        if previous in denied and _continues_list(reading, phrases[previous], first, phrases[first]):
            denied.add(first)
    for first, last in phrases.items():
        if _word(reading, last + 1) == "free" and reading.breaks[last + 1] == HYPHEN:  # "car-free"
            denied.add(first)
    return denied


# ---------------------------------------------------------------------------------------------------------------------
# Whole texts


def read_text(text):
    """Reading of a text: its words, their roles and its claims about objects."""
    reading = _split_words(text)
    claims, i = [], 0
    while i < len(reading.words):
        length, entry = _classify(reading, i)
        if not length:
            i += 1
            continue
        last = i + length - 1
        reading.roles[i:last + 1] = [entry.kind] * length
        if entry.classes:
            claims.append(Claim(entry.kind, entry.classes, False, i, last))
        if entry.kind == "any" and reading.words[i].rstrip("s") in vocab.WITH_PERSON:
            claims.append(Claim("object", ("person",), False, i, last))
        i = last + 1
    denied = _denied_phrases(reading, {claim.first: claim.last for claim in claims})
    reading.claims = [claim._replace(negated=True, flat=_is_flat(reading, claim)) if claim.first in denied else claim
                      for claim in claims]
    return reading


def _is_flat(reading, claim):
    """A denial that nothing between its commas limits to a time, a place or a kind."""
    if reading.words[claim.first] in ("nobody", "no"):  # "nobody is on the road": some may be beside it
        return False
    first, stop = claim.first, claim.last + 1
    while first > 0 and reading.breaks[first] < COMMA and claim.first - first < 12:
        first -= 1
    while not _ends_clause(reading, stop) and stop - claim.last < 12:
        stop += 1
    around = reading.words[first:claim.first] + reading.words[claim.last + 1:stop]
    return not any(word in vocab.DENIAL_LIMITS or word in ATTRIBUTE_OF or word in CONNECTIVE_WORDS for word in around)


def names_object(claim):
    """The claim names its classes: "fire truck" names a truck; "ambulance" and "van" name no particular class."""
    return claim.kind == "object" or claim.kind == "unverifiable" and len(claim.classes) == 1


def find_mentions(text):
    """Every COCO object that the text names, in the order of the text -> list[Mention].

    "cyclist" gives two mentions with the same span. Words that several classes satisfy ("vehicle", "van") and the
    camera's own vehicle give none. A hedged mention ("possibly a bus") is a mention.
    """
    reading, mentions = read_text(text), []
    for claim in filter(names_object, reading.claims):
        start, end = reading.starts[claim.first], reading.ends[claim.last]
        mentions += [Mention(name, claim.negated, start, end) for name in claim.classes]
    return mentions


def read_caption(text):
    """Caption of a text: its reading with verbs, attributes, scene facts, connectives and clauses."""
    caption = Caption(**vars(read_text(text)))
    inside_phrase = set()  # words of connectives and similar phrases that begin no clause
    for i, (word, role) in enumerate(zip(caption.words, caption.roles, strict=True)):
        is_verb = not role and word in VERB_OF and _is_verb(caption, i)
        is_command = word in vocab.COMMANDS and (i == 0 or caption.breaks[i] >= COMMA)
        phrase = "" if role else match_phrase(PHRASE_INDEX, caption, i)[1]
        caption.verbs.append(phrase or (VERB_OF[word] if is_verb else word if is_command else ""))
        caption.attributes.append("" if role else ATTRIBUTE_OF.get(word, ""))
        denied = i > 0 and caption.words[i - 1] in ("no", "not", "without")
        caption.scenes.append(None if denied else match_phrase(SCENE_INDEX, caption, i)[1])
        connective = ""
        if i not in inside_phrase:
            length, kind = match_phrase(CONNECTIVE_INDEX, caption, i)
            if kind == "connective":
                connective = " ".join(caption.words[i:i + length])
                inside_phrase.update(range(i + 1, i + length))  # "soon after": "after" begins no clause
            elif kind == "other":
                inside_phrase.update(range(i, i + length))  # "such as": nor does "as"
        caption.connectives.append(connective)
    caption.sentences = _split_sentences(caption, inside_phrase)
    caption.statements = find_statements(caption)
    caption.facts = find_facts(caption)
    return caption


def _is_verb(reading, i):
    """The form of a verb at word i is one: not "the flow of", "changes in", "appears to be", "the video starts"."""
    word, before, after = reading.words[i], _word_before(reading, i), _word(reading, i + 1)
    if word in ("appear", "appears", "appeared", "appearing") and after == "to":
        return False
    if before in vocab.VIDEO_WORDS or before in vocab.BE and _word(reading, i - 2) in vocab.VIDEO_WORDS:
        return False
    if word.endswith(("ing", "ed")) or word in IRREGULAR_FORMS:
        return True
    if before in vocab.DETERMINERS | vocab.NOUN_BEFORE or ATTRIBUTE_OF.get(before) in ("size", "colour"):
        return False
    if before == "lane" and VERB_OF[word] == "change" or after == "of":
        return False
    is_plural = word.endswith("s") and not (i and reading.roles[i - 1])  # "changes in", but "the car stops in"
    return not (is_plural and after == "in")


def _split_sentences(caption, inside_phrase):
    """The clauses of each sentence."""
    claims_at = {}  # first word -> claims
    for claim in caption.claims:
        claims_at.setdefault(claim.first, []).append(claim)
    starts = []
    for i, word in enumerate(caption.words):
        clause_word = word in vocab.CLAUSE_WORDS and i not in inside_phrase
        if i == 0 or caption.breaks[i] >= COMMA or clause_word:
            starts.append(i)
    sentences = []
    for first, stop in pairwise([*starts, len(caption.words)]):
        if first == 0 or caption.breaks[first] == STOP:
            sentences.append([])
        claims = [claim for i in range(first, stop) for claim in claims_at.get(i, ())]
        verbs = [verb for verb in caption.verbs[first:stop] if verb]
        sentences[-1].append(Clause(first, stop, claims, "ego" in caption.roles[first:stop], verbs))
    return sentences


# ---------------------------------------------------------------------------------------------------------------------
# What a caption says of the objects that it names


def _subject_of(named, i, begins=0):
    """What the verb at word i is said of: the first thing that its clause names before it ("a car behind a truck
    brakes"), else the first after it ("behind us follows a car"); None if the clause names nothing. begins: where a
    second subject may begin ("a bus stops and the ego vehicle passes it")."""
    if not named:
        return None
    second = next((subject for first, subject in named if begins < first < i), None) if begins else None
    if second:
        return second
    return named[0][1] if named[0][0] < i else next((subject for first, subject in named if first > i), None)


def find_statements(caption):
    """Every verb, attribute and special kind in clauses that deny nothing -> list[Statement], in the order of the text.

    A clause that names nothing speaks of what the clause before it in its sentence spoke of ("slows, then stops") or,
    after "it" and "they", of what the sentence before did.
    """
    statements, subject = [], None
    for clauses in caption.sentences:
        if not _continues(caption, clauses[0]):
            subject = None
        for clause in clauses:
            own = [claim for claim in clause.claims if claim.kind == "object" and not claim.negated]
            named = [(claim.first, claim.classes) for claim in clause.claims if not claim.negated]
            if clause.ego:
                named += [(i, ("ego",)) for i in clause.span if caption.roles[i] == "ego"]
            named.sort()
            verb_subject, begins = None, 0  # begins: at an "and" after a verb
            for i in clause.span:
                if caption.words[i] == "and" and (verb_subject or "ego" in caption.roles[i + 1:i + 3]):
                    begins = i
                if kind := "verb" if caption.verbs[i] else "event" if _is_event(caption, i) else "":
                    if _is_about_road(caption, i):
                        continue
                    known = ("ego",) if _is_command(caption, clause, i) else _subject_of(named, i, begins)
                    verb_subject = known or (not has_own_subject(caption, clause) and subject) or ()
                    statements.append(Statement(verb_subject, kind, _verb_value(caption, i, verb_subject), i))
                if own and caption.attributes[i]:
                    value = SAME.get(caption.words[i], caption.words[i])
                    statements.append(Statement(_nearest(own, i).classes, caption.attributes[i], value, i))
            for claim in own:
                statements += _subtypes(caption, claim)
            if clause.claims or clause.ego:
                subject = verb_subject or _subject_of(named, clause.stop)
    return statements


def _continues(caption, clause):
    """The sentence of this first clause goes on about what the one before spoke of: "It turns", "Then it stops"."""
    connective = caption.connectives[clause.first]
    after = _word(caption, clause.first + len(connective.split()))
    return caption.words[clause.first] in vocab.CONTINUING or connective != "" and after in ("it", "they")


def has_own_subject(caption, clause):
    """A determiner comes before the clause's first verb: "while a figure waits", not "at the corner"."""
    verb = next((i for i in clause.span if caption.verbs[i] or _is_event(caption, i)), clause.first)
    skipped = len(caption.connectives[clause.first].split())  # "after that it leaves": "that" determines nothing
    start = clause.first + max(skipped, caption.words[clause.first] in vocab.CONTINUING)
    return not vocab.DETERMINERS.isdisjoint(caption.words[start:verb])


def _is_about_road(caption, i):
    """The verb at word i is said of the road: "the road goes on", "traffic flows"."""
    return i > 0 and caption.words[i - 1] in vocab.PLACES


def _is_command(caption, clause, i):
    """Word i tells the driver what to do: ", stop", ". Yield to ...", ", come to a stop"."""
    begins = i == clause.first and caption.breaks[i] >= COMMA
    return begins and caption.verbs[i] != "" and caption.words[i] in (caption.verbs[i], "come")  # "come to a stop"


def _is_event(caption, i):
    return not caption.roles[i] and caption.words[i] in EVENT_OF and not caption.attributes[i]


def _verb_value(caption, i, subject):
    base = caption.verbs[i] or EVENT_OF[caption.words[i]]
    if subject == ("traffic light",) and base in LIGHT_VERBS:
        return "change"
    value, way = SAME.get(base, base), _word(caption, i + 1)
    return f"{value} {way}" if value == "turn" and way in ("left", "right") else value


def _nearest(claims, i):
    """The claim nearest to word i; one after it wins a tie ("the car behind a large truck")."""
    return min(claims, key=lambda claim: claim.first - i if claim.first > i else i - claim.last + 0.5)


def _subtypes(caption, claim):
    """The statement that an object is of a special kind ("dump truck", "taxi"), if the text makes it."""
    words = caption.words[claim.first:claim.last + 1]
    marks = SUBTYPE_WORDS if len(words) == 1 else SUBTYPE_WORDS | vocab.SUBTYPE_MARKS
    mark = next((word for word in words if word in marks), None)
    return [Statement(claim.classes, "subtype", mark.rstrip("s"), claim.first)] if mark else []


def find_facts(caption):
    """What the text says of the objects that it names and evidence can decide -> list[Fact], in the order of the text.

    Only plain statements count: what is denied, and what is waited for ("until the light turns green"), is no fact.
    """
    facts, light = [], None  # light: the sentence's last traffic light, for "it turns red, then green"
    for clauses in caption.sentences:
        if not _continues(caption, clauses[0]):
            light = None
        for clause in clauses:
            if caption.words[clause.first] == "until":
                continue
            named = [claim for claim in clause.claims if not claim.negated and claim.kind in ("object", "any")]
            taken = set()  # words of noun phrases, which say nothing of other objects
            for claim in named:
                facts += _noun_phrase_facts(caption, claim, taken)
            for claim in named or ([light] if light and not clause.ego else []):
                if "traffic light" in claim.classes:
                    light = claim
                    facts += _light_facts(caption, clause, claim, taken)
            if named:
                facts += _predicate_facts(caption, clause, named, taken)
    return sorted(facts, key=lambda fact: fact.first)


def _noun_phrase_facts(caption, claim, taken):
    """Facts of the words before an object's name: "two red cars", "an oncoming truck", "a green light"."""
    facts, first, words = [], claim.first, caption.words
    while first > 0 and claim.first - first < 6 and caption.breaks[first] < COMMA and not caption.roles[first - 1]:
        word = words[first - 1]
        joins = word == "and" and ATTRIBUTE_OF.get(words[first]) == "colour"
        joins = joins and _word(caption, first - 3) not in VERB_OF  # not "turns red and white cars stop"
        of = word == "of" and first > 1 and words[first - 2] in vocab.COUNTS
        if word in vocab.FUNCTION_WORDS - vocab.NUMBERS and not joins and not of or caption.connectives[first - 1]:
            break
        first -= 1
    phrase = range(first, claim.first)
    taken.update(phrase)
    colours = [i for i in phrase if words[i] in vocab.VEHICLE_COLOURS]
    if "traffic light" in claim.classes:
        facts += [_fact(claim, "light", _signal(words[i]), i) for i in colours if words[i] in vocab.COLOURS_OF_LIGHT]
    elif colours and VEHICLES.issuperset(claim.classes):
        value = "|".join(vocab.VEHICLE_COLOURS[words[i]] for i in colours)
        facts.append(_fact(claim, "colour", value, colours[0], colours[-1]))
    for i in phrase:
        if words[i] in vocab.COUNTS and claim.kind == "object":
            facts.append(_fact(claim, "count", vocab.COUNTS[words[i]], i))
        elif words[i].isdigit() and claim.kind == "object" and 1 < int(words[i][:3]) < 100:
            facts.append(_fact(claim, "count", int(words[i][:3]), i))
        elif words[i] in MOTION_WORDS:
            facts.append(_fact(claim, "motion", MOTION_WORDS[words[i]], i))
    return facts


def _light_facts(caption, clause, claim, taken):
    """Colours that the clause gives to a traffic light: "the light turns green", "the signal is red, then green"."""
    facts = []
    for i in clause.span:
        if caption.words[i] in vocab.COLOURS_OF_LIGHT and i not in taken and not caption.roles[i]:
            noun = _word(caption, i + 1) if not _ends_clause(caption, i + 1) else ""
            if noun in vocab.FUNCTION_WORDS or noun in ATTRIBUTE_OF or not noun or VERB_OF.get(noun):
                taken.add(i)
                facts.append(_fact(claim, "light", _signal(caption.words[i]), i))
    return facts


def _predicate_facts(caption, clause, named, taken):
    """Facts of verbs and of "is": "the car is white", "crosses from the left", "waits on the right"."""
    facts, words = [], caption.words
    for i in clause.span:
        before = [claim for claim in named if claim.last < i]
        if not before:
            continue
        if words[i] in ("left", "right") and i not in taken:
            if preposition := _direction(caption, i):
                kind = SIDE_KINDS[words[preposition]]
                facts.append(_fact(before[0] if kind == "from" else before[-1], kind, words[i], preposition, i))
        elif words[i] in vocab.VEHICLE_COLOURS and i not in taken and words[i - 1] in vocab.BE:
            if VEHICLES.issuperset(before[-1].classes) and _is_predicate(caption, i):
                facts.append(_fact(before[-1], "colour", vocab.VEHICLE_COLOURS[words[i]], i))
        elif words[i] in MOTION_WORDS and i not in taken and not caption.roles[i] and "ego" not in caption.roles[
                clause.first:i]:
            facts.append(_fact(before[0], "motion", MOTION_WORDS[words[i]], i))
    return facts


def _is_predicate(caption, i):
    return _ends_clause(caption, i + 1) or caption.words[i + 1] in vocab.FUNCTION_WORDS


def _direction(caption, i):
    """Index of the preposition before "left" or "right" at word i: "from the left", "on our right", "in right lane"."""
    for j in range(i - 1, max(-1, i - 4), -1):
        if caption.breaks[j + 1] >= COMMA:
            return None
        if caption.words[j] in SIDE_KINDS:
            return j
        if caption.words[j] not in BEFORE_SIDE:
            return None
    return None


def _signal(word):
    return "amber" if word == "yellow" else word


def _fact(claim, kind, value, first, last=None):
    return Fact(claim.classes, kind, value, first, first if last is None else last)
