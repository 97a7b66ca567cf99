"""The whole pipeline on the toy world: clips -> checks -> stage 1 -> stage 2 -> stage 3 -> table. No GPU, no downloads.

    make demo        (python -m demo.run)        about 9 minutes on 2 cores
    make results     (python -m demo.results)    adds all that a claim rests on; hours

Interrupt and rerun it: it resumes. A finished part is not run again: each leaves a stamp in output/demo/.done/ that
names its command, its configuration and the parts before it. An interrupted part continues from its last
checkpoint.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from training.common import cpu_count

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("output/demo")
PYTHON = sys.executable
PYTHON_SHOWN = ".venv/bin/python" if Path(PYTHON).parent == ROOT / ".venv" / "bin" else "python"
TORCHRUN = [PYTHON, "-m", "demo.torchrun", "--standalone", "--nproc_per_node", "2"]
STOPPED = 130  # exit code after Ctrl-C


@dataclass
class Part:
    """One command of the demo. `seconds`: on 2 cores, between bfloat16 and float32; for the estimate of time left.
    `needs`: names of the parts whose results it reads; none named: the part before it."""

    name: str
    title: str
    command: list[str]
    folder: Path
    seconds: float
    trains: bool = False
    needs: tuple[str, ...] = ()


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
        if word.endswith(".yaml") and OUT not in Path(word).parents:  # what a part wrote follows from that part
            h.update(Path(word).read_bytes())
    return h.hexdigest()


def stamp_of(part: Part) -> Path:
    return OUT / ".done" / f"{part.name}.json"


def seconds_taken(part: Part, mark: str) -> float | None:
    """Seconds that the part took, if it was run to its end by this command and configuration; else None."""
    stamp = stamp_of(part)
    state = json.loads(stamp.read_text()) if stamp.is_file() else {}
    return state["seconds"] if state.get("mark") == mark and part.folder.is_dir() else None


def begin_part(part: Part, mark: str) -> list[str]:
    """The part's command, after what another configuration left of it is gone."""
    stamp = stamp_of(part)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    state = json.loads(stamp.read_text()) if stamp.is_file() else {}
    if state.get("mark") != mark and part.folder.is_dir():
        shutil.rmtree(part.folder)
    stamp.write_text(json.dumps({"mark": mark, "seconds": None}))
    return [*part.command, "--resume", "auto"] if part.trains else part.command


def end_part(part: Part, mark: str, code: int, seconds: float, log: str = "") -> None:
    """Note that the part is done, or end the program."""
    if code == STOPPED:
        print("\nStopped. Run the same command again: it continues here.", file=sys.stderr)
        sys.exit(STOPPED)
    if code != 0:
        sys.exit(f"\n'{part.title}' failed with exit code {code}. {log}Its command was:\n    {' '.join(part.command)}\n"
                 "Run the same again: it resumes here.")
    stamp_of(part).write_text(json.dumps({"mark": mark, "seconds": seconds}))


def run_part(part: Part, mark: str) -> float:
    """Run one part to its end, resuming one that was cut off; returns its seconds."""
    command, start = begin_part(part, mark), time.time()
    code = run_command(command)
    seconds = time.time() - start
    end_part(part, mark, code, seconds)
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


def run_at_once(parts: list[Part], jobs: int) -> None:
    """`jobs` parts at a time, each once the parts are done that it needs; their output goes to OUT/logs.

    The tiny models gain little from a second core, so two parts at a time take little more than half the time.
    """
    marks, needs = marks_of(parts), needs_of(parts)
    done = {part.name for part in parts if seconds_taken(part, marks[part.name]) is not None}
    running = {}  # {name: (part, process, when it was started)}
    (OUT / "logs").mkdir(parents=True, exist_ok=True)
    try:
        while len(done) < len(parts):
            ready = [part for part in parts if part.name not in {*done, *running} and needs[part.name] <= done]
            for part in ready[:jobs - len(running)]:
                left = clock(sum(p.seconds for p in parts if p.name not in done) / jobs)
                print(f"{time.strftime('%H:%M:%S')}  {part.title}   (about {left} left; {log_of(part)})", flush=True)
                running[part.name] = part, start_in_background(part, marks[part.name], jobs), time.time()
            time.sleep(0.2)
            for part, process, start in [job for job in running.values() if job[1].poll() is not None]:
                del running[part.name]
                seconds = time.time() - start
                end_part(part, marks[part.name], process.returncode, seconds, f"Its output: {log_of(part)}. ")
                done.add(part.name)
                print(f"{time.strftime('%H:%M:%S')}  {part.title}: took {clock(seconds)}", flush=True)
    except KeyboardInterrupt:  # the parts have got it too, and save
        sys.exit(STOPPED)
    finally:
        for _, process, _ in running.values():
            process.wait()


def log_of(part: Part) -> Path:
    return OUT / "logs" / f"{part.name.replace('/', '-')}.log"


def start_in_background(part: Part, mark: str, jobs: int) -> subprocess.Popen:
    """Start the part on its share of the cores; its output is appended to its log."""
    threads = {"OMP_NUM_THREADS": str(max(1, cpu_count() // jobs))}
    with open(log_of(part), "a", encoding="utf-8") as file:
        return subprocess.Popen(begin_part(part, mark), env=environment() | threads, stdout=file,
                                stderr=subprocess.STDOUT)


def environment() -> dict[str, str]:
    extra = {"YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
             "CUDA_VISIBLE_DEVICES": "",  # the same numbers with a GPU as without, and two processes need no second one
             "TOKENIZERS_PARALLELISM": "false", "ULTRALYTICS_SAFE_LOAD": "1", "YOLO_CONFIG_DIR": str(OUT / ".yolo")}
    Path(extra["YOLO_CONFIG_DIR"]).mkdir(parents=True, exist_ok=True)
    return {**os.environ, **extra}


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def needs_of(parts: list[Part]) -> dict[str, set[str]]:
    """{name of a part: names of those that it needs}."""
    needs, before = {}, set()
    for part in parts:
        needs[part.name] = set(part.needs) or before
        before = {part.name}
    return needs


def marks_of(parts: list[Part]) -> dict[str, str]:
    """{name of a part: what its result depends on}."""
    marks = {}
    for name, needs in needs_of(parts).items():
        [part] = [part for part in parts if part.name == name]
        marks[name] = fingerprint(part, "".join(marks[needed] for needed in sorted(needs)))
    return marks


def run_parts(parts: list[Part]) -> None:
    """Run the parts in order; before each, print how long the rest takes at the pace measured so far."""
    marks, spent, expected = marks_of(parts), 0.0, 0.0
    for number, part in enumerate(parts, 1):
        mark = marks[part.name]
        pace = spent / expected if expected else 1.0
        left = pace * sum(p.seconds for p in parts[number - 1:] if seconds_taken(p, marks[p.name]) is None)
        print(f"\n=== {number}/{len(parts)}  {part.title}   (about {clock(left)} left)", flush=True)
        if (seconds := seconds_taken(part, mark)) is not None:
            print(f"    done before, in {clock(seconds)}")
            continue
        seconds = run_part(part, mark)
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
    print(f"    {PYTHON_SHOWN} -m tensorboard.main --logdir {OUT}    all curves\n"
          f"Ask stages 2 and 3 something on a page, or stage 3 here:\n"
          f"    {PYTHON_SHOWN} app.py --config configs/demo/stage3.yaml --checkpoint {OUT}/stage2 {OUT}/stage3\n"
          f"    {PYTHON_SHOWN} generate.py --checkpoint {OUT}/stage3 --mode copilot "
          f"--video {OUT}/world/videos/<clip>.mp4")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    os.chdir(ROOT)
    run_parts(demo_parts())
    show_demo()


if __name__ == "__main__":
    main()
