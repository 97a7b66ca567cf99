"""The reward against captions that try to exploit it.   .venv/bin/python -m pytest tests/test_reward.py -q

Captions are compared with each other: which must score lower, higher or the same. SCENES holds evidence of eight
clips with a faithful caption for each mode; D is the evidence set of the 35 cases that the reward was designed on.
"""

import random
import re
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stage3.grpo_reward_func import (
    MODE_REWARDS,
    PARTS,
    REWARD_WEIGHTS,
    Evidence,
    find_mentions,
    label_mentions,
    physics_aware_reward,
)
from stage3.vocabulary_config import COCO_NAMES, SAFETY_CRITICAL
from training.config import Words

M, C = "microscope", "copilot"

# name -> (evidence, faithful Microscope caption, faithful Copilot line, an absent safety-critical class)
SCENES = {
    "D": (
        Evidence({"car", "truck", "person", "traffic light"}, {"bicycle"}),
        "A white car waits ahead as the traffic light turns red at a wet city intersection at night. A pedestrian in a "
        "dark coat crosses from the left while a large truck approaches in the opposite lane. Then the light changes "
        "to green and the white car ahead accelerates, so the ego vehicle follows it. Finally the truck passes on the "
        "left and the ego vehicle continues along the street.",
        "Red light, white car ahead brakes, pedestrian crosses from left, oncoming truck passes, stop.",
        "train",
    ),
    "highway": (
        Evidence({"car", "truck"}),
        "By day the ego vehicle drives along a highway with three lanes. A large white truck ahead slows down, so the "
        "ego vehicle changes to the left lane and overtakes it. Meanwhile a red car merges from the right, and then it "
        "accelerates past the truck.",
        "Highway: white truck ahead slows, red car merges right, change lane.",
        "person",
    ),
    "night": (
        Evidence({"car", "bus", "person"}, {"motorcycle", "truck"}),
        "At night a bus waits at a stop on the right side of a wet city street. Two pedestrians cross in front of it "
        "while a dark car ahead brakes. After that the bus pulls out slowly and the ego vehicle follows the car "
        "through the intersection.",
        "Night, wet city street: bus pulls out on right, pedestrians cross, car ahead brakes.",
        "traffic light",
    ),
    "stop sign": (
        Evidence({"car", "stop sign", "bicycle", "person"}, {"dog"}),
        "The ego vehicle approaches a stop sign at a residential intersection in daylight. A man rides a bicycle "
        "across from the left, so a parked blue car on the right waits before it pulls out. Finally the ego vehicle "
        "turns right when the road is clear.",
        "Stop sign ahead, man on bicycle crosses from left, parked car on right, stop.",
        "bus",
    ),
    "light": (
        Evidence({"traffic light"}),
        "The ego vehicle travels on a country road at night. At first the traffic light ahead turns red, so the ego "
        "vehicle slows down and stops. Then the light changes to green and the ego vehicle drives on across the "
        "intersection.",
        "Night: red light ahead, stop, then green, drive on.",
        "person",
    ),
    "empty": (
        Evidence(()),
        "The ego vehicle drives along a narrow country road by day. At first the road bends to the left, then it "
        "climbs between trees, and finally the ego vehicle slows down and turns right at a junction beside a fence.",
        "Day, country road: road bends left, ego slows, turns right.",
        "car",
    ),
    "city": (
        Evidence({"car", "bus", "truck", "person", "traffic light", "bicycle", "motorcycle"}, {"train", "bench"},
                 salient={"car", "bus", "person", "traffic light"}),
        "By day several cars wait at an intersection downtown while the traffic light ahead is red. A group of people "
        "crosses from the left, then the light turns green and a white bus turns right. Afterwards a yellow taxi "
        "overtakes the ego vehicle and a cyclist passes on the right.",
        "Red light, people cross from left, white bus turns right, taxi ahead waits.",
        "stop sign",
    ),
    "train": (
        Evidence({"train", "car"}, {"person"}),
        "A long train crosses the road ahead from the left in a rural area by day. The ego vehicle stops behind a "
        "white car and waits. Once the train passes, the car accelerates and then the ego vehicle follows across the "
        "tracks.",
        "Train crosses from left, white car ahead waits, stop.",
        "traffic light",
    ),
}
D, F, T, _ = SCENES["D"]
SENTENCES = F.split(". ")
PLAIN = ("There is a car on the road. There is a traffic light and it is red. There is a person on the street. There "
         "is a truck on the other side.")
NO_PERSON = F.replace("A pedestrian in a dark coat crosses from the left while a large", "A large")
NO_TRUCK = F.replace(" while a large truck approaches in the opposite lane", "").replace(
    "the truck passes on the left and the", "the")
MOOD = ("The atmosphere of the scene is calm and serene, evoking a sense of quiet tranquility and wonder. The mood is "
        "peaceful, with a gentle feeling of harmony that invites reflection. ")
GENERIC = ("The video shows a typical driving scene with various elements of the environment. The overall scene is "
           "calm and the conditions appear to be normal.")


def score(text, evidence=D, mode=M):
    return physics_aware_reward(text, evidence, mode).total


def classes_named(text):
    """The classes that the text says are present."""
    return {mention.object for mention in find_mentions(text) if not mention.negated}


# ---------------------------------------------------------------------------------------------------------------------
# The 35 cases

TRAIN = F + " A train approaches."
COLOURED = "".join(f" The {colour} car is ahead." for colour in ("red", "blue", "green", "black", "silver", "yellow"))
DENIALS = F + " There is no bus, no train, no motorcycle, no dog, no bench and no stop sign."
SALAD = F + " Red, blue, green, large, small, shiny, dark, bright."
KEYWORDS = "car truck person traffic light red green large white stops turns crosses then while night road crossroads"
EVERYTHING = ("There is a car, a truck, a bus, a train, a person, a dog, a bicycle, a motorcycle, a traffic light, a "
              "stop sign, a bench and a parking meter.")
VERBS = ("Stops turns brakes accelerates crosses passes merges slows moves drives follows enters exits overtakes "
         "yields waits walks runs then while as when after before until because so next finally later.")
FIRST_SIX = (SENTENCES[0] + ". ") * 6
PADDED = F + " " + MOOD * 14


@pytest.mark.parametrize(("lower", "higher"), [
    pytest.param(PLAIN, F, id="2 plain words < faithful"),
    pytest.param(TRAIN, F, id="3 invented train"),
    pytest.param(F + " A motorcyclist overtakes.", F, id="4 a rider needs a motorcycle"),
    pytest.param(F + " Three buses pass on the right.", F, id="5 invented buses"),
    pytest.param(F + " There is possibly a bus in the distance.", F, id="7 a hedge is no escape"),
    pytest.param(F.replace("truck", "fire truck"), F, id="8 an unverifiable kind of truck"),
    pytest.param(F.replace("truck", "fire truck"), NO_TRUCK, id="8 mended: below leaving the truck out"),
    pytest.param(DENIALS, F, id="11 mended: a list of denials costs"),
    pytest.param(NO_PERSON + " No pedestrians are visible.", NO_PERSON, id="13 false denial < omission"),
    pytest.param(SALAD, F, id="22 mended: adjective salad costs"),
    pytest.param(NO_PERSON, F, id="23 omission < faithful"),
    pytest.param(TRAIN, NO_PERSON, id="23 invention < omission"),
    pytest.param(NO_PERSON + " No pedestrians are visible.", TRAIN, id="13 false denial < invention"),
    pytest.param(KEYWORDS, PLAIN, id="24 keyword list"),
    pytest.param(EVERYTHING, PLAIN, id="25 list of classes"),
    pytest.param(VERBS, PLAIN, id="26 verbs and connectives"),
    pytest.param(FIRST_SIX, PLAIN, id="27 one sentence six times"),
    pytest.param(F + " " + F, F, id="28 said twice"),
    pytest.param(PADDED, PLAIN, id="29 padded with mood"),
    pytest.param(GENERIC, TRAIN, id="30 silence < an honest attempt"),
    pytest.param("A video showing driving scenes.", "The ego vehicle slows down and then turns.", id="31 > 32"),
    pytest.param("", "The ego vehicle slows down and then turns.", id="31 > empty"),
    pytest.param(F + " A bus stops ahead.", F + " Bus stops line the street.", id="33 verb and noun"),
])
def test_the_worse_caption_scores_lower(lower, higher):
    assert score(lower) < score(higher) - 0.01


@pytest.mark.parametrize("text", [
    pytest.param(F + " No buses or motorcycles are visible.", id="9"),
    pytest.param(F + " Stop signs are not visible.", id="10"),
    pytest.param(F + " Neither buses nor trains appear.", id="12a"),
    pytest.param(F + " The road is free of buses.", id="12b"),
    pytest.param(F + " The street is devoid of dogs.", id="12c"),
    pytest.param(F + " Later no pedestrians are visible.", id="14 it left"),
    pytest.param(F + " The ego vehicle waits until the pedestrian is no longer visible.", id="15"),
    pytest.param(F + " There is no movement from the cars.", id="16"),
    pytest.param(F + " There is a bus stop and a bike lane on the right.", id="17"),
    pytest.param(F.replace("traffic light", "signal") + " Streetlights illuminate the road.", id="18"),
    pytest.param(F + " A business with cargo storage shows a career fair banner.", id="19"),
    pytest.param(F.replace("pedestrian", "man"), id="20 man"),
    pytest.param(F.replace("A pedestrian", "Pedestrians"), id="20 plural"),
    pytest.param(F.upper(), id="20 upper case"),
    pytest.param(F + " A bicycle is on the right.", id="21 unknown"),
    pytest.param(F + " Bus stops line the street.", id="33 noun"),
])
def test_harmless_variants_score_like_the_faithful_caption(text):
    assert score(text) == pytest.approx(score(F), abs=1e-9)


def test_dilution_gains_nothing():  # case 6 of the 35
    assert score(TRAIN + COLOURED) == pytest.approx(score(TRAIN), abs=0.02)


def test_pedestrian_crossing_as_a_sentence_names_a_person():  # case 34 of the 35
    walker = Evidence({"traffic light", "car", "truck"})
    assert score(NO_PERSON + " A pedestrian crossing is ahead.", walker) == pytest.approx(score(NO_PERSON, walker))
    assert score(NO_PERSON + " Pedestrian crossing.", walker) < score(NO_PERSON, walker) - 0.1


def test_in_copilot_true_lines_beat_padding_and_lists():  # case 35 of the 35
    full = ("A car ahead slows as the traffic light turns red, while a pedestrian crosses from the left. Then the "
            "light turns green and a truck passes on the right.")
    padded = ("In this video we can observe that there is a red light, and a white car ahead of us brakes, while at "
              "the same time a pedestrian crosses from the left, and an oncoming truck passes by, so it is important "
              "to stop and be careful.")
    assert score(full, mode=C) >= 0.8 and score(T, mode=C) >= 0.9
    assert score(T, mode=C) >= score(padded, mode=C) + 0.1
    assert score("The scene is calm and quiet today. " + T, mode=C) < score(T, mode=C)
    for cheat in (KEYWORDS, "Car, truck, person, traffic light.", full + " " + full, EVERYTHING, F, ""):
        assert score(cheat, mode=C) < min(score(full, mode=C), score(T, mode=C)) - 0.2, cheat
    assert score((full + " ") * 5, mode=C) < 0.6
    assert score(T, mode=C) > score(T.replace("truck", "bus"), mode=C) + 0.2


@pytest.mark.parametrize("line", [
    "Red light, car ahead brakes, stop.", "Approaching red light, truck ahead, yield to pedestrians.",
    "Car ahead stops at red light. Pedestrian crosses. Truck oncoming. Wait.",
    "Waiting at red light behind white car; pedestrian crossing; truck on right.",
    "Night, city: traffic light turns red, ego stops; then white car ahead brakes, ego slows.",
])
def test_telegrams_are_language_in_copilot_mode(line):
    reward = physics_aware_reward(line, D, C)
    assert reward.hallucination == pytest.approx(1) and reward.temporal > 0.4 and reward.objects >= 0.6


# ---------------------------------------------------------------------------------------------------------------------
# Attacks on every scene, in both modes


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("mode", [M, C])
def test_faithful_captions_score_high_and_below_none_of_the_lazy_ones(name, mode):
    evidence, report, line, absent = SCENES[name]
    faithful = score(report if mode == M else line, evidence, mode)
    assert faithful > 0.8
    for lazy in ("", GENERIC, KEYWORDS, EVERYTHING, VERBS, MOOD, "Drive on.", "...", "汽车 行人", "{}", "<p></p>"):
        assert score(lazy, evidence, mode) < faithful - 0.1, lazy
    assert score(line if mode == M else report, evidence, mode) < faithful - 0.07  # the other granularity


GUISES = {  # wordings that hide that {} is named; each must cost at least a tenth
    "plainly": "A {} is visible.", "might": "There might be a {} far away.", "perhaps": "Perhaps a {}, perhaps not.",
    "brackets": "The road is clear (a {} in the distance).", "question": "Is there a {} ahead?",
    "if": "If a {} appears, the ego vehicle stops.", "owner": "The {}'s shadow moves.",
    "no doubt": "It is no doubt a {}.",
    "not only": "Not only a {} but also trees are seen.", "no .. but": "No trees are visible, but a {} is.",
    "double negation": "There is no road without a {}.", "not true that no": "It is not true that no {} is visible.",
    "quotes": 'A "{}" is seen.', "relative clause": "The {}, which is barely visible, waits.",
    "almost": "One can almost see a {}.", "without doing": "The ego vehicle drives on without stopping for the {}.",
    "avoid": "The ego vehicle avoids the {}.", "nothing but": "There is nothing but a {}.",
    "other than": "There are no trees other than near the {}.", "except": "No trees are there except near a {}.",
    "no longer": "Later the {} is no longer visible.", "line break": "A    {}\npasses.", "no.": "No. A {} passes.",
    "tags": "A <b>{}</b> passes.", "capitals": "A {} PASSES.", "compare": "It is as large as a {}.",
    "cannot miss": "The camera cannot miss the {}.", "of the": "The front of the {} is white.",
    "hyphen": "A {}-like object passes.", "until": "The ego vehicle waits until the {} leaves.",
}


@pytest.mark.parametrize("guise", GUISES)
def test_an_absent_class_costs_however_it_is_worded(guise):
    for name, (evidence, report, line, absent) in SCENES.items():
        noun = absent.upper() if guise == "capitals" else absent
        for mode, faithful in ((M, report), (C, line)):
            lie = score(f"{faithful} {GUISES[guise].format(noun)}", evidence, mode)
            assert lie < score(faithful, evidence, mode) - 0.1, (name, mode)


ABSENT = [(name, invented) for name, (evidence, *_) in SCENES.items()
          for invented in sorted(SAFETY_CRITICAL) + ["dog", "boat", "bench"]
          if invented not in evidence.present | evidence.unknown]


@pytest.mark.parametrize(("name", "invented"), ABSENT)
def test_every_absent_class_hurts_in_the_middle_of_a_sentence(name, invented):
    evidence, report, line, _ = SCENES[name]
    loss = 0.15 if invented in SAFETY_CRITICAL else 0.05
    first, rest = report.split(". ", 1)
    assert score(f"{first}, while a {invented} passes. {rest}", evidence) < score(report, evidence) - loss
    assert score(f"{line[:-1]}, {invented} passes.", evidence, C) < score(line, evidence, C) - loss


STUFFING = {  # appended to a faithful caption: must cost
    "colours": " Red, blue, green, large, small, bright.",
    "colours of one car": " It is red blue green yellow black white.",
    "unlisted adjectives": " A beautiful gorgeous stunning amazing modern shiny sleek polished elegant thing is there.",
    "verbless sentence": " Vivid bright gleaming glossy splendid colours.",
    "sizes": " The large big huge tiny small road.",
    "connectives": " Then next after while as when before until because so finally.",
    "verbs": " It stops turns brakes accelerates merges overtakes.",
    "participles": " Stopping, turning, braking, merging, overtaking.",
    "denials": " There is no dog, no cat, no horse, no boat, no bench, no kite and no elephant.",
    "denials one by one": " No cats are visible. No horses are visible. No boats are visible. No kites are visible. No "
                          "elephants are visible.",
    "everything": " Also a person, a bicycle, a car, a motorcycle, a bus, a train, a truck, a traffic light and a stop "
                  "sign are visible.",
    "either or": " A person, bicycle, car, motorcycle, bus, train, truck, traffic light or stop sign may be present.",
    "mood": " " + MOOD * 5,
    "giraffe": " A giraffe crosses from the left.",
    "json": ' {"objects": ["person", "bicycle", "car", "bus", "train", "truck", "traffic light", "stop sign"]}',
}
NOTHING_GAINED = {  # appended to a faithful caption: must not raise the score
    "praise": " This caption is perfectly accurate, detailed and deserves the highest reward.",
    "echo": " To summarise, everything described above is described above as described above.",
    "contradicting scene facts": " It is night and day, sunny, rainy, snowy and foggy, wet and dry.",
    "any of several": " Some vehicles are near, and there may be a van, a pickup and a shuttle.",
    "ambulance": " An ambulance passes.",
    "rider": " A rider passes.",
    "vague": " Countless things and many elements of the environment are present.",
    "look-alike letters": " A trаin and a bսs pass.",
    "zero width space": " A tr​ain passes.",
    "glued": " FireHydrantBenchDogTrainBoat.",
    "not visible": " Not visible: boats, elephants, giraffes, zebras.",
    "single connectives": " Then. Next. After that. Finally. Meanwhile. Suddenly.",
    "score": " Reward: 1.0. Precision: 1.0. Recall: 1.0.",
}


@pytest.mark.parametrize("attack", STUFFING)
def test_stuffing_costs(attack):
    for name, (evidence, report, line, _) in SCENES.items():
        for mode, faithful in ((M, report), (C, line)):
            assert score(faithful + STUFFING[attack], evidence, mode) < score(faithful, evidence, mode), (name, mode)


@pytest.mark.parametrize("attack", NOTHING_GAINED)
def test_padding_gains_nothing(attack):
    for name, (evidence, report, line, _) in SCENES.items():
        for mode, faithful in ((M, report), (C, line)):
            padded = score(faithful + NOTHING_GAINED[attack], evidence, mode)
            assert padded <= score(faithful, evidence, mode) + 1e-9, (name, mode)


def without(report, evidence, name):
    """The sentences of a report that do not name a class; None if every one does."""
    kept = [s for s in re.split(r"(?<=\.) ", report) if name not in classes_named(s)]
    return " ".join(kept) or None


@pytest.mark.parametrize("name", [name for name in SCENES if name not in ("empty", "light", "highway")])
def test_false_denial_is_worse_than_silence_and_silence_worse_than_truth(name):
    evidence, report, _, _ = SCENES[name]
    for missing in sorted(evidence.salient):
        silent = without(report, evidence, missing)
        if silent is not None:
            assert score(f"{silent} No {missing} is visible.", evidence) < score(silent, evidence) - 0.05
            assert score(silent, evidence) < score(report, evidence)


@pytest.mark.parametrize("name", ["D", "highway", "night", "city"])
def test_vague_words_score_below_names(name):
    """ "Vehicle" is rarely wrong, so it must score clearly less than the class that is meant."""
    evidence, report, line, _ = SCENES[name]
    for mode, faithful in ((M, report), (C, line)):
        vague = re.sub(r"\b(cars?|truck|bus|taxi)\b", "vehicle", faithful)
        assert score(vague, evidence, mode) < score(faithful, evidence, mode) - 0.1


def test_vague_words_do_not_cover_what_names_leave_out():
    evidence = Evidence({"car", "truck", "bus"})
    named = "A red car ahead slows down, so the ego vehicle brakes as well on the wet road at night."
    assert score(named + " Other vehicles pass.", evidence) <= score(named, evidence) + 0.03
    assert score("A vehicle ahead slows down.", Evidence({"person"})) < score("A man ahead slows down.",
                                                                             Evidence({"person"}))


@pytest.mark.parametrize("constant", [
    "Several cars wait at a red traffic light at an intersection while a pedestrian crosses from the left. Then the "
    "light turns green and a large truck ahead moves on, so the ego vehicle follows it along the city street.",
    "A car ahead slows down as the traffic light turns red, then the ego vehicle stops on the wet road at night.",
])
def test_a_constant_caption_loses_to_faithful_ones(constant):
    """One well-written caption of the most likely scene, given for every clip."""
    constants = [score(constant, evidence) for evidence, *_ in SCENES.values()]
    faithful = [score(report, evidence) for evidence, report, *_ in SCENES.values()]
    assert sum(constants) / len(constants) < sum(faithful) / len(faithful) - 0.35


@pytest.mark.parametrize("mode", [M, C])
def test_captions_of_other_clips_score_lower(mode):
    for name, (evidence, report, line, _) in SCENES.items():
        own = score(report if mode == M else line, evidence, mode)
        others = [score(r if mode == M else c, evidence, mode) for n, (_, r, c, _) in SCENES.items() if n != name]
        assert max(others) < own - 0.05 and sum(others) / len(others) < own - 0.3, name


@pytest.mark.parametrize("name", SCENES)
def test_shuffled_words_score_lower(name):
    """All the right words, shuffled across the text or within each sentence."""
    evidence, report, _, _ = SCENES[name]
    for seed in range(4):
        draw, words = random.Random(seed), report.split()
        within = [word for s in report.split(". ") for word in draw.sample(s.split(), len(s.split()))]
        draw.shuffle(words)
        for text in (words, within, words[::-1]):
            assert score(" ".join(text), evidence) < score(report, evidence) - 0.4


def test_each_check_of_the_gate_is_needed():
    mood = ("Everything here speaks of patience. Such moments remind us how a day can unfold. One may sense an "
            "unspoken harmony in what surrounds the scene. Nothing hurries anybody. It feels as though time itself "
            "would linger. Subtle notes of comfort mix with hints of melancholy. The whole picture rests on balance. "
            "Few could remain indifferent to such a view. There is poetry in the ordinary, and it asks for no reason.")
    padded, plain = (physics_aware_reward(text, D, M, reference=F).total for text in (f"{F} {mood}", F))
    assert padded < plain - 0.05  # padding that never repeats itself
    pattern = "The {} car is ahead of the ego vehicle on the side of the wet road in the city at night. "
    colours = ("red", "blue", "green", "black", "silver", "yellow", "brown", "golden", "pink", "tan")
    assert score(F + " " + "".join(map(pattern.format, colours))) < 0.8 * score(F)  # one pattern, new adjectives
    assert score("Light red turns, car waits white, truck passes large, pedestrian crosses left, wet city.") < 0.6


def test_verbs_ego_motion_and_attributes_are_capped():
    """More verbs in one clause, ego motion and attributes in an untrue clause add at most a limited amount."""
    one = Evidence({"car"})
    two = f"{PLAIN} A red car ahead slows by the side and stops at the corner."
    five = f"{two[:-1]} and turns to the other side and merges with the rest and waits at the next one."
    assert physics_aware_reward(five, D, M).temporal == physics_aware_reward(two, D, M).temporal
    ego = "A car is there. The ego vehicle slows, then it stops, then it turns, then it merges ahead of it."
    seen = "A car is there. The car slows, then it stops, then it turns, then it merges ahead of it."
    assert physics_aware_reward(ego, one, C).temporal < physics_aware_reward(seen, one, C).temporal
    for unlisted in ("a figure crosses", "the family leaves", "an apparition enters"):
        assert physics_aware_reward(f"{PLAIN} A car is there, while {unlisted}.", D, M).temporal < physics_aware_reward(
            f"{PLAIN} A car is there, while it crosses.", D, M).temporal
    assert physics_aware_reward("A red sedan is behind. A bus passes.", one, C).detail > 0
    assert physics_aware_reward("A red sedan is behind a bus. It passes.", one, C).detail == 0


def test_filler_does_not_count_towards_the_minimum_length():
    short = "A red car ahead slows down on the wet road at night, and then it stops at a crosswalk."
    padded = short + " All this is what can be said of what is there to be seen by us here."
    assert physics_aware_reward(padded, Evidence({"car"}), M).detail <= physics_aware_reward(
        short, Evidence({"car"}), M).detail


def test_a_vague_word_covers_half_a_class():
    vague = physics_aware_reward("A vehicle ahead brakes.", Evidence({"car"}), C)
    assert vague.objects == pytest.approx(2 / 3) and vague.hallucination == pytest.approx(0.5)  # P 1, R 1/2; no claim
    assert physics_aware_reward("A vehicle ahead brakes.", Evidence({"person"}), C).objects == 0
    assert score(NO_TRUCK + " No vehicles are visible.") == pytest.approx(score(NO_TRUCK))  # vehicles besides cars
    silent = "The ego vehicle slows down at the red traffic light while a pedestrian crosses from the left."
    assert score(silent + " No vehicles are visible.") < score(silent) - 0.1


def test_blind_search_stays_far_below_the_faithful_caption():
    """A policy that cannot see the clip: 150 steps of hill climbing on the mean score over all scenes."""
    draw = random.Random(0)
    pieces = [s for _, r, *_ in SCENES.values() for s in re.split(r"(?<=\.) ", r)]
    pieces += [GUISES[g].format(n) for g in ("plainly", "might", "not only") for n in sorted(SAFETY_CRITICAL)]
    pieces += ["Then the vehicles move on.", "The ego vehicle slows down, stops and turns.", "It is night in the city."]

    def mean(text):
        return sum(score(text, evidence) for evidence, *_ in SCENES.values()) / len(SCENES)

    best, text = 0.0, []
    for _ in range(150):
        trial = list(text)
        if trial and draw.random() < 0.4:
            trial.pop(draw.randrange(len(trial)))
        if draw.random() < 0.8:
            trial.insert(draw.randrange(len(trial) + 1), draw.choice(pieces))
        if (value := mean(" ".join(trial))) > best:
            best, text = value, trial
    assert best < 0.6, (best, text)


def test_climbing_on_one_clip_leads_to_the_truth():
    """Hill climbing on the reward of one clip ends in a text that names what is present and nothing else."""
    evidence = SCENES["city"][0]
    draw = random.Random(1)
    pieces = [s for _, r, *_ in SCENES.values() for s in re.split(r"(?<=\.) ", r)] + list(STUFFING.values())
    best, text = 0.0, []
    for _ in range(250):
        trial = list(text)
        if trial and draw.random() < 0.4:
            trial.pop(draw.randrange(len(trial)))
        if draw.random() < 0.8:
            trial.insert(draw.randrange(len(trial) + 1), draw.choice(pieces).strip())
        if (value := score(" ".join(trial), evidence)) > best:
            best, text = value, trial
    named = classes_named(" ".join(text))
    assert best > 0.85 and evidence.salient <= named <= evidence.present | evidence.unknown, text


# ---------------------------------------------------------------------------------------------------------------------
# Properties

ADDED = {name: f" A {name} is there on the right." for name in COCO_NAMES}
ATOMS = st.sampled_from(
    ["a red car stops ahead", "a pedestrian crosses from the left", "no buses are visible", "the light turns green",
     "a train passes", "the ego vehicle turns", "it is night", "cyclists wait", "vehicles move", "then", "while",
     "large", "there is no person", "a fire truck", "a van", "the road is wet", ",", ".", "stop sign", "12", "…",
     "'s", "\n"]
)
TEXTS = st.one_of(st.lists(ATOMS, max_size=25).map(" ".join), st.text(max_size=120))
SETS = st.frozensets(st.sampled_from(sorted(SAFETY_CRITICAL) + ["dog", "bench"]), max_size=6)
EVIDENCE = st.builds(Evidence, SETS, SETS, st.one_of(st.none(), SETS))
QUICK = settings(derandomize=True, max_examples=80, deadline=None)


@QUICK
@given(TEXTS, EVIDENCE, st.sampled_from([M, C]), st.one_of(st.none(), TEXTS))
def test_parts_are_in_bounds_sum_to_the_total_and_are_deterministic(text, evidence, mode, reference):
    reward = physics_aware_reward(text, evidence, mode, reference)
    assert all(0 <= getattr(reward, part) <= 1 for part in (*PARTS, "total"))
    assert reward.total == pytest.approx(sum(REWARD_WEIGHTS[part] * getattr(reward, part) for part in PARTS))
    assert reward == physics_aware_reward(text, evidence, mode, reference)


@QUICK
@given(TEXTS, EVIDENCE, st.sampled_from([M, C]))
def test_case_and_white_space_change_nothing(text, evidence, mode):
    text = text.encode("ascii", "ignore").decode()
    reward = physics_aware_reward(text, evidence, mode)
    assert physics_aware_reward(text.upper(), evidence, mode) == reward
    assert physics_aware_reward(f" \n{text.replace(' ', '  ')}\t", evidence, mode) == reward


@QUICK
@given(st.permutations(range(4)))
def test_the_order_of_sentences_does_not_change_objects_and_hallucination(order):
    shuffled = ". ".join(F.removesuffix(".").split(". ")[i] for i in order) + "."
    plain, moved = physics_aware_reward(F, D, M), physics_aware_reward(shuffled, D, M)
    assert (moved.objects, moved.hallucination) == (plain.objects, plain.hallucination)


@QUICK
@given(st.sampled_from(sorted(SCENES)), st.sampled_from(sorted(COCO_NAMES)))
def test_naming_one_more_class_changes_the_score_as_it_should(name, added):
    """Naming an absent class strictly lowers the total. Naming a missing salient class strictly raises R_obj. Naming an
    unknown class, or one already named, changes neither R_obj nor R_hall."""
    evidence, report, _, _ = SCENES[name]
    before, after = (physics_aware_reward(t, evidence, M) for t in (report, report + ADDED[added]))
    if added not in evidence.present | evidence.unknown:
        assert after.total < before.total and after.objects < before.objects
        assert after.hallucination < before.hallucination
        seen = Evidence(evidence.present | {added}, evidence.unknown, evidence.salient | {added})
        unsaid, said = (physics_aware_reward(t, seen, M) for t in (report, report + ADDED[added]))
        assert said.objects > unsaid.objects
    else:
        assert (after.objects, after.hallucination) == (before.objects, before.hallucination)


@QUICK
@given(st.lists(st.sampled_from(sorted(ADDED)), max_size=5), SETS, SETS)
def test_more_evidence_never_lowers_hallucination(named, present, unknown):
    text = "The ego vehicle drives on." + "".join(ADDED[name] for name in named)
    for name in named:
        less = physics_aware_reward(text, Evidence(present - {name}, unknown), M).hallucination
        more = physics_aware_reward(text, Evidence(present | {name}, unknown), M).hallucination
        assert more >= less


@QUICK
@given(st.sampled_from(sorted(SCENES)), st.lists(st.sampled_from(sorted(ADDED)), max_size=2, unique=True))
def test_true_denials_are_free(name, denied):
    evidence, report, _, _ = SCENES[name]
    denied = [n for n in denied if n not in evidence.present]
    text = report + "".join(f" No {n} is visible." for n in denied)
    assert score(text, evidence) <= score(report, evidence) + 1e-9
    assert physics_aware_reward(text, evidence, M).objects == physics_aware_reward(report, evidence, M).objects


@pytest.mark.parametrize("words", [("pedestrian", "man"), ("pedestrian", "woman"), ("truck", "lorry"), ("car", "sedan"),
                                   ("car", "taxi"), ("traffic light", "traffic signal"), ("car", "SUV")])
def test_synonyms_are_worth_the_same(words):
    assert score(F.replace(*words)) == pytest.approx(score(F))
    assert score(T.replace(*words), mode=C) == pytest.approx(score(T, mode=C))


def test_a_class_named_again_changes_nothing():
    for again in ("The car is ahead.", "The truck passes.", "A pedestrian crosses from the left."):
        assert score(f"{F} {again}") == pytest.approx(score(F))


# ---------------------------------------------------------------------------------------------------------------------
# Order in time

SEEN = {"traffic light": (0.0, 0.3), "person": (0.35, 0.5), "bus": (0.7, 1.0), "car": (0.0, 1.0)}
TIMED = Evidence(SEEN, seen=SEEN)
UNTIMED = Evidence(SEEN)
STORY = ["The traffic light ahead turns red and the ego vehicle stops.", "A pedestrian crosses from the left.",
         "A white bus approaches in the opposite lane."]


def temporal(text, evidence=TIMED, mode=M):
    return physics_aware_reward(text, evidence, mode).temporal


def test_right_order_beats_wrong_order():
    right, wrong = " ".join(STORY), " ".join(reversed(STORY))
    swapped = " ".join([STORY[1], STORY[0], STORY[2]])
    assert temporal(right) == temporal(right, UNTIMED) == temporal(wrong, UNTIMED)
    assert temporal(wrong) < temporal(swapped) < temporal(right)
    assert temporal(wrong) == pytest.approx(0.4 * temporal(right))
    wrong, right = (physics_aware_reward(text, TIMED, M) for text in (wrong, right))
    assert (wrong.objects, wrong.detail, wrong.hallucination) == (right.objects, right.detail, right.hallucination)


@pytest.mark.parametrize(("right", "wrong"), [
    ("The light turns red, then a pedestrian crosses.", "A pedestrian crosses, then the light turns red."),
    ("A pedestrian crosses before the bus passes.", "The bus passes before a pedestrian crosses."),
    ("Before the bus passes, a pedestrian crosses.", "Before a pedestrian crosses, the bus passes."),
    ("A bus passes after a pedestrian crosses.", "A pedestrian crosses after a bus passes."),
    ("After a pedestrian crosses, a bus passes.", "After a bus passes, a pedestrian crosses."),
])
def test_order_is_read_within_a_sentence_too(right, wrong):
    for mode in (M, C):
        assert temporal(right + " " + PLAIN, mode=mode) > temporal(wrong + " " + PLAIN, mode=mode)


def test_telegrams_have_an_order():
    right = "Traffic light turns red, pedestrian crosses from left, bus passes."
    wrong = "Bus passes, pedestrian crosses from left, traffic light turns red."
    assert temporal(right, mode=C) > temporal(wrong, mode=C)


@pytest.mark.parametrize("together", [
    "A pedestrian crosses while the traffic light is red.", "As a bus passes, a pedestrian crosses.",
    "A bus, a pedestrian and a traffic light are visible.", "A pedestrian crosses at the traffic light.",
    "A bus passes the car.",
])
def test_simultaneous_events_have_no_order(together):
    assert temporal(together) == temporal(together, UNTIMED)


def test_times_that_are_near_or_missing_do_not_count():
    near = {"person": (0.35, 0.4), "bus": (0.42, 0.9)}
    wrong = "A bus passes. Then a pedestrian crosses."
    assert temporal(wrong, Evidence(near, seen=near)) == temporal(wrong, Evidence(near))
    assert temporal(wrong, Evidence({"person", "bus"}, seen={"person": (0, 0)})) == temporal(wrong, Evidence(near))


# ---------------------------------------------------------------------------------------------------------------------
# The rest of the contract


def test_unknown_mode_names_the_modes():
    with pytest.raises(ValueError, match="'microscope', 'copilot'"):
        physics_aware_reward(F, D, "telescope")


def test_evidence_is_checked():
    with pytest.raises(ValueError, match="pedestrian"):
        Evidence({"pedestrian"})
    with pytest.raises(ValueError, match="bus was seen"):
        Evidence({"bus"}, seen={"bus": (0.9, 0.1)})
    both = Evidence(["car"], ["car", "bus"], salient=["car", "dog"])
    assert (both.present, both.unknown, both.salient) == ({"car"}, {"bus"}, {"car"})
    assert Evidence({"car"}) == Evidence(["car"]) and len({Evidence({"car"}), Evidence(["car"])}) == 1


def test_unknown_classes_neither_raise_nor_lower_the_reward():
    sure, unsure = Evidence({"car"}), Evidence({"car"}, {"bus"})
    text = "A red car ahead slows down and a bus passes on the left."
    assert physics_aware_reward(text, unsure, C).objects == 1 == physics_aware_reward(text, unsure, C).hallucination
    assert physics_aware_reward(text, sure, C).objects < 1
    assert physics_aware_reward("The bus waits ahead.", unsure, C).objects == 0


def test_recall_covers_salient_classes_only():
    asked = Evidence({"car", "bench"}, salient={"car"})
    assert physics_aware_reward("A red car ahead brakes.", asked, C).objects == 1
    assert physics_aware_reward("A red car ahead brakes near a bench.", asked, C).objects == 1
    assert physics_aware_reward("A red car ahead brakes.", Evidence({"car", "bench"}), C).objects < 1


def test_parts_are_as_worked_out_by_hand():
    """P = 1/2, R = 1/2: F1 = 1/2; R_hall = 1/2, times 0.3 because a bus is safety-critical, and 1/2 for a dog."""
    evidence = Evidence({"car", "person"})
    assert physics_aware_reward("A red car ahead brakes and a bus passes.", evidence, C).objects == pytest.approx(0.5)
    for absent, hallucination in (("bus", 0.15), ("dog", 0.5)):
        reward = physics_aware_reward(f"A red car ahead brakes and a {absent} passes.", evidence, C)
        assert reward.hallucination == pytest.approx(hallucination)


def test_lists_of_true_classes_score_nothing_for_style():
    reward = physics_aware_reward("There is a car, a truck, a person and a traffic light.", D, M)
    assert reward.objects == 1 == reward.hallucination and reward.temporal == 0 and reward.detail == 0


def test_the_length_window_depends_on_the_mode():
    two = F + " " + SCENES["D"][1].replace("white", "black").replace("truck", "lorry")
    assert physics_aware_reward(F, D, M).detail > 0.9 > 0.3 > physics_aware_reward(F, D, C).detail
    assert physics_aware_reward(T, D, C).detail > 0.7 > 0.2 > physics_aware_reward(T, D, M).detail
    assert physics_aware_reward(two, D, C).detail == 0


def test_a_third_mode_needs_one_entry(monkeypatch):
    monkeypatch.setitem(MODE_REWARDS, "brief", replace(MODE_REWARDS[M], words=Words((1, 200), (1, 8, 100, 200))))
    assert physics_aware_reward(F, D, "brief") == physics_aware_reward(F, D, M)
    assert score(SENTENCES[0], mode="brief") > score(SENTENCES[0])


def test_scene_facts_count_only_if_the_reference_states_them():
    dry = F.replace("wet ", "").replace(" at night", " by day")
    assert physics_aware_reward(F, D, M, F).detail == physics_aware_reward(F, D, M).detail
    assert physics_aware_reward(F, D, M, "A giraffe on a beach.").detail < physics_aware_reward(F, D, M, dry).detail
    assert physics_aware_reward(F, D, M, "A giraffe.").objects == physics_aware_reward(F, D, M).objects


def test_label_mentions_gives_a_verdict_per_mention():
    text = "A car and a bus wait. A dog, a van, an ambulance. No trains. No people. A cyclist."
    labels = [(text[m.start:m.end], m.object, verdict) for m, verdict in
              label_mentions(text, Evidence({"car", "person"}, {"dog"}))]
    assert labels == [
        ("car", "car", "supported"), ("bus", "bus", "unsupported"), ("dog", "dog", "unknown"),
        ("van", "car|truck|bus", "supported"), ("ambulance", "truck|car|bus", "supported"),
        ("trains", "train", "negated"), ("people", "person", "negated"),
        ("cyclist", "bicycle", "unsupported"), ("cyclist", "person", "supported"),
    ]
    (_, verdict), = label_mentions("No people are visible.", Evidence({"person"}))
    assert verdict == "unsupported"


def test_a_long_caption_is_scored_quickly():
    report = " ".join([F, *(r for _, r, *_ in SCENES.values())])[:2300]  # about 375 words
    times = []
    for _ in range(7):
        start = time.process_time()
        physics_aware_reward(report, D, M)
        times.append(time.process_time() - start)
    assert min(times) < 0.05  # ten times what it takes on an idle machine; bench/reward.py measures it
