"""Which modules may import which. Imports within functions, and those for type annotations, count as well."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("var", "var_kernels", "tools", "tests", "benchmarks")
# For each folder of var/, the folders of var/ from which its modules may import.
LAYERS = {
    "model": {"model"},
    "data": {"data"},
    "generation": {"generation", "model"},
    "evaluation": {"evaluation", "generation", "model", "data"},
    "training": {"training", "evaluation", "model", "data"},
    "cli": {"cli", "training", "evaluation", "generation", "model", "data"},
}
BACKENDS = ("reference", "native", "triton")


def modules() -> dict[str, Path]:
    """Every module of the project by its name."""
    found = {}
    for top in TOPS:
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """The modules of the project that a module imports."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            candidates = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            candidates = [(source, alias.name) for alias in node.names]
        else:
            continue
        for source, attribute in candidates:
            target = f"{source}.{attribute}"
            if attribute is not None and target in MODULES:
                yield target
            elif source in MODULES:
                yield source


def cycle_through(start: str, graph: dict[str, set[str]]) -> list[str] | None:
    """A path of imports from the module `start` back to it, or None if there is none."""
    paths, seen = [[start]], set()
    while paths:
        path = paths.pop(0)
        for following in graph[path[-1]]:
            if following == start:
                return [*path, start]
            if following not in seen:
                seen.add(following)
                paths.append([*path, following])
    return None


GRAPH = {name: set(imports(name)) - {name} for name in MODULES}


def test_every_kind_of_import_is_seen():
    assert "var.model.config" in GRAPH["var.model.transformer"]  # relative
    assert "var_kernels.triton.targets" in GRAPH["tools.report.bounds"]  # absolute
    assert "var.cli.demo" in GRAPH["var.cli.images"]  # within a function
    assert "var_kernels.native.build" in GRAPH["var_kernels.native.load"]  # a module as a name


@pytest.mark.parametrize("folder", LAYERS)
def test_a_layer_of_the_model_imports_only_what_lies_below(folder):
    for name in MODULES:
        if name.startswith(f"var.{folder}"):
            for target in GRAPH[name]:
                top, _, rest = target.partition(".")
                if top == "var":
                    assert rest.partition(".")[0] in LAYERS[folder], f"{name} imports {target}"


def test_every_folder_of_the_model_is_a_layer():
    folders = {path.parent.name for path in (ROOT / "var").glob("*/*.py")}
    assert folders == set(LAYERS)


@pytest.mark.parametrize(
    ("top", "allowed"),
    [
        ("var_kernels", {"var_kernels"}),
        ("var", {"var", "var_kernels"}),
        ("tools", {"tools", "var_kernels"}),
        ("benchmarks", {"benchmarks", "var", "var_kernels"}),
    ],
)
def test_the_packages_import_nothing_of_the_tools_or_the_tests(top, allowed):
    for name in MODULES:
        if name.split(".")[0] == top:
            above = {target for target in GRAPH[name] if target.split(".")[0] not in allowed}
            assert not above, f"{name} imports {above}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_imports_no_other_and_no_kernel_its_reference(backend):
    others = tuple(f"var_kernels.{other}" for other in BACKENDS if other != backend)
    # All backends need the definitions of the raw operators, and measurements record the sources of the build.
    shared = {"var_kernels.native.library", "var_kernels.native.build"}
    for name in MODULES:
        if name.startswith(f"var_kernels.{backend}"):
            found = {target for target in GRAPH[name] if target.startswith(others)} - shared
            assert not found, f"{name} imports {found}"


@pytest.mark.parametrize("top", TOPS)
def test_no_modules_import_one_another_in_a_circle(top):
    for name in MODULES:
        if name.split(".")[0] == top:
            circle = cycle_through(name, GRAPH)
            assert circle is None, " -> ".join(circle)


def test_no_test_imports_a_test():
    for name in MODULES:
        for target in GRAPH[name]:
            assert not target.rpartition(".")[2].startswith("test_"), f"{name} imports {target}"


def test_every_file_and_folder_says_what_it_is():
    silent = []
    for name, path in MODULES.items():
        # In tests/, an empty __init__.py only makes a package of a folder.
        is_marker = path.name == "__init__.py" and name.split(".")[0] == "tests"
        if not is_marker and ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None:
            silent.append(name)
    assert not silent


def test_a_folder_fits_one_screen():
    for folder in {path.parent for path in MODULES.values()}:
        entries = [entry for entry in folder.iterdir() if entry.name != "__pycache__"]
        assert len(entries) <= 24, f"{folder.relative_to(ROOT)}: {len(entries)} entries"
