"""The scorer: answers and truth in, numbers out. It reads nothing else, so a number can be worked out by hand.

`Truth` is what a clip shows. `score_text` counts what one answer says rightly and wrongly; every metric (`METRICS`) is
a ratio of such counts, summed over clips; `score` adds intervals by drawing clips anew. Nothing here knows what
answered.
"""

import itertools
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stage3.evidence import Evidence
from stage3.grpo_reward_func import judge_facts
from stage3.mentions import find_mentions, read_caption
from stage3.vocabulary_config import COCO_NAMES, SAFETY_CRITICAL

BOOTSTRAP = 1000  # draws of clips
MOST_REPEATED = 0.2  # rep-4 of an answer above which it counts as broken: no caption of real or toy clips has over 0.17
WORD = re.compile(r"[\w'-]+")
KNOWN_OF_CLASSES = ("counts", "sides", "light", "colours", "motion")  # what a truth file may know besides `present`


# ---- truth -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """What a clip shows. A class in none of the sets is absent."""

    present: frozenset[str]
    salient: frozenset[str]  # what a complete answer mentions: recall counts these
    unknown: frozenset[str] = frozenset()  # neither right nor wrong
    order: tuple[str, ...] = ()  # classes in the order of their first appearance
    evidence: Evidence | None = None  # what is known of them besides: counts, sides, colours, lights, motion
    actions: dict[str, list[str]] | None = None  # class -> what it does, as verbs of stage3/mentions.py's statements
    traps: tuple[tuple[str, str, bool], ...] = ()  # (context in which captions invent, class they invent, is it there)

    def verdict(self, name: str) -> str:
        """What a mention of class `name` is, in the words of pages/render.py."""
        if name in self.present:
            return "supported"
        return "unknown" if name in self.unknown else "unsupported"


def exact_truth(path: str, videos: list[str], problems: list[str]) -> dict[str, Truth]:
    """A truth file, {video: {"present": [..], "order": [..], ..}}; clips that it lacks are added to `problems`."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    missing = [video for video in videos if video not in rows]
    if missing:
        problems.append(f"truth: {path} lacks {len(missing)} of {len(videos)} clips ({', '.join(missing[:3])} ..)")
    unknown_names = set().union(*(rows[video]["present"] for video in videos if video in rows)) - set(COCO_NAMES)
    if unknown_names:
        problems.append(f"truth: {path} has classes that are not COCO's: {', '.join(sorted(unknown_names))}")
        return {}
    truth, wrong = {}, []
    for video, row in rows.items():
        present = frozenset(row["present"])
        try:
            evidence = Evidence(present, **{key: row[key] for key in KNOWN_OF_CLASSES if key in row})
        except ValueError as error:
            wrong.append(f"{video}: {error}")
            continue
        truth[video] = Truth(present, present, order=tuple(row.get("order", ())), evidence=evidence,
                             actions=row.get("actions"), traps=traps_of(row))
    if wrong:
        problems.append(f"truth: {path} is wrong in {len(wrong)} clips: {'; '.join(wrong[:3])}")
    return truth


def traps_of(row: dict) -> tuple[tuple[str, str, bool], ...]:
    """The traps of a clip's row in a truth file, `{"traps": [{"context", "class", "there"}, ..]}`."""
    return tuple((trap["context"], trap["class"], trap["there"]) for trap in row.get("traps", ()))


# ---- scoring: predictions and truth in, numbers out ------------------------------------------------------------------


class Metric(NamedTuple):
    """One column: the sum of one count over all texts, divided by the sum of another."""

    head: str
    decimals: int
    above: str = ""  # a count of score_text
    below: str = "texts"
    needs: str = ""  # the table shows a dash where this sum (see SUMS) is 0
    table: str = "content"  # content (what is said) | form (how) | "" (in metrics.json only)


CLAIM_KINDS = ("colour", "light", "side", "motion", "count", "event")
KIND_OF_FACT = {"from": "side", "to": "side"}  # a fact's kind where it is none of these

# {key in metrics.json: column}. A new metric is one count in score_text and one line here.
METRICS = {
    "words": Metric("words", 0, "words"),
    "precision": Metric("P", 2, "hit", "named", needs="mentions"),
    "recall": Metric("R", 2, "recalled", "salient"),
    "safety_recall": Metric("safety R", 2, "safety_recalled", "safety", needs="safety_classes"),
    "f1_micro": Metric("F1", 2),  # computed in metrics_of from precision and recall
    "f1_macro": Metric("F1 macro", 2),  # computed in metrics_of from the counts of each class
    "chair_i": Metric("CHAIRi", 2, "invented", "mentions", needs="mentions"),
    "chair_s": Metric("CHAIRs", 2, "inventing", needs="mentions"),
    "trap_told": Metric("told", 2, "trap_told", "trap_there", needs="traps_there"),
    "trap_invented": Metric("invented", 2, "trap_invented", "trap_absent", needs="traps_absent"),
    "recall_equal": Metric("R equal", 2, "recalled_equal", "salient", needs="mentions_equal"),
    "chair_i_equal": Metric("CHAIRi equal", 2, "invented_equal", "mentions_equal", needs="mentions_equal"),
    "wrong_claims": Metric("wrong", 2, "wrong", "decided", needs="claims"),
    **{f"wrong_{kind}": Metric(f"wrong {kind}", 2, f"wrong_{kind}", f"decided_{kind}", table="")
       for kind in CLAIM_KINDS},
    "order": Metric("order", 2, "agreeing", "pairs", needs="order_pairs"),
    "in_range": Metric("in range", 2, "in_range", table="form"),
    "ended": Metric("ended", 2, "ended", table="form"),
    "repetition": Metric("rep-4", 2, "repeated", "grams", table="form"),
    "nll": Metric("NLL", 2, "nll", "nll_tokens", needs="nll_tokens", table="form"),
    "rouge_l": Metric("ROUGE-L", 2, "rouge_l", "captioned", needs="captioned", table="form"),
    "bleu": Metric("BLEU", 1, needs="captioned", table="form"),  # computed in evaluation/captions.py
    "cider": Metric("CIDEr", 2, "cider", "captioned", needs="captioned", table="form"),
    "tokens_per_second": Metric("tok/s", 0, "tokens", "seconds", needs="tokens_per_second", table="form"),
}
# {key in metrics.json: count}: how much there is of what a metric is a share of
SUMS = {"mentions": "mentions", "claims": "decided", "order_pairs": "pairs", "safety_classes": "safety",
        "traps_there": "trap_there", "traps_absent": "trap_absent", "mentions_equal": "mentions_equal",
        "nll_tokens": "nll_tokens", "captioned": "captioned"}
OF_ROWS = ("ended", "tokens", "seconds", "nll", "nll_tokens", "rouge_l", "cider", "captioned")  # a row's own counts


def mentioned(text: str) -> list[str]:
    """The objects that a text says are there, one per mention, in the order of the text."""
    return [mention.object for mention in find_mentions(text) if not mention.negated]


def count_words(text: str) -> int:
    return len(WORD.findall(text))


def four_word_sequences(words: list[str]) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + 4]) for i in range(len(words) - 3)]


def score_text(text: str, truth: Truth, words: list[int], equal_words: int | None = None) -> dict:
    """The counts that every metric is a ratio of. `words`: [fewest, most]; `equal_words`: the number of words at which
    answers of different lengths are compared, None: they are not."""
    mentions = [mention for mention in find_mentions(text) if not mention.negated]
    spoken = [mention.object for mention in mentions]
    known = [name for name in spoken if name not in truth.unknown]
    invented = [name for name in known if name not in truth.present]
    said = set(spoken)
    tokens = WORD.findall(text.lower())
    grams = four_word_sequences(tokens)
    first = [spoken.index(name) for name in truth.order if name in said]  # first mentions, in the order of appearance
    pairs = list(itertools.combinations(first, 2))
    safety = truth.salient & SAFETY_CRITICAL
    counts = {
        "texts": 1, "words": len(tokens), "in_range": words[0] <= len(tokens) <= words[1],
        "hit": len(said & truth.present), "named": len(set(known)),
        "recalled": len(said & truth.salient), "salient": len(truth.salient),
        "safety_recalled": len(said & safety), "safety": len(safety),
        "mentions": len(known), "invented": len(invented), "inventing": bool(invented),
        "grams": len(grams), "repeated": len(grams) - len(set(grams)),
        "pairs": len(pairs), "agreeing": sum(earlier < later for earlier, later in pairs),
    }
    counts |= count_claims(text, truth) | count_traps(said, truth)
    if equal_words is not None:
        counts |= count_start(text, mentions, truth, equal_words)
    counts |= {("hit", name): 1 for name in said & truth.present}
    counts |= {("false", name): 1 for name in set(invented)}
    counts |= {("missed", name): 1 for name in truth.salient - said}
    counts |= {("recalled", name): 1 for name in truth.salient & said}
    counts |= {("salient", name): 1 for name in truth.salient}
    return counts


def count_traps(said: set[str], truth: Truth) -> dict:
    """Of the traps whose class is there: how many are told; of the others: how many are invented. By context, too."""
    counts = Counter()
    for context, name, there in truth.traps:
        if there:
            counts.update({"trap_there": 1, "trap_told": name in said, ("there", context, name): 1,
                           ("told", context, name): name in said})
        elif name not in truth.present | truth.unknown:
            counts.update({"trap_absent": 1, "trap_invented": name in said, ("absent", context, name): 1,
                           ("invented", context, name): name in said})
    return dict(counts)


def count_start(text: str, mentions: list, truth: Truth, words: int) -> dict[str, int]:
    """Mentions and inventions of a text's first `words` words."""
    ends = [match.end() for match in WORD.finditer(text)][:words]
    spoken = [mention.object for mention in mentions if ends and mention.end <= ends[-1]]
    known = [name for name in spoken if name not in truth.unknown]
    return {"mentions_equal": len(known), "invented_equal": sum(name not in truth.present for name in known),
            "recalled_equal": len(set(spoken) & truth.salient)}


def count_claims(text: str, truth: Truth) -> dict[str, int]:
    """What the text says of classes that are there, as far as the truth decides it: how much, and how much is wrong."""
    verdicts = []  # (kind, "supported", "contradicted" or "unknown")
    if truth.evidence is None:
        return {}
    caption = read_caption(text)
    for fact, verdict in zip(caption.facts, judge_facts(caption, truth.evidence), strict=True):
        verdicts.append((KIND_OF_FACT.get(fact.kind, fact.kind), verdict))
    for statement in caption.statements:
        acting = [name for name in statement.subject if name in truth.present and name in (truth.actions or {})]
        if statement.kind in ("verb", "event") and acting:
            right = any(statement.value in truth.actions[name] for name in acting)
            verdicts.append(("event", "supported" if right else "contradicted"))
    counts = Counter()
    for kind, verdict in verdicts:
        decided, wrong = verdict != "unknown", verdict == "contradicted"
        counts.update({"decided": decided, "wrong": wrong, f"decided_{kind}": decided, f"wrong_{kind}": wrong})
    return dict(counts)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, and 0 where there is nothing below."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=float), where=below > 0)


def metrics_of(by_clip: list[Counter], draws: np.ndarray, salient_classes: set[str]) -> dict[str, np.ndarray]:
    """The metrics as arrays [B], one value per draw; draws [B, clips]: how often each holds a clip.

    Their meaning is in docs/evaluation.md. Without a mention, precision and CHAIR are 0. The macro average is over the
    classes that the truth contains; a draw in which some class never occurs leaves that class out.
    """
    total = defaultdict(lambda: np.zeros(len(draws)))
    for key in set().union(*by_clip):
        total[key] = draws @ np.array([counts[key] for counts in by_clip], dtype=float)
    values = {key: ratio(total[metric.above], total[metric.below]) for key, metric in METRICS.items()}
    precision, recall = values["precision"], values["recall"]
    values["f1_micro"] = ratio(2 * precision * recall, precision + recall)
    f1_sum, num_classes = np.zeros(len(draws)), np.zeros(len(draws))
    for name in sorted(salient_classes):
        hits, errors = 2 * total["hit", name], total["false", name] + total["missed", name]
        f1_sum += ratio(hits, hits + errors)
        num_classes += hits + errors > 0
    values["f1_macro"] = ratio(f1_sum, num_classes)
    return values


def tally(predictions: list[dict], truth: dict[str, Truth], ranges: dict[str, list[int]],
          equal_words: dict[tuple[str, str], int] | None = None) -> dict[tuple[str, str], Counter]:
    """One system's rows of predictions.jsonl -> {(mode, video): its counts}.

    `ranges`: {mode: [fewest, most] words}; `equal_words`: {(mode, video): see score_text}.
    """
    counts = defaultdict(Counter)
    for row in predictions:
        mode, video = row["mode"], row["video"]
        equal = (equal_words or {}).get((mode, video))
        counts[mode, video].update(score_text(row["text"], truth[video], ranges[mode], equal))
        counts[mode, video].update({key: row[key] for key in OF_ROWS if key in row})
    return counts


def draw_clips(number: int, seed: int | np.random.Generator) -> np.ndarray:
    """[1 + BOOTSTRAP, clips]: how often each draw holds each clip. Row 0 is no draw: it holds every clip once."""
    if number == 0:
        return np.zeros((1 + BOOTSTRAP, 0), dtype=int)
    draws = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=BOOTSTRAP)
    return np.vstack([np.ones(number, dtype=int), draws])


def values_of(counts: dict, modes, videos: list[str], truth: dict[str, Truth], seed: int) -> dict[str, dict]:
    """{mode: {metric: array [1 + BOOTSTRAP]}} over some clips. The same clips and seed give the same draws whatever the
    system, so two systems' arrays can be subtracted."""
    draws = draw_clips(len(videos), seed)
    salient_classes = set().union(*(truth[video].salient for video in videos))
    values = {}
    for mode in modes:
        values[mode] = metrics_of([counts[mode, video] for video in videos], draws, salient_classes)
    return values


def interval_of(values: np.ndarray) -> list[float]:
    """The 2.5 and 97.5 percentiles of the draws."""
    return np.percentile(values[1:], [2.5, 97.5]).round(4).tolist()


def block_of(counts: dict, mode: str, values: dict[str, np.ndarray], videos: list[str]) -> dict:
    """One system's and mode's block of metrics.json."""
    total = Counter()
    for video in videos:
        total.update(counts[mode, video])
    block = {key: round(float(value[0]), 4) for key, value in values.items()}
    block |= {key: total[count] for key, count in SUMS.items()}
    block["traps"] = traps_block(total)
    block["classes"] = classes_block(total)
    block["interval"] = {key: interval_of(value) for key, value in values.items()}
    return block


def traps_block(total: Counter) -> dict[str, dict]:
    """{"context: class": {"told": [times, of those there], "invented": [times, of those not there]}}."""
    block = {}
    for context, name in sorted({key[1:] for key in total if isinstance(key, tuple) and len(key) == 3}):
        told, there, invented, absent = (total[what, context, name] for what in ("told", "there", "invented", "absent"))
        block[f"{context}: {name}"] = {"told": [told, there], "invented": [invented, absent]}
    return block


def classes_block(total: Counter) -> dict[str, dict]:
    """{class: {"told": [answers, of those to clips where it is salient], "invented": answers}}."""
    block = {}
    for name in sorted({key[1] for key in total if isinstance(key, tuple) and key[0] in ("salient", "false")}):
        told, there, invented = (total[what, name] for what in ("recalled", "salient", "false"))
        block[name] = {"told": [told, there], "invented": invented}
    return block


def score(predictions: list[dict], truth: dict[str, Truth], ranges: dict[str, list[int]], seed: int = 42,
          equal_words: dict[tuple[str, str], int] | None = None) -> dict:
    """One system's rows of predictions.jsonl -> its block of metrics.json; parameters as in `tally`."""
    counts = tally(predictions, truth, ranges, equal_words)
    videos = sorted({row["video"] for row in predictions})
    values = values_of(counts, ranges, videos, truth, seed)
    block = {mode: block_of(counts, mode, values[mode], videos) for mode in ranges}
    block["mode_accuracy"] = mode_accuracy(predictions, ranges)
    return block


def mode_accuracy(predictions: list[dict], ranges: dict[str, list[int]]) -> float:
    """The share of clips (or sampled answers to them) whose answers have a usual length in every mode."""
    in_range = defaultdict(dict)
    for row in predictions:
        low, high = ranges[row["mode"]]
        in_range[row["video"], row["sample"]][row["mode"]] = low <= count_words(row["text"]) <= high
    right = [all(modes.values()) for modes in in_range.values() if len(modes) == len(ranges)]
    return round(float(np.mean(right)), 4) if right else 0.0


def is_broken(row: dict) -> bool:
    """Did the answer not end by itself, or repeat more of its four-word sequences than MOST_REPEATED?"""
    grams = four_word_sequences(WORD.findall(row["text"].lower()))
    return not row["ended"] or len(grams) - len(set(grams)) > MOST_REPEATED * len(grams)


def score_wordings(predictions: list[dict], ranges: dict[str, list[int]]) -> dict[str, dict]:
    """One system's answers to several wordings, rows with "question" -> {mode: {question: {"asked": answers, "right":
    those of a usual length that are not broken, "broken": those that are (`is_broken`)}}}."""
    block = {mode: {} for mode in ranges}
    for row in predictions:
        low, high = ranges[row["mode"]]
        counts = block[row["mode"]].setdefault(row["question"], {"asked": 0, "right": 0, "broken": 0})
        broken = is_broken(row)
        counts["asked"] += 1
        counts["broken"] += broken
        counts["right"] += low <= count_words(row["text"]) <= high and not broken
    return block


def share_right(wordings: dict[str, dict]) -> float:
    """What `score_wordings` found -> the share of all answers that are right."""
    asked = right = 0
    for counts in itertools.chain.from_iterable(block.values() for block in wordings.values()):
        asked, right = asked + counts["asked"], right + counts["right"]
    return round(right / asked, 4)


# ---- between systems, and within parts of the clips ------------------------------------------------------------------

SLICE_METRICS = ("words", "recall", "safety_recall", "chair_i", "wrong_claims", "ended")
SMALLEST_SLICE = 8  # clips: below, an interval says nothing
BETTER = {"recall": 1, "safety_recall": 1, "chair_i": -1, "wrong_claims": -1, "ended": 1}  # +1: more is better


def equal_lengths(rows_of: dict[str, list[dict]], names) -> dict[tuple[str, str], int]:
    """{(mode, video): words of the shortest answer, but an empty one, that the systems `names` give}."""
    shortest = {}
    for name in names:
        for row in rows_of[name]:
            if number := count_words(row["text"]):
                key = row["mode"], row["video"]
                shortest[key] = min(number, shortest.get(key, number))
    return shortest


def difference(before: dict[str, dict], after: dict[str, dict]) -> dict[str, dict[str, list[float]]]:
    """Two systems' `values_of` the same clips -> {mode: {metric: [after - before, low, high]}}, paired: each draw holds
    the same clips for both."""
    result = {}
    for mode in before:
        change = {key: after[mode][key] - before[mode][key] for key in before[mode]}
        result[mode] = {key: [round(float(value[0]), 4), *interval_of(value)] for key, value in change.items()}
    return result


def slices_of(attributes: dict[str, dict], truth: dict[str, Truth]) -> dict[str, list[str]]:
    """{slice: its clips}: by what `attributes` says of clips, {clip: {"night": true, "weather": "rain"}} (other values
    than words and yes/no are not read), and by the classes that are there. Slices of under 8 clips are left out."""
    clips = defaultdict(list)
    for video in sorted(truth):
        for key, value in attributes.get(video, {}).items():
            if isinstance(value, bool):
                clips[key if value else f"not {key}"].append(video)
            elif isinstance(value, str):
                clips[f"{key}: {value}"].append(video)
        for name in sorted(truth[video].present):
            clips[f"with {name}"].append(video)
    return {name: videos for name, videos in sorted(clips.items()) if len(videos) >= SMALLEST_SLICE}


def score_slice(counts: dict, modes, videos: list[str], truth: dict[str, Truth], seed: int) -> dict[str, dict]:
    """One system on some of the clips: {mode: block with SLICE_METRICS only}."""
    blocks = {}
    for mode, values in values_of(counts, modes, videos, truth, seed).items():
        block = block_of(counts, mode, {key: values[key] for key in SLICE_METRICS}, videos)
        blocks[mode] = {key: value for key, value in block.items() if key not in ("traps", "classes")}
    return blocks


def worse_than(baseline: dict, metrics: dict) -> list[str]:
    """What got worse than in an earlier metrics.json beyond that one's interval: one line per system, mode, part of the
    clips and metric that both have."""
    parts = [("all clips", baseline["systems"], metrics["systems"])]
    for name in sorted(set(baseline.get("slices", {})) & set(metrics.get("slices", {}))):
        parts.append((name, baseline["slices"][name]["systems"], metrics["slices"][name]["systems"]))
    lines = []
    for part, before, after in parts:
        for system in (name for name in after if name in before):
            for mode in (name for name in metrics["words_in_range"] if name in before[system]):
                old, new = before[system][mode], after[system][mode]
                for key, sign in BETTER.items():
                    low, high = old["interval"].get(key, (None, None))
                    if low is not None and (new[key] < low if sign > 0 else new[key] > high):
                        lines.append(f"{system}, {mode}, {part}: {METRICS[key].head} {old[key]:.3f} "
                                     f"[{low:.3f}, {high:.3f}] -> {new[key]:.3f}")
    return lines
