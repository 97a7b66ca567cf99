"""Is the plan right? Steps of a model with random weights on this CPU: memory as planned, and as the system sees it.

    python -m bench.plan_check small|middle      # one JSON object per stage; bench/plan.py --check prints a table

planned: the peak of bench/phases.py on fake tensors; followed: the same ledger on real tensors; measured: how far the
process grew meanwhile (VmHWM). In MiB, float32, Linux only.
"""

import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

SIZES = {  # keys of the tower, of the language model (middle: 93 M parameters), of all stages, of each stage
    "small": (dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=96,
                   patch_size=8, vision_use_head=False),
              dict(hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=32, vocab_size=4096, tie_word_embeddings=True),
              dict(num_frames=8, max_text_tokens=200),
              {1: dict(per_device_batch_size=8, activation_checkpointing=False), 2: dict(per_device_batch_size=12),
               3: dict(per_device_batch_size=2, activation_checkpointing=False, max_new_tokens={"microscope": 96})}),
    "middle": (dict(hidden_size=192, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=144,
                    patch_size=8, vision_use_head=False),
               dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=10, num_attention_heads=12,
                    num_key_value_heads=4, head_dim=64, vocab_size=8192, tie_word_embeddings=True),
               dict(num_frames=16, max_text_tokens=256),
               {1: dict(per_device_batch_size=2, activation_checkpointing=False), 2: dict(per_device_batch_size=4),
                3: dict(activation_checkpointing=False, max_new_tokens={"microscope": 64})}),
}


def checks(size):
    """Yields {"stage", "planned", "followed", "measured"} for each stage: MiB at the peak of a process that gives freed
    memory back to the system at once. CalledProcessError where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1",
                   "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "bench.plan_check", size]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True,
                          cwd=Path(__file__).resolve().parents[1]) as process:
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def run(stage, size):
    import torch
    from transformers import AutoTokenizer, Qwen3Config, SiglipVisionConfig

    from bench.phases import longest_answers, peak_of, phases_of
    from bench.sizes import STAGES

    torch.set_num_threads(1)
    vision, language, shared, own = SIZES[size]
    config = STAGES[stage](dtype="float32", **shared, **own[stage])
    config.init_from, config.gradient_accumulation_steps = None, 1
    bases = (SiglipVisionConfig(**vision), Qwen3Config(**language), AutoTokenizer.from_pretrained("demo/base/language"))

    def peak(config, **options):
        return peak_of(phases_of(config, stage, bases, longest_answers(config, stage), gpu=False, **options)) / 2**20

    planned = peak(config)
    peak(dataclasses.replace(config, per_device_batch_size=1), fake=False)  # loads what the process needs once
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = status("VmRSS")
    followed = peak(config, fake=False)
    measured = status("VmHWM") - before
    print(json.dumps({"stage": stage, "planned": planned, "followed": followed, "measured": measured}), flush=True)


def status(key):
    """MiB of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    for each in (1, 2, 3):
        run(each, sys.argv[1])
