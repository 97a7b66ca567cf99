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
import json
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

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
from evaluation.scoring import METRICS, Truth, exact_truth, mentioned, score, score_text
from model import DriveVLM, ModelError, read_checkpoint, resolve_dtype
from pages.render import film_strip, highlight, render
from stage3.detect_objects import evidence_problems, get_evidence
from stage3.grpo_reward_func import label_facts
from stage3.mentions import find_mentions
from training.loop import leak_problems

FIXED = ("prior", "blank", "swapped", "reversed", "reference")  # rows that are there whatever the checkpoints
FRAMES = 8  # frames of a clip that are shown


# ---- truth by a detector (exact truth: evaluation/scoring.py) --------------------------------------------------------


def judged_truth(config: EvaluateConfig, entries) -> dict[str, Truth]:
    """The judge's evidence on the entries' clips (those that it could look at); detects what is not cached."""
    truth = {}
    for video, evidence in get_evidence(entries, config.video_root, config.judge, config.evidence_cache).items():
        if evidence is not None:
            truth[video] = Truth(evidence.present, evidence.salient, evidence.unknown, evidence=evidence)
    return truth


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
