"""What a detector sees in each clip: the evidence that stage 3 is paid by, and the one that evaluate.py judges by.

    python -m stage3.detect_objects --config configs/stage3.yaml                       every clip, the reward's detector
    python -m stage3.detect_objects --config configs/stage3.yaml --which judge         ... the judge's settings
    torchrun --nproc_per_node 4 -m stage3.detect_objects --config configs/stage3.yaml  clips are shared out by rank

Every box down to 0.10 confidence is kept, one JSON a clip, so that thresholds can be moved later without running the
detector again. From the boxes follows evidence of three values for each class: present, absent, unknown.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import sys
import typing
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from dataset import DataError, VideoError, load_entries, open_clip, resolve_video, split_by_video, spread_over_time
from stage3.grpo_reward_func import Evidence
from stage3.vocabulary_config import COCO_NAMES
from training import DataConfig, load_config, opt, process_rank

BOX_FLOOR = 0.10  # boxes under this confidence are not kept
FORMAT = 1  # of the cache; a change here makes every older cache another folder
KNOWN_WEIGHTS = re.compile(r"yolo(v8|11|12)[nsmlx]\.pt")  # names that ultralytics offers for download
DOWNLOADS = Path("output/weights")
VEHICLE_BODIES = frozenset({"car", "truck", "bus"})  # one body that a detector may call by two of these names


class DetectionError(RuntimeError):
    """Weights or evidence that cannot be used; the message says what to do."""


@dataclass
class DetectorSettings:
    """Detector: how clips are looked at (this makes the cache's folder), and what its boxes are taken to mean"""

    weights: str = opt("yolov8x.pt", "a weights file, or a known name such as yolov8x.pt, which is then downloaded")
    image_size: int = opt(1280, "longer side of the frames as the detector sees them; 640 loses far traffic lights")
    num_frames: int = opt(31, "frames looked at; k * (model's frames - 1) + 1 holds the model's own and some between")
    nms_iou: float = opt(0.7, "overlap at which two boxes of one class become one")
    batch_size: int = opt(8, "frames a forward pass")

    present_confidence: float = opt(0.5, "a class is present where it has this confidence in present_frames frames")
    present_frames: int = opt(2, "... in so many frames")
    strong_confidence: float = opt(0.7, "... or this confidence in one frame")
    absent_confidence: float = opt(0.25, "a class is absent where it stays under this; between: unknown")
    salient_area: float = opt(0.002, "a present class is salient (must be told) at this share of the frame's area")
    salient_frames: int = opt(4, "... or if it is there (at present_confidence) in so many frames")
    merge_iou: float = opt(0.7, "car, truck and bus boxes that overlap so much are one body: the weaker is unknown")


BOX_SETTINGS = ("image_size", "num_frames", "nms_iou")  # with the weights, what decides which boxes come out


# ----------------------------------------------------------------------------------------------------------------------
# Settings and weights


def check_settings(settings: DetectorSettings, name: str = "detector", model_frames: int | None = None) -> list[str]:
    """All that is wrong with `settings`, one line each; nothing slow is done and nothing downloaded.

    model_frames: the number of frames that the model sees, where the detector must see these too (the reward's must).
    """
    problems = []
    if not weights_path(settings.weights).is_file() and not KNOWN_WEIGHTS.fullmatch(settings.weights):
        problems.append(f"{name}.weights: no such file, and no name that can be downloaded: {settings.weights} "
                        "(names: yolov8n.pt .. yolov8x.pt, yolo11n.pt .. yolo11x.pt)")
    for key in ("image_size", "num_frames", "batch_size", "present_frames", "salient_frames"):
        if getattr(settings, key) < 1:
            problems.append(f"{name}.{key}: must be at least 1, is {getattr(settings, key)}")
    low, middle, high = settings.absent_confidence, settings.present_confidence, settings.strong_confidence
    if not BOX_FLOOR <= low <= middle <= high <= 1:
        problems.append(f"{name}: needs {BOX_FLOOR} <= absent_confidence <= present_confidence <= strong_confidence "
                        f"<= 1, has {low}, {middle}, {high}")
    if model_frames and model_frames > 1 and (settings.num_frames - 1) % (model_frames - 1):
        fits = [k * (model_frames - 1) + 1 for k in (1, 2, 3)]
        problems.append(f"{name}.num_frames: {settings.num_frames} frames do not hold the model's {model_frames}; "
                        f"use {fits[0]}, {fits[1]}, {fits[2]} ...")
    return problems


def weights_path(weights: str) -> Path:
    """The file that `weights` names: itself, or where a download of that name is kept."""
    path = Path(weights)
    return DOWNLOADS / weights if not path.is_file() and KNOWN_WEIGHTS.fullmatch(weights) else path


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(settings: DetectorSettings) -> dict:
    """What decides a clip's boxes. `weights_sha256` is None where the weights are not on this machine."""
    path = weights_path(settings.weights)
    return {
        "format": FORMAT,
        "weights": Path(settings.weights).name,
        "weights_sha256": file_sha256(path) if path.is_file() else None,
        **{key: getattr(settings, key) for key in BOX_SETTINGS},
    }


def _quiet_ultralytics(offline: bool) -> None:
    """Must run before ultralytics is imported: it reads these once, then looks for the network and for updates."""
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("YOLO_VERBOSE", "false")
    os.environ.setdefault("ULTRALYTICS_SAFE_LOAD", "1")  # weights-only unpickling of the .pt
    if offline:
        os.environ.setdefault("YOLO_OFFLINE", "true")


def get_weights(settings: DetectorSettings) -> Path:
    """The weights as a file that exists, downloading a known name (once, under several ranks too)."""
    path = weights_path(settings.weights)
    if not path.is_file():
        if not KNOWN_WEIGHTS.fullmatch(settings.weights):
            raise DetectionError(f"detector weights: no such file: {path}")
        _quiet_ultralytics(offline=False)
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


def load_detector(settings: DetectorSettings):
    """The ultralytics model. Its class ids must be COCO's: they are named by our own table, never by the file's."""
    path = get_weights(settings)
    _quiet_ultralytics(offline=True)
    from ultralytics import YOLO

    model = YOLO(str(path))
    for class_id, name in model.names.items():
        known = COCO_NAMES[class_id] if class_id < len(COCO_NAMES) else None
        if name != known and not (name.isdigit() and known):  # a model built from a .yaml has "0" ..
            raise DetectionError(f"{path}: class {class_id} is '{name}', but COCO's is '{known}': not a COCO detector")
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Boxes: one JSON a clip


def clip_file(folder: Path, video: str) -> Path:
    """Two videos of one name in two folders are two clips: the hash tells them apart."""
    return folder / f"{Path(video).stem}-{hashlib.sha256(video.encode()).hexdigest()[:8]}.json"


def cache_folder(cache_dir: Path | str, made_by: dict) -> Path:
    """Other settings, another folder: boxes of two settings never mix. The weights count by their bytes alone."""
    what = {key: value for key, value in made_by.items() if key != "weights"}
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    return Path(cache_dir) / f"{made_by['image_size']}px-{made_by['num_frames']}frames-{key}"


def write_json(path: Path, value) -> None:
    """Complete or absent, also when the run is killed here."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(value, separators=(",", ":")) + "\n")
    os.replace(partial, path)


def read_clip(path: Path, num_frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> indices [K]; times [K], as fractions of the clip; frames uint8 [K, H, W, 3] RGB at native size and aspect.

    The choice is the training's (`spread_over_time`). K < num_frames in clips that are shorter. Raises VideoError.
    """
    with open_clip(path) as reader:
        starts = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0]
        indices = np.unique(spread_over_time(starts, num_frames))
        frames = reader.get_batch(indices.tolist()).asnumpy()
    times = (starts[indices] - starts[0]) / max(starts[-1] - starts[0], 1e-9)
    return indices, times, frames


def detect_frames(model, frames: np.ndarray, settings: DetectorSettings, device: str) -> list[list[list[float]]]:
    """frames: uint8 [K, H, W, 3] RGB -> for each frame its boxes [class id, confidence, x1, y1, x2, y2], in 0..1 of
    the frame's width and height, most confident first."""
    found = []
    for start in range(0, len(frames), settings.batch_size):
        batch = [np.ascontiguousarray(f[..., ::-1]) for f in frames[start : start + settings.batch_size]]  # BGR
        results = model.predict(batch, conf=BOX_FLOOR, iou=settings.nms_iou, imgsz=settings.image_size,
                                device=device, verbose=False)
        for result in results:
            boxes = result.boxes
            rows = torch.cat([boxes.cls[:, None], boxes.conf[:, None], boxes.xyxyn], dim=1).tolist()
            rows.sort(key=lambda row: -row[1])
            found.append([[int(row[0])] + [round(value, 4) for value in row[1:]] for row in rows])
    return found


def _stands(file: Path, clip: Path) -> bool:
    """Is the clip's record there, sound, and about this very file? A clip that failed is tried again."""
    if not file.is_file():
        return False
    record = json.loads(file.read_text())
    return "error" not in record and clip.is_file() and record["bytes"] == clip.stat().st_size


def _open_cache(cache_dir: Path | str, made_by: dict, version: str) -> Path:
    """The folder of these settings; one that another ultralytics made is refused rather than mixed."""
    folder = cache_folder(cache_dir, made_by)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"made_by": made_by, "ultralytics": version}
    with FileLock(f"{folder}.lock"):
        if not (folder / "settings.json").is_file():
            write_json(folder / "settings.json", about)
    standing = json.loads((folder / "settings.json").read_text())
    if standing["ultralytics"] != version:
        raise DetectionError(f"{folder} was made by ultralytics {standing['ultralytics']}, here is {version}: "
                             "install that version, or remove the folder to detect again")
    return folder


def detect_clips(videos: list[str], video_root: str, settings: DetectorSettings, cache_dir: Path | str,
                 device: str | None = None, rank: int = 0, world_size: int = 1) -> dict[str, str]:
    """Runs the detector over the clips of this rank that have no record yet; returns the failed ones with the reason.

    videos: as in the data file, repeats allowed. Each finished clip is on disk: a killed run continues where it was.
    """
    videos = sorted(set(videos))[rank::world_size]
    get_weights(settings)
    made_by, version = fingerprint(settings), importlib.metadata.version("ultralytics")
    folder = _open_cache(cache_dir, made_by, version)
    paths = {video: resolve_video(video_root, video) for video in videos}
    todo = [video for video in videos if not _stands(clip_file(folder, video), paths[video])]
    if not todo:
        return {}
    model = load_detector(settings)
    device = device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    failed = {}
    bar = tqdm(total=len(todo), desc=f"detect ({made_by['weights']})", unit="clip", disable=rank > 0)
    for video, clip in _read_ahead(todo, paths, settings.num_frames):
        record = {"video": video, "made_by": made_by, "ultralytics": version}
        if isinstance(clip, VideoError):
            failed[video] = record["error"] = str(clip)
        else:
            boxes = detect_frames(model, clip[2], settings, device)
            record |= {"bytes": paths[video].stat().st_size, "frames": [
                {"index": int(index), "time": round(float(time), 4), "boxes": found}
                for index, time, found in zip(clip[0], clip[1], boxes, strict=True)
            ]}
        write_json(clip_file(folder, video), record)
        bar.update()
    bar.close()
    return failed


def _read_ahead(videos: list[str], paths: dict[str, Path], num_frames: int, depth: int = 2):
    """Yields (video, clip or VideoError) in order, decoding the next clips while the detector works on this one."""

    def read(video):
        try:
            return read_clip(paths[video], num_frames)
        except VideoError as error:
            return error

    with ThreadPoolExecutor(depth) as pool:
        waiting = deque()
        for video in videos:
            waiting.append((video, pool.submit(read, video)))
            if len(waiting) > depth:
                video, future = waiting.popleft()
                yield video, future.result()
        for video, future in waiting:
            yield video, future.result()


# ----------------------------------------------------------------------------------------------------------------------
# Evidence


def find_cache(cache_dir: Path | str, settings: DetectorSettings) -> Path:
    """The folder under `cache_dir` that these settings made. Works without the weights and without ultralytics, as on
    a machine to which only the evidence was copied; a cache of other settings is refused, naming what differs."""
    want = fingerprint(settings)
    del want["weights" if want["weights_sha256"] else "weights_sha256"]  # bytes tell more than a name, if they are here
    others, fitting = [], []
    for file in sorted(Path(cache_dir).glob("*/settings.json")):
        made_by = json.loads(file.read_text())["made_by"]
        differs = [f"{key} {made_by.get(key)}, not {value}" for key, value in want.items() if made_by.get(key) != value]
        if differs:
            others.append(f"{file.parent.name}: {'; '.join(differs)}")
        else:
            fitting.append(file.parent)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise DetectionError(f"{cache_dir} holds several caches made by {want['weights']}, and the weights are not "
                             f"here to tell which is meant: {', '.join(path.name for path in fitting)}")
    there = "".join(f"\n  {line}" for line in others) or " nothing"
    raise DetectionError(f"no evidence made with these settings in {cache_dir}; run python -m stage3.detect_objects "
                         f"first. There is:{there}")


def load_records(cache_dir: Path | str, videos: list[str], settings: DetectorSettings) -> dict[str, dict]:
    """The clips' cached records, by video as in the data file. A clip that was never looked at is an error."""
    folder = find_cache(cache_dir, settings)
    files = {video: clip_file(folder, video) for video in videos}
    missing = [video for video, file in files.items() if not file.is_file()]
    if missing:
        raise DetectionError(f"no evidence yet for {len(missing)} of {len(files)} clips ({', '.join(missing[:3])} ..); "
                             "run python -m stage3.detect_objects again")
    return {video: json.loads(file.read_text()) for video, file in files.items()}


def load_evidence(cache_dir: Path | str, entries: list, settings: DetectorSettings) -> dict[str, Evidence | None]:
    """entries: of dataset.load_entries -> evidence by `Entry.video`; None for a clip whose detection failed, which is
    to say that nothing is known about it (and not that nothing is there)."""
    records = load_records(cache_dir, sorted({entry.video for entry in entries}), settings)
    return {video: clip_evidence(record, settings) for video, record in records.items()}


@dataclass
class Sightings:
    """One class in one clip."""

    confidence: float = 0.0  # highest
    times: list[float] = field(default_factory=list)  # of frames at present_confidence, in 0..1
    area: float = 0.0  # largest, share of the frame, at present_confidence or more


def _iou(a: list[float], b: list[float]) -> float:
    """Boxes as [x1, y1, x2, y2]."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def merge_bodies(boxes: list[list[float]], merge_iou: float) -> list[tuple[str, float, list[float], bool]]:
    """-> (name, confidence, box, whole): a car, truck or bus box on the body of a more confident one of another name is
    not whole: the detector has seen one thing and hesitates over its name."""
    merged = []
    for class_id, confidence, *box in sorted(boxes, key=lambda row: -row[1]):
        name = COCO_NAMES[class_id]
        doubled = name in VEHICLE_BODIES and any(
            other in VEHICLE_BODIES and other != name and whole and _iou(box, body) >= merge_iou
            for other, _, body, whole in merged
        )
        merged.append((name, confidence, box, not doubled))
    return merged


def clip_sightings(record: dict, settings: DetectorSettings) -> dict[str, Sightings]:
    """What was seen of each class that has a box, over the frames of a clip's record."""
    classes: dict[str, Sightings] = {}
    for frame in record["frames"]:
        for name, confidence, box, whole in merge_bodies(frame["boxes"], settings.merge_iou):
            seen = classes.setdefault(name, Sightings())
            if not whole:  # enough for doubt, never for presence
                seen.confidence = max(seen.confidence, min(confidence, settings.absent_confidence))
                continue
            seen.confidence = max(seen.confidence, confidence)
            if confidence >= settings.present_confidence:
                seen.area = max(seen.area, (box[2] - box[0]) * (box[3] - box[1]))
                if not seen.times or seen.times[-1] != frame["time"]:
                    seen.times.append(frame["time"])
    return classes


def clip_evidence(record: dict, settings: DetectorSettings) -> Evidence | None:
    """The three-valued evidence of one clip; None where detection failed.

    present: at present_confidence in present_frames frames, or at strong_confidence in one; unknown: at
    absent_confidence or more, yet not present; salient: present, and large or long enough that a caption must tell
    it; seen: first and last frame at present_confidence, as fractions of the clip.
    """
    if "error" in record:
        return None
    present, unknown, salient, times = set(), set(), set(), {}
    for name, seen in clip_sightings(record, settings).items():
        if len(seen.times) >= settings.present_frames or seen.confidence >= settings.strong_confidence:
            present.add(name)
            times[name] = (seen.times[0], seen.times[-1])
            if seen.area >= settings.salient_area or len(seen.times) >= settings.salient_frames:
                salient.add(name)
        elif seen.confidence >= settings.absent_confidence:
            unknown.add(name)
    return Evidence(frozenset(present), frozenset(unknown), frozenset(salient), times)


def frequency_table(records: dict[str, dict], settings: DetectorSettings) -> str:
    """How often each class is present, salient and unknown over the clips that were read, most frequent first."""
    evidence = [clip_evidence(record, settings) for record in records.values()]
    evidence = [e for e in evidence if e is not None]
    counts = {name: [sum(name in getattr(e, kind) for e in evidence) for kind in ("present", "salient", "unknown")]
              for name in COCO_NAMES}
    lines = [f"{'class':16}{'present':>9}{'share':>8}{'salient':>9}{'unknown':>9}"]
    for name, (present, salient, unknown) in sorted(counts.items(), key=lambda item: [-n for n in item[1]]):
        if present or unknown:
            lines.append(f"{name:16}{present:9}{present / len(evidence):8.0%}{salient:9}{unknown:9}")
    lines.append(f"{len(evidence)} clips with evidence, {len(records) - len(evidence)} failed")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


@dataclass
class DetectConfig(DataConfig):
    """Evidence"""

    which: typing.Literal["detector", "judge"] = opt("detector", "the reward's settings (all clips) or the judge's "
                                                                 "(held-out clips, for evaluate.py)")
    evidence_cache: str = opt("output/evidence", "folder of the detector's boxes, one JSON a clip")
    detector: DetectorSettings = opt(DetectorSettings, "what stage 3 is paid by")
    judge: DetectorSettings = opt(DetectorSettings, "what evaluate.py judges by where there is no exact truth")

    def problems(self) -> list[str]:
        frames = self.num_frames if self.which == "detector" else None
        found = super().problems() + check_settings(getattr(self, self.which), self.which, frames)
        found += [f"{key}: not found: {path}" for key, path in (("data", self.data), ("video_root", self.video_root))
                  if not Path(path).exists()]
        return found


def main(argv: list[str] | None = None) -> int:
    from evaluate import EvaluateConfig
    from train_stage3 import Stage3Config

    config = load_config(DetectConfig, argv, default_config="configs/stage3.yaml", description=__doc__,
                         also=(Stage3Config, EvaluateConfig))
    settings = getattr(config, config.which)
    rank, world_size = process_rank()
    entries = load_entries(config.data, config.default_mode)
    if config.which == "judge":
        entries = split_by_video(entries, config.num_val_videos, config.split_seed, config.video_root)[1]
    videos = sorted({entry.video for entry in entries})
    failed = detect_clips(videos, config.video_root, settings, config.evidence_cache, rank=rank, world_size=world_size)
    for video, reason in failed.items():
        print(f"no evidence: {video}: {reason}", file=sys.stderr)
    if world_size > 1:  # the table is about all clips: wait for the other ranks
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
    try:
        sys.exit(main())
    except (DataError, DetectionError) as error:
        sys.exit(f"detect_objects: {error}")
