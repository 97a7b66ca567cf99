"""Group-relative policy optimisation on a shared prefix: advantages, the loss, group rollouts, the training pass.

    group_advantages, grpo_loss      pure functions on tensors
    VisualTokens                     a clip's projected tokens, computed once and kept on disk
    sample_groups                    G completions a prompt from one prefill
    completion_logps                 their log-probs in one row a prompt: [prefix | c1 .. cG]
    load_reference, reference        stage 2's adapter, frozen, beside the one that trains

A prompt's clip is 1,296 tokens of the real model, an answer some 200: the prompt is what must not be repeated. So a
row holds a prompt once and all of its completions behind it. Every position has an *owner* (the prompt, completion k,
or nobody), and a position sees those of the prompt and of its own completion that stand before it; positions restart
at the prompt's end for each completion. That is exact, in values and gradients, and serves both sampling and training.
`shared_prefix=False` is the plain way, a row a completion, for models whose attention takes no such mask.

Sampling, policy and reference share one distribution: the same temperature and the same banned ids; nothing is
truncated (no top-p, no top-k). Completions are ids from sampling to loss; text is decoded for the reward alone.
"""

import hashlib
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from dataset import cached_frames, resolve_video
from model import ModelError, adapter_hash, checkpoint_folder, head_logits, token_logps

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


# ---------------------------------------------------------------------------------------------------------------------
# Prompts: clips and questions


class VisualTokens:
    """Projected tokens of clips [N, D], from a folder of one file a clip.

    Tower and projector are frozen in stage 3, so a clip goes through them once: alone (a batch would round otherwise)
    and read back after writing, so that a fresh run and one that finds the folder full agree to the bit. The file's
    name holds all that decides its content: tower, projector, frames, number type, the clip's size and time.
    """

    def __init__(self, model, folder, video_root, frame_cache=None):
        self.model, self.folder, self.video_root, self.frame_cache = model, Path(folder), video_root, frame_cache
        self.folder.mkdir(parents=True, exist_ok=True)
        vision = {name: p for name, p in model.state_dict().items() if name.split(".")[0] in ("projector", "temporal")}
        made_by = (model.base["vision_model"], adapter_hash(vision), model.num_frames, model.image_size, model.dtype)
        self.made_by = repr(made_by)

    def __call__(self, video):
        """Tokens [N, D] of `video` as the data file names it; VideoError where it cannot be read."""
        path = resolve_video(self.video_root, video)
        stat = path.stat() if path.is_file() else None
        clip = f"{self.made_by} {path} {stat and (stat.st_size, stat.st_mtime_ns)}"
        file = self.folder / f"{hashlib.sha256(clip.encode()).hexdigest()[:32]}.safetensors"
        if not file.is_file():
            frames = cached_frames(path, self.model.num_frames, self.model.image_size, self.frame_cache)
            with torch.no_grad():
                tokens = self.model.encode_video(torch.as_tensor(frames)[None])[0]  # [N, D]
            partial = file.with_name(f".{file.name}.{os.getpid()}")
            save_file({"tokens": tokens.cpu().contiguous()}, partial)
            os.replace(partial, file)
        return load_file(file)["tokens"].to(self.model.device)


def prompts_of_step(entries, step, count, modes, seed):
    """The `count` entries of optimizer step `step` (from 0): a pure function of its arguments, so a resumed run agrees.

    Slots are dealt out to `modes` in turn (a mode named twice gets two slots in a round). Each mode's entries are gone
    through in an order shuffled by (seed, mode, pass).
    """
    chosen, pools = [], {mode: [entry for entry in entries if entry.mode == mode] for mode in set(modes)}
    for slot in range(step * count, (step + 1) * count):
        mode = modes[slot % len(modes)]
        pool = pools[mode]
        before = slot // len(modes) * modes.count(mode) + modes[: slot % len(modes)].count(mode)
        generator = torch.Generator().manual_seed(stable_seed(seed, mode, before // len(pool)))
        chosen.append(pool[torch.randperm(len(pool), generator=generator)[before % len(pool)]])
    return chosen


def stable_seed(*parts):
    """A 63-bit seed from anything that prints, the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


# ---------------------------------------------------------------------------------------------------------------------
# Owners: what may see what

PREFIX, NOBODY = -2, -1  # owners of a position; completion k is owned by k


@dataclass
class Completion:
    """One sampled answer: `ids` with its end token, `ended` by itself (not cut off), log-probs as sampled."""

    ids: list[int]
    ended: bool
    text: str
    logps: list[float]


@dataclass
class Group:
    """A prompt with its completions: prompt ids, the clip's tokens [N, D], lists of completion ids."""

    prompt: list[int]
    visual: torch.Tensor
    completions: list[list[int]]


def check_shared_prefix(llm):
    """ModelError where the LM's attention would not keep to a mask of our own: set `shared_prefix: false` there."""
    attention = llm.config._attn_implementation
    layers = set(getattr(llm.config, "layer_types", None) or ["full_attention"])
    if attention not in ("sdpa", "eager") or layers != {"full_attention"}:
        raise ModelError(
            f"shared_prefix needs sdpa or eager attention in full layers; {type(llm).__name__} has {attention} in "
            f"{', '.join(sorted(layers))} layers: set shared_prefix to false"
        )


def attention_mask(model, visible):
    """visible [R, Q, K] bool -> additive [R, 1, Q, K], which sdpa and eager both take."""
    mask = torch.zeros_like(visible, dtype=model.dtype)
    return mask.masked_fill_(~visible, torch.finfo(model.dtype).min)[:, None]


def sees(query_owner, key_owner):
    """[R, Q], [R, K] -> [R, Q, K]: a key of the prefix or of the query's own completion. The order is not looked at."""
    key = key_owner[:, None, :]
    return (key == PREFIX) | ((key == query_owner[:, :, None]) & (key != NOBODY))


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts


def sample_tokens(logits, uniforms):
    """logits [n, V], uniforms [n] in [0, 1) -> token ids [n], by inverting the cumulative distribution.

    One number decides a token, so what a completion says does not hang on which others are decoded beside it. An id at
    -inf has no width and is never met; in float64 the widths of 150,000 ids add up.
    """
    cumulative = torch.softmax(logits, dim=-1, dtype=torch.float64).cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]


@torch.no_grad()
def sample_groups(model, prompts, visual, seeds, limits, *, temperature=1.0, shared_prefix=True):
    """Sample len(seeds[p]) completions of every prompt, all prompts together: list [P] of lists [G] of Completion.

    prompts: P lists of ids; visual [P, N, D]; seeds [P][G] ints; limits [P]: most new tokens. temperature 0 is greedy.
    Each prompt is prefilled once. With `shared_prefix` its completions then take turns behind it in one row: a step
    adds one token of each to the row's cache, and a mask keeps them apart; else the cache is expanded, a row each.
    Finished completions leave the row, and rows without any leave the batch.
    """
    num_prompts, group = len(prompts), len(seeds[0])
    width = group if shared_prefix else 1  # completions in one row
    device, length = model.device, max(map(len, prompts))
    ids = torch.tensor([[model.pad_token_id] * (length - len(p)) + p for p in prompts], device=device)  # [P, L]
    owner = torch.tensor([[NOBODY] * (length - len(p)) + [PREFIX] * len(p) for p in prompts], device=device)
    uniforms = [[torch.rand(limit, generator=torch.Generator().manual_seed(s)) for s in row]
                for row, limit in zip(seeds, limits, strict=True)]
    uniforms = torch.nn.utils.rnn.pad_sequence([u for row in uniforms for u in row], batch_first=True).to(device)
    ends = torch.tensor(model.end_ids, device=device)
    limits = torch.tensor(limits, device=device).repeat_interleave(group)  # [P * G]
    said, said_logps = [[] for _ in limits], [[] for _ in limits]
    with model.decoding(), model.autocast():
        head = model.head_weight if device.type == "cuda" else model.head_weight.float()
        cache = DynamicCache(config=model.causal_lm.config)
        hidden = model.hidden_states(
            model.embed(ids, visual), (owner == PREFIX).long(), past_key_values=cache, use_cache=True
        )[:, -1:]  # [P, 1, D]
        if width == 1:
            cache.batch_repeat_interleave(group)
            owner, hidden = owner.repeat_interleave(group, 0), hidden.repeat_interleave(group, 0)
        slots = torch.arange(num_prompts * group, device=device).view(-1, width)  # [R, W]: the completion, or NOBODY
        start = (owner == PREFIX).sum(1, keepdim=True)  # [R, 1]: position of the first new token
        hidden = hidden.expand(-1, width, -1)  # [R, W, D]
        for t in range(int(limits.max())):
            alive = slots != NOBODY
            which = slots[alive]  # [n]
            with torch.autocast(device.type, enabled=False):
                logits = head_logits(hidden[alive], head, temperature or 1.0, model.banned_ids)  # [n, V]
            tokens = sample_tokens(logits, uniforms[which, t]) if temperature else logits.argmax(-1)
            logps = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
            for k, token, logp in zip(which.tolist(), tokens.tolist(), logps.tolist(), strict=True):
                said[k].append(token)
                said_logps[k].append(logp)
            done = torch.isin(tokens, ends) | (t + 1 >= limits[which])
            slots = slots.masked_scatter(alive, torch.where(done, NOBODY, which))
            if done.all():
                break
            token_at = torch.full_like(slots, model.pad_token_id).masked_scatter(alive, tokens)
            if done.any():  # close the ranks: the living to the left, then drop empty columns and rows
                order = (slots == NOBODY).long().argsort(dim=1, stable=True)[:, : (slots != NOBODY).sum(1).max()]
                rows = (slots != NOBODY).any(1).nonzero()[:, 0]
                slots, token_at = slots.gather(1, order)[rows], token_at.gather(1, order)[rows]
                if len(rows) < len(owner):
                    owner, start = owner[rows], start[rows]
                    cache.batch_select_indices(rows)
            owner = torch.cat([owner, slots], dim=1)  # [R, L + t + 1 ..]
            visible = attention_mask(model, sees(slots, owner)) if shared_prefix else (owner != NOBODY).long()
            hidden = model.hidden_states(
                model.causal_lm.get_input_embeddings()(token_at), visible, position_ids=(start + t).expand_as(slots),
                past_key_values=cache, use_cache=True,
            )
    made = [Completion(ids, ids[-1] in model.end_ids, model.answer(ids).text, logps)
            for ids, logps in zip(said, said_logps, strict=True)]
    return [made[p * group : (p + 1) * group] for p in range(num_prompts)]


# ---------------------------------------------------------------------------------------------------------------------
# The training pass


def pack_groups(groups, pad_token_id):
    """One row a group: [prompt | c1 .. cG], a completion without its last token (nothing is predicted from it).

    Returns ids, owner, positions [R, L] (right padding: owner NOBODY), and for all completions in order [N, T]: which
    flat index r * L + l predicts each token, the token itself, and the mask of real ones.
    """
    rows, predictors, targets = [], [], []
    for group in groups:
        ids, n = list(group.prompt), len(group.prompt)
        owner, positions = [PREFIX] * n, list(range(n))
        for k, completion in enumerate(group.completions):
            predictors.append([n - 1, *range(len(ids), len(ids) + len(completion) - 1)])
            targets.append(completion)
            ids += completion[:-1]
            owner += [k] * (len(completion) - 1)
            positions += range(n, n + len(completion) - 1)
        rows.append((ids, owner, positions))
    length, longest = max(len(ids) for ids, _, _ in rows), max(map(len, targets))
    first = [row * length for row, group in enumerate(groups) for _ in group.completions]

    def stack(lists, width, fill):
        return torch.tensor([list(x) + [fill] * (width - len(x)) for x in lists])

    parts = zip(zip(*rows, strict=True), (pad_token_id, NOBODY, 0), strict=True)
    packed = [stack(part, length, fill) for part, fill in parts]  # ids, owner, positions
    mask = stack([[1] * len(t) for t in targets], longest, 0).bool()
    return (*packed, stack(predictors, longest, 0) + torch.tensor(first)[:, None], stack(targets, longest, 0), mask)


def completion_logps(model, groups, *, temperature=1.0, shared_prefix=True):
    """Log-probs and entropies of all completions' tokens under the model's active adapter.

    Returns (logps, entropy, mask), each [N, T]: completions of all groups in order, right padded, 0 where masked.
    Gradients flow through prompt and completions. Entropy is that of the whole distribution, in nats, no gradient.
    """
    if not shared_prefix:
        groups = [Group(g.prompt, g.visual, [completion]) for g in groups for completion in g.completions]
    packed = pack_groups(groups, model.pad_token_id)
    ids, owner, positions, predictors, targets, mask = (x.to(model.device) for x in packed)
    embeds = model.embed(ids, torch.stack([g.visual for g in groups]))
    if shared_prefix:
        earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=model.device).tril()
        hidden = model.hidden_states(embeds, attention_mask(model, sees(owner, owner) & earlier), positions)
    else:
        hidden = model.hidden_states(embeds, (owner != NOBODY).long())
    hidden = hidden.flatten(0, 1)[predictors[mask]]  # [tokens, D]
    logps, entropy = token_logps(
        hidden, model.head_weight, targets[mask], temperature=temperature, banned=model.banned_ids
    )
    empty = torch.zeros(mask.shape, device=model.device)
    return empty.masked_scatter(mask, logps), empty.masked_scatter(mask, entropy), mask


def loss_share(loss_type, rows, step_rows, passes):
    """What a pass's loss is multiplied with so that the passes of all ranks add up to the optimizer step's loss.

    grpo and dr_grpo are means over rows: the pass's share of the rows. dapo has divided by the step's tokens already
    (num_items). bnpo is a mean of passes, by definition: it alone depends on how the step is split.
    """
    return {"grpo": rows / step_rows, "dr_grpo": rows / step_rows, "dapo": 1.0, "bnpo": 1.0 / passes}[loss_type]


# ---------------------------------------------------------------------------------------------------------------------
# Reference: the adapter that stage 2 left


def load_reference(model, folder):
    """Load a checkpoint's adapter as the frozen adapter "reference" beside the one that trains; returns its hash."""
    folder = checkpoint_folder(folder)
    model.llm.load_adapter(str(folder / "adapter"), adapter_name="reference", is_trainable=False)
    model.set_trainable(3)  # dropout 0 for this adapter too
    loaded, stored = adapter_hash(model.adapter_state("reference")), adapter_hash(folder)
    if loaded != stored:
        raise ModelError(f"the reference adapter differs from {folder / 'adapter'} after loading")
    return stored


@contextmanager
def reference(model):
    """Inside, the model is the reference; outside, the policy. A switch of adapters flips requires_grad in PEFT, not in
    all versions alike: it is set right here."""
    model.llm.set_adapter("reference")
    try:
        yield
    finally:
        model.llm.set_adapter("default")
        for name, parameter in model.llm.named_parameters():
            if ".lora_" in name:
                parameter.requires_grad_(".default." in name)
