"""Do stages 1 and 2 fit a 24 GB card, and how fast is a step? The full architecture with random weights.

    python bench/full_size.py --tokenizer DIR --work DIR [--memory_gb 24] [--steps 4]

Writes a SigLIP2-SO400M tower and a Qwen3-4B with random weights, in the real file formats, to --work (9 GB; kept for
later runs), makes 48 clips with 96 entries, and runs the stages' own scripts on configs/stage1.yaml and
configs/stage2.yaml for a few steps, each in a process that may use at most --memory_gb of the GPU. Random weights take
as much time and memory as trained ones; the losses mean nothing. --tokenizer: folder of a Qwen3 tokenizer.
Prints one table and writes one JSON file.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.sizes import QWEN3_4B, TOWER

REPORT = ("The video follows a vehicle on a city street. A red car ahead brakes at the light, so the driver waits. "
          "Then the light turns green and the traffic moves on past parked trucks and a crossing pedestrian. ") * 8


def make_bases(work: Path, tokenizer: Path, device: str):
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        SiglipVisionModel(SiglipVisionConfig(**TOWER)).save_pretrained(work / "vision")
        llm = Qwen3ForCausalLM(Qwen3Config(**QWEN3_4B))
    llm.generation_config = GenerationConfig(eos_token_id=[151645, 151643], pad_token_id=151643)
    llm.save_pretrained(work / "language")
    torch.set_default_dtype(torch.float32)
    for file in tokenizer.iterdir():
        shutil.copy(file, work / "language" / file.name)


def make_data(work: Path, num_clips: int = 48):
    """Clips of random noise, as what they show does not matter here, and their captions."""
    import cv2
    import numpy as np

    folder = work / "videos"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for clip in range(num_clips):
        out = cv2.VideoWriter(str(folder / f"{clip}.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (640, 360))
        for _ in range(20):
            out.write(rng.integers(0, 255, (360, 640, 3), dtype=np.uint8))
        out.release()
        rows.append({"video": f"{clip}.mp4", "microscope": [REPORT], "copilot": ["Red car ahead brakes, then go."]})
    (work / "captions.json").write_text(json.dumps(rows))


def run_stage(stage: int, args, work: Path) -> dict:
    """The stage's script in a process whose GPU memory is capped; returns means over its steps, without the first."""
    script = {1: "train_stage1_ddp", 2: "train_stage2"}[stage]
    out = work / f"stage{stage}"
    shutil.rmtree(out, ignore_errors=True)
    flags = ["--config", str(ROOT / f"configs/stage{stage}.yaml"), "--data", work / "captions.json",
             "--video_root", work / "videos", "--vision_model", work / "vision", "--language_model", work / "language",
             "--num_val_videos", 2, "--output_dir", out, "--max_steps", args.steps, "--frame_cache", work / "frames",
             "--eval_every", 1000, "--sample_every", 1000]
    if stage == 2:
        flags += ["--init_from", work / "stage1"]
    cap = (
        "import sys, torch\n"
        "if torch.cuda.is_available():\n"
        "    share = float(sys.argv[1]) * 1024**3 / torch.cuda.get_device_properties(0).total_memory\n"
        "    torch.cuda.set_per_process_memory_fraction(min(1.0, share))\n"
        f"import {script}\n{script}.main(sys.argv[2:])\n"
    )
    start = time.time()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([sys.executable, "-c", cap, str(args.memory_gb), *map(str, flags)], check=True, env=environment)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "tokens_per_second" in row][1:]
    speed = sum(row["tokens_per_second"] for row in rows) / len(rows)
    waiting = sum(row["data_wait"] for row in rows) / len(rows)
    config = {1: "4 clips x 4", 2: "2 clips x 16"}[stage]
    peak = max(row["memory_gb"] for row in rows)
    return {"stage": stage, "step": config, "tokens_per_second": speed, "data_wait": waiting, "memory_gb": peak,
            "seconds_in_all": time.time() - start}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a Qwen3 tokenizer")
    parser.add_argument("--work", type=Path, required=True, help="folder for models, clips and runs (20 GB free)")
    parser.add_argument("--memory_gb", type=float, default=24.0, help="GPU memory that a stage may use, in GiB")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per stage; the first is not counted")
    parser.add_argument("--json", type=Path, default=Path("output/bench/full_size.json"), help="JSON file to write")
    args = parser.parse_args(argv)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "language" / "tokenizer_config.json").is_file():
        make_bases(args.work, args.tokenizer, device)
        torch.cuda.empty_cache()
    if not (args.work / "captions.json").is_file():
        make_data(args.work)
    results = [run_stage(stage, args, args.work) for stage in (1, 2)]
    print(f"\n{name}, capped at {args.memory_gb:.0f} GiB, torch {torch.__version__}, {args.steps} steps per stage\n")
    print("| stage | clips per step | tokens/s | waiting for data | peak GB |\n| --- | --- | --- | --- | --- |")
    for r in results:
        print(f"| {r['stage']} | {r['step']} | {r['tokens_per_second']:,.0f} | {r['data_wait']:.0%} "
              f"| {r['memory_gb']:.1f} |")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"device": name, "memory_gb": args.memory_gb, "results": results}, indent=2))


if __name__ == "__main__":
    main()
