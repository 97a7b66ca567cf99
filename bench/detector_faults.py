"""What a detector's faults do to the evidence, dose by dose, against the toy world's exact truth.

    python -m bench.detector_faults        after `make demo`; 0, 5, 15 and 30% of demo/detector_faults.py, seed 42

Takes the demo's stored boxes, of all its clips, and writes nothing but one JSON file. Prints precision and recall of
each class (demo/base_detector.py, `accuracy`), and of each kind of fact how many of those in the truth are answered and
how many answers are right (bench/evidence_truth.py; a light's state that is shown in a single frame counts as wrong).
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from bench.evidence_truth import KINDS_OF_FACT, compare, items
from demo.base_detector import accuracy
from demo.detector_faults import Faults, all_with_faults, faulty_settings
from stage3.detect_objects import load_records
from stage3.evidence import clip_evidence
from training.common import load_config, run_main, write_json
from training.config import EvaluateConfig, Stage3Config


def facts_right(evidence: dict, truth: dict) -> dict[str, dict]:
    """{kind of fact: {"answered": share of the truth's that have an answer, "precision": share of answers that are
    right}} of {video: Evidence} and the rows of truth.json."""
    found = {}
    for kind in KINDS_OF_FACT:
        counts = Counter()
        for video, said in evidence.items():
            for _, value, true in items(kind, said, truth[video]):
                counts[compare(value, true)] += 1
                counts["in truth"] += bool(true)
        answers = counts["right"] + counts["invented"] + counts["incomplete"]
        found[kind] = {"answered": round(answers / max(counts["in truth"], 1), 3),
                       "precision": round(counts["right"] / max(answers, 1), 3)}
    return found


def measure(records: dict, truth: dict, settings, faults: Faults) -> dict[str, dict]:
    """{class, "all" or kind of fact: its numbers} of one error model."""
    settings = faulty_settings(settings, faults, Path("none"))
    evidence = {}
    for video, record in all_with_faults(records, faults, settings).items():
        evidence[video] = clip_evidence(record, settings)
    classes, _ = accuracy(evidence, {video: set(row["present"]) for video, row in truth.items()})
    return {"classes": classes, "facts": facts_right(evidence, truth)}


def as_text(cell: dict, left: str, right: str) -> str:
    if cell.get("unknown") == 1:
        return "unknown"
    return f"{cell[left]:.2f} / {cell[right]:.2f}" if cell[right] else "– / 0.00"


def table(results: dict[str, dict]) -> str:
    """{head of the column: result of `measure`} as Markdown."""
    heads = list(results)
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for group, left, right in (("classes", "precision", "recall"), ("facts", "precision", "answered")):
        lines.append(f"| *{left} / {right}* |" + " |" * len(heads))
        for name in results[heads[0]][group]:
            cells = [result[group][name] for result in results.values()]
            lines.append(f"| {name} | " + " | ".join(as_text(cell, left, right) for cell in cells) + " |")
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo/stage3.yaml", help="names clips, truth and the boxes")
    parser.add_argument("--doses", type=float, nargs="+", default=[0.0, 0.05, 0.15, 0.30], help="of each kind of fault")
    parser.add_argument("--seed", type=int, default=42, help="of the faults")
    parser.add_argument("--json", type=Path, default=Path("output/bench/detector_faults.json"), help="JSON to write")
    args = parser.parse_args(argv)
    config = load_config(Stage3Config, ["--config", args.config])
    truth_file = load_config(EvaluateConfig, ["--config", args.config]).truth
    truth = json.loads(Path(truth_file).read_text(encoding="utf-8"))
    records = load_records(config.evidence_cache, sorted(truth), config.detector)
    results = {f"{dose:.0%}": measure(records, truth, config.detector, Faults(dose, args.seed)) for dose in args.doses}
    results["blind to person"] = measure(records, truth, config.detector, Faults(0.0, args.seed, blind=("person",)))
    results["person left out"] = measure(records, truth, config.detector, Faults(0.0, args.seed, leave_out=("person",)))
    print(table(results))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, {"seed": args.seed, "clips": len(records), "results": results}, indent=1)
    return 0


if __name__ == "__main__":
    run_main(main)
