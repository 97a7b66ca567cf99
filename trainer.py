"""The supervised loop of stages 1 and 2, on transformers' Trainer.

Trainer gives the loop, accumulation, DDP, schedules and resume. Ours are: the order of clips (EpochSampler), losses
weighted by token over the whole optimizer step and all processes, in evaluation too, atomic checkpoints, the log line,
sample answers, and what happens to clips that cannot be read. Apart from training.py, which stays free of torch.
"""

import functools
import json
import math
import os
import resource
import time
from collections import Counter
from pathlib import Path

import torch
import transformers
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from dataset import MODES, DataError, EpochSampler, VideoInstructDataset, collate, split_by_video
from training import checkpoint_step, fail, process_rank


class TrainingError(SystemExit):
    """Training cannot go on: a loss that is not finite, too many unreadable clips. Run prints it; exit code 1."""

    def __init__(self, text: str):
        super().__init__(1)
        self.text = text

    def __str__(self):
        return self.text


def start_process() -> torch.device:
    """Quiet libraries, threads shared out between the processes of this machine; returns this process's device."""
    transformers.logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    local_rank, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if here > 1:  # two processes with two threads each on two cores slow each other five-fold
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def plan(config, entries):
    """(training entries, held-out entries, sampler); ConfigError if the split leaves less than one optimizer step."""
    step_size = config.per_device_batch_size * config.gradient_accumulation_steps * process_rank()[1]
    try:
        train, held_out = split_by_video(entries, config.num_val_videos, config.split_seed, config.video_root)
        return train, held_out, EpochSampler(len(train), step_size, config.seed)
    except DataError as error:
        fail([f"data: {error}"])


def make_dataset(config, model, entries, train: bool) -> VideoInstructDataset:
    """The entries as examples for `model`."""
    return VideoInstructDataset(
        entries, model.tokenizer, video_root=config.video_root, num_frames=model.num_frames,
        image_size=model.image_size, num_visual_tokens=model.num_visual_tokens,
        max_text_tokens=config.max_text_tokens, cache_dir=config.frame_cache, seed=config.seed, train=train,
    )


class RunBatches:
    """Batch sampler of a whole run: this process's (epoch, index) keys, micro-batch by micro-batch, epoch after epoch.

    Each group of world x batch_size keys is one micro-batch of all processes, so that two processes see in one
    micro-batch what one process sees with twice the batch size.
    """

    def __init__(self, sampler: EpochSampler, batch_size: int, num_batches: int):
        self.sampler, self.batch_size, self.num_batches = sampler, batch_size, num_batches
        self.rank, self.world = process_rank()

    def __len__(self):
        return self.num_batches

    def __iter__(self):
        given, epoch, group = 0, 0, self.batch_size * self.world
        while given < self.num_batches:
            self.sampler.set_epoch(epoch)
            keys = list(self.sampler)
            for start in range(0, len(keys), group):
                if given == self.num_batches:
                    return
                mine = start + self.rank * self.batch_size
                yield keys[mine:mine + self.batch_size]
                given += 1
            epoch += 1


class _Schedule(TrainerCallback):
    """When to evaluate and to save, the last step included; and that every trained tensor gets a gradient."""

    def __init__(self, config):
        self.config, self.checked = config, False

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step >= state.max_steps
        due = [state.global_step % every == 0 for every in (self.config.eval_every, self.config.sample_every)]
        control.should_evaluate = last or any(due)
        control.should_save = last or state.global_step % self.config.save_every == 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.checked:
            without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
            if without:
                raise TrainingError(f"{len(without)} trained tensors get no gradient, such as {without[0]}")
            self.checked = True


def _arguments(config, run, max_steps: int, device: torch.device) -> TrainingArguments:
    """Trainer's own switches. Its bf16 stays off: the model autocasts itself. Its saving, evaluation, logging and
    progress bar are replaced."""
    schedule = {"constant": "constant_with_warmup"}.get(config.lr_schedule, config.lr_schedule)
    args = TrainingArguments(
        output_dir=str(run.folder), max_steps=max_steps, seed=config.seed, use_cpu=device.type == "cpu",
        per_device_train_batch_size=config.per_device_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate, lr_scheduler_type=schedule, max_grad_norm=config.max_grad_norm,
        warmup_steps=round(config.warmup * max_steps), logging_steps=1, logging_nan_inf_filter=False,
        save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
        label_names=["labels"], ddp_find_unused_parameters=False,
    )
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs are for torchrun; one process never runs DataParallel
    return args


class StageTrainer(Trainer):
    """Trains what the model has set trainable, and leaves the stage's result in the run folder's `model/`.

    `learning_rates`: {parameter group: peak rate} with the groups "projector", "temporal" and "lora"; the first one's
    is the rate in the log line.
    """

    def __init__(self, *, model, config, run, stage, learning_rates, train_set, val_set, sampler, device):
        self.config, self.run, self.stage, self.learning_rates = config, run, stage, learning_rates
        self.sampler, self.rank, self.world = sampler, *process_rank()
        step_size = config.per_device_batch_size * config.gradient_accumulation_steps * self.world
        max_steps = config.max_steps or config.epochs * (len(sampler) // step_size)
        self.failed_clips = set()  # "path: reason" of every clip that could not be read, of all processes
        self.num_clips = len({entry.video for data in (train_set, val_set) for entry in data.entries})
        self.waited = self.step_tokens = 0.0
        self.step_ids, self.began, self.first_step = [], None, 0
        model.activation_checkpointing(config.activation_checkpointing)
        # DDP then synchronises the trained part alone, and does not send the frozen gigabytes around at the start.
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        frozen += [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        super().__init__(
            model=model, args=_arguments(config, run, max_steps, device), train_dataset=train_set, eval_dataset=val_set,
            data_collator=functools.partial(collate, pad_token_id=model.pad_token_id), callbacks=[_Schedule(config)],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss is divided by num_items_in_batch already
        torch.manual_seed(config.seed + self.rank)  # dropout differs between processes

    # ---- data

    def _loader(self, data, batches) -> DataLoader:
        cuda = self.args.device.type == "cuda"
        return DataLoader(  # its own generator: making a loader must not move the generator that dropout draws from
            data, batch_sampler=batches, collate_fn=self.data_collator, num_workers=self.config.num_workers,
            pin_memory=cuda, generator=torch.Generator().manual_seed(self.config.seed),
        )

    def get_train_dataloader(self) -> DataLoader:
        batches = self.args.max_steps * self.config.gradient_accumulation_steps
        return self._loader(self.train_dataset, RunBatches(self.sampler, self.config.per_device_batch_size, batches))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and the number of label tokens in it over all processes."""
        if self.began is None:
            self.began, self.first_step = time.perf_counter(), self.state.global_step
        self.step_began = time.perf_counter()
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        self.waited = time.perf_counter() - self.step_began
        self.step_ids = [name for batch in batches for name in batch["ids"]]
        labels = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        failed = [error for batch in batches for error in batch.pop("errors")]
        counts = self._sum([labels, tokens, len(failed)])
        self.step_tokens = counts[1]
        if counts[2]:
            self.count_failed(failed)
        return batches, torch.tensor(max(counts[0], 1.0), device=device)

    def _sum(self, numbers) -> list[float]:
        """Sums over all processes."""
        if self.world == 1:
            return [float(n) for n in numbers]
        total = torch.tensor(numbers, dtype=torch.float64, device=self.args.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def count_failed(self, failed: list[str]):
        """Log clips that could not be read; past the limit the run stops. Every process calls this together."""
        if self.world > 1:
            gathered = [None] * self.world
            torch.distributed.all_gather_object(gathered, failed)
            failed = [error for part in gathered for error in part]
        for error in sorted(set(failed) - self.failed_clips):
            self.failed_clips.add(error)
            self.run.say(f"skipped clip {len(self.failed_clips)} of {self.num_clips} | {error}")
        share = len(self.failed_clips) / self.num_clips
        if share > self.config.max_failed_share:
            raise TrainingError(
                f"{len(self.failed_clips)} of {self.num_clips} clips ({share:.1%}) cannot be read, more than "
                f"max_failed_share {self.config.max_failed_share:.1%}; check_dataset.py lists all of them. Last: "
                f"{sorted(failed)[-1]}")

    # ---- optimizer and loss

    def create_optimizer(self, model=None):
        """AdamW with a rate per group; weight decay on the projector's matrices alone."""
        groups = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                head = name.split(".")[0]
                group = "lora" if head == "llm" else head
                decays = group == "projector" and parameter.ndim > 1
                groups.setdefault((group, decays), []).append(parameter)
        order = list(self.learning_rates)
        self.optimizer = torch.optim.AdamW(
            [{"params": groups[key], "lr": self.learning_rates[key[0]],
              "weight_decay": self.config.weight_decay if key[1] else 0.0}
             for key in sorted(groups, key=lambda key: (order.index(key[0]), key[1]))],
            fused=self.args.device.type == "cuda")
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of the label tokens' losses / label tokens of the whole step. DDP averages gradients over the processes,
        hence the factor."""
        ids = inputs.pop("ids")
        loss = model(**inputs, num_items_in_batch=num_items_in_batch)["loss"] * self.world
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is {loss.item()} in step {self.state.global_step + 1}, on {', '.join(ids)}")
        return loss

    # ---- logging

    def log(self, logs, start_time=None):
        """One line a step. Trainer calls this after every step, and once at the end with totals that we do not need."""
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
        if "loss" not in logs:
            return
        step, last, now = self.state.global_step, self.args.max_steps, time.perf_counter()
        if not math.isfinite(logs["grad_norm"]):
            raise TrainingError(f"the gradient norm is {logs['grad_norm']} in step {step}, on "
                                + ", ".join(self.step_ids))
        seconds = now - self.step_began
        left = (now - self.began) / (step - self.first_step) * (last - step)
        main, *others = self.learning_rates.items()
        values = {
            "loss": logs["loss"], "learning_rate": logs["learning_rate"], "grad_norm": logs["grad_norm"],
            "step_seconds": seconds, "tokens_per_second": self.step_tokens / seconds,
            "data_wait": self.waited / seconds,
            "memory_gb": memory_gb(self.args.device), "seconds_left": left,
            "failed_clips": len(self.failed_clips),
        }
        values |= {f"learning_rate_{group}": logs["learning_rate"] * rate / main[1]
                   for group, rate in others if rate != main[1]}
        self.run.log(step, values, line=(
            f"step {step:>{len(str(last))}}/{last} | loss {logs['loss']:7.4f} | lr {logs['learning_rate']:.1e} | "
            f"grad {logs['grad_norm']:6.2f} | {self.step_tokens / seconds:6,.0f} tok/s | "
            f"data {self.waited / seconds:3.0%} | {values['memory_gb']:.1f} GB | {clock(left)} left"))

    # ---- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Loss on the held-out clips and answers about three of them, each when it is due."""
        step, config = self.state.global_step, self.config
        last = step >= self.args.max_steps
        if len(self.eval_dataset):
            if last or step % config.eval_every == 0:
                self.evaluate_loss(step)
            if (last or step % config.sample_every == 0) and self.run.main:
                self.show_answers(step)
        self.run.curves()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {})
        return {}

    @torch.no_grad()
    def evaluate_loss(self, step: int):
        """Token-weighted loss over all held-out entries, shared out between the processes, in all and by mode."""
        self.model.eval()
        entries, size = self.eval_dataset.entries, self.config.per_device_batch_size
        modes = sorted({entry.mode for entry in entries})
        batches = []  # of one mode each
        for mode in modes:
            mine = [i for i, entry in enumerate(entries) if entry.mode == mode][self.rank::self.world]
            batches += [mine[i:i + size] for i in range(0, len(mine), size)]
        loss_sums, tokens, failed = Counter(), Counter(), []
        for batch, rows in zip(self._loader(self.eval_dataset, batches), batches, strict=True):
            failed += batch.pop("errors")
            out = self.model(**batch)
            loss_sums[entries[rows[0]].mode] += out["loss_sum"].item()
            tokens[entries[rows[0]].mode] += out["num_tokens"].item()
        self.model.train()
        sums = self._sum([len(failed)] + [c[mode] for mode in modes for c in (loss_sums, tokens)])
        if sums[0]:
            self.count_failed(failed)
        by_mode = dict(zip(modes, zip(sums[1::2], sums[2::2], strict=True), strict=True))
        values = {f"eval_loss_{mode}": total / count for mode, (total, count) in by_mode.items() if count}
        everything = sum(count for _, count in by_mode.values())
        if everything:
            values = {"eval_loss": sum(total for total, _ in by_mode.values()) / everything} | values
            parts = ", ".join(f"{mode} {values.get(f'eval_loss_{mode}', math.nan):.4f}" for mode in modes)
            self.run.log(step, values, line=f"held-out after step {step} | loss {values['eval_loss']:.4f} ({parts})")

    def show_answers(self, step: int):
        """Greedy answers about the first three held-out clips that can be read, in both modes."""
        clips, references = {}, {}
        for index, entry in enumerate(self.eval_dataset.entries):
            if entry.video not in clips and len(clips) < 3:
                example = self.eval_dataset[index]
                if "error" not in example:
                    clips[entry.video] = example["frames"]
            references[entry.video, entry.mode] = entry.captions[0]
        if not clips:
            return
        asked = [(video, mode) for video in clips for mode in MODES]
        frames = torch.stack([clips[video] for video, _ in asked])  # [6, T, S, S, 3]
        answers = self.model.generate(frames, [MODES[mode] for _, mode in asked],
                                      max_new_tokens=self.config.sample_tokens)
        lines, shown = [f"what the model says after step {step}"], None
        for (video, mode), answer in zip(asked, answers, strict=True):
            text = answer.text if answer.ended else answer.text + " [cut off]"
            reference = references.get((video, mode), "none")
            self.run.text(f"answers/{mode}/{video}", step, f"{text}\n\nreference: {reference}", show=False)
            lines += [f"  {video}"] if video != shown else []
            lines += [f"    {mode:10} | {text}"] + ([f"    {'reference':>10} | {reference}"] if step == 0 else [])
            shown = video
        self.run.say("\n".join(lines))

    # ---- checkpoints

    def fit(self, checkpoint: Path | None):
        """Train to the end, from `checkpoint` if given (whose weights the model holds already), and write `model/`."""
        if checkpoint is None:
            self.evaluate()  # what there is to improve; and finds out now if evaluation or decoding fail
        else:
            state = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
            self.failed_clips = set(state["failed_clips"])
        if checkpoint is None or checkpoint_step(checkpoint) < self.args.max_steps:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.run.curves()
        if self.run.main:
            self.model.save_checkpoint(self.run.model_folder, stage=self.stage)
        if self.world > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    def _save_checkpoint(self, model, trial=None, **kwargs):
        """checkpoints/step-000010/: model/, optimizer, schedule, random states, counters; complete or not there."""
        with self.run.checkpoint(self.state.global_step, self.config.keep_checkpoints,
                                 barrier=self.accelerator.wait_for_everyone,
                                 failed_clips=sorted(self.failed_clips)) as folder:
            if self.run.main:
                self.model.save_checkpoint(folder / "model", stage=self.stage)
                self.state.save_to_json(str(folder / "trainer_state.json"))
            self._save_optimizer_and_scheduler(str(folder))
            self._save_rng_state(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Nothing: the stage script has built the model from the checkpoint."""


def memory_gb(device: torch.device) -> float:
    """Peak memory in GB: of the GPU, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def clock(seconds: float) -> str:
    """3725 -> 1:02:05"""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
