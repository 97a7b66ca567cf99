"""augment_captions.py: checks on scripted texts, sampling by seed, and the same file however a run was interrupted."""

import functools
import json
import os
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

import augment_captions as aug
from augment_captions import Clip, Request, SeededSampling, Teacher, find_fault, overlap
from dataset import MODE_TABLE, MODES, Mode, load_entries
from training.config import AugmentConfig

SOURCE = (
    "The video shows a wet street at night. A red car stops at the traffic light while a pedestrian crosses from left "
    "to right. When the light turns green, the car drives on, and our vehicle follows it past a parked truck on the "
    "right side of the road. No bicycles are visible at any time during the drive."
)
SUMMARY = (
    "Wet street at night. The red car ahead brakes for the traffic light while a pedestrian walks across; once it is "
    "green, go on behind that car and leave room for the truck standing on the right."
)


# ---- the checks


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny.llm)


@pytest.mark.parametrize("text, reason, detail", [
    (SUMMARY, None, ""),
    (SUMMARY.replace("brakes", "brakes, as 2 cars behind it do,"), None, ""),  # a number is not numbering
    (SUMMARY.replace("Wet street", "Here the wet street"), None, ""),  # "Here" is not "Here is"
    (SUMMARY + " No bicycles are in sight.", None, ""),  # the original denies them too
    ("", "empty", ""),
    (SUMMARY + "<|im_end|>", "control_token", "<|im_end|>"),
    (SUMMARY + "<|eot_id|>", "control_token", "<|eot_id|>"),  # a control token of another model
    ("<think>hm</think>" + SUMMARY, "control_token", "<think>"),
    (SUMMARY + "\ufffd", "control_token", "\ufffd"),
    ("1. " + SUMMARY, "markup", "1."),
    ("- " + SUMMARY, "markup", "-"),
    (SUMMARY.replace(". The", ".\n2) The"), "markup", "2)"),
    ("**" + SUMMARY + "**", "markup", "**"),
    ("# Summary\n" + SUMMARY, "markup", "#"),
    (f'"{SUMMARY}"', "markup", '"Wet'),
    ("Here is the summary: " + SUMMARY, "preamble", "Here is"),
    ("Here\u2019s a shorter one. " + SUMMARY, "preamble", "Here's"),
    ("Sure! " + SUMMARY, "preamble", "Sure!"),
    ("Certainly, " + SUMMARY, "preamble", "Certainly,"),
    ("Summary: " + SUMMARY, "preamble", "Summary:"),
    ("A driver's summary (38 words): " + SUMMARY, "preamble", "A driver's summary"),
    (SUMMARY + " (38 words)", "preamble", "(38 words)"),
    (SUMMARY + " Let me know if you need more.", "preamble", "Let me know"),
    ("Wet street at night, red car ahead.", "length", "7 words instead of 30 to 60"),
    (SUMMARY + " " + SUMMARY, "length", "74 words"),
    (SUMMARY.replace("the truck", "the bus"), "invented_object", "bus"),
    (SUMMARY.replace("a pedestrian", "a cyclist"), "invented_object", "bicycle"),
    (SUMMARY + " No buses are in sight.", "invented_object", "no bus"),  # a denial that the original does not contain
    (SUMMARY + " No pedestrians are in sight.", "invented_object", "no person"),
])
def test_each_fault_is_found_and_named(tokenizer, text, reason, detail):
    fault = find_fault(text, True, (30, 60), SOURCE, [], AugmentConfig(), tokenizer)
    assert (fault and fault[0]) == reason
    assert detail in (fault or ("", ""))[1]
    assert reason is None or reason in aug.REASONS


def test_a_text_that_did_not_end_is_dropped_even_if_it_reads_well(tokenizer):
    assert find_fault(SUMMARY, False, (30, 60), SOURCE, [], AugmentConfig(), tokenizer) == ("not_ended", "")


def test_near_copies_are_dropped(tokenizer):
    config = AugmentConfig()
    one_word = SUMMARY.replace("brakes", "halts")
    fault = find_fault(one_word, True, (30, 60), SOURCE, [SOURCE, SUMMARY], config, tokenizer)
    assert fault[0] == "near_copy"
    other = ("At night on a wet road a person crosses in front of the red car waiting at the traffic light. It turns "
             "green, both vehicles roll on, and a parked truck is passed on the right.")
    assert find_fault(other, True, (30, 60), SOURCE, [SOURCE, SUMMARY], config, tokenizer) is None
    assert overlap(SUMMARY, SUMMARY.upper().replace(",", "")) == 1
    words = [f"w{n}" for n in range(100)]
    tenth = [word + "x" if n % 10 == 5 else word for n, word in enumerate(words)]
    assert overlap(" ".join(words), " ".join(tenth)) == pytest.approx(0.6, abs=0.02)  # as the help says
    assert overlap("a b", "a b") == 1 and overlap("a b", "c") == 0 and overlap("", "a") == 0


def test_limits_of_rewrites_follow_from_the_original():
    assert len(SOURCE.split()) == 59
    assert aug.word_limits("microscope", SOURCE, AugmentConfig()) == (42, 82)
    assert aug.word_limits("copilot", SOURCE, AugmentConfig()) == (30, 60)


def test_choose_keeps_texts_in_order_and_counts_the_dropped_ones(tokenizer):
    clip = Clip("a.mov", {"microscope": [SOURCE], "copilot": []})
    config = AugmentConfig(num_summaries=1)
    answers = [("1. " + SUMMARY, True), (SUMMARY, True), (SUMMARY, True)]
    kept, log = aug.choose(clip, "copilot", answers, config, tokenizer)
    assert kept == [SUMMARY]
    assert (log["sampled"], log["spare"], [d["reason"] for d in log["dropped"]]) == (3, 1, ["markup"])


def test_prompts_hold_caption_and_limits_and_short_originals_are_not_summarised():
    config = AugmentConfig()
    clip = Clip("a.mov", {"microscope": [SOURCE + " {braces}"], "copilot": []})
    for mode, count, limits in (("microscope", 6, ("42", "84")), ("copilot", 7, ("30", "60"))):
        requests = aug.make_requests(clip, mode, config)
        assert len(requests) == count and len({r.seed for r in requests}) == count
        assert all(r.prompt.endswith(SOURCE + " {braces}") for r in requests)
        assert all(f" {n} " in requests[0].prompt for n in limits)
    short = Clip("b.mov", {"microscope": ["A red car stops."], "copilot": []})
    assert aug.make_requests(short, "copilot", config) == []
    assert len(aug.make_requests(short, "microscope", config)) == 6
    filled = Clip("c.mov", {"microscope": [SOURCE], "copilot": ["s"] * 4})
    assert len(aug.make_requests(filled, "copilot", config)) == 3  # one wanted text and two spares


# ---- sampling


def test_sampling_follows_the_distribution_within_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.9]).log()
    grid = (torch.arange(1000) + 0.5) / 1000

    def shares(top_p, temperature=1.0):
        config = SimpleNamespace(top_p=top_p, temperature=temperature)
        sampler = SeededSampling(grid[:, None], config, vocab_size=4)  # id 4 is a row past the tokenizer's length
        tokens = sampler(None, logits.repeat(1000, 1)).argmax(-1)
        return (torch.bincount(tokens, minlength=5) / 1000).tolist()

    assert shares(1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05, 0], abs=0.002)
    assert shares(0.7) == pytest.approx([0.625, 0.375, 0, 0, 0], abs=0.002)
    assert shares(1.0, temperature=0.5) == pytest.approx([0.685, 0.247, 0.062, 0.007, 0], abs=0.002)
    last = SeededSampling(torch.tensor([[1.0 - 2**-24]]), SimpleNamespace(top_p=0.7, temperature=1.0), 4)
    assert last(None, logits[None]).argmax(-1).item() == 1  # the very end of the interval is still a kept token


def requests_of(lengths):
    source = "A red car stops at the light."
    return [Request("Tell it again. " + "car " * n, 100 + n, source, 8 + n % 5) for n in lengths]


def make_teacher(folder, **changes):
    config = AugmentConfig(language_model=str(folder), dtype="float32", **changes)
    return Teacher(config, AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("name", ["llm", "llm_plain"])
def test_a_text_depends_on_its_request_alone(tiny, name):
    teacher = make_teacher(getattr(tiny, name))
    requests = requests_of([1, 9, 30, 2])
    together = teacher(requests)
    assert [teacher([r])[0] for r in requests] == together
    assert teacher(requests[::-1]) == together[::-1]
    assert len(set(together)) == 4 and teacher([]) == []


def test_generation_defaults_of_the_model_are_not_used(tiny, tmp_path):
    folder = tmp_path / "llm"
    folder.mkdir()
    for file in tiny.llm.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    generation = json.loads((folder / "generation_config.json").read_text())
    generation.update(repetition_penalty=9.0, min_new_tokens=20, no_repeat_ngram_size=1, max_length=7, num_beams=3,
                      suppress_tokens=list(range(20, 300)))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    assert make_teacher(folder)(requests_of([3, 5])) == make_teacher(tiny.llm)(requests_of([3, 5]))


def test_answers_end_at_any_end_token_and_at_their_own_limit(tiny):
    teacher = make_teacher(tiny.llm)
    ids = teacher.tokenizer.encode("A red car stops.", add_special_tokens=False)
    for end in ("<|im_end|>", "<|endoftext|>"):
        end_id = teacher.tokenizer.convert_tokens_to_ids(end)
        assert teacher.answer([*ids, end_id, 5, 5]) == ("A red car stops.", True)
    assert teacher.answer(ids) == ("A red car stops.", False)
    visible = teacher.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert teacher.answer([*ids, visible]) == ("A red car stops.<|video_pad|>", False)  # kept, for the check
    assert make_teacher(tiny.llm_plain).end_ids == [2]


# ---- whole runs with a scripted teacher


class Script:
    """Replaces the teacher: sound and faulty texts by the request's seed; dies after a given number of batches."""

    calls = 0

    def __init__(self, config, tokenizer, dies_after=None):
        self.dies_after = dies_after

    def __call__(self, requests):
        Script.calls += 1
        if self.dies_after is not None and Script.calls > self.dies_after:
            raise KeyboardInterrupt
        return [self.answer(r) for r in requests]

    def answer(self, request):
        rng = random.Random(request.seed)
        words = request.source.split()
        rng.shuffle(words)  # the same objects, but other sequences of words
        faults = [("1. " + " ".join(words), True), (" ".join(words[:3]), True), (" ".join(words), False)]
        return rng.choice(faults) if rng.random() < 0.3 else (" ".join(words), True)


FLAGS = ("--summary_min_words", 5, "--summary_max_words", 40, "--rewrite_longest", 3, "--clips_per_batch", 2,
         "--dtype", "float32", "--num_rewrites", 2, "--num_summaries", 2)


@pytest.fixture
def scene(tiny, tmp_path):
    """.raw: 11 raw captions; .run(name, ...): one run in this process; .files(name): what it wrote."""
    rows = [{"video": f"clips/{n:02d}.mov", "q": "Describe the video in detail.",
             "a": f"Clip {n}: " + " ".join(f"word{n}x{k}" for k in range(10 + n))} for n in range(11)]
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps(rows), encoding="utf-8")

    def run(name, *more, make=Script, data=raw):
        Script.calls = 0
        argv = ["--data", data, "--output", tmp_path / f"{name}.jsonl", "--language_model", tiny.llm, *FLAGS, *more]
        return aug.main([str(a) for a in argv], make)

    def files(name):
        kept = [tmp_path / f"{name}.jsonl", tmp_path / f"{name}.jsonl.augment/dropped.jsonl"]
        return [file.read_bytes() for file in kept]

    return SimpleNamespace(raw=raw, run=run, files=files, root=tmp_path, llm=tiny.llm,
                           folder=lambda name: tmp_path / f"{name}.jsonl.augment")


def results_of(scene, name):
    return sorted((scene.folder(name) / "clips").glob("[0-9]*.json"))


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_a_run_writes_rows_report_and_table(scene, capsys):
    assert scene.run("out") == 0
    rows = rows_of(scene.root / "out.jsonl")
    originals = json.loads(scene.raw.read_text())
    assert [row["video"] for row in rows] == [row["video"] for row in originals]
    assert [row["microscope"][0] for row in rows] == [row["a"] for row in originals]
    assert all(len(row["microscope"]) <= 3 and len(row.get("copilot", [])) <= 2 for row in rows)
    assert {entry.mode for entry in load_entries(scene.root / "out.jsonl")} == {"microscope", "copilot"}

    report = json.loads((scene.folder("out") / "report.json").read_text())
    dropped = rows_of(scene.folder("out") / "dropped.jsonl")
    for mode, counts in report["modes"].items():
        texts = sum(len(row.get(mode, [])) for row in rows)
        assert counts["given"] + counts["new"] == texts
        assert counts["sampled"] == counts["new"] + counts["spare"] + sum(counts["dropped"].values()) == 11 * 4
        assert sum(counts["dropped"].values()) == sum(drop["mode"] == mode for drop in dropped)
    assert {drop["reason"] for drop in dropped} == {"markup", "length", "not_ended"}
    table = capsys.readouterr().out
    assert "dropped: markup" in table and str(scene.root / "out.jsonl") in table


def test_json_and_jsonl_hold_the_same_rows(scene):
    scene.run("out")
    argv = ["--data", scene.raw, "--output", scene.root / "list.json", "--language_model", scene.llm, *FLAGS]
    assert aug.main([str(a) for a in argv], Script) == 0
    assert json.loads((scene.root / "list.json").read_text()) == rows_of(scene.root / "out.jsonl")


def test_killed_and_repeated_runs_give_the_same_file(scene, capsys):
    scene.run("whole")
    for batches in (1, 2, 5, 11):  # two clips take two batches of texts, one per mode
        name = f"cut{batches}"
        with pytest.raises(KeyboardInterrupt):
            scene.run(name, make=functools.partial(Script, dies_after=batches))
        assert not (scene.root / f"{name}.jsonl").exists()
        done = results_of(scene, name)
        assert len(done) == batches // 2 * 2
        if batches == 2:  # killed while the second clip of a batch was being written
            done[-1].rename(done[-1].with_name(f".{done[-1].name}.1.tmp"))
        elif done:  # damaged, as by a power failure
            whole = done[-1].read_bytes()
            done[-1].write_bytes(whole[: len(whole) // 2] if batches == 5 else b"")
        assert scene.run(name) == 0
        assert scene.files(name) == scene.files("whole")
    assert scene.run("whole") == 0 and Script.calls == 0  # nothing is sampled, results are only merged again
    assert scene.files("whole") == scene.files("cut1")


def test_only_clips_that_are_not_done_are_sampled_again(scene):
    assert scene.run("out") == 0 and Script.calls == 12  # six batches of clips, two modes
    before = scene.files("out")
    results_of(scene, "out")[3].unlink()
    assert scene.run("out") == 0 and Script.calls == 2 and scene.files("out") == before


def test_texts_of_a_third_mode_are_passed_through(scene, monkeypatch):
    monkeypatch.setitem(MODE_TABLE, "hazards", Mode("List the hazards."))
    monkeypatch.setitem(MODES, "hazards", "List the hazards.")
    rows = [{**row, "microscope": [row.pop("a")], "hazards": ["None."]} for row in json.loads(scene.raw.read_text())]
    (scene.root / "three.json").write_text(json.dumps(rows))
    assert scene.run("three", data=scene.root / "three.json") == 0
    assert all(row["hazards"] == ["None."] and row["microscope"] for row in rows_of(scene.root / "three.jsonl"))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_processes_share_the_clips_and_the_last_one_merges_them(scene, monkeypatch, capsys, order):
    scene.run("whole")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for last, rank in enumerate(order):
        monkeypatch.setenv("RANK", str(rank))
        assert scene.run("shared") == 0
        assert (scene.root / "shared.jsonl").exists() == bool(last)
        if not last:
            numbers = [int(file.stem) for file in results_of(scene, "shared")]
            assert numbers == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10]][rank]
    assert scene.files("shared") == scene.files("whole")


def test_a_run_may_continue_with_another_number_of_processes(scene, monkeypatch):
    scene.run("whole")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert scene.run("moved") == 0 and not (scene.root / "moved.jsonl").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert scene.run("moved") == 0
    assert scene.files("moved") == scene.files("whole")


def test_two_runs_on_one_output_exclude_each_other(scene, capsys):
    def second_run(config, tokenizer):
        assert scene.run("out") == 1
        assert "another run" in capsys.readouterr().err
        return Script(config, tokenizer)

    assert scene.run("out", make=second_run) == 0


def test_existing_texts_are_kept_and_missing_ones_added(scene):
    long = " ".join(f"word{n}" for n in range(20))
    rows = [
        {"video": "a.mov", "microscope": [long, "Mine."], "copilot": ["Own one.", "Own two."]},
        {"video": "./a.mov", "microscope": ["Mine."]},
        {"video": "b.mov", "copilot": ["No original here."]},
        {"video": "c.mov", "question": "?", "q": "What happens?", "captions": ["Four words are few."]},
    ]
    (scene.root / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scene.run("mixed_out", data=scene.root / "mixed.jsonl")
    a, b, c = rows_of(scene.root / "mixed_out.jsonl")
    assert a["microscope"][:2] == [long, "Mine."] and len(a["microscope"]) == 3
    assert a["copilot"] == ["Own one.", "Own two."]
    assert b == {"video": "b.mov", "copilot": ["No original here."]}
    assert c["microscope"][0] == "Four words are few." and "copilot" not in c  # too short for a summary


def test_a_clip_without_a_sound_summary_keeps_its_microscope_row(scene, capsys):
    class Bad(Script):
        def answer(self, request):
            return "Sure! Here is a summary.", True

    assert scene.run("bad", make=Bad) == 0
    rows = rows_of(scene.root / "bad.jsonl")
    assert len(rows) == 11 and all(set(row) == {"video", "microscope"} for row in rows)
    report = json.loads((scene.folder("bad") / "report.json").read_text())
    assert len(report["modes"]["copilot"]["clips_without"]) == 11
    assert '11 of 11 rows have no "copilot"' in capsys.readouterr().out
    # completed later, from this output and with another seed
    assert scene.run("better", "--seed", 7, data=scene.root / "bad.jsonl") == 0
    assert sum("copilot" in row for row in rows_of(scene.root / "better.jsonl")) > 5


# ---- mistakes of the user


def test_all_mistakes_are_in_one_message(scene, tiny, capsys):
    def refuse(*argv, **keys):
        with pytest.raises(SystemExit) as stop:
            scene.run("out", *argv, make=None, **keys)
        assert stop.value.code == 2
        return capsys.readouterr().err

    text = refuse("--temperature", 0, "--top_p", 2, "--rewrite_shortest", 4, "--summary_min_words", 80, "--spares", -1)
    assert all(key in text for key in ("temperature", "top_p", "rewrite_shortest", "summary_max_words", "spares"))
    assert "num_rewrites" in refuse("--num_rewrite", 3)
    (scene.root / "out.jsonl").write_text("mine")
    text = refuse("--language_model", scene.root / "nowhere", data=scene.root / "none.json")
    assert all(word in text for word in ("none.json", "nowhere", "give another --output"))
    assert (scene.root / "out.jsonl").read_text() == "mine" and not scene.folder("out").exists()
    bad = scene.root / "bad.json"
    bad.write_text(json.dumps([{"video": "x.mov", "copilot": ["A line."]}]))
    assert "no detailed caption" in refuse(data=bad)
    bad.write_text(json.dumps([{"video": "x.mov", "microscope": ["A car.<|im_end|> And on."]}]))
    text = refuse(data=bad)
    assert "x.mov" in text and "<|im_end|>" in text


def test_other_settings_cannot_continue_in_the_same_folder(scene, capsys):
    scene.run("out")
    for flags, key in ((("--seed", 1), "seed"), (("--num_rewrites", 1), "num_rewrites")):
        with pytest.raises(SystemExit):
            scene.run("out", *flags)
        assert f"with {key} " in capsys.readouterr().err
    other = scene.root / "other.json"
    other.write_text(json.dumps(json.loads(scene.raw.read_text())[1:]))
    with pytest.raises(SystemExit):
        scene.run("out", data=other)
    assert "captions" in capsys.readouterr().err
    assert scene.run("out", "--clips_per_batch", 3) == 0  # may be changed, for when memory ran out


# ---- the real thing, small: a random model, torchrun, SIGKILL


def test_two_killed_processes_and_one_that_finishes_give_the_same_file(scene, tiny):
    """Two processes are killed with SIGKILL; one process finishes the run; the bytes are those of one whole run."""
    raw = scene.root / "short.json"
    raw.write_text(json.dumps([{"video": f"{n}.mov", "microscope": [f"A red car stops at light {n}. Then it turns."]}
                               for n in range(8)]))
    argv = ["augment_captions.py", "--data", raw, "--language_model", tiny.llm, "--dtype", "float32",
            "--clips_per_batch", 1, "--summary_min_words", 3, "--summary_max_words", 12, "--num_rewrites", 2,
            "--num_summaries", 3, "--spares", 1]
    argv = [str(a) for a in argv]
    assert aug.main([*argv[1:], "--output", str(scene.root / "whole.jsonl")]) == 0

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = (scene.root / "log.txt").open("w+")
    launcher = psutil.Popen([*command, "--output", str(scene.root / "cut.jsonl")], cwd=ROOT, env=environment,
                            stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    while not results_of(scene, "cut"):
        assert launcher.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
        time.sleep(0.005)
    processes = [launcher, *launcher.children(recursive=True)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes)
    assert 0 < len(results_of(scene, "cut")) < 8 and not (scene.root / "cut.jsonl").exists()
    assert aug.main([*argv[1:], "--output", str(scene.root / "cut.jsonl")]) == 0
    assert scene.files("cut") == scene.files("whole")
    assert len(scene.files("whole")[1]) > 1000  # all texts are dropped; dropped ones are compared
