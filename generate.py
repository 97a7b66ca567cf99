"""Asks a checkpoint about one clip.

    python generate.py --checkpoint output/stage3 --video drive.mp4 --mode copilot
    python generate.py --checkpoint output/stage3 --video drive.mp4 --question "Is anybody crossing?" --json
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from dataset import MODES, DataError, VideoError, read_frames
from model import DriveVLM, ModelError, read_checkpoint
from training import fail


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint or run folder of any stage")
    parser.add_argument("--video", required=True, help="the clip")
    parser.add_argument("--mode", choices=list(MODES), default="microscope", help="granularity [microscope]")
    parser.add_argument("--question", help="your own words in the place of the mode's")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=640, help="longest answer [640]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy [0]")
    parser.add_argument("--seed", type=int, default=42, help="of a sampled answer [42]")
    parser.add_argument("--json", action="store_true", help="print one JSON object: text, ended, tokens, seconds ..")
    args = parser.parse_args(argv)

    problems = [] if Path(args.video).is_file() else [f"--video: no such file: {args.video}"]
    try:
        read_checkpoint(args.checkpoint)
    except ModelError as error:
        problems.append(f"--checkpoint: {error}")
    if args.max_new_tokens < 1 or args.temperature < 0:
        problems.append("--max_new_tokens must be at least 1 and --temperature at least 0")
    if problems:
        fail(problems)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DriveVLM.from_checkpoint(args.checkpoint, device=device)
    question = args.question or MODES[args.mode]
    begun = time.perf_counter()
    frames = torch.from_numpy(read_frames(args.video, model.num_frames, model.image_size))[None]  # [1, T, S, S, 3]
    answer = model.generate(frames, [question], max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                            seed=args.seed)[0]
    if args.json:
        print(json.dumps({
            "video": args.video, "mode": None if args.question else args.mode, "question": question,
            "text": answer.text, "ended": answer.ended, "tokens": len(answer.ids),
            "frames": model.num_frames, "seconds": round(time.perf_counter() - begun, 3),
        }))
    else:
        print(answer.text)
        if not answer.ended:
            print(f"(cut after {args.max_new_tokens} tokens)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (DataError, ModelError, VideoError) as error:
        sys.exit(f"generate: {error}")
