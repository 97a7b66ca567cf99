"""Long runs: memory, open files and files on disk stay flat, and no temporary file is left. `make test-slow`.

Each run is a process of its own, on tiny random models. After a warm-up (allocators and caches fill) the process is
measured after every tenth step.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_stage3 import write_evidence

from model import DriveVLM
from training.common import read_jsonl
from training.config import DetectorSettings

ROOT = Path(__file__).resolve().parents[1]
STEPS, WARM_UP = 300, 100
RSS_MARGIN_MB = 8  # for the 200 steps that follow; one batch of frames kept at every step would be 22 MB

DRIVER = """
import gc, json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import psutil
import {script}
from training.run_folder import RunFolder

process, seen = psutil.Process(), []
flush = RunFolder.flush

def measure(self):
    step = self._row.get("step", 0)
    if step and step % 10 == 0:
        gc.collect()
        files = [os.path.join(folder, name) for folder, _, names in os.walk(self.folder) for name in names]
        seen.append({{"step": step, "rss_mb": process.memory_info().rss / 2**20, "descriptors": process.num_fds(),
                     "threads": process.num_threads(), "children": len(process.children(recursive=True)),
                     "files": len(files)}})
    flush(self)

RunFolder.flush = measure
try:
    {script}.main(sys.argv[1:])
finally:
    with open({output!r}, "w") as file:
        json.dump(seen, file)
"""


def soak(tmp_path, script, flags):
    """Run a script in a process of its own; returns what was measured after the warm-up."""
    measured, driver = tmp_path / "measured.json", tmp_path / "driver.py"
    driver.write_text(DRIVER.format(root=str(ROOT), tests=str(ROOT / "tests"), script=script, output=str(measured)))
    argv = [f"--{key}={value}" for key, value in flags.items()]
    done = subprocess.run([sys.executable, str(driver), *argv], capture_output=True, text=True, timeout=1200,
                          check=False, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for row in json.loads(measured.read_text()) if row["step"] >= WARM_UP]
    assert rows[-1]["step"] == STEPS
    print(f"\n{script}: step {rows[0]['step']} {rows[0]}\n{script}: step {rows[-1]['step']} {rows[-1]}")
    return {key: [row[key] for row in rows] for key in rows[0]}


def check_flat(seen, folder):
    """No growth between the warm-up and the end, in the means of the first and the last five measurements."""
    first, last = (sum(part) / len(part) for part in (seen["rss_mb"][:5], seen["rss_mb"][-5:]))
    assert last - first < RSS_MARGIN_MB, f"resident memory grew from {first:.0f} to {last:.0f} MB"
    for key in ("descriptors", "threads", "children"):
        assert max(seen[key][-5:]) <= max(seen[key][:5]), f"{key}: {seen[key]}"
    # keep_checkpoints holds from the third checkpoint on, so the number of files is that of the warm-up
    assert max(seen["files"][-5:]) <= max(seen["files"][:5]), f"files: {seen['files']}"
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    left = [name for name in names if re.search(r"(^|/)\.(?!lock$)|\.tmp|\.old", name)]
    assert not left, f"temporary files are left: {left}"
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == list(range(STEPS + 1))


def shared_flags(tiny, tmp_path):
    return {
        "data": tiny.data, "video_root": tiny.videos, "vision_model": tiny.vision, "language_model": tiny.llm,
        "output_dir": tmp_path / "run", "frame_cache": tmp_path / "frames", "num_frames": 2, "num_val_videos": 2,
        "dtype": "float32", "max_steps": STEPS, "eval_every": 20, "sample_every": 40, "sample_tokens": 8,
        "save_every": 20, "keep_checkpoints": 2,
    }


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_300_steps_of_stage_1_leave_memory_and_files_flat(tiny, tmp_path, num_workers):
    seen = soak(tmp_path, "train_stage1_ddp", shared_flags(tiny, tmp_path) | {
        "num_workers": num_workers, "per_device_batch_size": 2, "gradient_accumulation_steps": 1})
    check_flat(seen, tmp_path / "run")


@pytest.mark.slow
def test_300_steps_of_stage_3_leave_memory_and_files_flat(tiny, tmp_path):
    model = DriveVLM.from_base(tiny.vision, tiny.llm, num_frames=2, dtype="float32", seed=1)
    model.add_lora(r=4, alpha=8, dropout=0.1, seed=2)
    model.save_checkpoint(tmp_path / "stage2" / "model", stage=2)
    write_evidence(tmp_path / "evidence", DetectorSettings(weights="none.pt", num_frames=3))
    mappings = {"max_new_tokens": {"microscope": 14, "copilot": 8}, "reward_weights": {
        "objects": 1.0, "temporal": 0.0, "detail": 0.0, "hallucination": 0.0}}
    (tmp_path / "config.yaml").write_text(json.dumps(mappings), encoding="utf-8")  # JSON is YAML
    seen = soak(tmp_path, "train_stage3", shared_flags(tiny, tmp_path) | {
        "config": tmp_path / "config.yaml", "init_from": tmp_path / "stage2", "evidence_cache": tmp_path / "evidence",
        "detector.weights": "none.pt", "detector.num_frames": 3, "reward": "test_stage3:vowels", "num_generations": 4,
        "per_device_batch_size": 2, "gradient_accumulation_steps": 1, "mask_truncated": False, "max_kl": "none",
        "stop_when_blind": "none"})
    check_flat(seen, tmp_path / "run")
