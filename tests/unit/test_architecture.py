"""The floors of the house: imports go down only, and the light floors stay light.

langchain > llm > cli > loadtest > api > engine > runner > models > kernels > core > (errors,
config). `api`, `engine` and `core` never import torch, so that the whole server can be tested
without a model. The load test is a client: of the server it has the tokenizer and the chat
template, nothing else.
"""

import ast
import sys
from pathlib import Path

import pytest

import streamserve
import streamserve.models
from tests.interpreter import ROOT, run_python

FLOORS = [
    "base",
    "core",
    "kernels",
    "models",
    "runner",
    "engine",
    "api",
    "loadtest",
    "cli",
    "llm",
    "langchain",
]
BASE = {"streamserve", "streamserve.errors", "streamserve.config"}
TORCH_FREE = {"base", "core", "engine", "api"}
HEAVY = {"torch", "transformers", "numba", "triton", "numpy"}
# What a floor may import although it is not below: `engine` meets `runner` in `core`'s protocol.
FORBIDDEN = {
    "engine": {"runner", "models", "kernels"},
    "api": {"runner", "models", "kernels"},
    "loadtest": {"api", "runner", "models", "kernels", "core"},
}


def _modules() -> dict[str, Path]:
    files = {}
    for root, top in (
        (ROOT, "streamserve"),
        (ROOT / "kernels", "streamserve_kernels"),
        (ROOT / "loadtest", "streamserve_loadtest"),
    ):
        for path in (root / top).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts).removesuffix(".__init__")] = path
    return files


MODULES = _modules()


def _floor(module: str) -> str:
    if module in BASE:
        return "base"
    if module == "streamserve.__main__":
        return "cli"
    top, _, rest = module.partition(".")
    if top in {"streamserve_kernels", "streamserve_loadtest"}:
        return top.removeprefix("streamserve_")
    return rest.split(".")[0]


def _imports(module: str, path: Path) -> set[str]:
    """Every imported module, also those inside functions; ``from a import b`` counts a.b if one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    return {module: _imports(module, path) for module, path in MODULES.items()}


def test_every_module_has_a_floor():
    assert {_floor(module) for module in MODULES} <= set(FLOORS)


def test_imports_go_down(imports):
    wrong = {module: _wrong(module, imports) for module in MODULES}
    assert {module: names for module, names in wrong.items() if names} == {}


def _wrong(module: str, imports: dict[str, set[str]]) -> set[str]:
    """What the module imports and may not."""
    floor = _floor(module)
    ours = {name for name in imports[module] if name.split(".")[0].startswith("streamserve")}
    wrong = {name for name in ours if FLOORS.index(_floor(name)) > FLOORS.index(floor)}
    wrong |= {name for name in ours if _floor(name) in FORBIDDEN.get(floor, ())}
    if floor == "kernels":
        wrong |= {name for name in ours if _floor(name) != "kernels"}
    if floor in TORCH_FREE:
        wrong |= {name for name in imports[module] if name.split(".")[0] in HEAVY}
    return wrong


@pytest.mark.parametrize("module", sorted(m for m in MODULES if _floor(m) in {"core", "base"}))
def test_core_is_standard_library_only(module, imports):
    for name in imports[module]:
        top = name.split(".")[0]
        assert top == "streamserve" or top in sys.stdlib_module_names, f"{module} imports {name}"


def test_no_import_cycles(imports):
    state: dict[str, int] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert state.get(module) != 1, f"cycle: {' -> '.join((*trail, module))}"
        if state.get(module) == 2:
            return
        state[module] = 1
        for name in sorted(imports[module]):
            if name in MODULES and name != module:
                visit(name, (*trail, module))
        state[module] = 2

    for module in sorted(MODULES):
        visit(module, ())


def test_only_the_cli_reads_argv_and_the_environment():
    for module, path in MODULES.items():
        if _floor(module) in {"cli", "kernels", "loadtest"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                assert name not in {"sys.argv", "os.environ", "os.getenv"}, f"{module}: {name}"


def test_kernels_folder_is_not_a_package():
    """Hugging Face publishes a package called `kernels`; ours would shadow it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_files_stay_readable():
    for module, path in MODULES.items():
        lines = len(path.read_text().splitlines())
        assert lines <= 550, f"{module} has {lines} lines; split it"


def test_serving_without_a_model_leaves_torch_alone():
    """The import of every torch-free floor, in a fresh interpreter."""
    light = sorted(m for m in MODULES if _floor(m) in TORCH_FREE)
    code = f"import sys, {', '.join(light)}; print(*sorted({HEAVY} & set(sys.modules)))"
    assert run_python("-c", code).stdout.split() == []


def test_importing_the_package_and_its_names_leaves_torch_alone():
    """Torch is there when a model is loaded, and takes seconds."""
    code = (
        "import streamserve, sys; names = [getattr(streamserve, n) for n in streamserve.__all__]; "
        f"print(*sorted({HEAVY} & set(sys.modules)))"
    )
    assert run_python("-c", code).stdout.split() == []


@pytest.mark.parametrize("package", [streamserve, streamserve.models])
def test_a_packages_names_are_those_of_its_stub(package):
    stub = ast.parse(Path(package.__file__).with_suffix(".pyi").read_text())
    named = {
        alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert named == set(package.__all__) - {"__version__"}


def test_serving_on_a_cpu_leaves_triton_alone():
    """What a server on a CPU imports, kernels and all; a CPU-only installation has no triton."""
    code = (
        "import sys, streamserve.cli.compose, streamserve.cli.compose_cpu, streamserve_kernels; "
        "streamserve_kernels.load('cpu'); "
        "print(*(m for m in sys.modules if m.split('.')[0] == 'triton' or '.cuda.' in m "
        "and m.startswith('streamserve')))"
    )
    assert run_python("-c", code).stdout.split() == []
