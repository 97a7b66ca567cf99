"""The held-out clips during stage 3: what the video is worth to the reward, the stop, the best step.

Run: `python -m pytest tests/test_held_out.py -q`
"""

import json
import re
from collections import Counter
from types import SimpleNamespace

import pytest
from test_stage3 import deterministic, quick, rows_of, run_stage3, stage2  # noqa: F401 - fixtures

import stage3.held_out
import train_stage3
from dataset import Entry
from model import adapter_hash
from stage3.grpo_reward_func import Reward
from stage3.held_out import add_rewards, blind_problem, other_clips
from stage3.report import evaluation_rows
from training import loop
from training.common import TrainingError
from training.config import Stage3Config
from training.run_folder import RunFolder, step_folders


def entry(video, mode="copilot", question="What?"):
    return Entry(f"{video}#{mode}", video, mode, question, ("a caption",))


# ---------------------------------------------------------------------------------------------------------------------
# The gap


def test_the_other_clip_is_asked_the_same_question_in_the_same_mode():
    entries = [*(entry(v) for v in "abcde"), entry("a", "microscope"), entry("b", "microscope"),
               entry("c", question="Why?")]
    others = other_clips(entries, range(len(entries)))
    assert others == {0: 2, 1: 3, 2: 4, 3: 0, 4: 1, 5: 6, 6: 5}  # nobody else was asked entry 7's question
    assert other_clips(entries, [1, 3, 5]) == {1: 3, 3: 1}  # clips that could not be read have no answer to give


def test_gaps_by_hand():
    """Three clips; the reward of a text is the number in it, plus 1 where it names its own clip."""
    entries = [entry("a"), entry("b"), entry("c"), entry("d")]
    answers, blank = {0: "a 0.5", 1: "b 0.25", 2: "c 0.75", 3: "d 1"}, {("copilot", "What?"): "grey 0.125"}
    sampler = SimpleNamespace(
        evidence={"a": True, "b": True, "c": None, "d": True},
        reward_of=lambda entry, text: (float(text.split()[1]) + (text[0] == entry.video), {}))
    sums = Counter()
    add_rewards(sampler, entries, range(4), answers, blank, sums)
    assert sums["answers", "copilot"] == sums["swapped", "copilot"] == 3  # c has no evidence, but an answer for a
    assert sums["reward", "copilot"] == 1.5 + 1.25 + 2.0
    assert sums["gap_swapped", "copilot"] == (1.5 - 0.75) + (1.25 - 1.0) + (2.0 - 0.25)
    assert sums["gap_blank", "copilot"] == (1.5 - 0.125) + (1.25 - 0.125) + (2.0 - 0.125)
    parts = [Counter(), Counter()]  # two ranks
    for rank, own in enumerate(parts):
        add_rewards(sampler, entries, range(rank, 4, 2), answers, blank, own)
    assert parts[0] + parts[1] == sums


def values(**numbers):
    return {f"eval_{key}": value for key, value in numbers.items()}


@pytest.mark.parametrize("reward, gap, stops", [
    (0.8, 0.11, False), (0.8, 0.10, True), (0.8, -0.3, True),
    (0.6, 0.0, False),  # the reward has not risen
    (0.8, 0.35, False),
])
def test_a_run_is_blind_when_the_reward_has_risen_and_the_gap_is_half_of_what_it_was(reward, gap, stops):
    first = values(reward_copilot=0.6, gap_swapped_copilot=0.2)
    problem = blind_problem(Stage3Config(stop_when_blind=0.5), first,
                            values(reward_copilot=reward, gap_swapped_copilot=gap))
    assert (problem is not None) == stops
    if stops:
        assert "in copilot" in problem and "from 0.600 to 0.800" in problem and "was 0.200 with stage 2" in problem


def test_one_blind_mode_of_those_trained_is_enough_and_one_without_a_gap_at_the_start_is_blind():
    first = values(reward_copilot=0.6, gap_swapped_copilot=1e-17, reward_microscope=0.6, gap_swapped_microscope=0.2)
    now = values(reward_copilot=0.7, gap_swapped_copilot=2e-17, reward_microscope=0.7, gap_swapped_microscope=0.2)
    assert "in copilot" in blind_problem(Stage3Config(stop_when_blind=0.5), first, now)
    assert blind_problem(Stage3Config(stop_when_blind=0.5, modes=["microscope"]), first, now) is None
    assert blind_problem(Stage3Config(stop_when_blind=None), first, now) is None
    assert blind_problem(Stage3Config(stop_when_blind=0.5), values(reward_copilot=0.6), now) is None


# ---------------------------------------------------------------------------------------------------------------------
# A run


def vowels(caption):
    return sum(letter in "aeiou" for letter in caption) / max(len(caption), 1)


def blind(caption, evidence, mode, reference=None):
    """Pays for a text whatever the clip shows."""
    return Reward(vowels(caption), 0.0, 0.0, 0.0, 0.0)


def generous(caption, evidence, mode, reference=None):
    return Reward(0.25 + vowels(caption) / 2, 0.0, 0.0, 0.0, 0.0)


def script(monkeypatch, by_step):
    """Held-out (reward, gap) by step, the same in both modes: the tiny models' own would be chance."""
    inner, now = stage3.held_out.Evaluations.evaluate, []

    def evaluate(sampler, held_out):
        reward, gap = by_step[now[-1]]
        return {"eval_loss": 1.0, "eval_reward_copilot": reward, "eval_reward_microscope": reward,
                "eval_gap_swapped_copilot": gap, "eval_gap_swapped_microscope": gap}

    def note_the_step(self, step):
        now.append(step)
        return inner(self, step)

    monkeypatch.setattr(stage3.held_out, "evaluate", evaluate)
    monkeypatch.setattr(stage3.held_out.Evaluations, "evaluate", note_the_step)


def test_a_reward_that_ignores_the_video_stops_the_run(stage2, tmp_path, quick):  # noqa: F811
    flags = ("--reward", "test_held_out:blind", "--max_steps", 12, "--learning_rate", 0.03, "--warmup", 0,
             "--num_val_videos", 4, "--lr_schedule", "constant", "--wordings", 0)
    with pytest.raises(TrainingError, match="without watching: on the held-out clips its reward has risen") as error:
        run_stage3(stage2, tmp_path / "run", *flags, "--stop_when_blind", 0.5)
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")
    step = rows[-1]["step"]
    assert 0 < step <= 12 and f"step {step}: in " in str(error.value)
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "run.json").is_file()
    assert not (tmp_path / "run" / "model").exists()
    assert all(abs(row["eval_gap_swapped_copilot"]) < 1e-9 for row in rows if "eval_gap_swapped_copilot" in row)
    run_stage3(stage2, tmp_path / "goes_on", *flags, "--stop_when_blind", "none")
    assert rows_of(tmp_path / "goes_on" / "metrics.jsonl")[-1]["step"] == 12


def test_the_gap_is_that_of_the_models_own_answers(stage2, tmp_path, quick):  # noqa: F811
    """On a real run, with a reward that knows the clip: the gap is its lead, whichever way the numbers are summed."""
    seen = {}
    inner = stage3.held_out.add_rewards

    def look(sampler, entries, own, answers, blank, sums):
        seen.update(entries=entries, answers=answers, blank=blank, sampler=sampler)
        inner(sampler, entries, own, answers, blank, sums)

    quick.setattr(stage3.held_out, "add_rewards", look)
    run_stage3(stage2, tmp_path / "run", "--max_steps", 1, "--num_val_videos", 3, "--eval_every", 9, "--wordings", 0)
    entries, answers, reward_of = seen["entries"], seen["answers"], seen["sampler"].reward_of
    row = rows_of(tmp_path / "run" / "metrics.jsonl")[-1]
    assert len(answers) == 6 and len(seen["blank"]) == 2
    for mode in ("microscope", "copilot"):
        own = [i for i, e in enumerate(entries) if e.mode == mode]
        real = [reward_of(entries[i], answers[i])[0] for i in own]
        swapped = [reward_of(entries[i], answers[j])[0] for i, j in zip(own, own[1:] + own[:1], strict=True)]
        grey = [reward_of(entries[i], seen["blank"][mode, entries[i].question])[0] for i in own]
        assert row[f"eval_reward_{mode}"] == pytest.approx(sum(real) / 3)
        assert row[f"eval_gap_swapped_{mode}"] == pytest.approx((sum(real) - sum(swapped)) / 3, abs=1e-12)
        assert row[f"eval_gap_blank_{mode}"] == pytest.approx((sum(real) - sum(grey)) / 3, abs=1e-12)
    assert len(set(answers.values())) > 1  # the tiny model does look


def test_what_another_clips_tokens_give_is_that_clips_answer(stage2, tmp_path, quick):  # noqa: F811
    """Why no answer is generated for the swapped gap."""
    kept, texts = {}, set()
    inner = stage3.held_out.answer_batch

    def swap(sampler, entries, sums, answers):
        read, clips = sampler.read_clips, sorted({e.video for e in entries.values()})
        errors = inner(sampler, entries, sums, answers)
        others = dict(zip(clips, clips[1:] + clips[:1], strict=True))
        sampler.read_clips = lambda asked: ({i: sampler.visual_tokens(others[e.video]) for i, e in asked.items()}, [])
        shown = {}
        inner(sampler, entries, Counter(), shown)
        sampler.read_clips = read
        for i, e in entries.items():
            (same,) = [j for j, o in entries.items() if o.video == others[e.video] and o.mode == e.mode]
            kept[i] = shown[i] == answers[same]
        texts.update(answers.values())
        return errors

    quick.setattr(stage3.held_out, "answer_batch", swap)
    run_stage3(stage2, tmp_path / "run", "--max_steps", 1, "--num_val_videos", 3, "--eval_batch_size", 6,
               "--eval_every", 9, "--wordings", 0)
    assert len(kept) == 6 and all(kept.values()) and len(texts) > 1


def cut_the_power(*_, **__):
    raise KeyboardInterrupt


def first_of(folder, step):
    return json.loads((folder / "checkpoints" / f"step-{step:06d}" / "run.json").read_text())["evaluations"]["first"]


def test_the_start_is_known_after_a_resume_and_measured_anew_on_a_branch(stage2, tmp_path, quick):  # noqa: F811
    flags = ("--num_val_videos", 3)
    run_stage3(stage2, tmp_path / "whole", *flags)
    start = rows_of(tmp_path / "whole" / "metrics.jsonl")[0]
    first = first_of(tmp_path / "whole", 4)
    assert first == {key: start[key] for key in first} and "eval_gap_blank_copilot" in first

    with quick.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "save_result", cut_the_power)
        run_stage3(stage2, tmp_path / "run", *flags)
    (tmp_path / "run" / "checkpoints" / "step-000004").rename(tmp_path / "step-000004")
    run_stage3(stage2, tmp_path / "run", *flags, "--resume", "auto")
    assert first_of(tmp_path / "run", 4) == first
    assert adapter_hash(tmp_path / "run") == adapter_hash(tmp_path / "whole")
    assert deterministic(tmp_path / "run") == deterministic(tmp_path / "whole")

    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000002"
    run_stage3(stage2, tmp_path / "branch", *flags, "--resume", checkpoint, "--reward", "test_held_out:generous")
    branch = first_of(tmp_path / "branch", 4)  # of stage 2's adapter, under the branch's own reward
    assert branch["eval_loss"] == first["eval_loss"] and branch["eval_reward_copilot"] >= 0.25
    run_stage3(stage2, tmp_path / "alone", *flags, "--max_steps", 1, "--reward", "test_held_out:generous")
    assert branch == {key: rows_of(tmp_path / "alone" / "metrics.jsonl")[0][key] for key in branch}


# ---------------------------------------------------------------------------------------------------------------------
# The best step


CURVE = {0: (0.5, 0.2), 2: (0.7, 0.2), 4: (0.9, 0.2), 6: (0.9, 0.2), 8: (0.6, 0.2), 10: (0.8, 0.2)}
KEEP = ("--keep_best", "true", "--stop_when_blind", 0.5, "--max_steps", 10, "--keep_checkpoints", 1, "--save_every", 5)


def steps_of(folder):
    return [int(path.name[5:]) for path in step_folders(folder / "checkpoints")]


@pytest.fixture(scope="module")
def best_of(stage2, tmp_path_factory):  # noqa: F811
    """A whole run whose best step is 4 (6 is as good, later)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.run_folder.plot_curves", lambda *_: None)
        script(patch, CURVE)
        return run_stage3(stage2, tmp_path_factory.mktemp("best") / "run", *KEEP)


def test_the_result_is_the_best_step(best_of, stage2):  # noqa: F811
    assert steps_of(best_of) == [4, 10]
    checkpoint = best_of / "checkpoints" / "step-000004"
    for name in ("adapter/adapter_model.safetensors", "projector.safetensors", "clips.json"):
        assert (best_of / "model" / name).read_bytes() == (checkpoint / "model" / name).read_bytes(), name
    assert adapter_hash(best_of) != adapter_hash(best_of / "checkpoints" / "step-000010" / "model")
    meta = json.loads((best_of / "model" / "drivevlm.json").read_text())
    assert meta.pop("best") == {"step": 4, "reward": 0.9} and meta["stage"] == 3
    assert meta == json.loads((checkpoint / "model" / "drivevlm.json").read_text())
    state = json.loads((best_of / "checkpoints" / "step-000010" / "run.json").read_text())
    assert state["evaluations"]["best"] == {"step": 4, "reward": 0.9}
    log = (best_of / "train.log").read_text()
    assert "step 4 is the best so far" in log and "step 6 is" not in log
    assert "model is of step 4, the best by held-out reward (0.9000)" in log
    rows = rows_of(best_of / "metrics.jsonl")
    assert {row["step"]: row["best_step"] for row in rows if "best_step" in row} == {0: 0, 2: 2, 4: 4}
    table, best = evaluation_rows(rows)
    assert best == "4" and [row[0] for row in table[1:]] == ["0", "2", "4", "6", "8", "10"]
    assert table[3] == ["4", "0.900", "0.200", "–", "0.900", "0.200", "–"]
    page = (best_of / "report.html").read_text()
    assert "Step 4 has the highest reward" in page and re.search(r'<tr class="strong"><td>\s*4\s*</td>', page)


@pytest.mark.parametrize("where", ["before the best", "after the best", "before the result"])
def test_the_best_step_survives_a_kill(where, stage2, tmp_path, quick, best_of):  # noqa: F811
    step = {"before the best": 4, "after the best": 9, "before the result": None}[where]
    compute = train_stage3.compute_advantages
    with quick.context() as patch, pytest.raises(KeyboardInterrupt):
        script(patch, CURVE)
        if step is None:
            patch.setattr(loop, "save_result", cut_the_power)
        else:
            patch.setattr(train_stage3, "compute_advantages", lambda config, rollouts, records, *rest: (
                cut_the_power() if records[0]["step"] == step else compute(config, rollouts, records, *rest)))
        run_stage3(stage2, tmp_path / "run", *KEEP)
    assert steps_of(tmp_path / "run") == {4: [2], 9: [4, 5], None: [4, 10]}[step]
    with quick.context() as patch:
        script(patch, CURVE)
        run_stage3(stage2, tmp_path / "run", *KEEP, "--resume", "auto")
    assert steps_of(tmp_path / "run") == [4, 10]
    assert deterministic(tmp_path / "run") == deterministic(best_of)
    for path in (best_of / "model").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "run" / path.relative_to(best_of)).read_bytes(), path.name


def test_a_damaged_best_checkpoint_is_no_result(stage2, tmp_path, quick):  # noqa: F811
    inner = loop.save_result

    def damaged(run, *args, **options):
        with open(run.checkpoints / "step-000004" / "model" / "adapter" / "adapter_model.safetensors", "ab") as file:
            file.write(b"x")
        inner(run, *args, **options)

    script(quick, CURVE)
    quick.setattr(loop, "save_result", damaged)
    with pytest.raises(TrainingError, match="step-000004, the best by held-out reward, is damaged: .*instead of"):
        run_stage3(stage2, tmp_path / "run", *KEEP)
    assert not (tmp_path / "run" / "model").exists()


def test_a_blind_step_is_never_the_best(stage2, tmp_path, quick):  # noqa: F811
    script(quick, CURVE | {4: (0.95, 0.05)})
    with pytest.raises(TrainingError, match="step 4: in microscope the model is paid without watching"):
        run_stage3(stage2, tmp_path / "run", *KEEP)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000004" / "run.json").read_text())
    assert state["evaluations"]["best"] == {"step": 2, "reward": 0.7} and steps_of(tmp_path / "run") == [2, 4]


def test_a_result_that_was_cut_off_is_written_again(tmp_path):
    with RunFolder(tmp_path) as run:
        with run.checkpoint(3, 1, evaluations={"first": {}, "best": {"step": 3, "reward": 0.5}}) as folder:
            (folder / "model").mkdir()
            (folder / "model" / "drivevlm.json").write_text('{"stage": 3}')
        (tmp_path / ".model.tmp").mkdir()
        (tmp_path / "model").mkdir()  # without drivevlm.json: no result
        (tmp_path / "model" / "half").write_text("")
        loop.save_result(run, None, stage=3, best={"step": 3, "reward": 0.5})
        assert run.finished and not (tmp_path / "model" / "half").exists() and not (tmp_path / ".model.tmp").exists()
        for step in (4, 5):
            with run.checkpoint(step, 1, evaluations={"first": {}, "best": {"step": 3, "reward": 0.5}}) as folder:
                (folder / "a").write_text("")
        assert steps_of(tmp_path) == [3, 5]


def test_keep_best_needs_held_out_clips():
    assert "keep_best needs held-out clips" in Stage3Config(keep_best=True, num_val_videos=0).problems()[0]
    assert Stage3Config(keep_best=True, num_val_videos=0, val_data="a.json").problems() == []
    assert "stop_when_blind must be between 0 and 1" in Stage3Config(stop_when_blind=2.0).problems()[0]
