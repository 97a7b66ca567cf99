"""The loop of stage 3: roll out, pay, update, log, look at the held-out clips, save.

One process or several under torchrun: a step's prompts are shared out by rank, rewards are gathered (advantages and
denominators are over the whole step), gradients are summed. There is no DDP wrapper: the adapters' gradients are one
vector, added up once a step, and a rank without anything to learn from adds zeros.
"""

import json
import math
import time
from collections import Counter
from dataclasses import asdict

import torch
from accelerate.utils import gather_object

from dataset import IGNORE_INDEX, MODES, VideoError, encode_example, encode_prompt
from stage3.grpo import (
    Group,
    VisualTokens,
    completion_logps,
    group_advantages,
    grpo_loss,
    has_variance,
    loss_share,
    prompts_of_step,
    reference,
    sample_groups,
    stable_seed,
)
from stage3.grpo_reward_func import judge_mentions, physics_aware_reward
from trainer import TrainingError, clock, memory_gb
from training import fail

PARTS = ("objects", "temporal", "detail", "hallucination")
SUMS = ("tokens", "kl", "clip", "clip_low", "clip_high", "entropy", "sampler_gap")  # over a step's tokens that count
PANELS = {  # curves.png
    "reward": ["reward/microscope", "reward/copilot", "eval_reward_microscope", "eval_reward_copilot"],
    "parts, Microscope": [f"{part}/microscope" for part in PARTS],
    "parts, Copilot": [f"{part}/copilot" for part in PARTS],
    "std of a group's rewards, share of dead groups": ["reward_std", "dead_groups"],
    "KL to stage 2, nats a token": ["kl"],
    "entropy, nats a token": ["entropy"],
    "tokens an answer": ["length/microscope", "length/copilot"],
    "share cut off, share clipped": ["truncated/microscope", "truncated/copilot", "clip"],
    "loss on held-out captions": ["eval_loss"],
    "gradient norm": ["grad_norm"],
}


def learning_rate_at(config, step, total):
    """The rate of optimizer step `step` (from 0) of `total`: a pure function, so there is no schedule to save."""
    warmup = round(config.warmup * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total - warmup, 1)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return config.learning_rate * shape[config.lr_schedule]


def evidence_dict(evidence):
    """Evidence as JSON takes it."""
    sets = {key: sorted(getattr(evidence, key)) for key in ("present", "unknown", "salient")}
    return {**sets, "seen": {name: list(times) for name, times in (evidence.seen or {}).items()}}


class GroupTrainer:
    """Trains `model`'s adapter against its adapter "reference".

    evidence: {video: Evidence or None}; prompts: entries to sample answers for, each with evidence; held_out: entries.
    """

    def __init__(self, *, config, run, accelerator, model, reference_hash, evidence, prompts, held_out):
        self.config, self.run, self.accelerator, self.model = config, run, accelerator, model
        self.reference_hash, self.evidence, self.prompts = reference_hash, evidence, prompts
        self.held_out = sorted(held_out, key=lambda entry: entry.mode)  # batches of like lengths
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.mine = config.per_device_batch_size * config.gradient_accumulation_steps  # prompts a step, this process
        self.total = config.max_steps or max(1, config.epochs * len(prompts) // (self.mine * self.world))
        self.limits = {"microscope": config.max_new_tokens_microscope, "copilot": config.max_new_tokens_copilot}
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, weight_decay=0.0, fused=model.device.type == "cuda")
        self.tokens = VisualTokens(model, run.folder / "visual_tokens", config.video_root, config.frame_cache)
        self.rollouts = run.folder / "rollouts.jsonl"
        self.failed_clips, self.dead_steps, self.saved = set(), 0, None

    # ---- the loop

    def fit(self, checkpoint=None):
        """All steps, from `checkpoint` if given (whose weights the model holds already)."""
        first = self.resume(checkpoint) if checkpoint else 0
        if self.run.main:
            kept = self.rollouts.read_text(encoding="utf-8").splitlines(True) if self.rollouts.is_file() else []
            kept = [line for line in kept if line.endswith("\n") and json.loads(line)["step"] <= first]
            self.rollouts.write_text("".join(kept), encoding="utf-8")
        self.run.say(f"{self.total} steps of {self.mine * self.world} prompts x {self.config.num_generations} answers")
        if not first:
            self.look(0)  # what there is to improve; and finds out now if anything in it fails
        began = time.perf_counter()
        for step in range(first + 1, self.total + 1):
            start = time.perf_counter()
            rollouts, records = self.roll_out(step)
            records = gather_object(records)
            live, totals = self.judge(records)
            rolled = time.perf_counter()
            batch = [(*rollouts[slot], *live[slot]) for slot in rollouts if slot in live]
            stats, problem = self.update(step, batch, totals)
            now = time.perf_counter()
            values = {**self.measure(records, live), **stats, "learning_rate": self.optimizer.param_groups[0]["lr"],
                      "rollout_seconds": rolled - start, "update_seconds": now - rolled,
                      "tokens_per_second": sum(r["tokens"] for r in records) / (now - start),
                      "memory_gb": memory_gb(self.model.device), "failed_clips": len(self.failed_clips),
                      "seconds_left": (now - began) / (step - first) * (self.total - step)}
            self.log(step, values, records)
            self.dead_steps = 0 if live else self.dead_steps + 1
            limit = self.config.max_dead_steps
            if limit is not None and self.dead_steps >= limit and not problem:
                problem = (f"in {limit} steps in a row no group's rewards differed: there is nothing to learn from "
                           "(are all answers alike? see rollouts.jsonl and the entropy; a higher temperature helps)")
            if problem:
                last = step - 1 if stats["updates"] == 0 and live else step
                self.save(last)
                raise TrainingError(f"step {step}: {problem}\nthe weights before that are in "
                                    f"{self.run.checkpoints / f'step-{last:06d}'}; --resume with this path and another "
                                    "--output_dir goes on from there with other settings")
            self.look(step)
            if step % self.config.save_every == 0 or step == self.total:
                self.save(step)

    # ---- rollouts and rewards

    @torch.no_grad()
    def roll_out(self, step):
        """Sample this process's prompts of the step and score every answer.

        Returns ({slot: (entry, Group, log-probs as sampled)}, records): a slot is a prompt's place in the step over all
        processes; records are what rollouts.jsonl and the curves are made of. A clip that cannot be read leaves its
        slot empty.
        """
        config, world = self.config, self.world
        asked = prompts_of_step(self.prompts, step - 1, self.mine * world, config.modes, config.seed)
        asked = dict(list(enumerate(asked))[self.rank * self.mine : (self.rank + 1) * self.mine])
        visual = self.read_clips(asked)
        slots = [slot for slot in asked if slot in visual]
        if not slots:
            return {}, []
        prompts = [self.prompt(asked[slot]) for slot in slots]
        seeds = [[stable_seed(config.seed, step, asked[slot].id, k) for k in range(config.num_generations)]
                 for slot in slots]
        answers = sample_groups(
            self.model, prompts, torch.stack([visual[slot] for slot in slots]), seeds,
            [self.limits[asked[slot].mode] for slot in slots], temperature=config.temperature,
            shared_prefix=config.shared_prefix,
        )
        rollouts, records = {}, []
        for slot, prompt, completions in zip(slots, prompts, answers, strict=True):
            group = Group(prompt, visual[slot], [c.ids for c in completions])
            rollouts[slot] = (asked[slot], group, [c.logps for c in completions])
            for k, completion in enumerate(completions):
                records.append({"step": step, "slot": slot, "k": k, **self.score(asked[slot], completion)})
        return rollouts, records

    def read_clips(self, asked):
        """{slot: visual tokens [N, D]} of the clips that can be read. All processes call this together."""
        visual, failed = {}, []
        for slot, entry in asked.items():
            try:
                visual[slot] = self.tokens(entry.video)
            except VideoError as error:
                failed.append(str(error))
        for error in sorted(set(gather_object(failed)) - self.failed_clips):
            self.failed_clips.add(error)
            self.run.say(f"skipped clip {len(self.failed_clips)} | {error}")
        clips = len({entry.video for entry in self.prompts})
        if len(self.failed_clips) > self.config.max_failed_share * clips:
            raise TrainingError(f"{len(self.failed_clips)} of {clips} clips cannot be read, more than max_failed_share "
                                f"{self.config.max_failed_share:.1%}; check_dataset.py lists all of them")
        return visual

    def prompt(self, entry):
        return encode_prompt(self.model.tokenizer, entry.question, self.model.num_visual_tokens)

    def score(self, entry, completion):
        """One line of rollouts.jsonl, but for its place in the step."""
        evidence = self.evidence[entry.video]
        parts = asdict(physics_aware_reward(completion.text, evidence, entry.mode, entry.captions[0]))
        mentions = [[mention.object, verdict, mention.start, mention.end]
                    for mention, verdict in judge_mentions(completion.text, evidence)]
        return {"id": entry.id, "video": entry.video, "mode": entry.mode, "text": completion.text,
                "tokens": len(completion.ids), "ended": completion.ended, "reward": parts.pop("total"), **parts,
                "mentions": mentions}

    def judge(self, records):
        """Advantages over the whole step's groups (all processes).

        Writes "advantage" into the records. Returns ({slot: (advantages [G], kept [G])} of the groups that can teach
        something, the step's totals that losses are divided by). A group whose rewards are all equal, or whose every
        answer was cut off and masked, is dead: it is not in any of these.
        """
        config, group = self.config, self.config.num_generations
        if not records:
            return {}, Counter()
        rewards = torch.tensor([r["reward"] for r in records], dtype=torch.float64).view(-1, group)  # [B, G]
        advantages = group_advantages(rewards, config.advantage_scale, config.std_floor)
        live, totals, passes = {}, Counter(), Counter()
        for row, varied in enumerate(has_variance(rewards).tolist()):
            own = records[row * group : (row + 1) * group]
            for record, advantage in zip(own, advantages[row].tolist(), strict=True):
                record["advantage"] = advantage
            kept = [record["ended"] or not config.mask_truncated for record in own]
            if varied and any(kept):
                slot = own[0]["slot"]
                live[slot] = (advantages[row].float(), torch.tensor(kept))
                totals["rows"] += group
                totals["tokens"] += sum(r["tokens"] for r, keep in zip(own, kept, strict=True) if keep)
                passes[slot // self.mine] += 1
        totals["passes"] = sum(math.ceil(count / config.per_device_batch_size) for count in passes.values())
        return live, totals

    # ---- the update

    def update(self, step, batch, totals):
        """`inner_epochs` updates on the step's live groups; batch: this process's, a tuple as in `backward` for each.

        Returns (numbers to log, None or why the run must stop): it stops before the update that would go wrong.
        """
        config, size = self.config, self.config.per_device_batch_size
        stats = {"updates": 0}
        if not totals["rows"]:
            return stats, None
        passes = [batch[i : i + size] for i in range(0, len(batch), size)]
        references, olds, sums = [None] * len(passes), [None] * len(passes), Counter()
        if config.beta > 0:
            with torch.no_grad(), reference(self.model):
                references = [self.logps(groups)[0] for groups in passes]
        for _ in range(config.inner_epochs):
            self.optimizer.zero_grad(set_to_none=True)
            losses = []
            for i, groups in enumerate(passes):
                loss, olds[i] = self.backward(groups, olds[i], references[i], totals, sums)
                losses.append(loss)
            stats["loss"] = self.sum_gradients(sum(losses))
            stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.trained, config.max_grad_norm).item()
            summed = self.sum_over_ranks([sums[key] for key in SUMS])
            stats |= {key: value / summed[0] for key, value in zip(SUMS[1:], summed[1:], strict=True)}
            if not math.isfinite(stats["loss"]) or not math.isfinite(stats["grad_norm"]):
                bad = [groups for groups, loss in zip(passes, losses, strict=True) if not math.isfinite(loss)]
                names = gather_object([entry.id for groups in bad or passes for entry, *_ in groups])
                return stats, f"loss {stats['loss']}, gradient norm {stats['grad_norm']}, on {', '.join(names)}"
            if config.max_kl is not None and stats["kl"] > config.max_kl:
                return stats, (f"the KL to stage 2 is {stats['kl']:.3g} nats a token, above max_kl {config.max_kl:g}: "
                               "the policy drifts away (a lower learning_rate or a higher beta holds it)")
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = learning_rate_at(config, step - 1, self.total)
            self.optimizer.step()
            stats["updates"] += 1
        return stats, None

    def logps(self, batch):
        groups = [group for _, group, *_ in batch]
        config = self.config
        return completion_logps(
            self.model, groups, temperature=config.temperature, shared_prefix=config.shared_prefix
        )

    def backward(self, batch, old, ref, totals, sums):
        """One pass: gradients of its share of the step's loss are added up in the parameters, statistics in `sums`.

        batch: [(entry, Group, log-probs as sampled, advantages [G], kept [G])]; old: log-probs before the first update
        (None: this is it). Returns (the share of the loss, old).
        """
        config = self.config
        logps, entropy, mask = self.logps(batch)  # [N, T]
        advantages = torch.cat([item[3] for item in batch]).to(logps.device)
        kept = torch.cat([item[4] for item in batch]).to(logps.device)
        if old is None:
            sampled = torch.tensor([x for item in batch for row in item[2] for x in row], device=logps.device)
            gap = torch.zeros_like(logps).masked_scatter(mask, (logps.detach()[mask] - sampled).abs())
        mask = mask & kept[:, None]
        loss, stats = grpo_loss(
            logps, advantages, mask, old_logps=old, ref_logps=ref, beta=config.beta, epsilon=config.epsilon,
            epsilon_high=config.epsilon_high, loss_type=config.loss_type, kl=config.kl,
            max_completion_tokens=max(self.limits.values()), num_items=totals["tokens"],
        )
        loss = loss * loss_share(config.loss_type, len(logps), totals["rows"], totals["passes"])
        loss.backward()
        sums["tokens"] += stats["tokens"].item()
        for key in ("kl", "clip", "clip_low", "clip_high"):
            sums[key] += (stats[key] * stats["tokens"]).item()
        sums["entropy"] += entropy[mask].sum().item()
        if old is None:
            sums["sampler_gap"] += gap[mask].sum().item() * config.inner_epochs  # measured once, divided by all
        return loss.item(), logps.detach() if old is None else old

    def sum_over_ranks(self, numbers):
        """Sums of each number over all processes."""
        total = torch.tensor(numbers, dtype=torch.float64, device=self.model.device)
        return (self.accelerator.reduce(total) if self.world > 1 else total).tolist()

    def sum_gradients(self, loss):
        """Add up all processes' gradients, in place, and their losses, which are returned."""
        if self.world == 1:
            return loss
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        flat = torch.cat([g.flatten() for g in grads] + [grads[0].new_tensor([loss])])
        flat = self.accelerator.reduce(flat)
        for parameter, grad in zip(self.trained, flat[:-1].split([p.numel() for p in self.trained]), strict=True):
            parameter.grad = grad.view_as(parameter)
        return flat[-1].item()

    # ---- logs

    def measure(self, records, live):
        """What a step's answers are like: {tag: number}, rewards and lengths by mode."""
        group = self.config.num_generations
        rewards = torch.tensor([r["reward"] for r in records], dtype=torch.float64).view(-1, group)
        values = {"prompts": len(rewards)}
        if records:
            values |= {"reward": rewards.mean().item(), "reward_std": rewards.std(1).mean().item(),
                       "dead_groups": 1 - len(live) / len(rewards)}
        for mode in MODES:
            own = [r for r in records if r["mode"] == mode]
            if not own:
                continue
            columns = {"reward": [r["reward"] for r in own], **{part: [r[part] for r in own] for part in PARTS},
                       "length": [r["tokens"] for r in own], "truncated": [not r["ended"] for r in own]}
            values |= {f"{name}/{mode}": sum(column) / len(own) for name, column in columns.items()}
        return values

    def log(self, step, values, records):
        """metrics.jsonl, TensorBoard and the log line; rollouts.jsonl."""

        def show(form, key):
            return form.format(values[key]) if key in values else "-"

        by_mode = ", ".join(f"{mode[:3]} {show('{:.3f}', f'reward/{mode}')}" for mode in MODES)
        lengths = "/".join(show("{:.0f}", f"length/{mode}") for mode in MODES)
        self.run.log(step, values, line=(
            f"step {step:>{len(str(self.total))}}/{self.total} | reward {show('{:.3f}', 'reward')} ({by_mode}) | "
            f"std {show('{:.3f}', 'reward_std')} | dead {show('{:.0%}', 'dead_groups')} | kl {show('{:.4f}', 'kl')} | "
            f"entropy {show('{:.2f}', 'entropy')} | tokens {lengths} | grad {show('{:.2f}', 'grad_norm')} | "
            f"lr {values['learning_rate']:.1e} | {values['tokens_per_second']:,.0f} tok/s | "
            f"{values['memory_gb']:.1f} GB | {clock(values['seconds_left'])} left"))
        if self.run.main:
            with open(self.rollouts, "a", encoding="utf-8") as file:
                for record in records:
                    evidence = evidence_dict(self.evidence[record["video"]])
                    file.write(json.dumps({**record, "evidence": evidence}, ensure_ascii=False) + "\n")

    # ---- held-out clips

    def look(self, step):
        """Loss and reward on the held-out clips and answers about three of them, each when it is due."""
        last = step == self.total
        if self.held_out and (last or step % self.config.eval_every == 0):
            self.evaluate(step)
        if self.held_out and self.run.main and (last or step % self.config.sample_every == 0):
            self.show_answers(step)
        if last or step and step % self.config.save_every == 0:
            self.run.curves(PANELS)

    @torch.no_grad()
    def evaluate(self, step):
        """Loss of the held-out captions and reward of greedy answers, by mode, shared out between the processes."""
        sums, size = Counter(), self.config.eval_batch_size
        mine = self.held_out[self.rank :: self.world]
        for batch in (mine[i : i + size] for i in range(0, len(mine), size)):
            read = [(entry, tokens) for entry in batch if (tokens := self.try_clip(entry)) is not None]
            if not read:
                continue
            groups = [Group(*self.example(entry, tokens)) for entry, tokens in read]
            logps, _, mask = completion_logps(self.model, groups, shared_prefix=False)
            answers = sample_groups(
                self.model, [g.prompt for g in groups], torch.stack([g.visual for g in groups]), [[0]] * len(groups),
                [self.limits[entry.mode] for entry, _ in read], temperature=0.0, shared_prefix=False,
            )
            for row, ((entry, _), (answer,)) in enumerate(zip(read, answers, strict=True)):
                sums["nats", entry.mode] -= logps[row].sum().item()
                sums["tokens", entry.mode] += mask[row].sum().item()
                if self.evidence[entry.video]:
                    sums["reward", entry.mode] += self.score(entry, answer)["reward"]
                    sums["answers", entry.mode] += 1
        keys = [(what, mode) for what in ("nats", "tokens", "reward", "answers") for mode in MODES]
        sums = dict(zip(keys, self.sum_over_ranks([sums[key] for key in keys]), strict=True))
        values = {}
        tokens = sum(sums["tokens", mode] for mode in MODES)
        if tokens:
            values["eval_loss"] = sum(sums["nats", mode] for mode in MODES) / tokens
        for mode in MODES:
            if sums["tokens", mode]:
                values[f"eval_loss_{mode}"] = sums["nats", mode] / sums["tokens", mode]
            if sums["answers", mode]:
                values[f"eval_reward_{mode}"] = sums["reward", mode] / sums["answers", mode]
        shown = ", ".join(f"{key.removeprefix('eval_').replace('_', ' ')} {value:.3f}" for key, value in values.items())
        self.run.log(step, values, line=f"held-out after step {step} | {shown}")

    def try_clip(self, entry):
        """Visual tokens of a held-out clip, None where it cannot be read."""
        try:
            return self.tokens(entry.video)
        except VideoError as error:
            self.run.say(f"skipped held-out clip | {error}")
            return None

    def example(self, entry, tokens):
        """(prompt ids, visual tokens, [caption's ids]) of an entry with its first caption."""
        example = encode_example(self.model.tokenizer, entry.question, entry.captions[0], self.model.num_visual_tokens,
                                 self.config.max_text_tokens)
        answer = [label for label in example["labels"] if label != IGNORE_INDEX]
        return example["input_ids"][: -len(answer)], tokens, [answer]

    def show_answers(self, step):
        """Greedy answers about the first three held-out clips that can be read, in both modes."""
        clips = {}
        for entry in self.held_out:
            if entry.video not in clips and len(clips) < 3 and (tokens := self.try_clip(entry)) is not None:
                clips[entry.video] = tokens
        asked = [(video, mode) for video in clips for mode in MODES]
        answers = self.model.generate(
            None, [MODES[mode] for _, mode in asked], max_new_tokens=self.config.sample_tokens,
            visual=torch.stack([clips[video] for video, _ in asked]),
        )
        lines = [f"what the model says after step {step}"]
        for (video, mode), answer in zip(asked, answers, strict=True):
            text = answer.text if answer.ended else answer.text + " [cut off]"
            self.run.text(f"answers/{mode}/{video}", step, text, show=False)
            lines.append(f"  {video} | {mode:10} | {text}")
        self.run.say("\n".join(lines))

    # ---- checkpoints

    def save(self, step):
        """checkpoints/step-000010/: model/, optimizer.pt, run.json; complete or not there."""
        if self.saved == step:
            return
        with self.run.checkpoint(
            step, self.config.keep_checkpoints, barrier=self.accelerator.wait_for_everyone,
            init_from=str(self.config.init_from), reference_sha256=self.reference_hash,
            failed_clips=sorted(self.failed_clips), dead_steps=self.dead_steps,
        ) as folder:
            if self.run.main:
                self.model.save_checkpoint(folder / "model", stage=3)
                torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        self.saved = step

    def resume(self, checkpoint):
        """Take up optimizer and counters from a checkpoint; refuse another reference. Returns its step."""
        state = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
        if state["reference_sha256"] != self.reference_hash:
            fail([f"init_from: {checkpoint} was trained against the adapter of {state['init_from']} "
                  f"(sha256 {state['reference_sha256'][:12]}), {self.config.init_from} holds another "
                  f"({self.reference_hash[:12]}): the KL would pull elsewhere"])
        optimizer = torch.load(checkpoint / "optimizer.pt", map_location=self.model.device, weights_only=True)
        self.optimizer.load_state_dict(optimizer)
        self.failed_clips, self.dead_steps = set(state["failed_clips"]), state["dead_steps"]
        self.saved = int(checkpoint.name.removeprefix("step-"))
        return self.saved
