"""Limits for wrong captions and for honest ones.   .venv/bin/python -m pytest tests/test_reward_attacks.py -q

`python -m bench.reward_attacks --list` shows the texts behind a number.
"""

import pytest

from bench.attack_scenes import SCENES, misfits
from bench.reward_attacks import (
    FAMILIES,
    HONEST_TEXTS,
    MODES,
    attack_table,
    attacks,
    best_constant,
    climbs,
    faithful,
    honest,
    reward,
)

CHECKED = [family for family, (kind, _) in FAMILIES.items() if kind == "checked"]
LOST, LOST_IN_ONE_FAMILY, HONEST_SHARE = 0.90, 0.75, 0.99


@pytest.fixture(scope="module")
def table():
    return attack_table(attacks())


@pytest.fixture(scope="module")
def groups():
    return honest()


def test_the_scenes_are_sound():
    assert not misfits()
    for scene in SCENES:
        assert min(reward(scene, mode, faithful(scene, mode)) for mode in MODES) > 0.7, scene.name


def test_attacks_are_the_same_with_the_same_seed():
    assert attacks(3) == attacks(3)


def test_wrong_captions_lose(table):
    checked = table["checked"]
    assert checked["lose"] >= LOST * checked["n"]
    assert checked["largest"] <= 0.01 and checked["win"] <= 0.005 * checked["n"]


@pytest.mark.parametrize("family", CHECKED)
def test_no_family_pays(table, family):
    row = table[family]
    assert row["n"] > 0 and row["lose"] >= LOST_IN_ONE_FAMILY * row["n"]
    assert row["mean"] < 0


@pytest.mark.parametrize("group", HONEST_TEXTS)
def test_honest_texts_are_believed(groups, group):
    assert groups[group]["share"] >= HONEST_SHARE, groups[group]["failures"]


def test_sentences_that_are_inserted_gain_little():
    assert climbs(100, moves=("insert",))["gain"] <= 0.01


@pytest.mark.parametrize("mode", MODES)
def test_a_caption_without_a_look_at_the_clip_gets_half_at_most(mode):
    constant = best_constant(mode)
    assert constant["reward"] <= 0.5 * constant["faithful"]
