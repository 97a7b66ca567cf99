"""The held-out clips during training: their loss, the reward of greedy answers, and what the video is worth to it.

    evaluate       the numbers of one evaluation
    Evaluations    those of one run: why it must stop, which step was best

A policy can learn to be paid without looking, by a text that the reward likes whatever the clip shows. Such a shortcut
forms abruptly (arXiv 2606.22043), so every evaluation looks for it: the *gap* is the reward of the answers minus what
the same evidence and captions pay for answers to other frames. 0: what the model is shown makes no difference.

    swapped    another held-out clip. No answer is generated for this: greedy decoding gives a clip's answer wherever
               that clip is shown, so the answers to the other clips are scored once more
    blank      grey frames: one answer per question (and per clip length, where prompts hold the frames' times)
"""

from collections import Counter

import torch
from accelerate.utils import gather_object

from dataset import GREY, IGNORE_INDEX, MODES, encode_example
from stage3.grpo import Group, completion_logps, reference_policy
from stage3.rollout import sample_groups
from training.common import TrainingError
from training.loop import log_losses, mean_losses, show_answers, sum_over_ranks

ROUNDING = 1e-9  # gaps are differences of sums of up to thousands of rewards


# ---------------------------------------------------------------------------------------------------------------------
# One evaluation


@torch.no_grad()
def evaluate(sampler, held_out) -> dict[str, float]:
    """Numbers of the held-out entries, by mode: "eval_loss", "eval_loss_<mode>" (nats per token of the first captions),
    "eval_reward_<mode>", "eval_gap_swapped_<mode>" and "eval_gap_blank_<mode>" (rewards of greedy answers).

    Divided among the ranks, which call this together. sampler: a RolloutSampler. What cannot be measured is left out:
    rewards of clips without evidence, the swapped gap of a question that was asked about one clip only.
    """
    config, accelerator = sampler.config, sampler.accelerator
    entries = sorted(held_out, key=lambda entry: entry.mode)  # batches of similar lengths
    own = range(accelerator.process_index, len(entries), accelerator.num_processes)
    sums, answers, errors = Counter(), {}, []
    for start in range(0, len(own), config.eval_batch_size):
        batch = {i: entries[i] for i in own[start:start + config.eval_batch_size]}
        errors += answer_batch(sampler, batch, sums, answers)
    sampler.failed_clips.add(accelerator, errors)
    values = mean_losses(accelerator, sums)
    answers = dict(sorted(gather_object(list(answers.items()))))  # {index: text} of all ranks
    add_rewards(sampler, entries, own, answers, blank_answers(sampler, entries), sums)
    for name, counted in (("reward", "answers"), ("gap_swapped", "swapped"), ("gap_blank", "answers")):
        totals = sum_over_ranks(accelerator, [sums[name, mode] for mode in MODES])
        counts = sum_over_ranks(accelerator, [sums[counted, mode] for mode in MODES])
        values |= {f"eval_{name}_{mode}": total / count
                   for mode, total, count in zip(MODES, totals, counts, strict=True) if count}
    return values


def answer_batch(sampler, entries, sums, answers) -> list[str]:
    """Add the losses of the entries {index: entry} to `sums` and their greedy answers to `answers` {index: text};
    returns the errors of unreadable clips."""
    visual, errors = sampler.read_clips(entries)
    if not visual:
        return errors
    groups = [caption_group(sampler, entries[i], tokens) for i, tokens in visual.items()]
    logps, _, mask = completion_logps(sampler.model, groups, shared_prefix=False)
    texts = greedy(sampler, [entries[i].mode for i in visual], [group.prompt_ids for group in groups],
                   torch.stack(list(visual.values())))
    for row, (i, text) in enumerate(zip(visual, texts, strict=True)):
        sums["loss", entries[i].mode] -= logps[row].sum().item()
        sums["tokens", entries[i].mode] += mask[row].sum().item()
        answers[i] = text
    return errors


def caption_group(sampler, entry, tokens):
    """The entry's prompt with its first caption as the only completion."""
    model = sampler.model
    example = encode_example(model.tokenizer, entry.question, entry.captions[0], model.num_visual_tokens,
                             sampler.config.max_text_tokens, entry.times)
    answer = [label for label in example["labels"] if label != IGNORE_INDEX]
    return Group(example["input_ids"][:-len(answer)], tokens, [answer])


def greedy(sampler, modes, prompts, visual) -> list[str]:
    """Greedy answers to prompts (lists of ids) about visual tokens [B, N, D]."""
    answers = sample_groups(sampler.model, prompts, visual, [[0]] * len(prompts),
                            [sampler.limits[mode] for mode in modes], temperature=0.0, shared_prefix=False)
    return [answer.text for (answer,) in answers]


def blank_prompt(entry) -> tuple:
    """What an entry asks about grey frames: (mode, question), with the frames' times where prompts hold them."""
    return (entry.mode, entry.question, entry.times) if entry.times else (entry.mode, entry.question)


def blank_answers(sampler, entries) -> dict[tuple, str]:
    """{`blank_prompt`: the greedy answer about grey frames}, divided among the ranks. An unreadable clip has none."""
    model, accelerator, size = sampler.model, sampler.accelerator, sampler.config.eval_batch_size
    questions = sorted({blank_prompt(entry) for entry in entries if entry.times != ()})
    own = questions[accelerator.process_index::accelerator.num_processes]
    frames = torch.full((1, model.num_frames, model.image_size, model.image_size, 3), GREY, dtype=torch.uint8)
    visual = model.encode_video(frames) if own else None  # [1, N, D]
    answers = []
    for start in range(0, len(own), size):
        batch = own[start:start + size]
        prompts = [model.prompt_ids(*asked) for _, *asked in batch]
        texts = greedy(sampler, [mode for mode, *_ in batch], prompts, visual.expand(len(batch), -1, -1))
        answers += zip(batch, texts, strict=True)
    return dict(gather_object(answers))


def other_clips(entries, answered) -> dict[int, int]:
    """{index of an entry: index of the one whose answer it is given}: another clip, asked the same question in the
    same mode. `answered`: indices, in order; one whose question was asked once is left out."""
    same_question, others = {}, {}
    for i in answered:
        same_question.setdefault((entries[i].mode, entries[i].question), []).append(i)
    for indices in same_question.values():
        if half := len(indices) // 2:
            others |= dict(zip(indices, indices[half:] + indices[:half], strict=True))
    return others


def add_rewards(sampler, entries, own, answers, blank, sums):
    """Add rewards and gaps of this rank's entries (`own`: indices) to `sums`, where the clip was read and has
    evidence."""
    others = other_clips(entries, answers)
    for i in own:
        entry = entries[i]
        if i not in answers or not sampler.evidence[entry.video]:
            continue
        reward, _ = sampler.reward_of(entry, answers[i])
        sums["reward", entry.mode] += reward
        sums["answers", entry.mode] += 1
        sums["gap_blank", entry.mode] += reward - sampler.reward_of(entry, blank[blank_prompt(entry)])[0]
        if i in others:
            sums["gap_swapped", entry.mode] += reward - sampler.reward_of(entry, answers[others[i]])[0]
            sums["swapped", entry.mode] += 1


# ---------------------------------------------------------------------------------------------------------------------
# The evaluations of a run


def mean_reward(config, values) -> float:
    """Mean of an evaluation's rewards over the modes that are trained, each counted once; TrainingError without any."""
    rewards = [values[f"eval_reward_{mode}"] for mode in MODES
               if mode in config.modes and f"eval_reward_{mode}" in values]
    if not rewards:
        raise TrainingError("keep_best: no held-out clip could be scored, so no step can be called the best")
    return sum(rewards) / len(rewards)


def blind_problem(config, first, values) -> str | None:
    """Why the run must stop: in a mode that it trains on, the held-out reward has risen since stage 2 while the swapped
    gap has fallen to `stop_when_blind` of what it was, or there never was one. None where that is not so.

    first, values: `evaluate` of stage 2 and of now.
    """
    for mode in MODES if config.stop_when_blind is not None else ():
        reward, gap = f"eval_reward_{mode}", f"eval_gap_swapped_{mode}"
        if mode not in config.modes or gap not in values or gap not in first:
            continue
        limit = config.stop_when_blind * max(first[gap], 0.0) + ROUNDING
        if values[reward] > first[reward] and values[gap] <= limit:
            before, now = round(first[gap], 3) + 0.0, round(values[gap], 3) + 0.0  # + 0.0: no "-0.000"
            return (f"in {mode} the model is paid without watching: on the held-out clips its reward has risen from "
                    f"{first[reward]:.3f} to {values[reward]:.3f}, while its lead over answers to another clip is "
                    f"{now:.3f}, and was {before:.3f} with stage 2 (stop_when_blind: {config.stop_when_blind:g} of "
                    "that). The reward can be had without the video: see the answers in train.log and rollouts.jsonl")
    return None


class Evaluations:
    """The evaluations of one run: each is logged, and compared with stage 2's and with the best so far.

    sampler: a RolloutSampler; state: run.json of the checkpoint that the run continues from. Resumed from a path, the
    reward may be another: stage 2 is then measured anew, and the best step is one of this run's own.
    """

    def __init__(self, config, run, sampler, held_out, state):
        self.config, self.run, self.sampler, self.held_out = config, run, sampler, held_out
        known = state.get("evaluations") if config.resume == "auto" else None
        # for run.json: stage 2's evaluation, and {"step", "reward"} of the best one where `keep_best` is set
        self.state = known or {"first": None, "best": None}

    def after(self, step, last) -> str | None:
        """What is due after `step` (all, if it is the `last`): an evaluation, answers that are shown. Returns why the
        run must stop, else None. All ranks call this together."""
        config, problem = self.config, None
        if self.held_out and (last or step % config.eval_every == 0):
            problem = self.evaluate(step)
        if self.held_out and self.run.main and (last or problem or step % config.sample_every == 0):
            show_answers(config, self.run, self.sampler.model, step, self.held_out, self.sampler.visual_tokens)
        return problem

    def evaluate(self, step) -> str | None:
        """Evaluate and log the model as it is; returns why the run must stop, else None."""
        values, best = evaluate(self.sampler, self.held_out), self.state["best"]
        log_losses(self.run, step, values)
        if self.state["first"] is None:
            self.state["first"] = values if step == 0 else self._of_stage_2()
        if problem := blind_problem(self.config, self.state["first"], values):
            return problem
        if self.config.keep_best and (best is None or mean_reward(self.config, values) > best["reward"]):
            self.state["best"] = {"step": step, "reward": mean_reward(self.config, values)}
            self.run.log_scalars(step, {"best_step": step}, line=f"step {step} is the best so far")
        return None

    def _of_stage_2(self):
        with reference_policy(self.sampler.model):
            return evaluate(self.sampler, self.held_out)

    def is_best(self, step) -> bool:
        """True if `step` was just evaluated as the best so far, so that it must be saved."""
        return self.state["best"] is not None and self.state["best"]["step"] == step
