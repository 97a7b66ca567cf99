"""bench/plan.py: memory as it is planned, and as real steps take it; what a plan says of a configuration."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from torch._subclasses import FakeTensorMode
from transformers import AutoTokenizer, Qwen3Config, SiglipVisionConfig

from bench import plan
from bench.phases import GIB, Ledger, as_on_gpu, build, longest_answers, peak_of, phases_of, read_bases
from bench.plan_check import SIZES, checks
from bench.sizes import Card
from dataset import load_split
from training import loop
from training.common import ConfigError, load_config
from training.config import Stage2Config

ROOT = Path(__file__).resolve().parents[1]


def test_planned_memory_is_what_steps_take():
    """Fake tensors, real tensors under the same ledger, and what the system says of the process."""
    found = list(checks("small"))
    assert [stage["stage"] for stage in found] == [1, 2, 3]
    for stage in found:
        assert stage["planned"] == pytest.approx(stage["followed"], rel=0.001), stage
        assert stage["planned"] == pytest.approx(stage["measured"], rel=0.1), stage


def small(stage, layers=1, **keys):
    """(config, bases) of a small stage, of one layer because operations on fake tensors are slow too."""
    vision, language, shared, own = SIZES["small"]
    config = plan.STAGES[stage](**{"dtype": "float32", **shared, **own[stage], **keys})
    config.init_from = None
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/base/language")
    vision, language = (sizes | {"num_hidden_layers": layers} for sizes in (vision, language))
    return config, (SiglipVisionConfig(**vision), Qwen3Config(**language), tokenizer)


def test_a_ledger_follows_what_is_alive():
    ledger = Ledger()
    with ledger:
        x = torch.ones(1000)
        y = x.view(10, 100)[:, :50]
        assert (ledger.now, ledger.peak) == (4000, 4000)  # a view takes nothing
        z = y + 1
        assert ledger.now == 6000 and ledger.read == 2000
        del z
        assert (ledger.now, ledger.peak) == (4000, 6000)
        del x
        assert ledger.now == 4000  # y still holds it
        del y
    assert ledger.now == 0


def test_parameters_of_the_real_models():
    config = Stage2Config(dtype="bfloat16", init_from=None)
    parameters = build(config, 2, read_bases(config)).llm.parameters()
    assert sum(p.numel() * p.element_size() for p in parameters) / GIB == pytest.approx(7.74, abs=0.01)


def test_on_a_gpu_the_head_needs_no_copy_in_float32():
    """bfloat16 weights: on a CPU the head is widened, on a GPU its product is. The vocabulary is most of the model."""
    config, (vision, language, tokenizer) = small(1, dtype="bfloat16", per_device_batch_size=1)
    language.vocab_size = 200_000
    longest = longest_answers(config, 1)
    on_gpu, on_cpu = (phases_of(config, 1, (vision, language, tokenizer), longest, gpu=gpu) for gpu in (True, False))
    head = 200_000 * language.hidden_size * 4
    assert peak_of(on_cpu) - peak_of(on_gpu) == pytest.approx(head, rel=0.2)
    with as_on_gpu():
        model = build(config, 1, (vision, language, tokenizer))
        assert model.temporal.is_cuda
    assert not model.temporal.is_cuda


def test_gradients_and_optimizer_states_count():
    """Stage 1 trains the projector: a gradient and two moments of 4 bytes each; where passes add up, a second gradient
    beside the first."""
    peaks = []
    for passes in (1, 2):
        config, bases = small(1, per_device_batch_size=1, gradient_accumulation_steps=passes)
        bases[1].hidden_size, bases[0].hidden_size = 1024, 512  # the projector is most of the model
        phases = phases_of(config, 1, bases, {"microscope": 4})
        peaks.append(phases["forward and backward"].peak)
    trained = sum(p.numel() for p in build(config, 1, bases).parameters() if p.requires_grad)
    assert phases["optimizer"].peak - phases["load"].peak == pytest.approx(12 * trained, rel=0.01)
    assert peaks[1] - peaks[0] == pytest.approx(4 * trained, rel=0.2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_largest_batch_fits_and_the_next_does_not(stage):
    config, bases = small(stage, layers=2, per_device_batch_size=2)
    longest = longest_answers(config, stage)
    phases = phases_of(config, stage, bases, longest)
    budget = 3.3 * peak_of(phases)
    best = plan.largest_batch(config, stage, bases, phases, budget)
    peaks = []
    for size in (best, best + 1):
        changed, _ = small(stage, per_device_batch_size=size)
        peaks.append(peak_of(phases_of(changed, stage, bases, longest)))
    assert best > config.per_device_batch_size and peaks[0] <= budget < peaks[1]
    assert plan.largest_batch(config, stage, bases, phases, phases["load"].peak) == 0


def test_checkpointing_trades_memory_for_work():
    kept, bases = small(2, per_device_batch_size=4, activation_checkpointing=False)
    recomputed, _ = small(2, per_device_batch_size=4, activation_checkpointing=True)
    answers, name = {"microscope": 100}, "forward and backward"
    assert phases_of(recomputed, 2, bases, answers)[name].peak < 0.8 * phases_of(kept, 2, bases, answers)[name].peak
    more, less = (phases_of(config, 2, bases, answers, flops=True)[name].flops for config in (recomputed, kept))
    assert more > 1.2 * less


def test_flops_grow_with_rows():
    config, bases = small(2, per_device_batch_size=2, gradient_accumulation_steps=1)
    twice, _ = small(2, per_device_batch_size=4, gradient_accumulation_steps=1)
    one, two = (phases_of(c, 2, bases, {"microscope": 50}, flops=True)["forward and backward"] for c in (config, twice))
    assert two.flops == pytest.approx(2 * one.flops, rel=0.01)
    accumulated, _ = small(2, per_device_batch_size=2, gradient_accumulation_steps=3)
    three = phases_of(accumulated, 2, bases, {"microscope": 50}, flops=True)["forward and backward"]
    assert three.flops == 3 * one.flops and three.read == pytest.approx(3 * one.read, rel=0.02)


def test_a_shared_prefix_saves_work():
    config, bases = small(2, per_device_batch_size=1)
    shared, _ = small(2, per_device_batch_size=1, shared_prefix=True)
    answers = {"microscope": 60, "copilot": 20}
    apart, together = (phases_of(c, 2, bases, answers, flops=True)["forward and backward"].flops
                       for c in (config, shared))
    assert apart < together < 2 * apart  # a row of two texts against two rows


def test_a_stage_is_recognised_by_name_or_keys(tmp_path, capsys):
    for path in sorted(ROOT.glob("configs/**/stage*.yaml")):
        assert plan.recognise(path) == int(path.stem[-1]), path
    for stage, key in ((1, "pooling: 3"), (2, "lora_r: 8"), (3, "beta: 0.1")):
        (tmp_path / "mine.yaml").write_text(f"{key}\nnum_frames: 8\n")
        assert plan.recognise(tmp_path / "mine.yaml") == stage
    (tmp_path / "mine.yaml").write_text("num_frames: 8\n")
    with pytest.raises(ConfigError):
        plan.recognise(tmp_path / "mine.yaml")
    assert "--stage" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/1*gb/stage*.yaml")), ids=lambda path: path.parent.name)
def test_presets_for_smaller_cards_hold_only_keys_that_differ(path):
    stage = plan.recognise(path)
    config, default = load_config(plan.STAGES[stage], ["--config", str(path)]), plan.STAGES[stage]()
    keys = yaml.safe_load(path.read_text())
    assert keys and [key for key in keys if getattr(config, key) == getattr(default, key)] == []
    if config.init_from != default.init_from:  # what the preset of the stage before writes, of the same model
        before = load_config(plan.STAGES[stage - 1], ["--config", str(path.with_name(f"stage{stage - 1}.yaml"))])
        assert (before.output_dir, before.language_model) == (config.init_from, config.language_model)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_steps_are_those_of_the_script(tiny, stage, monkeypatch):
    config = plan.STAGES[stage](data=str(tiny.data), video_root=str(tiny.videos), num_val_videos=2, epochs=3,
                                per_device_batch_size=2, gradient_accumulation_steps=1)
    entries, usual, source = plan.read_data(config, stage, 999)
    train, _ = load_split(config)
    assert [entry.id for entry in entries] == [entry.id for entry in train] and "4 training clips" in source
    assert usual["microscope"] < 20  # the captions' own length
    assert plan.count_steps(config, stage, entries) == 12
    if stage < 3:
        assert loop.count_steps(config, train) == 12
        config.shared_prefix = True  # a row is a clip
        assert plan.count_steps(config, stage, entries) == loop.count_steps(config, train) == 6
    config.data = str(tiny.root / "none.json")
    entries, usual, source = plan.read_data(config, stage, 12)
    assert len(entries) == 20 and "12 clips by --clips" in source
    assert usual == plan.USUAL_ANSWER


def test_a_plan_of_local_models(tiny, tmp_path, capsys):
    """Sizes come from the folders' config.json; the exit code says whether it fits."""
    path = str(ROOT / "configs/demo/stage3.yaml")
    flags = ["--vision_model", str(tiny.vision), "--language_model", str(tiny.llm), "--num_frames", "4", "--dtype",
             "float32", "--num_generations", "3", "--per_device_batch_size", "1", "--data",
             str(tmp_path / "none.json"), "--init_from", str(tmp_path / "none")]
    assert plan.main(["--config", path, *flags, "--clips", "100", "--json", str(tmp_path / "plan.json")]) == 0
    out = capsys.readouterr().out
    assert "Fits" in out and "update: forward and backward" in out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["stage"] == 3 and written["fits"] and written["steps"] == 70
    waiting = {row["phase"]: row["calls"] * plan.CALL_SECONDS for row in written["phases"]}
    seconds = {row["phase"]: row["seconds"]["0.5"] for row in written["phases"]}
    assert seconds == pytest.approx(waiting, rel=0.01)  # the model is tiny: Python decides
    assert waiting["sampling: decoding"] > waiting["sampling: prefill"] > 0
    in_step = sum(row["seconds"]["0.5"] for row in written["phases"] if row["in_step"])
    assert written["hours"]["0.5"] == pytest.approx(70 * in_step / 3600)
    tight = plan.make_plan(plan.read_config(path, 3, flags), 3, Card("small", plan.RESERVED_GIB, 1, 1), 100)
    assert not tight["fits"] and tight["largest_batch"] == 0
    assert "DOES NOT FIT" in plan.plan_table(tight, path)


@pytest.mark.parametrize("fake", [True, False])
def test_calls_are_those_of_real_tensors(fake):
    with FakeTensorMode() if fake else contextlib.nullcontext():
        a = torch.ones(2, 3)
    with Ledger() as ledger:
        a @ a.t()  # a fake tensor is asked for its device here
    assert ledger.calls == 2


def test_where_python_does_not_decide_the_card_does(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "CALL_SECONDS", 0.0)
    flags = ["--vision_model", str(tiny.vision), "--language_model", str(tiny.llm), "--num_frames", "4", "--dtype",
             "float32", "--data", str(tmp_path / "none.json")]
    found = plan.make_plan(plan.read_config(str(ROOT / "configs/demo/stage1.yaml"), 1, flags), 1,
                           Card("small", 8, 1e-3, 1), 100, batch=False)
    for row in found["phases"]:
        promised = max(row["tflop"] / 1e-3, row["gb_read"] / 1)
        assert row["seconds"] == {"0.3": pytest.approx(promised / 0.3), "0.5": pytest.approx(promised / 0.5)}
    assert found["hours"]["0.3"] > found["hours"]["0.5"] > 0


def test_a_model_that_is_not_known_is_one_clear_error(tmp_path, capsys):
    with pytest.raises(ConfigError):
        plan.main(["--config", str(ROOT / "configs/stage1.yaml"), "--language_model", "some/model", "--vision_model",
                   str(tmp_path)])
    said = capsys.readouterr().err
    assert "2 problems" in said and "some/model" in said and "Qwen/Qwen3-1.7B" in said and "config.json" in said
