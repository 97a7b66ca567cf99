"""Every key of every program: one dataclass per program, built from groups that several programs share.

The defaults are the real recipe (SigLIP2-SO400M, Qwen3-4B, one RTX 4090). The comment on a field's line is its help
text. `problems()` checks values only; what touches the disk is checked by the program, before anything slow starts.
A program declares only the keys that it reads (tests/test_config.py checks that). Contract: DESIGN section 8.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Words:
    """Numbers of words of one mode's answers, for all that looks at lengths."""

    usual: tuple[int, int]  # fewest and most of a usual answer: check_dataset.py, evaluate.py
    paid: tuple[int, int, int, int]  # at which the reward's length factor is 0, 1, 1 and 0, linear between
    function_words: tuple[int, int] | None = None  # at which that factor begins to fall, and is 0: a line is no prose
    asked: tuple[int, int] | None = None  # fewest and most that augment_captions.py asks for in a summary


WORDS = {
    # 300 real reports: 142 to 667 words, 95% under 482
    "microscope": Words(usual=(100, 1000), paid=(8, 32, 500, 900)),
    # toy lines: 12 to 27 words; captions summarised by augment_captions.py: 30 to 60
    "copilot": Words(usual=(5, 80), paid=(1, 4, 60, 100), function_words=(10, 35), asked=(30, 60)),
}


@dataclass
class Config:
    """Base of all programs' keys."""

    @classmethod
    def every_key(cls) -> set[str]:
        """Keys of all programs: one YAML file may serve several of them."""
        keys, classes = set(), [Config]
        while classes:
            known = classes.pop()
            keys |= set(known.__dataclass_fields__)
            classes += known.__subclasses__()
        return keys

    def problems(self) -> list[str]:
        """Values of the right type that cannot work, one line each."""
        return []

    def out_of_range(self, above=(), least=(), shares=()) -> list[str]:
        """One line for each value out of its range: `above` 0, at `least` 0, `shares` in [0, 1]; None is in range."""
        rules = [(above, "above 0", lambda x: x > 0), (least, "at least 0", lambda x: x >= 0),
                 (shares, "between 0 and 1", lambda x: 0 <= x <= 1)]
        found = []
        for keys, words, holds in rules:
            for key in keys:
                value = getattr(self, key)
                if value is not None and not holds(value):
                    found.append(f"{key} must be {words}, got {value}")
        return found


# ---- groups of keys --------------------------------------------------------------------------------------------------


@dataclass
class DataKeys(Config):
    """Clips, captions and the split."""

    data: str = "data/captions.json"  # captions: a JSON, JSONL or BDD-X CSV file, or a folder of them (see README)
    val_data: str | None = None  # captions of the held-out clips in a file of their own; none: split `data`
    video_root: str = "data/videos"  # folder that the rows' video paths are relative to
    num_val_videos: int = 40  # clips of `data` held out for evaluation, with all their entries
    split_seed: int = 42  # decides which clips are held out; must be the same in all stages
    default_mode: str | None = None  # mode of rows whose question is not known; none: such rows are errors
    # what decodes clips; auto: decord on x86-64 Linux and Windows, PyAV elsewhere (pixels of scaled frames differ by
    # a few levels, so use one reader in all stages)
    video_reader: Literal["auto", "decord", "pyav"] = "auto"

    def problems(self):
        return super().problems() + self.out_of_range(least=["num_val_videos"])


@dataclass
class BaseModelKeys(Config):
    """Base models and what the language model reads."""

    vision_model: str = "google/siglip2-so400m-patch14-384"  # SigLIP-style tower: a folder or a hub name
    language_model: str = "Qwen/Qwen3-4B-Instruct-2507"  # causal LM with a chat template: a folder or a hub name
    num_frames: int = 16  # frames read from each clip, first and last included
    max_text_tokens: int = 1024  # limit for question + answer + end token; longer answers are cut at a sentence

    def problems(self):
        found = super().problems() + self.out_of_range(above=["num_frames"])
        return found + ([] if self.max_text_tokens >= 8
                        else [f"max_text_tokens must be at least 8, got {self.max_text_tokens}"])


@dataclass
class TrainKeys(BaseModelKeys, DataKeys):
    """Training, all stages."""

    output_dir: str = "output/run"  # run folder: everything that this run writes
    init_from: str | None = None  # run or checkpoint folder of the stage before
    resume: str = "none"  # none | auto (continue from the last checkpoint) | a checkpoint folder
    seed: int = 42  # decides the order of clips, caption variants, augmentation, new weights, sampled answers
    # frozen weights and autocast (trained weights are float32); auto: bfloat16 on CUDA and on CPUs with native bfloat16
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    frame_cache: str | None = "output/frame_cache"  # folder of decoded frames, shared by all runs; none: no cache
    epochs: int = 1  # passes over the training entries
    max_steps: int | None = None  # optimizer steps; overrides epochs
    learning_rate: float = 1e-4  # peak learning rate
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"  # shape after the warm-up
    warmup: float = 0.03  # share of the steps over which the learning rate rises to its peak
    # share of the training prompts that are asked in another wording of their mode's question (dataset.MODE_TABLE)
    wordings: float = 0.5
    # name each frame's time in the clip before its visual tokens in the prompt, such as 2.1s: 4 or 5 tokens per frame.
    # Stage 1 decides; the later stages need the same value
    time_stamps: bool = False
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    per_device_batch_size: int = 1  # clips per forward pass of one process
    gradient_accumulation_steps: int = 1  # forward passes per optimizer step
    activation_checkpointing: bool = True  # recompute activations in the backward pass to save memory
    # compile the decoder blocks with torch.compile, which takes a minute at the start. Off until it is measured on a
    # GPU: on a CPU it gains nothing
    compile_blocks: bool = False
    eval_every: int = 50  # steps between evaluations on the held-out clips (also before the first step, after the last)
    sample_every: int = 100  # steps between sample answers about three held-out clips
    sample_tokens: int = 320  # longest sample answer, in tokens
    save_every: int = 100  # steps between checkpoints (also after the last step)
    keep_checkpoints: int = 2  # number of newest checkpoints that are kept
    # where curves and sample answers go beside metrics.jsonl; trackio and wandb are not installed with the rest
    report_to: Literal["tensorboard", "trackio", "wandb", "none"] = "tensorboard"
    max_failed_share: float = 0.01  # stop once more than this share of the clips could not be read

    def problems(self):
        return super().problems() + self.out_of_range(
            above=("epochs", "max_steps", "learning_rate", "max_grad_norm", "per_device_batch_size",
                   "gradient_accumulation_steps", "eval_every", "sample_every", "sample_tokens", "save_every",
                   "keep_checkpoints"),
            shares=("warmup", "max_failed_share", "wordings"))


@dataclass
class DetectorSettings:
    """A detector: how it looks at a clip, and what its boxes are taken to mean."""

    weights: str = "yolov8x.pt"  # a weights file, or a name that ultralytics offers for download (AGPL-3.0)
    image_size: int = 1280  # longer side of the frames as the detector sees them; 640 loses far traffic lights
    num_frames: int = 31  # frames that the detector runs on; k * (model's frames - 1) + 1 includes the model's own
    nms_iou: float = 0.7  # boxes of one class that overlap this much are merged
    # the detector's classes in our words (COCO_NAMES in stage3/vocabulary_config.py), or none to ignore one; all of
    # them where its names are not COCO's. What is not listed counts as unknown, never as absent
    classes: dict[str, str] = field(default_factory=dict)
    batch_size: int = 8  # frames per forward pass

    present_confidence: float = 0.5  # a class is present at this confidence in present_frames frames
    present_frames: int = 2  # number of such frames that it takes
    strong_confidence: float = 0.7  # ... or at this confidence in one frame
    absent_confidence: float = 0.25  # a class that stays below this is absent; in between it is unknown
    salient_area: float = 0.002  # a present class is salient (a caption should mention it) at this share of the frame
    salient_frames: int = 4  # ... or if it is present in this many frames
    merge_iou: float = 0.7  # car, truck and bus boxes that overlap this much are one body: the weaker is unknown

    def problems(self, name: str, lowest_confidence: float = 0.1) -> list[str]:
        """Values that cannot work. `name`: the key of these settings; boxes below `lowest_confidence` are not kept."""
        found = [f"{name}.{key} must be at least 1, got {getattr(self, key)}" for key in
                 ("image_size", "num_frames", "batch_size", "present_frames", "salient_frames")
                 if getattr(self, key) < 1]
        low, middle, high = self.absent_confidence, self.present_confidence, self.strong_confidence
        if not lowest_confidence <= low <= middle <= high <= 1:
            found.append(f"{name}: needs {lowest_confidence} <= absent_confidence <= present_confidence <= "
                         f"strong_confidence <= 1, got {low}, {middle}, {high}")
        return found


def judge_defaults() -> DetectorSettings:
    """Other weights and other frames than the reward's detector: its mistakes are not the judge's."""
    return DetectorSettings(weights="yolo11x.pt", image_size=1536, num_frames=46)


# ---- one class per program -------------------------------------------------------------------------------------------


@dataclass
class SupervisedKeys(TrainKeys):
    """Stages 1 and 2."""

    augment: bool = True  # change brightness and contrast of the training clips, differently in each epoch
    tower_cache: str | None = None  # folder for the frozen tower's features, made once per clip; needs augment: false
    # one row per clip with all of its entries behind the video, which is read once: batches count clips, not entries
    shared_prefix: bool = False
    num_workers: int = 4  # processes that read clips; 0: read in the training process

    def problems(self):
        found = self.out_of_range(least=["num_workers"])
        if self.tower_cache is not None and self.augment:
            found.append("tower_cache: its features are of clips as they are, so it needs augment: false")
        return super().problems() + found


@dataclass
class Stage1Config(SupervisedKeys):
    """train_stage1_ddp.py"""

    output_dir: str = "output/stage1"  # run folder: everything that this run writes
    pooling: int = 3  # patches per side that become one visual token (27x27 patches, pooling 3: 81 tokens per frame)
    epochs: int = 40  # passes over the training entries
    learning_rate: float = 1e-3  # peak learning rate of the projector and the temporal embeddings
    weight_decay: float = 0.01  # on the projector's matrices; biases and temporal embeddings have none
    per_device_batch_size: int = 4  # clips per forward pass of one process
    gradient_accumulation_steps: int = 4  # forward passes per optimizer step
    eval_every: int = 100  # steps between losses on the held-out clips (also before the first step, after the last)
    sample_every: int = 200  # steps between sample answers about three held-out clips
    save_every: int = 200  # steps between checkpoints (also after the last step)

    def problems(self):
        return super().problems() + self.out_of_range(above=["pooling"], least=["weight_decay"])


@dataclass
class Stage2Config(SupervisedKeys):
    """train_stage2.py"""

    output_dir: str = "output/stage2"  # run folder: everything that this run writes
    init_from: str | None = "output/stage1"  # stage 1's run folder
    epochs: int = 20  # passes over the training entries
    learning_rate: float = 5e-5  # peak learning rate of the LoRA adapters
    projector_learning_rate: float = 5e-5  # peak learning rate of the projector
    weight_decay: float = 0.01  # on the projector's matrices; biases and LoRA have none
    lora_r: int = 32  # rank of the adapters on every linear layer of the language model's blocks
    lora_alpha: int = 64  # the adapters' update is scaled by alpha / r
    lora_dropout: float = 0.05  # dropout on the adapters' input
    per_device_batch_size: int = 2  # clips per forward pass of one process
    gradient_accumulation_steps: int = 16  # forward passes per optimizer step

    def problems(self):
        found = self.out_of_range(above=("projector_learning_rate", "lora_r", "lora_alpha"),
                                  least=["weight_decay"])
        if not 0 <= self.lora_dropout < 1:
            found.append(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        return super().problems() + found


@dataclass
class RewardKeys(Config):
    """What stage 3 pays for."""

    # module:function (caption, evidence, mode, reference) -> dataclass of parts in [0, 1]
    reward: str = "stage3.grpo_reward_func:physics_aware_reward"
    # the reward is this weighted sum of its parts
    reward_weights: dict[str, float] = field(default_factory=lambda: {
        "objects": 0.40, "temporal": 0.25, "detail": 0.20, "hallucination": 0.15})
    detector: DetectorSettings = field(default_factory=DetectorSettings)  # detector whose evidence the reward checks
    evidence_cache: str = "output/evidence"  # folder of the detectors' boxes, one JSON per clip

    def problems(self):
        weights = self.reward_weights.values()
        if not weights or min(weights) < 0 or sum(weights) <= 0:
            return [*super().problems(), f"reward_weights must be at least 0 and not all 0, got {self.reward_weights}"]
        return super().problems()


@dataclass
class Stage3Config(RewardKeys, TrainKeys):
    """train_stage3.py"""

    output_dir: str = "output/stage3"  # run folder: everything that this run writes
    init_from: str | None = "output/stage2"  # stage 2's run folder; its adapter is also the KL's reference policy
    epochs: int = 2  # passes over the prompts
    learning_rate: float = 1e-5  # peak learning rate of the LoRA adapters
    warmup: float = 0.05  # share of the steps over which the learning rate rises to its peak
    per_device_batch_size: int = 1  # prompts per training pass of one process, each with all its answers
    gradient_accumulation_steps: int = 4  # training passes per optimizer step; all their prompts are sampled at once
    eval_every: int = 100  # steps between evaluations on held-out clips: loss, reward of greedy answers
    eval_batch_size: int = 4  # held-out prompts that are answered at once
    sample_every: int = 50  # steps between sample answers about three held-out clips
    save_every: int = 50  # steps between checkpoints (also after the last step)

    # prompts alternate between these modes; repeat a mode to sample it more often
    modes: list[str] = field(default_factory=lambda: ["microscope", "copilot"])
    # weight of each mode's loss in the step's; a mode left out: 1. Without weights, modes count alike, whatever the
    # number and length of their answers
    mode_weights: dict[str, float] = field(default_factory=dict)
    num_generations: int = 8  # answers sampled for each prompt: its group
    # longest answer per mode, in tokens; a mode left out: its limit in dataset.MODE_TABLE
    max_new_tokens: dict[str, int] = field(default_factory=lambda: {"microscope": 768, "copilot": 96})
    temperature: float = 1.0  # of sampling, and of all log-probs

    # what is learnt from a group: grpo, or, to compare with, raft (cross-entropy of its best answer) or dpo (prefer its
    # best answer to its worst)
    objective: Literal["grpo", "raft", "dpo"] = "grpo"
    # who samples the answers; reference: stage 2's adapter throughout (raft and dpo only), as in training on a data set
    # that was sampled beforehand
    sample_from: Literal["policy", "reference"] = "policy"
    dpo_beta: float = 0.2  # dpo's beta: the higher, the closer the policy stays to stage 2
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"  # how the loss is averaged over tokens (not dpo's)
    beta: float = 0.02  # weight of the KL to stage 2's adapter in grpo's loss; 0: no KL
    kl: Literal["k3", "k2"] = "k3"  # estimator of that KL
    epsilon: float = 0.2  # the probability ratio is clipped at 1 - epsilon
    epsilon_high: float = 0.28  # ... and at 1 + epsilon_high
    inner_epochs: int = 1  # updates made with one batch of answers
    # multiply an answer's reward by 1 to 0 as its worst tokens leave the range of stage 2's own samples
    judge_language: bool = True
    advantage_scale: Literal["group", "batch", "none"] = "group"  # std that advantages are divided by
    std_floor: float = 0.05  # lower bound on that std, so that tiny reward differences are not amplified
    mask_truncated: bool = True  # exclude truncated answers from the loss (they still count in the group mean)
    shared_prefix: bool = True  # process a prompt once for its whole group; false: for models that cannot mask so

    max_kl: float | None = 1.0  # stop when a step's mean KL per token exceeds this; none: never
    max_dead_steps: int | None = 20  # stop after this many consecutive steps without a group whose rewards differ
    # stop when, on the held-out clips, a mode's reward has risen while its lead over the reward of answers to another
    # clip has fallen to this share of what it was with stage 2; none: never
    stop_when_blind: float | None = 0.5
    # the result is the evaluated step with the highest held-out reward (mean of the modes), not the last step
    keep_best: bool = False

    def problems(self):
        found = self.out_of_range(
            above=("eval_batch_size", "temperature", "inner_epochs", "max_dead_steps", "dpo_beta"),
            least=("beta", "epsilon", "epsilon_high", "std_floor"), shares=["stop_when_blind"])
        if self.objective == "grpo" and self.sample_from == "reference":
            found.append("sample_from: reference does not go with objective: grpo, which learns from the policy's own "
                         "answers only")
        if self.num_generations < 2:
            found.append(f"num_generations must be at least 2 (answers are compared), got {self.num_generations}")
        if not self.modes:
            found.append("modes must name at least one mode")
        found += [f"max_new_tokens.{mode} must be above 0, got {limit}"
                  for mode, limit in self.max_new_tokens.items() if limit < 1]
        if self.keep_best and self.val_data is None and self.num_val_videos == 0:
            found.append("keep_best needs held-out clips: num_val_videos or val_data")
        found += [f"mode_weights.{mode} must be above 0, got {weight}"
                  for mode, weight in self.mode_weights.items() if weight <= 0]
        return super().problems() + found + self.detector.problems("detector")


@dataclass
class DetectConfig(DataKeys):
    """python -m stage3.detect_objects"""

    # the reward's settings (all clips) or the judge's (held-out clips, for evaluate.py)
    which: Literal["detector", "judge"] = "detector"
    detector: DetectorSettings = field(default_factory=DetectorSettings)  # detector whose evidence the reward checks
    # evaluate.py's detector, where there is no exact truth
    judge: DetectorSettings = field(default_factory=judge_defaults)
    evidence_cache: str = "output/evidence"  # folder of the detectors' boxes, one JSON per clip
    num_frames: int = 16  # frames that the model reads; the reward's detector must run on these too

    def problems(self):
        return super().problems() + getattr(self, self.which).problems(self.which)


@dataclass
class ImportConfig(DataKeys):
    """python -m stage3.import_boxes"""

    format: Literal["scalabel", "coco", "yolo"] = "scalabel"  # of the labels
    # the reward's evidence (labels of all clips) or the judge's (of the held-out clips, for evaluate.py)
    which: Literal["detector", "judge"] = "detector"
    detector: DetectorSettings = field(default_factory=DetectorSettings)  # weights: the labels, a file or a folder
    judge: DetectorSettings = field(default_factory=judge_defaults)  # the same for the judge
    evidence_cache: str = "output/evidence"  # folder of the boxes, one JSON per clip
    label_fps: float | None = None  # frame numbers per second of the labels; none: they are the clip's own

    def problems(self):
        return super().problems() + getattr(self, self.which).problems(self.which) + self.out_of_range(
            above=["label_fps"])


@dataclass
class EvaluateConfig(RewardKeys, DataKeys):
    """evaluate.py"""

    checkpoint: list[str] = field(default_factory=list)  # NAME=FOLDER, one or several: checkpoint or run folders
    output_dir: str = "output/evaluate"  # where predictions, metrics, table and page are written
    control: str = ""  # the checkpoint that is shown blank, swapped and reversed clips; default: stage2, else the last
    # changed clips that every checkpoint is shown as well: blank, swapped, middle (its middle frame only), shuffled,
    # reversed, dark
    controls: list[str] = field(default_factory=list)
    # BEFORE:AFTER, pairs of systems whose paired difference is shown; default: each checkpoint and the next
    compare: list[str] = field(default_factory=list)
    nll_under: str = ""  # checkpoint under which the NLL of all answers is measured; default: stage2, if there is one
    slices: str = ""  # JSON, {clip: {"night": true, "weather": "rain"}}: parts of the clips to score; default: truth
    baseline: str = ""  # metrics.json of an earlier run: exit 1 where something got worse beyond its interval
    # folder of clips without captions (or of images: one clip): ask about them instead of the held-out ones of `data`
    clips: str = ""
    caption_metrics: bool = False  # also BLEU, ROUGE-L and CIDEr against the held-out captions
    probes: bool = False  # also ask two questions about each clip: one class that it shows, one that it does not
    # JSON list of twins, held-out clips with one object removed: how often is that object still named? See demo.world
    twins: str = ""
    # also measure how sure the objects are that checkpoints name, for generate.py --hedge (evaluation/hedging.py)
    calibrate: bool = False
    unseen_wordings: bool = True  # also ask checkpoints in wordings that training never draws (mode_accuracy_unseen)
    truth: str = ""  # file of exact truth, as the toy world writes it; without it, the judge's evidence is the truth
    # detector that judges where there is no exact truth
    judge: DetectorSettings = field(default_factory=judge_defaults)
    # another judge, to see how far the two agree, and the scores on what they agree on; without weights: none
    second_judge: DetectorSettings = field(default_factory=lambda: DetectorSettings(weights=""))
    vision_model: str | None = None  # where the tower is now, if not where the checkpoint says
    language_model: str | None = None  # where the language model is now, if not where the checkpoint says
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # weights and autocast; auto: as fast as the machine allows
    frame_cache: str | None = "output/frame_cache"  # folder of decoded frames, shared by all runs; none: no cache
    # fewest and most words of an answer in range, per mode; a mode left out: dataset.MODE_TABLE
    word_range: dict[str, list[int]] = field(default_factory=dict)
    # longest answer per mode, longer than in training, so that rambling shows in the metrics
    eval_max_new_tokens: dict[str, int] = field(default_factory=dict)
    num_samples: int = 0  # extra rows with this many sampled answers per clip and mode
    temperature: float = 1.0  # of the sampled answers
    # an extra row, best-of-N: the best of this many sampled answers per clip and mode, by stage 3's reward (`reward`,
    # `reward_weights`) and the evidence of its `detector`
    best_of: int = 0
    best_of_checkpoint: str = ""  # the checkpoint that samples these; default: stage2, if there is one, else the last
    seed: int = 42  # of sampled answers, bootstrap draws and sheets
    eval_batch_size: int = 8  # clips that are answered at once
    # write a sheet for people with this many clips: the answers of two systems, from the predictions in output_dir
    sheet: int = 0
    sheet_systems: list[str] = field(default_factory=lambda: ["stage2", "stage3"])  # the two to compare
    sheet_modes: list[str] = field(default_factory=list)  # modes that the sheet asks about; default: all
    read_sheet: list[str] = field(default_factory=list)  # CSV files that raters gave back for the sheet in output_dir

    def problems(self):
        found = self.out_of_range(above=("eval_batch_size", "temperature"), least=("num_samples", "best_of"))
        found += ["best_of: the best of one answer is that answer"] if self.best_of == 1 else []
        found += [f"eval_max_new_tokens.{mode} must be above 0, got {limit}"
                  for mode, limit in self.eval_max_new_tokens.items() if limit < 1]
        found += word_range_problems(self.word_range) + self.sheet_problems()
        if self.second_judge.weights:
            found += self.second_judge.problems("second_judge")
        if self.clips and self.caption_metrics:
            found.append("caption_metrics: needs captions, and the clips of --clips have none")
        if self.clips and self.probes:
            found.append("probes: needs captions, and the clips of --clips have none")
        return super().problems() + found + ([] if self.truth else self.judge.problems("judge"))

    def sheet_problems(self):
        found = self.out_of_range(least=["sheet"])
        if len(self.sheet_systems) != 2 or len(set(self.sheet_systems)) != 2:
            found.append(f"sheet_systems must name two systems, got {self.sheet_systems}")
        if len(set(self.sheet_modes)) != len(self.sheet_modes):
            found.append(f"sheet_modes names a mode twice: {self.sheet_modes}")
        if self.sheet and self.read_sheet:
            found.append("sheet and read_sheet: write a sheet or read one, not both")
        return found + (self.detector.problems("detector") if self.sheet or self.best_of else [])


@dataclass
class GenerateConfig(Config):
    """generate.py"""

    checkpoint: str = ""  # checkpoint or run folder of any stage
    video: list[str] = field(default_factory=list)  # clips (files, or folders of images), or folders of clips
    video_reader: Literal["auto", "decord", "pyav"] = "auto"  # what decodes it; use the one of the training
    mode: str = "microscope"  # a mode of dataset.MODE_TABLE, or both
    question: str | None = None  # your own words instead of the mode's question
    window: float | None = None  # ask about stretches of so many seconds, not about the whole clip at once
    stride: float | None = None  # seconds from the start of one stretch to that of the next; none: no overlap
    output: str | None = None  # JSON Lines file to append the answers to; what it holds is not asked again
    detect: bool = False  # let a detector look for what the answer names, and say when and where it sees it
    detector: DetectorSettings = field(default_factory=DetectorSettings)  # that detector
    evidence_cache: str = "output/evidence"  # folder of the detector's boxes, one JSON per clip
    # mark the objects as unsure that are right with less than this probability, as calibrated on held-out clips
    hedge: float | None = None
    calibration: str = "output/evaluate/metrics.json"  # of evaluate.py --calibrate true, for --hedge
    max_new_tokens: int | None = None  # longest answer, in tokens; none: the mode's limit
    temperature: float = 0.0  # 0: greedy
    seed: int = 42  # of a sampled answer
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # weights and autocast; auto: as fast as the machine allows
    vision_model: str | None = None  # where the tower is now, if not where the checkpoint says
    language_model: str | None = None  # where the language model is now, if not where the checkpoint says
    json: bool = False  # print one JSON object a line: text, ended, tokens, seconds

    def problems(self):
        found = [f"--{key}: must be given" for key in ("checkpoint", "video") if not getattr(self, key)]
        if self.detect and self.window:
            found.append("--detect looks at whole clips, so it goes without --window")
        if self.hedge is not None and not 0 < self.hedge < 1:
            found.append(f"--hedge must be in (0, 1), got {self.hedge}")
        if self.hedge is not None and self.question:
            found.append("--hedge: answers to your own questions are not calibrated; it goes with --mode")
        return super().problems() + found + self.out_of_range(
            above=["max_new_tokens", "window", "stride"], least=["temperature"])


@dataclass
class AppConfig(Config):
    """app.py"""

    checkpoint: list[str] = field(default_factory=list)  # checkpoint or run folders of any stage, shown side by side
    video_root: str = "data/videos"  # folder of the clips that can be picked
    video_reader: Literal["auto", "decord", "pyav"] = "auto"  # what decodes them; use the one of the training
    detect: bool = True  # let a detector look for what the answers name
    detector: DetectorSettings = field(default_factory=DetectorSettings)  # that detector
    evidence_cache: str = "output/evidence"  # folder of the detector's boxes, one JSON per clip
    max_upload_mb: int = 200  # largest clip that can be sent to the page
    port: int = 7860  # of the page, on 127.0.0.1
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # weights and autocast; auto: as fast as the machine allows
    vision_model: str | None = None  # where the tower is now, if not where the checkpoint says
    language_model: str | None = None  # where the language model is now, if not where the checkpoint says

    def problems(self):
        found = [] if self.checkpoint else ["--checkpoint: must be given, one or several folders"]
        found += self.detector.problems("detector") if self.detect else []
        return super().problems() + found + self.out_of_range(above=["max_upload_mb", "port"])


@dataclass
class ExportConfig(Config):
    """export.py"""

    checkpoint: str = ""  # checkpoint or run folder of any stage; with --video also an exported folder
    output_dir: str = ""  # folder to write, empty or not there
    metrics: str | None = None  # metrics.json of evaluate.py, for the model card
    prompt_embeds: bool = False  # write the prompt embeddings of --video instead of the model; --video alone does, too
    video: str | None = None  # the clip whose prompt embeddings are written
    video_reader: Literal["auto", "decord", "pyav"] = "auto"  # what decodes it; use the one of the training
    mode: str = "microscope"  # a mode of dataset.MODE_TABLE: what the clip's prompt asks
    question: str | None = None  # your own words instead of the mode's question
    vision_model: str | None = None  # where the tower is now, if not where the checkpoint says
    language_model: str | None = None  # where the language model is now, if not where the checkpoint says

    def problems(self):
        needed = ("checkpoint", "output_dir", *(["video"] if self.prompt_embeds else []))
        return super().problems() + [f"--{key}: must be given" for key in needed if not getattr(self, key)]


@dataclass
class CheckConfig(BaseModelKeys, DataKeys):
    """check_dataset.py"""

    output_dir: str = "output/run"  # the report is written into its folder check_dataset/
    pooling: int = 3  # patches per side that become one visual token
    time_stamps: bool = False  # show the examples with the times of their frames, as training with this key does
    frame_cache: str | None = "output/frame_cache"  # folder of decoded frames that --build_cache fills
    # fewest and most words of a usual caption, per mode; a mode left out: dataset.MODE_TABLE
    word_range: dict[str, list[int]] = field(default_factory=dict)
    small_side: int = 224  # clips whose shorter side has fewer pixels are reported
    num_workers: int = 4  # processes that read clips
    no_video: bool = False  # check rows and labels only
    strict: bool = False  # warnings fail too
    json: str | None = None  # also write the report to this JSON file
    drop_bad: str | None = None  # write the rows without errors to this JSONL file
    # data files of other stages: do they train on a clip that is held out here?
    other_data: list[str] = field(default_factory=list)
    build_cache: bool = False  # fill frame_cache: decode every clip once, as training needs it
    decode: Literal["all", "sampled"] = "all"  # decode all frames of a clip, or (faster) those that training reads
    clip_timeout: float = 120.0  # seconds after which a clip that is still being decoded counts as hung
    examples: int = 2  # examples per mode in report.html

    def problems(self):
        found = self.out_of_range(above=("clip_timeout", "pooling"), least=("examples", "num_workers", "small_side"))
        if self.build_cache and self.no_video:
            found.append("--build_cache and --no_video exclude each other")
        if self.build_cache and self.frame_cache is None:
            found.append("--build_cache needs a folder: --frame_cache output/frame_cache")
        return super().problems() + found + word_range_problems(self.word_range)


@dataclass
class AugmentConfig(Config):
    """augment_captions.py"""

    data: str = "data/raw_captions.json"  # raw captions: JSON, JSONL, or a folder of them, in any form of row
    output: str = "data/captions.json"  # rows to train on, .json or .jsonl; a folder FILE.augment is made beside it
    language_model: str = "Qwen/Qwen3-4B-Instruct-2507"  # teacher: causal LM with a chat template, folder or name
    default_mode: str | None = "microscope"  # mode of rows whose question is not known
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the teacher's weights; auto: the faster one
    seed: int = 42  # with clip, mode and number of the text, decides what is sampled
    num_rewrites: int = 4  # Microscope texts wanted beside the original
    num_summaries: int = 5  # Copilot texts wanted
    spares: int = 2  # texts of each kind sampled beyond those wanted, to replace the ones that fail
    clips_per_batch: int = 4  # clips whose texts are sampled together; lower it if memory runs out
    temperature: float = 0.9  # of sampling
    top_p: float = 0.95  # sample from the likeliest tokens that hold this probability together
    rewrite_shortest: float = 0.7  # a rewrite has at least this share of the original's words
    rewrite_longest: float = 1.4  # ... and at most this one
    summary_min_words: int = WORDS["copilot"].asked[0]  # fewest words of a summary; shorter originals get none
    summary_max_words: int = WORDS["copilot"].asked[1]  # most words of a summary
    max_overlap: float = 0.6  # a text that shares more of its runs of 4 words with another is a copy of it

    def problems(self):
        found = self.out_of_range(above=("clips_per_batch", "temperature", "summary_min_words", "top_p", "max_overlap"),
                                  least=("num_rewrites", "num_summaries", "spares"), shares=("top_p", "max_overlap"))
        if not 0 < self.rewrite_shortest <= self.rewrite_longest:
            found.append(f"rewrite_shortest {self.rewrite_shortest}, rewrite_longest {self.rewrite_longest}: "
                         "0 < shortest <= longest is needed")
        if self.summary_max_words < self.summary_min_words:
            found.append(f"summary_max_words {self.summary_max_words} is below summary_min_words")
        return super().problems() + found


def word_range_problems(word_range) -> list[str]:
    return [f"word_range.{mode} must be [fewest, most], got {words}" for mode, words in word_range.items()
            if len(words) != 2 or not 0 <= words[0] <= words[1]]
