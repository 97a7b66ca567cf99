"""Which of the objects that an answer names can be relied on? Measured by what the clip adds to their words.

    mention_gains    how much likelier the clip makes the words of each object that is named, in nats
    calibrate        mentions whose truth is known -> which share of them is right, as a function of the gain
    probability      that share for one gain
    mark_unsure      an answer whose unsure objects say so

A model that has learnt what captions usually say is as sure of an invented object as of a real one, so the
probability of its words tells little. What the clip adds to it does: the log-probability with the clip less that with
grey frames, the contrast of visual contrastive decoding (2311.16922, equation 3). It is summed over the object's words
and the LEAD tokens before them: after "while a", "pedestrian" may be certain with any clip, and what the clip has
decided is "while". evaluate.py --calibrate calibrates it on held-out clips, generate.py --hedge uses that.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataset import GREY
from stage3.grpo import Group, completion_logps
from stage3.mentions import Mention, find_mentions
from training.common import file_sha256

LEAD = 3  # tokens before an object's words that count as leading to it
FEWEST = 20  # mentions that a mode must have to be calibrated
TARGETS = (0.8, 0.9, 0.95)  # probabilities whose worth is measured


@dataclass(frozen=True)
class Judged:
    """One mention of a clip's answer: its gain in nats, whether it is right, whether captions invent its class in such
    a clip (`Truth.traps`), and the log-probability of its words, in nats."""

    clip: str
    gain: float
    right: bool
    trap: bool = False
    logp: float = 0.0


# ---------------------------------------------------------------------------------------------------------------------
# What the clip adds


@torch.no_grad()
def grey_clip(model) -> torch.Tensor:
    """Visual tokens [N, D] of a clip that shows nothing."""
    size = model.image_size
    frames = torch.full((1, model.num_frames, size, size, 3), GREY, dtype=torch.uint8)
    return model.encode_video(frames)[0]


@torch.no_grad()
def mention_gains(model, asked: list[tuple[list[int], torch.Tensor, str]], grey
                  ) -> list[list[tuple[Mention, float, float]]]:
    """For each (prompt's ids, visual tokens [N, D], answer): its mentions that are not denials, in the order of the
    text, with what the clip adds to the log-probability of the words that name them and lead there, and with the
    log-probability of those that name them, in nats.

    grey [N, D]: from `grey_clip`."""
    groups, blank, kept = [], [], []
    for prompt, visual, text in asked:
        mentions = [mention for mention in find_mentions(text) if not mention.negated]
        encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        kept.append((mentions, encoded["offset_mapping"]))
        if mentions:
            groups.append(Group(prompt, visual, [encoded["input_ids"]]))
            blank.append(Group(prompt, grey, [encoded["input_ids"]]))
    if not groups:
        return [[] for _ in asked]
    shown, unseen = (completion_logps(model, rows, shared_prefix=False)[0] for rows in (groups, blank))  # [n, T]
    rows, found = iter(zip((shown - unseen).tolist(), shown.tolist(), strict=True)), []
    for mentions, places in kept:
        added, logps = next(rows) if mentions else ([], [])
        gains = []
        for mention in mentions:
            tokens = [i for i, (start, end) in enumerate(places) if start < mention.end and end > mention.start]
            gain = sum(added[max(0, tokens[0] - LEAD):tokens[-1] + 1])
            gains.append((mention, round(gain, 3), sum(logps[i] for i in tokens)))
        found.append(gains)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Which share is right


def calibrate(judged: list[Judged]) -> list[list[float]]:
    """Steps [[gain, share], ...], both rising: mentions from this gain on are right with this share.

    Isotonic regression (pool adjacent violators), each step's share shrunk by one right and one wrong mention more, so
    that a few mentions at the top promise nothing.
    """
    blocks = []  # [lowest gain, right, mentions]
    for one in sorted(judged, key=lambda one: one.gain):
        if blocks and blocks[-1][0] == one.gain:  # equal gains cannot be told apart
            blocks[-1][1:] = blocks[-1][1] + one.right, blocks[-1][2] + 1
        else:
            blocks.append([one.gain, float(one.right), 1])
        while len(blocks) > 1 and shrunk(blocks[-2]) >= shrunk(blocks[-1]):
            _, right, count = blocks.pop()
            blocks[-1][1:] = blocks[-1][1] + right, blocks[-1][2] + count
    return [[gain, round(shrunk((gain, right, count)), 4)] for gain, right, count in blocks]


def shrunk(block) -> float:
    _, right, count = block
    return (right + 1) / (count + 2)


def probability(steps: list[list[float]], gain: float) -> float:
    """The share of mentions of this gain that is right; below the first step, as in it."""
    found = steps[0][1]
    for start, share in steps:
        if start > gain:
            break
        found = share
    return found


def check_on_halves(judged: list[Judged], targets=TARGETS) -> dict[str, dict[str, float]]:
    """{target: {"kept", "right", "told", "traps_told"}}: of the mentions, the share whose probability reaches the
    target; of these, the share that is right; of all right ones, the share that is kept, and the same of the right ones
    that captions often invent (None where none is known). Each half of the clips is judged by steps that were
    calibrated on the other half."""
    clips, halves = sorted({one.clip for one in judged}), ([], [])
    for one in judged:
        halves[clips.index(one.clip) % 2].append(one)
    found = {}
    for target in targets:
        kept = []
        for own, other in (halves, halves[::-1]):
            steps = calibrate(other)
            kept += [one for one in own if steps and probability(steps, one.gain) >= target]
        (right, traps), (kept_right, kept_traps) = count_right(judged), count_right(kept)
        shares = {"kept": (len(kept), len(judged)), "right": (kept_right, len(kept)), "told": (kept_right, right),
                  "traps_told": (kept_traps, traps)}
        found[str(target)] = {name: part / of if of else None for name, (part, of) in shares.items()}
    return found


def count_right(judged: list[Judged]) -> tuple[int, int]:
    """(right ones, those of them that captions often invent)."""
    return sum(one.right for one in judged), sum(one.right and one.trap for one in judged)


def calibration_of(judged: dict[str, list[Judged]]) -> dict[str, dict]:
    """{mode: steps and what they are worth}, as metrics.json holds it; modes with too few mentions are left out."""
    found = {}
    for mode, ones in judged.items():
        if len(ones) >= FEWEST:
            found[mode] = {"steps": calibrate(ones), "mentions": len(ones),
                           "right": sum(one.right for one in ones) / len(ones), "targets": check_on_halves(ones),
                           "auc_gain": separation(ones, "gain"), "auc_logp": separation(ones, "logp")}
    return found


def separation(judged: list[Judged], name: str) -> float | None:
    """The chance that a right mention has a higher gain (or logp) than a wrong one: 0.5 tells nothing. None where all
    are right, or all wrong."""
    values = np.array([getattr(one, name) for one in judged])
    right = np.array([one.right for one in judged])
    if right.all() or not right.any():
        return None
    above = values[right][:, None] - values[~right]  # [right, wrong]
    return round(float((above > 0).mean() + (above == 0).mean() / 2), 4)


def judge_gains(model, rows: list[dict], truth, look, size: int) -> dict[str, list[Judged]]:
    """{mode: its mentions that the truth can judge} of rows of predictions.jsonl.

    look(clip) -> (its visual tokens [N, D], the times of its frames [T] or None)
    """
    judged, grey = defaultdict(list), grey_clip(model)
    for start in range(0, len(rows), size):
        batch, asked = rows[start:start + size], []
        for row in batch:
            visual, times = look(row["video"])
            asked.append((model.prompt_ids(row["question"], times), visual, row["text"]))
        gains = mention_gains(model, asked, grey)
        for row, mentions in zip(batch, gains, strict=True):
            known = truth[row["video"]]
            traps = {name for _, name, _ in known.traps}
            for mention, gain, logp in mentions:
                verdict = known.verdict(mention.object)
                if verdict != "unknown":
                    judged[row["mode"]].append(
                        Judged(row["video"], gain, verdict == "supported", mention.object in traps, logp))
    return judged


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def weights_id(folder: Path) -> str:
    """Names a checkpoint folder's weights."""
    return " ".join(file_sha256(file)[:16] for file in sorted(Path(folder).rglob("*.safetensors")))


def mark_unsure(text: str, mentions: list[dict]) -> str:
    """The text with " (unsure)" behind each of the mentions ({"end", "unsure"}) that is."""
    done, marked = 0, ""
    for mention in sorted((mention for mention in mentions if mention["unsure"]), key=lambda mention: mention["end"]):
        marked += text[done:mention["end"]] + " (unsure)"
        done = mention["end"]
    return marked + text[done:]
