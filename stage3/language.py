"""Is an answer sound language? Judged by its negative log-likelihood under stage 2's frozen adapter.

Stage 2 learnt from sound texts, and the training pass computes its log-probs anyway, for the KL. A broken text of true
words has a few tokens that stage 2 would never have said there: these part it from sound text far better than the mean
does. What is usual is measured on stage 2's own samples before training (`usual_nll`); an answer whose worst tokens are
within that range is paid in full, one that is twice as far out is paid nothing.
"""

import itertools
import math
import statistics

import torch

from dataset import VideoError
from stage3.grpo import has_variance, policy_logps, reference_policy
from stage3.rollout import prompts_of_step, sample_groups
from training.common import TrainingError, stable_seed

WORST_TOKENS = 3  # the mean of so many of an answer's worst tokens is what counts
USUAL_PROMPTS = 8  # prompts of each mode that stage 2 answers, `num_generations` times, to measure what is usual
USUAL_MEDIANS = 2.5  # x the median of these answers: what is further out is a slip, in the toy world one report in 16


def worst_nll(logps, mask):
    """Mean negative log-likelihood of each row's WORST_TOKENS worst tokens, in nats: logps, mask [N, T] -> [N]."""
    nll = torch.where(mask, -logps, 0.0)  # [N, T]
    worst = nll.topk(min(WORST_TOKENS, nll.shape[1]), dim=1).values  # [N, 3]
    return worst.sum(1) / mask.sum(1).clamp(min=1, max=worst.shape[1])


def language_factor(worst, usual):
    """The share of its reward that an answer gets, in [0, 1]: 1 up to the `worst_nll` that is usual, 0 from twice
    that."""
    return min(1.0, max(0.0, 2.0 - worst / max(usual, 1e-6)))


@torch.no_grad()
def usual_nll(config, model, sampler, prompts, log=print) -> dict[str, float] | None:
    """{mode: the largest `worst_nll` of stage 2's own samples, and at most USUAL_MEDIANS x their median}: a function of
    the seed, the prompts and stage 2. None where language is not judged.

    With the largest alone, one sample that slips by 7 nats would make a dropped or doubled word usual.
    """
    if not config.judge_language:
        return None
    modes = sorted(set(config.modes))
    chosen = prompts_of_step(prompts, 0, USUAL_PROMPTS * len(modes), modes, stable_seed(config.seed, "usual"),
                             config.wordings)
    usual = {}
    for mode in modes:
        entries = [entry for entry in chosen if entry.mode == mode]
        visual, errors = sampler.read_clips(dict(enumerate(entries)))
        entries = [entry for i, entry in enumerate(entries) if i in visual]
        if not entries:
            raise VideoError(chosen[0].video, f"nor can the other clips of {mode} be read: {errors[0]}")
        size, worst, tokens = sampler.prompts_per_rank, [], list(visual.values())  # as many at once as in a step
        for start in range(0, len(entries), size):
            batch = entries[start:start + size]
            seeds = []
            for entry in batch:
                seeds.append([stable_seed(config.seed, "usual", entry.id, k) for k in range(config.num_generations)])
            asked = [model.prompt_ids(entry.question, entry.times) for entry in batch]
            with reference_policy(model):
                groups = sample_groups(model, asked, torch.stack(tokens[start:start + size]), seeds,
                                       [sampler.limits[mode]] * len(batch), temperature=config.temperature,
                                       shared_prefix=config.shared_prefix)
            for answer in itertools.chain(*groups):
                logps = torch.tensor([answer.logps])  # [1, T]
                worst.append(worst_nll(logps, torch.ones_like(logps, dtype=torch.bool)).item())
        usual[mode] = round(min(max(worst), USUAL_MEDIANS * statistics.median(worst)), 2)
    ranges = ", ".join(f"{nll:.2f} ({mode})" for mode, nll in usual.items())
    log(f"sound language: the worst tokens of stage 2's own answers usually have an NLL of up to {ranges}")
    return usual


@torch.no_grad()
def judge_language(config, model, rollouts, usual):
    """Log-probs of the rollouts' answers under stage 2, kept in `rollout.ref_logps` [G, T] for the KL; the records get
    "nll" (mean), "worst_nll" and "language", the factor that their reward is multiplied by.

    NLLs are rounded to hundredths of a nat, so that what a pass happens to hold does not show in rewards. Groups whose
    rewards are all equal have nothing to teach and cost no forward pass. usual: {mode: nats}, or None: rewards stay as
    they are. Raises TrainingError where an NLL is not a number.
    """
    live = []
    for rollout in rollouts:
        rewards = torch.tensor([[record["reward"] for record in rollout.records]], dtype=torch.float64)
        if has_variance(rewards).item():
            live.append(rollout)
    size = config.per_device_batch_size
    for batch in (live[start:start + size] for start in range(0, len(live), size)):
        with reference_policy(model):
            logps, _, mask = policy_logps(config, model, batch)  # [N, T]
        worst, mean = worst_nll(logps, mask), -(logps * mask).sum(1) / mask.sum(1)
        row = 0
        for rollout in batch:
            rows = slice(row, row + len(rollout.records))
            rollout.ref_logps = logps[rows, :max(map(len, rollout.group.completion_ids))]
            for record, nll, most in zip(rollout.records, mean[rows].tolist(), worst[rows].tolist(), strict=True):
                if math.isnan(nll):
                    raise TrainingError(f"the NLL under stage 2 of an answer to {record['id']} is not a number")
                record |= {"nll": round(nll, 2), "worst_nll": round(most, 2)}
                if usual:
                    record["language"] = language_factor(record["worst_nll"], usual[rollout.entry.mode])
                    record["reward"] *= record["language"]
            row = rows.stop
