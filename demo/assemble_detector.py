"""Builds the `.pt` file that ultralytics loads from the safetensors and JSON in demo/base/detector.

    python -m demo.assemble_detector --output output/demo/detector/detector.pt

The repository contains no pickles: this file is made on the machine that uses it. ultralytics can load it with
ULTRALYTICS_SAFE_LOAD=1.
"""

import argparse
import json
import os
from pathlib import Path

# ultralytics reads these when it is imported: install no packages, do not use the network, print no banner
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_VERBOSE", "false")

import torch
from safetensors.torch import load_file

BASE = Path(__file__).parent / "base" / "detector"


def build_network(about: dict):
    """A YOLOv8 with random weights, shaped by `about`: {"yaml": ultralytics' model description, "names": [...]}."""
    from ultralytics.nn.tasks import DetectionModel

    network = DetectionModel(dict(about["yaml"]), nc=len(about["names"]), verbose=False)
    network.names = dict(enumerate(about["names"]))
    return network


def assemble(folder: Path | str, output: Path | str) -> Path:
    """Write the checkpoint. The same files give the same bytes, so evidence made with an earlier copy stays valid."""
    folder, output = Path(folder), Path(output)
    about = json.loads((folder / "detector.json").read_text())
    network = build_network(about)
    weights = load_file(folder / "detector.safetensors")
    network.load_state_dict({name: value.to(network.state_dict()[name].dtype) for name, value in weights.items()})
    for value in network.parameters():
        value.requires_grad_(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    with open(partial, "wb") as file:  # a file object: given a path, torch.save would store its name in the archive
        torch.save({"model": network.eval(), "train_args": {"task": "detect", "imgsz": about["image_size"]},
                    "license": "AGPL-3.0"}, file)
    os.replace(partial, output)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", default=str(BASE), help="folder of detector.json and detector.safetensors")
    parser.add_argument("--output", default="output/demo/detector/detector.pt", help="the checkpoint to write")
    args = parser.parse_args()
    print(f"wrote {assemble(args.detector, args.output)}")


if __name__ == "__main__":
    main()
