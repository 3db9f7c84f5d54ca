"""Layers, import cycles, gates of outside libraries, sizes and names."""

import ast
import re
import statistics
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rlhf", "stages", "data", "conf")
FLOORS = [
    {"rlhf.config", "rlhf.types"},
    {"rlhf.runtime", "rlhf.micro_batches"},
    {"rlhf.algorithms", "rlhf.text"},
    {"rlhf.deepspeed", "rlhf.migrate", "rlhf.tracking"},
    {"rlhf.models", "rlhf.generation", "data"},
    {"rlhf.engine"},
    {"rlhf.hf_trainer"},
    {"rlhf.hf"},
    {"rlhf.forward_passes", "rlhf.hidden_states"},
    {"rlhf.reward_functions"},
    {"rlhf.reward_calls"},
    {"rlhf.rewards"},
    {"rlhf.row_exchange"},
    {"rlhf.rollout"},
    {"rlhf.evaluation", "rlhf.chat"},
    {"rlhf.training", "rlhf.tracking.report"},
    {"rlhf.memory_plan"},
    {"stages.lifecycle"},
    {"stages.setup"},
    {"stages.supervised"},
    {"stages.sft", "stages.reward", "stages.dpo", "stages.ppo", "stages.eval", "stages.chat", "stages.publish"},
    {"stages.pipeline"},
    {"run_pipeline"},
]
GATES = {
    "hydra": ("run_pipeline", "stages"),
    "omegaconf": ("run_pipeline", "stages"),
    "wandb": ("rlhf.tracking.",),
    "wandb_workspaces": ("rlhf.tracking.dashboard",),
    "yaml": ("rlhf.deepspeed.", "rlhf.migrate.", "data.known_datasets", "data.split_files"),
    "matplotlib": ("rlhf.tracking.report.charts",),
    "jinja2": ("rlhf.tracking.report.page", "rlhf.text.", "stages.lifecycle.model_card"),
    "transformers": ("rlhf.models", "rlhf.text.", "rlhf.generation", "rlhf.hf"),
    "trl": ("rlhf.hf",),
    "torch.distributed": ("rlhf.runtime.dist", "rlhf.engine"),
}


def sources():
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    return sorted(files) + [ROOT / "run_pipeline.py"]


def module_name(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree(file):
    return ast.parse(file.read_text())


@cache
def imports(file):
    names = []
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def room(name):
    """The entry of FLOORS that a module belongs to, the most specific one, and its floor."""
    rooms = [(candidate, floor) for floor, candidates in enumerate(FLOORS) for candidate in candidates]
    return max(
        ((r, floor) for r, floor in rooms if f"{name}.".startswith(f"{r}.")), key=lambda r: len(r[0]), default=None
    )


def functions(file):
    return [node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def nesting(node, depth=0):
    blocks = ast.If | ast.For | ast.While | ast.With | ast.Try
    depths = [depth]
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        elif_branch = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        depths.append(nesting(child, depth + (isinstance(child, blocks) and not elif_branch)))
    return max(depths)


@pytest.mark.parametrize("file", sources(), ids=module_name)
def test_a_module_imports_only_from_lower_floors_or_its_own_room(file):
    own = room(module_name(file))
    if own is None:
        return  # an empty package file above the rooms
    for name in imports(file):
        other = room(name)
        if other is None or other[0] == own[0]:
            continue
        assert other[1] < own[1], f"{module_name(file)} (floor {own[1]}) imports {name} (floor {other[1]})"


def test_rlhf_knows_neither_data_nor_stages():
    for file in (ROOT / "rlhf").rglob("*.py"):
        assert not [name for name in imports(file) if re.match(r"(data|stages|run_pipeline)\b", name)], file


def test_stages_never_import_each_other():
    for file in (ROOT / "stages").glob("*.py"):
        for name in imports(file) if file.stem in STORIES else ():
            assert not re.match(rf"stages\.({'|'.join(STORIES - {file.stem})})\b", name), f"{file} imports {name}"


@pytest.mark.parametrize("library", GATES)
def test_each_outside_library_has_one_gate(library):
    users = [module_name(f) for f in sources() for n in imports(f) if n == library or n.startswith(library + ".")]
    assert all(user.startswith(GATES[library]) for user in users), users
    if library == "wandb":
        assert len(set(users)) == 1, users


def test_algorithms_need_torch_alone():
    for file in (ROOT / "rlhf/algorithms").glob("*.py"):
        for name in imports(file):
            assert re.match(
                r"(torch(?!\.distributed)|rlhf\.(algorithms|types)|typing|collections|dataclasses|math|"
                r"__future__|abc|enum|functools)\b",
                name,
            ), f"{file} imports {name}"


def test_the_configuration_imports_the_standard_library_alone():
    for file in (ROOT / "rlhf/config").glob("*.py"):
        assert not [
            n
            for n in imports(file)
            if not re.match(
                r"(rlhf\.config|dataclasses|enum|functools|math|pathlib|collections|typing|__future__)\b",
                n,
            )
        ]


def test_nothing_is_pickled():
    for file in sources():
        assert not {"pickle", "marshal", "shelve", "multiprocessing"} & {n.split(".")[0] for n in imports(file)}, file
        assert not re.search(r"(gather|scatter)_object\(|object_list\(|torch\.(load|save)\(", file.read_text()), file


def test_init_files_are_empty():
    assert [file for file in sources() if file.name == "__init__.py" and file.read_text().strip()] == []


def test_no_room_for_odds_and_ends():
    assert [file for file in sources() if file.stem in {"utils", "common", "misc", "helpers"}] == []


def test_no_modules_import_each_other_in_a_circle():
    """Imports under TYPE_CHECKING and inside functions count too."""
    names = {module_name(file) for file in sources()}
    graph = {module_name(file): {module_of(name, names) for name in imports(file)} - {None} for file in sources()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def module_of(name, names):
    """The module that an imported name comes from, None for one that is not ours."""
    return next((found for found in (name, name.rpartition(".")[0]) if found in names), None)


STORIES = {"sft", "reward", "dpo", "ppo", "eval", "chat"}
"""A stage may share its name with its arithmetic: `stages/ppo.py` and `rlhf/algorithms/ppo.py`."""


def test_no_two_files_have_one_name():
    stems = Counter(file.stem for file in sources() if not file.stem.startswith("__") and file.stem not in STORIES)
    assert [stem for stem, count in stems.items() if count > 1] == []


def test_no_two_classes_have_one_name():
    found = Counter(node.name for file in sources() for node in tree(file).body if isinstance(node, ast.ClassDef))
    assert [name for name, count in found.items() if count > 1] == []


def test_a_configuration_class_is_asked_about_in_its_own_room_alone():
    """What differs between stages is a role or a setting; nothing else dispatches on the class of a configuration."""
    for file in sources():
        if "rlhf/config/" not in str(file):
            found = re.findall(r"(?<!assert )isinstance\([^()]*?\b(\w+Config)\b", file.read_text())
            assert set(found) <= {"DictConfig", "PreTrainedConfig"}, module_name(file)


@pytest.mark.parametrize("file", sources(), ids=module_name)
def test_files_and_functions_keep_their_size(file):
    assert len(file.read_text().splitlines()) <= 350, file
    contract = module_name(file).startswith("rlhf.algorithms")  # its signatures are the contract: up to four tensors
    for function in functions(file):
        where = f"{module_name(file)}.{function.name}"
        assert function.end_lineno - function.lineno + 1 <= 60, where
        assert nesting(function) <= 3, where
        args = function.args
        positional = [a.arg for a in args.posonlyargs + args.args if a.arg not in {"self", "cls"}]
        assert len(positional) + len(args.kwonlyargs) <= 7, where
        if not function.name.startswith("__"):
            assert len(positional) <= (4 if contract else 2), f"{where}: keyword-only after the second parameter"


def test_the_median_function_is_short():
    sizes = [f.end_lineno - f.lineno + 1 for file in sources() for f in functions(file)]
    assert statistics.median(sizes) <= 10


def test_no_function_returns_an_unnamed_tuple_of_more_than_two():
    for file in sources():
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
                assert len(node.value.elts) <= 2, f"{file}:{node.lineno}"


def test_every_tensor_field_says_its_shape():
    for number, line in enumerate((ROOT / "rlhf/types.py").read_text().splitlines(), 1):
        if re.match(r"    \w+: Tensor", line):
            assert re.search(r"#.*\[[0-9BPRSTVD, ]+\]", line), f"rlhf/types.py:{number}: {line}"


def test_masks_are_named_for_what_is_true():
    for file in sources():
        assert not re.search(r"padding_mask|INVALID_LOGPROB", file.read_text()), file


def test_every_cited_note_exists_once():
    text = "\n".join(file.read_text() for file in sources())
    cited = re.findall(r"[Ss]ee \[Note: ([^\]]+)\]", text)
    for note in cited:
        assert len(re.findall(rf"(?<![Ss]ee )\[Note: {re.escape(note)}\]", text)) == 1, note


def test_code_that_comes_with_a_model_is_refused_in_every_call():
    for file in sources():
        for node in ast.walk(tree(file)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner, method = ast.unparse(node.func.value).lower(), node.func.attr
            if method in {"from_pretrained", "from_config"} and "auto" in owner:
                said = [ast.unparse(word.value) for word in node.keywords if word.arg == "trust_remote_code"]
                assert said == ["False"], f"{module_name(file)}:{node.lineno}"
