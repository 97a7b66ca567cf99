"""The physics-aware reward of stage 3: what a caption says, checked against what a detector saw.

    R = 0.40 R_obj + 0.25 R_temp + 0.20 R_detail + 0.15 R_hall        each part in [0, 1]

Pure functions of (caption, evidence, mode, reference): no model, file, clock or random number takes part. The parts,
thresholds and known limits are told in docs/reward.md; the words are in stage3/vocabulary_config.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from stage3.vocabulary_config import (
    ARTICLES,
    ATTRIBUTE_OF,
    COCO_NAMES,
    COMMA,
    CONNECTIVE_INDEX,
    EXCLUSIVE,
    FUNCTION_WORDS,
    SAFETY_CRITICAL,
    SCENE_INDEX,
    STOP,
    VERB_OF,
    Mention,
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

    window: tuple[float, float, float, float]  # words: detail pays 0, 1, 1, 0 at these and in a line between them
    verbs: int  # distinct dynamic verbs for full pay
    connectives: int  # distinct connectives for full pay
    attributes: tuple[float, ...]  # pay for 0, 1, 2 .. kinds of attribute said of a class
    scene_facts: int  # kinds of scene fact for full pay
    scene_weight: float  # their share of the detail part
    free_filler: float  # share of words in sentences that say nothing new, up to which it costs nothing


MODES = {
    "microscope": ModeSettings((10, 40, 500, 900), 4, 3, (0.0, 0.7, 1.0), 3, 0.4, 0.45),
    "copilot": ModeSettings((1, 4, 20, 80), 2, 1, (0.0, 1.0), 1, 0.2, 0.3),
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
# What the caption claims, against the evidence


def _verdict(claim, evidence):
    """ "supported", "unsupported", "unknown" or "negated" for one claim; a denial of what is there is unsupported."""
    classes = frozenset(claim.classes)
    if claim.negated:
        return "negated"
    if classes & evidence.present:
        return "supported"
    return "unknown" if classes & evidence.unknown else "unsupported"


@dataclass
class Facts:
    """The claims of a caption after the check."""

    right: frozenset[str]  # classes named, present
    wrong: frozenset[str]  # classes named, absent (or the words' own name where no one class is meant)
    denied: frozenset[str]  # classes that are present and only denied
    doubtful: float  # special vehicles that no detector confirms, half an error each
    true_denials: int  # classes that are only denied and not present
    recall: float  # share of the salient classes that are covered

    @property
    def errors(self):
        return len(self.wrong) + len(self.denied) + 0.5 * self.doubtful

    @property
    def precision(self):
        """1 where nothing is claimed."""
        return len(self.right) / (len(self.right) + self.errors) if self.errors else 1.0


def _check_claims(claims, evidence):
    named, denied, groups, wrong, doubtful = set(), set(), [], set(), set()
    for claim in claims:
        verdict = _verdict(claim, evidence)
        if claim.kind == "object":
            (denied if claim.negated else named).update(claim.classes)
        elif verdict == "unsupported":
            wrong.add(claim.classes[0] if claim.kind == "unverifiable" else "|".join(claim.classes))
        elif verdict == "supported" and claim.kind == "unverifiable":
            doubtful.add(claim.classes)
        elif verdict == "supported" or claim.negated:
            groups.append(claim)
    right = named & evidence.present
    wrong |= named - evidence.present - evidence.unknown
    denied -= named
    for claim in groups:  # "no vehicles are visible" is false where one is there and none is named
        if claim.negated and set(claim.classes) & evidence.present and not set(claim.classes) & named:
            denied.add(next(name for name in claim.classes if name in evidence.present))
    covered = dict.fromkeys(right & evidence.salient, 1.0)
    for claim in groups:
        open_classes = [name for name in claim.classes if name in evidence.salient and name not in covered]
        if not claim.negated and open_classes and not any(covered.get(name) == 0.5 for name in claim.classes):
            covered[open_classes[0]] = 0.5
    recall = sum(covered.values()) / len(evidence.salient) if evidence.salient else 1.0
    return Facts(frozenset(right), frozenset(wrong), frozenset(denied & evidence.present), len(doubtful),
                 len(denied - evidence.present), recall)


# ---------------------------------------------------------------------------------------------------------------------
# Clauses


@dataclass
class Clause:
    """A stretch of words [first, stop) between commas, stops and clause words."""

    first: int
    stop: int
    sentence: int
    claims: list
    ego: bool
    truth: str = ""  # "object": something checked is said; "ego": the camera's own motion; "false"; "": nothing


CLAUSE_WORDS = frozenset(
    "while as when then before after until because but where whereas although though once since so followed".split()
)
PRONOUN_STARTS = frozenset("it they he she this both these".split())


def _split_clauses(reading):
    skipped = set()
    for i in range(len(reading.words)):
        length, pays = match_phrase(CONNECTIVE_INDEX, reading, i)
        if length and not pays:
            skipped.update(range(i, i + length))
    starts = [
        i for i, word in enumerate(reading.words)
        if i == 0 or reading.breaks[i] >= COMMA or word in CLAUSE_WORDS and i not in skipped
    ]
    clauses, sentence = [], 0
    by_word = {}
    for claim in reading.claims:
        by_word.setdefault(claim.first, []).append(claim)
    for first, stop in zip(starts, [*starts[1:], len(reading.words)], strict=True):
        sentence += first > 0 and reading.breaks[first] == STOP
        claims = [claim for i in range(first, stop) for claim in by_word.get(i, ())]
        clauses.append(Clause(first, stop, sentence, claims, "ego" in reading.roles[first:stop]))
    return clauses


def _judge_clauses(reading, clauses, facts, evidence, commands):
    """Sets the truth of each clause. One without objects goes on with the clause before it in its sentence ("slows,
    then stops") or, after "it" or "they", in the text. commands: a bare verb is an order to the driver (Copilot)."""
    before, sentence = "", -1
    for clause in clauses:
        verdicts = {
            "false" if claim.negated and facts.denied & set(claim.classes) else _verdict(claim, evidence)
            for claim in clause.claims
        }
        pronoun = reading.words[clause.first] in PRONOUN_STARTS
        inherited = before if clause.sentence == sentence or pronoun else ""
        if verdicts & {"unsupported", "false"}:
            clause.truth = "false"
        elif "supported" in verdicts:
            clause.truth = "object"
        elif clause.ego:
            clause.truth = "ego"
        elif commands and not clause.claims and reading.words[clause.first] in VERB_OF and inherited in ("", "object"):
            clause.truth = "ego"
        else:
            clause.truth = inherited
        before, sentence = clause.truth, clause.sentence


# ---------------------------------------------------------------------------------------------------------------------
# Is it language, and does it say something? One gate in [0, 1] for all four parts


def _ramp(x, low, high):
    """0 below low, 1 above high, a line between."""
    return min(1.0, max(0.0, (x - low) / (high - low)))


def _window(words, edges):
    """Trapezoid over the number of words: 0 at edges[0], 1 from edges[1] to edges[2], 0 at edges[3]."""
    return min(_ramp(words, edges[0], edges[1]), 1.0 - _ramp(words, edges[2], edges[3]))


def _sentence_grammar(reading):
    """1 for running English, 0 for a list of words: the share of function words, and articles that lead nowhere."""
    words = reading.words
    share = sum(word in FUNCTION_WORDS and word not in CONNECTIVE_INDEX for word in words) / len(words)
    lost = sum(
        a in ARTICLES and (b in FUNCTION_WORDS and b not in ("few", "other", "another", "single", "each", "several")
                           and not (a == "a" and b in ("while", "few")) or reading.breaks[i + 1] == STOP)
        for i, (a, b) in enumerate(zip(words, words[1:], strict=False))
    )
    return _ramp(share, 0.12, 0.25) * (1.0 - _ramp(lost / len(words), 0.02, 0.08))


def _telegram_grammar(reading, clauses):
    """1 for telegraphic clauses ("car ahead brakes"), 0 for bare nouns and word salad: the share of words in clauses
    that say something of a thing."""
    good, orders = 0, 0
    for clause in clauses:
        words = reading.words[clause.first:clause.stop]
        things = [i for i in range(clause.first, clause.stop) if reading.roles[i]]
        said = [w for i, w in enumerate(words, clause.first)
                if not reading.roles[i] and (w in VERB_OF or w in ATTRIBUTE_OF or w in FUNCTION_WORDS)]
        functions = sum(word in FUNCTION_WORDS for word in words)
        if len(words) > 8 and functions < 0.12 * len(words):
            continue
        scene = any(match_phrase(SCENE_INDEX, reading, i)[0] for i in range(clause.first, clause.stop))
        adjacent = sum(b.first == a.last + 1 for a, b in zip(clause.claims, clause.claims[1:], strict=False))
        if things and said and adjacent == 0 or scene and len(words) > 1 and not things:
            good += len(words)
        elif not things and len(words) <= 4 and any(word in VERB_OF for word in words) and orders < 2:
            good, orders = good + len(words), orders + 1
        elif scene and not things:
            good += 0.5 * len(words)
    return _ramp(good / len(reading.words), 0.35, 0.7)


def _repetition(words):
    """1 while at least 80% of the three-word runs are distinct, 0 at 40%."""
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return _ramp(len(set(runs)) / len(runs), 0.4, 0.8) if runs else 1.0


def _stuffed_share(reading, sentences_expected):
    """Share of the words that stand in piles: adjective after adjective, verb after verb, single words between commas,
    and (where sentences are expected) ten words in a row without a function word."""
    words, stuffed, n = reading.words, set(), len(reading.words)

    def pile(member, least):
        i = 0
        while i < n:
            j = i
            while j < n and (member(j) or j > i and words[j] == "and" and j + 1 < n and member(j + 1)):
                j += 1
            if j - i >= least:
                stuffed.update(range(i, j))
            i = max(j, i + 1)

    pile(lambda i: ATTRIBUTE_OF.get(words[i]) in ("colour", "size", "state") and not reading.roles[i], 4)
    pile(lambda i: words[i] in VERB_OF and not reading.roles[i] and words[i] not in ATTRIBUTE_OF, 3)
    pile(lambda i: words[i] in CONNECTIVE_INDEX and not reading.roles[i], 3)

    def alone(i):
        return not reading.roles[i] and (i == 0 or reading.breaks[i] >= COMMA) and (
            i + 1 == n or reading.breaks[i + 1] >= COMMA)

    pile(alone, 3)
    if sentences_expected:
        pile(lambda i: words[i] not in FUNCTION_WORDS, 10)
    return len(stuffed) / n


def _says_something_new(reading, clauses):
    """Share of the words that stand in sentences which say something that was not said before."""
    known, useful, words = set(), 0, 0
    sentence_facts, length, current = set(), 0, 0
    for clause in [*clauses, None]:
        if clause is None or clause.sentence != current:
            useful += length if sentence_facts - known else 0
            words, known = words + length, known | sentence_facts
            sentence_facts, length = set(), 0
            if clause is None:
                break
            current = clause.sentence
        span = range(clause.first, clause.stop)
        length += len(span)
        who = {claim.classes for claim in clause.claims} or ({("ego",)} if clause.ego else set())
        sentence_facts |= {(name, "is") for name in who if name != ("ego",)}
        sentence_facts |= {(name, reading.words[i]) for name in who for i in span
                           if reading.words[i] in ATTRIBUTE_OF or reading.words[i] in VERB_OF}
        sentence_facts |= {match_phrase(SCENE_INDEX, reading, i)[1] for i in span} - {None}
        if not who and clause.truth == "ego":
            sentence_facts |= {("ego", reading.words[i]) for i in span if reading.words[i] in VERB_OF}
    return useful / words


def _gate(reading, clauses, facts, settings, mode):
    """In [0, 1], 1 for an honest caption: language x no repetition x no filler x no piles x no lists of denials."""
    telegram = _telegram_grammar(reading, clauses)
    if mode == "microscope":
        language = max(_sentence_grammar(reading), 0.5 * telegram)
    else:
        language = telegram
    repetition = 0.3 + 0.7 * _repetition(reading.words)
    filler = 1.0 - _says_something_new(reading, clauses)
    focus = 1.0 - 0.8 * _ramp(filler, settings.free_filler, 0.9)
    piles = 1.0 - min(0.8, 2.0 * _stuffed_share(reading, mode == "microscope"))
    denials = 1.0 - min(0.5, 0.04 * max(0, facts.true_denials - 3))
    return language * repetition * focus * piles * denials


# ---------------------------------------------------------------------------------------------------------------------
# The four parts


def _objects(facts, evidence):
    """R_obj = F1 of the set of named classes: precision over known classes, recall over salient ones.

    A false denial counts as a false claim, so it is worse than silence. Source: CHAIR's object sets, AMBER's coverage.
    """
    if not evidence.salient and not facts.errors:
        return 1.0
    precision, recall = facts.precision, facts.recall
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _hallucination(facts, evidence):
    """R_hall = 1 - errors / claims; times 0.3 if an error is about a safety-critical class.

    errors: absent classes named + present classes denied + half a special vehicle that no detector confirms. Nothing
    claimed: 0.5, for it is no error and no help (1 if there is nothing to name). Source: CHAIR_i on sets.
    """
    claims = len(facts.right) + facts.errors
    if not claims:
        return 1.0 if not evidence.salient else 0.5
    share = 1.0 - facts.errors / claims
    names = {name for wrong in facts.wrong | facts.denied for name in wrong.split("|")}
    return 0.3 * share if names & SAFETY_CRITICAL else share


def _temporal(reading, clauses, facts, evidence, settings, mode):
    """R_temp = grounding x order x mean of (verbs / target, connectives / target), each at most 1.

    Only distinct verbs of motion in clauses that say something true count, two a clause at most, and of the camera's
    own motion no more than half the target; connectives beside such clauses, two a sentence at most. In Copilot mode
    each further true clause with a verb counts as a connective: a telegram needs none.
    """
    verbs, ego_verbs, connectives, steps = set(), set(), set(), 0
    in_sentence = {}
    for number, clause in enumerate(clauses):
        after = clauses[number + 1] if number + 1 < len(clauses) else None
        carrier = clause if clause.claims or clause.ego or after is None or after.sentence != clause.sentence else after
        if carrier.truth in ("object", "ego"):
            for i in range(clause.first, clause.stop):
                length, pays = match_phrase(CONNECTIVE_INDEX, reading, i)
                phrase = " ".join(reading.words[i:i + length])
                if pays and phrase not in connectives and in_sentence.get(clause.sentence, 0) < 2:
                    connectives.add(phrase)
                    in_sentence[clause.sentence] = in_sentence.get(clause.sentence, 0) + 1
        said = dict.fromkeys(
            VERB_OF[reading.words[i]] for i in range(clause.first, clause.stop)
            if reading.words[i] in VERB_OF and not reading.roles[i]
        )
        if clause.truth in ("object", "ego"):
            (verbs if clause.truth == "object" else ego_verbs).update(list(said)[:2])
            steps += bool(said)
    moves = len(verbs) + min(len(ego_verbs - verbs), settings.verbs / 2)
    links = max(len(connectives), steps - 1) if mode == "copilot" else len(connectives)
    pace = 0.5 * min(1.0, moves / settings.verbs) + 0.5 * min(1.0, links / settings.connectives)
    return pace * _order(reading, clauses, evidence) * _grounding(facts)


ORDER_MARGIN = 0.1  # of the clip: nearer appearances count as together
TOGETHER = frozenset("while as when where whereas because since so although though but".split())


def _order(reading, clauses, evidence):
    """In [0.4, 1]: 1 - 0.6 x the share of pairs of classes introduced against the order in which they came into view.

    Classes introduced in one clause, or in clauses joined by "while", "as", "when" .., are not ordered; "after" and
    "before" turn the order of their clauses round. 1 without times or without pairs that differ by a tenth of the clip.
    """
    if not evidence.seen:
        return 1.0
    steps, sentence = [], -1  # groups of clauses in the order of the told events
    for clause in clauses:
        word = reading.words[clause.first]
        names = [n for claim in clause.claims if not claim.negated and names_object(claim) for n in claim.classes]
        if clause.sentence == sentence and (word in TOGETHER or not names) and steps:
            steps[-1] += names
        elif clause.sentence == sentence and word == "after":
            steps.insert(len(steps) - 1, names)
        else:
            steps.append(names)
        sentence = clause.sentence
    rank = {}
    for number, names in enumerate(steps):
        for name in names:
            if name in evidence.present and name in evidence.seen:
                rank.setdefault(name, number)
    agree = against = 0
    for a in rank:
        for b in rank:
            if rank[a] < rank[b]:
                gap = evidence.seen[b][0] - evidence.seen[a][0]
                agree, against = agree + (gap > ORDER_MARGIN), against + (gap < -ORDER_MARGIN)
    return 1.0 - 0.6 * against / (agree + against) if agree + against else 1.0


def _detail(reading, clauses, facts, evidence, settings, reference):
    """R_detail = grounding x length window x ((1 - w) described + w scene).

    described: mean over the salient classes of how much is said of each (kinds of attribute beside a true mention).
    scene: kinds of scene fact / target; a kind told in two ways (day and night) pays nothing; with a reference caption
    a fact pays only if the reference tells it too.
    """
    kinds = {}
    for clause in clauses:
        named = [c for c in clause.claims if c.kind == "object" and not c.negated and set(c.classes) & facts.right]
        if clause.truth != "object" or not named:
            continue
        for i in range(clause.first, clause.stop):
            if reading.words[i] in ATTRIBUTE_OF and not reading.roles[i]:
                near = min(named, key=lambda c: min(abs(c.first - i), abs(c.last - i)) + 0.5 * (i > c.last))
                for name in near.classes:
                    kinds.setdefault(name, set()).add(ATTRIBUTE_OF[reading.words[i]])
    wanted = evidence.salient or facts.right
    pay = settings.attributes
    described = sum(pay[min(len(kinds.get(name, ())), len(pay) - 1)] for name in wanted) / len(wanted) if wanted else 1.0
    scene = _scene_facts(reading)
    if reference is not None:
        told = _scene_facts(read_text(reference))
        scene = {kind: values & told.get(kind, set()) for kind, values in scene.items()}
    count = sum(bool(values) and not (kind in EXCLUSIVE and len(values) > 1) for kind, values in scene.items())
    part = min(1.0, count / settings.scene_facts)
    weight = settings.scene_weight
    window = _window(len(reading.words), settings.window)
    return ((1 - weight) * described + weight * part) * window * _grounding(facts)


def _scene_facts(reading):
    """kind of scene fact -> values told, with denied ones ("no rain") left out."""
    facts = {}
    for i in range(len(reading.words)):
        found = match_phrase(SCENE_INDEX, reading, i)[1]
        if found and (i == 0 or reading.words[i - 1] not in ("no", "not", "without")):
            facts.setdefault(found[0], set()).add(found[1])
    return facts


def _grounding(facts):
    """In [0, 1]: precision x (0.3 + 0.7 recall). Style pays in so far as the caption is true and complete."""
    return facts.precision * (0.3 + 0.7 * facts.recall)


# ---------------------------------------------------------------------------------------------------------------------


def physics_aware_reward(caption, evidence, mode, reference=None):
    """The reward of one caption -> Reward, all in [0, 1].

    caption, reference: text. evidence: Evidence of the clip. mode: "microscope" or "copilot". A reference caption, if
    given, serves to check scene facts (night, rain) that no COCO detector sees; its objects are not read.
    Raises ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: the modes are {', '.join(map(repr, MODES))}")
    settings = MODES[mode]
    reading = read_text(caption)
    if not reading.words:
        return Reward(0.0, 0.0, 0.0, 0.0, 0.0)
    facts = _check_claims(reading.claims, evidence)
    clauses = _split_clauses(reading)
    _judge_clauses(reading, clauses, facts, evidence, commands=mode == "copilot")
    gate = _gate(reading, clauses, facts, settings, mode)
    parts = {
        "objects": gate * _objects(facts, evidence),
        "temporal": gate * _temporal(reading, clauses, facts, evidence, settings, mode),
        "detail": gate * _detail(reading, clauses, facts, evidence, settings, reference),
        "hallucination": gate * _hallucination(facts, evidence),
    }
    return Reward(**parts, total=sum(WEIGHTS[name] * value for name, value in parts.items()))


def judge_mentions(text, evidence):
    """What a report colours: list[(Mention, verdict)] in the order of the text.

    verdict: "supported", "unsupported" (the detector did not see it: that is all we can say), "unknown", or "negated"
    (a denial; "unsupported" if the class is there and the text names it nowhere). A word that several classes satisfy
    ("van") appears with its classes joined by "|" as the mention's object.
    """
    reading = read_text(text)
    facts = _check_claims(reading.claims, evidence)
    judged = []
    for claim in reading.claims:
        names = claim.classes if names_object(claim) else ("|".join(claim.classes),)
        for name in names:
            verdict = _verdict(claim._replace(classes=tuple(name.split("|"))), evidence)
            if claim.negated and facts.denied & set(name.split("|")):
                verdict = "unsupported"
            mention = Mention(name, claim.negated, reading.starts[claim.first], reading.ends[claim.last])
            judged.append((mention, verdict))
    return judged
