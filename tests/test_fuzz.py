"""Whatever comes in, the programs answer with a result or with their own error, never with a traceback.

2,000 cases, the same in every run (derandomized). `FUZZ_FACTOR=10` in the environment makes ten times as many.
"""

import contextlib
import io
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from conftest import make_qwen, make_vision
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dataset import MODES, DataError, Entry, RowError, load_entries, parse_row, resolve_video
from model import DriveVLM, ModelError, read_checkpoint
from stage3.detect_objects import (
    DetectionError,
    cache_folder,
    clip_file,
    fingerprint,
    load_evidence,
    load_records,
    read_record,
)
from stage3.evidence import Evidence, clip_evidence
from stage3.grpo_reward_func import PARTS, label_mentions, physics_aware_reward
from stage3.mentions import find_mentions
from stage3.vocabulary_config import COCO_NAMES
from training.common import ConfigError, load_config, write_json
from training.config import (
    AugmentConfig,
    CheckConfig,
    Config,
    DetectConfig,
    DetectorSettings,
    EvaluateConfig,
    GenerateConfig,
    Stage1Config,
    Stage2Config,
    Stage3Config,
)

PROGRAMS = [Stage1Config, Stage2Config, Stage3Config, CheckConfig, AugmentConfig, DetectConfig, EvaluateConfig,
            GenerateConfig]


def cases(number):
    """Settings of one property: no shrinking, which would take longer than the search."""
    return settings(max_examples=number * int(os.environ.get("FUZZ_FACTOR", 1)), derandomize=True, deadline=None,
                    database=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))


def case(what, *cases, id=None):
    """One that ended in a traceback once."""
    return pytest.param(*cases, id=id or what)


# ---- what comes in ---------------------------------------------------------------------------------------------------

WORDS = ["car", "The car stops.", "", " ", "\0", "\ud800", "\ufffd", "é", "🚗" * 40, "none", "null", "true", "1e400",
         "-1", "nan", "${seed}", "???", "[1", "{a: 1}", "../../etc/passwd", "~", "<|im_end|>", "x" * 5000]
NUMBERS = [0, 1, -1, 2, 3.5, -0.5, 1e300, 10**30, math.inf, -math.inf, math.nan, 2**63]
SCALARS = st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(), st.floats(),
                    st.sampled_from(WORDS), st.text(max_size=12))
VALUES = st.recursive(SCALARS, lambda inner: st.one_of(
    st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.sampled_from(WORDS), st.text(max_size=6)), inner,
                                                 max_size=4)), max_leaves=8)


# ---- rows ------------------------------------------------------------------------------------------------------------

TURN = st.one_of(VALUES, st.fixed_dictionaries({}, optional={
    key: st.one_of(st.sampled_from(["human", "gpt", "user", "assistant", "<video>\nWhat?"]), VALUES)
    for key in ("from", "role", "value", "content")}))
CAPTIONS = st.one_of(VALUES, st.lists(st.one_of(st.text(max_size=12), VALUES), max_size=3))
ROW = st.one_of(VALUES, st.fixed_dictionaries({}, optional={
    "video": st.one_of(st.just("a.mp4"), VALUES),
    "q": st.one_of(st.sampled_from([*MODES.values()]), VALUES),
    "a": VALUES, "captions": CAPTIONS, "microscope": CAPTIONS, "copilot": CAPTIONS,
    "mode": st.one_of(st.sampled_from([*MODES]), VALUES),
    "conversations": st.one_of(VALUES, st.lists(TURN, max_size=3)), "messages": st.lists(TURN, max_size=2)}))
BDDX_ROW = st.fixed_dictionaries({"Input.Video": st.one_of(st.just("https://host/a.mov"), VALUES)}, optional={
    f"Answer.{n}{what}": VALUES for n in (1, 2) for what in ("start", "end", "action", "justification")})


def check_entries(entries):
    for entry in entries:
        assert entry.mode in MODES and entry.video and entry.captions
        assert all(isinstance(text, str) and text.strip() for text in (entry.question, *entry.captions))


@cases(500)
@given(row=st.one_of(ROW, ROW, BDDX_ROW), default_mode=st.sampled_from([None, *MODES]))
def test_any_row_gives_entries_or_a_row_error(row, default_mode):
    with contextlib.suppress(RowError):
        check_entries(parse_row(row, default_mode))


@cases(200)
@given(rows=st.lists(ROW, max_size=4), style=st.sampled_from(["list", "lines", "csv", "cut"]), cut=st.integers(0, 400),
       junk=st.binary(max_size=20))
def test_any_data_file_gives_entries_or_a_data_error(rows, style, cut, junk):
    content = "\n".join(map(json.dumps, rows)) if style == "lines" else json.dumps(rows)
    content = content.encode()
    if style == "cut":
        content = content[:cut] + junk + content[cut:]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.csv" if style == "csv" else "rows.json")
        file.write_bytes(content)
        with contextlib.suppress(DataError):
            check_entries(load_entries(file))


NUMBER = "1" * 5000  # more digits than Python converts


@pytest.mark.parametrize("row", [
    case("dataset.find_mode: a mode that cannot be hashed", {"video": "a.mp4", "q": "?", "a": "!", "mode": []}),
    case("dataset._from_bddx: Input.Video is no text", {"Input.Video": 5}),
    case("dataset._from_bddx: an action is no text", {"Input.Video": "a.mov", "Answer.1action": ["stops"]}),
    case("dataset._from_bddx: a start is no text",
        {"Input.Video": "a.mov", "Answer.1action": "stops", "Answer.1start": 2}),
    case("dataset._from_bddx: a huge number of an answer", {"Input.Video": "a.mov", f"Answer.{NUMBER}action": "stops"}),
])
def test_a_row_of_wrong_types_is_a_row_error(row):
    with pytest.raises(RowError):
        parse_row(row)


@pytest.mark.parametrize("name, content", [
    ("rows.jsonl", '{"video": "a.mp4", "copilot": ['),
    ("rows.json", '[{"video": "a.mp4"'),
    ("rows.csv", "Input.Video,Answer.1action\n\0,\n"),
    case("dataset._rows_of_file: nested too deep", "rows.json", "[" * 100_000),
    case("dataset._row_of_line: nested too deep", "rows.jsonl", '{"video": ' + "[" * 100_000),
    case("dataset._rows_of_file: a number too long", "rows.json", f"[{NUMBER}]"),
    case("dataset._row_of_line: a number too long", "rows.jsonl", f'{{"video": {NUMBER}}}'),
    case("dataset._rows_of_file: csv.Error is not caught", "rows.csv",
         "Input.Video,Answer.1action\na," + "x" * 200_000),
])
def test_a_broken_data_file_is_a_data_error(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError):
        load_entries(tmp_path / name)


@pytest.mark.parametrize("video", [
    "../a.mp4", "a\0.mp4",
    case("dataset.resolve_video: a lone surrogate, which a row may hold", "\ud800.mp4", id="surrogate"),
])
def test_a_path_that_cannot_be_one_is_a_row_error(tmp_path, video):
    with pytest.raises(RowError):
        resolve_video(tmp_path, video)


# ---- settings --------------------------------------------------------------------------------------------------------

KEYS = sorted(Config.every_key())
ODD_NAMES = ["detector.weights", "judge.num_frames", "reward_weights.objects", "lr", "config", "help", ""]
NAMES = st.one_of(st.sampled_from(KEYS), st.sampled_from(ODD_NAMES), st.text(max_size=5))


def check_config(cls, argv):
    """A config whose values pass, or an exit with a message: code 2, or 0 after --help."""
    with contextlib.redirect_stdout(io.StringIO()) as help_text, contextlib.redirect_stderr(io.StringIO()) as message:
        try:
            config = load_config(cls, argv)
        except SystemExit as error:
            assert error.code in (0, None) and help_text.getvalue() or error.code == 2 and message.getvalue()
        else:
            assert isinstance(config, cls) and not config.problems()


@cases(300)
@given(cls=st.sampled_from(PROGRAMS), content=st.one_of(
    st.dictionaries(NAMES, VALUES, max_size=4), st.dictionaries(NAMES, SCALARS, max_size=2), VALUES,
    st.text(max_size=60), st.binary(max_size=30)))
def test_any_yaml_gives_a_config_or_an_exit_with_a_message(cls, content):
    import yaml

    if isinstance(content, bytes):
        text = content
    else:
        text = content if isinstance(content, str) else yaml.safe_dump(content, allow_unicode=True)
        text = text.encode("utf-8", "replace")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_bytes(text)
        check_config(cls, ["--config", str(file)])


FLAG = st.tuples(NAMES, SCALARS, st.booleans()).map(
    lambda part: [f"--{part[0]}={part[1]}"] if part[2] else [f"--{part[0]}", str(part[1])])


@cases(50)
@given(cls=st.sampled_from(PROGRAMS), flags=st.lists(FLAG, max_size=3), loose=st.lists(st.text(max_size=5), max_size=1))
def test_any_flags_give_a_config_or_an_exit_with_a_message(cls, flags, loose):
    check_config(cls, [*loose, *sum(flags, [])])


@pytest.mark.parametrize("cls, content", [
    (Stage1Config, "data: [1"), (Stage1Config, "? [1, 2]\n: 3"), (Stage1Config, "data: &a [*a]"),
    (Stage3Config, "detector: {weights: ???}"), (Stage3Config, "reward_weights: {objects: ${nope}}"),
    case("common._read_yaml: to_object resolves", Stage1Config, "data: ${nope}", id="unknown interpolation"),
    case("common._read_yaml: to_object resolves", Stage1Config, "seed: ${oc.env:NOT_SET}", id="unset variable"),
    case("common._read_yaml: GrammarParseError at load", Stage1Config, "data: ${", id="interpolation cut off"),
    case("common._read_yaml: MissingMandatoryValue", Stage1Config, "data: ???", id="question marks"),
    case("TrainKeys.problems: the order of clips takes no negative seed", Stage1Config, "seed: -1", id="negative seed"),
    case("TrainKeys.problems: torch takes 64 bits", Stage1Config, f"seed: {10**30}", id="huge seed"),
    case("Stage3Config.problems: nan is not above 0", Stage3Config, "reward_weights: {objects: .nan}", id="nan weight"),
    case("out_of_range: inf is above 0", Stage1Config, "learning_rate: .inf", id="infinite rate"),
])
def test_yaml_that_cannot_work_is_an_exit_with_a_message(tmp_path, capsys, cls, content):
    (tmp_path / "config.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError):
        load_config(cls, ["--config", str(tmp_path / "config.yaml")])
    assert "problem" in capsys.readouterr().err


# ---- checkpoint folders ----------------------------------------------------------------------------------------------


class Files(dict):
    """{path: bytes}, not printed when a case fails."""

    def __repr__(self):
        return f"{len(self)} files"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """{path inside it: bytes} of a checkpoint with an adapter, on the smallest base models."""
    root = tmp_path_factory.mktemp("fuzz")
    make_vision(root / "vision")
    make_qwen(root / "llm")
    model = DriveVLM.from_base(root / "vision", root / "llm", num_frames=2, dtype="float32")
    model.add_lora(r=2, alpha=4, dropout=0.1, seed=0)
    folder = model.save_checkpoint(root / "model", stage=2)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return Files({str(path.relative_to(folder)): path.read_bytes() for path in files})


META_KEYS = ["format", "stage", "vision_model", "language_model", "num_frames", "image_size", "pooling",
             "tokens_per_frame", "num_visual_tokens", "placeholder", "dtype", "prompts", "lora", "versions"]
DAMAGE = st.one_of(
    st.tuples(st.just("meta"), st.sampled_from(META_KEYS), VALUES),
    st.tuples(st.just("adapter"), st.sampled_from(["peft_type", "r", "lora_alpha", "lora_dropout", "target_modules",
                                                   "task_type", "bias", "use_dora", "rank_pattern"]), VALUES),
    st.tuples(st.just("remove"), st.integers(0, 9), st.none()),
    st.tuples(st.just("truncate"), st.integers(0, 9), st.integers(0, 40_000)),
    st.tuples(st.just("overwrite"), st.integers(0, 9), st.tuples(st.integers(0, 40_000), st.binary(min_size=1))),
    st.tuples(st.just("replace"), st.integers(0, 9), st.one_of(st.binary(max_size=50), VALUES)))


def damaged(files, damage):
    """The files after one kind of damage."""
    kind, which, what = damage
    files = dict(files)
    if kind in ("meta", "adapter"):
        name = "drivevlm.json" if kind == "meta" else "adapter/adapter_config.json"
        files[name] = json.dumps(json.loads(files[name]) | {which: what}).encode()
        return files
    name = sorted(files)[which % len(files)]
    if kind == "remove":
        del files[name]
    elif kind == "truncate":
        files[name] = files[name][:what % len(files[name])]
    elif kind == "overwrite":
        start = what[0] % len(files[name])
        files[name] = files[name][:start] + what[1] + files[name][start + len(what[1]):]
    else:
        files[name] = what if isinstance(what, bytes) else json.dumps(what).encode()
    return files


def load_damaged(files, suppressed=(ModelError,)):
    folder = Path(tempfile.mkdtemp())
    try:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(*suppressed):
            read_checkpoint(folder)
            DriveVLM.from_checkpoint(folder)
    finally:
        shutil.rmtree(folder)


@cases(150)
@given(damage=DAMAGE)
def test_a_damaged_checkpoint_loads_or_is_refused(checkpoint, damage):
    load_damaged(damaged(checkpoint, damage))


@pytest.mark.parametrize("damage", [
    ("remove", 0, None), ("truncate", 1, 500), ("meta", "num_frames", 10**9), ("meta", "num_frames", "two"),
    ("meta", "tokens_per_frame", "nine"),
    case("model.read_checkpoint: no type is checked", ("meta", "stage", "two"), id="stage"),
    case("DriveVLM.from_checkpoint: no type is checked", ("meta", "vision_model", []), id="vision_model"),
    case("DriveVLM.from_checkpoint: no type is checked", ("meta", "language_model", {}), id="language_model"),
    case("model.check_pooling: no type is checked", ("meta", "pooling", "three"), id="pooling"),
    case("model.check_pooling: division by 0", ("meta", "pooling", 0), id="pooling 0"),
    case("DriveVLM._build: no type is checked", ("meta", "dtype", []), id="dtype"),
    case("DriveVLM.from_checkpoint: no type is checked", ("meta", "prompts", []), id="prompts"),
    case("DriveVLM._load_adapter: errors of PEFT", ("adapter", "r", "four"), id="r"),
    case("DriveVLM._load_adapter: errors of PEFT", ("adapter", "lora_dropout", 7.0), id="lora_dropout"),
    case("DriveVLM._load_adapter: errors of PEFT", ("adapter", "task_type", "NOPE"), id="task_type"),
    case("DriveVLM._load_adapter: errors of PEFT", ("adapter", "target_modules", []), id="target_modules"),
    case("transformers: a tokenizer_config.json that is a list", ("replace", 7, [None]), id="tokenizer_config.json"),
    case("tokenizers raises Exception itself", ("overwrite", 6, (6, b"J")), id="tokenizer.json"),
    case("dataset.chat_pieces: TemplateSyntaxError", ("truncate", 2, 2), id="chat_template.jinja"),
])
def test_damage_is_refused_as_a_model_error(checkpoint, damage):
    files = damaged(checkpoint, damage)
    with pytest.raises(ModelError):
        load_damaged(files, suppressed=())


def test_prompts_of_modes_that_are_gone_do_no_harm(checkpoint):
    load_damaged(damaged(checkpoint, ("meta", "prompts", {"gone": math.nan})), suppressed=())


# ---- evidence --------------------------------------------------------------------------------------------------------

DETECTOR = DetectorSettings(weights="none.pt", num_frames=3)
BOX = st.one_of(st.tuples(st.integers(0, 79), *[st.floats(0, 1)] * 5).map(list), st.lists(SCALARS, max_size=7), VALUES)
FRAME = st.one_of(VALUES, st.fixed_dictionaries({}, optional={
    "index": SCALARS, "time": st.one_of(st.floats(0, 1), SCALARS),
    "boxes": st.one_of(st.lists(BOX, max_size=3), VALUES)}))
RECORD = st.one_of(VALUES, st.fixed_dictionaries({}, optional={
    "video": SCALARS, "bytes": st.one_of(st.just(1), SCALARS), "error": VALUES,
    "frames": st.one_of(st.lists(FRAME, max_size=3), VALUES)}),
    st.fixed_dictionaries({"bytes": st.just(1), "frames": st.lists(st.fixed_dictionaries({
        "time": st.floats(0, 1), "boxes": st.lists(BOX, max_size=3)}), min_size=1, max_size=3)}))


@pytest.fixture(scope="module")
def evidence_cache(tmp_path_factory):
    """(cache folder, the file of its only clip)."""
    folder = tmp_path_factory.mktemp("evidence")
    made_by = fingerprint(DETECTOR)
    cache = cache_folder(folder, made_by)
    cache.mkdir()
    write_json(cache / "settings.json", {"made_by": made_by})
    return folder, clip_file(cache, "a.mp4")


@cases(400)
@given(record=RECORD, cut=st.one_of(st.none(), st.integers(0, 200)), junk=st.binary(max_size=5))
def test_a_damaged_record_is_evidence_or_a_detection_error(evidence_cache, record, cut, junk):
    folder, file = evidence_cache
    content = json.dumps(record).encode()
    file.write_bytes(content if cut is None else content[:cut] + junk + content[cut + len(junk):])
    with contextlib.suppress(DetectionError):
        records = load_records(folder, ["a.mp4"], DETECTOR)
        evidence = load_evidence(folder, [Entry("a#copilot", "a.mp4", "copilot", "?", ("A car.",))], DETECTOR)
        assert records["a.mp4"] == read_record(file)
        assert evidence["a.mp4"] is None or isinstance(evidence["a.mp4"], Evidence)
        assert (clip_evidence(records["a.mp4"], DETECTOR) is None) == ("error" in records["a.mp4"])


def sound_record(*times, box=(2, 0.9, 0.1, 0.1, 0.5, 0.5)):
    return {"bytes": 1, "frames": [{"index": i, "time": time, "boxes": [list(box)]} for i, time in enumerate(times)]}


@pytest.mark.parametrize("record", [
    [], {"frames": []}, {"bytes": 1, "frames": [[]]}, sound_record(0, 2), sound_record(math.nan),
    sound_record(0, box=(80, 0.9, 0, 0, 1, 1)), sound_record(0, box=(2, 0.9, 0, 0, 1)),
    sound_record(0, box=(2, math.nan)),
    case("detect_objects.read_record: min and max do not see nan",
        sound_record(0, box=(2, 0.9, math.nan, 0.1, 0.5, 0.5)), id="nan in a box"),
    case("detect_objects.read_record: times that go back, then Evidence raises ValueError", sound_record(0.9, 0.1),
        id="times go back"),
])
def test_a_record_that_cannot_be_used_is_detected_again(evidence_cache, record):
    folder, file = evidence_cache
    file.write_text(json.dumps(record), encoding="utf-8")
    assert read_record(file) is None
    with pytest.raises(DetectionError):
        load_records(folder, ["a.mp4"], DETECTOR)


# ---- texts -----------------------------------------------------------------------------------------------------------

PHRASES = [*COCO_NAMES[:12], "no", "not", "the", "a red", ",", ".", "then", "because", "stops", "turns left", "behind",
           "at night", "and", "...", "\n\n", "bus stop", "<|im_end|>", "\0", "\ud800", "۱۲۳", "ﬁ", "İ", "ß", "'s", "-",
           "\u200b"]
TEXT = st.one_of(st.text(max_size=300), st.lists(st.sampled_from(PHRASES), max_size=60).map(" ".join),
                 st.tuples(st.one_of(st.text(min_size=1, max_size=20), st.sampled_from(PHRASES)),
                           st.integers(1, 5000)).map(lambda pair: (pair[0] * pair[1])[:5000]))
CLASSES = st.frozensets(st.sampled_from(COCO_NAMES[:12]), max_size=4)


@cases(400)
@given(text=TEXT, reference=st.one_of(st.none(), TEXT), present=CLASSES, unknown=CLASSES,
       mode=st.sampled_from([*MODES]))
def test_any_text_has_mentions_and_a_reward_in_0_to_1(text, reference, present, unknown, mode):
    evidence = Evidence(present, unknown, None, dict.fromkeys(sorted(present)[:1], (0.2, 0.7)))
    for mention in find_mentions(text):
        assert mention.object in COCO_NAMES and 0 <= mention.start < mention.end <= len(text)
    for mention, verdict in label_mentions(text, evidence):
        assert isinstance(verdict, str) and 0 <= mention.start <= mention.end <= len(text)
    reward = physics_aware_reward(text, evidence, mode, reference)
    for part in (*PARTS, "total"):
        assert 0 <= getattr(reward, part) <= 1, part
