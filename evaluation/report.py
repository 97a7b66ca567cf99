"""What evaluate.py prints and draws: the tables, and the page with every clip and answer."""

from collections import Counter, defaultdict

from evaluation.probes import KINDS
from evaluation.scoring import METRICS, Truth, score_text
from pages.render import highlight, markdown_table, render
from stage3.grpo_reward_func import label_facts
from stage3.mentions import find_mentions

IN_DIFFERENCES = ("words", "recall", "safety_recall", "chair_i", "trap_told", "trap_invented", "wrong_claims", "order",
                  "nll")  # columns of the table of differences
SURE = "0.9"  # probability in the tables of hedged answers; metrics.json has others, too
PROBED = ("told", "statement", "swapped")  # ways in which a probe is answered


def cell(block: dict, key: str) -> str:
    """`0.79 ±.05`, half of the interval's width after the sign; a dash where the number means nothing."""
    metric = METRICS[key]
    if metric.needs and not block.get(metric.needs):
        return "–"
    low, high = block["interval"][key]
    spread = f"{(high - low) / 2:.{metric.decimals}f}"
    return f"{block[key]:.{metric.decimals}f} ±{spread.removeprefix('0') or spread}"


def columns(metrics: dict, mode: str, kind: str) -> list[str]:
    """The metrics of one kind of table, without those that mean nothing for any system."""
    there = {""}  # sums that are above 0 for some system
    for block in metrics["systems"].values():
        there |= {key for key, value in block[mode].items() if value}
    return [key for key, metric in METRICS.items() if metric.table == kind and metric.needs in there]


def table_of_mode(metrics: dict, mode: str, kind: str) -> list[list[str]]:
    """One mode's table, its head first. kind: content (what is said) or form (how)."""
    keys = columns(metrics, mode, kind)
    extra = ["mode acc.", "mode acc. unseen"] if kind == "form" else []
    rows = [[mode.capitalize() + (", form" if kind == "form" else ""), *(METRICS[key].head for key in keys), *extra]]
    for name, block in metrics["systems"].items():
        shares = [block.get(key) for key in ("mode_accuracy", "mode_accuracy_unseen")] if extra else []
        more = ["–" if share is None else f"{share:.2f}" for share in shares]
        rows.append([name, *(cell(block[mode], key) for key in keys), *more])
    return rows


def differences_of_mode(metrics: dict, mode: str) -> list[list[str]]:
    """The paired differences of one mode, head first: `+0.08 [+.05, +.11]`, in bold where the interval leaves out 0."""
    keys = [key for key in columns(metrics, mode, "content") + columns(metrics, mode, "form") if key in IN_DIFFERENCES]
    rows = [[f"{mode.capitalize()}, change", *(METRICS[key].head for key in keys)]]
    for pair in metrics["differences"]:
        cells, systems = [], metrics["systems"]
        for key in keys:
            needs, digits = METRICS[key].needs, max(METRICS[key].decimals, 1)
            if needs and not all(systems[pair[side]][mode].get(needs) for side in ("before", "after")):
                cells.append("–")
                continue
            change, low, high = pair[mode][key]
            text = f"{change:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
            cells.append(f"**{text}**" if low > 0 or high < 0 else text)
        rows.append([f"{pair['before']} → {pair['after']}", *cells])
    return rows


def all_tables(metrics: dict) -> list[list[list[str]]]:
    """Every table of the run, each with its head first."""
    tables = []
    for mode in metrics["words_in_range"]:
        tables += [table_of_mode(metrics, mode, "content"), table_of_mode(metrics, mode, "form")]
    if metrics["differences"]:
        tables += [differences_of_mode(metrics, mode) for mode in metrics["words_in_range"]]
    return tables + probe_tables(metrics) + twin_tables(metrics) + calibration_tables(metrics)


def slice_tables(metrics: dict) -> list[list[list[str]]]:
    """Per mode: what each checkpoint invents and tells in each part of the clips."""
    tables = []
    for mode in metrics["words_in_range"]:
        rows = [[f"{mode.capitalize()}, part of the clips", "clips", "system",
                 *(METRICS[key].head for key in ("words", "recall", "safety_recall", "chair_i", "wrong_claims"))]]
        for name, part in metrics["slices"].items():
            for system, block in part["systems"].items():
                rows.append([name, str(part["clips"]), system, *(
                    cell(block[mode], key) for key in ("words", "recall", "safety_recall", "chair_i", "wrong_claims"))])
        tables.append(rows)
    return tables


def agreed_tables(metrics: dict) -> list[list[list[str]]]:
    """The systems' tables on what two judges agree on; none without a second judge."""
    if "agreed" not in metrics:
        return []
    return [table_of_mode(metrics | metrics["agreed"], mode, "content") for mode in metrics["words_in_range"]]


def share_cell(share: dict | list[float] | None, key: str = "right") -> str:
    """A share of evaluation/probes.py, [value, low, high] or such a one in a dict, as a cell; a dash for None."""
    if not share:
        return "–"
    value, low, high = share[key] if isinstance(share, dict) else share
    return f"{value:.2f} ±{(high - low) / 2:.2f}".replace("±0", "±")


def probe_tables(metrics: dict) -> list[list[list[str]]]:
    """Per mode: the share of probes that each system answers rightly, and the AUC of its margins; none without
    `--probes`."""
    tables = []
    for mode in metrics["words_in_range"]:
        columns_of = {how: [*KINDS, "auc"] if how != "told" else KINDS for how in PROBED}
        heads = [f"{how}, {key.replace('auc', 'AUC')}" for how in PROBED for key in columns_of[how]]
        rows = [[f"{mode.capitalize()}, probes", *heads]]
        for name, systems_block in metrics["systems"].items():
            if probes := systems_block[mode].get("probes"):
                found = [probes.get(how, {}).get(key) for how in PROBED for key in columns_of[how]]
                rows.append([name, *(share_cell(share) for share in found)])
        tables += [rows] if len(rows) > 1 else []
    return tables


def twin_tables(metrics: dict) -> list[list[list[str]]]:
    """Per mode: how often a class is told in the clip and in the twin that lacks it; none without `--twins`."""
    tables = []
    for mode in metrics["words_in_range"]:
        rows = []
        for name, systems_block in metrics["systems"].items():
            if twins := systems_block[mode].get("twins"):
                counts = [f"{part} ({twins[part]['twins']})" for part in twins]
                rows = rows or [[f"{mode.capitalize()}, twins", *(f"{what}, {part}" for part in counts for what in (
                    "told", "still told", "right"))]]
                rows.append([name, *(share_cell(twins[part], key) for part in twins
                                     for key in ("told", "still_told", "right"))])
        tables += [rows] if rows else []
    return tables


def calibration_tables(metrics: dict) -> list[list[list[str]]]:
    """Per mode: of the objects that each checkpoint names, the share that is right; and of those that are right with a
    probability of SURE, what `check_on_halves` of evaluation/hedging.py says. None without `--calibrate`."""
    tables, columns_of = [], {"kept": "kept", "right": "right", "told": "right ones kept",
                              "traps_told": "companions there kept"}
    for mode in metrics["words_in_range"]:
        rows = []
        for name, found in metrics.get("calibration", {}).items():
            if block := found["modes"].get(mode):
                rows = rows or [[f"{mode.capitalize()}, hedged", "objects", "right", "AUC of words", "AUC of gain",
                                 *(f"{SURE}: {what}" for what in columns_of.values())]]
                shares = [block["auc_logp"], block["auc_gain"], *(block["targets"][SURE][key] for key in columns_of)]
                rows.append([name, str(block["mentions"]), f"{block['right']:.2f}",
                             *("–" if share is None else f"{share:.2f}" for share in shares)])
        tables += [rows] if rows else []
    return tables


def bars_of_mode(metrics: dict, mode: str, key: str) -> list[dict]:
    """One bar per system: its value of a metric (None where it means nothing) and its interval, shares from 0 to 1."""
    bars = []
    for name, systems_block in metrics["systems"].items():
        block, needs = systems_block[mode], METRICS[key].needs
        low, high = block["interval"][key]
        bars.append({"name": name, "value": None if needs and not block[needs] else block[key],
                     "low": low, "high": high})
    return bars


def table(metrics: dict) -> str:
    """What is printed at the end and stands in table.md."""
    text = "\n".join(markdown_table(rows) for rows in all_tables(metrics))
    if tables := agreed_tables(metrics):
        found = metrics["agreed"]["agreement"]
        kappa = "undefined" if found["kappa"] is None else f"{found['kappa']:.2f}"
        text += (f"\nTwo judges agree on {found['agreeing']:.1%} of {found['pairs']} pairs of a clip and a class "
                 f"(Cohen's kappa {kappa}). On what both say:\n\n" + "\n".join(map(markdown_table, tables)))
    return text


def marked(text: str, truth: Truth):
    """The text as HTML, each mention coloured by what the truth says of it."""
    spans = []
    for mention in find_mentions(text):
        kind = "negated" if mention.negated else truth.verdict(mention.object)
        spans.append((mention.start, mention.end, kind, f"{mention.object}: {kind}"))
    for what, verdict, start, end in label_facts(text, truth.evidence) if truth.evidence else ():
        spans.append((start, end, verdict, f"{what}: {verdict}"))
    return highlight(text, spans)


def report(metrics: dict, predictions: list[dict], truth: dict[str, Truth], strips: dict[str, list]) -> str:
    """The page: the tables, then each clip with its frames and every system's answers, most invention first."""
    answers, invented = defaultdict(dict), Counter()
    for row in predictions:
        if row["sample"] == 0 and row["system"] != "prior":
            text = marked(row["text"], truth[row["video"]])
            answers[row["video"]].setdefault(row["system"], {})[row["mode"]] = text
        if row["system"] in metrics["checkpoints"]:
            invented[row["video"]] += score_text(row["text"], truth[row["video"]], [0, 0])["invented"]
    clips = []
    for video in sorted(answers, key=lambda video: (-invented[video], video)):
        clips.append({"video": video, "frames": strips[video], "answers": answers[video],
                      "present": sorted(truth[video].present), "unknown": sorted(truth[video].unknown)})
    charts = {mode: (bars_of_mode(metrics, mode, "chair_i"), bars_of_mode(metrics, mode, "recall"))
              for mode in metrics["words_in_range"]}
    return render("evaluation.html", metrics=metrics, clips=clips, charts=charts,
                  tables=all_tables(metrics), slices=slice_tables(metrics) if metrics["slices"] else [],
                  agreed=agreed_tables(metrics))
