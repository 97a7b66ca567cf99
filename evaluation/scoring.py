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
from stage3.vocabulary_config import COCO_NAMES

BOOTSTRAP = 1000  # draws of clips
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
                             actions=row.get("actions"))
    if wrong:
        problems.append(f"truth: {path} is wrong in {len(wrong)} clips: {'; '.join(wrong[:3])}")
    return truth


# ---- scoring: predictions and truth in, numbers out ------------------------------------------------------------------


class Metric(NamedTuple):
    """One column: the sum of one count over all texts, divided by the sum of another."""

    head: str
    decimals: int
    above: str = ""  # a count of score_text
    below: str = "texts"
    needs: str = ""  # the table shows a dash where this key of the block is 0
    in_table: bool = True  # or in metrics.json only


CLAIM_KINDS = ("colour", "light", "side", "motion", "count", "event")
KIND_OF_FACT = {"from": "side", "to": "side"}  # a fact's kind where it is none of these

# {key in metrics.json: column}. A new metric is one count in score_text and one line here. Reference captions are there
# too: `counts["cider"] = cider(text, references)` and `"cider": Metric("CIDEr", 2, "cider")` add CIDEr.
METRICS = {
    "words": Metric("words", 0, "words"),
    "in_range": Metric("in range", 2, "in_range"),
    "ended": Metric("ended", 2, "ended"),
    "precision": Metric("P", 2, "hit", "named", needs="mentions"),
    "recall": Metric("R", 2, "recalled", "salient"),
    "f1_micro": Metric("F1", 2),  # computed in metrics_of from precision and recall
    "f1_macro": Metric("F1 macro", 2),  # computed in metrics_of from the counts of each class
    "chair_i": Metric("CHAIRi", 2, "invented", "mentions", needs="mentions"),
    "chair_s": Metric("CHAIRs", 2, "inventing", needs="mentions"),
    "wrong_claims": Metric("wrong", 2, "wrong", "decided", needs="claims"),
    **{f"wrong_{kind}": Metric(f"wrong {kind}", 2, f"wrong_{kind}", f"decided_{kind}", in_table=False)
       for kind in CLAIM_KINDS},
    "order": Metric("order", 2, "agreeing", "pairs", needs="order_pairs"),
    "repetition": Metric("rep-4", 2, "repeated", "grams"),
    "tokens_per_second": Metric("tok/s", 0, "tokens", "seconds", needs="tokens_per_second"),
}


def mentioned(text: str) -> list[str]:
    """The objects that a text says are there, one per mention, in the order of the text."""
    return [mention.object for mention in find_mentions(text) if not mention.negated]


def score_text(text: str, truth: Truth, words: list[int], references: tuple[str, ...] = ()) -> dict:
    """The counts that every metric is a ratio of. `words`: [fewest, most]; `references`: the clip's captions."""
    spoken = mentioned(text)
    known = [name for name in spoken if name not in truth.unknown]
    invented = [name for name in known if name not in truth.present]
    said = set(spoken)
    tokens = re.findall(r"[\w'-]+", text.lower())
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    first = [spoken.index(name) for name in truth.order if name in said]  # first mentions, in the order of appearance
    pairs = list(itertools.combinations(first, 2))
    counts = {
        "texts": 1, "words": len(tokens), "in_range": words[0] <= len(tokens) <= words[1],
        "hit": len(said & truth.present), "named": len(set(known)),
        "recalled": len(said & truth.salient), "salient": len(truth.salient),
        "mentions": len(known), "invented": len(invented), "inventing": bool(invented),
        "grams": len(grams), "repeated": len(grams) - len(set(grams)),
        "pairs": len(pairs), "agreeing": sum(earlier < later for earlier, later in pairs),
    }
    counts |= count_claims(text, truth)
    counts |= {("hit", name): 1 for name in said & truth.present}
    counts |= {("false", name): 1 for name in set(invented)}
    counts |= {("missed", name): 1 for name in truth.salient - said}
    return counts


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


def score(predictions: list[dict], truth: dict[str, Truth], ranges: dict[str, list[int]], seed: int = 42,
          references: dict[str, tuple[str, ...]] | None = None) -> dict:
    """One system's rows of predictions.jsonl -> its block of metrics.json.

    `ranges`: {mode: [fewest, most] words}; `references`: {entry id: captions}. Intervals are the 2.5 and 97.5
    percentiles over the bootstrap draws of clips.
    """
    videos = sorted({row["video"] for row in predictions})
    even = np.full(len(videos), 1 / len(videos))
    draws = np.random.default_rng(seed).multinomial(len(videos), even, size=BOOTSTRAP)
    draws = np.vstack([np.ones(len(videos), dtype=int), draws])  # row 0: every clip once
    salient_classes = set().union(*(truth[video].salient for video in videos))
    sums, in_range = defaultdict(Counter), defaultdict(list)
    for row in predictions:
        mode, video, captions = row["mode"], row["video"], (references or {}).get(row["id"], ())
        counts = score_text(row["text"], truth[video], ranges[mode], captions)
        sums[mode, video].update(counts | {key: row[key] for key in ("ended", "tokens", "seconds")})
        in_range[video, row["sample"]].append(counts["in_range"])
    block = {}
    for mode in ranges:
        by_clip = [sums[mode, video] for video in videos]
        values = metrics_of(by_clip, draws, salient_classes)
        block[mode] = {key: round(float(value[0]), 4) for key, value in values.items()}
        block[mode]["mentions"] = sum(counts["mentions"] for counts in by_clip)
        block[mode]["claims"] = sum(counts["decided"] for counts in by_clip)
        block[mode]["order_pairs"] = sum(counts["pairs"] for counts in by_clip)
        block[mode]["interval"] = {key: np.percentile(value[1:], [2.5, 97.5]).round(4).tolist()
                                   for key, value in values.items()}
    right = [all(modes) for modes in in_range.values() if len(modes) == len(ranges)]
    block["mode_accuracy"] = round(float(np.mean(right)), 4) if right else 0.0
    return block
