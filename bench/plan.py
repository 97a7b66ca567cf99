"""Does a configuration fit a card, and how long will it take? Neither a GPU nor a download is needed to know.

    python -m bench.plan --config configs/stage2.yaml                     # on an RTX 4090
    python -m bench.plan --config configs/stage3.yaml --card a100 --num_generations 16 --clips 2000
    python -m bench.plan --sweep                                          # what each key costs; minutes
    python -m bench.plan --check                                          # the plan against real runs on this CPU

Any other flag is a key of the stage, as for its script. The project's own model and loss code runs on tensors without
content (torch's FakeTensorMode): each operation says what it would allocate, and what it frees is followed, which gives
the peak of each phase. Memory is planned for the longest rows that the configuration allows (`max_text_tokens`, all
answers at `max_new_tokens`), time for usual ones. FLOPs are counted by torch (full attention scores, also where half of
them are masked); GB read are all that operations read, one by one, as they run without a compiler. A phase takes as
long as its FLOPs or its reading, at 30% and 50% of what the card's data sheet promises, or as its calls of torch's
operations from Python, whichever is longest.

Assumed: attention is PyTorch's sdpa by fused kernels, which keep no length x length scores. Rows with padding and
GRPO's shared prefix need a mask of that size; it is counted, and a kernel that takes one (memory-efficient attention)
is assumed. Not counted: the driver's context, kernels' workspaces and the allocator's gaps, for which 2 GiB are left.
"""

import argparse
import dataclasses
import itertools
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.sizes import CARDS, STAGES
from training.common import fail, load_config, run_main, write_json

RESERVED_GIB = 2.0
SHARES = (0.3, 0.5)  # of the card's data sheet
CALL_SECONDS = 20e-6  # of Python for a call: decoding with configs/stage3.yaml took 19.5e-6 on an H200's host
# tokens of a usual answer: the mean of 300 real captions by Qwen3's tokenizer; a Copilot line of 45 words
USUAL_ANSWER = {"microscope": 442, "copilot": 53}
TOKENS_PER_WORD = 1.17  # of these captions


def parse_args(argv=None):
    """(our flags, the stage's flags)"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--config", default="configs/stage2.yaml", help="a stage's YAML [configs/stage2.yaml]")
    parser.add_argument("--stage", type=int, choices=STAGES, help="its stage [by the file's name, else by its keys]")
    parser.add_argument("--card", choices=CARDS, default="4090", help="[4090]")
    parser.add_argument("--clips", type=int, default=446, help="clips, if the data file is not here [446]")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    parser.add_argument("--sweep", action="store_true",
                        help="tables for configs/: what each key saves; what frames, groups and clips cost")
    parser.add_argument("--check", action="store_true", help="compare the plan of a middle-sized model with real steps")
    return parser.parse_known_args(argv)


if __name__ == "__main__":  # --help is answered before torch is imported, which takes seconds
    parse_args()

import torch
import transformers

from bench.phases import GIB, longest_answers, peak_of, phases_of, read_bases
from bench.plan_check import checks
from dataset import MODES, Entry, group_by_clip, load_split
from stage3.rollout import answer_limits


def read_data(config, stage, clips):
    """(training entries, {mode: tokens of a usual answer}, where they are from): made up where there are none."""
    usual = dict(USUAL_ANSWER)
    if Path(config.data).exists():
        entries, words = load_split(config)[0], {}
        for entry in entries:
            words.setdefault(entry.mode, []).append(len(entry.captions[0].split()))
        usual |= {mode: round(TOKENS_PER_WORD * sum(counts) / len(counts)) for mode, counts in words.items()}
        source = f"the {len(group_by_clip(entries)):,} training clips of {config.data}"
    else:
        names = map(str, range(max(1, clips - config.num_val_videos)))
        entries = [Entry(f"{name}#{mode}", name, mode, question, ("",))
                   for name, (mode, question) in itertools.product(names, MODES.items())]
        source = f"{clips:,} clips by --clips, as {config.data} is not here"
    if stage == 3:
        limits = answer_limits(config)
        usual = {mode: min(usual[mode], limits[mode]) for mode in dict.fromkeys(config.modes)}
        entries = [entry for entry in entries if entry.mode in config.modes]
    return entries, usual, source


def count_steps(config, stage, entries):
    """Optimizer steps of one process, as the stage's script counts them, but at least one."""
    size = config.per_device_batch_size * config.gradient_accumulation_steps
    rows = len(group_by_clip(entries)) if stage < 3 and config.shared_prefix else len(entries)
    steps = config.epochs * (rows // size) if stage < 3 else config.epochs * rows // size
    return config.max_steps or max(1, steps)


def largest_batch(config, stage, bases, phases, budget):
    """The largest per_device_batch_size whose peak is within `budget` bytes, by the growth of each phase from this
    batch to twice as many; 0 if not even one row fits."""
    size = config.per_device_batch_size
    doubled = phases_of(dataclasses.replace(config, per_device_batch_size=2 * size), stage, bases,
                        longest_answers(config, stage))
    fits = []
    for name, phase in phases.items():
        growth = (doubled[name].peak - phase.peak) / size
        if growth > 0:
            fits.append(size + (budget - phase.peak) // growth)
    return max(0, int(min(fits)))


def make_plan(config, stage, card, clips, batch=True):
    """All numbers of a plan, as they go to --json. `batch`: also look for the largest batch."""
    bases = read_bases(config)
    entries, usual, source = read_data(config, stage, clips)
    longest, budget = longest_answers(config, stage), (card.gib - RESERVED_GIB) * GIB
    memory = phases_of(config, stage, bases, longest)
    work = phases_of(config, stage, bases, usual, flops=True)
    steps, peak, rows = count_steps(config, stage, entries), peak_of(memory), []
    step_seconds = dict.fromkeys(map(str, SHARES), 0.0)
    for name, phase in memory.items():
        flops, read, calls = work[name].flops, work[name].read, work[name].calls
        promised = max(flops / card.tflops / 1e12, read / card.gb_per_second / 1e9)  # by the data sheet
        seconds = {str(share): max(promised / share, calls * CALL_SECONDS) for share in SHARES}
        for share in seconds if phase.in_step else ():
            step_seconds[share] += seconds[share]
        rows.append({"phase": name, "peak_gib": phase.peak / GIB, "tflop": flops / 1e12, "gb_read": read / 1e9,
                     "calls": round(calls), "in_step": phase.in_step, "seconds": seconds})
    return {"stage": stage, "card": dataclasses.asdict(card), "language_model": config.language_model,
            "vision_model": config.vision_model, "clips": source, "entries": len(entries), "steps": steps,
            "rows_a_step": config.per_device_batch_size * config.gradient_accumulation_steps,
            "longest_answers": longest, "usual_answers": usual,
            "peak_gib": peak / GIB, "budget_gib": budget / GIB, "fits": peak <= budget,
            "largest_batch": largest_batch(config, stage, bases, memory, budget) if batch else None,
            "hours": {share: steps * seconds / 3600 for share, seconds in step_seconds.items()}, "phases": rows,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}


def list_answers(tokens: dict[str, int]) -> str:
    return ", ".join(f"{mode} {number}" for mode, number in tokens.items())


def plan_table(plan, name):
    """The plan as text."""
    low, high = map(str, SHARES)
    card, batch, hours = plan["card"], plan["largest_batch"], plan["hours"]
    lines = [f"{name}, stage {plan['stage']}, on one {card['name']} ({card['gib']:g} GiB) | {plan['language_model']}, "
             f"{plan['vision_model']} | torch {plan['versions']['torch']}", "",
             f"| phase | peak GiB | TFLOP | GB read | 1,000 calls | s at {SHARES[0]:.0%} | s at {SHARES[1]:.0%} |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in plan["phases"]:
        seconds = f"{row['seconds'][low]:,.1f} | {row['seconds'][high]:,.1f}"
        phase = row["phase"] if row["in_step"] else f"{row['phase']} *"
        lines.append(f"| {phase} | {row['peak_gib']:.1f} | {row['tflop']:,.1f} | {row['gb_read']:,.0f} | "
                     f"{row['calls'] / 1000:,.0f} | {seconds} |")
    longest, usual = (list_answers(plan[key]) for key in ("longest_answers", "usual_answers"))
    lines += ["", f"All of an optimizer step; *: once, of one batch. Answers in tokens: for memory {longest}; for time "
                  f"{usual}.",
              f"{'Fits' if plan['fits'] else 'DOES NOT FIT'}: {plan['peak_gib']:.1f} GiB at the peak, of "
              f"{plan['budget_gib']:g} to use. Largest per_device_batch_size that fits: {batch or 'none'}.",
              f"{plan['steps']:,} steps of {plan['rows_a_step']} rows ({plan['entries']:,} entries: {plan['clips']}): "
              f"{hours[low]:.1f} h at {SHARES[0]:.0%} of the card, {hours[high]:.1f} h at {SHARES[1]:.0%}, without "
              "evaluations."]
    return "\n".join(lines)


def recognise(path):
    """The stage that a YAML is for, by its name (stage2.yaml), else by a key that one stage alone has; ConfigError."""
    if named := re.search("stage([123])", Path(path).stem):
        return int(named[1])
    from omegaconf import OmegaConf

    keys = set(OmegaConf.load(path)) if Path(path).is_file() else set()
    fields = {stage: set(cls.__dataclass_fields__) for stage, cls in STAGES.items()}
    for stage, own in fields.items():
        if keys & own - set().union(*(others for other, others in fields.items() if other != stage)):
            return stage
    fail([f"{path}: which stage is it for? Say --stage 1, 2 or 3"], title="nothing was planned")


def read_config(path, stage, flags):
    config = load_config(STAGES[stage], ["--config", str(path), *flags])
    config.dtype = "bfloat16" if config.dtype == "auto" else config.dtype  # as on any CUDA card
    return config


# ---------------------------------------------------------------------------------------------------------------------
# What keys save and cost


SAVINGS = {  # changes of one key, and the stages that have it
    "num_frames: 8": (1, 2, 3),
    "per_device_batch_size: 1": (1, 2),
    "max_text_tokens: 512": (1, 2),
    "num_generations: 4": (3,),
    "max_new_tokens: {microscope: 384, copilot: 96}": (3,),
    "gradient_accumulation_steps: 2": (3,),
    "language_model: Qwen/Qwen3-1.7B": (1, 2, 3),
    "shared_prefix: true": (2,),
    "shared_prefix: false": (3,),
    "activation_checkpointing: false": (1, 2, 3),
}
GROWTH = {"num_frames": ((8, 16, 32, 64), (1, 2, 3)), "num_generations": ((2, 4, 8, 16), (3,))}
CLIPS = (10, 100, 1000, 10000)


def sweep(card):
    """Tables of configs/stage1.yaml to stage3.yaml with single keys changed, and all plans behind them."""
    configs = {stage: read_config(ROOT / f"configs/stage{stage}.yaml", stage, []) for stage in STAGES}
    plans = {stage: make_plan(config, stage, card, 446, batch=False) for stage, config in configs.items()}
    print(f"Peak GiB on a GPU, and what a change saves\n\n{table(['', *map('stage {}'.format, STAGES)])}")
    print(row("as in configs/", *(f"{plan['peak_gib']:.1f}" for plan in plans.values())), flush=True)
    saved = {}
    for change, stages in SAVINGS.items():
        cells = []
        for stage, config in configs.items():
            if stage in stages:
                config = read_config(ROOT / f"configs/stage{stage}.yaml", stage, flags_of(change))
                phases = phases_of(config, stage, read_bases(config), longest_answers(config, stage))
                saved[f"{change}, stage {stage}"] = peak = peak_of(phases) / GIB
                cells.append(f"{peak:.1f} ({peak - plans[stage]['peak_gib']:+.1f})")
            else:
                cells.append("")
        print(row(f"`{change}`", *cells), flush=True)
    grown = {}
    for key, (values, stages) in GROWTH.items():
        print(f"\nPeak GiB and hours at {SHARES[0]:.0%} of the card, 446 clips\n\n"
              f"{table([key, *map('stage {}'.format, stages)])}")
        for value in values:
            cells = []
            for stage in stages:
                config = dataclasses.replace(configs[stage], **{key: value})
                grown[f"{key} {value}, stage {stage}"] = plan = make_plan(config, stage, card, 446, batch=False)
                cells.append(f"{plan['peak_gib']:.1f}, {plan['hours'][str(SHARES[0])]:.1f} h")
            print(row(value, *cells), flush=True)
    print(f"\nHours at {SHARES[0]:.0%} of the card\n\n{table(['training clips', *map('stage {}'.format, STAGES)])}")
    for clips in CLIPS:
        cells = []
        for stage, config in configs.items():
            entries, _, _ = read_data(config, stage, clips + config.num_val_videos)
            hours = plans[stage]["hours"][str(SHARES[0])] / plans[stage]["steps"] * count_steps(config, stage, entries)
            refused = stage < 3 and len(entries) < plans[stage]["rows_a_step"]
            cells.append("too few for a step" if refused else f"{hours:,.1f}")
        print(row(f"{clips:,}", *cells), flush=True)
    return {"configs": plans, "savings_peak_gib": saved, "growth": grown}


def row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def table(heads):
    return f"{row(*heads)}\n{row(*('---' for _ in heads))}"


def flags_of(change):
    """"key: value" -> the flags that say so."""
    key, value = change.split(": ", 1)
    return [f"--{key}", value]


def main(argv=None):
    args, flags = parse_args(argv)
    transformers.logging.set_verbosity_error()
    if args.check:
        return check_table()
    if args.sweep:
        found, code = sweep(CARDS[args.card]), 0
    else:
        stage = args.stage or recognise(args.config)
        found = make_plan(read_config(args.config, stage, flags), stage, CARDS[args.card], args.clips)
        print(plan_table(found, args.config))
        code = 0 if found["fits"] else 1
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, found, indent=1)
    return code


def check_table():
    print(f"MiB at the peak, float32, on this CPU\n\n{table(['stage', 'planned', 'measured', 'planned / measured'])}")
    for found in checks("middle"):
        print(row(found["stage"], f"{found['planned']:,.0f}", f"{found['measured']:,.0f}",
                  f"{found['planned'] / found['measured']:.3f}"), flush=True)
    return 0


if __name__ == "__main__":
    run_main(main)
