"""The model: shapes and counts, exact log-probabilities, generation, what trains, checkpoints."""

import hashlib
import json
import os
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import model as model_module
from dataset import IGNORE_INDEX, MODES, NOBODY, PREFIX, collate, encode_example, pack_examples
from model import (
    DriveVLM,
    ModelError,
    Projector,
    VisionTower,
    adapter_hash,
    check_head,
    check_pooling,
    choose_dtype,
    packed_mask,
    packed_positions,
    resolve_dtype,
    token_logps,
    tokens_per_frame,
)
from training.common import git_commit, is_other_base
from training.loop import make_optimizer

T = 2  # frames
QUESTIONS = ["Describe the video in detail.", "Red car?", "Summarize the driving scene concisely. Then wait."]


@pytest.fixture(params=["llm", "llm_plain"])
def llm(tiny, request):
    """A Qwen-like folder; and one whose template adds a system turn, without vision tokens, padded with eos."""
    return getattr(tiny, request.param)


def build(tiny, llm=None, dtype="float32", **options):
    return DriveVLM.from_base(tiny.vision, llm or tiny.llm, num_frames=T, dtype=dtype, seed=1, **options)


def with_adapter(tiny, llm=None, dtype="float32", dropout=0.0, spread=0.3):
    """A stage-2 model whose adapter is not the identity; with a large spread its answers vary."""
    model = build(tiny, llm, dtype)
    model.add_lora(4, 8, dropout, seed=3)
    model.set_trainable("lora", "projector")
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, spread)
    return model


def clips(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, T, 96, 96, 3), dtype=torch.uint8, generator=generator)


def batch(model, answers=("The red car stops.", "Bus.")):
    """Right-padded training rows as `collate` makes them."""
    rows = [encode_example(model.tokenizer, QUESTIONS[0], a, model.num_visual_tokens, 200) for a in answers]
    length = max(len(row["input_ids"]) for row in rows)

    def pad(row, key, value):
        return row[key] + [value] * (length - len(row[key]))

    return {
        "frames": clips(len(rows)),
        "input_ids": torch.tensor([pad(row, "input_ids", model.pad_token_id) for row in rows]),
        "labels": torch.tensor([pad(row, "labels", IGNORE_INDEX) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"]))
                                        for row in rows]),
    }


def file_hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.safetensors")}


# ---- sizes


def test_full_size_counts_are_those_of_the_documents(tiny):
    """SigLIP2-SO400M and Qwen3-4B with 16 frames, on the meta device: the numbers that the documents give."""
    vision_config = SiglipVisionConfig(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
                                       num_attention_heads=16, image_size=384, patch_size=14, vision_use_head=False)
    llm_config = Qwen3Config(vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
                             num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
                             max_position_embeddings=262144)
    with torch.device("meta"):
        vision = VisionTower(SiglipVisionModel(vision_config))
        llm = AutoModelForCausalLM.from_config(llm_config)
        model = DriveVLM(vision, llm, AutoTokenizer.from_pretrained(tiny.llm), num_frames=16, dtype="bfloat16",
                         pooling=3, seed=0, base={})
        assert (model.tokens_per_frame, model.num_visual_tokens) == (81, 1296)
        assert model.set_trainable("projector", "temporal") == {
            "projector": 33_100_800, "temporal": 18_432, "lora": 0, "vision": 0, "llm": 0}
        model.add_lora(32, 64, 0.05, seed=0)
    assert sum(hasattr(module, "lora_A") for module in model.llm.modules()) == 252
    expected = {"projector": 33_100_800, "temporal": 0, "lora": 66_060_288, "vision": 0, "llm": 0}
    assert model.set_trainable("lora", "projector") == expected
    assert model.set_trainable("lora") == expected | {"projector": 0}
    table = model.trainable_table()
    assert "66,060,288" in table and "33,100,800" in table


@pytest.mark.parametrize(("image", "patch", "sizes"), [(224, 16, "12x12 (image_size 192) or 15x15 (image_size 240)"),
                                                       (16, 8, "3x3 (image_size 24)")])
def test_a_grid_that_does_not_divide_is_refused_with_valid_sizes(image, patch, sizes):
    with pytest.raises(ModelError) as error:
        check_pooling(SiglipVisionConfig(image_size=image, patch_size=patch), 3)
    assert sizes in str(error.value)
    assert check_pooling(SiglipVisionConfig(image_size=384, patch_size=14), 3) == 27


def test_pooling_can_be_set_and_is_kept_in_the_checkpoint(tiny, tmp_path):
    model = build(tiny, pooling=2)  # the tower has 12 x 12 patches
    assert model.tokens_per_frame == 36 and tokens_per_frame(tiny.vision, 2) == (36, 96)
    assert model.encode_video(clips(1)).shape == (1, T * 36, 64)
    folder = model.save_checkpoint(tmp_path / "model")
    again = DriveVLM.from_checkpoint(folder)
    assert again.pooling == 2 and torch.equal(again.projector.fc1.weight, model.projector.fc1.weight)
    meta = json.loads((folder / "drivevlm.json").read_text())
    del meta["pooling"]  # as written before it was a key: then 3 is assumed, which these weights do not fit
    (folder / "drivevlm.json").write_text(json.dumps(meta))
    with pytest.raises(ModelError, match="projector.fc1.weight"):
        DriveVLM.from_checkpoint(folder)
    with pytest.raises(ModelError, match="valid pooling here: 1, 2, 3, 4, 6, 12"):
        build(tiny, pooling=5)
    assert tokens_per_frame("nobody/nothing", 3) is None


@pytest.mark.parametrize("cuda, flags, aten, expected", [
    (True, set(), None, "bfloat16"), (False, {"avx2"}, None, "float32"), (False, {"avx512f"}, None, "float32"),
    (False, {"avx2", "avx512_bf16"}, None, "bfloat16"), (False, {"amx_bf16"}, "", "bfloat16"),
    (False, {"bf16"}, None, "bfloat16"), (False, {"avx2", "avx512_bf16"}, "avx2", "float32"),
    (True, set(), "avx2", "bfloat16"),
])
def test_auto_means_bfloat16_where_it_is_native(cuda, flags, aten, expected):
    dtype, reason = choose_dtype(cuda, flags, aten)
    assert dtype == expected and reason


def test_auto_is_resolved_and_said(capsys):
    assert resolve_dtype("float32") == "float32" and capsys.readouterr().err == ""
    assert resolve_dtype("auto") in ("bfloat16", "float32") and "(auto: " in capsys.readouterr().err


def test_weights_that_a_checkpoint_does_not_hold_are_not_lost_silently(tiny, tmp_path):
    model = build(tiny)
    model.set_trainable("projector", "vision")
    with pytest.raises(ModelError, match="vision were trained, but a checkpoint does not hold them"):
        model.save_checkpoint(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_learning_rates_must_be_those_of_what_trains(tiny):
    model = with_adapter(tiny)
    with pytest.raises(ModelError, match="given for lora, but what trains is lora, projector"):
        make_optimizer(model, {"lora": 1e-3})


def test_another_base_model_is_told_from_one_that_has_moved(tmp_path):
    (tmp_path / "old" / "tower").mkdir(parents=True)
    old = str(tmp_path / "old" / "tower")
    assert is_other_base(old, str(tmp_path / "other")) and is_other_base("org/a", "org/b")
    assert not is_other_base(old, old) and not is_other_base(old, str(tmp_path / "new" / "tower"))
    assert not is_other_base(str(tmp_path / "gone"), "anywhere") and not is_other_base("demo/base/x", "/abs/base/x")


def test_a_checkpoint_trained_with_other_prompts_prints_a_note(tiny, tmp_path, capsys, monkeypatch):
    folder = build(tiny).save_checkpoint(tmp_path / "model")
    DriveVLM.from_checkpoint(folder)
    assert "trained to answer" not in capsys.readouterr().err
    monkeypatch.setitem(MODES, "copilot", "One line, please.")
    DriveVLM.from_checkpoint(folder)
    said = capsys.readouterr().err
    assert "'Summarize the driving scene concisely.' (copilot); it is now asked 'One line, please.'" in said


def test_space_to_depth_keeps_each_cell_together():
    projector = Projector(6, 3, 5, 7)
    seen = {}
    projector.fc1.register_forward_hook(lambda module, args, output: seen.update(x=args[0]))
    patches = torch.randn(2, 36, 5)
    assert projector(patches).shape == (2, 4, 7)
    square = patches.view(2, 6, 6, 5)
    for cell in range(4):
        y, x = 3 * (cell // 2), 3 * (cell % 2)
        assert torch.equal(seen["x"][:, cell], square[:, y:y + 3, x:x + 3].reshape(2, -1))


# ---- the pass


def test_encode_video_adds_temporal_embeddings_and_projects(tiny, monkeypatch):
    model = build(tiny)
    frames = clips(3)
    visual = model.encode_video(frames)
    assert visual.shape == (3, T * 16, 64)
    pixels = frames[1, 1].permute(2, 0, 1)[None] / 127.5 - 1
    patches = model.vision.model(pixel_values=pixels).last_hidden_state + model.temporal[1]
    assert torch.allclose(visual[1, 16:], model.projector(patches)[0], atol=1e-5)
    monkeypatch.setattr(model_module, "FRAMES_PER_PASS", 4)
    assert torch.allclose(model.encode_video(frames), visual, atol=1e-5)
    for wrong in (frames.float(), frames[:, :1], frames[:, :, :90]):
        with pytest.raises(ModelError, match="frames are"):
            model.encode_video(wrong)


def test_embed_puts_visual_tokens_in_order(tiny):
    model = build(tiny)
    ids, _ = model.prompt_batch(QUESTIONS[:2])
    visual = torch.randn(2, model.num_visual_tokens, 64)
    embeds = model.embed(ids, visual)
    places = ids == model.placeholder_id
    assert torch.equal(embeds[places].view_as(visual), visual)
    assert torch.equal(embeds[~places], model.causal_lm.get_input_embeddings()(ids)[~places])
    for rows, tokens in ((ids, visual[:, 1:]), (ids[:1], visual), (ids[:, :-20], visual[:1])):
        with pytest.raises(ModelError, match="placeholder"):
            model.embed(rows, tokens)


def test_loss_and_gradients_equal_those_of_a_plain_forward(tiny, llm):
    model = build(tiny, llm)
    model.set_trainable("projector", "temporal")
    inputs = batch(model)
    out = model(**inputs)
    out["loss"].backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert set(ours) == {"temporal"} | {f"projector.{n}" for n, _ in model.projector.named_parameters()}

    model.zero_grad()
    embeds = model.embed(inputs["input_ids"], model.encode_video(inputs["frames"]))
    logits = model.causal_lm(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    plain.backward()
    assert out["num_tokens"] == (inputs["labels"] != IGNORE_INDEX).sum()
    assert torch.allclose(out["loss"], plain, atol=1e-5)
    for name, grad in ours.items():
        assert torch.allclose(grad, model.get_parameter(name).grad, atol=1e-6), name
    share = model(**inputs, num_items_in_batch=torch.tensor(50), ids=["a", "b"])
    assert torch.allclose(share["loss"], share["loss_sum"] / 50) and torch.allclose(share["loss_sum"], out["loss_sum"])


def entries_of_two_clips():
    """Three texts of one clip and one of another, as (clip, question, answer)."""
    return [(0, QUESTIONS[0], "The red car stops. " * 3), (0, QUESTIONS[2], "Bus."), (0, QUESTIONS[1], "Yes, it is."),
            (1, QUESTIONS[2], "A truck merges.")]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_of_several_texts_give_the_loss_and_gradients_of_plain_rows(tiny, llm, checkpointing):
    model, frames = with_adapter(tiny, llm), clips(2)
    model.activation_checkpointing(checkpointing)
    model.train()
    entries = entries_of_two_clips()
    examples = [encode_example(model.tokenizer, question, answer, model.num_visual_tokens, 200)
                for _, question, answer in entries]
    rows = [{"id": str(k), "frames": frames[clip], **example}
            for k, ((clip, *_), example) in enumerate(zip(entries, examples, strict=True))]
    packed = [{"id": "a", "frames": frames[0], **pack_examples(examples[:3], model.placeholder_id)},
              {"id": "b", "frames": frames[1], **pack_examples(examples[3:], model.placeholder_id)}]

    def run(rows):
        model.zero_grad()
        batch = collate(rows, model.pad_token_id)
        out = model(**batch)
        out["loss"].backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return out, gradients, int((batch["attention_mask"]).sum())

    (plain, expected, num_plain), (shared, found, num_shared) = run(rows), run(packed)
    assert shared["num_tokens"] == plain["num_tokens"] > 20
    assert num_shared < num_plain - model.num_visual_tokens
    torch.testing.assert_close(shared["loss"], plain["loss"], rtol=1e-5, atol=1e-6)
    assert found.keys() == expected.keys() and len(found) > 10
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)


def test_positions_restart_behind_the_prefix():
    owner = torch.tensor([[PREFIX, PREFIX, PREFIX, 0, 0, 1, 1, 1, NOBODY], [PREFIX, 1, 1, 2, *[NOBODY] * 5]])
    assert packed_positions(owner).tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0], [0, 1, 2, 1, 0, 0, 0, 0, 0]]
    visible = packed_mask(owner, torch.float32)[0, 0] == 0  # [L, L]
    assert visible[6].tolist() == [True] * 3 + [False] * 2 + [True] * 2 + [False] * 2
    assert visible[1].tolist() == [True] * 2 + [False] * 7


def test_no_label_gives_a_zero_loss_with_a_graph(tiny):
    model = build(tiny)
    model.set_trainable("projector", "temporal")
    inputs = batch(model)
    inputs["labels"].fill_(IGNORE_INDEX)
    loss = model(**inputs)["loss"]
    loss.backward()
    assert loss == 0
    for parameter in (*model.projector.parameters(), model.temporal):
        assert parameter.grad is not None and not parameter.grad.any()


def test_cache_and_left_padding_do_not_change_hidden_states(tiny, llm):
    model = build(tiny, llm)
    ids, mask = model.prompt_batch(QUESTIONS)
    embeds = model.embed(ids, model.encode_video(clips(3)))
    whole = model.hidden_states(embeds, mask)
    cache = DynamicCache(config=model.causal_lm.config)
    first = model.hidden_states(embeds[:, :-3], mask[:, :-3], past_key_values=cache, use_cache=True)
    rest = model.hidden_states(embeds[:, -3:], mask, past_key_values=cache, use_cache=True)
    joined = torch.cat([first, rest], 1)
    assert torch.allclose(joined[mask.bool()], whole[mask.bool()], atol=1e-5)
    alone = mask[1].bool()
    assert torch.allclose(model.hidden_states(embeds[1:2, alone], mask[1:2, alone])[0], whole[1, alone], atol=1e-5)
    with pytest.raises(ModelError, match="position_ids"):
        model.hidden_states(embeds, mask[:, None, None].float())


def test_bfloat16_trains_float32_masters(tiny):
    exact, model = with_adapter(tiny), with_adapter(tiny, dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and exact.dtype == torch.float32
    for name, parameter in model.named_parameters():
        frozen = name.split(".")[0] in ("vision", "llm") and "lora_" not in name
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name
    losses = [m(**batch(m))["loss"] for m in (exact, model)]
    assert losses[1].dtype == torch.float32 and torch.allclose(*losses, atol=0.05)
    losses[1].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in exact.parameters())


def test_activation_checkpointing_changes_nothing_but_memory(tiny, llm):
    """Also in stage 1, where the LM is frozen: its layers must still be recomputed, so that they are run twice."""
    grads, passes = [], []
    for enabled in (False, True):
        model = build(tiny, llm)
        model.set_trainable("projector", "temporal")
        model.activation_checkpointing(enabled)
        counted = []
        layer = model.causal_lm.get_decoder().layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, seen=counted: seen.append(1))
        model(**batch(model))["loss"].backward()
        grads.append(model.projector.fc1.weight.grad)
        passes.append(len(counted))
    assert passes == [1, 2]
    assert torch.equal(*grads)


def test_decoding_restores_everything(tiny):
    model = with_adapter(tiny, dropout=0.5)
    model.activation_checkpointing(True)
    before = {name: module.training for name, module in model.named_modules()}
    with model.decoding():
        assert not any(module.training for module in model.modules())
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    with pytest.raises(ZeroDivisionError), model.decoding():
        raise ZeroDivisionError
    assert before == {name: module.training for name, module in model.named_modules()}
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert before[""] and not before["vision"]


# ---- log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("banned", [None, [0, 7, 12]])
def test_token_logps_equal_log_softmax(temperature, banned):
    torch.manual_seed(0)
    hidden, head = torch.randn(23, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    targets, weights = torch.randint(13, 40, (23,)), torch.randn(23)
    banned = None if banned is None else torch.tensor(banned)
    logps, entropy = token_logps(hidden, head, targets, temperature=temperature, banned=banned, chunk=5)
    (logps * weights).sum().backward()
    grad, hidden.grad = hidden.grad, None
    assert head.grad is None and not entropy.requires_grad

    logits = hidden @ head.detach().T / temperature
    if banned is not None:
        logits[:, banned] = float("-inf")
    plain = logits.log_softmax(-1)
    chosen = plain.gather(1, targets[:, None])[:, 0]
    (chosen * weights).sum().backward()
    assert torch.allclose(logps, chosen, atol=1e-5)
    assert torch.allclose(grad, hidden.grad, atol=1e-5)
    assert torch.allclose(entropy, torch.distributions.Categorical(logits=logits).entropy(), atol=1e-5)


def test_token_logps_are_float32_under_autocast():
    """bfloat16 operands, float32 sums: autocast around it must not round the logits."""
    torch.manual_seed(0)
    hidden = torch.randn(9, 64).bfloat16().requires_grad_()
    head, targets = (torch.randn(50, 64) * 3).bfloat16(), torch.randint(0, 50, (9,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps, _ = token_logps(hidden, head, targets, chunk=4)
    exact = (hidden.float() @ head.float().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert logps.dtype == torch.float32 and torch.allclose(logps, exact, atol=1e-4)
    logps.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16


def test_token_logps_of_no_tokens_are_empty():
    hidden = torch.randn(0, 8, requires_grad=True)
    logps, entropy = token_logps(hidden, torch.randn(5, 8), torch.zeros(0, dtype=torch.long), banned=torch.tensor([1]))
    logps.sum().backward()
    assert logps.shape == entropy.shape == (0,) and hidden.grad.shape == (0, 8)
    torch.manual_seed(0)
    both = [token_logps(torch.ones(2, 8), torch.ones(5, 8), torch.tensor([1, 4]), banned=b)[0]
            for b in (None, torch.tensor([], dtype=torch.long))]
    assert torch.equal(*both)


# ---- what is refused at load


def tiny_llm_config(cls, **options):
    return cls(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
               num_key_value_heads=1, head_dim=16, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_head_refuses_scaled_and_capped_logits(dtype):
    torch.manual_seed(0)
    check_head(LlamaForCausalLM(tiny_llm_config(LlamaConfig)).to(dtype).eval())
    capped = Gemma2ForCausalLM(tiny_llm_config(Gemma2Config, final_logit_softcapping=50.0))
    scaled = GraniteForCausalLM(tiny_llm_config(GraniteConfig, logits_scaling=1.1))
    for llm in (capped, scaled):
        with pytest.raises(ModelError, match="scaled or capped"):
            check_head(llm.to(dtype).eval())


def test_missing_base_models_are_listed_together(tiny, tmp_path):
    with pytest.raises(ModelError) as error:
        DriveVLM.from_base(tmp_path / "no_tower", tmp_path / "no_llm")
    text = str(error.value)
    assert "vision_model" in text and "no_tower" in text and "language_model" in text and "no_llm" in text
    with pytest.raises(ModelError, match="bfloat16, float32"):
        DriveVLM.from_base(tiny.vision, tiny.llm, dtype="float16")


def test_naflex_tower_is_refused(tiny, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "siglip2_vision_model"}', encoding="utf-8")
    with pytest.raises(ModelError, match="siglip2_vision_model.*fixed-resolution"):
        DriveVLM.from_base(tmp_path, tiny.llm)


def test_the_vision_tower_is_loaded_from_a_two_tower_checkpoint(tiny, tmp_path):
    """As google/siglip2-so400m-patch14-384 is published: text tower and pooling head are in the file too."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(text_config=small | {"vocab_size": 20}, vision_config=small | {"image_size": 96,
                                                                                       "patch_size": 8})
    full = SiglipModel(config).eval()
    full.save_pretrained(tmp_path)
    model = DriveVLM.from_base(tmp_path, tiny.llm, num_frames=T, dtype="float32")
    pixels = torch.randn(1, 3, 96, 96)
    ours = model.vision.model(pixel_values=pixels).last_hidden_state
    assert torch.equal(ours, full.vision_model(pixel_values=pixels).last_hidden_state)
    assert not any("head" in name for name, _ in model.vision.named_parameters())


def test_base_weights_that_lack_a_tensor_are_refused(tiny, tmp_path):
    for file in tiny.vision.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    dropped = sorted(weights)[0]
    del weights[dropped]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lack 1 tensors"):
        DriveVLM.from_base(tmp_path, tiny.llm)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot load"):
        DriveVLM.from_base(tmp_path, tiny.llm)


def test_too_many_frames_for_the_language_model_are_refused(tiny):
    with pytest.raises(ModelError, match="4160 visual tokens.*4096"):
        DriveVLM.from_base(tiny.vision, tiny.llm, num_frames=260)


def test_dropout_of_base_models_is_off(tiny, tmp_path):
    config = LlamaConfig.from_pretrained(tiny.llm_plain, attention_dropout=0.5)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny.llm_plain).save_pretrained(tmp_path)
    model = build(tiny, tmp_path)
    model.set_trainable("projector", "temporal")
    assert torch.equal(model(**batch(model))["loss"], model(**batch(model))["loss"])


def test_building_depends_on_the_seed_and_leaves_the_global_generator_alone(tiny):
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first, second = build(tiny), build(tiny)
    first.add_lora(2, 4, 0.0, seed=8)
    second.add_lora(2, 4, 0.0, seed=8)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.projector.fc1.weight, second.projector.fc1.weight)
    assert adapter_hash(first.adapter_state()) == adapter_hash(second.adapter_state())
    other = DriveVLM.from_base(tiny.vision, tiny.llm, num_frames=T, dtype="float32", seed=2)
    assert not torch.equal(first.projector.fc1.weight, other.projector.fc1.weight)


# ---- what trains


def test_each_stage_trains_its_groups_and_no_others(tiny):
    model = build(tiny)
    projector = sum(p.numel() for p in model.projector.parameters())
    assert not any(p.requires_grad for p in model.parameters()) and model.stage == 0
    nothing = {"projector": 0, "temporal": 0, "lora": 0, "vision": 0, "llm": 0}
    assert model.set_trainable("projector", "temporal") == nothing | {"projector": projector, "temporal": T * 32}
    with pytest.raises(ModelError, match="add_lora"):
        model.set_trainable("lora", "projector")
    model.add_lora(4, 8, 0.05, seed=0)
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert model.set_trainable("lora", "projector") == nothing | {"projector": projector, "lora": lora}
    drops = [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    assert len(drops) == 14 and all(m.training for m in drops)
    assert model.set_trainable("lora") == nothing | {"lora": lora}
    model.set_lora_dropout(0.0)
    assert not any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    assert model.training and not model.vision.training and not model.vision.model.encoder.training
    with pytest.raises(ModelError, match="already"):
        model.add_lora(4, 8, 0.05, seed=0)
    with pytest.raises(ModelError, match="no group 'projectr'; valid: projector, temporal, lora"):
        model.set_trainable("projectr")


def test_a_wrong_trained_group_stops_the_run(tiny):
    model = with_adapter(tiny, dtype="bfloat16")
    model.temporal.requires_grad_(True)
    model.causal_lm.get_decoder().norm.weight.requires_grad_(True)
    model.projector.fc1.bias.requires_grad_(False)
    with pytest.raises(ModelError) as error:
        model.check_trainable()
    text = str(error.value)
    assert "temporal: 64 parameters train, expected 0" in text and "llm: 64" in text and "projector" in text
    assert "not float32" in text


def test_the_table_shows_what_trains(tiny):
    lines = with_adapter(tiny).trainable_table().splitlines()
    assert [line.split()[0] for line in lines] == ["group", "projector", "temporal", "lora", "vision", "llm", "all"]
    assert lines[2].split()[1:] == ["64", "-", "float32"] and len({line.rfind(",") < 60 for line in lines}) == 1


# ---- answers


def greedy_by_hand(model, frames, question, max_new_tokens):
    """No cache, no padding, no generate() of transformers: one full pass per token."""
    ids, _ = model.prompt_batch([question])
    made = []
    while len(made) < max_new_tokens and (not made or made[-1] not in model.end_ids):
        row = torch.cat([ids, torch.tensor([made], dtype=torch.long)], 1)
        hidden = model.hidden_states(model.embed(row, model.encode_video(frames)), torch.ones_like(row))
        logits = hidden[0, -1] @ model.head_weight.T
        logits[model.banned_ids] = float("-inf")
        made.append(logits.argmax().item())
    return made


def test_a_batch_of_unequal_lengths_gives_the_answers_of_single_generation(tiny, llm):
    model = with_adapter(tiny, llm, spread=1.2)
    frames = clips(3)
    said = model.generate(frames, QUESTIONS, max_new_tokens=12)[0].ids
    model.end_ids = model.end_ids + [next(i for i in said if i != said[0])]  # so that rows end at different lengths
    together = model.generate(frames, QUESTIONS, max_new_tokens=12)
    for i, answer in enumerate(together):
        assert answer == model.generate(frames[i:i + 1], QUESTIONS[i:i + 1], max_new_tokens=12)[0]
        assert answer.ids == greedy_by_hand(model, frames[i:i + 1], QUESTIONS[i], 12)
        assert answer.ended == (answer.ids[-1] in model.end_ids)
        said = answer.ids[:-1] if answer.ended else answer.ids
        assert not set(said) & set(model.end_ids) and answer.text == model.tokenizer.decode(said).strip()
    assert together[0].ended and len({len(answer.ids) for answer in together}) > 1
    visual = model.encode_video(frames)
    assert together == model.generate(None, QUESTIONS, max_new_tokens=12, visual=visual)


def test_end_and_banned_ids_come_from_template_tokenizer_and_generation_config(tiny):
    model = build(tiny)
    ids = model.tokenizer.convert_tokens_to_ids
    assert model.end_ids == [ids("<|im_end|>"), ids("<|endoftext|>")]  # template, generation config, tokenizer
    banned = {ids(t) for t in ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
                               "<|video_pad|>")} | set(range(len(model.tokenizer), 384))
    assert set(model.banned_ids.tolist()) == banned
    plain = build(tiny, tiny.llm_plain)
    assert plain.end_ids == [2] and set(plain.banned_ids.tolist()) == {0, 1, 3, 4, *range(350, 352)}
    assert plain.pad_token_id == 2


def test_banned_ids_are_never_generated(tiny):
    model = build(tiny)
    with torch.no_grad():  # make all banned ids the likeliest by far
        model.causal_lm.get_decoder().norm.weight.fill_(1.0)
        model.head_weight[model.banned_ids] = model.head_weight[model.banned_ids].sign() * 5
    for options in ({}, {"temperature": 1.0, "num_samples": 4, "seed": 0}):
        for answer in model.generate(clips(1), QUESTIONS[:1], max_new_tokens=16, **options):
            assert not set(answer.ids) & set(model.banned_ids.tolist())


def test_the_default_generation_config_is_not_used(tiny, recwarn):
    """The fixture's generation_config samples at 0.7 with top_k 20 and top_p 0.8, as Qwen3's does."""
    model = build(tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        greedy = [model.generate(clips(2), QUESTIONS[:2], max_new_tokens=6) for _ in range(2)]
        assert greedy[0] == greedy[1]
        model.end_ids = [383]  # ends nothing
        wide = model.generate(clips(1), QUESTIONS[:1], max_new_tokens=40, temperature=50.0, num_samples=10, seed=1)
    assert len({i for answer in wide for i in answer.ids}) > 150  # top_k 20 would give far fewer


def test_sampled_tokens_follow_the_distribution_of_the_model(tiny):
    model = build(tiny)
    with torch.no_grad():
        model.causal_lm.get_decoder().norm.weight.mul_(8)
    answers = model.generate(clips(1), QUESTIONS[:1], max_new_tokens=1, temperature=1.3, num_samples=800, seed=0)
    ids, mask = model.prompt_batch(QUESTIONS[:1])
    hidden = model.hidden_states(model.embed(ids, model.encode_video(clips(1))), mask)[0, -1]
    logits = hidden @ model.head_weight.T / 1.3
    logits[model.banned_ids] = float("-inf")
    counts = torch.bincount(torch.tensor([a.ids[0] for a in answers]), minlength=384) / 800
    assert (counts - logits.softmax(-1)).abs().sum() < 0.45  # 800 draws give 0.35; at temperature 1 it would be 0.7


def test_samples_depend_on_the_seed_and_leave_the_global_generator_alone(tiny):
    model = build(tiny)

    def ask(seed):
        return model.generate(clips(2), QUESTIONS[:2], max_new_tokens=5, temperature=1.0, num_samples=3, seed=seed)

    torch.manual_seed(4)
    state = torch.get_rng_state()
    first = ask(7)
    assert torch.equal(state, torch.get_rng_state())
    assert len(first) == 6 and first == ask(7) and first != ask(8)
    assert ask(None) != ask(None)


def test_generate_in_training_leaves_the_model_as_it_was(tiny):
    model = with_adapter(tiny, dtype="bfloat16", dropout=0.3)
    model.activation_checkpointing(True)
    answers = model.generate(clips(2), QUESTIONS[:2], max_new_tokens=4)
    assert model.training and answers == model.generate(clips(2), QUESTIONS[:2], max_new_tokens=4)
    assert model.check_trainable()["lora"] > 0


@pytest.mark.parametrize(("options", "message"), [
    ({"num_samples": 2}, "temperature above 0"), ({"max_new_tokens": 0}, "at least 1"),
    ({"temperature": -1.0}, "at least 0"), ({"questions": []}, "1 clips but 0 questions"),
])
def test_generate_refuses_numbers_that_make_no_sense(tiny, options, message):
    with pytest.raises(ModelError, match=message):
        build(tiny).generate(clips(1), **{"questions": QUESTIONS[:1], "max_new_tokens": 3, **options})


# ---- checkpoints


def test_a_checkpoint_comes_back_the_same(tiny, llm, tmp_path):
    model = with_adapter(tiny, llm, dropout=0.05)
    model.save_checkpoint(tmp_path / "run" / "model")
    again = DriveVLM.from_checkpoint(tmp_path / "run", expect_stage=2)  # a run folder works like its model/
    assert again.stage == 2 and again.dtype == torch.float32 and again.tokenizer.get_vocab() == (
        model.tokenizer.get_vocab())
    assert not any(p.requires_grad for p in again.parameters()) and not again.training
    mine, theirs = model.eval().state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    frames = clips(2)
    assert model.generate(frames, QUESTIONS[:2], max_new_tokens=6) == again.generate(frames, QUESTIONS[:2],
                                                                                    max_new_tokens=6)
    assert again.set_trainable("lora", "projector") == model.check_trainable()
    meta = json.loads((tmp_path / "run" / "model" / "drivevlm.json").read_text(encoding="utf-8"))
    assert meta["stage"] == 2 and meta["num_frames"] == T and meta["tokens_per_frame"] == 16
    assert meta["prompts"] == MODES and meta["language_model"]["name"] == str(llm)
    assert meta["placeholder"] == ("<|video_pad|>" if llm == tiny.llm else "<extra_1>")
    assert meta["lora"] == {"r": 4, "alpha": 8, "dropout": 0.05} and meta["pooling"] == 3
    assert meta["git_commit"] == git_commit()
    assert DriveVLM.from_checkpoint(tmp_path / "run", dtype="bfloat16").dtype == torch.bfloat16


def test_the_folder_holds_what_trains_and_nothing_else(tiny, tmp_path):
    model = with_adapter(tiny)
    model.save_checkpoint(tmp_path / "model")
    names = {path.relative_to(tmp_path / "model").as_posix() for path in (tmp_path / "model").rglob("*.*")}
    assert names == {"clips.json", "drivevlm.json", "projector.safetensors", "adapter/adapter_config.json",
                     "adapter/adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
                     "chat_template.jinja"}
    projector = load_file(tmp_path / "model" / "projector.safetensors")
    assert set(projector) == {"temporal"} | {f"projector.{n}" for n, _ in model.projector.named_parameters()}
    adapter = load_file(tmp_path / "model" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 28 and all(".lora_A." in name or ".lora_B." in name for name in adapter)  # not the tied head


def test_plain_peft_loads_the_adapter(tiny, llm, tmp_path):
    model = with_adapter(tiny, llm).eval()
    model.save_checkpoint(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    ids = torch.tensor([[5, 9, 77, 120]])
    without = base(ids).logits
    plain = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter").eval()
    assert torch.equal(plain(ids).logits, model.llm(ids).logits)
    assert not torch.allclose(plain(ids).logits, without, atol=1e-3)


@pytest.mark.parametrize("key, value", [("bias", ""), ("rank_pattern", {"(": 4}), ("r", "x"), ("target_modules", 3)])
def test_an_adapter_config_that_peft_cannot_use_is_an_error_of_the_checkpoint(key, value, tiny, tmp_path):
    folder = with_adapter(tiny).save_checkpoint(tmp_path / "model")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ModelError, match="adapter_config.json|does not fit|LoRA wraps"):
        DriveVLM.from_checkpoint(folder)


def test_a_reference_copy_of_the_adapter_is_not_saved(tiny, tmp_path):
    model = with_adapter(tiny)
    model.save_checkpoint(tmp_path / "two")
    model.llm.load_adapter(tmp_path / "two" / "adapter", adapter_name="reference")
    counts = model.set_trainable("lora")
    assert counts["lora"] == sum(t.numel() for t in model.adapter_state().values())
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".reference." in name)
    model.save_checkpoint(tmp_path / "three")
    assert [p.name for p in (tmp_path / "three" / "adapter").iterdir() if p.is_dir()] == []
    assert file_hashes(tmp_path / "two") == file_hashes(tmp_path / "three")
    assert adapter_hash(tmp_path / "three") == adapter_hash(model.adapter_state("reference"))
    assert adapter_hash(tmp_path / "three" / "adapter") == adapter_hash(model.adapter_state())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_stage_changes_the_bytes_of_its_own_modules_only(tiny, tmp_path, dtype):
    """A step of each stage, each from the folder of the one before; what is frozen is written back bit for bit."""
    bases = [file_hashes(tiny.vision), file_hashes(tiny.llm)]
    model = build(tiny, dtype=dtype)
    trains = {1: ("projector", "temporal"), 2: ("lora", "projector"), 3: ("lora",)}
    for stage, groups in trains.items():
        if stage > 1:
            model = DriveVLM.from_checkpoint(tmp_path / f"stage{stage - 1}", expect_stage=stage - 1)
        if stage == 2:
            model.add_lora(4, 8, 0.05, seed=0)
        model.set_trainable(*groups)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
        for _ in range(2):  # LoRA's A gets a gradient once B is not 0
            model(**batch(model))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_checkpoint(tmp_path / f"stage{stage}", stage=stage)
        after = DriveVLM.from_checkpoint(tmp_path / f"stage{stage}").state_dict()
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        expected = {name for name, p in model.named_parameters() if p.requires_grad}
        assert changed == expected, stage
    assert bases == [file_hashes(tiny.vision), file_hashes(tiny.llm)]


def test_wrong_folders_are_refused_with_all_problems(tiny, tmp_path):
    model = with_adapter(tiny)
    folder = model.save_checkpoint(tmp_path / "model")
    with pytest.raises(ModelError, match="it holds stage 2, but stage 1 is needed here$"):
        DriveVLM.from_checkpoint(folder, expect_stage=1)
    with pytest.raises(ModelError, match="no checkpoint folder at"):
        DriveVLM.from_checkpoint(tmp_path / "nothing")
    with pytest.raises(ModelError, match="has no drivevlm.json"):
        DriveVLM.from_checkpoint(tiny.llm)
    (folder / "projector.safetensors").unlink()
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError) as error:
        DriveVLM.from_checkpoint(folder, expect_stage=3)
    text = str(error.value)
    assert "stage 3 is needed" in text and "projector.safetensors is missing" in text
    assert "adapter/adapter_model.safetensors is missing" in text
    (folder / "drivevlm.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="is not JSON"):
        DriveVLM.from_checkpoint(folder)


def test_wrong_shapes_are_refused(tiny, tmp_path):
    model = with_adapter(tiny)
    folder = model.save_checkpoint(tmp_path / "model")
    state = load_file(folder / "projector.safetensors")
    save_file(state | {"temporal": torch.zeros(3, 32), "extra": torch.zeros(1)}, folder / "projector.safetensors")
    with pytest.raises(ModelError) as error:
        DriveVLM.from_checkpoint(folder)
    assert "temporal is [3, 32], needs [2, 32]" in str(error.value) and "extra is unknown" in str(error.value)
    (folder / "projector.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ModelError, match="projector.safetensors cannot be read"):
        DriveVLM.from_checkpoint(folder)
    save_file(state, folder / "projector.safetensors")
    path = folder / "adapter" / "adapter_model.safetensors"
    adapter = load_file(path)
    name = next(iter(adapter))
    save_file({key: value for key, value in adapter.items() if key != name}, path)
    with pytest.raises(ModelError, match=f"{name} is missing"):
        DriveVLM.from_checkpoint(folder)
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "IA3"}', encoding="utf-8")
    with pytest.raises(ModelError, match="'IA3', not 'LORA'"):
        DriveVLM.from_checkpoint(folder)


def test_base_models_may_move_but_must_fit(tiny, tmp_path):
    """They may be elsewhere later; others that do not fit are refused before their weights are read."""
    folder = with_adapter(tiny).save_checkpoint(tmp_path / "model")
    moved = tmp_path / "elsewhere"
    moved.symlink_to(tiny.llm)
    assert DriveVLM.from_checkpoint(folder, language_model=moved).base["language_model"]["name"] == str(moved)
    with pytest.raises(ModelError) as error:
        DriveVLM.from_checkpoint(folder, vision_model=tmp_path / "gone")
    assert "gone" in str(error.value)
    config = SiglipVisionConfig(hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                image_size=96, patch_size=8, vision_use_head=False)
    SiglipVisionModel(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(ModelError, match="does not fit"):
        DriveVLM.from_checkpoint(folder, vision_model=tmp_path / "wide")


def test_relative_base_paths_stay_relative(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.root)
    model = DriveVLM.from_base("vision", "llm", num_frames=T, dtype="float32")
    model.set_trainable("projector", "temporal")
    model.save_checkpoint(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "drivevlm.json").read_text())["vision_model"]["name"] == "vision"
    assert DriveVLM.from_checkpoint(tmp_path / "model", expect_stage=1).stage == 1


def test_saving_is_all_or_nothing(tiny, tmp_path, monkeypatch):
    model = build(tiny)
    model.set_trainable("projector", "temporal")
    model.save_checkpoint(tmp_path / "model")
    before = file_hashes(tmp_path / "model")
    with torch.no_grad():
        model.temporal.add_(1.0)
    monkeypatch.setattr(model.tokenizer, "save_pretrained", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_checkpoint(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"] and file_hashes(tmp_path / "model") == before
    monkeypatch.undo()
    (tmp_path / ".model.tmp" / "adapter").mkdir(parents=True)  # of a save that was killed
    model.save_checkpoint(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"] and file_hashes(tmp_path / "model") != before


def test_adapter_hash_sees_every_bit(tiny, tmp_path):
    model = with_adapter(tiny)
    state = model.adapter_state()
    name = next(iter(state))
    other = state | {name: state[name].clone()}
    assert adapter_hash(state) == adapter_hash(other)
    other[name].view(torch.int32)[0, 0] ^= 1
    assert adapter_hash(state) != adapter_hash(other)
    build(tiny).save_checkpoint(tmp_path / "bare")
    with pytest.raises(ModelError, match="holds no adapter"):
        adapter_hash(tmp_path / "bare")
    with pytest.raises(ModelError, match="no adapter"):
        build(tiny).adapter_state()
