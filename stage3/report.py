"""Stage 3's report.html: sampled answers, what the detector saw in their clips, and how they were rewarded.

    python -m stage3.report output/stage3          works while the run is still going on

One file without outside references: the run's curves, then, for some of the steps, the groups whose rewards differ
most: frames with the detector's boxes, the best and the worst answer, each mention coloured by what the detector says.
"""

import sys
from pathlib import Path

import numpy as np

from dataset import MODE_TABLE, choose_video_reader, resolve_video, sample_clip
from pages.render import data_uri, film_strip, highlight, render
from stage3.detect_objects import load_records
from stage3.vocabulary_config import COCO_NAMES
from training.common import DriveVLMError, fail, load_config, read_jsonl, run_main, write_text
from training.config import Stage3Config

STEPS = 8  # steps that are shown
FRAMES = 4  # frames of a clip that are shown


def evenly(items, count: int) -> list:
    """At most `count` of the items, evenly spaced, first and last included."""
    chosen = np.linspace(0, len(items) - 1, count).round().astype(int)
    return [items[i] for i in np.unique(chosen)]


def groups_by_step(records: list[dict]) -> dict[int, list[list[dict]]]:
    """{step: its groups}; a group is the records of one prompt's answers."""
    slots = {}
    for record in records:
        slots.setdefault((record["step"], record["slot"]), []).append(record)
    steps = {}
    for (step, _), group in sorted(slots.items()):
        steps.setdefault(step, []).append(group)
    return steps


def chosen_groups(groups: list[list[dict]]) -> list[list[dict]]:
    """Of one step's groups: in each mode, the one whose rewards differ most."""
    widest = {}
    for group in groups:
        rewards = [record["reward"] for record in group]
        spread, mode = max(rewards) - min(rewards), group[0]["mode"]
        if mode not in widest or spread > widest[mode][0]:
            widest[mode] = (spread, group)
    return [widest[mode][1] for mode in MODE_TABLE if mode in widest]


def boxes_at(time: float, record: dict, evidence: dict, settings) -> list[tuple]:
    """The boxes of the detector's frame nearest to `time` (0 to 1), for film_strip.

    A box's kind says what the evidence made of its class; boxes too weak for even "unknown" are left out.
    """
    nearest = min(record["frames"], key=lambda frame: abs(frame["time"] - time))
    boxes = []
    for class_id, confidence, *corners in nearest["boxes"]:
        if confidence >= settings.absent_confidence:
            name = COCO_NAMES[class_id]
            kind = next((kind for kind in ("present", "unknown") if name in evidence[kind]), "absent")
            boxes.append((kind, f"{name} {confidence:.2f}", *corners))
    return boxes


def clip_strip(video: str, evidence: dict, config: Stage3Config) -> list[dict]:
    """Some of the frames that the model saw, at the clip's own aspect, with the detector's boxes."""
    record = load_records(config.evidence_cache, [video], config.detector)[video]
    _, times, frames = sample_clip(resolve_video(config.video_root, video), config.num_frames)
    shown = evenly(range(len(frames)), FRAMES)
    return film_strip(frames[shown], [f"{times[i]:.0%} of the clip" for i in shown],
                      [boxes_at(times[i], record, evidence, config.detector) for i in shown])


def group_values(records: list[dict], config: Stage3Config) -> dict:
    """One prompt's group as rollouts.html shows it, best answer first."""
    first = records[0]
    frames, no_picture = [], ""
    try:
        frames = clip_strip(first["video"], first["evidence"], config)
    except DriveVLMError as error:  # the clips or the boxes may be gone by now; the answers are still worth reading
        no_picture = str(error)
    answers = []
    for record in sorted(records, key=lambda record: -record["reward"]):
        spans = [(start, end, verdict, f"{name}: {verdict}") for name, verdict, start, end in record["mentions"]]
        spans += [(start, end, verdict, f"{what}: {verdict}") for what, verdict, start, end in record.get("claims", ())]
        answers.append({**record, "marked": highlight(record["text"], spans)})
    return {"video": first["video"], "mode": first["mode"], "colour": MODE_TABLE[first["mode"]].colour,
            "question": first.get("question", ""), "evidence": first["evidence"], "frames": frames,
            "no_picture": no_picture, "answers": answers}


def reward_progress(metrics: list[dict]) -> list[tuple[str, float, float]]:
    """(mode, mean reward of the first tenth of the steps, of the last tenth) for each mode that was sampled."""
    progress = []
    for mode in MODE_TABLE:
        rewards = [row[f"reward/{mode}"] for row in metrics if row.get(f"reward/{mode}") is not None]
        if rewards:
            tenth = max(1, len(rewards) // 10)
            progress.append((mode, sum(rewards[:tenth]) / tenth, sum(rewards[-tenth:]) / tenth))
    return progress


def evaluation_rows(metrics: list[dict]) -> tuple[list[list[str]], str]:
    """(rows of a table, its head first; the best step or ""): of each evaluation the step and, for each mode, the
    reward of greedy answers and what of it is lost with another clip and with grey frames (stage3/held_out.py)."""
    rows, best, keys = [["step"]], "", []
    for mode in MODE_TABLE:
        rows[0] += [mode, "lost: other clip", "lost: grey"]
        keys += [f"eval_{name}_{mode}" for name in ("reward", "gap_swapped", "gap_blank")]
    for row in metrics:
        if any(row.get(key) is not None for key in keys):
            values = [row.get(key) for key in keys]
            rows.append([str(row["step"]), *("–" if value is None else f"{value:.3f}" for value in values)])
            best = str(row["best_step"]) if "best_step" in row else best
    return rows, best


def write_report(folder, config: Stage3Config) -> Path:
    """Write `folder`/report.html again and return its path; `config`: the run's configuration."""
    folder = Path(folder)
    steps = groups_by_step(read_jsonl(folder / "rollouts.jsonl"))
    if not steps:
        raise DriveVLMError(f"{folder / 'rollouts.jsonl'} holds no rollouts yet")
    shown = []
    for number in evenly(sorted(steps), STEPS):
        groups = [group_values(records, config) for records in chosen_groups(steps[number])]
        shown.append({"number": number, "groups": groups})
    curves, metrics = folder / "curves.png", read_jsonl(folder / "metrics.jsonl")
    evaluations, best = evaluation_rows(metrics)
    page = render(
        "rollouts.html", folder=folder, num_steps=len(steps), steps=shown, progress=reward_progress(metrics),
        evaluations=evaluations, best=best,
        reward=config.reward, weights=config.reward_weights,
        curves=data_uri(curves.read_bytes(), "image/png") if curves.is_file() else "")
    write_text(folder / "report.html", page)
    return folder / "report.html"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1 or not (Path(argv[0]) / "rollouts.jsonl").is_file():
        fail(["usage: python -m stage3.report RUN_FOLDER (a run folder of stage 3, with rollouts.jsonl)"])
    config = load_config(Stage3Config, ["--config", f"{argv[0]}/config.yaml"])
    choose_video_reader(config.video_reader)
    print(write_report(argv[0], config))
    return 0


if __name__ == "__main__":
    run_main(main)
