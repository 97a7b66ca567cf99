"""Stage 3 as a user runs it, on tiny random models: what trains, resumes, splits, stops, and what is written.

Run: `python -m pytest tests/test_stage3.py -q`
"""

import dataclasses
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import in_two_processes
from safetensors.torch import load_file

import evaluate
import generate
import stage3.grpo
import stage3.held_out
import train_stage1_ddp
import train_stage2
import train_stage3
from dataset import MODES, draw_question, encode_example, load_entries
from model import DriveVLM, adapter_hash
from stage3.detect_objects import cache_folder, clip_file, fingerprint
from stage3.grpo import group_advantages
from stage3.grpo_reward_func import PARTS, REWARD_WEIGHTS, Reward
from stage3.language import usual_nll
from stage3.rollout import load_reward
from training.common import ConfigError, TrainingError, write_json
from training.config import DetectorSettings, Stage3Config

ROOT = Path(__file__).resolve().parents[1]
CLIPS = ("car", "bus", "walk", "truck", "night", "stop")


def write_evidence(folder, settings, failed=()):
    """A detector's cache as stage3/detect_objects.py leaves it: a car in every frame, and perhaps a truck."""
    made_by = fingerprint(settings)
    cache = cache_folder(folder, made_by)
    cache.mkdir(parents=True)
    write_json(cache / "settings.json", {"made_by": made_by, "ultralytics": "test"})
    for name in CLIPS:
        video = f"{name}.mp4"
        boxes = [[2, 0.9, 0.1, 0.3, 0.4, 0.6], [7, 0.3, 0.5, 0.05, 0.8, 0.5], [0, 0.12, 0.7, 0.5, 0.75, 0.8]]
        record = {"video": video, "made_by": made_by, "ultralytics": "test"}
        if name in failed:
            record["error"] = "broken"
        else:
            frames = [{"index": i, "time": i / 19, "boxes": boxes} for i in (0, 10, 19)]
            record |= {"bytes": 1, "frames": frames}
        write_json(clip_file(cache, video), record)


@pytest.fixture(scope="module")
def stage2(tiny):
    """A folder with stage 2's result (adapter and projector drawn at random), evidence, and a config file."""
    folder = tiny.root / "for_stage3"
    if folder.exists():
        return folder
    model = DriveVLM.from_base(tiny.vision, tiny.llm, num_frames=2, dtype="float32", seed=1)
    model.add_lora(r=4, alpha=8, dropout=0.1, seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.llm.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1, generator=generator)
    model.save_checkpoint(folder / "stage2" / "model", stage=2)
    write_evidence(folder / "evidence", DetectorSettings(weights="none.pt", num_frames=3))
    config = {
        "data": str(tiny.data), "video_root": str(tiny.videos), "vision_model": str(tiny.vision),
        "language_model": str(tiny.llm), "num_frames": 2, "max_text_tokens": 128, "num_val_videos": 2,
        "dtype": "float32", "frame_cache": str(folder / "frames"), "num_workers": 0,
        "init_from": str(folder / "stage2"), "output_dir": str(folder / "default"), "max_steps": 4,
        "learning_rate": 0.01, "per_device_batch_size": 2, "gradient_accumulation_steps": 2, "num_generations": 4,
        "max_new_tokens": {"microscope": 14, "copilot": 8}, "sample_tokens": 8, "mask_truncated": False,
        "reward": "test_stage3:vowels",
        "reward_weights": {"objects": 1.0, "temporal": 0.5, "detail": 0.0, "hallucination": 0.0},
        "activation_checkpointing": False, "eval_every": 2, "sample_every": 4, "save_every": 2, "max_kl": None,
        "stop_when_blind": None,  # the rewards of these tests do not look at the video
        "evidence_cache": str(folder / "evidence"), "detector": {"weights": "none.pt", "num_frames": 3},
    }  # JSON is YAML
    (folder / "stage3.yaml").write_text(json.dumps(config))
    return folder


def vowels(caption, evidence, mode, reference=None):
    """A reward that random models can raise: the share of vowels."""
    share = sum(letter in "aeiou" for letter in caption) / max(len(caption), 1)
    return Reward(share, share / 2, 0.0, 1.0, share)


def constant(caption, evidence, mode, reference=None):
    return Reward(0.1, 0.2, 0.3, 0.4, 0.7)


def vowels_of_microscope(caption, evidence, mode, reference=None):
    """Every Copilot answer gets the same reward."""
    return vowels(caption, evidence, mode) if mode == "microscope" else Reward(0.5, 0.5, 0.5, 0.5, 0.5)


@pytest.fixture
def quick(monkeypatch):
    """Runs that measure stage 2's language once."""
    monkeypatch.setattr(train_stage3, "usual_nll", remembered_usual_nll)
    return monkeypatch


USUAL = {}
USUAL_KEYS = ("dtype", "seed", "modes", "num_generations", "temperature", "max_new_tokens", "wordings",
              "shared_prefix", "judge_language")


def remembered_usual_nll(config, model, sampler, prompts, log):
    """`usual_nll`, which is a function of these alone (tests/test_language.py)."""
    settings = [getattr(config, key) for key in USUAL_KEYS]
    key = str([adapter_hash(config.init_from), settings, sampler.prompts_per_rank, [entry.id for entry in prompts]])
    if key not in USUAL:
        USUAL[key] = usual_nll(config, model, sampler, prompts, log)
    return USUAL[key]


def run_stage3(stage2, output, *flags):
    train_stage3.main(["--config", str(stage2 / "stage3.yaml"), "--output_dir", str(output), *map(str, flags)])
    return output


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def weights_of(folder):
    return load_file(Path(folder) / "model" / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(stage2, tmp_path_factory):
    """One whole run of four steps."""
    return run_stage3(stage2, tmp_path_factory.mktemp("stage3") / "run")


# ---------------------------------------------------------------------------------------------------------------------
# From clips to answers


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_whole_path_works_in_both_number_types(dtype, stage2, tiny, tmp_path, quick, capsys):
    """Stages 1, 2 and 3, evaluation and one answer, as `make demo` runs them, on tiny models."""
    shared = ["--config", stage2 / "stage3.yaml", "--dtype", dtype, "--tower_cache", tmp_path / "tower",
              "--augment", "false", "--max_steps", 2]
    train_stage1_ddp.main([*shared, "--output_dir", tmp_path / "one", "--init_from", "none"])
    train_stage2.main([*shared, "--output_dir", tmp_path / "two", "--init_from", tmp_path / "one", "--lora_r", 4])
    run_stage3(stage2, tmp_path / "three", "--init_from", tmp_path / "two", "--dtype", dtype, "--max_steps", 2)
    for name in ("one", "two", "three"):
        assert json.loads((tmp_path / name / "model" / "drivevlm.json").read_text())["dtype"] == dtype
        losses = [row["loss"] for row in rows_of(tmp_path / name / "metrics.jsonl") if "loss" in row]
        assert losses and all(math.isfinite(loss) for loss in losses)
    tensor, = {load_file(file)["tensor"].dtype for file in (tmp_path / "tower").rglob("*.safetensors")}
    assert str(tensor) == f"torch.{dtype}"  # what the tower makes has its own type

    truth = {f"{name}.mp4": {"present": ["car"]} for name in CLIPS}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    evaluate.main(["--config", str(stage2 / "stage3.yaml"), "--dtype", dtype, "--output_dir", str(tmp_path / "eval"),
                   "--truth", str(tmp_path / "truth.json"), "--checkpoint", f"stage3={tmp_path / 'three'}",
                   "--eval_max_new_tokens", "microscope", "99", "copilot", "99"])
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert {"stage3", "blank", "swapped", "reference"} <= set(metrics["systems"])
    capsys.readouterr()
    generate.main(["--checkpoint", str(tmp_path / "three"), "--video", str(tiny.videos / "car.mp4"), "--json",
                   "--dtype", dtype, "--max_new_tokens", "8"])
    assert json.loads(capsys.readouterr().out)["tokens"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves


def test_a_run_leaves_what_it_should(finished, stage2):
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "model", "checkpoints", "metrics.jsonl", "curves.png", "runs", "train.log",
            "rollouts.jsonl", "report.html"} <= names
    assert [p.name for p in sorted((finished / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
    state = json.loads((finished / "checkpoints" / "step-000004" / "run.json").read_text())
    assert state["reference_sha256"] == adapter_hash(stage2 / "stage2")
    assert state["init_from"] == str(stage2 / "stage2")
    assert json.loads((finished / "model" / "drivevlm.json").read_text())["stage"] == 3


def test_only_the_adapter_has_changed(finished, stage2):
    before, after = stage2 / "stage2" / "model", finished / "model"
    assert (before / "projector.safetensors").read_bytes() == (after / "projector.safetensors").read_bytes()
    old, new = weights_of(stage2 / "stage2"), weights_of(finished)
    assert old.keys() == new.keys() and all(not torch.equal(old[name], new[name]) for name in old)
    assert not list(after.glob("adapter/reference*"))


def test_the_first_step_starts_where_stage_2_ended(finished):
    first, second = rows_of(finished / "metrics.jsonl")[1:3]
    assert first["step"] == 1 and first["kl"] == 0.0 and first["clip"] == 0.0
    assert second["kl"] > 0
    assert all(row["sampler_gap"] < 1e-5 for row in (first, second))


def test_every_tag_is_explained(finished):
    page = (ROOT / "docs" / "metrics.md").read_text()
    tags = {key for row in rows_of(finished / "metrics.jsonl") for key in row} - {"step"}
    expected = {f"{name}/{mode}" for name in ("reward", "objects", "temporal", "length", "truncated") for mode in MODES}
    assert all(f"`{part}/<mode>`" in page for part in PARTS)
    expected |= {"reward", "reward_std", "dead_groups", "kl", "entropy", "clip", "clip_low", "clip_high", "loss",
                 "grad_norm", "learning_rate", "tokens_per_second", "memory_gb", "eval_loss", "eval_reward_copilot"}
    assert expected <= tags
    unexplained = [tag for tag in tags if f"`{tag}`" not in page and f"`{tag.split('/')[0]}/<mode>`" not in page
                   and f"`{tag.rsplit('_', 1)[0]}_<mode>`" not in page]
    assert not unexplained


def test_rollouts_hold_answers_rewards_and_evidence(finished):
    rows = rows_of(finished / "rollouts.jsonl")
    assert len(rows) == 4 * 4 * 4 and [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    for i in range(0, len(rows), 4):
        group = rows[i : i + 4]
        assert len({(r["step"], r["slot"], r["id"]) for r in group}) == 1 and [r["k"] for r in group] == [0, 1, 2, 3]
        expected = group_advantages(torch.tensor([[r["reward"] for r in group]], dtype=torch.float64), std_floor=0.05)
        assert [r["advantage"] for r in group] == pytest.approx(expected[0].tolist())
    for row in rows:  # the weighted sum, by the run's own weights, times what the answer's language is worth
        parts = 1.0 * row["objects"] + 0.5 * row["temporal"]
        assert row["reward"] == pytest.approx(parts * row.get("language", 1.0))
        assert row["hallucination"] == 1
    sets = {key: rows[0]["evidence"][key] for key in ("present", "unknown", "salient", "seen")}
    assert sets == {"present": ["car"], "unknown": ["truck"], "salient": ["car"], "seen": {"car": [0.0, 1.0]}}
    assert {row["mode"] for row in rows} == set(MODES)
    assert all(row["tokens"] <= (14 if row["mode"] == "microscope" else 8) for row in rows)
    held_out = {name for name in CLIPS if f"{name}.mp4" not in {row["video"] for row in rows}}
    assert len(held_out) == 2  # prompts come from the training split only


def test_rollouts_ask_drawn_wordings_and_held_out_numbers_the_standard_question(finished, stage2, tmp_path, quick):
    rows = rows_of(finished / "rollouts.jsonl")
    entries = {entry.id: entry for entry in load_entries(json.loads((stage2 / "stage3.yaml").read_text())["data"])}
    for row in rows:  # 8 prompts of each mode on 4 clips: two passes
        assert row["question"] in {draw_question(entries[row["id"]], 42, epoch) for epoch in (0, 1)}
    assert len({row["question"] for row in rows}) > 6
    held_out = set()

    def note(tokenizer, question, *rest):
        held_out.add(question)
        return encode_example(tokenizer, question, *rest)

    quick.setattr(stage3.held_out, "encode_example", note)
    run_stage3(stage2, tmp_path / "run", "--max_steps", 1)
    assert held_out == set(MODES.values())


def test_the_report_has_no_outside_references(finished):
    page = (finished / "report.html").read_text()
    assert page.count("data:image/jpeg") == 4 * 2 * 2  # steps, modes, frames
    assert page.count("data:image/png") == 1 and "car 0.90" in page and 'class="box unknown' in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted and resumed


def test_an_interrupted_and_resumed_run_ends_in_the_same_bits(stage2, tmp_path, finished, quick):
    compute = train_stage3.compute_advantages

    def cut_the_power(config, rollouts, records, *rest):
        if records[0]["step"] == 4:
            raise KeyboardInterrupt
        return compute(config, rollouts, records, *rest)

    with quick.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_stage3, "compute_advantages", cut_the_power)
        run_stage3(stage2, tmp_path / "run")
    with open(tmp_path / "run" / "rollouts.jsonl", "a") as file:
        file.write('{"step": 4, "half a li')
    assert not (tmp_path / "run" / "model").exists()
    run_stage3(stage2, tmp_path / "run", "--resume", "auto")
    assert adapter_hash(tmp_path / "run") == adapter_hash(finished)
    assert rows_of(tmp_path / "run" / "rollouts.jsonl") == rows_of(finished / "rollouts.jsonl")
    assert deterministic(tmp_path / "run") == deterministic(finished)
    once, twice = (torch.load(folder / "checkpoints" / "step-000004" / "optimizer.pt", weights_only=True)
                   for folder in (finished, tmp_path / "run"))
    torch.testing.assert_close(once["state"], twice["state"], rtol=0, atol=0)


def deterministic(folder):
    """Rows of metrics.jsonl without the times."""
    clock = ("seconds", "per_second", "memory")
    return [{key: value for key, value in row.items() if not any(word in key for word in clock)}
            for row in rows_of(folder / "metrics.jsonl")]


def test_a_run_killed_before_its_first_checkpoint_logs_step_0_once(stage2, tmp_path, finished, quick):
    def cut_the_power(*_):
        raise KeyboardInterrupt

    with quick.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_stage3, "update", cut_the_power)
        run_stage3(stage2, tmp_path / "run")
    assert [row["step"] for row in rows_of(tmp_path / "run" / "metrics.jsonl")] == [0]
    run_stage3(stage2, tmp_path / "run", "--resume", "auto")
    assert deterministic(tmp_path / "run") == deterministic(finished)
    assert adapter_hash(tmp_path / "run") == adapter_hash(finished)


def test_a_resume_refuses_another_reference(stage2, tmp_path, quick, capsys):
    run_stage3(stage2, tmp_path / "run", "--max_steps", 2)
    other = shutil.copytree(stage2 / "stage2", tmp_path / "other")
    model = DriveVLM.from_checkpoint(other)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if ".lora_B." in name)[0, 0] += 1e-6
    model.save_checkpoint(other / "model")
    with pytest.raises(ConfigError):
        run_stage3(stage2, tmp_path / "branch", "--max_steps", 3, "--resume", tmp_path / "run", "--init_from", other)
    assert "was trained against the adapter of" in capsys.readouterr().err
    moved = shutil.copytree(stage2 / "stage2", tmp_path / "moved")  # the same adapter in another folder is accepted
    run_stage3(stage2, tmp_path / "branch", "--max_steps", 3, "--resume", tmp_path / "run", "--init_from", moved)
    assert rows_of(tmp_path / "branch" / "metrics.jsonl")[-1]["step"] == 3


# ---------------------------------------------------------------------------------------------------------------------
# One step, divided in different ways


def gradients_of(stage2, output, monkeypatch, *flags, evaluations=False):
    """Gradients of the first step, before clipping, in the order of the parameters, as one vector; and its loss. The
    held-out clips are left alone without `evaluations`."""
    clip, seen = torch.nn.utils.clip_grad_norm_, []

    def look(parameters, limit):
        seen.append(torch.cat([p.grad.flatten() for p in parameters]).clone())
        return clip(parameters, limit)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", look)
        if not evaluations:
            patch.setattr(stage3.held_out.Evaluations, "after", lambda *_: None)
        run_stage3(stage2, output, "--max_steps", 1, "--num_val_videos", 2, "--eval_every", 99, *flags)
    return seen[0], rows_of(output / "metrics.jsonl")[-1]["loss"]


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_micro_batches_change_nothing_except_with_bnpo(stage2, tmp_path, quick, loss_type):
    """Four prompts in one pass or in four; truncated answers are masked, so the number of counted rows differs."""
    flags = ("--loss_type", loss_type, "--mask_truncated", "true", "--max_new_tokens.microscope", 70,
             "--max_new_tokens.copilot", 50, "--seed", 5)
    whole, loss = gradients_of(stage2, tmp_path / "a", quick, *flags,
                               "--per_device_batch_size", 4, "--gradient_accumulation_steps", 1)
    split, split_loss = gradients_of(stage2, tmp_path / "b", quick, *flags,
                                     "--per_device_batch_size", 1, "--gradient_accumulation_steps", 4)
    rows = rows_of(tmp_path / "a" / "rollouts.jsonl")
    assert rows == rows_of(tmp_path / "b" / "rollouts.jsonl") and whole.abs().max() > 1e-3
    assert len({row["slot"] for row in rows if row["ended"]}) > 2  # live groups, of different lengths
    if loss_type == "bnpo":
        assert (whole - split).norm() > 0.01 * whole.norm()
    else:
        torch.testing.assert_close(whole, split, atol=1e-6, rtol=1e-5)
        assert loss == pytest.approx(split_loss, abs=1e-6)


def test_the_plain_path_gives_the_same_step(stage2, tmp_path, quick):
    shared, loss = gradients_of(stage2, tmp_path / "a", quick)
    plain, plain_loss = gradients_of(stage2, tmp_path / "b", quick, "--shared_prefix", "false")
    assert rows_of(tmp_path / "a" / "rollouts.jsonl") == rows_of(tmp_path / "b" / "rollouts.jsonl")
    torch.testing.assert_close(shared, plain, atol=1e-6, rtol=1e-5)
    assert loss == pytest.approx(plain_loss, abs=1e-6)


def test_two_processes_give_the_same_step_as_one(stage2, tmp_path, quick):
    losses = ["grpo", "dr_grpo", "dapo"]
    flags = ["--mask_truncated", "true", "--max_new_tokens.microscope", 40, "--max_new_tokens.copilot", 60]

    def both(rank):
        USUAL.clear()  # two processes measure it together
        quick.setattr(Accelerator, "end_training", lambda self: None)  # one process group serves all three
        for name in losses:
            grads, _ = gradients_of(stage2, tmp_path / f"two-{name}", quick, *flags, "--loss_type", name,
                                    "--gradient_accumulation_steps", 1, evaluations=True)
            torch.save(grads, tmp_path / f"{name}-{rank}.pt")

    in_two_processes(both, tmp_path / "log")
    for name in losses:
        folders = tmp_path / f"one-{name}", tmp_path / f"two-{name}"
        alone, loss = gradients_of(stage2, folders[0], quick, *flags, "--loss_type", name, evaluations=True)
        for rank in range(2):
            together = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
        one, two = (rows_of(folder / "metrics.jsonl")[-1] for folder in folders)
        assert two["loss"] == pytest.approx(loss, abs=1e-6)
        for key in ("reward", "reward_std", "dead_groups", "kl", "entropy", "length/copilot", "eval_loss",
                    "eval_reward_microscope", "eval_gap_swapped_microscope", "eval_gap_blank_microscope"):
            assert two[key] == pytest.approx(one[key], abs=1e-5), key
        assert rows_of(folders[0] / "rollouts.jsonl") == rows_of(folders[1] / "rollouts.jsonl")
        assert (folders[1] / "model" / "drivevlm.json").is_file() and (folders[1] / "report.html").is_file()


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_modes_weigh_the_same_whatever_their_answers_are(stage2, tmp_path, quick, loss_type):
    """The gradient of a step of both modes is the mean of the gradients of the modes by themselves, by weight."""
    captured = {}

    def step_of(name, *flags, only=None):
        compute = train_stage3.compute_advantages

        def one_mode(config, rollouts, records, *rest):
            if only:  # the same answers, but those of the other mode do not count
                rollouts[:] = [rollout for rollout in rollouts if rollout.entry.mode == only]
                records[:] = [record for record in records if record["mode"] == only]
            return compute(config, rollouts, records, *rest)

        quick.setattr(train_stage3, "compute_advantages", one_mode)
        grads, _ = gradients_of(stage2, tmp_path / name, quick, "--loss_type", loss_type, *flags)
        quick.setattr(train_stage3, "compute_advantages", compute)
        captured[name] = grads

    step_of("both")
    step_of("weighted", "--mode_weights", "microscope", 3, "copilot", 1)
    for mode in MODES:
        step_of(mode, only=mode)
    for name, share in (("both", 0.5), ("weighted", 0.75)):
        expected = share * captured["microscope"] + (1 - share) * captured["copilot"]
        torch.testing.assert_close(captured[name], expected, rtol=1e-4, atol=1e-7)
    assert (captured["microscope"] - captured["copilot"]).abs().max() > 1e-4


def test_inner_epochs_update_from_the_same_answers(stage2, tmp_path, quick):
    run_stage3(stage2, tmp_path / "run", "--max_steps", 2, "--inner_epochs", 3, "--learning_rate", 0.05)
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert rows[1]["updates"] == 3 and rows[1]["clip"] > 0  # the ratio has moved by the second update
    assert rows[1]["sampler_gap"] < 1e-5 and rows[1]["kl"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# The objectives that GRPO is compared with

OBJECTIVES = [("raft", "policy"), ("raft", "reference"), ("dpo", "policy"), ("dpo", "reference")]


@pytest.mark.parametrize("objective, sampler", OBJECTIVES)
def test_an_objective_learns_and_logs_what_it_has(stage2, tmp_path, quick, objective, sampler):
    """KL, clipping and the gap to the sampler only where there are any (and no limit to a KL that is not measured);
    every number is explained."""
    run_stage3(stage2, tmp_path / "run", "--objective", objective, "--sample_from", sampler, "--max_kl", 1e-6)
    assert adapter_hash(tmp_path / "run") != adapter_hash(stage2 / "stage2")
    rows = [row for row in rows_of(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 4 and all(math.isfinite(value) for row in rows for value in row.values())
    own = {"dpo": {"dpo_accuracy", "dpo_margin", "dpo_chosen"}, "raft": set()}[objective]
    own |= {"sampler_gap"} if sampler == "policy" else set()
    for row in rows:
        extra = {"kl", "clip", "clip_low", "clip_high", "sampler_gap", "dpo_accuracy", "dpo_margin", "dpo_chosen"}
        assert row.keys() & extra == own and row["entropy"] > 0 and row["updates"] == 1
        assert row.get("sampler_gap", 0.0) < 1e-5
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert all(f"`{name}`" in page for name in own)
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_the_first_update_of_raft_has_the_likelihood_of_the_best_answers(stage2, tmp_path, quick, loss_type):
    """Its loss is worked out from the log-probs as sampled, of the best answer of each live group, by mode."""
    chosen = []
    only_counted = train_stage3.only_counted
    quick.setattr(train_stage3, "only_counted", lambda rollout: chosen.append(rollout) or only_counted(rollout))
    run_stage3(stage2, tmp_path / "run", "--objective", "raft", "--max_steps", 1, "--loss_type", loss_type)
    best = {}
    for rollout in chosen:
        rewards = [record["reward"] for record in rollout.records]
        best.setdefault(rollout.entry.mode, []).append(rollout.completions[rewards.index(max(rewards))].logps)
    expected = 0.0
    for answers in best.values():
        answers = answers if loss_type == "grpo" else [list(itertools.chain(*answers))]
        expected += sum(-sum(logps) / len(logps) for logps in answers) / len(answers) / 2
    assert len(best) == 2 and len(chosen) > 2
    assert rows_of(tmp_path / "run" / "metrics.jsonl")[-1]["loss"] == pytest.approx(expected, 1e-5)


def test_dpo_begins_at_log_2_and_learns_to_tell_the_pairs_apart(stage2, tmp_path, quick):
    """The same prompts and pairs in each of the inner epochs."""
    run_stage3(stage2, tmp_path / "first", "--objective", "dpo", "--max_steps", 1)
    first = rows_of(tmp_path / "first" / "metrics.jsonl")[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(first["dpo_margin"]) < 1e-5
    run_stage3(stage2, tmp_path / "run", "--objective", "dpo", "--max_steps", 1, "--inner_epochs", 8, "--warmup", 0)
    row = rows_of(tmp_path / "run" / "metrics.jsonl")[-1]  # the loss of the last epoch, means over all of them
    assert row["loss"] < 0.5 and row["dpo_accuracy"] > 0.8 and row["dpo_margin"] > 0.1


def test_dpos_beta_counts(stage2, tmp_path, quick):
    small, _ = gradients_of(stage2, tmp_path / "a", quick, "--objective", "dpo", "--dpo_beta", 0.1)
    large, _ = gradients_of(stage2, tmp_path / "b", quick, "--objective", "dpo", "--dpo_beta", 0.4)
    torch.testing.assert_close(4 * small, large, atol=1e-6, rtol=1e-3)  # at a margin of 0


@pytest.mark.parametrize("objective", ["raft", "dpo"])
def test_answers_of_the_reference_do_not_depend_on_what_was_learnt(stage2, tmp_path, quick, objective):
    """They are those of a data set sampled beforehand; at first the policy says the same."""
    def answers(name, *flags):
        run_stage3(stage2, tmp_path / name, "--objective", objective, "--max_steps", 3, *flags)
        return [row["text"] for row in rows_of(tmp_path / name / "rollouts.jsonl")]

    offline = answers("a", "--sample_from", "reference", "--learning_rate", 0.05)
    assert offline == answers("b", "--sample_from", "reference", "--learning_rate", 0.001)
    online = answers("c", "--learning_rate", 0.05)
    assert online[:16] == offline[:16] and online[32:] != offline[32:]


@pytest.mark.parametrize("objective, loss_type", [("raft", "dapo"), ("raft", "grpo"), ("raft", "dr_grpo"),
                                                  ("dpo", "dapo"), ("dpo", "bnpo")])
def test_micro_batches_change_nothing_in_raft_and_dpo(stage2, tmp_path, quick, objective, loss_type):
    flags = ("--objective", objective, "--loss_type", loss_type, "--mask_truncated", "true", "--seed", 5,
             "--max_new_tokens.microscope", 70, "--max_new_tokens.copilot", 50)
    whole, loss = gradients_of(stage2, tmp_path / "a", quick, *flags,
                               "--per_device_batch_size", 4, "--gradient_accumulation_steps", 1)
    split, split_loss = gradients_of(stage2, tmp_path / "b", quick, *flags,
                                     "--per_device_batch_size", 1, "--gradient_accumulation_steps", 4)
    rows = rows_of(tmp_path / "a" / "rollouts.jsonl")
    assert rows == rows_of(tmp_path / "b" / "rollouts.jsonl") and whole.abs().max() > 1e-4
    torch.testing.assert_close(whole, split, atol=1e-6, rtol=1e-5)
    assert loss == pytest.approx(split_loss, abs=1e-6)


def test_the_plain_path_gives_the_same_step_of_dpo(stage2, tmp_path, quick):
    shared, loss = gradients_of(stage2, tmp_path / "a", quick, "--objective", "dpo")
    plain, plain_loss = gradients_of(stage2, tmp_path / "b", quick, "--objective", "dpo", "--shared_prefix", "false")
    torch.testing.assert_close(shared, plain, atol=1e-6, rtol=1e-5)
    assert loss == pytest.approx(plain_loss, abs=1e-6)


def test_an_interrupted_and_resumed_run_of_dpo_ends_in_the_same_bits(stage2, tmp_path, quick):
    flags = ("--objective", "dpo", "--sample_from", "reference")
    run_stage3(stage2, tmp_path / "whole", *flags)
    compute = train_stage3.compute_advantages

    def cut_the_power(config, rollouts, records, *rest):
        if records[0]["step"] == 4:
            raise KeyboardInterrupt
        return compute(config, rollouts, records, *rest)

    with quick.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_stage3, "compute_advantages", cut_the_power)
        run_stage3(stage2, tmp_path / "run", *flags)
    run_stage3(stage2, tmp_path / "run", *flags, "--resume", "auto")
    assert adapter_hash(tmp_path / "run") == adapter_hash(tmp_path / "whole")
    assert rows_of(tmp_path / "run" / "rollouts.jsonl") == rows_of(tmp_path / "whole" / "rollouts.jsonl")


def test_dpo_needs_no_other_use_of_the_reference(stage2, tmp_path, quick):
    """Neither a KL nor a judge of language has to ask for its log-probs."""
    run_stage3(stage2, tmp_path / "run", "--objective", "dpo", "--beta", 0, "--judge_language", "false",
               "--max_steps", 1)
    assert rows_of(tmp_path / "run" / "metrics.jsonl")[-1]["loss"] == pytest.approx(math.log(2), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Groups without variance, clips without evidence


def test_a_constant_reward_with_beta_0_changes_nothing(stage2, tmp_path, quick):
    passes = []
    quick.setattr(stage3.grpo, "policy_logps", lambda *_: passes.append(1))
    run_stage3(stage2, tmp_path / "run", "--beta", 0, "--reward", "test_stage3:constant")
    assert adapter_hash(tmp_path / "run") == adapter_hash(stage2 / "stage2")
    assert not passes  # and there is no forward pass
    row = rows_of(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["dead_groups"] == 1.0 and row["updates"] == 0 and "loss" not in row


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_dead_groups_are_in_neither_numerator_nor_denominator(stage2, tmp_path, quick, beta):
    """In Copilot all rewards are equal: a step on four prompts equals the step on its two Microscope prompts."""
    flags = ("--beta", beta, "--loss_type", "grpo", "--reward", "test_stage3:vowels_of_microscope")
    mixed, loss = gradients_of(stage2, tmp_path / "a", quick, *flags)
    assert rows_of(tmp_path / "a" / "metrics.jsonl")[-1]["dead_groups"] == 0.5
    alone, alone_loss = gradients_of(stage2, tmp_path / "b", quick, *flags, "--modes", "microscope",
                                     "--per_device_batch_size", 1)
    assert [r["text"] for r in rows_of(tmp_path / "a" / "rollouts.jsonl") if r["mode"] == "microscope"] == [
        r["text"] for r in rows_of(tmp_path / "b" / "rollouts.jsonl")]
    torch.testing.assert_close(mixed, alone, atol=1e-6, rtol=1e-5)
    assert loss == pytest.approx(alone_loss, abs=1e-6)


def test_masked_truncated_answers_are_not_in_the_loss(stage2, tmp_path, quick):
    run_stage3(stage2, tmp_path / "run", "--max_steps", 1, "--mask_truncated", "true", "--max_new_tokens.copilot", 1,
               "--max_new_tokens.microscope", 1)
    rows = rows_of(tmp_path / "run" / "rollouts.jsonl")
    assert not any(row["ended"] for row in rows) and any(row["advantage"] != 0 for row in rows)
    assert adapter_hash(tmp_path / "run") == adapter_hash(stage2 / "stage2")


def test_clips_without_evidence_are_not_used(stage2, tmp_path, quick, capsys):
    write_evidence(tmp_path / "evidence", DetectorSettings(weights="none.pt", num_frames=3), failed=("car", "bus"))
    run_stage3(stage2, tmp_path / "run", "--evidence_cache", tmp_path / "evidence", "--num_val_videos", 1)
    assert "2 of 6 clips have none" in capsys.readouterr().out
    videos = {row["video"] for row in rows_of(tmp_path / "run" / "rollouts.jsonl")}
    assert videos and not videos & {"car.mp4", "bus.mp4"}


def test_an_unreadable_clip_is_skipped_and_counted_up_to_the_limit(stage2, tiny, tmp_path, quick, finished):
    videos = shutil.copytree(tiny.videos, tmp_path / "videos")
    broken = rows_of(finished / "rollouts.jsonl")[0]["video"]
    (videos / broken).write_bytes(b"no clip")
    flags = ("--video_root", videos, "--max_steps", 2)
    run_stage3(stage2, tmp_path / "run", *flags, "--max_failed_share", 0.5)
    assert broken not in {row["video"] for row in rows_of(tmp_path / "run" / "rollouts.jsonl")}
    last = rows_of(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["failed_clips"] == 1
    assert f"skipped clip 1 of 6 | {videos / broken}" in (tmp_path / "run" / "train.log").read_text()
    with pytest.raises(TrainingError, match="max_failed_share"):
        run_stage3(stage2, tmp_path / "strict", *flags)


# ---------------------------------------------------------------------------------------------------------------------
# When to stop


def sound(folder, step, stage2):
    """The checkpoint of `step` is there, loads, and holds finite weights."""
    checkpoint = folder / "checkpoints" / f"step-{step:06d}"
    weights = weights_of(checkpoint)
    assert DriveVLM.from_checkpoint(checkpoint / "model", expect_stage=3) and (checkpoint / "optimizer.pt").is_file()
    return all(torch.isfinite(w).all() for w in weights.values()) and not (folder / "model").exists()


def test_a_kl_above_the_limit_stops_the_run(stage2, tmp_path, quick):
    with pytest.raises(TrainingError, match="step 2: the KL to stage 2 .* above max_kl 1e-06"):
        run_stage3(stage2, tmp_path / "run", "--max_kl", 1e-6)
    assert sound(tmp_path / "run", 1, stage2)
    assert rows_of(tmp_path / "run" / "metrics.jsonl")[-1]["kl"] > 1e-6  # what stopped it can be seen
    assert "--resume auto" in (tmp_path / "run" / "train.log").read_text()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_clips(stage2, tmp_path, quick):
    training_pass = train_stage3.training_pass

    def poisoned(config, model, batch, *rest):
        loss, old = training_pass(config, model, batch, *rest)
        return (float("nan") if any(rollout.entry.mode == "copilot" for rollout in batch) else loss), old

    quick.setattr(train_stage3, "training_pass", poisoned)
    with pytest.raises(TrainingError, match=r"step 1: loss nan.*on \w+#copilot(, \w+#copilot)*\n"):
        run_stage3(stage2, tmp_path / "run", "--per_device_batch_size", 1)
    assert sound(tmp_path / "run", 0, stage2)
    assert weights_of(tmp_path / "run" / "checkpoints" / "step-000000").keys() == weights_of(stage2 / "stage2").keys()


def test_steps_without_a_live_group_stop_the_run(stage2, tmp_path, quick):
    with pytest.raises(TrainingError, match="for 3 consecutive steps no group's rewards differed"):
        run_stage3(stage2, tmp_path / "run", "--max_dead_steps", 3, "--reward", "test_stage3:constant")
    assert sound(tmp_path / "run", 3, stage2)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused before anything slow starts


@pytest.mark.parametrize("flags, message", [
    (("--num_generations", 1), "num_generations must be at least 2"),
    (("--modes", "copilot", "telescope"), "modes must be of microscope, copilot, got copilot, telescope"),
    (("--mode_weights", "copilot", "0"), "mode_weights.copilot must be above 0"),
    (("--modes", "copilot", "--mode_weights", "microscope", "2"), "mode_weights: microscope is none of modes: copilot"),
    (("--beta", "-1", "--temperature", "0"), "beta must be at least 0"),
    (("--sample_from", "reference"), "sample_from: reference does not go with objective: grpo"),
    (("--objective", "dpo", "--dpo_beta", "0"), "dpo_beta must be above 0, got 0"),
    (("--loss_type", "ppo"), "--loss_type: Invalid value 'ppo', expected one of"),
    (("--evidence_cache", "nowhere"), "detector.weights: no such file"),
    (("--detector.num_frames", 4, "--num_frames", 3), "detector.num_frames: 4"),
    (("--init_from", "nowhere"), "init_from: no checkpoint folder at nowhere"),
    (("--reward", "stage3.grpo_reward_func:no_such_reward"), "reward: stage3.grpo_reward_func:no_such_reward does not"),
    (("--reward", "nowhere:reward"), "No module named 'nowhere'"),
    (("--reward", "math:sqrt"), "reward: math:sqrt does not work as module:function"),
    (("--num_generation", 4), "did you mean 'num_generations'"),
])
def test_mistakes_are_refused_before_a_model_is_loaded(stage2, tmp_path, capsys, flags, message):
    with pytest.raises(ConfigError) as error:
        run_stage3(stage2, tmp_path / "run", *flags)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_the_wrong_stage_is_refused(stage2, finished, tmp_path, capsys):
    with pytest.raises(ConfigError):
        run_stage3(stage2, tmp_path / "run", "--init_from", finished)
    assert "it holds stage 3, but stage 2 is needed here" in capsys.readouterr().err


@dataclasses.dataclass
class Talk:
    language: float
    manners: float


def talk(caption, evidence, mode, reference=None):
    return Talk(1.0, 0.5)


def test_parts_of_a_reward_must_not_be_named_as_other_things_of_a_rollout():
    config = Stage3Config(reward="test_stage3:talk", reward_weights={"language": 1.0, "manners": 1.0})
    assert "named as other things in rollouts.jsonl: language" in load_reward(config, "copilot")[1]


def test_reward_weights_must_name_the_parts_of_the_reward():
    for weights in ({"objects": 1.0, "style": 1.0}, {"objects": 1.0}):
        function, problem = load_reward(Stage3Config(reward="test_stage3:vowels", reward_weights=weights),
                                        "copilot")
        assert function is None and "the parts of test_stage3:vowels are objects, temporal, detail, halluc" in problem
    assert load_reward(Stage3Config(reward="test_stage3:vowels"), "copilot")[0] is vowels
    assert "at least 0 and not all 0" in Stage3Config(reward_weights={"objects": 0.0}).problems()[0]
    assert Stage3Config().reward_weights == REWARD_WEIGHTS  # those that physics_aware_reward's own total is made of
