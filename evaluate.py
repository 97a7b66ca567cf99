"""Measures checkpoints on the held-out clips, beside what needs no eyes at all.

    python evaluate.py --checkpoint stage1=output/stage1 stage2=output/stage2 stage3=output/stage3 \\
        --config configs/stage3.yaml --output_dir output/evaluate

Greedy answers in both modes, one row a system: `prior` (the best constant caption), `blank` (no picture), `swapped`
(another clip's picture), `reversed` (the clip backwards, where the truth knows the order of events), the checkpoints,
`reference` (the held-out captions as if they were answers). The scorer reads only the predictions and the evidence:
exact truth where a file gives it (`truth`), else a detector with other settings than the one that paid the reward
(`judge`). Each number has a 95% bootstrap interval over clips. `--num_samples 4` adds rows sampled at `--temperature`.

Answers that stand in <output_dir>/predictions.jsonl and were made by the same weights are kept.
"""

import base64
import hashlib
import html
import io
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dataset import MODES, DataError, Entry, VideoError, cached_frames, load_entries, resolve_video, split_by_video
from model import DriveVLM, ModelError, checkpoint_folder
from stage3.detect_objects import DetectionError, DetectorSettings, check_settings, detect_clips, load_evidence
from stage3.vocabulary_config import COCO_NAMES, find_mentions
from training import DataConfig, fail, load_config, opt

BOOTSTRAP = 1000
FIXED = ("prior", "blank", "swapped", "reversed", "reference")  # rows that are there whatever the checkpoints
# key in metrics.json, head in the table, decimals
COLUMNS = [("words", "words", 0), ("in_range", "in range", 2), ("ended", "ended", 2), ("precision", "P", 2),
           ("recall", "R", 2), ("f1_micro", "F1", 2), ("f1_macro", "F1 macro", 2), ("chair_i", "CHAIRi", 2),
           ("chair_s", "CHAIRs", 2), ("order", "order", 2), ("repetition", "rep-4", 2),
           ("tokens_per_second", "tok/s", 0)]


@dataclass
class EvaluateConfig(DataConfig):
    """Evaluation"""

    checkpoint: list[str] = opt([], "NAME=FOLDER, one or several: checkpoint or run folders")
    control: str = opt("", "the checkpoint that blank, swapped and reversed ask; default stage2, else the last")
    truth: str = opt("", "file of exact truth, as the toy world writes; without it the judge's evidence is the truth")
    judge: DetectorSettings = field(default_factory=DetectorSettings)
    evidence_cache: str = opt("output/evidence", "where the detector's boxes are kept")
    microscope_words: list[int] = opt([150, 1000], "fewest and most words of a Microscope answer in range")
    copilot_words: list[int] = opt([10, 60], "fewest and most words of a Copilot answer in range")
    microscope_tokens: int = opt(640, "an answer is cut after so many tokens")
    copilot_tokens: int = opt(128, "an answer is cut after so many tokens")
    num_samples: int = opt(0, "sampled answers a clip and mode in extra rows, 0 for none")
    temperature: float = opt(1.0, "of the sampled answers")
    eval_batch_size: int = opt(8, "clips that are answered at once")

    def folders(self) -> dict[str, Path]:
        """--checkpoint as {name: folder}."""
        return {name: Path(folder) for name, _, folder in (text.partition("=") for text in self.checkpoint)}

    def problems(self) -> list[str]:
        found, names = super().problems(), [text.partition("=")[0] for text in self.checkpoint]
        for text, name in zip(self.checkpoint, names, strict=True):
            if not re.fullmatch(r"[^=]+=.+", text):
                found.append(f"checkpoint: {text!r} is not NAME=FOLDER")
            elif name in FIXED or names.count(name) > 1:
                found.append(f"checkpoint: the name {name!r} is taken (also by the fixed rows {', '.join(FIXED)})")
            elif not (checkpoint_folder(self.folders()[name]) / "drivevlm.json").is_file():
                found.append(f"checkpoint: {self.folders()[name]} holds no drivevlm.json, nor does its model/")
        if not names:
            found.append("checkpoint: none given; use --checkpoint NAME=FOLDER [NAME=FOLDER ...]")
        if self.control and self.control not in names:
            found.append(f"control: no checkpoint is called {self.control!r}")
        found += [f"{key}: not found: {path}" for key, path in (("data", self.data), ("video_root", self.video_root),
                  ("truth", self.truth)) if path and not Path(path).exists()]
        if any((Path(self.output_dir) / name).exists() for name in ("train.log", "model")):
            found.append(f"output_dir: {self.output_dir} is a training run's folder; give another with --output_dir")
        if not self.truth:
            found += check_settings(self.judge, "judge")
        for key in ("microscope_words", "copilot_words"):
            words = getattr(self, key)
            if len(words) != 2 or not 0 <= words[0] <= words[1]:
                found.append(f"{key} must be [fewest, most], got {words}")
        for key in ("microscope_tokens", "copilot_tokens", "eval_batch_size", "temperature"):
            if not getattr(self, key) > 0:
                found.append(f"{key} must be above 0, got {getattr(self, key)}")
        return found


# ----------------------------------------------------------------------------------------------------------------------
# Truth


@dataclass(frozen=True)
class Truth:
    """What a clip shows. A class in none of the sets is absent."""

    present: frozenset[str]
    salient: frozenset[str]  # what a complete answer tells: recall counts these
    unknown: frozenset[str] = frozenset()  # neither right nor wrong
    order: tuple[str, ...] = ()  # classes in the order of their first appearance


def exact_truth(path: str, videos: list[str]) -> dict[str, Truth]:
    """Reads `{video: {"present": [..], "order": [..], ..}}`; leaves with a message where clips are missing."""
    rows = json.loads(Path(path).read_text())
    missing = [video for video in videos if video not in rows]
    if missing:
        fail([f"truth: {path} lacks {len(missing)} of {len(videos)} clips ({', '.join(missing[:3])} ..)"])
    strange = {name for video in videos for name in rows[video]["present"]} - set(COCO_NAMES)
    if strange:
        fail([f"truth: {path} has classes that are not COCO's: {', '.join(sorted(strange))}"])
    truth = {}
    for video in videos:
        present = frozenset(rows[video]["present"])
        truth[video] = Truth(present, present, order=tuple(rows[video].get("order", ())))
    return truth


def judged_truth(config: EvaluateConfig, entries: list[Entry]) -> tuple[dict[str, Truth], list[str]]:
    """The judge's evidence on the entries' clips, detecting what is not cached -> (truth, clips without evidence)."""
    videos = sorted({entry.video for entry in entries})
    detect_clips(videos, config.video_root, config.judge, config.evidence_cache)
    evidence = load_evidence(config.evidence_cache, entries, config.judge)
    truth = {video: Truth(frozenset(e.present), frozenset(e.salient), frozenset(e.unknown))
             for video, e in evidence.items() if e is not None}
    return truth, [video for video in videos if video not in truth]


# ----------------------------------------------------------------------------------------------------------------------
# Systems that need no model


def mentioned(text: str) -> list[str]:
    """The objects that a text says are there, one for each mention, in the text's order."""
    return [m.object for m in sorted(find_mentions(text), key=lambda m: m.start) if not m.negated]


def micro_f1(answers: list[set], truths: list[Truth]) -> float:
    hit = sum(len(a & t.present) for a, t in zip(answers, truths, strict=True))
    named = sum(len(a - t.unknown) for a, t in zip(answers, truths, strict=True))
    told = sum(len(a & t.salient) for a, t in zip(answers, truths, strict=True))
    due = sum(len(t.salient) for t in truths)
    return harmonic(hit / named if named else 0.0, told / due if due else 0.0)


def harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def constant_caption(train: list[Entry], truth: dict[str, Truth]) -> tuple[str, float]:
    """The prior: the classes most frequent in the training captions, as many of them as score best in micro-F1 on the
    training clips -> (caption, that F1). Held-out clips have no part in it.

    truth: of the training clips; a clip that it lacks is judged by what its own captions mention.
    """
    said = {}
    for entry in train:
        for caption in entry.captions:
            said.setdefault(entry.video, set()).update(mentioned(caption))
    frequent = [name for name, _ in Counter(name for names in said.values() for name in sorted(names)).most_common()]
    truths = [truth.get(video) or Truth(frozenset(names), frozenset(names)) for video, names in said.items()]
    scores = [micro_f1([set(frequent[:k])] * len(truths), truths) for k in range(len(frequent) + 1)]
    best = int(np.argmax(scores))
    return ", ".join(frequent[:best]).capitalize() + ".", scores[best]


def fixed_predictions(system: str, entries: list[Entry], text_of) -> list[dict]:
    return [{"system": system, "key": "", "id": e.id, "video": e.video, "mode": e.mode, "sample": 0, "text": text_of(e),
             "tokens": 0, "ended": True, "seconds": 0.0} for e in entries]


# ----------------------------------------------------------------------------------------------------------------------
# Asking a checkpoint


def checkpoint_hash(folder: Path) -> str:
    """Of the weights and settings in a checkpoint or run folder: answers made by others are asked again."""
    folder = checkpoint_folder(folder)
    digest = hashlib.sha256()
    for file in [folder / "drivevlm.json", *sorted(folder.rglob("*.safetensors"))]:
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def change_frames(frames: np.ndarray, how: str) -> np.ndarray:
    """frames: uint8 [N, T, S, S, 3] of N different clips; what each clip shows under a control."""
    if how == "blank":
        return np.full_like(frames, 128)  # grey: near 0 once normalised
    if how == "swapped":
        return np.roll(frames, len(frames) // 2, axis=0)
    if how == "reversed":
        return frames[:, ::-1]
    return frames


@dataclass(frozen=True)
class System:
    """One row of the table that a checkpoint answers for."""

    name: str
    folder: Path
    control: str = ""  # see change_frames
    num_samples: int = 0  # 0: greedy


def ask(model: DriveVLM, system: System, key: str, entries: list[Entry], config: EvaluateConfig) -> list[dict]:
    """Every entry's answer by `model` -> rows of predictions.jsonl.

    All clips' frames are held in memory: 40 clips of 16 frames at 384 px are 0.3 GB.
    """
    samples = max(system.num_samples, 1)
    videos = sorted({entry.video for entry in entries})
    frames = np.stack([cached_frames(resolve_video(config.video_root, video), model.num_frames, model.image_size,
                                     config.frame_cache or None) for video in videos])
    frames = torch.from_numpy(np.ascontiguousarray(change_frames(frames, system.control)))  # [N, T, S, S, 3]
    place = {video: i for i, video in enumerate(videos)}
    rows = []
    bar = tqdm(total=len(entries), desc=system.name, unit="answer")
    for mode in MODES:
        wanted = [entry for entry in entries if entry.mode == mode]
        max_new_tokens = getattr(config, f"{mode}_tokens")
        for start in range(0, len(wanted), config.eval_batch_size):
            batch = wanted[start : start + config.eval_batch_size]
            begun = time.perf_counter()
            answers = model.generate(
                frames[[place[entry.video] for entry in batch]], [entry.question for entry in batch],
                max_new_tokens=max_new_tokens, temperature=config.temperature if system.num_samples else 0.0,
                num_samples=samples, seed=config.seed + start,
            )
            seconds = (time.perf_counter() - begun) / len(answers)
            for i, answer in enumerate(answers):
                entry = batch[i // samples]
                rows.append({"system": system.name, "key": key, "id": entry.id, "video": entry.video, "mode": mode,
                             "sample": i % samples, "text": answer.text, "tokens": len(answer.ids),
                             "ended": answer.ended, "seconds": round(seconds, 4)})
            bar.update(len(batch))
    bar.close()
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Scoring: predictions and truth in, numbers out


def score_text(text: str, truth: Truth, words: list[int]) -> dict:
    """The counts that every metric is a ratio of."""
    spoken = mentioned(text)
    known = [name for name in spoken if name not in truth.unknown]
    invented = [name for name in known if name not in truth.present]
    said = set(spoken)
    tokens = re.findall(r"[\w'-]+", text.lower())
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    first = {name: i for i, name in reversed(list(enumerate(spoken)))}
    script = [name for name in truth.order if name in first]
    pairs = [(a, b) for i, a in enumerate(script) for b in script[i + 1 :]]
    counts = {
        "texts": 1, "words": len(tokens), "in_range": words[0] <= len(tokens) <= words[1],
        "hit": len(said & truth.present), "named": len(set(known)),
        "told": len(said & truth.salient), "due": len(truth.salient),
        "mentions": len(known), "invented": len(invented), "inventing": bool(invented),
        "grams": len(grams), "repeated": len(grams) - len(set(grams)),
        "pairs": len(pairs), "agreeing": sum(first[a] < first[b] for a, b in pairs),
    }
    for name in said & truth.present:
        counts["hit", name] = 1
    for name in set(invented):
        counts["false", name] = 1
    for name in truth.salient - said:
        counts["missed", name] = 1
    return counts


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, and 0 where there is nothing below."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=float), where=below > 0)


def metrics_of(total: dict, due_classes: set[str]) -> dict[str, np.ndarray]:
    """total: each count summed over texts, as arrays [B] (one value a bootstrap draw). Meanings: docs/evaluation.md.

    Without a mention, precision and CHAIR are 0. The macro average goes over the classes that the truth contains; a
    bootstrap draw without a case of some class leaves that one out.
    """
    precision, recall = ratio(total["hit"], total["named"]), ratio(total["told"], total["due"])
    shape = (len(due_classes), len(precision))
    hits = 2 * np.array([total["hit", name] for name in sorted(due_classes)]).reshape(shape)
    slips = np.array([total["false", name] + total["missed", name] for name in sorted(due_classes)]).reshape(shape)
    per_class = ratio(hits, hits + slips)
    return {
        "words": ratio(total["words"], total["texts"]),
        "in_range": ratio(total["in_range"], total["texts"]),
        "ended": ratio(total["ended"], total["texts"]),
        "precision": precision,
        "recall": recall,
        "f1_micro": ratio(2 * precision * recall, precision + recall),
        "f1_macro": ratio(per_class.sum(0), (hits + slips > 0).sum(0)),
        "chair_i": ratio(total["invented"], total["mentions"]),
        "chair_s": ratio(total["inventing"], total["texts"]),
        "order": ratio(total["agreeing"], total["pairs"]),
        "repetition": ratio(total["repeated"], total["grams"]),
        "tokens_per_second": ratio(total["tokens"], total["seconds"]),
    }


def totals(by_clip: dict[str, Counter], draws: np.ndarray, videos: list[str]) -> dict:
    """Sums each count over clips, weighted by how often a draw holds the clip: draws [B, clips] -> arrays [B]."""
    total = defaultdict(lambda: np.zeros(len(draws)))
    for key in {key for counts in by_clip.values() for key in counts}:
        total[key] = draws @ np.array([by_clip[video][key] for video in videos], dtype=float)
    return total


def score(predictions: list[dict], truth: dict[str, Truth], ranges: dict[str, list[int]], seed: int = 42) -> dict:
    """One system's rows of predictions.jsonl -> its block of metrics.json.

    ranges: mode -> [fewest, most] words. Intervals: the 2.5 and 97.5 percentiles over 1,000 draws of clips.
    """
    videos = sorted({row["video"] for row in predictions})
    draws = np.random.default_rng(seed).multinomial(len(videos), np.full(len(videos), 1 / len(videos)), size=BOOTSTRAP)
    draws = np.vstack([np.ones(len(videos), dtype=int), draws])  # row 0: every clip once
    due_classes = {name for video in videos for name in truth[video].salient}
    block, in_range = {}, defaultdict(list)
    for mode in MODES:
        by_clip: dict[str, Counter] = {video: Counter() for video in videos}
        for row in predictions:
            if row["mode"] == mode:
                counts = score_text(row["text"], truth[row["video"]], ranges[mode])
                counts |= {"ended": row["ended"], "tokens": row["tokens"], "seconds": row["seconds"]}
                by_clip[row["video"]].update(counts)
                in_range[row["video"], row["sample"]].append(counts["in_range"])
        total = totals(by_clip, draws, videos)
        values = metrics_of(total, due_classes)
        block[mode] = {key: round(float(value[0]), 4) for key, value in values.items()}
        block[mode] |= {"mentions": int(total["mentions"][0]), "order_pairs": int(total["pairs"][0])}
        block[mode]["interval"] = {key: np.percentile(value[1:], [2.5, 97.5]).round(4).tolist()
                                   for key, value in values.items()}
    right = [all(both) for both in in_range.values() if len(both) == len(MODES)]
    block["mode_accuracy"] = round(float(np.mean(right)), 4) if right else 0.0
    return block


# ----------------------------------------------------------------------------------------------------------------------
# Table and page


def cell(block: dict, key: str, decimals: int) -> str:
    """`0.79 ±.05`, half of the interval's width behind the sign; a dash where the number means nothing."""
    needs = {"order": "order_pairs", "precision": "mentions", "chair_i": "mentions", "chair_s": "mentions",
             "tokens_per_second": "tokens_per_second"}
    if key in needs and not block[needs[key]]:
        return "–"
    low, high = block["interval"][key]
    spread = f"{(high - low) / 2:.{decimals}f}"
    return f"{block[key]:.{decimals}f} ±{spread.removeprefix('0') or spread}"


def table(metrics: dict) -> str:
    """One Markdown table a mode, columns padded so that it reads as well in a terminal."""
    systems, parts = metrics["systems"], []
    for mode in MODES:
        columns = [c for c in COLUMNS if c[0] != "order" or any(s[mode]["order_pairs"] for s in systems.values())]
        rows = [[mode.capitalize(), *(head for _, head, _ in columns), "mode acc."]]
        for name, block in systems.items():
            rows.append([name, *(cell(block[mode], key, decimals) for key, _, decimals in columns),
                         f"{block['mode_accuracy']:.2f}"])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
                 for row in rows]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Drive-VLM: evaluation</title><style>
:root { --ink:#1d2430; --soft:#667085; --line:#e3e7ee; --card:#fff; --page:#f5f7fa; }
body { font:15px/1.55 system-ui,sans-serif; color:var(--ink); background:var(--page); margin:0 auto; max-width:1240px;
  padding:28px 24px 80px }
h1 { font-size:26px; margin:0 0 4px } h2 { font-size:17px; margin:0 0 10px } p { color:var(--soft); margin:4px 0 14px }
section { background:var(--card); border:1px solid var(--line); border-radius:12px; padding:18px 20px; margin:18px 0 }
table { border-collapse:collapse; width:100%%; font-size:13px }
th { color:var(--soft); font-weight:600; text-align:left }
td, th { padding:5px 8px; border-bottom:1px solid var(--line); vertical-align:top; white-space:nowrap }
td small { color:var(--soft) } tr.checkpoint td:first-child { font-weight:700 }
td.text { white-space:normal; width:46%% }
.scroll { overflow-x:auto } .strip { display:flex; gap:4px; margin:8px 0 12px } .strip img { flex:1; min-width:0;
  border-radius:6px }
.chip { background:#eef1f6; border-radius:99px; padding:1px 10px; margin-right:5px; font-size:13px }
mark { border-radius:4px; padding:0 3px; color:inherit } .yes { background:#c9efd4 } .no { background:#ffc9c4;
  font-weight:600 } .unknown { background:#e6e2d3 } .negated { background:#d6e4ff; text-decoration:line-through }
.legend mark { margin-right:8px } .out { color:#b54708; font-size:12px }
</style><h1>Evaluation on %(clips)d held-out clips</h1>
<p>Truth: %(truth)s. The number behind ± is half of the 95%% bootstrap interval over clips. The prior answers every clip
with “%(prior)s”.</p>
<p class="legend"><mark class="yes">supported by the truth</mark><mark class="no">not supported</mark><mark
class="unknown">unknown: neither right nor wrong</mark><mark class="negated">said to be absent</mark></p>
<section>%(tables)s</section>%(sections)s</html>
"""


def coloured(text: str, truth: Truth) -> str:
    """The text as HTML, each mention marked by what the truth says of it. Words for two classes take the worse."""
    spans: dict[tuple[int, int], str] = {}
    rank = ("negated", "yes", "unknown", "no")
    for m in find_mentions(text):
        known = "yes" if m.object in truth.present else "unknown" if m.object in truth.unknown else "no"
        kind = "negated" if m.negated else known
        spans[m.start, m.end] = max(spans.get((m.start, m.end), kind), kind, key=rank.index)
    out, end = [], 0
    for (start, stop), kind in sorted(spans.items()):
        if start >= end:
            out.append(f'{html.escape(text[end:start])}<mark class="{kind}">{html.escape(text[start:stop])}</mark>')
            end = stop
    return "".join(out) + html.escape(text[end:])


def frame_strip(path: Path, num_frames: int = 8, width: int = 240) -> str:
    """Some frames of a clip, as pictures inside the page."""
    from PIL import Image

    from stage3.detect_objects import read_clip

    pictures = []
    for frame in read_clip(path, num_frames)[2]:
        picture = Image.fromarray(frame)
        picture.thumbnail((width, width))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=80)
        pictures.append(f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">')
    return f'<div class="strip">{"".join(pictures)}</div>'


def html_table(metrics: dict) -> str:
    parts = []
    for block in table(metrics).strip().split("\n\n"):
        lines = [line for line in block.split("\n") if not line.startswith("|--")]
        rows = [[text.strip() for text in line.strip("|").split("|")] for line in lines]
        body = ["<tr>" + "".join(f"<th>{html.escape(text)}</th>" for text in rows[0]) + "</tr>"]
        for row in rows[1:]:
            cells = (re.sub(r" (±.*)", r" <small>\1</small>", html.escape(text)) for text in row)
            kind = ' class="checkpoint"' if row[0] in metrics["checkpoints"] else ""
            body.append(f"<tr{kind}>" + "".join(f"<td>{text}</td>" for text in cells) + "</tr>")
        parts.append(f'<div class="scroll"><table>{"".join(body)}</table></div>')
    return "<br>".join(parts)


def report(metrics: dict, predictions: list[dict], truth: dict[str, Truth], video_root: str) -> str:
    """The page: the table, then each clip with its frames and every system's answers, most invention first."""
    by_clip: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    wrong: Counter = Counter()
    for row in predictions:
        if row["sample"] == 0 and row["system"] != "prior":
            by_clip[row["video"]][row["system"]][row["mode"]] = row["text"]
        if row["system"] in metrics["checkpoints"]:
            wrong[row["video"]] += score_text(row["text"], truth[row["video"]], [0, 0])["invented"]
    sections = []
    for video in sorted(by_clip, key=lambda v: (-wrong[v], v)):
        chips = "".join(f'<span class="chip">{name}</span>' for name in sorted(truth[video].present))
        chips += "".join(f'<span class="chip">{name}?</span>' for name in sorted(truth[video].unknown))
        rows = ["<tr><th></th>" + "".join(f"<th>{mode.capitalize()}</th>" for mode in MODES) + "</tr>"]
        for system, texts in by_clip[video].items():
            cells = "".join(f'<td class="text">{coloured(texts.get(mode, ""), truth[video])}</td>' for mode in MODES)
            kind = ' class="checkpoint"' if system in metrics["checkpoints"] else ""
            rows.append(f"<tr{kind}><td>{html.escape(system)}</td>{cells}</tr>")
        strip = frame_strip(resolve_video(video_root, video))
        sections.append(f"<section><h2>{html.escape(video)}</h2>There: {chips}{strip}<table>{''.join(rows)}</table>"
                        "</section>")
    return PAGE % {"clips": metrics["clips"], "truth": html.escape(metrics["truth"]), "tables": html_table(metrics),
                   "prior": html.escape(metrics["prior"]["caption"].rstrip(".")), "sections": "".join(sections)}


# ----------------------------------------------------------------------------------------------------------------------
# The run


def readable(entries: list[Entry], config: EvaluateConfig) -> tuple[list[Entry], dict[str, str]]:
    """The entries whose clip can be read, and the others' reasons: a clip is left out for every system or for none."""
    from stage3.detect_objects import read_clip

    failed = {}
    for video in sorted({entry.video for entry in entries}):
        try:
            read_clip(resolve_video(config.video_root, video), 2)
        except VideoError as error:
            failed[video] = str(error)
            print(f"left out, cannot be read: {error}", file=sys.stderr)
    return [entry for entry in entries if entry.video not in failed], failed


def write(path: Path, text: str) -> None:
    """Complete or absent, also when the run is killed here."""
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text)
    os.replace(partial, path)


def planned_systems(config: EvaluateConfig, ordered: bool) -> list[System]:
    """The rows that checkpoints answer for. ordered: the truth knows the order of events."""
    folders = config.folders()
    control = config.control or ("stage2" if "stage2" in folders else list(folders)[-1])
    controls = ["blank", "swapped", *(["reversed"] if ordered else [])]
    systems = [System(how, folders[control], control=how) for how in controls]
    systems += [System(name, folder) for name, folder in folders.items()]
    if config.num_samples:
        systems += [System(f"{name} T={config.temperature:g}", folder, num_samples=config.num_samples)
                    for name, folder in folders.items()]
    return systems


def answers_key(system: System, entries: list[Entry], config: EvaluateConfig) -> str:
    """Changes with all that an answer depends on: weights, questions, clips, control, sampling."""
    what = [checkpoint_hash(system.folder), system.control, system.num_samples, config.microscope_tokens,
            config.copilot_tokens, [config.seed, config.temperature] if system.num_samples else "greedy", config.dtype,
            config.video_root, config.eval_batch_size, [(e.id, e.question) for e in entries]]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]


def ask_all(systems: list[System], entries: list[Entry], config: EvaluateConfig, file: Path) -> list[dict]:
    """The answers of all systems; those that stand in `file` and would come out the same are kept. Each finished system
    is on disk at once, so that a killed run goes on where it was."""
    keys = {system.name: answers_key(system, entries, config) for system in systems}
    answers = defaultdict(list)
    for row in read_predictions(file):
        if keys.get(row["system"]) == row["key"]:
            answers[row["system"]].append(row)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, loaded = None, None
    for system in systems:
        if system.name in answers:
            print(f"{system.name}: its answers stand in {file}")
            continue
        if loaded != system.folder:
            model = None  # two 4B models at once need not fit
            model, loaded = DriveVLM.from_checkpoint(system.folder, dtype=config.dtype, device=device), system.folder
        answers[system.name] = ask(model, system, keys[system.name], entries, config)
        write_predictions(file, [row for name in keys if name in answers for row in answers[name]])
    return [row for name in keys for row in answers[name]]


def read_predictions(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def write_predictions(file: Path, rows: list[dict]) -> None:
    write(file, "".join(json.dumps(row) + "\n" for row in rows))


def known_truth(config: EvaluateConfig, train: list[Entry], entries: list[Entry]):
    """-> (truth of the held-out clips, truth of the training clips, {held-out clip without evidence: reason})."""
    if not config.truth:
        truth, unseen = judged_truth(config, entries)
        return truth, {}, dict.fromkeys(unseen, "the judge has no evidence")
    truth = exact_truth(config.truth, sorted({entry.video for entry in entries}))
    known = json.loads(Path(config.truth).read_text())
    return truth, exact_truth(config.truth, sorted({e.video for e in train if e.video in known})), {}


def evaluate(config: EvaluateConfig) -> dict:
    """The whole run; returns the content of metrics.json."""
    train, held_out = split_by_video(load_entries(config.data, config.default_mode), config.num_val_videos,
                                     config.split_seed, config.video_root)
    missing = [mode for mode in MODES if not any(entry.mode == mode for entry in held_out)]
    if missing:
        fail([f"data: no {mode} entry among the held-out clips of {config.data}" for mode in missing])
    entries, failed = readable(held_out, config)
    truth, train_truth, unseen = known_truth(config, train, entries)
    failed |= unseen
    entries = [entry for entry in entries if entry.video in truth]
    num_clips = len({entry.video for entry in entries})
    if num_clips < 2:
        fail([f"{num_clips} held-out clips can be used; swapping pictures needs two (num_val_videos)"])
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)

    prior, prior_f1 = constant_caption(train, train_truth)
    print(f'prior: every clip is answered with "{prior}" (micro-F1 on the training clips: {prior_f1:.2f})')
    systems = planned_systems(config, any(t.order for t in truth.values()))
    asked = ask_all(systems, entries, config, out / "predictions.jsonl")
    predictions = [*fixed_predictions("prior", entries, lambda entry: prior), *asked,
                   *fixed_predictions("reference", entries, lambda entry: entry.captions[0])]
    write_predictions(out / "predictions.jsonl", predictions)

    ranges = {mode: getattr(config, f"{mode}_words") for mode in MODES}
    by_system = defaultdict(list)
    for row in predictions:
        by_system[row["system"]].append(row)
    metrics = {
        "systems": {name: score(rows, truth, ranges, config.seed) for name, rows in by_system.items()},
        "checkpoints": {name: str(folder) for name, folder in config.folders().items()},
        "clips": num_clips,
        "left_out": failed,
        "prior": {"caption": prior, "f1_micro_train": round(prior_f1, 4)},
        "truth": f"exact ({config.truth})" if config.truth else f"detector ({Path(config.judge.weights).name}, judge)",
        "words_in_range": ranges,
    }
    write(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    write(out / "table.md", table(metrics))
    write(out / "report.html", report(metrics, predictions, truth, config.video_root))
    print(f"\n{table(metrics)}\nclips and answers: {out / 'report.html'}")
    return metrics


def main(argv: list[str] | None = None) -> int:
    from train_stage3 import Stage3Config

    evaluate(load_config(EvaluateConfig, argv, default_config="configs/stage3.yaml", description=__doc__,
                         also=(Stage3Config,)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (DataError, DetectionError, ModelError, VideoError) as error:
        sys.exit(f"evaluate: {error}")
