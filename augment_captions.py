"""Raw captions -> training rows: a chat model rewrites each caption (Microscope) and summarises it (Copilot).

    python augment_captions.py --data raw.json --output data/captions.json
    torchrun --nproc_per_node 4 augment_captions.py --data raw.json --output data/captions.json
    python augment_captions.py --data raw.json --output out.jsonl --language_model ANY_CHAT_MODEL --num_rewrites 2

Reads every form of row that training reads and writes one row a clip: {"video", "microscope": [original, rewrites ..],
"copilot": [summaries ..]}. Each sampled text is checked; what fails is dropped, with its reason in report.json, and
never mended. A clip whose summaries all fail keeps a row without "copilot". Killed and started again, it goes on and
ends in the same file; texts that the data holds already are kept, so a second run over its output fills it up.
"""

import contextlib
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
from typing import Literal

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dataset import DataError, clip_key, find_control_text, load_entries
from stage3.vocabulary_config import find_mentions
from training import fail, load_config, model_problem, opt, print0, process_rank

# The two prompts, the only place where they stand. {least} and {most} are words.
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

TOP_K = 50  # no token is sampled that is not among so many likeliest


@dataclass
class AugmentConfig:
    """Caption augmentation"""

    data: str = opt("data/raw_captions.json", "raw captions: JSON, JSONL, or a folder of them, in any form of row")
    output: str = opt("data/captions.json", "rows to train on, .json or .jsonl; beside it a folder FILE.augment")
    language_model: str = opt("Qwen/Qwen3-4B-Instruct-2507", "teacher: causal LM with a chat template, folder or name")
    default_mode: Literal["microscope", "copilot"] = opt("microscope", "mode of rows whose question is not known")
    dtype: Literal["bfloat16", "float32"] = opt("bfloat16", "of the teacher's weights")
    seed: int = opt(42, "with clip, mode and number of the text, decides what is sampled")
    num_rewrites: int = opt(4, "Microscope texts wanted beside the original")
    num_summaries: int = opt(5, "Copilot texts wanted")
    spares: int = opt(2, "texts of each kind sampled beyond those wanted, to stand in for the ones that fail")
    clips_per_batch: int = opt(4, "clips whose texts are sampled together; lower it if memory runs out")
    temperature: float = opt(0.9, "of sampling")
    top_p: float = opt(0.95, "sample from the likeliest tokens that hold this probability together")
    rewrite_shortest: float = opt(0.7, "a rewrite has at least this share of the original's words")
    rewrite_longest: float = opt(1.4, "... and at most this one")
    summary_min_words: int = opt(30, "a summary has at least so many words; shorter originals are not summarised")
    summary_max_words: int = opt(60, "... and at most so many")
    max_overlap: float = opt(0.6, "a text that shares more of its runs of 4 words with another is a copy of it")

    def problems(self):
        at_least = {"num_rewrites": 0, "num_summaries": 0, "spares": 0, "clips_per_batch": 1,
                    "summary_min_words": 1}
        found = [f"{key} must be at least {low}, got {getattr(self, key)}"
                 for key, low in at_least.items() if getattr(self, key) < low]
        if self.temperature <= 0:
            found.append(f"temperature must be above 0, got {self.temperature}")
        found += [f"{key} must lie above 0 and at most at 1, got {getattr(self, key)}"
                  for key in ("top_p", "max_overlap") if not 0 < getattr(self, key) <= 1]
        if not 0 < self.rewrite_shortest <= self.rewrite_longest:
            found.append(f"rewrite_shortest {self.rewrite_shortest}, rewrite_longest {self.rewrite_longest}: "
                         "0 < shortest <= longest is wanted")
        if self.summary_max_words < self.summary_min_words:
            found.append(f"summary_max_words {self.summary_max_words} is below summary_min_words")
        return found


# ---- clips and what is asked about them ------------------------------------------------------------------------------


@dataclass
class Clip:
    video: str
    texts: dict[str, list[str]] = field(default_factory=lambda: {"microscope": [], "copilot": []})


@dataclass(frozen=True)
class Request:
    """One text to sample."""

    prompt: str
    seed: int
    source: str  # the original caption
    max_words: int


def gather_clips(entries):
    """One Clip a video, in file order, with the texts that the data holds for it."""
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


def wanted(clip, mode, config):
    """How many new texts the clip's row lacks; 0 where there is no original, or one too short to be summed up."""
    if not clip.texts["microscope"]:
        return 0
    if mode == "microscope":
        return max(1 + config.num_rewrites - len(clip.texts[mode]), 0)
    too_short = len(clip.texts["microscope"][0].split()) < config.summary_min_words
    return 0 if too_short else max(config.num_summaries - len(clip.texts[mode]), 0)


def make_requests(clip, mode, config):
    """The texts to sample for one clip and mode: those wanted, and the spares."""
    count = wanted(clip, mode, config)
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
    """A logits processor that draws each row's token with that row's own random numbers.

    One token keeps a finite score, so greedy decoding takes it. uniforms: [B, steps], one number a token, drawn
    beforehand from the request's seed: what else is in the batch changes nothing.
    """

    def __init__(self, uniforms, config, vocab_size):
        self.uniforms, self.config, self.vocab_size = uniforms, config, vocab_size
        self.step = 0

    def __call__(self, input_ids, scores):  # [B, L], [B, V] -> [B, V]
        known = scores[:, : self.vocab_size].float()  # embedding rows past the tokenizer's length are no tokens
        values, ids = known.topk(min(TOP_K, known.shape[1]))  # [B, K], likeliest first
        p = (values / self.config.temperature).softmax(-1)
        p = p.masked_fill(p.cumsum(-1) - p >= self.config.top_p, 0.0)
        edges = p.cumsum(-1)
        drawn = self.uniforms[:, self.step, None] * edges[:, -1:]
        choice = (edges <= drawn).sum(-1, keepdim=True).clamp(max=(p > 0).sum(-1, keepdim=True) - 1)
        self.step += 1
        return torch.full_like(scores, -math.inf).scatter(1, ids.gather(1, choice), 0.0)


class Teacher:
    """A chat model that answers requests: [Request] -> [(text, ended by itself)]."""

    def __init__(self, config, tokenizer):
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, config.dtype)
        self.config, self.tokenizer = config, tokenizer
        self.model = AutoModelForCausalLM.from_pretrained(config.language_model, dtype=dtype).to(device).eval()
        self.end_ids = self._find_end_ids()
        pad = tokenizer.pad_token_id
        self.pad_id = self.end_ids[0] if pad is None else pad
        # Nothing of the published generation settings (penalties, minimal lengths, temperatures) may slip in.
        self.model.generation_config = GenerationConfig(eos_token_id=self.end_ids, pad_token_id=self.pad_id)

    def _find_end_ids(self):
        """All eos ids of model and tokenizer, and the token that the template writes behind an answer."""
        eos = self.model.generation_config.eos_token_id
        ids = [*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id]
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "SENTINEL"}]
        tail = self.tokenizer.apply_chat_template(turns, tokenize=False).rpartition("SENTINEL")[2]
        behind = self.tokenizer.encode(tail, add_special_tokens=False)
        ids += [i for i in behind[:1] if i in self.tokenizer.added_tokens_decoder]
        return list(dict.fromkeys(i for i in ids if i is not None))

    def encode(self, prompt):
        turns = [{"role": "user", "content": prompt}]
        # enable_thinking: a hybrid model answers at once; other templates do not look at it.
        return self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True, enable_thinking=False
        )["input_ids"]

    def token_limit(self, request):
        """Tokens that `max_words` may take, at the original's tokens a word and a quarter more."""
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
        """(text, ended): all before the first end id; control tokens stay in the text, where the check sees them."""
        end = next((n for n, i in enumerate(ids) if i in self.end_ids), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return unicodedata.normalize("NFC", text.strip()), end is not None


# ---- the checks ------------------------------------------------------------------------------------------------------

CONTROL = re.compile(r"<\|[^|<>]*\|>|</?think>|\ufffd")  # of any model; the teacher's own tokens are asked for by name
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


def words_of(text):
    return re.findall(r"[^\W_]+", text.lower())


def overlap(a, b, n=4):
    """Share of runs of n words that two texts have in common, of the one with fewer; 0 to 1. One word in ten changed
    leaves about 0.6."""
    a, b = words_of(a), words_of(b)
    n = max(min(n, len(a), len(b)), 1)
    runs = [{tuple(words[i : i + n]) for i in range(len(words) - n + 1)} for words in (a, b)]
    return len(runs[0] & runs[1]) / max(min(map(len, runs)), 1)


def claims(text):
    """What a text says of objects: "car", or "no car" where it denies one."""
    return {("no " if mention.negated else "") + mention.object for mention in find_mentions(text)}


def find_fault(text, ended, limits, source, others, config, tokenizer):
    """Why a text cannot be kept: (reason, detail), the first that holds; None if it is sound.

    limits: (least, most) words; source: the original caption; others: texts that it must not repeat.
    """
    if not text:
        return "empty", ""
    if not ended:
        return "not_ended", ""
    if control := find_control_text(tokenizer, text) or CONTROL.search(text):
        return "control_token", str(control if isinstance(control, str) else control[0])
    if found := MARKUP.search(text):
        return "markup", found[0].strip()[:40]
    if found := PREAMBLE.search(text.replace("’", "'")):
        return "preamble", found[0][:40]
    count = len(text.split())
    if not limits[0] <= count <= limits[1]:
        return "length", f"{count} words; {limits[0]} to {limits[1]} are wanted"
    if invented := claims(text) - claims(source):
        return "invented_object", ", ".join(sorted(invented))
    share = max((overlap(text, other) for other in others), default=0.0)
    if share > config.max_overlap:
        return "near_copy", f"shares {share:.0%} of its runs of 4 words"
    return None


def choose(clip, mode, answers, config, tokenizer):
    """Check sampled texts in their order -> (texts to keep, {"sampled", "spare", "dropped"}: what became of each)."""
    kept, dropped, spare = [], [], 0
    for text, ended in answers:
        if len(kept) == wanted(clip, mode, config):
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
    """Rows of some clips, sampled together: [{"row": the row to write, "log": {mode: what became of each text}}]."""
    results = [{"row": {"video": clip.video}, "log": {}} for clip in clips]
    for mode in PROMPTS:
        requests = [make_requests(clip, mode, config) for clip in clips]
        answers = iter(teacher([request for some in requests for request in some]))
        for clip, some, result in zip(clips, requests, results, strict=True):
            new, log = choose(clip, mode, [next(answers) for _ in some], config, tokenizer)
            result["log"][mode] = {"given": len(clip.texts[mode]), "new": len(new), **log}
            if clip.texts[mode] + new:
                result["row"][mode] = clip.texts[mode] + new
    return results


# ---- part files, one a process: what is done stays done --------------------------------------------------------------


@contextlib.contextmanager
def replacing(path):
    """A text file that takes the place of `path` when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        yield file
    os.replace(temporary, path)


def settings_of(config, clips):
    """All that decides the rows, as a resumed run must find it again. The batch size only moves rounding."""
    free = ("data", "output", "clips_per_batch")
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in free}
    content = {"captions": [dataclasses.asdict(clip) for clip in clips], "prompts": PROMPTS}
    hashes = {key: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16] for key, value in content.items()}
    return {**settings, **hashes}


def read_parts(folder):
    """{clip's number: (file, offset of its line)} of all part files, but for a last line that was cut off."""
    places = {}
    for path in sorted(folder.glob("part-*.jsonl")):
        with path.open("rb") as file:
            offset = 0
            for line in file:
                if not line.endswith(b"\n"):
                    break
                with contextlib.suppress(json.JSONDecodeError):  # damaged: the clip counts as not done
                    places[json.loads(line)["number"]] = (path, offset)
                offset += len(line)
    return places


def open_part(path):
    """The part file, open at the end of its last whole line."""
    file = path.open("ab")
    file.truncate(path.read_bytes().rfind(b"\n") + 1)
    return file


def merge(clips, folder, config, settings):
    """Write the rows in order, dropped.jsonl and report.json; -> the report, or None while clips are missing."""
    places = read_parts(folder)
    if len(places) < len(clips):
        return None
    tally = {mode: Counter(dict.fromkeys(("given", "sampled", "new", "spare"), 0)) for mode in PROMPTS}
    reasons, empty = {mode: Counter() for mode in PROMPTS}, {mode: [] for mode in PROMPTS}
    with contextlib.ExitStack() as stack:  # leaves in reverse order: the output, entered first, is there last
        output = stack.enter_context(replacing(Path(config.output)))
        drops = stack.enter_context(replacing(folder / "dropped.jsonl"))
        parts = {path: stack.enter_context(path.open("rb")) for path, _ in places.values()}
        is_list = Path(config.output).suffix == ".json"
        for number, (path, offset) in sorted(places.items()):
            parts[path].seek(offset)
            part = json.loads(parts[path].readline())
            row, log = part["row"], part["log"]
            line = json.dumps(row, ensure_ascii=False)
            output.write((",\n" if number else "[\n") + line if is_list else line + "\n")
            for mode, counts in log.items():
                tally[mode].update({key: counts[key] for key in tally[mode]})
                reasons[mode].update(drop["reason"] for drop in counts["dropped"])
                empty[mode] += [] if mode in row else [row["video"]]
                for drop in counts["dropped"]:
                    drops.write(json.dumps({"video": row["video"], "mode": mode, **drop}, ensure_ascii=False) + "\n")
        output.write("\n]\n" if is_list else "")
        report = {"output": config.output, "clips": len(clips), "settings": settings, "modes": {
            mode: {**tally[mode], "dropped": reasons[mode], "clips_without": empty[mode]} for mode in PROMPTS}}
        with replacing(folder / "report.json") as file:
            file.write(json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    return report


def print_report(report, folder):
    modes = list(report["modes"].values())

    def line(name, numbers, remark=""):
        print(f"  {name:26}" + "".join(f"{n:>12,}" for n in numbers) + (f"   {remark}" if remark else ""))

    print(f"\n  {'texts':26}" + "".join(f"{mode:>12}" for mode in report["modes"]))
    line("in the data", [m["given"] for m in modes])
    line("sampled", [m["sampled"] for m in modes])
    line("  kept", [m["new"] for m in modes])
    line("  not needed", [m["spare"] for m in modes], "the row had all that were wanted")
    for reason, meaning in REASONS.items():
        if any(m["dropped"].get(reason) for m in modes):
            line(f"  dropped: {reason}", [m["dropped"].get(reason, 0) for m in modes], meaning)
    line("clips without any", [len(m["clips_without"]) for m in modes])
    lost = len(report["modes"]["copilot"]["clips_without"])
    if lost:
        print(f"\n{lost:,} of {report['clips']:,} rows have no \"copilot\": no summary passed (or the original is too "
              "short to be summed up).\nRun again with --data on this output, another --output and another --seed to "
              "fill them up.")
    print(f"\nrows     {report['output']}\nreport   {folder / 'report.json'}\ndropped  {folder / 'dropped.jsonl'}")


# ---- the run ---------------------------------------------------------------------------------------------------------


def prepare(config, folder):
    """Clips, tokenizer and settings; ConfigError (exit 2) with everything that is wrong."""
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
        problems += [f"output: {folder} was begun with {key} {before.get(key)}, not {value}: remove it, or name another"
                     for key, value in settings.items() if before.get(key) != value]
    elif Path(config.output).exists() and not known.is_file():
        problems.append(f"output: {config.output} is there and was not made by this script; name another")
    if problem := model_problem("language_model", config.language_model):
        problems.append(problem)
    elif Path(config.language_model).is_dir() or not problems:  # nothing is downloaded for a run that cannot start
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.language_model)
        except (OSError, ValueError) as error:
            problems.append(f"language_model: {config.language_model} has no tokenizer that can be loaded: {error}")
    if tokenizer is not None:
        if not tokenizer.chat_template:
            problems.append(f"language_model: {config.language_model} has no chat template: a chat model is wanted")
        spelt = ((clip, find_control_text(tokenizer, "\n".join(clip.texts["microscope"][:1]))) for clip in clips)
        problems += [f"data: the caption of {clip.video} spells out the control token {found}"
                     for clip, found in spelt if found][:20]
    if problems:
        fail(problems)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(known) as file:
        file.write(json.dumps(settings, indent=1) + "\n")
    return clips, tokenizer, settings


def sample_rows(clips, folder, config, tokenizer, make_teacher):
    """Append the rows of this process's clips that are not done yet to its part file."""
    rank, world = process_rank()
    size = config.clips_per_batch
    groups = [range(start, min(start + size, len(clips))) for start in range(0, len(clips), size)][rank::world]
    done = read_parts(folder)
    # A batch is the same clips in every run, whatever was done before and by how many processes: same rounding.
    open_groups = [group for group in groups if any(number not in done for number in group)]
    left = sum(map(len, open_groups))
    print0(f"teacher  {config.language_model}\nclips    {len(clips):,}, of which {len(done):,} were done before"
           + (f"; {world} processes, this one takes {left:,}" if world > 1 else ""))
    if not open_groups:
        return
    teacher = make_teacher(config, tokenizer)
    with open_part(folder / f"part-{rank:05d}.jsonl") as part, tqdm(total=left, unit="clip", disable=rank > 0) as bar:
        for group in open_groups:
            results = augment_clips([clips[number] for number in group], teacher, config, tokenizer)
            for number, result in zip(group, results, strict=True):
                if number not in done:
                    part.write(json.dumps({"number": number, **result}).encode() + b"\n")
            part.flush()
            bar.update(len(group))


def main(argv=None, make_teacher=Teacher):
    config = load_config(AugmentConfig, argv, description=__doc__)
    folder = Path(f"{config.output}.augment")
    clips, tokenizer, settings = prepare(config, folder)
    try:
        with FileLock(folder / f"part-{process_rank()[0]:05d}.lock", timeout=0):
            sample_rows(clips, folder, config, tokenizer, make_teacher)
    except Timeout:
        print(f"another run is writing to {folder}", file=sys.stderr)
        return 1
    report = merge(clips, folder, config, settings)  # by the process that ends last, or by a later run
    if report is None:
        print0("This process's clips are done; the last process to end puts the rows together (or a later run does).")
    else:
        print_report(report, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
