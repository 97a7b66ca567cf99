"""Configuration: defaults, YAML, flags, and that every program declares only the keys that it reads."""

import ast
import dataclasses
import errno
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from training import config as configs
from training.common import ConfigError, cpu_count, load_config, run_main
from training.config import Stage1Config, Stage2Config, Stage3Config, TrainKeys

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Detector:
    """Detector"""

    weights: str = "yolov8x.pt"  # weights file
    image_size: int = 1280  # pixels
    threshold: float = 0.5  # confidence


@dataclass
class Config(TrainKeys):
    """Test stage"""

    learning_rate: float = 1e-3  # peak learning rate
    detector: Detector = field(default_factory=Detector)  # the detector
    checkpoint: list[str] = field(default_factory=list)  # NAME=FOLDER
    limits: dict[str, int] = field(default_factory=lambda: {"microscope": 3, "copilot": 4})  # tokens
    no_video: bool = False  # rows only


def problems_of(capsys, *argv, cls=Config, **kwargs):
    """The lines of the one message that `argv` causes on stderr, exit code 2."""
    with pytest.raises(ConfigError) as caught:
        load_config(cls, list(argv), **kwargs)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.strip() == str(caught.value)
    return err.split("\n  - ")[1:]


def test_flags_override_yaml_and_yaml_overrides_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 5e-4\nseed: 7\nepochs: 3\ndetector: a.pt\nlimits: {copilot: 9}\n")
    config = load_config(Config, ["--config", str(file), "--seed", "8"])
    assert (config.num_frames, config.learning_rate, config.seed, config.epochs) == (16, 5e-4, 8, 3)
    assert isinstance(config, Config) and config.detector == Detector("a.pt", 1280)
    assert config.limits == {"copilot": 9}  # a mapping is replaced: what the file leaves out is not in it


def test_none_is_understood_in_yaml_and_flags(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("max_steps: none\nframe_cache: none\ninit_from: null\nresume: none\n")
    config = load_config(Config, ["--config", str(file)])
    assert (config.max_steps, config.frame_cache, config.init_from, config.resume) == (None, None, None, "none")


def test_the_word_none_stays_a_word_where_a_key_has_no_none():
    flags = ["--resume", "none", "--max_kl", "none", "--report_to", "none", "--advantage_scale", "none"]
    config = load_config(Stage3Config, flags)
    assert (config.resume, config.max_kl) == ("none", None)
    assert (config.report_to, config.advantage_scale) == ("none", "none")


def test_flags_may_have_dashes_underscores_equals_signs_and_nested_keys():
    config = load_config(Config, ["--learning-rate", "2e-4", "--per_device-batch_size=3", "--no-video", "--detector",
                                  "b.pt", "--detector.image-size", "640", "--checkpoint", "a=x", "b=y", "--max-steps",
                                  "none", "--output-dir=with-dash", "--activation_checkpointing", "false",
                                  "--limits.copilot", "7"])
    assert (config.learning_rate, config.per_device_batch_size, config.no_video) == (2e-4, 3, True)
    assert config.detector == Detector("b.pt", 640) and config.checkpoint == ["a=x", "b=y"]
    assert config.max_steps is None and config.output_dir == "with-dash" and config.activation_checkpointing is False
    assert config.limits == {"microscope": 3, "copilot": 7}
    config = load_config(Config, ["--no-activation-checkpointing", "--max_steps", "null", "--checkpoint", "--epochs=2"])
    assert (config.activation_checkpointing, config.max_steps, config.checkpoint) == (False, None, [])
    assert load_config(Config, ["--activation_checkpointing"]).activation_checkpointing is True
    assert load_config(Config, ["--data", "{what???}"]).data == "{what???}"


def test_yaml_may_hold_nested_mappings(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("detector:\n  weights: c.pt\n  image_size: 320\n")
    assert load_config(Config, ["--config", str(file)]).detector == Detector("c.pt", 320)
    file.write_text("detector:\n  wieghts: c.pt\n")
    with pytest.raises(ConfigError, match="detector: .*'weights'"):
        load_config(Config, ["--config", str(file)])


def test_all_problems_are_reported_at_once_with_the_nearest_key(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("learnin_rate: 1\nepochs: many\ndtype: float16\n")
    found = problems_of(capsys, "stray", "--config", str(file), "--num-frame", "8", "--seed", "1.5", "--dtype", "x",
                        "--detector.wieghts", "a.pt")
    assert len(found) == 8
    text = "\n".join(found)
    assert "unknown key learnin_rate (did you mean 'learning_rate'?)" in text
    assert "epochs: Value 'many' of type 'str' could not be converted to Integer" in text
    assert "dtype: Invalid value 'float16', expected one of ['auto', 'bfloat16', 'float32']" in text
    assert "unknown flag --num_frame (did you mean 'num_frames'?)" in text
    assert "unknown flag --detector.wieghts (did you mean 'detector.weights'?)" in text
    assert "--seed: Value '1.5' of type 'str' could not be converted to Integer" in text
    assert "--dtype: Invalid value 'x', expected one of ['auto', 'bfloat16', 'float32']" in text
    assert "'stray' belongs to no flag" in text


@pytest.mark.parametrize("argv, word", [
    (["--epochs", "0"], "epochs must be above 0, got 0"),
    (["--warmup", "2"], "warmup must be between 0 and 1"),
    (["--learning_rate", "nan"], "command line: --learning_rate must be a finite number, got nan"),
    (["--max_grad_norm", "inf"], "command line: --max_grad_norm must be a finite number, got inf"),
    (["--seed", "-1"], "command line: --seed must be at least 0 and below 2**63, got -1"),
    (["--split_seed", "-1"], "command line: --split_seed must be at least 0 and below 2**63, got -1"),
    (["--activation_checkpointing", "perhaps"], "--activation_checkpointing: Value 'perhaps' is not a valid bool"),
    (["--report_to", "mlflow"], "--report_to: Invalid value 'mlflow', expected one of ['tensorboard', 'trackio', 'wa"),
    (["--seed"], "command line: --seed: the value is missing"),
    (["--seed", "3", "4"], "command line: '4' belongs to no flag"),
    (["--data", "???"], "--data: '???' refers to another key"),
    (["--max_new_tokens.sketch", "9"], "unknown flag --max_new_tokens.sketch (did you mean"),
    (["--no_seed"], "unknown flag --no_seed (did you mean 'seed'?)"),
    (["--lr", "1e-3"], "unknown flag --lr (did you mean 'learning_rate'?)"),
    (["--config", "nowhere.yaml"], "config file nowhere.yaml not found"),
])
def test_values_that_cannot_work_are_refused(argv, word, capsys):
    assert any(word in line for line in problems_of(capsys, *argv))


@pytest.mark.parametrize("content, word", [
    ("a: [1\n", "not a valid YAML file"), ("- a\n- b\n", "key: value"), ("seed: 1\nseed: 2\n", "duplicate key"),
    ("seed: null\n", "seed: field 'seed' is not Optional"), ("data: [a, b]\n", "data: Cannot convert"),
    ("warmup: .nan\n", "c.yaml: warmup must be a finite number, got nan"), ("warmup: 1e-2x\n", "c.yaml: warmup: Value"),
    ("warmup: nan\n", "c.yaml: warmup must be a finite number, got nan"), ("seed: -1\n", "c.yaml: seed must be at lea"),
    ("detector: {threshold: -.inf}\n", "c.yaml: detector.threshold must be a finite number, got -inf"),
    ("warmup: ${x}\n", "c.yaml: warmup: '${x}' refers to another key"), ("data: ${x\n", "full_key: data"),
    ("data: ${oc.env:HOME}\n", "c.yaml: data: '${oc.env:HOME}' refers to another key"),
    ("detector: {weights: '${x}'}\n", "c.yaml: detector: {'weights': '${x}'} refers to another key"),
])
def test_broken_yaml_is_refused(content, word, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    assert any(word in line for line in problems_of(capsys, "--config", str(file)))


@pytest.mark.parametrize("value", ["${HOME}/clips", "${seed", "${oc.env:HOME}"])
def test_a_flag_that_refers_to_another_key_is_refused(value, capsys):
    assert any(f"--data: '{value}' refers to another key" in line for line in problems_of(capsys, "--data", value))


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.e-3", "+1e-3", "'1e-3'", "0.001"])
def test_numbers_with_an_exponent_need_no_dot(number, tmp_path, recwarn):
    """YAML 1.1, which most parsers follow, takes 1e-3 for a text."""
    file = tmp_path / "c.yaml"
    file.write_text(f"learning_rate: {number}\ndetector: {{threshold: {number}}}\n")
    config = load_config(Config, ["--config", str(file)])
    assert (config.learning_rate, config.detector.threshold) == (1e-3, 1e-3) and not list(recwarn)


# ---- what is printed into a pipe that nobody reads, or onto a full disk ----------------------------------------------


def unread(code, *argv, unbuffered=""):
    """Runs Python code whose standard output is a pipe that is closed before anything is written to it."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE,
                              text=True, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    finally:
        os.close(writing)


LOAD = "from training.common import *; from training.config import Stage3Config; "


@pytest.mark.parametrize("code, argv, exit_code, said", [
    (LOAD + "load_config(Stage3Config, default_config='configs/stage3.yaml')", ["--help"], 141, ""),
    (LOAD + "run_main(lambda: load_config(Stage3Config))", ["--help"], 141, ""),
    (LOAD + "run_main(lambda: print('x' * 100_000))", [], 141, ""),
    (LOAD + "run_main(lambda: print('short'))", [], 0, ""),
    (LOAD + "run_main(lambda: [print('short'), 1 / 0])", [], 1, "ZeroDivisionError"),
    (LOAD + "run_main(lambda: [print('short'), fail(['a'])])", [], 2, "1 problem"),
])
def test_a_reader_that_leaves_is_no_traceback(code, argv, exit_code, said):
    done = unread(code, *argv)
    assert done.returncode == exit_code and said in done.stderr
    assert said or not done.stderr


def test_a_reader_that_leaves_is_no_traceback_without_a_buffer():
    done = unread(LOAD + "run_main(lambda: print('short'))", unbuffered="1")
    assert done.returncode == 141 and not done.stderr


def test_a_pipe_other_than_standard_output_is_an_error():
    def main():
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError):
        run_main(main)


def test_a_full_disk_is_one_line():
    def broken(error):
        raise error

    for error, words in ((OSError(errno.ENOSPC, "No space left on device", "x.json"), "cannot write x.json: No space"),
                         (ValueError("I/O error: No space left on device (os error 28)"), "cannot write a file: No")):
        with pytest.raises(SystemExit, match=words):
            run_main(lambda error=error: broken(error))
    with pytest.raises(FileNotFoundError):
        run_main(lambda: broken(FileNotFoundError(errno.ENOENT, "No such file", "x.json")))


def test_keys_of_other_programs_may_be_in_the_file_but_not_on_the_command_line(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("judge: {weights: x.pt}\nlora_r: 3\nseed: 3\n")
    assert load_config(Stage1Config, ["--config", str(file)]).seed == 3
    assert "unknown flag --lora_r" in problems_of(capsys, "--lora_r", "3", cls=Stage1Config)[0]


def test_help_names_every_key_with_its_current_value(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 1234\n")
    with pytest.raises(SystemExit) as caught:
        load_config(Config, ["--help", "--config", str(file)], description="What this does.")
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "What this does." in text and "--config FILE" in text
    for key in Config.__dataclass_fields__:
        assert f"--{key}" in text, key
    assert "default: 1234)" in " ".join(text.split())
    assert "peak learning rate" in text and "--detector.image_size" in text


def test_a_flag_may_give_a_whole_table():
    """Single entries are changed by --reward_weights.objects 0; other names need the whole table."""
    config = load_config(configs.Stage3Config, ["--reward_weights", "{chair: 1, style: 0.5}"])
    assert config.reward_weights == {"chair": 1.0, "style": 0.5}
    assert load_config(configs.Stage3Config, ["--max-new-tokens", "{copilot: 9}"]).max_new_tokens == {"copilot": 9}
    flags = ["--mode_weights", "copilot", "2", "microscope", "1"]
    assert load_config(configs.Stage3Config, flags).mode_weights == {"copilot": 2.0, "microscope": 1.0}
    for flags, said in ((["--mode_weights", "copilot", "2", "x"], "'2' belongs to no flag"),
                        (["--reward_weights", "{chair: x}"], "--reward_weights: .*'x'"),
                        (["--reward_weights", "{chair"], "--reward_weights: "), (["--no_flag", "{a: 1}"], "no_flag"),
                        (["--seed", "{a: 1}"], "--seed: ")):
        with pytest.raises(ConfigError) as error:
            load_config(configs.Stage3Config, flags)
        assert re.search(said, error.value.text)


# ---- what is shipped -------------------------------------------------------------------------------------------------

PROGRAMS = {  # program: (its configuration, files that read it beyond the program's own)
    "train_stage1_ddp.py": (configs.Stage1Config, ["training/loop.py", "training/run_folder.py", "dataset.py"]),
    "train_stage2.py": (configs.Stage2Config, ["training/loop.py", "training/run_folder.py", "dataset.py"]),
    "train_stage3.py": (configs.Stage3Config, ["training/loop.py", "training/run_folder.py", "dataset.py",
                                               "stage3/rollout.py", "stage3/grpo.py", "stage3/language.py",
                                               "stage3/held_out.py"]),
    "stage3/detect_objects.py": (configs.DetectConfig, ["dataset.py"]),
    "stage3/import_boxes.py": (configs.ImportConfig, ["stage3/detect_objects.py", "dataset.py"]),
    "evaluate.py": (configs.EvaluateConfig, ["dataset.py", "evaluation/sheet.py", "evaluation/ratings.py",
                                              "evaluation/best_of.py"]),
    "export.py": (configs.ExportConfig, ["dataset.py"]),
    "app.py": (configs.AppConfig, ["dataset.py"]),
    "generate.py": (configs.GenerateConfig, ["dataset.py"]),
    "check_dataset.py": (configs.CheckConfig, ["dataset.py"]),
    "augment_captions.py": (configs.AugmentConfig, []),
}


def keys_read(path):
    """Attributes read from something called config or self.config in a file, and literal names given to getattr."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("config", "self.config"):
            found.add(node.attr)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_reads_every_key_that_it_declares(program):
    cls, others = PROGRAMS[program]
    read = set.union(*(keys_read(path) for path in (program, *others)))
    assert not set(cls.__dataclass_fields__) - read


def test_every_program_is_listed_here():
    programs = {cls for cls in vars(configs).values() if isinstance(cls, type) and issubclass(cls, configs.Config)
                and cls.__name__.endswith("Config")} - {configs.Config}
    assert programs == {cls for cls, _ in PROGRAMS.values()}


def test_cores_are_counted_where_the_system_has_no_affinity(monkeypatch):
    assert cpu_count() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert cpu_count() == 12


def test_the_check_of_a_data_set_does_not_wait_for_peft():
    """It takes two seconds to import, and brings torch's compiler with it."""
    code = "import check_dataset, sys; print({'peft', 'torch._dynamo'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_wrong_flags_never_wait_for_torch(program, tmp_path):
    """torch is replaced by a module that cannot be imported: a program that imports it before parsing flags fails."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    run = [sys.executable, "-m", program.removesuffix(".py").replace("/", ".")]
    for flag, code, word in (("--help", 0, "usage:"), ("--no_such_flag", 2, "unknown flag --no_such_flag")):
        done = subprocess.run([*run, flag], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == code and word in done.stdout + done.stderr, done.stderr


@pytest.mark.parametrize("name, cls", [("stage1", configs.Stage1Config), ("stage2", configs.Stage2Config),
                                       ("stage3", configs.Stage3Config), ("stage3", configs.DetectConfig)])
def test_the_real_configs_hold_the_default_values(name, cls):
    """A key that a demo config leaves out has the real recipe's value."""
    assert load_config(cls, ["--config", str(ROOT / "configs" / f"{name}.yaml")]) == cls()


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_demo_configs_hold_only_keys_that_differ(name):
    keys = yaml.safe_load((ROOT / "configs" / "demo" / f"{name}.yaml").read_text())
    programs = {"stage1": [configs.Stage1Config], "stage2": [configs.Stage2Config, configs.CheckConfig],
                "stage3": [configs.Stage3Config, configs.EvaluateConfig, configs.DetectConfig]}[name]
    for key, value in keys.items():
        defaults = [dataclasses.asdict(cls())[key] for cls in programs if key in cls.__dataclass_fields__]
        assert defaults and value not in defaults, key


def test_the_recipe_is_that_of_the_published_project():
    for config, values in ((Stage1Config(), (1e-3, 40, 16)), (Stage2Config(), (5e-5, 20, 32))):
        clips = config.per_device_batch_size * config.gradient_accumulation_steps
        assert (config.num_frames, config.num_val_videos, config.seed) == (16, 40, 42)
        assert (config.learning_rate, config.epochs, clips) == values
    config = Stage2Config()
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (32, 64, 0.05)
    assert (config.per_device_batch_size, config.lr_schedule) == (2, "cosine")
