"""Stages 1 and 2 on tiny random models: what trains, resume, broken clips, wrong folders, two processes.

Everything runs in this process, or in two that are forked from it.
"""

import functools
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import in_two_processes
from safetensors.torch import load_file

import dataset
import train_stage1_ddp
import train_stage2
from dataset import MODES, draw_question, load_entries, read_frames, split_by_video
from model import DriveVLM
from training import loop
from training.common import ConfigError, TrainingError, load_config, read_jsonl
from training.config import Stage2Config
from training.run_folder import last_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def flags(tiny, output_dir, **changes):
    """Flags of a short run: 8 entries to train on, 4 held out, 4 clips per step, 2 steps per epoch."""
    values = {
        "data": tiny.data, "video_root": tiny.videos, "vision_model": tiny.vision, "language_model": tiny.llm,
        "output_dir": output_dir, "frame_cache": tiny.root / "frame_cache", "num_workers": 0, "num_frames": 2,
        "num_val_videos": 2, "dtype": "float32", "max_steps": 6, "per_device_batch_size": 2,
        "gradient_accumulation_steps": 2, "warmup": 0.2, "eval_every": 3, "sample_every": 6, "sample_tokens": 8,
        "save_every": 2, "keep_checkpoints": 2, "learning_rate": 1e-2,
    }
    return [f"--{key}={value}" for key, value in (values | changes).items()]


def stage1(tiny, output_dir, *extra, **changes):
    train_stage1_ddp.main([*flags(tiny, output_dir, **changes), *extra])
    return Path(output_dir)


def stage2(tiny, output_dir, init_from, *extra, **changes):
    lora = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.2, "projector_learning_rate": 1e-3, "init_from": init_from}
    train_stage2.main([*flags(tiny, output_dir, **(lora | changes)), *extra])
    return Path(output_dir)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """One finished run of each stage, with the models as they were in memory at the end."""
    root, models = tmp_path_factory.mktemp("runs"), []
    patch = pytest.MonkeyPatch()
    for module in (train_stage1_ddp, train_stage2):
        build = module.build_model
        patch.setattr(module, "build_model", lambda *args, build=build: models.append(build(*args)) or models[-1])
    one = stage1(tiny, root / "stage1")
    two = stage2(tiny, root / "stage2", one)
    patch.undo()
    return SimpleNamespace(one=one, two=two, models=models)


def files(folder):
    """{relative path: bytes} of a folder's safetensors."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*.safetensors"))}


def steps(folder):
    return {row["step"]: row for row in read_jsonl(folder / "metrics.jsonl")}


# ---- what a run leaves behind ----------------------------------------------------------------------------------------


def test_the_run_folder_is_complete(runs):
    for folder, stage in ((runs.one, 1), (runs.two, 2)):
        assert {p.name for p in folder.iterdir()} == {
            ".lock", "config.yaml", "checkpoints", "curves.png", "metrics.jsonl", "model", "runs", "train.log"}
        rows = steps(folder)
        assert list(rows) == [0, 1, 2, 3, 4, 5, 6]
        for step in range(1, 7):
            assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "data_wait", "memory_gb",
                    "seconds_left", "failed_clips"} <= set(rows[step])
        for step in (0, 3, 6):
            assert {"eval_loss", "eval_loss_copilot", "eval_loss_microscope"} <= set(rows[step])
        assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
        suffixes = {p.suffix for p in (folder / "model").rglob("*") if p.is_file()}
        assert suffixes == {".json", ".safetensors", ".jinja"}
        meta = json.loads((folder / "model" / "drivevlm.json").read_text())
        assert meta["stage"] == stage and meta["num_frames"] == 2
        log = (folder / "train.log").read_text()
        assert "step 6/6 | loss" in log and "what the model says after step 6" in log and "projector" in log
        assert (folder / "curves.png").stat().st_size > 10_000


def test_answers_of_fixed_clips_in_both_modes_are_in_log_and_tensorboard(runs, tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs.one / "runs")).Reload()
    _, held_out = split_by_video(load_entries(tiny.data), 2, 42)
    for entry in held_out:
        tag = f"answers/{entry.mode}/{entry.video}/text_summary"
        assert [event.step for event in events.Tensors(tag)] == [0, 6]
        assert f"reference | {entry.captions[0]}" in (runs.one / "train.log").read_text()
    assert {"train/loss", "train/grad_norm", "eval/loss"} <= set(events.Tags()["scalars"])


def test_loss_falls_and_learning_rate_follows_the_schedule(runs):
    rows = steps(runs.one)
    assert rows[6]["loss"] < rows[1]["loss"] and rows[6]["eval_loss"] < rows[0]["eval_loss"]
    rates = [rows[step]["learning_rate"] for step in range(1, 7)]
    # a warm-up of one step in six: half of the peak, then the peak, then the cosine
    assert rates[0] == pytest.approx(5e-3) and rates[1] == pytest.approx(1e-2)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    two = steps(runs.two)
    assert two[3]["learning_rate_projector"] == pytest.approx(two[3]["learning_rate"] / 10)
    assert two[0]["eval_loss"] == pytest.approx(rows[6]["eval_loss"], rel=1e-6)  # stage 2 starts where stage 1 ended


# ---- who learns ------------------------------------------------------------------------------------------------------


def test_each_stage_changes_its_own_modules_and_no_others(runs, tiny):
    fresh = DriveVLM.from_base(tiny.vision, tiny.llm, num_frames=2, dtype="float32", seed=42)
    base = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    one, two = (load_file(folder / "model" / "projector.safetensors") for folder in (runs.one, runs.two))
    for name, tensor in one.items():
        assert not torch.equal(tensor, base[name]), name  # stage 1 trains projector and temporal
    for name, tensor in two.items():
        assert torch.equal(tensor, one[name]) == (name == "temporal"), name  # stage 2 trains the projector only
    assert not (runs.one / "model" / "adapter").exists()
    adapter = load_file(runs.two / "model" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    for model in runs.models:
        after = {name.replace("llm.base_model.model.", "llm.").replace(".base_layer", ""): tensor
                 for name, tensor in model.state_dict().items()}
        for name, tensor in base.items():
            if name.startswith(("vision.", "llm.")):
                assert torch.equal(after[name], tensor), name


def test_weight_decay_changes_projector_matrices_only(tiny, tmp_path, monkeypatch):
    seen = {}
    make = loop.make_optimizer

    def look(model, *args):
        optimizer = make(model, *args)
        names = {id(p): name for name, p in model.named_parameters()}
        for group in optimizer.param_groups:
            seen.update({names[id(p)]: (group["weight_decay"], group["name"]) for p in group["params"]})
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", look)
    stage1(tiny, tmp_path / "run", weight_decay=0.3, max_steps=1)
    assert seen == {
        "projector.fc1.weight": (0.3, "projector"), "projector.fc2.weight": (0.3, "projector"),
        "projector.fc1.bias": (0.0, "projector"), "projector.fc2.bias": (0.0, "projector"),
        "temporal": (0.0, "temporal")}


def test_steps_ask_drawn_wordings_and_held_out_losses_the_standard_question(tiny, tmp_path, monkeypatch):
    encode, evaluate, asked = dataset._encode_example, loop.evaluate_loss, {"training": set(), "held out": set()}
    now = ["training"]

    def note(tokenizer, question, *rest):
        asked[now[0]].add(question)
        return encode(tokenizer, question, *rest)

    def note_held_out(*args):
        now[0] = "held out"
        losses = evaluate(*args)
        now[0] = "training"
        return losses

    monkeypatch.setattr(dataset, "_encode_example", note)
    monkeypatch.setattr(loop, "evaluate_loss", note_held_out)
    stage1(tiny, tmp_path / "run")
    train, _ = split_by_video(load_entries(tiny.data), 2, 42)
    drawn = {draw_question(entry, 42, epoch) for epoch in range(3) for entry in train}  # six steps: three epochs
    assert asked == {"training": drawn, "held out": set(MODES.values())} and len(drawn) > 8


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_step_does_not_depend_on_micro_batches(tiny, tmp_path):
    losses, evals, weights = [], [], []
    for size, parts in ((4, 1), (1, 4)):
        folder = stage1(tiny, tmp_path / f"{size}x{parts}", per_device_batch_size=size, max_steps=3,
                        gradient_accumulation_steps=parts, warmup=0, activation_checkpointing=False)
        rows = steps(folder)
        losses.append([rows[step]["loss"] for step in (1, 2, 3)])
        evals.append([rows[step][key] for step in (0, 3) for key in ("eval_loss", "eval_loss_copilot")])
        weights.append(load_file(folder / "model" / "projector.safetensors"))
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
    assert evals[0] == pytest.approx(evals[1], abs=2e-5)
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-4, rtol=0)


def test_both_stages_train_on_rows_that_share_a_clip(tiny, tmp_path, monkeypatch):
    """Every step takes all eight entries of the four clips, in eight rows or in four: the numbers are the same."""
    monkeypatch.setattr(train_stage1_ddp.loop, "step_batches", lambda count, *_: [
        [(0, i) for i in range(count)]])  # all rows in each step
    runs = {}
    for shared, rows in ((False, 8), (True, 4)):
        runs[shared] = stage1(tiny, tmp_path / f"one_{shared}", shared_prefix=shared, per_device_batch_size=rows,
                              gradient_accumulation_steps=1, augment=False, max_steps=3)
    plain, packed = steps(runs[False]), steps(runs[True])
    for step in (1, 2, 3):
        assert packed[step]["loss"] == pytest.approx(plain[step]["loss"], rel=1e-4)
        assert packed[step]["grad_norm"] == pytest.approx(plain[step]["grad_norm"], rel=1e-3)
    assert packed[3]["eval_loss"] == pytest.approx(plain[3]["eval_loss"], rel=1e-4)
    two = stage2(tiny, tmp_path / "two", runs[True], shared_prefix=True, augment=False, max_steps=2,
                 gradient_accumulation_steps=1, per_device_batch_size=4)
    assert steps(two)[2]["eval_loss"] < steps(two)[0]["eval_loss"] and (two / "model" / "adapter").is_dir()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_model_that_cannot_mask_refuses_shared_rows(stage, runs, tiny, tmp_path, monkeypatch, capsys):
    module, load = (train_stage1_ddp, "from_base") if stage == 1 else (train_stage2, "from_checkpoint")
    build = getattr(DriveVLM, load)

    def other_attention(*args, **options):
        model = build(*args, **options)
        model.causal_lm.config._attn_implementation = "flash_attention_2"
        return model

    monkeypatch.setattr(module.DriveVLM, load, other_attention)
    start = stage1 if stage == 1 else functools.partial(stage2, init_from=runs.one)
    with pytest.raises(ConfigError, match="flash_attention_2 in full_attention layers: set shared_prefix to false"):
        start(tiny, tmp_path / "run", shared_prefix=True, per_device_batch_size=1)
    assert not (tmp_path / "run" / "model").exists()


def test_two_processes_give_the_result_of_one_with_twice_the_batch(tiny, tmp_path, monkeypatch):
    options = {"max_steps": 2, "warmup": 0, "max_grad_norm": 1e9, "learning_rate": 1e-3}
    results = {}
    sum_gradients = loop.sum_gradients

    def run(rank, folder, size):
        step = itertools.count()

        def look(accelerator, parameters, loss):
            loss = sum_gradients(accelerator, parameters, loss)
            torch.save([p.grad.clone() for p in parameters], folder / f"grads-{next(step)}-{rank}.pt")
            return loss

        with monkeypatch.context() as patch:
            patch.setattr(loop, "sum_gradients", look)
            stage1(tiny, folder / "run", per_device_batch_size=size, **options)

    for name, size in (("two", 1), ("one", 2)):
        folder = tmp_path / name
        folder.mkdir()
        if name == "one":
            run(0, folder, size)
        else:
            printed = in_two_processes(functools.partial(run, folder=folder, size=size), tmp_path / "log")
            assert printed.count("step 2/2") == 1  # only rank 0 prints
        grads = [torch.load(folder / f"grads-{step}-0.pt", weights_only=True) for step in (0, 1)]
        rows = steps(folder / "run")
        results[name] = grads, [rows[1]["loss"], rows[2]["loss"], rows[0]["eval_loss"], rows[2]["eval_loss"]]
    for two, one in zip(results["two"][0], results["one"][0], strict=True):
        assert len(one) == 5  # two matrices, two biases, the temporal embedding
        for a, b in zip(two, one, strict=True):
            assert b.abs().max() > 0
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert results["two"][1] == pytest.approx(results["one"][1], abs=1e-5)
    other_rank = torch.load(tmp_path / "two" / "grads-1-1.pt", weights_only=True)
    for a, b in zip(other_rank, results["two"][0][1], strict=True):
        assert torch.equal(a, b)  # both ranks hold the same gradient


# ---- resume ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def kill_after(monkeypatch, step):
    """The run dies in the given step, before it could be saved."""
    log_step = loop.log_step

    def dying(run, now, *args):
        log_step(run, now, *args)
        if now == step:
            raise Killed

    monkeypatch.setattr(loop, "log_step", dying)


def deterministic(rows):
    """Rows of metrics.jsonl without the times."""
    clock = ("seconds", "per_second", "data_wait", "memory_gb")
    return [{key: value for key, value in row.items() if not any(word in key for word in clock)} for row in rows]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_resumed_run_ends_in_the_same_bytes(stage, runs, tiny, tmp_path, monkeypatch, capsys):
    def run(*extra):
        if stage == 1:
            return stage1(tiny, tmp_path / "run", *extra)
        return stage2(tiny, tmp_path / "run", runs.one, *extra)

    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            run()
    folder, whole = tmp_path / "run", {1: runs.one, 2: runs.two}[stage]
    assert last_checkpoint(folder).name == "step-000004" and not (folder / "model").exists()
    assert "continue from the last checkpoint with --resume auto" in (folder / "train.log").read_text()
    with pytest.raises(ConfigError, match="--resume auto"):
        run()
    with pytest.raises(ConfigError, match="seed: was 42, now 43"):
        run("--resume=auto", "--seed=43")

    run("--resume=auto")
    assert files(folder / "model") == files(whole / "model")
    assert files(folder / "checkpoints" / "step-000006") == files(whole / "checkpoints" / "step-000006")
    a, b = (torch.load(f / "checkpoints" / "step-000006" / "optimizer.pt", weights_only=True) for f in (folder, whole))
    assert a["param_groups"] == b["param_groups"]
    torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
    assert deterministic(read_jsonl(folder / "metrics.jsonl")) == deterministic(read_jsonl(whole / "metrics.jsonl"))

    before = files(folder / "model")
    run("--resume=auto")  # the stage is complete: nothing is done again
    assert files(folder / "model") == before
    assert "already exists" in capsys.readouterr().out


def test_a_run_killed_between_last_checkpoint_and_model_can_be_finished(runs, tiny, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs.one, folder, ignore=shutil.ignore_patterns("model.*"))
    shutil.rmtree(folder / "model")
    config = (folder / "config.yaml").read_text().replace(str(runs.one), str(folder))
    (folder / "config.yaml").write_text(config)
    stage1(tiny, folder, "--resume=auto")
    assert files(folder / "model") == files(runs.one / "model")


def test_a_run_killed_before_its_first_checkpoint_logs_step_0_once(runs, tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Killed):
            stage1(tiny, tmp_path / "run")
    assert list(steps(tmp_path / "run")) == [0, 1]
    stage1(tiny, tmp_path / "run", "--resume=auto")
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert deterministic(rows) == deterministic(read_jsonl(runs.one / "metrics.jsonl"))


def test_a_checkpoint_is_weights_optimizer_and_run_json(runs):
    for folder in (runs.one, runs.two):
        checkpoint = folder / "checkpoints" / "step-000006"
        assert {path.name for path in checkpoint.iterdir()} == {"model", "optimizer.pt", "run.json"}
        torch.load(checkpoint / "optimizer.pt", weights_only=True)
        assert json.loads((checkpoint / "run.json").read_text())["num_processes"] == 1


# ---- clips that cannot be read, losses that are not finite -----------------------------------------------------------


def with_broken_clip(tiny, tmp_path, name):
    videos = tmp_path / "videos"
    shutil.copytree(tiny.videos, videos)
    (videos / name).write_bytes(b"not a video")
    return videos


def test_a_broken_clip_is_skipped_counted_named_and_never_replaced(tiny, tmp_path, monkeypatch):
    train, _ = split_by_video(load_entries(tiny.data), 2, 42)
    broken = train[0].video
    batches = []
    forward = DriveVLM.forward

    def spy(self, **inputs):
        if self.training:
            batches.append((list(inputs["ids"]), int((inputs["labels"] != -100).sum())))
        return forward(self, **inputs)

    monkeypatch.setattr(DriveVLM, "forward", spy)
    folder = stage1(tiny, tmp_path / "run", video_root=with_broken_clip(tiny, tmp_path, broken), max_failed_share=0.5,
                    per_device_batch_size=1, gradient_accumulation_steps=4, max_steps=4)  # two epochs
    seen = sorted(name for ids, labels in batches for name in ids if labels)
    assert seen == sorted(2 * [entry.id for entry in train if entry.video != broken])
    assert sum(labels == 0 for _, labels in batches) == 4  # micro-batches without any clip: a zero loss, with a graph
    rows = steps(folder)
    assert rows[4]["failed_clips"] == 1 and rows[4]["loss"] > 0
    log = (folder / "train.log").read_text()
    assert "skipped clip 1 of 6" in log and broken in log and "skipped clip 2" not in log
    state = load_file(folder / "model" / "projector.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("augment, train, changed", [(True, True, True), (False, True, False), (True, False, False)])
def test_only_training_clips_are_augmented_and_only_where_the_key_says_so(augment, train, changed, runs, tiny):
    config = load_config(Stage2Config, flags(tiny, "unused", augment=augment))
    entries = load_entries(tiny.data)
    examples = loop.make_dataset(config, DriveVLM.from_checkpoint(runs.one), entries, train=train)
    plain = torch.from_numpy(read_frames(tiny.videos / entries[0].video, 2, 96))
    assert torch.equal(examples[0]["frames"], plain) != changed


# ---- features of the frozen tower, made once -------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_cached_features_give_the_same_bytes(stage, runs, tiny, tmp_path, monkeypatch):
    def run(name, **changes):
        settings = {"augment": "false", "max_steps": 3, **changes}
        if stage == 1:
            return stage1(tiny, tmp_path / name, **settings)
        return stage2(tiny, tmp_path / name, runs.one, **settings)

    plain, cached = run("plain"), run("cached", tower_cache=tmp_path / "tower")
    assert files(cached / "model") == files(plain / "model")
    assert steps(cached)[3]["eval_loss"] == steps(plain)[3]["eval_loss"]
    assert len(list((tmp_path / "tower").rglob("*.safetensors"))) == 6

    def no_tower(*_):
        raise AssertionError("the tower ran again")

    monkeypatch.setattr(DriveVLM, "tower_features", no_tower)
    monkeypatch.setattr(loop, "show_answers", lambda *_: None)
    again = run("again", tower_cache=tmp_path / "tower")
    assert files(again / "model") == files(plain / "model")


def test_the_tower_cache_needs_clips_as_they_are_and_a_frozen_tower(tiny, tmp_path, capsys):
    with pytest.raises(ConfigError, match="tower_cache: its features are of clips as they are"):
        stage1(tiny, tmp_path / "run", tower_cache=tmp_path / "tower")
    config = SimpleNamespace(tower_cache="tower")
    with pytest.raises(ConfigError, match="tower_cache: the tower is trained"):
        loop.tower_features(config, None, SimpleNamespace(trained_groups=("projector", "vision")), [])
    assert not (tmp_path / "run").exists()


def test_a_broken_clip_has_no_features_and_is_named(tiny, tmp_path):
    train, _ = split_by_video(load_entries(tiny.data), 2, 42)
    videos = with_broken_clip(tiny, tmp_path, train[0].video)
    folder = stage1(tiny, tmp_path / "run", video_root=videos, max_failed_share=0.5, augment="false",
                    tower_cache=tmp_path / "tower", per_device_batch_size=1, gradient_accumulation_steps=4, max_steps=2)
    assert steps(folder)[2]["failed_clips"] == 1
    log = (folder / "train.log").read_text()
    assert f"{train[0].video}: not a readable video" in log
    assert len(list((tmp_path / "tower").rglob("*.safetensors"))) == 5


def test_two_processes_share_the_clips_and_a_full_disk_is_said(tiny, tmp_path, monkeypatch):
    entries, waited = load_entries(tiny.data), []
    model = SimpleNamespace(
        trained_groups=("projector",), frozen_parts_id=lambda *groups: "tower", num_frames=2, image_size=96,
        feature_shape=(2, 1), tower_features=lambda frames: torch.ones(1, 2, 1))
    config = SimpleNamespace(tower_cache=tmp_path / "tower", video_root=tiny.videos, frame_cache=None)
    for rank in range(2):
        accelerator = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0,
                                      wait_for_everyone=lambda: waited.append(1))
        features = loop.tower_features(config, accelerator, model, entries)
        assert len(list((tmp_path / "tower").rglob("*.safetensors"))) == 3 * (rank + 1) and len(waited) == rank + 1
    assert all(torch.equal(features.read(entry.video), torch.ones(2, 1)) for entry in entries)
    (tmp_path / "file").write_text("")
    config.tower_cache = tmp_path / "file"
    with pytest.raises(TrainingError, match=f"cannot write {tmp_path}/file: Not a directory"):
        loop.tower_features(config, accelerator, model, entries)


def test_too_many_broken_clips_stop_the_run(tiny, tmp_path, capsys):
    train, _ = split_by_video(load_entries(tiny.data), 2, 42)
    videos = with_broken_clip(tiny, tmp_path, train[0].video)
    with pytest.raises(TrainingError, match="max_failed_share 1.0%") as caught:
        stage1(tiny, tmp_path / "run", video_root=videos)
    assert caught.value.code == 1 and train[0].video in str(caught.value)
    assert "cannot be read" in capsys.readouterr().out
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_numbers_stop_the_run_and_name_the_clips(where, tiny, tmp_path, monkeypatch):
    forward = DriveVLM.forward

    def spoiled(self, **inputs):
        out = forward(self, **inputs)
        if self.training and len(calls) >= 4:  # the third step
            if where == "loss":
                out["loss"] = out["loss"] * float("nan")
            else:
                out["loss"].register_hook(lambda grad: grad * float("inf"))
        if self.training:
            calls.append(1)
        return out

    calls = []
    monkeypatch.setattr(DriveVLM, "forward", spoiled)
    train, _ = split_by_video(load_entries(tiny.data), 2, 42)
    with pytest.raises(TrainingError, match=f"the {where}.*of step 3 is .*, on ") as caught:
        stage1(tiny, tmp_path / "run")
    assert any(entry.id in str(caught.value) for entry in train)
    assert last_checkpoint(tmp_path / "run").name == "step-000002"


# ---- wrong folders, missing things -----------------------------------------------------------------------------------


def test_the_wrong_stage_is_refused(runs, tiny, tmp_path):
    for call, word in (
        (lambda: stage1(tiny, tmp_path / "a", init_from=runs.one), "takes none"),
        (lambda: stage2(tiny, tmp_path / "b", runs.two), "it holds stage 2, but stage 1 is needed here"),
        (lambda: stage2(tiny, tmp_path / "c", tmp_path), "it has no drivevlm.json"),
        (lambda: stage2(tiny, tmp_path / "d", "none"), "--init_from output/stage1"),
        (lambda: stage2(tiny, tmp_path / "e", runs.one, num_frames=4), "num_frames: 4"),
        (lambda: stage2(tiny, tmp_path / "f", runs.one, language_model=tiny.llm_plain), "language_model: .* trained"),
    ):
        with pytest.raises(ConfigError, match=word) as caught:
            call()
        assert caught.value.code == 2


def test_stage_2_needs_both_modes(runs, tiny, tmp_path):
    rows = [{"video": row["video"], "microscope": row["microscope"]} for row in json.loads(tiny.data.read_text())]
    data = tmp_path / "one_mode.json"
    data.write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match="no copilot entries"):
        stage2(tiny, tmp_path / "b", runs.one, data=data)
    folder = stage1(tiny, tmp_path / "a", data=data, max_steps=1)  # stage 1 trains on one mode
    assert "eval_loss_copilot" not in steps(folder)[1] and "eval_loss_microscope" in steps(folder)[1]


def test_less_than_one_step_of_clips_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="8 training examples do not fill one optimizer step of 40"):
        stage1(tiny, tmp_path / "run", gradient_accumulation_steps=20)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.curves
def test_no_held_out_clips_means_no_evaluation(tiny, tmp_path):
    folder = stage1(tiny, tmp_path / "run", num_val_videos=0, max_steps=1)
    assert "eval_loss" not in steps(folder)[1] and (folder / "curves.png").is_file()


# ---- the order of clips ----------------------------------------------------------------------------------------------


def test_all_ranks_together_see_the_batches_of_one_process():
    def batches(rank, world, size):
        per_step = [loop.step_batches(11, step, 1, size, 1, rank, world) for step in range(6)]
        return [batch for step in per_step for batch in step]

    one, ranks = batches(0, 1, 4), [batches(rank, 2, 2) for rank in (0, 1)]
    assert one == [a + b for a, b in zip(*ranks, strict=True)]
    assert [len(batch) for batch in one] == [4] * 6
    epochs = [{epoch for epoch, _ in batch} for batch in one]
    assert epochs == [{0}, {0}, {1}, {1}, {2}, {2}]  # 3 of 11 entries are left out of each epoch
    assert len({index for batch in one[:2] for _, index in batch}) == 8


def test_the_order_is_a_function_of_seed_and_step(monkeypatch):
    def order(seed, steps, size=2, parts=3):
        return [loop.step_batches(20, step, seed, size, parts, 0, 1) for step in steps]

    assert order(1, range(3, 9)) == order(1, range(9))[3:]  # a resumed run continues with the same batches
    assert order(1, range(3)) != order(2, range(3))
    first_epoch = [key for step in order(1, range(3)) for batch in step for key in batch]
    assert len(set(first_epoch)) == 18 and {epoch for epoch, _ in first_epoch} == {0}
    whole = [step[0] for step in order(1, range(3), size=6, parts=1)]
    assert whole == [sum(step, []) for step in order(1, range(3))]  # how a step is divided does not matter


def test_dropout_differs_between_steps_and_ranks():
    def draw(*key):
        loop.seed_dropout(*key)
        return torch.rand(4).tolist()

    assert draw(1, 5, 0) == draw(1, 5, 0)
    assert len({str(draw(*key)) for key in ((1, 5, 0), (1, 6, 0), (1, 5, 1), (2, 5, 0))}) == 4


def test_learning_rate_rises_and_falls_and_never_starts_at_0():
    config = Stage2Config(warmup=0.2)
    rates = [loop.learning_rate_factor(config, step, 10) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[6] == pytest.approx(0.5)
    linear = Stage2Config(warmup=0.0, lr_schedule="linear")
    assert loop.learning_rate_factor(linear, 3, 4) == pytest.approx(0.25)
    assert loop.learning_rate_factor(Stage2Config(warmup=0.0, lr_schedule="constant"), 9, 10) == 1.0


def test_defaults_of_the_scripts_are_the_real_recipe(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(Stage2Config, [], default_config="configs/stage2.yaml")
    assert (config.data, config.output_dir) == ("data/captions.json", "output/stage2")
    with pytest.raises(ConfigError) as caught:
        train_stage2.main([])
    assert "data/captions.json" in str(caught.value) and "output/stage1" in str(caught.value)
