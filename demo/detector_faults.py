"""A detector with faults: the toy detector's stored boxes again, after a seeded error model.

    python -m demo.detector_faults --dose 0.15 --output_dir output/demo/faults/dose15
    python -m demo.detector_faults --blind person --output_dir output/demo/faults/blind_person
    python -m demo.detector_faults --leave_out car --output_dir output/demo/faults/leave_out_car

The toy detector is nearly perfect, real ones are not. An object is a class in a clip (the toy world never shows two
objects of one class). At dose d, each with probability d:

    missed      an object has no box in any frame of its clip: what is small or dark is not seen, however long it is
                there. Frames are not independent, so this is what makes evidence wrong: the class counts as absent
    flicker     an object that was not missed has no box in one frame. This breaks tracks; a class that is seen in many
                frames stays present
    confused    a bus is called a truck, or a truck a bus, in all frames of the clip, with its own boxes and colours
    false       a clip shows one class that is not there, in FALSE_FRAMES frames one after the other: the boxes,
                confidences and colours are those of a real object of another clip

--blind CLASS: the detector never sees it, so it counts as absent. --leave_out CLASS: nobody asks the detector about it,
so it counts as unknown (`classes` in the YAML that is written).

Each fault is decided by (seed, kind of fault, clip, class, frame) alone, and in the same way at each dose: what goes
wrong at 5% goes wrong at 15%. (Once missed, an object cannot be confused any more.)

The folder gets faults.json, which describes the faults; boxes in the form of stage3/detect_objects.py; and stage3.yaml,
the given YAML with this evidence, for `train_stage3.py --config`. faults.json stands where a detector's weights stand,
so its hash is part of what names the cache: boxes with faults are found by this YAML alone, and never taken for the
detector's own.
"""

import argparse
import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from omegaconf import OmegaConf

from dataset import load_entries
from stage3.detect_objects import clip_file, find_cache, fingerprint, frequency_table, load_records, open_cache
from stage3.vocabulary_config import COCO_NAMES
from training.common import fail, load_config, run_main, stable_seed, write_json, write_text
from training.config import DetectorSettings, Stage3Config

FAULTS_FILE = "faults.json"
CONFUSED = {"bus": "truck", "truck": "bus"}
FALSE_FRAMES = 3
VERSION = 1  # of the error model; another one is another cache


@dataclass(frozen=True)
class Faults:
    """dose: in 0..1; blind, leave_out: COCO names. The module's docstring has the meaning."""

    dose: float = 0.0
    seed: int = 42
    blind: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()

    def happens(self, *what) -> bool:
        """True with probability `dose`; what happens at a dose happens at every higher one."""
        return stable_seed(self.seed, *what) < self.dose * 2**63

    def problems(self) -> list[str]:
        """Values that cannot work, one line each."""
        found = [] if 0 <= self.dose <= 1 else [f"dose must be between 0 and 1, got {self.dose}"]
        found += [] if self.seed >= 0 else [f"seed must be at least 0, got {self.seed}"]
        for key in ("blind", "leave_out"):
            if strange := sorted(set(getattr(self, key)) - set(COCO_NAMES)):
                found.append(f"{key}: {', '.join(strange)}: not in COCO_NAMES of stage3/vocabulary_config.py")
        if both := sorted(set(self.blind) & set(self.leave_out)):
            found.append(f"blind and leave_out both name {', '.join(both)}: absent or unknown?")
        return found


# ---- the error model -------------------------------------------------------------------------------------------------


def classes_of(record: dict) -> set[str]:
    """The classes of which a clip's record has boxes."""
    return {COCO_NAMES[box[0]] for frame in record.get("frames", ()) for box in frame["boxes"]}


def find_tracks(records: dict[str, dict], confidence: float) -> dict[str, list[list[tuple]]]:
    """{class: its tracks of FALSE_FRAMES frames in all clips}: [(number of the frame, box, colour), ...], of the most
    confident box of each frame, all of this confidence or more."""
    found = defaultdict(list)
    for _, record in sorted(records.items()):
        best: dict[str, list[tuple]] = defaultdict(list)
        for number, frame in enumerate(record.get("frames", ())):
            rows = {}
            for box, colour in zip(frame["boxes"], frame["colours"], strict=True):  # most confident first
                rows.setdefault(COCO_NAMES[box[0]], (number, box, colour))
            for name, row in rows.items():
                if row[1][1] >= confidence:
                    best[name].append(row)
        for name, rows in best.items():
            for start in range(len(rows) - FALSE_FRAMES + 1):
                track = rows[start : start + FALSE_FRAMES]
                if track[-1][0] - track[0][0] == FALSE_FRAMES - 1:
                    found[name].append(track)
    return dict(found)


def false_track(record: dict, faults: Faults, tracks: dict[str, list[list[tuple]]]) -> list[tuple]:
    """A track, as `find_tracks` has them, of a class that the clip does not show; [] where there is no false object."""
    video, seen = record["video"], classes_of(record)
    strange = sorted(set(tracks) - seen - {CONFUSED[name] for name in seen & set(CONFUSED)})
    if not strange or not faults.happens("false", video):
        return []
    name = strange[stable_seed(faults.seed, "false class", video) % len(strange)]
    fitting = [track for track in tracks[name] if track[-1][0] < len(record["frames"])]
    if not fitting or name in (*faults.blind, *faults.leave_out):
        return []
    return fitting[stable_seed(faults.seed, "false track", video) % len(fitting)]


def with_faults(record: dict, faults: Faults, tracks: dict[str, list[list[tuple]]]) -> dict:
    """A clip's record after the faults, which it names under "faults"; a record of a failed clip stays as it is.

    tracks: of `find_tracks`, among which false objects are chosen.
    """
    if "error" in record:
        return record
    video, seen = record["video"], classes_of(record)
    silent = {*faults.blind, *faults.leave_out}
    missed = {name for name in seen - silent if faults.happens("missed", video, name)}
    confused = {name: CONFUSED[name] for name in (seen - silent - missed) & set(CONFUSED)
                if faults.happens("confused", video, name)}
    added = false_track(record, faults, tracks)
    frames, lost = [], 0
    for number, frame in enumerate(record["frames"]):
        rows = [(box, colour) for other, box, colour in added if other == number]
        for box, colour in zip(frame["boxes"], frame["colours"], strict=True):
            name = COCO_NAMES[box[0]]
            said = confused.get(name, name)
            if name in missed or said in silent:
                continue
            if faults.happens("flicker", video, name, number):
                lost += 1
            else:
                rows.append(([COCO_NAMES.index(said), *box[1:]], colour))
        rows.sort(key=lambda row: -row[0][1])
        frames.append(frame | {"boxes": [box for box, _ in rows], "colours": [colour for _, colour in rows]})
    faulty = {"missed": sorted(missed), "confused": sorted(confused), "flicker": lost,
              "false": sorted({COCO_NAMES[box[0]] for _, box, _ in added})}
    return record | {"frames": frames, "faults": faulty}


def all_with_faults(records: dict[str, dict], faults: Faults, settings: DetectorSettings) -> dict[str, dict]:
    """`with_faults` of every clip: {video: record}."""
    tracks = find_tracks(records, settings.present_confidence)
    return {video: with_faults(record, faults, tracks) for video, record in records.items()}


# ---- files -----------------------------------------------------------------------------------------------------------


def faulty_settings(settings: DetectorSettings, faults: Faults, output_dir: Path) -> DetectorSettings:
    """The settings by which stage 3 finds the boxes with faults: faults.json stands for the weights, and the classes
    that are left out are none of the detector's."""
    classes = settings.classes
    if faults.leave_out:
        known = classes or {name: name for name in COCO_NAMES}
        classes = {theirs: "none" if ours in faults.leave_out else ours for theirs, ours in known.items()}
    return replace(settings, weights=str(output_dir / FAULTS_FILE), classes=classes)


def write_boxes(config_file: str, file: Path, about: dict, settings: DetectorSettings, records: dict[str, dict],
                others: str) -> None:
    """Write boxes that take the place of a detector's into the folder of `file`: `file`, which says what they are and
    stands where weights stand; the records; stage3.yaml, the given YAML with this evidence. Exits if the folder holds
    `others`."""
    folder = file.parent
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != about:
        fail([f"output_dir: {folder} holds {others}; remove it or give another folder"], "nothing was written")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, about, indent=1)
    made_by = fingerprint(settings)
    cache = open_cache(folder, made_by, {file.stem: about})
    for video, record in records.items():
        write_json(clip_file(cache, video), record | {"made_by": made_by}, separators=(",", ":"))
    recipe = OmegaConf.load(config_file)
    recipe.evidence_cache, recipe.detector = str(folder), asdict(settings)
    recipe.output_dir = str(folder / "stage3")
    write_text(folder / "stage3.yaml", f"# {config_file} with the evidence of {file}\n{OmegaConf.to_yaml(recipe)}")


def write_faulty(config_file: str, config: Stage3Config, records: dict[str, dict], faults: Faults,
                 output_dir: Path) -> dict[str, dict]:
    """Write faults.json, the boxes and stage3.yaml; returns {video: record}. Exits if the folder holds other faults."""
    source = find_cache(config.evidence_cache, config.detector)
    boxes_of = json.loads((source / "settings.json").read_text(encoding="utf-8"))
    about = {"made_by": "python -m demo.detector_faults", "version": VERSION, "boxes_of": boxes_of,
             **asdict(replace(faults, blind=sorted(faults.blind), leave_out=sorted(faults.leave_out)))}
    settings = faulty_settings(config.detector, faults, output_dir)
    faulty = all_with_faults(records, faults, settings)
    write_boxes(config_file, output_dir / FAULTS_FILE, about, settings, faulty, "boxes with other faults")
    return faulty


def describe(records: dict[str, dict], faulty: dict[str, dict]) -> str:
    """How many faults of each kind there are."""
    clips = [record["faults"] for record in faulty.values() if "error" not in record]
    counts = Counter()
    for clip in clips:
        counts.update(flicker=clip["flicker"], **{key: len(clip[key]) for key in ("missed", "confused", "false")})
    objects = [name for record in records.values() for name in classes_of(record)]
    boxes = sum(len(frame["boxes"]) for record in records.values() for frame in record.get("frames", ()))
    return (f"missed {counts['missed']} of {len(objects)} objects, confused {counts['confused']} of "
            f"{sum(name in CONFUSED for name in objects)} buses and trucks,\na false object in {counts['false']} of "
            f"{len(clips)} clips, {counts['flicker']} of {boxes} boxes lost in single frames")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.detector_faults", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo/stage3.yaml", help="names the clips and the detector's boxes")
    parser.add_argument("--dose", type=float, default=0.0, help="probability of each kind of fault, 0 to 1")
    parser.add_argument("--seed", type=int, default=42, help="decides which objects and clips have faults")
    parser.add_argument("--blind", nargs="+", default=[], metavar="CLASS", help="classes that count as absent")
    parser.add_argument("--leave_out", "--leave-out", nargs="+", default=[], metavar="CLASS",
                        help="classes that count as unknown")
    parser.add_argument("--output_dir", "--output-dir", required=True, help="folder of the boxes with faults")
    args = parser.parse_args(argv)
    faults = Faults(args.dose, args.seed, tuple(args.blind), tuple(args.leave_out))
    config, output_dir = load_config(Stage3Config, ["--config", args.config]), Path(args.output_dir)
    problems = faults.problems()
    if output_dir.resolve() == Path(config.evidence_cache).resolve():
        problems.append(f"output_dir: {output_dir} holds the detector's own boxes; give another folder")
    if problems:
        fail(problems, "nothing was written")
    videos = sorted({entry.video for entry in load_entries(config.data, config.default_mode)})
    records = load_records(config.evidence_cache, videos, config.detector)
    seen = set().union(*map(classes_of, records.values()))
    if unseen := sorted({*args.blind, *args.leave_out} - seen):
        fail([f"{', '.join(unseen)}: no box in any clip, so nothing to be blind to or to leave out"],
             "nothing was written")
    faulty = write_faulty(args.config, config, records, faults, output_dir)
    print(describe(records, faulty))
    print(f"\nWhat it says about {len(faulty)} clips of {config.data}:\n")
    print(frequency_table(faulty, faulty_settings(config.detector, faults, output_dir)))
    print(f"\nto train with it: python train_stage3.py --config {output_dir / 'stage3.yaml'}")
    return 0


if __name__ == "__main__":
    run_main(main)
