"""What can be gained by captions that are wrong, and what is lost by honest ones? The reward of stage 3 under attack.

    python -m bench.reward_attacks [--json FILE] [--climb_steps 300] [--seed 0] [--list]

Attacks: each family of FAMILIES makes the faithful captions of bench/attack_scenes.py wrong. A wrong caption is scored
with the faithful one as reference; it loses if its reward is lower, and a win is a way to be paid for a wrong caption.
Kind "checked": evidence or reference say that it is wrong. Kind "language": only the wording is, which in training the
likelihood under stage 2 judges, not the reward. Kind "control": changes that stay true. How often these lose says how
much of a family's losses come from any change at all, not from what is wrong in it.

Climb: random edits of faithful captions, each kept unless the reward falls. With all edits, then with only sentences
inserted, which is what is left if the likelihood forbids broken language.

Constant: the best caption that can be put together without a look at the clip.

Honest: the texts of bench/honest_lines.py, with the classes that they name as evidence. An R_obj or R_hall below 0.95
means that a true text is taken for a false one, or for none.

Prints one table for each and writes one JSON file. --list prints the attacks that do not lose and the controls that do.
"""

import argparse
import json
import random
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.attack_scenes import SCENES, Scene, edited
from bench.honest_lines import COPILOT, REPORTS, SENTENCES
from stage3.grpo_reward_func import Evidence, find_mentions, physics_aware_reward

MODES = ("microscope", "copilot")
TOLERANCE = 1e-6
HONEST = 0.95  # of R_obj, and of the R_hall that the text can have
NO_CLAIM = 0.5  # R_hall of a text that names nothing

VAGUE = {"microscope": ("The video shows a typical driving scene with various elements of the environment. The scene "
                        "is calm overall and the conditions appear to be normal.",),
         "copilot": ("Drive carefully and pay attention to the surroundings.", "Stay alert, adapt speed.")}
CONSTANTS = {
    "microscope": ("By day the ego vehicle drives along a city street behind a white car. Then the car ahead brakes at "
                   "a red traffic light while a pedestrian crosses from the left, so we stop.",
                   "The ego vehicle follows a car on a dry road and finally slows down because the car ahead brakes."),
    "copilot": ("Car ahead brakes, keep distance.", "Day: red light, white car ahead, pedestrian crosses, stop.")}
BOILERPLATE = ("The scene shows a typical driving situation in which the driver needs to stay attentive at all times.",
               "Overall the atmosphere is calm, and the surroundings convey a sense of everyday life.",
               "This highlights the importance of safe driving and of awareness of the surroundings.")
OPENINGS = re.compile(r"^(then|after that|finally|meanwhile|at first|once|and finally|and then),? ", re.I)
CONNECTIVES = ("Then", "Meanwhile", "Therefore", "After that", "Next", "Finally", "As a result", "Subsequently")
HEDGES = ("Perhaps", "Possibly", "It may be that", "Maybe")

REWORDINGS = (("Then ", "After this "), ("ego vehicle", "camera car"), (" ahead", " in front"),
              ("pedestrian", "walker"), ("approaches", "comes closer"), ("intersection", "junction"),
              ("stop.", "come to a stop."))

THINGS = ("the car", "a red car", "a white truck", "the bus", "a pedestrian", "two cyclists", "the traffic light",
          "a motorcycle", "the ego vehicle", "a black car", "three people", "the train", "a dog", "the silver car")
DOINGS = ("brakes", "accelerates", "turns left", "turns right", "crosses from the left", "crosses from the right",
          "overtakes", "stops", "merges from the right", "reverses", "crashes into a wall", "turns green", "turns red",
          "approaches", "passes on the left", "waits on the right", "pulls out", "swerves", "is parked")
SETTINGS = ("at night", "by day", "in heavy rain", "on a wet road", "at an intersection", "on a highway", "in snow", "")
EDITS = ("delete", "double", "swap", "replace", "insert")


# ---------------------------------------------------------------------------------------------------------------------
# Texts and their pieces


def faithful(scene: Scene, mode: str) -> str:
    return scene.microscope if mode == "microscope" else scene.copilot


def reward(scene: Scene, mode: str, text: str) -> float:
    return physics_aware_reward(text, scene.evidence, mode, faithful(scene, mode)).total


def pieces(text: str, mode: str) -> list[str]:
    """The sentences of a report, without full stops; the clauses of a line."""
    return re.split(r"\. ", text.rstrip(".")) if mode == "microscope" else re.split(r"[,:] ", text.rstrip("."))


def joined(parts: list[str], mode: str) -> str:
    if mode == "copilot":
        return ", ".join(parts) + "."
    return " ".join(part[:1].upper() + part[1:] + "." for part in parts)


def added(text: str, mode: str, sentence: str) -> str:
    """`text` with a sentence at its end; a line gets it as its last clause."""
    if mode == "microscope":
        return f"{text} {sentence}."
    return f"{text.rstrip('.')}, {sentence[0].lower()}{sentence[1:]}."


# ---------------------------------------------------------------------------------------------------------------------
# Families: (scene, mode, faithful text, random numbers) -> wrong texts

Family = Callable[[Scene, str, str, random.Random], list[str]]


def edits(name: str) -> Family:
    return lambda scene, mode, text, draw: edited(scene, name, text)


def sentences(*templates: str, absent: str = "") -> Family:
    """Adds a sentence; {present} is each class that is there, {absent} the scene's absent one. With `absent`: only
    where that class is not there."""
    def family(scene, mode, text, draw):
        if absent in scene.evidence.present | scene.evidence.unknown:
            return []
        made = []
        for template in templates:
            classes = sorted(scene.evidence.salient) if "{present}" in template else [""]
            made += [added(text, mode, template.format(present=name, absent=scene.absent)) for name in classes]
        return made
    return family


def listed(scene, mode, text, draw):
    names = ["car", "truck", "bus", "train", "person", "dog", "bicycle", "motorcycle", "traffic light", "stop sign"]
    return ["There is a " + ", a ".join(names) + "." if mode == "microscope" else ", ".join(names) + "."]


def keywords(scene, mode, text, draw):
    words = " ".join(sorted(scene.evidence.present))
    return [f"{words} red white large stops turns brakes crosses then while night road intersection left right"]


def repeated(scene, mode, text, draw):
    first = pieces(text, mode)[0]
    return [f"{text} {text}", joined([first] * 6, mode)]


def constant(scene, mode, text, draw):
    place = SCENES.index(scene)
    others = [faithful(SCENES[(place + step) % len(SCENES)], mode) for step in (1, 5)]
    return [*CONSTANTS[mode], *others]


def connectives(scene, mode, text, draw):
    parts = pieces(text, mode)
    return [joined([f"{CONNECTIVES[i % len(CONNECTIVES)]} {part[0].lower()}{part[1:]}" for i, part in enumerate(parts)],
                   mode)]


def hedged(scene, mode, text, draw):
    parts = pieces(text, mode)
    return [joined([f"{HEDGES[i % len(HEDGES)]} {part[0].lower()}{part[1:]}" for i, part in enumerate(parts)], mode)]


def boilerplate(scene, mode, text, draw):
    """42% of the words say nothing."""
    words, filler = len(text.split()), " ".join(BOILERPLATE).split()
    return [text + " " + " ".join(filler[:round(words * 0.42 / 0.58)]).rstrip(".,") + "."]


def reworded(scene, mode, text, draw):
    """The text with each of a few words replaced by others that mean the same."""
    return [text.replace(old, new) for old, new in REWORDINGS if old in text]


def introductions(text: str) -> list[str]:
    names = [mention.object for mention in find_mentions(text) if not mention.negated]
    return list(dict.fromkeys(names))


def backwards(scene, mode, text, draw):
    """The pieces in reverse order, where this introduces classes against `seen`."""
    parts = [OPENINGS.sub("", part) for part in reversed(pieces(text, mode))]
    link = "Then " if mode == "microscope" else "then "
    made = joined(parts[:1] + [link + part[:1].lower() + part[1:] for part in parts[1:]], mode)
    times = [scene.evidence.seen[name][0] for name in introductions(made) if name in (scene.evidence.seen or {})]
    against = [late for place, late in enumerate(times) if late > 0.1 + min(times[place:])]
    return [made] if against else []


def list_then_backwards(scene, mode, text, draw):
    names = sorted(scene.evidence.present, key=lambda name: scene.evidence.seen[name])
    opening = "There is a " + ", a ".join(names) + ". " if mode == "microscope" else ", ".join(names) + " ahead, then "
    return [opening + made for made in backwards(scene, mode, text, draw)]


def damaged(words: list[str], how: str, draw: random.Random) -> list[str]:
    """The words with one of them dropped or doubled, or two neighbours swapped."""
    place, words = draw.randrange(len(words)), list(words)
    if how == "delete":
        del words[place]
    elif how == "double":
        words.insert(place, words[place])
    elif place + 1 < len(words):
        words[place:place + 2] = reversed(words[place:place + 2])
    return words


def broken(how: str) -> Family:
    """Two texts a caption, each with damage to one word in ten; or all words shuffled."""
    def family(scene, mode, text, draw):
        made = []
        for _ in range(2):
            words = text.split()
            if how == "shuffle":
                draw.shuffle(words)
            for _ in range(0 if how == "shuffle" else max(1, len(words) // 10)):
                words = damaged(words, how, draw)
            made.append(" ".join(words))
        return made
    return family


FAMILIES: dict[str, tuple[str, Family]] = {
    "invented class": ("checked", sentences("A {absent} approaches")),
    "crash of an absent class": ("checked", sentences("A {absent} crashes into a wall")),
    "list of classes": ("checked", listed),
    "keywords": ("checked", keywords),
    "repetition": ("checked", repeated),
    "vague": ("checked", lambda scene, mode, text, draw: list(VAGUE[mode])),
    "silence": ("checked", lambda scene, mode, text, draw: ["", "A video showing driving scenes."]),
    "other granularity": ("checked", lambda scene, mode, text, draw: [
        faithful(scene, MODES[1 - MODES.index(mode)])]),
    "constant caption": ("checked", constant),
    "action invented": ("checked", sentences("The {present} overturns", "The {present} catches fire",
                                             "The {present} makes a U-turn")),
    "crash, true object": ("checked", sentences("The {present} crashes into a wall",
                                                "The {present} collides with the ego vehicle")),
    "deer, helicopter": ("checked", sentences("A deer jumps over the road", "A helicopter lands ahead")),
    "unlisted people": ("checked", sentences("A juggler performs ahead", "Soldiers march on the right",
                                             absent="person")),
    "unlisted vehicles": ("checked", sentences("A tractor pulls out", "A rickshaw passes on the left")),
    "light, never shown": ("checked", edits("light")),
    "light, wrong moment": ("checked", edits("moment")),
    "side": ("checked", edits("side")),
    "count": ("checked", edits("count")),
    "colour": ("checked", edits("colour")),
    "vehicle subtype": ("checked", edits("subtype")),
    "action swapped": ("checked", edits("action")),
    "who does what": ("checked", edits("who")),
    "ego action": ("checked", edits("ego")),
    "flat contradiction": ("checked", sentences("There is no {present} anywhere")),
    "time of day": ("checked", edits("time")),
    "weather": ("checked", edits("weather")),
    "order backwards": ("checked", backwards),
    "list, then backwards": ("checked", list_then_backwards),
    "connective everywhere": ("language", connectives),
    "hedged throughout": ("language", hedged),
    "42% boilerplate": ("language", boilerplate),
    "words dropped": ("language", broken("delete")),
    "words doubled": ("language", broken("double")),
    "words swapped": ("language", broken("swap")),
    "words shuffled": ("language", broken("shuffle")),
    "true, of an object": ("control", sentences("The {present} is in view")),
    "true, of the road": ("control", sentences("The road goes on")),
    "true rewording": ("control", reworded),
}
KINDS = ("checked", "language", "control")


@dataclass(frozen=True)
class Attack:
    family: str
    kind: str
    scene: str
    mode: str
    text: str
    difference: float  # its reward - the faithful caption's

    @property
    def outcome(self) -> str:
        return "lose" if self.difference < -TOLERANCE else "win" if self.difference > TOLERANCE else "tie"


def attacks(seed: int = 0) -> list[Attack]:
    """All attacks on all scenes in both modes."""
    found = []
    for scene in SCENES:
        for mode in MODES:
            text = faithful(scene, mode)
            best = reward(scene, mode, text)
            for family, (kind, make) in FAMILIES.items():
                wrong = make(scene, mode, text, random.Random(f"{seed} {family} {scene.name} {mode}"))
                found += [Attack(family, kind, scene.name, mode, made, reward(scene, mode, made) - best)
                          for made in wrong if made != text]
    return found


def summary(found: list[Attack]) -> dict:
    """{n, lose, tie, win, mean difference} of some attacks."""
    outcomes = [attack.outcome for attack in found]
    return {"n": len(found), **{name: outcomes.count(name) for name in ("lose", "tie", "win")},
            "mean": statistics.fmean(attack.difference for attack in found) if found else 0.0,
            "largest": max((attack.difference for attack in found), default=0.0)}


def attack_table(found: list[Attack]) -> dict[str, dict]:
    """Family -> summary with its kind; then "all attacks" and each kind."""
    table = {}
    for family, (kind, _) in FAMILIES.items():
        table[family] = summary([attack for attack in found if attack.family == family]) | {"kind": kind}
    table["all attacks"] = summary([attack for attack in found if attack.kind != "control"]) | {"kind": ""}
    for kind in KINDS:
        table[kind] = summary([attack for attack in found if attack.kind == kind]) | {"kind": kind}
    return table


# ---------------------------------------------------------------------------------------------------------------------
# The climb, and the best constant caption


def invented(draw: random.Random, mode: str) -> str:
    """A sentence or clause of random things and doings."""
    text = f"{draw.choice(THINGS)} {draw.choice(DOINGS)}"
    if mode == "copilot":
        return re.sub(r"\b(a|the) ", "", text)
    return f"{draw.choice(CONNECTIVES)} {text} {draw.choice(SETTINGS)}".strip()


def vocabulary() -> list[str]:
    texts = [scene.microscope + " " + scene.copilot for scene in SCENES]
    return sorted(set(" ".join([*texts, *THINGS, *DOINGS, *SETTINGS, *CONNECTIVES]).split()))


def changed(text: str, mode: str, how: str, words: list[str], draw: random.Random) -> str:
    """`text` after one random edit."""
    if how == "insert":
        parts = pieces(text, mode)
        parts.insert(draw.randrange(len(parts) + 1), invented(draw, mode))
        return joined(parts, mode)
    told = text.split()
    if how == "replace":
        told[draw.randrange(len(told))] = draw.choice(words)
    else:
        told = damaged(told, how, draw)
    return " ".join(told) or text


def climb(scene: Scene, mode: str, steps: int, seed: int = 0, moves: tuple[str, ...] = EDITS) -> dict:
    """Random edits of the faithful caption, each kept unless the reward falls."""
    draw, words = random.Random(f"{seed} {scene.name} {mode}"), vocabulary()
    text = faithful(scene, mode)
    start = best = reward(scene, mode, text)
    for _ in range(steps):
        made = changed(text, mode, draw.choice(moves), words, draw)
        if (value := reward(scene, mode, made)) >= best - 1e-12:
            text, best = made, max(best, value)
    return {"scene": scene.name, "mode": mode, "start": start, "end": best, "gain": best - start, "text": text}


def climbs(steps: int, seed: int = 0, moves: tuple[str, ...] = EDITS) -> dict:
    """The climbs from all faithful captions: mean start and end, mean and largest gain, and each end text."""
    runs = [climb(scene, mode, steps, seed, moves) for scene in SCENES for mode in MODES]
    start, end = statistics.fmean(run["start"] for run in runs), statistics.fmean(run["end"] for run in runs)
    return {"moves": moves, "start": start, "end": end, "gain": end - start,
            "largest": max(run["gain"] for run in runs), "runs": runs}


def mean_reward(text: str, mode: str) -> float:
    return statistics.fmean(reward(scene, mode, text) for scene in SCENES)


def best_constant(mode: str, seed: int = 0, most: int = 8) -> dict:
    """A caption put together from pieces of all captions and invented ones, for the best mean reward."""
    draw, pool = random.Random(seed), []
    for scene in SCENES:
        pool += pieces(faithful(scene, mode), mode)
    pool += [invented(draw, mode) for _ in range(60)]
    told, best = [], mean_reward("", mode)
    for _ in range(most):
        values = [(mean_reward(joined([*told, piece], mode), mode), piece) for piece in pool if piece not in told]
        value, piece = max(values)
        if value <= best + TOLERANCE:
            break
        told, best = [*told, piece], value
    truth = statistics.fmean(reward(scene, mode, faithful(scene, mode)) for scene in SCENES)
    return {"mode": mode, "reward": best, "faithful": truth, "text": joined(told, mode) if told else ""}


# ---------------------------------------------------------------------------------------------------------------------
# Honest texts

HONEST_TEXTS = {  # name -> (texts with their classes, mode)
    "Copilot lines": (COPILOT, "copilot"),
    "sentences, Copilot": (SENTENCES, "copilot"),
    "sentences, Microscope": (SENTENCES, "microscope"),
    "reports, Microscope": (REPORTS, "microscope"),
}


def believed(text: str, names: set[str], mode: str) -> tuple[bool, dict]:
    """Whether nothing in an honest text is taken for an error, an omission or bad style; R_obj, R_hall and total."""
    value = physics_aware_reward(text, Evidence(frozenset(names)), mode)
    right = value.objects >= HONEST and value.hallucination >= HONEST * (1 if names else NO_CLAIM)
    return right, {"objects": value.objects, "hallucination": value.hallucination, "total": value.total}


def honest() -> dict[str, dict]:
    """Group -> n, share believed, and the texts that are not."""
    groups = {}
    for group, (texts, mode) in HONEST_TEXTS.items():
        failures = []
        for text, names in texts:
            right, parts = believed(text, names, mode)
            if not right:
                failures.append({"text": text, "classes": sorted(names), **parts})
        groups[group] = {"n": len(texts), "share": 1 - len(failures) / len(texts), "failures": failures}
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# The report


def print_attacks(table: dict[str, dict]):
    print(f"{'family':<26}{'n':>6}{'lose':>6}{'tie':>6}{'win':>6}{'mean':>9}{'largest':>9}  kind")
    for family, row in table.items():
        print(f"{family:<26}{row['n']:>6}{row['lose']:>6}{row['tie']:>6}{row['win']:>6}{row['mean']:>+9.3f}"
              f"{row['largest']:>+9.3f}  {row['kind']}")


def print_rest(results: dict):
    for run in results["climb"]:
        best = max(run["runs"], key=lambda one: one["gain"])
        print(f"\nclimb with {', '.join(run['moves'])}: {run['start']:.3f} -> {run['end']:.3f}, "
              f"gain {run['gain']:+.3f}, largest {run['largest']:+.3f} ({best['scene']}, {best['mode']}):"
              f"\n  {best['text']}")
    for row in results["constant"]:
        print(f"\nbest constant caption, {row['mode']}: {row['reward']:.3f} (faithful ones {row['faithful']:.3f})"
              f"\n  {row['text']}")
    for group, row in results["honest"].items():
        print(f"\nhonest, {group}: {row['share']:.1%} of {row['n']} believed")
        for one in row["failures"]:
            print(f"  R_obj {one['objects']:.2f} R_hall {one['hallucination']:.2f}  {one['text']} {one['classes']}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("output/bench/reward_attacks.json"), help="JSON to write")
    parser.add_argument("--climb_steps", type=int, default=300, help="random edits of each faithful caption; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="of broken language, climb and constant captions")
    parser.add_argument("--list", action="store_true", help="print attacks that do not lose, controls that do")
    args = parser.parse_args(argv)
    found = attacks(args.seed)
    by_mode = {}
    for mode in MODES:
        by_mode[mode] = attack_table([attack for attack in found if attack.mode == mode])
    results = {"attacks": attack_table(found), "by_mode": by_mode, "honest": honest(),
               "constant": [best_constant(mode, args.seed) for mode in MODES],
               "climb": [climbs(args.climb_steps, args.seed, moves) for moves in (EDITS, ("insert",))]}
    print_attacks(results["attacks"])
    print_rest(results)
    kept = [attack for attack in found if (attack.outcome == "lose") == (attack.kind == "control")]
    for attack in kept if args.list else ():
        print(f"{attack.family} | {attack.scene}, {attack.mode} | {attack.difference:+.3f} | {attack.text}")
    results["listed"] = [vars(attack) for attack in kept]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
