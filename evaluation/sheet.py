"""A sheet for people: one offline page on which raters compare two systems' answers without knowing whose they are.

    python evaluate.py --config FILE --output_dir DIR --sheet 20 --sheet_systems stage2 stage3

Reads DIR/predictions.jsonl, which a run of evaluate.py has left, and writes DIR/sheet.html and DIR/sheet_key.json. The
page shows clips chosen by seed; for each clip and mode it asks which of two answers describes the clip better, and of
each object that an answer names, whether the clip shows it. Which answer is whose stands only in the key, and so does
what truth, judge and reward's evidence say of each mention. evaluation/ratings.py reads what comes back.
"""

import base64
import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup, escape

from dataset import MODE_TABLE, resolve_video, root_of_clips, sample_clip, video_reader_problems
from evaluation.scoring import Truth, exact_truth
from pages.render import jpeg_uri, page_file, render
from stage3.detect_objects import evidence_problems, get_evidence
from stage3.mentions import find_mentions
from stage3.vocabulary_config import COCO_NAMES
from training.common import fail, read_jsonl, stable_seed, write_json, write_text
from training.config import EvaluateConfig

FRAMES = 16  # pictures of a clip
FRAME_WIDTH = 800  # of these pictures, in pixels


@dataclass(frozen=True)
class Item:
    """One question of the sheet: what two systems say of a clip in one mode."""

    video: str
    mode: str
    systems: tuple[str, str]  # whose answers A and B are
    texts: tuple[str, str]  # A and B

    @property
    def sides(self) -> dict[str, str]:
        """{heading: text}; two equal answers are shown once, and nobody is asked which is better."""
        first, second = self.texts
        return {"A and B": first} if first == second else {"A": first, "B": second}


class OfClip(NamedTuple):
    """What get_evidence needs to know of an entry."""

    video: str


# ---- what is asked ---------------------------------------------------------------------------------------------------


def find_answers(predictions: list[dict], systems: list[str]) -> dict[tuple[str, str], dict[str, str]]:
    """{(video, mode): {system: its first answer}} of the two systems."""
    answers = {}
    for row in predictions:
        if row["system"] in systems and row["sample"] == 0:
            answers.setdefault((row["video"], row["mode"]), {})[row["system"]] = row["text"]
    return answers


def comparable_clips(answers: dict, modes: list[str]) -> list[str]:
    """The clips that both systems have answered in all modes, sorted."""
    found = {video for video, _ in answers}
    for mode in modes:
        found = {video for video in found if len(answers.get((video, mode), ())) == 2}
    return sorted(found)


def draw_items(answers: dict, systems: list[str], modes: list[str], num_clips: int, seed: int) -> list[Item]:
    """`num_clips` clips in random order, each in all modes; a coin per item decides whose answer is A."""
    clips = sorted(comparable_clips(answers, modes), key=lambda video: stable_seed(seed, "sheet", video))
    items = []
    for video, mode in itertools.product(clips[:num_clips], modes):
        swap = stable_seed(seed, "sheet", video, mode) % 2
        order = (systems[1], systems[0]) if swap else (systems[0], systems[1])
        said = answers[video, mode]
        items.append(Item(video, mode, order, (said[order[0]], said[order[1]])))
    return items


def asked_mentions(text: str) -> list:
    """The mentions that raters are asked about: all but the denied ones, which CHAIR does not count either."""
    return [mention for mention in find_mentions(text) if not mention.negated]


def sheet_name(items: list[Item]) -> str:
    """Names the sheet by what raters see, so that ratings of another one are told apart."""
    content = [[item.video, item.mode, *item.texts] for item in items]
    return "sheet-" + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]


# ---- the page --------------------------------------------------------------------------------------------------------


def numbered(text: str, ids: list[str]) -> Markup:
    """The text with its asked mentions marked and numbered; `ids`: one question a mention. "cyclist" has two."""
    parts, done, number = [], 0, 0
    for (start, end), group in itertools.groupby(asked_mentions(text), key=lambda found: (found.start, found.end)):
        size = len(list(group))
        questions, numbers = ids[number : number + size], range(number + 1, number + size + 1)
        parts += [escape(text[done:start]), Markup('<mark data-questions="{}">{}<sup>{}</sup></mark>').format(
            " ".join(questions), text[start:end], ", ".join(map(str, numbers)))]
        done, number = end, number + size
    return Markup("").join([*parts, escape(text[done:])])


def sides_of_page(number: int, item: Item) -> list[dict]:
    """What the template shows of an item's answers. Nothing here depends on whose they are."""
    sides = []
    for name, text in item.sides.items():
        mentions = [{"id": f"q{number}{name[0]}{k}", "mention": f"{name[0]}{k}", "number": k, "object": mention.object,
                     "words": text[mention.start : mention.end]} for k, mention in enumerate(asked_mentions(text), 1)]
        sides.append({"name": name, "mentions": mentions,
                      "text": numbered(text, [mention["id"] for mention in mentions])})
    return sides


def write_page(file: Path, items: list[Item], frames: dict[str, list[dict]]) -> int:
    """Writes the page of these items; `frames`: per clip its pictures. Returns the number of questions."""
    clips, questions = {}, 0
    for number, item in enumerate(items, 1):
        sides = sides_of_page(number, item)
        questions += sum(len(side["mentions"]) for side in sides) + (len(sides) > 1)
        clip = clips.setdefault(item.video, {"frames": frames[item.video], "answers": []})
        clip["answers"].append({"number": number, "question": MODE_TABLE[item.mode].question, "sides": sides})
    script = page_file("sheet.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    write_text(file, render("sheet.html", sheet=sheet_name(items), clips=list(clips.values()), questions=questions,
                            script=Markup(script), script_hash=f"sha256-{digest}"))
    return questions


def read_frames(config: EvaluateConfig, videos: list[str]) -> dict[str, list[dict]]:
    """The pictures of each clip. Raises VideoError where one cannot be read."""
    frames = {}
    for video in videos:
        _, times, pictures = sample_clip(resolve_video(config.video_root, video), FRAMES)
        frames[video] = [{"uri": jpeg_uri(picture, FRAME_WIDTH), "label": f"{time:.0%} of the clip"}
                         for time, picture in zip(times, pictures, strict=True)]
    return frames


# ---- the key ---------------------------------------------------------------------------------------------------------


def key_of_items(items: list[Item], truths: dict[str, dict[str, Truth]]) -> list[dict]:
    """Whose answers A and B are, and what each source says of each mention. Two equal answers share their questions."""
    rows = []
    for item in items:
        mentions, sides = [], ("A", "A") if len(item.sides) == 1 else ("A", "B")
        for side, system, text in zip(sides, item.systems, item.texts, strict=True):
            for k, mention in enumerate(asked_mentions(text), 1):
                verdicts = {source: truth[item.video].verdict(mention.object) for source, truth in truths.items()}
                mentions.append({"question": f"{side}{k}", "system": system, "object": mention.object,
                                 "verdicts": verdicts})
        rows.append({"video": item.video, "mode": item.mode, "A": item.systems[0], "B": item.systems[1],
                     "equal": len(item.sides) == 1, "mentions": mentions})
    return rows


def count_invented(answers: dict, truths: dict[str, dict[str, Truth]]) -> dict:
    """{source: {system: {mode: {video: [mentions not there, mentions decided]}}}} over all clips, for CHAIR."""
    counts = {}
    for source, truth in truths.items():
        for (video, mode), said in answers.items():
            for system, text in said.items():
                verdicts = Counter(truth[video].verdict(mention.object) for mention in asked_mentions(text))
                of_mode = counts.setdefault(source, {}).setdefault(system, {}).setdefault(mode, {})
                of_mode[video] = [verdicts["unsupported"], verdicts["unsupported"] + verdicts["supported"]]
    return counts


def read_truths(config: EvaluateConfig, videos: list[str], problems: list[str]) -> dict[str, dict[str, Truth]]:
    """{source: {video: Truth}} for the sources "truth" or "judge", and "detector"; exits with all problems."""
    truths, detectors, clips = {}, {"detector": config.detector}, [OfClip(video) for video in videos]
    if not config.truth:
        detectors = {"judge": config.judge, **detectors}
    elif Path(config.truth).is_file():
        truths["truth"] = exact_truth(config.truth, videos, problems)
    else:
        problems.append(f"truth: not found: {config.truth}")
    for name, settings in detectors.items():
        problems += evidence_problems(clips, settings, config.evidence_cache, name)
    if problems:
        fail(problems)
    nothing_known = Truth(frozenset(), frozenset(), frozenset(COCO_NAMES))  # the detector could not read the clip
    for name, settings in detectors.items():
        truths[name] = dict.fromkeys(videos, nothing_known)
        for video, evidence in get_evidence(clips, config.video_root, settings, config.evidence_cache).items():
            if evidence is not None:
                truths[name][video] = Truth(evidence.present, evidence.salient, evidence.unknown)
    return truths


# ---- the run ---------------------------------------------------------------------------------------------------------


def open_answers(config: EvaluateConfig, problems: list[str]) -> tuple[dict, list[str]]:
    """(find_answers of the comparable clips, modes of the sheet); what is wrong is added to `problems`."""
    file = Path(config.output_dir) / "predictions.jsonl"
    predictions = read_jsonl(file)
    if not predictions:
        problems.append(f"output_dir: no answers in {file}; run evaluate.py with --checkpoint first")
        return {}, []
    known = list(dict.fromkeys(row["system"] for row in predictions))
    missing = [f"sheet_systems: no answers of {name!r} in {file}; there are {', '.join(known)}"
               for name in config.sheet_systems if name not in known]
    answers = find_answers(predictions, config.sheet_systems)
    asked = {mode for _, mode in answers}
    answered = [mode for mode in MODE_TABLE if mode in asked]
    modes = config.sheet_modes or answered
    missing += [f"sheet_modes: no answers in mode {mode!r}; there are {', '.join(answered)}"
                for mode in modes if answers and mode not in answered]
    clips = set(comparable_clips(answers, modes))
    if not missing and len(clips) < config.sheet:
        missing.append(f"sheet: {config.sheet} clips asked for, but both systems have answered about {len(clips)}")
    problems += missing
    return {of: said for of, said in answers.items() if of[0] in clips and of[1] in modes}, modes


def key_problems(file: Path, name: str) -> list[str]:
    """A key that is there must be of the same sheet: ratings of another one could not be read without it."""
    if not file.exists():
        return []
    try:
        other = json.loads(file.read_text(encoding="utf-8"))["sheet"]
    except (ValueError, KeyError, TypeError):
        return [f"output_dir: {file} is no key of a sheet; move it away"]
    return [] if other == name else [f"output_dir: {file} is the key of another sheet ({other}), whose ratings could "
                                     "not be read without it; move sheet.html and sheet_key.json away first"]


def make_sheet(config: EvaluateConfig) -> int:
    """Writes sheet.html and sheet_key.json into the output folder. All problems come in one message, exit code 2."""
    problems, out = video_reader_problems(config), Path(config.output_dir)
    if config.clips:
        config = dataclasses.replace(config, video_root=root_of_clips(config.clips))
    if not Path(config.video_root).exists():
        problems.append(f"{'clips' if config.clips else 'video_root'}: not found: {config.video_root}")
    answers, modes = open_answers(config, problems)
    items = []
    if not problems:
        items = draw_items(answers, config.sheet_systems, modes, config.sheet, config.seed)
        problems += key_problems(out / "sheet_key.json", sheet_name(items))
    clips = comparable_clips(answers, modes)
    truths = read_truths(config, clips, problems)
    frames = read_frames(config, list(dict.fromkeys(item.video for item in items)))
    key = {"sheet": sheet_name(items), "systems": config.sheet_systems, "modes": modes, "clips": clips,
           "items": key_of_items(items, truths), "counts": count_invented(answers, truths)}
    write_json(out / "sheet_key.json", key, indent=1)
    questions = write_page(out / "sheet.html", items, frames)
    size = (out / "sheet.html").stat().st_size / 1e6
    print(f"for raters: {out / 'sheet.html'} ({len(frames)} clips, {questions} questions, {size:.1f} MB)\n"
          f"not for raters: {out / 'sheet_key.json'}, which says whose answer is A and whose is B")
    return 0
