"""Builds the demo's base models from the toy world: a SigLIP tower, a Qwen3 with its tokenizer, and a small YOLOv8.

    make base-models                                  tens of minutes on 2 cores; finished parts are not built again
    python -m demo.base_models --only vision          one part: vision, language or detector

They take the place of the public base models that a real run starts from, in the same formats (safetensors and JSON,
bfloat16). All are trained on clips whose seeds the demo's world never uses.

- vision: `SiglipVisionModel`, trained to name what each patch shows. (Trained only on which classes a clip has, the
  same tower is far worse.)
- language: `Qwen3ForCausalLM`, trained to caption from *notes*: one word for each cell of a 4x4 grid over each of 8
  frames, at the positions where the projector's visual tokens will be. Its captions are true to the notes. A language
  model that has never had to read anything at those positions gives stage 1 nothing to connect to.
- detector: see demo/base_detector.py.
"""

import argparse
import itertools
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dataset import (
    IGNORE_INDEX,
    MODE_TABLE,
    MODES,
    encode_example,
    encode_prompt,
    frame_indices,
    placeholder_id,
    read_frames,
)
from demo.world import (
    CLASSES,
    COLOURS,
    FRAMES,
    HEIGHT,
    WIDTH,
    actions_of,
    boxes_of,
    captions_of,
    event_facts,
    make_clip,
    make_script,
    render,
    write_json,
    write_video,
)
from stage3.mentions import read_caption

BASE = Path(__file__).resolve().parent / "base"
VISION_SEED, LANGUAGE_SEED, PROBE_SEED = 2_000_001, 2_000_002, 2_000_003
TUNING, FRESH = 500_000, 900_000  # number of the first clip that the language model is tuned on, tested on
IMAGE_SIZE, PATCH, CELLS, NUM_FRAMES = 192, 16, 4, 8
GRID = IMAGE_SIZE // PATCH  # 12 patches per side; 3x3 of them make one cell

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Words by which a question says how long the answer shall be, as any language model knows them.
LENGTH_WORDS = {
    "microscope": (
        "detail", "details", "in detail", "detailed", "thorough", "thoroughly", "complete", "completely", "full",
        "fully", "long", "longer", "at length", "everything", "all of it", "carefully", "careful", "exactly",
        "extensive", "comprehensive", "exhaustive", "step by step", "nothing left out", "as much as you can",
    ),
    "copilot": (
        "short", "shortly", "in short", "brief", "briefly", "in brief", "concise", "concisely", "compact", "quick",
        "quickly", "few words", "in a few words", "one line", "one sentence", "single", "summary", "summarize",
        "sum it up", "main point", "gist", "at a glance", "tersely", "as little as you can",
    ),
}
# What a note may say about a cell, by class of the object.
NOTE_OF = {
    "person": "person", "bicycle": "bicycle", "car": "car", "motorcycle": "motorcycle", "bus": "bus", "truck": "truck",
    "traffic light": "light", "stop sign": "sign",
}
COMMON = """the a an of and to in is are was it this that with for on as at by from not be have has had do does will can
would could should there here what which who when where why how yes no please video image frame clip
scene user assistant system answer question road street lane vehicle ahead behind left right day night city country
one two three first then next while after before because so north south east west morning evening rain snow sun"""


def say(text):
    print(text, flush=True)


def learning_rate(step, steps, peak, warmup=30):
    return peak * min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * step / steps)))


def set_lr(optimizer, value):
    for group in optimizer.param_groups:
        group["lr"] = value


def decoded(clip, indices):
    """A clip's frames as the data set reads them: through H.264 and decord. uint8 [T, 192, 192, 3]."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, clip.frames)
        return read_frames(path, FRAMES, IMAGE_SIZE)[indices]


# ------------------------------------------------------------------------------------------------------- vision

ATTRIBUTES = ("red light", "amber light", "green light", *sorted({c for colours in COLOURS.values() for c in colours}))
TARGETS = (*CLASSES, *ATTRIBUTES, "night", "city")  # what is predicted for each patch


def patch_targets(boxes, script):
    """What the patches of one frame show: float32 [144, len(TARGETS)].

    1 where a box covers more than a third of the patch, or more than 0.4 of the box is in it (small boxes)."""
    target = np.zeros((GRID, GRID, len(TARGETS)), np.float32)
    edges = np.arange(GRID + 1) * PATCH
    for box in boxes:
        x1, x2 = (v * IMAGE_SIZE / WIDTH for v in (box.xyxy[0], box.xyxy[2]))
        y1, y2 = (v * IMAGE_SIZE / HEIGHT for v in (box.xyxy[1], box.xyxy[3]))
        across = np.clip(np.minimum(edges[1:], x2) - np.maximum(edges[:-1], x1), 0, None)
        down = np.clip(np.minimum(edges[1:], y2) - np.maximum(edges[:-1], y1), 0, None)
        area = np.outer(down, across)  # [12, 12] px
        covered = (area > PATCH * PATCH / 3) | (area > 0.4 * (x2 - x1) * (y2 - y1))
        target[covered, TARGETS.index(box.name)] = 1
        if box.attribute:
            name = f"{box.attribute} light" if box.name == "traffic light" else box.attribute
            target[covered, TARGETS.index(name)] = 1
    target[..., -2], target[..., -1] = script.night, script.city
    return target.reshape(GRID * GRID, -1)


def balanced_scripts(seed, count):
    """Scripts in which rare classes are about as frequent as common ones."""
    tally, scripts, index = dict.fromkeys(CLASSES, 0), [], 0
    while len(scripts) < count:
        script = make_script((seed, index))
        index += 1
        rarest = sorted(tally, key=tally.get)[:3]
        if not set(rarest) & set(script.present) and index % 8:
            continue
        scripts.append(script)
        for name in script.present:
            tally[name] += 1
    return scripts


def vision_data(seed, num_clips, frames_a_clip):
    """(frames uint8 [N, 192, 192, 3], targets float32 [N, 144, len(TARGETS)]) of randomly chosen frames."""
    rng = np.random.default_rng(seed)
    frames, targets = [], []
    for script in balanced_scripts(seed, num_clips):
        clip = render(script)
        chosen = np.sort(rng.choice(FRAMES, frames_a_clip, replace=False))
        frames.append(decoded(clip, chosen))
        targets += [patch_targets(clip.boxes[i], script) for i in chosen]
    return np.concatenate(frames), np.stack(targets)


def pixels(frames, rng=None):
    """uint8 [N, S, S, 3] -> float32 [N, 3, S, S] in [-1, 1]; with rng, random brightness and contrast."""
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    if rng is not None:
        gain = torch.from_numpy(rng.uniform(0.75, 1.25, (len(x), 1, 1, 1)).astype(np.float32))
        shift = torch.from_numpy(rng.uniform(-0.15, 0.15, (len(x), 1, 1, 1)).astype(np.float32))
        x = (x * gain + shift).clamp(-1, 1)
    return x


def build_vision(folder, steps=1200, num_clips=500, batch=24):
    """Train the tower with a linear head on its last hidden state, the only output that the projector will read."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(VISION_SEED)
    rng = np.random.default_rng(VISION_SEED)
    tower = SiglipVisionModel(SiglipVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=IMAGE_SIZE,
        patch_size=PATCH, vision_use_head=False,
    ))
    head = nn.Linear(128, len(TARGETS))
    say(f"vision: {sum(p.numel() for p in tower.parameters()):,} parameters; drawing {num_clips} clips")
    frames, targets = vision_data(VISION_SEED, num_clips, 8)
    weight = torch.full((len(TARGETS),), 3.0)  # objects cover few patches, so positives weigh more
    weight[-2:] = 1.0
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], weight_decay=0.02)
    tower.train()
    begun = time.time()
    for step in range(steps):
        set_lr(optimizer, learning_rate(step, steps, 1.2e-3))
        chosen = rng.choice(len(frames), batch, replace=False)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = tower(pixel_values=pixels(frames[chosen], rng)).last_hidden_state  # [B, 144, 128]
        loss = nn.functional.binary_cross_entropy_with_logits(
            head(hidden.float()), torch.from_numpy(targets[chosen]), pos_weight=weight, reduction="none",
        ).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            left = (time.time() - begun) / (step + 1) * (steps - step - 1)
            say(f"vision: step {step + 1} of {steps}, loss {loss.item():.3f}, {left / 60:.1f} min left")
    tower.eval()
    f1 = clip_f1(tower, head)
    say(f"vision: clip-level F1 {f1:.3f} on 60 fresh clips")
    standardize(tower, frames[::10])
    tower.to(torch.bfloat16).save_pretrained(folder)
    return {"clip_f1": round(f1, 3)}


@torch.no_grad()
def standardize(tower, frames):
    """Shift and scale the last layer norm so that each channel has mean 0 and variance 1 over `frames`.

    Without this, most of every patch's vector is the same constant, which swamps the signal for an untrained projector.
    """
    hidden = torch.cat([tower(pixel_values=pixels(part)).last_hidden_state for part in np.array_split(frames, 20)])
    mean, std = hidden.mean((0, 1)), hidden.std((0, 1))
    norm = tower.get_submodule("post_layernorm")
    norm.bias.copy_((norm.bias - mean) / std)
    norm.weight.div_(std)


@torch.no_grad()
def clip_f1(tower, head, num_clips=60):
    """F1 of a clip's classes: those predicted above 0.8 in any patch of the frames that the model will see."""
    hits = wrong = missed = 0
    for index in range(num_clips):
        clip = make_clip((PROBE_SEED, index))
        frames = decoded(clip, frame_indices(FRAMES, NUM_FRAMES))
        logits = head(tower(pixel_values=pixels(frames)).last_hidden_state.float())  # [8, 144, targets]
        best = logits.sigmoid().amax((0, 1))
        seen = {name for i, name in enumerate(CLASSES) if best[i] > 0.8}
        present = set(clip.script.present)
        hits, wrong, missed = hits + len(seen & present), wrong + len(seen - present), missed + len(present - seen)
    return 2 * hits / (2 * hits + wrong + missed)


# ------------------------------------------------------------------------------------------------------- tokenizer


def build_tokenizer(folder, vocab_size=1200, texts_from=800):
    """Byte-level BPE (any text can be encoded) with Qwen's control tokens and turn format."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [*MODES.values()] * 40 + [COMMON] * 8
    for mode, words in LENGTH_WORDS.items():
        texts += [*MODE_TABLE[mode].wordings[::8], *([" ".join(["", *words])] * 8)]
    for index in range(texts_from):
        captions = captions_of(make_script((LANGUAGE_SEED, index)))
        texts += [*captions["microscope"], *captions["copilot"]]
    texts += [" ".join(["", *words]) for words in (NOTE_WORDS, ("user", "assistant"))] * 40
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL), show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, chat_template=CHAT_TEMPLATE, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        model_max_length=4096, clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


# ------------------------------------------------------------------------------------------------------- notes

NOTE_WORDS = (*NOTE_OF.values(), "red", "amber", "green", *ATTRIBUTES[3:], "night", "day", "city", "country", "road")


def cell_words(boxes, script):
    """For each of the 16 cells of a frame, its objects: a list of tuples (class word, attribute if it has one)."""
    cells = [[] for _ in range(CELLS * CELLS)]
    for box in boxes:
        x1, y1, x2, y2 = box.xyxy
        for row in range(CELLS):
            for column in range(CELLS):
                w = min(x2, (column + 1) * WIDTH / CELLS) - max(x1, column * WIDTH / CELLS)
                h = min(y2, (row + 1) * HEIGHT / CELLS) - max(y1, row * HEIGHT / CELLS)
                area = max(w, 0) * max(h, 0)
                if area > 0.25 * (x2 - x1) * (y2 - y1) or area > 0.25 * WIDTH * HEIGHT / CELLS**2:
                    cells[row * CELLS + column].append((NOTE_OF[box.name], *([box.attribute] if box.attribute else [])))
    return cells


def background_word(row, script, rng):
    if row == CELLS - 1:
        return "road"
    if row == 0:
        return "night" if script.night else "day"
    return rng.choice(["city" if script.city else "country", "road"])


def write_notes(script, frames, rng, slips=0.06):
    """One word per cell and frame: a list of 8 * 16 words. In a share `slips` of the cells the object is missed."""
    words = []
    for boxes in frames:
        for index, known in enumerate(cell_words(boxes, script)):
            word = background_word(index // CELLS, script, rng)
            if known and rng.random() > slips:
                thing = known[rng.integers(len(known))]
                word = thing[1] if len(thing) > 1 and rng.random() < 0.4 else thing[0]
            elif rng.random() < 0.004:
                word = str(rng.choice(NOTE_WORDS))
            words.append(str(word))
    return words


# ------------------------------------------------------------------------------------------------------- language


def language_script(index):
    """Half of the scripts may combine what the demo's training clips never do: to a language model that has never read
    of a truck and a motorcycle in one clip, the second cannot be a truck."""
    return make_script((LANGUAGE_SEED, 10_000 + index), held_out=index % 2 == 1)


def language_clips(first=0):
    """Numbers of the clips to train on, from `first` on.

    A car, bus or truck does one of two things, and notes tell which only by where it is: hard to read, and so rare that
    on clips as they come the model never learns it. So most have two such events. The side from which one comes is as
    hard to read: such clips are taken more often too.
    """
    for index in itertools.count(first):
        events = language_script(index).events
        twofold = sum(event.name in COLOURS for event in events)
        crossing = any(event.kind in ("car_turns", "truck_merges") for event in events)
        if twofold >= 2 or twofold == 1 and index % 3 <= crossing or index % 8 == 0:
            yield index


def made_up_word(rng):
    return "".join(rng.choice(list("aabcdeeefghiiklmnoooprsttuw"), size=rng.integers(3, 9)))


def language_question(mode, rng, made_up=0.0):
    """What the language model is asked: the standard question, a wording of training (dataset.MODE_TABLE), or any words
    among which one says how long the answer shall be.

    A language model that knows the standard questions alone takes any other for noise, where a real one knows what the
    words mean. The wordings that evaluate.py keeps for itself, `unseen`, are never among these. A share `made_up` of
    the words is no word at all, as stands for any that it does not know."""
    kind = rng.random()
    if kind < 0.5:
        return MODES[mode]
    if kind < 0.75:
        return str(rng.choice(MODE_TABLE[mode].wordings))
    words = [str(word) for word in rng.choice(COMMON.split(), size=rng.integers(1, 12))]
    if made_up:
        words = [made_up_word(rng) if rng.random() < made_up else word for word in words]
    words.insert(rng.integers(len(words) + 1), str(rng.choice(LENGTH_WORDS[mode])))
    return " ".join(words)


def language_example(index, mode, tokenizer, note_ids, made_up=0.0):
    """{"input_ids", "labels"} of one clip: notes where the video goes, a question, a true caption."""
    script = language_script(index)
    rng = np.random.default_rng((LANGUAGE_SEED, index))
    boxes = boxes_of(script)
    notes = write_notes(script, [boxes[i] for i in frame_indices(FRAMES, NUM_FRAMES)], rng)
    question, caption = language_question(mode, rng, made_up), captions_of(script)[mode][0]
    example = encode_example(tokenizer, question, caption, len(notes), 512)
    words = iter(notes)
    video = placeholder_id(tokenizer)
    example["input_ids"] = [note_ids[next(words)] if id_ == video else id_ for id_ in example["input_ids"]]
    return example


def language_batch(indices, tokenizer, note_ids, made_up=0.0):
    """(input_ids, labels) [B, L] of clips, in turn with a Microscope and a Copilot caption."""
    rows = [language_example(index, ("microscope", "copilot")[row % 2], tokenizer, note_ids, made_up)
            for row, index in enumerate(indices)]
    length = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), IGNORE_INDEX)
    for i, row in enumerate(rows):
        input_ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
    return input_ids, labels


def find_note_ids(tokenizer):
    """{note word: its one token}."""
    found = {word: tokenizer.encode(f" {word}") for word in NOTE_WORDS}
    split = [word for word, ids in found.items() if len(ids) != 1]
    if split:
        raise ValueError(f"notes must be single tokens; these are not: {', '.join(split)}")
    return {word: ids[0] for word, ids in found.items()}


def language_config(tokenizer):
    from transformers import Qwen3Config

    rows = -(-len(tokenizer) // 64) * 64  # as in Qwen3, more rows than tokens
    return Qwen3Config(
        vocab_size=rows, hidden_size=192, intermediate_size=576, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, head_dim=32, max_position_embeddings=4096, tie_word_embeddings=True, rope_theta=10_000.0,
        use_cache=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        attention_dropout=0.0,
    )


def blur(embeds, notes):
    """Embeddings [B, L, D] whose notes (positions `notes`) are as unclear as what a projector makes of a clip: each is
    mixed with that of a cell nearby, up to half of it, and noise is added, up to four times as large as the notes are.
    """
    clear = embeds[:, notes]  # [B, 128, D]
    rows, cells, _ = clear.shape
    nearby = clear.roll(random.choice((1, -1, CELLS, -CELLS)), dims=1)
    share = 0.5 * torch.rand(rows, 1, 1) * torch.rand(rows, cells, 1)
    size = 4 * torch.rand(rows, 1, 1) * clear.detach().std()
    unclear = (1 - share) * clear + share * nearby + size * torch.randn_like(clear)
    return torch.cat([embeds[:, :notes.start], unclear, embeds[:, notes.stop:]], 1)


def caption_loss(model, input_ids, labels, blurred=None):
    """Mean cross-entropy of the captions' tokens; with causal attention, right padding needs no mask. `blurred`: the
    positions of notes that are blurred."""
    embeds = model.get_input_embeddings()(input_ids)  # [B, L, D]
    embeds = embeds if blurred is None else blur(embeds, blurred)
    hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]  # [B, L-1, D]
    chosen = labels[:, 1:] != IGNORE_INDEX
    return nn.functional.cross_entropy(model.lm_head(hidden[chosen]).float(), labels[:, 1:][chosen])


@torch.no_grad()
def wrong_statements(model, tokenizer, note_ids, num_clips=200):
    """What Copilot captions of fresh notes say of events: the shares that are wrong, of what vehicles do and of the
    sides on which things are."""
    told, wrong = Counter(), Counter()
    for index in range(FRESH, FRESH + num_clips):
        example = language_example(index, "copilot", tokenizer, note_ids)
        prompt = [id_ for id_, label in zip(example["input_ids"], example["labels"], strict=True)
                  if label == IGNORE_INDEX]
        answer = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=64)[0, len(prompt):]
        script = language_script(index)
        actions, sides = actions_of(script), {}
        for fact in event_facts(script):
            sides.setdefault(fact["class"], set()).add(fact["side"])
        for statement in read_caption(tokenizer.decode(answer, skip_special_tokens=True)).statements:
            verb = statement.kind == "verb"
            truth = actions if verb else sides if statement.value in ("left", "right") else {}
            known = [name for name in statement.subject if name in truth and (name in COLOURS or not verb)]
            if known:
                told[verb] += 1
                wrong[verb] += not any(statement.value in truth[name] for name in known)
    return {"wrong_events": round(wrong[True] / told[True], 4), "wrong_sides": round(wrong[False] / told[False], 4)}


def train_language(model, batches, steps, peak, blurred=None):
    """Train on `batches`, an iterator of (input_ids, labels); `peak`: the highest learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, betas=(0.9, 0.98))
    model.train()
    begun, recent = time.time(), []
    for step in range(steps):
        set_lr(optimizer, learning_rate(step, steps, peak, warmup=60))
        input_ids, labels = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss = caption_loss(model, input_ids, labels, blurred)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if step % 50 == 49:
            left = (time.time() - begun) / (step + 1) * (steps - step - 1)
            say(f"language: step {step + 1} of {steps}, loss {np.mean(recent[-50:]):.3f}, {left / 60:.1f} min left")
    model.eval()


def language_batches(tokenizer, first=0, size=16, **options):
    """Batches for `train_language`, of the clips from number `first` on."""
    clips, note_ids = language_clips(first), find_note_ids(tokenizer)
    while True:
        yield language_batch(itertools.islice(clips, size), tokenizer, note_ids, **options)


def build_language(folder):
    """Train the tokenizer, then the language model on captions that are true to the notes before them."""
    from transformers import GenerationConfig, Qwen3ForCausalLM

    torch.manual_seed(LANGUAGE_SEED)
    tokenizer = build_tokenizer(folder)
    model = Qwen3ForCausalLM._from_config(language_config(tokenizer), attn_implementation="eager")  # faster here
    say(f"language: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    train_language(model, language_batches(tokenizer), steps=6000, peak=3e-3)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=ends[1], do_sample=True, temperature=0.7, top_k=20, top_p=0.8,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    return tune_language(folder)


def tune_language(folder):
    """Teach the language model in `folder` to read unclear notes, and questions with words that it does not know.

    What a projector makes of a clip is never as clear as a note, and stage 1 connects poorly to a language model that
    has read nothing but clear ones."""
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    torch.manual_seed(LANGUAGE_SEED)
    random.seed(LANGUAGE_SEED)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    note_ids, count = find_note_ids(tokenizer), NUM_FRAMES * CELLS**2
    start = encode_prompt(tokenizer, "", count).index(placeholder_id(tokenizer))
    train_language(model, language_batches(tokenizer, TUNING, made_up=0.5), steps=1500, peak=2e-3,
                   blurred=slice(start, start + count))
    with torch.no_grad():
        fresh = [language_batch(range(first, first + 16), tokenizer, note_ids)
                 for first in range(FRESH, FRESH + 64, 16)]
        held = float(np.mean([caption_loss(model, *pair).item() for pair in fresh]))
    wrong = wrong_statements(model, tokenizer, note_ids)
    say(f"language: loss {held:.4f} on 64 fresh captions; {wrong['wrong_events']:.1%} of what vehicles are said to do "
        f"and {wrong['wrong_sides']:.1%} of the sides are wrong")
    model.to(torch.bfloat16).save_pretrained(folder)
    return {"caption_loss": round(held, 4), **wrong}


# ------------------------------------------------------------------------------------------------------- all parts


def build_detector(folder):
    """In a separate process, because ultralytics' trainer changes global settings."""
    subprocess.run([sys.executable, "-m", "demo.base_detector", "--output_dir", str(folder)], check=True)
    return {}


PARTS = {
    "vision": (build_vision, "model.safetensors"), "language": (build_language, "model.safetensors"),
    "detector": (build_detector, "detector.safetensors"),
}


def build(name, output_dir):
    """Build one part in a temporary folder and move it into place: complete or absent."""
    function, weights = PARTS[name]
    folder = output_dir / name
    if (folder / weights).is_file():
        say(f"{name}: {folder} is complete")
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=output_dir))
    begun = time.time()
    try:
        measured = function(work)
        if measured:
            write_json(work / "build.json", {**measured, "minutes": round((time.time() - begun) / 60, 1)})
        work.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"{name}: built {folder} in {(time.time() - begun) / 60:.1f} min")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m demo.base_models", description="Build the demo's base models.")
    parser.add_argument("--output_dir", "--output-dir", default=str(BASE), help="where the parts' folders go")
    parser.add_argument("--only", choices=PARTS, help="one part instead of all")
    parser.add_argument("--force", action="store_true", help="build parts again that are complete")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    output_dir = Path(args.output_dir)
    for name in [args.only] if args.only else PARTS:
        if args.force:
            shutil.rmtree(output_dir / name, ignore_errors=True)
        build(name, output_dir)
    size = sum(path.stat().st_size for path in output_dir.rglob("*") if path.is_file()) / 2**20
    say(f"{output_dir}: {size:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
