"""How fast are loading rows, decoding clips and reading the frame cache?

    python -m bench.data [--rows 100000] [--clips 4] [--workers 2] [--work output/bench/data]

1. Load `--rows` rows of realistic length (alternately 370 words of Microscope and 45 of Copilot) in a fresh process:
   seconds and peak memory. Target: 100,000 rows in at most 5 s and 1 GB.
2. Go through generated clips (40 s, 1280x720, 30 fps, H.264), decoding them or reading them from the frame cache.
   Target: the cache is at least 50 times faster.
3. The data loader as training uses it (encoding, augmentation, padding, `--workers` processes), reading from the cache,
   compared with the most that one RTX 4090 can use: a clip costs 6 x 4.0e9 parameters x 2,000 tokens = 4.8e13 FLOP
   (forward, recomputation and backward through the frozen weights) and the card peaks at 165e12 FLOP/s in bfloat16, so
   it needs at most 3.4 clips per second.
Clips and rows are kept in --work for later runs. Prints one table and writes one JSON file.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

FRAMES, SIZE, VISUAL_TOKENS = 16, 384, 1296
CARD_CLIPS_PER_SECOND = 165e12 / (6 * 4.0e9 * 2000)
LOAD = """
import resource, sys, time
from dataset import load_entries
before = time.perf_counter()
entries = load_entries(sys.argv[1])
print(time.perf_counter() - before, len(entries), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


def write_rows(path: Path, count: int) -> None:
    """Write `count` rows; they alternate between a clip's long text and its short one."""
    from dataset import MODES

    draw = random.Random(0)
    words = "the a car truck road light turns green while pedestrian “waits” crossing café ahead slowly left".split()
    with open(path, "w", encoding="utf-8") as out:
        out.write("[\n")
        for i in range(count):
            question, length = ((MODES["microscope"], 370), (MODES["copilot"], 45))[i % 2]
            text = " ".join(draw.choices(words, k=length)) + "."
            row = {"video": f"{i // 2:08x}-{i:08x}.mov", "q": question, "captions": [text]}
            out.write(json.dumps(row, ensure_ascii=False) + (",\n" if i < count - 1 else "\n]\n"))


def write_clip(path: Path, seed: int) -> None:
    """40 s of a moving textured plane that a box crosses; about 15 MB, like a dash-cam clip."""
    import av
    import numpy as np

    rng = np.random.default_rng(seed)
    plain = rng.integers(0, 255, (90, 320, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)  # [720, 2560, 3]
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for t in range(1200):
            frame = plain[:, t : t + 1280].copy()
            frame[::2, ::2] += np.uint8(t % 7)  # as hard to encode as a sensor's noise
            frame[300:400, 3 * t % 1100 : 3 * t % 1100 + 100] = 255
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


def seconds(function) -> float:
    before = time.perf_counter()
    function()
    return time.perf_counter() - before


def measure(args) -> dict:
    rows, videos, cache = args.work / f"rows_{args.rows}.json", args.work / "videos", args.work / "cache"
    videos.mkdir(parents=True, exist_ok=True)
    if not rows.exists():
        write_rows(rows, args.rows)
    clips = [videos / f"{i}.mov" for i in range(args.clips)]
    for i, clip in enumerate(clips):
        if not clip.exists():
            write_clip(clip, i)
    output = subprocess.run([sys.executable, "-c", LOAD, rows], capture_output=True, text=True, check=True).stdout
    load_seconds, entries, gigabytes = map(float, output.split())
    results = {"rows": int(entries), "load_seconds": load_seconds, "load_peak_gb": gigabytes}

    from dataset import cached_frames, read_frames

    shutil.rmtree(cache, ignore_errors=True)
    decode = seconds(lambda: [read_frames(clip, FRAMES, SIZE) for clip in clips]) / len(clips)
    for clip in clips:
        cached_frames(clip, FRAMES, SIZE, cache)
    rounds = max(1, 40 // len(clips))
    read = seconds(lambda: [cached_frames(clip, FRAMES, SIZE, cache) for clip in clips * rounds]) / len(clips) / rounds
    results |= {"decode_seconds_per_clip": decode, "cache_seconds_per_clip": read, "cache_speedup": decode / read}
    results["loader_clips_per_second"] = loader_speed(args, clips, cache)
    results["card_clips_per_second"] = CARD_CLIPS_PER_SECOND
    return results


def loader_speed(args, clips: list[Path], cache: Path, length: int = 256) -> float:
    """Clips per second of a data loader as training builds it, without the first batches, when workers start."""
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer

    from dataset import MODES, Entry, VideoInstructDataset, collate

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    text = "The car ahead stops at the light while a pedestrian crosses the road. " * 30
    entries = [Entry(f"{i}#microscope", clips[i % len(clips)].name, "microscope", MODES["microscope"], (text,))
               for i in range(length)]
    examples = VideoInstructDataset(entries, tokenizer, video_root=clips[0].parent, num_frames=FRAMES, image_size=SIZE,
                                    num_visual_tokens=VISUAL_TOKENS, max_text_tokens=1024, cache_dir=cache)
    loader = DataLoader(examples, batch_size=2, num_workers=args.workers,
                        collate_fn=lambda rows: collate(rows, tokenizer.pad_token_id))
    batches, skipped = iter(loader), 16
    for _ in range(skipped):
        next(batches)
    taken = seconds(lambda: [batch["ids"] for batch in batches])
    return (length - 2 * skipped) / taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="rows to load")
    parser.add_argument("--clips", type=int, default=4, help="clips to decode (15 s each to generate)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of the data loader")
    parser.add_argument("--tokenizer", default="demo/base/language", help="folder of a tokenizer")
    parser.add_argument("--work", type=Path, default=Path("output/bench/data"), help="folder for rows, clips and cache")
    parser.add_argument("--json", type=Path, default=Path("output/bench/data.json"), help="JSON file to write")
    args = parser.parse_args()
    r = measure(args)
    for name, value, target in (
        (f"load {r['rows']:,} rows", f"{r['load_seconds']:.2f} s", "at most 5 s for 100,000"),
        ("peak memory, torch included", f"{r['load_peak_gb']:.2f} GB", "at most 1 GB"),
        ("decode a 40 s 720p clip", f"{r['decode_seconds_per_clip']:.3f} s", ""),
        ("read it from the cache", f"{r['cache_seconds_per_clip'] * 1e3:.1f} ms", ""),
        ("an epoch: cache vs decoding", f"{r['cache_speedup']:.0f}x", "at least 50x"),
        (f"loader, {args.workers} workers", f"{r['loader_clips_per_second']:.1f} clips/s",
         f"{r['card_clips_per_second']:.1f} clips/s feed an RTX 4090"),
    ):
        print(f"{name:34} {value:>14}   {target}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(r, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
