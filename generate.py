"""Asks a checkpoint about clips.

    python generate.py --checkpoint output/stage3 --video drive.mp4 --mode copilot
    python generate.py --checkpoint output/stage3 --video drive.mp4 --question "Is anybody crossing?" --json
    python generate.py --checkpoint output/stage3 --video a.mp4 b.mp4 clips/ --mode both --output answers.jsonl
    python generate.py --checkpoint output/stage3 --video drive.mp4 --mode copilot --window 10 --stride 5
    python generate.py --checkpoint output/stage3 --video drive.mp4 --detect true --detector.weights yolov8x.pt
    python generate.py --checkpoint output/stage3 --video drive.mp4 --hedge 0.9

On a terminal, the answer to one question about one clip is shown as it is written; of several, each stands under its
clip. A folder stands for the clips in it; a folder of images (drive_001/000001.jpg ..) is one clip. --window asks about
stretches of a long drive, one after another. With --output, an interrupted run continues where it was. --detect lets a
detector look for what the answer names: what it sees is green, what it does not is red, what it cannot tell yellow, and
a line for each says when and where. --hedge 0.9 marks objects that are right with a probability below 0.9, by what
evaluate.py --calibrate true measured. Exit code 1: some clips could not be read; they are named, the others are
answered.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

from training.common import fail, file_sha256, load_config, read_jsonl, run_main
from training.config import GenerateConfig

if __name__ == "__main__":  # --help and wrong flags are answered before torch is imported, which takes seconds
    load_config(GenerateConfig, description=__doc__)

import torch

from dataset import (
    IMAGE_SUFFIXES,
    MODE_TABLE,
    VIDEO_SUFFIXES,
    DataError,
    VideoError,
    clip_seconds,
    decode_frames,
    decode_times,
    find_clips,
    is_clip,
    video_reader_problems,
)
from evaluation.hedging import grey_clip, mark_unsure, mention_gains, probability, weights_id
from model import DriveVLM, ModelError, read_checkpoint, resolve_dtype
from stage3.detect_objects import make_detector, weights_problems
from stage3.receipts import lines, look, paint, receipts


def main(argv: list[str] | None = None) -> int:
    config = load_config(GenerateConfig, argv, description=__doc__)
    clips, modes, key, done, steps = check(config)
    model = DriveVLM.from_checkpoint(config.checkpoint, dtype=resolve_dtype(config.dtype),
                                     device="cuda" if torch.cuda.is_available() else "cpu",
                                     vision_model=config.vision_model, language_model=config.language_model)
    if done:
        print(f"{config.output} holds {len(done)} answers already", file=sys.stderr)
    detector = make_detector(config.detector) if config.detect else None
    grey = grey_clip(model) if config.hedge else None
    alone, failed = len(clips) * len(modes) == 1 and config.window is None, 0
    for clip in clips:
        try:
            record = look(clip, config.detector, config.evidence_cache, detector) if detector else None
            windows = stretches(clip_seconds(clip), config.window, config.stride) if config.window else [None]
            for window in windows:
                asked = {mode: row_of(config, clip, mode, window, key) for mode in modes}
                left = {mode: row for mode, row in asked.items() if identity(row) not in done}
                visual = encode(model, clip, window) if left else None  # [1, N, D]
                times = decode_times(clip, model.num_frames, window) if left and model.time_stamps else None  # [T]
                for row in left.values():
                    stream = alone and not (config.json or record or config.hedge) and sys.stdout.isatty()
                    row |= answer(model, config, row, visual, times, stream)
                    if config.hedge:
                        prompt = model.prompt_ids(row["question"], times)
                        row |= hedge(model, row, prompt, visual[0], grey, steps[row["mode"]], config.hedge)
                    if record:
                        row["receipts"] = receipts(row["text"], record, config.detector, clip_seconds(clip))
                    show(config, row, alone, stream)
        except VideoError as error:
            print(f"generate: {error}", file=sys.stderr, flush=True)
            failed += 1
    return 1 if failed else 0


def check(config) -> tuple[list[Path], list[str | None], str, set, dict]:
    """(clips, modes: None stands for an own question, what names weights and settings, identities of the rows that
    --output holds already, {mode: calibrated steps} for --hedge); ConfigError where anything is wrong."""
    problems, clips = video_reader_problems(config), []
    for name in config.video:
        try:
            found = find_clips(name) if Path(name).is_dir() else [Path(name)]
        except DataError as error:
            problems.append(f"--video: {error}")
            continue
        if not found:
            suffixes = ", ".join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))
            problems.append(f"--video: no clip in {name} ({suffixes})")
        problems += [f"--video: no such file: {path}" for path in found if not is_clip(path)]
        clips += found
    folder = None
    try:
        folder, _ = read_checkpoint(config.checkpoint)
    except ModelError as error:
        problems.append(f"--checkpoint: {error}")
    modes = [None] if config.question else list(MODE_TABLE) if config.mode == "both" else [config.mode]
    problems += [f"--mode: {mode!r} is none of {', '.join(MODE_TABLE)}, both" for mode in modes
                 if mode not in (None, *MODE_TABLE)]
    if config.stride and not config.window:
        problems.append("--stride: of which --window?")
    key, rows, steps = "", [], {}
    if config.hedge and folder:
        steps = calibrated_steps(config, folder, modes, problems)
    if config.output and folder:
        key = settings_key(config, folder, steps)
        rows = read_jsonl(config.output) if Path(config.output).is_file() else []
        others = sum(row.get("key") != key for row in rows)
        if others:
            problems.append(f"--output: {others} of {len(rows)} answers in {config.output} are of another checkpoint "
                            "or other settings; give another file")
    if config.detect:
        problems += weights_problems(config.detector, "detector") + config.detector.problems("detector")
    if problems:
        fail(problems)
    return clips, modes, key, {identity(row) for row in rows}, steps


def calibrated_steps(config, folder: Path, modes, problems: list[str]) -> dict[str, list]:
    """{mode: its steps} of the checkpoint in `folder`; what is wrong is added to `problems`."""
    try:
        systems = json.loads(Path(config.calibration).read_text(encoding="utf-8"))["calibration"]
    except (OSError, ValueError, KeyError) as error:
        problems.append(f"--calibration: {config.calibration} holds no calibration ({type(error).__name__}: {error}): "
                        "run evaluate.py --calibrate true, and give its metrics.json")
        return {}
    weights = weights_id(folder)
    found = next((system["modes"] for system in systems.values() if system["weights"] == weights), None)
    if found is None:
        problems.append(f"--calibration: {config.calibration} is of other weights ({', '.join(systems)}) than "
                        f"{config.checkpoint}")
        return {}
    problems += [f"--hedge: {mode} is not calibrated in {config.calibration}: too few objects were named"
                 for mode in modes if mode in MODE_TABLE and mode not in found]
    return {mode: block["steps"] for mode, block in found.items()}


def settings_key(config, folder: Path, steps) -> str:
    """Changes with the weights and with what else an answer depends on, the question and the clip aside."""
    content = [[file_sha256(file) for file in sorted(folder.rglob("*.safetensors"))], config.max_new_tokens,
               config.temperature, config.seed, config.dtype, config.window, config.stride, config.detect, config.hedge,
               steps]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def stretches(seconds: float, window: float, stride: float | None) -> list[tuple[float, float]]:
    """(begin, end) of the stretches of a clip in seconds: each `window` long, the last ending with the clip."""
    starts = [0.0]
    while starts[-1] < seconds - window:
        starts.append(min(starts[-1] + (stride or window), seconds - window))
    return [(round(start, 3), round(start + window, 3)) for start in starts]


def row_of(config, clip: Path, mode: str | None, window, key: str) -> dict:
    """One answer's row, before it is answered."""
    row = {"video": str(clip), "mode": mode, "question": config.question or MODE_TABLE[mode].question}
    if window:
        row["begin"], row["end"] = window
    return row | ({"key": key} if key else {})


def identity(row: dict) -> tuple:
    return row["video"], row["question"], row.get("begin")


@torch.no_grad()
def encode(model, clip: Path, window) -> torch.Tensor:
    """Visual tokens [1, N, D] of a clip, or of a stretch of it."""
    frames = decode_frames(clip, model.num_frames, model.image_size, window)
    with model.decoding(), model.autocast():
        return model.encode_video(torch.from_numpy(frames)[None])


def answer(model, config, row: dict, visual, times, stream: bool) -> dict:
    """The answer to a row's question; `times`: of the frames, or None; `stream`: prints it as it is written."""
    begin, streamer = time.perf_counter(), None
    if stream:
        from transformers import TextStreamer

        streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    limit = config.max_new_tokens or MODE_TABLE[row["mode"] or "microscope"].max_new_tokens
    [said] = model.generate(None, [row["question"]], max_new_tokens=limit, temperature=config.temperature,
                            seed=config.seed, visual=visual, times=[times], streamer=streamer)
    return {"text": said.text, "ended": said.ended, "tokens": len(said.ids), "frames": model.num_frames,
            "seconds": round(time.perf_counter() - begin, 3)}


def hedge(model, row: dict, prompt, visual, grey, steps: list, target: float) -> dict:
    """{"mentions": the objects that an answer names, with their probabilities, "hedged": the text with marks}."""
    [gains], mentions = mention_gains(model, [(prompt, visual, row["text"])], grey), []
    for mention, gain, _ in gains:
        chance = probability(steps, gain)
        mentions.append({"words": row["text"][mention.start:mention.end], "start": mention.start, "end": mention.end,
                         "what": mention.object, "gain": gain, "probability": chance, "unsure": chance < target})
    return {"mentions": mentions, "hedged": mark_unsure(row["text"], mentions)}


def show(config, row: dict, alone: bool, streamed: bool) -> None:
    """Print an answered row, and append it to --output."""
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        with open(config.output, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if config.json:
        print(json.dumps(row), flush=True)
        return
    if not alone:
        when = f" | {clock(row['begin'])}-{clock(row['end'])}" if "begin" in row else ""
        print(f"{row['video']}{when} | {row['mode'] or row['question']}")
    found = row.get("receipts", [])
    if not streamed:
        plain = row.get("hedged", row["text"])
        print(paint(row["text"], found) if found and sys.stdout.isatty() else plain, flush=True)
    for line in lines(found):
        print(line)
    for mention in row.get("mentions", []):
        print(f"  {mention['words']} ({mention['what']}): right with probability {mention['probability']:.2f}")
    if not row["ended"]:
        print(f"(cut off after {row['tokens']} tokens)", file=sys.stderr)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{seconds % 60:04.1f}"


if __name__ == "__main__":
    run_main(main)
