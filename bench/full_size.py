"""The full architecture for real: a step of each stage and the detector on one clip, through the project's own scripts.

    python -m bench.full_size --tokenizer DIR --work DIR          # on a GPU: configs/, a few steps, 24 GiB at most
    python -m bench.full_size --tokenizer DIR --work DIR          # on a CPU with native bfloat16: one step of one clip
    python -m bench.full_size --tokenizer DIR --work DIR --small  # the same way through with a tiny model: a rehearsal

Writes a SigLIP2-SO400M tower, a Qwen3-4B and a YOLOv8x with random weights, in the real file formats, to --work (9 GB;
kept for later runs), and some clips of noise. Random weights take as much time and memory as trained ones; losses,
answers and boxes mean nothing, and so stage 3 is paid by a number drawn from the text. Each part runs in its own
process. On a GPU, the allocator may take --memory_gb at most; on a CPU the process's own peak is compared with it.

MFU: FLOPs that a step needs (counted on the model's code, without those of activation checkpointing) in relation to
what a large matrix product reaches on this machine. Decoding: seconds of a step in which every answer gets a token, in
relation to reading all weights and the cache once at the speed of a copy. Exit code 1 if something does not fit.
--tokenizer: folder of a Qwen3 tokenizer. Prints tables and writes one JSON file.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {1: "train_stage1_ddp", 2: "train_stage2", 3: "train_stage3"}
REPORT = ("The video follows a vehicle on a city street. A red car ahead brakes at the light, so the driver waits. "
          "Then the light turns green and the traffic moves on past parked trucks and a crossing pedestrian. ") * 8
LINE = "Red car ahead brakes for the light, then the traffic moves on past parked trucks. "
SMALL = {"vision": dict(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=2),
         "language": dict(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=16)}
ON_CPU = {  # one clip and few tokens, as the time of a CPU goes with them
    "all": ["--num_val_videos", 0, "--gradient_accumulation_steps", 1],
    1: ["--per_device_batch_size", 1, "--num_workers", 0],
    2: ["--per_device_batch_size", 1, "--num_workers", 0],
    3: ["--num_generations", 2, "--max_new_tokens", "{microscope: 16, copilot: 16}"],
}


# ---------------------------------------------------------------------------------------------------------------------
# What the stages get


def make_bases(args):
    """Tower, language model and detector with random weights, unless they are there."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    from bench.phases import fill
    from bench.sizes import QWEN3_4B, TOWER

    for name, cls, config_cls, keys in (("vision", SiglipVisionModel, SiglipVisionConfig, TOWER),
                                        ("language", Qwen3ForCausalLM, Qwen3Config, QWEN3_4B)):
        if (args.work / name / "model.safetensors").exists() or list((args.work / name).glob("*.index.json")):
            continue
        torch.manual_seed(0)
        with torch.device("meta"):
            model = cls._from_config(config_cls(**keys | (SMALL[name] if args.small else {})), dtype=torch.bfloat16)
        with torch.device("cuda" if args.gpu else "cpu"):
            model = fill(model, fake=False)
        if name == "language":
            model.tie_weights()
            model.generation_config = GenerationConfig(eos_token_id=[151645, 151643], pad_token_id=151643)
        model.save_pretrained(args.work / name)
    for file in args.tokenizer.iterdir():
        if file.is_file():
            shutil.copy(file, args.work / "language" / file.name)


def make_detector(args):
    """A YOLOv8x (with --small, a YOLOv8n) of random weights that knows COCO's names, in ultralytics' format."""
    import torch

    from demo.assemble_detector import build_network
    from stage3.vocabulary_config import COCO_NAMES

    if (args.work / "detector.pt").exists():
        return
    from ultralytics.nn.tasks import yaml_model_load

    torch.manual_seed(0)
    network = build_network({"yaml": yaml_model_load("yolov8n.yaml" if args.small else "yolov8x.yaml"),
                             "names": COCO_NAMES})
    with open(args.work / "detector.pt", "wb") as file:
        torch.save({"model": network.half().eval(), "train_args": {"task": "detect", "imgsz": 640}}, file)


def make_clips(args):
    """Clips of noise, as what they show does not matter here, and their captions."""
    import cv2
    import numpy as np

    folder = args.work / "videos"
    folder.mkdir(exist_ok=True)
    rng, rows = np.random.default_rng(0), []
    for clip in range(48 if args.gpu else 1):
        out = cv2.VideoWriter(str(folder / f"{clip}.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (640, 360))
        for _ in range(46):
            out.write(rng.integers(0, 255, (360, 640, 3), dtype=np.uint8))
        out.release()
        rows.append({"video": f"{clip}.mp4", "microscope": [REPORT.strip()], "copilot": [LINE.strip()]})
    (args.work / "captions.json").write_text(json.dumps(rows))


@dataclasses.dataclass(frozen=True)
class Draw:
    draw: float


def drawn_reward(caption, evidence, mode, reference) -> Draw:
    """A number in [0, 1] by the text alone: answers of random weights would all be paid alike."""
    return Draw(zlib.crc32(caption.encode()) / 0xFFFFFFFF)


# ---------------------------------------------------------------------------------------------------------------------
# Parts, each in its own process


def stage_flags(stage, args):
    """The stage's flags: configs/, the made-up models and clips, and on a CPU less of them."""
    work = args.work
    flags = ["--config", ROOT / f"configs/stage{stage}.yaml", "--data", work / "captions.json", "--video_root",
             work / "videos", "--vision_model", work / "vision", "--language_model", work / "language",
             "--num_val_videos", 2, "--output_dir", work / f"stage{stage}", "--max_steps", args.steps,
             "--frame_cache", work / "frames", "--eval_every", 1000, "--sample_every", 1000]
    if stage > 1:
        flags += ["--init_from", work / f"stage{stage - 1}"]
    if stage == 3:  # random weights do not end an answer
        flags += ["--reward", "bench.full_size:drawn_reward", "--reward_weights", "{draw: 1.0}", "--mask_truncated",
                  "false", *detector_flags(work)]
    if not args.gpu:
        flags += [*ON_CPU["all"], *ON_CPU[stage], "--dtype", "auto"]
    return [str(flag) for flag in flags]


def detector_flags(work):
    return ["--detector.weights", work / "detector.pt", "--evidence_cache", work / "evidence"]


def run_stage(stage, args):
    """The stage's own script, in this process, with its GPU memory capped."""
    import importlib

    import torch

    if args.gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_gb * 2**30 / total))
    importlib.import_module(SCRIPTS[stage]).main(stage_flags(stage, args))


def plan_stage(stage, args):
    """{"peak_gib", "flops"}: what bench/plan.py says of the stage with these flags: memory at its longest rows; FLOPs
    of a step on these clips, without recomputing (stage 3: of the update)."""
    from bench.phases import GIB, longest_answers, peak_of, phases_of, read_bases
    from bench.plan import read_config
    from stage3.rollout import answer_limits

    config = read_config(ROOT / f"configs/stage{stage}.yaml", stage, stage_flags(stage, args)[2:])
    bases = read_bases(config)
    texts = {"microscope": REPORT, "copilot": LINE}
    lengths = {mode: len(bases[2].encode(text)) + 1 for mode, text in texts.items()}
    if stage == 3:
        lengths = {mode: answer_limits(config)[mode] for mode in config.modes}
        counted = [lengths]
    else:
        counted = [{mode: length} for mode, length in lengths.items()]
    plain = dataclasses.replace(config, activation_checkpointing=False)
    flops = 0.0
    for answers in counted:
        phases = phases_of(plain, stage, bases, answers, flops=True)
        name = "update: forward and backward" if stage == 3 else "forward and backward"
        flops += phases[name].flops / len(counted)
    return {"peak_gib": peak_of(phases_of(config, stage, bases, longest_answers(config, stage))) / GIB, "flops": flops}


def measure_machine(args):
    """{"tflops", "gb_per_second"}: a large bfloat16 matrix product, and a copy (reading and writing)."""
    import torch

    device = "cuda" if args.gpu else "cpu"
    size = 8192 if args.gpu else 4096
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source, target = (torch.zeros(2**30, dtype=torch.uint8, device=device) for _ in range(2))
    return {"tflops": 2 * size**3 / seconds_of(lambda: a @ b.T, args) / 1e12,
            "gb_per_second": 2 * 2**30 / seconds_of(lambda: target.copy_(source), args) / 1e9}


def seconds_of(function, args, repeats=5):
    """The fastest of some calls."""
    import torch

    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if args.gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_decoding(args):
    """{"seconds", "bytes"} of one decoding step of a training step's answers; bytes of weights and cache that it must
    read."""
    import torch

    from dataset import MODES, encode_prompt
    from model import DriveVLM, head_logits
    from stage3.rollout import GroupDecoder, sample_tokens

    model = DriveVLM.from_checkpoint(args.work / "stage2", device="cuda" if args.gpu else "cpu")
    prompts = [encode_prompt(model.tokenizer, question, model.num_visual_tokens) for question in MODES.values()]
    prompts, group, steps = (prompts * 2, 8, 64) if args.gpu else (prompts[:1], 2, 12)
    visual = torch.zeros(len(prompts), model.num_visual_tokens, model.head_weight.shape[1], device=model.device)
    with torch.no_grad(), model.decoding(), model.autocast():
        head = model.head_weight if args.gpu else model.head_weight.float()  # as in sample_groups
        decoder = GroupDecoder(model, prompts, visual, group, shared_prefix=True)

        def next_token():
            with torch.autocast(model.device.type, enabled=False):
                logits = head_logits(decoder.hidden.flatten(0, 1), head, 1.0, model.banned_ids)
            tokens = sample_tokens(logits, torch.full((len(logits),), 0.5, device=logits.device))
            decoder.append(tokens.view_as(decoder.slots))

        next_token()
        seconds = seconds_of(lambda: [next_token() for _ in range(steps)], args, repeats=2) / steps
        positions = decoder.owner.numel()
    config = model.causal_lm.config
    weights = sum(p.numel() * p.element_size() for p in model.llm.parameters())
    cache = positions * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    return {"seconds": seconds, "bytes": weights + cache, "prompts": len(prompts), "group": group}


PARTS = {
    "bases": make_bases, "detector weights": make_detector, "clips": make_clips, "machine": measure_machine,
    "decoding": measure_decoding,
    **{f"stage {n}": lambda args, n=n: run_stage(n, args) for n in SCRIPTS},
    **{f"plan {n}": lambda args, n=n: plan_stage(n, args) for n in SCRIPTS},
}


def run_part(name, args):
    """A part in its own process -> (what it returns, peak GiB of the process, seconds)."""
    start = time.perf_counter()
    return *end_part(start_part(name, args), name, args), time.perf_counter() - start


def end_part(process, name, args):
    """Wait for a part -> (what it returns, peak GiB of the process)."""
    result = result_of(name, args)
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{name}: exit code {code}")
    found = json.loads(result.read_text()) if result.exists() else None
    return found, usage.ru_maxrss / 2**20


def result_of(name, args):
    return args.work / f"{name.replace(' ', '_')}.json"


def start_part(name, args):
    result_of(name, args).unlink(missing_ok=True)
    if name == "detector":
        command = [sys.executable, "-m", "stage3.detect_objects", "--config", ROOT / "configs/stage3.yaml", "--data",
                   args.work / "captions.json", "--video_root", args.work / "videos", "--num_val_videos", 0,
                   *detector_flags(args.work)]
    else:
        command = [sys.executable, "-m", "bench.full_size", *sys.argv[1:], "--part", name]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    print(f"\n== {name}", flush=True)
    return subprocess.Popen([str(word) for word in command], cwd=ROOT, env=environment)


# ---------------------------------------------------------------------------------------------------------------------


def read_stage(stage, args):
    """Means over the stage's steps, without the first if there are more; from its metrics.jsonl."""
    rows = [json.loads(line) for line in (args.work / f"stage{stage}/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "tokens_per_second" in row]
    if not any(row["grad_norm"] > 0 for row in rows if "grad_norm" in row):
        raise SystemExit(f"stage {stage}: no step changed a weight")
    counted = rows[1:] or rows

    def mean(key):
        return sum(row[key] for row in counted) / len(counted)

    seconds = mean("step_seconds") if stage < 3 else mean("update_seconds")
    return {"step_seconds": seconds if stage < 3 else seconds + mean("rollout_seconds"), "work_seconds": seconds,
            "tokens_per_second": mean("tokens_per_second"), "memory_gb": max(row["memory_gb"] for row in rows)}


def main(argv=None):
    args = parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.part:
        found = PARTS[args.part](args)
        if found is not None:
            result_of(args.part, args).write_text(json.dumps(found))
        return 0
    results = {"machine": args.machine, "memory_gb": args.memory_gb, "small": args.small, "steps": args.steps}
    for name in ("bases", "detector weights", "clips"):
        run_part(name, args)
    for folder in ("stage1", "stage2", "stage3", "evidence", "frames"):
        shutil.rmtree(args.work / folder, ignore_errors=True)
    plans = {}
    results["matrix"] = run_part("machine", args)[0]
    for stage in SCRIPTS:
        if args.gpu:  # planning takes a minute of a core; on a CPU it waits until nothing is measured any more
            plans[stage] = start_part(f"plan {stage}", args)
        if stage == 3:
            _, peak, seconds = run_part("detector", args)
            results["detector"] = {"seconds": seconds, "process_gb": peak}
            results["decoding"] = run_part("decoding", args)[0]
        _, peak, seconds = run_part(f"stage {stage}", args)
        results[f"stage {stage}"] = {**read_stage(stage, args), "seconds": seconds, "process_gb": peak}
    for stage in SCRIPTS:
        plan = plans.get(stage) or start_part(f"plan {stage}", args)
        results[f"stage {stage}"] |= end_part(plan, f"plan {stage}", args)[0]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(results, indent=2) + "\n")
    return report(results, args)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a Qwen3 tokenizer")
    parser.add_argument("--work", type=Path, required=True, help="folder for models, clips and runs (12 GB free)")
    parser.add_argument("--memory_gb", type=float, help="most memory, in GiB [24 on a GPU, 20 on a CPU]")
    parser.add_argument("--steps", type=int, help="optimizer steps per stage; the first of several is not counted "
                                                  "[4 on a GPU, 1 on a CPU]")
    parser.add_argument("--small", action="store_true", help="a tiny model: does every part run?")
    parser.add_argument("--json", type=Path, default=Path("output/bench/full_size.json"), help="JSON file to write")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.tokenizer, args.work = args.tokenizer.absolute(), args.work.absolute()
    if not (args.tokenizer / "tokenizer_config.json").is_file():
        parser.error(f"--tokenizer: {args.tokenizer} holds no tokenizer_config.json")
    import torch

    args.gpu = torch.cuda.is_available()
    args.machine = torch.cuda.get_device_name() if args.gpu else "CPU"
    args.memory_gb = args.memory_gb or (24.0 if args.gpu else 20.0)
    args.steps = args.steps or (4 if args.gpu else 1)
    return args


def report(results, args):
    """The tables; 1 if something did not fit."""
    matrix, key = results["matrix"], "memory_gb" if args.gpu else "process_gb"
    print(f"\n{args.machine}, {args.memory_gb:g} GiB at most | a matrix product {matrix['tflops']:.2f} TFLOP/s, a copy "
          f"{matrix['gb_per_second']:.0f} GB/s | {args.steps} steps per stage\n")
    print("| stage | s a step | tokens/s | TFLOP | MFU | peak GiB | by the plan |\n"
          "| --- | --- | --- | --- | --- | --- | --- |")
    for stage in SCRIPTS:
        r = results[f"stage {stage}"]
        share = r["flops"] / r["work_seconds"] / matrix["tflops"] / 1e12
        print(f"| {stage} | {r['step_seconds']:.1f} | {r['tokens_per_second']:,.1f} | {r['flops'] / 1e12:,.1f} | "
              f"{share:.0%} | {r[key]:.1f} | {r['peak_gib']:.1f} |")
    step = results["decoding"]
    floor = step["bytes"] / matrix["gb_per_second"] / 1e9
    print(f"\nStage 3: TFLOP and MFU are of the update. Decoding ({step['prompts']} prompts x {step['group']} "
          f"answers): {step['seconds'] * 1000:.1f} ms a token, {step['seconds'] / floor:.2f} x the {floor * 1000:.1f} "
          f"ms that {step['bytes'] / 1e9:.1f} GB take.\nDetector: {results['detector']['seconds']:.0f} s in all, "
          f"{results['detector']['process_gb']:.1f} GiB of main memory.")
    peaks = {f"stage {stage}": results[f"stage {stage}"][key] for stage in SCRIPTS}
    above = [f"{name} takes {peak:.1f} GiB" for name, peak in peaks.items() if peak > args.memory_gb]
    print(f"DOES NOT FIT: {', '.join(above)}" if above else f"All fit {args.memory_gb:g} GiB.")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
