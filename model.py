"""Drive-VLM: a frozen SigLIP-style tower, an MLP projector with pooling, and a causal LM that reads the clip.

    frames [B,T,S,S,3] uint8 -> tower -> [B,T,729,Dv] + temporal embedding [T,Dv]
      -> 3x3 space-to-depth [B,T,81,9*Dv] -> Linear -> GELU -> Linear -> [B,T*81,D]
      -> replaces the placeholder tokens in the prompt -> LM

Any `SiglipVisionModel` and any `AutoModelForCausalLM` with a chat template works: sizes come from their configs.
Precision: base weights have `dtype`; the projector, the temporal embedding and LoRA are float32 and run under autocast
when `dtype` is bfloat16. They stay float32 where a stage freezes them, so that saving them again changes no bit.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, SiglipVisionConfig
from transformers.utils import logging as hf_logging

from dataset import IGNORE_INDEX, MODES, NOBODY, PREFIX, add_times, chat_pieces, encode_prompt, placeholder_id
from training.common import DriveVLMError, git_commit, process_rank

GROUPS = ("projector", "temporal", "lora", "vision", "llm")  # groups of parameters that a stage trains or freezes
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FRAMES_PER_PASS = 64  # frames that go through the tower at once; bounds its memory


class ModelError(DriveVLMError, ValueError):
    """Base models, a checkpoint or inputs that do not fit; the message lists every problem found."""


@dataclass(frozen=True)
class Answer:
    """One generated answer: `ids` as generated, with the end token; `text` without it; `ended`: by an end token."""

    text: str
    ids: list[int]
    ended: bool


def raise_problems(title, problems):
    """Raise one ModelError for a list of problems, if there are any."""
    if len(problems) == 1:
        raise ModelError(f"{title}: {problems[0]}")
    if problems:
        raise ModelError(f"{title}:" + "".join(f"\n  - {problem}" for problem in problems))


def choose_dtype(cuda: bool, cpu_flags: set[str], aten_capability: str | None = None) -> tuple[str, str]:
    """(number type, why) that `dtype: auto` means on a machine.

    cpu_flags: features as /proc/cpuinfo lists them; without native support, bfloat16 matrix products on a CPU are far
    slower than float32. aten_capability: torch's environment variable ATEN_CPU_CAPABILITY, which hides features, such
    as "avx2".
    """
    if cuda:
        return "bfloat16", "CUDA"
    native = sorted(cpu_flags & {"avx512_bf16", "amx_bf16", "bf16"})  # the last one is Arm's
    if native and aten_capability in (None, "", "avx512", "amx"):
        return "bfloat16", f"this CPU has {native[0]}"
    return "float32", "this CPU has no native bfloat16, so that float32 is faster"


def resolve_dtype(dtype: str) -> str:
    """The number type itself for `auto`, said on stderr with its reason; any other is returned as it is."""
    if dtype != "auto":
        return dtype
    info = Path("/proc/cpuinfo")
    words = set(info.read_text(encoding="utf-8").split()) if info.is_file() else set()
    dtype, reason = choose_dtype(torch.cuda.is_available(), words, os.environ.get("ATEN_CPU_CAPABILITY"))
    if process_rank()[0] == 0:
        print(f"dtype: {dtype} (auto: {reason})", file=sys.stderr, flush=True)
    return dtype


@contextmanager
def seeded(seed, device="cpu"):
    """Random numbers from `seed` on the CPU and on `device`; restores the generators afterwards."""
    cuda = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Log-probabilities of chosen tokens, without holding [tokens, vocabulary] logits


def head_logits(hidden, head, temperature, banned):
    """Logits [n, V] in float32 of hidden [n, D] and head [V, D]; bfloat16 products are summed and kept in float32."""
    if hidden.is_cuda and head.dtype != torch.float32:
        logits = torch.mm(hidden.to(head.dtype), head.T, out_dtype=torch.float32)
    else:
        logits = torch.mm(hidden.float(), head.float().T)
    if temperature != 1.0:
        logits.div_(temperature)
    if banned is not None:
        logits.index_fill_(1, banned, float("-inf"))
    return logits


class _TokenLogps(torch.autograd.Function):
    """Computes logits chunk by chunk, and again in the backward pass; the head gets no gradient."""

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, banned, chunk):
        logps, entropy, lse = (torch.empty(len(hidden), device=hidden.device) for _ in range(3))  # float32 [N]
        with torch.autocast(hidden.device.type, enabled=False):
            wide = head if hidden.is_cuda else head.float()
            for i in range(0, len(hidden), chunk):
                part = slice(i, i + chunk)
                logits = head_logits(hidden[part], wide, temperature, banned)  # [n, V]
                lse[part] = logits.logsumexp(-1)
                logits.sub_(lse[part, None])  # now log-probabilities
                logps[part] = logits.gather(1, targets[part, None])[:, 0]
                probs = logits.exp()
                if banned is not None:
                    logits.index_fill_(1, banned, 0.0)  # 0 * -inf would be NaN
                entropy[part] = -torch.linalg.vecdot(probs, logits)
        ctx.save_for_backward(hidden, head, targets, lse, banned)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, head, targets, lse, banned = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            wide = head if hidden.is_cuda else head.float()
            for i in range(0, len(hidden), ctx.chunk):
                part = slice(i, i + ctx.chunk)
                slope = head_logits(hidden[part], wide, ctx.temperature, banned)
                slope.sub_(lse[part, None]).exp_().neg_()  # d logp / d logits = onehot - softmax
                slope.scatter_add_(1, targets[part, None], torch.ones_like(lse[part, None]))
                slope.mul_(grad[part, None] / ctx.temperature)
                if banned is not None:
                    slope.index_fill_(1, banned, 0.0)
                grad_hidden[part] = torch.mm(slope.to(wide.dtype), wide).to(hidden.dtype)
        return grad_hidden, None, None, None, None, None


def token_logps(hidden, head_weight, targets, *, temperature=1.0, banned=None, chunk=256):
    """Log-probability of `targets` [N] under softmax(hidden @ head_weight.T / temperature) with `banned` ids at -inf.

    hidden [N, D], head_weight [V, D], targets [N] int64, banned [K] int64 or None. Returns (logps [N], entropy [N]) in
    float32, in nats; gradients flow from logps to hidden alone. At most [chunk, V] logits exist at any time.
    """
    if banned is not None and len(banned) == 0:
        banned = None
    return _TokenLogps.apply(hidden, head_weight.detach(), targets, float(temperature), banned, int(chunk))


# ----------------------------------------------------------------------------------------------------------------------
# The shared prefix: several texts in one row, behind one clip. Every position has an owner (PREFIX, the text's number,
# or NOBODY in the padding), and attends to earlier positions of the prefix and of its own text.


SPLIT_ATTENTION = "drivevlm_split"  # transformers' name for `split_attention`


def check_shared_prefix(llm):
    """ModelError where the LM's attention would ignore our own mask: set `shared_prefix: false` there."""
    attention = llm.config._attn_implementation
    layers = set(getattr(llm.config, "layer_types", None) or ["full_attention"])
    if attention not in ("sdpa", "eager", SPLIT_ATTENTION) or layers != {"full_attention"}:
        raise ModelError(
            f"shared_prefix needs sdpa or eager attention in full layers; {type(llm).__name__} has {attention} in "
            f"{', '.join(sorted(layers))} layers: set shared_prefix to false"
        )


def split_attention(module, query, key, value, attention_mask, **options):
    """transformers' sdpa attention, in two parts where `attention_mask` [R, 1, S, K] has fewer rows than there are
    queries [R, H, L, d]: it is then that of the last S, and the queries before them attend causally among themselves.

    So the clip is not compared with all that stands behind it, as under a mask [R, 1, L, L], whose result would be
    thrown away; and its part may use a kernel that takes no mask.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward  # brings torch's compiler with it

    n = 0 if attention_mask is None else query.shape[2] - attention_mask.shape[2]
    if n == 0 and attention_mask is not None and key.shape[1] < query.shape[1] and query.shape[2] < key.shape[2]:
        return decoding_attention(query, key, value, attention_mask, options.get("scaling")), None
    if n == 0:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    first, _ = sdpa_attention_forward(module, query[:, :, :n], key[:, :, :n], value[:, :, :n], None,
                                      **options | {"is_causal": True})
    last, _ = sdpa_attention_forward(module, query[:, :, n:], key, value, attention_mask, **options)
    return torch.cat([first, last], 1), None  # [R, L, H, d]


def decoding_attention(query, key, value, attention_mask, scaling):
    """Attention of a few new positions over a cache, with fewer heads of keys than of queries: the queries of the heads
    that share keys stand in one head behind one another, where transformers would copy the cache for each of them.

    query [R, H, W, d], key and value [R, Hk, K, d], mask [R, 1, W, K] -> [R, W, H, d]
    """
    rows, heads, width, size = query.shape
    shared = key.shape[1]
    packed = query.reshape(rows, shared, heads // shared * width, size)
    mask = attention_mask.repeat(1, 1, heads // shared, 1)
    out = nn.functional.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, heads, width, size).transpose(1, 2)


def use_split_attention(llm):
    """Let a model with sdpa attention use `split_attention`, which is the same for all other masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(SPLIT_ATTENTION, split_attention)
    AttentionMaskInterface.register(SPLIT_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    llm.set_attn_implementation(SPLIT_ATTENTION)


def attention_mask(visible, dtype):
    """bool [R, Q, K] -> additive mask [R, 1, Q, K], which sdpa and eager attention both take."""
    mask = torch.zeros_like(visible, dtype=dtype)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def sees(query_owner, key_owner):
    """[R, Q], [R, K] -> bool [R, Q, K]: a key of the prefix or of the query's own completion, earlier or later."""
    key = key_owner[:, None, :]
    return (key == PREFIX) | ((key == query_owner[:, :, None]) & (key != NOBODY))


def packed_mask(owner, dtype, start=0):
    """Owners [R, L] of whole rows -> additive mask [R, 1, L - start, L] of the positions from `start` on: earlier
    positions of the prefix and of one's own."""
    length = owner.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=owner.device).tril()[start:]  # [L - start, L]
    return attention_mask(sees(owner[:, start:], owner) & earlier, dtype)


def packed_positions(owner):
    """Owners [R, L] -> position numbers [R, L], which restart at the prefix's end for each owner; 0 in the padding.

    Owners stand in one stretch each, the prefix first.
    """
    places = torch.arange(owner.shape[1], device=owner.device).expand_as(owner)
    begins = torch.ones_like(owner, dtype=torch.bool)
    begins[:, 1:] = owner[:, 1:] != owner[:, :-1]
    within = places - torch.where(begins, places, 0).cummax(1).values  # place in the owner's stretch
    behind = (owner == PREFIX).sum(1, keepdim=True) + within
    return torch.where(owner == PREFIX, within, behind).masked_fill(owner == NOBODY, 0)


# ----------------------------------------------------------------------------------------------------------------------
# Parts


class Projector(nn.Module):
    """Patches [N, grid*grid, in_size] -> visual tokens [N, (grid/pooling)**2, out_size].

    Space-to-depth concatenates each pooling x pooling cell of patches; an MLP maps that to the language model's size.
    """

    def __init__(self, grid, pooling, in_size, out_size):
        super().__init__()
        self.pooling, self.cells = pooling, grid // pooling
        self.fc1 = nn.Linear(pooling * pooling * in_size, out_size)
        self.fc2 = nn.Linear(out_size, out_size)

    def forward(self, patches):
        n, _, d = patches.shape
        p, c = self.pooling, self.cells
        x = patches.view(n, c, p, c, p, d).transpose(2, 3)  # [N, c, c, p, p, Dv]
        x = x.reshape(n, c * c, p * p * d)  # [N, c*c, p*p*Dv]
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class VisionTower(nn.Module):
    """A fixed-resolution SigLIP tower; the only place that names SigLIP. Another tower needs the same members.

    `load_config` and `load`; config.hidden_size, .image_size, .patch_size;
    forward(frames uint8 [n, S, S, 3]) -> patches [n, grid*grid, hidden_size] in row-major order, without a CLS token.
    """

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    @staticmethod
    def load_config(name, revision=None, local_files_only=False):
        """The tower's config, without its unused pooling head; raises OSError or ModelError."""
        options = {"revision": revision, "local_files_only": local_files_only}
        raw, _ = PretrainedConfig.get_config_dict(name, **options)
        if raw.get("model_type") not in ("siglip", "siglip_vision_model"):
            raise ModelError(
                f"its model_type is {raw.get('model_type')!r}, not a fixed-resolution SigLIP tower ('siglip' or "
                "'siglip_vision_model', such as google/siglip2-so400m-patch14-384)"
            )
        config = SiglipVisionConfig.from_pretrained(name, **options)
        config.vision_use_head = False
        return config

    @classmethod
    def load(cls, name, config, dtype, revision=None):
        """The tower with its weights in `dtype`; ModelError where they do not load or lack a tensor."""
        return cls(_load_weights(transformers.SiglipVisionModel, name, config, dtype, revision))

    def forward(self, frames):
        dtype = next(self.model.parameters()).dtype
        pixels = frames.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)  # [n, 3, S, S], SigLIP's mean and std are 0.5
        return self.model(pixel_values=pixels.to(dtype)).last_hidden_state  # [n, grid*grid, Dv]


def check_pooling(config, pooling):
    """Patches per side of a vision config; ModelError, naming valid values, where `pooling` does not divide them."""
    grid = config.image_size // config.patch_size
    if grid == 0 or grid % pooling:
        near = [g for g in (grid - grid % pooling, grid - grid % pooling + pooling) if g > 0]
        sizes = " or ".join(f"{g}x{g} (image_size {g * config.patch_size})" for g in near)
        fits = ", ".join(str(p) for p in range(1, grid + 1) if grid % p == 0)
        raise ModelError(
            f"the tower's {grid}x{grid} patches (image {config.image_size} px, patch {config.patch_size} px) do not "
            f"divide into {pooling}x{pooling} cells; valid pooling here: {fits or 'none'}; valid grids nearby: "
            f"{sizes}"
        )
    return grid


def tokens_per_frame(vision_model, pooling):
    """(visual tokens per frame, image size) of a tower; None where its config.json is not on this machine."""
    try:
        config = VisionTower.load_config(vision_model, local_files_only=True)
    except OSError:
        return None
    return (check_pooling(config, pooling) // pooling) ** 2, config.image_size


def projector_shapes(vision_config, pooling, hidden_size, num_frames):
    """{tensor name in projector.safetensors: shape}."""
    d = vision_config.hidden_size
    return {
        "projector.fc1.weight": [hidden_size, pooling * pooling * d],
        "projector.fc1.bias": [hidden_size],
        "projector.fc2.weight": [hidden_size, hidden_size],
        "projector.fc2.bias": [hidden_size],
        "temporal": [num_frames, d],
    }


# ----------------------------------------------------------------------------------------------------------------------
# Base models


def _first_line(error):
    return str(error).strip().splitlines()[0]


def base_model_problem(key, name):
    """What is wrong with a base model's folder or hub name, as far as the disk can tell; None if nothing is."""
    folder = Path(name)
    if folder.is_dir():
        return None if (folder / "config.json").is_file() else f"{key}: {name} holds no config.json"
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1 or folder.parent.is_dir():
        return f"{key}: no such folder: {name}"
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(name, "config.json"), str):
        return f"{key}: {name} is not on this machine, and HF_HUB_OFFLINE is set, so it cannot be downloaded"
    return None


def _load_tokenizer(folder, revision):
    """The tokenizer of a folder or hub name; ValueError if it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(folder, revision=revision)
    except Exception as error:  # the tokenizers library raises Exception itself for a broken tokenizer.json
        raise ValueError(f"tokenizer of {folder}: {_first_line(error)}") from error


def _read_bases(vision_model, language_model, tokenizer_folder, pooling, vision_revision, language_revision):
    """(vision config, LM config, tokenizer) of the base models, no weights read; every problem in one ModelError."""
    named = {"vision_model": vision_model, "language_model": language_model}
    problems = [problem for key, name in named.items() if (problem := base_model_problem(key, name))]
    vision_config = llm_config = tokenizer = None
    if not any(problem.startswith("vision_model") for problem in problems):
        try:
            vision_config = VisionTower.load_config(vision_model, vision_revision)
            check_pooling(vision_config, pooling)
        except (OSError, ValueError) as error:
            problems.append(f"vision_model: {vision_model}: {_first_line(error)}")
    if not any(problem.startswith("language_model") for problem in problems):
        try:
            llm_config = AutoConfig.from_pretrained(language_model, revision=language_revision)
            revision = language_revision if tokenizer_folder == language_model else None
            tokenizer = _load_tokenizer(tokenizer_folder, revision)
            chat_pieces(tokenizer)  # raises if there is no usable chat template or no token for the video
        except (OSError, ValueError) as error:
            problems.append(f"language_model: {language_model}: {_first_line(error)}")
    raise_problems("cannot load the base models", problems)
    return vision_config, llm_config, tokenizer


def _load_weights(cls, name, config, dtype, revision):
    """`cls.from_pretrained` with every weight present, else ModelError: no tensor is left at a random value."""
    hf_logging.set_verbosity_error()  # no load report: what matters of it is checked here
    try:
        model, info = cls.from_pretrained(name, config=config, dtype=dtype, revision=revision, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load {name}: {_first_line(error)}") from error
    if info["missing_keys"]:
        keys = sorted(info["missing_keys"])
        raise ModelError(f"cannot load {name}: its weights lack {len(keys)} tensors, such as {keys[0]}")
    return model


def _without_dropout(config):
    """Set every dropout of a base model's config to 0: dropout has no use in frozen modules."""
    for key, value in config.to_dict().items():
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


@torch.no_grad()
def check_head(llm, name="the language model"):
    """Refuse a causal LM whose logits are not head(last hidden state): scaled or capped logits, a bias in the head.

    Hidden states are scaled until logits reach about 100, because a soft cap is invisible on small logits.
    """
    head = llm.get_output_embeddings()
    if head is None:
        raise ModelError(f"{name} has no output head")
    rows = head.weight[:4096].float()  # part of the vocabulary is enough
    seen = {}

    def scale_up(module, args, output):
        top = (output.last_hidden_state.float() @ rows.T).abs().max()
        output.last_hidden_state = output.last_hidden_state * (100.0 / top.clamp(min=1e-6)).item()
        seen["hidden"] = output.last_hidden_state
        return output

    hook = llm.get_decoder().register_forward_hook(scale_up)
    try:
        ids = torch.arange(8, device=rows.device)[None] % len(rows)
        logits = llm(input_ids=ids, use_cache=False).logits  # [1, 8, V]
    finally:
        hook.remove()
    gap = (logits[..., :len(rows)].float() - seen["hidden"].float() @ rows.T).abs().max().item()
    if not gap < 1.0:  # of 100; bfloat16 rounds to 0.25
        raise ModelError(
            f"{name}: its logits are not its head times its last hidden state (off by {gap:.3g} where logits reach "
            "100): scaled or capped logits are not supported"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint folders


def checkpoint_folder(folder):
    """`folder`, or `folder`/model where a run folder is given."""
    folder = Path(folder)
    if not (folder / "drivevlm.json").is_file() and (folder / "model" / "drivevlm.json").is_file():
        return folder / "model"
    return folder


def _read_json(path):
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content


def _is_base(value):
    return isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(
        value.get("revision"), str | None)


def read_checkpoint(folder, expect_stage=None):
    """(checkpoint folder, content of drivevlm.json); ModelError if files are missing or the stage is another."""
    folder = checkpoint_folder(folder)
    if not folder.is_dir():
        raise ModelError(f"no checkpoint folder at {folder}")
    if not (folder / "drivevlm.json").is_file():
        raise ModelError(f"{folder} is not a checkpoint folder: it has no drivevlm.json (nor has {folder / 'model'})")
    meta = _read_json(folder / "drivevlm.json")
    needed = ("stage", "vision_model", "language_model", "num_frames", "tokens_per_frame", "dtype", "placeholder")
    problems = [f"drivevlm.json lacks {key!r}" for key in needed if key not in meta]
    meta.setdefault("pooling", 3)  # of checkpoints written before it was a key
    meta.setdefault("time_stamps", False)  # the same
    types = {"stage": int, "num_frames": int, "pooling": int, "tokens_per_frame": int, "time_stamps": bool,
             "dtype": str, "prompts": dict}
    problems += [f"drivevlm.json: {key} is {meta[key]!r}" for key, kind in types.items()
                 if key in meta and (not isinstance(meta[key], kind) or kind is int and meta[key] < 1)]
    problems += [f"drivevlm.json: {key} is {meta[key]!r}, needs a name and a revision"
                 for key in ("vision_model", "language_model") if key in meta and not _is_base(meta[key])]
    raise_problems(f"checkpoint {folder}", problems)
    if expect_stage is not None and "stage" in meta and meta["stage"] != expect_stage:
        problems.append(f"it holds stage {meta['stage']}, but stage {expect_stage} is needed here")
    files = ["projector.safetensors", "tokenizer_config.json"]
    if meta.get("merged"):
        if expect_stage is not None:
            problems.append("it is an export: train on from the checkpoint that it was made of")
        files += ["config.json"]
    elif meta.get("stage", 0) >= 2:
        files += ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    problems += [f"{name} is missing" for name in files if not (folder / name).is_file()]
    adapter = folder / "adapter" / "adapter_config.json"
    if adapter.is_file():
        kind = _read_json(adapter).get("peft_type")
        problems += [] if kind == "LORA" else [f"adapter/adapter_config.json is of type {kind!r}, not 'LORA'"]
    raise_problems(f"checkpoint {folder}", problems)
    return folder, meta


def _shape_problems(path, expected):
    """What differs between a safetensors file's header and {name: shape}; reads no tensor."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        return [f"{Path(path).name} cannot be read: {_first_line(error)}"]
    wrong = [f"{name} is {found[name]}, needs {list(expected[name])}"
             for name in expected if name in found and found[name] != list(expected[name])]
    wrong += [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is unknown" for name in found if name not in expected]
    more = [f"and {len(wrong) - 8} more tensors"] if len(wrong) > 8 else []
    return [f"{Path(path).name}: {line}" for line in wrong[:8] + more]


def read_clips(folder):
    """{"trained": [..], "held_out": [..]}: keys (dataset.clip_key) of the clips that a checkpoint was trained on, in
    its stage and those before, and of those that it held out. Empty lists for checkpoints that do not say."""
    path = checkpoint_folder(folder) / "clips.json"
    return _read_json(path) if path.is_file() else {"trained": [], "held_out": []}


def adapter_hash(source):
    """sha256 over names, types, shapes and bytes of adapter tensors.

    `source`: a checkpoint, run or adapter folder, or {name: tensor} as `DriveVLM.adapter_state()` gives.
    """
    if not isinstance(source, dict):
        folder = checkpoint_folder(source)
        inner = folder / "adapter" / "adapter_model.safetensors"
        path = inner if inner.is_file() else folder / "adapter_model.safetensors"
        if not path.is_file():
            raise ModelError(f"{folder} holds no adapter")
        source = load_file(path)
    digest = hashlib.sha256()
    for name in sorted(source):
        tensor = source[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------


class DriveVLM(nn.Module):
    """The whole model. Build it with `from_base` or `from_checkpoint`.

    vision: VisionTower; llm: causal LM (a PeftModel after `add_lora`), both with their weights in `dtype`.
    base: {"vision_model": {"name", "revision"}, "language_model": {...}} as written to drivevlm.json.
    time_stamps: in prompts, each frame's visual tokens follow its time.
    """

    def __init__(self, vision, llm, tokenizer, *, num_frames, pooling, dtype, seed, base, time_stamps=False):
        super().__init__()
        if num_frames < 1:
            raise ModelError(f"num_frames is {num_frames}; at least 1")
        self.vision, self.llm, self.tokenizer, self.base = vision, llm, tokenizer, base
        self.time_stamps = time_stamps
        self.dtype = DTYPES[dtype]  # of the frozen weights, and of autocast
        self.num_frames, self.image_size, self.pooling = num_frames, vision.config.image_size, pooling
        grid = check_pooling(vision.config, pooling)
        self.tokens_per_frame = (grid // pooling) ** 2
        self.num_visual_tokens = num_frames * self.tokens_per_frame
        self.feature_shape = num_frames, grid * grid, vision.config.hidden_size  # of the tower's features: T, P, Dv
        embedding = llm.get_input_embeddings().weight  # [V, D]
        limit = getattr(llm.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and self.num_visual_tokens >= limit:
            raise ModelError(f"{num_frames} frames make {self.num_visual_tokens} visual tokens; the language model "
                             f"takes {limit} tokens in all: use fewer frames or a smaller image_size")
        with seeded(seed):
            projector = Projector(grid, pooling, vision.config.hidden_size, embedding.shape[1])
            temporal = torch.randn(num_frames, vision.config.hidden_size) * 0.02
        self.projector = projector.to(embedding.device)
        self.temporal = nn.Parameter(temporal.to(embedding.device))
        self.placeholder_id = placeholder_id(tokenizer)
        self.end_ids = self._find_end_ids()
        pad = tokenizer.pad_token_id
        self.pad_token_id = self.end_ids[0] if pad is None else pad
        self.register_buffer("banned_ids", self._find_banned_ids().to(embedding.device), persistent=False)
        if llm.config._attn_implementation == "sdpa":
            use_split_attention(llm)
        # Otherwise the published generation defaults (temperature, top_k, top_p) apply to any option we do not pass.
        llm.generation_config = GenerationConfig(eos_token_id=self.end_ids, pad_token_id=self.pad_token_id)
        self.stage = 0  # the stage that these weights come from; 0: straight from the base models
        self.clips = {"trained": [], "held_out": []}  # clip keys, of this stage and those before; see read_clips
        self.trained_groups = ()
        self.requires_grad_(False)
        self.eval()

    # ---- building

    @classmethod
    def from_base(cls, vision_model, language_model, *, num_frames=16, pooling=3, time_stamps=False, dtype="bfloat16",
                  seed=42, device="cpu", vision_revision=None, language_revision=None):
        """A fresh model on base models (folder or hub name); projector and temporal embedding drawn from `seed`."""
        return cls._build(vision_model, language_model, language_model, num_frames=num_frames, pooling=pooling,
                          time_stamps=time_stamps, dtype=dtype, seed=seed, device=device,
                          revisions=(vision_revision, language_revision))

    @classmethod
    def _build(cls, vision_model, language_model, tokenizer_folder, *, num_frames, pooling, time_stamps, dtype, seed,
               device, revisions, checkpoint=None):
        vision_model, language_model = str(vision_model), str(language_model)
        if dtype not in DTYPES:
            raise ModelError(f"dtype is {dtype!r}; valid: {', '.join(DTYPES)}")
        vision_config, llm_config, tokenizer = _read_bases(vision_model, language_model, str(tokenizer_folder), pooling,
                                                           *revisions)
        if checkpoint is not None:  # before gigabytes are read
            hidden_size = llm_config.get_text_config().hidden_size
            shapes = projector_shapes(vision_config, pooling, hidden_size, num_frames)
            raise_problems(f"checkpoint {checkpoint} does not fit {vision_model} and {language_model}",
                           _shape_problems(checkpoint / "projector.safetensors", shapes))
        vision = VisionTower.load(vision_model, _without_dropout(vision_config), DTYPES[dtype], revisions[0])
        llm = _load_weights(transformers.AutoModelForCausalLM, language_model, _without_dropout(llm_config),
                            DTYPES[dtype], revisions[1])
        vision, llm = vision.to(device).eval(), llm.to(device).eval()
        check_head(llm, language_model)
        base = {}
        for key, name, revision, config in (("vision_model", vision_model, revisions[0], vision_config),
                                            ("language_model", language_model, revisions[1], llm_config)):
            base[key] = {"name": name, "revision": getattr(config, "_commit_hash", None) or revision}
        return cls(vision, llm, tokenizer, num_frames=num_frames, pooling=pooling, time_stamps=time_stamps, dtype=dtype,
                   seed=seed, base=base)

    @classmethod
    def from_checkpoint(cls, folder, *, dtype=None, device="cpu", expect_stage=None, vision_model=None,
                        language_model=None):
        """The model saved in a checkpoint folder (or in a run folder's model/), nothing trainable yet.

        dtype: None for the saved one. expect_stage: the stage it must hold. vision_model, language_model: where the
        base models are now, if not where they were when it was saved. ModelError lists everything that does not fit.
        A checkpoint that was trained with other questions than MODES asks today says so on stderr. An exported folder
        (export.py) holds its language model itself, whatever `language_model` says.
        """
        folder, meta = read_checkpoint(folder, expect_stage)
        names, revisions = [], []
        for moved, key in ((vision_model, "vision_model"), (language_model, "language_model")):
            same = moved is None or str(moved) == meta[key]["name"]
            names.append(meta[key]["name"] if same else moved)
            revisions.append(meta[key]["revision"] if same else None)
        if meta.get("merged"):
            names[1], revisions[1] = str(folder), None
        model = cls._build(*names, folder, num_frames=meta["num_frames"], pooling=meta["pooling"],
                           time_stamps=meta["time_stamps"], dtype=dtype or meta["dtype"], seed=0, device=device,
                           revisions=revisions, checkpoint=folder)
        problems = []
        if model.tokens_per_frame != meta["tokens_per_frame"]:
            problems.append(f"it was trained with {meta['tokens_per_frame']} tokens per frame, the tower gives "
                            f"{model.tokens_per_frame}")
        placeholder = model.tokenizer.convert_ids_to_tokens(model.placeholder_id)
        if placeholder != meta["placeholder"]:
            problems.append(f"its placeholder is {meta['placeholder']}, the tokenizer beside it gives {placeholder}")
        raise_problems(f"checkpoint {folder}", problems)
        state = load_file(folder / "projector.safetensors", device=str(model.device))
        model.load_state_dict(state, strict=False)
        if (folder / "adapter").is_dir():
            model._load_adapter(folder / "adapter")
        model.stage, model.clips = meta["stage"], read_clips(folder)
        for mode, question in meta.get("prompts", {}).items():
            if mode in MODES and MODES[mode] != question:
                print(f"note: {folder} was trained to answer {question!r} ({mode}); it is now asked {MODES[mode]!r}",
                      file=sys.stderr, flush=True)
        return model

    def _load_adapter(self, folder):
        import peft

        try:
            config = peft.LoraConfig.from_pretrained(folder)
            config.inference_mode = False
            config.base_model_name_or_path = None  # PEFT fills in the current path; an old one would cause a warning
            self._wrap_lora(config, seed=0)
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, re.error) as error:  # of PEFT
            raise ModelError(f"{folder}: adapter_config.json: {_first_line(error)}") from error
        expected = {name: tensor.shape for name, tensor in self.adapter_state().items()}
        problems = _shape_problems(folder / "adapter_model.safetensors", expected)
        raise_problems(f"{folder} does not fit {self.base['language_model']['name']}", problems)
        state = load_file(folder / "adapter_model.safetensors", device=str(self.device))
        peft.set_peft_model_state_dict(self.llm, state)

    def add_lora(self, r, alpha, dropout, seed):
        """Wrap every linear layer of the LM's decoder blocks (not the head) in a fresh adapter drawn from `seed`."""
        import peft  # here, not above: it takes two seconds, and the check of a data set needs none of it

        if self.has_adapter:
            raise ModelError("the language model has an adapter already")
        names = self._block_linears()
        if not names:
            raise ModelError(f"{type(self.llm).__name__} has no nn.Linear in its decoder blocks to adapt")
        config = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, bias="none", task_type="CAUSAL_LM",
                            target_modules=sorted({name.rsplit(".", 1)[-1] for name in names}))
        self._wrap_lora(config, seed)

    def _wrap_lora(self, config, seed):
        import peft

        linears = self._block_linears()
        with seeded(seed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's own
            self.llm = peft.get_peft_model(self.llm, config)  # float32 adapters, also on bfloat16 layers
        wrapped = [module for module in self.llm.modules() if hasattr(module, "lora_A")]
        if len(wrapped) != len(linears):
            raise ModelError(f"LoRA wraps {len(wrapped)} modules; the decoder blocks have {len(linears)} linear layers")
        for module in wrapped:  # PEFT would make a float32 copy of each layer's input, which autocast rounds back
            module.cast_input_dtype_enabled = self.dtype == torch.float32
        self.llm.requires_grad_(False)
        self.llm.train(self.training)

    def _block_linears(self):
        """{path: layer} of every linear layer inside the decoder's numbered blocks, adapters unwrapped."""
        found = {}
        for name, module in self.causal_lm.get_decoder().named_modules():
            if isinstance(module, nn.Linear) and "lora_" not in name and any(p.isdigit() for p in name.split(".")):
                found[name.removesuffix(".base_layer")] = module
        return found

    def _find_end_ids(self):
        """Ids that end an answer: the template's turn end, and all eos of generation config and tokenizer."""
        eos = self.llm.generation_config.eos_token_id
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        ids = [*chat_pieces(self.tokenizer).turn_end, *eos, self.tokenizer.eos_token_id]
        return list(dict.fromkeys(int(i) for i in ids if i is not None))

    def _find_banned_ids(self):
        """Ids never sampled [K]: added tokens and all past the tokenizer's length, but for the end ids."""
        vocab_size = self.head_weight.shape[0]
        banned = set(self.tokenizer.added_tokens_decoder) | set(range(len(self.tokenizer), vocab_size))
        banned = {i for i in banned if i < vocab_size} - set(self.end_ids)
        return torch.tensor(sorted(banned), dtype=torch.long)

    # ---- small views

    @property
    def has_adapter(self):
        """True if the language model carries LoRA adapters (it is a PeftModel then)."""
        return hasattr(self.llm, "peft_config")

    @property
    def causal_lm(self):
        """The Hugging Face causal LM itself; its layers carry the adapter if there is one."""
        return self.llm.get_base_model() if self.has_adapter else self.llm

    @property
    def head_weight(self):
        """[V, D]"""
        return self.causal_lm.get_output_embeddings().weight

    @property
    def device(self):
        return self.temporal.device

    def adapter_state(self, adapter="default"):
        """{name: tensor} of an adapter, named as in adapter_model.safetensors; ModelError without one."""
        import peft

        if not self.has_adapter:
            raise ModelError("the model has no adapter: call add_lora first")
        return peft.get_peft_model_state_dict(self.llm, adapter_name=adapter, save_embedding_layers=False)

    def autocast(self):
        """bfloat16 autocast, or nothing in float32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    # ---- what trains

    @staticmethod
    def parameter_group(name):
        """The member of GROUPS that a parameter belongs to, by its name."""
        head = name.split(".", 1)[0]
        return "lora" if head == "llm" and ".lora_" in name else head

    def set_trainable(self, *groups):
        """Train these groups (members of GROUPS) and freeze the rest; returns {group: number of trained parameters}.

        ModelError for an unknown group, for "lora" without an adapter, and for trained weights that are not float32.
        """
        unknown = [group for group in groups if group not in GROUPS]
        if unknown:
            raise ModelError(f"there is no group {', '.join(map(repr, unknown))}; valid: {', '.join(GROUPS)}")
        if "lora" in groups and not self.has_adapter:
            raise ModelError("lora is to be trained, but the model has no adapter: call add_lora first")
        self.requires_grad_(False)
        for name, parameter in self._own_parameters():
            parameter.requires_grad_(self.parameter_group(name) in groups)
        self.trained_groups = groups
        self.train()
        return self.check_trainable()

    def _own_parameters(self):
        """(name, parameter) of all but frozen copies of the adapter, such as stage 3's reference policy."""
        return [(name, parameter) for name, parameter in self.named_parameters()
                if ".lora_" not in name or ".default." in name]

    def check_trainable(self):
        """{group: number of trained parameters}; ModelError if they are not all those of the trained groups."""
        counts, sizes, wrong_dtype = dict.fromkeys(GROUPS, 0), dict.fromkeys(GROUPS, 0), []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                counts[self.parameter_group(name)] += parameter.numel()
                if parameter.dtype != torch.float32:
                    wrong_dtype.append(name)
        for name, parameter in self._own_parameters():
            sizes[self.parameter_group(name)] += parameter.numel()
        expected = {group: sizes[group] if group in self.trained_groups else 0 for group in GROUPS}
        problems = [f"{group}: {counts[group]:,} parameters train, expected {expected[group]:,}"
                    for group in GROUPS if counts[group] != expected[group]]
        problems += [f"{group}: to be trained, but it has no parameters"
                     for group in self.trained_groups if not sizes[group]]
        if wrong_dtype:
            problems.append(f"{len(wrong_dtype)} trained tensors are not float32, such as {wrong_dtype[0]}")
        raise_problems(f"what trains is not {', '.join(self.trained_groups) or 'nothing'}", problems)
        return counts

    def set_lora_dropout(self, p):
        """Dropout of all adapters, loaded copies included, for this model and in its next checkpoint."""
        for config in self.llm.peft_config.values():
            config.lora_dropout = p
        for name, module in self.llm.named_modules():
            if isinstance(module, nn.Dropout) and ".lora_dropout." in name:
                module.p = p

    def trainable_table(self):
        """The table of parameters by group, as text: total, trained, number type."""
        total, trained = dict.fromkeys(GROUPS, 0), dict.fromkeys(GROUPS, 0)
        dtypes = {group: set() for group in GROUPS}
        for name, parameter in self._own_parameters():
            group = self.parameter_group(name)
            total[group] += parameter.numel()
            trained[group] += parameter.numel() if parameter.requires_grad else 0
            dtypes[group].add(str(parameter.dtype).removeprefix("torch."))
        lines = [f"{'group':<10} {'parameters':>15} {'trained':>15}  type"]
        for group in GROUPS:
            shown = f"{trained[group]:,}" if trained[group] else "-"
            lines.append(f"{group:<10} {total[group]:>15,} {shown:>15}  {', '.join(sorted(dtypes[group]))}")
        lines.append(f"{'all':<10} {sum(total.values()):>15,} {sum(trained.values()):>15,}")
        return "\n".join(lines)

    def train(self, mode=True):
        """Train mode, but for the tower. (The LM has no dropout; it checkpoints activations in train mode only.)"""
        super().train(mode)
        self.vision.eval()
        return self

    def activation_checkpointing(self, enabled):
        """Recompute the LM's activations in the backward pass (in train mode only), or keep them."""
        llm = self.causal_lm
        if enabled:  # the second name is the one before transformers 5.2x
            turn_on = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
            turn_on({"use_reentrant": False})
        else:
            turn_off = getattr(llm, "activation_checkpointing_disable", None) or llm.gradient_checkpointing_disable
            turn_off()

    def compile_blocks(self):
        """Compile each of the LM's decoder blocks with torch.compile, when it is first used, which takes a minute or
        two. All blocks and all lengths share the compiled code. Results differ by rounding, and dropout draws other
        numbers.

        ModelError on a CPU without a C++ compiler. `generate` goes on without.
        """
        import torch._dynamo
        from torch._inductor import cpp_builder, exc

        if self.device.type == "cpu":
            try:
                cpp_builder.get_cpp_compiler()
            except exc.InvalidCxxCompiler as error:
                raise ModelError("compile_blocks: torch.compile needs a C++ compiler on a CPU: install g++, or name "
                                 "one in the variable CXX") from error
        torch._dynamo.config.allow_unspec_int_on_nn_module = True  # else each layer_idx is compiled again
        blocks = next(child for child in self.causal_lm.get_decoder().children() if isinstance(child, nn.ModuleList))
        for block in blocks:
            block.compile(dynamic=True)

    @contextmanager
    def decoding(self):
        """Eval mode without activation checkpointing, which would lose the KV cache; restores both afterwards."""
        llm, training = self.causal_lm, self.training
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in llm.modules())
        if checkpointing:
            self.activation_checkpointing(False)
        self.eval()
        try:
            yield self
        finally:
            self.train(training)
            if checkpointing:
                self.activation_checkpointing(True)

    # ---- the pass

    def encode_video(self, frames):
        """Frames uint8 [B, T, S, S, 3], RGB -> visual tokens [B, T * tokens_per_frame, D]."""
        return self.project(self.tower_features(frames))

    def tower_features(self, frames):
        """Frames uint8 [B, T, S, S, 3] -> the tower's patches [B, T, P, Dv], in its own dtype.

        One clip at a time, as a batch would round differently: features from a cache equal fresh ones to the bit.
        """
        shape = (self.num_frames, self.image_size, self.image_size, 3)
        if frames.dtype != torch.uint8 or tuple(frames.shape[1:]) != shape:
            raise ModelError(f"frames are {frames.dtype} {list(frames.shape)}, need torch.uint8 [B, "
                             + ", ".join(map(str, shape)) + "]")
        # The tower runs in its own dtype, not under autocast; where that is float32, its convolution is without TF32.
        exact = self.dtype == torch.float32
        precision = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if exact else nullcontext()
        with torch.set_grad_enabled("vision" in self.trained_groups and torch.is_grad_enabled()), precision:
            with torch.autocast(self.device.type, enabled=False):
                return torch.stack([self._patches(clip) for clip in frames])

    def _patches(self, clip):
        """Frames of one clip [T, S, S, 3] -> [T, P, Dv]"""
        return torch.cat([self.vision(part.to(self.device)) for part in clip.split(FRAMES_PER_PASS)])

    def project(self, features):
        """The tower's patches [B, T, P, Dv] -> visual tokens [B, T * tokens_per_frame, D]."""
        with self.autocast():
            patches = features.to(self.device) + self.temporal[:, None]  # [B, T, P, Dv]
            return self.projector(patches.flatten(0, 1)).view(len(patches), self.num_visual_tokens, -1)

    def frozen_parts_id(self, *groups):
        """Names what frozen parts of the model make of a clip: a text that changes with their weights, the frames that
        they read and the number type."""
        weights = {name: tensor for name, tensor in self.state_dict().items() if self.parameter_group(name) in groups}
        return f"{adapter_hash(weights)} {self.num_frames} frames of {self.image_size} px, {self.dtype}"

    def embed(self, input_ids, visual):
        """Embeddings [B, L, D] of input_ids [B, L], with visual [B, N, D] instead of the placeholder tokens'."""
        places = input_ids == self.placeholder_id  # [B, L]
        counts = places.sum(1).tolist()
        if len(visual) != len(input_ids) or set(counts) != {visual.shape[1]}:
            raise ModelError(f"prompts hold {counts} placeholder tokens in {len(input_ids)} rows, the clips give "
                             f"{visual.shape[1]} visual tokens in {len(visual)} rows")
        embeds = self.causal_lm.get_input_embeddings()(input_ids)
        return embeds.masked_scatter(places[..., None], visual.to(embeds.dtype))

    def hidden_states(self, inputs_embeds, attention_mask, position_ids=None, past_key_values=None, use_cache=False):
        """The decoder's output after its last norm [B, L, D].

        attention_mask: [B, past + L], 1 where there is a token, or an additive mask [B, 1, L, past + L]. Positions
        count the mask's ones if not given. A cache given is filled in place where use_cache is true.
        """
        if position_ids is None:
            if attention_mask.dim() != 2:
                raise ModelError("a 4D attention mask needs position_ids")
            positions = attention_mask.long().cumsum(1).sub(1).clamp(min=0)
            position_ids = positions[:, -inputs_embeds.shape[1]:]
        with self.autocast():
            output = self.causal_lm.get_decoder()(
                inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, use_cache=use_cache,
            )
        return output.last_hidden_state

    def packed_hidden_states(self, inputs_embeds, owner):
        """`hidden_states` of rows that hold several texts behind one clip. owner [R, L], the prefix first."""
        split = self.causal_lm.config._attn_implementation == SPLIT_ATTENTION
        # Up to where all rows have their prefix, plain causal attention will do.
        start = min(int((owner == PREFIX).sum(1).min()), owner.shape[1] - 1) if split else 0
        owner = owner.to(self.device)
        return self.hidden_states(inputs_embeds, packed_mask(owner, self.dtype, start), packed_positions(owner))

    def forward(self, frames=None, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None,
                features=None, owner=None, **ignored):
        """Token-weighted cross-entropy of the labels; only label positions reach the head.

        frames uint8 [B, T, S, S, 3], or features [B, T, P, Dv] that the tower made of them; input_ids, attention_mask,
        labels [B, L], labels -100 where not supervised. owner [B, L]: a row holds several texts behind one clip (see
        the shared prefix, above). Returns {"loss": loss_sum / (num_items_in_batch or this batch's label tokens),
        "loss_sum", "num_tokens"}.
        """
        device = self.device
        input_ids, labels = input_ids.to(device), labels.to(device)
        visual = self.encode_video(frames) if features is None else self.project(features)  # [B, N, D]
        embeds = self.embed(input_ids, visual)
        if owner is None:
            hidden = self.hidden_states(embeds, attention_mask.to(device))
        else:
            hidden = self.packed_hidden_states(embeds, owner)
        counted = labels[:, 1:] != IGNORE_INDEX  # position i predicts token i + 1
        logps, _ = token_logps(hidden[:, :-1][counted], self.head_weight, labels[:, 1:][counted])
        loss_sum = -logps.sum()
        num_tokens = counted.sum()
        share = num_tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return {"loss": loss_sum / share, "loss_sum": loss_sum, "num_tokens": num_tokens}

    # ---- answers

    def with_times(self, entries, video_root, frame_cache):
        """The entries (dataset.Entry) as this model is asked them: with the times of the frames that it reads, where
        its prompts hold them."""
        return add_times(entries, self.num_frames, video_root, frame_cache) if self.time_stamps else entries

    def prompt_ids(self, question, times=None):
        """Ids of a prompt; times: of the clip's frames in seconds [T] with `time_stamps`, else None."""
        given, needed = 0 if times is None else len(times), self.num_frames if self.time_stamps else 0
        if given != needed:
            raise ModelError(f"a prompt of this model holds the times of {needed} frames, got {given}")
        return encode_prompt(self.tokenizer, question, self.num_visual_tokens, times)

    def prompt_batch(self, questions, times=None):
        """Left-padded prompts: (input_ids [B, L], attention_mask [B, L]). times: for each of them, see `prompt_ids`."""
        times = [None] * len(questions) if times is None else times
        prompts = [self.prompt_ids(*asked) for asked in zip(questions, times, strict=True)]
        length = max(map(len, prompts))
        ids = torch.full((len(prompts), length), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt):] = torch.tensor(prompt)
            mask[row, length - len(prompt):] = 1
        return ids.to(self.device), mask.to(self.device)

    @torch.no_grad()
    def generate(self, frames, questions, *, max_new_tokens, temperature=0.0, num_samples=1, seed=None, visual=None,
                 times=None, streamer=None):
        """Answer each question about its clip -> list of Answer, `num_samples` in a row per question.

        frames uint8 [B, T, S, S, 3], or visual [B, N, D] from `encode_video` (frames is then not read). times: B of
        [T], see `prompt_ids`. temperature 0 is greedy. With a seed, answers are the same at every call with the same
        batch, and the global generator is left alone. streamer: one of transformers', which is given the ids of a
        single answer as they are generated.
        ModelError for numbers that make no sense.
        """
        if max_new_tokens < 1 or num_samples < 1 or temperature < 0:
            raise ModelError(f"max_new_tokens ({max_new_tokens}) and num_samples ({num_samples}) must be at least 1, "
                             f"temperature ({temperature}) at least 0")
        if num_samples > 1 and temperature == 0:
            raise ModelError(f"{num_samples} samples need a temperature above 0: greedy answers are all the same")
        rows = len(frames) if visual is None else len(visual)
        if rows != len(questions) or rows == 0:
            raise ModelError(f"{rows} clips but {len(questions)} questions: one question per clip, at least one")
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, num_return_sequences=num_samples, eos_token_id=self.end_ids,
            pad_token_id=self.pad_token_id, suppress_tokens=self.banned_ids.tolist() or None, **options,
        )
        # Compiled blocks would be compiled once more for each layer of transformers' own cache.
        with self.decoding(), self.autocast(), torch.compiler.set_stance("force_eager"):
            visual = self.encode_video(frames) if visual is None else visual.to(self.device)
            ids, mask = self.prompt_batch(questions, times)
            embeds = self.embed(ids, visual)
            with nullcontext() if seed is None else seeded(seed, self.device):
                out = self.causal_lm.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config,
                                              streamer=streamer)
        return [self.answer(row) for row in out.tolist()]

    def answer(self, ids):
        """The Answer in generated ids: cut after the first end id; what follows it is padding."""
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), None)
        kept = ids if end is None else ids[:end + 1]
        said = kept if end is None else kept[:-1]
        text = self.tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(text=text.strip(), ids=list(kept), ended=end is not None)

    # ---- saving

    def save_checkpoint(self, folder, *, stage=None):
        """Write a checkpoint folder, complete or not at all; an older one is replaced. Returns its path."""
        folder = Path(folder)
        lost = [group for group in ("vision", "llm") if group in self.trained_groups]
        if lost:
            raise ModelError(f"{' and '.join(lost)} were trained, but a checkpoint does not hold them: first add their "
                             "tensors to save_checkpoint and from_checkpoint")
        if stage is None:  # the weights' own; straight from base models: stage 2 with an adapter, else stage 1
            stage = self.stage or (2 if self.has_adapter else 1)
        temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            self._write(temporary, self._meta(stage))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        return folder

    def _write(self, folder, meta):
        folder.mkdir(parents=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()
                 if self.parameter_group(name) in ("projector", "temporal")}
        save_file(state, folder / "projector.safetensors")
        if self.has_adapter:
            self.llm.save_pretrained(folder / "adapter", selected_adapters=["default"], save_embedding_layers=False)
            (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        self.tokenizer.save_pretrained(folder)
        for name, content in (("clips.json", self.clips), ("drivevlm.json", meta)):
            (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _meta(self, stage):
        lora = None
        if self.has_adapter:
            config = self.llm.peft_config["default"]
            lora = {"r": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
        return {
            "format": 1,
            "stage": stage,
            **self.base,
            "num_frames": self.num_frames,
            "image_size": self.image_size,
            "pooling": self.pooling,
            "time_stamps": self.time_stamps,
            "tokens_per_frame": self.tokens_per_frame,
            "num_visual_tokens": self.num_visual_tokens,
            "placeholder": self.tokenizer.convert_ids_to_tokens(self.placeholder_id),
            "dtype": str(self.dtype).removeprefix("torch."),
            "prompts": dict(MODES),
            "lora": lora,
            "git_commit": git_commit(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
