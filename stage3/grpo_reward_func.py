"""The physics-aware reward of stage 3: what a caption says, checked against what a detector saw.

    R = 0.40 R_obj + 0.25 R_temp + 0.20 R_detail + 0.15 R_hall        each part in [0, 1]

A pure function of (caption, evidence, mode, reference): no model, file, clock or random number takes part. This file
holds, in this order, the settings, the reward and its four parts, the check of a caption's claims, and the gates that
keep degenerate text from scoring. docs/reward.md explains the formulas and the known limits.
"""

import re
from dataclasses import dataclass
from itertools import pairwise, permutations

from stage3 import vocabulary_config as vocab
from stage3.evidence import Evidence
from stage3.mentions import (
    COMMA,
    CONNECTIVE_WORDS,
    STOP,
    VERB_OF,
    Mention,
    find_mentions,
    names_object,
    read_caption,
    read_text,
)

__all__ = ["MODE_REWARDS", "PARTS", "REWARD_WEIGHTS", "Evidence", "ModeReward", "Reward", "find_mentions",
           "label_mentions", "physics_aware_reward"]

REWARD_WEIGHTS = {"objects": 0.40, "temporal": 0.25, "detail": 0.20, "hallucination": 0.15}
PARTS = tuple(REWARD_WEIGHTS)


@dataclass(frozen=True)
class ModeReward:
    """What the reward expects of the captions of one mode. Targets are counts at which a score is full."""

    length_window: tuple[int, int, int, int]  # words at which the length gate is 0, 1, 1 and 0, linear between
    verb_target: int  # distinct dynamic verbs
    connective_target: int  # distinct connectives
    clauses_count_as_connectives: bool  # every true clause with a verb after the first counts like a connective
    attribute_scores: tuple[float, ...]  # score of a class for 0, 1, 2, ... kinds of attribute
    scene_target: int  # kinds of scene fact
    scene_weight: float  # share of scene facts in R_detail
    telegraphic: bool  # clauses may lack function words, and one that begins with a bare verb is about the driver
    sentence_weight: float  # the language gate is the better of sentence_weight x sentence grammar
    telegram_weight: float  # and telegram_weight x telegram grammar
    free_stale_share: float  # share of words in sentences that say nothing new, up to which they cost nothing
    lone_words: int  # number of single words between commas that make a pile


MODE_REWARDS = {  # a further mode needs one entry here, and nothing else in this file
    "microscope": ModeReward(
        length_window=(8, 32, 500, 900),  # 300 real reports: 142 to 667 words, 95% under 482
        verb_target=4, connective_target=3, clauses_count_as_connectives=False,
        attribute_scores=(0.0, 0.7, 1.0), scene_target=3, scene_weight=0.4,
        telegraphic=False, sentence_weight=1.0, telegram_weight=0.5,
        free_stale_share=0.45, lone_words=3,  # stale words in real reports: median 21%, 95th percentile 41%
    ),
    "copilot": ModeReward(
        length_window=(1, 4, 20, 70),  # 300 toy lines: 12 to 27 words, median 16
        verb_target=2, connective_target=1, clauses_count_as_connectives=True,
        attribute_scores=(0.0, 1.0), scene_target=1, scene_weight=0.2,
        telegraphic=True, sentence_weight=0.0, telegram_weight=1.0,
        free_stale_share=0.3, lone_words=4,
    ),
}

# Numbers of the four parts. They are set by hand; tests/test_reward.py holds the comparisons that they must satisfy.
CRITICAL_ERROR_FACTOR = 0.3  # x R_hall if an error is about a safety-critical class
NO_CLAIM_SCORE = 0.5  # R_hall of a caption that claims nothing: no error, but no help either
UNCONFIRMED_ERROR = 0.5  # "ambulance" where a truck is present, as a fraction of an error
VAGUE_RECALL = 0.5  # recall of a class that is only named by "vehicle" or "van"
GROUNDING_FLOOR = 0.3  # grounding of a caption that is correct but has recall 0
MAX_VERBS_PER_CLAUSE = 2  # so that a list of verbs is not worth more than a sentence
MAX_CONNECTIVES_PER_SENTENCE = 2
ORDER_COST = 0.6  # the order factor loses this if every pair of classes is in the wrong order
ORDER_MARGIN = 0.1  # of the clip: appearances that are closer count as simultaneous


@dataclass(frozen=True)
class Reward:
    """The four parts and their weighted sum, each in [0, 1]."""

    objects: float
    temporal: float
    detail: float
    hallucination: float
    total: float


def physics_aware_reward(caption, evidence, mode, reference=None):
    """The reward of one caption -> Reward.

    caption: text. evidence: Evidence of the clip. mode: a key of MODE_REWARDS. reference: the reference caption; if
    given, only scene facts (night, rain) that it also states count. Its objects are not read.
    Raises ValueError for an unknown mode.
    """
    if mode not in MODE_REWARDS:
        raise ValueError(f"unknown mode {mode!r}: the modes are {', '.join(map(repr, MODE_REWARDS))}")
    settings = MODE_REWARDS[mode]
    caption = read_caption(caption)
    if not caption.words:
        return Reward(0.0, 0.0, 0.0, 0.0, 0.0)
    claimed = compare_claims(caption.claims, evidence)
    mark_clauses(caption, claimed, evidence, settings)
    new_share = new_words_share(caption)
    gate = caption_gate(caption, claimed, new_share, settings)
    style_gate = gate * length_gate(len(caption.words), new_share, settings)
    parts = {
        "objects": gate * objects_part(claimed, evidence),
        "temporal": style_gate * temporal_part(caption, claimed, evidence, settings),
        "detail": style_gate * detail_part(caption, claimed, evidence, settings, reference),
        "hallucination": gate * hallucination_part(claimed, evidence),
    }
    return Reward(**parts, total=sum(REWARD_WEIGHTS[name] * parts[name] for name in PARTS))


# ---------------------------------------------------------------------------------------------------------------------
# The four parts, each in [0, 1], before gates


def objects_part(claimed, evidence):
    """R_obj = F1 of the set of named classes: precision over known classes, recall over salient ones.

    A false denial counts as an error, so it scores below silence. Source: the object sets of CHAIR, AMBER's coverage.
    """
    if not evidence.salient and not claimed.errors:
        return 1.0
    precision, recall = claimed.precision, claimed.recall
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def hallucination_part(claimed, evidence):
    """R_hall = 1 - errors / claims, reduced further if an error is about a safety-critical class.

    errors: absent classes named + present classes denied + half of each special vehicle that no detector can confirm.
    Source: CHAIR_i, on sets.
    """
    claims = len(claimed.correct) + claimed.errors
    if not claims:
        return NO_CLAIM_SCORE if evidence.salient else 1.0
    share_correct = 1.0 - claimed.errors / claims
    wrong = claimed.invented | claimed.falsely_denied
    wrong_names = {name for names in wrong for name in names.split("|")}
    return share_correct if wrong_names.isdisjoint(vocab.SAFETY_CRITICAL) else CRITICAL_ERROR_FACTOR * share_correct


def temporal_part(caption, claimed, evidence, settings):
    """R_temp = grounding x order x mean of (verbs / target, connectives / target), each at most 1."""
    verbs = min(1.0, _count_verbs(caption, evidence, settings) / settings.verb_target)
    connectives = min(1.0, _count_connectives(caption, settings) / settings.connective_target)
    return claimed.grounding * order_factor(caption, evidence) * (0.5 * verbs + 0.5 * connectives)


def _count_verbs(caption, evidence, settings):
    """Distinct verbs of motion in true clauses. The camera's own motion gives at most half the target, unless nothing
    else can be described."""
    object_verbs, ego_verbs = set(), set()
    for clause in caption.clauses:
        verbs = list(dict.fromkeys(clause.verbs))[:MAX_VERBS_PER_CLAUSE]
        if clause.truth == "object":
            object_verbs.update(verbs)
        elif clause.truth == "ego":
            ego_verbs.update(verbs)
    ego_limit = settings.verb_target / 2 if evidence.salient else settings.verb_target
    return len(object_verbs) + min(len(ego_verbs - object_verbs), ego_limit)


def _count_connectives(caption, settings):
    """Distinct connectives that belong to true clauses."""
    counted = set()
    for clauses in caption.sentences:
        links = []
        for clause, following in pairwise([*clauses, clauses[-1]]):
            owner = clause if clause.claims or clause.ego else following  # "Then, ..." belongs to the clause after it
            if owner.is_true:
                links += [caption.connectives[i] for i in clause.span if caption.connectives[i]]
        new = [link for link in dict.fromkeys(links) if link not in counted]
        counted.update(new[:MAX_CONNECTIVES_PER_SENTENCE])
    if settings.clauses_count_as_connectives:
        true_clauses = sum(clause.is_true and bool(clause.verbs) for clause in caption.clauses)
        return max(len(counted), true_clauses - 1)
    return len(counted)


def order_factor(caption, evidence):
    """1 - ORDER_COST x the share of pairs of classes that the text introduces against the order of the clip.

    A pair counts if both classes are present and came into view at times that differ by more than ORDER_MARGIN. 1 if
    no pair counts or no times are known.
    """
    if not evidence.seen:
        return 1.0
    step_of = {}  # class -> number of the step that first names it
    for number, names in enumerate(_narrated_steps(caption)):
        for name in names:
            if name in evidence.present and name in evidence.seen:
                step_of.setdefault(name, number)
    right = wrong = 0
    for a, b in permutations(step_of, 2):
        if step_of[a] < step_of[b]:
            gap = evidence.seen[b][0] - evidence.seen[a][0]
            right += gap > ORDER_MARGIN
            wrong += gap < -ORDER_MARGIN
    return 1.0 - ORDER_COST * wrong / (right + wrong) if wrong else 1.0


def _narrated_steps(caption):
    """Lists of the classes named as present, one list per step, in the order in which the text says the steps happen.

    Clauses joined by "while", "as", "when" are one step; "after" and an initial "before" swap their clauses.
    """
    all_steps = []
    for clauses in caption.sentences:
        steps, pending, swap_next = [], [], False
        for clause in clauses:
            for claim in clause.claims:
                if not claim.negated and names_object(claim):
                    pending += claim.classes
            if not clause.verbs and vocab.AUXILIARIES.isdisjoint(caption.words[clause.first:clause.stop]):
                continue  # an item of a list, or "at the traffic light,": part of the step that follows
            first_word = caption.words[clause.first]
            if steps and first_word in vocab.SIMULTANEOUS:
                steps[-1] += pending
            elif steps and (first_word == "after" or swap_next):
                steps.insert(len(steps) - 1, pending)
                swap_next = False
            else:
                swap_next = not steps and first_word == "before"
                steps.append(pending)
            pending = []
        if steps:
            steps[-1] += pending
        all_steps += steps or [pending]
    return all_steps


def detail_part(caption, claimed, evidence, settings, reference):
    """R_detail = grounding x ((1 - w) described + w scene), w = scene_weight.

    described: mean over the salient classes of attribute_scores[kinds of attribute]. scene: kinds of scene fact /
    target, at most 1; with a reference caption only facts that it also states count.
    """
    kinds, scores = _attribute_kinds(caption), settings.attribute_scores
    described = [scores[min(len(kinds.get(name, ())), len(scores) - 1)] for name in evidence.salient or claimed.correct]
    scene = scene_facts(caption)
    if reference is not None:
        stated = scene_facts(read_caption(reference))
        scene = {kind: values & stated.get(kind, set()) for kind, values in scene.items()}
    scene_kinds = sum(bool(values) for values in scene.values())
    part = (1 - settings.scene_weight) * (sum(described) / len(described) if described else 1.0)
    part += settings.scene_weight * min(1.0, scene_kinds / settings.scene_target)
    return claimed.grounding * part


def _attribute_kinds(caption):
    """class -> kinds of attribute (colour, size, state, position, number) next to its mentions in true clauses."""
    kinds = {}
    for clause in caption.clauses:
        named = [claim for claim in clause.claims if claim.kind == "object" and not claim.negated]
        if clause.truth != "object" or not named:
            continue
        for i in clause.span:
            if caption.attributes[i]:
                # The nearest mention; a mention after the attribute wins a tie ("the car behind a large truck").
                nearest = min(named, key=lambda c: c.first - i if c.first > i else i - c.last + 0.5)
                for name in nearest.classes:
                    kinds.setdefault(name, set()).add(caption.attributes[i])
    return kinds


def scene_facts(caption):
    """kind of scene fact -> values stated, without kinds that contradict themselves (night and day)."""
    facts = {}
    for kind, value in filter(None, caption.scenes):
        facts.setdefault(kind, set()).add(value)
    return {kind: values for kind, values in facts.items() if len(values) == 1 or kind not in vocab.EXCLUSIVE}


# ---------------------------------------------------------------------------------------------------------------------
# Claims against evidence


@dataclass(frozen=True)
class ClaimedClasses:
    """A caption's claims after the check, as sets: so saying a thing twice changes nothing."""

    correct: frozenset[str]  # named and present
    invented: frozenset[str]  # named and absent ("car|truck" for a word that either would satisfy)
    falsely_denied: frozenset[str]  # only denied, but present
    unconfirmed: int  # special vehicles whose kind no detector can confirm
    true_denials: int  # classes only denied, and not present
    recall: float  # share of the salient classes that are named

    @property
    def errors(self):
        return len(self.invented) + len(self.falsely_denied) + UNCONFIRMED_ERROR * self.unconfirmed

    @property
    def precision(self):
        """1 if nothing is claimed."""
        return len(self.correct) / (len(self.correct) + self.errors) if self.errors else 1.0

    @property
    def grounding(self):
        """Factor in [0, 1] of R_temp and R_detail: style scores only as far as the caption is true and complete."""
        return self.precision * (GROUNDING_FLOOR + (1 - GROUNDING_FLOOR) * self.recall)


def _verdict(claim, evidence):
    """ "supported", "unsupported", "unknown" or "negated" for a single claim."""
    if claim.negated:
        return "negated"
    if not evidence.present.isdisjoint(claim.classes):
        return "supported"
    return "unsupported" if evidence.unknown.isdisjoint(claim.classes) else "unknown"


def compare_claims(claims, evidence):
    """ClaimedClasses of a caption's claims. A class that is named as present anywhere is not denied."""
    named, denied, invented, unconfirmed, vague = set(), set(), set(), set(), []
    for claim in claims:
        verdict = _verdict(claim, evidence)
        if claim.kind == "object":
            names = denied if claim.negated else named
            names.update(claim.classes)
        elif claim.negated or claim.kind == "any" and verdict == "supported":
            vague.append(claim)
        elif verdict == "unsupported":
            invented.add("|".join(claim.classes))
        elif verdict == "supported":
            unconfirmed.add(claim.classes)
    covered = dict.fromkeys(named & evidence.salient, 1.0)
    for claim in vague:
        if not named.isdisjoint(claim.classes):
            continue  # "a car ... no vehicles": other vehicles
        first_present = next((name for name in claim.classes if name in evidence.present), None)
        if claim.negated:
            denied.add(first_present)
        elif first_present in evidence.salient and covered.keys().isdisjoint(claim.classes):
            covered[first_present] = VAGUE_RECALL
    denied -= named | {None}
    return ClaimedClasses(
        correct=frozenset(named & evidence.present),
        invented=frozenset(invented | named - evidence.present - evidence.unknown),
        falsely_denied=frozenset(denied & evidence.present),
        unconfirmed=len(unconfirmed),
        true_denials=len(denied - evidence.present),
        recall=sum(covered.values()) / len(evidence.salient) if evidence.salient else 1.0,
    )


def mark_clauses(caption, claimed, evidence, settings):
    """Set the truth of each clause (see Clause).

    A clause that names nothing inherits the truth of the clause before it in its sentence ("slows, then stops") or,
    after "it" or "they", in the text, unless it has a subject of its own ("while a figure waits").
    """
    sentence_starts = {sentence[0].first for sentence in caption.sentences}
    truth = ""
    for clause in caption.clauses:
        first_word = caption.words[clause.first]
        verdicts = {_verdict(claim, evidence) for claim in clause.claims}
        denied = {name for claim in clause.claims if claim.negated for name in claim.classes}
        inherited = truth if clause.first not in sentence_starts or first_word in vocab.CONTINUING else ""
        is_command = settings.telegraphic and first_word in VERB_OF and not clause.claims and inherited != "false"
        if "unsupported" in verdicts or not claimed.falsely_denied.isdisjoint(denied):
            truth = "false"
        elif "supported" in verdicts:
            truth = "object"
        elif clause.ego or is_command:
            truth = "ego"
        else:
            truth = "" if _has_own_subject(caption, clause) else inherited
        clause.truth = truth


def _has_own_subject(caption, clause):
    """A determiner comes before the clause's first verb: "while a figure waits", not "at the corner"."""
    verb = next((i for i in clause.span if caption.verbs[i]), clause.first)
    start = clause.first + (caption.words[clause.first] in vocab.CONTINUING)
    return not vocab.DETERMINERS.isdisjoint(caption.words[start:verb])


def label_mentions(text, evidence):
    """The mentions that a report colours: list[(Mention, verdict)] in the order of the text.

    verdict: "supported", "unsupported" (the detector did not see it, which does not prove that it is absent),
    "unknown", or "negated" (a denial; "unsupported" if the class is present and the text names it nowhere). The object
    of a word that several classes satisfy ("van") is its classes joined by "|".
    """
    reading = read_text(text)
    claimed = compare_claims(reading.claims, evidence)
    labels = []
    for claim in reading.claims:
        start, end = reading.starts[claim.first], reading.ends[claim.last]
        groups = [(name,) for name in claim.classes] if names_object(claim) else [claim.classes]
        for classes in groups:
            verdict = _verdict(claim._replace(classes=classes), evidence)
            if claim.negated and not claimed.falsely_denied.isdisjoint(classes):
                verdict = "unsupported"
            labels.append((Mention("|".join(classes), claim.negated, start, end), verdict))
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# Gates: is the text language, and does it say something? The parts above only count, so without gates lists of classes,
# stuffed adjectives, repetition and padding would score. Each gate is in [0, 1], and 1 for honest captions.
#
# _ramp rises from 0 to 1 between the two numbers of a pair. "Real": measured on 300 captions of BDD100K clips; "toy":
# on 300 Copilot lines of the toy world. Numbers without a figure are set by hand, as above.

FUNCTION_WORD_SHARE = (0.12, 0.25)  # real: 0.28 to 0.46
BROKEN_PAIR_SHARE = (0.02, 0.06)  # real: at most 0.003; the same captions with shuffled words: 0.034 to 0.11
TELEGRAM_SHARE = (0.35, 0.70)  # words in clauses that say something; toy: 0.92 to 0.96, keyword lists: under 0.24
DISTINCT_RUN_SHARE = (0.30, 0.65)  # of runs of three words; real: 0.91 to 1
ALL_STALE = 0.9  # share of stale words at which the cost is full; it begins at ModeReward.free_stale_share
VARIETY_FLOOR = 0.3  # the variety gate if everything is repeated
STALE_COST, MAX_PILE_COST, MAX_DENIAL_COST = 0.8, 0.8, 0.5  # the most that each of these gates takes away
PILE_COST = 2.0  # per share of words in piles; real: 0 for 95%, at most 0.025
FREE_DENIALS, DENIAL_COST = 3, 0.04  # true denials that are free (real: 1 at most in 99%), cost of each further one
LONG_CLAUSE = 8  # words; a longer clause is no telegram; toy: at most 7
LONG_CLAUSE_FUNCTION_WORDS = 0.2  # share from which a long clause may be a sentence instead
COMMAND_WORDS, FREE_COMMANDS = 4, 2  # "slow down": the longest command to the driver, and how many count
LONE_SCENE_CREDIT = 0.5  # words that a clause like "night" counts
PILE_OF_LOOKS, PILE_OF_VERBS, PILE_OF_CONNECTIVES, PILE_OF_ADJECTIVES = 4, 3, 3, 6  # words in a row
FREE_FRAGMENT = 2  # words of a telegraphic clause that may say nothing
BARE_RUN, MIN_INFLECTED = 8, 2  # of so many words in a row without function words, so many are inflected in English
LOOKS_RUN, MAX_LOOKS = 6, 2  # of so many words in a row without function words, at most so many are looks

AFTER_ARTICLE = frozenset("few other another single each several while no only inside very".split())  # may follow "a"
NEVER_LAST = vocab.ARTICLES | frozenset("of at with from into for and or while as because to than its their".split())
NO_VERB_AFTER = frozenset("of from with into at for".split())
PLACES = frozenset("road street traffic way lane highway intersection junction crosswalk".split())
PLAIN_COLOURS = frozenset("red blue green white black yellow orange brown purple pink".split())
LOOKS = ("colour", "size", "state")  # kinds of attribute that tend to be piled up
ADJECTIVE = re.compile(r"..+(?:ful|ous|ing|ive|ant|ent|ern|ish|[^l]y|ed|al|ic|ble|less|id|ary)$")
INFLECTED = ("s", "ed", "ing", "ly")


def _ramp(x, low, high):
    """0 below low, 1 above high, linear between."""
    return min(1.0, max(0.0, (x - low) / (high - low)))


def length_gate(num_words, new_share, settings):
    """Factor of R_temp and R_detail. Words in sentences that say nothing new do not help to reach the minimum."""
    low, full, most, high = settings.length_window
    return min(_ramp(num_words * new_share, low, full), 1.0 - _ramp(num_words, most, high))


def caption_gate(caption, claimed, new_share, settings):
    """Factor of all four parts: language x variety x focus x no piles x no list of denials."""
    language = max(settings.sentence_weight * _sentence_grammar(caption),
                   settings.telegram_weight * _telegram_grammar(caption, settings))
    variety = VARIETY_FLOOR + (1 - VARIETY_FLOOR) * _variety(caption)
    focus = 1.0 - STALE_COST * _ramp(1.0 - new_share, settings.free_stale_share, ALL_STALE)
    piles = 1.0 - min(MAX_PILE_COST, PILE_COST * _stuffed_share(caption, settings))
    denials = 1.0 - min(MAX_DENIAL_COST, DENIAL_COST * max(0, claimed.true_denials - FREE_DENIALS))
    return language * variety * focus * piles * denials


def _is_broken(reading, i):
    """Words i and i + 1 never follow each other in English: "the of", "car the", "has car", "from and", "the." """
    words, breaks, roles = reading.words, reading.breaks, reading.roles
    word, last = words[i], i + 1 == len(words)
    if last or breaks[i + 1] >= COMMA:
        return word in vocab.ARTICLES or word in NEVER_LAST and (last or breaks[i + 1] == STOP)
    after = words[i + 1]
    if word in vocab.ARTICLES:
        return after in vocab.FUNCTION_WORDS and after not in AFTER_ARTICLE
    if after in vocab.ARTICLES:
        return roles[i] in ("object", "any")
    if word in NO_VERB_AFTER:
        return after in vocab.AUXILIARIES or after in ("and", "or", "while")
    return word in vocab.BE and roles[i + 1] == "object" and not (i and words[i - 1] in ("there", "it", "not"))


def _sentence_grammar(caption):
    """1 for running English, 0 for a list of words or for words in disorder."""
    words = caption.words
    function_words = sum(word in vocab.FUNCTION_WORDS and word not in CONNECTIVE_WORDS for word in words)
    broken_pairs = sum(_is_broken(caption, i) for i in range(len(words)))
    in_order = 1.0 - _ramp(broken_pairs / len(words), *BROKEN_PAIR_SHARE)
    return _ramp(function_words / len(words), *FUNCTION_WORD_SHARE) * in_order


def _is_sentence(caption, clause):
    """A long clause reads like a sentence: enough function words, and no broken pair."""
    function_words = sum(caption.words[i] in vocab.FUNCTION_WORDS for i in clause.span)
    return function_words >= LONG_CLAUSE_FUNCTION_WORDS * len(clause.span) and not any(
        _is_broken(caption, i) for i in clause.span)


def _telegram_grammar(caption, settings):
    """1 for telegraphic clauses ("car ahead brakes"), 0 for bare nouns and word salad.

    Counts the words of clauses that say something about a thing, of scene facts ("at night") and of a few commands
    to the driver ("slow down"); a scene fact alone ("night") counts half a word.
    """
    words, roles = caption.words, caption.roles
    good, commands = 0.0, 0
    for clause in caption.clauses:
        span, length = clause.span, len(clause.span)
        if length > LONG_CLAUSE and not (settings.telegraphic and _is_sentence(caption, clause)):
            continue
        thing = any(roles[i] or words[i] in PLACES for i in span)
        scene = any(caption.scenes[i] for i in span)
        predicate = clause.verbs or any(
            caption.attributes[i] or words[i] in vocab.FUNCTION_WORDS and not roles[i] for i in span)
        list_of_objects = any(b.first == a.last + 1 for a, b in pairwise(clause.claims))
        if thing and predicate and not list_of_objects or scene and not thing and length > 1:
            good += length
        elif clause.verbs and not thing and length <= COMMAND_WORDS and commands < FREE_COMMANDS:
            good += length
            commands += 1
        elif scene and not thing:
            good += LONE_SCENE_CREDIT
    return _ramp(good / len(words), *TELEGRAM_SHARE)


def _variety(caption):
    """1 while most runs of three words within sentences are distinct, 0 when most are repeated."""
    runs = []
    for clauses in caption.sentences:
        words = caption.words[clauses[0].first:clauses[-1].stop]
        runs += zip(words, words[1:], words[2:], strict=False)
    return _ramp(len(set(runs)) / len(runs), *DISTINCT_RUN_SHARE) if runs else 1.0


def _piles(caption, members, least):
    """Indices of words in runs of at least `least` members within a sentence. "and" may come between members."""
    found, run = set(), []
    for i, member in enumerate(members):
        if not member:
            continue
        adjacent = run and (i == run[-1] + 1 or i == run[-1] + 2 and caption.words[i - 1] == "and")
        if not adjacent or STOP in caption.breaks[run[-1] + 1:i + 1]:
            run = []
        run.append(i)
        if len(run) == least:
            found.update(run)
        elif len(run) > least:
            found.add(i)
    return found


def _stuffed_share(caption, settings):
    """Share of the words in piles (adjectives, verbs, connectives, single words between commas) and in stretches that
    say nothing about anything."""
    words, breaks, roles = caption.words, caption.breaks, caption.roles
    clause_starts = [True, *(gap >= COMMA for gap in breaks[1:]), True]
    alone = [clause_starts[i] and clause_starts[i + 1] and not role for i, role in enumerate(roles)]
    looks = [attribute in LOOKS for attribute in caption.attributes]
    moves = [verb and not look for verb, look in zip(caption.verbs, looks, strict=True)]
    links = [word in CONNECTIVE_WORDS and not role for word, role in zip(words, roles, strict=True)]
    stuffed = _piles(caption, looks, PILE_OF_LOOKS) | _piles(caption, moves, PILE_OF_VERBS)
    stuffed |= _piles(caption, links, PILE_OF_CONNECTIVES) | _piles(caption, alone, settings.lone_words)
    for i in range(1, len(words)):
        if breaks[i] < COMMA and words[i - 1] in PLAIN_COLOURS and words[i] in PLAIN_COLOURS:  # "red blue car"
            stuffed |= {i - 1, i}
    if settings.telegraphic:
        for clause in caption.clauses:
            span = clause.span
            about = clause.verbs or any(
                roles[i] or caption.scenes[i] or words[i] in vocab.FUNCTION_WORDS or words[i] in PLACES for i in span)
            if len(span) > FREE_FRAGMENT and not about:
                stuffed.update(span)
    else:
        adjectives = [look or ADJECTIVE.match(word) and word not in vocab.FUNCTION_WORDS
                      for word, look in zip(words, looks, strict=True)]
        stuffed |= _piles(caption, adjectives, PILE_OF_ADJECTIVES)
        for clauses in caption.sentences:
            stuffed |= _not_running_english(caption, range(clauses[0].first, clauses[-1].stop), looks)
    return len(stuffed) / len(words)


def _not_running_english(caption, span, looks):
    """Indices of the words of a sentence that are not running English: long runs without function words that have too
    few inflected words or too many looks, or a whole sentence without function words or of connectives only."""
    words, found, content = caption.words, set(), []
    for i in span:
        if words[i] in vocab.FUNCTION_WORDS:
            content = []
            continue
        content.append(i)
        run = content[-BARE_RUN:]
        if len(run) == BARE_RUN and sum(words[j].endswith(INFLECTED) for j in run) < MIN_INFLECTED:
            found.update(run)
        run = content[-LOOKS_RUN:]
        if len(run) == LOOKS_RUN and sum(looks[j] for j in run) > MAX_LOOKS:
            found.update(run)
    says_something = any(caption.roles[i] or caption.verbs[i] for i in span)
    bare = len(content) == len(span) or all(words[i] in CONNECTIVE_WORDS for i in span)
    if bare and not says_something:
        found.update(span)
    return found


def new_words_share(caption):
    """Share of the words that are in sentences which say something that no other sentence says.

    Sentences are taken from the one that says most, so that their order in the text does not matter.
    """
    scenes = {(kind, value) for kind, values in scene_facts(caption).items() for value in values}
    sentences = []
    for clauses in caption.sentences:
        facts = _sentence_facts(caption, clauses, scenes)
        sentences.append((facts, clauses[-1].stop - clauses[0].first))
    sentences.sort(key=lambda item: (-len(item[0]), item[1], sorted(map(str, item[0]))))
    known, new_words = set(), 0
    for facts, length in sentences:
        if not facts <= known:
            new_words += length
        known |= facts
    return new_words / len(caption.words)


def _sentence_facts(caption, clauses, scenes):
    """What a sentence says, as pairs: (who, "is"), (who, attribute or verb), (kind, value) of a scene fact."""
    ego = ("ego",)
    facts, subjects = set(), set()
    for clause in clauses:
        named = {claim.classes for claim in clause.claims if not claim.negated}
        if named or clause.claims and not clause.ego:
            subjects = named
        elif clause.ego:
            subjects = {ego}
        words = [caption.words[i] for i in clause.span if caption.attributes[i] or caption.verbs[i]]
        for subject in subjects:
            facts.update((subject, word) for word in words)
        facts.update((subject, "is") for subject in subjects - {ego})
        facts.update(caption.scenes[i] for i in clause.span if caption.scenes[i] in scenes)
        if clause.truth == "ego" and not subjects:
            facts.update(("ego", verb) for verb in clause.verbs)
    return facts
