"""Is the data sound, and what will the loss see? Checks every row, every clip and every label before training.

    python check_dataset.py                                          # configs/stage2.yaml: the real data
    python check_dataset.py --config configs/demo/stage2.yaml        # the toy world
    python check_dataset.py --data rows.jsonl --video_root clips     # any other data
    python check_dataset.py --no-video                               # rows and labels only, in seconds
    python check_dataset.py --drop-bad sound.jsonl --build-cache     # write the sound rows, decode every clip once

Writes report.html and report.json into <output_dir>/check_dataset/. Needs no GPU and no weights, only the language
model's tokenizer (and, for the number of visual tokens, the vision model's config.json if it is on this machine).
Exit code: 0 sound (warnings allowed, unless --strict), 1 problems in rows or clips, 2 wrong flags or missing inputs.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import time
import typing
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from training.common import fail, file_sha256, load_config, run_main, write_json, write_text
from training.config import CheckConfig

if __name__ == "__main__":  # answer --help and mistyped flags before the slow imports
    load_config(CheckConfig, default_config="configs/stage2.yaml", description=__doc__)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer is used in forked processes

import numpy as np
import torch
from transformers import AutoTokenizer

import dataset
import model
from dataset import IGNORE_INDEX, MODE_TABLE, MODES, DataError, Entry, RowError, VideoError, chat_pieces
from pages.render import film_strip, render
from training.workers import in_processes

PUBLISHED_LIMIT = 512  # tokens at which the published code cut a conversation, including its end token
BDD_NAME = re.compile(r"[0-9a-f]{8}-[0-9a-f]{8}")  # a BDD100K clip
BDD_SECONDS = (30, 50)  # such a clip lasts about 40 s
SAME_PICTURE = 12.0  # mean difference of grey levels up to which two thumbnails show the same scene
LONG_TEXT = 60  # words from which equal captions of two clips cannot be chance
SAME_SHORT_TEXTS = 0.05  # short captions shared with training clips are chance up to this share of held-out entries
LIKELY_CONTROL = re.compile(r"<\|\w+\|>|</?think>|<video>|<image>")  # control tokens of other tokenizers
LABEL_CHUNK = 64  # entries that a worker process checks at once

CODES = {  # what a code means, and what to do
    "no_rows": "The data holds no row that can be read.",
    "unknown_format": "The row has none of the accepted forms; README, 'Bring your own clips', lists them.",
    "unknown_mode": 'Neither "mode" nor the question says which mode this is. Add "mode", or set default_mode.',
    "multi_turn": "A conversation with several turns. Write one row per question and answer.",
    "empty_question": "The question is empty or not a text.",
    "empty_caption": "A caption (or the list of captions) is empty, blank or not a text.",
    "bad_unicode": "Text with a broken encoding (U+FFFD, lone surrogates, not UTF-8). Export the file again as UTF-8.",
    "control_token": "A text contains one of the tokenizer's control tokens, which could end a turn or act as a frame.",
    "path_escape": "The video's path leads out of video_root (absolute, '..', '~', a URL, or a link).",
    "missing_video": "video_root holds no such clip.",
    "corrupt_video": "The clip cannot be decoded from start to end. Copy or encode it again, or drop its rows.",
    "hung_video": "Decoding took longer than clip_timeout and was stopped. Encode the clip again.",
    "cache_not_written": "--build_cache could not store frames of these clips. The clips themselves are sound.",
    "duplicate_entry": "Another row has the same clip, mode and captions.",
    "ambiguous_prompt": "One question is used for two modes, so the model cannot know which one is meant.",
    "split_leak": "A clip, a copy of it, or a long caption is both in the training data and in the held-out data.",
    "end_token_lost": "The supervised text does not end with the end token: the model would never learn to stop.",
    "end_token_repeated": "The supervised text contains more than one end token.",
    "nothing_supervised": "No token of the answer is supervised. Raise max_text_tokens.",
    "prompt_supervised": "Tokens of the prompt are supervised: the model would learn to write questions.",
    "pad_supervised": "Padding is supervised.",
    "video_token_supervised": "Video placeholders are supervised.",
    "visual_token_count": "The number of video placeholders is not frames x tokens per frame.",
    "label_mismatch": "The supervised tokens do not decode to the caption.",
    "prompt_too_long": "The question alone exceeds max_text_tokens.",
    "batch_broken": "Padding an example into a batch changed it.",
    "mode_missing": "No entry has this mode. Stage 1 works without it, stages 2 and 3 do not.",
    "split_too_small": "There are no more clips than num_val_videos: training would refuse, and leaks cannot be found.",
    "answer_ignored": 'The row has "captions" and an "a" that is not one of them; "a" is ignored.',
    "repeated_id": 'Two rows describe one clip in one mode. Put their texts into one row\'s "captions".',
    "repeated_caption": "An entry lists the same caption twice, so it is drawn more often than the others.",
    "same_caption": f"Over {SAME_SHORT_TEXTS:.0%} of the held-out entries have the short caption of a training clip.",
    "caption_length": "Unusual for the mode. Fine if intended; otherwise check that the modes are not mixed up.",
    "caption_cut": "Longer than max_text_tokens: cut at the end of a sentence; the end token is kept.",
    "duplicate_clip": "Two files (or folders of images) on one side of the split hold the same clip.",
    "similar_clip": "Held out and trained-on clips of one name that look alike: perhaps one clip, encoded twice.",
    "short_video": "The clip has fewer frames than num_frames, so some are repeated.",
    "small_video": "Clips with a side under small_side: distant objects cannot be seen.",
    "portrait_video": "Taller than wide after applying the rotation tag. Is the tag right?",
    "variable_frame_rate": "Frames are not evenly spaced in time, so they are sampled by time.",
    "odd_duration": f"A BDD100K clip lasts about 40 s; this one is outside {BDD_SECONDS[0]}-{BDD_SECONDS[1]} s.",
}


@dataclass
class Row:
    where: str
    raw: object
    entries: list[Entry]
    held_out: bool
    bad: bool = False

    @property
    def side(self) -> str:
        return "held out" if self.held_out else "trained on"


@dataclass
class Findings:
    """Everything found so far."""

    problems: list[dict] = field(default_factory=list)

    def add(self, level: str, code: str, where: str, message: str, rows: Iterable[Row] = ()):
        """`level`: "error", which marks `rows` as bad, or "warning"."""
        self.problems.append({"level": level, "code": code, "where": where, "message": message})
        for row in rows:
            row.bad |= level == "error"

    def count(self, level: str) -> int:
        return sum(problem["level"] == level for problem in self.problems)


@dataclass
class Inputs:
    """What the check reads from the models' folders."""

    tokenizer: typing.Any
    visual_tokens: int  # of one clip
    tokens_per_frame: int | None  # None: the vision model's config.json is not on this machine
    image_size: int | None


def main(argv=None) -> int:
    config = load_config(CheckConfig, argv, default_config="configs/stage2.yaml", description=__doc__)
    begin, found = time.monotonic(), Findings()
    inputs = open_inputs(config)

    rows = read_rows(inputs.tokenizer, config, found)
    clips = find_clips(rows, config, found)
    split_rows(rows, config, found)
    check_repeats(clips, found)
    check_questions(rows, found)
    check_wordings(rows, inputs.tokenizer, found)
    check_modes(rows, config, found)
    lengths = check_labels(rows, inputs, config, found)
    facts = {} if config.no_video else check_clips(clips, inputs, config, found)
    check_clip_leaks(clips, facts, config, found)
    check_text_leaks(rows, found)
    check_other_data(rows, config, found)

    ok = not found.count("error") and not (config.strict and found.count("warning"))
    report = {"ok": ok, "counts": count(rows, clips, facts, lengths, inputs, config, found), "problems": found.problems}
    folder = Path(config.output_dir) / "check_dataset"
    write_reports(report, folder, make_examples(rows, lengths, inputs, config), inputs, config)
    if config.drop_bad:
        sound = [row.raw for row in rows if not row.bad and not (config.val_data and row.held_out)]
        Path(config.drop_bad).parent.mkdir(parents=True, exist_ok=True)
        write_text(config.drop_bad, "".join(json.dumps(raw, ensure_ascii=False) + "\n" for raw in sound))
    print_summary(report, folder, inputs, config, time.monotonic() - begin)
    return 0 if ok else 1


# ---- inputs ----------------------------------------------------------------------------------------------------------


def open_inputs(config) -> Inputs:
    """Tokenizer and number of visual tokens; exits with code 2 and everything that is missing."""
    files = [("data", config.data), *(("other_data", file) for file in config.other_data)]
    files += [("val_data", config.val_data)] if config.val_data else []
    modes = [("default_mode", config.default_mode), *(("word_range", mode) for mode in config.word_range)]
    problems = dataset.video_reader_problems(config)
    problems += [f"{key}: no file or folder {file} (README, 'Bring your own clips', says what rows look like)"
                for key, file in files if not Path(file).exists()]
    problems += [f"{key}: no mode {mode!r}; modes are {', '.join(MODES)}" for key, mode in modes
                 if mode not in (None, *MODES)]
    if not config.no_video and not Path(config.video_root).is_dir():
        problems.append(f"video_root: no folder {config.video_root} (--no-video checks rows and labels only)")
    if config.drop_bad and Path(config.drop_bad).resolve() in [Path(file).resolve() for _, file in files]:
        problems.append(f"drop_bad: {config.drop_bad} is one of the data files and would be overwritten")
    tokenizer = size = None
    is_folder = Path(config.language_model).is_dir()  # a folder that holds just a tokenizer will do
    problem = None if is_folder else model.base_model_problem("language_model", config.language_model)
    if problem:
        problems.append(problem)
    elif is_folder or not problems:  # nothing is downloaded for a check that cannot start
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.language_model)
            chat_pieces(tokenizer)
        except (OSError, ValueError) as error:
            problems.append(f"language_model: {error}")
    try:
        size = model.tokens_per_frame(config.vision_model, config.pooling)
    except model.ModelError as error:
        problems.append(f"vision_model: {error}")
    if config.build_cache and size is None:
        problems.append(f"vision_model: --build-cache reads the frames' size from {config.vision_model}/config.json")
    if problems:
        fail(problems, "nothing was checked")
    per_frame, image_size = size or (None, None)
    return Inputs(tokenizer, config.num_frames * (per_frame or 1), per_frame, image_size)


# ---- rows ------------------------------------------------------------------------------------------------------------


def read_rows(tokenizer, config, found: Findings) -> list[Row]:
    """The rows of `data` and `val_data` that can be read; those of `val_data` are held out."""
    rows = []
    for path, held_out in ((config.data, False), (config.val_data, True)):
        where = None
        try:
            for where, raw in dataset.read_rows(path) if path else ():
                try:
                    entries = dataset.parse_row(raw, config.default_mode)
                except RowError as error:
                    found.add("error", error.code, where, str(error))
                    check_unknown_mode(tokenizer, raw, error, where, found)
                    continue
                rows.append(Row(where, raw, entries, held_out))
                if "captions" in raw and "a" in raw and raw["a"] not in raw["captions"]:
                    found.add("warning", "answer_ignored", where, f"{raw['a']!r:.60} is not one of its captions")
            if path and where is None:
                found.add("error", "no_rows", path, "the file holds no row")
        except DataError as error:
            found.add("error", "no_rows", path, str(error))
    return rows


def check_unknown_mode(tokenizer, raw, error: RowError, where: str, found: Findings) -> None:
    """Find control tokens in a row whose mode is unknown: setting `default_mode` would not be enough to mend it."""
    if error.code != "unknown_mode":
        return
    row = {key: value for key, value in raw.items() if key != "mode"}
    try:
        entries = dataset.parse_row(row, next(iter(MODES)))
    except RowError as another:
        found.add("error", another.code, where, str(another))
        return
    for entry in entries:
        for name, control in find_controls(tokenizer, dataset.texts_of(entry)):
            found.add("error", "control_token", where, f"{name} contains {control}")


def find_clips(rows: list[Row], config, found: Findings) -> dict[str, list[Row]]:
    """{clip: its rows}; rows whose path leads out of the root lose their entries."""
    clips = defaultdict(list)
    for row in rows:
        try:
            clips[dataset.clip_key(row.entries[0].video, config.video_root)].append(row)
        except RowError as error:
            found.add("error", error.code, row.where, str(error), [row])
            row.entries = []
    return dict(clips)


def split_rows(rows: list[Row], config, found: Findings) -> None:
    """Mark the rows that training holds out, unless they come from a file of their own."""
    entries = [entry for row in rows for entry in row.entries]
    if config.val_data or not entries:
        return
    try:
        _, val = dataset.split_by_video(entries, config.num_val_videos, config.split_seed, config.video_root)
    except DataError as error:
        found.add("warning", "split_too_small", "all rows", str(error))
        return
    held_out = {entry.video for entry in val}
    for row in rows:
        row.held_out = any(entry.video in held_out for entry in row.entries)


def check_repeats(clips: dict[str, list[Row]], found: Findings) -> None:
    """Find rows that repeat another row of their clip."""
    for rows in clips.values():
        seen = defaultdict(list)  # (side of the split, mode) -> [(row, captions)]
        for row, entry in entries_of(rows):
            others = seen[row.held_out, entry.mode]
            same = [other for other, captions in others if captions == entry.captions]
            if same:
                found.add("error", "duplicate_entry", row.where, f"{entry.id}: the same as {same[0].where}", [row])
                continue
            if others:
                found.add("warning", "repeated_id", row.where, f"{entry.id}: also in {others[0][0].where}")
            others.append((row, entry.captions))


def check_questions(rows: list[Row], found: Findings) -> None:
    """Find questions that are used for two modes."""
    first_uses = {}  # question -> (mode, where)
    for name, mode in MODE_TABLE.items():
        first_uses |= dict.fromkeys(mode.known, (name, "dataset.MODE_TABLE"))
    for row, entry in entries_of(rows):
        mode, where = first_uses.setdefault(entry.question, (entry.mode, row.where))
        if mode != entry.mode:
            found.add("error", "ambiguous_prompt", row.where,
                      f"{entry.question[:60]!r} means {entry.mode} here, but {mode} in {where}", [row])


def check_wordings(rows: list[Row], tokenizer, found: Findings) -> None:
    """Find control tokens in what training asks instead of the rows' own questions."""
    for mode in sorted({entry.mode for _, entry in entries_of(rows) if entry.question == MODES[entry.mode]}):
        wordings = [(repr(wording), wording) for wording in MODE_TABLE[mode].wordings]
        for name, control in find_controls(tokenizer, wordings):
            found.add("error", "control_token", f"dataset.MODE_TABLE, {mode}", f"{name} contains {control}")


def check_modes(rows: list[Row], config, found: Findings) -> None:
    """Warn of modes without entries, of captions listed twice and of unusual lengths, once per mode."""
    for mode in MODES:
        uses = [(row, entry) for row, entry in entries_of(rows) if entry.mode == mode]
        if rows and not uses:
            found.add("warning", "mode_missing", "all rows", f"no {mode} entries")
        repeated = [row for row, entry in uses if len(set(entry.captions)) < len(entry.captions)]
        if repeated:
            found.add("warning", "repeated_caption", f"{len(repeated):,} {mode} entries",
                      f"the first is {repeated[0].where}")
        low, high = config.word_range.get(mode, MODE_TABLE[mode].word_range)
        words = count_words(entry for _, entry in uses)
        odd = [n for n in words if not low <= n <= high]
        if odd:
            found.add("warning", "caption_length", f"{len(odd):,} of {len(words):,} {mode} captions",
                      f"{min(odd)} to {max(odd)} words, expected {low} to {high}")


def entries_of(rows: list[Row]) -> Iterator[tuple[Row, Entry]]:
    return ((row, entry) for row in rows for entry in row.entries)


def count_words(entries: Iterable[Entry]) -> list[int]:
    return [len(caption.split()) for entry in entries for caption in entry.captions]


# ---- clips and captions that appear on both sides of the split -------------------------------------------------------


def check_clip_leaks(clips: dict[str, list[Row]], facts: dict, config, found: Findings) -> None:
    """Find clips that are on both sides of the split, and clips that are in the folder twice."""
    for clip, rows in clips.items():
        held_out, trained = [row for row in rows if row.held_out], [row for row in rows if not row.held_out]
        if held_out and trained:  # only `val_data` makes this possible
            found.add("error", "split_leak", f"{clip} ({trained[0].where})",
                      f"trained on, but also held out by {held_out[0].where}", trained)
    same_content = {}  # clip -> another with the same bytes
    for first, *others in find_copies(clips, facts, config):
        for clip in others:
            same_content[clip] = first
            row, first_row = clips[clip][0], clips[first][0]
            kind = "file" if facts[clip]["is_file"] else "images"
            message = f"{row.side}; the same {kind} as {first} ({first_row.where}), which is {first_row.side}"
            level, code = ("warning", "duplicate_clip") if row.side == first_row.side else ("error", "split_leak")
            found.add(level, code, f"{clip} ({row.where})", message, clips[clip])
    same_name = defaultdict(list)
    for clip in facts:
        if clip not in same_content:
            same_name[PurePosixPath(dataset.video_stem(clip)).name.lower()].append(clip)
    for first, *others in same_name.values():
        for clip in others:
            row, first_row = clips[clip][0], clips[first][0]
            if row.held_out != first_row.held_out and same_picture(facts[first], facts[clip]):
                found.add("warning", "similar_clip", f"{clip} ({row.where})",
                          f"{row.side}; it looks like {first} of the same name, which is {first_row.side}")


def find_copies(clips: dict[str, list[Row]], facts: dict, config) -> list[list[str]]:
    """Groups of clips whose files hold the same bytes. Whole files are read only where sizes and beginnings agree.

    Of a folder of images, these are the bytes of its images in their order, whatever names and times they have.
    """
    likely, same = defaultdict(list), defaultdict(list)
    for clip in facts:
        likely[facts[clip]["content"]].append(clip)
    for content, group in likely.items():
        for clip in group if len(group) > 1 else ():
            path = dataset.resolve_video(config.video_root, clips[clip][0].entries[0].video)
            same[content, *map(file_sha256, dataset.media_files(path))].append(clip)
    return list(same.values())


def same_picture(one: dict, other: dict) -> bool:
    """Do two clips last equally long and look alike at their start, middle and end?"""
    alike = np.abs(one["thumbnails"] - other["thumbnails"]).mean() <= SAME_PICTURE
    return bool(alike) and abs(one["seconds"] - other["seconds"]) < 0.5


def check_text_leaks(rows: list[Row], found: Findings) -> None:
    """Find captions that appear on both sides of the split: long ones, and short ones where they are many."""
    trained, short = {}, []  # {captions: the first (row, entry) that trains on them}, (where, message)
    for row, entry in entries_of(rows):
        if not row.held_out:
            trained.setdefault(plain_texts(entry), (row, entry))
    for row, entry in entries_of(rows):
        if not row.held_out or plain_texts(entry) not in trained:
            continue
        other_row, other = trained[plain_texts(entry)]
        where = f"{entry.id} ({row.where})"
        message = f"held out, with the same text as {other.id} ({other_row.where}), which is trained on"
        if max(len(caption.split()) for caption in entry.captions) >= LONG_TEXT:
            found.add("error", "split_leak", where, message, [row])
        else:
            short.append((where, message))
    if len(short) > SAME_SHORT_TEXTS * sum(row.held_out for row, _ in entries_of(rows)):
        for where, message in short:
            found.add("warning", "same_caption", where, message)


def plain_texts(entry: Entry) -> frozenset[str]:
    """An entry's captions without differences of case and white space."""
    return frozenset(" ".join(caption.lower().split()) for caption in entry.captions)


def check_other_data(rows: list[Row], config, found: Findings) -> None:
    """Find clips held out here that another stage's data file trains on.

    Clips are matched by their paths without suffix; one that is given without its folder matches every folder.
    """
    held_out = defaultdict(set)  # file name -> paths
    for row, entry in entries_of(rows):
        if row.held_out:
            path = dataset.video_stem(dataset.clip_key(entry.video))
            held_out[PurePosixPath(path).name].add(path)
    for file in config.other_data:
        try:
            train = dataset.load_entries(file, config.default_mode)
            if not config.val_data:
                train, _ = dataset.split_by_video(train, config.num_val_videos, config.split_seed)
        except DataError as error:
            found.add("error", "unknown_format", file, str(error))
            continue
        leaks = set()
        for path in {dataset.video_stem(dataset.clip_key(entry.video)) for entry in train}:
            others = held_out.get(PurePosixPath(path).name, ())
            leaks |= {other for other in others if f"/{path}".endswith(f"/{other}") or other.endswith(f"/{path}")}
        for clip in sorted(leaks):
            found.add("error", "split_leak", clip, f"held out here, but {file} trains on it")


# ---- labels ----------------------------------------------------------------------------------------------------------


def check_labels(rows: list[Row], inputs: Inputs, config, found: Findings) -> dict[str, list[int]]:
    """Encode every caption of every entry and decode the labels again.

    Returns {entry id: text tokens of each caption}, with prompt and end token, before any cut.
    """
    pairs = list(entries_of(rows))
    chunks = [pairs[start : start + LABEL_CHUNK] for start in range(0, len(pairs), LABEL_CHUNK)]

    def check(number):
        return [check_entry(inputs.tokenizer, entry, inputs.visual_tokens, config.max_text_tokens)
                for _, entry in chunks[number]]

    lengths = defaultdict(list)
    for number, answers, failure in in_processes(check, range(len(chunks)), config.num_workers, title="labels"):
        if failure:
            raise RuntimeError(f"a worker process {failure} while it checked labels")
        for (row, entry), (problems, tokens) in zip(chunks[number], answers, strict=True):
            lengths[entry.id] += tokens
            for level, code, message in problems:
                found.add(level, code, f"{entry.id} ({row.where})", message, [row])
    check_batch([entry for row, entry in pairs if not row.bad], inputs, config, found)
    return lengths


def check_entry(tokenizer, entry: Entry, visual_tokens: int, limit: int) -> tuple[list[tuple], list[int]]:
    """([(level, code, message)], [text tokens of each caption before any cut]), with the longest question that
    training may ask."""
    controls = dict(find_controls(tokenizer, dataset.texts_of(entry)))
    problems = [("error", "control_token", f"{name} contains {token}") for name, token in controls.items()]
    if "the question" in controls:
        return problems, []
    question = longest_question(tokenizer, dataset.training_questions(entry))
    tokens, prompt = [], len(dataset.encode_prompt(tokenizer, question, 0))
    for name, caption in dataset.texts_of(entry)[1:]:
        if name in controls:
            continue
        try:
            example = dataset.encode_example(tokenizer, question, caption, visual_tokens, limit)
        except DataError as error:
            problems.append(("error", "prompt_too_long", str(error)))
            continue
        tokens.append(prompt + sum(label != IGNORE_INDEX for label in example["labels"]))
        for code, message in check_example(tokenizer, example, prompt + visual_tokens, caption, visual_tokens):
            if code == "caption_cut":
                tokens[-1] = prompt + len(tokenizer.encode(caption, add_special_tokens=False)) + 1
                message = f"{tokens[-1]} tokens with prompt and end token, {message}"
            problems.append(("warning" if code == "caption_cut" else "error", code, f"{name}: {message}"))
    return problems, tokens


@functools.lru_cache(maxsize=1024)
def longest_question(tokenizer, questions: tuple[str, ...]) -> str:
    """The question with the most tokens; those with control tokens are reported elsewhere, and left out."""
    sound = [question for question in questions if not dataset.find_control_text(tokenizer, question)]
    return max(sound, key=lambda question: len(tokenizer.encode(question, add_special_tokens=False)))


def find_controls(tokenizer, texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """[(name, text)] -> [(name, a control token in the text)], of this tokenizer or of similar ones."""
    found = []
    for name, text in texts:
        likely = LIKELY_CONTROL.search(text)
        control = dataset.find_control_text(tokenizer, text) or (likely[0] if likely else None)
        found += [(name, control)] if control else []
    return found


def check_example(tokenizer, example: dict, prompt: int, caption: str, visual_tokens: int) -> Iterator[tuple[str, str]]:
    """Yield (code, message) for everything that is wrong with one example's labels, found by decoding them.

    `prompt`: number of tokens before the answer.
    """
    pieces = chat_pieces(tokenizer)
    ids, labels = example["input_ids"], example["labels"]
    supervised = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
    target = [labels[i] for i in supervised]
    (end,) = pieces.turn_end
    if ids.count(pieces.placeholder) != visual_tokens:
        yield "visual_token_count", f"{ids.count(pieces.placeholder)} placeholders instead of {visual_tokens}"
    answer = [label for label in target if label != end]
    if not answer:
        yield "nothing_supervised", "no token of the answer is supervised"
        return
    if len(ids) != len(labels) or any(ids[i] != labels[i] for i in supervised):
        yield "label_mismatch", "supervised labels differ from the input ids"
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
    text = tokenizer.decode(answer, clean_up_tokenization_spaces=False).strip()
    if text != caption and caption.startswith(text):
        yield "caption_cut", f"cut after {text[-40:]!r}"
    elif text != caption:
        yield "label_mismatch", f"the labels decode to {text[:80]!r}"


def check_batch(entries: list[Entry], inputs: Inputs, config, found: Findings) -> None:
    """Pad the shortest, the longest and some other examples into one batch and compare it with its rows."""
    entries = sorted(entries, key=lambda entry: len(entry.captions[0]))
    if not entries:
        return
    rows, frames = [], torch.zeros(1, 1, 1, 3, dtype=torch.uint8)
    for entry in [entries[0], entries[-1], *entries[:: len(entries) // 6 + 1]]:
        rows.append({"id": entry.id, "frames": frames, **encode_first(entry, inputs, config)})
    batch = dataset.collate(rows, inputs.tokenizer.pad_token_id or 0)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        mask = batch["attention_mask"][i].tolist()
        whole = all(batch[key][i, :n].tolist() == row[key] for key in ("input_ids", "labels"))
        if not whole or mask != [1] * n + [0] * (len(mask) - n) or (batch["labels"][i, n:] != IGNORE_INDEX).any():
            found.add("error", "batch_broken", row["id"], "ids, labels or mask changed when the batch was padded")


def encode_first(entry: Entry, inputs: Inputs, config, times=None) -> dict:
    return dataset.encode_example(inputs.tokenizer, entry.question, entry.captions[0], inputs.visual_tokens,
                                  config.max_text_tokens, times)


# ---- clips -----------------------------------------------------------------------------------------------------------


def check_clips(clips: dict[str, list[Row]], inputs: Inputs, config, found: Findings) -> dict[str, dict]:
    """Decode every clip. Returns {clip: facts} of the sound ones."""

    def check(clip):
        path = dataset.resolve_video(config.video_root, clips[clip][0].entries[0].video)
        return check_clip(path, config, inputs.image_size)

    facts, unwritten = {}, []
    for clip, answer, failure in in_processes(check, clips, config.num_workers, config.clip_timeout, "clips"):
        where = f"{clip} ({clips[clip][0].where})"
        if failure == "hung":
            answer = {"code": "hung_video", "reason": f"not decoded within {config.clip_timeout:g} s"}
        elif failure:
            answer = {"code": "corrupt_video", "reason": "the decoder crashed"}
        if "code" in answer:
            found.add("error", answer["code"], where, answer["reason"], clips[clip])
            continue
        facts[clip] = answer
        if answer["cache_problem"]:
            unwritten.append(answer["cache_problem"])
        for code, message in clip_warnings(clip, answer, config):
            found.add("warning", code, where, message)
    if unwritten:
        found.add("error", "cache_not_written", f"{len(unwritten):,} clips", f"{config.frame_cache}: {unwritten[0]}")
    sizes = Counter((f["width"], f["height"]) for f in facts.values())
    for (width, height), number in sizes.most_common():
        if min(width, height) < config.small_side:
            message = f"{width}x{height}, small_side is {config.small_side}"
            found.add("warning", "small_video", f"{number:,} clips", message)
    return facts


def check_clip(path: Path, config, image_size: int | None) -> dict:
    """Decode one clip. Returns its facts, or {"code", "reason"}."""
    if not dataset.is_clip(path):
        reason = f"neither a file nor a folder of images: {path}" if os.path.exists(path) else f"no file {path}"
        return {"code": "missing_video", "reason": reason}
    try:
        with dataset.Clip(path) as clip:
            width, height = clip.size
        with dataset.Clip(path, (96, 96)) as clip:  # small: decoding costs the same, copying much less
            starts = clip.times
            indices = list(range(len(starts))) if config.decode == "all" else clip.choose(config.num_frames).tolist()
            samples = clip.frames([indices[0], indices[len(indices) // 2], indices[-1]]).astype(np.float32).mean(-1)
            for start in range(0, len(indices), 128):  # in parts: bounds the memory of long clips
                clip.frames(indices[start : start + 128])
        cache_problem = fill_cache(path, config, image_size) if config.build_cache else None
        files = dataset.media_files(path)
        with open(files[0], "rb") as file:
            head = file.read(1 << 20)
        size = sum(file.stat().st_size for file in files)
    except (VideoError, OSError) as error:
        return {"code": "corrupt_video", "reason": getattr(error, "reason", str(error))}
    gaps = np.diff(starts)
    step = float(np.median(gaps)) if len(gaps) else 0.0
    return {
        "width": width, "height": height, "frames": len(starts), "seconds": float(starts[-1]) + step,
        "fps": 1 / step if step > 0 else 0.0, "longest_gap": float(gaps.max()) / step if step > 0 else 1.0,
        "cache_problem": cache_problem,
        "is_file": path.is_file(), "content": (len(files), size, hashlib.sha256(head).hexdigest()),
        "thumbnails": samples.reshape(3, 8, 12, 8, 12).mean((2, 4)),  # first, middle and last frame in grey
    }


def fill_cache(path: Path, config, image_size: int) -> str | None:
    """Store a clip's frames for training; returns why they could not be written, None where they were."""
    try:
        dataset.cached_frames(path, config.num_frames, image_size, config.frame_cache, must_write=True)
        if config.time_stamps:
            dataset.cached_times(path, config.num_frames, config.frame_cache)
    except OSError as error:
        return error.strerror or str(error)
    return None


def clip_warnings(clip: str, facts: dict, config) -> Iterator[tuple[str, str]]:
    """Yield (code, message) for what is odd about a clip that can be decoded."""
    if facts["frames"] < config.num_frames:
        yield "short_video", f"{facts['frames']} frames, num_frames is {config.num_frames}"
    if facts["height"] > facts["width"]:
        yield "portrait_video", f"{facts['width']}x{facts['height']}"
    if facts["longest_gap"] > dataset.VFR_RATIO:
        yield "variable_frame_rate", f"the longest gap is {facts['longest_gap']:.1f} times the median gap"
    low, high = BDD_SECONDS
    if BDD_NAME.fullmatch(PurePosixPath(clip).stem) and not low <= facts["seconds"] <= high:
        yield "odd_duration", f"{facts['seconds']:.1f} s"


# ---- totals ----------------------------------------------------------------------------------------------------------


def count(rows, clips, facts, lengths, inputs: Inputs, config, found: Findings) -> dict:
    """The numbers of report.json and of the summary."""
    entries = [entry for _, entry in entries_of(rows)]
    by_mode = {mode: [] for mode in MODES}
    for entry in entries:
        by_mode[entry.mode].append(entry)
    held_out = Counter(entry.mode for row, entry in entries_of(rows) if row.held_out)
    held_out_clips = sum(clip_rows[0].held_out for clip_rows in clips.values())
    counts = {
        "visual_tokens": inputs.visual_tokens, "tokens_per_frame": inputs.tokens_per_frame or 1,
        "rows": len(rows), "bad_rows": sum(row.bad for row in rows), "entries": len(entries), "clips": len(clips),
        "captions": sum(len(entry.captions) for entry in entries),
        "modes": {mode: {"train": len(uses) - held_out[mode], "held_out": held_out[mode]}
                  for mode, uses in by_mode.items()},
        "train_clips": len(clips) - held_out_clips, "held_out_clips": held_out_clips,
        "own_questions": sum(entry.question != MODES[entry.mode] for entry in entries),
        "words": {mode: percentiles(count_words(uses)) for mode, uses in by_mode.items()},
        "text_tokens": count_tokens(list(itertools.chain(*lengths.values())), config.max_text_tokens),
        "errors": found.count("error"), "warnings": found.count("warning"),
        "codes": dict(Counter(problem["code"] for problem in found.problems).most_common()),
    }
    if not config.no_video:
        counts["sound_clips"] = len(facts)
        counts["seconds"] = percentiles([f["seconds"] for f in facts.values()])
        counts["sizes"] = dict(Counter(f"{f['width']}x{f['height']}" for f in facts.values()).most_common(5))
        counts["fps"] = percentiles([f["fps"] for f in facts.values()])
    return counts


def count_tokens(tokens: list[int], limit: int) -> dict:
    """Statistics of the captions' text tokens (prompt and end token included, before any cut); {} if there are none."""
    if not tokens:
        return {}
    tokens = np.array(tokens)
    longest = int(tokens.max())
    top = max(longest, limit if longest > limit / 2 else 0)  # the page shows the limit unless it is far off
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
    numbers = np.percentile(values, [0, 5, 50, 95, 100]).round(2).tolist()
    return dict(zip(("min", "p5", "median", "p95", "max"), numbers, strict=True))


def summary_lines(counts: dict, inputs: Inputs, config) -> list[tuple[str, str]]:
    """(title, text) pairs for the console and for the top of the page."""
    c, t = counts, counts["text_tokens"]
    modes = ", ".join(f"{n['train'] + n['held_out']:,} {mode}" for mode, n in c["modes"].items())
    source = config.val_data or f"split_seed {config.split_seed}"
    lines = [("rows", f"{c['rows']:,} readable, {c['entries']:,} entries ({modes}) of {c['clips']:,} clips"),
             ("split", f"{c['train_clips']:,} clips to train on, {c['held_out_clips']:,} held out ({source})")]
    wordings = ", ".join(f"{mode} in {1 + len(info.wordings)} wordings" for mode, info in MODE_TABLE.items())
    lines.append(("asked", f"{c['entries'] - c['own_questions']:,} entries as their mode is ({wordings}), "
                           f"{c['own_questions']:,} in their own words"))
    if t:
        lines += [("text", f"{t['min']:.0f} to {t['max']:.0f} tokens with prompt and end token, median "
                           f"{t['median']:.0f}; max_text_tokens {t['limit']:,} cuts {t['cut']:,} of {c['captions']:,}"),
                  ("", f"{t['max_text_tokens_that_keeps_99_percent']:,} would keep 99% whole; at {PUBLISHED_LIMIT}, "
                       f"{t[f'share_over_{PUBLISHED_LIMIT}']:.1%} would lose their end")]
    frames = f"{config.num_frames} frames"
    lines.append(("video", f"{frames} x {c['tokens_per_frame']} = {c['visual_tokens']:,} visual tokens"
                  + ("" if inputs.tokens_per_frame else " (one per frame: no config.json of the vision model here)")))
    if config.no_video:
        return [*lines, ("clips", "not checked (--no-video)")]
    sizes = "".join(f"; {number:,} of {size}" for size, number in list(c["sizes"].items())[:3])
    ends = dict.fromkeys(f"{c['seconds'][end]:.1f}" for end in ("min", "max") if c["seconds"])
    seconds = f"; {' to '.join(ends)} s" if ends else ""
    which = "from start to end" if config.decode == "all" else f"in the {frames} that training reads"
    lines.append(("clips", f"{c['sound_clips']:,} of {c['clips']:,} decode {which}{sizes}{seconds}"))
    return [*lines, ("cache", f"frames in {config.frame_cache}")] if config.build_cache else lines


def verdict(report: dict, config) -> str:
    errors, warnings = report["counts"]["errors"], report["counts"]["warnings"]
    text = f"{errors:,} error{'s' * (errors != 1)}, {warnings:,} warning{'s' * (warnings != 1)}"
    return f"{'sound' if report['ok'] else 'not sound'}: {text}{' (--strict)' * config.strict}"


def grouped(problems: list[dict]) -> list[tuple[str, str, list[dict]]]:
    """[(level, code, problems)], errors first, then by number."""
    groups = defaultdict(list)
    for problem in problems:
        groups[problem["level"], problem["code"]].append(problem)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0] != "error", -len(item[1])))
    return [(level, code, group) for (level, code), group in ordered]


def print_summary(report: dict, folder: Path, inputs: Inputs, config, seconds: float) -> None:
    print(f"check_dataset  {config.data}")
    for title, text in summary_lines(report["counts"], inputs, config):
        print(f"  {title:6} {text}")
    for level, code, group in grouped(report["problems"]):
        print(f"  {level} {code}: {len(group):,}\n      {CODES[code]}")
        for problem in group[:3]:
            print(f"      - {problem['where']}: {problem['message']}")
        if len(group) > 3:
            print(f"      ... and {len(group) - 3:,} more in report.json")
    if config.drop_bad:
        print(f"  rows without errors: {config.drop_bad}")
    print(f"  report: {folder / 'report.html'} ({seconds:.0f} s)")
    print(f"{config.data} is {verdict(report, config)}")


# ---- reports ---------------------------------------------------------------------------------------------------------


def write_reports(report: dict, folder: Path, examples: list[dict], inputs: Inputs, config) -> None:
    """Write report.json (and its copy, --json FILE) and report.html."""
    for path in filter(None, (folder / "report.json", config.json)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(path, report, indent=1)
    page = render("check.html", config=config, report=report, verdict=verdict(report, config),
                  totals=summary_lines(report["counts"], inputs, config), groups=grouped(report["problems"]),
                  meanings=CODES, examples=examples)
    write_text(folder / "report.html", page)


def make_examples(rows: list[Row], lengths: dict, inputs: Inputs, config) -> list[dict]:
    """What the page shows of `config.examples` sound entries per mode: a typical one, the longest, then others."""
    chosen = []
    for mode in MODES:
        sound = [(row, entry) for row, entry in entries_of(rows) if entry.mode == mode and not row.bad]
        sound.sort(key=lambda pair: lengths[pair[1].id][0])
        n = len(sound)
        order = dict.fromkeys([n // 2, n - 1, 0, n // 4, 3 * n // 4]) if n else {}
        chosen += [sound[i] for i in list(order)[: config.examples]]

    def decode(number):
        try:
            path = dataset.resolve_video(config.video_root, chosen[number][1].video)
            indices, _, frames = dataset.sample_clip(path, config.num_frames)
            times = dataset.read_times(path, config.num_frames) if config.time_stamps else None  # [T]
        except VideoError:
            return None
        return film_strip(frames, [f"frame {index}" for index in indices]), times

    decoded = {}
    if not config.no_video:
        results = in_processes(decode, range(len(chosen)), config.num_workers, config.clip_timeout, "examples")
        decoded = {number: result for number, result, _ in results if result}
    examples = []
    for number, (row, entry) in enumerate(chosen):
        strip, times = decoded.get(number, (None, None))
        example = encode_first(entry, inputs, config, times)
        supervised = sum(label != IGNORE_INDEX for label in example["labels"])
        examples.append({"id": entry.id, "mode": entry.mode, "colour": MODE_TABLE[entry.mode].colour,
                         "where": row.where, "supervised": supervised, "total": len(example["labels"]),
                         "frames": strip, "spans": token_spans(inputs.tokenizer, example)})
    return examples


def token_spans(tokenizer, example: dict) -> list[tuple[str, str]]:
    """[(kind, text)] of an example's tokens; kind: "video" (a run as one span), "masked", "supervised", "end"."""
    placeholder = chat_pieces(tokenizer).placeholder
    pairs = list(zip(example["input_ids"], example["labels"], strict=True))
    spans, pending = [], []  # pending: tokens that do not make a whole character yet
    for is_video, run in itertools.groupby(pairs, key=lambda pair: pair[0] == placeholder):
        run = list(run)
        if is_video:
            spans.append(("video", f"{tokenizer.decode([placeholder])} × {len(run):,}"))
            continue
        for token, label in run:
            pending.append(token)
            text = tokenizer.decode(pending, clean_up_tokenization_spaces=False)
            if not text.endswith("\ufffd"):
                spans.append(("masked" if label == IGNORE_INDEX else "supervised", text))
                pending = []
    if pairs[-1][1] != IGNORE_INDEX:
        spans[-1] = ("end", spans[-1][1])
    return spans


if __name__ == "__main__":
    run_main(main)
