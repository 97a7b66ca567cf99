"""The physics-aware reward of stage 3: what a caption says, checked against what a detector saw.

    R = 0.40 R_obj + 0.25 R_temp + 0.20 R_detail + 0.15 R_hall        each part in [0, 1]

A pure function of (caption, evidence, mode, reference): no model, file, clock or random number takes part. This file
holds, in this order, the settings, the reward and its four parts, the check of a caption's claims, and the gates that
keep degenerate text from scoring. docs/reward.md explains the formulas and the known limits.
"""

import functools
import math
import re
from dataclasses import dataclass, replace
from itertools import islice, pairwise, permutations

from stage3 import vocabulary_config as vocab
from stage3.evidence import Evidence
from stage3.mentions import (
    COMMA,
    CONNECTIVE_WORDS,
    LIGHT_VERBS,
    STOP,
    WORD,
    Mention,
    find_mentions,
    has_own_subject,
    names_object,
    read_caption,
)
from training.config import WORDS, Words

__all__ = ["MODE_REWARDS", "PARTS", "REWARD_WEIGHTS", "Evidence", "ModeReward", "Reward", "find_mentions",
           "judge_facts", "label_facts", "label_mentions", "physics_aware_reward"]

REWARD_WEIGHTS = {"objects": 0.40, "temporal": 0.25, "detail": 0.20, "hallucination": 0.15}
PARTS = tuple(REWARD_WEIGHTS)


@dataclass(frozen=True)
class ModeReward:
    """What the reward expects of the captions of one mode. Targets are counts at which a score is full."""

    words: Words  # numbers of words that are paid
    verb_target: int  # distinct dynamic verbs
    connective_target: int  # distinct connectives
    clauses_count_as_connectives: bool  # every true clause with a verb after the first counts like a connective
    attribute_scores: tuple[float, ...]  # score of a class for 0, 1, 2, ... kinds of attribute
    scene_target: int  # kinds of scene fact
    scene_weight: float  # share of scene facts in R_detail
    telegraphic: bool  # a clause that begins with a bare verb is about the driver ("slow down")
    free_stale_share: float  # share of words in sentences that say nothing new, up to which they cost nothing
    lone_words: int  # number of single words between commas that make a pile


MODE_REWARDS = {  # a further mode needs one entry here, and nothing else in this file
    "microscope": ModeReward(
        words=WORDS["microscope"],
        verb_target=4, connective_target=3, clauses_count_as_connectives=False,
        attribute_scores=(0.0, 0.7, 1.0), scene_target=3, scene_weight=0.4,
        telegraphic=False,
        free_stale_share=0.65, lone_words=3,  # stale words in real reports: median 21%, at most 66%
    ),
    "copilot": ModeReward(
        words=WORDS["copilot"],
        verb_target=2, connective_target=1, clauses_count_as_connectives=True,
        attribute_scores=(0.0, 1.0), scene_target=1, scene_weight=0.2,
        telegraphic=True,
        free_stale_share=0.2, lone_words=4,
    ),
}

# Numbers of the four parts. They are set by hand; tests/test_reward.py holds the comparisons that they must satisfy.
CRITICAL_ERROR_FACTOR = 0.3  # x R_hall if an error is about a safety-critical class
NO_CLAIM_SCORE = 0.5  # R_hall of a caption that claims nothing: no error, but no help either
UNCONFIRMED_ERROR = 0.5  # "ambulance" where a truck is present, as a fraction of an error
CONTRADICTED_ERROR = 4.0  # "red light" where it is green, in errors: at 1, stage 3 told more wrong sides than stage 2
UNSUPPORTED_PAY = 1 / 3  # of a verb, attribute or scene fact that neither evidence nor the reference supports
SCENE_ERROR_COST = 0.5  # R_detail loses this share for each kind of scene fact that contradicts the reference
IDLE_COST = 0.5  # style loses this x the share of words that say nothing, beyond the reference's own share
FREE_CONNECTIVES = 1.25  # x the reference's rate: more connectives than that lower R_temp
VAGUE_RECALL = 0.5  # recall of a class that is only named by "vehicle" or "van"
GROUNDING_FLOOR = 0.3  # grounding of a caption that is correct but has recall 0
MAX_VERBS_PER_CLAUSE = 2  # so that a list of verbs is not worth more than a sentence
MAX_CONNECTIVES_PER_SENTENCE = 2
ORDER_COST = 0.6  # the order factor loses this if every pair of classes is in the wrong order
MAX_STEP_CLASSES = 2  # a step with more classes lists them: the order counts where they are told of singly
ORDER_MARGIN = 0.1  # of the clip: appearances that are closer count as simultaneous


CROSSING = frozenset({"left to right", "right to left"})
ACTIONS = frozenset({"verb", "event"})
LOOKS_AND_PLACES = frozenset({*vocab.ATTRIBUTES, "subtype"})


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

    caption: text. evidence: Evidence of the clip. mode: a key of MODE_REWARDS. reference: the reference caption. It
    vouches for verbs, attributes and scene facts, never for an object; a colour, side or way is contradicted where it
    gives another and the evidence does not know. Without it, all that the evidence does not contradict counts. A text
    of more than four times the mode's longest is scored 0 without being read.
    Raises ValueError for an unknown mode.
    """
    if mode not in MODE_REWARDS:
        raise ValueError(f"unknown mode {mode!r}: the modes are {', '.join(map(repr, MODE_REWARDS))}")
    settings = MODE_REWARDS[mode]
    caption = read_caption(caption) if _is_readable(caption, settings) else None
    if not caption or not caption.words:
        return Reward(0.0, 0.0, 0.0, 0.0, 0.0)
    said = reference_facts(reference) if reference is not None else None
    verdicts = judge_facts(caption, evidence, said)
    claimed = compare_claims(caption, evidence, verdicts)
    mark_clauses(caption, claimed, evidence, settings)
    support = find_support(caption, verdicts, evidence, said)
    new_share = new_words_share(caption, settings)
    gate = math.prod(caption_gates(caption, claimed, new_share, settings).values())
    style_gate = gate * length_gate(caption, new_share, said, settings)
    style_gate *= idle_gate(caption, support, evidence, said)
    parts = {
        "objects": gate * objects_part(claimed, evidence),
        "temporal": style_gate * temporal_part(caption, claimed, evidence, support, said, settings),
        "detail": style_gate * detail_part(caption, claimed, evidence, support, said, settings),
        "hallucination": gate * hallucination_part(claimed, evidence),
    }
    return Reward(**parts, total=sum(REWARD_WEIGHTS[name] * parts[name] for name in PARTS))


def _is_readable(text, settings):
    """The text is short enough to be an answer of the mode. Longer ones are not parsed: 100 kB would take too long."""
    most = 4 * settings.words.paid[3]
    return sum(1 for _ in islice(WORD.finditer(text), most + 1)) <= most


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

    errors: absent classes named + present classes denied + CONTRADICTED_ERROR of each kind of fact about a class (its
    colour, side, number) that is contradicted + half of each special vehicle that no detector can confirm.
    Source: CHAIR_i, on sets.
    """
    claims = len(claimed.correct) + claimed.errors
    if not claims:
        return NO_CLAIM_SCORE if evidence.salient else 1.0
    share_correct = 1.0 - claimed.errors / claims
    wrong = claimed.invented | claimed.falsely_denied
    wrong_names = {name for names in wrong for name in names.split("|")}
    wrong_light = (("traffic light",), "light") in claimed.contradicted
    critical = wrong_light or not wrong_names.isdisjoint(vocab.SAFETY_CRITICAL)
    return CRITICAL_ERROR_FACTOR * share_correct if critical else share_correct


def temporal_part(caption, claimed, evidence, support, said, settings):
    """R_temp = grounding x order x supported x mean of (verbs / target, connectives / target), each at most 1.

    supported: the square of the mean support of what the caption says that things do.
    """
    verbs = min(1.0, _paid_verbs(caption, evidence, support, settings) / settings.verb_target)
    connectives = min(1.0, _count_connectives(caption, settings) / settings.connective_target)
    restraint = _connective_restraint(caption, said) if said else 1.0
    supported = mean_support(caption, support, evidence, ACTIONS) ** 2
    factor = claimed.grounding * order_factor(caption, evidence) * supported
    return factor * (0.5 * verbs + 0.5 * connectives * restraint)


def _paid_verbs(caption, evidence, support, settings):
    """Sum of the support of the distinct verbs of motion in true clauses. The camera's own motion gives at most half
    the target, unless nothing else can be described."""
    object_verbs, ego_verbs = {}, {}
    support_at = {statement.word: value for statement, value in zip(caption.statements, support, strict=True)
                  if statement.kind == "verb"}
    for clause in caption.clauses:
        verbs = object_verbs if clause.truth == "object" else ego_verbs if clause.truth == "ego" else {}
        counted = set()
        for i in clause.span:
            verb = caption.verbs[i]
            if i in support_at and (verb in counted or len(counted) < MAX_VERBS_PER_CLAUSE):
                counted.add(verb)
                verbs[verb] = max(verbs.get(verb, 0.0), support_at[i])
    ego_limit = settings.verb_target / 2 if evidence.salient else settings.verb_target
    ego = sum(value for verb, value in ego_verbs.items() if verb not in object_verbs)
    return sum(object_verbs.values()) + min(ego, ego_limit)


def _connective_restraint(caption, said):
    """Below 1 for a caption that has a connective in many more places than the reference."""
    rate = sum(map(bool, caption.connectives)) / len(caption.words)
    return min(1.0, FREE_CONNECTIVES * said.connective_rate / rate) if rate else 1.0


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
    step_of, listed = {}, {}  # class -> number of the first step that tells of it, or only lists it
    for number, (names, tells) in enumerate(_narrated_steps(caption)):
        names = {name for name in names if name in evidence.present and name in evidence.seen}
        for name in names:
            (step_of if tells and len(names) <= MAX_STEP_CLASSES else listed).setdefault(name, number)
    step_of = listed | step_of
    right = wrong = 0
    for a, b in permutations(step_of, 2):
        if step_of[a] < step_of[b]:
            gap = evidence.seen[b][0] - evidence.seen[a][0]
            right += gap > ORDER_MARGIN
            wrong += gap < -ORDER_MARGIN
    return 1.0 - ORDER_COST * wrong / (right + wrong) if wrong else 1.0


def _narrated_steps(caption):
    """(classes named as present, whether it tells of them and does not only list them) of each step, in the order in
    which the text says the steps happen.

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
            tells = bool(clause.verbs) or len(pending) == 1 and first_word != "there"  # "there is a car, a bus": no
            if steps and first_word in vocab.SIMULTANEOUS:
                steps[-1] = (steps[-1][0] + pending, steps[-1][1] or tells)
            elif steps and (first_word == "after" or swap_next):
                steps.insert(len(steps) - 1, (pending, tells))
                swap_next = False
            else:
                swap_next = not steps and first_word == "before"
                steps.append((pending, tells))
            pending = []
        if steps:
            steps[-1] = (steps[-1][0] + pending, steps[-1][1])
        all_steps += steps or [(pending, False)]
    return all_steps


def detail_part(caption, claimed, evidence, support, said, settings):
    """R_detail = grounding x ((1 - w) described + w scene) x (1 - SCENE_ERROR_COST) ** wrong scene facts.

    w = scene_weight.
    described: mean over the salient classes of attribute_scores[kinds of attribute, each x its support], x the mean
    support of all attributes. scene: kinds of scene fact / target, at most 1; of those that the reference does not
    state, a third.
    """
    kinds = _attribute_kinds(caption, support)
    described = [_attribute_score(kinds.get(name, {}), settings) for name in evidence.salient or claimed.correct]
    described = sum(described) / len(described) if described else 1.0
    facts = scene_facts(caption)
    scene, wrong = _paid_scene(facts, said)
    mean_scene = scene / max(1, len(facts))
    part = (1 - settings.scene_weight) * described * mean_support(caption, support, evidence, LOOKS_AND_PLACES)
    part += settings.scene_weight * min(1.0, scene / settings.scene_target) * mean_scene
    return claimed.grounding * part * (1 - SCENE_ERROR_COST) ** wrong


def _attribute_score(kinds, settings):
    """attribute_scores at the sum of the supports of a class's kinds of attribute, linear between whole numbers."""
    scores, total = settings.attribute_scores, sum(kinds.values())
    whole = int(total)
    if whole >= len(scores) - 1:
        return scores[-1]
    return scores[whole] + (total - whole) * (scores[whole + 1] - scores[whole])


def _attribute_kinds(caption, support):
    """class -> {kind of attribute (colour, size, state, position, number): its best support} in true clauses."""
    support_at = {statement.word: (statement, value) for statement, value in zip(
        caption.statements, support, strict=True) if statement.kind in vocab.ATTRIBUTES}
    kinds = {}
    for clause in caption.clauses:
        for i in clause.span if clause.truth == "object" else ():
            if i in support_at:
                statement, value = support_at[i]
                for name in statement.subject:
                    known = kinds.setdefault(name, {})
                    known[statement.kind] = max(known.get(statement.kind, 0.0), value)
    return kinds


def _paid_scene(facts, said):
    """(sum of the support of the kinds of scene fact stated, number of kinds that contradict the reference)."""
    if said is None:
        return sum(map(bool, facts.values())), 0
    pay, wrong = 0.0, 0
    for kind, values in facts.items():
        stated = said.scene.get(kind, set())
        near = any(frozenset((a, b)) in vocab.NEAR_SCENES for a in values for b in stated)
        if values & stated:
            pay += 1.0
        elif stated and kind in vocab.EXCLUSIVE and not near:
            wrong += 1
        else:
            pay += UNSUPPORTED_PAY
    return pay, wrong


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
    contradicted: frozenset[tuple]  # (classes, kind) of the facts that the evidence contradicts
    unconfirmed: int  # special vehicles whose kind no detector can confirm
    true_denials: int  # classes only denied, and not present
    recall: float  # share of the salient classes that are named

    @property
    def errors(self):
        absolute = len(self.invented) + len(self.falsely_denied)
        return absolute + UNCONFIRMED_ERROR * self.unconfirmed + CONTRADICTED_ERROR * len(self.contradicted)

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


def judge_facts(caption, evidence, said=None):
    """The verdict on each of the caption's facts: that of the evidence, or, where the evidence does not know and `said`
    (ReferenceFacts) tells otherwise, "contradicted".

    A light that "turns red" must have done so after what the text told of it before: it cannot turn red twice where the
    evidence shows red once.
    """
    verdicts, at = [judge_fact(fact, evidence) for fact in caption.facts], None
    for i, fact in enumerate(caption.facts):
        if said is not None and verdicts[i] == "unknown" and reference_contradicts(fact, evidence, said.told):
            verdicts[i] = "contradicted"
    light = evidence.light or ("unknown",)
    for i, fact in enumerate(caption.facts):
        if fact.kind != "light" or verdicts[i] != "supported" or "unknown" in light:
            continue
        begin = fact.first
        while begin > 0 and fact.first - begin < 3 and caption.breaks[begin] < COMMA:
            begin -= 1
        turns = not LIGHT_VERBS.isdisjoint(caption.verbs[begin:fact.first])
        first = 0 if at is None else at + 1 if turns and light[at] == fact.value else at
        later = next((k for k in range(first, len(light)) if light[k] == fact.value), None)
        if later is not None:
            at = later
        elif turns:
            verdicts[i] = "contradicted"
    return verdicts


def judge_fact(fact, evidence):
    """ "supported", "contradicted" or "unknown": what the evidence says of a Fact about classes that are present."""
    verdicts = {_judge(fact, name, evidence) for name in fact.classes if name in evidence.present}
    return "supported" if "supported" in verdicts else "contradicted" if verdicts == {"contradicted"} else "unknown"


def reference_contradicts(fact, evidence, told):
    """The reference gives another colour, side or way to a class of which the clip shows a single object.

    Of several cars one may be red and another blue, so there both texts can be right. told: ReferenceFacts.told.
    """
    names = [name for name in fact.classes if name in evidence.present]
    if fact.kind in ("from", "to"):
        names = [name for name in names if told.motion.get(name)]  # "on the left" says nothing of where it came from
    counts = evidence.counts or {}
    return bool(names) and all(counts.get(name) == 1 and _judge(fact, name, told) == "contradicted" for name in names)


def _judge(fact, name, evidence):
    """`judge_fact` for one class."""
    kind, value = fact.kind, fact.value
    if kind == "count":
        return _judge_count(value, (evidence.counts or {}).get(name))
    if kind == "light":
        return _judge_set({value}, set(evidence.light or ())) if name == "traffic light" else "unknown"
    if kind == "colour":
        seen = {vocab.VEHICLE_COLOURS.get(colour, colour) for colour in (evidence.colours or {}).get(name, ())}
        values = set(value.split("|"))
        similar = any(frozenset((a, b)) in vocab.SIMILAR_COLOURS for a in values for b in seen)
        return "unknown" if similar and not values & seen else _judge_set(values, seen)
    moves, sides = set((evidence.motion or {}).get(name, ())), set((evidence.sides or {}).get(name, ()))
    if kind in ("from", "to"):
        way = _way(fact)
        across = moves & CROSSING
        if across:
            return _judge_set({way}, across | moves & {"unknown"})
        return _judge_set({value}, sides)
    if kind == "side":
        return _judge_set({value}, sides)
    if value == "crosses":
        return _judge_set(CROSSING, moves)
    if value == "stands":  # what stands for a while may move before and after
        return "supported" if "stands" in moves else "unknown"
    opposite = {"approaches": "recedes", "recedes": "approaches"}[value]
    return _judge_set({value}, moves) if moves & {value, opposite} else "unknown"


def _way(fact):
    """The way across the picture that a fact of the kind "from" or "to" tells."""
    return "left to right" if (fact.kind, fact.value) in (("from", "left"), ("to", "right")) else "right to left"


def _judge_set(values, seen):
    """Any of `values` is among those seen; "unknown" among them stands for others that there may be."""
    if values & seen:
        return "supported"
    return "contradicted" if seen and "unknown" not in seen else "unknown"


def _judge_count(value, count):
    """value: the number that the text gives, 0 for several; count: most at one time, or None."""
    if count is None:
        return "unknown"
    if value == 0:
        return "supported" if count >= 3 else "contradicted" if count == 1 else "unknown"
    return "supported" if value == count else "contradicted" if value > count else "unknown"  # two of three


def compare_claims(caption, evidence, verdicts):
    """ClaimedClasses of a caption; `verdicts` are those of its facts. A class that is named as present anywhere is not
    denied, unless the denial is flat ("no truck anywhere")."""
    named, denied, flatly, singly = set(), set(), set(), set()
    invented, unconfirmed, vague = set(), set(), []
    for claim in caption.claims:
        verdict = _verdict(claim, evidence)
        if claim.kind == "object":
            names = denied if claim.negated else named
            names.update(claim.classes)
            if claim.flat:
                flatly.update(claim.classes)
            elif not claim.negated and len(claim.classes) == 1:
                singly.update(claim.classes)
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
    denied -= named - (flatly & singly) | {None}  # "no pedestrians" beside a cyclist is no contradiction
    contradicted = [fact for fact, verdict in zip(caption.facts, verdicts, strict=True) if verdict == "contradicted"]
    return ClaimedClasses(
        correct=frozenset(named & evidence.present),
        invented=frozenset(invented | named - evidence.present - evidence.unknown),
        contradicted=frozenset((fact.classes, fact.kind) for fact in contradicted),
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
        bare_verb = caption.verbs[clause.first] == first_word and not clause.claims
        is_command = settings.telegraphic and bare_verb and inherited != "false"
        if "unsupported" in verdicts or not claimed.falsely_denied.isdisjoint(denied):
            truth = "false"
        elif "supported" in verdicts:
            truth = "object"
        elif clause.ego or is_command:
            truth = "ego"
        else:
            truth = "" if has_own_subject(caption, clause) else inherited
        clause.truth = truth


def label_mentions(text, evidence):
    """The mentions that a report colours: list[(Mention, verdict)] in the order of the text.

    verdict: "supported", "unsupported" (the detector did not see it, which does not prove that it is absent),
    "unknown", or "negated" (a denial; "unsupported" if the class is present and the text names it nowhere). The object
    of a word that several classes satisfy ("van") is its classes joined by "|".
    """
    caption = read_caption(text)
    claimed = compare_claims(caption, evidence, ["unknown"] * len(caption.facts))
    labels = []
    for claim in caption.claims:
        start, end = caption.starts[claim.first], caption.ends[claim.last]
        groups = [(name,) for name in claim.classes] if names_object(claim) else [claim.classes]
        for classes in groups:
            verdict = _verdict(claim._replace(classes=classes), evidence)
            if claim.negated and not claimed.falsely_denied.isdisjoint(classes):
                verdict = "unsupported"
            labels.append((Mention("|".join(classes), claim.negated, start, end), verdict))
    return labels


def label_facts(text, evidence, reference=None):
    """What a report colours beside the mentions: list[(what, verdict, start, end)], in the order of the text.

    what: "car colour red", text[start:end] the words that say so. verdict: as `judge_facts` gives it, by the evidence
    and, if one is given, the reference caption; facts about classes that are not present are left out, as the mention
    is what is wrong.
    """
    caption, labels = read_caption(text), []
    said = reference_facts(reference) if reference is not None else None
    for fact, verdict in zip(caption.facts, judge_facts(caption, evidence, said), strict=True):
        if not evidence.present.isdisjoint(fact.classes):
            value = (fact.value or "several") if fact.kind == "count" else fact.value
            labels.append((f"{'|'.join(fact.classes)} {fact.kind} {value}", verdict, caption.starts[fact.first],
                           caption.ends[fact.last]))
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# What the evidence and the reference support


@dataclass(frozen=True)
class ReferenceFacts:
    """What a reference caption says."""

    statements: frozenset[tuple[str, str, str]]  # (class, "ego" or "" for an unknown subject; kind; value)
    told: Evidence  # the colours, sides and ways across the picture that it gives to classes
    scene: dict[str, set[str]]
    idle_share: float  # of its words are in clauses that say nothing
    connective_rate: float  # connectives per word
    function_words: int


@functools.lru_cache(maxsize=1024)
def reference_facts(text):
    """ReferenceFacts of a caption; kept, as a clip's answers share their reference."""
    caption, statements = read_caption(text), set()
    for statement in caption.statements:
        statements.update((name, statement.kind, statement.value) for name in statement.subject or ("",))
    said = ReferenceFacts(frozenset(statements), _told(caption.facts), scene_facts(caption), 0.0,
                          sum(map(bool, caption.connectives)) / max(1, len(caption.words)),
                          count_function_words(caption))
    return replace(said, idle_share=_idle_share(caption, [1.0] * len(caption.statements), None, said))


def _told(facts):
    """The colours, sides and ways of facts, as Evidence. A side of what goes across the picture is one of its two."""
    colours, sides, motion = {}, {}, {}
    for fact in facts:
        doubt = {"unknown"} if len(fact.classes) > 1 else set()  # "a red van" may be the car or the truck
        for name in fact.classes:
            if fact.kind == "colour":
                colours.setdefault(name, set()).update(fact.value.split("|"), doubt)
            elif fact.kind == "side":
                sides.setdefault(name, set()).update({fact.value}, doubt)
            elif fact.kind in ("from", "to"):
                motion.setdefault(name, set()).update({_way(fact)}, doubt)
                sides.setdefault(name, set()).add("unknown")
    return Evidence(frozenset(), colours=colours, sides=sides, motion=motion)


def find_support(caption, verdicts, evidence, said):
    """Support of each of the caption's statements: 1 where the evidence or the reference says the same of the same
    class, 0 where the evidence contradicts it, UNSUPPORTED_PAY between; 0 for an event (a crash) that is not supported.

    said: ReferenceFacts, or None: then all that is not contradicted is supported.
    """
    verdict_at = {}
    for fact, verdict in zip(caption.facts, verdicts, strict=True):
        if verdict == "supported" and said is not None and (fact.value == "approaches" or fact.kind == "light"):
            # what we pass grows too, and a colour may be right at another moment: here the reference decides
            continue
        for i in range(fact.first, fact.last + 1):
            verdict_at[i] = verdict
    support = []
    for statement in caption.statements:
        verdict = verdict_at.get(statement.word, "unknown")
        told = said is None or any((name, statement.kind, statement.value) in said.statements
                                   for name in statement.subject or ("",))
        if verdict == "unknown" and not told:
            support.append(0.0 if statement.kind == "event" else UNSUPPORTED_PAY)
        else:
            support.append(0.0 if verdict == "contradicted" else 1.0)
    return support


def mean_support(caption, support, evidence, kinds):
    """Mean support of the distinct statements of some kinds, without those about absent classes; 1 if there is none.

    A statement that is made several times counts once, with its least support.
    """
    seen = evidence.present | evidence.unknown | {"ego"}
    least = {}
    for statement, value in zip(caption.statements, support, strict=True):
        if statement.kind in kinds and (not statement.subject or not seen.isdisjoint(statement.subject)):
            key = statement[:3]
            least[key] = min(least.get(key, 1.0), value)
    return sum(least.values()) / len(least) if least else 1.0


def idle_gate(caption, support, evidence, said):
    """Factor of R_temp and R_detail: 1 unless more of the caption's words than of the reference's say nothing."""
    if said is None:
        return 1.0
    return 1.0 - IDLE_COST * max(0.0, _idle_share(caption, support, evidence, said) - said.idle_share)


def _idle_share(caption, support, evidence, said):
    """Share of the words in clauses that say nothing which is seen (`evidence`; None: all is) or told by the reference.
    A hedged clause counts half."""
    supported = {statement.word for statement, value in zip(caption.statements, support, strict=True) if value == 1.0}
    idle = 0.0
    for clause in caption.clauses:
        named = {name for claim in clause.claims for name in claim.classes}
        says = named and (evidence is None or not named.isdisjoint(evidence.present | evidence.unknown))
        says = says or any(claim.negated for claim in clause.claims) or any(i in supported for i in clause.span)
        says = says or not vocab.PLACES.isdisjoint(caption.words[clause.first:clause.first + 3])
        says = says or any(caption.scenes[i] and caption.scenes[i][1] in said.scene.get(caption.scenes[i][0], ())
                           for i in clause.span)
        hedged = not vocab.HEDGES.isdisjoint(caption.words[clause.first:clause.stop])
        idle += len(clause.span) * (1.0 if not says else 0.5 if hedged else 0.0)
    return idle / max(1, len(caption.words))


# ---------------------------------------------------------------------------------------------------------------------
# Gates: is the text language, and does it say something? The parts above only count, so without gates lists of classes,
# stuffed adjectives, repetition and padding would score. Each gate is in [0, 1], and 1 for honest captions.
#
# _ramp rises from 0 to 1 between the two numbers of a pair. "Real": measured on 300 captions of BDD100K clips; "toy":
# on 300 Copilot lines of the toy world. Numbers without a figure are set by hand, as above.

BROKEN_PAIR_SHARE = (0.02, 0.06)  # real: at most 0.003; the same captions with shuffled words: 0.034 to 0.11
DOUBLED_COST, MAX_DOUBLED_COST = 0.05, 0.5  # of each word that follows itself ("the the"); real: none
MAY_DOUBLE = frozenset("that had very no".split())
DISTINCT_RUN_SHARE = (0.30, 0.65)  # of runs of three words; real: 0.91 to 1
ALL_STALE = 0.9  # share of stale words at which the cost is full; it begins at ModeReward.free_stale_share
VARIETY_FLOOR = 0.3  # the variety gate if everything is repeated
STALE_COST, MAX_PILE_COST, MAX_DENIAL_COST = 0.8, 0.8, 0.5  # the most that each of these gates takes away
PILE_COST = 2.0  # per share of words in piles; real: 0 for 95%, at most 0.025
FREE_DENIALS, DENIAL_COST = 3, 0.04  # true denials that are free (real: 1 at most in 99%), cost of each further one
PILE_OF_LOOKS, PILE_OF_VERBS, PILE_OF_CONNECTIVES, PILE_OF_ADJECTIVES = 4, 4, 3, 6  # words in a row
FREE_SENTENCE = 4  # words of a sentence without function words that may say nothing: "Nothing else happens."
FREE_FRAGMENT = 2  # words of a telegraphic clause that may say nothing
BARE_RUN, MIN_INFLECTED = 8, 2  # of so many words in a row without function words, so many are inflected in English
LOOKS_RUN, MAX_LOOKS = 6, 2  # of so many words in a row without function words, at most so many are looks

AFTER_ARTICLE = frozenset("few other another single each several while no only inside very".split())  # may follow "a"
NEVER_LAST = vocab.ARTICLES | frozenset("of at with from into for and or while as because to than its their".split())
NO_VERB_AFTER = frozenset("of from with into at for".split())
PLAIN_COLOURS = frozenset("red blue green white black yellow orange brown purple pink".split())
LOOKS = ("colour", "size", "state")  # kinds of attribute that tend to be piled up
ADJECTIVE = re.compile(r"..+(?:ful|ous|ing|ive|ant|ent|ern|ish|[^l]y|ed|al|ic|ble|less|id|ary)$")
INFLECTED = ("s", "ed", "ing", "ly")


def _ramp(x, low, high):
    """0 below low, 1 above high, linear between."""
    return min(1.0, max(0.0, (x - low) / (high - low)))


def length_gate(caption, new_share, said, settings):
    """Factor of R_temp and R_detail. Words in sentences that say nothing new do not help to reach the minimum; function
    words beyond the mode's number, or the reference's own, make a line too wordy."""
    low, full, most, high = settings.words.paid
    num_words = len(caption.words)
    gate = min(_ramp(num_words * new_share, low, full), 1.0 - _ramp(num_words, most, high))
    if settings.words.function_words:
        free, wordy = settings.words.function_words
        more = max(0.0, said.function_words - free) if said else 0.0
        gate = min(gate, 1.0 - _ramp(count_function_words(caption), free + more, wordy + more))
    return gate


def count_function_words(caption):
    return sum(word in vocab.FUNCTION_WORDS for word in caption.words)


def caption_gates(caption, claimed, new_share, settings):
    """The gates, {name: factor of all four parts}. tests/test_reward_gates.py shows what each stops, and that none of
    them touches honest texts."""
    variety = VARIETY_FLOOR + (1 - VARIETY_FLOOR) * _variety(caption)
    focus = 1.0 - STALE_COST * _ramp(1.0 - new_share, settings.free_stale_share, ALL_STALE)
    piles = 1.0 - min(MAX_PILE_COST, PILE_COST * _stuffed_share(caption, settings))
    denials = 1.0 - min(MAX_DENIAL_COST, DENIAL_COST * max(0, claimed.true_denials - FREE_DENIALS))
    return {"word order": _word_order(caption), "variety": variety, "focus": focus, "piles": piles,
            "denials": denials}


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


def _word_order(caption):
    """1 for English, 0 for words in disorder or doubled."""
    words = caption.words
    broken_pairs = sum(_is_broken(caption, i) for i in range(len(words)))
    doubled = sum(a == b and len(a) > 1 and a not in MAY_DOUBLE for a, b in pairwise(words))
    order = 1.0 - _ramp(broken_pairs / len(words), *BROKEN_PAIR_SHARE)
    return order * (1.0 - min(MAX_DOUBLED_COST, DOUBLED_COST * doubled))


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
            plain = vocab.FUNCTION_WORDS | vocab.PLACES
            about = clause.verbs or any(roles[i] or caption.scenes[i] or words[i] in plain for i in span)
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
    if bare and not says_something and len(span) > FREE_SENTENCE:
        found.update(span)
    return found


def new_words_share(caption, settings):
    """Share of the words that are in sentences which say something that no other sentence says. In telegraphic lines
    short ones count too ("Speed: reduce.").

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
        if not facts <= known or settings.telegraphic and length <= FREE_SENTENCE:
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
        facts.update((claim.classes, "is absent") for claim in clause.claims if claim.negated)
        facts.update(caption.scenes[i] for i in clause.span if caption.scenes[i] in scenes)
        if clause.truth == "ego" and not subjects:
            facts.update(("ego", verb) for verb in clause.verbs)
    return facts
