"""One test for each line that was once broken on purpose without a test failing. Break the line again, and it fails.

Most are keys that must reach their place. So each stage runs twice here: once with no key at its default ("odd"), once
with other values for some of them ("even"), and the tests look at what the runs did.
"""

import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROWS
from safetensors.torch import load_file
from test_stage3 import write_evidence
from torch._subclasses import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import augment_captions
import dataset
import generate
import model as model_module
import stage3.grpo
import stage3.rollout
import train_stage1_ddp
import train_stage2
import train_stage3
import training.run_folder
from dataset import IGNORE_INDEX, Entry, VideoInstructDataset, load_entries, load_split, split_by_video
from model import DriveVLM, ModelError, head_logits, token_logps
from stage3 import detect_objects
from stage3.evidence import Evidence
from stage3.grpo import group_advantages
from stage3.rollout import Completion, RolloutSampler, prompts_of_step
from training import loop
from training.common import ConfigError, TrainingError, check_gpus, read_jsonl
from training.config import DetectorSettings, Stage1Config

STAGES = {1: train_stage1_ddp, 2: train_stage2, 3: train_stage3}
STEPS, SEED, SPLIT_SEED, TEXT_LIMIT, WORDINGS = 5, 7, 3, 75, 0.75
FINISHED_KEYS = {"keep_checkpoints": 3, "save_every": 2, "eval_every": 3, "sample_every": 4}


# ---- two runs of each stage, and what was seen of them ---------------------------------------------------------------


class Watch:
    """Sees what a run does, where it is done: forward passes, optimizer steps, the loss of stage 3."""

    def __init__(self):
        self.patch, self.passes, self.updates, self.losses, self.optimizer = pytest.MonkeyPatch(), [], [], [], None

    def __enter__(self):
        self.hook = register_optimizer_step_pre_hook(self.before_an_update)
        self.around(DriveVLM, "forward", self.see_pass)
        self.around(DriveVLM, "hidden_states", self.see_checkpointing)
        self.around(stage3.grpo, "grpo_loss", lambda *args, **options: self.losses.append(options))
        self.checkpointing = set()
        return self

    def __exit__(self, *error):
        self.patch.undo()
        self.hook.remove()

    def around(self, owner, name, look):
        inner = getattr(owner, name)

        def wrapped(*args, **options):
            look(*args, **options)
            return inner(*args, **options)

        self.patch.setattr(owner, name, wrapped)

    def see_pass(self, model, **batch):
        if model.training:
            self.passes.append(batch)

    def see_checkpointing(self, model, *args, **options):
        if torch.is_grad_enabled():
            self.checkpointing.add(any(getattr(m, "gradient_checkpointing", False) for m in model.causal_lm.modules()))

    def before_an_update(self, optimizer, args, options):
        groups = [{key: group[key] for key in ("name", "lr", "weight_decay")} for group in optimizer.param_groups]
        grads = torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]])
        self.updates.append((groups, grads.norm().item()))


def run_stage(stage, world, output, **changes):
    """A run without curves (they take longer than the training), watched."""
    values = world.values | world.stage_values[stage] | changes | {"output_dir": output}
    argv = [f"--{key}={value}" for key, value in values.items()]
    with Watch() as seen:
        seen.patch.setattr(training.run_folder, "plot_curves", lambda *_: None)
        seen.patch.chdir(world.root)
        STAGES[stage].main(argv)
    seen.folder = Path(output)
    seen.rows = {row["step"]: row for row in read_jsonl(seen.folder / "metrics.jsonl")}
    return seen


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """Data and flags: 8 entries to train on, 4 held out, 2 a step, five steps."""
    root = tmp_path_factory.mktemp("bites")
    rows = [{"video": v, "microscope": [m, f"Here is what happens. {m}", f"In short: {c}"], "copilot": [c, f"Now: {c}"]}
            for v, m, c in ROWS]
    (root / "captions.json").write_text(json.dumps(rows), encoding="utf-8")
    write_evidence(root / "evidence", DetectorSettings(weights="none.pt", num_frames=3))
    train, held_out = split_by_video(load_entries(root / "captions.json"), 2, SPLIT_SEED, tiny.videos)
    values = {
        "config": root / "config.yaml", "data": root / "captions.json", "video_root": tiny.videos,
        "vision_model": tiny.vision, "language_model": tiny.llm, "num_frames": 2, "num_val_videos": 2,
        "max_steps": STEPS, "dtype": "float32", "seed": SEED, "split_seed": SPLIT_SEED, "max_text_tokens": TEXT_LIMIT,
        "wordings": WORDINGS, "lr_schedule": "linear", "warmup": 0.4, "max_grad_norm": 0.01, "sample_tokens": 5,
        "learning_rate": 0.02, "per_device_batch_size": 1, "gradient_accumulation_steps": 2, **FINISHED_KEYS,
    }
    mappings = {"max_new_tokens": {"microscope": 9, "copilot": 6}, "reward_weights": {
        "objects": 1.0, "temporal": 0.0, "detail": 0.0, "hallucination": 0.0}}
    (root / "config.yaml").write_text(json.dumps(mappings), encoding="utf-8")  # JSON is YAML
    stage_values = {
        1: {"weight_decay": 0.3, "num_workers": 0},
        2: {"weight_decay": 0.3, "num_workers": 0, "projector_learning_rate": 0.003, "lora_r": 3, "lora_alpha": 12,
            "lora_dropout": 0.3, "init_from": root / "odd1"},
        3: {"init_from": root / "odd2", "evidence_cache": root / "evidence", "detector.weights": "none.pt",
            "detector.num_frames": 3, "num_generations": 3, "reward": "test_stage3:vowels", "temperature": 0.7,
            "loss_type": "grpo", "beta": 0.5, "kl": "k2", "epsilon": 0.1, "epsilon_high": 0.4, "inner_epochs": 2,
            "advantage_scale": "batch", "std_floor": 0.12, "mask_truncated": False, "max_kl": "none",
            "stop_when_blind": "none"},
    }
    return SimpleNamespace(root=root, tiny=tiny, values=values, stage_values=stage_values, train=train,
                           held_out=held_out)


@pytest.fixture(scope="module")
def odd(world):
    """{stage: what was seen}: activations are checkpointed, frames are cached."""
    return {stage: run_stage(stage, world, world.root / f"odd{stage}", frame_cache=world.root / f"frames{stage}")
            for stage in STAGES}


@pytest.fixture(scope="module")
def even(world, odd):
    """{stage: what was seen}: neither; a constant learning rate, another seed."""
    changes = {"frame_cache": "none", "activation_checkpointing": False, "seed": 8, "lr_schedule": "constant",
               "warmup": 0, "keep_checkpoints": 1, "save_every": 1, "max_steps": 2}
    before = {path for path in world.root.rglob("*.frames")}
    seen = {stage: run_stage(stage, world, world.root / f"even{stage}", **changes) for stage in STAGES}
    seen["new cache files"] = [path for path in world.root.rglob("*.frames") if path not in before]
    return seen


# ---- keys of every stage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_examples_of_a_run_are_those_of_its_seed_split_seed_and_text_limit(stage, odd, world):
    """Ids, tokens, labels and pixels of every forward pass: order, question, caption variant and augmentation are the
    seed's."""
    reader = DriveVLM.from_checkpoint(odd[stage].folder)
    expected = VideoInstructDataset(
        world.train, reader.tokenizer, video_root=world.tiny.videos, num_frames=2, image_size=reader.image_size,
        num_visual_tokens=reader.num_visual_tokens, max_text_tokens=TEXT_LIMIT, seed=SEED, wordings=WORDINGS)
    keys = [batch for step in range(STEPS) for batch in loop.step_batches(len(expected), step, SEED, 1, 2, 0, 1)]
    assert len(odd[stage].passes) == len(keys)
    lengths = set()
    for batch, (key,) in zip(odd[stage].passes, keys, strict=True):
        example = expected[key]
        assert batch["ids"] == [example["id"]]
        assert batch["input_ids"].tolist() == [example["input_ids"]] and batch["labels"].tolist() == [example["labels"]]
        assert torch.equal(batch["frames"][0], example["frames"])
        lengths.add(int((batch["input_ids"] != reader.placeholder_id).sum()))
    assert TEXT_LIMIT - 10 < max(lengths) <= TEXT_LIMIT  # and the limit has cut something, or this says nothing
    assert any(expected[key]["cut"] for (key,) in keys)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_learning_rate_follows_schedule_and_warmup(stage, odd, even):
    shape = [1 / 3, 2 / 3, 1.0, 2 / 3, 1 / 3]  # two steps of warm-up, then a line from 1 to 0 over three
    peaks = {"projector": 0.003 if stage == 2 else 0.02, "temporal": 0.02, "lora": 0.02}
    for seen, factors in ((odd[stage], shape), (even[stage], [1.0, 1.0])):
        of_updates = [factor for step, factor in enumerate(factors, 1)
                      for _ in range(seen.rows[step].get("updates", 1))]
        assert len(of_updates) >= len(factors) - 1  # in stage 3 a step has two inner epochs, or none where all is dead
        for (groups, _), factor in zip(seen.updates, of_updates, strict=True):
            for group in groups:
                assert group["lr"] == pytest.approx(peaks[group["name"]] * factor)
        assert [seen.rows[step]["learning_rate"] for step in range(1, len(factors) + 1)] == pytest.approx(
            [0.02 * factor for factor in factors])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_are_clipped_to_max_grad_norm(stage, odd):
    logged = [odd[stage].rows[step]["grad_norm"] for step in range(1, STEPS + 1)]
    assert max(logged) > 0.02  # before clipping
    norms = [norm for _, norm in odd[stage].updates]
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weight_decay_reaches_the_optimizer(stage, odd):
    decays = {(group["name"], group["weight_decay"]) for groups, _ in odd[stage].updates for group in groups}
    assert decays == {1: {("projector", 0.3), ("projector", 0.0), ("temporal", 0.0)},
                      2: {("lora", 0.0), ("projector", 0.3), ("projector", 0.0)}, 3: {("lora", 0.0)}}[stage]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_activation_checkpointing_is_on_where_the_key_says_so(stage, odd, even):
    assert odd[stage].checkpointing == {True} and even[stage].checkpointing == {False}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_frame_cache_is_filled(stage, odd, world):
    assert len(list((world.root / f"frames{stage}").rglob("*.frames"))) == len(ROWS)


def test_without_a_frame_cache_none_is_made(even, world):
    assert even["new cache files"] == [] and not (world.root / "output").exists() and not (world.root / "none").exists()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_evaluations_samples_and_checkpoints_are_at_their_steps_and_at_the_last(stage, odd):
    """eval_every 3, sample_every 4, save_every 2, five steps; three checkpoints are kept."""
    folder, rows = odd[stage].folder, odd[stage].rows
    assert [step for step, row in rows.items() if "eval_loss" in row] == [0, 3, 5]
    samples = re.findall(r"what the model says after step (\d+)", (folder / "train.log").read_text(encoding="utf-8"))
    assert samples == ["0", "4", "5"]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000002", "step-000004", "step-000005"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_only_keep_checkpoints_are_kept(stage, even):
    assert [p.name for p in (even[stage].folder / "checkpoints").iterdir()] == ["step-000002"]


def test_stage_1_starts_from_the_projector_of_its_seed(odd, even):
    assert odd[1].rows[0]["eval_loss"] != even[1].rows[0]["eval_loss"]


def test_count_steps_drops_the_incomplete_step_of_each_epoch():
    config = Stage1Config(per_device_batch_size=2, gradient_accumulation_steps=2, epochs=3)
    entries = [Entry(f"{i}", f"{i // 2}.mp4", "copilot", "Well?", ("!",)) for i in range(12)]  # two of each clip
    assert loop.count_steps(config, entries[:11]) == 6 and loop.count_steps(config, entries) == 9
    order = [[len(batch) for batch in loop.step_batches(11, step, 1, 2, 2, 0, 1)] for step in range(6)]
    assert order == [[2, 2]] * 6
    config.shared_prefix = True
    assert loop.count_steps(config, entries) == 3  # six clips
    config.max_steps = 100
    assert loop.count_steps(config, entries[:11]) == 100


def test_the_sampler_takes_the_order_of_the_seed():
    def order(seed):
        return list(loop.StepSampler(Stage1Config(seed=seed), 64, 1, 3))

    assert order(1) != order(2)
    assert order(1) == [batch for step in (1, 2) for batch in loop.step_batches(64, step, 1, 4, 4, 0, 1)]


def test_the_split_is_that_of_split_seed_and_not_of_seed(world):
    def held_out(**seeds):
        config = SimpleNamespace(**{"data": world.values["data"], "val_data": None, "num_val_videos": 2,
                                    "video_root": world.tiny.videos, "default_mode": None} | seeds)
        return {entry.video for entry in load_split(config)[1]}

    assert len({frozenset(held_out(seed=1, split_seed=n)) for n in range(6)}) > 1
    assert len({frozenset(held_out(seed=n, split_seed=1)) for n in range(6)}) == 1


# ---- stage 2 ---------------------------------------------------------------------------------------------------------


def test_the_adapter_has_the_rank_alpha_and_dropout_of_the_config(odd):
    saved = json.loads((odd[2].folder / "model" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (3, 12, 0.3)
    meta = json.loads((odd[2].folder / "model" / "drivevlm.json").read_text(encoding="utf-8"))
    assert meta["lora"] == {"r": 3, "alpha": 12, "dropout": 0.3}


def test_dropout_of_a_run_depends_on_the_rank(odd, world, monkeypatch):
    """The same step as another rank would take it: the same clips, other dropout."""

    class OtherRank:
        process_index = 1

        def __init__(self, timeout_hours):
            self.inner = start(timeout_hours)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    start = loop.start_accelerator
    with monkeypatch.context() as patch:
        patch.setattr(loop, "start_accelerator", OtherRank)
        other = run_stage(2, world, world.root / "other_rank", max_steps=1, frame_cache=world.root / "frames2")
    assert [batch["ids"] for batch in other.passes] == [batch["ids"] for batch in odd[2].passes[:2]]
    one, two = odd[2].rows[1], other.rows[1]
    assert one["loss"] == two["loss"]  # a fresh adapter adds nothing, whatever dropout does to its input
    assert one["grad_norm"] != two["grad_norm"]


# ---- stage 3 ---------------------------------------------------------------------------------------------------------


def test_every_key_of_the_loss_reaches_the_loss(odd):
    assert len(odd[3].losses) > STEPS  # two inner epochs, of one pass at least; a dead step has none
    for options in odd[3].losses:
        values = {key: options[key] for key in ("beta", "epsilon", "epsilon_high", "loss_type", "kl")}
        assert values == {"beta": 0.5, "epsilon": 0.1, "epsilon_high": 0.4, "loss_type": "grpo", "kl": "k2"}
        assert options["ref_logps"] is not None
    assert {options["max_completion_tokens"] for options in odd[3].losses} == {9, 6}  # each mode's own limit
    assert sum(options["old_logps"] is None for options in odd[3].losses) * 2 == len(odd[3].losses)  # the first epoch


def test_policy_log_probs_are_those_of_the_sampler_at_another_temperature(odd):
    """Sampler and policy share temperature and banned ids, or there is a gap."""
    live = [row for row in odd[3].rows.values() if row.get("updates")]
    assert len(live) > 2 and all(row["sampler_gap"] < 1e-5 and row["updates"] == 2 for row in live)


def test_advantages_are_those_of_advantage_scale_and_std_floor(odd):
    records = read_jsonl(odd[3].folder / "rollouts.jsonl")
    assert len(records) == STEPS * 2 * 3
    furthest = dict.fromkeys([("batch", 0.05), ("batch", 0.0), ("none", 0.12)], 0.0)
    for start in range(0, len(records), 3):  # a step has one group of each mode
        group = records[start:start + 3]
        rewards = torch.tensor([[row["reward"] for row in group]], dtype=torch.float64)
        given = torch.tensor([[row["advantage"] for row in group]], dtype=torch.float64)
        torch.testing.assert_close(given, group_advantages(rewards, "batch", 0.12), rtol=1e-5, atol=1e-7)
        for other, gap in furthest.items():
            furthest[other] = max(gap, (given - group_advantages(rewards, *other)).abs().max().item())
    assert min(furthest.values()) > 0.01, furthest  # other settings would have shown


def test_prompts_are_those_of_the_seed_from_the_training_split(odd, world):
    records = read_jsonl(odd[3].folder / "rollouts.jsonl")
    expected = [entry.id for step in range(STEPS)
                for entry in prompts_of_step(world.train, step, 2, ["microscope", "copilot"], SEED, WORDINGS)]
    assert [row["id"] for row in records[::3]] == expected
    assert not {row["video"] for row in records} & {entry.video for entry in world.held_out}


def test_sampled_answers_depend_on_the_seed(odd, world):
    """One clip to train on: its two prompts are those of the first step, whatever the seed."""
    held_out, one = {entry.video for entry in world.held_out}, world.train[0].video
    rows = json.loads(Path(world.values["data"]).read_text(encoding="utf-8"))
    files = {}
    for name, videos in (("data", {one}), ("val_data", held_out)):
        files[name] = world.root / f"{name}_of_one_clip.json"
        files[name].write_text(json.dumps([row for row in rows if row["video"] in videos]), encoding="utf-8")
    texts = []
    for seed in (1, 2):
        seen = run_stage(3, world, world.root / f"seed{seed}", seed=seed, max_steps=1,
                         frame_cache=world.root / "frames3", **files)
        texts.append({(row["id"], row["k"]): row["text"] for row in read_jsonl(seen.folder / "rollouts.jsonl")})
    assert texts[0].keys() == texts[1].keys() and len(texts[0]) == 6
    assert texts[0] != texts[1]


def test_captions_are_cut_at_the_text_limit_in_the_evaluation_of_stage_3(odd, world):
    """Stage 3 begins where stage 2 ended: its first losses, computed here by hand (banned ids are left out)."""
    model = DriveVLM.from_checkpoint(odd[2].folder)
    examples = VideoInstructDataset(
        world.held_out, model.tokenizer, video_root=world.tiny.videos, num_frames=2, image_size=model.image_size,
        num_visual_tokens=model.num_visual_tokens, max_text_tokens=TEXT_LIMIT, train=False)
    total = tokens = 0
    for example in (examples[i] for i in range(len(examples))):
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        with torch.no_grad():
            visual = model.encode_video(example["frames"][None])
            hidden = model.hidden_states(model.embed(ids, visual), torch.ones_like(ids))
        counted = labels[:, 1:] != IGNORE_INDEX
        logits = head_logits(hidden[:, :-1][counted], model.head_weight, 1.0, model.banned_ids)
        total += torch.nn.functional.cross_entropy(logits, labels[:, 1:][counted], reduction="sum").item()
        tokens += int(counted.sum())
    assert odd[3].rows[0]["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_truncated_answers_are_left_out_where_the_key_says_so():
    """Without mask_truncated they count."""
    for masked in (False, True):
        config = SimpleNamespace(num_generations=2, advantage_scale="group", std_floor=0.0, mask_truncated=masked,
                                 per_device_batch_size=1, mode_weights={}, objective="grpo")
        records = [{"slot": 0, "mode": "copilot", "reward": float(k), "ended": k == 0, "tokens": 5} for k in range(2)]
        rollout = SimpleNamespace(slot=0, advantages=None, kept=None)
        totals = stage3.rollout.compute_advantages(config, [rollout], records, 1)
        assert rollout.kept.tolist() == [True, not masked] and totals.tokens == {"copilot": 5 if masked else 10}
        assert totals.weights == {"copilot": 1.0}


def test_passes_and_rows_are_counted_by_mode():
    """Two ranks of three prompts, two per pass; the second group of rank 0 is dead and takes no place in a pass."""
    config = SimpleNamespace(num_generations=2, advantage_scale="group", std_floor=0.0, mask_truncated=True,
                             per_device_batch_size=2, mode_weights={"copilot": 3.0}, objective="grpo")
    records = []
    for slot, mode in enumerate(["microscope", "copilot", "copilot", "microscope", "copilot", "microscope"]):
        records += [{"slot": slot, "mode": mode, "reward": float(k and slot != 1), "ended": True, "tokens": 10 * slot}
                    for k in range(2)]
    totals = stage3.rollout.compute_advantages(config, [], records, 3)
    assert totals.live_groups == 5 and totals.rows == {"microscope": 6, "copilot": 4}
    assert totals.tokens == {"microscope": 160, "copilot": 120}
    # rank 0: (microscope 0, copilot 2); rank 1: (microscope 3, copilot 4), (microscope 5)
    assert totals.passes == {"microscope": 3, "copilot": 2}
    assert totals.weights == {"microscope": 0.25, "copilot": 0.75}


def test_a_batch_has_its_own_std_for_each_mode():
    config = SimpleNamespace(num_generations=2, advantage_scale="batch", std_floor=0.0, mask_truncated=True,
                             per_device_batch_size=1, mode_weights={}, objective="grpo")
    rewards = {"microscope": [[0.0, 1.0], [0.2, 0.3]], "copilot": [[0.0, 0.01], [0.5, 0.9]]}
    for scale in ("batch", "group", "none"):
        config.advantage_scale, records = scale, []
        for slot, (mode, number) in enumerate([("microscope", 0), ("copilot", 0), ("copilot", 1), ("microscope", 1)]):
            records += [{"slot": slot, "mode": mode, "reward": reward, "ended": True, "tokens": 1}
                        for reward in rewards[mode][number]]
        stage3.rollout.compute_advantages(config, [], records, 4)
        given = {mode: [record["advantage"] for record in records if record["mode"] == mode] for mode in rewards}
        for mode, groups in rewards.items():
            expected = stage3.grpo.group_advantages(torch.tensor(groups, dtype=torch.float64), scale)
            assert given[mode] == expected.flatten().tolist()


# ---- several ranks, clips that fail ----------------------------------------------------------------------------------


class TwoRanks:
    """An accelerator of rank 0 of 2, without a second process: `other` holds what rank 1 adds to the next sums."""

    num_processes, process_index, device = 2, 0, torch.device("cpu")

    def __init__(self, *other):
        self.other = list(other)

    def reduce(self, tensor):
        return tensor + torch.tensor(self.other.pop(0), dtype=tensor.dtype)


@pytest.fixture
def failed_clips():
    return loop.FailedClips(Stage1Config(max_failed_share=0.5), SimpleNamespace(print=print), 4)


def test_failed_clips_are_those_of_all_ranks(failed_clips, monkeypatch):
    monkeypatch.setattr(loop, "gather_object", lambda own: own + ["b.mp4: broken"])
    failed_clips.add(TwoRanks(), ["a.mp4: broken"])
    assert failed_clips.reasons == {"a.mp4: broken", "b.mp4: broken"}
    monkeypatch.setattr(loop, "gather_object", lambda own: own + ["c.mp4: broken"])
    with pytest.raises(TrainingError, match="3 of 4 clips"):
        failed_clips.add(TwoRanks(), [])


def batch_of(labels, errors=()):
    labels = torch.tensor([labels])
    return {"labels": labels, "attention_mask": torch.ones_like(labels), "errors": list(errors), "num_cut": 1}


def test_tokens_are_counted_over_all_ranks_and_an_error_of_another_rank_is_noted(failed_clips, monkeypatch):
    monkeypatch.setattr(loop, "gather_object", lambda own: own + ["b.mp4: broken"])
    batches = [batch_of([IGNORE_INDEX, 4, 5]), batch_of([IGNORE_INDEX, 6])]
    assert loop.count_tokens(TwoRanks([10.0, 100.0, 3.0, 1.0]), batches, failed_clips) == (13, 105, 5)
    assert failed_clips.reasons == {"b.mp4: broken"}
    assert all("errors" not in batch for batch in batches)  # not an input of the model


def test_a_step_without_any_label_is_not_divided_by_zero(failed_clips):
    one = SimpleNamespace(num_processes=1)
    labels, *_ = loop.count_tokens(one, [batch_of([IGNORE_INDEX, IGNORE_INDEX], ["a.mp4: broken"])], failed_clips)
    assert labels == 1


def test_failed_clips_and_optimizer_come_back_on_resume(tmp_path, failed_clips):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], weight_decay=0.1)
    weight.sum().backward()
    optimizer.step()
    failed_clips.reasons = {"b.mp4: broken", "a.mp4: broken"}
    fake_model = SimpleNamespace(save_checkpoint=lambda folder, stage: folder.mkdir())
    with training.run_folder.RunFolder(tmp_path) as run:
        config, accelerator = Stage1Config(), SimpleNamespace(wait_for_everyone=lambda: None)
        loop.save_checkpoint(config, run, accelerator, fake_model, optimizer, 3, 1, failed_clips, dead_steps=4)
        checkpoint = run.checkpoints / "step-000003"
    fresh = torch.optim.AdamW([weight], weight_decay=0.2)
    again = loop.FailedClips(config, None, 4)
    step, state = loop.restore(checkpoint, fresh, again, "cpu")
    assert step == 3 and state["dead_steps"] == 4 and again.reasons == {"a.mp4: broken", "b.mp4: broken"}
    assert fresh.param_groups[0]["weight_decay"] == 0.2  # the configuration's, not the checkpoint's
    assert torch.equal(fresh.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg"])


def test_held_out_losses_are_weighted_by_tokens_over_modes_and_ranks():
    sums = {("loss", "microscope"): 10.0, ("tokens", "microscope"): 4, ("loss", "copilot"): 3.0,
            ("tokens", "copilot"): 1}
    one = loop.mean_losses(SimpleNamespace(num_processes=1), sums)
    assert one == {"eval_loss": 13 / 5, "eval_loss_microscope": 10 / 4, "eval_loss_copilot": 3.0}
    two = loop.mean_losses(TwoRanks([2.0, 7.0], [8.0, 3.0]), sums)
    assert two == {"eval_loss": 22 / 16, "eval_loss_microscope": 12 / 12, "eval_loss_copilot": 10 / 4}


# ---- checkpoint folders ----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny, tmp_path):
    """A model of stage 1 whose base models have revisions, and its checkpoint."""
    model = DriveVLM.from_base(tiny.vision, tiny.llm, num_frames=2, dtype="float32", vision_revision="v1",
                               language_revision="l1")
    return model, model.save_checkpoint(tmp_path / "model")


def test_the_revisions_of_the_base_models_are_saved_and_asked_for_again(saved, tiny, monkeypatch):
    meta = json.loads((saved[1] / "drivevlm.json").read_text(encoding="utf-8"))
    assert meta["vision_model"] == {"name": str(tiny.vision), "revision": "v1"}
    assert meta["language_model"] == {"name": str(tiny.llm), "revision": "l1"}
    asked = []

    def look(owner, name):
        inner = getattr(owner, name)

        def wrapped(where, *args, **options):
            asked.append((str(where), options.get("revision")))
            return inner(where, *args, **options)

        monkeypatch.setattr(owner, name, wrapped)

    look(model_module.AutoConfig, "from_pretrained")
    look(transformers.AutoModelForCausalLM, "from_pretrained")
    look(transformers.SiglipVisionModel, "from_pretrained")
    look(model_module.SiglipVisionConfig, "from_pretrained")
    DriveVLM.from_checkpoint(saved[1])
    assert {pair for pair in asked if pair[0] == str(tiny.vision)} == {(str(tiny.vision), "v1")}
    assert {pair for pair in asked if pair[0] == str(tiny.llm)} == {(str(tiny.llm), "l1")}
    asked.clear()
    moved = tiny.llm.parent / "." / tiny.llm.name  # the same folder by another name: its revision is not known
    DriveVLM.from_checkpoint(saved[1], language_model=f"{moved.parent}/./{moved.name}")
    assert {revision for where, revision in asked if where != str(tiny.vision)} == {None}


def test_another_placeholder_in_the_tokenizer_is_refused(saved):
    file = saved[1] / "drivevlm.json"
    meta = json.loads(file.read_text(encoding="utf-8"))
    assert meta["placeholder"] == "<|video_pad|>"
    file.write_text(json.dumps(meta | {"placeholder": "<|image_pad|>"}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"its placeholder is <\|image_pad\|>, the tokenizer .* gives <\|video_pad\|>"):
        DriveVLM.from_checkpoint(saved[1])


def test_other_tokens_per_frame_are_refused(saved):
    file = saved[1] / "drivevlm.json"
    meta = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(meta | {"tokens_per_frame": 99}), encoding="utf-8")
    with pytest.raises(ModelError, match="trained with 99 tokens per frame"):
        DriveVLM.from_checkpoint(saved[1])


def test_the_old_checkpoint_exists_until_the_new_one_is_in_its_place(saved, monkeypatch):
    """A power cut at the last rename loses neither: the old one can still be found beside it."""
    model, folder = saved
    old = (folder / "projector.safetensors").read_bytes()
    with torch.no_grad():
        model.temporal.add_(1.0)
    rename = Path.rename

    def power_cut(path, target):
        if Path(target) == folder:
            raise OSError("power cut")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", power_cut)
    with pytest.raises(OSError, match="power cut"):
        model.save_checkpoint(folder)
    left = [path.read_bytes() for path in folder.parent.rglob("projector.safetensors")]
    assert len(left) == 2 and old in left
    monkeypatch.undo()
    model.save_checkpoint(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_cache_file_is_never_seen_half_written(tiny, tmp_path, monkeypatch):
    clip = tiny.videos / "car.mp4"
    dataset.cached_frames(clip, 2, 96, tmp_path)
    (file,) = tmp_path.rglob("*.frames")
    whole = file.read_bytes()
    key = dataset._cache_place(clip, 2, 96, tmp_path)[1]

    def disk_full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(dataset, "_cache_head", disk_full)
    with pytest.raises(OSError, match="disk full"):
        dataset._write_cache(file, key, dataset.read_frames(clip, 2, 96))
    assert file.read_bytes() == whole and list(file.parent.iterdir()) == [file]


# ---- generate.py -----------------------------------------------------------------------------------------------------


def test_the_temperature_flag_reaches_the_answer(odd, tiny, capsys):
    def ask(*flags):
        generate.main(["--checkpoint", str(odd[2].folder), "--video", str(tiny.videos / "car.mp4"), "--max_new_tokens",
                       "12", "--mode", "copilot", *flags])
        return capsys.readouterr().out

    greedy = {ask("--temperature", "0", "--seed", str(seed)) for seed in (1, 2)}
    hot = [ask("--temperature", "3", "--seed", str(seed)) for seed in (1, 2, 1)]
    assert len(greedy) == 1 and hot[0] != hot[1] and hot[0] == hot[2]


# ---- the head on a GPU -----------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Notes (number type of the factors, number type of the product) of every matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "mm" in function.__name__:
            self.seen.append((args[0].dtype, args[1].dtype, result.dtype))
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_cuda_the_head_is_multiplied_in_its_own_type_and_summed_in_float32(dtype):
    """Fake tensors: no GPU is needed, because nothing is computed."""
    with FakeTensorMode():
        hidden = torch.empty(5, 8, device="cuda")  # after the last norm, float32
        head = torch.empty(11, 8, device="cuda", dtype=dtype)
        banned, targets = (torch.zeros(n, device="cuda", dtype=torch.long) for n in (2, 5))
        with Products() as products:
            logits = head_logits(hidden, head, 1.3, banned)
            logps, entropy = token_logps(hidden, head, targets, banned=banned, chunk=3)
    assert products.seen == [(dtype, dtype, torch.float32)] * 3  # once, then in two chunks
    assert logits.dtype == logps.dtype == entropy.dtype == torch.float32 and logits.device.type == "cuda"


def test_on_a_cpu_the_head_is_multiplied_in_float32():
    hidden, head = torch.randn(5, 8), torch.randn(11, 8).bfloat16()
    with Products() as products:
        logits = head_logits(hidden, head, 1.0, None)
    assert products.seen == [(torch.float32, torch.float32, torch.float32)]
    torch.testing.assert_close(logits, hidden @ head.float().T)


def test_weights_of_the_two_runs_differ(odd, even):
    """A guard of this file: if the runs did nothing, most of the above would say nothing."""
    for stage in (1, 2):
        one, two = (load_file(seen[stage].folder / "model" / "projector.safetensors") for seen in (odd, even))
        assert all(not torch.equal(one[name], two[name]) for name in one if stage == 1 or name != "temporal")


# ---- lines that random mutations broke without a test failing --------------------------------------------------------


def test_memory_is_in_gigabytes():
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]  # KiB, on Linux
    assert loop.memory_gb(torch.device("cpu")) == pytest.approx(int(peak) / 2**20, rel=0.02)


def test_processes_on_one_machine_share_its_cores(monkeypatch):
    threads = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(loop, "cpu_count", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    loop.start_accelerator()
    assert threads == [3]


def test_a_rollout_shows_what_its_reference_contradicts():
    entry = Entry("car#copilot", "car.mp4", "copilot", dataset.MODES["copilot"], ("A red car brakes.",))
    sampler = SimpleNamespace(evidence={"car.mp4": Evidence({"car"}, counts={"car": 1})},
                              reward_of=lambda *_: (0.5, {}))
    line = RolloutSampler.score(sampler, entry, Completion([1], True, "A blue car brakes.", [0.0]))
    assert line["claims"] == [["car colour blue", "contradicted", 2, 6]]


@pytest.mark.parametrize("start", [
    loop.start_accelerator,
    lambda: detect_objects.main(["--config", "configs/demo/stage3.yaml"]),
    lambda: augment_captions.main(["--data", "none.json", "--output", "none.json"]),
], ids=["a stage", "detector", "augmentation"])
def test_more_processes_than_gpus_are_refused_with_what_to_do(start, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError):
        start()
    assert "2 processes for 1 GPU: start torchrun with --nproc_per_node 1" in capsys.readouterr().err


@pytest.mark.parametrize("cards", [0, 2, 3])
def test_as_many_gpus_as_processes_or_none_are_enough(cards, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    check_gpus()


def test_data_loader_workers_leave_signals_to_the_training_process(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    loop.start_worker(0)
    assert handlers == {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL}


def test_a_signal_is_announced_by_rank_0_alone(monkeypatch, capsys):
    for rank, said in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        loop.StopSignals()._note(signal.SIGTERM, None)
        assert capsys.readouterr().out.count("SIGTERM: finishing this step") == said


def test_a_held_out_clip_that_cannot_be_read_is_counted(monkeypatch):
    class Model:
        def eval(self):
            pass

        train = eval

        def __call__(self, **batch):
            return {"loss_sum": torch.tensor(3.0), "num_tokens": torch.tensor(2)}

    entries = [Entry(f"{name}#copilot", name, "copilot", "", ("",)) for name in "ab"]
    monkeypatch.setattr(loop, "make_loader", lambda *_: [{"errors": ["b: broken"]}])
    failed, accelerator = [], SimpleNamespace(process_index=0, num_processes=1)
    losses = loop.evaluate_loss(SimpleNamespace(per_device_batch_size=2), accelerator, Model(),
                                SimpleNamespace(entries=entries),
                                SimpleNamespace(add=lambda _, errors: failed.extend(errors)))
    assert failed == ["b: broken"] and losses == {"eval_loss": 1.5, "eval_loss_copilot": 1.5}


def test_answers_are_shown_of_three_clips_each_read_once():
    entries = [Entry(f"{name}#{mode}", f"{name}.mp4", mode, dataset.MODES[mode], (f"{name}, {mode}",))
               for name in "abcde" for mode in dataset.MODES]
    read, said = [], []

    def read_tokens(video):
        read.append(video)
        if video == "b.mp4":
            raise dataset.VideoError(video, "gone")
        return torch.zeros(1, 2)

    answer = SimpleNamespace(text="A car.", ended=True)
    model = SimpleNamespace(generate=lambda frames, questions, **options: [answer] * len(questions))
    run = SimpleNamespace(print=said.append, log_text=lambda *args: None)
    loop.show_answers(SimpleNamespace(sample_tokens=5), run, model, 0, entries, read_tokens)
    assert read == ["a.mp4", "b.mp4", "b.mp4", "c.mp4", "d.mp4"]  # b is tried for each of its entries
    assert re.findall(r"\n  (\w)\.mp4", said[-1]) == ["a", "c", "d"] and said[-1].count("A car.") == 6
