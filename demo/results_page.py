"""docs/results.md and its figures, from what `make results` left in output/demo.

    python -m demo.results_page            writes the page again; parts that were not run are left out, and named

Every number comes from a metrics.json of evaluate.py or a metrics.jsonl of train_stage3.py; nothing is typed in.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from demo.results import (
    BASELINES,
    CONTROLS,
    DEMO_SEED,
    DOSES,
    FRESH_CLIPS,
    NEW_CLIPS,
    NEW_STEPS,
    OVER_EVERY,
    OVER_STEPS,
    PLACEBOS,
    RESULTS,
    SEEDS,
    WEIGHTS,
    C,
    all_parts,
    folder_of,
    marks_of,
    seconds_taken,
)
from evaluation.report import probe_tables, twin_tables
from evaluation.scoring import METRICS
from pages.render import markdown_table
from stage3.held_out import blind_problem
from training.common import git_commit, load_config, read_jsonl, write_text
from training.config import Stage3Config
from training.run_folder import last_checkpoint

DOCS = Path("docs")
COLUMNS = {"words": "words", "recall": "recall", "trap_told": "companions told", "trap_invented": "invented",
           "chair_i": "CHAIRi", "wrong_claims": "wrong claims", "nll": "NLL"}
MODES = ("microscope", "copilot")
WINDOW = 35  # steps
BLUE, ORANGE, GREY = "#2563eb", "#d9480f", "#98a2b3"


def read_metrics(name: str) -> dict | None:
    file = RESULTS / name / "metrics.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def table(head: list[str], rows: list[list[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in [head, ["---"] * len(head), *rows])


def number(block: dict, key: str) -> str:
    """The value with its interval, a dash where there is nothing that it is a share of."""
    needs, digits = METRICS[key].needs, max(METRICS[key].decimals, 0 if key == "words" else 2)
    if needs and not block.get(needs):
        return "–"
    low, high = block["interval"][key]
    return f"{block[key]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def systems_table(metrics: dict, systems: list[str], mode: str, columns=COLUMNS) -> str:
    """One run of evaluate.py: a row per system, each number with its interval over clips."""
    rows = []
    for name in systems:
        if name in metrics["systems"]:
            title = f"stage2/{name}" if name in CONTROLS else name  # evaluate.py leaves out whose control it is
            rows.append([title, *(number(metrics["systems"][name][mode], key) for key in columns)])
    return table([mode.capitalize(), *columns.values()], rows)


# ---- the table of seeds ----------------------------------------------------------------------------------------------

SYSTEMS = {"stage2": "stage 2", "longer": "stage 2, trained for as long as stages 2 and 3",
           "best-of-8": "best of 8 answers of stage 2, by the reward",
           **{name: f"{name.upper()}, same number of answers" for name in BASELINES}, "stage3": "**stage 3 (GRPO)**",
           "new": f"stage 3 for {NEW_STEPS} steps on {NEW_CLIPS} clips that stage 2 has not seen",
           "reference": "held-out captions"}


def over_seeds(runs: list[dict], system: str, mode: str, key: str) -> str:
    """Mean over seeds, and from the lowest to the highest."""
    blocks = [run["systems"][system][mode] for run in runs]
    if METRICS[key].needs and not all(block.get(METRICS[key].needs) for block in blocks):
        return "–"
    values, digits = [block[key] for block in blocks], 0 if key == "words" else 2
    spread = f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def seeds_tables(runs: list[dict]) -> str:
    text = ""
    for mode in MODES:
        rows = []
        common = set.intersection(*(set(run["systems"]) for run in runs))
        for name in (name for name in SYSTEMS if name in common):
            rows.append([SYSTEMS[name], *(over_seeds(runs, name, mode, key) for key in COLUMNS)])
        text += table([mode.capitalize(), *COLUMNS.values()], rows) + "\n"
    return text


def difference_rows(runs: list[dict], mode: str, before: str, after: str) -> list[list[str]]:
    """Change from one system to another in each seed, paired over clips."""
    rows = []
    for key, title in COLUMNS.items():
        cells = []
        for run in runs:
            [pair] = [pair for pair in run["differences"] if (pair["before"], pair["after"]) == (before, after)]
            change, low, high = pair[mode][key]
            digits = 1 if key == "words" else 3
            text = f"{change:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
            cells.append(f"**{text}**" if low > 0 or high < 0 else text)
        rows.append([title, *cells])
    return rows


def differences_section(runs: list[dict], seeds: list[int]) -> str:
    text = ("### Paired differences\n\nOne system minus another, each seed by itself, with the 95% interval over "
            "clips; bold where it leaves out 0.\n\n")
    pairs = [*((before, "stage3") for before in ("stage2", "best-of-8", *BASELINES)), ("stage2", "new")]
    for before, after in pairs:
        for mode in MODES:
            head = [f"{mode.capitalize()}: {after} − {before}", *(f"seed {seed}" for seed in seeds)]
            text += table(head, difference_rows(runs, mode, before, after)) + "\n"
    return text


def draw_tradeoff(runs: list[dict], file: Path) -> None:
    """What is told of the companions that are there, against what is invented of those that are not."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharex=True, sharey=True)
    for axis, mode in zip(axes, MODES, strict=True):
        for name, marker in zip(SYSTEMS, "os^Dv*hP", strict=False):
            blocks = [run["systems"][name][mode] for run in runs if name in run["systems"]]
            if blocks:
                colour, size = {"stage3": (BLUE, 190), "stage2": (ORANGE, 70)}.get(name, (GREY, 70))
                invented = [block["trap_invented"] for block in blocks]
                told = [block["trap_told"] for block in blocks]
                axis.scatter(invented, told, marker=marker, s=size, color=colour, label=name, alpha=0.85,
                             edgecolor="white", zorder=2 if colour == GREY else 3)
        axis.set(title=mode.capitalize(), xlabel="companions invented (of those not there)", xlim=(-0.04, 1.04),
                 ylim=(-0.04, 1.04))
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("companions told (of those there)")
    axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def contradicted(rollouts: Path) -> list[str]:
    """Of what a run's sampled answers say of counts, colours, sides, lights and motion and evidence or reference
    decide: the share that they contradict, in the first and in the last WINDOW steps."""
    records = [record for record in read_jsonl(rollouts) if "claims" in record]
    last, shares = max(record["step"] for record in records), []
    for first in (1, last - WINDOW + 1):
        verdicts = []
        for record in records:
            if first <= record["step"] < first + WINDOW:
                verdicts += [verdict for _, verdict, _, _ in record["claims"]]
        wrong = verdicts.count("contradicted")
        shares.append(f"{wrong / max(1, wrong + verdicts.count('supported')):.1%}")
    return shares


def contradicted_section(seeds: list[int]) -> str:
    rows = []
    for name, title in (("stage3", "stage 3, on clips that stage 2 was trained on"), ("new", "stage 3, on new clips")):
        files = [folder_of(seed, name) / "rollouts.jsonl" for seed in seeds]
        if all(file.is_file() for file in files):
            rows.append([title, *(" → ".join(contradicted(file)) for file in files)])
    if not rows:
        return ""
    return ("### What there is to learn about claims\n\nThe share of the sampled answers' claims about counts, "
            "colours, sides, lights and motion that the evidence contradicts, or the reference where the evidence does "
            f"not know, of those that are decided: in the first {WINDOW} steps → in the last {WINDOW}.\n\n"
            + table(["", *(f"seed {seed}" for seed in seeds)], rows))


def wordings_section(runs: list[dict]) -> str:
    """Answers of the granularity asked for, in the standard question and in wordings that training never saw."""
    rows = []
    for name in ("stage2", "longer", *BASELINES, "stage3"):
        shares, broken, asked = {"mode_accuracy": [], "mode_accuracy_unseen": []}, 0, 0
        for run in runs:
            for key, values in shares.items():
                values.append(run["systems"][name][key])
            for questions in run["unseen_wordings"][name].values():
                broken += sum(counts["broken"] for counts in questions.values())
                asked += sum(counts["asked"] for counts in questions.values())
        cells = [f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})" for values in shares.values()]
        rows.append([SYSTEMS[name], *cells, f"{broken} of {asked:,}"])
    return ("### Asked in other words\n\nThe share of answers of the mode's usual length, unbroken in the second "
            "column: to the standard questions, and to eight wordings a mode that training never saw (`MODE_TABLE` in "
            "`dataset.py`). Broken: cut off, or more than a fifth of it repeated.\n\n"
            + table(["", "standard questions", "unseen wordings", "broken, of the unseen"], rows))


def stage3_answers() -> str:
    config = load_config(Stage3Config, ["--config", f"{C}/stage3.yaml"])
    prompts = config.per_device_batch_size * config.gradient_accumulation_steps
    return f"{config.max_steps} steps of {prompts} prompts with {config.num_generations} answers each"


def table_section(done: list[int]) -> str:
    runs = [read_metrics(f"seed{seed}/table") for seed in done]
    draw_tradeoff(runs, DOCS / "results_tradeoff.png")
    return f"""## Does reinforcement learning help, and does it beat the cheaper ways?

Seeds {', '.join(map(str, done))}; mean over seeds, in brackets the lowest and the highest. Every baseline takes the
same seed's stage 2 and as many answers of it, or of its own, as stage 3 takes ({stage3_answers()}).

{seeds_tables(runs)}
![companions told against invented](results_tradeoff.png)

{differences_section(runs, done)}
{contradicted_section(done)}
{wordings_section(runs)}"""


# ---- the other groups ------------------------------------------------------------------------------------------------


def look_section(metrics: dict) -> str:
    columns = {"recall": "recall", "trap_told": "companions told", "trap_invented": "invented", "chair_i": "CHAIRi",
               "wrong_claims": "wrong claims", "order": "order of events"}
    text = "## Does it look at the video?\n\nSeed 42. Each stage, shown the clip and changed clips.\n\n"
    for mode in MODES:
        names = ["prior"]
        for stage in ("stage1", "stage2", "stage3"):
            names += [stage, *(how if stage == "stage2" else f"{stage}/{how}" for how in CONTROLS)]
        text += systems_table(metrics, names, mode, columns) + "\n"
    text += "Two questions about each clip, and clips that lack one object ([evaluation.md](evaluation.md)):\n\n"
    answered = {name: block for name, block in metrics["systems"].items() if name not in CONTROLS and "/" not in name}
    metrics = metrics | {"systems": answered}
    return text + "\n".join(map(markdown_table, probe_tables(metrics) + twin_tables(metrics))) + "\n"


def gap_rows(title: str, folder: Path, config: Stage3Config) -> list[list[str]]:
    """One run of stage 3: a row per evaluation, stage 2's (step 0) first; "stop" where `stop_when_blind` would stop."""
    state = json.loads((last_checkpoint(folder) / "run.json").read_text(encoding="utf-8"))
    first = state["evaluations"]["first"]
    log = [row for row in read_jsonl(folder / "metrics.jsonl") if "eval_reward_microscope" in row]
    rows = []
    for values in log:
        cells = []
        for mode in MODES:
            cells += [f"{values[f'eval_{key}_{mode}']:.2f}" for key in ("reward", "gap_swapped", "gap_blank")]
        rows.append([title, str(values["step"]), *cells, "stop" if blind_problem(config, first, values) else ""])
    return rows


def watching_section(seeds: list[int]) -> str:
    """Reward of the own clip, and its lead over another clip and grey frames, while stage 3 and placebos train."""
    config = load_config(Stage3Config, ["--config", f"{C}/stage3.yaml"])
    runs = {f"stage 3, seed {seed}": folder_of(seed, "stage3") for seed in seeds}
    runs |= {name: folder_of(DEMO_SEED, name) for name in PLACEBOS}
    rows = []
    for title, folder in runs.items():
        if last_checkpoint(folder) is not None and (folder / "metrics.jsonl").is_file():
            rows += gap_rows(title, folder, config)
    if not rows:
        return ""
    head = ["run", "step"]
    for mode in MODES:
        head += [f"{mode} reward", "over another clip", "over grey"]
    return ("## Is the video still watched while it trains?\n\nOn the demo's 40 held-out clips: the reward of the "
            "answers (each run's own), and how much less the answers to another clip, or to grey frames, are paid by "
            "the same evidence. *stop*: here `stop_when_blind` stops the run; these went on all the same.\n\n"
            + table([*head, ""], rows))


def ablations_section(metrics: dict) -> str:
    names = ["stage2", "stage3", *PLACEBOS, *(f"without_{part}" for part in WEIGHTS)]
    text = ("## Placebos, and each part of the reward removed\n\nSeed 42. `style_alone` believes all that is said "
            "(`bench/baselines.py`); `other_clip` checks a training clip's answers against another clip's boxes.\n\n")
    return text + "\n".join(systems_table(metrics, names, mode) for mode in MODES) + "\n"


def faults_section(metrics: dict) -> str:
    names = ["stage2", "dose0", *(f"dose{dose}" for dose in DOSES), "blind_person", "leave_out_person", "leave_out_car"]
    draw_faults(metrics, DOCS / "results_faults.png")
    text = ("## A detector with faults\n\nSeed 42. At dose d, each object is missed, each bus or truck confused and a "
            "false object added to a clip with probability d (`demo/detector_faults.py`).\n\n"
            "![dose curve](results_faults.png)\n\n")
    return text + "\n".join(systems_table(metrics, names, mode) for mode in MODES) + "\n"


def draw_faults(metrics: dict, file: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", sharex=True)
    doses = [0, *DOSES]
    for axis, key in zip(axes, ("chair_i", "trap_told", "wrong_claims"), strict=True):
        for mode, colour in zip(MODES, (BLUE, ORANGE), strict=True):
            blocks = [metrics["systems"][f"dose{dose}"][mode] for dose in doses]
            draw_line(axis, doses, blocks, key, colour, mode)
            axis.axhline(metrics["systems"]["stage2"][mode][key], color=colour, linestyle=":", linewidth=1)
        axis.set(title=COLUMNS[key], xlabel="dose, %")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=8, title="dotted: stage 2", title_fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_line(axis, x, blocks: list[dict], key: str, colour: str, label: str) -> None:
    low, high = zip(*(block["interval"][key] for block in blocks), strict=True)
    axis.plot(x, [block[key] for block in blocks], "o-", color=colour, label=label, markersize=4)
    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def over_section(metrics: dict) -> str:
    steps = [0, *range(OVER_EVERY, OVER_STEPS + 1, OVER_EVERY)]
    log = [row for row in read_jsonl(folder_of(DEMO_SEED, "over") / "metrics.jsonl") if "eval_reward_microscope" in row]
    reward = {row["step"]: (row["eval_reward_microscope"] + row["eval_reward_copilot"]) / 2 for row in log}
    best = max(reward, key=reward.get)
    draw_over(metrics, steps, reward, best, DOCS / "results_over.png")
    names = ["stage2", *(f"step{step}" for step in steps[1:])]
    return f"""## Four times the steps

Seed 42, {OVER_STEPS} steps. The held-out reward is highest at step {best}, which `keep_best` keeps.

![reward, truth, second judge, NLL and KL over the steps](results_over.png)

{systems_table(metrics, names, "microscope")}
{systems_table(metrics, names, "copilot")}
"""


def draw_over(metrics: dict, steps: list[int], reward: dict, best: int, file: Path) -> None:
    names = ["stage2", *(f"step{step}" for step in steps[1:])]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained", sharex=True)
    axes = axes.flatten()
    axes[0].plot(list(reward), list(reward.values()), "o-", color="#111827", markersize=4)
    axes[0].set_title("held-out reward, mean of the modes")
    for mode, colour in zip(MODES, (BLUE, ORANGE), strict=True):
        blocks = [metrics["systems"][name][mode] for name in names]
        draw_line(axes[1], steps, blocks, "chair_i", colour, f"{mode}, truth")
        judged = [metrics["agreed"]["systems"][name][mode]["chair_i"] for name in names]
        axes[1].plot(steps, judged, "--", color=colour, linewidth=1, label=f"{mode}, truth and second judge")
        draw_line(axes[2], steps, blocks, "recall", colour, mode)
        draw_line(axes[3], steps, blocks, "nll", colour, f"{mode}, NLL under stage 2")
    axes[1].set_title("CHAIRi")
    axes[2].set_title("recall")
    kl = [(row["step"], row["kl"]) for row in read_jsonl(folder_of(DEMO_SEED, "over") / "metrics.jsonl") if "kl" in row]
    axes[3].plot(*zip(*kl, strict=True), color=GREY, linewidth=0.8, label="KL to stage 2")
    axes[3].set_title("nats per token")
    for axis in axes:
        axis.axvline(best, color="#16a34a", linewidth=1, linestyle=":")
        axis.grid(alpha=0.25)
    axes[1].legend(frameon=False, fontsize=7)
    axes[3].legend(frameon=False, fontsize=7)
    axes[2].set_xlabel(f"step (dotted: best held-out reward, step {best})")
    figure.savefig(file, dpi=110)
    plt.close(figure)


# ---- the page --------------------------------------------------------------------------------------------------------


def machine() -> str:
    """Cores and processor, as the system names it."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines()
                 if line.startswith("model name")]
        model = f"{len(names)} cores of {names[0]}" if names else model
    return model


def spent(seeds) -> str:
    """How long the parts took that are done."""
    parts = all_parts(seeds)
    marks = marks_of(parts)
    seconds = [seconds_taken(part, marks[part.name]) for part in parts]
    done = [value for value in seconds if value is not None]
    return f"{len(done)} of {len(parts)} parts, {sum(done) / 3600:.1f} hours one after another"


def write_page(seeds=SEEDS) -> Path:
    """Write docs/results.md from what is there; returns its path."""
    done = [seed for seed in seeds if read_metrics(f"seed{seed}/table")]
    sections, missing = [], []
    if done:
        sections.append(table_section(done))
    if left := [str(seed) for seed in seeds if seed not in done]:
        missing.append(f"the table of seed {', '.join(left)}")
    for name, write in (("look", look_section), ("ablations", ablations_section), ("faults", faults_section),
                        ("over", over_section)):
        metrics = read_metrics(name)
        if metrics is None:
            missing.append(name)
        else:
            sections.append(write(metrics))
    sections.append(watching_section(done))
    head = f"""# Results in the toy world

`make results` on {machine()}, {time.strftime('%Y-%m-%d')}, commit {git_commit()[:10]}: {spent(seeds)}.
{FRESH_CLIPS} fresh clips that no run was trained on; exact truth; greedy answers. Intervals are 95% bootstrap
intervals over clips: they say what other clips might give, not what another training run might; that, the seeds say.
The columns are explained in [evaluation.md](evaluation.md). A *companion* is what captions invent by context: a
pedestrian at a red light, a car behind a bus.
"""
    if missing:
        head += f"\n**Not run yet: {', '.join(missing)}.**\n"
    path = DOCS / "results.md"
    write_text(path, head + "\n" + "\n".join(sections))
    return path


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.results_page", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="seeds of the first table")
    print(f"the results: {write_page(parser.parse_args(argv).seeds)}")


if __name__ == "__main__":
    main()
