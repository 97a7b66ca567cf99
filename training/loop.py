"""What the training loops of the three stages share; each loop itself is in its stage script.

Order of clips, learning rate and dropout are functions of (seed, step, rank): `step_batches`, `learning_rate_factor`,
`seed_dropout`. A resumed run therefore needs weights and optimizer state only, and repeats the uninterrupted run bit
for bit. There is no DDP wrapper: gradients of the trained part are summed once per optimizer step (`sum_gradients`).
"""

import contextlib
import functools
import json
import math
import os
import resource
import shutil
import signal
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer

from dataset import (
    IGNORE_INDEX,
    MODES,
    ClipTensors,
    DataError,
    VideoError,
    VideoInstructDataset,
    cached_frames,
    check_times,
    clip_key,
    collate,
    find_bad_texts,
    group_by_clip,
    is_clip,
    load_split,
    resolve_video,
    video_reader_problems,
)
from model import ModelError, base_model_problem, read_checkpoint, read_clips
from training.common import (
    StopRun,
    TrainingError,
    base_model_differences,
    check_gpus,
    cpu_count,
    fail,
    process_rank,
    stable_seed,
    write_json,
)
from training.run_folder import checkpoint_problems, checkpoint_step, tracker_problems, writing

PANELS = {  # curves.png of stages 1 and 2
    "loss": ["loss", "eval_loss", *(f"eval_loss_{mode}" for mode in MODES)],
    "learning rate": ["learning_rate"],
    "gradient norm": ["grad_norm"],
    "tokens / s": ["tokens_per_second"],
}


# ---- inputs, checked before anything slow starts ---------------------------------------------------------------------


def load_inputs(config, stage: int, modes=(), min_modes=1, problems=()):
    """(training, held-out) entries; all that is missing or does not fit comes in one message (ConfigError, exit 2).

    `modes` must all occur in the data, and at least `min_modes` modes of any kind. `stage` (1, 2 or 3) decides what
    `init_from` must hold. `problems` are those that the caller has found itself.
    """
    problems = [*problems, *video_reader_problems(config), *tracker_problems(config.report_to)]
    problems += [problem for key in ("vision_model", "language_model")
                 if (problem := base_model_problem(key, getattr(config, key)))]
    problems += _init_from_problems(config, stage)
    missing = []
    if not Path(config.video_root).is_dir():
        missing.append(f"video_root: no folder {config.video_root} (the rows' video paths are relative to it)")
    for key in ("data", "val_data"):
        path = getattr(config, key)
        if path is not None and not Path(path).exists():
            missing.append(f"{key}: no file or folder {path} (one row per clip: "
                           '{"video": "a.mov", "microscope": ["..."], "copilot": ["..."]})')
    train_entries, held_out = [], []
    if not missing:
        try:
            train_entries, held_out = load_split(config)
            problems += _entry_problems(config, train_entries, held_out, modes, min_modes)
            if not problems:  # nothing is downloaded for a run that cannot start
                tokenizer = AutoTokenizer.from_pretrained(config.language_model)
                problems += find_bad_texts([*train_entries, *held_out], tokenizer, config.max_text_tokens,
                                           config.wordings)
            if config.init_from and Path(config.init_from).is_dir():
                problems += leak_problems(config, held_out, config.init_from)
        except DataError as error:
            problems.append(f"data: {error}")
        except (OSError, ValueError) as error:
            problems.append(f"language_model: {config.language_model}: {str(error).strip().splitlines()[0]}")
    problems += missing
    if problems:
        fail(problems)
    return train_entries, held_out


def _init_from_problems(config, stage):
    """`init_from` must hold the result of the stage before, of the same frames and base models."""
    if stage == 1:
        return ["init_from: stage 1 starts from the base models and takes none"] if config.init_from else []
    if not config.init_from:
        return [f"init_from: stage {stage} starts from stage {stage - 1}'s run folder: "
                f"--init_from output/stage{stage - 1}"]
    try:
        folder, meta = read_checkpoint(config.init_from, expect_stage=stage - 1)
    except ModelError as error:
        return [f"init_from: {error} (has stage {stage - 1} finished?)"]
    found = []
    if meta["num_frames"] != config.num_frames:
        found.append(f"num_frames: {config.num_frames}, but {folder} was trained with {meta['num_frames']}")
    if meta["time_stamps"] != config.time_stamps:
        found.append(f"time_stamps: {config.time_stamps}, but {folder} was trained with {meta['time_stamps']}")
    return found + base_model_differences(config, meta, folder)


def _entry_problems(config, train_entries, held_out, modes, min_modes):
    """Modes that are missing, clips that are not there, less than one optimizer step of entries."""
    entries, found = [*train_entries, *held_out], []
    there = {entry.mode for entry in entries}
    missing_modes = [mode for mode in MODES if mode not in there and (mode in modes or len(there) < min_modes)]
    if missing_modes:
        found.append(f"data: {config.data} has no {' and no '.join(missing_modes)} entries")
    paths = {entry.video: resolve_video(config.video_root, entry.video) for entry in entries}
    missing = [str(path) for path in paths.values() if not is_clip(path)]
    if len(missing) > config.max_failed_share * len(paths):
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        found.append(f"video_root: {len(missing)} of {len(paths)} clips are missing: {names}")
    return found


def clip_keys(config, entries) -> list[str]:
    """What identifies the entries' clips in clips.json."""
    return sorted({clip_key(entry.video, config.video_root) for entry in entries})


def leak_problems(config, held_out, folder) -> list[str]:
    """One line if clips held out here were trained on by the checkpoint in `folder`, or by a stage before it."""
    leaked = sorted(set(read_clips(folder)["trained"]) & set(clip_keys(config, held_out)))
    names = ", ".join(leaked[:5]) + (", ..." if len(leaked) > 5 else "")
    return [f"data: {len(leaked)} clips that would be held out here were trained on by {folder}: {names} "
            "(another data file, split_seed or num_val_videos than then?)"] if leaked else []


def record_clips(config, model, train_entries, held_out):
    """Note in `model` which clips it is trained on, in this stage and those before, and which are held out."""
    trained = sorted({*model.clips["trained"], *clip_keys(config, train_entries)})
    model.clips = {"trained": trained, "held_out": clip_keys(config, held_out)}


def check_resume(config, checkpoint, train_entries, held_out):
    """ConfigError where a resumed run would hold out what it has trained on, or where `auto` finds other clips."""
    if checkpoint is None:
        return
    problems, before = leak_problems(config, held_out, checkpoint / "model"), read_clips(checkpoint / "model")
    new = sorted(set(clip_keys(config, train_entries)) - set(before["trained"]))
    same = before["held_out"] == clip_keys(config, held_out) and not new
    if config.resume == "auto" and before["trained"] and not same:
        problems.append(f"data: not the clips of {checkpoint} (new to train on: {', '.join(new[:5]) or 'none'}); "
                        "--resume auto continues on the same data only")
    if problems:
        fail(problems)


def count_steps(config, entries) -> int:
    """Optimizer steps of stage 1 or 2 on these training entries; ConfigError where they do not fill one."""
    step_size = config.per_device_batch_size * config.gradient_accumulation_steps * process_rank()[1]
    num_rows = len(group_by_clip(entries)) if config.shared_prefix else len(entries)
    if num_rows < step_size:
        fail([f"data: {num_rows} training examples do not fill one optimizer step of {step_size}"])
    return config.max_steps or config.epochs * (num_rows // step_size)


def start_accelerator(timeout_hours: float = 0.5) -> Accelerator:
    """accelerate's view of this process: device, rank, sums over ranks. Silences libraries, divides CPU threads."""
    transformers.logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data loader workers are forked
    check_gpus()
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes_here > 1:  # processes with more threads than they have cores slow each other down
        torch.set_num_threads(max(1, cpu_count() // processes_here))
    timeout = InitProcessGroupKwargs(timeout=timedelta(hours=timeout_hours))
    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[timeout])


# ---- order, learning rate, dropout: functions of (seed, step, rank) --------------------------------------------------


def step_batches(num_entries, step, seed, batch_size, num_batches, rank, world) -> list[list[tuple[int, int]]]:
    """(epoch, index) keys of one optimizer step (from 0), one list per micro-batch of this rank.

    An epoch is a permutation drawn from (seed, epoch), truncated to whole steps: the last incomplete step is dropped.
    Each stretch of world * batch_size keys is one micro-batch of all ranks, so two ranks see in one micro-batch what
    one process sees with twice the batch size.
    """
    step_size = world * batch_size * num_batches
    epoch, place = divmod(step, num_entries // step_size)
    order = np.random.default_rng([seed, epoch]).permutation(num_entries)[place * step_size:(place + 1) * step_size]
    keys = [(epoch, int(index)) for index in order]
    starts = range(rank * batch_size, step_size, world * batch_size)
    return [keys[start:start + batch_size] for start in starts]


class StepSampler:
    """The batch sampler of a data loader: the micro-batches of steps first_step .. total_steps - 1, for this rank."""

    def __init__(self, config, num_entries, first_step, total_steps):
        self.config, self.num_entries, self.steps = config, num_entries, range(first_step, total_steps)

    def __len__(self):
        return len(self.steps) * self.config.gradient_accumulation_steps

    def __iter__(self):
        for step in self.steps:
            yield from step_batches(self.num_entries, step, self.config.seed, self.config.per_device_batch_size,
                                    self.config.gradient_accumulation_steps, *process_rank())


def learning_rate_factor(config, step, total_steps) -> float:
    """Share of the peak learning rate at optimizer step `step` (from 0), above 0 except at the end of the schedule.

    It rises linearly over the first `warmup` share of the steps, then follows `lr_schedule`.
    """
    warmup_steps = round(config.warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)  # 0 .. 1
    shapes = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return shapes[config.lr_schedule]


def seed_dropout(seed, step, rank):
    """Dropout of one optimizer step, different on each rank; called at each step, so there is no state to save."""
    torch.manual_seed(stable_seed("dropout", seed, step, rank))


# ---- data and optimizer ----------------------------------------------------------------------------------------------


def tower_features(config, accelerator, model, entries) -> ClipTensors | None:
    """The frozen tower's features of the entries' clips, all made before training; None without `tower_cache`.

    Processes share the work. Clips that cannot be read have none: the data set names them when it is their turn.
    """
    if config.tower_cache is None:
        return None
    if "vision" in model.trained_groups:
        fail(["tower_cache: the tower is trained, so its features change with every step; leave tower_cache out"])
    features = ClipTensors(config.tower_cache, model.frozen_parts_id("vision"), model.feature_shape, config.video_root,
                           model.num_frames, model.image_size, config.frame_cache)
    videos = sorted({entry.video for entry in entries})[accelerator.process_index::accelerator.num_processes]
    with writing(config.tower_cache):
        for video in tqdm(videos, desc="  tower", unit=" clips", disable=None if accelerator.is_main_process else True):
            with contextlib.suppress(VideoError):
                features.make(video, model.tower_features)
    accelerator.wait_for_everyone()
    return features


def make_dataset(config, model, entries, features=None, train: bool = True) -> VideoInstructDataset:
    """The entries as examples for `model`; `features`: what `tower_features` gave."""
    entries = model.with_times(entries, config.video_root, config.frame_cache)
    return VideoInstructDataset(
        entries, model.tokenizer, video_root=config.video_root, num_frames=model.num_frames,
        image_size=model.image_size, num_visual_tokens=model.num_visual_tokens,
        max_text_tokens=config.max_text_tokens, cache_dir=config.frame_cache, seed=config.seed, train=train,
        augment=config.augment and train, features=features, wordings=config.wordings,
        shared_prefix=config.shared_prefix and train,
    )


def make_loader(config, model, dataset, batches) -> DataLoader:
    """Batches of `dataset`; `batches`: lists of its keys."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=config.num_workers,
                      collate_fn=functools.partial(collate, pad_token_id=model.pad_token_id),
                      pin_memory=model.device.type == "cuda", worker_init_fn=start_worker)


def make_optimizer(model, learning_rates: dict[str, float], weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW over the trained parameters, one group per peak rate; weight decay on the projector's matrices only.

    This is the one place to choose another optimizer; its groups carry `name`, for `set_learning_rates`.
    """
    groups = {}
    if set(learning_rates) != set(model.trained_groups):
        raise ModelError(f"learning rates are given for {', '.join(learning_rates)}, but what trains is "
                         f"{', '.join(model.trained_groups)}")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = model.parameter_group(name)
            decays = group == "projector" and parameter.ndim > 1
            groups.setdefault((list(learning_rates).index(group), decays), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[key], "name": list(learning_rates)[key[0]], "weight_decay": weight_decay if key[1] else 0.0}
         for key in sorted(groups)],
        fused=model.device.type == "cuda")


def set_learning_rates(optimizer, learning_rates: dict[str, float], factor: float):
    """Each group's rate: its peak times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rates[group["name"]] * factor


# ---- sums over ranks, what stops a run -------------------------------------------------------------------------------


def sum_over_ranks(accelerator, numbers) -> list[float]:
    """The sum of each number over all processes."""
    if accelerator.num_processes == 1:
        return [float(number) for number in numbers]
    return accelerator.reduce(torch.tensor(numbers, dtype=torch.float64, device=accelerator.device)).tolist()


def sum_gradients(accelerator, parameters, loss: float) -> float:
    """Sum the gradients of all processes in place (none counts as zero), as one vector; returns the summed losses."""
    if accelerator.num_processes == 1:
        return loss
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(grad.flatten() for grad in grads), grads[0].new_tensor([loss])])
    flat = accelerator.reduce(flat)
    for parameter, grad in zip(parameters, flat[:-1].split([p.numel() for p in parameters]), strict=True):
        parameter.grad = grad.view_as(parameter)
    return flat[-1].item()


def require_finite(value: float, what: str, ids):
    """TrainingError that names the entries, unless `value` is finite."""
    if not math.isfinite(value):
        raise TrainingError(f"the {what} is {value}, on {', '.join(ids)}")


def require_gradients(model):
    """TrainingError if a trained tensor got no gradient: it would silently never change."""
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if without:
        raise TrainingError(f"{len(without)} trained tensors get no gradient, such as {without[0]}")


class FailedClips:
    """Clips that could not be read, of all processes. They are skipped and logged; too many of them stop the run."""

    def __init__(self, config, run, num_clips):
        self.limit, self.run, self.num_clips = config.max_failed_share, run, num_clips
        self.reasons = set()  # "path: reason"

    def add(self, accelerator, errors: list[str]):
        """Every process calls this together."""
        errors = set(gather_object(errors) if accelerator.num_processes > 1 else errors)
        for error in sorted(errors - self.reasons):
            self.reasons.add(error)
            self.run.print(f"skipped clip {len(self.reasons)} of {self.num_clips} | {error}")
        share = len(self.reasons) / self.num_clips
        if errors and share > self.limit:
            raise TrainingError(
                f"{len(self.reasons)} of {self.num_clips} clips ({share:.1%}) cannot be read, more than "
                f"max_failed_share {self.limit:.1%}; check_dataset.py lists all of them. Last: {sorted(errors)[-1]}")


def count_tokens(accelerator, batches, failed_clips) -> tuple[float, float, float]:
    """(label tokens, all tokens, answers cut at max_text_tokens) of a step's micro-batches over all ranks.

    Notes the clips that failed.
    """
    errors = []
    labels = tokens = cut = 0
    for batch in batches:
        errors += batch.pop("errors")
        cut += batch.pop("num_cut")
        labels += int((batch["labels"] != IGNORE_INDEX).sum())
        tokens += int(batch["attention_mask"].sum())
    labels, tokens, cut, num_errors = sum_over_ranks(accelerator, [labels, tokens, cut, len(errors)])
    if num_errors:
        failed_clips.add(accelerator, errors)
    return max(labels, 1.0), tokens, cut


class StopSignals:
    """SIGTERM and Ctrl-C let the current step finish and be saved; a second one exits at once. A context manager."""

    def __init__(self):
        self.number = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        if process_rank()[0] == 0:
            name = signal.Signals(number).name
            print(f"\n{name}: finishing this step, then saving; once more exits at once", flush=True)

    def requested(self, accelerator) -> bool:
        """True on all ranks if one of them got a signal. Every process calls this together, once per step."""
        return sum_over_ranks(accelerator, [self.number is not None])[0] > 0

    def end_run(self, step):
        """Leave with the exit code of the signal: 143 for SIGTERM, 130 for Ctrl-C."""
        number = self.number or signal.SIGTERM  # another rank got it
        raise Interrupted(f"{signal.Signals(number).name}, after step {step}", 128 + number)


class Interrupted(StopRun):
    """A run that stopped on a signal, after saving."""

    def __init__(self, text, exit_code):
        self.exit_code = exit_code
        super().__init__(text)


def start_worker(_):
    """Data loader workers leave signals to the training process, which ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def log_step(run, step, total_steps, values: dict):
    """One step of stage 1 or 2: metrics.jsonl, the tracker and a line."""
    v = values
    run.log_scalars(step, values, line=(
        f"step {step:>{len(str(total_steps))}}/{total_steps} | loss {v['loss']:7.4f} | lr {v['learning_rate']:.1e} | "
        f"grad {v['grad_norm']:6.2f} | {v['tokens_per_second']:6,.0f} tok/s | data {v['data_wait']:3.0%} | "
        f"{v['memory_gb']:.1f} GB | {clock(v['seconds_left'])} left"))


def log_losses(run, step, losses: dict):
    """Losses on the held-out clips: metrics.jsonl, the tracker and a line."""
    shown = ", ".join(f"{key.removeprefix('eval_').replace('_', ' ')} {value:.4f}" for key, value in losses.items())
    run.log_scalars(step, losses, line=f"held-out after step {step} | {shown}")


@torch.no_grad()
def evaluate_loss(config, accelerator, model, dataset, failed_clips) -> dict[str, float]:
    """Token-weighted loss over all held-out entries, divided among the ranks: {eval_loss, eval_loss_<mode>}."""
    model.eval()
    size, entries, batches = config.per_device_batch_size, dataset.entries, []
    for mode in MODES:  # batches of one mode each
        rows = [i for i, entry in enumerate(entries) if entry.mode == mode]
        rows = rows[accelerator.process_index::accelerator.num_processes]
        batches += [rows[start:start + size] for start in range(0, len(rows), size)]
    sums, errors = Counter(), []
    for batch, rows in zip(make_loader(config, model, dataset, batches), batches, strict=True):
        errors += batch.pop("errors")
        out = model(**batch)
        sums["loss", entries[rows[0]].mode] += out["loss_sum"].item()
        sums["tokens", entries[rows[0]].mode] += out["num_tokens"].item()
    model.train()
    failed_clips.add(accelerator, errors)
    return mean_losses(accelerator, sums)


def mean_losses(accelerator, sums) -> dict[str, float]:
    """{("loss", mode): nats, ("tokens", mode): n} of this rank -> {"eval_loss", "eval_loss_<mode>"} of all ranks."""
    losses = sum_over_ranks(accelerator, [sums["loss", mode] for mode in MODES])
    tokens = sum_over_ranks(accelerator, [sums["tokens", mode] for mode in MODES])
    values = {"eval_loss": sum(losses) / sum(tokens)} if sum(tokens) else {}
    return values | {f"eval_loss_{mode}": loss / count
                     for mode, loss, count in zip(MODES, losses, tokens, strict=True) if count}


def frames_reader(config, model):
    """video -> visual tokens [N, D], for `show_answers`; VideoError where the clip cannot be read."""

    def read(video):
        path = resolve_video(config.video_root, video)
        frames = cached_frames(path, model.num_frames, model.image_size, config.frame_cache)
        with torch.no_grad():
            return model.encode_video(torch.from_numpy(frames)[None])[0]

    return read


def show_answers(config, run, model, step, entries, read_tokens):
    """Greedy answers about the first three held-out clips that can be read, in every mode. For rank 0."""
    clips, times, references = {}, {}, {}
    for entry in entries:
        references[entry.video, entry.mode] = entry.captions[0]
        if entry.video not in clips and len(clips) < 3:
            try:
                tokens = read_tokens(entry.video)
                check_times(entry)
                clips[entry.video], times[entry.video] = tokens, entry.times
            except VideoError as error:
                run.print(f"skipped held-out clip | {error}")
    if not clips:
        return
    asked = [(video, mode) for video in clips for mode in MODES]
    answers = model.generate(None, [MODES[mode] for _, mode in asked], max_new_tokens=config.sample_tokens,
                             visual=torch.stack([clips[video] for video, _ in asked]),
                             times=[times[video] for video, _ in asked])
    lines, shown = [f"what the model says after step {step}"], None
    for (video, mode), answer in zip(asked, answers, strict=True):
        text = answer.text if answer.ended else answer.text + " [cut off]"
        reference = references.get((video, mode), "none")
        run.log_text(f"answers/{mode}/{video}", step, f"{text}\n\nreference: {reference}")
        lines += [f"  {video}"] if video != shown else []
        lines.append(f"    {mode:10} | {text}")
        lines += [f"    {'reference':>10} | {reference}"] if step == 0 else []
        shown = video
    run.print("\n".join(lines))


def memory_gb(device: torch.device) -> float:
    """Peak memory in GB: of the GPU, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def clock(seconds: float) -> str:
    """3725 -> 1:02:05"""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(config, run, accelerator, model, optimizer, step, stage, failed_clips, **state):
    """checkpoints/step-000010/: model/, optimizer.pt, run.json (failed clips and `state`); complete or absent.

    All ranks call this together. An existing checkpoint of this step is kept.
    """
    with run.checkpoint(step, config.keep_checkpoints, barrier=accelerator.wait_for_everyone,
                        failed_clips=sorted(failed_clips.reasons), **state) as folder:
        if run.main:
            model.save_checkpoint(folder / "model", stage=stage)
            with open(folder / "optimizer.pt", "wb") as file:  # by path, torch hides why it could not write
                torch.save(optimizer.state_dict(), file)


def save_result(run, model, stage, best=None):
    """The stage's result, model/: written last, complete or absent. For rank 0.

    best: {"step", ..} of the checkpoint whose model it is, which drivevlm.json then names; None: the last weights.
    """
    with writing(run.model_folder):
        if best is None:
            model.save_checkpoint(run.model_folder, stage=stage)
            return
        source = run.checkpoints / f"step-{best['step']:06d}"
        if problems := checkpoint_problems(source):
            raise TrainingError(f"{source}, the best by held-out reward, is damaged: {'; '.join(problems)}")
        temporary = run.model_folder.with_name(".model.tmp")
        for leftover in (temporary, run.model_folder):  # a folder without drivevlm.json is no result
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(source / "model", temporary)
        meta = json.loads((temporary / "drivevlm.json").read_text(encoding="utf-8"))
        write_json(temporary / "drivevlm.json", {**meta, "best": best}, indent=1)
        temporary.rename(run.model_folder)
        run.print(f"{run.model_folder} is of step {best['step']}, the best by held-out reward ({best['reward']:.4f})")


def restore(checkpoint, optimizer, failed_clips, device) -> tuple[int, dict]:
    """Load optimizer and counters from a checkpoint; returns its (step, run.json). (0, {}) where it is None.

    Learning rates and weight decay stay those of this run's configuration.
    """
    if checkpoint is None:
        return 0, {}
    state = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
    weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
    optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", map_location=device, weights_only=True))
    for group, weight_decay in zip(optimizer.param_groups, weight_decays, strict=True):
        group["weight_decay"] = weight_decay
    failed_clips.reasons = set(state["failed_clips"])
    return checkpoint_step(checkpoint), state
