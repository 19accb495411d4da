"""What the sources promise about their own form: an op's parts, what native code may not contain,
sizes."""

import ast
import inspect
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

import elastic_infer.ops
from elastic_infer import _C
from elastic_infer.ops import OpSpec, registry

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(p.name for p in (ROOT / "csrc/ops").iterdir() if p.is_dir())
SPECS = registry()

# The ops that a model's pass is made of.
OPS = {
    "embed",
    "rms_norm",
    "matmul",
    "causal_conv",
    "ssm_scan",
    "ssm_step",
    "gated_norm",
    "mamba_step",
    "kv_append",
    "attention_prefill",
    "attention_decode",
    "moe_route",
    "moe_matmul",
    "sample",
}


def tracked(*patterns):
    """Paths of the tracked files, relative to the root; all sources where there is no git."""
    done = subprocess.run(
        ["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        names = [name for name in done.stdout.split("\0") if name]
    else:
        folders = ("csrc", "elastic_infer", "tests", "bench", "examples", "docs")
        names = [
            str(p.relative_to(ROOT))
            for folder in folders
            for pattern in patterns
            for p in (ROOT / folder).rglob(pattern)
        ]
    found = [name for name in names if (ROOT / name).is_file()]
    assert found, patterns
    return found


@cache
def syntax(path):
    return ast.parse((ROOT / path).read_text())


def functions(node):
    """All functions below a module, class or function; expressions are not searched."""
    for child in getattr(node, "body", ()):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
        yield from functions(child)


def code(path):
    """A C++ source without its comments."""
    text = (ROOT / path).read_text()
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


# -- ops ---------------------------------------------------------------------------------------


def test_registry_equals_the_folders():
    assert set(FOLDERS) == set(SPECS)
    assert set(SPECS) >= OPS


@pytest.mark.parametrize("op", FOLDERS)
def test_op_has_all_its_parts(op):
    folder = ROOT / "csrc/ops" / op
    texts = {}
    for name in (f"{op}.h", f"{op}.cpp", f"{op}_cpu.cpp"):
        assert (folder / name).is_file(), f"csrc/ops/{op}/{name} is missing"
        texts[name] = (folder / name).read_text()
    contract, checks, kernel = texts.values()
    assert contract.startswith(f"// {op}: "), "the contract says what the op computes"
    assert f"EI_CPU_KERNEL({op}, " in contract
    assert checks.startswith("// ") and f'm.def("{op}"' in checks
    for heading in ("Computes", "Layout", "Work split", "Limits", "Speed"):
        assert f"// {heading}: " in kernel, f"{op}_cpu.cpp does not say {heading}"
    assert f"void {op}(const" in kernel
    assert hasattr(_C, op)


@pytest.mark.parametrize("op", FOLDERS)
def test_op_module_is_complete(op):
    """A documented function of the op's name, and a spec whose every part is there."""
    module = __import__(f"elastic_infer.ops.{op}", fromlist=[op])
    function, spec = getattr(module, op), SPECS[op]
    assert isinstance(spec, OpSpec) and spec in module.SPECS
    documentation = inspect.getdoc(function)
    for part in ("Args:", "Raises:"):
        assert part in documentation, f"{op}: docstring lacks {part}"
    for name in inspect.signature(function).parameters:
        assert re.search(rf"\b{name}\b", documentation), f"{op}: {name} is not documented"
    assert list(inspect.signature(function).parameters)[-1] == "run"
    cases = list(spec.cases())
    awkward, bench = [c for c in cases if not c.get("bench")], [c for c in cases if c.get("bench")]
    assert len(awkward) >= 2, "the smallest case, and at least one of awkward sizes"
    assert bench, "at least one case of a real model's size"
    for case in cases:
        moved, flops = spec.cost(case, 2)
        assert isinstance(moved, int) and isinstance(flops, int) and moved > 0 and flops >= 0
    assert spec.outputs and spec.rows and spec.row
    # Rows of logits have no narrower form and are read whole; kv_append has no narrower form.
    assert spec.sliced or op in ("sample", "softmax_stats", "kv_append"), "no slice law"
    assert spec.poison or op in ("sample", "softmax_stats"), "no poison law"


def test_public_names_of_ops():
    assert set(elastic_infer.ops.__all__) == {"OpSpec", "Pool", "Step", "registry"}


# -- floors ------------------------------------------------------------------------------------

# The package from the ground up. A module imports from its own folder or from floors below.
FLOORS = (
    ("public", "version", "torch_modes", "rounding"),
    ("errors",),
    ("showing",),
    ("codes", "outputs", "files"),
    ("user_calls", "value_checks"),
    ("checkpoint", "text", "device", "ops"),
    ("cache", "plans", "sampling", "elastify"),
    ("model", "quantize"),
    ("scheduling", "sizing"),
    ("engine",),
    ("",),  # the public names, `elastic_infer/__init__.py`
    ("reasoner",),
    ("cli",),
    ("__main__",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = {
    path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
    for path in tracked("elastic_infer/**.py")
    if path.endswith(".py")
}


def room(module):
    """The folder or top-level file that a module belongs to; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def imports_of(module):
    """Modules of the package that a module imports, also for type checkers and inside functions."""
    path = MODULES[module]
    inside = module.split(".") if path.endswith("__init__.py") else module.split(".")[:-1]
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for name in node.names:
                if f"{base}.{name.name}" in MODULES:
                    yield f"{base}.{name.name}"
                elif base in MODULES and name.name != "_C":
                    yield base


def test_every_folder_has_a_floor():
    assert {room(module) for module in MODULES} == set(FLOOR)


def test_imports_go_down_or_stay_in_the_folder():
    """Stands for the architecture: nothing below knows what is built on it."""
    up = [
        f"{module} -> {other}"
        for module in MODULES
        for other in imports_of(module)
        if room(other) != room(module) and FLOOR[room(other)] >= FLOOR[room(module)]
    ]
    assert not up


def test_no_module_imports_itself_in_a_circle():
    graph = {module: set(imports_of(module)) - {module} for module in MODULES}
    done = set()

    def walk(module, way):
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module in done:
            return
        for other in sorted(graph[module]):
            walk(other, [*way, module])
        done.add(module)

    for module in MODULES:
        walk(module, [])


def given_by(module):
    """{name: where from} that a module of the package imports from others."""
    names = {}
    inside = module.split(".")[:-1]
    for node in ast.walk(syntax(MODULES[module])):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*inside[: len(inside) - node.level + 1], *filter(None, [node.module])])
            names |= {name.name: base for name in node.names}
    return names


def test_a_name_is_imported_from_the_module_that_defines_it():
    """A name's home can be told from its import; packages hand on their public names."""
    modules = {name for name, path in MODULES.items() if not path.endswith("__init__.py")}
    given = {module: given_by(module) for module in modules}
    handed_on = [
        f"{module}: {name} of {base}"
        for module in modules
        for name, base in given[module].items()
        if base in modules and name in given[base]
    ]
    listed = [
        f"{module}: {name} in __all__"
        for module in modules
        for node in syntax(MODULES[module]).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for name in ast.literal_eval(node.value)
        if name in given[module]
    ]
    assert not handed_on and not listed


# -- native code -------------------------------------------------------------------------------

NATIVE = tracked("*.cpp", "*.h", "*.cu", "*.cuh")
FORBIDDEN = {
    r"#\s*include\s*[<\"](torch|ATen|c10)/": "torch headers: the binding is DLPack",
    r"\bcuda(Malloc|Free)\w*\s*\(": "ops never allocate",
    r"\bcudaDeviceSynchronize\s*\(": "ops never synchronize",
    r"\b(secure_)?getenv\s*\(": "nothing is read from the environment",
    r"\b(f?printf|puts)\s*\(|std::cout|std::cerr": "a library does not print",
    r"(?<![\w.])(exit|abort|_Exit)\s*\(": "errors are exceptions",
    r"\bassert\s*\(": "checks are not compiled away",
    r"\bTODO\b|\bFIXME\b": "unfinished",
}

# The one file that calls the CUDA runtime for memory: workspaces, taken outside of ops.
EXEMPT = {r"\bcuda(Malloc|Free)\w*\s*\(": ["csrc/host/device.cpp"]}


@pytest.mark.parametrize("pattern", FORBIDDEN, ids=FORBIDDEN.values())
def test_native_code_is_free_of(pattern):
    offenders = [
        f"{path}: {found.group()}"
        for path in NATIVE
        if path.startswith("csrc/") and path not in EXEMPT.get(pattern, ())
        for found in re.finditer(pattern, code(path))
    ]
    assert not offenders


def test_patterns_find_what_they_are_for():
    """The forbidden patterns match what they forbid, and nothing like it."""
    bad = [
        "#include <torch/extension.h>",
        "cudaMalloc(&p, 4);",
        "cudaDeviceSynchronize();",
        'std::getenv("X")',
        'std::printf("x")',
        "std::exit(1)",
        "assert(x)",
        "TODO",
    ]
    for pattern, text in zip(FORBIDDEN, bad, strict=True):
        assert re.search(pattern, text), text
    for text in ('snprintf(b, 9, "x")', "on_exit(3)", "static_assert(x)", "#include <string>"):
        assert not any(re.search(pattern, text) for pattern in FORBIDDEN), text


def test_intrinsics_live_in_the_vector_headers():
    offenders = [
        path
        for path in NATIVE
        if not re.search(r"csrc/cpu/vec_avx\w*\.h$", path)
        and re.search(r"\b_mm\d*_\w+\s*\(|\b__m(128|256|512)|[a-z]+mmintrin\.h", code(path))
    ]
    assert not offenders


def test_headers_are_guarded_and_begin_with_their_purpose():
    for path in NATIVE:
        text = (ROOT / path).read_text()
        if path.startswith("csrc/") and path.endswith((".h", ".cuh")):
            assert text.startswith("// "), f"{path} does not begin with what it is for"
            assert "#pragma once" in text, path


# -- sizes -------------------------------------------------------------------------------------

SOURCES = tracked("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")


def test_files_are_at_most_500_lines():
    long = {p: n for p in SOURCES if (n := len((ROOT / p).read_text().splitlines())) > 500}
    assert not long


def test_python_functions_are_at_most_80_lines():
    long = [
        f"{path}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1}"
        for path in SOURCES
        if path.endswith(".py")
        for node in functions(syntax(path))
        if node.end_lineno - node.lineno >= 80
    ]
    assert not long


def test_lines_are_at_most_100_characters():
    long = [
        f"{path}:{number}"
        for path in SOURCES
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
        if len(line) > 100
    ]
    assert not long


def test_public_functions_are_documented():
    """Modules and public functions of the library say what they are for."""
    missing = []
    for path in SOURCES:
        if not path.startswith("elastic_infer/") or not path.endswith(".py"):
            continue
        module = syntax(path)
        if not ast.get_docstring(module):
            missing.append(path)
        missing += [
            f"{path}: {node.name}"
            for node in module.body
            if isinstance(node, ast.FunctionDef)
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
        ]
    assert not missing


def test_relative_links_of_documents_lead_somewhere():
    broken = []
    for path in tracked("*.md"):
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / path).read_text()):
            if "://" not in link and not (ROOT / path).parent.joinpath(link).exists():
                broken.append(f"{path}: {link}")
    assert not broken


def test_the_library_reads_no_environment_variable():
    offenders = [
        path
        for path in SOURCES
        if path.startswith("elastic_infer/")
        and path.endswith(".py")
        and re.search(r"\bos\.(environ|getenv)\b", (ROOT / path).read_text())
    ]
    assert not offenders


def test_docstrings_begin_with_a_verb_or_a_noun():
    """No headless question ("What …"), and no person without a part ("nobody", "whoever")."""
    questions = ("What", "Whether", "How", "Which", "Where", "Who", "When", "Why")
    persons = r"\b(?:no|any|some|every)body\b|\bwhoever\b"
    folders = ("elastic_infer/", "bench/", "docs/", "tools/", "examples/")
    for path in (path for path in tracked("*.py") if path.startswith(folders)):
        for node in ast.walk(syntax(path)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                said = ast.get_docstring(node) or ""
                place = f"{path}: {getattr(node, 'name', 'module')}"
                heads = questions if path.startswith("elastic_infer/") else questions[:2]
                assert said.split(" ")[0] not in heads, place
                if path.startswith("elastic_infer/"):
                    assert not re.search(persons, said, re.IGNORECASE), place
