"""Stage 3, physics-aware GRPO: LoRA adapters learn to say what a detector confirms; all else stays frozen.

    python train_stage3.py --init_from output/stage2       # one GPU, the real models: configs/stage3.yaml
    torchrun --nproc_per_node 4 train_stage3.py --gradient_accumulation_steps 1    # four GPUs, same 4 prompts per step
    python train_stage3.py --config configs/demo/stage3.yaml                       # toy world, CPU, three minutes

One step: take some prompts of all modes, sample `num_generations` answers to each, score every answer with a reward
that checks it against the detector's evidence, and make one update that raises the probability of answers better than
their group's mean. Evidence is read from `evidence_cache`; the detector first runs on clips that are not there yet, as
`python -m stage3.detect_objects` would. Any key of the YAML is a flag (--help lists them). docs/metrics.md explains
every number that is logged. Continue an interrupted run with --resume auto.
"""

import functools
import json
import math
import time

from training.common import TrainingError, fail, load_config, print0, run_main
from training.config import Stage3Config

if __name__ == "__main__":  # --help and wrong flags are answered before torch is imported, which takes seconds
    load_config(Stage3Config, default_config="configs/stage3.yaml", description=__doc__)

import torch
from accelerate.utils import gather_object

from dataset import MODES
from model import DriveVLM, ModelError, check_shared_prefix, resolve_dtype
from stage3.detect_objects import evidence_problems, frames_problems, get_evidence
from stage3.grpo import SUMS, load_reference, mean_statistics, needs_reference, training_pass
from stage3.held_out import Evaluations
from stage3.language import judge_language, usual_nll
from stage3.report import write_report
from stage3.rollout import (
    RolloutSampler,
    answer_limits,
    compute_advantages,
    curve_panels,
    describe,
    gather_records,
    load_reward,
    log_step,
    only_counted,
)
from training import loop
from training.run_folder import RunFolder


def main(argv=None):
    config = load_config(Stage3Config, argv, default_config="configs/stage3.yaml", description=__doc__)
    config.dtype = resolve_dtype(config.dtype)
    unknown = sorted(set(config.modes) - set(MODES))
    problems = [f"modes must be of {', '.join(MODES)}, got {', '.join(config.modes)}"] if unknown else []
    if strange := sorted(set(config.mode_weights) - set(config.modes)):
        problems.append(f"mode_weights: {', '.join(strange)} is none of modes: {', '.join(config.modes)}")
    reward, problem = load_reward(config, config.modes[0]) if not unknown else (None, None)
    problems += frames_problems(config.detector, "detector", config.num_frames) + ([problem] if problem else [])
    train_entries, held_out = loop.load_inputs(config, stage=3, modes=config.modes, problems=problems)
    if problems := evidence_problems([*train_entries, *held_out], config.detector, config.evidence_cache, "detector"):
        fail(problems)
    with RunFolder(config.output_dir) as run, loop.StopSignals() as signals:
        checkpoint = run.find_resume(config)
        loop.check_resume(config, checkpoint, train_entries, held_out)
        if run.finished:
            run.print(f"{run.model_folder} already exists: stage 3 is complete")
        else:
            train(config, reward, train_entries, held_out, run, checkpoint, signals)


def train(config, reward, train_entries, held_out, run, checkpoint, signals):
    # ---- set-up; the detector may run for hours on another rank, hence the timeout
    accelerator = loop.start_accelerator(timeout_hours=12)
    run.start(config, checkpoint)

    # ---- data: prompts of the training split whose clips have evidence
    evidence = get_evidence([*train_entries, *held_out], config.video_root, config.detector, config.evidence_cache,
                            barrier=accelerator.wait_for_everyone, log=run.print)
    prompts = find_prompts(config, train_entries, evidence)

    # ---- model and optimizer
    model, reference_hash = build_model(config, checkpoint, accelerator.device)
    loop.record_clips(config, model, train_entries, held_out)
    run.print(model.trainable_table())
    prompts, held_out = (model.with_times(x, config.video_root, config.frame_cache) for x in (prompts, held_out))
    failed_clips = loop.FailedClips(config, run, len({entry.video for entry in [*prompts, *held_out]}))
    optimizer = loop.make_optimizer(model, {"lora": config.learning_rate})
    first_step, state = loop.restore(checkpoint, optimizer, failed_clips, accelerator.device)
    sampler = RolloutSampler(config, accelerator, model, run.folder, evidence, reward, failed_clips)
    total_steps = count_steps(config, run, sampler, prompts, held_out)
    sampler.usual_nll = state.get("usual_nll") or usual_nll(config, model, sampler, prompts, run.print)
    evaluations = Evaluations(config, run, sampler, held_out, state)
    save = functools.partial(
        loop.save_checkpoint, config, run, accelerator, model, optimizer, stage=3, failed_clips=failed_clips,
        init_from=config.init_from, reference_sha256=reference_hash, usual_nll=sampler.usual_nll,
        evaluations=evaluations.state)  # a dict that changes with each evaluation

    # ---- the loop: step 0 only evaluates, which gives the baseline. Resumed from a path, dead steps count from 0 again
    dead_steps, began = state.get("dead_steps", 0) if config.resume == "auto" else 0, time.perf_counter()
    for step in range(first_step, total_steps + 1):
        if step > first_step:
            factor = loop.learning_rate_factor(config, step - 1, total_steps)
            loop.set_learning_rates(optimizer, {"lora": config.learning_rate}, factor)
            values, records, live, problem = train_step(config, accelerator, model, optimizer, sampler, prompts, step)
            values["seconds_left"] = (time.perf_counter() - began) / (step - first_step) * (total_steps - step)
            log_step(run, step, total_steps, values)
            run.log_rollouts(records)
            dead_steps = 0 if live else dead_steps + 1
            if problem or config.max_dead_steps is not None and dead_steps >= config.max_dead_steps:
                stop(run, save, step, values["updates"] or not live, dead_steps, problem)
        elif checkpoint:
            continue  # the checkpoint's own step was evaluated before it was saved
        last = step == total_steps
        if problem := evaluations.after(step, last):
            stop(run, save, step, True, dead_steps, problem)
        stopping = signals.requested(accelerator)
        if evaluations.is_best(step) or step > first_step and (last or stopping or step % config.save_every == 0):
            save(step, dead_steps=dead_steps)
            run.draw_curves(curve_panels(config))
        if stopping and not last:
            signals.end_run(step)

    # ---- the result
    if run.main:
        loop.save_result(run, model, stage=3, best=evaluations.state["best"])
        run.print(f"report: {write_report(run.folder, config)}")
    accelerator.end_training()
    run.print(f"done: {run.model_folder} | next: evaluate.py --checkpoint s2={config.init_from} s3={run.folder}")


def find_prompts(config, train_entries, evidence):
    """The entries of `modes` whose clips have evidence; ConfigError if a mode has none."""
    prompts = [entry for entry in train_entries if evidence[entry.video] and entry.mode in config.modes]
    if missing := set(config.modes) - {entry.mode for entry in prompts}:
        fail([f"no clip of the training split has evidence and a prompt of mode {' or '.join(sorted(missing))}"])
    without = sum(value is None for value in evidence.values())
    print0(f"evidence: {without} of {len(evidence)} clips have none and are not used")
    return prompts


def count_steps(config, run, sampler, prompts, held_out):
    """Optimizer steps of the run, which is announced with them."""
    total_steps = config.max_steps or max(1, config.epochs * len(prompts) // sampler.prompts_per_step)
    run.print(f"stage 3 in {run.folder} on {sampler.accelerator.device} | {config.objective} | {len(prompts)} prompts, "
              f"{len(held_out)} held out | {total_steps} steps of {sampler.prompts_per_step} prompts x "
              f"{config.num_generations} answers of the {config.sample_from}")
    return total_steps


def build_model(config, checkpoint, device):
    """(model, hash of the reference policy): stage 2's model, or a checkpoint of this stage, and beside its adapter
    the frozen copy of stage 2's that the KL is measured against."""
    folder, stage = (checkpoint / "model", 3) if checkpoint else (config.init_from, 2)
    try:
        model = DriveVLM.from_checkpoint(folder, expect_stage=stage, dtype=config.dtype, device=device,
                                         vision_model=config.vision_model, language_model=config.language_model)
        reference_hash = load_reference(model, config.init_from)
        if config.shared_prefix:
            check_shared_prefix(model.causal_lm)
    except ModelError as error:
        fail([str(error)])
    if checkpoint:
        state = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
        if state["reference_sha256"] != reference_hash:
            fail([f"init_from: {checkpoint} was trained against the adapter of {state['init_from']} "
                  f"(sha256 {state['reference_sha256'][:12]}), {config.init_from} holds another "
                  f"({reference_hash[:12]}): the KL would be measured against another policy"])
    model.set_trainable("lora")
    model.activation_checkpointing(config.activation_checkpointing)
    if config.compile_blocks:
        model.compile_blocks()
    model.set_lora_dropout(0.0)  # sampling and scoring must use the same probabilities
    return model, reference_hash


def train_step(config, accelerator, model, optimizer, sampler, prompts, step):
    """Sample, score, update. Returns (numbers for the log, records of all ranks, number of groups with something to
    learn from, None or why the run must stop)."""
    start = time.perf_counter()
    rollouts = sampler.roll_out(prompts, step)  # this rank's prompts, G scored answers each
    if needs_reference(config) or sampler.usual_nll:
        judge_language(config, model, rollouts, sampler.usual_nll)
    records = gather_records(rollouts)
    totals = compute_advantages(config, rollouts, records, sampler.prompts_per_rank)  # over the prompts of all ranks
    sampled = time.perf_counter()
    live = [rollout for rollout in rollouts if rollout.advantages is not None]
    if config.objective != "grpo":
        live = [only_counted(rollout) for rollout in live]
    stats, problem = update(config, accelerator, model, optimizer, live, totals)
    now = time.perf_counter()
    values = {**describe(config, records, totals), **stats, "learning_rate": optimizer.param_groups[0]["lr"],
              "rollout_seconds": sampled - start, "update_seconds": now - sampled,
              "tokens_per_second": sum(record["tokens"] for record in records) / (now - start),
              "memory_gb": loop.memory_gb(accelerator.device), "failed_clips": len(sampler.failed_clips.reasons)}
    return values, records, totals.live_groups, problem


def update(config, accelerator, model, optimizer, rollouts, totals):
    """`inner_epochs` updates on this rank's live rollouts of the step.

    Returns (numbers for the log, None or why the run must stop); it stops before the update that would go wrong.
    """
    stats, sums = {"updates": 0}, dict.fromkeys(SUMS, 0.0)
    if not totals.live_groups:  # of all ranks; a rank with no usable groups of its own contributes zero gradients
        return stats, None
    size = config.per_device_batch_size
    passes = [rollouts[start:start + size] for start in range(0, len(rollouts), size)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    old_logps = [None] * len(passes)
    for _ in range(config.inner_epochs):
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for i, batch in enumerate(passes):
            loss, old_logps[i] = training_pass(config, model, batch, answer_limits(config), old_logps[i], totals, sums)
            losses.append(loss)
        stats["loss"] = loop.sum_gradients(accelerator, trained, sum(losses))
        stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm).item()
        over_ranks = loop.sum_over_ranks(accelerator, [sums[key] for key in SUMS])
        stats |= mean_statistics(config, dict(zip(SUMS, over_ranks, strict=True)))
        if not math.isfinite(stats["loss"]) or not math.isfinite(stats["grad_norm"]):
            bad = [batch for batch, loss in zip(passes, losses, strict=True) if not math.isfinite(loss)]
            names = gather_object([rollout.entry.id for batch in bad or passes for rollout in batch])
            return stats, f"loss {stats['loss']}, gradient norm {stats['grad_norm']}, on {', '.join(names)}"
        if config.max_kl is not None and stats.get("kl", 0.0) > config.max_kl:
            return stats, (f"the KL to stage 2 is {stats['kl']:.3g} nats per token, above max_kl {config.max_kl:g}: "
                           "the policy has drifted too far (try a lower learning_rate or a higher beta)")
        optimizer.step()
        stats["updates"] += 1
    return stats, None


def stop(run, save, step, weights_are_of_this_step, dead_steps, problem):
    """Save the last weights whose numbers are sound and end the run with the reason."""
    problem = problem or (
        f"for {dead_steps} consecutive steps no group's rewards differed, so there is nothing to learn from (are all "
        "answers the same? see rollouts.jsonl and the entropy; a higher temperature helps)")
    last = step if weights_are_of_this_step else step - 1
    save(last, dead_steps=dead_steps)
    folder = run.checkpoints / f"step-{last:06d}"
    raise TrainingError(f"step {step}: {problem}\nthe weights after step {last} are in {folder}; --resume with this "
                        "path and another --output_dir continues from there with other settings")


if __name__ == "__main__":
    run_main(main)
