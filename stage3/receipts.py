"""What stands behind each object that an answer names: in which frames the detector sees it, when and where.

For people who ask about one clip (`generate.py --detect`, `app.py`); the verdicts are those that the reward goes by.
"""

import os
from pathlib import Path

from dataset import VideoError
from stage3.detect_objects import detect_clips, load_records
from stage3.evidence import clip_evidence, merge_bodies
from stage3.grpo_reward_func import label_facts, label_mentions

COLOURS = {"supported": 32, "contradicted": 31, "unsupported": 31, "unknown": 33, "negated": 36}  # of a terminal
WORDS = {"supported": "seen", "contradicted": "not so", "unsupported": "not seen", "unknown": "cannot tell",
         "negated": "said not to be there, and not seen"}


def look(clip: Path, settings, cache, detector) -> dict:
    """What the detector of these settings (`make_detector`) sees in a clip, from the folder `cache` or now, as
    stage3/detect_objects.py writes it; VideoError where it cannot read the clip."""
    root, name = os.path.split(os.path.abspath(clip))  # "." is a folder of images too, and has no name
    failed = detect_clips([name], root, settings, cache, detector=detector)
    if failed:
        raise VideoError(clip, failed[name].removeprefix(f"{clip}: "))
    return load_records(cache, [name], settings)[name]


def receipts(text: str, record: dict, settings, seconds: float) -> list[dict]:
    """The objects and claims of an answer in the order of the text, judged by a clip's boxes.

    record: as stage3/detect_objects.py writes it; settings: its DetectorSettings; seconds: how long the clip is.
    Returns {"words", "start", "end" (place in the text), "what" (a class, or a claim such as "car colour red"),
    "verdict"}, and for an object that is seen "frames" and "of" (in how many of how many frames), "first", "last" (in
    seconds) and "best": {"second", "confidence", "box" [x1, y1, x2, y2] in 0..1}. Empty where the detector could not
    read the clip.
    """
    evidence = clip_evidence(record, settings)
    if evidence is None:
        return []
    found = []
    for mention, verdict in label_mentions(text, evidence):
        row = {"words": text[mention.start:mention.end], "start": mention.start, "end": mention.end,
               "what": mention.object, "verdict": verdict}
        found.append(row | (sightings(record, settings, mention.object.split("|"), seconds)
                            if verdict == "supported" else {}))
    for what, verdict, start, end in label_facts(text, evidence):
        found.append({"words": text[start:end], "start": start, "end": end, "what": what, "verdict": verdict})
    return sorted(found, key=lambda row: (row["start"], row["end"]))


def sightings(record: dict, settings, names: list[str], seconds: float) -> dict:
    """When and where a clip's frames show an object of these classes surely enough to count as present."""
    seen = []  # (confidence, second, box), the best of each frame
    for frame in record["frames"]:
        boxes = [(confidence, frame["time"] * seconds, box) for name, confidence, box, whole
                 in merge_bodies(frame["boxes"], settings.merge_iou)
                 if whole and name in names and confidence >= settings.present_confidence]
        seen += [max(boxes)] if boxes else []
    if not seen:  # sure of one of several classes that a word stands for, not of which
        return {}
    confidence, second, box = max(seen)
    return {"frames": len(seen), "of": len(record["frames"]), "first": round(seen[0][1], 2),
            "last": round(seen[-1][1], 2),
            "best": {"second": round(second, 2), "confidence": confidence, "box": [round(x, 3) for x in box]}}


def paint(text: str, rows: list[dict]) -> str:
    """The text for a terminal, its objects in the colour of their verdicts."""
    done, painted = 0, ""
    for row in rows:
        if row["start"] >= done:  # what a claim says of an object may lie within the object's words
            painted += f"{text[done:row['start']]}\033[{COLOURS[row['verdict']]}m{row['words']}\033[0m"
            done = row["end"]
    return painted + text[done:]


def lines(rows: list[dict]) -> list[str]:
    """One line for each object and claim."""
    found = []
    for row in rows:
        what = "" if row["words"] == row["what"] else f" ({row['what']})"
        line = f"  {row['words']}{what}: {WORDS[row['verdict']]}"
        if "best" in row:
            left, top, right, bottom = row["best"]["box"]
            line += (f" in {row['frames']} of {row['of']} frames, {row['first']:g} to {row['last']:g} s; best at "
                     f"{row['best']['second']:g} s, confidence {row['best']['confidence']:.2f}, "
                     f"x {left:.2f}-{right:.2f}, y {top:.2f}-{bottom:.2f}")
        found.append(line)
    return found
