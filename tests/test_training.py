"""Configuration, run folder, resume rules and curves. No torch in here: this file takes a second or two."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import training
from training import ConfigError, Run, TrainConfig, find_resume, load_config, opt

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Detector:
    """Detector"""

    weights: str = opt("yolov8x.pt", "weights file")
    image_size: int = opt(1280, "pixels")


@dataclass
class Config(TrainConfig):
    """Test stage"""

    learning_rate: float = opt(1e-3, "peak learning rate")
    detector: Detector = opt(Detector, "detector")
    checkpoint: list[str] = opt([], "NAME=FOLDER")
    no_video: bool = opt(False, "rows alone")


@dataclass
class Other:
    judge: Detector = opt(Detector, "another script's detector")


def problems_of(capsys, *argv, cls=Config, **kwargs):
    """The lines of the one message that `argv` brings on stderr, exit code 2."""
    with pytest.raises(ConfigError) as caught:
        load_config(cls, list(argv), **kwargs)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.strip() == str(caught.value)
    return err.split("\n  - ")[1:]


def test_defaults_yaml_flags_in_this_order(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 5e-4\nseed: 7\nepochs: 3\ndetector: a.pt\n")
    config = load_config(Config, ["--config", str(file), "--seed", "8"])
    assert (config.num_frames, config.learning_rate, config.seed, config.epochs) == (16, 5e-4, 8, 3)
    assert isinstance(config, Config) and config.detector == Detector("a.pt", 1280)


def test_flags_with_dash_underscore_equals_and_nested():
    config = load_config(Config, ["--learning-rate", "2e-4", "--per_device-batch_size=3", "--no-video", "--detector",
                                  "b.pt", "--detector.image-size", "640", "--checkpoint", "a=x", "b=y", "--max-steps",
                                  "none", "--output-dir=with-dash", "--activation_checkpointing", "false"])
    assert (config.learning_rate, config.per_device_batch_size, config.no_video) == (2e-4, 3, True)
    assert config.detector == Detector("b.pt", 640) and config.checkpoint == ["a=x", "b=y"]
    assert config.max_steps is None and config.output_dir == "with-dash" and config.activation_checkpointing is False


def test_nested_mapping_in_yaml(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("detector:\n  weights: c.pt\n  image_size: 320\n")
    assert load_config(Config, ["--config", str(file)]).detector == Detector("c.pt", 320)
    file.write_text("detector:\n  wieghts: c.pt\n")
    with pytest.raises(ConfigError, match="detector.weights"):
        load_config(Config, ["--config", str(file)])


def test_all_problems_come_at_once_with_the_nearest_key(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("learnin_rate: 1\nepochs: many\ndtype: float16\n")
    found = problems_of(capsys, "--config", str(file), "--num-frame", "8", "--seed", "1.5", "stray")
    assert len(found) == 6
    text = "\n".join(found)
    assert "unknown key learnin_rate (did you mean 'learning_rate'?)" in text
    assert "epochs must be a whole number, got 'many'" in text
    assert "dtype must be bfloat16 or float32, got 'float16'" in text
    assert "unknown flag --num_frame (did you mean 'num_frames'?)" in text
    assert "--seed must be a whole number, got '1.5'" in text
    assert "'stray' belongs to no flag" in text


@pytest.mark.parametrize("argv, word", [
    (["--epochs", "0"], "epochs must be above 0, got 0"),
    (["--warmup", "2"], "warmup must lie between 0 and 1"),
    (["--learning_rate", "nan"], "learning_rate must be above 0"),
    (["--activation_checkpointing", "perhaps"], "true or false"),
    (["--seed"], "--seed: expected one argument"),
    (["--lr", "1e-3"], "unknown flag --lr (did you mean 'learning_rate'?)"),
    (["--config", "nowhere.yaml"], "config file nowhere.yaml not found"),
])
def test_values_that_cannot_work(argv, word, capsys):
    assert any(word in line for line in problems_of(capsys, *argv))


@pytest.mark.parametrize("content, word", [
    ("a: [1\n", "not valid YAML"), ("- a\n- b\n", "key: value"), ("seed: 1\nseed: 2\n", "duplicate key"),
    ("seed: null\n", "seed must be a whole number, got None"), ("data: [a, b]\n", "data must be a text"),
])
def test_broken_yaml(content, word, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    assert any(word in line for line in problems_of(capsys, "--config", str(file)))


def test_keys_of_other_scripts_may_stand_in_the_file_but_not_on_the_command_line(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("judge: x.pt\nseed: 3\n")
    assert load_config(Config, ["--config", str(file)], also=(Other,)).seed == 3
    assert "unknown key judge.weights" in problems_of(capsys, "--judge.weights", "x", also=(Other,))[0].replace(
        "flag --", "key ")
    assert "judge" in problems_of(capsys, "--config", str(file))[0]


def test_help_names_every_key_with_the_value_in_force(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 1234\n")
    with pytest.raises(SystemExit) as caught:
        load_config(Config, ["--help", "--config", str(file)], description="What this does.")
    text = capsys.readouterr().out
    assert caught.value.code == 0 and text.startswith("What this does.")
    for key in training._fields(Config):
        assert f"--{key} " in text or f"--{key}\n" in text
    assert "[1234]" in text and "Test stage:" in text


@pytest.mark.parametrize("name, stage", [("stage1", 1), ("stage2", 2), ("demo/stage1", 1), ("demo/stage2", 2)])
def test_shipped_configs_hold_every_key_and_a_comment_on_each(name, stage):
    import train_stage1_ddp
    import train_stage2

    cls = {1: train_stage1_ddp.Stage1Config, 2: train_stage2.Stage2Config}[stage]
    path = ROOT / "configs" / f"{name}.yaml"
    config = load_config(cls, ["--config", str(path)])
    keys = set(yaml.safe_load(path.read_text()))
    assert set(training._fields(cls)) - keys == ({"init_from"} if stage == 1 else set())
    for line in path.read_text().splitlines():
        assert not line.strip() or "#" in line, line
    if not name.startswith("demo"):  # the recipe of the published project
        clips = config.per_device_batch_size * config.gradient_accumulation_steps
        assert (config.num_frames, config.num_val_videos, config.seed) == (16, 40, 42)
        assert (config.learning_rate, config.epochs, clips) == ((1e-3, 40, 16) if stage == 1 else (5e-5, 20, 32))
    if name == "stage2":
        assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (32, 64, 0.05)
        assert (config.per_device_batch_size, config.lr_schedule) == (2, "cosine")


def test_config_errors_need_neither_torch_nor_seconds():
    code = ("import sys, training, train_stage1_ddp\n"
            "try: train_stage1_ddp.main(['--no_such_flag'])\n"
            "except SystemExit as error: assert error.code == 2\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


# ---- run folder ------------------------------------------------------------------------------------------------------


def config_in(folder, **changes):
    return Config(output_dir=str(folder), **changes)


def fake_checkpoint(folder, step, processes=1):
    path = Path(folder) / "checkpoints" / f"step-{step:06d}"
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"num_processes": processes}))
    return path


def test_second_run_on_a_folder_refuses_from_this_and_from_another_process(tmp_path, capsys):
    code = f"import training\nwith training.Run({str(tmp_path)!r}): pass"
    with Run(tmp_path):
        with pytest.raises(ConfigError, match="another run is writing"):
            Run(tmp_path)
        other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert other.returncode == 2 and "another run is writing" in other.stderr
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    with pytest.raises(ZeroDivisionError), Run(tmp_path):
        raise ZeroDivisionError
    Run(tmp_path).close()


def test_run_writes_config_metrics_log_tensorboard_and_curves(tmp_path, capsys):
    config = config_in(tmp_path, seed=5)
    with Run(tmp_path) as run:
        run.start(config)
        for step in range(1, 41):
            run.log(step, {"loss": 1 / step, "grad_norm": float("inf") if step == 3 else 1.0}, line=f"line {step}")
        run.log(40, {"eval_loss": 0.5, "reward/total": 1.0})
        run.text("answers/copilot", 40, "a red car")
        run.curves()
    rows = training.read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[2]["grad_norm"] is None and rows[39]["eval_loss"] == 0.5 and rows[39]["loss"] == 1 / 40
    log = (tmp_path / "train.log").read_text()
    assert "| line 40" in log and "| a red car" in log and "line 40" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "runs").glob("events*"))
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith("# ") and "# commit " in text and yaml.safe_load(text)["seed"] == 5


def test_other_ranks_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Run(tmp_path / "run") as run:
        run.start(config_in(tmp_path))
        run.log(1, {"loss": 1.0}, line="x")
        run.text("a", 1, "x")
        run.curves()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_resumed_logs_drop_what_came_after_the_checkpoint(tmp_path):
    with Run(tmp_path) as run:
        run.start(config_in(tmp_path))
        for step in (1, 2, 3, 4):
            run.log(step, {"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    with Run(tmp_path) as run:
        run.start(config_in(tmp_path), step=2)
        run.log(3, {"loss": 2.0})
    rows = training.read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_checkpoints_are_complete_or_absent_and_rotate(tmp_path):
    with Run(tmp_path) as run:
        for step in (2, 4, 6):
            with run.checkpoint(step, keep=2, failed_clips=[]) as folder:
                (folder / "weights").write_text(str(step))
        with pytest.raises(OSError), run.checkpoint(8, keep=2):
            raise OSError("disk full")
        assert sorted(p.name for p in run.checkpoints.glob("step-*")) == ["step-000004", "step-000006"]
        with run.checkpoint(10, keep=1):
            pass
        assert [p.name for p in run.checkpoints.iterdir()] == ["step-000010"]
        assert json.loads((run.checkpoints / "step-000010" / "run.json").read_text())["num_processes"] == 1


def test_resume_none_refuses_a_used_folder(tmp_path):
    with Run(tmp_path) as run:
        assert find_resume(run, "none", config_in(tmp_path)) is None
        fake_checkpoint(tmp_path, 10)
        with pytest.raises(ConfigError, match="--resume auto"):
            find_resume(run, "none", config_in(tmp_path))


def test_resume_auto_takes_the_newest_and_lists_differences(tmp_path):
    config = config_in(tmp_path)
    with Run(tmp_path) as run:
        assert find_resume(run, "auto", config) is None
        run.start(config)
        fake_checkpoint(tmp_path, 10)
        newest = fake_checkpoint(tmp_path, 20)
        (tmp_path / "checkpoints" / ".step-000030").mkdir()
        assert find_resume(run, "auto", config) == newest
        other = config_in(tmp_path, learning_rate=2.0, detector=Detector(image_size=64), resume="auto")
        with pytest.raises(ConfigError) as caught:
            find_resume(run, "auto", other)
        assert "learning_rate: was 0.001, now 2.0" in str(caught.value)
        assert "detector.image_size: was 1280, now 64" in str(caught.value) and "resume:" not in str(caught.value)


def test_resume_auto_needs_the_same_number_of_processes(tmp_path):
    config = config_in(tmp_path)
    with Run(tmp_path) as run:
        run.start(config)
        fake_checkpoint(tmp_path, 10, processes=2)
        with pytest.raises(ConfigError, match="processes: was 2, now 1"):
            find_resume(run, "auto", config)


def test_resume_from_a_path_may_change_the_config_in_another_folder(tmp_path, capsys):
    old = tmp_path / "old"
    with Run(old) as run:
        run.start(config_in(old))
    first, last = fake_checkpoint(old, 10), fake_checkpoint(old, 20)
    with Run(tmp_path / "new") as run:
        changed = config_in(tmp_path / "new", max_steps=99)
        assert find_resume(run, str(first), changed) == first
        assert "max_steps: was None, now 99" in capsys.readouterr().out
        assert find_resume(run, str(old), changed) == last
        with pytest.raises(ConfigError, match="neither none, auto"):
            find_resume(run, str(tmp_path / "nothing"), changed)
    with Run(old) as run:
        assert find_resume(run, str(last), config_in(old)) == last
        with pytest.raises(ConfigError, match="branch off"):
            find_resume(run, str(first), config_in(old))


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_everything_that_is_missing_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    config = config_in(tmp_path, data=str(tmp_path / "no.json"), video_root=str(tmp_path / "no"),
                       vision_model=str(tmp_path / "empty"), language_model="./no-model", init_from=None)
    with pytest.raises(ConfigError) as caught:
        training.check_inputs(config, stage=2, more=["one of the caller's"])
    text = str(caught.value)
    assert text.startswith("pytest: 6 problems") or "6 problems" in text
    for word in ("no.json", "video_root: no folder", "holds no config.json", "no folder ./no-model",
                 "--init_from output/stage1", "one of the caller's"):
        assert word in text


@pytest.mark.parametrize("name, stage, changes, word", [
    (None, 1, {}, None), ("stage1", 2, {}, None), ("stage1/model", 2, {}, None), ("stage1", 1, {}, "takes none"),
    ("stage1", 3, {}, "is of stage 1; stage 3 starts from stage 2"), (None, 2, {}, "starts from stage 1's run folder"),
    ("nowhere", 2, {}, "no drivevlm.json"), ("stage1", 2, {"num_frames": 8}, "num_frames: 8"),
    ("stage1", 2, {"vision_model": "org/other"}, "vision_model: org/other, but"),
    ("stage1", 2, {"language_model": "moved/here"}, None),  # where it lay is gone
])
def test_init_from_must_be_the_stage_before(name, stage, changes, word, tmp_path):
    (tmp_path / "stage1" / "model").mkdir(parents=True)
    bases = {"vision_model": {"name": "org/tower"}, "language_model": {"name": "/gone/llm"}}
    meta = {"stage": 1, "num_frames": 16} | bases
    (tmp_path / "stage1" / "model" / "drivevlm.json").write_text(json.dumps(meta))
    values = {"init_from": name and str(tmp_path / name), "num_frames": 16, "vision_model": "org/tower",
              "language_model": "/gone/llm"}
    problems = training._init_problems(SimpleNamespace(**(values | changes)), stage)
    assert problems == [] if word is None else word in problems[0]


def test_entries_are_checked_too(tiny, tmp_path):
    def check(rows, modes=(), num_val_videos=1, **kwargs):
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        config = config_in(tmp_path, data=str(tmp_path / "rows.json"), video_root=str(tiny.videos),
                           num_val_videos=num_val_videos, vision_model=str(tiny.vision), language_model=str(tiny.llm))
        return training.check_inputs(config, stage=1, modes=modes, **kwargs)

    both = {"microscope": ["A car."], "copilot": ["Car."]}
    entries = check([{"video": "car.mp4"} | both, {"video": "bus.mp4"} | both], modes=("microscope", "copilot"))
    assert len(entries) == 4
    for rows, word in (
        ([{"video": "car.mp4"} | both, {"video": "gone.mp4"} | both], "1 of 2 clips are missing"),
        ([{"video": "car.mp4", "microscope": ["x"]}, {"video": "bus.mp4", "microscope": ["x"]}], "no copilot entries"),
        ([{"video": "car.mp4"} | both], "leaves none to train on"),
        ([{"video": "../car.mp4"} | both, {"video": "bus.mp4"} | both], "../car.mp4"),
        ([{"clip": "car.mp4"}], "clip"),
    ):
        with pytest.raises(ConfigError) as caught:
            check(rows, modes=("microscope", "copilot"))
        assert word in str(caught.value), str(caught.value)


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_curves_with_few_values_own_panels_and_nothing(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null, "kl": 0.1}\n')
    training.plot_curves(metrics, tmp_path / "a.png")
    training.plot_curves(metrics, tmp_path / "b.png", {"KL": ["kl"], "reward": ["reward"]})
    training.plot_curves(tmp_path / "none.jsonl", tmp_path / "c.png")
    assert (tmp_path / "a.png").is_file() and (tmp_path / "b.png").is_file() and not (tmp_path / "c.png").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "metrics.jsonl"]


def test_smoothing_has_no_bias_towards_the_start():
    assert training._smooth([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0, 2.0, 2.0])
