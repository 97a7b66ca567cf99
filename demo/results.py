"""Everything that a claim of the README rests on, in the toy world: three seeds, the cheaper ways to use the same
rollouts, placebos, each part of the reward taken out, a detector with faults, four times the steps; then the page.

    make results     (python -m demo.results)         hours on 2 cores
    python -m demo.results --list                     the parts, and which of them are done
    python -m demo.results --seeds 42 --only table    some of it

All systems answer about the same 300 fresh clips, which no run has trained on or chosen anything by. Interrupt and
rerun it: a finished part is not run again (see demo/run.py), an interrupted one continues. The last step writes
docs/results.md and its figures from the metrics.json files (demo/results_page.py).
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from demo.run import (
    OUT,
    PYTHON,
    ROOT,
    TORCHRUN,
    Part,
    clock,
    demo_parts,
    marks_of,
    run_at_once,
    run_parts,
    seconds_taken,
)
from training.common import cpu_count
from training.config import RewardKeys

C = "configs/demo"
RESULTS = OUT / "results"
DEMO_SEED = 42  # the demo's own run
SEEDS = (42, 1, 2)
FRESH_CLIPS, FRESH_SEED = 300, 7
NEW_CLIPS, NEW_SEED, NEW_STEPS = 400, 11, 210  # clips for stage 3 that stage 2 was not trained on
LONGER_STEPS = 440  # stage 2's 180 steps and as many more as take the time of stage 3
OVER_STEPS, OVER_EVERY = 280, 35  # four times the steps of configs/demo/stage3.yaml
DOSES = (5, 15, 30)  # percent
CONTROLS = ["blank", "swapped", "middle", "shuffled", "reversed", "dark"]
# {name: flags of train_stage3.py}: what else can be made of the same number of rollouts
BASELINES = {
    "raft": ["--objective", "raft"],
    # of 1e-3, 3e-4 and 1e-4, with dpo_beta 0.2 and 0.5, what gave the highest held-out reward
    "dpo": ["--objective", "dpo", "--sample_from", "reference", "--learning_rate", "3e-4"],
}
# {name: flags}: rewards that do not look, or look elsewhere; bench/baselines.py explains them
PLACEBOS = {
    "style_alone": ["--reward", "bench.baselines:style_alone", "--reward_weights", "{temporal: 0.55, detail: 0.45}"],
    "fixed_text": ["--reward", "bench.baselines:fixed_text", "--reward_weights", "{likeness: 1}"],
    "other_clip": [],
}
WEIGHTS = RewardKeys().reward_weights
UNSTOPPED = ["--stop_when_blind", "none", "--max_kl", "none"]  # a run that goes wrong is a result too
NEW = ["--data", f"{OUT}/new/captions.json", "--video_root", f"{OUT}/new/videos", "--evidence_cache",
       f"{OUT}/evidence_new", "--max_steps", str(NEW_STEPS), "--eval_every", "105", "--save_every", "105"]
EVALUATE = [PYTHON, "evaluate.py", "--config", f"{C}/stage3.yaml", "--data", f"{OUT}/world/captions.json", "--val_data",
            f"{OUT}/fresh/captions.json", "--video_root", f"{OUT}/fresh/videos", "--truth", f"{OUT}/fresh/truth.json",
            "--evidence_cache", f"{OUT}/evidence_fresh", "--eval_batch_size", "100"]
STANDARD = ["--unseen_wordings", "false", "--calibrate", "false"]  # for the table alone


def folder_of(seed: int, name: str) -> Path:
    """Where a seed's run is: the demo's own stages are not trained again."""
    if seed == DEMO_SEED and name in ("stage1", "stage2", "stage3"):
        return OUT / name
    return RESULTS / f"seed{seed}" / name


def training(seed: int, name: str, title: str, flags: list[str], needs: tuple[str, ...], seconds: float,
             script: str = "train_stage3.py", config: str = f"{C}/stage3.yaml") -> Part:
    """A run of stage 2 or 3 from the seed's stage before."""
    before = "stage1" if script == "train_stage2.py" else "stage2"
    folder = folder_of(seed, name)
    command = [PYTHON, script, "--config", config, "--init_from", str(folder_of(seed, before)), "--output_dir",
               str(folder), "--seed", str(seed), *flags]
    return Part(f"{seed}-{name}", f"Seed {seed}: {title}", command, folder, seconds, trains=True, needs=needs)


def part_name(seed: int, name: str) -> str:
    return name if folder_of(seed, name) == OUT / name else f"{seed}-{name}"


def evaluation(name: str, title: str, systems: dict[str, Path], flags: list[str], needs: list[str], rows: int) -> Part:
    """One evaluate.py on the fresh clips. `rows`: systems that answer, for the estimate of time."""
    command = [*EVALUATE, "--output_dir", str(RESULTS / name), "--checkpoint",
               *(f"{system}={folder}" for system, folder in systems.items()), *flags]
    return Part(f"eval-{name}", title, command, RESULTS / name, 45.0 * rows, needs=("detect-fresh", *needs))


def seed_parts(seed: int) -> list[Part]:
    """A seed's stages, its baselines, and the table of both."""
    parts, longer = [], ["--max_steps", str(LONGER_STEPS)]
    stage1, stage2, stage3 = (part_name(seed, name) for name in ("stage1", "stage2", "stage3"))
    if seed != DEMO_SEED:
        parts.append(Part(stage1, f"Seed {seed}: stage 1",
                          [*TORCHRUN, "train_stage1_ddp.py", "--config", f"{C}/stage1.yaml", "--output_dir",
                           str(folder_of(seed, "stage1")), "--seed", str(seed)],
                          folder_of(seed, "stage1"), 58, trains=True, needs=("check",)))
        parts.append(training(seed, "stage2", "stage 2", [], (stage1,), 124, "train_stage2.py", f"{C}/stage2.yaml"))
        parts.append(training(seed, "stage3", "stage 3", [], (stage2, "detect"), 178))
    parts.append(training(seed, "longer", "stage 2 for as long as stages 2 and 3 take", longer, (stage1,), 300,
                          "train_stage2.py", f"{C}/stage2.yaml"))
    for name, flags in BASELINES.items():
        parts.append(training(seed, name, f"{name} instead of GRPO", [*flags, *UNSTOPPED], (stage2, "detect"), 178))
    parts.append(training(seed, "new", "stage 3 on clips new to stage 2", [*NEW, *UNSTOPPED], (stage2, "detect-new"),
                          534))
    names = ["stage2", "longer", *BASELINES, "stage3", "new"]
    systems = {name: folder_of(seed, name) for name in names}
    pairs = [*(f"{name}:stage3" for name in ("stage2", "longer", "best-of-8", *BASELINES)), "stage2:new"]
    parts.append(evaluation(f"seed{seed}/table", f"Seed {seed}: all of them on {FRESH_CLIPS} fresh clips", systems,
                            ["--best_of", "8", "--best_of_checkpoint", "stage2", "--compare", *pairs, "--calibrate",
                             "false"],
                            [part_name(seed, name) for name in names], len(names) + 9))
    return parts


def table_parts(seeds) -> list[Part]:
    parts = []
    for seed in seeds:
        parts += seed_parts(seed)
    return parts


def look_parts() -> list[Part]:
    """Does it look? Controls of every stage, questions, twins."""
    systems = {name: OUT / name for name in ("stage1", "stage2", "stage3")}
    flags = ["--controls", *CONTROLS, "--probes", "true", "--twins", f"{OUT}/fresh/twins.json", *STANDARD]
    return [evaluation("look", "Controls, questions and twins of each stage", systems, flags, list(systems), 28)]


def ablation_parts() -> list[Part]:
    """Placebos, and each part of the reward removed."""
    other = RESULTS / "evidence_of_others"
    command = [PYTHON, "-m", "bench.baselines", "--config", f"{C}/stage3.yaml", "--output_dir", str(other)]
    parts = [Part("evidence-of-others", "Evidence of another clip for each clip", command, other, 8, needs=("detect",))]
    runs = dict(PLACEBOS)
    for removed in WEIGHTS:
        rest = 1 - WEIGHTS[removed]  # the others' weights still sum to 1
        weights = {name: 0 if name == removed else round(weight / rest, 4) for name, weight in WEIGHTS.items()}
        table = ", ".join(f"{name}: {weight}" for name, weight in weights.items())
        runs[f"without_{removed}"] = ["--reward_weights", "{" + table + "}"]
    for name, flags in runs.items():
        needs, config = ("stage2", "detect"), f"{C}/stage3.yaml"
        if name == "other_clip":
            needs, config = ("stage2", "evidence-of-others"), str(other / "stage3.yaml")
        parts.append(training(DEMO_SEED, name, name.replace("_", " "), [*flags, *UNSTOPPED], needs, 178, config=config))
    systems = {"stage2": OUT / "stage2", "stage3": OUT / "stage3"} | {name: folder_of(DEMO_SEED, name) for name in runs}
    parts.append(evaluation("ablations", "Placebos, and parts of the reward removed", systems, STANDARD,
                            ["stage2", "stage3", *(f"{DEMO_SEED}-{name}" for name in runs)], len(systems) + 3))
    return parts


def fault_parts() -> list[Part]:
    """A detector with faults, in doses; one that is blind to people; a class left out of the reward."""
    parts, systems = [], {"stage2": OUT / "stage2", "dose0": OUT / "stage3"}
    faults = {f"dose{dose}": ["--dose", str(dose / 100)] for dose in DOSES}
    faults |= {"blind_person": ["--blind", "person"], "leave_out_person": ["--leave_out", "person"],
               "leave_out_car": ["--leave_out", "car"]}
    for name, flags in faults.items():
        folder = RESULTS / "evidence_with_faults" / name
        parts.append(Part(f"faults-{name}", f"Evidence with faults: {name}",
                          [PYTHON, "-m", "demo.detector_faults", *flags, "--output_dir", str(folder)], folder, 8,
                          needs=("detect",)))
        parts.append(training(DEMO_SEED, name, f"stage 3 with this evidence: {name}", UNSTOPPED,
                              ("stage2", f"faults-{name}"), 178, config=str(folder / "stage3.yaml")))
        systems[name] = folder_of(DEMO_SEED, name)
    parts.append(evaluation("faults", "Stage 3 by a detector with faults", systems, STANDARD,
                            ["stage2", "stage3", *(part.name for part in parts)], len(systems) + 3))
    return parts


def over_parts() -> list[Part]:
    """Four times the steps: where does it stop being better?"""
    steps = ["--max_steps", str(OVER_STEPS), "--eval_every", str(OVER_EVERY), "--save_every", str(OVER_EVERY),
             "--keep_checkpoints", "99", "--keep_best", "true", *UNSTOPPED]
    run = training(DEMO_SEED, "over", "four times the steps of stage 3", steps, ("stage2", "detect"), 720)
    systems = {"stage2": OUT / "stage2"}
    for step in range(OVER_EVERY, OVER_STEPS + 1, OVER_EVERY):
        systems[f"step{step}"] = run.folder / "checkpoints" / f"step-{step:06d}"
    judge = ["--second_judge.weights", f"{OUT}/detector/detector.pt", "--second_judge.image_size", "416",
             "--second_judge.num_frames", "11", *STANDARD]
    return [run, evaluation("over", "Every checkpoint of it", systems, judge, ["stage2", run.name], len(systems) + 3)]


def fresh_parts() -> list[Part]:
    folder, new = OUT / "fresh", OUT / "new"
    return [Part("fresh", f"{FRESH_CLIPS} fresh clips, and twins that lack an object",
                 [PYTHON, "-m", "demo.world", "--output_dir", str(folder), "--num_clips", str(FRESH_CLIPS), "--seed",
                  str(FRESH_SEED), "--held_out", "true", "--twins", "true"], folder, 30, needs=("world",)),
            Part("detect-fresh", "What the detector sees in them, to choose the best of 8 answers by",
                 [PYTHON, "-m", "stage3.detect_objects", "--config", f"{C}/stage3.yaml", "--data",
                  f"{folder}/captions.json", "--video_root", f"{folder}/videos", "--evidence_cache",
                  f"{OUT}/evidence_fresh"], OUT / "evidence_fresh", 40, needs=("fresh", "detector")),
            Part("new", f"{NEW_CLIPS} clips for stage 3 that stage 2 has not seen",
                 [PYTHON, "-m", "demo.world", "--output_dir", str(new), "--num_clips", str(NEW_CLIPS), "--seed",
                  str(NEW_SEED)], new, 20, needs=("world",)),
            Part("detect-new", "What the detector sees in them",
                 [PYTHON, "-m", "stage3.detect_objects", "--config", f"{C}/stage3.yaml", *NEW[:6]],
                 OUT / "evidence_new", 50, needs=("new", "detector"))]


GROUPS = {"table": table_parts, "look": look_parts, "ablations": ablation_parts, "faults": fault_parts,
          "over": over_parts}


def all_parts(seeds=SEEDS, only=tuple(GROUPS)) -> list[Part]:
    """Every part in the order in which it is run: the demo's first, then fresh clips, then the groups."""
    parts = [*demo_parts(), *fresh_parts()]
    for name in only:
        parts += GROUPS[name](seeds) if name == "table" else GROUPS[name]()
    return parts


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.results", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="seeds of the table (42: the demo's)")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of runs, default: all")
    parser.add_argument("--jobs", type=int, default=min(4, cpu_count()),
                        help="parts at a time, each on its share of the cores (default: one per core, 4 at most)")
    parser.add_argument("--list", action="store_true", help="list the parts and whether they are done; run nothing")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    parts = all_parts(args.seeds, args.only)
    if args.list:
        marks = marks_of(parts)
        for part in parts:
            taken = seconds_taken(part, marks[part.name])
            print(f"{part.title:<70} {'about ' + clock(part.seconds) if taken is None else 'done in ' + clock(taken)}")
        return
    if args.jobs > 1:
        run_at_once(parts, args.jobs)
    else:
        run_parts(parts)
    sys.exit(subprocess.call([PYTHON, "-m", "demo.results_page", "--seeds", *map(str, args.seeds)]))


if __name__ == "__main__":
    main()
