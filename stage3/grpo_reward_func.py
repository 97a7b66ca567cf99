"""The physics-aware reward of stage 3: what a caption says, checked against what a detector saw.

    R = 0.40 R_obj + 0.25 R_temp + 0.20 R_detail + 0.15 R_hall        each part in [0, 1]

Pure functions of (caption, evidence, mode, reference): no model, file, clock or random number takes part. The parts,
thresholds and known limits are told in docs/reward.md; the words are in stage3/vocabulary_config.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from stage3.vocabulary_config import (
    ARTICLES,
    ATTRIBUTE_OF,
    AUXILIARIES,
    BE,
    COCO_NAMES,
    COMMA,
    CONNECTIVE_INDEX,
    CONNECTIVE_WORDS,
    DETERMINERS,
    EXCLUSIVE,
    FUNCTION_WORDS,
    SAFETY_CRITICAL,
    SCENE_INDEX,
    STOP,
    VERB_OF,
    Claim,
    Mention,
    Reading,
    find_mentions,
    first_mentions,
    match_phrase,
    mention_sets,
    names_object,
    read_text,
)

__all__ = ["WEIGHTS", "Evidence", "Reward", "find_mentions", "first_mentions", "judge_mentions", "mention_sets",
           "physics_aware_reward"]

WEIGHTS = {"objects": 0.40, "temporal": 0.25, "detail": 0.20, "hallucination": 0.15}


@dataclass(frozen=True)
class ModeSettings:
    """What one granularity asks for."""

    window: tuple[float, float, float, float]  # words: style pays 0, 1, 1, 0 at these, in a line between them
    verbs: int  # distinct dynamic verbs for full pay
    connectives: int  # distinct connectives for full pay
    attributes: tuple[float, ...]  # pay for 0, 1, 2 .. kinds of attribute said of a class
    scene_facts: int  # kinds of scene fact for full pay
    scene_weight: float  # their share of the detail part
    free_filler: float  # share of words in sentences that say nothing new, up to which it costs nothing


MODES = {
    "microscope": ModeSettings((8, 32, 500, 900), 4, 3, (0.0, 0.7, 1.0), 3, 0.4, 0.45),
    "copilot": ModeSettings((1, 4, 20, 70), 2, 1, (0.0, 1.0), 1, 0.2, 0.3),
}


@dataclass(frozen=True)
class Evidence:
    """What the detector says of one clip, in COCO names; every name in neither set is absent.

    present: seen for certain. unknown: perhaps seen, so it neither pays nor costs (a name in both sets is present).
    salient: the part of `present` that a good caption names (default: all of it). seen: class -> (first, last) time at
    which it was seen, as fractions of the clip, if known.
    Raises ValueError for a name that COCO lacks and for times that are not 0 <= first <= last <= 1.
    """

    present: frozenset[str]
    unknown: frozenset[str] = frozenset()
    salient: frozenset[str] | None = None
    seen: Mapping[str, tuple[float, float]] | None = field(default=None, hash=False)

    def __post_init__(self):
        present = frozenset(self.present)
        salient = present if self.salient is None else frozenset(self.salient)
        named = present | frozenset(self.unknown) | salient | frozenset(self.seen or ())
        if strange := sorted(map(str, named - frozenset(COCO_NAMES))):
            raise ValueError(f"evidence names classes that COCO does not have: {', '.join(strange)}")
        for name, (first, last) in (self.seen or {}).items():
            if not 0 <= first <= last <= 1:
                raise ValueError(f"{name} was seen from {first} to {last}: not fractions of the clip, first to last")
        object.__setattr__(self, "present", present)
        object.__setattr__(self, "unknown", frozenset(self.unknown) - present)
        object.__setattr__(self, "salient", salient & present)


@dataclass(frozen=True)
class Reward:
    """The four parts and their weighted sum, each in [0, 1]."""

    objects: float
    temporal: float
    detail: float
    hallucination: float
    total: float


# ---------------------------------------------------------------------------------------------------------------------
# A caption in clauses


@dataclass
class Clause:
    """A stretch of words [first, stop) between commas, stops and clause words."""

    first: int
    stop: int
    sentence: int
    claims: list[Claim]
    ego: bool  # names the camera's own vehicle
    verbs: list[str]  # base forms of its verbs of motion
    truth: str = ""  # "object": says something checked; "ego": the camera's own motion; "false"; "": nothing


@dataclass
class Caption:
    """A text as the parts below read it. Lists are parallel to reading.words."""

    reading: Reading
    verbs: list[str]  # base form of a verb of motion, or ""
    attributes: list[str]  # category of an attribute, or ""
    scenes: list[tuple[str, str] | None]  # (category, value) of a scene fact
    connectives: list[str]  # the connective that begins here, or ""
    clauses: list[Clause]


CLAUSE_WORDS = frozenset(
    "while as when then before after until because but where whereas although though once since so followed".split()
)
PRONOUNS = frozenset("it they he she this both these".split())  # these go on with the sentence before


def read_caption(text):
    """Caption of a text; its clauses are not judged yet."""
    reading = read_text(text)
    words, roles = reading.words, reading.roles
    verbs = ["" if role else VERB_OF.get(word, "") for word, role in zip(words, roles, strict=True)]
    attributes = ["" if role else ATTRIBUTE_OF.get(word, "") for word, role in zip(words, roles, strict=True)]
    scenes, connectives, in_phrase = [None] * len(words), [""] * len(words), set()
    for i, word in enumerate(words):
        if word in SCENE_INDEX:
            scenes[i] = match_phrase(SCENE_INDEX, reading, i)[1]
            if scenes[i] and i and words[i - 1] in ("no", "not", "without"):
                scenes[i] = None
        if word in CONNECTIVE_INDEX and i not in in_phrase:
            length, pays = match_phrase(CONNECTIVE_INDEX, reading, i)
            connectives[i] = " ".join(words[i:i + length]) if pays else ""
            in_phrase.update(range(i + 1 - (pays is False), i + length))  # "such as", "soon after" begin no clause
    caption = Caption(reading, verbs, attributes, scenes, connectives, [])
    starts = [i for i, word in enumerate(words)
              if i == 0 or reading.breaks[i] >= COMMA or word in CLAUSE_WORDS and i not in in_phrase]
    claims = {}
    for claim in reading.claims:
        claims.setdefault(claim.first, []).append(claim)
    sentence = 0
    for first, stop in zip(starts, [*starts, len(words)][1:], strict=True):
        sentence += first > 0 and reading.breaks[first] == STOP
        caption.clauses.append(Clause(
            first, stop, sentence, [claim for i in range(first, stop) for claim in claims.get(i, ())],
            "ego" in roles[first:stop], [verb for verb in verbs[first:stop] if verb],
        ))
    return caption


def _sentences(caption):
    """The clauses, grouped by sentence."""
    groups = {}
    for clause in caption.clauses:
        groups.setdefault(clause.sentence, []).append(clause)
    return list(groups.values())


# ---------------------------------------------------------------------------------------------------------------------
# What the caption claims, against the evidence


@dataclass(frozen=True)
class Facts:
    """The claims of a caption after the check, as sets: to say a thing twice changes nothing."""

    right: frozenset[str]  # classes named, present
    wrong: frozenset[str]  # classes named, absent ("car|truck" for a word that either would satisfy)
    denied: frozenset[str]  # classes only denied, present
    doubtful: int  # special vehicles that no detector confirms, half an error each
    true_denials: int  # classes only denied, not present
    recall: float  # share of the salient classes that are covered

    @property
    def errors(self):
        return len(self.wrong) + len(self.denied) + 0.5 * self.doubtful

    @property
    def precision(self):
        """1 where nothing is claimed."""
        return len(self.right) / (len(self.right) + self.errors) if self.errors else 1.0

    @property
    def grounding(self):
        """In [0, 1]: style pays in so far as the caption is true and complete."""
        return self.precision * (0.3 + 0.7 * self.recall)


def _verdict(claim, evidence):
    """ "supported", "unsupported", "unknown" or "negated" for one claim alone."""
    if claim.negated:
        return "negated"
    if not evidence.present.isdisjoint(claim.classes):
        return "supported"
    return "unsupported" if evidence.unknown.isdisjoint(claim.classes) else "unknown"


def check_claims(claims, evidence):
    """Facts of a caption's claims.

    A class that is named as there anywhere is not denied. "Vehicle" and "van" are wrong if none of their classes is
    there; if none of them is named otherwise they cover the first salient one by half.
    """
    named, denied, wrong, doubtful, groups = set(), set(), set(), set(), []
    for claim in claims:
        verdict = _verdict(claim, evidence)
        if claim.kind == "object":
            (denied if claim.negated else named).update(claim.classes)
        elif claim.negated or claim.kind == "any" and verdict == "supported":
            groups.append(claim)
        elif verdict == "unsupported":
            wrong.add("|".join(claim.classes))
        elif verdict == "supported":
            doubtful.add(claim.classes)
    covered = dict.fromkeys(named & evidence.salient, 1.0)
    for claim in groups:
        if named.isdisjoint(claim.classes):
            there = [name for name in claim.classes if name in evidence.present]
            if claim.negated:
                denied.update(there[:1])
            elif claim.classes and covered.keys().isdisjoint(claim.classes):
                covered.update({name: 0.5 for name in claim.classes if name in evidence.salient and name in there[:1]})
    denied -= named
    return Facts(
        right=frozenset(named & evidence.present),
        wrong=frozenset(wrong | named - evidence.present - evidence.unknown),
        denied=frozenset(denied & evidence.present),
        doubtful=len(doubtful),
        true_denials=len(denied - evidence.present),
        recall=sum(covered.values()) / len(evidence.salient) if evidence.salient else 1.0,
    )


def judge_clauses(caption, facts, evidence, mode):
    """Sets the truth of each clause. One that names nothing goes on with the clause before it in its sentence ("slows,
    then stops") or, after "it" or "they", in the text, unless it brings a subject of its own ("while a figure waits");
    in Copilot mode a bare verb is an order to the driver."""
    before, sentence = "", -1
    for clause in caption.clauses:
        verdicts = {_verdict(claim, evidence) for claim in clause.claims}
        lies = any(claim.negated and not facts.denied.isdisjoint(claim.classes) for claim in clause.claims)
        first = caption.reading.words[clause.first]
        inherited = before if clause.sentence == sentence or first in PRONOUNS else ""
        if lies or "unsupported" in verdicts:
            clause.truth = "false"
        elif "supported" in verdicts:
            clause.truth = "object"
        elif clause.ego or mode == "copilot" and not clause.claims and inherited != "false" and first in VERB_OF:
            clause.truth = "ego"
        else:
            clause.truth = "" if _has_own_subject(caption, clause) else inherited
        before, sentence = clause.truth, clause.sentence


def _has_own_subject(caption, clause):
    """A determiner stands before the clause's first verb: "while a figure waits", not "at the corner"."""
    words = caption.reading.words
    verb = next((i for i in range(clause.first, clause.stop) if caption.verbs[i]), clause.first)
    start = clause.first + (words[clause.first] in PRONOUNS)
    return any(words[i] in DETERMINERS for i in range(start, verb))


# ---------------------------------------------------------------------------------------------------------------------
# Is it language, and does it say something? One gate in [0, 1] for all four parts


def _ramp(x, low, high):
    """0 below low, 1 above high, a line between."""
    return min(1.0, max(0.0, (x - low) / (high - low)))


AFTER_ARTICLE = frozenset("few other another single each several while no only inside very".split())  # may follow "a"
NEVER_LAST = ARTICLES | frozenset("of at with from into for and or while as because to than its their".split())
NO_VERB_AFTER = frozenset("of from with into at for".split())


def _is_broken(reading, i):
    """No English sentence has words i and i + 1 in a row: "the of", "car the", "has car", "from and", "the." """
    words, breaks, roles = reading.words, reading.breaks, reading.roles
    word, last = words[i], i + 1 == len(words)
    if last or breaks[i + 1] >= COMMA:
        return word in ARTICLES or word in NEVER_LAST and (last or breaks[i + 1] == STOP)
    after = words[i + 1]
    if word in ARTICLES:
        return after in FUNCTION_WORDS and after not in AFTER_ARTICLE
    if after in ARTICLES:
        return roles[i] in ("object", "any")
    if word in NO_VERB_AFTER:
        return after in AUXILIARIES or after in ("and", "or", "while")
    return word in BE and roles[i + 1] == "object" and not (i and words[i - 1] in ("there", "it", "not"))


def _sentence_grammar(caption):
    """1 for running English, 0 for a list of words or for words in disorder: the share of function words and of pairs
    of words that do not go together (0.5% at most in 300 real captions, 4% or more once their words are shuffled)."""
    words = caption.reading.words
    share = sum(word in FUNCTION_WORDS and word not in CONNECTIVE_WORDS for word in words) / len(words)
    broken = sum(_is_broken(caption.reading, i) for i in range(len(words)))
    return _ramp(share, 0.12, 0.25) * (1.0 - _ramp(broken / len(words), 0.02, 0.06))


PLACES = frozenset("road street traffic way lane highway intersection junction crosswalk".split())


def _telegram_grammar(caption, mode):
    """1 for telegraphic clauses ("car ahead brakes"), 0 for bare nouns and word salad: the share of words in clauses
    that say something of a thing. Two bare orders ("slow down") and scene facts ("night") may stand beside them. More
    than eight words are no telegram: in Copilot mode they pass if they are a sentence."""
    words, roles = caption.reading.words, caption.reading.roles
    good, orders = 0.0, 0
    for clause in caption.clauses:
        span = range(clause.first, clause.stop)
        if len(span) > 8:
            functions = sum(words[i] in FUNCTION_WORDS for i in span)
            if mode == "microscope" or functions < 0.2 * len(span) or any(_is_broken(caption.reading, i) for i in span):
                continue
        thing = any(roles[i] or words[i] in PLACES for i in span)
        scene = any(caption.scenes[i] for i in span)
        said = clause.verbs or any(caption.attributes[i] or words[i] in FUNCTION_WORDS and not roles[i] for i in span)
        touching = any(b.first == a.last + 1 for a, b in zip(clause.claims, clause.claims[1:], strict=False))
        if thing and said and not touching or scene and not thing and len(span) > 1:
            good += len(span)
        elif clause.verbs and not thing and len(span) <= 4 and orders < 2:
            good, orders = good + len(span), orders + 1
        elif scene and not thing:
            good += 0.5
    return _ramp(good / len(words), 0.35, 0.7)


def _variety(caption):
    """1 while at least 65% of the runs of three words within sentences are distinct, 0 at 30%."""
    words = caption.reading.words
    runs = []
    for clauses in _sentences(caption):
        first, stop = clauses[0].first, clauses[-1].stop
        runs += zip(words[first:stop], words[first + 1:stop], words[first + 2:stop], strict=False)
    return _ramp(len(set(runs)) / len(runs), 0.3, 0.65) if runs else 1.0


def _piles(words, breaks, members, least):
    """Indices of words in runs of at least `least` members within a sentence; "and" may stand between members."""
    found, run = set(), []
    for i in (i for i, member in enumerate(members) if member):
        joined = run and (i == run[-1] + 1 or i == run[-1] + 2 and words[i - 1] == "and")
        if not joined or STOP in breaks[run[-1] + 1:i + 1]:
            run = []
        run.append(i)
        if len(run) >= least:
            found.update(run)
    return found


PLAIN_COLOURS = frozenset("red blue green white black yellow orange brown purple pink".split())
LOOKS = ("colour", "size", "state")
ADJECTIVE = re.compile(r"..+(?:ful|ous|ing|ive|ant|ent|ern|ish|[^l]y|ed|al|ic|ble|less|id|ary)$")
INFLECTED = ("s", "ed", "ing", "ly")  # of eight words of running English, at least two end so


def _stuffed_share(caption, mode):
    """Share of the words that stand in piles: adjectives, verbs, connectives or single words between commas, and
    stretches that say nothing of anything."""
    words, breaks, roles = caption.reading.words, caption.reading.breaks, caption.reading.roles
    ends = [*(b >= COMMA for b in breaks[1:]), True]
    alone = [end and (i == 0 or ends[i - 1]) and not roles[i] for i, end in enumerate(ends)]
    looks = [attribute in LOOKS for attribute in caption.attributes]
    moves = [verb and not look for verb, look in zip(caption.verbs, looks, strict=True)]
    links = [word in CONNECTIVE_WORDS and not role for word, role in zip(words, roles, strict=True)]
    stuffed = _piles(words, breaks, looks, 4) | _piles(words, breaks, moves, 3) | _piles(words, breaks, links, 3)
    stuffed |= _piles(words, breaks, alone, 3 if mode == "microscope" else 4)
    stuffed |= {j for i, (a, b) in enumerate(zip(words, words[1:], strict=False))
                if a in PLAIN_COLOURS and b in PLAIN_COLOURS and breaks[i + 1] < COMMA for j in (i, i + 1)}
    if mode == "microscope":
        stuffed |= _piles(words, breaks, [
            look or ADJECTIVE.match(word) and word not in FUNCTION_WORDS
            for word, look in zip(words, looks, strict=True)], 6)
        for clauses in _sentences(caption):
            stuffed |= _unsaid(caption, clauses[0].first, clauses[-1].stop, looks)
    else:
        for clause in caption.clauses:
            span = range(clause.first, clause.stop)
            if len(span) > 2 and not clause.verbs and not any(
                    roles[i] or caption.scenes[i] or words[i] in FUNCTION_WORDS | PLACES for i in span):
                stuffed.update(span)
    return len(stuffed) / len(words)


def _unsaid(caption, first, stop, looks):
    """Indices of words of a sentence that belong to no running English: a sentence without a function word or of bare
    connectives, eight words in a row without function words and endings, three looks among six such words."""
    words, found, content = caption.reading.words, set(), []
    for i in range(first, stop):
        if words[i] in FUNCTION_WORDS:
            content = []
            continue
        content.append(i)
        if len(content) >= 8 and sum(words[j].endswith(INFLECTED) for j in content[-8:]) < 2:
            found.update(content[-8:])
        if len(content) >= 6 and sum(looks[j] for j in content[-6:]) > 2:
            found.update(content[-6:])
    told = any(caption.reading.roles[i] or caption.verbs[i] for i in range(first, stop))
    if not told and (len(content) == stop - first or all(word in CONNECTIVE_WORDS for word in words[first:stop])):
        found.update(range(first, stop))
    return found


def new_words_share(caption):
    """Share of the words that stand in sentences which say something that no other sentence says.

    Sentences are taken from the one that says most, so their order in the text does not matter.
    """
    words, told = caption.reading.words, []
    scenes = {(kind, value) for kind, values in scene_facts(caption).items() for value in values}
    for clauses in _sentences(caption):
        facts, who = set(), set()
        for clause in clauses:
            span = range(clause.first, clause.stop)
            named = {claim.classes for claim in clause.claims if not claim.negated}
            who = named or ({("ego",)} if clause.ego else set() if clause.claims else who)
            facts |= {(name, "is") for name in who if name != ("ego",)}
            facts |= {(name, words[i]) for name in who for i in span if caption.attributes[i] or caption.verbs[i]}
            facts |= {caption.scenes[i] for i in span} & scenes
            if clause.truth == "ego" and not who:
                facts |= {("ego", verb) for verb in clause.verbs}
        told.append((facts, clauses[-1].stop - clauses[0].first))
    known, useful = set(), 0
    for facts, length in sorted(told, key=lambda item: (-len(item[0]), item[1], sorted(map(str, item[0])))):
        if not facts <= known:
            useful += length
        known |= facts
    return useful / len(words)


def length_window(words, new_share, mode):
    """Trapezoid over the number of words, for the two parts that style can raise: 0 at the first edge of the mode's
    window, 1 between the second and the third, 0 at the fourth. Words that say nothing new do not help to reach it."""
    low, full, most, high = MODES[mode].window
    return min(_ramp(words * new_share, low, full), 1.0 - _ramp(words, most, high))


def caption_gate(caption, facts, new_share, mode):
    """In [0, 1] and 1 for an honest caption: language x variety x focus x no piles x no list of denials."""
    language = _telegram_grammar(caption, mode)
    if mode == "microscope":
        language = max(_sentence_grammar(caption), 0.5 * language)
    variety = 0.3 + 0.7 * _variety(caption)
    focus = 1.0 - 0.8 * _ramp(1.0 - new_share, MODES[mode].free_filler, 0.9)
    piles = 1.0 - min(0.8, 2.0 * _stuffed_share(caption, mode))
    denials = 1.0 - min(0.5, 0.04 * max(0, facts.true_denials - 3))
    return language * variety * focus * piles * denials


# ---------------------------------------------------------------------------------------------------------------------
# The four parts, before gate and window


def objects_part(facts, evidence):
    """R_obj = F1 of the set of named classes: precision over known classes, recall over salient ones.

    A false denial counts as a false claim, so it is worse than silence. Source: CHAIR's object sets, AMBER's coverage.
    """
    if not evidence.salient and not facts.errors:
        return 1.0
    precision, recall = facts.precision, facts.recall
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def hallucination_part(facts, evidence):
    """R_hall = 1 - errors / claims, times 0.3 if an error is about a safety-critical class.

    errors: absent classes named + present classes denied + half a special vehicle that no detector confirms. Nothing
    claimed: 0.5, for it is no error and no help (1 if there is nothing to name). Source: CHAIR_i on sets.
    """
    claims = len(facts.right) + facts.errors
    if not claims:
        return 0.5 if evidence.salient else 1.0
    share = 1.0 - facts.errors / claims
    names = {name for wrong in facts.wrong | facts.denied for name in wrong.split("|")}
    return share if names.isdisjoint(SAFETY_CRITICAL) else 0.3 * share


def temporal_part(caption, facts, evidence, mode):
    """R_temp = window x grounding x order x mean of (verbs / target, connectives / target), each at most 1.

    Only distinct verbs of motion in clauses that say something true count, two a clause at most, and of the camera's
    own motion no more than half the target where there is more to tell; connectives beside such clauses, two a sentence
    at most. In Copilot mode each further true clause with a verb counts as a connective: a telegram needs none.
    """
    settings = MODES[mode]
    verbs, ego_verbs, connectives, steps = set(), set(), set(), 0
    for clauses in _sentences(caption):
        linked = 0
        for clause, after in zip(clauses, [*clauses[1:], clauses[-1]], strict=True):
            told = after if not clause.claims and not clause.ego else clause  # "Then, ..." belongs to what follows
            for i in range(clause.first, clause.stop):
                link = caption.connectives[i]
                if link and link not in connectives and linked < 2 and told.truth in ("object", "ego"):
                    connectives.add(link)
                    linked += 1
            if clause.truth in ("object", "ego"):
                said = list(dict.fromkeys(clause.verbs))[:2]
                (verbs if clause.truth == "object" else ego_verbs).update(said)
                steps += bool(said)
    most = settings.verbs / 2 if evidence.salient else settings.verbs  # all that there is to tell of an empty road
    moves = len(verbs) + min(len(ego_verbs - verbs), most)
    links = max(len(connectives), steps - 1) if mode == "copilot" else len(connectives)
    pace = 0.5 * min(1.0, moves / settings.verbs) + 0.5 * min(1.0, links / settings.connectives)
    return facts.grounding * told_in_order(caption, evidence) * pace


ORDER_MARGIN = 0.1  # of the clip: appearances that are nearer count as together
TOGETHER = frozenset("while as when where whereas because since so although though but".split())


def told_in_order(caption, evidence):
    """In [0.4, 1]: 1 - 0.6 x the share of pairs of classes that are introduced against the order of the clip.

    A pair counts if both classes are present and came into view at times that differ by more than ORDER_MARGIN.
    Classes in one clause, or in clauses joined by "while", "as", "when" .., are told together; "after" and a first
    "before" turn the order of their clauses round. 1 without times or without pairs.
    """
    if not evidence.seen:
        return 1.0
    rank = {}
    for number, names in enumerate(_told_steps(caption)):
        for name in names:
            if name in evidence.present and name in evidence.seen:
                rank.setdefault(name, number)
    agree = against = 0
    for a in rank:
        for b in rank:
            if rank[a] < rank[b]:
                gap = evidence.seen[b][0] - evidence.seen[a][0]
                agree, against = agree + (gap > ORDER_MARGIN), against + (gap < -ORDER_MARGIN)
    return 1.0 - 0.6 * against / (agree + against) if against else 1.0


def _told_steps(caption):
    """The classes named as there, in groups, in the order in which the text says that they come."""
    steps = []
    for clauses in _sentences(caption):
        told, waiting, first_is_later = [], [], False
        for clause in clauses:
            word = caption.reading.words[clause.first]
            names = [name for claim in clause.claims if not claim.negated and names_object(claim)
                     for name in claim.classes]
            predicate = clause.verbs or any(
                caption.reading.words[i] in AUXILIARIES for i in range(clause.first, clause.stop))
            if not predicate:  # an item of a list, or "at the traffic light,": told with what comes next
                waiting += names
            elif told and word in TOGETHER:
                told[-1] += waiting + names
                waiting = []
            elif told and (word == "after" or first_is_later):
                told.insert(len(told) - 1, waiting + names)
                waiting, first_is_later = [], False
            else:
                first_is_later = not told and word == "before"
                told.append(waiting + names)
                waiting = []
        if told and waiting:
            told[-1] += waiting
        steps += told or [waiting]
    return steps


def detail_part(caption, facts, evidence, mode, reference):
    """R_detail = window x grounding x ((1 - w) described + w scene).

    described: mean over the salient classes of the pay for the kinds of attribute (colour, size, state, position,
    number) said of each beside a true mention. scene: kinds of scene fact / target, at most 1; a kind told in two ways
    (day and night) pays nothing; with a reference caption a fact pays only if the reference tells it too.
    """
    settings = MODES[mode]
    kinds = {}
    for clause in caption.clauses:
        named = [c for c in clause.claims if c.kind == "object" and not c.negated]
        if clause.truth != "object" or not named:
            continue
        for i in range(clause.first, clause.stop):
            if caption.attributes[i]:
                nearest = min(named, key=lambda c: c.first - i if c.first > i else i - c.last + 0.5)
                for name in nearest.classes:
                    kinds.setdefault(name, set()).add(caption.attributes[i])
    wanted = evidence.salient or facts.right
    pay = settings.attributes
    described = [pay[min(len(kinds.get(name, ())), len(pay) - 1)] for name in wanted]
    scene = scene_facts(caption)
    if reference is not None:
        told = scene_facts(read_caption(reference))
        scene = {kind: values & told.get(kind, set()) for kind, values in scene.items()}
    count = sum(bool(values) for values in scene.values())
    part = (1 - settings.scene_weight) * (sum(described) / len(described) if described else 1.0)
    part += settings.scene_weight * min(1.0, count / settings.scene_facts)
    return facts.grounding * part


def scene_facts(caption):
    """kind of scene fact -> set of the values told, without the kinds that contradict themselves (night and day)."""
    facts = {}
    for fact in caption.scenes:
        if fact:
            facts.setdefault(fact[0], set()).add(fact[1])
    return {kind: values for kind, values in facts.items() if len(values) == 1 or kind not in EXCLUSIVE}


# ---------------------------------------------------------------------------------------------------------------------


def physics_aware_reward(caption, evidence, mode, reference=None):
    """The reward of one caption -> Reward, all in [0, 1].

    caption, reference: text. evidence: Evidence of the clip. mode: "microscope" or "copilot". A reference caption, if
    given, serves to check scene facts (night, rain) that no COCO detector sees; its objects are not read.
    Raises ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: the modes are {', '.join(map(repr, MODES))}")
    caption = read_caption(caption)
    if not caption.clauses:
        return Reward(0.0, 0.0, 0.0, 0.0, 0.0)
    facts = check_claims(caption.reading.claims, evidence)
    judge_clauses(caption, facts, evidence, mode)
    new_share = new_words_share(caption)
    gate = caption_gate(caption, facts, new_share, mode)
    style = gate * length_window(len(caption.reading.words), new_share, mode)
    parts = {
        "objects": gate * objects_part(facts, evidence),
        "temporal": style * temporal_part(caption, facts, evidence, mode),
        "detail": style * detail_part(caption, facts, evidence, mode, reference),
        "hallucination": gate * hallucination_part(facts, evidence),
    }
    return Reward(**parts, total=sum(WEIGHTS[name] * value for name, value in parts.items()))


def judge_mentions(text, evidence):
    """What a report colours: list[(Mention, verdict)] in the order of the text.

    verdict: "supported", "unsupported" (the detector did not see it: that is all we can say), "unknown", or "negated"
    (a denial; "unsupported" if the class is there and the text names it nowhere). A word that several classes satisfy
    ("van") appears with its classes joined by "|" as the mention's object.
    """
    reading = read_text(text)
    facts = check_claims(reading.claims, evidence)
    judged = []
    for claim in reading.claims:
        for classes in [(name,) for name in claim.classes] if names_object(claim) else [claim.classes]:
            verdict = _verdict(claim._replace(classes=classes), evidence)
            if claim.negated and not facts.denied.isdisjoint(classes):
                verdict = "unsupported"
            span = reading.starts[claim.first], reading.ends[claim.last]
            judged.append((Mention("|".join(classes), claim.negated, *span), verdict))
    return judged
