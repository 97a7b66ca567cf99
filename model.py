"""Drive-VLM: a frozen SigLIP-style tower, an MLP projector with 3x3 pooling, and a causal LM that reads the clip.

    frames [B,T,S,S,3] uint8 -> tower -> [B,T,729,Dv] + temporal embedding [T,Dv]
      -> 3x3 space-to-depth [B,T,81,9*Dv] -> Linear -> GELU -> Linear -> [B,T*81,D]
      -> takes the place of the placeholder tokens in the prompt -> LM

Any `SiglipVisionModel` and any `AutoModelForCausalLM` with a chat template will do: sizes come from their configs.
Precision: base weights have `dtype`; the projector, the temporal embedding and LoRA are float32 and run under autocast
when `dtype` is bfloat16. They stay float32 where a stage freezes them, so that saving them again changes no bit.
"""

import functools
import hashlib
import json
import shutil
import subprocess
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.utils import logging as hf_logging

from dataset import IGNORE_INDEX, MODES, chat_pieces, encode_prompt, placeholder_id

POOL = 3  # patches a side that become one visual token
GROUPS = ("projector", "temporal", "lora", "vision", "llm")
TRAINS = {1: ("projector", "temporal"), 2: ("projector", "lora"), 3: ("lora",)}  # stage -> trained groups
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FRAMES_PER_PASS = 64  # frames that go through the tower at once; bounds its memory


class ModelError(ValueError):
    """Base models, a checkpoint or inputs that do not fit; the message lists every problem found."""


@dataclass(frozen=True)
class Answer:
    """One generated answer: `ids` as generated, with the end token; `text` without it; `ended`: by an end token."""

    text: str
    ids: list[int]
    ended: bool


def fail(title, problems):
    """Raise one ModelError for a list of problems: in one line if there is one, else as a list."""
    if len(problems) == 1:
        raise ModelError(f"{title}: {problems[0]}")
    if problems:
        raise ModelError(f"{title}:" + "".join(f"\n  - {problem}" for problem in problems))


@contextmanager
def seeded(seed, device="cpu"):
    """Random numbers from `seed` on the CPU and on `device`; the generators are as before afterwards."""
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
# Parts


class Projector(nn.Module):
    """Patches [N, grid*grid, in_size] -> visual tokens [N, (grid/3)**2, out_size]: 3x3 space-to-depth, then an MLP."""

    def __init__(self, grid, in_size, out_size):
        super().__init__()
        self.cells = grid // POOL
        self.fc1 = nn.Linear(POOL * POOL * in_size, out_size)
        self.fc2 = nn.Linear(out_size, out_size)

    def forward(self, patches):
        n, _, d = patches.shape
        x = patches.view(n, self.cells, POOL, self.cells, POOL, d).transpose(2, 3)  # [N, c, c, 3, 3, Dv]
        x = x.reshape(n, self.cells**2, POOL * POOL * d)  # [N, c*c, 9*Dv]
        return self.fc2(nn.functional.gelu(self.fc1(x)))


def patch_grid(config):
    """Patches a side of a vision config; ModelError, naming valid sizes, where 3x3 cells do not tile it."""
    grid = config.image_size // config.patch_size
    if grid == 0 or grid % POOL:
        near = [g for g in (grid - grid % POOL, grid - grid % POOL + POOL) if g > 0]
        sizes = " or ".join(f"{g}x{g} (image_size {g * config.patch_size})" for g in near)
        raise ModelError(
            f"the tower's {grid}x{grid} patches (image {config.image_size} px, patch {config.patch_size} px) do not "
            f"divide into {POOL}x{POOL} cells; valid grids nearby: {sizes}"
        )
    return grid


def projector_shapes(vision_config, hidden_size, num_frames):
    """{tensor name in projector.safetensors: shape}."""
    d = vision_config.hidden_size
    return {
        "projector.fc1.weight": [hidden_size, POOL * POOL * d],
        "projector.fc1.bias": [hidden_size],
        "projector.fc2.weight": [hidden_size, hidden_size],
        "projector.fc2.bias": [hidden_size],
        "temporal": [num_frames, d],
    }


@contextmanager
def _quiet():
    """No progress bars and no load reports: what matters of them is checked here and raised."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _first_line(error):
    return str(error).strip().splitlines()[0]


def _load_problem(name, file, error):
    """Why a base model's `file` does not load from `name` (a folder, or a name on the model hub), in one line."""
    path = Path(name)
    if path.is_dir():
        return _first_line(error) if (path / file).is_file() else f"the folder has no {file}"
    if path.is_absolute() or len(path.parts) != 2 or Path(path.parts[0]).is_dir():
        return "there is no such folder"
    return f"no such folder here, and the model hub does not give it: {_first_line(error)}"


def _read_bases(vision_model, language_model, tokenizer_folder, vision_revision, language_revision):
    """(vision config, LM config, tokenizer) of the base models, no weights read; every problem in one ModelError."""
    vision_config = llm_config = tokenizer = None
    problems = []
    try:
        raw, _ = PretrainedConfig.get_config_dict(vision_model, revision=vision_revision)
        if raw.get("model_type") not in ("siglip", "siglip_vision_model"):
            raise ModelError(
                f"its model_type is {raw.get('model_type')!r}, not a fixed-resolution SigLIP tower ('siglip' or "
                "'siglip_vision_model', such as google/siglip2-so400m-patch14-384)"
            )
        vision_config = SiglipVisionConfig.from_pretrained(vision_model, revision=vision_revision)
        vision_config.vision_use_head = False  # the pooled vector is never read
        patch_grid(vision_config)
    except (OSError, ValueError) as error:
        problems.append(f"vision_model {vision_model}: {_load_problem(vision_model, 'config.json', error)}")
    try:
        llm_config = AutoConfig.from_pretrained(language_model, revision=language_revision)
    except (OSError, ValueError) as error:
        problems.append(f"language_model {language_model}: {_load_problem(language_model, 'config.json', error)}")
    if llm_config is not None or tokenizer_folder != language_model:
        try:
            revision = language_revision if tokenizer_folder == language_model else None
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, revision=revision)
            chat_pieces(tokenizer)  # has it a usable chat template, and a token left for the video?
        except (OSError, ValueError) as error:
            why = _load_problem(tokenizer_folder, "tokenizer_config.json", error)
            problems.append(f"tokenizer of {tokenizer_folder}: {why}")
    fail("cannot load the base models", problems)
    return vision_config, llm_config, tokenizer


def _load_weights(cls, name, config, dtype, revision):
    """`cls.from_pretrained` with every weight present, else ModelError: no tensor is left at a random value."""
    try:
        with _quiet():
            model, info = cls.from_pretrained(
                name, config=config, dtype=dtype, revision=revision, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load {name}: {_first_line(error)}") from error
    if info["missing_keys"]:
        keys = sorted(info["missing_keys"])
        raise ModelError(f"cannot load {name}: its weights lack {len(keys)} tensors, such as {keys[0]}")
    return model


def _without_dropout(config):
    """Set every dropout of a base model's config to 0: frozen weights gain nothing from it, in train mode or not."""
    for key, value in config.to_dict().items():
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


@torch.no_grad()
def check_head(llm, name="the language model"):
    """Refuse a causal LM whose logits are not head(last hidden state): scaled or capped logits, a bias in the head.

    Hidden states are blown up to logits of about 100 first, as a cap would not show on small ones.
    """
    head = llm.get_output_embeddings()
    if head is None:
        raise ModelError(f"{name} has no output head")
    rows = head.weight[:4096].float()  # part of the vocabulary is enough
    seen = {}

    def blow_up(module, args, output):
        top = (output.last_hidden_state.float() @ rows.T).abs().max()
        output.last_hidden_state = output.last_hidden_state * (100.0 / top.clamp(min=1e-6)).item()
        seen["hidden"] = output.last_hidden_state
        return output

    hook = llm.get_decoder().register_forward_hook(blow_up)
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


@functools.cache
def git_commit():
    """The commit of the code that runs, or None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git is not installed
        return None
    return done.stdout.strip() or None


def checkpoint_folder(folder):
    """The checkpoint folder itself: `folder`, or `folder`/model where a run folder is given."""
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


def read_checkpoint(folder, expect_stage=None):
    """(checkpoint folder, content of drivevlm.json); ModelError if files are missing or the stage is another."""
    folder = checkpoint_folder(folder)
    if not folder.is_dir():
        raise ModelError(f"no checkpoint folder at {folder}")
    if not (folder / "drivevlm.json").is_file():
        raise ModelError(f"{folder} is no checkpoint folder: it has no drivevlm.json (nor has {folder / 'model'})")
    meta = _read_json(folder / "drivevlm.json")
    needed = ("stage", "vision_model", "language_model", "num_frames", "tokens_per_frame", "dtype", "placeholder")
    problems = [f"drivevlm.json lacks {key!r}" for key in needed if key not in meta]
    if expect_stage is not None and "stage" in meta and meta["stage"] != expect_stage:
        problems.append(f"it holds stage {meta['stage']}, but stage {expect_stage} is needed here")
    files = ["projector.safetensors", "tokenizer_config.json"]
    if meta.get("stage", 0) >= 2:
        files += ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    problems += [f"{name} is missing" for name in files if not (folder / name).is_file()]
    adapter = folder / "adapter" / "adapter_config.json"
    if adapter.is_file():
        kind = _read_json(adapter).get("peft_type")
        problems += [] if kind == "LORA" else [f"adapter/adapter_config.json is of type {kind!r}, not 'LORA'"]
    fail(f"checkpoint {folder}", problems)
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

    vision: SiglipVisionModel; llm: causal LM (a PeftModel after `add_lora`), both with their weights in `dtype`.
    base: {"vision_model": {"name", "revision"}, "language_model": {...}} as written to drivevlm.json.
    """

    def __init__(self, vision, llm, tokenizer, *, num_frames, dtype, seed, base):
        super().__init__()
        if dtype not in DTYPES:
            raise ModelError(f"dtype is {dtype!r}; valid: {', '.join(DTYPES)}")
        if num_frames < 1:
            raise ModelError(f"num_frames is {num_frames}; at least 1")
        self.vision, self.llm, self.tokenizer, self.base = vision, llm, tokenizer, base
        self.compute_dtype = DTYPES[dtype]
        self.num_frames, self.image_size = num_frames, vision.config.image_size
        grid = patch_grid(vision.config)
        self.tokens_per_frame = (grid // POOL) ** 2
        self.num_visual_tokens = num_frames * self.tokens_per_frame
        embedding = llm.get_input_embeddings().weight  # [V, D]
        limit = getattr(llm.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and self.num_visual_tokens >= limit:
            raise ModelError(f"{num_frames} frames make {self.num_visual_tokens} visual tokens; the language model "
                             f"takes {limit} tokens in all: use fewer frames or a smaller image_size")
        with seeded(seed):
            projector = Projector(grid, vision.config.hidden_size, embedding.shape[1])
            temporal = torch.randn(num_frames, vision.config.hidden_size) * 0.02
        self.projector = projector.to(embedding.device)
        self.temporal = nn.Parameter(temporal.to(embedding.device))
        self.placeholder_id = placeholder_id(tokenizer)
        self.end_ids = self._find_end_ids()
        pad = tokenizer.pad_token_id
        self.pad_token_id = self.end_ids[0] if pad is None else pad
        self.register_buffer("banned_ids", self._find_banned_ids().to(embedding.device), persistent=False)
        # The published defaults (temperature, top_k, top_p) would fill what a call leaves open.
        llm.generation_config = GenerationConfig(eos_token_id=self.end_ids, pad_token_id=self.pad_token_id)
        self.stage = 0  # the stage that these weights come from, or train in; 0: straight from the base models
        self.requires_grad_(False)
        self.eval()

    # ---- building

    @classmethod
    def from_base(cls, vision_model, language_model, *, num_frames=16, dtype="bfloat16", seed=42, device="cpu",
                  vision_revision=None, language_revision=None):
        """A fresh model on base models (folder or hub name); projector and temporal embedding drawn from `seed`."""
        return cls._build(vision_model, language_model, language_model, num_frames=num_frames, dtype=dtype, seed=seed,
                          device=device, revisions=(vision_revision, language_revision))

    @classmethod
    def _build(cls, vision_model, language_model, tokenizer_folder, *, num_frames, dtype, seed, device, revisions,
               checkpoint=None):
        vision_model, language_model = str(vision_model), str(language_model)
        if dtype not in DTYPES:
            raise ModelError(f"dtype is {dtype!r}; valid: {', '.join(DTYPES)}")
        vision_config, llm_config, tokenizer = _read_bases(vision_model, language_model, str(tokenizer_folder),
                                                           *revisions)
        if checkpoint is not None:  # before gigabytes are read
            hidden_size = llm_config.get_text_config().hidden_size
            shapes = projector_shapes(vision_config, hidden_size, num_frames)
            fail(f"checkpoint {checkpoint} does not fit {vision_model} and {language_model}",
                 _shape_problems(checkpoint / "projector.safetensors", shapes))
        vision = _load_weights(SiglipVisionModel, vision_model, _without_dropout(vision_config), DTYPES[dtype],
                               revisions[0])
        llm = _load_weights(AutoModelForCausalLM, language_model, _without_dropout(llm_config), DTYPES[dtype],
                            revisions[1])
        vision, llm = vision.to(device).eval(), llm.to(device).eval()
        check_head(llm, language_model)
        base = {}
        for key, name, revision, config in (("vision_model", vision_model, revisions[0], vision_config),
                                            ("language_model", language_model, revisions[1], llm_config)):
            base[key] = {"name": name, "revision": getattr(config, "_commit_hash", None) or revision}
        return cls(vision, llm, tokenizer, num_frames=num_frames, dtype=dtype, seed=seed, base=base)

    @classmethod
    def from_checkpoint(cls, folder, *, dtype=None, device="cpu", expect_stage=None, vision_model=None,
                        language_model=None):
        """The model saved in a checkpoint folder (or in a run folder's model/), nothing trainable yet.

        dtype: None for the saved one. expect_stage: the stage it must hold. vision_model, language_model: where the
        base models lie now, if not where they lay when it was saved. ModelError lists everything that does not fit.
        """
        folder, meta = read_checkpoint(folder, expect_stage)
        moved = (vision_model, language_model)
        names, revisions = [], []
        for override, key in zip(moved, ("vision_model", "language_model"), strict=True):
            names.append(override or meta[key]["name"])
            revisions.append(None if override else meta[key]["revision"])
        model = cls._build(*names, folder, num_frames=meta["num_frames"], dtype=dtype or meta["dtype"], seed=0,
                           device=device, revisions=revisions, checkpoint=folder)
        problems = []
        if model.tokens_per_frame != meta["tokens_per_frame"]:
            problems.append(f"it was trained with {meta['tokens_per_frame']} tokens a frame, the tower gives "
                            f"{model.tokens_per_frame}")
        placeholder = model.tokenizer.convert_ids_to_tokens(model.placeholder_id)
        if placeholder != meta["placeholder"]:
            problems.append(f"its placeholder is {meta['placeholder']}, the tokenizer beside it gives {placeholder}")
        fail(f"checkpoint {folder}", problems)
        state = load_file(folder / "projector.safetensors", device=str(model.device))
        model.load_state_dict(state, strict=False)
        if (folder / "adapter").is_dir():
            model._load_adapter(folder / "adapter")
        model.stage = meta["stage"]
        return model

    def _load_adapter(self, folder):
        config = LoraConfig.from_pretrained(folder)
        config.inference_mode = False
        config.base_model_name_or_path = None  # PEFT writes the present one, and would warn that it changed
        self._wrap_lora(config, seed=0)
        expected = {name: tensor.shape for name, tensor in self.adapter_state().items()}
        problems = _shape_problems(folder / "adapter_model.safetensors", expected)
        fail(f"{folder} does not fit {self.base['language_model']['name']}", problems)
        set_peft_model_state_dict(self.llm, load_file(folder / "adapter_model.safetensors", device=str(self.device)))

    def add_lora(self, r, alpha, dropout, seed):
        """Wrap every linear layer of the LM's decoder blocks (not the head) in a fresh adapter drawn from `seed`."""
        if isinstance(self.llm, PeftModel):
            raise ModelError("the language model has an adapter already")
        names = self._block_linears()
        if not names:
            raise ModelError(f"{type(self.llm).__name__} has no nn.Linear in its decoder blocks to adapt")
        config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, bias="none", task_type="CAUSAL_LM",
                            target_modules=sorted({name.rsplit(".", 1)[-1] for name in names}))
        self._wrap_lora(config, seed)

    def _wrap_lora(self, config, seed):
        linears = self._block_linears()
        with seeded(seed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's own
            self.llm = get_peft_model(self.llm, config)  # float32 adapters, also on bfloat16 layers
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
    def causal_lm(self):
        """The Hugging Face causal LM itself; its layers carry the adapter if there is one."""
        return self.llm.get_base_model() if isinstance(self.llm, PeftModel) else self.llm

    @property
    def head_weight(self):
        """[V, D]"""
        return self.causal_lm.get_output_embeddings().weight

    @property
    def device(self):
        return self.temporal.device

    @property
    def dtype(self):
        return self.compute_dtype

    def adapter_state(self, adapter="default"):
        """{name: tensor} of an adapter, named as in adapter_model.safetensors; ModelError without one."""
        if not isinstance(self.llm, PeftModel):
            raise ModelError("the model has no adapter: call add_lora first")
        return get_peft_model_state_dict(self.llm, adapter_name=adapter, save_embedding_layers=False)

    def autocast(self):
        """bfloat16 autocast, or nothing in float32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    # ---- what trains

    @staticmethod
    def _group(name):
        head = name.split(".", 1)[0]
        return "lora" if head == "llm" and ".lora_" in name else head

    def set_trainable(self, stage):
        """Train the groups of `stage` and freeze the rest; returns {group: trained parameters} (see check_trainable).

        Stage 3 also sets LoRA's dropout to 0: sampled and scored probabilities must be of one model.
        """
        if stage not in TRAINS:
            raise ModelError(f"stage is {stage!r}; valid: 1, 2, 3")
        if "lora" in TRAINS[stage] and not isinstance(self.llm, PeftModel):
            raise ModelError(f"stage {stage} trains an adapter, but the model has none: call add_lora first")
        if stage == 1 and isinstance(self.llm, PeftModel):
            raise ModelError("stage 1 trains no adapter, but the model has one")
        for name, parameter in self.named_parameters():
            group = self._group(name)
            trains = group in TRAINS[stage] and (group != "lora" or ".default." in name)
            parameter.requires_grad_(trains)
        if stage == 3:
            self.llm.peft_config["default"].lora_dropout = 0.0
            for name, module in self.llm.named_modules():
                if isinstance(module, nn.Dropout) and ".lora_dropout." in name:
                    module.p = 0.0
        self.stage = stage
        self.train()
        return self.check_trainable()

    def check_trainable(self):
        """{group: parameters that train}; ModelError if they are not the stage's, by group and by count."""
        counts, wrong_dtype = dict.fromkeys(GROUPS, 0), []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                counts[self._group(name)] += parameter.numel()
                if parameter.dtype != torch.float32:
                    wrong_dtype.append(name)
        expected = dict.fromkeys(GROUPS, 0)
        for group in TRAINS.get(self.stage, ()):
            expected[group] = self._expected_count(group)
        problems = [f"{group}: {counts[group]:,} parameters train, expected {expected[group]:,}"
                    for group in GROUPS if counts[group] != expected[group]]
        if wrong_dtype:
            problems.append(f"{len(wrong_dtype)} trained tensors are not float32, such as {wrong_dtype[0]}")
        fail(f"what trains is not what stage {self.stage} trains", problems)
        return counts

    def _expected_count(self, group):
        if group == "lora":
            r = self.llm.peft_config["default"].r
            return sum(r * (layer.in_features + layer.out_features) for layer in self._block_linears().values())
        shapes = projector_shapes(self.vision.config, self.head_weight.shape[1], self.num_frames)
        return sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.split(".")[0] == group)

    def trainable_table(self):
        """The table of parameters by group, as text: total, trained, number type."""
        total, trained = dict.fromkeys(GROUPS, 0), dict.fromkeys(GROUPS, 0)
        dtypes = {group: set() for group in GROUPS}
        for name, parameter in self.named_parameters():
            group = self._group(name)
            if group == "lora" and ".default." not in name:
                continue  # a frozen reference copy
            total[group] += parameter.numel()
            trained[group] += parameter.numel() if parameter.requires_grad else 0
            dtypes[group].add(str(parameter.dtype).removeprefix("torch."))
        lines = [f"{'stage ' + str(self.stage):<10} {'parameters':>15} {'trained':>15}  type"]
        for group in GROUPS:
            shown = f"{trained[group]:,}" if trained[group] else "-"
            lines.append(f"{group:<10} {total[group]:>15,} {shown:>15}  {', '.join(sorted(dtypes[group]))}")
        lines.append(f"{'all':<10} {sum(total.values()):>15,} {sum(trained.values()):>15,}")
        return "\n".join(lines)

    def print_trainable(self):
        """Print `trainable_table`."""
        print(self.trainable_table(), flush=True)

    def train(self, mode=True):
        """The tower stays in eval mode. The LM, which has no dropout, checkpoints activations in train mode only."""
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

    @contextmanager
    def decoding(self):
        """Eval mode and no activation checkpointing, which would lose the KV cache; all as it was afterwards."""
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
        shape = (self.num_frames, self.image_size, self.image_size, 3)
        if frames.dtype != torch.uint8 or tuple(frames.shape[1:]) != shape:
            raise ModelError(f"frames are {frames.dtype} {list(frames.shape)}, need torch.uint8 [B, "
                             + ", ".join(map(str, shape)) + "]")
        b, t = frames.shape[:2]
        device = self.device
        # The tower runs in its own dtype, not under autocast; where that is float32, its convolution is without TF32.
        exact = self.dtype == torch.float32
        precision = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if exact else nullcontext()
        with torch.no_grad(), torch.autocast(device.type, enabled=False), precision:
            parts = []
            for part in frames.flatten(0, 1).split(FRAMES_PER_PASS):
                pixels = part.to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)  # [n, 3, S, S] in -1..1
                parts.append(self.vision(pixel_values=pixels.to(self.dtype)).last_hidden_state)
            patches = torch.cat(parts)  # [B*T, P, Dv]
        with self.autocast():
            patches = patches.view(b, t, *patches.shape[1:]) + self.temporal[:, None]  # [B, T, P, Dv]
            return self.projector(patches.flatten(0, 1)).view(b, self.num_visual_tokens, -1)

    def embed(self, input_ids, visual):
        """Embeddings [B, L, D] of input_ids [B, L] with visual [B, N, D] in the places of the placeholder tokens."""
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

    def forward(self, frames, input_ids, attention_mask, labels, num_items_in_batch=None, **ignored):
        """Token-weighted cross-entropy of the labels; only label positions reach the head.

        frames uint8 [B, T, S, S, 3]; input_ids, attention_mask, labels [B, L], labels -100 where not supervised.
        Returns {"loss": loss_sum / (num_items_in_batch or this batch's label tokens), "loss_sum", "num_tokens"}.
        """
        device = self.device
        input_ids, labels = input_ids.to(device), labels.to(device)
        embeds = self.embed(input_ids, self.encode_video(frames))
        hidden = self.hidden_states(embeds, attention_mask.to(device))
        counted = labels[:, 1:] != IGNORE_INDEX  # position i predicts token i + 1
        logps, _ = token_logps(hidden[:, :-1][counted], self.head_weight, labels[:, 1:][counted])
        loss_sum = -logps.sum()
        num_tokens = counted.sum()
        share = num_tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return {"loss": loss_sum / share, "loss_sum": loss_sum, "num_tokens": num_tokens}

    # ---- answers

    def prompt_batch(self, questions):
        """Left-padded prompts: (input_ids [B, L], attention_mask [B, L])."""
        prompts = [encode_prompt(self.tokenizer, question, self.num_visual_tokens) for question in questions]
        length = max(map(len, prompts))
        ids = torch.full((len(prompts), length), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt):] = torch.tensor(prompt)
            mask[row, length - len(prompt):] = 1
        return ids.to(self.device), mask.to(self.device)

    @torch.no_grad()
    def generate(self, frames, questions, *, max_new_tokens, temperature=0.0, num_samples=1, seed=None, visual=None):
        """Answer each question on its clip: `num_samples` answers in a row for each, as one list.

        frames uint8 [B, T, S, S, 3], or visual [B, N, D] from `encode_video` (frames is then not read). temperature 0
        is greedy. With a seed the answers are the same at every call with the same batch; the global generator is not
        touched then.
        """
        if max_new_tokens < 1 or num_samples < 1 or temperature < 0:
            raise ModelError(f"max_new_tokens ({max_new_tokens}) and num_samples ({num_samples}) must be at least 1, "
                             f"temperature ({temperature}) at least 0")
        if num_samples > 1 and temperature == 0:
            raise ModelError(f"{num_samples} samples need a temperature above 0: greedy answers are all the same")
        rows = len(frames) if visual is None else len(visual)
        if rows != len(questions) or rows == 0:
            raise ModelError(f"{rows} clips but {len(questions)} questions: one question a clip, at least one")
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, num_return_sequences=num_samples, eos_token_id=self.end_ids,
            pad_token_id=self.pad_token_id, suppress_tokens=self.banned_ids.tolist() or None, **options,
        )
        with self.decoding(), self.autocast():
            visual = self.encode_video(frames) if visual is None else visual.to(self.device)
            ids, mask = self.prompt_batch(questions)
            embeds = self.embed(ids, visual)
            with nullcontext() if seed is None else seeded(seed, self.device):
                out = self.causal_lm.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config)
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
        """Write a checkpoint folder, complete or not at all; one that stands there is replaced. Returns its path."""
        folder = Path(folder)
        stage = self.stage if stage is None else stage
        temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()
                 if self._group(name) in ("projector", "temporal")}
        save_file(state, temporary / "projector.safetensors")
        if isinstance(self.llm, PeftModel):
            self.llm.save_pretrained(temporary / "adapter", selected_adapters=["default"], save_embedding_layers=False)
            (temporary / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        self.tokenizer.save_pretrained(temporary)
        meta = self._meta(stage)
        (temporary / "drivevlm.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        return folder

    def _meta(self, stage):
        lora = None
        if isinstance(self.llm, PeftModel):
            config = self.llm.peft_config["default"]
            lora = {"r": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
        return {
            "format": 1,
            "stage": stage,
            **self.base,
            "num_frames": self.num_frames,
            "image_size": self.image_size,
            "tokens_per_frame": self.tokens_per_frame,
            "num_visual_tokens": self.num_visual_tokens,
            "placeholder": self.tokenizer.convert_ids_to_tokens(self.placeholder_id),
            "dtype": str(self.dtype).removeprefix("torch."),
            "prompts": dict(MODES),
            "lora": lora,
            "git_commit": git_commit(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
