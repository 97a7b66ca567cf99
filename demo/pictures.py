"""The README's picture and table, from the runs that `make demo` left in output/demo.

    python -m demo.pictures

Writes docs/toy_world.jpg (frames of held-out clips with what stage 2 and stage 3 said) and prints the README's table.
"""

import json
import textwrap
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dataset import MODES, read_frames
from evaluation.scoring import METRICS
from training.common import read_jsonl

OUT, DOCS = Path("output/demo"), Path("docs")
COLUMNS = {"recall": "recall", "chair_i": "CHAIRi", "trap_told": "companions told", "wrong_claims": "wrong claims",
           "order": "order"}


def readme_table(metrics: dict) -> str:
    """One row per system; half the 95% bootstrap interval behind each number."""
    heads = [f"{mode.capitalize()} {head}" for mode in MODES for head in COLUMNS.values()]
    lines = ["| " + " | ".join(["", *heads]) + " |", "|" + " --- |" * (len(heads) + 1)]
    for system, blocks in metrics["systems"].items():
        cells = [system]
        for mode in MODES:
            for key in COLUMNS:
                needs = METRICS[key].needs
                low, high = blocks[mode]["interval"][key]
                number = f"{blocks[mode][key]:.2f} ± {(high - low) / 2:.2f}"
                cells.append(number if not needs or blocks[mode][needs] else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mended_clips(said: dict, truth: dict, number: int) -> list[str]:
    """Clips on which stage 2 names a person who is not there and stage 3 does not. `said`: {(system, clip): text}."""
    names = ("pedestrian", "person")

    def invents(system, video):
        return any(name in said[system, video] for name in names)

    clips = sorted(video for system, video in said if system == "stage2" and "person" not in truth[video]["present"])
    return [v for v in clips if invents("stage2", v) and not invents("stage3", v)][:number]


def draw_clips(clips: list[str], said: dict, path: Path):
    figure, axes = plt.subplots(2 * len(clips), 1, figsize=(12, 2.05 * len(clips)),
                                height_ratios=[1.13, 0.92] * len(clips), layout="constrained")
    for clip, picture, words in zip(clips, axes[::2], axes[1::2], strict=True):
        frames = read_frames(OUT / "world" / "videos" / clip, 6, 192)
        picture.imshow(np.concatenate(list(frames), axis=1), aspect=9 / 16)
        text = "\n".join(textwrap.fill(f"{system}: {said[system, clip]}", 165, subsequent_indent="    ")
                         for system in ("stage2", "stage3"))
        words.text(0, 1, text, fontsize=9.5, va="top")
        picture.axis("off")
        words.axis("off")
    figure.savefig(path, dpi=100, pil_kwargs={"quality": 85})


def main():
    metrics = json.loads((OUT / "evaluate" / "metrics.json").read_text(encoding="utf-8"))
    said = {(row["system"], row["video"]): row["text"] for row in read_jsonl(OUT / "evaluate" / "predictions.jsonl")
            if row["mode"] == "microscope"}
    truth = json.loads((OUT / "world" / "truth.json").read_text(encoding="utf-8"))
    draw_clips(mended_clips(said, truth, 3), said, DOCS / "toy_world.jpg")
    print(readme_table(metrics))


if __name__ == "__main__":
    main()
