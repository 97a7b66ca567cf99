"""Turns a checkpoint into a folder to hand over: the language model with the adapter merged in, the projector, the
tokenizer and a model card.

    python export.py --checkpoint output/stage3 --output_dir output/export --metrics output/evaluate/metrics.json
    python generate.py --checkpoint output/export --video drive.mp4 --mode copilot
    python export.py --checkpoint output/export --output_dir output/prompt --prompt_embeds true \\
        --video drive.mp4 --mode copilot

The folder is a model of transformers (`AutoModelForCausalLM.from_pretrained`) and, for our own programs, a checkpoint
that no longer needs the base language model; the tower is still read by name. The adapter is added to the weights in
float32, and the sum is rounded once to the checkpoint's number type. At full size, by arithmetic: 9 GB of memory (Qwen3
in bfloat16, the tower, one layer in float32), no GPU, and 8.1 GB on disk.

With --prompt_embeds, or --video alone, what is written is a prompt for an inference server that takes embeddings:
<clip>.<mode>.safetensors with "prompt_embeds" [L, D] (question and clip, as the language model reads them) and
<clip>.<mode>.json. vLLM takes such a tensor as `{"prompt_embeds": tensor}` where it is started with
`--enable-prompt-embeds` and the exported folder as its model; we have not run vLLM.
"""

import json
import shutil
from pathlib import Path

from training.common import fail, load_config, run_main
from training.config import ExportConfig

if __name__ == "__main__":  # --help and wrong flags are answered before torch is imported, which takes seconds
    load_config(ExportConfig, description=__doc__)

import torch
from safetensors.torch import save_file

from dataset import MODE_TABLE, is_clip, read_frames, read_times, video_reader_problems
from evaluation.report import table
from model import DriveVLM, ModelError, read_checkpoint
from training.common import git_commit, write_json, write_text

CARD = """# {title}

A driving video-language model, made by stage {stage} of Drive-VLM. It reads {frames} of a dash-cam clip and
answers at the granularity asked for:

{questions}

| | |
| --- | --- |
| language model | {language_model}, its LoRA adapter merged in |
| vision tower | {vision_model}, frozen; not in this folder |
| projector | `projector.safetensors`: {tokens_per_frame} visual tokens a frame |
| number type | {dtype} |
| trained on | {num_trained} clips ({num_held_out} held out); names in `clips.json` |
| made by | commit {commit}, from `{checkpoint}` |

## Use

    python generate.py --checkpoint THIS_FOLDER --video drive.mp4 --mode copilot

`AutoModelForCausalLM.from_pretrained("THIS_FOLDER")` gives the language model alone; it sees a clip only through the
embeddings that the tower and the projector make of it.

## Results

{results}

## Limits

This is research, not for the control of a vehicle. It mentions what is not there and keeps silent about what is. It has
been trained on {num_trained} clips: what they do not show, it does not know. Stage 3 unlearns what an object detector
can check; nothing checks what has no box.

## Licences

The language model and the tower keep the licences of {language_model} and {vision_model}; the clips and
captions that it was trained on keep theirs, and may forbid commercial use. Drive-VLM's own code is MIT.
"""


def main(argv: list[str] | None = None) -> int:
    config = load_config(ExportConfig, argv, description=__doc__)
    out, problems, meta = Path(config.output_dir), video_reader_problems(config), {}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.append(f"--output_dir: {out} is in use; give a folder that is empty or not there")
    try:
        _, meta = read_checkpoint(config.checkpoint)
    except ModelError as error:
        problems.append(f"--checkpoint: {error}")
    if config.video and not is_clip(config.video):
        problems.append(f"--video: no such file: {config.video}")
    if config.mode not in MODE_TABLE:
        problems.append(f"--mode: {config.mode!r} is none of {', '.join(MODE_TABLE)}")
    if config.metrics and not Path(config.metrics).is_file():
        problems.append(f"--metrics: no such file: {config.metrics}")
    if meta.get("merged") and not config.video:
        problems.append(f"--checkpoint: {config.checkpoint} is an export already")
    if problems:
        fail(problems)
    model = DriveVLM.from_checkpoint(config.checkpoint, vision_model=config.vision_model,
                                     language_model=config.language_model)
    work = out.with_name(f".{out.name}.tmp")  # complete, or not there
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        if config.prompt_embeds or config.video:
            write_prompt(model, config, work)
        else:
            write_model(model, meta, config, work)
        for file in work.iterdir():
            file.chmod(0o644)  # safetensors makes files that nobody else may read
        shutil.rmtree(out, ignore_errors=True)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"written: {out}")
    return 0


@torch.no_grad()
def merge_adapter(model: DriveVLM) -> None:
    """Add the adapter to the weights that it adapts, layer by layer in float32, and drop it."""
    if not model.has_adapter:
        return
    for module in model.llm.modules():
        if hasattr(module, "lora_A"):
            weight, scaling = module.base_layer.weight, module.scaling["default"]  # [out, in]
            update = module.lora_B["default"].weight.float() @ module.lora_A["default"].weight.float()
            weight.copy_(weight.float() + scaling * update)
    model.llm = model.llm.unload()


def write_model(model: DriveVLM, meta: dict, config: ExportConfig, folder: Path) -> None:
    """The merged language model, tokenizer, projector, drivevlm.json and README.md."""
    merge_adapter(model)
    model.save_checkpoint(folder / "parts", stage=meta["stage"])
    for file in (folder / "parts").iterdir():
        file.rename(folder / file.name)
    (folder / "parts").rmdir()
    model.causal_lm.save_pretrained(folder)
    write_json(folder / "drivevlm.json", {**meta, "lora": None, "merged": True, "git_commit": git_commit()}, indent=1)
    write_text(folder / "README.md", model_card(model, meta, config))


def model_card(model: DriveVLM, meta: dict, config: ExportConfig) -> str:
    questions = "\n".join(f'- {mode}: "{info.question}"' for mode, info in MODE_TABLE.items())
    results = "Not measured: give `export.py` the metrics.json of `evaluate.py` (`--metrics`)."
    if config.metrics:
        metrics = json.loads(Path(config.metrics).read_text(encoding="utf-8"))
        results = (f"From `{config.metrics}`; ± half of the 95% bootstrap interval over clips. The columns are "
                   f"explained in Drive-VLM's docs/evaluation.md.\n\n{table(metrics)}")
    frames = f"{model.num_frames} frames{', each with its time,' if model.time_stamps else ''}"
    return CARD.format(
        title=Path(config.output_dir).name, stage=meta["stage"], frames=frames, questions=questions,
        language_model=meta["language_model"]["name"], vision_model=meta["vision_model"]["name"],
        tokens_per_frame=meta["tokens_per_frame"], dtype=meta["dtype"], num_trained=len(model.clips["trained"]),
        num_held_out=len(model.clips["held_out"]), commit=(meta.get("git_commit") or "unknown")[:10],
        checkpoint=config.checkpoint, results=results)


@torch.no_grad()
def write_prompt(model: DriveVLM, config: ExportConfig, folder: Path) -> None:
    """The embeddings of one clip and question, and what they are of."""
    question = config.question or MODE_TABLE[config.mode].question
    frames = read_frames(config.video, model.num_frames, model.image_size)
    times = read_times(config.video, model.num_frames) if model.time_stamps else None  # [T]
    ids, _ = model.prompt_batch([question], [times])  # [1, L]
    with model.autocast():
        embeds = model.embed(ids, model.encode_video(torch.from_numpy(frames)[None]))[0]  # [L, D]
    name = f"{Path(config.video).stem}.{config.mode}"
    save_file({"prompt_embeds": embeds.to(model.dtype).contiguous()}, folder / f"{name}.safetensors")
    write_json(folder / f"{name}.json", {
        "video": config.video, "question": question, "checkpoint": config.checkpoint, "tokens": len(embeds),
        "max_tokens": MODE_TABLE[config.mode].max_new_tokens, "stop_token_ids": model.end_ids}, indent=1)


if __name__ == "__main__":
    run_main(main)
