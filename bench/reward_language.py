"""Does stage 2's likelihood tell broken language from sound? And how far does a climb over word edits get with it?

    python -m bench.reward_language --config configs/demo/stage3.yaml            after `make demo`

On held-out clips: the worst tokens' NLL under stage 2 of the reference captions and of the same damaged (a word dropped
or doubled, two swapped, all shuffled), and of the answers that stage 3 sampled last, with the factor that each is paid.
Then climbs: random word edits of each reference, kept unless the reward falls, with the reward function alone and with
the factor, as the trainer pays. Prints two tables and writes one JSON file. Two minutes on 2 cores.
"""

import argparse
import json
import random
import statistics
from pathlib import Path
from types import SimpleNamespace

import torch

from bench.reward_attacks import changed
from dataset import MODES, load_split
from model import DriveVLM
from stage3.detect_objects import load_evidence
from stage3.grpo import Group, completion_logps, load_reference
from stage3.grpo_reward_func import physics_aware_reward
from stage3.language import language_factor, usual_nll, worst_nll
from stage3.rollout import VisualTokens, answer_limits, reference_text
from training.common import load_config, read_jsonl
from training.config import Stage3Config

EDITS = ("delete", "double", "swap", "replace")
LAST = 0.2  # share of the steps whose answers are taken for stage 3's


class Judge:
    """The reward of texts about a clip, with the language factor of stage 2."""

    def __init__(self, config, train):
        self.config = config
        self.model = DriveVLM.from_checkpoint(config.init_from, expect_stage=2, dtype=config.dtype)
        load_reference(self.model, config.init_from)
        self.visual = VisualTokens(self.model, Path("output/bench/visual_tokens"), config.video_root,
                                   config.frame_cache)
        sampler = SimpleNamespace(limits=answer_limits(config), prompts_per_rank=config.per_device_batch_size,
                                  read_clips=lambda asked: ({i: self.visual(e.video) for i, e in asked.items()}, []))
        train = self.model.with_times(train, config.video_root, config.frame_cache)
        self.usual = usual_nll(config, self.model, sampler, train)

    @torch.no_grad()
    def worst(self, entry, texts: list[str]) -> list[float]:
        """`worst_nll` of texts as answers to an entry, in nats."""
        tokenizer = self.model.tokenizer
        prompt = self.model.prompt_ids(entry.question, entry.times)
        ids = [[*tokenizer(text)["input_ids"], self.model.end_ids[0]] for text in texts]
        logps, _, mask = completion_logps(self.model, [Group(prompt, self.visual(entry.video), ids)],
                                          temperature=self.config.temperature)
        return worst_nll(logps, mask).tolist()

    def factors(self, entry, texts: list[str]) -> list[float]:
        return [language_factor(worst, self.usual[entry.mode]) for worst in self.worst(entry, texts)]


def damaged(text: str, how: str, draw: random.Random) -> str:
    if how == "shuffle":
        return " ".join(draw.sample(text.split(), len(text.split())))
    return changed(text, "microscope", how, [], draw)


def measure_kinds(judge: Judge, entries, records: list[dict], seed: int) -> dict:
    """{mode: {kind of text: {n, worst, paid, whole}}}: mean and largest worst NLL, mean factor, share paid in full."""
    table = {}
    for mode in MODES:
        rows = {}
        for entry in (entry for entry in entries if entry.mode == mode):
            draw = random.Random(f"{seed} {entry.id}")
            texts = {"reference": entry.captions[0]}
            texts |= {how: damaged(entry.captions[0], how, draw) for how in ("delete", "double", "swap", "shuffle")}
            for kind, worst in zip(texts, judge.worst(entry, list(texts.values())), strict=True):
                rows.setdefault(kind, []).append((worst, language_factor(worst, judge.usual[mode])))
        own = [(record["worst_nll"], record["language"]) for record in records
               if record["mode"] == mode and "language" in record]
        if own:
            rows["stage 3's answers"] = own
        table[mode] = {kind: describe(values) for kind, values in rows.items()}
    return table


def describe(values: list[tuple[float, float]]) -> dict:
    """Numbers of some texts' (worst NLL, factor)."""
    worst, factors = zip(*values, strict=True)
    return {"n": len(values), "worst": statistics.fmean(worst), "largest": max(worst),
            "paid": statistics.fmean(factors), "whole": sum(factor == 1 for factor in factors) / len(values)}


def climb(judge: Judge, entry, evidence, words, steps: int, seed: int, with_language: bool) -> dict:
    """Random word edits of the entry's caption, each kept unless what it is paid falls."""
    draw, said = random.Random(f"{seed} {entry.id}"), reference_text(entry)

    def paid(text):
        value = physics_aware_reward(text, evidence, entry.mode, said).total
        return value * judge.factors(entry, [text])[0] if with_language else value

    text = entry.captions[0]
    start = best = paid(text)
    for _ in range(steps):
        made = changed(text, entry.mode, draw.choice(EDITS), words, draw)
        if (value := paid(made)) >= best - 1e-12:
            text, best = made, value
    return {"id": entry.id, "start": start, "end": best, "gain": best - start, "text": text,
            "edited": text != entry.captions[0]}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo/stage3.yaml", help="stage 3's config, with evidence made")
    parser.add_argument("--num_clips", type=int, default=8, help="held-out clips to climb on, both modes")
    parser.add_argument("--climb_steps", type=int, default=150, help="edits of each caption")
    parser.add_argument("--seed", type=int, default=0, help="of damage and edits")
    parser.add_argument("--json", type=Path, default=Path("output/bench/reward_language.json"), help="JSON to write")
    args = parser.parse_args(argv)
    config = load_config(Stage3Config, ["--config", args.config, "--dtype", "float32"])
    train, held_out = load_split(config)
    evidence = load_evidence(config.evidence_cache, [*train, *held_out], config.detector)
    train = [entry for entry in train if evidence[entry.video]]
    judge = Judge(config, train)
    held_out = judge.model.with_times(held_out, config.video_root, config.frame_cache)
    rollouts = Path(config.output_dir) / "rollouts.jsonl"
    records = list(read_jsonl(rollouts)) if rollouts.is_file() else []
    begin = (1 - LAST) * max((record["step"] for record in records), default=0)
    kinds = measure_kinds(judge, held_out, [r for r in records if r["step"] > begin], args.seed)
    print("| text | n | worst tokens, nats (largest) | paid | paid in full |\n|---|---|---|---|---|")
    for mode, rows in kinds.items():
        print(f"| **{mode}**, usual up to {judge.usual[mode]:.2f} | | | | |")
        for kind, row in rows.items():
            print(f"| {kind} | {row['n']} | {row['worst']:.2f} ({row['largest']:.2f}) | {row['paid']:.2f} | "
                  f"{row['whole']:.0%} |")
    videos = sorted({entry.video for entry in held_out if evidence[entry.video]})[:args.num_clips]
    words = sorted(set(" ".join(entry.captions[0] for entry in held_out).split()))
    climbs = {}
    print("\n| climb of word edits | start | end | gain | largest gain | texts changed |\n|---|---|---|---|---|---|")
    for name, with_language in (("reward function alone", False), ("with the language factor", True)):
        runs = [climb(judge, entry, evidence[entry.video], words, args.climb_steps, args.seed, with_language)
                for entry in held_out if entry.video in videos]
        climbs[name] = runs
        start, end = statistics.fmean(run["start"] for run in runs), statistics.fmean(run["end"] for run in runs)
        print(f"| {name} | {start:.3f} | {end:.3f} | {end - start:+.3f} | "
              f"{max(run['gain'] for run in runs):+.3f} | {sum(run['edited'] for run in runs)} of {len(runs)} |")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"usual": judge.usual, "kinds": kinds, "climbs": climbs}, indent=2))


if __name__ == "__main__":
    main()
