"""What people said of a sheet: preference, agreement, the error of the evidence, and CHAIR corrected by it.

    python evaluate.py --output_dir DIR --read_sheet ratings_anna.csv ratings_ben.csv

Reads the CSVs that sheet.html gives back and DIR/sheet_key.json (evaluation/sheet.py writes both), prints tables and
writes DIR/sheet_ratings.json. Loads neither torch nor a model. Intervals are the 2.5 and 97.5 percentiles over
bootstrap draws of clips: all ratings of a clip come and go together.
"""

import csv
import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from evaluation.scoring import draw_clips
from pages.render import markdown_table
from training.common import fail, write_json
from training.config import EvaluateConfig

COLUMNS = ("sheet", "rater", "item", "mention", "answer")
PREFERENCES = ("A", "B", "same")
MARKS = ("there", "not there", "cannot tell")
SHOWN = 5  # problems of one kind that are printed for a file
ESTIMATOR = "Rogan-Gladen: (apparent - false alarm rate) / (1 - false alarm rate - miss rate), clamped to [0, 1]"


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_key(file: Path, problems: list[str]) -> dict:
    """The content of sheet_key.json, or {} and a problem."""
    try:
        key = json.loads(file.read_text(encoding="utf-8"))
        key["sheet"], key["systems"], key["clips"], key["items"], key["counts"]  # noqa: B018
        return key
    except OSError:
        problems.append(f"output_dir: no {file}; it is written beside the sheet by --sheet")
    except (ValueError, KeyError, TypeError):
        problems.append(f"output_dir: {file} is no key of a sheet")
    return {}


def questions_of(key: dict) -> dict[tuple[str, str], tuple[str, ...]]:
    """{(item, mention or ""): the answers it can have}. Nobody is asked to choose between two equal answers."""
    questions = {}
    for number, item in enumerate(key["items"], 1):
        if not item["equal"]:
            questions[str(number), ""] = PREFERENCES
        for mention in item["mentions"]:
            questions[str(number), mention["question"]] = MARKS
    return questions


def read_rows(file: str, problems: list[str]) -> list[tuple[int, dict]]:
    """(line, row) of one CSV; what is wrong with the file as a whole is added to `problems`."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened)
            columns = reader.fieldnames or ["nothing"]
            missing = [name for name in COLUMNS if name not in columns]
            rows = [(reader.line_num, row) for row in reader] if not missing else []
    except OSError as error:
        problems.append(f"read_sheet: {file}: {error.strerror}")
        return []
    except (UnicodeDecodeError, csv.Error) as error:
        problems.append(f"read_sheet: {file} is no CSV file: {error}")
        return []
    if missing:
        problems.append(f"read_sheet: {file} lacks the columns {', '.join(missing)} (it begins with "
                        f"{', '.join(columns)})")
    elif not rows:
        problems.append(f"read_sheet: {file} holds no answers")
    return rows


def wrong_row(row: dict, key: dict, questions: dict, ratings: dict) -> str:
    """What is wrong with a row of a CSV, or ""."""
    question, answer = (row["item"], row["mention"]), row["answer"]
    if row["sheet"] != key["sheet"]:
        return f"of another sheet, {row['sheet']} (the key is of {key['sheet']})"
    if not (row["rater"] or "").strip():
        return "no name of a rater"
    if question not in questions:
        return f"the sheet has no item {row['item']!r} with mention {row['mention']!r}"
    if answer not in questions[question]:
        return f"answer {answer!r} is none of {', '.join(questions[question])}"
    if question in ratings.get(row["rater"], ()):
        return f"{row['rater']} has answered this question before"
    return ""


def read_ratings(files: list[str], key: dict, problems: list[str]) -> dict[str, dict[tuple[str, str], str]]:
    """{rater: {(item, mention or ""): answer}}; what is wrong with the files is added to `problems`."""
    ratings, questions = {}, questions_of(key) if key else {}
    for file in files:
        found = defaultdict(list)  # lines by problem
        for line, row in read_rows(file, problems):
            if key and (wrong := wrong_row(row, key, questions, ratings)):
                found[wrong].append(line)
            elif key:
                ratings.setdefault(row["rater"], {})[row["item"], row["mention"]] = row["answer"]
        for wrong, lines in itertools.islice(found.items(), SHOWN):
            where = f"line {lines[0]}" if len(lines) == 1 else f"{len(lines)} lines from line {lines[0]} on"
            problems.append(f"read_sheet: {file}, {where}: {wrong}")
        if len(found) > SHOWN:
            problems.append(f"read_sheet: {file}: {len(found) - SHOWN} more problems of this kind")
    return ratings


# ---- estimates -------------------------------------------------------------------------------------------------------


def share(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, and nan where there is nothing below."""
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=np.asarray(below) > 0)


def estimate(values: np.ndarray) -> dict:
    """Row 0 of `values` is the value, the others are draws -> {"value", "interval", "undefined_draws"}.

    None where the value is undefined. Draws in which it is undefined have no part in the interval.
    """
    defined = values[1:][~np.isnan(values[1:])]
    if np.isnan(values[0]) or not len(defined):
        return {"value": None, "interval": None, "undefined_draws": int(len(values) - 1 - len(defined))}
    return {"value": round(float(values[0]), 4), "interval": np.percentile(defined, [2.5, 97.5]).round(4).tolist(),
            "undefined_draws": int(len(values) - 1 - len(defined))}


def cohens_kappa(pairs: list[tuple[str, str]]) -> float | None:
    """Agreement of two raters beyond chance, (p_o - p_e) / (1 - p_e): 1 full, 0 as by chance. None where chance alone
    would make them agree (both have given one and the same answer throughout) or they have no question in common.
    Cohen 1960, Educational and Psychological Measurement 20(1)."""
    if not pairs:
        return None
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    chance = sum(first[name] * second[name] for name in first) / len(pairs) ** 2
    observed = sum(a == b for a, b in pairs) / len(pairs)
    return None if chance == 1 else (observed - chance) / (1 - chance)


def agreement(ratings: list[dict]) -> dict:
    """Of raters' {question: answer}: each pair's Cohen's kappa over the questions that both have answered, and their
    mean over the pairs that have one."""
    pairs = []
    for first, second in itertools.combinations(ratings, 2):
        common = [(first[question], second[question]) for question in first if question in second]
        pairs.append({"questions": len(common), "equal": sum(a == b for a, b in common), "kappa": cohens_kappa(common)})
    kappas = [pair["kappa"] for pair in pairs if pair["kappa"] is not None]
    questions, equal = sum(pair["questions"] for pair in pairs), sum(pair["equal"] for pair in pairs)
    return {"statistic": "Cohen's kappa" if len(pairs) < 2 else "mean of Cohen's kappa over the pairs of raters",
            "kappa": round(float(np.mean(kappas)), 4) if kappas else None, "pairs": len(pairs),
            "pairs_without_kappa": len(pairs) - len(kappas), "compared": questions,
            "equal": round(equal / questions, 4) if questions else None}


def rogan_gladen(apparent: np.ndarray, false_alarm: np.ndarray, miss: np.ndarray) -> np.ndarray:
    """The share that is really not there, from the share that an imperfect source calls so; nan where the source says
    no more than chance (false alarm + miss >= 1) or a rate is unknown. Rogan & Gladen 1978, clamped to [0, 1]."""
    informed = 1 - false_alarm - miss
    return np.clip(share(apparent - false_alarm, np.where(informed > 1e-9, informed, 0)), 0, 1)


def majority(marks: list[str]) -> str:
    """What most raters say of a mention; "cannot tell" where none decides it or as many say one thing as the other."""
    there, not_there = marks.count("there"), marks.count("not there")
    return "cannot tell" if there == not_there else "there" if there > not_there else "not there"


# ---- results ---------------------------------------------------------------------------------------------------------


def preferences(key: dict, ratings: dict, mode: str | None, draws: np.ndarray, clips: dict[str, int]) -> dict:
    """Of the second system against the first: each rater's rating of an item counts once, a tie as half a win. Two
    equal answers are a tie for every rater."""
    sums = [Counter() for _ in clips]
    for number, item in enumerate(key["items"], 1):
        for answers in ratings.values() if mode in (None, item["mode"]) else ():
            choice = "same" if item["equal"] else answers.get((str(number), ""))
            if choice:
                winner = item.get(choice)  # None: the same
                sums[clips[item["video"]]][key["systems"].index(winner) if winner else "tie"] += 1
    by_clip = np.array([[clip[0], clip[1], clip["tie"]] for clip in sums], float)  # [clips, 3]
    lost, won, ties = (draws @ by_clip).T
    return {"won": int(won[0]), "lost": int(lost[0]), "ties": int(ties[0]),
            "win_rate": estimate(share(won + ties / 2, won + lost + ties))}


def label_mentions(key: dict, ratings: dict) -> list[dict]:
    """The key's mentions that someone has marked, each with its clip, mode and `label`: the majority's mark."""
    labelled = []
    for number, item in enumerate(key["items"], 1):
        for mention in item["mentions"]:
            question = (str(number), mention["question"])
            marks = [answers[question] for answers in ratings.values() if question in answers]
            if marks:
                labelled.append({**mention, "video": item["video"], "mode": item["mode"], "label": majority(marks)})
    return labelled


def count_mentions(mentions: list[dict], source: str, clips: dict[str, int], draws: np.ndarray) -> dict:
    """{(verdict of the source, people's label): number in each draw}."""
    counts = {pair: np.zeros(len(clips)) for pair in itertools.product(("supported", "unsupported", "unknown"), MARKS)}
    for mention in mentions:
        counts[mention["verdicts"][source], mention["label"]][clips[mention["video"]]] += 1
    return {pair: draws @ by_clip for pair, by_clip in counts.items()}


def rates(counts: dict) -> tuple[np.ndarray, np.ndarray]:
    """(false alarm rate, miss rate) in each draw: of the mentions that people see, the share that the source calls not
    there; of those that people do not see, the share that it calls there. Undecided mentions are left out."""
    alarms, right_alarms = counts["unsupported", "there"], counts["unsupported", "not there"]
    misses, right_passes = counts["supported", "not there"], counts["supported", "there"]
    return share(alarms, alarms + right_passes), share(misses, misses + right_alarms)


def error_of(counts: dict) -> dict:
    """A source's error against people, with the counts that it is made of."""
    once = {pair: int(values[0]) for pair, values in counts.items()}
    false_alarm, miss = rates(counts)
    there = once["supported", "there"] + once["unsupported", "there"]
    not_there = once["supported", "not there"] + once["unsupported", "not there"]
    return {"there": there, "false_alarms": once["unsupported", "there"], "false_alarm_rate": estimate(false_alarm),
            "not_there": not_there, "misses": once["supported", "not there"], "miss_rate": estimate(miss),
            "undecided": sum(once.values()) - there - not_there}


def chair_of_people(mentions: list[dict], clips: dict[str, int], draws: np.ndarray) -> dict:
    """CHAIRi of these mentions as people see them, on the sheet's clips."""
    sums = {label: np.zeros(len(clips)) for label in MARKS}
    for mention in mentions:
        sums[mention["label"]][clips[mention["video"]]] += 1
    invented, there = draws @ sums["not there"], draws @ sums["there"]
    return {"not_there": int(invented[0]), "decided": int((invented + there)[0]),
            "chair_i": estimate(share(invented, invented + there))}


def corrected_chair(counts: np.ndarray, draws: np.ndarray, pooled: tuple, own: tuple) -> dict:
    """CHAIRi over all clips as a source gives it, and corrected by its error rates (pooled; of this system alone).

    counts [clips, 2]: of each clip's mentions those called not there, and those decided; draws [1 + BOOTSTRAP, clips].
    """
    invented, decided = (draws @ counts).T
    apparent = share(invented, decided)
    return {"apparent": estimate(apparent), "corrected": estimate(rogan_gladen(apparent, *pooled)),
            "corrected_by_own_rates": estimate(rogan_gladen(apparent, *own))}


def only(questions: list, answers: dict) -> dict:
    """The answers to these questions."""
    return {question: answers[question] for question in questions if question in answers}


def results(key: dict, ratings: dict[str, dict], seed: int) -> dict:
    """The content of sheet_ratings.json: a pure function of key, ratings and seed."""
    on_sheet = list(dict.fromkeys(item["video"] for item in key["items"]))
    others = [video for video in key["clips"] if video not in on_sheet]
    clips, rng = {video: i for i, video in enumerate(on_sheet)}, np.random.default_rng(seed)
    draws, draws_of_others = draw_clips(len(on_sheet), rng), draw_clips(len(others), rng)
    mentions, questions = label_mentions(key, ratings), questions_of(key)
    asked = {"preferences": [q for q in questions if not q[1]], "mentions": [q for q in questions if q[1]]}
    found = {
        "sheet": key["sheet"], "systems": key["systems"], "clips": len(clips), "estimator": ESTIMATOR,
        "questions": {kind: len(of_kind) for kind, of_kind in asked.items()},
        "raters": {name: {} for name in ratings},
        "preference": {mode or "all": preferences(key, ratings, mode, draws, clips) for mode in (None, *key["modes"])},
        "agreement": {}, "error": {}, "chair_i": {system: defaultdict(dict) for system in key["systems"]},
    }
    for kind, of_kind in asked.items():
        rated = {name: only(of_kind, answers) for name, answers in ratings.items()}
        found["agreement"][kind] = agreement(list(rated.values()))
        for name, answers in rated.items():
            found["raters"][name][kind] = len(answers)
    for system, mode in itertools.product(key["systems"], key["modes"]):
        said = [mention for mention in mentions if (mention["system"], mention["mode"]) == (system, mode)]
        found["chair_i"][system][mode]["people"] = chair_of_people(said, clips, draws)
    for source, by_system in key["counts"].items():
        pooled = count_mentions(mentions, source, clips, draws)
        found["error"][source] = {"both": error_of(pooled)}
        for system in key["systems"]:
            own = count_mentions([m for m in mentions if m["system"] == system], source, clips, draws)
            found["error"][source][system] = error_of(own)
            for mode, by_video in by_system[system].items():
                counts = np.array([by_video[video] for video in on_sheet + others], float)
                found["chair_i"][system][mode][source] = corrected_chair(
                    counts, np.hstack([draws, draws_of_others]), rates(pooled), rates(own))
    return found


# ---- printing --------------------------------------------------------------------------------------------------------


def shown(value: dict) -> str:
    """`0.62 [0.50, 0.74]`, or a dash where it is undefined."""
    return "–" if value["value"] is None else "{:.2f} [{:.2f}, {:.2f}]".format(value["value"], *value["interval"])


def summary(found: dict) -> str:
    """The tables that --read_sheet prints."""
    first, second = found["systems"]
    lines = [f"{found['sheet']}: {found['clips']} clips, {len(found['raters'])} raters, 95% intervals over clips\n"]
    asked = found["questions"]
    rows = [["rater", "preferences", "mentions"]]
    for name, done in found["raters"].items():
        rows.append([name, *(f"{done[kind]} of {asked[kind]}" for kind in asked)])
    lines.append(markdown_table(rows))
    rows = [[f"{second} against {first}", "won", "lost", "the same", "win rate (the same: half)"]]
    rows += [[mode, str(block["won"]), str(block["lost"]), str(block["ties"]), shown(block["win_rate"])]
             for mode, block in found["preference"].items()]
    lines.append(markdown_table(rows))
    if len(found["raters"]) > 1:
        rows = [["agreement of raters", "compared", "equal", found["agreement"]["mentions"]["statistic"]]]
        for kind, block in found["agreement"].items():
            rows.append([kind, str(block["compared"]), *("–" if block[name] is None else f"{block[name]:.2f}"
                                                        for name in ("equal", "kappa"))])
        lines.append(markdown_table(rows))
    rows = [["error against people", "mentions of", "false alarms", "rate", "misses", "rate", "undecided"]]
    for source, blocks in found["error"].items():
        rows += [[source, name, f"{block['false_alarms']} of {block['there']}", shown(block["false_alarm_rate"]),
                  f"{block['misses']} of {block['not_there']}", shown(block["miss_rate"]), str(block["undecided"])]
                 for name, block in blocks.items()]
    lines.append(markdown_table(rows))
    rows = [["CHAIRi", "mode", "by", "as found", "corrected", "corrected by the system's own rates"]]
    for (system, modes), mode in itertools.product(found["chair_i"].items(), found["preference"]):
        for source, block in modes.get(mode, {}).items():
            values = [block["chair_i"]] if source == "people" else block.values()
            rows.append([system, mode, source, *map(shown, values), *[""] * (3 - len(values))])
    lines.append(markdown_table(rows) + f"Corrected: {found['estimator'].partition(':')[0]}; docs/evaluation.md.")
    return "\n".join(lines)


def read_sheet(config: EvaluateConfig) -> int:
    """Reads the ratings, prints tables, writes sheet_ratings.json. All problems come in one message, exit code 2."""
    problems, out = [], Path(config.output_dir)
    key = read_key(out / "sheet_key.json", problems)
    ratings = read_ratings(config.read_sheet, key, problems)
    if problems:
        fail(problems, "nothing was written")
    found = results(key, ratings, config.seed)
    write_json(out / "sheet_ratings.json", found, indent=1)
    print(summary(found))
    print(f"all numbers: {out / 'sheet_ratings.json'}")
    return 0
