"""Measures checkpoints on the held-out clips, next to baselines that never see the video.

    python evaluate.py --checkpoint stage1=output/stage1 stage2=output/stage2 stage3=output/stage3 \\
        --config configs/stage3.yaml --output_dir output/evaluate

Greedy answers in every mode, one row per system: `prior` (the best constant caption), the checkpoints, `reference`
(the held-out captions as if they were answers), and what a checkpoint says of changed clips (`blank`: grey frames;
`swapped`: another clip's; `--controls` for more, of every checkpoint). The scorer (evaluation/scoring.py) reads only
answers and truth: exact where a file gives it (`truth`), else what a detector finds (`judge`; not the detector that
the reward checks). Each number has a 95% bootstrap interval over clips, each pair of `--compare` a paired difference.
`--num_samples 4` adds rows of answers sampled at `--temperature`, `--best_of 8` a row of the best of 8 by stage 3's
reward. `--baseline metrics.json` exits with 1 where something got worse than in an earlier run. `--clips FOLDER` asks
about clips that have no captions, `--probes true` pairs of questions, `--twins FILE` about clips with one object
removed. Every checkpoint is also asked in wordings that training never saw (unseen.jsonl). Answers already in
<output_dir>/predictions.jsonl are kept if the same weights and settings made them. See docs/evaluation.md.
"""

import dataclasses
import functools
import hashlib
import json
import os
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from training.common import (
    base_model_differences,
    fail,
    file_sha256,
    load_config,
    read_jsonl,
    run_main,
    write_json,
    write_text,
)
from training.config import EvaluateConfig

if __name__ == "__main__":  # --help and wrong flags are answered before torch is imported, which takes seconds
    given = load_config(EvaluateConfig, default_config="configs/stage3.yaml", description=__doc__)
    if given.read_sheet:  # so are ratings
        from evaluation.ratings import read_sheet

        run_main(lambda: read_sheet(given))

import numpy as np
import torch
from tqdm import tqdm

from dataset import (
    GREY,
    IGNORE_INDEX,
    IMAGE_SUFFIXES,
    MODE_TABLE,
    MODES,
    VIDEO_SUFFIXES,
    DataError,
    Entry,
    VideoError,
    cached_frames,
    cached_times,
    encode_example,
    find_clips,
    load_split,
    resolve_video,
    root_of_clips,
    sample_clip,
    video_reader_problems,
    video_stem,
)
from evaluation.best_of import BestOf, best_of_problems
from evaluation.captions import add_bleu, add_caption_scores
from evaluation.hedging import calibration_of, judge_gains, weights_id
from evaluation.judges import agreed_truth, agreement
from evaluation.probes import (
    affirmed,
    ask_statements,
    classes_asked,
    draw_probes,
    draw_statements,
    read_twins,
    score_probes,
    score_twins,
    separation,
    told_by,
    twin_entries,
)
from evaluation.ratings import read_sheet
from evaluation.report import report, table
from evaluation.scoring import (
    Truth,
    block_of,
    difference,
    equal_lengths,
    exact_truth,
    mentioned,
    mode_accuracy,
    score_slice,
    score_wordings,
    share_right,
    slices_of,
    tally,
    values_of,
    worse_than,
)
from evaluation.sheet import make_sheet
from model import DriveVLM, ModelError, read_checkpoint, resolve_dtype
from pages.render import film_strip
from stage3.detect_objects import evidence_problems, get_evidence
from stage3.grpo import Group, completion_logps
from training.loop import leak_problems

CONTROLS = ("blank", "swapped", "middle", "shuffled", "reversed", "dark")  # see change_frames
FIXED = ("prior", "reference", *CONTROLS)  # names of rows that no checkpoint may have
DARK = 0.15  # share of the brightness that the control `dark` leaves
FRAMES = 8  # frames of a clip that are shown


# ---- truth by a detector (exact truth: evaluation/scoring.py) --------------------------------------------------------


def judged_truth(config: EvaluateConfig, judge, entries) -> dict[str, Truth]:
    """A judge's evidence on the entries' clips (those that it could look at); detects what is not cached."""
    truth = {}
    for video, evidence in get_evidence(entries, config.video_root, judge, config.evidence_cache).items():
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
    return {"system": system, "key": key, "id": entry.id, "video": entry.video, "mode": entry.mode,
            "question": entry.question, "sample": sample, "text": text, "tokens": tokens, "ended": ended,
            "seconds": round(seconds, 4)}


@dataclass(frozen=True)
class System:
    """One row of the table that a checkpoint answers for."""

    name: str
    folder: Path  # the checkpoint folder
    control: str = ""  # see change_frames
    num_samples: int = 0  # 0: greedy
    best_of: bool = False  # only the best of the sampled answers is kept


def planned_systems(config: EvaluateConfig, folders: dict[str, Path], ordered: bool) -> list[System]:
    """The rows that checkpoints answer for. `ordered`: the truth knows the order of events.

    The controls of one checkpoint, `control`, are called as they are, those of the others NAME/CONTROL.
    """
    default = "stage2" if "stage2" in folders else list(folders)[-1]
    chosen = config.control or default
    always = ["blank", "swapped", "reversed"] if ordered else ["blank", "swapped"]
    systems = []
    for how in CONTROLS:
        if how in always or how in config.controls:
            systems.append(System(how, folders[chosen], control=how))
    for name, folder in folders.items():
        systems.append(System(name, folder))
        if name != chosen:
            systems += [System(f"{name}/{how}", folder, control=how) for how in CONTROLS if how in config.controls]
    if config.num_samples:
        systems += [System(f"{name} T={config.temperature:g}", folder, num_samples=config.num_samples)
                    for name, folder in folders.items()]
    if config.best_of:
        systems.append(System(f"best-of-{config.best_of}", folders[config.best_of_checkpoint or default],
                              num_samples=config.best_of, best_of=True))
    return systems


def change_frames(frames: np.ndarray, how: str) -> np.ndarray:
    """frames: uint8 [N, T, S, S, 3] of N different clips -> what each clip shows under a control."""
    if how == "blank":
        return np.full_like(frames, GREY)
    if how == "swapped":
        return np.roll(frames, len(frames) // 2, axis=0)
    if how == "middle":  # one picture instead of a video
        return np.repeat(frames[:, frames.shape[1] // 2, None], frames.shape[1], axis=1)
    if how == "shuffled":  # no frame stays where it was: the cycle through a random order
        order = np.random.default_rng(0).permutation(frames.shape[1])
        moved = np.empty_like(frames)
        moved[:, order] = frames[:, np.roll(order, 1)]
        return moved
    if how == "reversed":
        return frames[:, ::-1]
    if how == "dark":
        return (frames * DARK).astype(np.uint8)
    return frames


def answers_key(system: System, entries, config: EvaluateConfig, limits: dict[str, int]) -> str:
    """Changes with everything that an answer depends on: weights, questions, clips, control, sampling."""
    sampling = [system.num_samples, config.seed, config.temperature] if system.num_samples else "greedy"
    content = [weights_key(system.folder, config), system.control, sampling, limits, config.eval_batch_size,
               config.video_root, [(entry.id, entry.question) for entry in entries]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def weights_key(folder: Path, config: EvaluateConfig) -> str:
    """Changes with the checkpoint's weights, the base models and the precision."""
    files = [folder / "drivevlm.json", *sorted(folder.rglob("*.safetensors"))]
    content = [[file_sha256(file) for file in files], config.vision_model, config.language_model, config.dtype]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def read_frames_of(videos: list[str], model, config: EvaluateConfig, control: str = "") -> torch.Tensor:
    """The clips' frames under a control, uint8 [N, T, S, S, 3]."""
    frames = [cached_frames(resolve_video(config.video_root, video), model.num_frames, model.image_size,
                            config.frame_cache) for video in videos]
    return torch.from_numpy(np.ascontiguousarray(change_frames(np.stack(frames), control)))


def open_model(folder: Path, config: EvaluateConfig):
    return DriveVLM.from_checkpoint(folder, dtype=config.dtype, device="cuda" if torch.cuda.is_available() else "cpu",
                                    vision_model=config.vision_model, language_model=config.language_model)


def ask(model, system: System, key: str, entries, config: EvaluateConfig, limits: dict[str, int]) -> list[dict]:
    """Every entry's answer by `model` -> rows of predictions.jsonl. `limits`: {mode: longest answer in tokens}.

    All clips' frames are held in memory: 40 clips of 16 frames at 384 px are 0.3 GB.
    """
    samples = max(system.num_samples, 1)
    entries = model.with_times(entries, config.video_root, config.frame_cache)  # a control changes the frames alone
    videos = sorted({entry.video for entry in entries})
    frames = read_frames_of(videos, model, config, system.control)  # uint8 [N, T, S, S, 3]
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
                    times=[entry.times for entry in batch],
                    temperature=config.temperature if system.num_samples else 0.0)
                seconds = (time.perf_counter() - begin) / len(answers)
                for i, answer in enumerate(answers):  # the answers to one entry follow each other
                    rows.append(prediction(system.name, batch[i // samples], answer.text, key, i % samples,
                                           len(answer.ids), answer.ended, seconds))
                bar.update(len(batch))
    return rows


def ask_all(systems: list[System], entries, config: EvaluateConfig, limits: dict[str, int], file: Path,
            best_of: BestOf | None) -> list[dict]:
    """The answers of all systems. Those in `file` that would come out the same are kept; each system is written when it
    is finished, so a killed run can be repeated without losing it."""
    keys = {system.name: answers_key(system, entries, config, limits) for system in systems}
    keys |= {system.name: f"{keys[system.name]}-{best_of.key(entries)}" for system in systems if system.best_of}
    answers = defaultdict(list)
    for row in read_jsonl(file):
        if keys.get(row["system"]) == row["key"]:
            answers[row["system"]].append(row)
    model = loaded = None
    for system in systems:
        if system.name in answers:
            print(f"{system.name}: kept its answers in {file}")
            continue
        if loaded != system.folder:
            model = None  # frees the one before: two 4B models may not fit together
            model = open_model(system.folder, config)
            loaded = system.folder
        rows = ask(model, system, keys[system.name], entries, config, limits)
        answers[system.name] = best_of.choose(rows) if system.best_of else rows
        write_predictions(file, [row for name in keys for row in answers.get(name, ())])
    return [row for name in keys for row in answers[name]]


def in_unseen_wordings(entries) -> list[Entry]:
    """The entries, each asked in one of the wordings that training never draws, in turns: each of them is asked about
    an equal share of the clips. Modes without such wordings are left out."""
    number, asked = Counter(), []
    for entry in entries:
        if wordings := MODE_TABLE[entry.mode].unseen:
            asked.append(dataclasses.replace(entry, question=wordings[number[entry.mode] % len(wordings)]))
            number[entry.mode] += 1
    return asked


@torch.no_grad()
def add_nll(rows: list[dict], entries, folder: Path, config: EvaluateConfig) -> None:
    """Adds to each row its answer's negative log-likelihood in nats, "nll", over "nll_tokens" tokens (the end token is
    one, where the answer ended), under the checkpoint in `folder`, shown the clip as it is; "nll_under" names the
    checkpoint's weights. Rows that have it already are left alone."""
    under = weights_key(folder, config)
    missing = defaultdict(list)
    for row in rows:
        if row.get("nll_under") != under:
            missing[row["id"]].append(row)
    if not missing:
        return
    model = open_model(folder, config)
    asked_about = model.with_times([entry for entry in entries if entry.id in missing], config.video_root,
                                   config.frame_cache)
    for entry in tqdm(asked_about, desc="NLL", unit="clip"):
        visual = model.encode_video(read_frames_of([entry.video], model, config))[0]  # [N, D]
        prompt = model.prompt_ids(entry.question, entry.times)
        ids, size = {}, config.eval_batch_size  # {answer: its ids}: systems often say the same
        for row in missing[entry.id]:
            ids[row["text"], row["ended"]] = answer_ids(model, entry.question, row)
        nll, asked = {}, [key for key in ids if ids[key]]
        for batch in (asked[start : start + size] for start in range(0, len(asked), size)):
            logps, _, _ = completion_logps(model, [Group(prompt, visual, [ids[key]]) for key in batch],
                                           shared_prefix=False)  # [n, T], 0 where there is no token
            nll |= dict(zip(batch, (-logps.sum(1)).tolist(), strict=True))
        for row in missing[entry.id]:
            key = row["text"], row["ended"]
            row |= {"nll": round(nll.get(key, 0.0), 3), "nll_tokens": len(ids[key]), "nll_under": under}


def answer_ids(model, question: str, row: dict) -> list[int]:
    """A row's text as the ids that are supervised in training, without the end token where the answer was cut off."""
    labels = encode_example(model.tokenizer, question, row["text"], model.num_visual_tokens, 10**6)["labels"]
    ids = [label for label in labels if label != IGNORE_INDEX]
    return ids if row["ended"] else ids[:-1]


def write_predictions(file: Path, rows: list[dict]) -> None:
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ---- the run ---------------------------------------------------------------------------------------------------------


def open_inputs(config: EvaluateConfig):
    """(checkpoint folders by name, training entries, held-out entries, {clip: truth} of the truth file, or None).

    Everything that is missing or wrong comes in one message, exit code 2.
    """
    problems, train, held_out, truth = video_reader_problems(config), [], [], None
    folders = open_checkpoints(config, problems)
    paths = {key: getattr(config, key) for key in ("data", "val_data", "video_root", "truth")}
    if config.clips:  # their own data: neither captions nor a split
        paths = {"clips": config.clips, "truth": config.truth}
    paths |= {"slices": config.slices, "baseline": config.baseline, "twins": config.twins}
    absent = {key for key, path in paths.items() if path and not Path(path).exists()}
    problems += [f"{key}: not found: {paths[key]}" for key in paths if key in absent]
    for key in ("word_range", "eval_max_new_tokens"):
        problems += [f"{key}: there is no mode {mode!r}; modes are {', '.join(MODE_TABLE)}"
                     for mode in getattr(config, key) if mode not in MODE_TABLE]
    if any((Path(config.output_dir) / name).exists() for name in ("train.log", "model")):
        problems.append(f"output_dir: {config.output_dir} is a training run's folder; give another with --output_dir")
    if not absent & {"data", "val_data", "clips"}:
        try:
            train, held_out = uncaptioned(config) if config.clips else load_split(config)
            if not held_out and config.clips:
                suffixes = ", ".join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))
                problems.append(f"clips: no clip in {config.clips} ({suffixes})")
            elif not held_out:
                problems.append(f"data: no held-out clips in {config.val_data or config.data} (num_val_videos is "
                                f"{config.num_val_videos})")
        except DataError as error:
            problems.append(f"{'clips' if config.clips else 'data'}: {error}")
    for folder in folders.values():
        problems += leak_problems(config, held_out, folder)
    problems += system_name_problems(config, list(folders), bool(train))
    problems += best_of_problems(config, held_out) if config.best_of else []
    if config.second_judge.weights:
        problems += evidence_problems(held_out, config.second_judge, config.evidence_cache, "second_judge")
    if not config.truth:
        problems += evidence_problems(held_out, config.judge, config.evidence_cache, "judge")
    elif "truth" not in absent:
        truth = exact_truth(config.truth, sorted({entry.video for entry in held_out}), problems)
    if config.twins and not absent & {"twins", "video_root", "clips"}:
        read_twins(config.twins, config.video_root, {entry.video for entry in held_out}, problems)
    if problems:
        fail(problems)
    return folders, train, held_out, truth


def system_name_problems(config: EvaluateConfig, checkpoints: list[str], has_captions: bool) -> list[str]:
    """What is wrong with the systems that `compare`, `nll_under` and `controls` name."""
    problems = [f"controls: {how!r} is none of {', '.join(CONTROLS)}"
                for how in config.controls if how not in CONTROLS]
    if config.nll_under and config.nll_under not in checkpoints:
        problems.append(f"nll_under: no checkpoint is called {config.nll_under!r}")
    if config.best_of_checkpoint not in ("", *checkpoints):
        return [*problems, f"best_of_checkpoint: no checkpoint is called {config.best_of_checkpoint!r}"]
    if not checkpoints or config.control not in ("", *checkpoints):
        return problems  # said by open_checkpoints
    known = [system.name for system in planned_systems(config, dict.fromkeys(checkpoints), True)]
    known += ["prior", "reference"] if has_captions else []
    for pair in config.compare:
        before, colon, after = pair.partition(":")
        if not colon or not {before, after} <= set(known):
            problems.append(f"compare: {pair!r} is not BEFORE:AFTER, two of the systems {', '.join(known)}")
    return problems


def open_checkpoints(config: EvaluateConfig, problems: list[str]) -> dict[str, Path]:
    """--checkpoint as {name: checkpoint folder}; what is wrong with it is added to `problems`."""
    names, folders = [], {}
    for text in config.checkpoint:
        name, _, folder = text.partition("=")
        if not name or not folder:
            problems.append(f"checkpoint: {text!r} is not NAME=FOLDER")
        elif name in (*FIXED, *names, f"best-of-{config.best_of}"):
            problems.append(f"checkpoint: the name {name!r} is taken (also by the fixed rows {', '.join(FIXED)})")
        else:
            names.append(name)
            try:
                folders[name], meta = read_checkpoint(folder)
            except ModelError as error:
                problems.append(f"checkpoint: {name}: {error}")
                continue
            problems += base_model_differences(config, meta, folder)
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


def uncaptioned(config: EvaluateConfig) -> tuple[list, list]:
    """([], one entry per mode for each clip in the folder `clips`, without captions). Raises DataError."""
    entries = []
    for path in find_clips(config.clips):
        video = Path(os.path.relpath(path, config.video_root)).as_posix()
        for mode, question in MODES.items():
            entries.append(Entry(f"{video_stem(video)}#{mode}", video, mode, question, ()))
    return [], entries


def find_truth(config: EvaluateConfig, entries, known_truth) -> tuple[dict[str, Truth], dict[str, Truth] | None]:
    """(truth of the entries' clips, what the second judge says of them: None where there is none)."""
    videos = {entry.video for entry in entries}
    truth = judged_truth(config, config.judge, entries) if known_truth is None else {
        video: known_truth[video] for video in sorted(videos)}
    return truth, judged_truth(config, config.second_judge, entries) if config.second_judge.weights else None


def pairs_of(config: EvaluateConfig, names: list[str]) -> list[tuple[str, str]]:
    """The pairs of `compare`; by default each checkpoint and the next."""
    if config.compare:
        return [tuple(pair.split(":")) for pair in config.compare]
    return list(zip(names, names[1:], strict=False))


def score_systems(config: EvaluateConfig, names: list[str], rows_of: dict, truth: dict[str, Truth], ranges) -> dict:
    """Everything in metrics.json that is computed from answers and truth. `names`: the checkpoints'."""
    videos, seed = sorted(truth), config.seed
    equal_words = equal_lengths(rows_of, names)
    counts = {name: tally(rows, truth, ranges, equal_words) for name, rows in rows_of.items()}
    values = {name: values_of(counts[name], ranges, videos, truth, seed) for name in rows_of}
    systems = {}
    for name, rows in rows_of.items():
        systems[name] = {mode: block_of(counts[name], mode, values[name][mode], videos) for mode in ranges}
        systems[name]["mode_accuracy"] = mode_accuracy(rows, ranges)
        if config.caption_metrics:
            add_bleu(systems[name], rows)
    differences = [{"before": before, "after": after, **difference(values[before], values[after])}
                   for before, after in pairs_of(config, names)]
    slices, shown = {}, [name for name in rows_of if name in names or name == "reference"]
    attributes = json.loads(Path(config.slices or config.truth).read_text()) if config.slices or config.truth else {}
    for part, clips in slices_of(attributes, truth).items():
        blocks = {name: score_slice(counts[name], ranges, clips, truth, seed) for name in shown}
        slices[part] = {"clips": len(clips), "systems": blocks}
    return {"systems": systems, "differences": differences, "slices": slices}


def score_agreed(config: EvaluateConfig, names: list[str], rows_of, truth, second, ranges) -> dict:
    """The two judges' agreement, and the systems' scores on what both say."""
    agreed = agreed_truth(truth, second)
    kept = {}
    for name, rows in rows_of.items():
        kept[name] = [row for row in rows if row["video"] in agreed]
    return {"agreement": agreement(truth, second), **score_systems(config, names, kept, agreed, ranges)}


def all_answers(config, folders, train, known_truth, truth, entries, limits, best_of) -> tuple[list[dict], dict, str]:
    """(rows of predictions.jsonl of all systems, which are written there; the prior, as in metrics.json; the name of
    the checkpoint under which their NLL was measured, or nothing)."""
    file, predictions, prior = Path(config.output_dir) / "predictions.jsonl", [], {}
    if train:
        caption, f1 = constant_caption(train, known_truth or {})
        print(f'prior: every clip is answered with "{caption}" (micro-F1 on the training clips: {f1:.2f})')
        prior = {"caption": caption, "f1_micro_train": round(f1, 4)}
        predictions += [prediction("prior", entry, caption) for entry in entries]
    systems = planned_systems(config, folders, any(clip.order for clip in truth.values()))
    predictions += ask_all(systems, entries, config, limits, file, best_of)
    predictions += [prediction("reference", entry, entry.captions[0]) for entry in entries if entry.captions]
    if under := config.nll_under or ("stage2" if "stage2" in folders else ""):
        add_nll(predictions, entries, folders[under], config)
    write_predictions(file, predictions)
    return predictions, prior, under


# ---- probes (see evaluation/probes.py) -------------------------------------------------------------------------------


def plan_probes(config: EvaluateConfig, train, entries, truth) -> tuple[dict, list]:
    """(statements, probes) about the classes that have statements in every mode."""
    statements = draw_statements(train, config.seed)
    classes = set.intersection(*(set(statements.get(entry.mode, ())) for entry in entries))
    probes = draw_probes(train, truth, classes, config.seed)
    if not probes:
        fail(["probes: no held-out clip both shows and lacks a class that, in every mode, has a sentence of its own in "
              "the training captions"])
    return statements, probes


def add_probes(config: EvaluateConfig, folders, entries, truth, statements, probes, rows_of, systems: dict) -> None:
    """Adds "probes" to each system's blocks, answered by what it told, and by how likely a checkpoint finds statements
    about both classes, shown the clip or another one."""
    seed, margins = config.seed, all_margins(config, folders, entries, statements, classes_asked(probes))
    for name, rows in rows_of.items():
        for mode in sorted({entry.mode for entry in entries}):
            block = {"told": score_probes(probes, told_by(rows, mode), seed)}
            for shown in ("clip", "swapped") if name in margins else ():
                how = "statement" if shown == "clip" else shown
                block[how] = score_probes(probes, affirmed(margins[name], mode, shown), seed)
                block[how]["auc"] = separation(margins[name], mode, shown, truth, seed)
            systems[name][mode]["probes"] = block


def all_margins(config: EvaluateConfig, folders, entries, statements, asked) -> dict[str, list[dict]]:
    """{checkpoint: its rows of probes.jsonl}; those in the file that would come out the same are kept."""
    file, content = Path(config.output_dir) / "probes.jsonl", [statements, asked, config.video_root]
    content.append([[entry.id, entry.question, entry.captions[0]] for entry in entries])
    known, rows = read_jsonl(file), {}
    for name, folder in folders.items():
        key = hashlib.sha256(json.dumps([weights_key(folder, config), content]).encode()).hexdigest()[:12]
        rows[name] = [row for row in known if row["system"] == name and row["key"] == key]
        if not rows[name]:
            rows[name] = [{"system": name, "key": key, **row}
                          for row in margins_under(folder, config, entries, statements, asked)]
            write_predictions(file, [row for done in rows.values() for row in done])
    return rows


def margins_under(folder: Path, config: EvaluateConfig, entries, statements, asked) -> list[dict]:
    model = open_model(folder, config)
    entries = model.with_times(entries, config.video_root, config.frame_cache)
    return ask_statements(model, lambda video: read_frames_of([video], model, config), entries, statements, asked,
                          config.eval_batch_size)


def add_twins(config: EvaluateConfig, folders, entries, limits, rows_of, systems: dict) -> dict[str, str]:
    """Adds "twins" to the blocks of the checkpoints and the prior; returns {twin that cannot be read: reason}."""
    videos = {entry.video for entry in entries}
    twins = [twin for twin in read_twins(config.twins, config.video_root, videos, []) if twin["of"] in videos]
    readable, left_out = read_clips([twin["video"] for twin in twins], config.video_root)
    twins = [twin for twin in twins if twin["video"] in readable]
    asked = twin_entries(twins, list(limits))
    answered = [System(name, folder) for name, folder in folders.items()]
    rows = ask_all(answered, asked, config, limits, Path(config.output_dir) / "twins.jsonl", None) if twins else []
    rows += [prediction("prior", entry, rows_of["prior"][0]["text"]) for entry in asked if "prior" in rows_of]
    for name in dict.fromkeys(row["system"] for row in rows):
        both = rows_of[name] + [row for row in rows if row["system"] == name]
        for mode in limits:
            systems[name][mode]["twins"] = score_twins(twins, told_by(both, mode), config.seed)
    return left_out


def add_unseen(config: EvaluateConfig, folders, entries, limits, ranges, systems: dict) -> dict[str, dict]:
    """Adds "mode_accuracy_unseen" to the checkpoints' blocks; returns {checkpoint: what `score_wordings` says of its
    answers to the entries in unseen wordings}, which are kept in unseen.jsonl. {} if no mode has such wordings."""
    asked = in_unseen_wordings(entries)
    if not asked:
        return {}
    answered = [System(name, folder) for name, folder in folders.items()]
    rows, counts = ask_all(answered, asked, config, limits, Path(config.output_dir) / "unseen.jsonl", None), {}
    for name in folders:
        answers = [row for row in rows if row["system"] == name]
        counts[name] = score_wordings(answers, ranges)
        systems[name]["mode_accuracy_unseen"] = share_right(counts[name])
    return counts


def calibrations(config: EvaluateConfig, folders, rows_of, truth) -> dict[str, dict]:
    """{checkpoint: {"weights", "modes"}}: how sure the objects are that its greedy answers name."""
    found = {}
    for name, folder in folders.items():
        model = open_model(folder, config)
        look = functools.cache(lambda video, model=model: encode_clip(model, video, config))
        judged = judge_gains(model, rows_of[name], truth, look, config.eval_batch_size)
        found[name] = {"weights": weights_id(folder), "modes": calibration_of(judged)}
    return found


@torch.no_grad()
def encode_clip(model, video: str, config: EvaluateConfig):
    """(visual tokens [N, D] of a clip, the times of its frames [T] where the model's prompts hold them, else None)."""
    visual = model.encode_video(read_frames_of([video], model, config))[0]
    path = resolve_video(config.video_root, video)
    return visual, cached_times(path, model.num_frames, config.frame_cache) if model.time_stamps else None


def evaluate(config: EvaluateConfig) -> dict:
    """The whole run; returns the content of metrics.json."""
    if config.clips:
        config = dataclasses.replace(config, video_root=root_of_clips(config.clips))
    folders, train, held_out, known_truth = open_inputs(config)
    asked = {entry.mode for entry in held_out}
    modes = {name: mode for name, mode in MODE_TABLE.items() if name in asked}
    limits = {name: config.eval_max_new_tokens.get(name, mode.max_new_tokens) for name, mode in modes.items()}
    ranges = {name: list(config.word_range.get(name, mode.word_range)) for name, mode in modes.items()}
    strips, left_out = read_clips(sorted({entry.video for entry in held_out}), config.video_root)
    entries = [entry for entry in held_out if entry.video in strips]
    best_of = BestOf(config, entries) if config.best_of else None
    if best_of:
        left_out |= best_of.left_out
        entries = [entry for entry in entries if entry.video not in best_of.left_out]
    truth, second = find_truth(config, entries, known_truth)
    left_out |= {entry.video: "the judge has no evidence" for entry in entries if entry.video not in truth}
    entries = [entry for entry in entries if entry.video in truth]
    if len(truth) < 2:
        fail([f"{len(truth)} held-out clips can be used; swapping clips needs two (num_val_videos)"])
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)

    planned = plan_probes(config, train, entries, truth) if config.probes else None
    predictions, prior, under = all_answers(config, folders, train, known_truth, truth, entries, limits, best_of)
    rows_of = defaultdict(list)
    for row in predictions:
        rows_of[row["system"]].append(row)
    if config.caption_metrics:
        captions = {entry.id: entry.captions for entry in entries}
        rows_of = {name: add_caption_scores(rows, captions) for name, rows in rows_of.items()}
    metrics = score_systems(config, list(folders), rows_of, truth, ranges) | {
        "checkpoints": dict(text.split("=", 1) for text in config.checkpoint),
        "clips": len(truth), "left_out": left_out, "nll_under": under,
        "prior": prior,
        "truth": f"exact ({config.truth})" if config.truth else f"detector ({Path(config.judge.weights).name}, judge)",
        "words_in_range": ranges,
    }
    if config.probes:
        add_probes(config, folders, entries, truth, *planned, rows_of, metrics["systems"])
    if config.twins:
        left_out |= add_twins(config, folders, entries, limits, rows_of, metrics["systems"])
    if config.unseen_wordings:
        metrics["unseen_wordings"] = add_unseen(config, folders, entries, limits, ranges, metrics["systems"])
    if config.calibrate:
        metrics["calibration"] = calibrations(config, folders, rows_of, truth)
    if second:
        metrics["agreed"] = score_agreed(config, list(folders), rows_of, truth, second, ranges)
    write_json(out / "metrics.json", metrics, indent=1)
    write_text(out / "table.md", table(metrics))
    write_text(out / "report.html", report(metrics, predictions, truth, strips))
    print(f"\n{table(metrics)}\nclips and answers: {out / 'report.html'}")
    return metrics


def main(argv: list[str] | None = None) -> int:
    config = load_config(EvaluateConfig, argv, default_config="configs/stage3.yaml", description=__doc__)
    if config.read_sheet:
        return read_sheet(config)
    if config.sheet:
        return make_sheet(config)
    config.dtype = resolve_dtype(config.dtype)
    baseline = read_baseline(config)  # before the run: it may be the file that the run writes
    metrics = evaluate(config)
    if baseline and (worse := worse_than(baseline, metrics)):
        print(f"worse than {config.baseline}, beyond its interval:\n  " + "\n  ".join(worse), file=sys.stderr)
        return 1
    return 0


def read_baseline(config: EvaluateConfig) -> dict | None:
    """The metrics.json of `baseline`, if there is one; ConfigError where it is none."""
    if not config.baseline or not Path(config.baseline).is_file():
        return None  # evaluate names a file that is missing, with all else that is
    try:
        baseline = json.loads(Path(config.baseline).read_text(encoding="utf-8"))
        if not all("interval" in block[mode] for block in baseline["systems"].values()
                   for mode in baseline["words_in_range"]):
            raise KeyError("interval")
    except (ValueError, KeyError, TypeError) as error:
        fail([f"baseline: {config.baseline} is no metrics.json of evaluate.py ({error})"])
    return baseline


if __name__ == "__main__":
    run_main(main)
