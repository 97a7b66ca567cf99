"""Asks a checkpoint about one clip.

    python generate.py --checkpoint output/stage3 --video drive.mp4 --mode copilot
    python generate.py --checkpoint output/stage3 --video drive.mp4 --question "Is anybody crossing?" --json
"""

import json
import sys
import time
from pathlib import Path

from training.common import fail, load_config, run_main
from training.config import GenerateConfig

if __name__ == "__main__":  # --help and wrong flags are answered before torch is imported, which takes seconds
    load_config(GenerateConfig, description=__doc__)

import torch

from dataset import MODE_TABLE, read_frames, video_reader_problems
from model import DriveVLM, ModelError, read_checkpoint, resolve_dtype


def main(argv: list[str] | None = None) -> int:
    config = load_config(GenerateConfig, argv, description=__doc__)
    problems = video_reader_problems(config)
    if not Path(config.video).is_file():
        problems.append(f"--video: no such file: {config.video}")
    try:
        read_checkpoint(config.checkpoint)
    except ModelError as error:
        problems.append(f"--checkpoint: {error}")
    if config.mode not in MODE_TABLE:
        problems.append(f"--mode: {config.mode!r} is none of {', '.join(MODE_TABLE)}")
    if problems:
        fail(problems)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DriveVLM.from_checkpoint(config.checkpoint, dtype=resolve_dtype(config.dtype), device=device,
                                     vision_model=config.vision_model, language_model=config.language_model)
    question = config.question or MODE_TABLE[config.mode].question
    limit = config.max_new_tokens or MODE_TABLE[config.mode].max_new_tokens
    begin = time.perf_counter()
    frames = read_frames(config.video, model.num_frames, model.image_size)
    frames = torch.from_numpy(frames)[None]  # [1, T, S, S, 3]
    answer = model.generate(frames, [question], max_new_tokens=limit, temperature=config.temperature,
                            seed=config.seed)[0]
    if config.json:
        print(json.dumps({"video": config.video, "mode": None if config.question else config.mode, "question": question,
                          "text": answer.text, "ended": answer.ended, "tokens": len(answer.ids),
                          "frames": model.num_frames, "seconds": round(time.perf_counter() - begin, 3)}))
    else:
        print(answer.text)
        if not answer.ended:
            print(f"(cut off after {limit} tokens)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_main(main)
