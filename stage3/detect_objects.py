"""Runs the detector on every clip: its boxes are the evidence for the stage-3 reward and for evaluate.py.

    python -m stage3.detect_objects                                    all clips, the reward's detector
    python -m stage3.detect_objects --which judge                      held-out clips, evaluate.py's detector
    torchrun --nproc_per_node 4 -m stage3.detect_objects               clips are divided among the ranks

Boxes are kept from a confidence of 0.10, in one JSON file per clip, so thresholds can be changed later without running
the detector again; with them the colours of vehicles and traffic lights, where the pixels tell them
(stage3/colours.py). stage3/evidence.py turns boxes into evidence.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

from training.common import (
    DriveVLMError,
    check_gpus,
    content_sha256,
    fail,
    load_config,
    process_rank,
    run_main,
    write_json,
)
from training.config import DetectConfig, DetectorSettings

if __name__ == "__main__":  # --help and wrong flags are answered before torch is imported, which takes seconds
    load_config(DetectConfig, default_config="configs/stage3.yaml", description=__doc__)

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from dataset import (
    DataError,
    VideoError,
    clip_files,
    load_entries,
    load_split,
    resolve_video,
    sample_clip,
    video_reader_problems,
)
from stage3.colours import BODY_COLOURS, frame_colours
from stage3.evidence import LIGHTS, Evidence, clip_evidence
from stage3.vocabulary_config import COCO_NAMES, NAMES_ELSEWHERE

BOX_FLOOR = 0.10  # boxes below this confidence are not kept
FORMAT = 2  # version of the cache; a new one starts a new folder
FINGERPRINT_KEYS = ("format", "weights", "weights_sha256", "image_size", "num_frames", "nms_iou")
KNOWN_COLOURS = {None, *BODY_COLOURS, *LIGHTS}
KNOWN_WEIGHTS = re.compile(r"yolo(v8|11|12)[nsmlx]\.pt")  # names that ultralytics offers for download
DOWNLOADS = Path("output/weights")
# ultralytics reads these when it is imported: install no packages, print no banner, unpickle nothing but weights
for variable, value in {"YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false", "ULTRALYTICS_SAFE_LOAD": "1"}.items():
    os.environ.setdefault(variable, value)


class DetectionError(DriveVLMError, RuntimeError):
    """Weights or evidence that cannot be used; the message says what to do."""


def weights_path(weights: str) -> Path:
    """The file that `weights` names: itself, or where a download of that name is kept."""
    path = Path(weights)
    return DOWNLOADS / weights if not path.is_file() and KNOWN_WEIGHTS.fullmatch(weights) else path


def weights_problems(settings: DetectorSettings, name: str) -> list[str]:
    """What is wrong with the weights (no file, and no name that can be downloaded) and with `classes`. `name`: the key
    of `settings`."""
    if holds_labels(settings):
        return [f"{name}.weights: {settings.weights} holds labels, not a detector, and not all clips have evidence of "
                "them with these settings; run python -m stage3.import_boxes"]
    return _file_problems(settings, name) + class_problems(settings, name)


def holds_labels(settings: DetectorSettings) -> bool:
    """True if the weights are labels for stage3/import_boxes.py: a JSON file or a folder."""
    path = Path(settings.weights)
    return path.is_dir() or path.suffix == ".json"


def _file_problems(settings: DetectorSettings, name: str) -> list[str]:
    if weights_path(settings.weights).is_file() or KNOWN_WEIGHTS.fullmatch(settings.weights):
        return []
    return [f"{name}.weights: no such file, and no name that can be downloaded: {settings.weights} "
            "(names: yolov8n.pt .. yolov8x.pt, yolo11n.pt .. yolo11x.pt)"]


def class_problems(settings: DetectorSettings, name: str) -> list[str]:
    """One line if `classes` names something that our table lacks."""
    strange = sorted(set(settings.classes.values()) - {*COCO_NAMES, "none"})
    return [f"{name}.classes: {', '.join(strange)}: neither a class of COCO_NAMES in stage3/vocabulary_config.py nor "
            "none, which ignores a class"] if strange else []


def our_class_ids(names: set[str], settings: DetectorSettings, source: str) -> tuple[dict[str, int | None], str | None]:
    """({a detector's class: its index in COCO_NAMES, None for one that is ignored}, None), or ({}, what is wrong)."""
    ours = settings.classes or {name: name for name in COCO_NAMES}
    if unlisted := sorted(names - set(ours)):
        same = dict(zip(COCO_NAMES, COCO_NAMES, strict=True))
        lines = [f"{name}: {(NAMES_ELSEWHERE | same).get(name.lower(), 'none')}" for name in sorted(names)]
        return {}, (f"classes: {source} has classes that are not listed: {', '.join(unlisted)}; say what each of its "
                    f"classes is in our words (none ignores one), as in classes: {{{', '.join(lines)}}}")
    return {name: None if ours[name] == "none" else COCO_NAMES.index(ours[name]) for name in names}, None


def frames_problems(settings: DetectorSettings, name: str, model_frames: int) -> list[str]:
    """One line if the detector would skip some of the `model_frames` frames that the model sees."""
    step = model_frames - 1
    if step < 1 or (settings.num_frames - 1) % step == 0:
        return []
    return [f"{name}.num_frames: {settings.num_frames} frames do not include the model's {model_frames}; "
            f"use {step + 1}, {2 * step + 1}, {3 * step + 1} ..."]


def get_weights(settings: DetectorSettings) -> Path:
    """The weights as an existing file; a known name is downloaded first, by one process only."""
    path = weights_path(settings.weights)
    if path.is_file():
        return path
    if not KNOWN_WEIGHTS.fullmatch(settings.weights):
        raise DetectionError(f"detector weights: no such file: {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            print(f"detector weights: downloading {settings.weights} (AGPL-3.0) to {path}", flush=True)
            from ultralytics.utils.downloads import attempt_download_asset

            try:
                attempt_download_asset(path)
            except (OSError, RuntimeError) as error:
                raise DetectionError(f"detector weights: {settings.weights} could not be downloaded ({error}); "
                                     f"put the file at {path}") from error
    return path


def fingerprint(settings: DetectorSettings) -> dict:
    """The settings that decide a clip's boxes. `weights_sha256` is None if the weights are not on this machine."""
    path = weights_path(settings.weights)
    sha256 = content_sha256(path) if path.exists() else None
    values = (FORMAT, Path(settings.weights).name, sha256, settings.image_size, settings.num_frames, settings.nms_iou)
    made_by = dict(zip(FINGERPRINT_KEYS, values, strict=True))
    return made_by | {"classes": dict(sorted(settings.classes.items()))} if settings.classes else made_by


class Detector:
    """YOLO by ultralytics. To use another detector, write a class with the same two methods and return it from
    `make_detector`, or pass it on:

        class GroundingDINO:
            def fingerprint(self) -> dict:
                return {**fingerprint(settings), "transformers": transformers.__version__, "prompt": PROMPT}

            def detect(self, frames) -> list:
                return [self.find_boxes(frame) for frame in frames]

        settings = DetectorSettings(weights="IDEA-Research/grounding-dino-base")
        detect_clips(videos, video_root, settings, cache_dir, detector=GroundingDINO())

    `load_evidence` with the same settings then reads its boxes, without the class.
    """

    def __init__(self, settings: DetectorSettings, device: str | None = None):
        self.settings, self.device, self.weights = settings, device, get_weights(settings)

    def fingerprint(self) -> dict:
        """Whatever decides a clip's boxes: `fingerprint(settings)`, which names the cache, and for example versions of
        libraries; a cache made with other versions is refused."""
        return {**fingerprint(self.settings), "ultralytics": importlib.metadata.version("ultralytics")}

    def detect(self, frames: np.ndarray) -> list[list[list[float]]]:
        """frames: uint8 [K, H, W, 3] RGB -> for each frame its boxes [class id, confidence, x1, y1, x2, y2].

        Class ids are indices of COCO_NAMES; x and y are fractions of the frame's width and height, in 0..1.
        """
        device = self.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
        found = []
        for start in range(0, len(frames), self.settings.batch_size):
            batch = frames[start : start + self.settings.batch_size, ..., ::-1]  # ultralytics takes BGR
            results = self.network.predict([np.ascontiguousarray(frame) for frame in batch], conf=BOX_FLOOR,
                                           iou=self.settings.nms_iou, imgsz=self.settings.image_size, device=device,
                                           verbose=False)
            for result in results:
                boxes = result.boxes
                rows = torch.cat([boxes.cls[:, None], boxes.conf[:, None], boxes.xyxyn], dim=1).tolist()
                found.append([])
                for class_id, *numbers in sorted(rows, key=lambda row: -row[1]):
                    if (ours := self.class_ids[int(class_id)]) is not None:
                        found[-1].append([ours, *(round(number, 4) for number in numbers)])
        return found

    @functools.cached_property
    def class_ids(self) -> dict[int, int | None]:
        """{class id of the network: index in COCO_NAMES, None for a class that is ignored}."""
        names = {}
        for class_id, name in self.network.names.items():  # a model built from a .yaml has "0", "1", ...: COCO's order
            unnamed = not self.settings.classes and name == str(class_id) and class_id < len(COCO_NAMES)
            names[class_id] = COCO_NAMES[class_id] if unnamed else name
        ids, problem = our_class_ids(set(names.values()), self.settings, str(self.weights))
        if problem:
            raise DetectionError(problem)
        return {class_id: ids[name] for class_id, name in names.items()}

    @functools.cached_property
    def network(self):
        """The ultralytics model, loaded when it is first needed: a complete cache needs none."""
        os.environ.setdefault("YOLO_OFFLINE", "true")  # no check for updates
        from ultralytics import YOLO

        return YOLO(str(self.weights))


def make_detector(settings: DetectorSettings):
    """The detector of these settings; the one place to choose another class, for example by the name of the weights."""
    return Detector(settings)


# ---- the cache: one folder per fingerprint, one JSON file per clip ---------------------------------------------------


def identity(made_by: dict) -> dict:
    """The part of a fingerprint to compare: weights by their hash where it is known, else by name."""
    ignored = "weights" if made_by["weights_sha256"] else "weights_sha256"
    return {key: value for key, value in made_by.items() if key != ignored}


def cache_folder(cache_dir: Path | str, made_by: dict) -> Path:
    """Boxes made with other settings go to another folder, so they are never mixed."""
    key = hashlib.sha256(json.dumps(identity(made_by), sort_keys=True).encode()).hexdigest()[:12]
    return Path(cache_dir) / f"{made_by['image_size']}px-{made_by['num_frames']}frames-{key}"


def clip_file(folder: Path, video: str) -> Path:
    """A clip's file; the hash distinguishes videos that have the same name in different folders."""
    return folder / f"{Path(video).stem}-{hashlib.sha256(video.encode()).hexdigest()[:8]}.json"


def are_sound(boxes: list) -> bool:
    """True if these are boxes as a record has them: [class id, confidence, x1, y1, x2, y2], in 0..1 but for the id."""
    try:
        for class_id, *numbers in boxes:
            if not isinstance(class_id, int) or not 0 <= class_id < len(COCO_NAMES) or len(numbers) != 5:
                return False
            if not all(0 <= number <= 1 for number in numbers):
                return False
    except (TypeError, ValueError):
        return False
    return True


def read_record(file: Path) -> dict | None:
    """A clip's record; None if there is none or it is damaged, so that the clip is detected again."""
    try:
        record = dict(json.loads(file.read_text(encoding="utf-8")))
        if "error" in record:
            return record
        times = [frame["time"] for frame in record["frames"]]
        sound = record["bytes"] > 0 and len(times) > 0 and times == sorted(times)
        for frame in record["frames"]:
            sound &= 0 <= frame["time"] <= 1 and are_sound(frame["boxes"])
            if "colours" in frame:  # imported labels may have none
                sound &= len(frame["colours"]) == len(frame["boxes"]) and KNOWN_COLOURS.issuperset(frame["colours"])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None
    return record if sound else None


def is_up_to_date(file: Path, clip: Path) -> bool:
    """True if a valid record exists for this exact clip. A clip that failed is tried again."""
    record = read_record(file)
    if record is None or "error" in record:
        return False
    try:
        return all(record.get(key) == value for key, value in clip_marks(clip).items())
    except (OSError, VideoError):  # said again where it is read
        return False


def clip_marks(clip: Path) -> dict:
    """What a record keeps of its clip to notice another one in its place: {"bytes"}; of a folder of images {"files"}
    too, a hash over their names and sizes and what says their times. No dates: evidence is copied between machines.

    Raises VideoError or OSError where there is no clip.
    """
    files = clip_files(clip)
    sizes = [file.stat().st_size for file in files]
    marks = {"bytes": sum(sizes)}
    if clip.is_dir():
        lines = [f"{file.name} {content_sha256(file) if file.suffix == '.txt' else size}"
                 for file, size in zip(files, sizes, strict=True)]
        marks["files"] = hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:32]
    return marks


def open_cache(cache_dir: Path | str, made_by: dict, versions: dict) -> Path:
    """The folder for these settings; refused if other versions made it, as their boxes must not be mixed."""
    folder = cache_folder(cache_dir, made_by)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    with FileLock(f"{folder}.lock"):
        if not file.is_file():
            write_json(file, {"made_by": made_by, **versions})
    stored = json.loads(file.read_text(encoding="utf-8"))
    differs = [f"{key} {stored.get(key)}, not {value}" for key, value in versions.items() if stored.get(key) != value]
    if differs:
        raise DetectionError(f"{folder} was made with {'; '.join(differs)}: "
                             "go back to that, or remove the folder to detect again")
    return folder


def detect_clips(videos: list[str], video_root: Path | str, settings: DetectorSettings, cache_dir: Path | str,
                 rank: int = 0, world_size: int = 1, detector=None) -> dict[str, str]:
    """Run the detector on this rank's clips that have no record yet; returns {video: reason} for clips that failed.

    videos: as in the data file, repeats allowed. detector: any object with the two methods of `Detector`, which is the
    default. A clip's record is written as soon as it is finished, so a killed run continues where it stopped.
    """
    detector = detector or make_detector(settings)
    versions = dict(detector.fingerprint())
    made_by = {key: versions.pop(key) for key in (*FINGERPRINT_KEYS, "classes") if key in versions}
    folder = open_cache(cache_dir, made_by, versions)
    paths = {video: resolve_video(video_root, video) for video in sorted(set(videos))[rank::world_size]}
    todo = [video for video, path in paths.items() if not is_up_to_date(clip_file(folder, video), path)]
    if not todo:
        return {}
    failed = {}
    clips = _read_ahead(todo, paths, settings.num_frames)
    for video, future in tqdm(clips, f"detect ({made_by['weights']})", len(todo), unit="clip", disable=rank > 0):
        record = {"video": video, "made_by": made_by, **versions}
        try:
            indices, times, frames = future.result()
        except VideoError as error:
            failed[video] = record["error"] = str(error)
        else:
            record |= {**clip_marks(paths[video]), "frames": [
                {"index": int(index), "time": round(float(time), 4), "boxes": boxes,
                 "colours": frame_colours(frame, boxes) if are_sound(boxes) else []}
                for index, time, frame, boxes in zip(indices, times, frames, detector.detect(frames), strict=True)
            ]}
        write_json(clip_file(folder, video), record, separators=(",", ":"))
        if read_record(clip_file(folder, video)) is None:
            raise DetectionError(f"{video}: boxes must be [class id, confidence, x1, y1, x2, y2] in 0..1; see Detector")
    return failed


def _read_ahead(videos: list[str], paths: dict[str, Path], num_frames: int, depth: int = 2):
    """Yield (video, future of its `sample_clip`) in order; the next clips are decoded while the detector works."""
    with ThreadPoolExecutor(depth) as pool:
        waiting = deque()
        for video in videos:
            waiting.append((video, pool.submit(sample_clip, paths[video], num_frames)))
            if len(waiting) > depth:
                yield waiting.popleft()
        yield from waiting


def find_cache(cache_dir: Path | str, settings: DetectorSettings) -> Path:
    """The folder in `cache_dir` that was made with these settings; if there is none, the error says what differs.

    Works without the weights and without ultralytics, as on a machine to which only the evidence was copied.
    """
    want = identity(fingerprint(settings))
    others, fitting = [], []
    for file in sorted(Path(cache_dir).glob("*/settings.json")):
        made_by = json.loads(file.read_text(encoding="utf-8"))["made_by"]
        differs = [f"{key} {made_by.get(key)}, not {want.get(key)}" for key in dict.fromkeys([*want, "classes"])
                   if made_by.get(key) != want.get(key)]
        if differs:
            others.append(f"\n  {file.parent.name}: {'; '.join(differs)}")
        else:
            fitting.append(file.parent)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise DetectionError(f"{cache_dir} has several caches that may be meant by {settings.weights}; put the weights "
                             f"here or remove all but one: {', '.join(path.name for path in fitting)}")
    raise DetectionError(f"no evidence made with these settings in {cache_dir}; run python -m stage3.detect_objects "
                         f"first. It contains:{''.join(others) or ' nothing'}")


def load_records(cache_dir: Path | str, videos: list[str], settings: DetectorSettings) -> dict[str, dict]:
    """{video: the clip's cached record}; a clip without a record is an error."""
    folder = find_cache(cache_dir, settings)
    records = {video: read_record(clip_file(folder, video)) for video in videos}
    missing = [video for video, record in records.items() if record is None]
    if missing:
        raise DetectionError(f"no evidence yet for {len(missing)} of {len(records)} clips ({', '.join(missing[:3])} "
                             "..); run python -m stage3.detect_objects again")
    return records


def load_evidence(cache_dir: Path | str, entries: list, settings: DetectorSettings) -> dict[str, Evidence | None]:
    """{entry.video: evidence} of dataset.Entry objects; None if detection failed, which means that nothing is known
    about the clip, not that nothing is in it."""
    records = load_records(cache_dir, sorted({entry.video for entry in entries}), settings)
    return {video: clip_evidence(record, settings) for video, record in records.items()}


def evidence_problems(entries, settings: DetectorSettings, cache_dir: Path | str, name: str) -> list[str]:
    """[] if the entries' clips have evidence already, or the weights that detecting needs can be had."""
    try:
        load_evidence(cache_dir, entries, settings)
        return []
    except DetectionError:
        return weights_problems(settings, name)


def get_evidence(entries, video_root: Path | str, settings: DetectorSettings, cache_dir: Path | str,
                 barrier=lambda: None, log=print) -> dict[str, Evidence | None]:
    """`load_evidence`, after running the detector on clips that are new. All ranks call this together."""
    try:
        return load_evidence(cache_dir, entries, settings)
    except DetectionError as error:
        log(f"evidence: {error}\nevidence: running {settings.weights} first")
    videos = sorted({entry.video for entry in entries})
    for video, reason in detect_clips(videos, video_root, settings, cache_dir, *process_rank()).items():
        print(f"no evidence: {video}: {reason}", file=sys.stderr)
    barrier()
    return load_evidence(cache_dir, entries, settings)


def frequency_table(records: dict[str, dict], settings: DetectorSettings) -> str:
    """In how many clips each class is present, salient and unknown, most frequent first."""
    evidence = [clip_evidence(record, settings) for record in records.values() if "error" not in record]
    present = Counter(name for clip in evidence for name in clip.present)
    salient = Counter(name for clip in evidence for name in clip.salient)
    unknown = Counter(name for clip in evidence for name in clip.unknown)
    lines = [f"{'class':16}{'present':>9}{'share':>8}{'salient':>9}{'unknown':>9}"]
    known = set(settings.classes.values()) or set(COCO_NAMES)
    for name in sorted(known - {"none"}, key=lambda name: (-present[name], -salient[name], -unknown[name], name)):
        if present[name] or unknown[name]:
            share = present[name] / len(evidence)
            lines.append(f"{name:16}{present[name]:9}{share:8.0%}{salient[name]:9}{unknown[name]:9}")
    lines.append(f"{len(evidence)} clips with evidence, {len(records) - len(evidence)} failed")
    return "\n".join(lines)


# ---- command line ----------------------------------------------------------------------------------------------------


def load_videos(config: DetectConfig) -> tuple[list[str], list[str]]:
    """(clips to detect, problems of the data): all clips for the detector, held-out ones for the judge."""
    files = [file for file in (config.data, config.val_data) if file]
    missing = [f"no such data file or folder: {file}" for file in files if not Path(file).exists()]
    if missing:
        return [], missing
    try:
        if config.which == "judge":
            entries = load_split(config)[1]
        else:
            entries = [entry for file in files for entry in load_entries(file, config.default_mode)]
        videos = sorted({entry.video for entry in entries})
        for video in videos:
            resolve_video(config.video_root, video)  # raises for a path that leads out of the video root
    except DataError as error:
        return [], [str(error)]
    return videos, []


def main(argv: list[str] | None = None) -> int:
    config = load_config(DetectConfig, argv, default_config="configs/stage3.yaml", description=__doc__)
    check_gpus()
    settings = getattr(config, config.which)
    videos, problems = load_videos(config)
    problems += weights_problems(settings, config.which) + video_reader_problems(config)
    if config.which == "detector":
        problems += frames_problems(settings, "detector", config.num_frames)
    if not Path(config.video_root).is_dir():
        problems.append(f"video_root: no such folder: {config.video_root}")
    if problems:
        fail(problems)
    rank, world_size = process_rank()
    failed = detect_clips(videos, config.video_root, settings, config.evidence_cache, rank, world_size)
    for video, reason in failed.items():
        print(f"no evidence: {video}: {reason}", file=sys.stderr)
    if world_size > 1:  # the table covers all clips: wait for the other ranks
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=2))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0:
        records = load_records(config.evidence_cache, videos, settings)
        print(f"\nWhat {Path(settings.weights).name} sees in {len(videos)} clips of {config.data}:\n")
        print(frequency_table(records, settings))
        print(f"\nboxes: {find_cache(config.evidence_cache, settings)}")
        return int(all("error" in record for record in records.values()))
    return 0


if __name__ == "__main__":
    run_main(main)
