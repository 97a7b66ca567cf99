"""What stage 3 is compared with, beyond its own keys: rewards and evidence of placebos and of a published baseline.

    python train_stage3.py --reward bench.baselines:style_alone --reward_weights "{temporal: 0.55, detail: 0.45}"
    python train_stage3.py --reward bench.baselines:chair_alone --reward_weights "{chair: 1}" --objective dpo \\
        --sample_from reference
    python train_stage3.py --reward bench.baselines:fixed_text --reward_weights "{likeness: 1}"
    python -m bench.baselines --config configs/demo/stage3.yaml --output_dir output/demo/swapped
    python train_stage3.py --config output/demo/swapped/stage3.yaml

style_alone: the style parts of our reward where all that an answer names is taken for seen and all that it says for
true, so neither evidence nor reference has a say. (Weights of 0 for `objects` and `hallucination` are no such placebo:
the style parts pay only what is true.) If it mends as much as the reward does, the evidence is not what mends.

fixed_text: pays for one text per mode, whatever the clip shows: stage 3 must notice it (`stop_when_blind`).

chair_alone: 1 - CHAIR_i, by which CHAIR-DPO (2508.20181) tells the better from the worse answer.

The last two commands give every training clip the boxes of another training clip (each clip's are used once, none keeps
its own; held-out clips keep theirs, so `eval_reward` and its kin stay true). The folder gets swapped.json, which stands
where a detector's weights stand, so its hash is part of what names the cache and the boxes are never taken for the
detector's own; the boxes, in the form of stage3/detect_objects.py, each with "boxes_of", the clip that they are of; and
stage3.yaml, the given YAML with this evidence. Captions stay with their clips: they still vouch for verbs and colours.
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from dataset import load_split
from demo.detector_faults import write_boxes
from stage3.detect_objects import find_cache, load_records
from stage3.evidence import Evidence, clip_evidence
from stage3.grpo_reward_func import label_mentions, physics_aware_reward
from stage3.mentions import find_mentions
from stage3.vocabulary_config import COCO_NAMES
from training.common import fail, load_config, run_main, stable_seed
from training.config import Stage3Config

# ---- rewards ---------------------------------------------------------------------------------------------------------

FIXED_TEXTS = {
    "microscope": ("The ego vehicle drives along a city street by day. First, a red car in front slows down, so the "
                   "ego vehicle keeps its distance. Then the traffic light turns red and the ego vehicle stops. The "
                   "drive continues straight ahead."),
    "copilot": "Day, city: red car ahead slows, keep distance; then red light, ego stops.",
}


@dataclass(frozen=True)
class Style:
    """Parts of the placebo, in [0, 1]."""

    temporal: float
    detail: float


@dataclass(frozen=True)
class Chair:
    """The one part of CHAIR-DPO's choice, in [0, 1]."""

    chair: float


@dataclass(frozen=True)
class Fixed:
    """The one part of the reward for a fixed text, in [0, 1]."""

    likeness: float


def style_alone(caption, evidence, mode, reference=None) -> Style:
    """R_temp and R_detail of a caption that is believed: what it names is there, nothing else must be told."""
    named = {mention.object for mention in find_mentions(caption) if not mention.negated}
    believed = Evidence(named, unknown=frozenset(COCO_NAMES) - named)
    reward = physics_aware_reward(caption, believed, mode)
    return Style(reward.temporal, reward.detail)


def fixed_text(caption, evidence, mode, reference=None) -> Fixed:
    """How like the mode's fixed text a caption is: F1 of the pairs of neighbouring words."""
    said, wanted = caption.lower().split(), FIXED_TEXTS[mode].lower().split()
    pairs, paid = Counter(zip(said, said[1:], strict=False)), Counter(zip(wanted, wanted[1:], strict=False))
    return Fixed(2 * (pairs & paid).total() / (pairs.total() + paid.total()))


def chair_alone(caption, evidence, mode, reference=None) -> Chair:
    """1 - the share of the mentions whose class the detector did not see; 1 without a mention that it can judge.

    Each mention counts, as in CHAIR (1809.02156); unknown classes and denials are left out.
    """
    verdicts = [verdict for mention, verdict in label_mentions(caption, evidence) if not mention.negated]
    wrong, right = verdicts.count("unsupported"), verdicts.count("supported")
    return Chair(right / (right + wrong) if right + wrong else 1.0)


# ---- evidence of other clips -----------------------------------------------------------------------------------------


def swap_records(records: dict[str, dict], videos: list[str], seed: int) -> dict[str, dict]:
    """The records, where each of `videos` that has boxes gets those of another of them; a function of its arguments."""
    sound = [video for video in set(videos) if "error" not in records[video]]
    order = sorted(sound, key=lambda video: stable_seed(seed, "swap", video))
    swapped = dict(records)
    for video, other in zip(order, order[1:] + order[:1], strict=True):
        swapped[video] = records[video] | {"frames": records[other]["frames"], "boxes_of": other}
    return swapped


def write_swapped(config_file: str, config: Stage3Config, seed: int, output_dir: Path) -> str:
    """Write swapped.json, the boxes and stage3.yaml; returns how much of the evidence differs from a clip's own."""
    train, held_out = load_split(config)
    videos = sorted({entry.video for entry in train})
    own = load_records(config.evidence_cache, sorted({entry.video for entry in [*train, *held_out]}), config.detector)
    source = find_cache(config.evidence_cache, config.detector) / "settings.json"
    about = {"made_by": "python -m bench.baselines", "seed": seed, "swapped": videos,
             "boxes_of": json.loads(source.read_text(encoding="utf-8"))}
    file = output_dir / "swapped.json"
    settings, swapped = replace(config.detector, weights=str(file)), swap_records(own, videos, seed)
    write_boxes(config_file, file, about, settings, swapped, "other boxes")
    moved = [video for video in videos if "boxes_of" in swapped[video]]
    differ = sum(clip_evidence(swapped[video], settings).present != clip_evidence(own[video], settings).present
                 for video in moved)
    return (f"{len(moved)} of {len(videos)} training clips have the boxes of another clip; "
            f"in {differ} of them other classes are present")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.baselines", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/stage3.yaml", help="names the clips and the detector's boxes")
    parser.add_argument("--seed", type=int, default=42, help="decides whose boxes a clip gets")
    parser.add_argument("--output_dir", "--output-dir", required=True, help="folder of the swapped boxes")
    args = parser.parse_args(argv)
    config, output_dir = load_config(Stage3Config, ["--config", args.config]), Path(args.output_dir)
    if output_dir.resolve() == Path(config.evidence_cache).resolve():
        fail([f"output_dir: {output_dir} holds the detector's own boxes; give another folder"], "nothing was written")
    print(write_swapped(args.config, config, args.seed, output_dir))
    print(f"to train with it: python train_stage3.py --config {output_dir / 'stage3.yaml'}")
    return 0


if __name__ == "__main__":
    run_main(main)
