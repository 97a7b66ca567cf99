"""Stage 3, physics-aware GRPO: LoRA adapters learn to say what a detector confirms; all else stays frozen.

    python train_stage3.py --init_from output/stage2       # one GPU, the real models: configs/stage3.yaml
    torchrun --nproc_per_node 4 train_stage3.py --gradient_accumulation_steps 1    # four GPUs, same 4 prompts a step
    python train_stage3.py --config configs/demo/stage3.yaml                       # toy world, CPU, three minutes

A step: some prompts of both modes, `num_generations` answers to each, a reward for every answer from the detector's
evidence about its clip, and one update that makes answers better than their group's mean likelier. What each clip
shows is read from `evidence_cache`; where clips are not there yet, the detector runs first, as
`python -m stage3.detect_objects` would. Any key of the YAML is a flag (--help lists them). docs/metrics.md explains
every number that is logged. A stopped run goes on with --resume auto.
"""

import sys
import typing
from dataclasses import dataclass
from datetime import timedelta

from dataset import MODES, split_by_video
from stage3.detect_objects import (
    DetectConfig,
    DetectionError,
    DetectorSettings,
    check_settings,
    detect_clips,
    find_cache,
    load_evidence,
)
from training import Run, TrainConfig, check_inputs, checkpoint_step, fail, find_resume, load_config, opt


@dataclass
class Stage3Config(TrainConfig):
    """Training"""

    output_dir: str = opt("output/stage3", "run folder: everything that this run writes")
    init_from: str | None = opt("output/stage2", "stage 2's run folder; its adapter is also the reference for the KL")
    epochs: int = opt(2, "passes over the prompts")
    learning_rate: float = opt(1e-5, "peak learning rate of the LoRA adapters")
    warmup: float = opt(0.05, "share of the steps over which the learning rate rises from 0")
    per_device_batch_size: int = opt(1, "prompts in one training pass of one process")
    gradient_accumulation_steps: int = opt(4, "training passes per optimizer step; all its prompts are sampled at once")
    eval_batch_size: int = opt(4, "held-out prompts that are answered at once")

    modes: list[str] = opt(list(MODES), "modes of the prompts, dealt out in turn; name one twice to weigh it")
    num_generations: int = opt(8, "answers sampled for each prompt: its group")
    max_new_tokens_microscope: int = opt(512, "a Microscope answer is cut off after so many tokens")
    max_new_tokens_copilot: int = opt(96, "a Copilot answer is cut off after so many tokens")
    temperature: float = opt(1.0, "of sampling, and of all log-probs")

    loss_type: typing.Literal["grpo", "bnpo", "dr_grpo", "dapo"] = opt("dapo", "how tokens are averaged")
    beta: float = opt(0.02, "weight of the KL to stage 2's adapter; 0 = no reference")
    kl: typing.Literal["k3", "k2"] = opt("k3", "estimator of that KL")
    epsilon: float = opt(0.2, "the probability ratio is clipped at 1 - epsilon ..")
    epsilon_high: float = opt(0.28, ".. and at 1 + epsilon_high")
    inner_epochs: int = opt(1, "updates made with one batch of answers")
    advantage_scale: typing.Literal["group", "batch", "none"] = opt("group", "std that advantages are divided by")
    std_floor: float = opt(0.05, "lowest std to divide by: near-equal rewards must not shout")
    mask_truncated: bool = opt(True, "answers that were cut off teach nothing (they still count in their group's mean)")
    shared_prefix: bool = opt(True, "keep a prompt once for its whole group; false for models with other attention")

    detector: DetectorSettings = opt(DetectorSettings, "detector whose evidence pays the reward")
    evidence_cache: str = opt("output/evidence", "folder of the detector's boxes, one JSON a clip")
    max_kl: float | None = opt(1.0, "stop when a step's mean KL per token passes this; none = never")
    max_dead_steps: int | None = opt(20, "stop after so many steps in a row in which no group differs; none = never")

    def problems(self):
        positive = ("eval_batch_size", "max_new_tokens_microscope", "max_new_tokens_copilot", "temperature",
                    "inner_epochs")
        found = [f"{key} must be above 0, got {getattr(self, key)}" for key in positive if not getattr(self, key) > 0]
        found += [f"{key} must not be below 0, got {getattr(self, key)}"
                  for key in ("beta", "epsilon", "epsilon_high", "std_floor") if getattr(self, key) < 0]
        if self.num_generations < 2:
            found.append(f"num_generations must be 2 at least (answers are compared), got {self.num_generations}")
        if not self.modes or set(self.modes) - set(MODES):
            found.append(f"modes must be of {', '.join(MODES)}, got {', '.join(self.modes) or 'none'}")
        settings = check_settings(self.detector, "detector", self.num_frames)
        if has_evidence(self):  # then the weights need not be on this machine
            settings = [problem for problem in settings if not problem.startswith("detector.weights")]
        return super().problems() + found + settings


def has_evidence(config) -> bool:
    try:
        find_cache(config.evidence_cache, config.detector)
    except DetectionError:
        return False
    return True


def main(argv=None):
    from evaluate import EvaluateConfig  # its keys may stand in the same file

    config = load_config(Stage3Config, argv, default_config="configs/stage3.yaml", description=__doc__,
                         also=(DetectConfig, EvaluateConfig))
    entries = check_inputs(config, stage=3, modes=sorted(set(config.modes)))
    with Run(config.output_dir) as run:
        train(config, entries, run)


def load_run_config(folder):
    """The resolved config of a run folder."""
    return load_config(Stage3Config, ["--config", f"{folder}/config.yaml"])


def train(config, entries, run):
    checkpoint = find_resume(run, config.resume, config)
    if run.finished:
        run.say(f"{run.model_folder} is there already: stage 3 is complete")
        return
    first = checkpoint_step(checkpoint) if checkpoint else 0

    # ---- set-up: transformers takes seconds to import, so only now
    from accelerate import Accelerator, InitProcessGroupKwargs

    from model import DriveVLM, ModelError
    from stage3.grpo import check_shared_prefix, load_reference
    from stage3.loop import GroupTrainer
    from stage3.report import write_report
    from trainer import start_process

    device = start_process()
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # the detector may run for long on another rank
    accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[patient])
    train_entries, held_out = split_by_video(entries, config.num_val_videos, config.split_seed, config.video_root)
    run.start(config, step=first)
    run.say(f"stage 3 in {run.folder} on {device} | {len(train_entries)} entries to train on, {len(held_out)} held out")

    # ---- data: prompts of the training split whose clips have evidence
    evidence = get_evidence(config, entries, run, accelerator)
    prompts = [entry for entry in train_entries if evidence[entry.video] and entry.mode in config.modes]
    if missing := set(config.modes) - {entry.mode for entry in prompts}:
        fail([f"no clip of the training split has evidence and a prompt of mode {' or '.join(sorted(missing))}"])
    blind = sum(e is None for e in evidence.values())
    run.say(f"{len(prompts)} prompts have evidence; {blind} of {len(evidence)} clips have none and pay nothing")

    # ---- model: stage 2's, its adapter once to train and once, frozen, as the reference
    try:
        folder, stage = (checkpoint / "model", 3) if checkpoint else (config.init_from, 2)
        model = DriveVLM.from_checkpoint(folder, expect_stage=stage, dtype=config.dtype, device=device,
                                         vision_model=config.vision_model, language_model=config.language_model)
        reference = load_reference(model, config.init_from)
        if config.shared_prefix:
            check_shared_prefix(model.causal_lm)
    except ModelError as error:
        fail([str(error)])
    model.activation_checkpointing(config.activation_checkpointing)
    run.say(model.trainable_table())

    # ---- train, and save the result to model/
    trainer = GroupTrainer(config=config, run=run, accelerator=accelerator, model=model, reference_hash=reference,
                           evidence=evidence, prompts=prompts, held_out=held_out)
    trainer.fit(checkpoint)
    if run.main:
        model.save_checkpoint(run.model_folder, stage=3)
        run.say(f"report: {write_report(run.folder, config)}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    run.say(f"done: {run.model_folder} | next: python evaluate.py --checkpoint stage2={config.init_from} "
            f"stage3={run.folder}")


def get_evidence(config, entries, run, accelerator):
    """{video: Evidence, or None where detection failed} for all clips, running the detector where clips are new."""
    try:
        return load_evidence(config.evidence_cache, entries, config.detector)
    except DetectionError as error:
        run.say(f"evidence: {error}\nevidence: running {config.detector.weights} first")
    videos = sorted({entry.video for entry in entries})
    failed = detect_clips(videos, config.video_root, config.detector, config.evidence_cache,
                          rank=accelerator.process_index, world_size=accelerator.num_processes)
    for video, reason in failed.items():
        print(f"no evidence: {video}: {reason}", file=sys.stderr)
    accelerator.wait_for_everyone()
    return load_evidence(config.evidence_cache, entries, config.detector)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DetectionError as error:
        sys.exit(f"train_stage3: {error}")
