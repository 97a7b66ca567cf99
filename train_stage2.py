"""Stage 2, split-entry SFT: LoRA adapters and the projector learn to answer at the granularity asked for, Microscope
or Copilot; SigLIP2, the temporal embeddings and Qwen3's own weights stay frozen.

    python train_stage2.py --init_from output/stage1                             # one GPU, configs/stage2.yaml
    torchrun --nproc_per_node 4 train_stage2.py --gradient_accumulation_steps 4  # four GPUs, also 32 clips a step
    python train_stage2.py --config configs/demo/stage2.yaml                     # toy world on a CPU, two minutes

Any key of the YAML is a flag (--help lists them). A stopped run goes on with --resume auto.
"""

import sys
from dataclasses import dataclass

from training import Run, TrainConfig, check_inputs, checkpoint_step, find_resume, load_config, opt


@dataclass
class Stage2Config(TrainConfig):
    """Stage 2"""

    output_dir: str = opt("output/stage2", "run folder: everything that this run writes")
    init_from: str | None = opt("output/stage1", "stage 1's run folder")
    epochs: int = opt(20, "passes over the training entries")
    learning_rate: float = opt(5e-5, "peak learning rate of the LoRA adapters")
    projector_learning_rate: float = opt(5e-5, "peak learning rate of the projector")
    lora_r: int = opt(32, "LoRA: rank of the adapters on every linear layer of the language model's blocks")
    lora_alpha: int = opt(64, "LoRA: the update is scaled by alpha / r")
    lora_dropout: float = opt(0.05, "LoRA: dropout on the adapters' input")
    per_device_batch_size: int = opt(2, "clips in one forward pass of one process")
    gradient_accumulation_steps: int = opt(16, "forward passes per optimizer step")

    def problems(self):
        found = [f"{key} must be above 0, got {getattr(self, key)}"
                 for key in ("projector_learning_rate", "lora_r", "lora_alpha") if not getattr(self, key) > 0]
        if not 0 <= self.lora_dropout < 1:
            found.append(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}")
        return super().problems() + found


def main(argv=None):
    config = load_config(Stage2Config, argv, default_config="configs/stage2.yaml", description=__doc__)
    entries = check_inputs(config, stage=2, modes=("microscope", "copilot"))
    with Run(config.output_dir) as run:
        train(config, entries, run)


def train(config, entries, run):
    checkpoint = find_resume(run, config.resume, config)
    if run.finished:
        run.say(f"{run.model_folder} is there already: stage 2 is complete")
        return

    # ---- set-up: torch and transformers take seconds to import, so only now
    from model import DriveVLM, ModelError
    from trainer import StageTrainer, make_dataset, plan, start_process
    from training import fail

    device = start_process()
    train_entries, val_entries, sampler = plan(config, entries)
    run.start(config, step=checkpoint_step(checkpoint) if checkpoint else 0)
    run.say(f"stage 2 in {run.folder} on {device} | entries: {len(train_entries)} to train on, "
            f"{len(val_entries)} held out")

    # ---- model: stage 1's, with a fresh adapter
    bases = {"vision_model": config.vision_model, "language_model": config.language_model}
    try:
        folder, stage = (checkpoint / "model", 2) if checkpoint else (config.init_from, 1)
        model = DriveVLM.from_checkpoint(folder, expect_stage=stage, dtype=config.dtype, device=device, **bases)
        if not checkpoint:
            model.add_lora(config.lora_r, config.lora_alpha, config.lora_dropout, config.seed)
    except ModelError as error:
        fail([str(error)])
    model.set_trainable(2)
    run.say(model.trainable_table())

    # ---- data
    train_set = make_dataset(config, model, train_entries, train=True)
    val_set = make_dataset(config, model, val_entries, train=False)

    # ---- train, and save the result to model/
    rates = {"lora": config.learning_rate, "projector": config.projector_learning_rate}
    trainer = StageTrainer(model=model, config=config, run=run, stage=2, learning_rates=rates, train_set=train_set,
                           val_set=val_set, sampler=sampler, device=device)
    trainer.fit(checkpoint)
    run.say(f"done: {run.model_folder} | next: python train_stage3.py --init_from {run.folder}")


if __name__ == "__main__":
    sys.exit(main())
