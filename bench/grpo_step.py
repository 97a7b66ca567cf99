"""A GRPO step on one prompt: the shared prefix of stage3/grpo.py compared with a plain implementation, same weights.

    python -m bench.grpo_step                          CPU, float32, Qwen3 with 8 layers of size 512; about 20 minutes
    python -m bench.grpo_step --no-growth              only the first comparison; about 3 minutes
    python -m bench.grpo_step --device cuda --dtype bfloat16 --hidden 2560 --layers 36 --heads 32 --kv_heads 8 \\
        --intermediate 9728 --vocab 151936 --tokens 256 --plain_rows 1

The plain implementation does what public trainers for vision-language models commonly do, at least in part: one
generation with its own prefill per completion, prompt and video in every row, logits of the whole vocabulary at every
position, a second copy of the model as the reference. Both arms sample with the same seeds and must give the same
completions; both are scored on these, and losses and gradients must agree. No completion ends early, so both do the
same work. Both are given the visual tokens, so the time that our cache of visual tokens saves is not counted.

Phases: rollout (prefill and decode), scoring (log-probs of the reference), training (log-probs of the policy, loss,
backward). Memory is the peak during a phase minus the use before it; the plain implementation's second copy of the
weights is reported separately. Prints tables and writes one JSON file.
"""

import argparse
import copy
import ctypes
import gc
import json
import platform
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from dataset import MODES, encode_prompt
from model import DTYPES, DriveVLM, VisionTower
from stage3.grpo import Group, completion_logps, grpo_loss, load_reference, reference_policy
from stage3.rollout import sample_groups
from training.common import cpu_count, stable_seed

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("rollout", "scoring", "training")


def build(args, prompt_tokens):
    """A DriveVLM with random weights whose prompt has `prompt_tokens` tokens, with one visual token per frame. The
    policy's adapter differs from the reference's, so that the KL is not 0."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/base/language")
    frames = prompt_tokens - len(encode_prompt(tokenizer, MODES["microscope"], 0))
    vision = SiglipVisionModel(SiglipVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                                  num_attention_heads=1, image_size=24, patch_size=8,
                                                  vision_use_head=False))
    config = Qwen3Config(vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.intermediate,
                         num_hidden_layers=args.layers, num_attention_heads=args.heads,
                         num_key_value_heads=args.kv_heads, head_dim=args.head_dim, tie_word_embeddings=True,
                         max_position_embeddings=65536)
    with torch.device(args.device):
        llm = Qwen3ForCausalLM._from_config(config, dtype=DTYPES[args.dtype])
    model = DriveVLM(VisionTower(vision).to(args.device), llm, tokenizer, num_frames=frames, pooling=3,
                     dtype=args.dtype, seed=0, base={"vision_model": {}, "language_model": {}})
    model.add_lora(args.lora_r, 2 * args.lora_r, 0.0, seed=0)
    ends = torch.tensor(model.end_ids, device=model.device)
    model.banned_ids = torch.cat([model.banned_ids, ends])  # so that no completion ends early
    with tempfile.TemporaryDirectory() as folder:
        model.save_checkpoint(Path(folder) / "stage2", stage=2)
        load_reference(model, Path(folder) / "stage2")
    model.set_trainable("lora")
    with torch.no_grad():
        for name, parameter in model.llm.named_parameters():
            if ".lora_B.default." in name:
                parameter.normal_(std=0.02)
    model.activation_checkpointing(args.checkpointing)
    if args.compile_blocks:
        model.compile_blocks()
    return model


# ---------------------------------------------------------------------------------------------------------------------
# The two arms: each phase is a function of (args, model, case)


def our_rollout(args, model, case):
    (answers,) = sample_groups(model, [case["prompt"]], case["visual"][None], [case["seeds"]], [case["tokens"]])
    return [answer.ids for answer in answers]


def plain_rollout(args, model, case):
    ids = []
    for seed in case["seeds"]:
        ((answer,),) = sample_groups(model, [case["prompt"]], case["visual"][None], [[seed]], [case["tokens"]],
                                     shared_prefix=False)
        ids.append(answer.ids)
    return ids


def our_scoring(args, model, case):
    with torch.no_grad(), reference_policy(model):
        return completion_logps(model, [Group(case["prompt"], case["visual"], case["completions"])])[0]


def our_training(args, model, case):
    logps, _, mask = completion_logps(model, [Group(case["prompt"], case["visual"], case["completions"])])
    return finish(model, logps, mask, case, share=1.0)


def plain_logps(model, case, completions):
    """Log-probs from rows of [prompt | completion], with logits of every position, as is usual around a causal LM."""
    ids = torch.tensor([case["prompt"] + completion for completion in completions], device=model.device)  # [n, L]
    embeds = model.embed(ids, case["visual"].expand(len(ids), -1, -1))
    with model.autocast():
        logits = model.causal_lm(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), use_cache=False).logits
    logits = logits.float()[:, :-1].index_fill(2, model.banned_ids, float("-inf"))
    logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return logps[:, len(case["prompt"]) - 1 :]


def rows_of(args, case):
    return [slice(i, i + args.plain_rows) for i in range(0, len(case["completions"]), args.plain_rows)]


def plain_scoring(args, second_model, case):
    with torch.no_grad():
        return torch.cat([plain_logps(second_model, case, case["completions"][rows]) for rows in rows_of(args, case)])


def plain_training(args, model, case):
    total = 0.0
    for rows in rows_of(args, case):
        logps = plain_logps(model, case, case["completions"][rows])
        part = {**case, "advantages": case["advantages"][rows], "ref_logps": case["ref_logps"][rows]}
        total += finish(model, logps, torch.ones_like(logps), part, share=len(logps) / len(case["completions"]))
    return total


def finish(model, logps, mask, case, share):
    """Loss and backward, the same for both arms."""
    loss, _ = grpo_loss(logps, case["advantages"], mask, ref_logps=case["ref_logps"], beta=0.02, loss_type="grpo")
    (loss * share).backward()
    return loss.item() * share


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def settle():
    """Return freed memory to the system and reset the peak counters."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def memory_mb(device, key):
    """key: "VmRSS" (in use now) or "VmHWM" (peak since `settle`)."""
    if device.type == "cuda":
        use = torch.cuda.memory_allocated() if key == "VmRSS" else torch.cuda.max_memory_allocated()
        return use / 2**20
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def measure(function, args, model, case):
    """(result, seconds, peak MB above what was in use before)."""
    settle()
    before, start = memory_mb(model.device, "VmRSS"), time.perf_counter()
    result = function(args, model, case)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return result, seconds, memory_mb(model.device, "VmHWM") - before


def gradients(model):
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad(set_to_none=True)
    return grads


def compare(args, prompt_tokens, generations, tokens):
    """One prompt, both arms: times, memory, and how much losses and gradients differ."""
    model = build(args, prompt_tokens)
    generator = torch.Generator().manual_seed(1)
    visual = torch.randn(model.num_visual_tokens, args.hidden, generator=generator) * 0.02
    case = {
        "prompt": encode_prompt(model.tokenizer, MODES["microscope"], model.num_visual_tokens),
        "visual": visual.to(model.device, model.dtype), "tokens": tokens,
        "seeds": [stable_seed("bench", k) for k in range(generations)],
        "advantages": torch.linspace(-1.5, 1.5, generations, device=model.device),
    }
    case["completions"], *ours_rollout = measure(our_rollout, args, model, case)
    same, *plain_rolled = measure(plain_rollout, args, model, case)
    agree = sum(a == b for a, b in zip(case["completions"], same, strict=True)) / generations
    case["ref_logps"], *ours_scoring = measure(our_scoring, args, model, case)
    loss, *ours_training = measure(our_training, args, model, case)
    grads = gradients(model)

    settle()
    before = memory_mb(model.device, "VmRSS")
    second = copy.deepcopy(model)
    second.llm.set_adapter("reference")
    copy_mb = memory_mb(model.device, "VmRSS") - before
    plain_ref, *plain_scored = measure(plain_scoring, args, second, case)
    del second
    plain_loss, *plain_trained = measure(plain_training, args, model, case)
    plain_grads = gradients(model)
    result = {
        "prompt": prompt_tokens, "generations": generations, "tokens": tokens,
        "row_tokens": prompt_tokens + generations * (tokens - 1),
        "plain_tokens": generations * (prompt_tokens + tokens),
        "ours": dict(zip(PHASES, (ours_rollout, ours_scoring, ours_training), strict=True)),
        "plain": dict(zip(PHASES, (plain_rolled, plain_scored, plain_trained), strict=True)),
        "second_copy_mb": copy_mb, "same_completions": agree, "loss": loss, "plain_loss": plain_loss,
        "logp_gap": (case["ref_logps"] - plain_ref).abs().max().item(),
        "gradient_gap": ((grads - plain_grads).norm() / plain_grads.norm()).item(),
    }
    for arm in ("ours", "plain"):
        result[arm]["step"] = [sum(result[arm][p][0] for p in PHASES), max(result[arm][p][1] for p in PHASES)]
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def detail_table(result):
    lines = ["| phase | ours s | plain s | faster | ours MB | plain MB |", "|---|---|---|---|---|---|"]
    for phase in (*PHASES, "step"):
        (ours, ours_mb), (plain, plain_mb) = result["ours"][phase], result["plain"][phase]
        lines.append(f"| {phase} | {ours:.2f} | {plain:.2f} | {plain / ours:.1f}x | {ours_mb:.0f} | {plain_mb:.0f} |")
    return "\n".join(lines)


def growth_table(results):
    lines = ["| prompt | G | new tokens | tokens of the training pass | rollout s | training s | step s | ours MB "
             "| faster |", "|---|---|---|---|---|---|---|---|---|"]
    for r in results:
        ours, plain = r["ours"], r["plain"]
        pairs = " | ".join(f"{ours[p][0]:.2f} / {plain[p][0]:.2f}" for p in ("rollout", "training", "step"))
        lines.append(f"| {r['prompt']} | {r['generations']} | {r['tokens']} | {r['row_tokens']:,} / "
                     f"{r['plain_tokens']:,} | {pairs} | {ours['step'][1]:.0f} | "
                     f"{plain['step'][0] / ours['step'][0]:.1f}x |")
    return "\n".join(lines)


def machine(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 512), ("layers", 8), ("heads", 8), ("kv_heads", 4), ("head_dim", 64),
                          ("intermediate", 1536), ("vocab", 8192), ("lora_r", 16), ("prompt", 1330),
                          ("generations", 8), ("tokens", 128), ("plain_rows", 8)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--threads", type=int, default=cpu_count())
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False,
                        help="recompute activations in the backward pass, in both arms")
    parser.add_argument("--compile_blocks", action="store_true",
                        help="the key of this name, in both arms; compiled in the warm-up")
    parser.add_argument("--growth", action=argparse.BooleanOptionalAction, default=True,
                        help="also with half and double the prompt, generations and tokens")
    parser.add_argument("--out", type=Path, default=Path("output/bench/grpo_step.json"))
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    sizes = f"hidden {args.hidden}, {args.layers} layers, vocabulary {args.vocab:,}, {args.dtype}"
    about = {"machine": machine(args.device), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
             "transformers": transformers.__version__, "model": sizes}
    print(f"One GRPO step on one prompt | {about['machine']} | torch {torch.__version__} | {about['date']}\n"
          f"Qwen3 with random weights: {sizes}")
    compare(args, 64, 2, 4)  # warms up threads and kernels
    centre = (args.prompt, args.generations, args.tokens)
    results = [compare(args, *centre)]
    first = results[0]
    print(f"\nprompt {args.prompt}, G {args.generations}, {args.tokens} new tokens; a second copy of the "
          f"model takes {first['second_copy_mb']:.0f} MB more\n\n{detail_table(first)}\n\n"
          f"same completions {first['same_completions']:.0%} | loss {first['loss']:.6f} / {first['plain_loss']:.6f} | "
          f"largest log-prob gap {first['logp_gap']:.1e} | gradient gap {first['gradient_gap']:.1e}", flush=True)
    if args.growth:
        for axis in range(3):
            for factor in (0.5, 2):
                point = [int(value * factor) if i == axis else value for i, value in enumerate(centre)]
                results.append(compare(args, *point))
        order = sorted(results[1:] + [first] * 3, key=lambda r: (r["prompt"], r["generations"], r["tokens"]))
        shown = list({(r["prompt"], r["generations"], r["tokens"]): r for r in order}.values())
        print(f"\nhow it scales (ours / plain)\n\n{growth_table(shown)}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**about, "arguments": {k: str(v) for k, v in vars(args).items()},
                                    "results": results}, indent=1) + "\n")
    print(f"\n{args.out}")


if __name__ == "__main__":
    main()
