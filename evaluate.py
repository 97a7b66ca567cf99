"""Measures checkpoints on the held-out clips, next to baselines that never see the video.

    python evaluate.py --checkpoint stage1=output/stage1 stage2=output/stage2 stage3=output/stage3 \\
        --config configs/stage3.yaml --output_dir output/evaluate

Greedy answers in every mode, one row per system: `prior` (the best constant caption), `blank` (grey frames), `swapped`
(another clip's frames), `reversed` (the clip backwards, where the truth knows the order of events), the checkpoints,
`reference` (the held-out captions as if they were answers). The scorer reads only predictions and truth: exact where a
file gives it (`truth`), else what a detector finds (`judge`; not the detector that the reward checks). Each number has
a 95% bootstrap interval over clips. `--num_samples 4` adds rows of answers sampled at `--temperature`. Answers already
in <output_dir>/predictions.jsonl are kept if the same weights and settings made them.
"""

import hashlib
import itertools
import json
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from training.common import fail, file_sha256, is_other_base, load_config, read_jsonl, run_main, write_json, write_text
from training.config import EvaluateConfig

if __name__ == "__main__":  # --help and wrong flags are answered before torch is imported, which takes seconds
    load_config(EvaluateConfig, default_config="configs/stage3.yaml", description=__doc__)

import numpy as np
import torch
from tqdm import tqdm

from dataset import (
    MODE_TABLE,
    DataError,
    VideoError,
    cached_frames,
    load_split,
    resolve_video,
    sample_clip,
    video_reader_problems,
)
from model import DriveVLM, ModelError, read_checkpoint, resolve_dtype
from pages.render import film_strip, highlight, render
from stage3.detect_objects import evidence_problems, get_evidence
from stage3.evidence import Evidence
from stage3.grpo_reward_func import judge_facts, label_facts
from stage3.mentions import find_mentions, read_caption
from stage3.vocabulary_config import COCO_NAMES
from training.loop import leak_problems

BOOTSTRAP = 1000  # draws of clips
KNOWN_OF_CLASSES = ("counts", "sides", "light", "colours", "motion")  # what a truth file may know besides `present`
FIXED = ("prior", "blank", "swapped", "reversed", "reference")  # rows that are there whatever the checkpoints
FRAMES = 8  # frames of a clip that are shown


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


def judged_truth(config: EvaluateConfig, entries) -> dict[str, Truth]:
    """The judge's evidence on the entries' clips (those that it could look at); detects what is not cached."""
    truth = {}
    for video, evidence in get_evidence(entries, config.video_root, config.judge, config.evidence_cache).items():
        if evidence is not None:
            truth[video] = Truth(evidence.present, evidence.salient, evidence.unknown, evidence=evidence)
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


# ---- answers: a constant caption's, and those of checkpoints ---------------------------------------------------------


def constant_caption(train, truth: dict[str, Truth]) -> tuple[str, float]:
    """The prior: the classes most frequent in the training captions, as many of them as give the best micro-F1 on the
    training clips -> (caption, that F1). Held-out clips have no part in it.

    `truth`: of the training clips; where it lacks a clip, what the clip's captions mention is taken for its truth.
    """
    said = defaultdict(set)
    for entry in train:
        for caption in entry.captions:
            said[entry.video].update(mentioned(caption))
    num_clips = Counter()
    for names in said.values():
        num_clips.update(sorted(names))
    frequent = [name for name, _ in num_clips.most_common()]
    clips = [truth.get(video) or Truth(frozenset(names), frozenset(names)) for video, names in said.items()]
    num_salient = sum(len(clip.salient) for clip in clips)
    hit = named = recalled = 0
    best, best_f1 = 0, 0.0
    for length, name in enumerate(frequent, start=1):
        hit += sum(name in clip.present for clip in clips)
        named += sum(name not in clip.unknown for clip in clips)
        recalled += sum(name in clip.salient for clip in clips)
        precision, recall = hit / max(named, 1), recalled / max(num_salient, 1)
        f1 = 2 * precision * recall / (precision + recall) if hit and recalled else 0.0
        if f1 > best_f1:
            best, best_f1 = length, f1
    return ", ".join(frequent[:best]).capitalize() + ".", best_f1


def prediction(system: str, entry, text: str, key="", sample=0, tokens=0, ended=True, seconds=0.0) -> dict:
    """One row of predictions.jsonl."""
    return {"system": system, "key": key, "id": entry.id, "video": entry.video, "mode": entry.mode, "sample": sample,
            "text": text, "tokens": tokens, "ended": ended, "seconds": round(seconds, 4)}


@dataclass(frozen=True)
class System:
    """One row of the table that a checkpoint answers for."""

    name: str
    folder: Path  # the checkpoint folder
    control: str = ""  # see change_frames
    num_samples: int = 0  # 0: greedy


def planned_systems(config: EvaluateConfig, folders: dict[str, Path], ordered: bool) -> list[System]:
    """The rows that checkpoints answer for. `ordered`: the truth knows the order of events."""
    control = config.control or ("stage2" if "stage2" in folders else list(folders)[-1])
    controls = ["blank", "swapped", "reversed"] if ordered else ["blank", "swapped"]
    systems = [System(how, folders[control], control=how) for how in controls]
    systems += [System(name, folder) for name, folder in folders.items()]
    if config.num_samples:
        systems += [System(f"{name} T={config.temperature:g}", folder, num_samples=config.num_samples)
                    for name, folder in folders.items()]
    return systems


def change_frames(frames: np.ndarray, how: str) -> np.ndarray:
    """frames: uint8 [N, T, S, S, 3] of N different clips -> what each clip shows under a control."""
    if how == "blank":
        return np.full_like(frames, 128)  # grey: near 0 once normalised
    if how == "swapped":
        return np.roll(frames, len(frames) // 2, axis=0)
    if how == "reversed":
        return frames[:, ::-1]
    return frames


def answers_key(system: System, entries, config: EvaluateConfig, limits: dict[str, int]) -> str:
    """Changes with everything that an answer depends on: weights, questions, clips, control, sampling."""
    files = [system.folder / "drivevlm.json", *sorted(system.folder.rglob("*.safetensors"))]
    sampling = [system.num_samples, config.seed, config.temperature] if system.num_samples else "greedy"
    content = [[file_sha256(file) for file in files], config.vision_model, config.language_model, config.dtype,
               system.control, sampling, limits, config.eval_batch_size, config.video_root,
               [(entry.id, entry.question) for entry in entries]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def ask(model, system: System, key: str, entries, config: EvaluateConfig, limits: dict[str, int]) -> list[dict]:
    """Every entry's answer by `model` -> rows of predictions.jsonl. `limits`: {mode: longest answer in tokens}.

    All clips' frames are held in memory: 40 clips of 16 frames at 384 px are 0.3 GB.
    """
    samples = max(system.num_samples, 1)
    videos = sorted({entry.video for entry in entries})
    frames = [cached_frames(resolve_video(config.video_root, video), model.num_frames, model.image_size,
                            config.frame_cache) for video in videos]
    frames = change_frames(np.stack(frames), system.control)
    frames = torch.from_numpy(np.ascontiguousarray(frames))  # uint8 [N, T, S, S, 3]
    rows = []
    with tqdm(total=len(entries), desc=system.name, unit="answer") as bar:
        for mode, limit in limits.items():
            asked = [entry for entry in entries if entry.mode == mode]
            for start in range(0, len(asked), config.eval_batch_size):
                batch = asked[start : start + config.eval_batch_size]
                begin = time.perf_counter()
                answers = model.generate(
                    frames[[videos.index(entry.video) for entry in batch]], [entry.question for entry in batch],
                    max_new_tokens=limit, num_samples=samples, seed=config.seed + start,
                    temperature=config.temperature if system.num_samples else 0.0)
                seconds = (time.perf_counter() - begin) / len(answers)
                for i, answer in enumerate(answers):  # the answers to one entry follow each other
                    rows.append(prediction(system.name, batch[i // samples], answer.text, key, i % samples,
                                           len(answer.ids), answer.ended, seconds))
                bar.update(len(batch))
    return rows


def ask_all(systems: list[System], entries, config: EvaluateConfig, limits: dict[str, int], file: Path) -> list[dict]:
    """The answers of all systems. Those in `file` that would come out the same are kept; each system is written when it
    is finished, so a killed run can be repeated without losing it."""
    keys = {system.name: answers_key(system, entries, config, limits) for system in systems}
    answers = defaultdict(list)
    for row in read_jsonl(file):
        if keys.get(row["system"]) == row["key"]:
            answers[row["system"]].append(row)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = loaded = None
    for system in systems:
        if system.name in answers:
            print(f"{system.name}: kept its answers in {file}")
            continue
        if loaded != system.folder:
            model = None  # frees the one before: two 4B models may not fit together
            model = DriveVLM.from_checkpoint(system.folder, dtype=config.dtype, device=device,
                                             vision_model=config.vision_model, language_model=config.language_model)
            loaded = system.folder
        answers[system.name] = ask(model, system, keys[system.name], entries, config, limits)
        write_predictions(file, [row for name in keys for row in answers.get(name, ())])
    return [row for name in keys for row in answers[name]]


def write_predictions(file: Path, rows: list[dict]) -> None:
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ---- table and page --------------------------------------------------------------------------------------------------


def cell(block: dict, key: str) -> str:
    """`0.79 ±.05`, half of the interval's width after the sign; a dash where the number means nothing."""
    metric = METRICS[key]
    if metric.needs and not block[metric.needs]:
        return "–"
    low, high = block["interval"][key]
    spread = f"{(high - low) / 2:.{metric.decimals}f}"
    return f"{block[key]:.{metric.decimals}f} ±{spread.removeprefix('0') or spread}"


def table_of_mode(metrics: dict, mode: str) -> list[list[str]]:
    """One mode's table, its head first. The order of events has no column where no system has such a pair."""
    systems = metrics["systems"]
    has_order = any(block[mode]["order_pairs"] for block in systems.values())
    keys = [key for key in METRICS if METRICS[key].in_table and (key != "order" or has_order)]
    rows = [[mode.capitalize(), *(METRICS[key].head for key in keys), "mode acc."]]
    for name, block in systems.items():
        rows.append([name, *(cell(block[mode], key) for key in keys), f"{block['mode_accuracy']:.2f}"])
    return rows


def bars_of_mode(metrics: dict, mode: str, key: str) -> list[dict]:
    """One bar per system: its value of a metric (None where it means nothing) and its interval, shares from 0 to 1."""
    bars = []
    for name, systems_block in metrics["systems"].items():
        block, needs = systems_block[mode], METRICS[key].needs
        low, high = block["interval"][key]
        bars.append({"name": name, "value": None if needs and not block[needs] else block[key],
                     "low": low, "high": high})
    return bars


def table(metrics: dict) -> str:
    """One Markdown table per mode, columns padded so that it also reads well in a terminal."""
    lines = []
    for mode in metrics["words_in_range"]:
        rows = table_of_mode(metrics, mode)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ["-" * width for width in widths])
        for row in rows:
            padded = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
            lines.append("| " + " | ".join(padded) + " |")
        lines.append("")
    return "\n".join(lines)


def marked(text: str, truth: Truth):
    """The text as HTML, each mention coloured by what the truth says of it."""
    spans = []
    for mention in find_mentions(text):
        kind = "negated" if mention.negated else truth.verdict(mention.object)
        spans.append((mention.start, mention.end, kind, f"{mention.object}: {kind}"))
    for what, verdict, start, end in label_facts(text, truth.evidence) if truth.evidence else ():
        spans.append((start, end, "unsupported" if verdict == "contradicted" else verdict, f"{what}: {verdict}"))
    return highlight(text, spans)


def report(metrics: dict, predictions: list[dict], truth: dict[str, Truth], strips: dict[str, list]) -> str:
    """The page: the tables, then each clip with its frames and every system's answers, most invention first."""
    answers, invented = defaultdict(dict), Counter()
    for row in predictions:
        if row["sample"] == 0 and row["system"] != "prior":
            text = marked(row["text"], truth[row["video"]])
            answers[row["video"]].setdefault(row["system"], {})[row["mode"]] = text
        if row["system"] in metrics["checkpoints"]:
            invented[row["video"]] += score_text(row["text"], truth[row["video"]], [0, 0])["invented"]
    clips = []
    for video in sorted(answers, key=lambda video: (-invented[video], video)):
        clips.append({"video": video, "frames": strips[video], "answers": answers[video],
                      "present": sorted(truth[video].present), "unknown": sorted(truth[video].unknown)})
    charts = {mode: (bars_of_mode(metrics, mode, "chair_i"), bars_of_mode(metrics, mode, "recall"))
              for mode in metrics["words_in_range"]}
    return render("evaluation.html", metrics=metrics, clips=clips, charts=charts,
                  tables=[table_of_mode(metrics, mode) for mode in metrics["words_in_range"]])


# ---- the run ---------------------------------------------------------------------------------------------------------


def open_inputs(config: EvaluateConfig):
    """(checkpoint folders by name, training entries, held-out entries, {clip: truth} of the truth file, or None).

    Everything that is missing or wrong comes in one message, exit code 2.
    """
    problems, train, held_out, truth = video_reader_problems(config), [], [], None
    folders = open_checkpoints(config, problems)
    paths = {key: getattr(config, key) for key in ("data", "val_data", "video_root", "truth")}
    absent = {key for key, path in paths.items() if path and not Path(path).exists()}
    problems += [f"{key}: not found: {paths[key]}" for key in paths if key in absent]
    for key in ("word_range", "eval_max_new_tokens"):
        problems += [f"{key}: there is no mode {mode!r}; modes are {', '.join(MODE_TABLE)}"
                     for mode in getattr(config, key) if mode not in MODE_TABLE]
    if any((Path(config.output_dir) / name).exists() for name in ("train.log", "model")):
        problems.append(f"output_dir: {config.output_dir} is a training run's folder; give another with --output_dir")
    if not absent & {"data", "val_data"}:
        try:
            train, held_out = load_split(config)
            if not held_out:
                problems.append(f"data: no held-out clips in {config.val_data or config.data} (num_val_videos is "
                                f"{config.num_val_videos})")
        except DataError as error:
            problems.append(f"data: {error}")
    for folder in folders.values():
        problems += leak_problems(config, held_out, folder)
    if not config.truth:
        problems += evidence_problems(held_out, config.judge, config.evidence_cache, "judge")
    elif "truth" not in absent:
        truth = exact_truth(config.truth, sorted({entry.video for entry in held_out}), problems)
    if problems:
        fail(problems)
    return folders, train, held_out, truth


def open_checkpoints(config: EvaluateConfig, problems: list[str]) -> dict[str, Path]:
    """--checkpoint as {name: checkpoint folder}; what is wrong with it is added to `problems`."""
    names, folders = [], {}
    for text in config.checkpoint:
        name, _, folder = text.partition("=")
        if not name or not folder:
            problems.append(f"checkpoint: {text!r} is not NAME=FOLDER")
        elif name in (*FIXED, *names):
            problems.append(f"checkpoint: the name {name!r} is taken (also by the fixed rows {', '.join(FIXED)})")
        else:
            names.append(name)
            try:
                folders[name], meta = read_checkpoint(folder)
            except ModelError as error:
                problems.append(f"checkpoint: {name}: {error}")
                continue
            for key in ("vision_model", "language_model"):
                given, recorded = getattr(config, key), meta[key]["name"]
                if given and is_other_base(recorded, given):
                    problems.append(f"{key}: {given}, but {folder} was trained with {recorded}")
    if not config.checkpoint:
        problems.append("checkpoint: none given; use --checkpoint NAME=FOLDER [NAME=FOLDER ...]")
    if config.control and config.control not in names:
        problems.append(f"control: no checkpoint is called {config.control!r}")
    return folders


def read_clips(videos: list[str], video_root: str) -> tuple[dict[str, list], dict[str, str]]:
    """({clip: its film strip}, {clip that cannot be read: reason}); such a clip is left out for every system."""
    strips, failed = {}, {}
    for video in videos:
        try:
            _, times, frames = sample_clip(resolve_video(video_root, video), FRAMES)
        except VideoError as error:
            failed[video] = str(error)
            print(f"left out, cannot be read: {error}", file=sys.stderr)
        else:
            strips[video] = film_strip(frames, [f"{time:.0%} of the clip" for time in times])
    return strips, failed


def evaluate(config: EvaluateConfig) -> dict:
    """The whole run; returns the content of metrics.json."""
    folders, train, held_out, known_truth = open_inputs(config)
    asked = {entry.mode for entry in held_out}
    modes = {name: mode for name, mode in MODE_TABLE.items() if name in asked}
    limits = {name: config.eval_max_new_tokens.get(name, mode.max_new_tokens) for name, mode in modes.items()}
    ranges = {name: list(config.word_range.get(name, mode.word_range)) for name, mode in modes.items()}
    strips, left_out = read_clips(sorted({entry.video for entry in held_out}), config.video_root)
    entries = [entry for entry in held_out if entry.video in strips]
    truth = judged_truth(config, entries) if known_truth is None else {video: known_truth[video] for video in strips}
    left_out |= {video: "the judge has no evidence" for video in strips if video not in truth}
    entries = [entry for entry in entries if entry.video in truth]
    if len(truth) < 2:
        fail([f"{len(truth)} held-out clips can be used; swapping clips needs two (num_val_videos)"])
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)

    prior, prior_f1 = constant_caption(train, known_truth or {})
    print(f'prior: every clip is answered with "{prior}" (micro-F1 on the training clips: {prior_f1:.2f})')
    systems = planned_systems(config, folders, any(clip.order for clip in truth.values()))
    predictions = [prediction("prior", entry, prior) for entry in entries]
    predictions += ask_all(systems, entries, config, limits, out / "predictions.jsonl")
    predictions += [prediction("reference", entry, entry.captions[0]) for entry in entries]
    write_predictions(out / "predictions.jsonl", predictions)

    references, rows_of = {entry.id: entry.captions for entry in entries}, defaultdict(list)
    for row in predictions:
        rows_of[row["system"]].append(row)
    metrics = {
        "systems": {name: score(rows, truth, ranges, config.seed, references) for name, rows in rows_of.items()},
        "checkpoints": dict(text.split("=", 1) for text in config.checkpoint),
        "clips": len(truth), "left_out": left_out,
        "prior": {"caption": prior, "f1_micro_train": round(prior_f1, 4)},
        "truth": f"exact ({config.truth})" if config.truth else f"detector ({Path(config.judge.weights).name}, judge)",
        "words_in_range": ranges,
    }
    write_json(out / "metrics.json", metrics, indent=1)
    write_text(out / "table.md", table(metrics))
    write_text(out / "report.html", report(metrics, predictions, truth, strips))
    print(f"\n{table(metrics)}\nclips and answers: {out / 'report.html'}")
    return metrics


def main(argv: list[str] | None = None) -> int:
    config = load_config(EvaluateConfig, argv, default_config="configs/stage3.yaml", description=__doc__)
    config.dtype = resolve_dtype(config.dtype)
    evaluate(config)
    return 0


if __name__ == "__main__":
    run_main(main)
