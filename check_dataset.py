"""What is wrong with these clips and captions, and what will the loss see? Every row, every clip, every label.

    python check_dataset.py                                          # configs/stage2.yaml: the real data
    python check_dataset.py --config configs/demo/stage2.yaml        # the toy world
    python check_dataset.py --data rows.jsonl --video_root clips     # any other
    python check_dataset.py --no-video                               # rows and labels alone, in seconds
    python check_dataset.py --drop-bad sound.jsonl --build-cache     # write the sound rows, decode every clip once

Writes report.html and report.json into <output_dir>/check_dataset/. Needs no GPU and no weights, only the language
model's tokenizer (and the vision model's config.json, if it is at hand, for the number of visual tokens).
Exit code: 0 sound (warnings allowed, unless --strict), 1 problems in rows or clips, 2 wrong flags or missing inputs.
"""

import base64
import hashlib
import html
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import time
import traceback
import typing
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from tqdm import tqdm

import dataset
from dataset import IGNORE_INDEX, MODES, DataError, Entry, RowError, VideoError, chat_pieces
from train_stage1_ddp import Stage1Config
from train_stage2 import Stage2Config
from train_stage3 import Stage3Config
from training import DataConfig, fail, load_config, model_problem, opt

PUBLISHED_LIMIT = 512  # tokens at which the published code cut a conversation, end token and all
WORD_RANGE = {"microscope": (100, 1000), "copilot": (1, 80)}
SMALL_SIDE = 224  # px
BDD_NAME = re.compile(r"[0-9a-f]{8}-[0-9a-f]{8}")  # a BDD100K clip: 40 s, so 30 to 50 is expected
BDD_SECONDS = (30, 50)
SAME_PICTURE = 12.0  # mean difference of grey levels up to which two small pictures show the same
LONG_TEXT = 60  # words from which equal captions of two clips cannot be chance

CODES = {  # what a code means, and what to do
    "no_rows": "The data holds no row that can be read.",
    "unknown_format": "The row has none of the accepted forms. README, 'Bring your own clips', lists them.",
    "unknown_mode": 'Neither "mode" nor the question tells the granularity. Add "mode", or set default_mode.',
    "multi_turn": "A conversation of several turns. Write one row for each question and answer.",
    "empty_question": "The question is empty or no text.",
    "empty_caption": "A caption is empty, blank or no text, or the list is.",
    "bad_unicode": "Text that was decoded wrongly once (U+FFFD, lone surrogates, not UTF-8). Make the file again.",
    "control_token": "A text spells out a control token of the tokenizer: it would end a turn or stand for a frame.",
    "path_escape": "The video's path leads out of video_root (absolute, '..', '~', a URL, or a link).",
    "missing_video": "There is no such clip in video_root.",
    "corrupt_video": "The clip cannot be decoded from start to end. Copy or encode it again, or drop its rows.",
    "hung_video": "Decoding did not end within clip_timeout seconds and was killed. Encode the clip again.",
    "duplicate_entry": "The same clip, mode and captions as in another row.",
    "ambiguous_prompt": "One question asks for two modes: the model could not know which is meant.",
    "split_leak": "What is held out is also trained on: the same clip, or the same long caption, on both sides.",
    "end_token_lost": "The supervised text does not end with the end token: the model would never learn to stop.",
    "end_token_repeated": "The supervised text holds more than one end token.",
    "nothing_supervised": "No token of the answer is supervised. Raise max_text_tokens.",
    "prompt_supervised": "Tokens of the prompt are supervised: the model would learn to ask.",
    "pad_supervised": "Padding is supervised.",
    "video_token_supervised": "Video placeholders are supervised.",
    "visual_token_count": "The number of video placeholders is not frames x tokens a frame.",
    "label_mismatch": "The supervised tokens do not decode to the caption.",
    "prompt_too_long": "The question alone leaves no room within max_text_tokens.",
    "batch_broken": "A padded batch differs from its rows.",
    "mode_missing": "No entry asks for this mode. Stage 1 can do without, stage 2 needs both.",
    "split_too_small": "Fewer clips than num_val_videos holds out: training would refuse, leaks cannot be looked for.",
    "answer_ignored": 'The row has "captions" and an "a" that is not among them; "captions" is used.',
    "repeated_id": 'Two rows describe one clip in one mode. Put the texts into one row\'s "captions".',
    "repeated_caption": "An entry lists the same caption twice: it will be drawn more often than the others.",
    "same_caption": "Two clips, one trained on and one held out, have the same caption.",
    "caption_length": "Unusual for the mode. No harm if it is meant; else, are the modes mixed up?",
    "caption_cut": "Longer than max_text_tokens: cut at a sentence's end, end token kept.",
    "duplicate_clip": "Two files hold the same clip.",
    "short_video": "Fewer frames than num_frames: some are shown twice.",
    "small_video": f"Clips with a side under {SMALL_SIDE} px: distant things cannot be seen.",
    "portrait_video": "Higher than wide, its rotation tag respected. Is the tag right?",
    "variable_frame_rate": "Frames are not evenly spaced in time; they are sampled by time.",
    "odd_duration": f"A BDD100K clip should last about 40 s, this one is outside {BDD_SECONDS[0]}-{BDD_SECONDS[1]} s.",
    "cache_full": "The cache has reached its limit; these clips are decoded each time they are used.",
}


@dataclass
class CheckConfig(DataConfig):
    """Check"""

    no_video: bool = opt(False, "leave the clips alone: check rows and labels only")
    strict: bool = opt(False, "warnings fail too")
    json: str | None = opt(None, "also write the report to this JSON file")
    drop_bad: str | None = opt(None, "write the rows without errors to this JSONL file")
    other_data: list[str] = opt([], "data files of other stages: do they train on a clip that is held out here?")
    build_cache: bool = opt(False, "fill frame_cache: decode every clip once, as training wants it")
    cache_limit_gb: float | None = opt(None, "with --build-cache: the cache may grow to this size; none = no limit")
    decode: typing.Literal["all", "sampled"] = opt("all", "all frames of a clip, or (faster) those that training reads")
    clip_timeout: float = opt(120.0, "seconds after which a clip that is still being decoded counts as hung")
    examples: int = opt(2, "examples of each mode in report.html")

    def problems(self):
        found = [f"{key} must be above 0, got {getattr(self, key)}"
                 for key in ("clip_timeout", "cache_limit_gb") if not (getattr(self, key) is None or
                                                                       getattr(self, key) > 0)]
        if self.examples < 0:
            found.append(f"examples must be at least 0, got {self.examples}")
        found += [f"other_data: no file or folder {file}" for file in self.other_data if not Path(file).exists()]
        if self.build_cache and self.no_video:
            found.append("--build-cache and --no-video exclude each other")
        if self.build_cache and self.frame_cache is None:
            found.append("--build-cache needs a folder: --frame_cache output/frame_cache")
        if self.drop_bad and Path(self.drop_bad).resolve() == Path(self.data).resolve():
            found.append("--drop-bad would overwrite the data file itself")
        return super().problems() + found


@dataclass
class Problem:
    level: str  # "error" or "warning"
    code: str
    where: str
    message: str


@dataclass
class Row:
    where: str
    raw: object
    entries: list[Entry]
    bad: bool = False


@dataclass
class Findings:
    """Everything found so far; an error marks its rows as bad."""

    problems: list[Problem] = field(default_factory=list)

    def error(self, code: str, where: str, message: str, rows: typing.Iterable[Row] = ()):
        self.problems.append(Problem("error", code, where, message))
        for row in rows:
            row.bad = True

    def warning(self, code: str, where: str, message: str):
        self.problems.append(Problem("warning", code, where, message))

    def count(self, level: str) -> int:
        return sum(problem.level == level for problem in self.problems)


def main(argv=None) -> int:
    config = load_config(
        CheckConfig, argv, default_config="configs/stage2.yaml", description=__doc__,
        also=(Stage1Config, Stage2Config, Stage3Config),
    )
    begin = time.monotonic()
    tokenizer, vision = open_inputs(config)
    found = Findings()
    counts = {"visual_tokens": vision["tokens"], "tokens_per_frame": vision["per_frame"]}

    rows = read_all(config, found)
    clips = find_clips(rows, config, found)
    check_rows(rows, clips, found)
    train, val = split(rows, config, found)
    lengths = check_labels(rows, tokenizer, vision, config, found)
    facts = {} if config.no_video else check_clips(clips, config, vision, found)
    check_leaks(rows, clips, train, val, facts, found)
    check_other_data(config, val, found)

    counts |= count(rows, clips, facts, train, val, lengths, config, found)
    ok = not found.count("error") and not (config.strict and found.count("warning"))
    report = {"ok": ok, "counts": counts, "problems": [asdict(problem) for problem in found.problems]}
    folder = Path(config.output_dir) / "check_dataset"
    pages = example_pages(rows, facts, tokenizer, vision, lengths, config)
    write_reports(report, folder, config, pages, vision)
    if config.drop_bad:
        write_sound_rows(rows, config.drop_bad)
    print_summary(report, config, folder, vision, time.monotonic() - begin)
    return 0 if ok else 1


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


def open_inputs(config):
    """(tokenizer, {"tokens", "per_frame", "image_size", "known"}), or exit 2 with all that is missing."""
    problems = []
    if not Path(config.data).exists():
        problems.append(f'data: no file or folder {config.data} (one row a clip: {{"video": "a.mov", "microscope": '
                        '["..."], "copilot": ["..."]})')
    if not config.no_video and not Path(config.video_root).is_dir():
        problems.append(f"video_root: no folder {config.video_root} (--no-video checks rows and labels alone)")
    tokenizer, vision = None, {"tokens": config.num_frames, "per_frame": 1, "image_size": None, "known": False}
    is_folder = Path(config.language_model).is_dir()
    if not is_folder and (problem := model_problem("language_model", config.language_model)):
        problems.append(problem)
    elif is_folder or not problems:  # a download can wait until the rest is in order
        try:
            tokenizer = load_tokenizer(config.language_model)
        except DataError as error:
            problems.append(f"language_model: {error}")
    try:
        vision |= read_vision_config(config)
    except ValueError as error:
        problems.append(f"vision_model: {error}")
    if config.build_cache and not vision["known"]:
        problems.append(f"vision_model: --build-cache needs the frames' size from {config.vision_model}/config.json")
    if problems:
        fail(problems, "nothing was checked")
    return tokenizer, vision


def load_tokenizer(name: str):
    """The tokenizer in a folder or the hub's cache, with a chat template that can be used; raises DataError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"no tokenizer in {name}: give a folder with tokenizer.json ({reason})") from error
    chat_pieces(tokenizer)
    return tokenizer


def read_vision_config(config) -> dict:
    """Number of visual tokens and the frames' size, if the tower's config.json is on this machine; else {}."""
    from transformers import SiglipVisionConfig

    from model import POOL, patch_grid

    try:
        tower = SiglipVisionConfig.from_pretrained(config.vision_model, local_files_only=True)
    except OSError:
        return {}
    per_frame = (patch_grid(tower) // POOL) ** 2
    return {"tokens": config.num_frames * per_frame, "per_frame": per_frame, "image_size": tower.image_size,
            "known": True}


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def read_all(config, found: Findings) -> list[Row]:
    """The rows that can be read."""
    rows = []
    try:
        for where, raw in dataset.read_rows(config.data):
            try:
                rows.append(Row(where, raw, dataset.parse_row(raw, config.default_mode)))
            except RowError as error:
                found.error(error.code, where, str(error))
                continue
            if "captions" in raw and "a" in raw and raw["a"] not in raw["captions"]:
                found.warning("answer_ignored", where, f'"a" is not among the {len(raw["captions"])} captions')
    except DataError as error:
        found.error("no_rows", config.data, str(error))
    if not rows and not found.problems:
        found.error("no_rows", config.data, "the file holds no row")
    return rows


def find_clips(rows: list[Row], config, found: Findings) -> dict[str, list[Row]]:
    """{clip: its rows}; the entries of rows whose path leads out of the root are left out."""
    clips = defaultdict(list)
    for row in rows:
        video = row.entries[0].video
        try:
            clips[dataset.clip_key(video, config.video_root)].append(row)
        except RowError as error:
            found.error(error.code, row.where, str(error), [row])
            row.entries = []
    return dict(clips)


def check_rows(rows: list[Row], clips: dict[str, list[Row]], found: Findings) -> None:
    """Repetitions, and prompts that ask for two modes."""
    for clip_rows in clips.values():
        seen = defaultdict(list)  # mode -> [(row, captions)]
        for row in clip_rows:
            for entry in row.entries:
                for before, captions in seen[entry.mode]:
                    if captions == entry.captions:
                        found.error("duplicate_entry", row.where, f"{entry.id}: the same as {before.where}", [row])
                        break
                else:
                    if seen[entry.mode]:
                        found.warning("repeated_id", row.where, f"{entry.id}: also in {seen[entry.mode][0][0].where}")
                    seen[entry.mode].append((row, entry.captions))
    modes = {question: {mode: "the standard prompt"} for mode, question in MODES.items()}
    for row in rows:
        for entry in row.entries:
            others = modes.setdefault(entry.question, {})
            if entry.mode not in others and others:
                other, where = next(iter(others.items()))
                found.error("ambiguous_prompt", row.where,
                            f"{entry.question[:60]!r} asks for {entry.mode} here, for {other} in {where}", [row])
            others.setdefault(entry.mode, row.where)
    for mode, (low, high) in WORD_RANGE.items():
        uses = [(row, entry) for row in rows for entry in row.entries if entry.mode == mode]
        if rows and not uses:
            found.warning("mode_missing", "all rows", f"no {mode} entries: enough for stage 1, not for stages 2 and 3")
        twice = [row for row, entry in uses if len(set(entry.captions)) < len(entry.captions)]
        if twice:
            found.warning("repeated_caption", f"{len(twice):,} {mode} entries", f"the first is {twice[0].where}")
        words = [len(caption.split()) for _, entry in uses for caption in entry.captions]
        odd = [n for n in words if n < low or n > high]
        if odd:
            found.warning("caption_length", f"{len(odd):,} of {len(words):,} {mode} captions",
                          f"{min(odd)} to {max(odd)} words, expected {low} to {high}")


def split(rows: list[Row], config, found: Findings) -> tuple[list[Entry], list[Entry]]:
    """The split that training makes of these rows."""
    entries = [entry for row in rows for entry in row.entries]
    try:
        return dataset.split_by_video(entries, config.num_val_videos, config.split_seed, config.video_root)
    except DataError as error:
        if entries:
            found.warning("split_too_small", "all rows", str(error))
        return entries, []


def check_leaks(rows, clips, train, val, facts, found: Findings) -> None:
    """What stands on both sides of the split, or twice in the folder, under different names."""
    held_out = {entry.video for entry in val}

    def side(clip):
        return "held out" if clips[clip][0].entries[0].video in held_out else "trained on"

    stems, contents = defaultdict(list), defaultdict(list)
    for clip in clips:
        stems[PurePosixPath(clip).stem.lower()].append(clip)
        if facts.get(clip, {}).get("content"):
            contents[facts[clip]["content"]].append(clip)
    for first, *others in stems.values():
        for clip in others:
            if side(clip) != side(first) and same_picture(facts.get(first), facts.get(clip)):
                found.error("split_leak", f"{clip} ({clips[clip][0].where})",
                            f"{side(clip)}, but {first} of the same name is {side(first)}", clips[clip])
    for first, *others in contents.values():
        for clip in others:
            sides = f"both {side(clip)}" if side(clip) == side(first) else f"one {side(first)}, one {side(clip)}"
            found.warning("duplicate_clip", f"{clip} ({clips[clip][0].where})", f"the same file as {first}; {sides}")

    texts = defaultdict(list)
    for row in rows:
        for entry in row.entries:
            texts[frozenset(" ".join(caption.lower().split()) for caption in entry.captions)].append((row, entry))
    for captions, uses in texts.items():
        first_row, first = uses[0]
        for row, entry in uses[1:]:
            if (entry.video in held_out) != (first.video in held_out):
                message = f"the same text as {first.id} ({first_row.where}), on the other side of the split"
                if max(len(caption.split()) for caption in captions) >= LONG_TEXT:
                    found.error("split_leak", f"{entry.id} ({row.where})", message, [row])
                else:
                    found.warning("same_caption", f"{entry.id} ({row.where})", message)


def check_other_data(config, val, found: Findings) -> None:
    """Clips held out here that another stage's data file, split in the same way, trains on; told by their names."""
    held_out = {Path(dataset.clip_key(entry.video)).stem for entry in val}
    for file in config.other_data:
        try:
            entries = dataset.load_entries(file, config.default_mode)
            train, _ = dataset.split_by_video(entries, config.num_val_videos, config.split_seed)
        except DataError as error:
            found.error("unknown_format", file, str(error))
            continue
        for clip in sorted(held_out & {Path(dataset.clip_key(entry.video)).stem for entry in train}):
            found.error("split_leak", clip, f"held out here, but {file} trains on it")


def same_picture(one: dict | None, other: dict | None) -> bool:
    """False only where both clips were decoded and clearly show different things."""
    if not one or not other or one.get("thumbs") is None or other.get("thumbs") is None:
        return True
    return float(np.abs(one["thumbs"] - other["thumbs"]).mean()) <= SAME_PICTURE


def write_sound_rows(rows: list[Row], path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row.raw, ensure_ascii=False) + "\n" for row in rows if not row.bad]
    Path(path).write_text("".join(lines), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Worker processes. decord can hang while it holds Python's lock, or crash: only a process of its own can be ended.


def in_processes(function, items, workers: int, timeout: float | None = None):
    """Yield (item, result, None) as they come, or (item, None, "hung" | "died"), from forked processes.

    A process that takes longer than `timeout` seconds over one item is killed and replaced. An exception inside
    `function` ends all with a RuntimeError that holds its trace.
    """
    context = multiprocessing.get_context("fork")
    todo, busy = iter(items), {}

    def start():
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(function, theirs, os.getpid()), daemon=True)
        process.start()
        theirs.close()
        return ours, process

    def give(worker):
        try:
            item = next(todo)
        except StopIteration:
            _end(*worker)
            return
        worker[0].send(item)
        busy[worker[0]] = (worker, item, time.monotonic() + timeout if timeout else float("inf"))

    try:
        for _ in range(max(1, workers)):
            give(start())
        while busy:
            ready = multiprocessing.connection.wait(busy, timeout=0.2 if timeout else None)
            for pipe in ready:
                worker, item, _ = busy.pop(pipe)
                try:
                    result, trace = pipe.recv()
                except EOFError:
                    _end(*worker)
                    worker, result, trace = start(), None, None
                    yield item, None, "died"
                else:
                    if trace:
                        raise RuntimeError(f"in a worker process, at {item!r}:\n{trace}")
                    yield item, result, None
                give(worker)
            now = time.monotonic()
            for pipe in [pipe for pipe, (_, _, end) in busy.items() if end < now]:
                worker, item, _ = busy.pop(pipe)
                _end(*worker)
                yield item, None, "hung"
                give(start())
    finally:
        for worker, _, _ in busy.values():
            _end(*worker)


def _serve(function, pipe, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what decord prints about a clip stands in the report
    torch.set_num_threads(1)
    while True:
        while not pipe.poll(2.0):
            if os.getppid() != parent:
                return
        item = pipe.recv()
        try:
            answer = function(item), None
        except Exception:  # not silent: the parent raises it
            answer = None, traceback.format_exc()
        pipe.send(answer)


def _end(pipe, process) -> None:
    pipe.close()
    process.kill()
    process.join()


def progress(items, total: int, what: str):
    return tqdm(items, total=total, desc=f"  {what:8}", unit="", disable=None, mininterval=0.5, leave=False)


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def check_labels(rows, tokenizer, vision, config, found: Findings) -> dict[str, list[int]]:
    """Encode every caption of every entry and read the result back. Returns {entry id: text tokens of each caption},
    before any cut, prompt and end token counted."""
    pairs = [(row, entry) for row in rows for entry in row.entries]

    def check(start):
        return [check_entry(tokenizer, entry, vision["tokens"], config.max_text_tokens)
                for _, entry in pairs[start : start + step]]

    step, lengths = 64, {}
    starts = range(0, len(pairs), step)
    results = in_processes(check, starts, config.num_workers)
    for start, answers, failure in progress(results, len(starts), "labels"):
        if failure:
            raise RuntimeError(f"a worker process {failure} while it checked labels")
        for (row, entry), (problems, tokens) in zip(pairs[start : start + step], answers, strict=True):
            lengths[entry.id] = lengths.get(entry.id, []) + tokens
            for level, code, message in problems:
                if level == "error":
                    found.error(code, f"{entry.id} ({row.where})", message, [row])
                else:
                    found.warning(code, f"{entry.id} ({row.where})", message)
    check_batch(pairs, tokenizer, vision, config, found)
    return lengths


def check_entry(tokenizer, entry: Entry, visual_tokens: int, limit: int) -> tuple[list[tuple], list[int]]:
    """([(level, code, message)], [text tokens of each caption before any cut])."""
    if control := find_control(tokenizer, entry.question):
        return [("error", "control_token", f"the question spells out {control}")], []
    problems, tokens, prompt = [], [], len(dataset.encode_prompt(tokenizer, entry.question, 0))
    for number, caption in enumerate(entry.captions, start=1):
        name = f"caption {number}" if len(entry.captions) > 1 else "the caption"
        if control := find_control(tokenizer, caption):
            problems.append(("error", "control_token", f"{name} spells out {control}"))
            continue
        try:
            example = dataset.encode_example(tokenizer, entry.question, caption, visual_tokens, limit)
        except DataError as error:
            problems.append(("error", "prompt_too_long", str(error)))
            continue
        tokens.append(prompt + sum(label != IGNORE_INDEX for label in example["labels"]))
        for code, message in check_example(tokenizer, example, prompt + visual_tokens, caption, visual_tokens):
            if code == "caption_cut":
                tokens[-1] = prompt + len(tokenizer.encode(caption, add_special_tokens=False)) + 1
                message = f"{tokens[-1]} tokens with prompt and end, {message}"
            problems.append(("warning" if code == "caption_cut" else "error", code, f"{name}: {message}"))
    return problems, tokens


def find_control(tokenizer, text: str) -> str | None:
    """A control token of this tokenizer, or of its like, that is spelt out in `text`."""
    likely = re.search(r"<\|\w+\|>|</?think>|<video>|<image>", text)
    return dataset.find_control_text(tokenizer, text) or (likely[0] if likely else None)


def check_example(tokenizer, example: dict, prompt: int, caption: str, visual_tokens: int):
    """Yield (code, message) for all that is wrong with the labels of one example, by decoding them.

    `prompt`: number of tokens before the answer.
    """
    pieces = chat_pieces(tokenizer)
    ids, labels = example["input_ids"], example["labels"]
    supervised = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
    target = [labels[i] for i in supervised]
    (end,) = pieces.turn_end
    if ids.count(pieces.placeholder) != visual_tokens:
        yield "visual_token_count", f"{ids.count(pieces.placeholder)} placeholders instead of {visual_tokens}"
    if not [label for label in target if label != end]:
        yield "nothing_supervised", "no token of the answer is supervised"
        return
    if len(ids) != len(labels) or any(ids[i] != labels[i] for i in supervised):
        yield "label_mismatch", "labels differ from the input ids where they count"
    if supervised[0] < prompt:
        yield "prompt_supervised", f"supervised from token {supervised[0]} on, the answer starts at {prompt}"
    if pieces.placeholder in target:
        yield "video_token_supervised", f"{target.count(pieces.placeholder)} placeholders are supervised"
    if tokenizer.pad_token_id != end and tokenizer.pad_token_id in target:
        yield "pad_supervised", f"{target.count(tokenizer.pad_token_id)} pads are supervised"
    if target[-1] != end or supervised[-1] != len(ids) - 1:
        yield "end_token_lost", f"the last supervised token is {tokenizer.decode([target[-1]])!r}"
    if target.count(end) > 1:
        yield "end_token_repeated", f"{target.count(end)} end tokens are supervised"
    answer = [label for label in target if label != end]
    text = tokenizer.decode(answer, clean_up_tokenization_spaces=False).strip()
    if text != caption and caption.startswith(text):
        yield "caption_cut", f"cut behind {text[-40:]!r}"
    elif text != caption:
        yield "label_mismatch", f"the labels decode to {text[:80]!r}"


def check_batch(pairs, tokenizer, vision, config, found: Findings) -> None:
    """Pad the shortest, the longest and some more examples into one batch and compare it with its rows."""
    sound = [entry for row, entry in pairs if not row.bad]
    by_length = sorted(sound, key=lambda entry: len(entry.captions[0]))
    if not by_length:
        return
    frames = torch.zeros(1, 1, 1, 3, dtype=torch.uint8)
    rows = []
    for entry in [by_length[0], by_length[-1], *by_length[:: len(by_length) // 6 + 1]]:
        rows.append({"id": entry.id, "frames": frames, **dataset.encode_example(
            tokenizer, entry.question, entry.captions[0], vision["tokens"], config.max_text_tokens)})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batch = dataset.collate(rows, pad)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        mask = batch["attention_mask"][i].tolist()
        whole = all(batch[key][i, :n].tolist() == row[key] for key in ("input_ids", "labels"))
        if not whole or mask != [1] * n + [0] * (len(mask) - n) or (batch["labels"][i, n:] != IGNORE_INDEX).any():
            found.error("batch_broken", row["id"], "ids, labels or mask changed when the batch was padded")


# ---------------------------------------------------------------------------------------------------------------------
# Clips


def check_clips(clips: dict[str, list[Row]], config, vision, found: Findings) -> dict[str, dict]:
    """Decode every clip. Returns {clip: facts} of the sound ones."""
    if config.build_cache:
        dataset.limit_cache(config.frame_cache, config.cache_limit_gb)

    def check(clip):
        return check_clip(dataset.resolve_video(config.video_root, clips[clip][0].entries[0].video), config, vision)

    facts, bad = {}, 0
    results = in_processes(check, clips, config.num_workers, config.clip_timeout)
    with progress(results, len(clips), "clips") as bar:
        for clip, answer, failure in bar:
            where = f"{clip} ({clips[clip][0].where})"
            if failure == "hung":
                answer = {"code": "hung_video", "reason": f"not decoded within {config.clip_timeout:g} s"}
            elif failure:
                answer = {"code": "corrupt_video", "reason": "the decoder crashed"}
            if "code" in answer:
                bad += 1
                found.error(answer["code"], where, answer["reason"], clips[clip])
                bar.set_postfix_str(f"{bad} bad")
                continue
            facts[clip] = answer
            for code, message in judge_clip(clip, answer, config):
                found.warning(code, where, message)
    sizes = Counter((f["width"], f["height"]) for f in facts.values() if min(f["width"], f["height"]) < SMALL_SIDE)
    for (width, height), number in sizes.most_common():
        found.warning("small_video", f"{number:,} clips", f"{width}x{height}")
    return facts


def check_clip(path: Path, config, vision) -> dict:
    """Decode one clip: its facts, or {"code", "reason"}."""
    if not path.is_file():
        return {"code": "missing_video", "reason": f"no file {path}" if not path.exists() else f"{path} is no file"}
    try:
        with dataset.open_clip(path) as reader:
            height, width = reader[0].shape[:2]
        with dataset.open_clip(path, 96, 96) as reader:
            starts = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0]
            chosen = dataset.spread_over_time(starts, config.num_frames)
            wanted = range(len(reader)) if config.decode == "all" else chosen.tolist()
            thumbs = small_pictures(reader, list(wanted))
        cached = None
        if config.build_cache:
            place = path, config.num_frames, vision["image_size"], config.frame_cache
            dataset.cached_frames(*place)
            cached = dataset.is_cached(*place)
        with open(path, "rb") as file:
            head = file.read(1 << 20)
    except VideoError as error:
        return {"code": "corrupt_video", "reason": error.reason}
    except OSError as error:
        return {"code": "corrupt_video", "reason": error.strerror or str(error)}
    gaps = np.diff(starts)
    step = float(np.median(gaps)) if len(gaps) else 0.0
    return {
        "width": width, "height": height, "frames": len(starts), "seconds": float(starts[-1]) + step,
        "fps": 1 / step if step > 0 else 0.0,
        "uneven": float(gaps.max()) / step if len(gaps) and step > 0 else 1.0,
        "content": (path.stat().st_size, hashlib.sha256(head).hexdigest()), "thumbs": thumbs, "cached": cached,
    }


def small_pictures(reader, wanted: list[int]) -> np.ndarray:
    """Decode the frames `wanted`; of the first, middle and last a grey picture, [3, 8, 8]."""
    keep = [wanted[0], wanted[len(wanted) // 2], wanted[-1]]
    pictures = {}
    for begin in range(0, len(wanted), 128):
        part = wanted[begin : begin + 128]
        frames = reader.get_batch(part).asnumpy()
        for index in keep:
            if index in part:
                grey = frames[part.index(index)].astype(np.float32).mean(-1)
                pictures[index] = grey.reshape(8, 12, 8, 12).mean((1, 3))
    return np.stack([pictures[index] for index in keep])


def judge_clip(clip: str, facts: dict, config):
    """Yield (code, message) for what is odd about a clip that can be decoded."""
    if facts["frames"] < config.num_frames:
        yield "short_video", f"{facts['frames']} frames for {config.num_frames}"
    if facts["height"] > facts["width"]:
        yield "portrait_video", f"{facts['width']}x{facts['height']}"
    if facts["uneven"] > dataset.VFR_RATIO:
        yield "variable_frame_rate", f"the longest gap is {facts['uneven']:.1f} times the median one"
    if facts["cached"] is False:
        yield "cache_full", f"the limit is {config.cache_limit_gb:g} GB"
    low, high = BDD_SECONDS
    if BDD_NAME.fullmatch(PurePosixPath(clip).stem) and not low <= facts["seconds"] <= high:
        yield "odd_duration", f"{facts['seconds']:.1f} s"


def frame_strip(path: Path, num_frames: int, height: int = 108) -> list[str]:
    """JPEGs (base64) of the frames that training reads, at the clip's own aspect."""
    from PIL import Image

    with dataset.open_clip(path) as reader:
        chosen = dataset.spread_over_time(reader.get_frame_timestamp(np.arange(len(reader)))[:, 0], num_frames)
        frames = reader.get_batch(chosen.tolist()).asnumpy()
    strip = []
    for frame in frames:
        picture = Image.fromarray(frame[..., :3])
        picture.thumbnail((16 * height // 9, height))
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=80)
        strip.append(base64.b64encode(data.getvalue()).decode())
    return strip


# ---------------------------------------------------------------------------------------------------------------------
# Totals


def count(rows, clips, facts, train, val, lengths, config, found: Findings) -> dict:
    """The numbers of report.json and of the report's first lines."""
    entries = [entry for row in rows for entry in row.entries]
    codes = Counter(problem.code for problem in found.problems)
    counts = {
        "rows": len(rows), "bad_rows": sum(row.bad for row in rows), "entries": len(entries), "clips": len(clips),
        "captions": sum(len(entry.captions) for entry in entries),
        "modes": {mode: {"train": sum(e.mode == mode for e in train), "held_out": sum(e.mode == mode for e in val)}
                  for mode in MODES},
        "train_clips": len({e.video for e in train}), "held_out_clips": len({e.video for e in val}),
        "words": {mode: percentiles([len(c.split()) for e in entries if e.mode == mode for c in e.captions])
                  for mode in MODES},
        "text_tokens": count_tokens([n for tokens in lengths.values() for n in tokens], config.max_text_tokens),
        "errors": found.count("error"), "warnings": found.count("warning"), "codes": dict(codes.most_common()),
    }
    if not config.no_video:
        counts["sound_clips"] = len(facts)
        counts["seconds"] = percentiles([f["seconds"] for f in facts.values()])
        counts["sizes"] = dict(Counter(f"{f['width']}x{f['height']}" for f in facts.values()).most_common(5))
        counts["fps"] = percentiles([f["fps"] for f in facts.values()])
    if config.frame_cache and Path(config.frame_cache).is_dir():
        files, size = dataset.cache_size(config.frame_cache)
        counts["frame_cache"] = {"folder": config.frame_cache, "files": files, "gigabytes": size / 1e9}
    return counts


def count_tokens(tokens: list[int], limit: int) -> dict:
    """Text tokens of all captions, prompt and end token counted, before any cut; {} if there are none."""
    if not tokens:
        return {}
    tokens = np.array(tokens)
    longest = int(tokens.max())
    top = max(longest, limit if longest > limit / 2 else 0)  # the limit is drawn where it is not far off
    top += -top % 4
    return {
        **percentiles(tokens), "limit": limit, "cut": int((tokens > limit).sum()),
        "share_cut": float((tokens > limit).mean()),
        f"share_over_{PUBLISHED_LIMIT}": float((tokens > PUBLISHED_LIMIT).mean()),
        "max_text_tokens_that_keeps_99_percent": int(np.percentile(tokens, 99, method="higher")),
        "histogram": np.histogram(tokens, bins=44, range=(0, top))[0].tolist(), "histogram_top": top,
    }


def percentiles(values) -> dict:
    if len(values) == 0:
        return {}
    low, median, high = np.percentile(values, [5, 50, 95])
    return {"min": round(float(min(values)), 2), "p5": round(float(low), 2), "median": round(float(median), 2),
            "p95": round(float(high), 2), "max": round(float(max(values)), 2)}


def grouped(problems: list[dict]) -> list[tuple[str, str, list[dict]]]:
    """[(level, code, problems)], errors first, then by number."""
    groups = defaultdict(list)
    for problem in problems:
        groups[problem["level"], problem["code"]].append(problem)
    return [(level, code, group) for (level, code), group in
            sorted(groups.items(), key=lambda item: (item[0][0] != "error", -len(item[1])))]


def summary_lines(report: dict, config, vision) -> list[tuple[str, str]]:
    """(title, what was found) of the console and of the report's top."""
    c = report["counts"]
    modes = ", ".join(f"{n['train'] + n['held_out']:,} {mode}" for mode, n in c["modes"].items())
    lines = [("rows", f"{c['rows']:,} readable, {c['entries']:,} entries ({modes}) of {c['clips']:,} clips")]
    lines.append(("split", f"{c['train_clips']:,} clips to train on, {c['held_out_clips']:,} held out "
                           f"(seed {config.split_seed})"))
    if t := c["text_tokens"]:
        lines.append(("text", f"{t['min']:.0f} to {t['max']:.0f} tokens with prompt and end, median {t['median']:.0f}; "
                              f"the limit of {t['limit']:,} cuts {t['cut']:,} of {c['captions']:,} captions"))
        lines.append(("", f"max_text_tokens {t['max_text_tokens_that_keeps_99_percent']} keeps 99% whole; "
                          f"{t[f'share_over_{PUBLISHED_LIMIT}']:.1%} would lose their end if cut at {PUBLISHED_LIMIT}"))
    frames = f"{config.num_frames} frames"
    if vision["known"]:
        lines.append(("video", f"{frames} x {c['tokens_per_frame']} = {c['visual_tokens']:,} visual tokens"))
    else:
        lines.append(("video", f"{frames}, counted as one token each: the vision model's config.json is not here"))
    if "sound_clips" in c:
        sizes = ", ".join(f"{n:,} of {size}" for size, n in list(c["sizes"].items())[:3])
        ends = sorted({f"{c['seconds'][key]:.1f}" for key in ("min", "max") if c["seconds"]}, key=float)
        seconds = f"; {' to '.join(ends)} s" if ends else ""
        which = "from start to end" if config.decode == "all" else f"in the {frames} that training reads"
        lines.append(("clips", f"{c['sound_clips']:,} of {c['clips']:,} decode {which}; {sizes}{seconds}"))
    else:
        lines.append(("clips", "not looked at (--no-video)"))
    if "frame_cache" in c:
        cache = c["frame_cache"]
        lines.append(("cache", f"{cache['files']:,} clips, {cache['gigabytes']:.2f} GB in {cache['folder']}"))
    return lines


def verdict(report: dict, strict: bool) -> str:
    c = report["counts"]
    many = f"{c['errors']:,} error{'s' * (c['errors'] != 1)}, {c['warnings']:,} warning{'s' * (c['warnings'] != 1)}"
    return ("sound" if report["ok"] else "not sound") + f": {many}" + (", which fail too (--strict)" if strict else "")


def print_summary(report, config, folder, vision, seconds) -> None:
    print(f"check_dataset  {config.data}")
    for title, text in summary_lines(report, config, vision):
        print(f"  {title:6} {text}")
    for level, code, group in grouped(report["problems"]):
        print(f"  {level} {code}: {len(group):,}\n      {CODES[code]}")
        for problem in group[:3]:
            print(f"      - {problem['where']}: {problem['message']}")
        if len(group) > 3:
            print(f"      ... and {len(group) - 3:,} more in report.json")
    if config.drop_bad:
        print(f"  {report['counts']['rows'] - report['counts']['bad_rows']:,} sound rows: {config.drop_bad}")
    print(f"  report: {folder / 'report.html'} ({seconds:.0f} s)")
    print(f"{config.data} is {verdict(report, config.strict)}")


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def example_pages(rows, facts, tokenizer, vision, lengths, config) -> list[dict]:
    """For some entries of each mode (a typical one, the longest, then others): token spans and frames."""
    chosen = []
    for mode in MODES:
        sound = [(row, e) for row in rows if not row.bad for e in row.entries if e.mode == mode and lengths.get(e.id)]
        sound.sort(key=lambda pair: lengths[pair[1].id][0])
        n = len(sound)
        order = dict.fromkeys([n // 2, n - 1, 0, n // 4, 3 * n // 4]) if n else {}
        chosen += [sound[i] for i in list(order)[: config.examples]]

    def strip(number):
        try:
            path = dataset.resolve_video(config.video_root, chosen[number][1].video)
            return frame_strip(path, config.num_frames)
        except (VideoError, RowError):
            return []

    strips = {}
    if facts and chosen:
        results = in_processes(strip, range(len(chosen)), min(2, max(1, config.num_workers)), config.clip_timeout)
        strips = {number: pictures or [] for number, pictures, _ in results}
    pages = []
    for number, (row, entry) in enumerate(chosen):
        example = dataset.encode_example(
            tokenizer, entry.question, entry.captions[0], vision["tokens"], config.max_text_tokens
        )
        pages.append({"entry": entry, "where": row.where, "spans": token_spans(tokenizer, example),
                      "supervised": sum(label != IGNORE_INDEX for label in example["labels"]),
                      "total": len(example["labels"]), "strip": strips.get(number, [])})
    return pages


def token_spans(tokenizer, example: dict) -> list[tuple[str, str]]:
    """[(kind, text)] of an example's tokens; kind: "video" (a run folded), "masked", "supervised", "end"."""
    placeholder = chat_pieces(tokenizer).placeholder
    spans, pending, previous = [], [], None  # pending: tokens that are no whole character yet
    for position, (token, label) in enumerate(zip(example["input_ids"], example["labels"], strict=True)):
        if token == placeholder:
            run = spans.pop()[2] + 1 if spans and previous == placeholder else 1
            spans.append(("video", f"{tokenizer.decode([token])} \u00d7 {run:,}", run))
        else:
            kind = "masked" if label == IGNORE_INDEX else "supervised"
            if kind == "supervised" and position == len(example["labels"]) - 1:
                kind = "end"
            pending.append(token)
            text = tokenizer.decode(pending, clean_up_tokenization_spaces=False)
            if not text.endswith("\ufffd"):
                spans.append((kind, text, 0))
                pending = []
        previous = token
    return [(kind, text) for kind, text, _ in spans]


def write_reports(report: dict, folder: Path, config, pages: list[dict], vision) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False, default=str)
    page = html_page(report, config, pages, vision)
    targets = [(folder / "report.json", text), (folder / "report.html", page)]
    if config.json:
        Path(config.json).parent.mkdir(parents=True, exist_ok=True)
        targets.append((Path(config.json), text))
    for path, content in targets:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)


def html_page(report, config, pages, vision) -> str:
    c, e = report["counts"], html.escape
    tiles = [(c["rows"], "rows"), (c["entries"], "entries"), (c["clips"], "clips"), (c["captions"], "captions"),
             (c["errors"], "errors"), (c["warnings"], "warnings")]
    tile_html = "".join(
        f'<div class="tile {name if n else ""}"><b>{n:,}</b><span>{name}</span></div>' for n, name in tiles
    )
    lines = "".join(f"<tr><th>{e(title)}</th><td>{e(text)}</td></tr>" for title, text in
                    summary_lines(report, config, vision))
    modes = "".join(
        f"<tr><th>{mode}</th><td>{n['train']:,}</td><td>{n['held_out']:,}</td>"
        + "".join(f"<td>{c['words'][mode].get(key, 0):.0f}</td>" for key in ("min", "median", "max")) + "</tr>"
        for mode, n in c["modes"].items()
    )
    problems = "".join(problem_html(level, code, group, level == "error" or report["ok"])
                       for level, code, group in grouped(report["problems"]))
    state = "good" if report["ok"] else "bad"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Dataset check: {e(Path(config.data).name)}</title><style>{STYLE}</style>
<header><div><h1>Dataset check <span class="badge {state}">{e(verdict(report, config.strict))}</span></h1>
<p>{e(config.data)} &middot; clips in {e(config.video_root)} &middot; tokenizer {e(config.language_model)}</p></div>
</header>
<main>
<div class="tiles">{tile_html}</div>
<section class="two"><div><h2>Totals</h2><table class="plain">{lines}</table></div>
<div><h2>Modes</h2><table class="numbers"><tr><th></th><td>train</td><td>held out</td><td>words: min</td><td>median</td>
<td>max</td></tr>{modes}</table>{histogram(c)}</div></section>
<h2>Problems</h2>{problems or '<p class="none">None: every row, clip and label is as it should be.</p>'}
<h2>What the loss sees</h2>
<p class="legend"><span class="t masked">masked: read, not learned</span> <span class="t video">video</span>
<span class="t supervised">supervised: learned</span> <span class="t end">end token</span></p>
{"".join(map(example_html, pages)) or '<p class="none">No sound example.</p>'}
</main></html>
"""


def problem_html(level: str, code: str, group: list[dict], unfolded: bool, shown: int = 8) -> str:
    e = html.escape
    rows = "".join(f"<tr><td>{e(p['where'])}</td><td>{e(p['message'])}</td></tr>" for p in group[:shown])
    more = f'<p class="more">and {len(group) - shown:,} more in report.json</p>' if len(group) > shown else ""
    state = "open" if unfolded else ""
    return (f'<details class="problem {level}" {state}><summary><span class="badge {level}">{level}</span> '
            f'<code>{code}</code> <b>{len(group):,}</b> <span class="why">{e(CODES[code])}</span></summary>'
            f"<table>{rows}</table>{more}</details>")


def example_html(page: dict) -> str:
    e, entry = html.escape, page["entry"]
    strip = "".join(f'<img src="data:image/jpeg;base64,{data}" alt="frame {i + 1}">'
                    for i, data in enumerate(page["strip"]))
    strip = f'<div class="strip">{strip}</div>' if strip else ""

    def span(kind, text):
        shown = e(text).replace("\n", '<i class="nl">\u21b5</i>\n')
        return f'<span class="t {kind}">{shown}</span>'

    tokens = "".join(span(kind, text) for kind, text in page["spans"])
    return (f'<article><h3><span class="mode {entry.mode}">{entry.mode}</span> {e(entry.id)}</h3>'
            f'<p class="meta">{e(page["where"])} &middot; {page["supervised"]:,} of {page["total"]:,} tokens supervised'
            f'</p>{strip}<div class="tokens">{tokens}</div></article>')


def histogram(counts: dict, width: int = 560, height: int = 120) -> str:
    """Text tokens of all captions as bars, with the limit and the length that keeps 99%."""
    tokens = counts["text_tokens"]
    if not tokens:
        return ""
    numbers, top, most = tokens["histogram"], tokens["histogram_top"], max(tokens["histogram"])
    step = width / len(numbers)
    bars = "".join(f'<rect x="{i * step + 1:.1f}" y="{height - height * n / most:.1f}" width="{step - 1.5:.1f}" '
                   f'height="{height * n / most:.1f}"><title>{n:,}</title></rect>' for i, n in enumerate(numbers))
    marks = ""
    for row, (value, text, kind) in enumerate([
        (tokens["max_text_tokens_that_keeps_99_percent"], "99%", "p99"), (tokens["limit"], "limit", "limit"),
    ]):
        x = value / top * width
        if x <= width:
            side = f'x="{x - 4:.1f}" text-anchor="end"' if x > width * 0.8 else f'x="{x + 4:.1f}"'
            marks += (f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{-14 - 14 * row}" y2="{height}"/>'
                      f'<text class="{kind}" {side} y="{-6 - 14 * row}">{text} {value:,}</text>')
    axis = "".join(f'<text class="axis" x="{k / 4 * width:.1f}" y="{height + 16}" text-anchor="'
                   f'{("start", "middle", "middle", "middle", "end")[k]}">{top * k / 4:,.0f}</text>' for k in range(5))
    return (f'<figure><svg viewBox="-2 -32 {width + 4} {height + 54}" role="img">{bars}{marks}{axis}</svg>'
            f"<figcaption>Tokens of prompt, caption and end token, all captions</figcaption></figure>")


STYLE = """
:root { --ink: #1d2733; --soft: #5d6b7a; --line: #dfe5eb; --good: #1f8a4c; --bad: #c63838; --warn: #b26a00; }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; color: var(--ink);
  background: #f5f7f9; }
header { background: #fff; border-bottom: 1px solid var(--line); }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 18px; margin: 32px 0 10px; } h3 { font-size: 15px; margin: 0; }
header p, .meta, .more, figcaption { color: var(--soft); margin: 4px 0 0; font-size: 13px; }
header > div, main { max-width: 1220px; margin: 0 auto; padding: 20px 20px 12px; } main { padding-bottom: 60px; }
.badge { display: inline-block; border-radius: 999px; padding: 2px 12px; font-size: 13px; font-weight: 600; color: #fff;
  vertical-align: middle; }
.badge.good { background: var(--good); } .badge.bad, .badge.error { background: var(--bad); }
.badge.warning { background: var(--warn); }
.tiles { display: grid; grid-template-columns: repeat(6, 1fr); gap: 12px; }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.tile b { display: block; font-size: 24px; font-variant-numeric: tabular-nums; } .tile span { color: var(--soft); }
.tile.errors b { color: var(--bad); } .tile.warnings b { color: var(--warn); }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 32px; }
@media (max-width: 900px) { .two { display: block; } }
table { border-collapse: collapse; width: 100%; background: #fff; }
td, th { text-align: left; padding: 5px 10px; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; font-weight: 400; }
.plain th { color: var(--soft); width: 64px; } .numbers td { text-align: right; font-variant-numeric: tabular-nums; }
.numbers tr:first-child td { color: var(--soft); font-size: 13px; }
.numbers th { font-weight: 600; }
figure { margin: 14px 0 0; } svg { width: 100%; height: auto; } rect { fill: #86a8cf; }
svg text { font-size: 12px; fill: var(--soft); } line { stroke-width: 1.5; }
line.limit { stroke: var(--bad); } text.limit { fill: var(--bad); } line.p99 { stroke: var(--good); }
text.p99 { fill: var(--good); }
.problem { background: #fff; border: 1px solid var(--line); border-left: 4px solid var(--warn); border-radius: 8px;
  margin: 8px 0; padding: 8px 14px; }
.problem.error { border-left-color: var(--bad); } .problem summary { cursor: pointer; } .why { color: var(--soft); }
.problem table { margin-top: 8px; font-size: 13px; table-layout: fixed; } .problem td:first-child { width: 38%; }
code { font: 13px ui-monospace, Menlo, Consolas, monospace; font-weight: 600; }
.none { color: var(--soft); }
article { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; margin: 12px 0; }
.mode { border-radius: 6px; padding: 2px 8px; font-size: 12px; font-weight: 600; background: #e4ecf6; color: #234d80; }
.mode.copilot { background: #f6ebdc; color: #7d4b06; }
.strip { display: flex; flex-wrap: wrap; gap: 4px; margin: 10px 0; } .strip img { height: 76px; border-radius: 4px; }
.tokens { font: 13.5px/1.95 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  margin-top: 8px; }
.t { border-radius: 3px; padding: 1px 0; } .legend .t { padding: 2px 8px; margin-right: 6px; font-size: 13px; }
.masked { background: #eceff2; color: #66727f; } .supervised { background: #d8f0de; color: #10522b; }
.supervised:nth-child(even) { background: #c7e8d0; } .masked:nth-child(even) { background: #e3e7eb; }
.video { background: #d6e6fb; color: #17477f; padding: 1px 6px; font-weight: 600; }
.end { background: #10522b; color: #fff; font-weight: 600; padding: 1px 6px; outline: 2px solid #58c98a; }
.nl { color: #a7b1bb; font-style: normal; }
"""


if __name__ == "__main__":
    sys.exit(main())
