"""Clips and captions: rows -> entries -> token ids, labels and frames.

The file reads top to bottom: the rows that are accepted (`load_entries`), the split (`split_by_video`), the one
renderer of a conversation (`encode_prompt`, `encode_example`), the frames of a clip and their cache (`read_frames`,
`cached_frames`), and what a data loader needs (`VideoInstructDataset`, `collate`, `EpochSampler`).
"""

import contextlib
import csv
import functools
import hashlib
import json
import os
import posixpath
import random
import re
import tempfile
import time
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch.utils.data import Dataset, Sampler

IGNORE_INDEX = -100
MODES = {
    "microscope": "Describe the video in detail.",
    "copilot": "Summarize the driving scene concisely.",
}
MIN_FRAME_SIZE = 56  # decord's scaler returns broken frames below this
LOCK_TIMEOUT = 600.0  # seconds to wait for another process that decodes the same clip
BROKEN_TEXT = re.compile("[\ufffd\ud800-\udfff]")  # what a wrong decoding leaves behind
VFR_RATIO = 1.5  # longest over median frame interval, above which a clip counts as variable frame rate


class DataError(ValueError):
    """Something is wrong with the rows, the texts or the settings; the message lists every problem found."""


class RowError(DataError):
    """One row is wrong: `code` is the stable word that `check_dataset.py` reports."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class VideoError(RuntimeError):
    """A clip cannot be read."""

    def __init__(self, path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self):  # crosses process borders whole
        return VideoError, (self.path, self.reason)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@dataclass(frozen=True)
class Entry:
    """One clip in one granularity. `captions` are variants of one answer; the first is the original."""

    id: str  # "<video path without suffix>#<mode>"
    video: str  # as the row gives it, relative to the video root
    mode: str
    question: str
    captions: tuple[str, ...]


def load_entries(path, default_mode: str | None = None) -> list[Entry]:
    """Entries of a JSON, JSONL or BDD-X CSV file, or of a folder of them, in file order.

    `default_mode` is given to rows whose mode neither their `mode` key nor their question tells.
    Raises DataError naming every bad row.
    """
    entries, problems = [], []
    for where, row in read_rows(path):
        try:
            entries.extend(parse_row(row, default_mode))
        except RowError as error:
            problems.append(f"{where}: {error}")
    if problems:
        more = f"\n  ... and {len(problems) - 20:,} more" if len(problems) > 20 else ""
        raise DataError(f"{path}: {len(problems):,} bad rows\n  " + "\n  ".join(problems[:20]) + more)
    if not entries:
        raise DataError(f"{path}: no rows")
    return entries


def read_rows(path) -> Iterator[tuple[str, object]]:
    """Yield ("file row N", row) for every row, N counted from 1; what is no JSON or no text comes as a RowError."""
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
    """The rows, one in memory at a time."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as text:
            if file.suffix.lower() == ".csv":
                yield from csv.DictReader(text)
            elif text.read(4096).lstrip()[:1] == "[":
                text.seek(0)
                yield from _items_of_list(text)
            else:
                text.seek(0)
                yield from (_row_of_line(line) for line in text if line.strip())
    except UnicodeDecodeError as error:
        yield RowError("bad_unicode", f"from about here the file is no UTF-8 text ({error.reason})")


def _items_of_list(text, step: int = 1 << 20) -> Iterator[object]:
    """Parse a JSON list piece by piece."""
    parse, lead, close = json.JSONDecoder().raw_decode, re.compile(r"\s*\[\s*"), re.compile(r"\s*\[\s*\]")
    buffer, at, chunk = text.read(step), 0, step
    while not close.match(buffer, at):
        try:
            mark = lead.match(buffer, at)
            if not mark:
                raise json.JSONDecodeError("expected ',' or ']'", buffer, at)
            row, end = parse(buffer, mark.end())
        except json.JSONDecodeError as error:  # a mistake, or a row that goes on in the next piece
            more = text.read(chunk)
            if not more:
                yield RowError("unknown_format", f"not valid JSON: {error.msg} at {buffer[error.pos:][:40]!r}")
                return
            buffer, at, chunk = buffer[at:] + more, 0, 2 * chunk
        else:
            yield row
            lead, close, at, chunk = re.compile(r"\s*,\s*"), re.compile(r"\s*\]"), end, step


def _row_of_line(line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return RowError("unknown_format", f"not valid JSON: {error}")


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
    if "microscope" in row or "copilot" in row:
        return [
            _entry(video, mode, question, row[mode], mode)
            for mode, question in MODES.items()
            if mode in row
        ]
    if "conversations" in row or "messages" in row:
        question, captions = _from_conversation(row)
    elif "q" in row and "captions" in row:
        question, captions = row["q"], row["captions"]
    elif "q" in row and "a" in row:
        question, captions = row["q"], [row["a"]]
    else:
        raise RowError("unknown_format", f"no known form of row (keys seen: {_keys(row)})")
    if not isinstance(question, str) or not question.strip():
        raise RowError("empty_question", f"the question of {video} is empty or no text")
    question = clean_text(question, "question")
    return [_entry(video, find_mode(row, question, default_mode), question, captions, "captions")]


def find_mode(row: dict, question: str, default_mode: str | None) -> str:
    """The row's `mode`, else the mode whose standard question this is, else `default_mode`; else a RowError."""
    by_question = {text: mode for mode, text in MODES.items()}
    mode = row.get("mode", by_question.get(question, default_mode))
    if mode not in MODES:
        told = f'"mode" is {mode!r}' if "mode" in row else f'no "mode", and {question[:60]!r} is no standard question'
        raise RowError("unknown_mode", f"{told}; modes are {', '.join(MODES)} (default_mode can set one)")
    return mode


def _entry(video: str, mode: str, question: str, captions, key: str) -> Entry:
    if not isinstance(captions, list):
        raise RowError("empty_caption", f'"{key}" of {video} must be a list of texts, not {type(captions).__name__}')
    if not captions:
        raise RowError("empty_caption", f'"{key}" of {video} is an empty list')
    for number, caption in enumerate(captions, start=1):
        if not isinstance(caption, str) or not caption.strip():
            raise RowError("empty_caption", f"caption {number} of {video} is empty or no text: {caption!r}")
    captions = tuple(clean_text(caption, f"caption of {video}") for caption in captions)
    return Entry(f"{unicodedata.normalize('NFC', video_stem(video))}#{mode}", video, mode, question, captions)


def video_stem(video: str) -> str:
    """The video's path without its suffix."""
    return posixpath.splitext(posixpath.normpath(video))[0]


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
        raise RowError("multi_turn", f"{len(turns)} turns; one question and one answer are wanted, a row for each")
    if len(turns) < 2 or who[0] not in ("human", "user") or who[1] not in ("gpt", "assistant"):
        raise RowError("unknown_format", f"turns must be human (user), then gpt (assistant); seen: {who}")
    if not isinstance(texts[0], str):
        raise RowError("empty_question", f"the question is no text: {texts[0]!r}")
    question = re.sub(r"^\s*<(video|image)>", "", texts[0])
    if re.search(r"<(video|image)>", question):
        raise RowError("unknown_format", "more than one <video> or <image>, or one that does not lead the question")
    return question, [texts[1]]


def _from_bddx(row: dict) -> dict:
    """A BDD-X line as a Copilot row: its actions and justifications in the order of time."""
    segments = []
    for key, action in row.items():
        number = re.fullmatch(r"Answer\.(\d+)action", key or "")
        if not number or not (action or "").strip():
            continue
        start = (row.get(f"Answer.{number[1]}start") or "").strip()
        try:
            seconds = float(start) if start else float("inf")
        except ValueError as error:
            raise RowError("unknown_format", f"Answer.{number[1]}start is no number: {start!r}") from error
        why = (row.get(f"Answer.{number[1]}justification") or "").strip()
        segments.append((seconds, int(number[1]), f"{action.strip()} {why}".strip().rstrip(".") + "."))
    video = PurePosixPath((row["Input.Video"] or "").strip().split("?")[0]).name  # the end of a URL
    return {"video": video, "copilot": [" ".join(text for *_, text in sorted(segments))]}


# ---------------------------------------------------------------------------------------------------------------------
# Split


def split_by_video(entries: list[Entry], num_val_videos: int = 40, seed: int = 42, video_root=None):
    """(train, val) entries: `num_val_videos` clips, chosen by `seed`, are held out with all their entries.

    Clips are told apart by their resolved path where `video_root` is given (a link and its target are one clip), else
    by their normalized path; both give the same split where there are no links.
    """
    clip_of = {entry.video: None for entry in entries}
    for video in clip_of:
        clip_of[video] = clip_key(video, video_root)
    clips = sorted(set(clip_of.values()))
    if not 0 <= num_val_videos < len(clips):
        raise DataError(f"num_val_videos is {num_val_videos}, but there are {len(clips)} clips: none left to train on")
    random.Random(seed).shuffle(clips)
    held_out = set(clips[:num_val_videos])
    train = [entry for entry in entries if clip_of[entry.video] not in held_out]
    return train, [entry for entry in entries if clip_of[entry.video] in held_out]


def clip_key(video: str, video_root=None) -> str:
    """One text for one clip, however a row spells its path; relative to the video root."""
    if video_root is not None:
        video = str(resolve_video(video_root, video))[len(_real_root(str(video_root))) + 1 :]
    return unicodedata.normalize("NFC", posixpath.normpath(video))


def resolve_video(video_root, video: str) -> Path:
    """The clip's real path; raises RowError (`path_escape`) where it leads, by text or by link, out of the root."""
    if "\0" in video or "\\" in video or "://" in video or video.startswith(("/", "~")):
        raise RowError("path_escape", f"{video!r} must be a plain path relative to the video root")
    root = _real_root(str(video_root))
    path = os.path.realpath(os.path.join(root, video))
    if not video.isascii() and not os.path.exists(path):  # macOS writes names as NFD, captions files hold mostly NFC
        spellings = [os.path.realpath(os.path.join(root, unicodedata.normalize(f, video))) for f in ("NFC", "NFD")]
        path = next(filter(os.path.exists, spellings), path)
    if not path.startswith(root + os.sep):
        raise RowError("path_escape", f"{video!r} leads out of the video root {root}")
    return Path(path)


@functools.lru_cache(maxsize=16)
def _real_root(video_root: str) -> str:
    return os.path.realpath(video_root)


# ---------------------------------------------------------------------------------------------------------------------
# The conversation: one renderer for training, evaluation, rollouts and generate.py


@dataclass(frozen=True)
class ChatPieces:
    """Token ids around question and answer, in the order in which they stand in a conversation."""

    before_user: tuple[int, ...]  # bos (if the template writes one) and the user turn's head
    vision_start: tuple[int, ...]  # empty where the tokenizer has no such token
    vision_end: tuple[int, ...]
    after_user: tuple[int, ...]  # the user turn's end and the answer's head
    turn_end: tuple[int, ...]  # the token that ends an answer: always exactly one
    placeholder: int  # stands once for each visual token


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
        # A hybrid model's template then writes the empty thought that makes it answer at once; others ignore the key.
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=prompt, enable_thinking=False
        )

    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template: choose a language model that was tuned to chat")
    before, found, after_user = render(question, prompt=True).partition(question)
    if not found or question in after_user:
        raise DataError("the tokenizer's chat template does not write the user's text exactly once")
    # The head of a user turn is what a second turn adds behind the first answer: a system turn and its like, which
    # some templates put before the first, are dropped with all else that stands there.
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
    """The token that visual tokens take the place of; its own embedding is never read."""
    for name in ("<|video_pad|>", "<|image_pad|>"):
        if name in added:
            return added[name]
    taken = used | {added.get("<|vision_start|>"), added.get("<|vision_end|>")}
    taken |= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    free = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special and number not in taken]
    if not free:
        raise DataError("the tokenizer has no special token left to stand for the video: add one to it first")
    return max(free)


def placeholder_id(tokenizer) -> int:
    """The id that stands once for each visual token: <|video_pad|>, <|image_pad|>, or the last free special token."""
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


def _encode_text(tokenizer, text: str, what: str) -> list[int]:
    control = find_control_text(tokenizer, text)
    if control:
        raise DataError(f"{what} spells out the control token {control}: {text[:80]!r}")
    return tokenizer.encode(text, add_special_tokens=False)


def encode_prompt(tokenizer, question: str, num_visual_tokens: int) -> list[int]:
    """Ids of everything before the answer: user turn's head, the video's placeholders, question, answer's head."""
    pieces = chat_pieces(tokenizer)
    video = [*pieces.vision_start, *[pieces.placeholder] * num_visual_tokens, *pieces.vision_end]
    return [*pieces.before_user, *video, *_encode_text(tokenizer, question, "the question"), *pieces.after_user]


def encode_example(tokenizer, question: str, answer: str, num_visual_tokens: int, max_text_tokens: int) -> dict:
    """{"input_ids", "labels"}: lists of one length; labels are IGNORE_INDEX but for the answer and its end token.

    `max_text_tokens` counts all tokens but the visual ones. An answer that does not fit is cut (`fit_answer`); the
    end token always stays. Raises DataError where not even that has room, and for control tokens in the texts.
    """
    prompt = encode_prompt(tokenizer, question, num_visual_tokens)
    room = max_text_tokens - (len(prompt) - num_visual_tokens) - 1
    if room < 0:
        raise DataError(
            f"max_text_tokens is {max_text_tokens}, but the prompt's text and the end token take "
            f"{max_text_tokens - room}: {question[:60]!r}"
        )
    answer_ids, _ = fit_answer(tokenizer, answer, room)
    target = [*answer_ids, *chat_pieces(tokenizer).turn_end]
    return {"input_ids": prompt + target, "labels": [IGNORE_INDEX] * len(prompt) + target}


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


@contextlib.contextmanager
def open_clip(path, width: int = -1, height: int = -1):
    """A decord reader of the clip at `path`; whatever fails while it is open becomes a VideoError.

    `width`, `height`: size to decode to (squashed, after the clip's rotation tag is applied), else the clip's own.
    """
    path = Path(path)
    if not path.is_file():
        raise VideoError(path, "no such file" if not path.exists() else "not a file")
    if path.stat().st_size == 0:
        raise VideoError(path, "empty file (0 bytes)")
    # At the end of a clip decord polls its own decoding thread: a sound 720p clip needs up to 2,048 polls, and a busy
    # machine more than an idle one; the default gives up at 10,240.
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", "40960")
    import decord  # after torch, and not before a worker needs it: it can crash or hang otherwise

    decord.logging.set_level(decord.logging.QUIET)
    try:
        yield decord.VideoReader(
            str(path), ctx=decord.cpu(0), width=width, height=height, num_threads=1, fault_tol=1
        )
    except VideoError:
        raise
    except (RuntimeError, AssertionError, IndexError, decord.DECORDError, decord.DECORDLimitReachedError) as error:
        raise VideoError(path, _reason(error)) from error


DECORD_REASONS = {  # words of decord's messages: what they mean
    "Error reading": "not a readable video",
    "av_read_frame failed": "cut off: the file ends before its last frame",
    "avcodec_send_packet": "damaged: a part of the stream cannot be decoded",
    "duplicate frames": "damaged: frames are missing, decord would repeat others in their place",
    "Unable to handle EOF": "damaged: the last frames cannot be decoded",
}


def _reason(error: Exception) -> str:
    """decord's message in plain words, else its first line without source positions."""
    for words, reason in DECORD_REASONS.items():
        if words in str(error):
            return reason
    line = re.sub(r"\[[\d:]+\] \S+:\d+: ", "", str(error).strip().split("\n")[0])
    return line[:200] or type(error).__name__


def read_frames(path, num_frames: int, size: int) -> np.ndarray:
    """`num_frames` frames spread over the clip, RGB uint8 [T, size, size, 3], aspect squashed; raises VideoError."""
    if size < MIN_FRAME_SIZE:
        raise DataError(f"frames must be at least {MIN_FRAME_SIZE} px a side, not {size}: decord breaks smaller ones")
    with open_clip(path, size, size) as reader:
        starts = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0]
        return reader.get_batch(spread_over_time(starts, num_frames).tolist()).asnumpy()


def cached_frames(path, num_frames: int, size: int, cache_dir) -> np.ndarray:
    """`read_frames` through the cache in folder `cache_dir` (None: decode). Safe under many processes and machines.

    A file is known by the clip's path, size and time of change and by what was asked for; it is written beside its
    place and renamed, and one that is damaged or holds something else is made again. Raises VideoError.
    """
    if cache_dir is None:
        return read_frames(path, num_frames, size)
    file, key = _cache_place(path, num_frames, size, cache_dir)
    shape = (num_frames, size, size, 3)
    frames = _read_cache(file, key, shape)
    if frames is not None:
        return frames
    locks = Path(cache_dir) / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(locks / f"{file.name[:3]}.lock", timeout=LOCK_TIMEOUT):
            frames = _read_cache(file, key, shape)  # another process may have made it while we waited
            if frames is None:
                frames = read_frames(path, num_frames, size)
                if _has_room(str(cache_dir), frames.nbytes, int(time.monotonic() / 30)):
                    _write_cache(file, key, frames)
    except Timeout as error:
        raise VideoError(path, f"another process has been decoding for {LOCK_TIMEOUT:.0f} s") from error
    return frames


def is_cached(path, num_frames: int, size: int, cache_dir) -> bool:
    """Is there a cache file for this clip and these settings? Its content is checked when it is read."""
    return _cache_place(path, num_frames, size, cache_dir)[0].is_file()


def _cache_place(path, num_frames: int, size: int, cache_dir) -> tuple[Path, str]:
    """(cache file, the text that tells what it must hold); raises VideoError where there is no clip."""
    path = Path(path).resolve()
    if not path.is_file():
        raise VideoError(path, "no such file" if not path.exists() else "not a file")
    stat = path.stat()
    key = json.dumps([str(path), stat.st_size, stat.st_mtime_ns, num_frames, size, "decord"])
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return Path(cache_dir) / name[:2] / f"{name}.frames", key


def _read_cache(file: Path, key: str, shape: tuple) -> np.ndarray | None:
    """The frames of a cache file that is whole and was made for `key`, else None."""
    frames = np.empty(shape, np.uint8)
    try:
        with open(file, "rb") as stored:  # read, not mapped: a mapped file that changes on a shared disk kills us
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
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", suffix=".tmp", delete=False) as temporary:
        temporary.write(_cache_head(key, frames))
        temporary.write(frames.data)
    os.replace(temporary.name, file)


def cache_size(cache_dir) -> tuple[int, int]:
    """(files, bytes) of the frames in a cache folder."""
    sizes = [file.stat().st_size for file in Path(cache_dir).glob("??/*.frames")]
    return len(sizes), sum(sizes)


def limit_cache(cache_dir, gigabytes: float | None) -> None:
    """Let a cache folder grow to `gigabytes` (None: without limit). The limit is kept in the folder, so that all who
    share it obey; clips that find no room are decoded each time. Also removes what killed processes left half written.
    """
    file = Path(cache_dir) / "limit_gb"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("" if gigabytes is None else str(gigabytes), encoding="utf-8")
    for left in Path(cache_dir).glob("??/.*.tmp"):
        if time.time() - left.stat().st_mtime > 2 * LOCK_TIMEOUT:
            left.unlink()
    _has_room.cache_clear()


@functools.lru_cache(maxsize=4)
def _has_room(cache_dir: str, num_bytes: int, _half_minute: int) -> bool:
    # Counting a big cache takes a second: one answer holds for half a minute, so the limit can be passed by what
    # is decoded in that time.
    limit = Path(cache_dir) / "limit_gb"
    text = limit.read_text(encoding="utf-8") if limit.is_file() else ""
    return not text or cache_size(cache_dir)[1] + num_bytes <= float(text) * 1e9


# ---------------------------------------------------------------------------------------------------------------------
# What a data loader needs


class VideoInstructDataset(Dataset):
    """Examples for training and evaluation; `ds[(epoch, index)]`, or `ds[index]` for epoch 0.

    An example is {"id", "frames" uint8 [T, S, S, 3], "input_ids", "labels" (lists of one length)}. A clip that cannot
    be read is never replaced by another: its example has "error" ("path: reason"), black frames and no supervised
    token, and `collate` leaves it out. Caption variant and augmentation depend on (seed, epoch, id) alone; with
    `train=False` the answer is `captions[0]` and frames stay as they are.
    """

    def __init__(
        self, entries: list[Entry], tokenizer, *, video_root, num_frames: int, image_size: int,
        num_visual_tokens: int, max_text_tokens: int, cache_dir=None, seed: int = 0, train: bool = True,
    ):
        self.entries, self.tokenizer, self.video_root = entries, tokenizer, Path(video_root)
        self.num_frames, self.image_size, self.cache_dir = num_frames, image_size, cache_dir
        self.num_visual_tokens, self.max_text_tokens = num_visual_tokens, max_text_tokens
        self.seed, self.train = seed, train

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        entry = self.entries[index]
        draw = random.Random(f"{self.seed}/{epoch}/{entry.id}")  # seeded by the text: the same in every process
        caption = draw.choice(entry.captions) if self.train else entry.captions[0]
        example = encode_example(
            self.tokenizer, entry.question, caption, self.num_visual_tokens, self.max_text_tokens
        )
        try:
            path = resolve_video(self.video_root, entry.video)
            frames = cached_frames(path, self.num_frames, self.image_size, self.cache_dir)
        except VideoError as error:
            example["labels"] = [IGNORE_INDEX] * len(example["labels"])
            black = torch.zeros(self.num_frames, self.image_size, self.image_size, 3, dtype=torch.uint8)
            return {"id": entry.id, "error": str(error), "frames": black, **example}
        if self.train:
            frames = augment(frames, draw)
        return {"id": entry.id, "frames": torch.from_numpy(frames), **example}


def augment(frames: np.ndarray, draw: random.Random) -> np.ndarray:
    """Other brightness and contrast, the same for all frames. Nothing that changes a fact: no hue (a red light stays
    red), no mirroring (left stays left), no crop (what a caption names stays in the picture)."""
    contrast, brightness = draw.uniform(0.85, 1.15), draw.uniform(-20.0, 20.0)
    levels = (np.arange(256) - 128.0) * contrast + 128.0 + brightness
    return levels.clip(0, 255).round().astype(np.uint8)[frames]


def collate(examples: list[dict], pad_token_id: int) -> dict:
    """One batch, padded on the right to its longest row. Examples with an error are left out and listed.

    Returns {"frames" uint8 [B, T, S, S, 3], "input_ids" [B, L], "attention_mask" [B, L], "labels" [B, L], "ids",
    "errors"}. If every example failed, the first is kept: it supervises nothing, so its loss is zero, with a graph.
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
    return {
        "frames": torch.stack([row["frames"] for row in rows]),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "ids": [row["id"] for row in rows],
        "errors": [example["error"] for example in examples if "error" in example],
    }


class EpochSampler(Sampler):
    """Yields (epoch, index): all indices in an order drawn from (seed, epoch), cut to whole optimizer steps.

    `step_size` is the number of examples in one optimizer step over all processes; the last incomplete step of an
    epoch is dropped. Raises DataError if not even one step is full.
    """

    def __init__(self, length: int, step_size: int, seed: int):
        if step_size < 1 or length < step_size:
            raise DataError(f"{length} training examples do not fill one optimizer step of {step_size}")
        self.length, self.seed, self.epoch = length, seed, 0
        self.kept = length - length % step_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.kept

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        return ((self.epoch, int(index)) for index in order[: self.kept])
