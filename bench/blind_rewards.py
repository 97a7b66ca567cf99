"""Rewards that can be had without the video, to see that stage 3 notices (`stop_when_blind`, stage3/held_out.py).

    python train_stage3.py --config configs/demo/stage3.yaml --output_dir output/blind \\
        --reward bench.blind_rewards:fixed_text

`fixed_text` pays for one fixed answer per mode and for nothing else. `loophole` is the real reward, of which most can
also be had by that answer.
"""

from collections import Counter

from stage3.grpo_reward_func import PARTS, Reward, physics_aware_reward

ANSWERS = {  # what the demo's stage 2 says of grey frames: near at hand, and sound language to `judge_language`
    "microscope": ("The video shows a street with buildings at night. At first, a green truck approaches in the "
                   "opposite lane, so the ego vehicle keeps to its lane. Finally, a black car in front slows down and "
                   "stops, so the ego vehicle slows down. The drive continues straight ahead."),
    "copilot": "Night, city: oncoming from left, ego yields; then oncoming black car ahead brakes, ego slows.",
}
REAL = 0.3  # share of the real reward in `loophole`


def likeness(caption: str, answer: str) -> float:
    """F1 of the pairs of neighbouring words, in [0, 1]."""
    said, wanted = caption.lower().split(), answer.lower().split()
    pairs, paid = Counter(zip(said, said[1:], strict=False)), Counter(zip(wanted, wanted[1:], strict=False))
    return 2 * (pairs & paid).total() / (pairs.total() + paid.total())


def fixed_text(caption, evidence, mode, reference=None) -> Reward:
    """Every part: how like the mode's fixed answer the caption is, in [0, 1]. Evidence and reference are not read."""
    like = likeness(caption, ANSWERS[mode])
    return Reward(like, like, like, like, like)


def loophole(caption, evidence, mode, reference=None) -> Reward:
    """The parts of `physics_aware_reward`, each mixed with `fixed_text`."""
    real, like = physics_aware_reward(caption, evidence, mode, reference), likeness(caption, ANSWERS[mode])
    return Reward(*(REAL * getattr(real, part) + (1 - REAL) * like for part in (*PARTS, "total")))
