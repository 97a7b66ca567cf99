"""export.py: the merged folder answers as the checkpoint does, here and in transformers; what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import export
import generate
from dataset import MODES
from model import DriveVLM, ModelError, read_checkpoint
from training.common import ConfigError


def make_checkpoint(folder, tiny, llm, dtype="float32"):
    """A stage-2 checkpoint whose adapter changes the answers."""
    model = DriveVLM.from_base(tiny.vision, llm, num_frames=2, dtype=dtype, seed=1)
    model.add_lora(4, 8, 0.0, seed=3)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.3)
    model.clips = {"trained": ["a", "b", "c"], "held_out": ["d"]}
    return model.save_checkpoint(folder, stage=2)


@pytest.fixture(scope="module", params=["llm", "llm_plain"])
def checkpoint(request, tiny, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param) / "stage2", tiny, getattr(tiny, request.param))


def run_export(checkpoint, out, **flags):
    values = {"checkpoint": checkpoint, "output_dir": out} | flags
    return export.main([f"--{key}={value}" for key, value in values.items()])


def answer(checkpoint, tiny, capsys, mode="copilot"):
    capsys.readouterr()
    generate.main([f"--checkpoint={checkpoint}", f"--video={next(iter(sorted(tiny.videos.iterdir())))}", "--json=true",
                   f"--mode={mode}", "--max_new_tokens=24", "--dtype=float32"])
    return json.loads(capsys.readouterr().out)["text"]


def test_an_exported_folder_answers_as_the_checkpoint_does(checkpoint, tiny, tmp_path, capsys):
    assert run_export(checkpoint, tmp_path / "out") == 0
    texts = {}
    for mode in MODES:
        texts[mode] = answer(checkpoint, tiny, capsys, mode)
        assert answer(tmp_path / "out", tiny, capsys, mode) == texts[mode]
    without = read_checkpoint(checkpoint)[1]["language_model"]["name"]  # nor does the base model, where it is given
    capsys.readouterr()
    generate.main([f"--checkpoint={tmp_path / 'out'}", f"--video={sorted(tiny.videos.iterdir())[0]}", "--json=true",
                   "--mode=copilot", "--max_new_tokens=24", "--dtype=float32", f"--language_model={without}"])
    assert json.loads(capsys.readouterr().out)["text"] == texts["copilot"]
    plain = DriveVLM.from_base(tiny.vision, without, num_frames=2, dtype="float32", seed=1)
    state = load_file(checkpoint / "projector.safetensors")
    plain.load_state_dict(state, strict=False)
    plain.save_checkpoint(tmp_path / "plain", stage=1)
    assert answer(tmp_path / "plain", tiny, capsys) != texts["copilot"]  # or the adapter would say nothing here


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_the_sum_in_float32_rounded_once(tiny, tmp_path, dtype):
    folder = make_checkpoint(tmp_path / "stage2", tiny, tiny.llm, dtype)
    run_export(folder, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tiny.llm, dtype=dtype).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == getattr(torch, dtype)
    merged, adapter = merged.state_dict(), load_file(folder / "adapter" / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    changed = 0
    for name, weight in base.items():
        start = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{start}.lora_A.weight" in adapter:
            update = adapter[f"{start}.lora_B.weight"].double() @ adapter[f"{start}.lora_A.weight"].double()
            expected = (weight.double() + 2 * update).to(weight.dtype)  # alpha / r
            tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 0.008, "atol": 1e-7}
            torch.testing.assert_close(merged[name], expected, **tolerance)  # at most one step of bfloat16
            if dtype == "bfloat16":  # where float32 and float64 fall on different sides of a half
                assert (merged[name] != expected).float().mean() < 0.001
            changed += 1
        else:
            assert torch.equal(merged[name], weight)
    assert changed == 14  # all linear layers of two blocks


def test_a_prompt_of_embeddings_gives_the_same_answer_in_transformers(checkpoint, tiny, tmp_path, capsys):
    video = sorted(tiny.videos.iterdir())[0]
    run_export(checkpoint, tmp_path / "out")
    for source in (checkpoint, tmp_path / "out"):
        out = tmp_path / f"prompt of {source.name}"
        run_export(source, out, video=video, mode="copilot")
        meta = json.loads((out / f"{video.stem}.copilot.json").read_text())
        embeds = load_file(out / f"{video.stem}.copilot.safetensors")["prompt_embeds"]
        assert len(embeds) == meta["tokens"] and meta["question"] == MODES["copilot"]
        kinds = ("json", "safetensors")
        assert {path.name for path in out.iterdir()} == {f"{video.stem}.copilot.{kind}" for kind in kinds}
        llm = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        model = DriveVLM.from_checkpoint(checkpoint)
        ids = llm.generate(inputs_embeds=embeds[None], attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
                           do_sample=False, max_new_tokens=24, eos_token_id=meta["stop_token_ids"],
                           suppress_tokens=model.banned_ids.tolist() or None)[0].tolist()
        assert model.answer(ids).text == answer(checkpoint, tiny, capsys)


def test_prompt_embeddings_are_of_a_clip(checkpoint, tiny, tmp_path, capsys):
    with pytest.raises(ConfigError, match="--video: must be given"):
        run_export(checkpoint, tmp_path / "out", prompt_embeds="true")
    video = sorted(tiny.videos.iterdir())[0]
    for name, more in (("named", {"prompt_embeds": "true"}), ("implied", {})):
        run_export(checkpoint, tmp_path / name, video=video, mode="copilot", **more)
    named, implied = (sorted(path.read_bytes() for path in (tmp_path / name).iterdir())
                      for name in ("named", "implied"))
    assert named == implied and len(named) == 2


def test_the_model_card_names_what_went_in(checkpoint, tiny, tmp_path):
    run_export(checkpoint, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    meta = read_checkpoint(checkpoint)[1]
    for text in (meta["language_model"]["name"], meta["vision_model"]["name"], "3 clips (1 held out)", "Not measured",
                 MODES["copilot"], "not for the control of a vehicle", "stage 2 of Drive-VLM", "float32"):
        assert text in card, text
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "projector.safetensors", "drivevlm.json", "clips.json",
            "tokenizer.json"} <= files and "adapter" not in files
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_checkpoint_without_adapter_keeps_its_language_model(tiny, tmp_path, capsys):
    model = DriveVLM.from_base(tiny.vision, tiny.llm, num_frames=2, dtype="float32", seed=1)
    folder = model.save_checkpoint(tmp_path / "stage1", stage=1)
    run_export(folder, tmp_path / "out")
    assert answer(tmp_path / "out", tiny, capsys) == answer(folder, tiny, capsys)


def test_problems_are_listed_together_and_nothing_is_written(checkpoint, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError) as error:
        run_export(checkpoint / "gone", used, video="no.mp4", mode="poem", metrics="no.json")
    for text in ("is in use; give a folder that is empty", "no checkpoint folder at", "no such file: no.mp4",
                 "'poem' is none of microscope, copilot", "no such file: no.json"):
        assert text in str(error.value), text
    assert [path.name for path in tmp_path.iterdir()] == ["used"] and [p.name for p in used.iterdir()] == ["mine.txt"]
    with pytest.raises(ConfigError, match="--checkpoint: must be given"):
        export.main([])


def test_a_failed_export_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        run_export(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_not_exported_or_trained_on(checkpoint, tmp_path):
    run_export(checkpoint, tmp_path / "out")
    with pytest.raises(ConfigError, match="is an export already"):
        run_export(tmp_path / "out", tmp_path / "again")
    with pytest.raises(ModelError, match="it is an export: train on from the checkpoint that it was made of"):
        read_checkpoint(tmp_path / "out", expect_stage=2)
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(ModelError, match="config.json is missing"):
        read_checkpoint(tmp_path / "out")
