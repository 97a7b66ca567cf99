"""Does the reward follow the truth? Rewards from the toy detector's evidence, compared with exact truth.

    python -m bench.reward_truth --config configs/demo/stage3.yaml            after `make demo`

Samples `--num_samples` answers per clip and mode from stage 2 (the config's init_from) at T = 1, on clips of the
training split. For each mode it reports Spearman's correlation of R_obj and of the total with the exact F1 of the
classes mentioned, and the mean reward of the held-out reference captions, with their own clip's evidence and with
another clip's. Prints one table and writes one JSON file.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from dataset import MODES, cached_frames, load_split, resolve_video
from stage3.detect_objects import load_evidence
from stage3.grpo_reward_func import physics_aware_reward
from stage3.mentions import find_mentions
from stage3.rollout import answer_limits
from training.common import load_config
from training.config import Stage3Config


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def spearman(a, b) -> float:
    """Spearman's rank correlation; NaN where either side is constant."""
    return float(np.corrcoef(ranks(np.asarray(a)), ranks(np.asarray(b)))[0, 1])


def exact_f1(text: str, present: set[str]) -> float:
    """F1 of the set of classes mentioned against the classes that are there."""
    said = {mention.object for mention in find_mentions(text) if not mention.negated}
    return 2 * len(said & present) / (len(said) + len(present)) if said or present else 1.0


def sample(config, entries, num_samples: int, batch_size: int):
    """[(entry, text)]: `num_samples` answers to each entry at T = 1 from stage 2."""
    import torch

    from model import DriveVLM

    model = DriveVLM.from_checkpoint(config.init_from, expect_stage=2)
    entries = model.with_times(entries, config.video_root, config.frame_cache)
    limits, said = answer_limits(config), []
    for mode in MODES:
        rows = [entry for entry in entries if entry.mode == mode]
        for start in range(0, len(rows), batch_size):
            batch = rows[start:start + batch_size]
            frames = [cached_frames(resolve_video(config.video_root, e.video), model.num_frames, model.image_size,
                                    config.frame_cache) for e in batch]
            answers = model.generate(torch.from_numpy(np.stack(frames)), [e.question for e in batch], temperature=1.0,
                                     max_new_tokens=limits[mode], num_samples=num_samples, seed=start,
                                     times=[e.times for e in batch])
            said += [(batch[i // num_samples], answer.text) for i, answer in enumerate(answers)]
    return said


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo/stage3.yaml", help="stage 3's config, with evidence made")
    parser.add_argument("--truth", type=Path, default=Path("output/demo/world/truth.json"), help="the exact truth")
    parser.add_argument("--num_clips", type=int, default=60, help="training clips to sample on")
    parser.add_argument("--num_samples", type=int, default=4, help="answers per clip and mode")
    parser.add_argument("--json", type=Path, default=Path("output/bench/reward_truth.json"), help="JSON file to write")
    args = parser.parse_args(argv)
    config = load_config(Stage3Config, ["--config", args.config])
    truth = {v: set(row["present"]) for v, row in json.loads(args.truth.read_text(encoding="utf-8")).items()}
    train, held_out = load_split(config)
    evidence = load_evidence(config.evidence_cache, [*train, *held_out], config.detector)
    clips = set(sorted({entry.video for entry in train})[:args.num_clips])
    said = sample(config, [e for e in train if e.video in clips and evidence[e.video]], args.num_samples, 16)
    results = {}
    for mode in MODES:
        rows = [(entry, text) for entry, text in said if entry.mode == mode]
        rewards = [physics_aware_reward(text, evidence[entry.video], mode) for entry, text in rows]
        f1 = [exact_f1(text, truth[entry.video]) for entry, text in rows]
        own = [entry for entry in held_out if entry.mode == mode]
        other = own[1:] + own[:1]
        rewarded = [physics_aware_reward(e.captions[0], evidence[e.video], mode).total for e in own]
        swapped = [physics_aware_reward(e.captions[0], evidence[o.video], mode).total
                   for e, o in zip(own, other, strict=True)]
        results[mode] = {
            "answers": len(rows), "mean_f1": float(np.mean(f1)),
            "spearman_objects": spearman([r.objects for r in rewards], f1),
            "spearman_total": spearman([r.total for r in rewards], f1),
            "reference_reward": float(np.mean(rewarded)), "swapped_reward": float(np.mean(swapped)),
        }
    print("| mode | answers | mean F1 | Spearman R_obj, F1 | total, F1 | references' reward | on another clip |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for mode, r in results.items():
        print(f"| {mode} | {r['answers']} | {r['mean_f1']:.2f} | {r['spearman_objects']:.2f} | "
              f"{r['spearman_total']:.2f} | {r['reference_reward']:.2f} | {r['swapped_reward']:.2f} |")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
