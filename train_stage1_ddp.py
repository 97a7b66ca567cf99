"""Stage 1, projector pre-training: the MLP projector and the temporal embeddings learn to speak the language model's
tokens; SigLIP2 and Qwen3 stay frozen.

    python train_stage1_ddp.py                                                       # one GPU, configs/stage1.yaml
    torchrun --nproc_per_node 4 train_stage1_ddp.py --gradient_accumulation_steps 1  # four GPUs, also 16 clips a step
    python train_stage1_ddp.py --config configs/demo/stage1.yaml                     # toy world on a CPU, a minute

Any key of the YAML is a flag (--help lists them). A stopped run goes on with --resume auto.
"""

import sys
from dataclasses import dataclass

from training import Run, TrainConfig, check_inputs, checkpoint_step, find_resume, load_config, opt


@dataclass
class Stage1Config(TrainConfig):
    """Stage 1"""

    output_dir: str = opt("output/stage1", "run folder: everything that this run writes")
    epochs: int = opt(40, "passes over the training entries")
    learning_rate: float = opt(1e-3, "peak learning rate of the projector and the temporal embeddings")
    per_device_batch_size: int = opt(4, "clips in one forward pass of one process")
    gradient_accumulation_steps: int = opt(4, "forward passes per optimizer step")


def main(argv=None):
    config = load_config(Stage1Config, argv, default_config="configs/stage1.yaml", description=__doc__)
    entries = check_inputs(config, stage=1)
    with Run(config.output_dir) as run:
        train(config, entries, run)


def train(config, entries, run):
    checkpoint = find_resume(run, config.resume, config)
    if run.finished:
        run.say(f"{run.model_folder} is there already: stage 1 is complete")
        return

    # ---- set-up: torch and transformers take seconds to import, so only now
    from model import DriveVLM, ModelError
    from trainer import StageTrainer, make_dataset, plan, start_process
    from training import fail

    device = start_process()
    train_entries, val_entries, sampler = plan(config, entries)
    run.start(config, step=checkpoint_step(checkpoint) if checkpoint else 0)
    run.say(f"stage 1 in {run.folder} on {device} | entries: {len(train_entries)} to train on, "
            f"{len(val_entries)} held out")

    # ---- model
    bases = {"vision_model": config.vision_model, "language_model": config.language_model}
    try:
        if checkpoint:
            model = DriveVLM.from_checkpoint(checkpoint / "model", expect_stage=1, dtype=config.dtype, device=device,
                                             **bases)
        else:
            model = DriveVLM.from_base(**bases, num_frames=config.num_frames, dtype=config.dtype, seed=config.seed,
                                       device=device)
    except ModelError as error:
        fail([str(error)])
    model.set_trainable(1)
    run.say(model.trainable_table())

    # ---- data
    train_set = make_dataset(config, model, train_entries, train=True)
    val_set = make_dataset(config, model, val_entries, train=False)

    # ---- train, and save the result to model/
    rates = {"projector": config.learning_rate, "temporal": config.learning_rate}
    trainer = StageTrainer(model=model, config=config, run=run, stage=1, learning_rates=rates, train_set=train_set,
                           val_set=val_set, sampler=sampler, device=device)
    trainer.fit(checkpoint)
    run.say(f"done: {run.model_folder} | next: python train_stage2.py --init_from {run.folder}")


if __name__ == "__main__":
    sys.exit(main())
