"""Rollouts of stage 3: which prompts a step takes, their sampled answers, and what the reward says of each.

    prompts_of_step              the prompts of a step, a function of (seed, step)
    VisualTokens                 a clip's projected tokens, computed once and kept on disk
    sample_groups                G completions per prompt from one prefill
    RolloutSampler               prompts -> Rollouts: sampled, scored, with one record per answer for rollouts.jsonl
    compute_advantages           over the records of all ranks; which groups and answers the loss is made of
"""

import contextlib
import dataclasses
import importlib
from collections import Counter
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dataset import (
    MODE_TABLE,
    MODES,
    NOBODY,
    PREFIX,
    ClipTensors,
    Entry,
    VideoError,
    check_times,
    draw_question,
)
from model import attention_mask, head_logits, sees
from stage3.evidence import Evidence, evidence_dict
from stage3.grpo import Group, group_advantages, has_variance, reference_policy
from stage3.grpo_reward_func import label_facts, label_mentions
from training.common import TrainingError, stable_seed
from training.loop import clock, require_finite

BLOCK = 512  # ids whose probabilities are summed first (`sample_tokens`)
SPARE_STEPS = 64  # decoding steps that a cache and its mask have room for


@dataclass
class Completion:
    """One sampled answer: `ids` with the end token, whether it `ended` by itself (was not cut off), its text, and the
    log-prob of each token as it was sampled."""

    ids: list[int]
    ended: bool
    text: str
    logps: list[float]


@dataclass
class Rollout:
    """One prompt of a step with its group of answers: sampled, scored, and what the loss needs of them."""

    slot: int  # the prompt's place in the step, over all ranks
    entry: Entry
    group: Group
    completions: list[Completion]
    records: list[dict]  # one per completion: its line of rollouts.jsonl
    advantages: torch.Tensor | None = None  # float32 [G]; None: nothing to learn from this group
    kept: torch.Tensor | None = None  # bool [G]: completions that count in the loss
    ref_logps: torch.Tensor | None = None  # [G, T] under stage 2's adapter, right padded; see stage3/language.py


# ---------------------------------------------------------------------------------------------------------------------
# Prompts: clips and questions


class VisualTokens:
    """Projected tokens of clips [N, D], kept in a folder as one file per clip.

    Tower and projector are frozen in stage 3, so a clip goes through them once.
    """

    def __init__(self, model, folder, video_root, frame_cache=None):
        shape = model.num_visual_tokens, model.head_weight.shape[1]
        self.model = model
        self.tensors = ClipTensors(folder, model.frozen_parts_id("vision", "projector", "temporal"), shape, video_root,
                                   model.num_frames, model.image_size, frame_cache)

    def __call__(self, video):
        """Tokens [N, D] of `video` as the data file names it; VideoError where it cannot be read."""
        return self.tensors.make(video, self.model.encode_video).to(self.model.device)


def prompts_of_step(entries, step, count, modes, seed, wordings=0.5):
    """The `count` entries of optimizer step `step` (from 0), in slot order, each with the question that it is asked
    (`draw_question`): a function of its arguments.

    Slots alternate between `modes` (a mode named twice gets two slots in each round). Each mode's entries are taken
    in an order shuffled by (seed, mode, pass).
    """
    pools, chosen = {}, []
    for entry in entries:
        pools.setdefault(entry.mode, []).append(entry)
    for slot in range(step * count, (step + 1) * count):
        round_number, place = divmod(slot, len(modes))
        mode = modes[place]
        served = round_number * modes.count(mode) + modes[:place].count(mode)  # prompts of this mode before this slot
        epoch, index = divmod(served, len(pools[mode]))
        generator = torch.Generator().manual_seed(stable_seed(seed, mode, epoch))
        order = torch.randperm(len(pools[mode]), generator=generator)
        entry = pools[mode][order[index]]
        chosen.append(dataclasses.replace(entry, question=draw_question(entry, seed, epoch, wordings)))
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def sample_tokens(logits, uniforms):
    """logits [n, V] float32, uniforms [n] in [0, 1) -> token ids [n], by inverting the cumulative distribution.

    One number decides a token, so a completion does not depend on what else is in the batch. An id with logit -inf has
    probability zero. Probabilities are in float32; their running sum, which float32 cannot hold over 150,000 ids, is in
    float64: first over blocks of ids, then within the block that the number falls into.
    """
    probs = torch.softmax(logits, dim=-1)  # [n, V]
    blocks = torch.nn.functional.pad(probs, (0, -probs.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))  # [n, b, BLOCK]
    ends = blocks.sum(-1).double().cumsum(1)  # [n, b]
    aim = uniforms[:, None] * ends[:, -1:]  # [n, 1]
    block = torch.searchsorted(ends, aim, right=True)  # [n, 1]
    inside = blocks[torch.arange(len(blocks), device=logits.device), block[:, 0]].double().cumsum(1)  # [n, BLOCK]
    total = inside[:, -1:]
    # Rounding may put the aim past either end of its block, where the next id with a probability is not in it.
    aim = (aim - ends.gather(1, block) + total).clamp(min=0.0).minimum(torch.nextafter(total, torch.zeros_like(total)))
    return block[:, 0] * BLOCK + torch.searchsorted(inside, aim, right=True)[:, 0]


class PreallocatedLayer(DynamicLayer):
    """A decoder layer's cached keys and values [R, heads, K, head size], in tensors that have room for SPARE_STEPS more
    decoding steps. transformers' DynamicLayer would copy the whole cache at every step."""

    def __init__(self):
        super().__init__()
        self.stores = {}  # of which `keys` and `values` are the beginning, once there is room

    def update(self, key_states, value_states, *args, **options):
        """Add keys and values [R, heads, n, head size]; returns all of them."""
        if not self.is_initialized:  # the prompt: what it will be followed by is not known yet
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name, old, new):
        length = old.shape[2] + new.shape[2]
        store = self.stores.get(name)
        if store is None or length > store.shape[2]:
            store = old.new_empty(*old.shape[:2], length + (SPARE_STEPS - 1) * new.shape[2], old.shape[3])
            store[:, :, :old.shape[2]] = old
            self.stores[name] = store
        store[:, :, old.shape[2]:length] = new
        return store[:, :, :length]

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.stores.clear()

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self.stores.clear()


class PreallocatedCache(DynamicCache):
    """transformers' cache with preallocated layers; layers of another kind, such as a sliding window's, stay as they
    are."""

    def __init__(self, config):
        super().__init__(config=config)
        self.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]

    @torch.compiler.disable  # else compiled blocks (model.compile_blocks) are compiled again as it grows
    def update(self, *args, **options):
        return super().update(*args, **options)


class GroupDecoder:
    """The KV cache of P prompts whose completions are decoded together, G per prompt.

    With `shared_prefix`, a row holds one prompt, and its completions take turns behind it: each step adds one token of
    each to the row's cache, and a mask keeps them apart. Without, the cache is expanded to one row per completion.
    Finished completions go on until `leave` takes them out of their row, and rows without any out of the batch.

    R rows, W completions per row, K cached positions:
        slots [R, W]     index p * G + g of the completion that each column decodes, or NOBODY
        owner [R, K]     who wrote each cached position: PREFIX, a completion's index, or NOBODY (padding)
        hidden [R, W, D] what predicts the next token of each column
    """

    def __init__(self, model, prompts, visual, group, shared_prefix):
        self.model, self.shared_prefix = model, shared_prefix
        width, device, length = group if shared_prefix else 1, model.device, max(map(len, prompts))
        pads = [length - len(prompt) for prompt in prompts]
        rows = list(zip(pads, prompts, strict=True))
        ids = torch.tensor([[model.pad_token_id] * n + prompt for n, prompt in rows], device=device)  # [P, L]
        self.owner = torch.tensor([[NOBODY] * n + [PREFIX] * len(prompt) for n, prompt in rows], device=device)
        self.cache = PreallocatedCache(model.causal_lm.config)
        hidden = model.hidden_states(model.embed(ids, visual), (self.owner == PREFIX).long(),
                                     past_key_values=self.cache, use_cache=True)[:, -1:]  # [P, 1, D]
        if not shared_prefix:
            self.cache.batch_repeat_interleave(group)
            self.owner, hidden = self.owner.repeat_interleave(group, 0), hidden.repeat_interleave(group, 0)
        self.slots = torch.arange(len(prompts) * group, device=device).view(-1, width)
        self.position = (self.owner == PREFIX).sum(1, keepdim=True)  # [R, 1]: of the next new token
        self.hidden = hidden.expand(-1, width, -1)
        self.mask = None  # [R, 1, W, K and room]; made by `_visible`

    def append(self, tokens):
        """Add one token to each column; tokens [R, W]."""
        self.owner = torch.cat([self.owner, self.slots], dim=1)
        visible = self._visible() if self.shared_prefix else (self.owner != NOBODY).long()
        self.hidden = self.model.hidden_states(
            self.model.causal_lm.get_input_embeddings()(tokens), visible,
            position_ids=self.position.expand_as(self.slots), past_key_values=self.cache, use_cache=True)
        self.position = self.position + 1

    def _visible(self):
        """The additive mask [R, 1, W, K] of a step. What is appended later is seen by its own column alone, so the mask
        is made for SPARE_STEPS steps at once."""
        length = self.owner.shape[1]
        if self.mask is None or length > self.mask.shape[3]:
            owner = torch.cat([self.owner, self.slots.repeat(1, SPARE_STEPS - 1)], dim=1)
            self.mask = attention_mask(sees(self.slots, owner), self.model.dtype)
        return self.mask[..., :length]

    def leave(self, done, tokens):
        """Take completions that are `done` [R, W] out, before their tokens [R, W] are appended; returns the tokens of
        those that stay [R, W]: they move to the left, then columns and rows that have none are dropped."""
        finished = done | (self.slots == NOBODY)
        widest = (~finished).sum(1).max()
        order = finished.long().argsort(dim=1, stable=True)[:, :widest]
        rows = (~finished).any(1).nonzero()[:, 0]
        if len(rows) < len(self.owner):
            self.owner, self.position = self.owner[rows], self.position[rows]
            self.cache.batch_select_indices(rows)
        self.slots = self.slots.masked_fill(finished, NOBODY).gather(1, order)[rows]
        self.hidden, self.mask = None, None
        return tokens.gather(1, order)[rows]


@torch.no_grad()
def sample_groups(model, prompts, visual, seeds, limits, *, temperature=1.0, shared_prefix=True, check_every=None):
    """Sample len(seeds[p]) completions of every prompt, all prompts together: list [P] of lists [G] of Completion.

    prompts: P lists of ids; visual [P, N, D]; seeds [P][G] ints; limits [P]: most new tokens. temperature 0 is greedy.
    check_every: steps between looks at which completions have ended, which a GPU has to stop for; None: 1 on a CPU,
    else 8. The completions are the same.
    """
    group, device = len(seeds[0]), model.device
    check_every = check_every or (1 if device.type == "cpu" else 8)
    uniforms = []  # one number per token, drawn beforehand from the completion's own seed
    for row, limit in zip(seeds, limits, strict=True):
        uniforms += [torch.rand(limit, generator=torch.Generator().manual_seed(seed)) for seed in row]
    longest = max(limits)
    # One row per completion, and a last one for columns without any: NOBODY is -1.
    uniforms = torch.nn.utils.rnn.pad_sequence([*uniforms, torch.zeros(longest)], batch_first=True).to(device)
    limits = torch.tensor([*limits, 0], device=device).repeat_interleave(group)[:len(uniforms)]  # [P * G + 1]
    ends = torch.tensor(model.end_ids, device=device)
    ids = torch.zeros(uniforms.shape, dtype=torch.long, device=device)  # [P * G + 1, longest]
    logps = torch.zeros(uniforms.shape, device=device)
    lengths = limits.clone()  # up to the end token, as soon as there is one
    with model.decoding(), model.autocast():
        head = model.head_weight if device.type == "cuda" else model.head_weight.float()
        decoder = GroupDecoder(model, prompts, visual, group, shared_prefix)
        for t in range(longest):
            which, hidden = decoder.slots.flatten(), decoder.hidden.flatten(0, 1)  # [n], [n, D]
            with torch.autocast(device.type, enabled=False):
                logits = head_logits(hidden, head, temperature or 1.0, model.banned_ids)  # [n, V]
            tokens = sample_tokens(logits, uniforms[which, t]) if temperature else logits.argmax(-1)
            ids[which, t] = tokens
            logps[which, t] = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
            stops = torch.isin(tokens, ends) & (t < lengths[which])
            lengths[which] = torch.where(stops, t + 1, lengths[which])
            tokens = tokens.view_as(decoder.slots)
            if (t + 1) % check_every == 0 or t + 1 == longest:
                done = (lengths <= t + 1)[decoder.slots]
                if done.all():
                    break
                if done.any():
                    tokens = decoder.leave(done, tokens)
            decoder.append(tokens)
    completions = []
    for row, count in enumerate(lengths.tolist()[:-1]):
        answer = ids[row, :count].tolist()
        completions.append(Completion(answer, answer[-1] in model.end_ids, model.answer(answer).text,
                                      logps[row, :count].tolist()))
    return [completions[start:start + group] for start in range(0, len(completions), group)]


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


RECORD_KEYS = frozenset("step slot k id video mode question text tokens ended reward mentions claims evidence nll "
                        "worst_nll language advantage".split())


def load_reward(config, mode, reference="A car ahead."):
    """(reward function of `config.reward`, None), or (None, what is wrong with it or with `config.reward_weights`).

    The function takes (caption, evidence, mode, reference caption) and returns a dataclass of parts in [0, 1]; the
    reward is their sum weighted by `reward_weights`. It is tried with this mode and reference.
    """
    module, _, name = config.reward.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        parts = dataclasses.asdict(function("A car ahead.", Evidence({"car"}), mode, reference))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        return None, f"reward: {config.reward} does not work as module:function: {type(error).__name__}: {error}"
    parts.pop("total", None)  # ours also returns its own weighted sum
    if taken := sorted(set(parts) & RECORD_KEYS):
        return None, f"reward: {config.reward} has parts named as other things in rollouts.jsonl: {', '.join(taken)}"
    if set(config.reward_weights) != set(parts):
        return None, (f"reward_weights: has {', '.join(config.reward_weights)}, but the parts of {config.reward} are "
                      f"{', '.join(parts)} (a weight of 0 leaves a part out)")
    return function, None


def score_text(text, evidence, mode, reference, reward, weights) -> tuple[float, dict[str, float]]:
    """(the weighted sum, {part: value}) of what a reward function says of a text."""
    parts = dataclasses.asdict(reward(text, evidence, mode, reference))
    parts = {name: parts[name] for name in weights}
    return sum(weight * parts[name] for name, weight in weights.items()), parts


def reference_text(entry) -> str:
    """What vouches for verbs, attributes and scene facts: all of the entry's captions, which are variants of one."""
    return "\n".join(entry.captions)


def answer_limits(config):
    """{mode: longest answer in tokens}: `max_new_tokens`, else the mode's own limit."""
    return {mode: config.max_new_tokens.get(mode, info.max_new_tokens) for mode, info in MODE_TABLE.items()}


class RolloutSampler:
    """Samples and scores the answers of a training step: `roll_out`. stage3/held_out.py evaluates with it.

    folder: run folder, where visual tokens are kept; evidence: {video: Evidence, or None where detection failed};
    reward: a function as `load_reward` gives.
    """

    def __init__(self, config, accelerator, model, folder, evidence, reward, failed_clips):
        self.config, self.accelerator, self.model = config, accelerator, model
        self.visual_tokens = VisualTokens(model, folder / "visual_tokens", config.video_root, config.frame_cache)
        self.evidence, self.reward = evidence, reward
        self.failed_clips, self.limits = failed_clips, answer_limits(config)
        self.usual_nll = None  # {mode: nats}: see stage3/language.py
        self.prompts_per_rank = config.per_device_batch_size * config.gradient_accumulation_steps
        self.prompts_per_step = self.prompts_per_rank * accelerator.num_processes

    def roll_out(self, prompts, step) -> list[Rollout]:
        """This rank's prompts of the step (from 1), each with its scored answers; without clips that cannot be read.

        All ranks call this together.
        """
        config = self.config
        chosen = prompts_of_step(prompts, step - 1, self.prompts_per_step, config.modes, config.seed,
                                 config.wordings)
        first = self.accelerator.process_index * self.prompts_per_rank
        asked = {slot: chosen[slot] for slot in range(first, first + self.prompts_per_rank)}
        visual, errors = self.read_clips(asked)
        self.failed_clips.add(self.accelerator, errors)
        slots = [slot for slot in asked if slot in visual]
        if not slots:
            return []
        seeds = []
        for slot in slots:
            seeds.append([stable_seed(config.seed, step, asked[slot].id, k) for k in range(config.num_generations)])
        prompt_ids = [self.model.prompt_ids(asked[slot].question, asked[slot].times) for slot in slots]
        sampler = reference_policy(self.model) if config.sample_from == "reference" else contextlib.nullcontext()
        with sampler:
            answers = sample_groups(
                self.model, prompt_ids, torch.stack([visual[slot] for slot in slots]), seeds,
                [self.limits[asked[slot].mode] for slot in slots], temperature=config.temperature,
                shared_prefix=config.shared_prefix)
        rollouts = []
        for slot, ids, completions in zip(slots, prompt_ids, answers, strict=True):
            group = Group(ids, visual[slot], [completion.ids for completion in completions])
            records = [{"step": step, "slot": slot, "k": k, **self.score(asked[slot], completion)}
                       for k, completion in enumerate(completions)]
            rollouts.append(Rollout(slot, asked[slot], group, completions, records))
        return rollouts

    def read_clips(self, asked):
        """({slot: visual tokens [N, D]} of the clips that can be read, what is wrong with the others)."""
        visual, errors = {}, []
        for slot, entry in asked.items():
            try:
                tokens = self.visual_tokens(entry.video)
                check_times(entry)
                visual[slot] = tokens
            except VideoError as error:
                errors.append(str(error))
        return visual, errors

    def reward_of(self, entry, text) -> tuple[float, dict[str, float]]:
        """(reward, its parts) of a text as an answer to the entry. A reward that fails ends the run."""
        try:
            total, parts = score_text(text, self.evidence[entry.video], entry.mode, reference_text(entry), self.reward,
                                      self.config.reward_weights)
        except Exception as error:  # whatever a user's function raises: it must not become a reward of 0
            raise TrainingError(f"reward {self.config.reward} failed on {entry.id}, {text[:200]!r}: "
                                f"{type(error).__name__}: {error}") from error
        require_finite(total, "reward", [entry.id])
        return total, parts

    def score(self, entry, completion) -> dict:
        """The answer's line of rollouts.jsonl, except its place in the step."""
        evidence = self.evidence[entry.video]
        total, parts = self.reward_of(entry, completion.text)
        mentions = [[mention.object, verdict, mention.start, mention.end]
                    for mention, verdict in label_mentions(completion.text, evidence)]
        claims = [list(label) for label in label_facts(completion.text, evidence, reference_text(entry))]
        return {"id": entry.id, "video": entry.video, "mode": entry.mode, "question": entry.question,
                "text": completion.text, "tokens": len(completion.ids), "ended": completion.ended, "reward": total,
                **parts, "mentions": mentions, "claims": claims, "evidence": evidence_dict(evidence)}


# ---------------------------------------------------------------------------------------------------------------------
# Advantages of a step


@dataclass
class StepTotals:
    """What a step's losses are divided by, by mode and over all ranks: rows and tokens that count, training passes."""

    live_groups: int = 0  # groups with something to learn from, of all modes
    rows: Counter = field(default_factory=Counter)
    tokens: Counter = field(default_factory=Counter)
    passes: Counter = field(default_factory=Counter)
    weights: dict[str, float] = field(default_factory=dict)  # of the modes with live groups; their sum is 1


def step_advantages(config, rewards, modes):
    """Rewards of a step [B, G] and the mode of each group [B] -> advantages [B, G].

    Each mode is taken by itself: the std that `advantage_scale: batch` divides by is not the same in all.
    """
    advantages = torch.empty_like(rewards)
    for mode in dict.fromkeys(modes):
        of_mode = [row for row, other in enumerate(modes) if other == mode]
        advantages[of_mode] = group_advantages(rewards[of_mode], config.advantage_scale, config.std_floor)
    return advantages


def counted_answers(config, records):
    """Which answers of a group [G] count in the loss, as a list of bools; all false: none.

    grpo: all. raft: the best, if it is better than the group's mean. dpo: the best and the worst, if they differ. With
    `mask_truncated`, answers that were cut off never count. Among equals, raft and dpo take the first best and the
    last worst.
    """
    whole = [record["ended"] or not config.mask_truncated for record in records]
    if config.objective == "grpo":
        return whole
    ranked = sorted((k for k, is_whole in enumerate(whole) if is_whole), key=lambda k: -records[k]["reward"])
    chosen = []
    if config.objective == "raft" and ranked and records[ranked[0]]["advantage"] > 0:
        chosen = ranked[:1]
    if config.objective == "dpo" and ranked and records[ranked[0]]["reward"] > records[ranked[-1]]["reward"]:
        chosen = [ranked[0], ranked[-1]]
    return [k in chosen for k in range(len(records))]


def only_counted(rollout):
    """The rollout with none but the answers that count in the loss, best first: others need no forward pass."""
    chosen = sorted(rollout.kept.nonzero()[:, 0].tolist(), key=lambda k: -rollout.records[k]["reward"])
    ids = [rollout.group.completion_ids[k] for k in chosen]
    ref_logps = rollout.ref_logps
    return dataclasses.replace(
        rollout, group=dataclasses.replace(rollout.group, completion_ids=ids),
        completions=[rollout.completions[k] for k in chosen], records=[rollout.records[k] for k in chosen],
        advantages=rollout.advantages[chosen], kept=rollout.kept[chosen],
        ref_logps=None if ref_logps is None else ref_logps[chosen, :max(map(len, ids))])


def compute_advantages(config, rollouts, records, prompts_per_rank) -> StepTotals:
    """Advantages of all answers of a step; `records` are those of all ranks in order, `rollouts` this rank's.

    Sets "advantage" in every record, and `advantages` and `kept` of the rollouts that the loss is made of. A group is
    left out (dead) where all rewards are equal, or where none of its answers counts (`counted_answers`).
    """
    totals, live_of_rank = StepTotals(), Counter()
    if not records:
        return totals
    own = {rollout.slot: rollout for rollout in rollouts}
    group = config.num_generations
    rewards = torch.tensor([record["reward"] for record in records], dtype=torch.float64).view(-1, group)  # [B, G]
    modes = [record["mode"] for record in records[::group]]  # [B]
    advantages = step_advantages(config, rewards, modes)
    passes = set()  # (mode, rank, number of the pass)
    for row, varied in enumerate(has_variance(rewards).tolist()):
        answers = records[row * group:(row + 1) * group]
        for record, advantage in zip(answers, advantages[row].tolist(), strict=True):
            record["advantage"] = advantage
        kept = counted_answers(config, answers)
        if not varied or not any(kept):
            continue
        slot, mode = answers[0]["slot"], modes[row]
        if slot in own:
            own[slot].advantages, own[slot].kept = advantages[row].float(), torch.tensor(kept)
        rank = slot // prompts_per_rank
        passes.add((mode, rank, live_of_rank[rank] // config.per_device_batch_size))
        live_of_rank[rank] += 1
        totals.live_groups += 1
        totals.rows[mode] += group if config.objective == "grpo" else sum(kept)
        totals.tokens[mode] += sum(record["tokens"] for record, keep in zip(answers, kept, strict=True) if keep)
    totals.passes = Counter(mode for mode, _, _ in passes)
    weights = {mode: config.mode_weights.get(mode, 1.0) for mode in totals.rows}
    totals.weights = {mode: weight / sum(weights.values()) for mode, weight in weights.items()}
    return totals


def gather_records(rollouts) -> list[dict]:
    """Records of all ranks, in the order of their slots."""
    records = []
    for rollout in rollouts:
        records += rollout.records
    return gather_object(records)


def describe(config, records, totals) -> dict[str, float]:
    """Statistics of a step's answers: {tag: number}, rewards and lengths by mode."""
    if not records:
        return {"prompts": 0}
    rewards = torch.tensor([record["reward"] for record in records], dtype=torch.float64)
    rewards = rewards.view(-1, config.num_generations)  # [B, G]
    values = {"prompts": len(rewards), "reward": rewards.mean().item(), "reward_std": rewards.std(1).mean().item(),
              "dead_groups": 1 - totals.live_groups / len(rewards)}
    for mode in MODES:
        own = [record for record in records if record["mode"] == mode]
        for name in ("reward", *config.reward_weights) if own else ():
            values[f"{name}/{mode}"] = sum(record[name] for record in own) / len(own)
        if own:
            values[f"length/{mode}"] = sum(record["tokens"] for record in own) / len(own)
            values[f"truncated/{mode}"] = sum(not record["ended"] for record in own) / len(own)
        judged = [record for record in own if "nll" in record]
        for name in ("nll", "worst_nll", "language") if judged else ():
            if name in judged[0]:
                values[f"{name}/{mode}"] = sum(record[name] for record in judged) / len(judged)
    return values


def log_step(run, step, total_steps, values):
    """One step: metrics.jsonl, the tracker and a line."""

    def show(form, key):
        return form.format(values[key]) if key in values else "-"

    by_mode = ", ".join(f"{mode[:3]} {show('{:.3f}', f'reward/{mode}')}" for mode in MODES)
    lengths = "/".join(show("{:.0f}", f"length/{mode}") for mode in MODES)
    run.log_scalars(step, values, line=(
        f"step {step:>{len(str(total_steps))}}/{total_steps} | reward {show('{:.3f}', 'reward')} ({by_mode}) | "
        f"std {show('{:.3f}', 'reward_std')} | dead {show('{:.0%}', 'dead_groups')} | kl {show('{:.4f}', 'kl')} | "
        f"entropy {show('{:.2f}', 'entropy')} | tokens {lengths} | grad {show('{:.2f}', 'grad_norm')} | "
        f"lr {values['learning_rate']:.1e} | {values['tokens_per_second']:,.0f} tok/s | "
        f"{values['memory_gb']:.1f} GB | {clock(values['seconds_left'])} left"))


def curve_panels(config):
    """Panels of curves.png: {title: keys}."""
    parts = {}
    for mode in MODES:
        parts[f"parts, {mode}"] = [f"{part}/{mode}" for part in config.reward_weights]
    return {
        "reward": [*(f"reward/{mode}" for mode in MODES), *(f"eval_reward_{mode}" for mode in MODES)], **parts,
        "held-out reward lost without the video": [
            *(f"eval_gap_swapped_{mode}" for mode in MODES), *(f"eval_gap_blank_{mode}" for mode in MODES)],
        "std of a group's rewards, share of dead groups": ["reward_std", "dead_groups"],
        "KL to stage 2, nats per token": ["kl"],
        "DPO: share of pairs told apart, margin": ["dpo_accuracy", "dpo_margin", "dpo_chosen"],
        "entropy, nats per token": ["entropy"],
        "NLL under stage 2: mean, worst tokens": [*(f"nll/{mode}" for mode in MODES),
                                                  *(f"worst_nll/{mode}" for mode in MODES)],
        "tokens per answer": [f"length/{mode}" for mode in MODES],
        "share cut off, share clipped": [*(f"truncated/{mode}" for mode in MODES), "clip"],
        "loss on held-out captions": ["eval_loss"],
        "gradient norm": ["grad_norm"],
    }
