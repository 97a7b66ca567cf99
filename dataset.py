"""Clips and captions: rows -> entries -> token ids, labels and frames.

The file reads top to bottom: the two granularities (`MODE_TABLE`), the rows that are accepted (`load_entries`), the
split (`load_split`, `split_by_video`), the one renderer of a conversation (`encode_prompt`, `encode_example`), the
frames of a clip and their cache (`Clip`, `read_frames`, `cached_frames`), and what a data loader needs
(`VideoInstructDataset`, `collate`).
"""

import contextlib
import csv
import dataclasses
import errno
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import posixpath
import random
import re
import stat
import struct
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from jinja2 import TemplateError
from PIL import ImageOps, UnidentifiedImageError
from PIL.Image import DecompressionBombError, Resampling
from PIL.Image import open as open_image  # ultralytics replaces Image.open by one that installs packages
from torch.utils.data import Dataset

from training.common import DriveVLMError, replacing, stable_seed, write_json
from training.config import WORDS
from training.workers import in_child

IGNORE_INDEX = -100
PREFIX, NOBODY = -2, -1  # owners of a position in a row of several texts behind one clip; text k is owned by k
MIN_FRAME_SIZE = 56  # decord's scaler returns broken frames below this
BROKEN_TEXT = re.compile("[\ufffd\ud800-\udfff]")  # what a wrong decoding leaves behind
ORIENTATION = 0x0112  # the EXIF tag that says how an image is turned
GREY = 128  # value of blank frames: near 0 once normalised
DECODE_TIMEOUT = 120.0  # seconds after which the decoding of a clip is stopped
VIDEO_SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"}  # files of a folder that are taken for clips
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}  # files of a folder that are taken for the frames of one clip
IMAGE_FPS = 10.0  # images a second of a folder that holds neither times.txt nor fps.txt
IMAGE_TIMES = ("times.txt", "fps.txt")  # what says when the images of a folder were taken; the first counts
VFR_RATIO = 1.5  # longest over median frame interval, above which a clip counts as variable frame rate


@dataclass(frozen=True)
class Mode:
    """One granularity. A new mode is one entry in MODE_TABLE and one in the reward's MODE_REWARDS.

    No question stands in it twice (ValueError). A data file may ask any of them: such a row is of this mode and is
    asked as `question`, so that no row brings an `unseen` one into training.
    """

    question: str  # the standard question: what evaluation asks, and training half of the time
    wordings: tuple[str, ...] = ()  # other words for it: training draws from them otherwise (`draw_question`)
    unseen: tuple[str, ...] = ()  # other words that training never draws: evaluate.py asks whether they work too
    word_range: tuple[int, int] = (1, 1000)  # fewest and most words of a usual answer
    max_new_tokens: int = 1024  # an answer is cut off after this many tokens
    colour: str = "#475467"  # on pages and curves

    def __post_init__(self):
        if len(self.known) < 1 + len(self.wordings) + len(self.unseen):
            raise ValueError(f"a mode has a question twice: {self.question!r}, its wordings or unseen ones")

    @functools.cached_property
    def known(self) -> frozenset[str]:
        """Every question that means this mode."""
        return frozenset((self.question, *self.wordings, *self.unseen))


CLIP_NAMES = ("the video", "this clip", "the footage", "the scene", "this driving video", "the recording")
# Questions by what their gap takes. The modes share them, so that only the words in the gap say which one is meant.
FORMS = {
    "adjective": (
        "Write a {} report on {clip}.", "I need a {} description of {clip}.", "May I have a {} account of {clip}?",
        "{} answer: what does the camera see in {clip}?", "{} caption for {clip}:",
        "The driver wants a {} text about {clip}.",
    ),
    "adverb": (
        "Describe {clip} {}.", "Explain {} what happens in {clip}.", "Please go through {clip} {}.",
        "Could you report on {clip} {}?", "How does the traffic behave in {clip}? Answer {}.",
        "Say {} what is on the road in {clip}.",
    ),
    "sentence": (
        "What happens in {clip}? {}", "{} What does {clip} show?", "Report on {clip}. {}", "Look at {clip}. {}",
        "Tell me about {clip}. {}", "Who does what on the road in {clip}? {}",
    ),
}


def fill_forms(**gaps: tuple[str, ...]) -> tuple[str, ...]:
    """{kind of gap: texts} -> every form with every text in its gap, for every name of the clip."""
    wordings = []
    for kind, texts in gaps.items():
        for form, text, clip in itertools.product(FORMS[kind], texts, CLIP_NAMES):
            wording = form.format(text, clip=clip)
            wordings.append(wording[0].upper() + wording[1:])
    return tuple(wordings)


MODE_TABLE = {
    "microscope": Mode(
        "Describe the video in detail.",
        wordings=fill_forms(
            adjective=("detailed", "full", "complete", "thorough", "long", "comprehensive"),
            adverb=("in every detail", "thoroughly", "completely", "at length", "step by step", "with great care"),
            sentence=("Leave nothing out.", "Mention everything.", "Be thorough.", "I want to know every detail.",
                      "Name all objects and all that they do.", "Be careful to say all of it.")),
        unseen=(
            "Give a detailed description of this clip.",
            "What exactly is going on here? Go into detail.",
            "Please tell the full story of this footage.",
            "Can you list everything you see in the scene, one thing after another?",
            "A thorough and complete report, please.",
            "Narrate this dashcam recording from the first frame to the last, missing no detail.",
            "Which vehicles, people and lights appear, and how do they move? Describe them all carefully.",
            "Take your time and write a long description of what you watch.",
        ),
        word_range=WORDS["microscope"].usual, max_new_tokens=1024, colour="#2563eb"),
    "copilot": Mode(
        "Summarize the driving scene concisely.",
        wordings=fill_forms(
            adjective=("short", "brief", "concise", "quick", "compact", "very short"),
            adverb=("briefly", "concisely", "in a few words", "quickly", "in short", "as briefly as you can"),
            sentence=("Keep it short.", "Only the main point.", "Be concise.", "Just the gist, nothing more.",
                      "A few words are enough.", "Sum it up.")),
        unseen=(
            "Short driving advice, please.",
            "What is going on here? Be brief.",
            "Can you summarize this clip in a single short sentence?",
            "Give me a quick overview of the footage.",
            "In brief: what is this scene about?",
            "A concise report, please.",
            "Boil this dashcam recording down to a few words.",
            "Tell the person at the wheel briefly what is ahead.",
        ),
        word_range=WORDS["copilot"].usual, max_new_tokens=128, colour="#d9480f"),
}
MODES = {name: mode.question for name, mode in MODE_TABLE.items()}


class DataError(DriveVLMError, ValueError):
    """Something is wrong with the rows, the texts or the settings; the message lists every problem found."""


class RowError(DataError):
    """One row is wrong: `code` is the stable word that `check_dataset.py` reports."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class VideoError(DriveVLMError, RuntimeError):
    """A clip cannot be read."""

    def __init__(self, path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self):  # survives being sent between processes
        return VideoError, (self.path, self.reason)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@dataclass(frozen=True)
class Entry:
    """One clip in one granularity. `captions` are variants of one answer; the first is the original."""

    id: str  # "<video path without suffix>#<mode>"
    video: str  # as in the row, relative to the video root
    mode: str
    question: str
    captions: tuple[str, ...]
    # of the frames that the model reads, where its prompts name them (`add_times`); (): the clip could not be read
    times: tuple[float, ...] | None = None


def load_entries(path, default_mode: str | None = None) -> list[Entry]:
    """Entries of a JSON, JSONL or BDD-X CSV file, or of a folder of them, in file order.

    `default_mode` is the mode of rows that neither have a `mode` key nor ask a question of MODE_TABLE.
    Raises DataError that names every bad row.
    """
    if default_mode is not None and default_mode not in MODES:
        raise DataError(f"default_mode is {default_mode!r}; modes are {', '.join(MODES)}")
    entries, problems = [], []
    for where, row in read_rows(path):
        try:
            entries.extend(parse_row(row, default_mode))
        except RowError as error:
            problems.append(f"{where}: {error}")
    if problems:
        more = f"\n  ... and {len(problems) - 20:,} more" if len(problems) > 20 else ""
        count = "1 bad row" if len(problems) == 1 else f"{len(problems):,} bad rows"
        raise DataError(f"{path}: {count}\n  " + "\n  ".join(problems[:20]) + more)
    if not entries:
        raise DataError(f"{path}: no rows")
    return entries


def read_rows(path) -> Iterator[tuple[str, object]]:
    """Yield ("file row N", row) for every row, N from 1; what is not JSON or not text is yielded as a RowError."""
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in (".json", ".jsonl", ".csv"))
        if not files:
            raise DataError(f"{path}: no .json, .jsonl or .csv file in this folder")
    elif path.is_file():
        files = [path]
    else:
        raise DataError(f"{path}: no such data file or folder")
    for file in files:
        for number, row in enumerate(_rows_of_file(file), start=1):
            yield f"{file.name} row {number}", row


def _rows_of_file(file: Path) -> Iterator[object]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as text:
            if file.suffix.lower() == ".csv":
                yield from csv.DictReader(text)
                return
            is_list = text.read(4096).lstrip()[:1] == "["
            text.seek(0)
            if not is_list:
                yield from (_row_of_line(line, number) for number, line in enumerate(text, start=1) if line.strip())
                return
            rows = json.load(text)
        rows.reverse()
        while rows:  # popped one by one, so that the raw rows and the entries made of them are not both in memory
            yield rows.pop()
    except UnicodeDecodeError as error:
        yield RowError("bad_unicode", f"from about here the file is not UTF-8 text ({error.reason})")
    except (ValueError, RecursionError, csv.Error) as error:  # also nested too deep, a number of 5,000 digits
        yield RowError("unknown_format", f"the file is not valid {file.suffix[1:].upper()}: {error}")


def _row_of_line(line: str, number: int) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return RowError("unknown_format", f"not valid JSON: {error.msg}: line {number} column {error.colno}")
    except (ValueError, RecursionError) as error:
        return RowError("unknown_format", f"not valid JSON: {error}: line {number}")


def parse_row(row, default_mode: str | None = None) -> list[Entry]:
    """The entries of one row of any accepted form; raises RowError."""
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError("unknown_format", f"a row must be an object, not {type(row).__name__}")
    if "Input.Video" in row:
        row = _from_bddx(row)
    video = row.get("video")
    if not isinstance(video, str) or not video.strip():
        raise RowError("unknown_format", f'no "video" (keys seen: {_keys(row)})')
    if not MODES.keys().isdisjoint(row):
        return [_entry(video, mode, MODES[mode], row[mode], mode) for mode in MODES if mode in row]
    if "conversations" in row or "messages" in row:
        question, captions = _from_conversation(row)
    elif "q" in row and "captions" in row:
        question, captions = row["q"], row["captions"]
    elif "q" in row and "a" in row:
        question, captions = row["q"], [row["a"]]
    else:
        raise RowError("unknown_format", f"no known form of row (keys seen: {_keys(row)})")
    if not isinstance(question, str) or not question.strip():
        raise RowError("empty_question", f"the question of {video} is empty or not a text")
    question = clean_text(question, "question")
    mode = find_mode(row, question, default_mode)
    question = MODES[mode] if question in MODE_TABLE[mode].known else question  # asked in today's words
    return [_entry(video, mode, question, captions, "captions")]


def find_mode(row: dict, question: str, default_mode: str | None) -> str:
    """The row's `mode`, else the mode of MODE_TABLE that knows this question, else `default_mode`; else a RowError."""
    asked = [name for name, mode in MODE_TABLE.items() if question in mode.known]
    mode = row.get("mode", asked[0] if asked else default_mode)
    if not isinstance(mode, str) or mode not in MODES:
        seen = f'"mode" is {mode!r}' if "mode" in row else f'no "mode", and {question[:60]!r} is not a known question'
        raise RowError("unknown_mode", f"{seen}; modes are {', '.join(MODES)} (default_mode can set one)")
    return mode


def training_questions(entry: Entry) -> tuple[str, ...]:
    """What training may ask of an entry: the mode's question and its wordings, or the row's own question alone."""
    mode = MODE_TABLE[entry.mode]
    return (mode.question, *mode.wordings) if entry.question == mode.question else (entry.question,)


def draw_question(entry: Entry, seed: int, epoch: int, share: float = 0.5) -> str:
    """What training asks of an entry in one pass over the data: a function of (seed, epoch, id), so that ranks and
    resumed runs agree. In a `share` of the draws it is one of the wordings, else the standard question, which
    evaluation asks.
    """
    standard, *wordings = training_questions(entry)
    turn, tick = divmod(stable_seed("question", seed, epoch, entry.id), 1000)
    return wordings[turn % len(wordings)] if wordings and tick < 1000 * share else standard


def _entry(video: str, mode: str, question: str, captions, key: str) -> Entry:
    if not isinstance(captions, list):
        raise RowError("empty_caption", f'"{key}" of {video} must be a list of texts, not {type(captions).__name__}')
    if not captions:
        raise RowError("empty_caption", f'"{key}" of {video} is an empty list')
    for number, caption in enumerate(captions, start=1):
        if not isinstance(caption, str) or not caption.strip():
            raise RowError("empty_caption", f"caption {number} of {video} is empty or not a text: {caption!r}")
    captions = tuple(clean_text(caption, f"caption of {video}") for caption in captions)
    return Entry(f"{unicodedata.normalize('NFC', video_stem(video))}#{mode}", video, mode, question, captions)


def video_stem(video: str) -> str:
    """The video's path without its suffix. A folder of images has none: 2024.01.05 and 2024.01.06 are two clips."""
    stem, suffix = posixpath.splitext(posixpath.normpath(video))
    return stem if suffix.lower() in VIDEO_SUFFIXES else stem + suffix


def clean_text(text: str, what: str) -> str:
    """NFC without outer white space; raises RowError on text that was broken before it came here."""
    text = unicodedata.normalize("NFC", text.strip())
    if BROKEN_TEXT.search(text):
        raise RowError("bad_unicode", f"{what} holds U+FFFD or a lone surrogate: it was decoded wrongly somewhere")
    return text


def _keys(row: dict) -> str:
    return ", ".join(sorted(map(str, row))) or "none"


def _from_conversation(row: dict) -> tuple[str, list]:
    """(question, [answer]) of a LLaVA row; `from`/`value` or `role`/`content`, a leading <video> or <image> or none."""
    turns = row.get("conversations", row.get("messages"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("unknown_format", "the conversation must be a list of objects")
    who = [turn.get("from", turn.get("role")) for turn in turns]
    texts = [turn.get("value", turn.get("content")) for turn in turns]
    if len(turns) > 2:
        raise RowError("multi_turn", f"{len(turns)} turns; write one row per question and answer")
    if len(turns) < 2 or who[0] not in ("human", "user") or who[1] not in ("gpt", "assistant"):
        raise RowError("unknown_format", f"turns must be human (user), then gpt (assistant); seen: {who}")
    if not isinstance(texts[0], str):
        raise RowError("empty_question", f"the question is not a text: {texts[0]!r}")
    question = re.sub(r"^\s*<(video|image)>", "", texts[0])
    if re.search(r"<(video|image)>", question):
        raise RowError("unknown_format", "more than one <video> or <image>, or one that does not lead the question")
    return question, [texts[1]]


def _from_bddx(row: dict) -> dict:
    """A BDD-X line as a Copilot row: its actions and justifications in the order of time."""
    segments = []
    strange = [key for key, value in row.items() if not isinstance(value, str | None)]
    if strange:
        raise RowError("unknown_format", f"{', '.join(map(str, strange[:3]))} must be a text")
    for key, action in row.items():
        number = re.fullmatch(r"Answer\.(\d{1,4})action", key or "")
        if not number or not (action or "").strip():
            continue
        start = (row.get(f"Answer.{number[1]}start") or "").strip()
        try:
            seconds = float(start) if start else float("inf")
        except ValueError as error:
            raise RowError("unknown_format", f"Answer.{number[1]}start is not a number: {start!r}") from error
        why = (row.get(f"Answer.{number[1]}justification") or "").strip()
        segments.append((seconds, int(number[1]), f"{action.strip()} {why}".strip().rstrip(".") + "."))
    video = PurePosixPath((row["Input.Video"] or "").strip().split("?")[0]).name  # the end of a URL
    return {"video": video, "copilot": [" ".join(text for *_, text in sorted(segments))]}


# ---------------------------------------------------------------------------------------------------------------------
# Split


def load_split(config) -> tuple[list[Entry], list[Entry]]:
    """(training, held-out) entries of a configuration with DataKeys: `val_data` where it is given, else a split.

    Raises DataError for bad rows, for a clip of `val_data` that `data` trains on, and for a split that leaves nothing.
    """
    entries = load_entries(config.data, config.default_mode)
    if config.val_data is None:
        return split_by_video(entries, config.num_val_videos, config.split_seed, config.video_root)
    held_out = load_entries(config.val_data, config.default_mode)
    trained = {clip_key(entry.video, config.video_root) for entry in entries}
    shared = sorted({e.video for e in held_out if clip_key(e.video, config.video_root) in trained})
    if shared:
        raise DataError(f"val_data: {len(shared)} of its clips are also in {config.data}: {', '.join(shared[:5])}")
    return entries, held_out


def split_by_video(entries: list[Entry], num_val_videos: int = 40, seed: int = 42, video_root=None):
    """(train, val) entries: `num_val_videos` clips, chosen by `seed`, are held out with all their entries.

    The held-out clips are those with the lowest hashes of (seed, clip), so a clip's chance does not depend on the other
    clips: dropping or adding k clips changes at most k of those held out. A clip is identified by its resolved path
    where `video_root` is given (a link and its target are one clip), else by its normalized path; both give the same
    split where there are no links.
    """
    clip_of = {entry.video: None for entry in entries}
    for video in clip_of:
        clip_of[video] = clip_key(video, video_root)
    clips = sorted(set(clip_of.values()), key=lambda clip: (stable_seed("split", seed, clip), clip))
    if num_val_videos < 0:
        raise DataError(f"num_val_videos must be at least 0, got {num_val_videos}")
    if num_val_videos >= len(clips):
        raise DataError(f"num_val_videos is {num_val_videos}, but there are {len(clips)} clips: none left to train on")
    held_out = set(clips[:num_val_videos])
    train = [entry for entry in entries if clip_of[entry.video] not in held_out]
    return train, [entry for entry in entries if clip_of[entry.video] in held_out]


def clip_key(video: str, video_root=None) -> str:
    """One key per clip, however a row spells its path; relative to the video root."""
    if video_root is not None:
        video = str(resolve_video(video_root, video))[len(_real_root(str(video_root))) + 1 :]
    return unicodedata.normalize("NFC", posixpath.normpath(video))


def resolve_video(video_root, video: str) -> Path:
    """The clip's real path; raises RowError where it, or an image of a folder of images, leads by text or by link out
    of the root (`path_escape`), and where it is longer than the file system allows (`missing_video`)."""
    if "\0" in video or "\\" in video or "://" in video or video.startswith(("/", "~")):
        raise RowError("path_escape", f"{video!r} must be a plain path relative to the video root")
    if BROKEN_TEXT.search(video):
        raise RowError("bad_unicode", f"{video!r} holds U+FFFD or a lone surrogate: it was decoded wrongly somewhere")
    root = _real_root(str(video_root))
    path = os.path.realpath(os.path.join(root, video))
    try:
        os.stat(path)
    except OSError as error:  # others are met again where the clip is opened
        if error.errno == errno.ENAMETOOLONG:
            raise RowError("missing_video", f"no such file: {video[:60]!r}... is too long for a file name") from error
    if not video.isascii() and not os.path.exists(path):  # macOS writes names as NFD, captions files hold mostly NFC
        spellings = [os.path.realpath(os.path.join(root, unicodedata.normalize(f, video))) for f in ("NFC", "NFD")]
        path = next(filter(os.path.exists, spellings), path)
    if not path.startswith(root + os.sep):
        raise RowError("path_escape", f"{video!r} leads out of the video root {root}")
    for name in _linked_images(path):
        if not os.path.realpath(os.path.join(path, name)).startswith(root + os.sep):
            raise RowError("path_escape", f"{video!r} holds {name}, a link that leads out of the video root {root}")
    return Path(path)


def _linked_images(path: str) -> list[str]:
    """Files that a folder of images is read from and that are links; [] where `path` is no folder."""
    try:
        with os.scandir(path) as found:
            return sorted(file.name for file in found if file.is_symlink() and _is_of_images(file.name))
    except OSError:  # a file, or what is met again where the clip is opened
        return []


@functools.lru_cache(maxsize=16)
def _real_root(video_root: str) -> str:
    return os.path.realpath(video_root)


# ---------------------------------------------------------------------------------------------------------------------
# The conversation: one renderer for training, evaluation, rollouts and generate.py


@dataclass(frozen=True)
class ChatPieces:
    """Token ids around question and answer, in the order of a conversation."""

    before_user: tuple[int, ...]  # bos (if the template writes one) and the user turn's head
    vision_start: tuple[int, ...]  # empty where the tokenizer has no such token
    vision_end: tuple[int, ...]
    after_user: tuple[int, ...]  # the user turn's end and the answer's head
    turn_end: tuple[int, ...]  # the token that ends an answer: always exactly one
    placeholder: int  # replaced by a visual token, once for each


def chat_pieces(tokenizer) -> ChatPieces:
    """The pieces of `tokenizer`'s chat template, found once by rendering it with sentinels; raises DataError."""
    return _chat_pieces(tokenizer, str(tokenizer.chat_template), len(tokenizer))


@functools.lru_cache(maxsize=16)
def _chat_pieces(tokenizer, template: str, _size: int) -> ChatPieces:
    before_user, after_user, turn_end = _template_pieces(tokenizer)

    def ids(text):
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    has_vision = "<|vision_start|>" in added and "<|vision_end|>" in added
    used = {*ids(before_user), *ids(after_user), added[turn_end]}
    return ChatPieces(
        before_user=ids(before_user),
        vision_start=(added["<|vision_start|>"],) if has_vision else (),
        vision_end=(added["<|vision_end|>"],) if has_vision else (),
        after_user=ids(after_user),
        turn_end=(added[turn_end],),
        placeholder=_find_placeholder(tokenizer, added, used),
    )


def _template_pieces(tokenizer) -> tuple[str, str, str]:
    """(text before the question, text between question and answer, turn end) of a one-turn conversation."""
    question, answer, again = "SENTINEL0QUESTION", "SENTINEL0ANSWER", "SENTINEL0AGAIN"

    def render(*texts, prompt=False):
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        # A hybrid model's template then writes the empty thinking block that makes it answer directly; others ignore
        # the key.
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt,
                                                 enable_thinking=False)
        except TemplateError as error:
            raise DataError(f"the tokenizer's chat template cannot be rendered: {error}") from error

    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template: choose a language model that was tuned to chat")
    before, found, after_user = render(question, prompt=True).partition(question)
    if not found or question in after_user:
        raise DataError("the tokenizer's chat template does not write the user's text exactly once")
    # The head of a user turn is what a second turn adds behind the first answer: a system turn and its like, which
    # some templates put before the first, are dropped with everything else there.
    tail = render(question, answer).partition(answer)[2].lstrip()
    added = sorted((t.content for t in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    turn_end = next((t for t in added if t.strip() and tail.startswith(t)), None)
    if turn_end is None:
        raise DataError(f"the tokenizer's chat template ends an answer with no token of its own: {tail[:40]!r}")
    between = render(question, answer, again, prompt=True).partition(answer)[2].partition(again)[0].lstrip()
    head = between.removeprefix(turn_end).lstrip()
    if not between.startswith(turn_end) or not head:
        raise DataError(f"the tokenizer's chat template gives a second user turn no head: {between[:40]!r}")
    bos = tokenizer.bos_token or ""
    if bos and before.startswith(bos) and not head.startswith(bos):
        head = bos + head
    return head, after_user, turn_end


def _find_placeholder(tokenizer, added: dict[str, int], used: set[int]) -> int:
    """The token that visual tokens replace; its own embedding is never read."""
    for name in ("<|video_pad|>", "<|image_pad|>"):
        if name in added:
            return added[name]
    taken = used | {added.get("<|vision_start|>"), added.get("<|vision_end|>")}
    taken |= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    free = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special and number not in taken]
    if not free:
        raise DataError("the tokenizer has no special token left as the video's placeholder: add one to it first")
    return max(free)


def placeholder_id(tokenizer) -> int:
    """The id that visual tokens replace: <|video_pad|>, <|image_pad|>, or the last free special token."""
    return chat_pieces(tokenizer).placeholder


def find_control_text(tokenizer, text: str) -> str | None:
    """The first control token of `tokenizer` that is spelt out in `text`, or None. Compares text, not ids."""
    found = _control_pattern(tokenizer, len(tokenizer)).search(text)
    return found[0] if found else None


@functools.lru_cache(maxsize=16)
def _control_pattern(tokenizer, _size: int) -> re.Pattern:
    # Some tokenizers keep runs of spaces or plain words as added tokens; those are text.
    added = tokenizer.added_tokens_decoder.values()
    control = [t.content for t in added if t.content.strip() and (t.special or re.search(r"[<>|\[\]]", t.content))]
    return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)")


def texts_of(entry: Entry) -> list[tuple[str, str]]:
    """[("the question", text), ("caption 1", text), ...]"""
    captions = [(f"caption {number}", caption) for number, caption in enumerate(entry.captions, start=1)]
    return [("the question", entry.question), *captions]


def find_bad_texts(entries: list[Entry], tokenizer, max_text_tokens: int | None = None,
                   wordings: float = 0.5) -> list[str]:
    """What training would stop at only when it draws that caption: one line per problem, the first 20 and a count.

    Texts that spell out a control token, and questions that leave no room for an answer in `max_text_tokens`; among
    them all that training may ask instead of the entries' own, unless the share `wordings` of such draws is 0.
    """
    search = _control_pattern(tokenizer, len(tokenizer)).search
    problems = _bad_wordings(entries, tokenizer, max_text_tokens) if wordings else []
    long_questions = {}  # question -> its tokens with the end token, where those are too many
    for question in {entry.question for entry in entries} if max_text_tokens is not None else ():
        if not search(question):
            tokens = len(encode_prompt(tokenizer, question, 0)) + 1
            long_questions |= {question: tokens} if tokens > max_text_tokens else {}
    for entry in entries:
        problems += [f"{entry.id}: {name} contains the control token {found[0]}"
                     for name, text in texts_of(entry) if (found := search(text))]
        if entry.question in long_questions:
            problems.append(f"{entry.id}: the question takes {long_questions[entry.question]} tokens with the end "
                            f"token, max_text_tokens is {max_text_tokens}")
    more = [f"... and {len(problems) - 20:,} more"] if len(problems) > 20 else []
    return problems[:20] + more


def _bad_wordings(entries, tokenizer, limit: int | None) -> list[str]:
    """One line for each wording of the entries' modes that spells out a control token or is over `limit` tokens."""
    problems = []
    for mode in sorted({entry.mode for entry in entries if entry.question == MODE_TABLE[entry.mode].question}):
        for wording in MODE_TABLE[mode].wordings:
            control = find_control_text(tokenizer, wording)
            tokens = 0 if control else len(encode_prompt(tokenizer, wording, 0)) + 1
            if control:
                problems.append(f"MODE_TABLE: {wording!r} ({mode}) contains the control token {control}")
            elif limit is not None and tokens > limit:
                problems.append(f"MODE_TABLE: {wording!r} ({mode}) takes {tokens} tokens with the end token, "
                                f"max_text_tokens is {limit}")
    return problems


def _encode_text(tokenizer, text: str, what: str) -> list[int]:
    control = find_control_text(tokenizer, text)
    if control:
        raise DataError(f"{what} spells out the control token {control}: {text[:80]!r}")
    return tokenizer.encode(text, add_special_tokens=False)


def encode_prompt(tokenizer, question: str, num_visual_tokens: int, times=None) -> list[int]:
    """Ids of everything before the answer: user turn's head, the video's placeholders, question, answer's head.

    times: None, or [T] of the clip's frames in seconds; each frame's placeholders then follow its time.
    """
    pieces = chat_pieces(tokenizer)
    video = [*pieces.vision_start, *_video_ids(tokenizer, num_visual_tokens, times), *pieces.vision_end]
    return [*pieces.before_user, *video, *_encode_text(tokenizer, question, "the question"), *pieces.after_user]


def _video_ids(tokenizer, num_visual_tokens: int, times) -> list[int]:
    """A placeholder for each visual token; with `times`, each frame's stand behind its time as text."""
    placeholder = chat_pieces(tokenizer).placeholder
    if not times:
        return [placeholder] * num_visual_tokens
    per_frame, left = divmod(num_visual_tokens, len(times))
    if left:
        raise DataError(f"{num_visual_tokens} visual tokens do not divide into {len(times)} frames")
    ids = []
    for seconds in times:
        ids += [*_encode_text(tokenizer, time_stamp(seconds), "a time"), *[placeholder] * per_frame]
    return ids


def time_stamp(seconds: float) -> str:
    """A frame's time in a prompt: 4 tokens below 10 s, 5 below 100 s, as Qwen3 splits it. No brackets as in Qwen3-VL's
    "<2.1 seconds>" (arXiv 2511.21631): between visual tokens, nothing else can be meant."""
    return f"{seconds:.1f}s"


def encode_example(tokenizer, question: str, answer: str, num_visual_tokens: int, max_text_tokens: int,
                   times=None) -> dict:
    """{"input_ids", "labels"}: lists of one length; labels are IGNORE_INDEX except for the answer and its end token.

    `max_text_tokens` counts all tokens but the visual ones and the frames' `times` ([T], or None). An answer that does
    not fit is cut (`fit_answer`); the end token always stays. Raises DataError where not even that has room, and for
    control tokens in the texts.
    """
    return _encode_example(tokenizer, question, answer, num_visual_tokens, max_text_tokens, times)[0]


def _encode_example(tokenizer, question, answer, num_visual_tokens, max_text_tokens, times) -> tuple[dict, bool]:
    """(`encode_example`'s result, was the answer cut?)"""
    prompt = encode_prompt(tokenizer, question, num_visual_tokens, times)
    room = max_text_tokens - (len(prompt) - len(_video_ids(tokenizer, num_visual_tokens, times))) - 1
    if room < 0:
        raise DataError(
            f"max_text_tokens is {max_text_tokens}, but the prompt's text and the end token take "
            f"{max_text_tokens - room}: {question[:60]!r}"
        )
    answer_ids, cut = fit_answer(tokenizer, answer, room)
    target = [*answer_ids, *chat_pieces(tokenizer).turn_end]
    return {"input_ids": prompt + target, "labels": [IGNORE_INDEX] * len(prompt) + target}, cut


def pack_examples(examples: list[dict], placeholder: int) -> dict[str, list[int]]:
    """Examples of one clip (`encode_example`) in one row, behind the clip's tokens, which are there once.

    Returns {"input_ids", "labels", "owner"} of one length; owner: PREFIX up to the last visual token, which is the same
    in all examples, then the example's number.
    """
    first = examples[0]["input_ids"]
    n = len(first) - first[::-1].index(placeholder)
    row = {"input_ids": first[:n], "labels": [IGNORE_INDEX] * n, "owner": [PREFIX] * n}
    for k, example in enumerate(examples):
        row["input_ids"] = row["input_ids"] + example["input_ids"][n:]
        row["labels"] = row["labels"] + example["labels"][n:]
        row["owner"] = row["owner"] + [k] * (len(example["labels"]) - n)
    return row


def fit_answer(tokenizer, answer: str, room: int) -> tuple[list[int], bool]:
    """(ids, was it cut?): the answer within `room` tokens, cut at a sentence's end, else behind a word, else empty."""
    ids = _encode_text(tokenizer, answer, "the answer")
    if len(ids) <= room:
        return ids, False
    reach = len(tokenizer.decode(ids[:room], clean_up_tokenization_spaces=False))
    for end in (r"[.!?…][\"'”’)\]]*(?=\s)|[。！？]", r"\S(?=\s)"):
        for stop in reversed([match.end() for match in re.finditer(end, answer)]):
            if stop <= reach + 1:
                ids = tokenizer.encode(answer[:stop], add_special_tokens=False)
                if len(ids) <= room:
                    return ids, True
    return [], True


# ---------------------------------------------------------------------------------------------------------------------
# Frames


def frame_indices(num_total: int, num_frames: int) -> np.ndarray:
    """`num_frames` indices spread over a clip of `num_total` frames, both ends included; a short clip repeats some."""
    if num_total < 1 or num_frames < 1:
        raise DataError(f"cannot choose {num_frames} of {num_total} frames")
    return np.linspace(0, num_total - 1, num_frames).round().astype(int)


def spread_over_time(starts: np.ndarray, num_frames: int) -> np.ndarray:
    """Like `frame_indices`, but even in time where the frames are not: `starts` [N] are the frames' times in s."""
    gaps = np.diff(starts)
    if len(gaps) == 0 or gaps.max() <= VFR_RATIO * np.median(gaps):
        return frame_indices(len(starts), num_frames)
    times = np.linspace(starts[0], starts[-1], num_frames)
    right = np.searchsorted(starts, times).clip(1, len(starts) - 1)
    return np.where(times - starts[right - 1] <= starts[right] - times, right - 1, right)


def choose_video_reader(name: str = "auto") -> str:
    """Resolve the key `video_reader` and use that reader from now on, in the processes that this one starts too.

    auto: decord where it has wheels (x86-64 under Linux and Windows), elsewhere PyAV. Never a silent change from one
    to the other: their frames differ slightly. DataError where it is not installed.
    """
    if name == "auto":
        name = default_video_reader(platform.system(), platform.machine())
    module = {"decord": "decord", "pyav": "av"}[name]
    if importlib.util.find_spec(module) is None:
        other = {"decord": "pyav", "pyav": "decord"}[name]
        raise DataError(f"video_reader: {name} is not installed here; pip install {module}, or choose video_reader: "
                        f"{other} (frames then differ slightly, so use it in all stages)")
    os.environ["DRIVEVLM_VIDEO_READER"] = name
    return name


def video_reader_problems(config) -> list[str]:
    """`choose_video_reader` for a program: sets the config's `video_reader` to what it resolves to."""
    try:
        config.video_reader = choose_video_reader(config.video_reader)
    except DataError as error:
        return [str(error)]
    return []


def default_video_reader(system: str, machine: str) -> str:
    """The reader of a platform: system and machine as Python's `platform` names them."""
    return "decord" if (system, machine.lower()) in (("Linux", "x86_64"), ("Windows", "amd64")) else "pyav"


def video_reader() -> str:
    """The reader in use: decord or pyav."""
    return os.environ.get("DRIVEVLM_VIDEO_READER") or choose_video_reader()


class Clip:
    """A clip, open for reading; the only place that names video decoders. Use as a context manager.

        with Clip(path) as clip:             # a video file, or a folder of images
            clip.size                        # (width, height) of the frames, after the clip's rotation tag is applied
            clip.times                       # [N] float32: start of each frame in seconds
            clip.choose(16)                  # [16] indices, spread evenly over time, both ends included
            clip.frames([0, 4, 9])           # uint8 [3, H, W, 3] RGB

    `size`: (width, height) to decode to (squashed), else the clip's own. Raises VideoError for whatever goes wrong.
    """

    def __init__(self, path, size: tuple[int, int] | None = None):
        self.path = path = Path(path)
        if clip_state(path).size == 0:
            raise VideoError(path, "empty file (0 bytes)")
        self._reader = {"decord": DecordReader, "pyav": PyAVReader, "images": ImageReader}[_reader_of(path)]()
        with self._reading():
            self._reader.open(path, size)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._reader.close()

    @contextlib.contextmanager
    def _reading(self):
        try:
            yield
        except self._reader.errors as error:
            raise VideoError(self.path, _reason(error)) from error

    @functools.cached_property
    def times(self) -> np.ndarray:
        with self._reading():
            return self._reader.times()

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        height, width = self.frames([0]).shape[1:3]
        return width, height

    def choose(self, num_frames: int) -> np.ndarray:
        return spread_over_time(self.times, num_frames)

    def frames(self, indices) -> np.ndarray:
        with self._reading():
            return self._reader.frames([int(index) for index in indices])


class DecordReader:
    """decord: rotates by itself; a damaged clip can hang or crash it (`decode_frames`)."""

    def __init__(self):
        # At the end of a clip decord polls its own decoding thread: a sound 720p clip needs up to 2,048 polls, and a
        # busy machine more than an idle one; the default gives up at 10,240.
        os.environ.setdefault("DECORD_EOF_RETRY_MAX", "40960")
        import decord  # after torch, and only in the process that decodes: it can crash or hang otherwise

        decord.logging.set_level(decord.logging.QUIET)
        self.decord = decord
        self.errors = (RuntimeError, AssertionError, IndexError, decord.DECORDError, decord.DECORDLimitReachedError)

    def open(self, path, size):
        width, height = size or (-1, -1)
        self.reader = self.decord.VideoReader(str(path), ctx=self.decord.cpu(0), width=width, height=height,
                                              num_threads=1, fault_tol=1)

    def close(self):
        self.reader = None  # frees the decoder's buffers at once

    def times(self):
        return self.reader.get_frame_timestamp(np.arange(len(self.reader)))[:, 0]

    def frames(self, indices):
        return self.reader.get_batch(indices).asnumpy()


class PyAVReader:
    """PyAV: for platforms without decord. Frames are decoded in order, from the start again for an earlier one."""

    def __init__(self):
        import av

        av.logging.set_level(av.logging.PANIC)
        self.av, self.container, self.next_index = av, None, 0
        self.errors = (av.FFmpegError, ClipDamage, IndexError)

    def open(self, path, size):
        self.path, self.size = str(path), size
        try:
            self._start()
            self.starts, packets = [], 0  # presentation times, in units of the stream's time base
            for packet in self.container.demux(self.stream):
                packets += packet.size > 0
                if packet.size and packet.pts is not None and not packet.is_discard:
                    self.starts.append(packet.pts)
        except (self.av.FFmpegError, IndexError) as error:
            raise ClipDamage("not a readable video") from error
        if packets < self.stream.frames:
            raise ClipDamage("cut off: the file ends before its last frame")
        if not self.starts:
            raise ClipDamage("not a readable video")
        self.starts.sort()
        self._start()

    def _start(self):
        self.close()
        self.container = self.av.open(self.path)
        self.stream = self.container.streams.best("video") or self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1
        self.stream.codec_context.options = {"err_detect": "explode"}  # an error instead of made-up pixels
        self.decoder, self.next_index = self.container.decode(self.stream), 0

    def close(self):
        if self.container is not None:
            self.container.close()

    def times(self):
        return np.array([float((start - self.starts[0]) * self.stream.time_base) for start in self.starts], np.float32)

    def frames(self, indices):
        pictures = {index: self._picture(index) for index in sorted(set(indices))}
        return np.stack([pictures[index] for index in indices])

    def _picture(self, index):
        """One frame, uint8 [H, W, 3] RGB, rotated upright."""
        if not 0 <= index < len(self.starts):
            raise IndexError(f"frame {index} of {len(self.starts)}")
        if index < self.next_index:
            self._start()
        frame = None
        while self.next_index <= index:
            frame = next(self.decoder, None)
            if frame is None or frame.pts != self.starts[self.next_index]:
                raise ClipDamage("damaged: the last frames cannot be decoded" if frame is None else
                                 "damaged: frames are missing")
            self.next_index += 1
        turns = round(frame.rotation / 90) % 4  # quarter turns, counter-clockwise
        width, height = self.size or (None, None)
        if turns % 2:
            width, height = height, width
        picture = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BILINEAR")  # as decord's
        return np.ascontiguousarray(np.rot90(picture, turns))


class ClipDamage(Exception):
    """What PyAVReader or ImageReader finds wrong with a clip, in plain words."""


class ImageReader:
    """Pillow: a folder of images of one size, one a frame, in the order of the numbers in their names.

    Times come from IMAGE_TIMES: times.txt (a line for each image: seconds, increasing), else fps.txt (one number), else
    the images are IMAGE_FPS a second. Damage is named with its file, and with its line in a text.
    """

    errors = (ClipDamage, IndexError)

    def open(self, path, size):
        self.files, self.size = image_files(path), size
        self.starts = image_times(path, len(self.files))
        self.own_size = self._upright(self.files[0]).size
        for file in self.files:  # their headers: a clip is refused as a whole, whichever frames are asked for
            with _reading_image(file) as image:
                self._check_size(file, _upright_size(image))

    def close(self):
        pass  # no image stays open

    def times(self):
        return self.starts

    def frames(self, indices):
        pictures = {index: self._picture(index) for index in sorted(set(indices))}
        return np.stack([pictures[index] for index in indices])

    def _picture(self, index):
        """One frame, uint8 [H, W, 3] RGB, rotated upright."""
        if not 0 <= index < len(self.files):
            raise IndexError(f"frame {index} of {len(self.files)}")
        picture = self._upright(self.files[index])
        self._check_size(self.files[index], picture.size)  # of the pixels: some tags stand behind them
        return np.array(picture.resize(self.size, Resampling.BILINEAR) if self.size else picture)

    def _check_size(self, file, size):
        if size != self.own_size:
            raise ClipDamage(f"{file.name}: {size[0]}x{size[1]}, but {self.files[0].name} is "
                             f"{self.own_size[0]}x{self.own_size[1]}; the images of a clip have one size")

    def _upright(self, file):
        """The decoded image of a file, RGB, rotated as its EXIF data says."""
        with _reading_image(file) as image:
            if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
                raise ClipDamage(f"{file.name}: pixels of kind {image.mode}; 8 bits per colour are read")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
                raise ClipDamage(f"{file.name}: it has transparent pixels, whose colour is not known")
            return image.convert("RGB")


@contextlib.contextmanager
def _reading_image(file: Path):
    """The image in a file, its header read; ClipDamage for what is wrong with it, now or while its pixels are read."""
    try:
        with open_image(file, formats=("JPEG", "PNG")) as image:
            yield image
    except UnidentifiedImageError as error:
        raise ClipDamage(f"{file.name}: not a readable JPEG or PNG image") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, DecompressionBombError) as error:
        raise ClipDamage(f"{file.name}: damaged or not readable: {error}") from error


def _upright_size(image) -> tuple[int, int]:
    """(width, height) of an image of which only the header was read, as its EXIF data turns it."""
    turned = "exif" in image.info and image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def image_times(folder: Path, count: int) -> np.ndarray:
    """The times of a folder's `count` images in seconds from the first, float32 [count].

    Raises ClipDamage, which names file and line, where the text that says them is wrong.
    """
    name = next((name for name in IMAGE_TIMES if os.path.lexists(folder / name)), None)
    if name is None:
        return (np.arange(count) / IMAGE_FPS).astype(np.float32)
    numbers = _read_numbers(folder / name)
    if name == "fps.txt":
        if len(numbers) != 1 or not 0.001 <= numbers[0] <= 1000:
            raise ClipDamage(f"fps.txt line {min(len(numbers), 2) or 1}: one number is expected, images a second, from "
                             "0.001 to 1000")
        return (np.arange(count) / numbers[0]).astype(np.float32)
    if len(numbers) != count:
        raise ClipDamage(f"times.txt line {min(len(numbers), count) + 1}: {len(numbers)} lines for {count} images")
    starts = (np.array(numbers) - numbers[0]).astype(np.float32)
    for line, (one, other) in enumerate(itertools.pairwise(starts), start=2):
        if not one < other < np.inf:
            raise ClipDamage(f"times.txt line {line}: {numbers[line - 1]:.15g} does not come after "
                             f"{numbers[line - 2]:.15g}")
    return starts


def _read_numbers(file: Path) -> list[float]:
    """The numbers of a text, one a line. Raises ClipDamage with file and line."""
    numbers = []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ClipDamage(f"{file.name}: not readable: {error}") from error
    for line, text in enumerate(lines, start=1):
        try:
            numbers.append(float(text))
        except ValueError:
            numbers.append(float("nan"))
        if not np.isfinite(numbers[-1]):
            raise ClipDamage(f"{file.name} line {line}: not a number: {text[:40]!r}")
    return numbers


DECODER_REASONS = {  # words of decord's and FFmpeg's messages: what they mean
    "Error reading": "not a readable video",
    "av_read_frame failed": "cut off: the file ends before its last frame",
    "avcodec_send_packet": "damaged: a part of the stream cannot be decoded",
    "Invalid data found": "damaged: a part of the stream cannot be decoded",
    "duplicate frames": "damaged: frames are missing, decord would repeat others in their place",
    "Unable to handle EOF": "damaged: the last frames cannot be decoded",
}


def _reason(error: Exception) -> str:
    """A decoder's message in plain words, else its first line without source positions."""
    for words, reason in DECODER_REASONS.items():
        if words in str(error):
            return reason
    line = re.sub(r"\[[\d:]+\] \S+:\d+: ", "", str(error).strip().split("\n")[0])
    return line[:200] or type(error).__name__


class ClipState(NamedTuple):
    """What changes when a clip does: bytes of its files, and a file's time of change in ns; of a folder of images, a
    hash over names, sizes and times of change of all its images and of what says their times."""

    size: int
    changed: int | str


def clip_state(path) -> ClipState:
    """The state of a clip, of which cached files are made. Raises VideoError where there is no clip."""
    path = Path(path)
    if not os.path.isdir(path):
        found = _stat_file(path, path)
        return ClipState(found.st_size, found.st_mtime_ns)
    files = clip_files(path)
    found = [_stat_file(file, path) for file in files]
    lines = [[file.name, each.st_size, each.st_mtime_ns] for file, each in zip(files, found, strict=True)]
    return ClipState(sum(each.st_size for each in found), hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:32])


def clip_files(path) -> list[Path]:
    """What a clip is read from: its file, or a folder's images and IMAGE_TIMES. Raises VideoError as `image_files`."""
    path = Path(path)
    if not os.path.isdir(path):
        return [path]
    return image_files(path) + [path / name for name in IMAGE_TIMES if os.path.lexists(path / name)]


def image_files(folder) -> list[Path]:
    """The images of a folder in the order of the numbers in their names (2 before 10), as frames of one clip.

    Raises VideoError where there are none, where video files lie beside them (which are meant?), and where two have the
    same place (1.jpg and 01.png).
    """
    folder = Path(folder)
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise VideoError(folder, error.strerror or str(error)) from error
    images = sorted((name for name in names if _suffix(name) in IMAGE_SUFFIXES), key=_numbers_in)
    if not images:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise VideoError(folder, f"a folder without images ({suffixes})" if names else "empty folder")
    if videos := sorted(name for name in names if _suffix(name) in VIDEO_SUFFIXES):
        raise VideoError(folder, f"holds images ({images[0]}) and video files ({videos[0]}): which of them are meant?")
    for one, other in itertools.pairwise(images):
        if _numbers_in(one) == _numbers_in(other):
            raise VideoError(folder, f"{min(one, other)} and {max(one, other)} have the same place in the clip")
    return [folder / name for name in images]


def media_files(path) -> list[Path]:
    """The files that hold a clip's pictures, in their order: its file, or a folder's images. Raises VideoError."""
    return image_files(path) if os.path.isdir(path) else [Path(path)]


def is_clip(path) -> bool:
    """Is there a file, or a folder that directly holds images? Whether it can be read is another question."""
    try:
        return any(_suffix(name) in IMAGE_SUFFIXES for name in os.listdir(path))
    except OSError:  # no folder, or one that may not be read
        return os.path.isfile(path)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _is_of_images(name: str) -> bool:
    return name in IMAGE_TIMES or _suffix(name) in IMAGE_SUFFIXES


def _numbers_in(name: str) -> list:
    """Sorts names without their suffixes by the numbers in them; every second item is a number."""
    parts = re.split(r"(\d+)", PurePosixPath(name).stem)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def _reader_of(path: Path) -> str:
    """What reads a clip: images, or the video reader in use."""
    return "images" if os.path.isdir(path) else video_reader()


def _stat_file(file: Path, clip: Path) -> os.stat_result:
    """Size and times of a file of a clip; raises VideoError where it is none."""
    name = "" if file == clip else f"{file.name}: "
    try:
        found = file.stat()
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        raise VideoError(clip, name + ("no such file" if missing else error.strerror or str(error))) from error
    if not stat.S_ISREG(found.st_mode):
        raise VideoError(clip, f"{name}not a file")
    return found


def find_clips(folder) -> list[Path]:
    """The clips in a folder and the folders in it, sorted: video files by their suffixes, and folders of images. A
    folder that directly holds images is one clip itself.

    Raises DataError for a folder that holds images and clips: which of them are meant?
    """
    found = [Path(folder)] if is_clip(folder) else []
    for place, folders, names in os.walk(folder):
        found += [Path(place, name) for name in folders if is_clip(Path(place, name))]
        found += [Path(place, name) for name in names if _suffix(name) in VIDEO_SUFFIXES]
    found.sort()
    for one, other in itertools.pairwise(found):  # in this order, what is in a folder follows it
        if one in other.parents:
            raise DataError(f"{one} holds images and clips ({other.relative_to(one)}): which of them are meant? "
                            "Give the clips by their names")
    return found


def root_of_clips(folder) -> str:
    """The video root of what `find_clips` finds: the folder, or the one above it where it is a clip itself."""
    return os.path.dirname(os.path.abspath(folder)) if os.path.isdir(folder) and is_clip(folder) else str(folder)


def clip_seconds(path) -> float:
    """From the start of a clip's first frame to that of its last, in seconds. Raises VideoError."""
    with Clip(path) as clip:
        return float(clip.times[-1] - clip.times[0])


def read_frames(path, num_frames: int, size: int, window: tuple[float, float] | None = None) -> np.ndarray:
    """`num_frames` frames spread over the clip, RGB uint8 [T, size, size, 3], aspect squashed; raises VideoError.

    window: (begin, end) in seconds from the clip's first frame; only frames that start in it are taken.
    """
    if size < MIN_FRAME_SIZE:
        raise DataError(f"frames must be at least {MIN_FRAME_SIZE} px per side, not {size}: decord breaks smaller ones")
    with Clip(path, (size, size)) as clip:
        return clip.frames(_choose(clip, num_frames, window))


def read_times(path, num_frames: int, window: tuple[float, float] | None = None) -> tuple[float, ...]:
    """When each of the frames of `read_frames` starts [T], in seconds from the first of them; raises VideoError.

    In a window, the first one is not the clip's: a stretch is asked about like a clip of its own.
    """
    with Clip(path) as clip:
        starts = clip.times[_choose(clip, num_frames, window)]
        return tuple((starts - starts[0]).tolist())


def _choose(clip: Clip, num_frames: int, window: tuple[float, float] | None) -> np.ndarray:
    """Indices [T] of the frames to read."""
    if window is None:
        return clip.choose(num_frames)
    starts = clip.times - clip.times[0]
    inside = np.flatnonzero((starts >= window[0]) & (starts < window[1]))
    if len(inside) == 0:
        raise VideoError(clip.path, f"no frame starts between {window[0]:g} and {window[1]:g} s")
    return inside[spread_over_time(starts[inside], num_frames)]


def sample_clip(path, num_frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices [K], times [K] as fractions of the clip, and frames uint8 [K, H, W, 3] RGB at native size and aspect.

    The choice is the training's (`Clip.choose`); K < num_frames in clips that are shorter. Raises VideoError.
    """
    with Clip(path) as clip:
        indices = np.unique(clip.choose(num_frames))
        starts = clip.times
        times = (starts[indices] - starts[0]) / max(starts[-1] - starts[0], 1e-9)
        return indices, times, clip.frames(indices)


def decode_frames(path, num_frames: int, size: int, window: tuple[float, float] | None = None) -> np.ndarray:
    """`read_frames` in a process of its own, stopped after DECODE_TIMEOUT: a clip that hangs or crashes the decoder
    gives a VideoError too."""
    return _decode(path, lambda: read_frames(path, num_frames, size, window))


def decode_times(path, num_frames: int, window: tuple[float, float] | None = None) -> tuple[float, ...]:
    """`read_times` in a process of its own, as `decode_frames`."""
    return _decode(path, lambda: read_times(path, num_frames, window))


def _decode(path, read):
    result, failure = in_child(read, DECODE_TIMEOUT)
    if failure:
        raise VideoError(path, f"decoding {failure}")
    return result


def decode_sample(path, num_frames: int) -> tuple[float, np.ndarray, np.ndarray]:
    """(seconds of the clip, times [K], frames uint8 [K, H, W, 3]): `clip_seconds` and `sample_clip` in a process of
    their own, as in `decode_frames`."""
    return _decode(path, lambda: (clip_seconds(path), *sample_clip(path, num_frames)[1:]))


def cached_frames(path, num_frames: int, size: int, cache_dir, must_write: bool = False) -> np.ndarray:
    """`decode_frames` through the cache in folder `cache_dir` (None: no cache). Safe under many processes and machines.

    A file is identified by the clip's path and `clip_state` and by what was asked for. It is written under a
    temporary name and renamed (at worst, two processes both decode a clip); one that is damaged or holds
    something else is made again. Where the cache cannot be read or written, frames are decoded; with `must_write`, a
    file that cannot be written is an OSError instead. Raises VideoError.
    """
    if cache_dir is None:
        return decode_frames(path, num_frames, size)
    file, key = _cache_place(path, num_frames, size, cache_dir)
    try:
        frames = _read_cache(file, key, (num_frames, size, size, 3))
    except OSError as error:
        _warn_of_cache("read", cache_dir, error)
        frames = None
    if frames is None:
        frames = decode_frames(path, num_frames, size)
        try:
            _write_cache(file, key, frames)
        except OSError as error:
            if must_write:
                raise
            _warn_of_cache("write", cache_dir, error)
    return frames


def cached_times(path, num_frames: int, cache_dir) -> tuple[float, ...]:
    """`decode_times` through the cache, where a clip's times have a small file of their own: frames that were stored
    before stay valid. Raises VideoError."""
    if cache_dir is None:
        return decode_times(path, num_frames)
    file, key = _cache_place(path, num_frames, "times", cache_dir)
    file = file.with_suffix(".times")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["key"] == key and len(stored["times"]) == num_frames:
            return tuple(map(float, stored["times"]))
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        pass  # none, or damaged
    except OSError as error:
        _warn_of_cache("read", cache_dir, error)
    times = decode_times(path, num_frames)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"key": key, "times": times})
    except OSError as error:
        _warn_of_cache("write", cache_dir, error)
    return times


def add_times(entries: list[Entry], num_frames: int, video_root, cache_dir) -> list[Entry]:
    """The entries with the times of the frames that a model reads; () where the clip cannot be read, which
    `check_times` reports when it is its turn."""
    times = {}
    for video in {entry.video: None for entry in entries}:
        try:
            times[video] = cached_times(resolve_video(video_root, video), num_frames, cache_dir)
        except VideoError:
            times[video] = ()
    return [dataclasses.replace(entry, times=times[entry.video]) for entry in entries]


def check_times(entry: Entry) -> None:
    """VideoError where `add_times` could not read the clip: its prompt would lack the times. To be called once its
    frames were read, which as a rule says more about what is wrong with it."""
    if entry.times == ():
        raise VideoError(entry.video, "the times of its frames could not be read at the start")


def _warn_of_cache(what: str, cache_dir, error: OSError) -> None:
    """Say once per process that the cache cannot be read or written."""
    if what not in _warned_of_cache:
        _warned_of_cache.add(what)
        print(f"frame_cache: cannot {what} {cache_dir}: {error.strerror or error}; clips are decoded each time",
              flush=True)


_warned_of_cache = set()


def _cache_place(path, num_frames: int, size: int | str, cache_dir) -> tuple[Path, str]:
    """(cache file, the key that it must hold); raises VideoError where there is no clip."""
    path = Path(path).resolve()
    key = json.dumps([str(path), *clip_state(path), num_frames, size, _reader_of(path)])
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return Path(cache_dir) / name[:2] / f"{name}.frames", key


def _read_cache(file: Path, key: str, shape: tuple) -> np.ndarray | None:
    """The frames of a cache file that is whole and was made for `key`, else None."""
    frames = np.empty(shape, np.uint8)
    try:
        with open(file, "rb") as stored:  # read(), not mmap: truncating a mapped file raises SIGBUS
            head = stored.readline(65536)
            whole = stored.readinto(frames.reshape(-1)) == frames.nbytes and not stored.read(1)
    except FileNotFoundError:
        return None
    return frames if whole and head == _cache_head(key, frames) else None


def _cache_head(key: str, frames: np.ndarray) -> bytes:
    return json.dumps({"key": key, "crc32": zlib.crc32(frames)}).encode() + b"\n"


def _write_cache(file: Path, key: str, frames: np.ndarray) -> None:
    """One line of JSON, then the pixels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary, open(temporary, "wb") as stored:
        stored.write(_cache_head(key, frames))
        stored.write(frames.data)


class ClipTensors:
    """One tensor per clip, made of its frames by frozen parts of a model, in a folder as one file per clip.

    A clip is processed alone (a batch would round differently) and read back after writing, so that a run that makes
    the tensors and one that finds them are equal to the bit. The file's name depends on all that decides its content:
    `made_by` (a text that names the frozen parts) and the clip's path and `clip_state`. `shape`: that of the tensors.
    Holds no model, so that data loader workers can have a copy.
    """

    def __init__(self, folder, made_by: str, shape: tuple, video_root, num_frames: int, image_size: int, frame_cache):
        self.folder, self.made_by, self.shape, self.video_root = Path(folder), made_by, tuple(shape), video_root
        self.num_frames, self.image_size, self.frame_cache = num_frames, image_size, frame_cache

    def make(self, video: str, compute) -> torch.Tensor:
        """The tensor of a clip, made with `compute` (frames uint8 [1, T, S, S, 3] -> [1, ...]) where it is not there.

        VideoError where the clip cannot be read, OSError where the file cannot be written.
        """
        path, file = self._place(video)
        tensor = self._load(file)
        if tensor is None:
            frames = cached_frames(path, self.num_frames, self.image_size, self.frame_cache)
            with torch.no_grad():
                tensor = compute(torch.from_numpy(frames)[None])[0]
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as temporary, open(temporary, "wb") as stored:
                stored.write(safetensors.torch.save({"tensor": tensor.cpu().contiguous()}))
            tensor = self._load(file)
        return tensor

    def read(self, video: str) -> torch.Tensor:
        """The tensor of a clip; VideoError where none was made."""
        path, file = self._place(video)
        tensor = self._load(file)
        if tensor is None:
            decode_frames(path, self.num_frames, self.image_size)  # says what is wrong with the clip
            raise VideoError(path, f"{self.folder} holds nothing for it: unreadable at the start, or changed since")
        return tensor

    def _place(self, video: str) -> tuple[Path, Path]:
        """(the clip's file, the tensor's file)"""
        path = resolve_video(self.video_root, video)
        state = clip_state(path)
        key = f"{self.made_by} {path} {state.size} {state.changed}"
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return path, self.folder / name[:2] / f"{name}.safetensors"

    def _load(self, file: Path) -> torch.Tensor | None:
        """What a file holds; None where it is not there, or damaged."""
        try:
            tensor = safetensors.torch.load(file.read_bytes())["tensor"]
        except (FileNotFoundError, safetensors.SafetensorError, KeyError):
            return None
        return tensor if tuple(tensor.shape) == self.shape else None


# ---------------------------------------------------------------------------------------------------------------------
# What a data loader needs


def group_by_clip(entries: list[Entry]) -> list[list[Entry]]:
    """Entries of the same clip together, in the order of their first."""
    clips = {}
    for entry in entries:
        clips.setdefault(entry.video, []).append(entry)
    return list(clips.values())


class VideoInstructDataset(Dataset):
    """Examples for training and evaluation; `ds[(epoch, index)]`, or `ds[index]` for epoch 0.

    An example is {"id", "frames" uint8 [T, S, S, 3], "input_ids", "labels" (lists of one length), "cut" (answers that
    did not fit)}; with `features` (the tower's, as ClipTensors), it has "features" [T, P, Dv] instead of frames. A clip
    that cannot be read is never replaced by another: its example has "error" ("path: reason"), zeros for frames and no
    supervised token, and `collate` leaves it out. Question, caption variant and augmentation (`augment`; None: as
    `train`) depend on (seed, epoch, id) alone; with `train=False`, they are the entry's own and `captions[0]`.

    shared_prefix: an example holds all of a clip's entries in one row, with "owner" (`pack_examples`); the clip is
    augmented as the first entry's is without.
    """

    def __init__(
        self, entries: list[Entry], tokenizer, *, video_root, num_frames: int, image_size: int,
        num_visual_tokens: int, max_text_tokens: int, cache_dir=None, seed: int = 0, train: bool = True,
        augment: bool | None = None, features: ClipTensors | None = None, wordings: float = 0.5,
        shared_prefix: bool = False,
    ):
        self.entries, self.tokenizer, self.video_root = entries, tokenizer, Path(video_root)
        self.shared_prefix = shared_prefix
        self.rows = group_by_clip(entries) if shared_prefix else [[entry] for entry in entries]
        self.num_frames, self.image_size, self.cache_dir = num_frames, image_size, cache_dir
        self.num_visual_tokens, self.max_text_tokens = num_visual_tokens, max_text_tokens
        self.seed, self.train, self.features, self.wordings = seed, train, features, wordings
        self.augment = train if augment is None else augment

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        row = self.rows[index]
        # seeded by a text: the same in every process
        draws = [random.Random(f"{self.seed}/{epoch}/{entry.id}") for entry in row]
        examples, cut = [], 0
        for entry, draw in zip(row, draws, strict=True):
            caption = draw.choice(entry.captions) if self.train else entry.captions[0]
            question = draw_question(entry, self.seed, epoch, self.wordings) if self.train else entry.question
            example, was_cut = _encode_example(self.tokenizer, question, caption, self.num_visual_tokens,
                                               self.max_text_tokens, entry.times)
            examples.append(example)
            cut += was_cut
        example = pack_examples(examples, placeholder_id(self.tokenizer)) if self.shared_prefix else examples[0]
        name = ", ".join(entry.id for entry in row)
        try:
            clip = self._read(row[0].video, draws[0])
            check_times(row[0])
        except VideoError as error:
            example["labels"] = [IGNORE_INDEX] * len(example["labels"])
            return {"id": name, "error": str(error), "cut": 0, **self._nothing(), **example}
        return {"id": name, "cut": cut, **clip, **example}

    def _read(self, video: str, draw: random.Random) -> dict[str, torch.Tensor]:
        """The clip of an example, as frames or features."""
        if self.features is not None:
            return {"features": self.features.read(video)}
        path = resolve_video(self.video_root, video)
        frames = cached_frames(path, self.num_frames, self.image_size, self.cache_dir)
        return {"frames": torch.from_numpy(augment(frames, draw) if self.augment else frames)}

    def _nothing(self) -> dict[str, torch.Tensor]:
        """What stands for a clip that cannot be read."""
        if self.features is not None:
            return {"features": torch.zeros(self.features.shape)}
        return {"frames": torch.zeros(self.num_frames, self.image_size, self.image_size, 3, dtype=torch.uint8)}


def augment(frames: np.ndarray, draw: random.Random) -> np.ndarray:
    """Other brightness and contrast, the same for all frames. Nothing that changes a fact: no hue (a red light stays
    red), no mirroring (left stays left), no crop (what a caption names stays in the picture)."""
    contrast, brightness = draw.uniform(0.85, 1.15), draw.uniform(-20.0, 20.0)
    levels = (np.arange(256) - 128.0) * contrast + 128.0 + brightness
    return levels.clip(0, 255).round().astype(np.uint8)[frames]


def collate(examples: list[dict], pad_token_id: int) -> dict:
    """One batch, padded on the right to its longest row. Examples with an error are left out and listed.

    Returns {"frames" uint8 [B, T, S, S, 3] or "features" [B, T, P, Dv], "input_ids" [B, L], "attention_mask" [B, L],
    "labels" [B, L], "ids", "num_cut" (answers that did not fit), "errors"}, with "owner" [B, L] where the examples have
    it. If every example failed, the first is kept: it supervises nothing, so its loss is zero, with a graph.
    """
    rows = [example for example in examples if "error" not in example] or examples[:1]
    length = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORE_INDEX)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        input_ids[i, :n] = torch.tensor(row["input_ids"])
        attention_mask[i, :n] = 1
        labels[i, :n] = torch.tensor(row["labels"])
    owner = {}
    if "owner" in rows[0]:
        owner["owner"] = torch.tensor([row["owner"] + [NOBODY] * (length - len(row["owner"])) for row in rows])
    seen = "features" if "features" in rows[0] else "frames"
    return {
        **owner,
        seen: torch.stack([row[seen] for row in rows]),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "ids": [row["id"] for row in rows],
        "num_cut": sum(row.get("cut", 0) for row in rows),
        "errors": [example["error"] for example in examples if "error" in example],
    }
