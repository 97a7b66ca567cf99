"""Trains the toy world's detector, a YOLOv8 of 0.9 M parameters, and writes it to demo/base/detector.

    python -m demo.base_detector                     about 8 minutes on one core (part of `make base-models`)
    python -m demo.base_detector --check             measures the shipped detector on clips that it was not trained on

Uses ultralytics' own trainer on frames drawn from seeds that the demo's clips never use. Class ids are COCO's 0..11, so
they mean the same for the toy detector and YOLOv8x. The result is saved as safetensors (bfloat16) and JSON;
demo/assemble_detector.py makes the pickle that ultralytics loads.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from demo.assemble_detector import BASE, assemble
from demo.world import CLASSES, make_clip, write_video
from stage3.detect_objects import Detector, detect_clips, load_records
from stage3.evidence import clip_evidence
from stage3.vocabulary_config import COCO_NAMES
from training.config import DetectorSettings

NAMES = list(COCO_NAMES[:12])
IMAGE_SIZE = 320
TRAIN_SEED, CHECK_SEED = 1_000_001, 1_000_002  # the demo's own world uses 42
LICENCE = """This detector was trained with ultralytics (https://github.com/ultralytics/ultralytics) on frames of the
toy world (demo/world.py). Its architecture and its training code are ultralytics', under AGPL-3.0, and so is
this folder: https://www.gnu.org/licenses/agpl-3.0.html. The rest of the repository is under the licence at
its top.
"""


def model_yaml() -> dict:
    """ultralytics' yolov8.yaml at an eighth of its width: 0.91 M parameters."""
    import yaml
    from ultralytics.utils import ROOT

    description = yaml.safe_load((ROOT / "cfg/models/v8/yolov8.yaml").read_text())
    return {**description, "nc": len(NAMES), "scales": {"n": [0.33, 0.125, 1024]}, "scale": "n"}


def write_split(folder: Path, split: str, seed: int, num_clips: int, num_images: int) -> None:
    """Write frames and YOLO labels of `num_clips` clips, and `<split>.txt`, which lists `num_images` of the frames.

    Rare classes are listed as often as frequent ones (a frame may be listed more than once); one frame in ten is empty.
    """
    import cv2

    (folder / "images" / split).mkdir(parents=True)
    (folder / "labels" / split).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    images_with: dict[str, list[str]] = {name: [] for name in [*CLASSES, ""]}  # "": frames without an object
    for index in range(num_clips):
        clip = make_clip((seed, index))
        for t in rng.choice(len(clip.frames), 6, replace=False):
            image = folder / "images" / split / f"{index:05d}_{t:02d}.jpg"
            cv2.imwrite(str(image), clip.frames[t][..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
            height, width = clip.frames[t].shape[:2]
            lines = []
            for box in clip.boxes[t]:
                x1, y1, x2, y2 = np.array(box.xyxy) / [width, height, width, height]
                lines.append(f"{CLASSES[box.name]} {(x1 + x2) / 2:.5f} {(y1 + y2) / 2:.5f} {x2 - x1:.5f} {y2 - y1:.5f}")
            (folder / "labels" / split / f"{image.stem}.txt").write_text("\n".join(lines))
            for name in {box.name for box in clip.boxes[t]} or {""}:
                images_with[name].append(str(image))
    share = {name: 0.1 if name == "" else 0.9 / len(CLASSES) for name in images_with}
    listed = [str(image) for name, images in images_with.items()
              for image in rng.choice(images, round(num_images * share[name]))]
    rng.shuffle(listed)
    (folder / f"{split}.txt").write_text("\n".join(listed))
    print(f"{split}: {num_clips} clips; frames with each class: "
          f"{ {name or 'nothing': len(images) for name, images in images_with.items()} }", flush=True)


def train(folder: Path, epochs: int, images: int, clips: int):
    """Returns the trained network (the moving average of its weights)."""
    import yaml
    from ultralytics import YOLO

    write_split(folder, "train", TRAIN_SEED, clips, images)
    write_split(folder, "val", TRAIN_SEED + 10, 40, 200)  # ultralytics requires one; it does not affect the result
    data = {"path": str(folder), "train": "train.txt", "val": "val.txt", "names": dict(enumerate(NAMES))}
    (folder / "data.yaml").write_text(yaml.safe_dump(data))
    (folder / "yolov8n.yaml").write_text(yaml.safe_dump(model_yaml()))
    model = YOLO(str(folder / "yolov8n.yaml"))
    started = time.time()

    def report_epoch(trainer):
        losses = ", ".join(f"{name} {value:.3f}" for name, value in trainer.label_loss_items(trainer.tloss).items())
        done = trainer.epoch + 1
        left = (time.time() - started) / done * (epochs - done)
        print(f"epoch {done}/{epochs} | {losses} | {left / 60:.0f} min left", flush=True)

    model.add_callback("on_train_epoch_end", report_epoch)
    # rect: batches of 320x192, not padded to a square. No hue shift: a red light must stay red.
    model.train(
        data=str(folder / "data.yaml"), epochs=epochs, imgsz=IMAGE_SIZE, rect=True, batch=16, nbs=16, workers=0,
        device="cpu", optimizer="AdamW", lr0=0.002, lrf=0.02, cos_lr=True, warmup_epochs=0.5, weight_decay=0.01,
        hsv_h=0.0, hsv_s=0.3, hsv_v=0.3, fliplr=0.5, scale=0.15, translate=0.08, mosaic=0.0, erasing=0.0,
        amp=False, val=False, plots=False, save=False, seed=42, project=str(folder), name="run", verbose=False,
    )
    return model.trainer.ema.ema


def save(network, folder: Path) -> None:
    """Write the weights in bfloat16; batch norm's counters stay integers."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.to(torch.bfloat16) if value.is_floating_point() else value
               for name, value in network.state_dict().items()}
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "detector.safetensors")


def describe(folder: Path, measured: dict | None) -> None:
    """Write the files beside the weights: architecture, classes and accuracy (from `measure`), and the licence."""
    about = {"names": NAMES, "image_size": IMAGE_SIZE, "license": "AGPL-3.0", "measured": measured,
             "yaml": model_yaml()}
    (folder / "detector.json").write_text(json.dumps(about, indent=1) + "\n")
    (folder / "LICENSE").write_text(LICENCE)


def accuracy(evidence: dict, truth: dict[str, set[str]]) -> tuple[dict, str]:
    """What evidence says of classes, against the truth: {video: Evidence} and {video: names of the classes}.

    Returns ({class or "all": {"precision", "recall", "unknown", "clips"}}, the same as a table). Counted over pairs of
    clip and class. Precision: of those called present, the share that are in the clip. Recall and unknown: of those in
    the clip, the share called present, and the share called unknown.
    """
    counts: Counter = Counter()
    for video, said in evidence.items():
        for name in said.present | said.unknown | truth[video]:
            called = "present" if name in said.present else "unknown" if name in said.unknown else "absent"
            for key in (name, "all"):
                counts[key, name in truth[video], called] += 1
    table, lines = {}, [f"{'class':16}{'clips':>7}{'precision':>11}{'recall':>8}{'unknown':>9}"]
    for name in [*sorted({key[0] for key in counts} - {"all"}), "all"]:
        right, wrong = counts[name, True, "present"], counts[name, False, "present"]
        there = right + counts[name, True, "unknown"] + counts[name, True, "absent"]
        row = {"clips": there, "precision": right / max(right + wrong, 1), "recall": right / max(there, 1),
               "unknown": counts[name, True, "unknown"] / max(there, 1)}
        table[name] = {key: round(value, 3) for key, value in row.items()}
        lines.append(f"{name:16}{there:7}{row['precision']:11.3f}{row['recall']:8.3f}{row['unknown']:9.3f}")
    return table, "\n".join(lines)


def measure(folder: Path, num_clips: int, settings: DetectorSettings) -> tuple[dict, str]:
    """`accuracy` of the evidence on held-out clips, which are encoded and decoded like the demo's."""
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        settings.weights = str(assemble(folder, work / "detector.pt"))
        truth = {}
        for index in range(num_clips):
            clip = make_clip((CHECK_SEED, index), held_out=True)
            write_video(work / f"clip_{index:04d}.mp4", clip.frames)
            truth[f"clip_{index:04d}.mp4"] = set(clip.script.present)
        detect_clips(list(truth), work, settings, work / "evidence", detector=Detector(settings, "cpu"))
        records = load_records(work / "evidence", list(truth), settings)
    return accuracy({video: clip_evidence(record, settings) for video, record in records.items()}, truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", "--output-dir", default=str(BASE), help="folder for the detector")
    parser.add_argument("--check", action="store_true", help="only measure the detector in output_dir")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of training")
    parser.add_argument("--images", type=int, default=5000, help="frames per epoch")
    parser.add_argument("--clips", type=int, default=1200, help="clips that the frames are taken from")
    parser.add_argument("--check_clips", "--check-clips", type=int, default=200, help="clips to measure on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(args.output_dir)
    if not args.check:
        with tempfile.TemporaryDirectory() as work:
            network = train(Path(work), args.epochs, args.images, args.clips)
        print(f"{sum(p.numel() for p in network.parameters()):,} parameters")
        save(network, folder)
        describe(folder, None)
    settings = DetectorSettings(weights="", image_size=IMAGE_SIZE, num_frames=15)
    measured, table = measure(folder, args.check_clips, settings)
    print(table)
    if not args.check:
        describe(folder, measured)


if __name__ == "__main__":
    main()
