"""Rewards that can be had without the video, to see that stage 3 notices (`stop_when_blind`, stage3/held_out.py).

    python train_stage3.py --config configs/demo/stage3.yaml --output_dir output/blind \\
        --reward bench.blind_rewards:fixed_text --reward_weights fixed 1
    python train_stage3.py --config configs/demo/stage3.yaml --output_dir output/loophole \\
        --reward bench.blind_rewards:loophole --reward_weights objects 0.12 temporal 0.08 detail 0.06 \\
        hallucination 0.04 fixed 0.7

`fixed_text` pays for one fixed answer and for nothing else. `loophole` is the real reward, which pays for it as well.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass

from stage3.grpo_reward_func import physics_aware_reward

ANSWERS = {  # as stage 2 words them, so that `judge_language` has nothing against them
    "microscope": ("The ego vehicle drives along a city street by day. First, a red car in front slows down, so the "
                   "ego vehicle keeps its distance. Then the traffic light turns red and the ego vehicle stops. The "
                   "drive continues straight ahead."),
    "copilot": "Day, city: red car ahead slows, keep distance; then red light, ego stops.",
}


@dataclass(frozen=True)
class Fixed:
    fixed: float


@dataclass(frozen=True)
class Loophole:
    objects: float
    temporal: float
    detail: float
    hallucination: float
    fixed: float


def likeness(caption: str, answer: str) -> float:
    """F1 of the pairs of neighbouring words, in [0, 1]."""
    said, wanted = caption.lower().split(), answer.lower().split()
    pairs, paid = Counter(zip(said, said[1:], strict=False)), Counter(zip(wanted, wanted[1:], strict=False))
    return 2 * (pairs & paid).total() / (pairs.total() + paid.total())


def fixed_text(caption, evidence, mode, reference=None) -> Fixed:
    """1 for the mode's fixed answer, less the less a caption is like it; evidence and reference are not looked at."""
    return Fixed(likeness(caption, ANSWERS[mode]))


def loophole(caption, evidence, mode, reference=None) -> Loophole:
    """The parts of `physics_aware_reward`, and that of `fixed_text`."""
    parts = dataclasses.asdict(physics_aware_reward(caption, evidence, mode, reference))
    del parts["total"]
    return Loophole(**parts, fixed=likeness(caption, ANSWERS[mode]))
