"""Stage 2, split-entry SFT: LoRA adapters and the projector learn to answer at the granularity asked for, Microscope
or Copilot; SigLIP2, the temporal embeddings and Qwen3's own weights stay frozen.

    python train_stage2.py --init_from output/stage1                             # one GPU, configs/stage2.yaml
    torchrun --nproc_per_node 4 train_stage2.py --gradient_accumulation_steps 4  # four GPUs, also 32 clips per step
    python train_stage2.py --config configs/demo/stage2.yaml                     # toy world on a CPU, two minutes

Any key of the YAML is a flag (--help lists them). Continue an interrupted run with --resume auto.
"""

import time

from training.common import fail, load_config, run_main
from training.config import Stage2Config

if __name__ == "__main__":  # --help and wrong flags are answered before torch is imported, which takes seconds
    load_config(Stage2Config, default_config="configs/stage2.yaml", description=__doc__)

import torch

from model import DriveVLM, ModelError, check_shared_prefix, resolve_dtype
from training import loop
from training.run_folder import RunFolder


def main(argv=None):
    config = load_config(Stage2Config, argv, default_config="configs/stage2.yaml", description=__doc__)
    config.dtype = resolve_dtype(config.dtype)
    train_entries, held_out = loop.load_inputs(config, stage=2, min_modes=2)
    with RunFolder(config.output_dir) as run, loop.StopSignals() as signals:
        checkpoint = run.find_resume(config)
        loop.check_resume(config, checkpoint, train_entries, held_out)
        if run.finished:
            run.print(f"{run.model_folder} already exists: stage 2 is complete")
        else:
            train(config, train_entries, held_out, run, checkpoint, signals)


def build_model(config, checkpoint, device):
    """Stage 1's model with a fresh adapter, or a checkpoint of this stage."""
    folder, stage = (checkpoint / "model", 2) if checkpoint else (config.init_from, 1)
    try:
        model = DriveVLM.from_checkpoint(folder, expect_stage=stage, dtype=config.dtype, device=device,
                                         vision_model=config.vision_model, language_model=config.language_model)
        if not checkpoint:
            model.add_lora(config.lora_r, config.lora_alpha, config.lora_dropout, config.seed)
        if config.shared_prefix:
            check_shared_prefix(model.causal_lm)
        return model
    except ModelError as error:
        fail([str(error)])


def train(config, train_entries, held_out, run, checkpoint, signals):
    # ---- set-up
    total_steps = loop.count_steps(config, train_entries)
    accelerator = loop.start_accelerator(timeout_hours=12 if config.tower_cache else 0.5)
    run.start(config, checkpoint)
    run.print(f"stage 2 in {run.folder} on {accelerator.device} | entries: {len(train_entries)} to train on, "
              f"{len(held_out)} held out")

    # ---- model
    model = build_model(config, checkpoint, accelerator.device)
    model.set_trainable("lora", "projector")
    model.activation_checkpointing(config.activation_checkpointing)
    if config.compile_blocks:
        model.compile_blocks()
    loop.record_clips(config, model, train_entries, held_out)
    run.print(model.trainable_table())

    # ---- data and optimizer
    features = loop.tower_features(config, accelerator, model, [*train_entries, *held_out])
    train_set = loop.make_dataset(config, model, train_entries, features)
    held_out_set = loop.make_dataset(config, model, held_out, features, train=False)
    failed_clips = loop.FailedClips(config, run, len({entry.video for entry in [*train_entries, *held_out]}))
    learning_rates = {"lora": config.learning_rate, "projector": config.projector_learning_rate}  # peaks
    optimizer = loop.make_optimizer(model, learning_rates, config.weight_decay)
    first_step, _ = loop.restore(checkpoint, optimizer, failed_clips, accelerator.device)
    sampler = loop.StepSampler(config, len(train_set), first_step, total_steps)
    batches = iter(loop.make_loader(config, model, train_set, sampler))

    # ---- the loop: step 0 only evaluates, which gives the baseline before training
    began = time.perf_counter()
    for step in range(first_step, total_steps + 1):
        if step > first_step:
            factor = loop.learning_rate_factor(config, step - 1, total_steps)
            loop.set_learning_rates(optimizer, learning_rates, factor)
            values = train_step(config, accelerator, model, optimizer, batches, step, failed_clips)
            values["learning_rate"] = factor * config.learning_rate
            values["learning_rate_projector"] = factor * config.projector_learning_rate
            values["seconds_left"] = (time.perf_counter() - began) / (step - first_step) * (total_steps - step)
            loop.log_step(run, step, total_steps, values)
        elif checkpoint:
            continue  # the checkpoint's own step was evaluated before it was saved
        last = step == total_steps
        if held_out and (last or step % config.eval_every == 0):
            losses = loop.evaluate_loss(config, accelerator, model, held_out_set, failed_clips)
            loop.log_losses(run, step, losses)
            run.draw_curves(loop.PANELS)
        if held_out and run.main and (last or step % config.sample_every == 0):
            loop.show_answers(config, run, model, step, held_out_set.entries, loop.frames_reader(config, model))
        stopping = signals.requested(accelerator)
        if step > first_step and (last or stopping or step % config.save_every == 0):
            loop.save_checkpoint(config, run, accelerator, model, optimizer, step, 2, failed_clips)
        if stopping and not last:
            signals.end_run(step)

    # ---- the result
    run.draw_curves(loop.PANELS)
    if run.main:
        loop.save_result(run, model, stage=2)
    accelerator.end_training()
    run.print(f"done: {run.model_folder} | next: python train_stage3.py --init_from {run.folder}")


def train_step(config, accelerator, model, optimizer, batches, step, failed_clips):
    """One optimizer step on `gradient_accumulation_steps` micro-batches; returns numbers for the log."""
    start = time.perf_counter()
    loop.seed_dropout(config.seed, step, accelerator.process_index)
    micro_batches = [next(batches) for _ in range(config.gradient_accumulation_steps)]
    waited = time.perf_counter() - start
    ids = [name for batch in micro_batches for name in batch["ids"]]
    # Every label token of the step weighs the same, in whatever micro-batch and rank it is: losses are sums, divided by
    # the label tokens of the whole step over all ranks.
    num_labels, num_tokens, num_cut = loop.count_tokens(accelerator, micro_batches, failed_clips)
    loss = 0.0
    for batch in micro_batches:
        share = model(**batch, num_items_in_batch=num_labels)["loss"]
        loop.require_finite(share.item(), f"loss of step {step}", batch["ids"])
        share.backward()
        loss += share.item()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loop.require_gradients(model)
    loss = loop.sum_gradients(accelerator, trained, loss)
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm).item()
    loop.require_finite(grad_norm, f"gradient norm of step {step}", ids)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - start
    return {"loss": loss, "grad_norm": grad_norm, "step_seconds": seconds, "tokens_per_second": num_tokens / seconds,
            "data_wait": waited / seconds, "memory_gb": loop.memory_gb(accelerator.device),
            "failed_clips": len(failed_clips.reasons), "cut_answers": num_cut}


if __name__ == "__main__":
    run_main(main)
