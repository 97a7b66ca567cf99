"""Small models and clips, made once per test session: random weights in the real file formats, no downloads."""

import json
import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # test_gpu.py needs one: make test-gpu

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like many chat models: inserts a system turn, has other turn markers, and ends the answer with eos.
SYSTEM_TEMPLATE = (
    "<s>[SYS]You are a helpful assistant.[/SYS]\n"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
TEXT = [
    "Describe the video in detail. Summarize the driving scene concisely. user assistant system",
    "A red car stops at the traffic light while a pedestrian crosses the road, then the light turns green.",
    "Truck ahead, bus oncoming, bicycle on the right. The ego vehicle slows down and waits.",
]
ROWS = [
    ("car.mp4", "A red car drives ahead, then it stops at the light.", "Red car ahead stops."),
    ("bus.mp4", "A bus passes on the left while the ego vehicle waits.", "Bus passes on the left, wait."),
    ("walk.mp4", "A pedestrian crosses the road and the car slows down.", "Pedestrian crosses, slow down."),
    ("truck.mp4", "A truck turns right after the traffic light changes to green.", "Truck turns right, go."),
    ("night.mp4", "At night a bicycle moves along the road before the car overtakes it.", "Night, bicycle overtaken."),
    ("stop.mp4", "The car brakes for a stop sign, then it continues.", "Stop sign, brake, continue."),
]


def train_tokenizer(folder, special, template, **named):
    """A byte-level BPE of about 350 tokens with the given control tokens, saved as a fast tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, **named)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_vision(folder, seed=0):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=96, patch_size=8, vision_use_head=False,
    )
    SiglipVisionModel(config).save_pretrained(folder)


def make_qwen(folder, seed=0):
    """A random Qwen3 with Qwen's control tokens, two end ids, and more embedding rows than tokens."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
               "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = train_tokenizer(folder, special, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, max_position_embeddings=4096,
    )
    llm = Qwen3ForCausalLM(config)
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    llm.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.8, top_k=20, eos_token_id=ends, pad_token_id=ends[1]
    )
    llm.save_pretrained(folder)


def make_llama(folder, seed=0):
    """A random Llama whose template inserts a system turn, with no vision tokens, padded with its eos."""
    from transformers import LlamaConfig, LlamaForCausalLM

    special = ["<unk>", "<s>", "</s>", "<extra_0>", "<extra_1>"]
    train_tokenizer(folder, special, SYSTEM_TEMPLATE, bos_token="<s>", eos_token="</s>", pad_token="</s>",
                    unk_token="<unk>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=352, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_clip(path, num_frames=20, width=320, height=180, seed=0, codec="mpeg4"):
    """A clip of a square that drifts over a coloured gradient; every frame differs."""
    import av

    rng = np.random.default_rng(seed)
    base = np.linspace(0, 200, width, dtype=np.uint8)[None, :, None] * np.ones((height, 1, 3), np.uint8)
    colour = rng.integers(50, 255, 3, dtype=np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(num_frames):
            frame = base.copy()
            x = 10 + t * (width - 70) // max(num_frames, 1)
            frame[60:110, x:x + 50] = colour
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)


def write_images(folder, frames, name="{:06d}.png", start=1, **options):
    """A folder of images, made of frames uint8 [N, H, W, 3]; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames, start):
        Image.fromarray(frame).save(folder / name.format(number), **options)
    return folder


def images_of(clip, folder, **options):
    """A folder of images with the frames of a clip."""
    from dataset import Clip

    with Clip(clip) as opened:
        return write_images(folder, opened.frames(range(len(opened.times))), **options)


def in_two_processes(function, log):
    """Run function(rank) in two processes that torch.distributed joins; what they print goes to the file `log` and is
    returned. As under torchrun, but forked from this process, which has imported all that is slow; test_survival.py
    and test_augment.py run torchrun itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with open(log, "a", buffering=1) as sys.stdout:
            sys.stderr = sys.stdout
            try:
                function(rank)
            except BaseException:
                traceback.print_exc()
                raise

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=(rank,), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(300)
            assert process.exitcode == 0, Path(log).read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
    return Path(log).read_text()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Paths of tiny base models, clips and captions: `.root .vision .llm .llm_plain .videos .data`."""
    root = tmp_path_factory.mktemp("tiny")
    paths = SimpleNamespace(root=root, vision=root / "vision", llm=root / "llm", llm_plain=root / "llm_plain",
                            videos=root / "videos", data=root / "captions.json")
    make_vision(paths.vision)
    make_qwen(paths.llm)
    make_llama(paths.llm_plain)
    paths.videos.mkdir()
    for seed, (name, _, _) in enumerate(ROWS):
        write_clip(paths.videos / name, seed=seed)
    rows = [{"video": v, "microscope": [m], "copilot": [c]} for v, m, c in ROWS]
    paths.data.write_text(json.dumps(rows), encoding="utf-8")
    return paths


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Runs draw no curves.png, which takes longer than their training; only runs of module fixtures and of tests marked
    `curves` draw it."""
    if "curves" not in request.keywords:
        monkeypatch.setattr("training.run_folder.plot_curves", lambda *_: None)


@pytest.fixture
def shared():
    """The folder of real captions, clip and tokenizer; tests that need it skip where it is missing."""
    if not (SHARED / "data" / "qwen3_tokenizer" / "tokenizer.json").is_file():
        pytest.skip("../shared/data is not beside this checkout")
    return SHARED / "data"
