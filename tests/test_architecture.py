"""The laws of the house, held by reading every file of the package (docs/architecture.md).

A law takes the house and returns its violations as lines of text; `test_the_house_keeps_its_laws`
expects none. The second half feeds each law a house that breaks it, so that a law which sees
nothing cannot pass for a law that is kept. Imports inside functions and under TYPE_CHECKING count:
they tie two rooms together just as well.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pagedserve"

# Top to bottom. A room is a folder or a module directly under the package, "__init__" the package
# itself. Rooms beside each other do not know each other, except the nouns, which are one room.
FLOORS = (
    ("__init__", "__main__"),
    ("cli",),
    ("commands",),
    ("llm",),
    ("api",),
    ("engine",),
    ("executor",),
    ("worker",),
    ("models",),
    ("layers",),
    ("attention",),
    ("quant", "dist", "device", "text"),
    ("kernels",),
    ("config", "limits", "logs", "request", "step", "spec", "errors", "version"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
NOUNS = FLOORS[-1]

KNOW_TEXT = ("text", "api", "llm", "cli")
FREE_OF_TORCH = ("engine", "text", "api")
API_PROCESS = ("cli", "commands", "api", "text")
READ_ENVIRONMENT = ("config", "device")
MAX_LINES = 450

FAMILIES = (
    "llama|mistral|mixtral|ministral|qwen|gemma|gpt|gptj|deepseek|falcon|bloom|mpt|olmo|granite|"
    "cohere|baichuan|internlm|chatglm|starcoder|stablelm|nemotron|exaone|grok|kimi|mamba|phi\\d"
)
VENDORS = "nvidia|amd|intel|huawei|cambricon|apple"
FORBIDDEN_NAME = re.compile(rf"(?<![a-z])({FAMILIES}|{VENDORS})(?![a-z])")
SAY_NAMES = ("models/architectures/", "device.py", "config.py")
# (file, identifier or string): why it is no branch on a model.
NAME_EXCEPTIONS = {
    ("layers/rotary.py", "llama3"): "a `rope_type` of checkpoints, whatever their family",
}


# What runs whatever it is given, or makes objects of it.
RUNS_DATA = (
    *("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle", "yaml"),
    *("code", "codeop", "runpy", "pty", "imp", "xmlrpc", "multiprocessing"),
)
RUNS_TEXT = ("eval", "exec", "__import__", "execfile")
RUNS_SHELL = ("system", "popen", "popen2", "getoutput", "getstatusoutput", "spawnlp", "spawnvp")
# (file, what): why it may.
RUN_EXCEPTIONS = {
    ("models/convert.py", "pickle"): "only for the name of an exception",
    ("models/convert.py", "torch.load"): "`pagedserve convert`, by hand, with weights_only",
    (
        "models/custom.py",
        "spec_from_file_location",
    ): "--architecture-file: a file of the user's own",
}


@dataclass(frozen=True)
class Module:
    """A parsed file. `path` is relative to the package, `name` dotted and absolute."""

    name: str
    path: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The folder or module directly under the package that this file belongs to."""
        return room_of(self.name)

    @property
    def package(self) -> str:
        """What a relative import starts from."""
        return self.name if self.path.endswith("__init__.py") else self.name.rpartition(".")[0]


House = dict[str, Module]
Law = Callable[[House], list[str]]


def room_of(name: str) -> str:
    """The room of a dotted module name inside the package."""
    return [*name.split("."), "__init__"][1]


def read_house(root: Path) -> House:
    """Parse every file under the package folder `root`."""
    house = {}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        parts = (root.name, *path.with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = file.read_text(encoding="utf-8")
        house[name] = Module(name, path.as_posix(), text, ast.parse(text, filename=str(file)))
    return house


def imports(module: Module, house: House) -> Iterator[tuple[str, int]]:
    """Every module that `module` imports, anywhere in it, with the line."""
    for node in ast.walk(module.tree):
        match node:
            case ast.Import():
                yield from ((alias.name, node.lineno) for alias in node.names)
            case ast.ImportFrom():
                base = absolute(node, module)
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    yield (inner if inner in house else base), node.lineno
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name, node.lineno


def absolute(node: ast.ImportFrom, module: Module) -> str:
    """The absolute name of what a `from … import` names."""
    if not node.level:
        return node.module or ""
    parts = module.package.split(".")
    start = ".".join(parts[: len(parts) - node.level + 1])
    return f"{start}.{node.module}" if node.module else start


def own_imports(module: Module, house: House) -> Iterator[tuple[str, int]]:
    """The imports of `module` that stay inside the package."""
    package = module.name.split(".")[0]
    for target, line in imports(module, house):
        if target.split(".")[0] == package:
            yield target, line


def every_file_lives_on_a_floor(house: House) -> list[str]:
    """A new folder has to be placed before anything can be said about its imports."""
    return [f"{m.path}: {m.room} is on no floor" for m in house.values() if m.room not in FLOOR]


def imports_run_down(house: House) -> list[str]:
    """A room imports rooms on lower floors, and itself."""
    found = []
    for module in house.values():
        for target, line in own_imports(module, house):
            here, there = module.room, room_of(target)
            same = here == there or (here in NOUNS and there in NOUNS)
            if not same and FLOOR.get(there, -1) <= FLOOR.get(here, -1):
                found.append(f"{module.path}:{line}: {here} may not import {target}")
    return found


def imports_have_no_circle(house: House) -> list[str]:
    """Modules can be read in an order in which each knows only those before it."""
    graph = {
        name: {target for target, _ in own_imports(module, house) if target in house}
        for name, module in house.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return ["circle: " + " imported by ".join(error.args[1])]
    return []


def only_the_front_knows_text(house: House) -> list[str]:
    """The engine and what is under it see token ids, never text."""
    return [
        f"{module.path}:{line}: {module.room} may not import {target}"
        for module in house.values()
        if module.room not in KNOW_TEXT
        for target, line in own_imports(module, house)
        if room_of(target) == "text"
    ]


def the_front_and_the_engine_import_no_torch(house: House) -> list[str]:
    """The API process starts in a moment, and the scheduler is tested without a device."""
    return [
        f"{module.path}:{line}: {module.room} may not import {target}"
        for module in house.values()
        if module.room in FREE_OF_TORCH
        for target, line in imports(module, house)
        if target.split(".")[0] in ("torch", "transformers")
    ]


def the_environment_is_read_in_one_place(house: House) -> list[str]:
    """Settings come through config, and through device for what a driver dictates."""
    names = ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")
    return [
        f"{module.path}:{node.lineno}: only config.py and device.py touch the environment"
        for module in house.values()
        if module.room not in READ_ENVIRONMENT
        for node in ast.walk(module.tree)
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.ImportFrom) and any(a.name in names for a in node.names))
    ]


def names_stay_in_their_files(house: House) -> list[str]:
    """No code branches on a model family or a vendor: no such identifier, key or file name."""
    found = []
    for module in house.values():
        if module.path.startswith(SAY_NAMES):
            continue
        for text, line in [(module.path, 1), *spoken_names(module.tree)]:
            name = forbidden_name(text)
            if name and (module.path, text) not in NAME_EXCEPTIONS:
                found.append(f"{module.path}:{line}: {text!r} names {name}")
    return found


def forbidden_name(text: str) -> str | None:
    """The family or vendor in an identifier, with underscores or CamelCase, or None."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text).lower()
    found = FORBIDDEN_NAME.search(words)
    return found[1] if found else None


def spoken_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Identifiers, and strings without a space, with their lines.

    Docstrings and messages are for people and may name what they like; where a third party's
    module is imported from is not ours to say, the name it gets here is.
    """
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in prose and " " not in text:
                yield text, node.lineno
            case ast.Name(id=name) | ast.Attribute(attr=name):
                yield name, node.lineno
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node.lineno
            case ast.arg(arg=str(name)) | ast.keyword(arg=str(name)):
                yield name, node.lineno
            case ast.alias():
                yield node.asname or node.name.rpartition(".")[2], node.lineno


def every_module_says_what_it_is_for(house: House) -> list[str]:
    """A module opens with a docstring."""
    return [
        f"{module.path}: no docstring"
        for module in house.values()
        if not module.name.rpartition(".")[2].startswith("_") and not ast.get_docstring(module.tree)
    ]


def nothing_runs_what_it_reads(house: House) -> list[str]:
    """No byte of a client, a model or a message becomes code, or an object of a chosen class."""
    return [
        f"{module.path}:{line}: {what} may run what it is given"
        for module in house.values()
        for what, line in ways_to_run(module, house)
        if (module.path, what) not in RUN_EXCEPTIONS
    ]


def ways_to_run(module: Module, house: House) -> Iterator[tuple[str, int]]:
    """Imports, calls and flags by which data becomes code, with their lines."""
    for target, line in imports(module, house):
        if target.split(".")[0] in RUNS_DATA:
            yield target.split(".")[0], line
    for node in ast.walk(module.tree):
        match node:
            case ast.Name(id=name) if name in RUNS_TEXT:
                yield name, node.lineno
            case ast.Attribute(value=ast.Name(id="os" | "subprocess" as where), attr=name):
                if name in RUNS_SHELL:
                    yield f"{where}.{name}", node.lineno
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                yield "torch.load", node.lineno
            case ast.Attribute(attr="spec_from_file_location" | "SourceFileLoader" as name):
                yield name, node.lineno
            case ast.keyword(arg="shell" | "trust_remote_code" as name, value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield name, value.lineno
            case ast.keyword(arg="allow_pickle" | "weights_only" as name, value=value):
                safe = name == "weights_only"
                if not (isinstance(value, ast.Constant) and value.value is safe):
                    yield name, value.lineno
            case ast.Name(id="Environment" | "SandboxedEnvironment" | "Template" as name):
                yield f"jinja2.{name}", node.lineno


def only_the_command_that_converts_reads_pickles(house: House) -> list[str]:
    """What may open a pickle is out of reach of a server."""
    return [
        f"{module.path}:{line}: only commands/convert.py may import {target}"
        for module in house.values()
        if module.path != "commands/convert.py"
        for target, line in own_imports(module, house)
        if target == "pagedserve.models.convert"
    ]


def rooms_stay_small(house: House) -> list[str]:
    """A file past the limit is two files; kernels may be long."""
    sizes = {m.path: len(m.text.splitlines()) for m in house.values() if m.room != "kernels"}
    return [f"{path}: {size} lines" for path, size in sizes.items() if size > MAX_LINES]


LAWS: list[Law] = [
    every_file_lives_on_a_floor,
    imports_run_down,
    imports_have_no_circle,
    only_the_front_knows_text,
    the_front_and_the_engine_import_no_torch,
    the_environment_is_read_in_one_place,
    names_stay_in_their_files,
    every_module_says_what_it_is_for,
    rooms_stay_small,
    nothing_runs_what_it_reads,
    only_the_command_that_converts_reads_pickles,
]


@pytest.fixture(scope="module")
def house() -> House:
    return read_house(PACKAGE)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_house_keeps_its_laws(law: Law, house: House) -> None:
    violations = law(house)
    assert not violations, "\n" + "\n".join(violations)


def test_every_exception_is_needed(house: House) -> None:
    said = {(m.path, text) for m in house.values() for text, _ in spoken_names(m.tree)}
    assert NAME_EXCEPTIONS.keys() <= said


def test_every_way_to_run_that_is_allowed_is_used(house: House) -> None:
    used = {(m.path, what) for m in house.values() for what, _ in ways_to_run(m, house)}
    assert RUN_EXCEPTIONS.keys() <= used


def test_the_api_process_imports_no_torch(house: House) -> None:
    rooms = {room: [m.name for m in house.values() if m.room == room] for room in API_PROCESS}
    assert all(rooms.values()), f"a room is missing: {rooms}"
    assert "pagedserve.api.app" in rooms["api"]
    code = f"import sys, {', '.join(sum(rooms.values(), []))}\nprint(*sys.modules)"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.returncode == 0, run.stderr
    assert not {"torch", "transformers"} & set(run.stdout.split())


# The laws themselves, on houses of one or two rooms.

CLEAN = '"""A room."""\n'


@pytest.fixture
def build(tmp_path: Path) -> Callable[[dict[str, str]], House]:
    """Write files, each with a docstring put before its code, and read them as a house."""

    def write(files: dict[str, str]) -> House:
        for path, code in files.items():
            file = tmp_path / "pagedserve" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(CLEAN + code)
        return read_house(tmp_path / "pagedserve")

    return write


Build = Callable[[dict[str, str]], House]


def test_a_clean_house_breaks_no_law(build: Build) -> None:
    house = build(
        {
            "__init__.py": "from pagedserve.llm import LLM\n",
            "llm.py": "from .engine import client\nfrom .text.chat import render\n",
            "engine/__init__.py": "",
            "engine/client.py": "import msgspec\nfrom pagedserve.step import Step\n",
            "text/chat.py": "from ..request import Request\n",
            "step.py": "from pagedserve.request import Request\n",
            "request.py": "",
            "models/architectures/llama.py": "def llama(): ...\n",
        }
    )
    assert [violation for law in LAWS for violation in law(house)] == []


@pytest.mark.parametrize(
    "code",
    [
        "from pagedserve.engine.loop import Loop",
        "from pagedserve.engine import loop",
        "from pagedserve import engine",
        "import pagedserve.engine.loop",
        "from ..engine import loop",
        "from ..engine.loop import Loop",
        "def f():\n    from pagedserve.engine.loop import Loop",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pagedserve.engine",
        "import importlib\nimportlib.import_module('pagedserve.engine.loop')",
    ],
)
def test_an_upward_import_is_found(code: str, build: Build) -> None:
    house = build({"worker/runner.py": code, "engine/__init__.py": "", "engine/loop.py": ""})
    (violation,) = imports_run_down(house)
    assert violation.startswith("worker/runner.py:")
    assert "worker may not import pagedserve.engine" in violation


def test_rooms_on_one_floor_do_not_import_each_other(build: Build) -> None:
    house = build({"dist/groups.py": "from pagedserve import device\n", "device.py": ""})
    assert imports_run_down(house) == ["dist/groups.py:2: dist may not import pagedserve.device"]


def test_the_package_itself_is_the_top(build: Build) -> None:
    house = build({"__init__.py": "", "cli.py": "from pagedserve import LLM\n"})
    assert imports_run_down(house) == ["cli.py:2: cli may not import pagedserve"]


def test_a_room_on_no_floor_is_found(build: Build) -> None:
    house = build({"utils/strings.py": "from pagedserve.errors import shorten\n"})
    assert every_file_lives_on_a_floor(house) == ["utils/strings.py: utils is on no floor"]


@pytest.mark.parametrize("late", ["from .b import B", "def f():\n    from .b import B"])
def test_a_circle_inside_a_room_is_found(late: str, build: Build) -> None:
    house = build(
        {
            "engine/a.py": late,
            "engine/b.py": "from . import c",
            "engine/c.py": "from pagedserve.engine.a import A",
        }
    )
    (violation,) = imports_have_no_circle(house)
    assert {"pagedserve.engine.a", "pagedserve.engine.b", "pagedserve.engine.c"} <= set(
        violation.split()
    )


def test_text_below_the_front_is_found(build: Build) -> None:
    house = build({"engine/stop.py": "from pagedserve.text.detokenizer import Detokenizer\n"})
    assert len(only_the_front_knows_text(house)) == 1


@pytest.mark.parametrize("room", FREE_OF_TORCH)
@pytest.mark.parametrize(
    "code", ["import torch", "from torch.nn import Module", "def f():\n    import transformers"]
)
def test_torch_in_a_room_without_it_is_found(room: str, code: str, build: Build) -> None:
    house = build({f"{room}/heavy.py": code, "worker/heavy.py": code})
    (violation,) = the_front_and_the_engine_import_no_torch(house)
    assert violation.startswith(f"{room}/heavy.py")


@pytest.mark.parametrize(
    "code",
    [
        "import os\nKEY = os.environ['KEY']",
        "import os as system\nKEY = system.environ.get('KEY')",
        "import os\nKEY = os.getenv('KEY')",
        "from os import environ",
        "from os import getenv as read",
    ],
)
def test_reading_the_environment_is_found(code: str, build: Build) -> None:
    house = build({"worker/runner.py": code, "config.py": code, "device.py": code})
    (violation,) = the_environment_is_read_in_one_place(house)
    assert violation.startswith("worker/runner.py")


@pytest.mark.parametrize(
    "code",
    [
        "class LlamaAttention: ...",
        "def load_qwen3(): ...",
        "if config.model_type == 'gpt2': ...",
        "kinds = {'GPT2LMHeadModel': 1}",
        "x.is_mistral = True",
        "f(gemma2=1)",
        "NVIDIA = 1",
        "import something as amd_smi",
        "vendor = f'{x}-intel'",
    ],
)
def test_a_family_or_vendor_name_is_found(code: str, build: Build) -> None:
    house = build(
        {"worker/runner.py": code, "models/architectures/one.py": code, "device.py": code}
    )
    (violation, *_) = names_stay_in_their_files(house)
    assert violation.startswith("worker/runner.py:2")


def test_a_file_named_after_a_family_is_found(build: Build) -> None:
    house = build({"layers/llama_attention.py": ""})
    assert len(names_stay_in_their_files(house)) == 1


@pytest.mark.parametrize(
    "code",
    [
        "# as in llama",
        "def f():\n    '''Like mistral.'''",
        "raise ValueError('needs an NVIDIA driver')",
        "from triton.language.nvidia import hopper",
        "quant = 'gptq'; bits = ramdisk; camdown = 1",
    ],
)
def test_prose_and_other_words_may_hold_a_name(code: str, build: Build) -> None:
    assert names_stay_in_their_files(build({"kernels/moe.py": code})) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import cloudpickle as c",
        "import yaml",
        "from multiprocessing.connection import Client",
        "import importlib\nimportlib.import_module('dill')",
        "x = eval(text)",
        "f = exec",
        "__import__(name)",
        "import os\nos.system(text)",
        "import subprocess\nsubprocess.getoutput(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import subprocess\nsubprocess.run(text, shell=wanted)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=config.trust)",
        "import torch\ntorch.load(path)",
        "import numpy\nnumpy.load(path, allow_pickle=True)",
        "load(path, weights_only=False)",
        "import importlib.util\nimportlib.util.spec_from_file_location('x', path)",
        "from jinja2 import Environment\nEnvironment()",
    ],
)
def test_a_way_to_run_data_is_found(code: str, build: Build) -> None:
    assert nothing_runs_what_it_reads(build({"worker/runner.py": code}))


def test_other_uses_of_such_words_are_none(build: Build) -> None:
    code = "import re\nre.compile('x')\nmodel.eval()\nrun(shell=False, trust_remote_code=False)\n"
    code += "executor.exec_step(1)\ntorch.save(x)\nload_code(weights_only=True)\n"
    assert nothing_runs_what_it_reads(build({"worker/runner.py": code})) == []


def test_reading_pickles_elsewhere_is_found(build: Build) -> None:
    line = "from pagedserve.models.convert import convert\n"
    files = {"models/convert.py": "", "commands/convert.py": line, "llm.py": line}
    (violation,) = only_the_command_that_converts_reads_pickles(build(files))
    assert violation.startswith("llm.py:2")


def test_a_module_without_a_docstring_is_found(build: Build, tmp_path: Path) -> None:
    build({"worker/runner.py": ""})
    for name in ("batch.py", "__init__.py", "_private.py"):
        (tmp_path / "pagedserve/worker" / name).write_text("x = 1\n")
    house = read_house(tmp_path / "pagedserve")
    assert every_module_says_what_it_is_for(house) == [
        "worker/__init__.py: no docstring",
        "worker/batch.py: no docstring",
    ]


def test_a_large_room_is_found_and_a_large_kernel_is_not(build: Build) -> None:
    long = "x = 1\n" * MAX_LINES
    house = build({"worker/runner.py": long, "kernels/decode.py": long})
    assert rooms_stay_small(house) == [f"worker/runner.py: {MAX_LINES + 1} lines"]
