"""What the phases of a stage take: the project's own model and loss code, run once on tensors without content.

    phases_of          {phase: its peak, FLOPs and bytes read} of a configuration
    build              a stage's DriveVLM of fake parameters (torch's FakeTensorMode), or of random ones
    Ledger             follows the storages that are alive: memory, on fake tensors as on real ones

Numbers that index (ids, labels, masks, positions) are real, so whatever the code decides by them is decided as in
training; all else is fake.
"""

import contextlib
import copy
import dataclasses
import math
import weakref
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, Qwen3Config, SiglipVisionConfig

from bench.sizes import LANGUAGE_MODELS, TOWERS
from dataset import IGNORE_INDEX, MODE_TABLE, MODES, Entry, collate, encode_prompt, pack_examples
from model import DTYPES, DriveVLM, VisionTower, head_logits, read_checkpoint
from stage3.grpo import SUMS, Group, needs_reference, policy_logps, reference_policy, training_pass
from stage3.rollout import (
    Completion,
    GroupDecoder,
    Rollout,
    StepTotals,
    answer_limits,
    only_counted,
    sample_tokens,
)
from training import loop
from training.common import ROOT, fail
from training.config import Stage1Config, Stage2Config

GIB = 2**30
CLIP_SECONDS = 40.0  # BDD100K's
aten = torch.ops.aten
# operations that allocate by the shape of what they are given, or that look up single rows of it
NOT_READ = {"embedding", "empty_like", "new_empty", "new_zeros", "zeros_like", "ones_like", "full_like"}


# ---------------------------------------------------------------------------------------------------------------------
# Tensors without content, and what they would take


class Ledger(TorchDispatchMode):
    """Follows every storage that an operation makes until nothing holds it: bytes alive `now`, their `peak`, the bytes
    that operations `read`, and their number, `calls`. Works on real tensors as on fake ones."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak, self.read, self.calls = {}, 0, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(args[0] if args else None, FakeTensor):
            if func is aten._local_scalar_dense.default:  # .item() of a number that nobody knows
                return 1.0 if args[0].is_floating_point() else 1
            if func is aten.index.Tensor:
                args = (args[0], rows_instead_of_masks(args[1]))
        out = func(*args, **kwargs)
        self.calls += func.namespace == "aten"  # not what fake tensors are asked for their device
        writes = func._schema.is_mutable
        for tensor in tree_leaves(out):
            writes |= isinstance(tensor, torch.Tensor) and self.add(tensor)
        if writes and str(func).split(".")[1] not in NOT_READ:
            self.read += sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
                             for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        return out

    def add(self, tensor):
        """Count a tensor's storage; False where it is counted already (a view)."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.alive:
            return False
        self.alive[key] = weakref.ref(storage, lambda _: self.free(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)
        return True

    def free(self, key, size):
        del self.alive[key]
        self.now -= size


def rows_instead_of_masks(indices):
    """A mask picks a number of rows that a fake tensor's operation cannot know; masks are real here, so we do."""
    found = []
    for index in indices:
        found += index.nonzero().unbind(1) if index is not None and index.dtype == torch.bool else [index]
    return found


@contextlib.contextmanager
def as_on_gpu():
    """Fake tensors are on the CPU, as autograd takes no fake GPU tensors without a driver. The head's products and
    dropout, which allocate other things on a GPU, do here what they do there."""

    def dropout(x, p=0.5, training=True, inplace=False):
        return torch.native_dropout(x, p, True)[0] if training and p > 0 else x

    with mock.patch.object(FakeTensor, "is_cuda", True), mock.patch("torch.nn.functional.dropout", dropout):
        yield


def fill(model, fake):
    """Give a model on the meta device fake parameters, or real random ones; shared ones stay shared. Numbers that index
    (buffers of integers) are real in both cases."""
    made, mode = {}, FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and id(old) not in made:
                    made[id(old)] = old, new_tensor(old, mode if fake else None)
                tensors[name] = None if old is None else made[id(old)][1]
    model.fake_mode = mode if fake else None
    return model


def new_tensor(old, mode):
    if not old.is_floating_point():
        return torch.zeros(old.shape, dtype=old.dtype)
    if mode is None:
        new = torch.randn(old.shape, dtype=old.dtype) * 0.02
    else:
        with mode:
            new = torch.empty(old.shape, dtype=old.dtype)
    return torch.nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, torch.nn.Parameter) else new


# ---------------------------------------------------------------------------------------------------------------------
# The model


def read_bases(config):
    """(vision config, LM config, tokenizer) from bench/sizes.py or from this machine; ConfigError for neither."""
    problems, found = [], {}
    for key, table, cls, load in (
            ("vision_model", TOWERS, SiglipVisionConfig, VisionTower.load_config),
            ("language_model", LANGUAGE_MODELS, Qwen3Config, AutoConfig.from_pretrained)):
        name = getattr(config, key)
        try:
            found[key] = cls(**table[name]) if name in table else load(name, local_files_only=True)
        except (OSError, ValueError) as error:
            problems.append(f"{key}: {name} is none of {', '.join(table)}, and its config.json cannot be read here "
                            f"({str(error).strip().splitlines()[0]}): give a folder that holds config.json")
    if problems:
        fail(problems, title="nothing was planned")
    own = Path(config.language_model, "tokenizer_config.json").is_file()  # else any tokenizer: prompts are short
    tokenizer = AutoTokenizer.from_pretrained(config.language_model if own else ROOT / "demo/base/language")
    return found["vision_model"], found["language_model"], tokenizer


def build(config, stage, bases, fake=True):
    """The stage's DriveVLM as its script builds it, of fake or random parameters."""
    vision_config, llm_config, tokenizer = bases
    vision_config, llm_config = copy.deepcopy(vision_config), copy.deepcopy(llm_config)
    dtype = DTYPES[config.dtype]
    inherited = {"pooling": Stage1Config.pooling, "lora": {"r": Stage2Config.lora_r}}
    if config.init_from and Path(config.init_from).is_dir():  # the stage before has decided these
        inherited |= read_checkpoint(config.init_from)[1]
    with torch.device("meta"):
        vision = VisionTower(AutoModel.from_config(vision_config, dtype=dtype))
        llm = AutoModelForCausalLM.from_config(llm_config, dtype=dtype)
        model = DriveVLM(vision, llm, tokenizer, num_frames=config.num_frames, dtype=config.dtype, seed=0, base={},
                         pooling=getattr(config, "pooling", inherited["pooling"]), time_stamps=config.time_stamps)
        if stage > 1:
            rank = getattr(config, "lora_r", (inherited["lora"] or {}).get("r"))
            model.add_lora(rank, 2 * rank, getattr(config, "lora_dropout", 0.0), seed=0)
        if stage == 3:
            model.llm.add_adapter("reference", model.llm.peft_config["default"])
    fill(model, fake)
    if stage == 3:
        with reference_policy(model):  # leaves the reference frozen
            pass
    model.set_trainable(*{1: ("projector", "temporal"), 2: ("lora", "projector"), 3: ("lora",)}[stage])
    model.activation_checkpointing(config.activation_checkpointing)
    return model


def made_up(model, shape, dtype):
    """A tensor as the model's parameters are: fake or real."""
    if model.fake_mode is None:
        return torch.zeros(shape, dtype=dtype)
    with model.fake_mode:
        return torch.empty(shape, dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The phases of a stage


@dataclasses.dataclass
class Phase:
    """peak: bytes on the card; flops, bytes read, calls of torch's operations: of one optimizer step (of one batch,
    where `in_step` is false)."""

    peak: float = 0
    flops: float = 0
    read: float = 0
    calls: float = 0
    in_step: bool = True


class Meter:
    """Runs phases. With `flops`, FLOPs are counted instead of memory: torch's counter keeps tensors alive. `gpu`: as on
    one; else as on this CPU."""

    def __init__(self, model, flops=False, gpu=True):
        self.model, self.flops, self.gpu, self.phases, self.ledger = model, flops, gpu, {}, Ledger()
        for tensor in (*model.parameters(), *model.buffers()):
            self.ledger.add(tensor)
        self.phases["load"] = Phase(peak=self.ledger.now, in_step=False)

    def run(self, name, function, times=1, in_step=True):
        """function(), which the optimizer step does `times` times."""
        ledger, counter = self.ledger, FlopCounterMode(display=False)
        ledger.peak, read, calls = ledger.now, ledger.read, ledger.calls
        with as_on_gpu() if self.gpu else contextlib.nullcontext():
            with counter if self.flops else contextlib.nullcontext(), ledger:
                result = function()
        phase = self.phases.setdefault(name, Phase(in_step=in_step))
        phase.peak = max(phase.peak, ledger.peak)
        phase.flops += times * (counter.get_total_flops() if self.flops else 0)
        phase.read += times * (ledger.read - read)
        phase.calls += times * (ledger.calls - calls)
        return result


class Optimizer:
    """The stage's optimizer with its states, as from the second step on, and what follows the backward pass."""

    def __init__(self, config, meter):
        self.trained = [parameter for parameter in meter.model.parameters() if parameter.requires_grad]
        self.optimizer = loop.make_optimizer(meter.model, dict.fromkeys(meter.model.trained_groups, 1e-4), 0.01)
        self.max_grad_norm = config.max_grad_norm
        for group in self.optimizer.param_groups:
            group["fused"] = meter.gpu  # as make_optimizer chooses by the device
        with meter.ledger:
            self.make_gradients()
            self.optimizer.step()
        self.clear()

    def make_gradients(self):
        """As after the first of several passes."""
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)

    def clear(self):
        self.optimizer.zero_grad(set_to_none=True)

    def step(self):
        torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm).item()
        self.optimizer.step()


def prompt_of(model, mode):
    """A mode's prompt; where prompts hold the frames' times, that of a clip of CLIP_SECONDS."""
    seconds = [CLIP_SECONDS * t / model.num_frames for t in range(1, model.num_frames + 1)]
    return model.prompt_ids(MODES[mode], seconds if model.time_stamps else None)


def supervised_batch(config, model, answers):
    """A batch of stages 1 and 2 with answers of so many tokens {mode: n}: rows of the longest answer, or of a clip with
    all answers behind it. All rows but the first are a token shorter, so there is padding."""
    word, rows = model.tokenizer.encode("a", add_special_tokens=False)[0], []
    for row in range(config.per_device_batch_size):
        examples = []
        for mode, tokens in answers.items():
            prompt = prompt_of(model, mode)
            room = config.max_text_tokens - len(encode_prompt(model.tokenizer, MODES[mode], 0))
            answer = [word] * (min(tokens, room) - (row > 0))
            examples.append({"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer})
        longest = max(examples, key=lambda example: len(example["labels"]))
        rows.append(pack_examples(examples, model.placeholder_id) if config.shared_prefix else longest)
        if config.tower_cache:
            seen = {"features": made_up(model, model.feature_shape, model.dtype)}
        else:
            size = model.image_size
            seen = {"frames": made_up(model, (model.num_frames, size, size, 3), torch.uint8)}
        rows[-1] = {"id": str(row), **seen, **rows[-1]}
    return collate(rows, model.pad_token_id)


def run_supervised(meter, config, answers):
    """Stages 1 and 2: a step, the loss on held-out clips, sample answers (three clips in each mode)."""
    model, batch = meter.model, supervised_batch(config, meter.model, answers)
    optimizer = Optimizer(config, meter)
    if config.tower_cache:
        meter.ledger.add(batch["features"])

    def pass_of_step():
        model(**batch, num_items_in_batch=1.0)["loss"].backward()

    if config.gradient_accumulation_steps > 1:
        with meter.ledger:
            optimizer.make_gradients()
    meter.run("forward and backward", pass_of_step, times=config.gradient_accumulation_steps)
    meter.run("optimizer", optimizer.step)
    optimizer.clear()
    model.eval()
    with torch.no_grad():
        meter.run("evaluation: loss", lambda: model(**batch)["loss"].item(), in_step=False)
    model.train()
    decode(meter, "sample answers", ["microscope"] * 3 * len(MODES), 1, False, config.sample_tokens)


def decode(meter, name, modes, group, shared_prefix, tokens, in_step=False):
    """The prompts' prefill and one of `tokens` decoding steps, `group` answers to a prompt; as `sample_groups` in
    stage3/rollout.py, and near what `generate` does, but for what is decided by the tokens sampled."""
    model = meter.model
    prompts = [prompt_of(model, mode) for mode in modes]
    visual = made_up(model, (len(prompts), model.num_visual_tokens, model.head_weight.shape[1]), model.dtype)
    meter.ledger.add(visual)

    def next_token(decoder):
        hidden = decoder.hidden.flatten(0, 1)  # [n, D]
        with torch.autocast(hidden.device.type, enabled=False):
            logits = head_logits(hidden, model.head_weight, 1.0, model.banned_ids)  # [n, V]
        sample_tokens(logits, torch.zeros(len(hidden)))
        decoder.append(torch.zeros_like(decoder.slots))

    with torch.no_grad(), model.decoding(), model.autocast():
        decoder = meter.run(f"{name}: prefill", lambda: GroupDecoder(model, prompts, visual, group, shared_prefix),
                            in_step=in_step)
        steps = tokens // 2 if meter.flops else tokens - 2  # the middle one stands for all, the last takes most memory
        meter.run(f"{name}: decoding", lambda: lengthen(decoder, steps), times=0, in_step=in_step)
        meter.run(f"{name}: decoding", lambda: next_token(decoder), times=tokens - 1, in_step=in_step)


def lengthen(decoder, tokens):
    """Make the cache as long as after so many more decoding steps."""
    more = decoder.slots.repeat(1, tokens)  # [R, W * tokens]
    for layer in decoder.cache.layers:
        for name in ("keys", "values"):
            old = getattr(layer, name)  # [R, heads, K, head size]
            rows, heads, length, size = old.shape
            setattr(layer, name, old.new_empty(rows, heads, length + more.shape[1], size))
    decoder.owner = torch.cat([decoder.owner, more], dim=1)
    decoder.position = decoder.position + tokens


def rollout_of(config, model, mode, answer_tokens, slot):
    """A prompt with answers of one length, as a step's sampling leaves it."""
    prompt = prompt_of(model, mode)
    word = model.tokenizer.encode("a", add_special_tokens=False)[0]
    ids = [word] * (answer_tokens - 1) + [model.end_ids[0]]
    group = config.num_generations
    visual = made_up(model, (model.num_visual_tokens, model.head_weight.shape[1]), model.dtype)
    counted = {"grpo": group, "raft": 1, "dpo": 2}[config.objective]
    return Rollout(slot, Entry(f"clip#{mode}", "clip", mode, MODES[mode], ("",)), Group(prompt, visual, [ids] * group),
                   [Completion(ids, True, "", [0.0] * len(ids)) for _ in range(group)],
                   [{"reward": -float(k)} for k in range(group)], torch.linspace(-1, 1, group),
                   torch.arange(group) < counted)


def run_stage3(meter, config, answers):
    """Stage 3: sampling, log-probs under stage 2, update, evaluation; answers {mode: tokens} are learnt from."""
    model, limits = meter.model, answer_limits(config)
    optimizer = Optimizer(config, meter)
    count = config.per_device_batch_size * config.gradient_accumulation_steps
    longest = max(config.modes, key=limits.get)
    most, asked = limits[longest], count
    if meter.flops:  # a step's prompts of the longest mode, with usual answers; the others have left by then
        most, asked = answers[longest], math.ceil(count * config.modes.count(longest) / len(config.modes))
    # for memory, all are of one mode, as they are where usual language is measured (stage3/language.py)
    decode(meter, "sampling", [longest] * asked, config.num_generations, config.shared_prefix, most, True)
    for mode, tokens in answers.items():
        batch = [rollout_of(config, model, mode, tokens, slot) for slot in range(config.per_device_batch_size)]
        share = config.gradient_accumulation_steps * config.modes.count(mode) / len(config.modes)
        if config.gradient_accumulation_steps > 1:
            with meter.ledger:
                optimizer.make_gradients()
        learn(meter, config, batch, share)
    meter.run("optimizer", optimizer.step)
    optimizer.clear()
    decode(meter, "evaluation", [longest] * config.eval_batch_size, 1, False, limits[longest])


def learn(meter, config, batch, times):
    """Log-probs of a pass's rollouts under stage 2, and the pass that learns from them."""
    model, mode, sums = meter.model, batch[0].entry.mode, dict.fromkeys(SUMS, 0.0)

    def score():
        with torch.no_grad(), reference_policy(model):
            return policy_logps(config, model, batch)[0].split(config.num_generations)

    if needs_reference(config) or config.judge_language:
        batch = [dataclasses.replace(rollout, ref_logps=logps)
                 for rollout, logps in zip(batch, meter.run("log-probs of stage 2", score, times), strict=True)]
    if config.objective != "grpo":
        batch = [only_counted(rollout) for rollout in batch]
    rows = sum(len(rollout.completions) for rollout in batch)
    totals = StepTotals(len(batch), *(Counter({mode: n}) for n in (rows, rows, 1)), {mode: 1.0})
    meter.run("update: forward and backward",
              lambda: training_pass(config, model, batch, answer_limits(config), None, totals, sums), times)


def phases_of(config, stage, bases, answers, flops=False, fake=True, gpu=True):
    """{phase: Phase} of a stage with answers of so many tokens {mode: n}; `bases` as `read_bases` gives."""
    meter = Meter(build(config, stage, bases, fake), flops, gpu)
    (run_stage3 if stage == 3 else run_supervised)(meter, config, answers)
    return meter.phases


def longest_answers(config, stage):
    """{mode: tokens} of the longest answers that a training pass may hold."""
    if stage < 3:
        return {mode: min(config.max_text_tokens, info.max_new_tokens) for mode, info in MODE_TABLE.items()}
    limits = answer_limits(config)
    longest = max(config.modes, key=limits.get)
    return {longest: limits[longest]}


def peak_of(phases):
    return max(phase.peak for phase in phases.values())
