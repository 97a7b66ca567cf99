"""A step of stage 2 on one clip with both of its texts: one row behind one video (`shared_prefix`), or two plain rows.

    python -m bench.sft_step                     CPU, float32, a Qwen3 of 100 M parameters; about 3 minutes on one core
    python -m bench.sft_step --device cuda --dtype bfloat16 --hidden 2560 --layers 36 --heads 32 --kv_heads 8 \\
        --intermediate 9728 --vocab 151936 --tower 1152 27 16 4304

Both arms have the same random weights, the same frames (16, of 81 visual tokens each, as in the real configuration) and
the same texts, as long as usual ones; losses and gradients must agree. The plain rows are computed one at a time, so
that neither arm pays for padding. Time is that of forward and backward pass, the tower's included. Prints a table and
writes one JSON file.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from bench.grpo_step import ROOT, machine
from dataset import IGNORE_INDEX, MODES, collate, encode_prompt, pack_examples
from model import DTYPES, DriveVLM, VisionTower

FRAMES, IMAGE_SIZE, PATCH = 16, 384, 14
ANSWERS = {"microscope": 442, "copilot": 53}  # tokens: the mean of 300 real reports, a Copilot line of 45 words


def build(args) -> DriveVLM:
    torch.manual_seed(0)
    size, layers, heads, intermediate = args.tower
    tower = SiglipVisionModel(SiglipVisionConfig(
        hidden_size=size, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=intermediate,
        image_size=IMAGE_SIZE, patch_size=PATCH, vision_use_head=False)).to(DTYPES[args.dtype])
    config = Qwen3Config(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim, tie_word_embeddings=True, max_position_embeddings=65536)
    with torch.device(args.device):
        llm = Qwen3ForCausalLM._from_config(config, dtype=DTYPES[args.dtype])
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/base/language")
    model = DriveVLM(VisionTower(tower).to(args.device), llm, tokenizer, num_frames=FRAMES, pooling=3,
                     dtype=args.dtype, seed=0, base={"vision_model": {}, "language_model": {}})
    model.add_lora(32, 64, 0.0, seed=0)
    model.set_trainable("lora", "projector")
    model.activation_checkpointing(args.checkpointing)
    if args.compile_blocks:
        model.compile_blocks()
    return model


def make_rows(model) -> tuple[list[dict], list[dict]]:
    """(the plain rows, the shared row) of one clip, for `collate`."""
    frames = torch.randint(0, 256, (FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8)
    examples = []
    for mode, length in ANSWERS.items():
        prompt = encode_prompt(model.tokenizer, MODES[mode], model.num_visual_tokens)
        answer = torch.randint(300, 900, (length,)).tolist()
        examples.append({"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer})
    rows = [{"id": mode, "frames": frames, **example} for mode, example in zip(ANSWERS, examples, strict=True)]
    return rows, [{"id": "both", "frames": frames, **pack_examples(examples, model.placeholder_id)}]


def step(model, batches) -> tuple[float, float, dict]:
    """(seconds, loss, gradients) of one clip's share of a step: forward and backward pass of each batch."""
    model.zero_grad()
    num_labels, loss, start = sum(ANSWERS.values()), 0.0, time.perf_counter()
    for batch in batches:
        share = model(**batch, num_items_in_batch=num_labels)["loss"]
        share.backward()
        loss += share.item()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return time.perf_counter() - start, loss, gradients


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="[cpu]")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="[float32]")
    for name, value in {"vocab": 8192, "hidden": 768, "intermediate": 2304, "layers": 14, "heads": 12, "kv_heads": 4,
                        "head_dim": 64, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"[{value}]")
    parser.add_argument("--tower", type=int, nargs=4, default=[256, 10, 4, 1024],
                        metavar=("SIZE", "LAYERS", "HEADS", "INTERMEDIATE"), help="[256 10 4 1024]")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--compile_blocks", action="store_true", help="the key of this name, in both arms")
    parser.add_argument("--json", type=Path, default=Path("output/bench/sft_step.json"), help="JSON file to write")
    args = parser.parse_args(argv)
    model = build(args)
    model.train()
    plain, shared = make_rows(model)
    arms = {"plain rows": [collate([row], model.pad_token_id) for row in plain],
            "shared_prefix": [collate(shared, model.pad_token_id)]}
    seconds = {name: [] for name in arms}
    for _ in range(args.repeats + 1):  # the first is not counted
        results = {}
        for name, batches in arms.items():
            taken, *results[name] = step(model, batches)
            seconds[name].append(taken)
    (loss, gradients), (shared_loss, shared_gradients) = results.values()
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    gaps = torch.stack([(shared_gradients[name] - gradient).norm() for name, gradient in gradients.items()])
    found = {"seconds": {}, "tokens": {}, "loss_gap": abs(loss - shared_loss),
             "gradient_gap": (gaps.norm() / norm).item()}
    for name, batches in arms.items():
        found["seconds"][name] = statistics.median(seconds[name][1:])
        found["tokens"][name] = sum(batch["input_ids"].numel() for batch in batches)
    size = sum(p.numel() for p in model.causal_lm.parameters()) / 1e6
    print(f"{machine(args.device)}, torch {torch.__version__}, a language model of {size:.0f} M parameters")
    print("| rows | tokens | seconds |\n| --- | --- | --- |")
    for name in arms:
        print(f"| {name} | {found['tokens'][name]:,} | {found['seconds'][name]:.1f} |")
    times = list(found["seconds"].values())
    print(f"{times[0] / times[1]:.2f}x; loss gap {found['loss_gap']:.1e}, gradient gap {found['gradient_gap']:.1e}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({**vars(args), **found}, indent=2, default=str))


if __name__ == "__main__":
    main()
