"""How long does scoring one caption take?

    python -m bench.reward [--repeats 200] [--output output/bench/reward.json]

Scores generated reports of about 50, 375 and 750 words, Copilot lines, and texts built to be slow to parse, one after
another in one thread. Prints one table and writes one JSON file. Target: 10 ms for 375 words.
"""

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path

from stage3.grpo_reward_func import Evidence, physics_aware_reward

EVIDENCE = Evidence(
    {"car", "truck", "person", "traffic light"}, {"bicycle"},
    seen={"car": (0.0, 1.0), "truck": (0.5, 0.9), "person": (0.2, 0.4), "traffic light": (0.0, 0.6)},
)
THINGS = ("a red car", "the traffic light", "two pedestrians", "a large white truck", "a cyclist", "the ego vehicle",
          "a bus stop", "no buses", "a parked van", "the wet crosswalk", "streetlights", "a row of trees")
DOINGS = ("turns left at the intersection", "slows down and stops", "waits behind the median", "crosses from the right",
          "is visible in the distance", "moves along the lane", "remains in view under an overcast sky",
          "shows the calm of the city at night", "passes the storefronts on the right")
JOINTS = (". Then ", ", while ", ". ", ", and ", " as ", ". Finally ", "; ", " before ")
SLOW = {"375 words: no car no car ..": "no car " * 187, "375 words: a, a, a ..": "a car, " * 187,
        "375 words: without end": "car and red or bus without " * 75}


def report(words, seed):
    """A generated report of about `words` words, with objects, denials, clauses and filler."""
    draw, text = random.Random(seed), "At first "
    while len(text.split()) < words:
        text += f"{draw.choice(THINGS)} {draw.choice(DOINGS)}{draw.choice(JOINTS)}"
    return text.rstrip(" ,;") + "."


def milliseconds(texts, mode):
    """Times to score each text, in milliseconds, sorted."""
    times = []
    for text in texts:
        start = time.perf_counter()
        physics_aware_reward(text, EVIDENCE, mode)
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Milliseconds to score a caption.")
    parser.add_argument("--repeats", type=int, default=200, help="texts of each length")
    parser.add_argument("--output", default="output/bench/reward.json", help="the JSON to write")
    args = parser.parse_args(argv)

    cases = {"Copilot, 15 words": ([report(15, n) for n in range(args.repeats)], "copilot")}
    for words in (50, 375, 750):
        cases[f"Microscope, {words} words"] = ([report(words, n) for n in range(args.repeats)], "microscope")
    for name, text in SLOW.items():
        cases[name] = ([text] * 20, "microscope")

    milliseconds([report(375, 0)] * 5, "microscope")  # warm up
    rows = {}
    print(f"{'caption':<30}{'median ms':>12}{'95% ms':>10}{'worst ms':>10}")
    for name, (texts, mode) in cases.items():
        times = milliseconds(texts, mode)
        rows[name] = {"median_ms": statistics.median(times), "p95_ms": times[int(0.95 * len(times))],
                      "worst_ms": times[-1], "texts": len(times)}
        print(f"{name:<30}{rows[name]['median_ms']:>12.2f}{rows[name]['p95_ms']:>10.2f}{times[-1]:>10.2f}")

    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"python": platform.python_version(), "machine": platform.machine(), "threads": 1}
    output.write_text(json.dumps({"machine": machine, "target_ms_375_words": 10, "cases": rows}, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
