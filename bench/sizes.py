"""Architecture numbers of the usual base models, and of cards: what bench/plan.py and bench/full_size.py build on."""

from dataclasses import dataclass

from training.config import Stage1Config, Stage2Config, Stage3Config

STAGES = {1: Stage1Config, 2: Stage2Config, 3: Stage3Config}
TOWER = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
             patch_size=14, vision_use_head=False)


def qwen3(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, positions=40960, theta=1000000.0):
    """Keys of a Qwen3Config; all sizes up to 4B share the rest."""
    return dict(vocab_size=151936, hidden_size=hidden_size, intermediate_size=intermediate_size,
                num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads, num_key_value_heads=8,
                head_dim=128, tie_word_embeddings=True, max_position_embeddings=positions,
                rope_parameters={"rope_type": "default", "rope_theta": theta})


QWEN3_4B = qwen3(2560, 9728, 36, 32, positions=262144, theta=5000000.0)  # of Qwen3-4B-Instruct-2507
TOWERS = {"google/siglip2-so400m-patch14-384": TOWER}
LANGUAGE_MODELS = {
    "Qwen/Qwen3-4B-Instruct-2507": QWEN3_4B,
    "Qwen/Qwen3-4B": qwen3(2560, 9728, 36, 32),
    "Qwen/Qwen3-1.7B": qwen3(2048, 6144, 28, 16),
    "Qwen/Qwen3-0.6B": qwen3(1024, 3072, 28, 16),
}


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet: memory, dense bfloat16 matrix products with float32 sums, memory bandwidth."""

    name: str
    gib: float
    tflops: float
    gb_per_second: float


CARDS = {
    "3060": Card("RTX 3060", 12, 25, 360),
    "4080": Card("RTX 4080", 16, 97, 717),
    "3090": Card("RTX 3090", 24, 71, 936),
    "4090": Card("RTX 4090", 24, 165, 1008),
    "a100": Card("A100 80 GB", 79, 312, 2039),
    "h100": Card("H100 80 GB", 79, 989, 3350),
    "h200": Card("H200", 139, 989, 4800),
}
