"""The key `time_stamps`: each frame's visual tokens in the prompt follow its time in the clip.

The clips here differ in length, so prompts differ in text and in their number of tokens.
"""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, write_clip
from safetensors.torch import load_file
from test_dataset import each_reader, levels, write_ramp  # noqa: F401 - a fixture
from test_model import with_adapter
from test_run_folder import config_in, old_run, resume_in, write_stage1  # noqa: F401 - a fixture
from test_stage3 import rows_of, write_evidence
from test_stages import stage1, stage2
from transformers import AutoTokenizer

import check_dataset
import dataset
import evaluate
import export
import generate
import stage3.held_out
import train_stage3
from bench import phases
from dataset import (
    IGNORE_INDEX,
    MODES,
    Clip,
    DataError,
    VideoError,
    VideoInstructDataset,
    add_times,
    cached_frames,
    cached_times,
    check_times,
    collate,
    decode_times,
    encode_example,
    encode_prompt,
    load_entries,
    pack_examples,
    read_frames,
    read_times,
    time_stamp,
)
from model import DriveVLM, ModelError, read_checkpoint
from stage3.grpo import Group, completion_logps
from stage3.rollout import RolloutSampler, sample_groups
from training import loop
from training.common import ConfigError, write_json
from training.config import DetectorSettings, EvaluateConfig

FRAMES = {"car": 20, "bus": 30, "walk": 90, "truck": 25, "night": 100, "stop": 8}  # at 8 frames a second
LAST = {"car": "2.4s", "bus": "3.6s", "walk": "11.1s", "truck": "3.0s", "night": "12.4s", "stop": "0.9s"}
SHORT, LONG = (0.0, 2.375), (0.0, 11.125)  # times of two frames of a clip; LONG has a token more
QUESTIONS = ["Describe the video in detail.", "Red car?"]


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """Clips of several lengths with captions; as `tiny`, but for `.videos .data .root`."""
    root = tmp_path_factory.mktemp("lengths")
    (root / "videos").mkdir()
    for seed, (name, count) in enumerate(FRAMES.items()):
        write_clip(root / "videos" / f"{name}.mp4", num_frames=count, seed=seed)
    rows = [{"video": f"{name}.mp4", "microscope": [f"A {name} passes, then it stops."], "copilot": [f"A {name}."]}
            for name in FRAMES]
    (root / "captions.json").write_text(json.dumps(rows))
    return SimpleNamespace(**vars(tiny) | {"root": root, "videos": root / "videos", "data": root / "captions.json"})


@pytest.fixture(scope="module")
def trained(world):
    """Runs of stages 1 and 2 with time stamps, two steps each."""
    options = {"max_steps": 2, "time_stamps": True, "shared_prefix": True, "per_device_batch_size": 1}
    one = stage1(world, world.root / "stage1", **options)
    return stage2(world, world.root / "stage2", one, **options, lora_dropout=0.0)


def stamped(model):
    model.time_stamps = True
    return model


def visual_tokens(model, count, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, model.num_visual_tokens, model.head_weight.shape[1], generator=generator) * 0.1


# ---------------------------------------------------------------------------------------------------------------------
# The text


@pytest.mark.parametrize("folder, start, end", [
    ("llm", "<|im_start|>user\n<|vision_start|>", "<|vision_end|>Red car?<|im_end|>\n<|im_start|>assistant\n"),
    ("llm_plain", "<s>[INST] ", "Red car? [/INST]")])
def test_a_prompt_names_each_frames_time_before_its_tokens(tiny, folder, start, end):
    tokenizer = AutoTokenizer.from_pretrained(getattr(tiny, folder))
    pad = tokenizer.decode([dataset.placeholder_id(tokenizer)])
    ids = encode_prompt(tokenizer, "Red car?", 6, (0.0, 1.26, 101.0))
    assert tokenizer.decode(ids) == f"{start}0.0s{pad}{pad}1.3s{pad}{pad}101.0s{pad}{pad}{end}"
    assert tokenizer.decode(encode_prompt(tokenizer, "Red car?", 2)) == f"{start}{pad}{pad}{end}"
    with pytest.raises(DataError, match="7 visual tokens do not divide into 3 frames"):
        encode_prompt(tokenizer, "Red car?", 7, (0.0, 1.0, 2.0))


@pytest.mark.parametrize("which", ["qwen3", "demo"])
def test_a_time_is_four_tokens_and_five_from_ten_seconds_on(which, request):
    folder = request.getfixturevalue("shared") / "qwen3_tokenizer" if which == "qwen3" else ROOT / "demo/base/language"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for seconds, text, count in ((0, "0.0s", 4), (9.94, "9.9s", 4), (9.96, "10.0s", 5), (40.04, "40.0s", 5)):
        plain = len(encode_prompt(tokenizer, "What?", 3))
        assert time_stamp(seconds) == text and len(encode_prompt(tokenizer, "What?", 3, [seconds])) == plain + count


def test_times_take_no_room_from_the_answer(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny.llm)
    answer = "The red car stops. The bus waits behind it. A truck comes."
    least = len(encode_prompt(tokenizer, "What?", 0)) + 1
    for limit in (least, least + 10, least + 25, 500):
        plain = encode_example(tokenizer, "What?", answer, 4, limit)
        timed = encode_example(tokenizer, "What?", answer, 4, limit, LONG)
        more = len(timed["labels"]) - len(plain["labels"])
        assert more == len(encode_prompt(tokenizer, "What?", 4, LONG)) - len(encode_prompt(tokenizer, "What?", 4)) == 9
        assert timed["labels"] == [IGNORE_INDEX] * more + plain["labels"]
    with pytest.raises(DataError, match=f"max_text_tokens is {least - 1}, but .* take {least}:"):
        encode_example(tokenizer, "What?", answer, 4, least - 1, LONG)


# ---------------------------------------------------------------------------------------------------------------------
# The times


def test_times_are_those_of_the_frames_that_are_read(each_reader, tmp_path):  # noqa: F811
    starts = np.concatenate([np.arange(20) / 20, 1 + np.arange(5)])  # uneven
    write_ramp(tmp_path / "clip.mp4", starts)
    with Clip(tmp_path / "clip.mp4") as clip:
        unit = float(clip.times[-1]) / 5  # the container's, not a second
    shown = levels(read_frames(tmp_path / "clip.mp4", 6, 96))
    assert shown == [0, 20, 21, 22, 23, 24]
    assert read_times(tmp_path / "clip.mp4", 6) == pytest.approx((starts[shown] * unit).tolist(), abs=2e-3)
    assert decode_times(tmp_path / "clip.mp4", 6) == read_times(tmp_path / "clip.mp4", 6)
    window = 1.5 * unit, 4.5 * unit
    assert levels(read_frames(tmp_path / "clip.mp4", 3, 96, window)) == [21, 22, 23]
    times = read_times(tmp_path / "clip.mp4", 3, window)  # those of a clip of its own
    assert times == pytest.approx((0.0, unit, 2 * unit), abs=2e-3) and times[0] == 0.0
    write_ramp(tmp_path / "one.mp4", [0.0])
    assert read_times(tmp_path / "one.mp4", 4) == (0.0,) * 4


def test_times_are_kept_beside_the_frames_and_old_frames_stay_valid(world, tmp_path, monkeypatch):
    clip, decoded = world.videos / "walk.mp4", []
    frames = cached_frames(clip, 3, 96, tmp_path)
    for name in ("decode_times", "decode_frames"):
        decode = getattr(dataset, name)
        monkeypatch.setattr(dataset, name, lambda *args, decode=decode: decoded.append(args) or decode(*args))
    times = cached_times(clip, 3, tmp_path)
    assert times == cached_times(clip, 3, tmp_path) == read_times(clip, 3) and len(decoded) == 1
    np.testing.assert_array_equal(cached_frames(clip, 3, 96, tmp_path), frames)
    assert cached_times(clip, 4, tmp_path) == read_times(clip, 4) and len(decoded) == 2
    assert cached_times(clip, 3, None) == times and len(decoded) == 3
    file, = [path for path in tmp_path.rglob("*.times") if len(json.loads(path.read_text())["times"]) == 3]
    other, = set(tmp_path.rglob("*.times")) - {file}
    sound = file.read_text()
    damages = ["", sound[:30], "[1]", "7", other.read_text(), sound.replace("walk", "bus"),
               sound.replace("0.0, ", "")]
    for count, damage in enumerate(damages, start=4):
        file.write_text(damage)
        assert cached_times(clip, 3, tmp_path) == times and len(decoded) == count and file.read_text() == sound
    assert len(list(tmp_path.rglob("*.frames"))) == 1


def test_times_of_a_changed_clip_are_read_again(tmp_path):
    for count in (20, 30):
        write_clip(tmp_path / "clip.mp4", num_frames=count)
        assert cached_times(tmp_path / "clip.mp4", 2, tmp_path / "cache") == (0.0, (count - 1) / 8)


def test_a_cache_that_cannot_be_written_is_done_without(world, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(dataset, "_warned_of_cache", set())
    assert cached_times(world.videos / "car.mp4", 2, tmp_path / "file") == read_times(world.videos / "car.mp4", 2)
    assert "frame_cache: cannot" in capsys.readouterr().out


def test_clips_of_other_lengths_get_other_stamps(world, tmp_path):
    entries = load_entries(world.data)
    timed = add_times(entries, 2, world.videos, tmp_path)
    assert [time_stamp(entry.times[-1]) for entry in timed[::2]] == list(LAST.values())
    assert all(entry.times[0] == 0.0 for entry in timed) and entries == load_entries(world.data)
    tokenizer = AutoTokenizer.from_pretrained(world.llm)
    ds = VideoInstructDataset(timed, tokenizer, video_root=world.videos, num_frames=2, image_size=96,
                              num_visual_tokens=4, max_text_tokens=200, train=False)
    pad = "<|video_pad|>"
    for number, name in ((0, "car"), (4, "walk")):
        text = tokenizer.decode(ds[number]["input_ids"])
        assert f"<|vision_start|>0.0s{pad}{pad}{LAST[name]}{pad}{pad}<|vision_end|>{timed[number].question}<" in text
    assert len(collate([ds[0], ds[4]], 0)["input_ids"][0]) == len(ds[4]["input_ids"])


def test_a_clip_whose_times_cannot_be_read_is_a_clip_that_cannot_be_read(world, tmp_path, monkeypatch):
    entries = load_entries(world.data)[:4]

    def fail(path, *args):
        if "car" in str(path):
            raise VideoError(path, "broken")
        return read_times(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "decode_times", fail)
        timed = add_times(entries, 2, world.videos, tmp_path)
    assert [entry.times == () for entry in timed] == [True, True, False, False]
    with pytest.raises(VideoError, match="car.mp4: the times of its frames could not be read"):
        check_times(timed[0])
    check_times(timed[2])
    check_times(entries[0])
    (tmp_path / "bad.mp4").write_bytes(b"x" * 99)
    bad = add_times([replace(entries[0], video="bad.mp4")], 2, tmp_path, None)
    options = dict(num_frames=2, image_size=96, num_visual_tokens=4, max_text_tokens=200, train=False)
    tokenizer = AutoTokenizer.from_pretrained(world.llm)
    ds = VideoInstructDataset(timed, tokenizer, video_root=world.videos, **options)
    assert "car.mp4: the times" in ds[0]["error"] and "error" not in ds[2]
    ds = VideoInstructDataset(bad, tokenizer, video_root=tmp_path, **options)
    assert bad[0].times == () and "not a readable video" in ds[0]["error"]
    reader = SimpleNamespace(visual_tokens=lambda video: video)
    visual, errors = RolloutSampler.read_clips(reader, {0: timed[0], 1: timed[2]})
    assert visual == {1: "bus.mp4"} and len(errors) == 1 and "car.mp4: the times" in errors[0]


# ---------------------------------------------------------------------------------------------------------------------
# The model


@pytest.fixture
def llm(tiny):
    return tiny.llm


def test_padded_and_packed_rows_give_the_loss_and_gradients_of_single_rows(tiny):
    model = stamped(with_adapter(tiny))
    frames = torch.randint(0, 256, (2, 2, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    asked = [(0, SHORT, QUESTIONS[0], "The red car stops. " * 3), (0, SHORT, QUESTIONS[1], "Bus."),
             (1, LONG, QUESTIONS[1], "A truck merges.")]
    examples = [encode_example(model.tokenizer, question, answer, model.num_visual_tokens, 200, times)
                for _, times, question, answer in asked]
    rows = [{"id": str(k), "frames": frames[clip], **example}
            for k, ((clip, *_), example) in enumerate(zip(asked, examples, strict=True))]
    packed = [{"id": "a", "frames": frames[0], **pack_examples(examples[:2], model.placeholder_id)},
              {"id": "b", "frames": frames[1], **pack_examples(examples[2:], model.placeholder_id)}]
    prefix = [len(row["owner"]) - len([owner for owner in row["owner"] if owner >= 0]) for row in packed]
    assert prefix[1] == prefix[0] + 1  # the prefix holds the times

    def run(*batches):
        model.zero_grad()
        out = [model(**collate(batch, model.pad_token_id), num_items_in_batch=30) for batch in batches]
        loss = sum(part["loss"] for part in out)
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, gradients = run(*[[row] for row in rows])
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for batch in (rows, packed):
        loss, found = run(batch)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)


def test_answers_depend_on_the_stamps_and_not_on_the_batch(tiny):
    """Greedy answers of one batch, of single clips, and of stage 3's sampler are the same."""
    model = stamped(with_adapter(tiny))
    visual, times = visual_tokens(model, 1).expand(3, -1, -1), [SHORT, LONG, SHORT]
    questions = [QUESTIONS[0], QUESTIONS[0], QUESTIONS[1]]
    together = model.generate(None, questions, max_new_tokens=12, visual=visual, times=times)
    assert together[0] != together[1]  # the same clip and question: only the stamps differ
    prompts = [model.prompt_ids(*asked) for asked in zip(questions, times, strict=True)]
    assert len(set(map(len, prompts))) == 3
    for row, answer in enumerate(together):
        assert [answer] == model.generate(None, [questions[row]], max_new_tokens=12, visual=visual[:1],
                                          times=[times[row]])
    for shared in (True, False):
        sampled = sample_groups(model, prompts, visual, [[0, 1]] * 3, [12] * 3, temperature=0.0, shared_prefix=shared)
        for answer, group in zip(together, sampled, strict=True):
            assert [completion.ids for completion in group] == [answer.ids] * 2


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_training_scores_answers_with_the_probabilities_that_sampled_them(tiny, shared_prefix):
    model = stamped(with_adapter(tiny))
    visual, prompts = visual_tokens(model, 2), [model.prompt_ids(QUESTIONS[0], times) for times in (SHORT, LONG)]
    groups = sample_groups(model, prompts, visual, [[1, 2, 3], [4, 5, 6]], [9, 9], shared_prefix=shared_prefix)
    answers = [[completion.ids for completion in group] for group in groups]
    with torch.no_grad():
        logps, _, mask = completion_logps(model, list(map(Group, prompts, visual, answers)),
                                          shared_prefix=shared_prefix)
    sampled = [logp for group in groups for completion in group for logp in completion.logps]
    torch.testing.assert_close(logps[mask], torch.tensor(sampled), atol=1e-4, rtol=1e-4)


def test_a_checkpoint_keeps_the_key(tiny, tmp_path):
    model = stamped(with_adapter(tiny))
    folder = model.save_checkpoint(tmp_path / "stamped", stage=2)
    again, visual = DriveVLM.from_checkpoint(folder), visual_tokens(model, 1)
    assert again.time_stamps is True and json.loads((folder / "drivevlm.json").read_text())["time_stamps"] is True
    asked = dict(max_new_tokens=8, visual=visual, times=[LONG])
    assert again.generate(None, QUESTIONS[:1], **asked) == model.generate(None, QUESTIONS[:1], **asked)
    meta = json.loads((folder / "drivevlm.json").read_text())
    write_json(folder / "drivevlm.json", {**meta, "time_stamps": "yes"})
    with pytest.raises(ModelError, match="time_stamps is 'yes'"):
        read_checkpoint(folder)
    del meta["time_stamps"]  # a checkpoint that was written before there was the key
    write_json(folder / "drivevlm.json", meta)
    assert DriveVLM.from_checkpoint(folder).time_stamps is False


def test_a_prompt_without_its_times_or_with_times_that_it_must_not_have_is_refused(tiny):
    model, entries = with_adapter(tiny), load_entries(tiny.data)
    assert model.with_times(entries, tiny.videos, None) is entries
    with pytest.raises(ModelError, match="times of 0 frames, got 2"):
        model.prompt_ids("What?", SHORT)
    model.time_stamps = True
    for times, given in ((None, 0), ((), 0), ((0.0,), 1)):
        with pytest.raises(ModelError, match=f"times of 2 frames, got {given}"):
            model.prompt_ids("What?", times)
    with pytest.raises(ModelError, match="times of 2 frames, got 0"):
        model.generate(None, ["What?"], max_new_tokens=2, visual=visual_tokens(model, 1))


# ---------------------------------------------------------------------------------------------------------------------
# The key


@pytest.mark.parametrize("kept, asked", [(True, False), (False, True), (None, True)])
def test_a_later_stage_that_disagrees_is_refused(tmp_path, kept, asked):
    write_stage1(tmp_path)
    file = tmp_path / "stage1" / "model" / "drivevlm.json"
    if kept is not None:
        write_json(file, {**json.loads(file.read_text()), "time_stamps": kept})
    values = dict(init_from=str(tmp_path / "stage1"), vision_model="org/tower", language_model="/gone/llm")
    agrees, disagrees = (loop._init_from_problems(config_in(tmp_path, time_stamps=value, **values), 2)
                         for value in (not asked, asked))
    assert agrees == [] and len(disagrees) == 1
    assert f"time_stamps: {asked}, but {tmp_path / 'stage1' / 'model'} was trained with {not asked}" in disagrees[0]


def test_a_run_is_not_continued_with_another_value(old_run, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="time_stamps: was False, now True"):
        resume_in(tmp_path / "new", old_run, time_stamps=True)


# ---------------------------------------------------------------------------------------------------------------------
# The programs


def prompts_seen(monkeypatch):
    """(question, times) of all prompts about a video that are encoded from now on."""
    seen, encode = [], dataset.encode_prompt

    def note(tokenizer, question, num_visual_tokens, times=None):
        seen.extend([(question, times)] if num_visual_tokens else [])
        return encode(tokenizer, question, num_visual_tokens, times)

    monkeypatch.setattr(dataset, "encode_prompt", note)
    monkeypatch.setattr("model.encode_prompt", note)
    return seen


def test_without_the_key_no_time_is_read(world, tmp_path, monkeypatch):
    seen = prompts_seen(monkeypatch)
    stage1(world, tmp_path / "run", max_steps=1, frame_cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.times")) and list((tmp_path / "cache").rglob("*.frames"))
    assert {times for _, times in seen} == {None} and len(seen) > 8
    assert read_checkpoint(tmp_path / "run")[1]["time_stamps"] is False


def test_stages_1_and_2_train_on_prompts_with_times(world, trained):
    for folder in (trained.parent / "stage1", trained):
        assert read_checkpoint(folder)[1]["time_stamps"] is True
    with pytest.raises(ConfigError, match="time_stamps: False, but"):
        stage2(world, world.root / "other", trained.parent / "stage1")
    assert len(list((world.root / "frame_cache").rglob("*.times"))) == len(FRAMES)


def test_training_and_held_out_losses_see_the_times_of_their_clips(world, tmp_path, monkeypatch):
    seen = prompts_seen(monkeypatch)
    stage1(world, tmp_path / "run", max_steps=1, time_stamps=True)
    asked = {(question, time_stamp(times[-1])) for question, times in seen}
    assert len({stamp for _, stamp in asked}) > 4 and {stamp for _, stamp in asked} <= set(LAST.values())
    assert set(MODES.values()) < {question for question, _ in asked}


def run_stage3(world, trained, output, *flags):
    settings = DetectorSettings(weights="none.pt", num_frames=3)
    if not (world.root / "evidence").exists():
        write_evidence(world.root / "evidence", settings)
    config = {
        "data": str(world.data), "video_root": str(world.videos), "vision_model": str(world.vision),
        "language_model": str(world.llm), "num_frames": 2, "max_text_tokens": 128, "num_val_videos": 2,
        "dtype": "float32", "frame_cache": str(world.root / "frame_cache"), "init_from": str(trained),
        "output_dir": str(output), "max_steps": 1, "per_device_batch_size": 2, "num_generations": 4,
        "gradient_accumulation_steps": 2, "max_new_tokens": {"microscope": 10, "copilot": 8}, "sample_tokens": 8,
        "mask_truncated": False, "reward": "test_stage3:vowels", "stop_when_blind": None, "max_kl": None,
        "reward_weights": {"objects": 1.0, "temporal": 0.5, "detail": 0.0, "hallucination": 0.0},
        "activation_checkpointing": False, "evidence_cache": str(world.root / "evidence"), "time_stamps": True,
        "detector": {"weights": "none.pt", "num_frames": 3},
    }
    (output.parent / "stage3.yaml").write_text(json.dumps(config))
    train_stage3.main(["--config", str(output.parent / "stage3.yaml"), *flags])


def test_stage_3_asks_about_each_clip_with_its_own_times(world, trained, tmp_path, monkeypatch):
    asked, blank, sample = [], [], stage3.held_out.blank_answers

    def note(sampler, entries):
        blank.append(sample(sampler, entries))
        return blank[-1]

    roll_out = RolloutSampler.roll_out
    monkeypatch.setattr(RolloutSampler, "roll_out", lambda *args: asked.extend(roll_out(*args)) or asked)
    monkeypatch.setattr(stage3.held_out, "blank_answers", note)
    run_stage3(world, trained, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(world.llm)
    assert len(asked) == 4 and len({rollout.entry.video for rollout in asked}) > 1
    for rollout in asked:
        text = tokenizer.decode(rollout.group.prompt_ids).replace("<|video_pad|>", "")
        name = rollout.entry.video.removesuffix(".mp4")
        assert f"<|vision_start|>0.0s{LAST[name]}<|vision_end|>{rollout.entry.question}<" in text
    assert len(blank[0]) == 4 and {len(key) for key in blank[0]} == {3}  # two clips, two modes
    row = rows_of(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["sampler_gap"] < 1e-4 and "eval_gap_blank_copilot" in row
    assert read_checkpoint(tmp_path / "run")[1]["time_stamps"] is True
    with pytest.raises(ConfigError, match="time_stamps: False, but"):
        run_stage3(world, trained, tmp_path / "other", "--time_stamps", "false")


def test_held_out_captions_are_scored_behind_the_times_and_a_clip_without_has_no_grey_answer(world, trained):
    model = DriveVLM.from_checkpoint(trained / "model")
    config = SimpleNamespace(max_text_tokens=128, eval_batch_size=4)
    sampler = SimpleNamespace(model=model, config=config, limits=dict.fromkeys(MODES, 4),
                              accelerator=SimpleNamespace(process_index=0, num_processes=1))
    entries = model.with_times(load_entries(world.data)[:4], world.videos, None)
    for entry in entries:
        group = stage3.held_out.caption_group(sampler, entry, None)
        assert group.prompt_ids == model.prompt_ids(entry.question, entry.times)
    lost = [replace(entry, times=()) for entry in entries[2:]]
    assert set(stage3.held_out.blank_answers(sampler, [*entries[:2], *lost])) == {
        (entry.mode, entry.question, entry.times) for entry in entries[:2]}


def test_generate_export_and_evaluate_take_the_key_from_the_checkpoint(world, trained, tmp_path, capsys, monkeypatch):
    """The same answer from each, and the prompt that export.py writes is the one that the model is asked."""
    clip = world.videos / "walk.mp4"
    seen = prompts_seen(monkeypatch)
    capsys.readouterr()
    generate.main([f"--checkpoint={trained}", f"--video={clip}", "--json=true", "--mode=copilot", "--dtype=float32",
                   "--max_new_tokens=8"])
    said = json.loads(capsys.readouterr().out)["text"]
    assert seen == [(MODES["copilot"], read_times(clip, 2))]
    config = EvaluateConfig(video_root=str(world.videos), frame_cache=None, dtype="float32")
    model = evaluate.open_model(read_checkpoint(trained)[0], config)
    entries = [entry for entry in load_entries(world.data) if entry.video == clip.name]
    for control in ("", "reversed"):
        rows = evaluate.ask(model, evaluate.System("stage2", trained, control), "", entries, config, {"copilot": 8})
        assert control or [row["text"] for row in rows] == [said]
        assert seen.pop() == (MODES["copilot"], read_times(clip, 2))
    evaluate.add_nll(rows, entries, read_checkpoint(trained)[0], config)
    assert seen[-2][1] == read_times(clip, 2) and rows[0]["nll"] > 0  # the last one encoded is for the answer's ids
    statements = {"copilot": {"car": ["A car."]}}
    evaluate.margins_under(read_checkpoint(trained)[0], config, entries[1:], statements, {clip.name: ["car"]})
    assert seen[-1] == (MODES["copilot"], read_times(clip, 2))
    generate.main([f"--checkpoint={trained}", f"--video={clip}", "--json=true", "--mode=copilot", "--dtype=float32",
                   "--max_new_tokens=2", "--window=4", "--stride=7"])
    assert [times for _, times in seen[-3:]] == [(0.0, 3.875)] * 3  # three stretches, each a clip of its own
    export.main([f"--checkpoint={trained}", f"--output_dir={tmp_path / 'out'}"])
    assert "2 frames, each with its time, of a dash-cam clip" in (tmp_path / "out" / "README.md").read_text()
    export.main([f"--checkpoint={tmp_path / 'out'}", f"--output_dir={tmp_path / 'prompt'}", f"--video={clip}",
                 "--mode=copilot"])
    embeds = load_file(tmp_path / "prompt" / "walk.copilot.safetensors")["prompt_embeds"]
    ids, _ = model.prompt_batch([MODES["copilot"]], [read_times(clip, 2)])
    visual = model.encode_video(torch.from_numpy(read_frames(clip, 2, 96))[None])
    torch.testing.assert_close(embeds, model.embed(ids, visual)[0].detach())


def test_the_plan_counts_the_times(tiny):
    model = with_adapter(tiny)
    assert phases.prompt_of(model, "copilot") == model.prompt_ids(MODES["copilot"])
    assert phases.prompt_of(stamped(model), "copilot") == model.prompt_ids(MODES["copilot"], (20.0, 40.0))


def test_the_check_shows_the_times_and_stores_them(world, tmp_path, monkeypatch):
    flags = ["--data", world.data, "--video_root", world.videos, "--output_dir", tmp_path, "--num_val_videos", 2,
             "--language_model", world.llm, "--vision_model", world.vision, "--num_frames", 2, "--examples", 2,
             "--num_workers", 2, "--frame_cache", tmp_path / "cache", "--build_cache"]
    for times in (False, True):
        assert check_dataset.main([*flags, "--time_stamps", times]) == 0
        page = (tmp_path / "check_dataset" / "report.html").read_text(encoding="utf-8")
        text = re.sub("<[^>]*>|\\s", "", page)  # each token has a span of its own
        assert any(f"×16{last}" in text for last in LAST.values()) == times
    monkeypatch.setattr(dataset, "decode_times", None)
    for name in FRAMES:
        clip = world.videos / f"{name}.mp4"
        assert time_stamp(cached_times(clip, 2, tmp_path / "cache")[1]) == LAST[name]
