"""Stage 3's report.html: what was said about which clip, what the detector saw there, and what it paid.

    python -m stage3.report output/stage3          the run may still be going on

One file without outside references, from the run folder's rollouts.jsonl and metrics.jsonl, the frame cache and the
detector's boxes. On top curves of reward and parts by mode; below, for some of the steps, the groups whose rewards
spread most: frames with boxes, the best and the worst answer, each mention coloured by what the detector says of it.
"""

import base64
import html
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dataset import MODES, VideoError, cached_frames, open_clip, resolve_video
from model import read_checkpoint
from stage3.detect_objects import DetectionError, load_records
from stage3.vocabulary_config import COCO_NAMES
from training import read_metrics

STEPS = 8  # steps that are shown
FRAMES = 4  # frames of a clip that are shown
WIDTH = 300  # of a frame, in pixels
PARTS = (("objects", 0.40), ("temporal", 0.25), ("detail", 0.20), ("hallucination", 0.15))
COLOURS = {"microscope": "#2563eb", "copilot": "#d9480f"}
WORST_FIRST = ("unsupported", "unknown", "negated", "supported")  # of two mentions in one span

STYLE = """
:root { --ink:#1c2430; --soft:#667085; --line:#e4e7ec; --paper:#fff; --back:#f5f6f8; --good:#12805c; --bad:#c92a2a;
  --unsure:#b26a00; --calm:#5b6b8c }
* { box-sizing:border-box }
body { margin:0; background:var(--back); color:var(--ink);
  font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif }
main { max-width:1180px; margin:0 auto; padding:28px 24px 80px }
h1 { font-size:27px; margin:0 0 4px } h2 { font-size:20px; margin:44px 0 12px } .soft { color:var(--soft) }
.card { background:var(--paper); border:1px solid var(--line); border-radius:10px; padding:16px 18px; margin:14px 0 }
.grid { display:grid; grid-template-columns:repeat(auto-fill,minmax(255px,1fr)); gap:12px }
.plot { background:var(--paper); border:1px solid var(--line); border-radius:10px; padding:10px 12px 6px }
.plot h3 { font-size:13px; margin:0 } .plot svg { width:100%; height:auto; display:block }
.key { font-size:13px } .key i { display:inline-block; width:22px; border-top:3px solid; vertical-align:4px }
nav { position:sticky; top:0; background:var(--back); padding:8px 0; z-index:9; border-bottom:1px solid var(--line) }
nav a { color:var(--ink); text-decoration:none; border:1px solid var(--line); background:var(--paper); padding:2px 11px;
  border-radius:14px; margin-right:5px; font-size:13px; display:inline-block }
.head { display:flex; gap:10px; align-items:baseline; flex-wrap:wrap; margin-bottom:10px }
.head b { font-size:16px } .mode { color:#fff; border-radius:12px; padding:0 10px; font-size:13px }
.film { display:grid; grid-template-columns:repeat(4,1fr); gap:6px }
.frame { position:relative; overflow:hidden; border-radius:5px; line-height:0 } .frame img { width:100% }
.frame small { position:absolute; right:4px; bottom:4px; background:#000a; color:#fff; font:11px/16px system-ui;
  padding:0 5px; border-radius:3px }
.box { position:absolute; border:2px solid }
.box b { position:absolute; left:-2px; top:-15px; font:600 10px/13px system-ui; color:#fff; padding:0 3px;
  white-space:nowrap } .box.low b { top:0 }
.box.present { border-color:var(--good) } .box.present b { background:var(--good) }
.box.unknown { border-color:var(--unsure); border-style:dashed } .box.unknown b { background:var(--unsure) }
.box.absent { border-color:#888; border-style:dotted; border-width:1px } .box.absent b { background:#888 }
.chips { margin:9px 0 2px; font-size:13px } .chip { border-radius:10px; padding:0 9px; margin-right:4px; color:#fff;
  display:inline-block } .chip.present { background:var(--good) } .chip.unknown { background:var(--unsure) }
.answers { display:grid; grid-template-columns:1fr 1fr; gap:14px; margin-top:12px }
.answer { border:1px solid var(--line); border-left:5px solid var(--soft); border-radius:8px; padding:10px 14px }
.answer.up { border-left-color:var(--good) } .answer.down { border-left-color:var(--bad) }
.answer p { margin:8px 0 } .tag { font-size:12px; text-transform:uppercase; letter-spacing:.05em; color:var(--soft) }
.adv { float:right; font-weight:600 } .up .adv { color:var(--good) } .down .adv { color:var(--bad) }
mark { background:none; color:inherit; border-radius:3px; padding:0 2px; border-bottom:2px solid }
mark.supported { background:#d3f2e4; border-color:var(--good) }
mark.unsupported { background:#ffdcdc; border-color:var(--bad) }
mark.unknown { background:#ffeccc; border-color:var(--unsure) }
mark.negated { background:#e5e9f4; border-color:var(--calm) }
.parts { display:grid; grid-template-columns:repeat(4,1fr); gap:10px; font-size:12px; color:var(--soft) }
.bar { height:6px; border-radius:3px; background:var(--line); overflow:hidden } .bar i { display:block; height:100%;
  background:#4b6bd6 }
details { margin-top:10px } summary { cursor:pointer; color:var(--soft); font-size:13px }
@media (max-width:760px) { .answers { grid-template-columns:1fr } .film { grid-template-columns:1fr 1fr } }
"""


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def svg_curve(rows, series, low=None, high=None):
    """One small plot: `series` is {key of metrics.jsonl: (colour, dash)}; values over steps."""
    points = {key: [(row["step"], row[key]) for row in rows if row.get(key) is not None] for key in series}
    points = {key: line for key, line in points.items() if line}
    if not points:
        return ""
    values = [y for line in points.values() for _, y in line]
    steps = [x for line in points.values() for x, _ in line]
    low, high = min(values) if low is None else low, max(values) if high is None else high
    high = high if high > low else low + 1.0
    left, right, top, bottom = 40, 312, 10, 122
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def place(x, y):
        return (f"{left + (x - first) / (last - first) * (right - left):.1f},"
                f"{bottom - (min(max(y, low), high) - low) / (high - low) * (bottom - top):.1f}")

    parts = []
    for share in (0.0, 0.5, 1.0):
        y, value = bottom - share * (bottom - top), low + share * (high - low)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y}" y2="{y}" stroke="#e4e7ec"/>'
                     f'<text x="{left - 5}" y="{y + 4}" text-anchor="end">{value:.2g}</text>')
    parts.append(f'<text x="{left}" y="138">{first}</text><text x="{right}" y="138" text-anchor="end">{last}</text>')
    for key, line in points.items():
        colour, dash = series[key]
        if dash:  # measured now and then: dots
            parts += [f'<circle cx="{xy.split(",")[0]}" cy="{xy.split(",")[1]}" r="3" fill="{colour}"/>'
                      for xy in (place(x, y) for x, y in line)]
        style = f'stroke="{colour}" fill="none" stroke-width="{1.2 if dash else 1.8}"'
        parts.append(f'<polyline {style} stroke-dasharray="{dash}" points="{" ".join(place(*p) for p in line)}"/>')
    text = 'font-family="system-ui" font-size="11" fill="#667085"'
    return f'<svg viewBox="0 0 322 142" {text}>{"".join(parts)}</svg>'


def curves(rows):
    """All plots, one colour a mode."""
    by_mode = [("Reward", "reward", 0.0, 1.0),
               *((f"{name.capitalize()} ({weight:.2f})", name, 0.0, 1.0) for name, weight in PARTS),
               ("Tokens an answer", "length", 0.0, None), ("Share cut off", "truncated", 0.0, 1.0)]
    plots = []
    for title, key, low, high in by_mode:
        series = {f"{key}/{mode}": (COLOURS[mode], "") for mode in MODES}
        if key == "reward":
            series |= {f"eval_reward_{mode}": (COLOURS[mode], "2 3") for mode in MODES}
        plots.append((title, svg_curve(rows, series, low, high)))
    grey = ("#475467", "")
    plots += [(title, svg_curve(rows, {key: grey}, 0.0)) for title, key in (
        ("KL to stage 2, nats a token", "kl"), ("Entropy, nats a token", "entropy"),
        ("Std inside a group", "reward_std"), ("Share of dead groups", "dead_groups"))]
    drawn = "".join(f'<div class="plot"><h3>{title}</h3>{svg}</div>' for title, svg in plots if svg)
    key = " &nbsp; ".join(f'<i style="color:{COLOURS[mode]}"></i> {mode.capitalize()}' for mode in MODES)
    return f'<p class="key">{key} &nbsp; <span class="soft">dots: greedy answers on held-out clips</span></p>' \
           f'<div class="grid">{drawn}</div>'


# ---------------------------------------------------------------------------------------------------------------------
# A group: frames with boxes, answers


def film(record, frames, aspect, evidence, settings):
    """Some of the model's frames [T, S, S, 3], in the clip's own aspect (height / width), with boxes.

    record: the clip's boxes; those of the frame nearest in time are drawn.
    """
    height, times = round(WIDTH * aspect), np.array([frame["time"] for frame in record["frames"]])
    cells = []
    for t in np.unique(np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)):
        buffer = io.BytesIO()
        Image.fromarray(frames[t]).resize((WIDTH, height), Image.LANCZOS).save(buffer, "JPEG", quality=82)
        time = t / max(len(frames) - 1, 1)
        drawn = []
        for class_id, confidence, x1, y1, x2, y2 in record["frames"][int(np.abs(times - time).argmin())]["boxes"]:
            if confidence < settings.absent_confidence:
                continue
            name = COCO_NAMES[class_id]
            state = next((key for key in ("present", "unknown") if name in evidence[key]), "absent")
            low = " low" if y1 * height < 16 else ""
            place = f"left:{x1:.2%};top:{y1:.2%};width:{x2 - x1:.2%};height:{y2 - y1:.2%}"
            drawn.append(f'<i class="box {state}{low}" style="{place}"><b>{name} {confidence:.2f}</b></i>')
        picture = f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
        cells.append(f'<div class="frame">{picture}{"".join(drawn)}<small>{time:.0%} of the clip</small></div>')
    return f'<div class="film">{"".join(cells)}</div>'


def coloured(text, mentions):
    """The text with each mention marked by the detector's verdict; where a span holds two, the worse one shows."""
    spans = {}
    for name, verdict, start, end in mentions:
        spans.setdefault((start, end), []).append((name, verdict))
    parts, at = [], 0
    for (start, end), found in sorted(spans.items()):
        if start < at:
            continue
        verdict = min((v for _, v in found), key=WORST_FIRST.index)
        title = html.escape("; ".join(f"{name}: {v}" for name, v in found))
        parts += [html.escape(text[at:start]), f'<mark class="{verdict}" title="{title}">',
                  html.escape(text[start:end]), "</mark>"]
        at = end
    return "".join([*parts, html.escape(text[at:])])


def answer_card(record, tag=""):
    side = "up" if record["advantage"] > 0 else "down" if record["advantage"] < 0 else ""
    bars = "".join(f'<div>{name} {record[name]:.2f}<div class="bar"><i style="width:{record[name]:.0%}"></i>'
                   "</div></div>" for name, _ in PARTS)
    cut = "" if record["ended"] else ' <span class="soft">[cut off]</span>'
    return (f'<div class="answer {side}"><span class="adv" title="advantage in its group">{record["advantage"]:+.2f}'
            f'</span><span class="tag">{tag}</span> <b>{record["reward"]:.3f}</b> '
            f'<span class="soft">{record["tokens"]} tokens</span>'
            f'<p>{coloured(record["text"], record["mentions"]) or "<i>nothing</i>"}{cut}</p>'
            f'<div class="parts">{bars}</div></div>')


def group_card(records, picture):
    """One prompt's group: best and worst answer side by side, the others folded away."""
    ranked = sorted(records, key=lambda r: -r["reward"])
    first, evidence = ranked[0], ranked[0]["evidence"]
    chips = "".join(f'<span class="chip present">{name}</span>' for name in evidence["present"])
    chips += "".join(f'<span class="chip unknown">{name} ?</span>' for name in evidence["unknown"])
    mean = sum(r["reward"] for r in records) / len(records)
    others = "".join(answer_card(record) for record in ranked[1:-1])
    return (f'<div class="card"><div class="head"><b>{html.escape(first["video"])}</b>'
            f'<span class="mode" style="background:{COLOURS[first["mode"]]}">{first["mode"].capitalize()}</span>'
            f'<span class="soft">{len(records)} answers, mean reward {mean:.3f}</span></div>{picture}'
            f'<div class="chips">the detector saw: {chips or "nothing for certain"}</div>'
            f'<div class="answers">{answer_card(first, "best")}{answer_card(ranked[-1], "worst")}</div>'
            + (f'<details><summary>the other {len(ranked) - 2}</summary><div class="answers">{others}</div></details>'
               if others else "") + "</div>")


# ---------------------------------------------------------------------------------------------------------------------
# The page


def read_rollouts(path):
    """{step: {slot: records of one group}}; a last line that was cut by a kill is left out."""
    steps = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                record = json.loads(line)
                steps.setdefault(record["step"], {}).setdefault(record["slot"], []).append(record)
    return steps


def chosen_groups(groups):
    """Of one step: the group whose rewards spread most, in each mode."""

    def spread(records):
        rewards = [r["reward"] for r in records]
        return max(rewards) - min(rewards)

    modes = {mode: [g for g in groups.values() if g[0]["mode"] == mode] for mode in MODES}
    return [max(own, key=spread) for own in modes.values() if own]


def picture_of(config, video, evidence, num_frames, image_size):
    """The clip's film strip, or a line that says why there is none."""
    try:
        record = load_records(config.evidence_cache, [video], config.detector)[video]
        path = resolve_video(config.video_root, video)
        frames = cached_frames(path, num_frames, image_size, config.frame_cache)
        with open_clip(path) as reader:
            height, width = reader[0].shape[:2]
    except (DetectionError, VideoError) as error:
        return f'<p class="soft">no picture: {html.escape(str(error))}</p>'
    return film(record, frames, height / width, evidence, config.detector)


def summary(rows):
    """First and last tenth of the steps, as one line a mode."""
    lines = []
    for mode in MODES:
        values = [row[f"reward/{mode}"] for row in rows if row.get(f"reward/{mode}") is not None]
        if values:
            tenth = max(1, len(values) // 10)
            before, after = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
            lines.append(f"{mode.capitalize()} <b>{before:.3f} → {after:.3f}</b>")
    return "reward of sampled answers, first and last tenth of the steps: " + ", ".join(lines)


def write_report(folder, config):
    """Write `folder`/report.html anew and return its path; `config`: the run's Stage3Config."""
    folder = Path(folder)
    meta = read_checkpoint(config.init_from)[1]
    rows = read_metrics(folder / "metrics.jsonl")
    steps = read_rollouts(folder / "rollouts.jsonl")
    numbers = sorted(steps)
    if not numbers:
        raise ValueError(f"{folder / 'rollouts.jsonl'} holds no rollouts yet")
    shown = [numbers[i] for i in np.unique(np.linspace(0, len(numbers) - 1, STEPS).round().astype(int))]
    sections = []
    for step in shown:
        cards = []
        for records in chosen_groups(steps[step]):
            first = records[0]
            picture = picture_of(config, first["video"], first["evidence"], meta["num_frames"], meta["image_size"])
            cards.append(group_card(records, picture))
        sections.append(f'<h2 id="step{step}">Step {step}</h2>{"".join(cards)}')
    links = "".join(f'<a href="#step{step}">{step}</a>' for step in shown)
    legend = "".join(f'<mark class="{verdict}">{text}</mark> &nbsp;' for verdict, text in (
        ("supported", "the detector saw it"), ("unsupported", "the detector did not"), ("unknown", "it is not sure"),
        ("negated", "denied by the text")))
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Stage 3: {html.escape(folder.name)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style><main>
<h1>Stage 3: what was said, and what it was paid</h1>
<p class="soft">{html.escape(str(folder))} &middot; {len(numbers)} steps &middot; {summary(rows)}</p>
{curves(rows)}
<h2>Rollouts</h2>
<p>{legend}<br><span class="soft">Of each step shown, in each mode, the group whose rewards differ most. Solid green
boxes: present; dashed: not sure; dotted: taken as absent. At the right of an answer: its advantage.</span></p>
<nav>step &nbsp;{links}</nav>{"".join(sections)}</main></html>"""
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def main(argv):
    if len(argv) != 1 or not (Path(argv[0]) / "rollouts.jsonl").is_file():
        print("usage: python -m stage3.report RUN_FOLDER (a run folder of stage 3, with rollouts.jsonl)",
              file=sys.stderr)
        return 2
    from train_stage3 import load_run_config

    print(write_report(argv[0], load_run_config(argv[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
