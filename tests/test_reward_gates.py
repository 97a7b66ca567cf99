"""Each gate of the reward leaves honest texts alone and stops an attack that nothing else stops.

Run: `python -m pytest tests/test_reward_gates.py -q`
"""

import json
from pathlib import Path

import pytest

from bench.honest_lines import COPILOT, REPORTS, SENTENCES
from stage3 import grpo_reward_func as rewards
from stage3.grpo_reward_func import MODE_REWARDS, Evidence, caption_gates, compare_claims, physics_aware_reward
from stage3.mentions import names_object, read_caption
from tests.test_reward import C, D, F, M, T

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "bdd_captions_300.json"


def gates_of(text, mode, present=None):
    """The gates of a text; present: None for all that it names, so that no claim of it is wrong."""
    caption, settings = read_caption(text), MODE_REWARDS[mode]
    if present is None:
        present = set()
        for claim in caption.claims:
            if not claim.negated:
                present.update(claim.classes if names_object(claim) else claim.classes[:1])
    evidence = Evidence(present)
    claimed = compare_claims(caption, evidence, ["unknown"] * len(caption.facts))
    rewards.mark_clauses(caption, claimed, evidence, settings)
    return caption_gates(caption, claimed, rewards.new_words_share(caption, settings), settings)


def least(texts):
    """{gate: (its least factor over (text, mode, present), the text)}."""
    worst = {}
    for text, mode, present in texts:
        for name, value in gates_of(text, mode, present).items():
            worst[name] = min(worst.get(name, (1.0, "")), (value, text))
    return worst


def test_no_gate_touches_honest_lines():
    lines = [(text, C, present) for text, present in [*COPILOT, *SENTENCES]]
    reports = [(text, M, present) for text, present in [*REPORTS, *SENTENCES]]
    assert {name: found for name, found in least(lines + reports).items() if found[0] < 0.95} == {}


@pytest.mark.skipif(not REAL.is_file(), reason="the real captions are not here")
def test_no_gate_touches_real_reports():
    reports = [(row["a"], M, None) for row in json.loads(REAL.read_text())]
    assert {name: found for name, found in least(reports).items() if found[0] < 0.95} == {}


ATTACKS = {  # gate -> (attack, mode, the faithful text)
    "word order": (F.replace("the", "the the"), M, F),
    "variety": (f"{F} {F}", M, F),
    "focus": (f"The scene is calm and quiet today. {T}", C, T),
    "piles": (F + " Red, blue, green, large, small, shiny, dark, bright.", M, F),
    "denials": (F + " No dog, no cat, no horse, no boat, no bench, no kite and no elephant are there.", M, F),
}


@pytest.mark.parametrize("gate", ATTACKS)
def test_each_gate_stops_an_attack_that_nothing_else_stops(gate, monkeypatch):
    """With the gate the attack loses; without it, it is worth as much as the faithful text."""
    attack, mode, faithful = ATTACKS[gate]
    best = physics_aware_reward(faithful, D, mode).total
    assert physics_aware_reward(attack, D, mode).total < 0.97 * best

    def without(*args):
        return caption_gates(*args) | {gate: 1.0}

    monkeypatch.setattr(rewards, "caption_gates", without)
    assert physics_aware_reward(attack, D, mode).total >= 0.999 * best
