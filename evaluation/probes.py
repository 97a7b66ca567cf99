"""Probes and twins: is a class said to be there because it is seen?

A probe asks two questions about one clip: is this class there (yes), is that one (no)? It counts only if both answers
are right, as in VideoHallucer (Wang et al. 2024, arXiv 2406.16338). The absent class is chosen as in POPE (Li et al.
2023, arXiv 2305.10355): `random`; `popular`, which captions name most often; `adversarial`, which they name most
often beside a class that is there. A probe is answered twice: by what the answer names (`told`), and by how likely the
checkpoint finds statements about both classes (`statement`), whether it makes them or not.

A twin is a clip without one of its objects. Who names that object in the twin as well has not looked.
"""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dataset import GREY, MODE_TABLE, Entry, RowError, is_clip, resolve_video, video_stem
from evaluation.scoring import Truth, draw_clips, interval_of, mentioned, ratio
from model import ModelError, check_shared_prefix
from stage3.grpo import Group, completion_logps
from stage3.mentions import find_mentions
from stage3.vocabulary_config import COCO_NAMES
from training.common import stable_seed

KINDS = ("random", "popular", "adversarial")
STATEMENTS = 3  # per class and mode
PLACES = 4  # of a caption at which a statement is tried, at most
SENTENCE_END = re.compile(r"(?<=[.:;!?])\s+")


# ---- probes ----------------------------------------------------------------------------------------------------------


class Probe(NamedTuple):
    """Two questions about a clip: is `present` there (yes), is `absent` there (no)?"""

    video: str
    kind: str
    present: str
    absent: str


def sentences(text: str) -> list[str]:
    """A caption in parts that end with . : ; ! or ?"""
    return SENTENCE_END.split(text.strip())


def draw_statements(train: list[Entry], seed: int) -> dict[str, dict[str, list[str]]]:
    """{mode: {class: statements}}: up to STATEMENTS sentences of the training captions that name this class, deny
    nothing and name no other. A caption's first sentence is not taken: it opens the caption, these go on with it."""
    found = defaultdict(set)
    for entry in train:
        for caption in entry.captions:
            for sentence in sentences(caption)[1:]:
                names = {(mention.object, mention.negated) for mention in find_mentions(sentence)}
                if len(names) == 1 and not next(iter(names))[1]:
                    found[entry.mode, names.pop()[0]].add(sentence)
    drawn = defaultdict(dict)
    for (mode, name), texts in sorted(found.items()):
        order = np.random.default_rng(stable_seed("statements", seed, mode, name)).permutation(len(texts))
        drawn[mode][name] = [sorted(texts)[index] for index in order[:STATEMENTS]]
    return dict(drawn)


def count_captions(train: list[Entry]) -> tuple[Counter, Counter]:
    """(captions that name a class, captions that name both of two: {(one, other)}), of the training captions."""
    naming, both = Counter(), Counter()
    for entry in train:
        for caption in entry.captions:
            names = set(mentioned(caption))
            naming.update(names)
            both.update((one, other) for one in names for other in names if one != other)
    return naming, both


def draw_probes(train: list[Entry], truth: dict[str, Truth], classes: set[str], seed: int) -> list[Probe]:
    """One probe of each kind for every clip of `truth` that shows and lacks one of `classes`; the present class is the
    same in all three. Which class is popular or adversarial, the training captions decide."""
    naming, both = count_captions(train)
    probes = []
    for video in sorted(truth):
        clip = truth[video]
        there = sorted(clip.salient & classes)
        missing = sorted(classes - clip.present - clip.unknown)
        if not there or not missing:
            continue

        def beside(name, present=clip.present):
            return max(both[other, name] / naming[other] for other in present if naming[other])

        rng = np.random.default_rng(stable_seed("probes", seed, video))
        present = there[rng.integers(len(there))]
        absent = {"random": missing[rng.integers(len(missing))], "popular": max(missing, key=naming.__getitem__),
                  "adversarial": max(missing, key=beside)}
        probes += [Probe(video, kind, present, absent[kind]) for kind in KINDS]
    return probes


def classes_asked(probes: list[Probe]) -> dict[str, list[str]]:
    """{clip: the classes that its probes ask about}"""
    asked = defaultdict(set)
    for probe in probes:
        asked[probe.video] |= {probe.present, probe.absent}
    return {video: sorted(names) for video, names in asked.items()}


# ---- how likely a statement is ---------------------------------------------------------------------------------------


def can_share_prefix(llm) -> bool:
    """Texts after the same words are scored in one row where the LM's attention allows it, else in a row each."""
    try:
        check_shared_prefix(llm)
    except ModelError:
        return False
    return True


def log_likelihoods(model, entry: Entry, texts: list[str], visuals: list[torch.Tensor], batch_size: int) -> np.ndarray:
    """[visuals, texts]: log of the probability that the entry's caption goes on with a text, a mean over places in the
    caption, if the model is shown these visual tokens, [N, D] each."""
    prompt = model.prompt_ids(entry.question, entry.times)  # whatever it is shown: the frames are what differs
    parts = sentences(entry.captions[0])
    last = max(len(parts) - 1, 1)  # nothing follows the last sentence
    places = np.linspace(1, last, min(PLACES, last)).round().astype(int).tolist()
    begun = [model.tokenizer.encode(" ".join(parts[:place]), add_special_tokens=False) for place in places]
    ids = [model.tokenizer.encode(f" {text}", add_special_tokens=False) for text in texts]
    groups = [Group(prompt + words, visual, ids) for visual in visuals for words in begun]
    shared, logps = can_share_prefix(model.causal_lm), []
    size = batch_size if shared else 1
    for start in range(0, len(groups), size):
        values, _, _ = completion_logps(model, groups[start : start + size], shared_prefix=shared)  # [n, T], padded: 0
        logps.append(values.sum(1).double().cpu())
    logps = torch.cat(logps).view(len(visuals), len(places), len(texts)).numpy()
    return np.logaddexp.reduce(logps, axis=1) - np.log(len(places))


def margins(shown: np.ndarray, grey: np.ndarray, statements: dict[str, list[str]]) -> dict[str, float]:
    """{class: by how much, in nats, the clip makes the statements about it likelier than grey frames do}.

    shown, grey: `log_likelihoods` of the statements, in the order of `statements`. What language alone makes likely is
    likely on grey frames, too, and cancels out: the pointwise mutual information of clip and statement, as in
    VisualGPTScore (Lin et al. 2024, arXiv 2306.01879). A model that ignores the video has margins of exactly 0.
    """
    found, start = {}, 0
    for name, texts in statements.items():
        part = slice(start, start + len(texts))
        found[name] = round(float(np.logaddexp.reduce(shown[part]) - np.logaddexp.reduce(grey[part])), 4)
        start += len(texts)
    return found


@torch.no_grad()
def ask_statements(model, read, entries: list[Entry], statements: dict, asked: dict, batch_size: int) -> list[dict]:
    """The margins of the classes that are asked about each clip, {clip: classes}, when the model is shown the clip
    (`shown`: "clip") and when it is shown another one ("swapped"): rows of probes.jsonl. `read`: clip -> frames
    [1, T, S, S, 3]; `statements`: of draw_statements."""
    videos, rows = sorted(asked), []
    grey = model.encode_video(torch.full_like(read(videos[0]), GREY))[0]  # [N, D]
    for number, video in enumerate(tqdm(videos, desc="probes", unit="clip")):
        visuals = [model.encode_video(read(shown))[0] for shown in (video, videos[number - len(videos) // 2])]
        for entry in (entry for entry in entries if entry.video == video):
            about = {name: statements[entry.mode][name] for name in asked[video]}
            texts = [text for name in about for text in about[name]]
            *values, unseen = log_likelihoods(model, entry, texts, [*visuals, grey], batch_size)
            for shown, value in zip(("clip", "swapped"), values, strict=True):
                rows.append({"id": entry.id, "video": video, "mode": entry.mode, "shown": shown,
                             "margins": margins(value, unseen, about)})
    return rows


def affirmed(rows: list[dict], mode: str, shown: str) -> dict[str, set[str]]:
    """{clip: the classes whose margin is above 0} of one checkpoint's rows of probes.jsonl."""
    found = {}
    for row in rows:
        if row["mode"] == mode and row["shown"] == shown:
            found[row["video"]] = {name for name, margin in row["margins"].items() if margin > 0}
    return found


# ---- counting --------------------------------------------------------------------------------------------------------


def share_of_clips(right: dict[str, list[bool]], seed: int) -> list[float]:
    """[share, low, high] of what is true, with a 95% interval over draws of clips; `right`: {clip: answers}."""
    videos = sorted(right)
    draws = draw_clips(len(videos), seed)
    values = ratio(draws @ np.array([sum(right[video]) for video in videos], dtype=float),
                   draws @ np.array([len(right[video]) for video in videos], dtype=float))
    return [round(float(values[0]), 4), *interval_of(values)]


def score_probes(probes: list[Probe], yes: dict[str, set[str]], seed: int) -> dict:
    """{kind: {"probes", "yes_present", "yes_absent", "right"}}; `yes`: {clip: the classes said to be there}.

    "right" is the share of probes with a yes for the present and a no for the absent class. Yes to all and no to all
    score 0, a coin 0.25.
    """
    block = {}
    for kind in KINDS:
        answers = {"yes_present": {}, "yes_absent": {}, "right": {}}
        for probe in probes:
            if probe.kind == kind and probe.video in yes:
                first, second = (name in yes[probe.video] for name in (probe.present, probe.absent))
                for key, answer in (("yes_present", first), ("yes_absent", second), ("right", first and not second)):
                    answers[key][probe.video] = [answer]
        if answers["right"]:
            block[kind] = {"probes": len(answers["right"]),
                           **{key: share_of_clips(answer, seed) for key, answer in answers.items()}}
    return block


def separation(rows: list[dict], mode: str, shown: str, truth: dict[str, Truth], seed: int) -> list[float] | None:
    """[AUC, low, high] of one checkpoint's rows of probes.jsonl: the chance that a clip with a class has the higher
    margin of it, beside a clip without (a tie counts half), a mean over the classes that were asked about in both kinds
    of clips. A model that ignores the video has 0.5. None where there is no such class."""
    rows = [row for row in rows if row["mode"] == mode and row["shown"] == shown]
    draws, of_class = draw_clips(len(rows), seed), defaultdict(list)  # [B, clips], a row per clip
    for place, row in enumerate(sorted(rows, key=lambda row: row["video"])):
        for name, margin in row["margins"].items():
            of_class[name].append((place, margin, name in truth[row["video"]].present))
    total, number = np.zeros(len(draws)), np.zeros(len(draws))
    for asked in of_class.values():
        place, margin, there = (np.array(column) for column in zip(*asked, strict=True))
        higher = np.sign(margin[there][:, None] - margin[~there]) / 2 + 0.5  # [clips with it, clips without]
        first, second = draws[:, place[there]], draws[:, place[~there]]
        pairs = first.sum(1) * second.sum(1)
        total += ratio(((first @ higher) * second).sum(1), pairs)
        number += pairs > 0
    if not number[0]:
        return None
    values = total[number > 0] / number[number > 0]
    return [round(float(values[0]), 4), *interval_of(values)]


def score_twins(twins: list[dict], told: dict[str, set[str]], seed: int) -> dict:
    """How often a class that a twin lacks is told in the clip (`told`), in the twin (`still_told`), and in the clip
    alone (`right`); of all twins, of those where training captions invent the class (`traps`), and the `others`.

    `twins`: rows of read_twins; `told`: {clip or twin: the classes that its answer names}. Twins of one clip are drawn
    together.
    """
    block, twins = {}, [twin for twin in twins if twin["of"] in told]  # a clip may be asked about in one mode only
    for part, chosen in (("all", twins), ("traps", [twin for twin in twins if twin["in_trap"]]),
                         ("others", [twin for twin in twins if not twin["in_trap"]])):
        answers = {key: defaultdict(list) for key in ("told", "still_told", "right")}
        for twin in chosen:
            before, after = (twin["lacks"] in told[twin[video]] for video in ("of", "video"))
            for key, answer in (("told", before), ("still_told", after), ("right", before and not after)):
                answers[key][twin["of"]].append(answer)
        if chosen:
            block[part] = {"twins": len(chosen),
                           **{key: share_of_clips(answer, seed) for key, answer in answers.items()}}
    return block


def told_by(rows: list[dict], mode: str) -> dict[str, set[str]]:
    """{clip: the classes that its answer names} of a system's rows of predictions.jsonl, the first sample of each."""
    return {row["video"]: set(mentioned(row["text"])) for row in rows if row["mode"] == mode and row["sample"] == 0}


# ---- twins' file -----------------------------------------------------------------------------------------------------


def read_twins(path: str, video_root: str, held_out: set[str], problems: list[str]) -> list[dict]:
    """The rows of a file of twins, `[{"video", "of", "lacks", "in_trap"}, ..]`: the twin, the held-out clip that it is
    the twin of, the class that it lacks, whether training captions invent that class in such clips. What is wrong is
    added to `problems`."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        twins = [{"video": str(row["video"]), "of": str(row["of"]), "lacks": str(row["lacks"]),
                  "in_trap": bool(row["in_trap"])} for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        problems.append(f"twins: {path} is no list of twins ({error!r})")
        return []
    wrong = {"not twins of held-out clips": [twin["of"] for twin in twins if twin["of"] not in held_out],
             "not COCO's classes": [twin["lacks"] for twin in twins if twin["lacks"] not in COCO_NAMES],
             "not there": []}
    for twin in twins:
        try:
            if not is_clip(resolve_video(video_root, twin["video"])):
                wrong["not there"].append(twin["video"])
        except RowError as error:
            problems.append(f"twins: {error}")
    problems += [f"twins: {path} has {len(names)} that are {what}: {', '.join(names[:3])}"
                 for what, names in wrong.items() if names]
    return twins


def twin_entries(twins: list[dict], modes: list[str]) -> list[Entry]:
    """What is asked about the twins: every mode's question."""
    return [Entry(f"{video_stem(twin['video'])}#{mode}", twin["video"], mode, MODE_TABLE[mode].question, ())
            for mode in modes for twin in twins]
