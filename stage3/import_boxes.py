"""Boxes that people already have become evidence: labels of the clips, in place of a detector's boxes.

    python -m stage3.import_boxes --format scalabel --detector labels/det.json     BDD100K's own labels (Scalabel JSON)
    python -m stage3.import_boxes --format coco --detector labels/coco.json        COCO JSON, one image per frame
    python -m stage3.import_boxes --format yolo --detector labels/txt              YOLO txt, one file per frame
    python -m stage3.import_boxes --format scalabel --which judge --judge FILE     as evaluate.py's judge

The labels stand where a detector's weights stand: with `detector: {weights: labels.json, classes: {...}}` in the
YAML, stage 3 and evaluate.py read what is imported here. `classes` says what each class of the labels is in our
words; a class that the labels do not have counts as unknown in every clip, never as absent.

Scalabel's `attributes.trafficLightColor` is taken over as what the lights show; other formats do not tell colours.
A clip is found by its name (file name without suffix); a frame's time by its timestamp (Scalabel), else by the number
at the end of its name: a frame of the clip (of a folder of images, the image with that number), or with --label_fps N
one of N in a second.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from training.common import fail, load_config, run_main, write_json
from training.config import ImportConfig

if __name__ == "__main__":  # --help and wrong flags are answered before torch is imported, which takes seconds
    load_config(ImportConfig, default_config="configs/stage3.yaml", description=__doc__)

from tqdm import tqdm

from dataset import Clip, DataError, VideoError, image_files, resolve_video, video_reader_problems, video_stem
from stage3.detect_objects import (
    class_problems,
    clip_file,
    clip_marks,
    fingerprint,
    frequency_table,
    load_videos,
    open_cache,
    our_class_ids,
)

OUTSIDE = 0.02  # how far a box may reach outside the frame, as a share of its side: labels are rounded
LIGHT_STATES = {"red": "red", "yellow": "amber", "green": "green"}  # BDD100K's; "none" and "NA" are not known
LONGEST_GAP = 0.15  # labels with a longer gap than this share of the clip may have missed something in between


@dataclass
class LabelledFrame:
    """One frame as the labels have it: `number` in the clip or `seconds` from its start, and boxes
    [name, confidence, x1, y1, x2, y2], in pixels of `size` or, where that is None, of the clip's own size. colours:
    what the labels say of each box (the state of a traffic light, else None), or None where they know no colours.
    named: `number` is the one in the name of the frame's image, not an index."""

    clip: str
    where: str
    boxes: list[list]
    number: int | None = None
    seconds: float | None = None
    size: tuple[float, float] | None = None
    colours: list[str | None] | None = None
    named: bool = False


# ---- the formats -----------------------------------------------------------------------------------------------------


def read_labels(path: Path, form: str) -> list[LabelledFrame]:
    """All labelled frames of a file or folder; DataError, naming the place, where it is not what `form` says."""
    reader = {"scalabel": read_scalabel, "coco": read_coco, "yolo": read_yolo}[form]
    try:
        return reader(path)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is not {form}: {what}") from error


def read_scalabel(path: Path) -> list[LabelledFrame]:
    """Scalabel JSON (BDD100K): a list of frames, or {"frames", "config": {"imageSize"}}, or a folder of such files."""
    frames = []
    for file in sorted(path.glob("**/*.json")) if path.is_dir() else [path]:
        content = json.loads(file.read_text(encoding="utf-8"))
        default = None if isinstance(content, list) else (content.get("config") or {}).get("imageSize")
        for row in content if isinstance(content, list) else content["frames"]:
            clip, number = split_name(row["name"])
            size = row.get("size") or default
            seconds = row["timestamp"] / 1000 if row.get("timestamp") is not None else None
            boxes, colours = [], []
            for label in row.get("labels") or []:
                if (box := label.get("box2d")) is not None:  # others are lanes, areas, masks
                    corners = [float(box[key]) for key in ("x1", "y1", "x2", "y2")]
                    boxes.append([label["category"], float(label.get("score", 1.0)), *corners])
                    colours.append(LIGHT_STATES.get((label.get("attributes") or {}).get("trafficLightColor")))
            frames.append(LabelledFrame(
                row.get("videoName") or clip, f"{file.name}, frame {row['name']}", boxes,
                row["frameIndex"] if row.get("frameIndex") is not None else number, seconds,
                (float(size["width"]), float(size["height"])) if size else None, colours,
                named=row.get("frameIndex") is None))
    if not any(colour for frame in frames for colour in frame.colours or []):
        for frame in frames:  # these labels do not know lights, which is not the same as not having read them
            frame.colours = None
    return frames


def read_coco(path: Path) -> list[LabelledFrame]:
    """COCO JSON: images (with `video_id` and `frame_id` where there are "videos"), annotations, categories."""
    content = json.loads(path.read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in content["categories"]}
    videos = {video["id"]: video["name"] for video in content.get("videos", [])}
    frames = {}
    for image in content["images"]:
        clip, number = split_name(image["file_name"])
        frames[image["id"]] = LabelledFrame(
            videos[image["video_id"]] if "video_id" in image else clip, f"{path.name}, image {image['file_name']}", [],
            image.get("frame_id", number), None, (float(image["width"]), float(image["height"])),
            named="frame_id" not in image)
    for row in content["annotations"]:
        x, y, width, height = map(float, row["bbox"])
        box = [names[row["category_id"]], float(row.get("score", 1.0)), x, y, x + width, y + height]
        frames[row["image_id"]].boxes.append(box)
    return list(frames.values())


def read_yolo(path: Path) -> list[LabelledFrame]:
    """A folder of txt files, one per frame, with lines "class x y width height [confidence]" in shares of the frame;
    classes.txt in it names the classes, one per line (or numbers stand as they are)."""
    if not path.is_dir():
        raise ValueError("a folder of txt files is expected")
    names_file, frames = path / "classes.txt", []
    names = names_file.read_text(encoding="utf-8").split("\n") if names_file.is_file() else []
    for file in sorted(path.glob("**/*.txt")):
        if file == names_file:
            continue
        clip, number = split_name(file.relative_to(path).as_posix())
        boxes = []
        for line in file.read_text(encoding="utf-8").splitlines():
            index, x, y, width, height, *confidence = map(float, line.split())
            name = names[int(index)].strip() if names else str(int(index))
            boxes.append([name, confidence[0] if confidence else 1.0,
                          x - width / 2, y - height / 2, x + width / 2, y + height / 2])
        frames.append(LabelledFrame(clip, file.relative_to(path).as_posix(), boxes, number, None, (1.0, 1.0),
                                    named=True))
    return frames


def split_name(name: str) -> tuple[str, int | None]:
    """(clip, number) of a frame's name: a-b-0000012.jpg, a-b_12.jpg or a-b/12.jpg; (a-b, None) for a-b.jpg.

    The hash-like parts of BDD100K's names (b1c66a42-6f7d68ca) are no frame numbers, all digits or not.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.stem.isdigit() and path.parent.name:
        return path.parent.name, int(path.stem)
    match = re.fullmatch(r"(?P<clip>[0-9a-f]{8}-[0-9a-f]{8}|.*?)(?:[-_](?P<number>\d+))?", path.stem)
    return match["clip"], int(match["number"]) if match["number"] else None


# ---- labels -> records of the evidence cache -------------------------------------------------------------------------


def match_clips(frames: list[LabelledFrame], videos: list[str]) -> dict[str, list[LabelledFrame]]:
    """{video of the data: its labelled frames}; DataError where a name in the labels could be two of the clips."""
    by_stem = defaultdict(list)
    for video in videos:
        by_stem[PurePosixPath(video_stem(video)).name].append(video)
    matched = defaultdict(list)
    for frame in frames:
        candidates = by_stem.get(PurePosixPath(video_stem(frame.clip)).name, [])
        if len(candidates) > 1:
            exact = [video for video in candidates if video_stem(video).endswith(frame.clip)]
            candidates = exact if len(exact) == 1 else candidates
        if len(candidates) > 1:
            raise DataError(f"{frame.where}: {frame.clip} may be {' or '.join(candidates)}")
        if candidates:
            matched[candidates[0]].append(frame)
    return matched


def frame_time(frame: LabelledFrame, times, label_fps: float | None) -> float:
    """When a labelled frame is shown, as a fraction of the clip; `times` [N]: the start of each frame in seconds."""
    seconds = frame.seconds
    if seconds is None and frame.number is None:
        raise DataError(f"{frame.where}: no timestamp, and no frame number at the end of its name")
    if seconds is None and label_fps:
        seconds = frame.number / label_fps
    if seconds is None:
        if frame.number >= len(times):
            raise DataError(f"{frame.where}: frame {frame.number} of a clip of {len(times)} frames (--label_fps N says "
                            "that N numbers make a second)")
        seconds = float(times[frame.number])
    longest = float(times[-1]) + 1.0  # the last frame is shown for a while
    if not 0 <= seconds <= longest:
        raise DataError(f"{frame.where}: {seconds:.1f} s, in a clip of {times[-1]:.1f} s")
    return min(seconds / max(float(times[-1]), 1e-9), 1.0)


def shares(frame: LabelledFrame, own_size, ids: dict[str, int | None]) -> dict:
    """The boxes of a frame as a record has them: {"boxes": [[class id, confidence, x1, y1, x2, y2], ...]} in shares of
    the frame, and "colours" beside them where the labels know any."""
    width, height = frame.size or own_size
    rows = []
    colours = [None] * len(frame.boxes) if frame.colours is None else frame.colours
    for (name, confidence, *corners), colour in zip(frame.boxes, colours, strict=True):
        box = [corner / side for corner, side in zip(corners, (width, height, width, height), strict=True)]
        if min(box) < -OUTSIDE or max(box) > 1 + OUTSIDE or not 0 <= confidence <= 1:
            raise DataError(f"{frame.where}: the box {corners} of a {name} ({confidence}) does not fit into a frame of "
                            f"{width:g} x {height:g}")
        x1, y1, x2, y2 = (round(min(max(share, 0.0), 1.0), 4) for share in box)
        if ids[name] is not None and x1 < x2 and y1 < y2:
            rows.append(([ids[name], round(confidence, 4), x1, y1, x2, y2], colour))
    rows.sort(key=lambda row: -row[0][1])
    found = {"boxes": [box for box, _ in rows]}
    return found if frame.colours is None else found | {"colours": [colour for _, colour in rows]}


def count_images(frames: list[LabelledFrame], path: Path) -> list[LabelledFrame]:
    """The frames of a folder of images, which may be numbered from 1 or 5000, with indices for their images' numbers.

    Raises DataError for a number that no image has, and where two images have one.
    """
    numbers = [split_name(str(file))[1] for file in image_files(path)]
    indices = {number: index for index, number in enumerate(numbers)}
    counted = []
    for frame in frames:
        if frame.named and frame.number is not None and frame.seconds is None:
            if numbers.count(frame.number) != 1:
                raise DataError(f"{frame.where}: {numbers.count(frame.number)} images in {path} have the number "
                                f"{frame.number}")
            frame = replace(frame, number=indices[frame.number])
        counted.append(frame)
    return counted


def make_record(video: str, path: Path, frames: list[LabelledFrame], ids, label_fps) -> dict:
    """A clip's record, as stage3/detect_objects.py writes it."""
    with Clip(path) as clip:
        times, size = clip.times, clip.size
    if path.is_dir() and not label_fps:
        frames = count_images(frames, path)
    rows = [{"index": frame.number or 0, "time": round(frame_time(frame, times, label_fps), 4),
             **shares(frame, size, ids)} for frame in frames]
    rows.sort(key=lambda row: row["time"])
    moments = [0.0, *(row["time"] for row in rows), 1.0]
    gap = max(later - earlier for earlier, later in zip(moments, moments[1:], strict=False))
    return {"video": video, **clip_marks(path), "frames": rows, "sparse": gap > LONGEST_GAP}


def open_labels(config, settings):
    """(clips of the data, {clip: its labelled frames}, class ids, all frames); exits with all that is wrong."""
    labels, frames, ids = Path(settings.weights), [], {}
    videos, problems = load_videos(config)
    problems += video_reader_problems(config) + class_problems(settings, config.which)
    if not labels.exists():
        problems.append(f"{config.which}.weights: no file or folder of labels at {labels}")
    if not problems:
        try:
            frames = read_labels(labels, config.format)
            ids, problem = our_class_ids({box[0] for frame in frames for box in frame.boxes}, settings, str(labels))
            problems += [f"{config.which}.{problem}"] if problem else []
            matched = match_clips(frames, videos)
        except DataError as error:
            problems.append(f"{config.which}.weights: {error}")
    if not problems and not matched:
        problems.append(f"{config.which}.weights: none of the clips in {labels} is in {config.data}; it has "
                        f"{frames[0].clip if frames else 'none'}, the data {videos[0]}")
    if problems:
        fail(problems, "nothing was imported")
    return videos, matched, ids, frames


def main(argv: list[str] | None = None) -> int:
    config = load_config(ImportConfig, argv, default_config="configs/stage3.yaml", description=__doc__)
    settings = getattr(config, config.which)
    videos, matched, ids, frames = open_labels(config, settings)
    records, problems = {}, []
    for video in tqdm(videos, desc="  labels", unit=" clips", disable=None):
        records[video] = {"video": video, "error": "the labels have no frame of it"}
        if video in matched:
            try:
                path = resolve_video(config.video_root, video)
                records[video] = make_record(video, path, matched[video], ids, config.label_fps)
            except (VideoError, DataError) as error:
                problems.append(str(error))
    if problems:
        fail(problems, "nothing was imported")
    made_by = fingerprint(settings)
    folder = open_cache(config.evidence_cache, made_by, {"format_of_labels": config.format})
    for video, record in records.items():
        write_json(clip_file(folder, video), record | {"made_by": made_by}, separators=(",", ":"))

    print(f"\nWhat {settings.weights} says about {len(matched)} of {len(videos)} clips of {config.data}:\n")
    print(frequency_table(records, settings))
    if sparse := sum(record.get("sparse", False) for record in records.values()):
        print(f"{sparse} clips have labels of single moments only: what is not labelled there is unknown, not absent")
    used = {frame.clip for group in matched.values() for frame in group}
    if others := {frame.clip for frame in frames} - used:
        print(f"{len(others)} clips of the labels are not in the data, such as {min(others)}")
    print(f"boxes: {folder}")
    return 0


if __name__ == "__main__":
    run_main(main)
