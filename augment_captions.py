"""Raw captions -> training rows: a chat model rewrites each caption (Microscope) and summarises it (Copilot).

    python augment_captions.py --data raw.json --output data/captions.json
    torchrun --nproc_per_node 4 augment_captions.py --data raw.json --output data/captions.json
    python augment_captions.py --data raw.json --output out.jsonl --language_model ANY_CHAT_MODEL --num_rewrites 2

Reads every form of row that training reads and writes one row per clip: {"video", "microscope": [original, rewrites
...], "copilot": [summaries ...]}. Each sampled text is checked; a text that fails is dropped, never repaired, and
report.json counts the reasons. A clip whose summaries all fail keeps a row without "copilot". Interrupt and rerun it:
it resumes and ends in the same file. Texts that the data already holds are kept, so a second run can fill up the
output of the first.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from training.common import check_gpus, fail, load_config, print0, process_rank, replacing, run_main, write_json
from training.config import AugmentConfig

if __name__ == "__main__":  # answer --help and mistyped flags before the slow imports
    load_config(AugmentConfig, description=__doc__)

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import model
from dataset import MODES, DataError, clip_key, find_control_text, load_entries
from stage3.mentions import find_mentions

# {least}, {most} and {middle} are numbers of words.
PROMPTS = {
    "microscope": """Below is a description of a clip from a car's front camera. Tell it again in your own words.

Keep every fact: each road user, colour, light, sign, place and movement, and the order in which things happen. Say \
nothing that the description does not say, however likely it may be. Choose other words and other sentences wherever \
you can, and write between {least} and {most} words of flowing prose: no list, no heading, no remark about the task. \
Answer with the new description alone.

Description:
{caption}""",
    "copilot": """Below is a description of a clip from a car's front camera. Sum it up for a driver who can spare it \
one glance.

Say what matters for driving, in the order in which it happens: who is on the road and what they do, what lights and \
signs demand, what our own car does. Name nothing that the description does not name, and leave out mood and guesses. \
Write one paragraph of {least} to {most} words, best about {middle}: no list, no heading, no remark about the task. \
Answer with the summary alone.

Description:
{caption}""",
}

TOP_K = 50  # only this many of the likeliest tokens are sampled


# ---- clips and requests ----------------------------------------------------------------------------------------------


@dataclass
class Clip:
    video: str
    texts: dict[str, list[str]] = field(default_factory=lambda: {mode: [] for mode in MODES})


@dataclass(frozen=True)
class Request:
    """One text to sample."""

    prompt: str
    seed: int
    source: str  # the original caption
    max_words: int


def gather_clips(entries):
    """One Clip per video, in file order, with the texts that the data holds for it."""
    clips = {}
    for entry in entries:
        texts = clips.setdefault(clip_key(entry.video), Clip(entry.video)).texts[entry.mode]
        texts += [text for text in entry.captions if text not in texts]
    return list(clips.values())


def word_limits(mode, source, config):
    """(least, most) words of a new text about the original caption `source`."""
    if mode == "copilot":
        return config.summary_min_words, config.summary_max_words
    words = len(source.split())
    return math.ceil(words * config.rewrite_shortest), math.floor(words * config.rewrite_longest)


def missing_texts(clip, mode, config):
    """How many new texts the clip's row lacks; 0 if there is no original, or if it is too short to summarise."""
    if not clip.texts["microscope"]:
        return 0
    if mode == "microscope":
        return max(1 + config.num_rewrites - len(clip.texts[mode]), 0)
    too_short = len(clip.texts["microscope"][0].split()) < config.summary_min_words
    return 0 if too_short else max(config.num_summaries - len(clip.texts[mode]), 0)


def make_requests(clip, mode, config):
    """The texts to sample for one clip and mode: the missing ones and the spares."""
    count = missing_texts(clip, mode, config)
    if count == 0:
        return []
    source = clip.texts["microscope"][0]
    least, most = word_limits(mode, source, config)
    prompt = PROMPTS[mode].format(caption=source, least=least, most=most, middle=(least + most) // 2)
    keys = [f"{config.seed}/{clip_key(clip.video)}/{mode}/{n}" for n in range(count + config.spares)]
    seeds = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") for key in keys]
    return [Request(prompt, seed, source, most) for seed in seeds]


# ---- the teacher -----------------------------------------------------------------------------------------------------


class SeededSampling:
    """A logits processor that samples each row's token with that row's own random numbers.

    Only the sampled token keeps a finite score, so greedy decoding takes it. uniforms: [B, steps], one per token, drawn
    in advance from the request's seed, so that a text does not depend on what else is in the batch.
    """

    def __init__(self, uniforms, config, vocab_size):
        self.uniforms, self.config, self.vocab_size = uniforms, config, vocab_size
        self.step = 0

    def __call__(self, input_ids, scores):  # [B, L], [B, V] -> [B, V]
        known = scores[:, : self.vocab_size].float()  # embedding rows past it are not tokens
        values, ids = known.topk(min(TOP_K, known.shape[1]))  # [B, K], likeliest first
        p = (values / self.config.temperature).softmax(-1)
        p = p.masked_fill(p.cumsum(-1) - p >= self.config.top_p, 0.0)
        edges = p.cumsum(-1)
        drawn = self.uniforms[:, self.step, None] * edges[:, -1:]
        choice = (edges <= drawn).sum(-1, keepdim=True).clamp(max=(p > 0).sum(-1, keepdim=True) - 1)
        self.step += 1
        return torch.full_like(scores, -math.inf).scatter(1, ids.gather(1, choice), 0.0)


class Teacher:
    """A chat model that answers requests: [Request] -> [(text, whether it ended by itself)]."""

    def __init__(self, config, tokenizer):
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, model.resolve_dtype(config.dtype))
        self.config, self.tokenizer = config, tokenizer
        self.model = AutoModelForCausalLM.from_pretrained(config.language_model, dtype=dtype).to(device).eval()
        self.end_ids = self._find_end_ids()
        pad = tokenizer.pad_token_id
        self.pad_id = self.end_ids[0] if pad is None else pad
        # otherwise the published defaults (penalties, minimum lengths, temperatures) apply to what we do not pass
        self.model.generation_config = GenerationConfig(eos_token_id=self.end_ids, pad_token_id=self.pad_id)

    def _find_end_ids(self):
        """All eos ids of model and tokenizer, and the token that the template writes after an answer."""
        eos = self.model.generation_config.eos_token_id
        ids = [*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id]
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "SENTINEL"}]
        tail = self.tokenizer.apply_chat_template(turns, tokenize=False).rpartition("SENTINEL")[2]
        after = self.tokenizer.encode(tail, add_special_tokens=False)
        ids += [i for i in after[:1] if i in self.tokenizer.added_tokens_decoder]
        return list(dict.fromkeys(i for i in ids if i is not None))

    def encode(self, prompt):
        turns = [{"role": "user", "content": prompt}]
        # enable_thinking=False: a hybrid model answers at once; other templates ignore it
        return self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True, enable_thinking=False
        )["input_ids"]

    def token_limit(self, request):
        """Tokens for `max_words` words, at the original's tokens per word, plus a quarter."""
        tokens = len(self.tokenizer.encode(request.source, add_special_tokens=False))
        return math.ceil(1.25 * request.max_words * tokens / len(request.source.split())) + 16

    @torch.inference_mode()
    def __call__(self, requests):
        if not requests:
            return []
        prompts = {r.prompt: self.encode(r.prompt) for r in requests}
        limits = [self.token_limit(r) for r in requests]
        length = max(len(ids) for ids in prompts.values())
        rows = [[self.pad_id] * (length - len(prompts[r.prompt])) + prompts[r.prompt] for r in requests]
        mask = [[0] * (length - len(prompts[r.prompt])) + [1] * len(prompts[r.prompt]) for r in requests]
        draws = [torch.rand(max(limits), generator=torch.Generator().manual_seed(r.seed)) for r in requests]
        device = self.model.device
        output = self.model.generate(
            input_ids=torch.tensor(rows, device=device), attention_mask=torch.tensor(mask, device=device),
            logits_processor=[SeededSampling(torch.stack(draws).to(device), self.config, len(self.tokenizer))],
            max_new_tokens=max(limits), do_sample=False,
        )
        return [self.answer(ids[:limit]) for ids, limit in zip(output[:, length:].tolist(), limits, strict=True)]

    def answer(self, ids):
        """(text before the first end id, whether there was one); control tokens stay, for `find_fault` to see."""
        end = next((n for n, i in enumerate(ids) if i in self.end_ids), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return unicodedata.normalize("NFC", text.strip()), end is not None


# ---- the checks ------------------------------------------------------------------------------------------------------

CONTROL = re.compile(r"<\|[^|<>]*\|>|</?think>|\ufffd")  # of any model; find_control_text knows the teacher's own
MARKUP = re.compile(r"^\s*(?:[(\[]?(?:\d{1,2}|[a-h])[.):\]](?=\s|$)|[-*•#>]+\s|```)|\*\*|^[\"“].*[\"”]$", re.M)
PREAMBLE = re.compile(
    r"^(?:here(?:'s| is| are)|below is|i'm|i am|i (?:can|can't|cannot|could|will|would|have|apologi[sz]e)|"
    r"as an? (?:ai|language|assistant)|the following (?:is|are|text|description|summary))\b"
    r"|^(?:sure|certainly|absolutely|of course|okay|ok|great|understood)\s*[,.!:—-]"
    r"|^[^.!?\n]{0,40}\b(?:description|summary|rewrite|rewritten|rephrased|version|option|caption|answer|output|note)\b"
    r"[^.!?\n]{0,20}:"
    r"|\b(?:let me know|hope this helps|feel free to|word count)\b|\(\d+ words\)",
    re.I,
)
REASONS = {
    "not_ended": "cut off before its end",
    "empty": "no text",
    "control_token": "a control token or broken character",
    "markup": "numbering, bullets, headings, quotes around it",
    "preamble": "talks about the task",
    "length": "too short or too long for its mode",
    "invented_object": "an object that the original lacks",
    "near_copy": "a near-copy of another text",
}


def overlap(a, b, n=4):
    """Runs of n words that two texts share, relative to the text with fewer runs: 0 to 1; changing one word in ten
    leaves about 0.6."""
    words = [re.findall(r"[^\W_]+", text.lower()) for text in (a, b)]
    n = max(min(n, *map(len, words)), 1)
    one, other = (runs_of(some, n) for some in words)
    return len(one & other) / max(min(len(one), len(other)), 1)


def runs_of(words, n):
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def claims(text):
    """What a text says about objects: "car", or "no car" if it denies one."""
    return {("no " if mention.negated else "") + mention.object for mention in find_mentions(text)}


def find_fault(text, ended, limits, source, others, config, tokenizer):
    """(reason, detail) of the first check that the text fails, None if it is sound.

    limits: (least, most) words; source: the original caption; others: texts that it must not repeat.
    """
    if not text:
        return "empty", ""
    if not ended:
        return "not_ended", ""
    if control := find_control_text(tokenizer, text) or (CONTROL.search(text) or [None])[0]:
        return "control_token", control
    if found := MARKUP.search(text):
        return "markup", found[0].strip()[:40]
    if found := PREAMBLE.search(text.replace("’", "'")):
        return "preamble", found[0][:40]
    count = len(text.split())
    if not limits[0] <= count <= limits[1]:
        return "length", f"{count} words instead of {limits[0]} to {limits[1]}"
    if invented := claims(text) - claims(source):
        return "invented_object", ", ".join(sorted(invented))
    share = max((overlap(text, other) for other in others), default=0.0)
    if share > config.max_overlap:
        return "near_copy", f"shares {share:.0%} of its runs of 4 words"
    return None


def choose(clip, mode, answers, config, tokenizer):
    """Check sampled texts in order -> (texts to keep, {"sampled", "spare", "dropped"}: what became of each)."""
    kept, dropped, spare = [], [], 0
    for text, ended in answers:
        if len(kept) == missing_texts(clip, mode, config):
            spare += 1
            continue
        source, others = clip.texts["microscope"][0], clip.texts[mode] + kept
        fault = find_fault(text, ended, word_limits(mode, source, config), source, others, config, tokenizer)
        if fault is None:
            kept.append(text)
        else:
            dropped.append({"reason": fault[0], "detail": fault[1], "text": text})
    return kept, {"sampled": len(answers), "spare": spare, "dropped": dropped}


def augment_clips(clips, teacher, config, tokenizer):
    """Sample for some clips together -> [{"row": the row to write, "log": {mode: what became of each text}}]."""
    results = [{"row": {"video": clip.video}, "log": {}} for clip in clips]
    for mode in PROMPTS:
        requests = [make_requests(clip, mode, config) for clip in clips]
        answers = iter(teacher([request for some in requests for request in some]))
        for clip, some, result in zip(clips, requests, results, strict=True):
            new, log = choose(clip, mode, [next(answers) for _ in some], config, tokenizer)
            result["log"][mode] = {"given": len(clip.texts[mode]), "new": len(new), **log}
            if clip.texts[mode] + new:
                result["row"][mode] = clip.texts[mode] + new
    for clip, result in zip(clips, results, strict=True):  # modes without a prompt here keep the texts that they have
        result["row"] |= {mode: texts for mode, texts in clip.texts.items() if texts and mode not in PROMPTS}
    return results


# ---- results: one JSON file per clip, so that a killed run resumes ---------------------------------------------------


def settings_of(config, clips):
    """Everything that decides the rows; a resumed run must have the same. The batch size only changes rounding."""
    free = ("data", "output", "clips_per_batch")
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in free}
    content = {"captions": [dataclasses.asdict(clip) for clip in clips], "prompts": PROMPTS}
    hashes = {key: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16] for key, value in content.items()}
    return {**settings, **hashes}


def result_file(folder, number):
    return folder / "clips" / f"{number:06d}.json"


def read_result(folder, number):
    """What `augment_clips` made of a clip; None if it is not done, or its file is damaged: it is sampled again."""
    try:
        return json.loads(result_file(folder, number).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def merge(clips, folder, config, settings):
    """Write the rows in order, dropped.jsonl and report.json; -> the report, or None while clips are missing."""
    if any(read_result(folder, number) is None for number in range(len(clips))):
        return None
    modes = {mode: {"given": 0, "sampled": 0, "new": 0, "spare": 0, "dropped": Counter(), "clips_without": []}
             for mode in PROMPTS}
    is_list = Path(config.output).suffix == ".json"
    with (replacing(config.output) as new_output, replacing(folder / "dropped.jsonl") as new_drops,
          open(new_output, "w", encoding="utf-8") as output, open(new_drops, "w", encoding="utf-8") as drops):
        for number in range(len(clips)):  # one in memory at a time
            result = read_result(folder, number)
            row = result["row"]
            line = json.dumps(row, ensure_ascii=False)
            output.write((",\n" if number else "[\n") + line if is_list else line + "\n")
            for mode, counts in result["log"].items():
                total = modes[mode]
                for key in ("given", "sampled", "new", "spare"):
                    total[key] += counts[key]
                total["clips_without"] += [] if mode in row else [row["video"]]
                for drop in counts["dropped"]:
                    total["dropped"][drop["reason"]] += 1
                    drops.write(json.dumps({"video": row["video"], "mode": mode, **drop}, ensure_ascii=False) + "\n")
        output.write("\n]\n" if is_list else "")
        report = {"output": config.output, "clips": len(clips), "settings": settings, "modes": modes}
        write_json(folder / "report.json", report, indent=1)
    return report  # the output, opened first, is renamed last


def print_report(report, folder):
    modes = list(report["modes"].values())

    def line(name, numbers, remark=""):
        print(f"  {name:26}" + "".join(f"{n:>12,}" for n in numbers) + (f"   {remark}" if remark else ""))

    print(f"\n  {'texts':26}" + "".join(f"{mode:>12}" for mode in report["modes"]))
    line("in the data", [m["given"] for m in modes])
    line("sampled", [m["sampled"] for m in modes])
    line("  kept", [m["new"] for m in modes])
    line("  not needed", [m["spare"] for m in modes], "the row already had all it needs")
    for reason, meaning in REASONS.items():
        if any(m["dropped"][reason] for m in modes):
            line(f"  dropped: {reason}", [m["dropped"][reason] for m in modes], meaning)
    line("clips without any", [len(m["clips_without"]) for m in modes])
    if lost := len(report["modes"]["copilot"]["clips_without"]):
        print(f"\n{lost:,} of {report['clips']:,} rows have no \"copilot\": no summary passed, or the original is too "
              "short to summarise.\nTo fill them up, run again on this output with another --output and --seed.")
    print(f"\nrows     {report['output']}\nreport   {folder / 'report.json'}\ndropped  {folder / 'dropped.jsonl'}")


# ---- the run ---------------------------------------------------------------------------------------------------------


def prepare(config, folder):
    """(clips, tokenizer, settings); exits with code 2 and everything that is wrong."""
    problems, clips, tokenizer = [], [], None
    try:
        clips = gather_clips(load_entries(config.data, config.default_mode))
    except DataError as error:
        problems.append(f"data: {error}")
    if clips and not any(clip.texts["microscope"] for clip in clips):
        problems.append(f"data: {config.data} has no detailed caption (mode microscope) to start from")
    settings, known = settings_of(config, clips), folder / "settings.json"
    if known.is_file() and clips:
        before = json.loads(known.read_text(encoding="utf-8"))
        problems += [f"output: {folder} was started with {key} {before.get(key)}, not {value}: remove the folder, or "
                     "give another --output" for key, value in settings.items() if before.get(key) != value]
    elif Path(config.output).exists() and not known.is_file():
        problems.append(f"output: {config.output} exists and is not from this script; give another --output")
    if problem := model.base_model_problem("language_model", config.language_model):
        problems.append(problem)
    elif Path(config.language_model).is_dir() or not problems:  # nothing is downloaded for a run that cannot start
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.language_model)
        except (OSError, ValueError) as error:
            problems.append(f"language_model: {error}")
    if tokenizer is not None:
        if not tokenizer.chat_template:
            problems.append(f"language_model: {config.language_model} has no chat template; a chat model is needed")
        originals = {clip.video: clip.texts["microscope"][0] for clip in clips if clip.texts["microscope"]}
        controls = {video: find_control_text(tokenizer, text) for video, text in originals.items()}
        problems += [f"data: the caption of {video} contains the control token {control}"
                     for video, control in controls.items() if control][:20]
    if problems:
        fail(problems)
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    write_json(known, settings, indent=1)
    return clips, tokenizer, settings


def sample_rows(clips, folder, config, tokenizer, make_teacher):
    """Write the results of this process's clips that are not done yet."""
    rank, world = process_rank()
    size = config.clips_per_batch
    groups = [range(start, min(start + size, len(clips))) for start in range(0, len(clips), size)][rank::world]
    done = {number for number in range(len(clips)) if read_result(folder, number)}
    # a batch holds the same clips in every run, whatever is done already and by how many processes: same rounding
    open_groups = [group for group in groups if not done.issuperset(group)]
    left = sum(map(len, open_groups))
    print0(f"teacher  {config.language_model}\nclips    {len(clips):,}, {len(done):,} of them already done"
           + (f"; {world} processes, this one takes {left:,}" if world > 1 else ""))
    if not open_groups:
        return
    teacher = make_teacher(config, tokenizer)
    with tqdm(total=left, unit="clip", disable=rank > 0) as bar:
        for group in open_groups:
            results = augment_clips([clips[number] for number in group], teacher, config, tokenizer)
            for number, result in zip(group, results, strict=True):
                if number not in done:
                    write_json(result_file(folder, number), result)
            bar.update(len(group))


def main(argv=None, make_teacher=Teacher):
    config = load_config(AugmentConfig, argv, description=__doc__)
    check_gpus()
    folder = Path(f"{config.output}.augment")
    clips, tokenizer, settings = prepare(config, folder)
    try:
        with FileLock(folder / f"rank-{process_rank()[0]:05d}.lock", timeout=0):
            sample_rows(clips, folder, config, tokenizer, make_teacher)
    except Timeout:
        print(f"another run is writing to {folder}", file=sys.stderr)
        return 1
    report = merge(clips, folder, config, settings)  # by the process that ends last, or by a later run
    if report is None:
        print0("This process's clips are done; the last process to end merges all rows (or a later run does).")
    else:
        print_report(report, folder)
    return 0


if __name__ == "__main__":
    run_main(main)
