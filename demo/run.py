"""The whole pipeline on the toy world: clips -> checks -> stage 1 -> stage 2 -> stage 3 -> table. No GPU, no downloads.

    make demo        (python -m demo.run)             about 9 minutes on 2 cores
    make results     (python -m demo.run --results)   adds seeds, sampled rows and the control; takes longer

Interrupt and rerun it: it resumes. A finished part is not run again: each leaves a stamp in output/demo/.done/ that
names its command, its configuration and the parts before it. An interrupted part continues from its last
checkpoint.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from training.common import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("output/demo")
PYTHON = sys.executable
PYTHON_SHOWN = ".venv/bin/python" if Path(PYTHON).parent == ROOT / ".venv" / "bin" else "python"
TORCHRUN = [PYTHON, "-m", "demo.torchrun", "--standalone", "--nproc_per_node", "2"]
DEMO_SEED = 42
STOPPED = 130  # exit code after Ctrl-C


@dataclass
class Part:
    """One command of the demo. `seconds`: on 2 cores, between bfloat16 and float32; for the estimate of time left."""

    name: str
    title: str
    command: list[str]
    folder: Path
    seconds: float
    trains: bool = False


def demo_parts() -> list[Part]:
    c = "configs/demo"
    return [
        Part("world", "Toy world: clips, captions, truth",
             [PYTHON, "-m", "demo.world", "--output_dir", f"{OUT}/world"], OUT / "world", 18),
        Part("detector", "Detector: assemble the toy YOLOv8 from demo/base/detector",
             [PYTHON, "-m", "demo.assemble_detector", "--output", f"{OUT}/detector/detector.pt"], OUT / "detector", 3),
        Part("check", "Check every row, clip and label; decode each clip once",
             [PYTHON, "check_dataset.py", "--config", f"{c}/stage2.yaml", "--output_dir", f"{OUT}/check",
              "--num_workers", "2", "--build_cache", "true"], OUT / "check", 15),
        Part("stage1", "Stage 1: projector and temporal embeddings, two processes",
             [*TORCHRUN, "train_stage1_ddp.py", "--config", f"{c}/stage1.yaml"], OUT / "stage1", 58, trains=True),
        Part("stage2", "Stage 2: LoRA and projector, two granularities",
             [PYTHON, "train_stage2.py", "--config", f"{c}/stage2.yaml"], OUT / "stage2", 124, trains=True),
        Part("detect", "Evidence: what the toy YOLO sees in each clip",
             [PYTHON, "-m", "stage3.detect_objects", "--config", f"{c}/stage3.yaml"], OUT / "evidence", 53),
        Part("stage3", "Stage 3: GRPO, rewarded for what the evidence confirms",
             [PYTHON, "train_stage3.py", "--config", f"{c}/stage3.yaml"], OUT / "stage3", 178, trains=True),
        Part("evaluate", "Evaluation on the held-out clips, by exact truth",
             [PYTHON, "evaluate.py", "--config", f"{c}/stage3.yaml", "--output_dir", f"{OUT}/evaluate", "--checkpoint",
              *(f"{s}={OUT}/{s}" for s in ("stage1", "stage2", "stage3"))], OUT / "evaluate", 30),
    ]


def fingerprint(part: Part, before: str) -> str:
    """What the part's result depends on: its command, the demo's configuration files, the parts before it."""
    h = hashlib.sha256(before.encode())
    h.update(json.dumps(part.command[1:]).encode())
    for word in part.command:
        if word.endswith(".yaml"):
            h.update(Path(word).read_bytes())
    return h.hexdigest()


def run_part(part: Part, mark: str) -> float:
    """Run one part to its end, resuming one that was cut off; returns its seconds (0 if it was done before)."""
    stamps = OUT / ".done"
    stamps.mkdir(parents=True, exist_ok=True)
    stamp = stamps / f"{part.name}.json"
    state = json.loads(stamp.read_text()) if stamp.is_file() else {}
    if state.get("mark") == mark and state.get("seconds") is not None and part.folder.is_dir():
        print(f"    done before, in {state['seconds']:.0f} s")
        return 0.0
    if state.get("mark") != mark and part.folder.is_dir():
        shutil.rmtree(part.folder)  # made with another configuration
    stamp.write_text(json.dumps({"mark": mark, "seconds": None}))
    command = list(part.command)
    if part.trains:
        command += ["--resume", "auto"]
    start = time.time()
    code = run_command(command)
    if code == STOPPED:
        print("\nStopped. Run make demo again: it continues here.", file=sys.stderr)
        sys.exit(STOPPED)
    if code != 0:
        sys.exit(f"\n'{part.title}' failed with exit code {code}. Its command was:\n    {' '.join(command)}\n"
                 "Run make demo again: it resumes here.")
    seconds = time.time() - start
    stamp.write_text(json.dumps({"mark": mark, "seconds": seconds}))
    return seconds


def run_command(command: list[str]) -> int:
    """The command's exit code. Ctrl-C reaches the command as well: wait until it has saved; a second one ends it."""
    with subprocess.Popen(command, env=environment()) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            try:
                process.wait()
            except KeyboardInterrupt:
                process.kill()
            return STOPPED


def environment() -> dict[str, str]:
    extra = {"YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
             "TOKENIZERS_PARALLELISM": "false", "ULTRALYTICS_SAFE_LOAD": "1", "YOLO_CONFIG_DIR": str(OUT / ".yolo")}
    Path(extra["YOLO_CONFIG_DIR"]).mkdir(parents=True, exist_ok=True)
    return {**os.environ, **extra}


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def run_parts(parts: list[Part]) -> None:
    """Run the parts in order; before each, print how long the rest takes at the pace measured so far."""
    mark, spent, expected = "", 0.0, 0.0
    for number, part in enumerate(parts, 1):
        mark = fingerprint(part, mark)
        pace = spent / expected if expected else 1.0
        left = pace * sum(p.seconds for p in parts[number - 1:])
        print(f"\n=== {number}/{len(parts)}  {part.title}   (about {clock(left)} left)", flush=True)
        seconds = run_part(part, mark)
        if seconds:
            spent, expected = spent + seconds, expected + part.seconds
            print(f"    took {clock(seconds)}", flush=True)


def show_demo() -> None:
    print("\n" + (OUT / "evaluate" / "table.md").read_text(encoding="utf-8"))
    print(f"Open this page first, every held-out clip with every system's answers:\n"
          f"    {PYTHON_SHOWN} -m webbrowser {OUT}/evaluate/report.html\nThen:")
    for path, what in [
        ("stage3/report.html", "stage 3's rollouts: frames, boxes, answers with their rewards"),
        ("check/check_dataset/report.html", "what the loss sees: each token, masked or supervised, beside the frames"),
        ("stage1/curves.png", "stage 1 learning to see"),
        ("stage2/curves.png", "stage 2 learning two granularities"),
    ]:
        print(f"    {OUT / path}    {what}")
    print(f"    {PYTHON_SHOWN} -m tensorboard.main --logdir {OUT}    all curves\nAsk the result something:\n"
          f"    {PYTHON_SHOWN} generate.py --checkpoint {OUT}/stage3 --mode copilot "
          f"--video {OUT}/world/videos/<clip>.mp4")


# ---------------------------------------------------------------------------------------------------------------------
# make results

def results_parts(seed: int, steps: int) -> list[Part]:
    """Stages 1 to 3 with another seed (for its own seed, the demo's run is used), the control (stage 2 trained for as
    long as stages 2 and 3 together), and answers of all, greedy and sampled."""
    out, c = OUT / "results" / f"seed{seed}", "configs/demo"
    stages = OUT if seed == DEMO_SEED else out
    s = ["--seed", str(seed)]
    parts = [
        Part(f"s{seed}-stage1", f"Seed {seed}: stage 1",
             [*TORCHRUN, "train_stage1_ddp.py", "--config", f"{c}/stage1.yaml", "--output_dir", f"{out}/stage1", *s],
             out / "stage1", 58, trains=True),
        Part(f"s{seed}-stage2", f"Seed {seed}: stage 2",
             [PYTHON, "train_stage2.py", "--config", f"{c}/stage2.yaml", "--init_from", f"{out}/stage1",
              "--output_dir", f"{out}/stage2", *s], out / "stage2", 124, trains=True),
        Part(f"s{seed}-stage3", f"Seed {seed}: stage 3",
             [PYTHON, "train_stage3.py", "--config", f"{c}/stage3.yaml", "--init_from", f"{out}/stage2",
              "--output_dir", f"{out}/stage3", *s], out / "stage3", 178, trains=True),
    ] if stages == out else []
    parts.append(Part(
        f"s{seed}-control", f"Seed {seed}: control, stage 2 trained on for as long as stage 3 takes",
        [PYTHON, "train_stage2.py", "--config", f"{c}/stage2.yaml", "--init_from", f"{stages}/stage1",
         "--output_dir", f"{out}/control", "--max_steps", str(steps), *s], out / "control", 290, trains=True))
    systems = [f"{n}={stages}/{n}" for n in ("stage1", "stage2", "stage3")] + [f"control={out}/control"]
    # split_seed, and so the held-out clips, are the demo's for every seed.
    for kind, extra in (("greedy", []), ("sampled", ["--num_samples", "4", "--temperature", "1.0"])):
        parts.append(Part(
            f"s{seed}-{kind}", f"Seed {seed}: {kind} answers",
            [PYTHON, "evaluate.py", "--config", f"{c}/stage3.yaml", "--output_dir", f"{out}/{kind}",
             "--checkpoint", *systems, *extra], out / kind, 45 if kind == "greedy" else 180))
    return parts


def control_steps() -> int:
    """Stage 2's own steps and as many more as fit into stage 3's time, by the median seconds per step of each."""
    stage2, stage3 = (read_jsonl(OUT / name / "metrics.jsonl") for name in ("stage2", "stage3"))
    short = [row["step_seconds"] for row in stage2 if "step_seconds" in row]
    long = [row["rollout_seconds"] + row["update_seconds"] for row in stage3 if "rollout_seconds" in row]
    return len(short) + round(len(long) * statistics.median(long) / statistics.median(short))


def summarise(seeds: list[int]) -> str:
    """Mean and standard deviation over seeds of the numbers that the README shows."""
    keys = ("f1_micro", "recall", "chair_i", "chair_s", "ended")
    lines = ["| answers | system | mode | " + " | ".join(keys) + " |", "|" + " --- |" * (len(keys) + 3)]
    for kind in ("greedy", "sampled"):
        files = [OUT / "results" / f"seed{seed}" / kind / "metrics.json" for seed in seeds]
        runs = [json.loads(file.read_text())["systems"] for file in files]
        for system in runs[0]:
            for mode in (key for key, block in runs[0][system].items() if isinstance(block, dict)):
                cells = []
                for key in keys:
                    values = [run[system][mode][key] for run in runs]
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
                lines.append(f"| {kind} | {system} | {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", action="store_true", help="add several seeds, sampled rows, the control")
    parser.add_argument("--seeds", type=int, nargs="+", default=[DEMO_SEED, 1, 2],
                        help="seeds of --results (default: 42 1 2; 42 is the demo's own run)")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    run_parts(demo_parts())
    show_demo()
    if args.results:
        steps = control_steps()
        for seed in args.seeds:
            run_parts(results_parts(seed, steps))
        table = OUT / "results" / "table.md"
        table.write_text(summarise(args.seeds), encoding="utf-8")
        print(f"\nMean and standard deviation over seeds {args.seeds}; control: {steps} steps of stage 2.\n")
        print(table.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
