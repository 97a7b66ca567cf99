"""Group-relative policy optimisation on a shared prefix: advantages, losses, the training pass, the reference policy.

    group_advantages, grpo_loss            pure functions on tensors
    raft_loss, dpo_loss                    the same for the simpler objectives that GRPO is compared with
    completion_logps                       log-probs of completions, one row per prompt: [prefix | c1 .. cG]
    load_reference, reference_policy       stage 2's adapter, frozen, beside the one that trains

A prompt's clip is 1,296 tokens of the real model, an answer about 200, so the prompt is processed once, not once per
completion. A row holds a prompt and all of its completions behind it. Every position has an *owner* (the prompt,
completion k, or nobody), and a position attends to earlier positions of the prompt and of its own completion; position
numbers restart at the prompt's end for each completion. That is exact, in values and gradients, and serves sampling
(stage3/rollout.py) and training. `shared_prefix=False` is the plain way, one row per completion, for models whose
attention takes no such mask.

Sampling, policy and reference share one distribution: the same temperature and the same banned ids; nothing is
truncated (no top-p, no top-k). Completions are ids from sampling to loss; text is decoded for the reward only.
"""

import itertools
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dataset import NOBODY, PREFIX
from model import ModelError, adapter_hash, checkpoint_folder, token_logps

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
MAX_LOG_DIFF = 20.0  # exp(20) = 4.9e8 is far below float32's maximum, and no real token changes that much
STD_EPS = 1e-4
STATISTICS = {  # of each objective: means over the tokens that count in the loss; those named dpo_*, over pairs
    "grpo": ("kl", "clip", "clip_low", "clip_high"),
    "raft": (),
    "dpo": ("dpo_accuracy", "dpo_margin", "dpo_chosen"),
}
SUMS = ("tokens", "pairs", *itertools.chain(*STATISTICS.values()), "entropy", "sampler_gap")  # that passes add up


# ---------------------------------------------------------------------------------------------------------------------
# Advantages and losses


def group_advantages(rewards, scale="group", std_floor=0.0):
    """How much better each completion did than its group: `(r - mean) / (std + 1e-4)`.

    rewards [B, G]: one row per prompt, one column per completion; finite. Returns [B, G] in rewards' dtype.
    scale: "group" divides by the group's own std (Bessel's correction), "batch" by the std over all B * G rewards,
    "none" leaves the difference as it is (Dr. GRPO). std_floor: lower bound on the std, so that tiny reward
    differences are not amplified. A group of equal rewards gets exact zeros.
    ValueError: fewer than two completions per group, an unknown scale, a reward that is not finite.
    Source: DeepSeekMath (2402.03300), section 4.1; Dr. GRPO (2503.20783), section 3.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [prompts, completions], 2 completions at least, not {list(rewards.shape)}")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale must be group, batch or none, not {scale!r}")
    if not torch.isfinite(rewards).all():
        raise ValueError("a reward is not finite")
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    rewards = rewards.double()
    advantages = rewards - rewards.mean(dim=1, keepdim=True)  # [B, G]
    if scale == "group":
        advantages = advantages / (rewards.std(dim=1, keepdim=True).clamp(min=std_floor) + STD_EPS)
    elif scale == "batch":
        advantages = advantages / (rewards.std().clamp(min=std_floor) + STD_EPS)
    return torch.where(has_variance(rewards)[:, None], advantages, 0.0).to(dtype)


def has_variance(rewards):
    """rewards [B, G] -> bool [B], False where all of a group's rewards are equal: it gives no gradient."""
    return rewards.amax(dim=1) > rewards.amin(dim=1)


def log_difference(a, b):
    """a - b for log-probs, clamped to +-20; two -inf differ by 0. No gradient where it is clamped; NaN stays NaN."""
    both_infinite = torch.isinf(a) & (a == b)
    return torch.where(both_infinite, 0.0, a - b).clamp(-MAX_LOG_DIFF, MAX_LOG_DIFF)


def grpo_loss(
    logps,
    advantages,
    mask,
    *,
    old_logps=None,
    ref_logps=None,
    beta=0.0,
    epsilon=0.2,
    epsilon_high=None,
    loss_type="dapo",
    kl="k3",
    max_completion_tokens=None,
    num_items=None,
):
    """The clipped policy loss plus `beta` times the KL to the reference, averaged over tokens as `loss_type` says.

    logps [N, T]: log-probs of the sampled tokens under the policy; advantages [N]; mask [N, T]: true where a token
    counts. old_logps: those of the policy that sampled (None: this policy, so the ratio is 1 and only its gradient
    works). ref_logps: those of the reference policy; needed where beta > 0. Per token, with w = exp(logp - old):

        p = -min(w A, clip(w, 1 - epsilon, 1 + epsilon_high) A) + beta KL
        KL: k3 = exp(d) - d - 1 with d = ref - logp;  k2 = d^2 / 2

        grpo     mean over rows of (sum of p over the row / its tokens)
        bnpo     sum of p / tokens of this call
        dr_grpo  sum of p / (N * max_completion_tokens)
        dapo     sum of p / num_items (tokens of the whole optimizer step; None: tokens of this call)

    Returns (loss, stats): stats are means over counted tokens (`kl`, `ratio`, `clip_low`, `clip_high`, `clip`),
    and `tokens`, their number; no gradients.
    Positions outside the mask are set to 0 before any arithmetic, so -inf, huge values or NaN there do no harm.
    ValueError: unknown loss_type or kl, beta without ref_logps, dr_grpo without max_completion_tokens, shapes.
    Formulas: DeepSeekMath (2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), as in TRL 1.10.
    """
    check_averaging(loss_type, max_completion_tokens)
    if kl not in ("k3", "k2"):
        raise ValueError(f"kl must be k3 or k2, not {kl!r}")
    if beta != 0.0 and ref_logps is None:
        raise ValueError("beta is not 0: ref_logps are needed")
    if logps.shape != mask.shape or advantages.shape != logps.shape[:1]:
        shapes = [list(x.shape) for x in (logps, mask, advantages)]
        raise ValueError(f"logps, mask and advantages must be [N, T], [N, T] and [N], not {shapes}")

    mask = mask.bool()
    dtype = torch.promote_types(logps.dtype, torch.float32)  # exp needs more than half precision

    def clean(x):
        return torch.where(mask, x.to(dtype), 0.0)

    logps, advantages = clean(logps), advantages.to(dtype)[:, None]
    old = logps.detach() if old_logps is None else clean(old_logps)
    high = epsilon if epsilon_high is None else epsilon_high

    ratio = log_difference(logps, old).exp()  # [N, T]
    clipped = ratio.clamp(1.0 - epsilon, 1.0 + high)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    kl_token = torch.zeros_like(logps)
    if ref_logps is not None:
        d = log_difference(clean(ref_logps), logps)
        kl_token = torch.expm1(d) - d if kl == "k3" else 0.5 * d * d
        if beta != 0.0:
            per_token = per_token + beta * kl_token
    loss = mean_of_tokens(per_token, mask, loss_type, max_completion_tokens, num_items)

    with torch.no_grad():
        tokens = mask.sum()
        count = tokens.clamp(min=1)
        low_side = (ratio < 1.0 - epsilon) & (advantages < 0) & mask
        high_side = (ratio > 1.0 + high) & (advantages > 0) & mask
        stats = {
            "kl": torch.where(mask, kl_token, 0.0).sum() / count,
            "ratio": torch.where(mask, ratio, 0.0).sum() / count,
            "clip_low": low_side.sum() / count,
            "clip_high": high_side.sum() / count,
            "clip": (low_side | high_side).sum() / count,
            "tokens": tokens,
        }
    return loss, stats


def check_averaging(loss_type, max_completion_tokens):
    """ValueError where a loss cannot be averaged so."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, not {loss_type!r}")
    if loss_type == "dr_grpo" and not max_completion_tokens:
        raise ValueError("dr_grpo divides by a constant: max_completion_tokens is needed")


def mean_of_tokens(per_token, mask, loss_type, max_completion_tokens=None, num_items=None):
    """per_token, mask [N, T] -> the mean over counted tokens that `loss_type` stands for (see `grpo_loss`)."""
    per_token = torch.where(mask, per_token, 0.0)
    if loss_type == "grpo":
        return (per_token.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / max(len(mask), 1)
    if loss_type == "dr_grpo":
        return per_token.sum() / (max(len(mask), 1) * max_completion_tokens)
    tokens = mask.sum() if loss_type == "bnpo" or num_items is None else torch.as_tensor(num_items, device=mask.device)
    return per_token.sum() / tokens.clamp(min=1)


def raft_loss(logps, mask, *, loss_type="dapo", max_completion_tokens=None, num_items=None):
    """Cross-entropy of the answers that were chosen, in nats, averaged over tokens as `loss_type` says in `grpo_loss`.

    logps [N, T]: log-probs of the chosen answers' tokens under the policy, one row per answer; mask [N, T]: true where
    a token counts. "dapo" is the mean over all tokens, as in supervised fine-tuning. There is no KL and no clipping.
    Positions outside the mask have no effect. A token is at most 20 nats, without a gradient beyond: never inf; NaN
    stays NaN. Returns (loss, stats): `tokens`, their number. ValueError: as in `grpo_loss`.
    Source: RAFT (2304.06767); as a baseline of GRPO: 2504.11343.
    """
    check_averaging(loss_type, max_completion_tokens)
    if logps.shape != mask.shape or logps.ndim != 2:
        raise ValueError(f"logps and mask must be [N, T], not {list(logps.shape)}, {list(mask.shape)}")
    mask = mask.bool()
    logps = logps.to(torch.promote_types(logps.dtype, torch.float32))
    nll = log_difference(torch.zeros_like(logps), logps)  # [N, T]
    return mean_of_tokens(nll, mask, loss_type, max_completion_tokens, num_items), {"tokens": mask.sum()}


def dpo_loss(logps, ref_logps, mask, beta):
    """Direct preference optimisation: -log sigmoid(beta x margin), the mean over pairs.

        margin = sum over tokens of (logp - ref) of the chosen answer, minus the same of the rejected one

    logps, ref_logps, mask [N, 2, T]: N pairs of answers to one prompt, the chosen one first; log-probs under the
    policy and under the frozen reference; mask: true where a token counts. beta > 0: how closely to stay to the
    reference. The sums are not divided by length, and there is no supervised term.
    Returns (loss, stats): `pairs`, their number, `tokens`, and means over pairs, without gradients: `dpo_margin`
    (beta x margin), `dpo_accuracy` (share of margins above 0), `dpo_chosen` (beta x the chosen answer's sum).
    Infinite and huge log-probs, masked positions and NaN: as in `grpo_loss`. No pairs: a zero with a graph.
    ValueError: shapes, beta. Sources: DPO (2305.18290), equation 7; CHAIR-DPO (2508.20181), with beta 0.2.
    """
    if logps.shape != mask.shape or ref_logps.shape != mask.shape or mask.ndim != 3 or mask.shape[1] != 2:
        shapes = [list(x.shape) for x in (logps, ref_logps, mask)]
        raise ValueError(f"logps, ref_logps and mask must be [N, 2, T], not {shapes}")
    if not beta > 0:
        raise ValueError(f"beta must be above 0, not {beta}")
    mask = mask.bool()
    dtype = torch.promote_types(logps.dtype, torch.float32)
    logps, ref_logps = (torch.where(mask, x.to(dtype), 0.0) for x in (logps, ref_logps))
    rewards = beta * log_difference(logps, ref_logps).sum(dim=2)  # [N, 2]: DPO's implicit rewards
    margins = rewards[:, 0] - rewards[:, 1]  # [N]
    count = max(len(margins), 1)
    loss = -torch.nn.functional.logsigmoid(margins).sum() / count
    with torch.no_grad():
        stats = {"pairs": torch.tensor(len(margins)), "tokens": mask.sum(), "dpo_margin": margins.sum() / count,
                 "dpo_accuracy": (margins > 0).sum() / count, "dpo_chosen": rewards[:, 0].sum() / count}
    return loss, stats


# ---------------------------------------------------------------------------------------------------------------------
# The training pass


@dataclass
class Group:
    """A prompt with its completions: prompt ids, the clip's visual tokens [N, D], lists of completion ids."""

    prompt_ids: list[int]
    visual: torch.Tensor
    completion_ids: list[list[int]]


@dataclass
class PackedGroups:
    """Rows of `pack_groups`, right padded, and for all completions in order what predicts their tokens."""

    ids: torch.Tensor  # [R, L]
    owner: torch.Tensor  # [R, L]; NOBODY in the padding
    predictors: torch.Tensor  # [N, T] index r * L + l into the flattened rows of the position that predicts each token
    targets: torch.Tensor  # [N, T] the token itself
    mask: torch.Tensor  # [N, T] True for real tokens


def pack_groups(groups, pad_token_id):
    """One row per group: [prompt | c1 .. cG], completions without their last token (nothing is predicted from it).

    For a prompt p0 p1 with completions a0 a1 a2 and b0 b1:

        ids        p0 p1 | a0 a1 | b0
        owner      -2 -2 |  0  0 |  1
        predictors  a: 1 2 3, b: 1 4     (a0 and b0 are both predicted from p1)
    """
    rows, predictors, targets = [], [], []
    for group in groups:
        ids, n = list(group.prompt_ids), len(group.prompt_ids)
        owner = [PREFIX] * n
        for k, completion in enumerate(group.completion_ids):
            predictors.append([n - 1, *range(len(ids), len(ids) + len(completion) - 1)])
            targets.append(completion)
            ids += completion[:-1]
            owner += [k] * (len(completion) - 1)
        rows.append((ids, owner))
    length, longest = max(len(ids) for ids, _ in rows), max(map(len, targets))
    first = [row * length for row, group in enumerate(groups) for _ in group.completion_ids]

    def stack(lists, width, fill):
        return torch.tensor([list(x) + [fill] * (width - len(x)) for x in lists])

    ids, owner = zip(*rows, strict=True)
    return PackedGroups(
        ids=stack(ids, length, pad_token_id),
        owner=stack(owner, length, NOBODY),
        predictors=stack(predictors, longest, 0) + torch.tensor(first)[:, None],
        targets=stack(targets, longest, 0),
        mask=stack([[1] * len(target) for target in targets], longest, 0).bool(),
    )


def completion_logps(model, groups, *, temperature=1.0, shared_prefix=True):
    """Log-probs and entropies of all completions' tokens under the model's active adapter.

    Returns (logps, entropy, mask), each [N, T]: completions of all groups in order, right padded, 0 where masked.
    Gradients flow through prompt and completions. Entropy is that of the whole distribution, in nats, no gradient.
    """
    if not shared_prefix:
        groups = [Group(g.prompt_ids, g.visual, [completion]) for g in groups for completion in g.completion_ids]
    packed = pack_groups(groups, model.pad_token_id)
    ids, owner, mask = packed.ids.to(model.device), packed.owner.to(model.device), packed.mask.to(model.device)
    embeds = model.embed(ids, torch.stack([group.visual for group in groups]))  # [R, L, D]
    if shared_prefix:
        hidden = model.packed_hidden_states(embeds, packed.owner)
    else:
        hidden = model.hidden_states(embeds, (owner != NOBODY).long())
    hidden = hidden.flatten(0, 1)[packed.predictors.to(model.device)[mask]]  # [tokens, D]
    logps, entropy = token_logps(
        hidden, model.head_weight, packed.targets.to(model.device)[mask], temperature=temperature,
        banned=model.banned_ids)
    empty = torch.zeros(mask.shape, device=model.device)
    return empty.masked_scatter(mask, logps), empty.masked_scatter(mask, entropy), mask


def loss_share(loss_type, rows, step_rows, passes):
    """The factor by which a pass's loss of one mode is multiplied, so that all passes sum to the step's loss of it.

    grpo and dr_grpo are means over rows: the pass's share of the rows. dapo is already divided by the step's tokens
    (num_items). bnpo is a mean of passes, by definition: only it depends on how the step is split.
    """
    return {"grpo": rows / step_rows, "dr_grpo": rows / step_rows, "dapo": 1.0, "bnpo": 1.0 / passes}[loss_type]


def policy_logps(config, model, batch):
    """(log-probs, entropy, mask), each [N, T], of the rollouts' completions under the active adapter."""
    return completion_logps(model, [rollout.group for rollout in batch], temperature=config.temperature,
                            shared_prefix=config.shared_prefix)


def needs_reference(config):
    """Does the loss need log-probs under the reference policy?"""
    return config.objective == "dpo" or config.objective == "grpo" and config.beta > 0


def reference_logps(config, batch):
    """Log-probs of the completions under the reference policy [N, T], from stage3/language.py; None without need."""
    if not needs_reference(config):
        return None
    rows = []
    for rollout in batch:
        rows += list(rollout.ref_logps)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def objective_loss(config, logps, mask, advantages, old_logps, ref_logps, limit, tokens):
    """(loss, statistics) of one mode's rows [N, T] in a pass, by the objective; dpo's rows are pairs, chosen first."""
    if config.objective == "dpo":
        pairs = (-1, 2, logps.shape[1])
        return dpo_loss(logps.view(pairs), ref_logps.view(pairs), mask.view(pairs), config.dpo_beta)
    averaging = {"loss_type": config.loss_type, "max_completion_tokens": limit, "num_items": tokens}
    if config.objective == "raft":
        return raft_loss(logps, mask, **averaging)
    return grpo_loss(logps, advantages, mask, old_logps=old_logps, ref_logps=ref_logps, beta=config.beta,
                     epsilon=config.epsilon, epsilon_high=config.epsilon_high, kl=config.kl, **averaging)


def counted_by(statistic):
    """What a statistic is a mean over."""
    return "pairs" if statistic.startswith("dpo_") else "tokens"


def mean_statistics(config, sums):
    """{statistic: its mean} from sums over all passes and ranks."""
    names = [*STATISTICS[config.objective], "entropy"]
    if config.sample_from == "policy":  # else another policy was the sampler
        names.append("sampler_gap")
    return {name: sums[name] / sums[counted_by(name)] for name in names}


def training_pass(config, model, batch, limits, old_logps, totals, sums):
    """Forward and backward over some rollouts; gradients of their share of the step's loss add up in the parameters.

    The step's loss is the mean over modes, weighted by `mode_weights`, of each mode's own loss: else the long answers
    of one mode would outweigh the short ones of the other. batch: stage3.rollout.Rollouts with advantages; limits:
    {mode: longest answer}; totals: what the losses are divided by; old_logps [N, T]: log-probs before the first update
    (None: this is it). Statistics are added to `sums`. Returns (the share of the loss, old_logps).
    With raft and dpo, the batch holds only the answers that count (`only_counted` in stage3/rollout.py).
    """
    logps, entropy, mask = policy_logps(config, model, batch)  # [N, T]
    ref_logps = reference_logps(config, batch)  # [N, T]
    advantages = torch.cat([rollout.advantages for rollout in batch]).to(logps.device)  # [N]
    kept = torch.cat([rollout.kept for rollout in batch]).to(logps.device)  # [N]
    first_pass = old_logps is None
    if first_pass:  # how far training log-probs are from those of the sampler: 0 except for rounding
        sampled = []
        for rollout in batch:
            for completion in rollout.completions:
                sampled += completion.logps
        gap = (logps.detach()[mask] - torch.tensor(sampled, device=logps.device)).abs()
        gap = torch.zeros_like(logps).masked_scatter(mask, gap)
    mask = mask & kept[:, None]
    modes = [rollout.entry.mode for rollout in batch for _ in rollout.completions]  # [N]
    loss = 0.0
    for mode in dict.fromkeys(modes):
        rows = torch.tensor([other == mode for other in modes], device=logps.device)
        old, ref = (None if x is None else x[rows] for x in (old_logps, ref_logps))
        of_mode, stats = objective_loss(
            config, logps[rows], mask[rows], advantages[rows], old, ref, limits[mode], totals.tokens[mode])
        averaged = "grpo" if config.objective == "dpo" else config.loss_type  # a mean over rows, two for each pair
        share = loss_share(averaged, int(rows.sum()), totals.rows[mode], totals.passes[mode])
        loss = loss + totals.weights[mode] * share * of_mode
        sums["tokens"] += stats["tokens"].item()
        sums["pairs"] += int(stats.get("pairs", 0))
        for key in STATISTICS[config.objective]:
            sums[key] += (stats[key] * stats[counted_by(key)]).item()
    loss.backward()
    sums["entropy"] += entropy[mask].sum().item()
    if first_pass:  # measured once, but divided by the tokens of all inner epochs
        sums["sampler_gap"] += gap[mask].sum().item() * config.inner_epochs
    return loss.item(), logps.detach() if first_pass else old_logps


# ---------------------------------------------------------------------------------------------------------------------
# The reference policy: the adapter that stage 2 left


def load_reference(model, folder):
    """Load a checkpoint's adapter as the frozen adapter "reference" beside the one that trains; returns its hash."""
    folder = checkpoint_folder(folder)
    model.llm.load_adapter(str(folder / "adapter"), adapter_name="reference", is_trainable=False)
    loaded, stored = adapter_hash(model.adapter_state("reference")), adapter_hash(folder)
    if loaded != stored:
        raise ModelError(f"the reference adapter differs from {folder / 'adapter'} after loading")
    return stored


@contextmanager
def reference_policy(model):
    """Inside, the model is the reference policy; outside, the one that trains."""
    model.llm.set_adapter("reference")
    try:
        yield
    finally:
        model.llm.set_adapter("default")
        for name, parameter in model.llm.named_parameters():  # PEFT versions differ, so we set requires_grad explicitly
            if ".lora_" in name:
                parameter.requires_grad_(".default." in name)
