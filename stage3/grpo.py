"""Group-relative policy optimisation on a shared prefix: advantages, the loss, group rollouts, the training pass.

    1  group_advantages, grpo_loss      pure functions on tensors

What is kept of GRPO: the clipped ratio (low and high), KL to a frozen copy of stage 2's adapter, four ways to average
(`grpo`, `bnpo`, `dr_grpo`, `dapo`). Sampling, policy and reference log-probs share one distribution: the same
temperature and the same banned ids; nothing is truncated (no top-p, no top-k).
"""

import torch

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
MAX_LOG_DIFF = 20.0  # exp(20) = 4.9e8 is still far from float32's end, and no honest token moves that far
STD_EPS = 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Advantages and loss


def group_advantages(rewards, scale="group", std_floor=0.0):
    """How much better each completion did than its group: `(r - mean) / (std + 1e-4)`.

    rewards [B, G]: one row a prompt, one column a completion; finite. Returns [B, G] in rewards' dtype.
    scale: "group" divides by the group's own std (Bessel's correction), "batch" by the std over all B * G rewards,
    "none" leaves the difference as it is (Dr. GRPO). std_floor: stds under it count as it, so that a group whose
    rewards hardly differ does not shout as loud as one whose rewards do. A group of equal rewards gets exact zeros.
    ValueError: fewer than two completions a group, an unknown scale, a reward that is not finite.
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
    """Which groups can teach anything: rewards [B, G] -> bool [B], False where all of a group's rewards are equal."""
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
    works). ref_logps: those of the reference; needed where beta > 0. Per token, with w = exp(logp - old):

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
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, not {loss_type!r}")
    if kl not in ("k3", "k2"):
        raise ValueError(f"kl must be k3 or k2, not {kl!r}")
    if beta != 0.0 and ref_logps is None:
        raise ValueError("beta is not 0: ref_logps are needed")
    if loss_type == "dr_grpo" and not max_completion_tokens:
        raise ValueError("dr_grpo divides by a constant: max_completion_tokens is needed")
    if logps.shape != mask.shape or advantages.shape != logps.shape[:1]:
        shapes = [list(x.shape) for x in (logps, mask, advantages)]
        raise ValueError(f"logps, mask and advantages must be [N, T], [N, T] and [N], not {shapes}")

    mask = mask.bool()
    dtype = torch.promote_types(logps.dtype, torch.float32)  # half precision is no place for exp

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
    per_token = torch.where(mask, per_token, 0.0)

    tokens = mask.sum()
    if loss_type == "grpo":
        loss = (per_token.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / max(len(logps), 1)
    elif loss_type == "dr_grpo":
        loss = per_token.sum() / (max(len(logps), 1) * max_completion_tokens)
    else:
        items = tokens if loss_type == "bnpo" or num_items is None else torch.as_tensor(num_items, device=logps.device)
        loss = per_token.sum() / items.clamp(min=1)

    with torch.no_grad():
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
