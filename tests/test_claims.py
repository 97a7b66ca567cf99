"""What a text says of the objects that it names, and what evidence and reference make of it.

Run: `python -m pytest tests/test_claims.py -q`
"""

import time

import pytest

from stage3.grpo_reward_func import (
    Evidence,
    find_support,
    judge_facts,
    label_facts,
    physics_aware_reward,
    reference_facts,
)
from stage3.mentions import find_mentions, read_caption

M, C = "microscope", "copilot"


def facts_of(text):
    return [("|".join(fact.classes), fact.kind, fact.value) for fact in read_caption(text).facts]


def said_of(text):
    return {("|".join(s.subject), s.kind, s.value) for s in read_caption(text).statements}


@pytest.mark.parametrize(("text", "facts"), [
    ("Two red cars wait.", [("car", "count", 2), ("car", "colour", "red")]),
    ("A pair of trucks and 3 buses pass.", [("truck", "count", 2), ("bus", "count", 3)]),
    ("A group of people waits.", [("person", "count", 0)]),
    ("A red and white bus stops.", [("bus", "colour", "red|white")]),
    ("The car ahead is silver.", [("car", "colour", "grey")]),
    ("A pedestrian in a red coat waits.", []),
    ("A dark car waits.", []),
    ("The traffic light turns red, then green.", [("traffic light", "light", "red"),
                                                  ("traffic light", "light", "green")]),
    ("The light changes from yellow to red.", [("traffic light", "light", "amber"), ("traffic light", "light", "red")]),
    ("The light turns red and white cars stop.", [("traffic light", "light", "red"), ("car", "colour", "white")]),
    ("Red light ahead, stop.", [("traffic light", "light", "red")]),
    ("The ego vehicle waits until the light turns green.", []),
    ("A man crosses from the left.", [("person", "motion", "crosses"), ("person", "from", "left")]),
    ("A bicycle passes on the right side.", [("bicycle", "side", "right")]),
    ("A truck in the left lane moves to the right.", [("truck", "side", "left"), ("truck", "to", "right")]),
    ("Oncoming bus, parked cars on right.", [("bus", "motion", "approaches"), ("car", "motion", "stands"),
                                             ("car", "side", "right")]),
    ("A bus turns right.", []),
    ("No red cars are visible.", []),
    ("The ego vehicle turns to the left.", []),
    ("A two-lane road with a car.", []),
])
def test_facts(text, facts):
    assert facts_of(text) == facts


@pytest.mark.parametrize(("text", "expected"), [
    ("A car behind a truck brakes.", ("car", "verb", "brake")),
    ("A car slows, then stops.", ("car", "verb", "brake")),
    ("A bus stops and the ego vehicle passes it.", ("ego", "verb", "pass")),
    ("Truck ahead, stop.", ("ego", "verb", "brake")),
    ("Truck ahead, come to a stop.", ("ego", "verb", "brake")),
    ("A car is there. It accelerates.", ("car", "verb", "accelerate")),
    ("The traffic light switches to green.", ("traffic light", "verb", "change")),
    ("The ego vehicle turns left.", ("ego", "verb", "turn left")),
    ("A deer crosses.", ("", "verb", "cross")),
    ("A taxi waits.", ("car", "subtype", "taxi")),
    ("A truck crashes into a wall.", ("truck", "event", "crash")),
    ("A bus comes to a full stop.", ("bus", "verb", "brake")),
])
def test_statements(text, expected):
    assert expected in said_of(text)


@pytest.mark.parametrize("text", [
    "The flow of traffic is light.", "There are changes in the scene.", "The video starts.",
    "A car appears to be there.", "The exit is near a car.", "The road goes on.",
])
def test_nouns_and_boilerplate_are_no_verbs(text):
    assert not {kind for _, kind, _ in said_of(text)} & {"verb", "event"}


E = Evidence(
    {"car", "truck", "person", "traffic light", "bus"}, counts={"car": 1, "person": 3}, light=("red", "green"),
    sides={"person": {"left"}, "truck": {"right", "unknown"}}, colours={"car": {"red"}, "truck": {"white", "unknown"}},
    motion={"person": {"left to right"}, "bus": {"approaches"}})


@pytest.mark.parametrize(("text", "verdict"), [
    ("A red car.", "supported"), ("A blue car.", "contradicted"), ("An orange car.", "unknown"),  # like red
    ("A maroon car.", "supported"), ("A blue truck.", "unknown"), ("A white truck.", "supported"),
    ("A blue bus.", "unknown"), ("A blue van.", "unknown"),
    ("Two cars.", "contradicted"), ("Several cars.", "contradicted"), ("Three people.", "supported"),
    ("Two people.", "unknown"), ("Four people.", "contradicted"), ("A group of people.", "supported"),
    ("Two trucks.", "unknown"),
    ("The light is red.", "supported"), ("The light is yellow.", "contradicted"),
    ("A person comes from the left.", "supported"), ("A person comes from the right.", "contradicted"),
    ("A person walks to the right.", "supported"), ("A person walks to the left.", "contradicted"),
    ("A person waits on the right.", "contradicted"), ("A truck waits on the left.", "unknown"),
    ("A person crosses.", "supported"), ("A bus crosses.", "contradicted"), ("A car crosses.", "unknown"),
    ("A bus approaches.", "supported"), ("A bus recedes.", "contradicted"), ("An oncoming person.", "unknown"),
])
def test_verdicts(text, verdict):
    assert judge_facts(read_caption(text), E)[-1:] == [verdict]


def test_a_light_cannot_turn_to_a_colour_more_often_than_the_evidence_shows_it():
    verdicts = judge_facts(read_caption("The light is green. Then the light turns green."), E)
    assert verdicts == ["supported", "contradicted"]
    verdicts = judge_facts(read_caption("The light turns red. Then it turns green. The red light was long."), E)
    assert verdicts == ["supported"] * 3  # told again, it does not turn


def test_values_in_any_spelling_and_wrong_ones_refused():
    one = Evidence({"car", "traffic light"}, light="yellow", colours={"car": "silver"}, sides={"car": "left"})
    assert one.light == ("amber",) and one.sides == {"car": {"left"}}
    assert judge_facts(read_caption("A grey car."), one) == ["supported"]
    for wrong in ({"light": ["blue"]}, {"sides": {"car": {"up"}}}, {"motion": {"car": {"flies"}}},
                  {"counts": {"car": 0}}, {"colours": {"unicorn": {"pink"}}}):
        with pytest.raises(ValueError):
            Evidence({"car"}, **wrong)


def support_of(text, reference=None, evidence=E):
    caption = read_caption(text)
    said = reference_facts(reference) if reference is not None else None
    values = find_support(caption, judge_facts(caption, evidence), evidence, said)
    return {(s.kind, s.value): value for s, value in zip(caption.statements, values, strict=True)}


def test_support_comes_from_evidence_or_from_what_the_reference_says_of_the_same_class():
    told = "A white bus stops ahead. A blue car turns."
    assert support_of("The bus brakes.", told) == {("verb", "brake"): 1.0}  # the same in other words
    assert support_of("The bus turns.", told) == {("verb", "turn"): pytest.approx(1 / 3)}  # told of the car
    assert support_of("The bus crashes.", told) == {("event", "crash"): 0.0}
    assert support_of("A blue car.", told) == {("colour", "blue"): 0.0}  # the evidence knows better
    assert support_of("A red car.", told) == {("colour", "red"): 1.0}
    grows = {("state", "opposite"): pytest.approx(1 / 3)}  # as does what we pass
    assert support_of("An oncoming bus.", told) == grows
    assert support_of("An oncoming bus.") == {("state", "opposite"): 1.0}
    assert support_of("The bus turns.") == {("verb", "turn"): 1.0}  # nothing to compare with


def test_the_reference_never_vouches_for_an_object():
    evidence = Evidence({"car"})
    text = "A red car ahead brakes while a pedestrian crosses from the left."
    assert physics_aware_reward(text, evidence, M, text).hallucination == physics_aware_reward(
        text, evidence, M).hallucination < 0.2


def test_parts_of_a_contradicted_claim_by_hand():
    """One class right, its colour wrong, which counts as four errors: P = 1/5, F1 = 1/3, R_hall = 1/5; for a light's
    colour 0.3 x that."""
    car = physics_aware_reward("A blue car ahead brakes.", Evidence({"car"}, colours={"car": {"red"}}), C)
    assert car.objects == pytest.approx(1 / 3) and car.hallucination == pytest.approx(0.2)
    light = physics_aware_reward("Red light ahead.", Evidence({"traffic light"}, light=("green",)), C)
    assert light.hallucination == pytest.approx(0.06)
    doubt = Evidence({"car"}, colours={"car": {"red", "unknown"}})
    unknown = physics_aware_reward("A blue car ahead brakes.", doubt, C)
    assert unknown.objects == 1 == unknown.hallucination


ONE_CAR = {"counts": {"car": 1}}


@pytest.mark.parametrize(("text", "told", "facts", "verdict"), [
    ("A blue car brakes.", "A red car brakes.", ONE_CAR, "contradicted"),
    ("A blue car brakes.", "A blue car brakes.", ONE_CAR, "unknown"),  # the reference can contradict, never confirm
    ("A blue car brakes.", "A car brakes beside a red bus.", ONE_CAR, "unknown"),
    ("A blue car brakes.", "A red car passes a blue car.", ONE_CAR, "unknown"),
    ("A grey car brakes.", "A white car brakes.", ONE_CAR, "unknown"),  # similar
    ("A blue car brakes.", "A red car brakes.", {}, "unknown"),  # there may be two
    ("A blue car brakes.", "A red car brakes.", {"counts": {"car": 2}}, "unknown"),
    ("A blue car brakes.", "A red car brakes.", {**ONE_CAR, "colours": {"car": {"blue"}}}, "supported"),
    ("A car comes from the left.", "A car comes from the right.", ONE_CAR, "contradicted"),
    ("A car comes from the left.", "A car moves to the left.", ONE_CAR, "contradicted"),
    ("A car comes from the left.", "A car moves to the right.", ONE_CAR, "unknown"),
    ("A car comes from the left.", "A car waits on the right.", ONE_CAR, "unknown"),
    ("A car waits on the left.", "A car waits on the right.", ONE_CAR, "contradicted"),
    ("A car waits on the left.", "A car comes from the right and waits on the right.", ONE_CAR, "unknown"),
    ("A blue car brakes.", "A red van brakes.", ONE_CAR, "unknown"),  # which may be a truck
    ("A car waits on the left.", "A van waits on the right.", ONE_CAR, "unknown"),
    ("A car comes from the left.", "A van comes from the right.", ONE_CAR, "unknown"),
    ("Two cars brake.", "A car brakes.", {}, "unknown"),  # not a kind that the reference decides
])
def test_the_reference_contradicts_what_evidence_does_not_know_of_a_single_object(text, told, facts, verdict):
    evidence = Evidence({"car"}, **facts)
    assert judge_facts(read_caption(text), evidence, reference_facts(told))[-1] == verdict
    assert label_facts(text, evidence, told)[-1][1] == verdict
    told_pay, silent = (physics_aware_reward(text, evidence, C, reference).objects for reference in (told, None))
    assert (told_pay < silent) == (verdict == "contradicted")


def test_a_flat_denial_costs_even_where_the_class_is_named_elsewhere():
    evidence = Evidence({"car", "truck", "bicycle", "person"})
    text = "A truck waits ahead and a car turns in front of it, while a cyclist passes on the left."
    for denial, costs in (("There is no truck anywhere.", True), ("No trucks are visible.", True),
                          ("Later no trucks are visible.", False), ("No other trucks are visible.", False),
                          ("There is no truck in the left lane.", False), ("There are no pedestrians.", False)):
        worse = physics_aware_reward(f"{text} {denial}", evidence, M).objects < 1
        assert worse == costs, denial


def test_wrong_time_of_day_costs_and_near_values_do_not():
    def detail(text):
        told = "At night a car ahead brakes on the wet road in the city."
        return physics_aware_reward(text, Evidence({"car"}), M, told).detail

    right = detail("At night a car ahead brakes on the wet road in the city.")
    assert detail("By day a car ahead brakes on the wet road in the city.") < 0.6 * right
    assert detail("By day a car ahead brakes on the wet road in the city.") < detail(
        "At dusk a car ahead brakes on the wet road in the city.") < right


def test_a_list_of_everything_at_the_start_does_not_disarm_the_order():
    seen = {"car": (0.0, 0.2), "bus": (0.5, 0.7), "person": (0.8, 1.0)}
    evidence = Evidence(seen, seen=seen)
    backwards = "A man crosses. Then a bus stops. Then a car turns."
    forwards = "A car turns. Then a bus stops. Then a man crosses."
    for lead in ("There is a car, a bus and a man. ", "A car, a bus and a man are visible. ", ""):
        assert physics_aware_reward(lead + backwards, evidence, M).temporal < physics_aware_reward(
            lead + forwards, evidence, M).temporal, lead
    two = Evidence({"car", "bus"}, seen={"car": (0.0, 0.2), "bus": (0.5, 0.7)})
    listed = "There is a car. There is a bus. "
    assert physics_aware_reward(f"{listed}A bus stops. Then a car turns.", two, C).temporal < physics_aware_reward(
        f"{listed}A car turns. Then a bus stops.", two, C).temporal
    standing = "A car is on the left. Then a bus stops. Finally the car turns."  # told of first, if with no verb
    assert physics_aware_reward(standing, two, C).temporal == physics_aware_reward(
        standing, Evidence({"car", "bus"}), C).temporal > 0


def test_clauses_that_say_nothing_cost_beyond_the_references_own_share():
    evidence, told = Evidence({"car"}), "The scene is calm. A red car ahead brakes on the wet road at night."
    same = physics_aware_reward(told, evidence, M, told)
    more = physics_aware_reward(f"{told} Such is life in these parts.", evidence, M, told)
    assert more.temporal < same.temporal and more.objects == same.objects


def test_connectives_in_many_more_places_than_in_the_reference_lower_their_half():
    evidence = Evidence({"car"})
    plain = "A red car ahead brakes. It stops on the wet road at night. It turns. It leaves."
    padded = "Then a red car ahead brakes. Next it stops on the wet road at night. Then it turns. After that it leaves."
    assert support_of(padded, plain, evidence) == support_of(padded, padded, evidence)  # no other difference
    assert physics_aware_reward(padded, evidence, M, plain).temporal < physics_aware_reward(
        padded, evidence, M, padded).temporal


def test_a_copilot_line_may_be_as_wordy_as_its_reference():
    evidence = Evidence({"car", "person"})
    wordy = ("A red car that is ahead of us in the lane on the left has to brake for a man who is about to cross the "
             "road from the right, so it would be best to slow down and to leave him all of the room that he needs.")
    assert physics_aware_reward(wordy, evidence, C).temporal < physics_aware_reward(wordy, evidence, C, wordy).temporal


def test_label_facts_gives_spans_for_a_page():
    text = "A blue car waits. Two people cross from the left. A white tram passes."
    assert [(what, verdict, text[start:end]) for what, verdict, start, end in label_facts(text, E)] == [
        ("car colour blue", "contradicted", "blue"), ("person count 2", "unknown", "Two"),
        ("person motion crosses", "supported", "cross"), ("person from left", "supported", "from the left"),
    ]


@pytest.mark.parametrize(("text", "objects"), [
    ("A Toyota Highlander passes.", []), ("A Toyota truck passes.", ["truck"]), ("A coach pulls over.", ["bus"]),
    ("A pick-up waits.", []), ("They pick up a man.", ["person"]), ("A brief pedestrian crossing is seen.", ["person"]),
    ("A double-decker tour bus waits.", ["bus"]), ("Wait at light.", ["traffic light"]),
    ("The car slows down because the light is red.", ["traffic light"]), ("The car ahead slows.", ["car"]),
    ("People are crossing, so the car has to wait.", ["person"]), ("A man looks at his phone.", ["person"]),
    ("A woman with a trolley waits.", ["person"]), ("Signal: red.", ["traffic light"]),
    ("The windshield of a moving car is wet.", []),
])
def test_what_the_parser_learnt(text, objects):
    assert [mention.object for mention in find_mentions(text)] == objects


def test_long_texts_are_read_in_linear_time():
    """100 kB: find_mentions takes twice as long for twice the text, and the reward does not read it."""
    for word in ("car ", "car, ", "no cars or trucks ", "a red car turns from the left and ", "are not visible ",
                 "so the car waits and "):
        times = []
        for size in (50_000, 100_000):
            text = (word * size)[:size]
            runs = []
            for _ in range(3):
                start = time.process_time()
                find_mentions(text)
                runs.append(time.process_time() - start)
            times.append(min(runs))
        assert times[1] < 4 * times[0] + 0.05, word
        assert physics_aware_reward((word * 100_000)[:100_000], E, M).total == 0
