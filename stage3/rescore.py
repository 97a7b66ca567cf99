"""Scores the stored rollouts of a stage-3 run with another reward: what would have been rewarded otherwise? No GPU.

    python -m stage3.rescore output/stage3 --reward my_rewards:score        another reward function
    python -m stage3.rescore output/stage3 --reward_weights.detail 0.4      other weights, or any other key of stage 3
    python -m stage3.rescore output/stage3                                  the run's reward as the code has it today

Reads RUN/rollouts.jsonl and RUN/config.yaml, and the captions of the run's data file (as references); writes nothing.
"""

import itertools
import sys
from collections import defaultdict
from pathlib import Path

from training.common import fail, load_config, read_jsonl, run_main
from training.config import Stage3Config

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    print(__doc__)
    sys.exit(0)

import torch
from tqdm import tqdm

from dataset import DataError, load_split
from stage3.evidence import Evidence
from stage3.grpo import has_variance
from stage3.rollout import load_reward, reference_text, score_text, step_advantages
from training.common import DriveVLMError

SHOWN = 5  # answers whose advantage changes most
NEAR = 1e-9  # rewards that differ less are equal


def rescore(records: list[dict], references: dict[str, str], reward, config) -> list[dict]:
    """The records with "new_reward" and "new_advantage"; groups are the answers of one step and slot."""
    scored = []
    for record in tqdm(records, desc="  answers", unit="", disable=None):
        seen = {name: tuple(times) for name, times in record["evidence"]["seen"].items()}
        evidence = Evidence(**record["evidence"] | {"seen": seen})
        reference = references.get(record["id"])
        if reference is None:
            raise DriveVLMError(f"{config.data} has no caption of {record['id']} any more")
        total, _ = score_text(record["text"], evidence, record["mode"], reference, reward, config.reward_weights)
        scored.append(record | {"new_reward": total * record.get("language", 1.0)})
    steps = defaultdict(list)
    for group in groups_of(scored):
        steps[group[0]["step"]].append(group)
    for groups in steps.values():
        advantages = step_advantages(config, rewards_of(groups, "new_reward"), [group[0]["mode"] for group in groups])
        for record, advantage in zip(itertools.chain(*groups), advantages.flatten().tolist(), strict=True):
            record["new_advantage"] = advantage
    return scored


def rewards_of(groups: list[list[dict]], key: str) -> torch.Tensor:
    """The groups' values of "reward" or "new_reward" [B, G]."""
    rows = []
    for group in groups:
        rows.append([record[key] for record in group])
    return torch.tensor(rows, dtype=torch.float64)


def groups_of(records: list[dict]) -> list[list[dict]]:
    """The answers of one prompt together."""
    groups = defaultdict(list)
    for record in records:
        groups[record["step"], record["slot"]].append(record)
    return list(groups.values())


def count_dead(groups: list[list[dict]], key: str) -> int:
    """Groups whose rewards are all equal: there is nothing to learn from them."""
    return int((~has_variance(rewards_of(groups, key))).sum())


def compare(groups: list[list[dict]]) -> dict[str, float]:
    """Numbers of one mode, before and after."""
    answers = list(itertools.chain(*groups))
    pairs = reversed_pairs = moved = 0
    for group in groups:
        for one, other in itertools.combinations(group, 2):
            before, after = one["reward"] - other["reward"], one["new_reward"] - other["new_reward"]
            pairs += abs(before) > NEAR
            reversed_pairs += before * after < -NEAR**2
        best = max(group, key=lambda record: record["reward"])
        moved += best["new_reward"] < max(record["new_reward"] for record in group) - NEAR
    turned = sum(record["advantage"] * record["new_advantage"] < 0 for record in answers)
    return {
        "answers": len(answers), "groups": len(groups),
        "reward": sum(record["reward"] for record in answers) / len(answers),
        "new reward": sum(record["new_reward"] for record in answers) / len(answers),
        "dead groups": count_dead(groups, "reward"),
        "new dead groups": count_dead(groups, "new_reward"),
        "pairs reversed": reversed_pairs / max(pairs, 1), "best answer changed": moved / len(groups),
        "advantage changes sign": turned / len(answers),
    }


def table(columns: dict[str, dict[str, float]]) -> str:
    """One column per mode; shares as percentages."""
    lines = [f"{'':24}" + "".join(f"{mode:>14}" for mode in columns)]
    for key in next(iter(columns.values())):
        cells = []
        for values in columns.values():
            value = values[key]
            form = "14,d" if isinstance(value, int) else "14.4f" if "reward" in key else "14.1%"
            cells.append(f"{value:{form}}")
        lines.append(f"{key:24}" + "".join(cells))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else [str(arg) for arg in argv]
    run = Path(argv[0]) if argv and not argv[0].startswith("-") else Path()
    if not all((run / name).is_file() for name in ("rollouts.jsonl", "config.yaml")):
        fail(["usage: python -m stage3.rescore RUN_FOLDER [--reward module:function] [any key of stage 3]; RUN_FOLDER "
              "is a run folder of stage 3, with rollouts.jsonl and config.yaml"])
    config = load_config(Stage3Config, ["--config", run / "config.yaml", *argv[1:]])
    reward, problem = load_reward(config, config.modes[0])
    problems = [problem] if problem else []
    try:
        train, held_out = load_split(config)
        references = {entry.id: reference_text(entry) for entry in [*train, *held_out]}
    except (DataError, OSError) as error:
        problems.append(f"data: {error}")
    if problems:
        fail(problems)

    scored = rescore(list(read_jsonl(run / "rollouts.jsonl")), references, reward, config)
    if not scored:
        raise DriveVLMError(f"{run / 'rollouts.jsonl'} holds no rollouts yet")
    by_mode = defaultdict(list)
    for group in groups_of(scored):
        by_mode[group[0]["mode"]].append(group)
    weights = ", ".join(f"{weight:g} {part}" for part, weight in config.reward_weights.items())
    print(f"\n{run / 'rollouts.jsonl'} under {config.reward} ({weights}):\n")
    print(table({mode: compare(groups) for mode, groups in by_mode.items()}))
    scored.sort(key=lambda record: -abs(record["new_advantage"] - record["advantage"]))
    changed = [record for record in scored if abs(record["new_advantage"] - record["advantage"]) > 1e-6]
    print("\nAnswers whose advantage changes most:" if changed else "\nNo advantage changes.")
    for record in changed[:SHOWN]:
        print(f"  step {record['step']}, {record['id']}: reward {record['reward']:.3f} -> {record['new_reward']:.3f}, "
              f"advantage {record['advantage']:+.2f} -> {record['new_advantage']:+.2f}\n    {record['text']}")
    return 0


if __name__ == "__main__":
    run_main(main)
