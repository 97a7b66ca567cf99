"""The shape of the code: imports point one way, functions are short, comprehensions are not nested."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"train_stage1_ddp", "train_stage2", "train_stage3", "check_dataset", "augment_captions", "generate",
           "evaluate", "export", "app"}
FLOORS = [  # a module imports modules of lower floors, or of its own floor where there is no circle
    {"training.common", "training.config", "training.workers", "pages.render"},  # these import no module of ours
    {"training.run_folder", "dataset"},
    {"model"},
    {"training.loop"},
    {"stage3"},
    {"evaluation"},
    SCRIPTS,
    {"demo", "bench"},
]
FORMULAS = {"grpo_loss"}  # long because the docstring holds the formula


def modules():
    """{module name: path} of all our code except the tests."""
    found = {}
    for pattern in ("*.py", "training/*.py", "stage3/*.py", "evaluation/*.py", "pages/*.py", "demo/*.py", "bench/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            if path.name != "__init__.py":
                found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return found


MODULES = modules()


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports_of(path):
    """Names of our modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(tree_of(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name for name in names if name in MODULES}
    return found


def floor_of(module):
    for number, names in enumerate(FLOORS):
        if module in names or module.split(".")[0] in names:
            return number
    raise AssertionError(f"{module} has no floor: is it in its right room?")


def test_imports_point_one_way():
    upward = [f"{module} imports {other}" for module, path in MODULES.items() for other in imports_of(path)
              if floor_of(other) > floor_of(module)]
    assert not upward
    assert not [m for m in FLOORS[0] if imports_of(MODULES[m]) - {"training.common"} or
                m != "pages.render" and imports_of(MODULES[m])]


def test_there_are_no_circles():
    left = {module: imports_of(path) for module, path in MODULES.items()}
    while left:
        free = [module for module, others in left.items() if not others & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for module in free:
            del left[module]


def test_no_module_imports_a_script():
    assert not [module for module, path in MODULES.items()
                if module.split(".")[0] not in ("demo", "bench") and imports_of(path) & SCRIPTS]


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short_and_comprehensions_are_not_nested(module):
    tree = tree_of(MODULES[module])
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    long, nested = [], []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name not in FORMULAS:
            if node.end_lineno - node.lineno + 1 > 60:
                long.append(f"{node.name}: {node.end_lineno - node.lineno + 1} lines")
        if isinstance(node, kinds):
            nested += [inner.lineno for inner in ast.walk(node) if inner is not node and isinstance(inner, kinds)]
    assert not long and not nested


def test_only_one_place_names_a_decoder_and_one_a_detector():
    for word, homes in (("decord", {"dataset", "demo.world"}), ("ultralytics", {"stage3.detect_objects"})):
        importing = set()
        for module, path in MODULES.items():
            for node in ast.walk(tree_of(path)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [
                    node.module] if isinstance(node, ast.ImportFrom) else []
                if any((name or "").split(".")[0] == word for name in names):
                    importing.add(module)
        assert {m for m in importing if m.split(".")[0] not in ("demo", "bench")} <= homes, word


def test_the_core_imports_without_the_stages():
    """model.py and dataset.py can be used in notebooks: neither needs the stages or a detector."""
    code = "import model, sys; assert not {'stage3', 'ultralytics', 'training.loop'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_stages_1_and_2_make_a_step_in_the_same_way():
    """`train_step` stands in both scripts, to be read there; a change in one must come with the other."""
    steps = []
    for script in ("train_stage1_ddp", "train_stage2"):
        nodes = tree_of(MODULES[script]).body
        steps += [ast.unparse(node) for node in nodes if getattr(node, "name", "") == "train_step"]
    assert len(steps) == 2 and steps[0] == steps[1]


def test_the_tests_that_the_reliability_page_names_exist():
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", page))
    assert named and [name for name in sorted(named) if f"def {name}(" not in tests] == []
