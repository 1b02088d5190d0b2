"""The rules of the house, read from source text alone: what each function finds, it returns as
sentences, one for each breach. `root` is the package's folder, `trainer/`."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# from the lowest up; rooms on one floor may import each other in one direction
FLOORS: tuple[tuple[str, ...], ...] = (
    ("kernels", "media", "common"),
    ("attention", "data"),
    ("ops", "backbones"),
    ("methods", "diffusion"),
    ("config",),
    ("runs",),
    ("export", "training"),
    ("evaluation",),
    ("continual",),
    ("cli",),
    ("__main__",),
)
LEVELS = ("weight", "function", "feature", "map", "application")
FAMILY = "\nFAMILY = Family("  # in the text of a family's file
# names of methods that are also words a page about attention needs
ORDINARY = {
    "full": "as in full resolution",
    "linear_attention": "the field's word for a kind of attention, which a model may have itself",
}
LOOSE_MODULES, LONG_FUNCTIONS, LONG_FILES = 3, 5, 5
FUNCTION_LINES, FILE_LINES, POSITIONAL = 40, 320, 3
# what every file of one kind calls alike: a room's protocol
PROTOCOLS = {
    "export/formats": {"write", "read", "carries", "relearns", "remark", "refuse", "usage"},
    "backbones": {"load", "make", "initialise", "encode_prompts", "inputs", "pipeline", "check"},
    "cli": {"run"},
}
# functions of other libraries that take any number of values, or take them by position only
VARIADIC = {
    "max", "min", "zip", "map", "print", "chain", "join", "view", "reshape", "permute", "repeat",
    "expand", "zeros", "ones", "empty", "randn", "rand", "save_for_backward", "apply", "info",
    "warning", "add_row", "broadcast_tensors", "add_argument", "block_diag", "partial",
    "seed_of",
}  # fmt: skip


def files_of(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(root: Path) -> dict[str, set[str]]:
    """Module to the modules of the package it imports, anywhere in it: inside functions and for
    types alone, too."""
    modules = {module_of(path, root): path for path in files_of(root)}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        targets = (
            target for node in ast.walk(tree_of(path)) for target in _targets(node, modules.keys())
        )
        found[name] = {target for target in targets if target != name}
    return found


def _targets(node: ast.AST, modules: object) -> Iterator[str]:
    assert hasattr(modules, "__contains__")
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are by full name"
        whole = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name in modules else str(node.module) for name in whole]
    else:
        return
    yield from (name for name in names if name in modules)


def room_of(module: str) -> str | None:
    """`attention` of `trainer.attention.op`; None of the package itself."""
    return module.split(".")[1] if "." in module else None


def upward_imports(root: Path) -> list[str]:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    found = []
    for module, targets in imports_of(root).items():
        own = room_of(module)
        for target in targets:
            other = room_of(target)
            if own is None or other is None or own == other:
                continue
            if floor[own] < floor[other]:
                found.append(f"{module} imports {target}, which is on a higher floor")
    return found


def rooms_without_floor(root: Path) -> list[str]:
    known = {room for rooms in FLOORS for room in rooms}
    rooms = {room_of(module_of(path, root)) for path in files_of(root)}
    return [f"{room} is on no floor" for room in rooms if room is not None and room not in known]


def neighbours_both_ways(root: Path) -> list[str]:
    """Rooms of one floor that import each other."""
    arrows = {
        (room_of(module), room_of(target))
        for module, targets in imports_of(root).items()
        for target in targets
    }
    return [
        f"{one} and {other} import each other"
        for rooms in FLOORS
        for one in rooms
        for other in rooms
        if one < other and {(one, other), (other, one)} <= arrows
    ]


def import_circles(root: Path) -> list[str]:
    """Every set of modules each of which reaches all others."""
    graph = imports_of(root)
    reach = {module: _reached(module, graph) for module in graph}
    circles = {
        frozenset({module, *(other for other in reach[module] if module in reach[other])})
        for module in graph
        if module in reach[module]
    }
    return [f"{' and '.join(sorted(circle))} import each other" for circle in circles]


def _reached(start: str, graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += graph[module]
    return seen


def foreign_names(root: Path) -> list[str]:
    """Names of methods and families anywhere in the text of `attention/`."""
    methods = [path for level in LEVELS for path in (root / "methods" / level).glob("*.py")]
    families = [
        path
        for path in (root / "backbones").glob("*.py")
        if FAMILY in path.read_text(encoding="utf-8")
    ]
    names = {path.stem for path in (*methods, *families)} - {"__init__", *ORDINARY}
    found = []
    for path in files_of(root / "attention"):
        text = path.read_text(encoding="utf-8")
        split = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", text)  # SanaLinear -> Sana Linear
        for name in sorted(names):
            spelling = name.replace("_", "[-_ ]?")
            pattern = re.compile(rf"(?<![a-z0-9]){spelling}(?![a-z0-9])")
            if pattern.search(text.lower()) or pattern.search(split.lower()):
                found.append(f"{path.relative_to(root)} names {name}")
    return found


def loose_modules(root: Path) -> list[str]:
    loose = [path.name for path in root.glob("*.py") if path.stem != "__init__"]
    return sorted(loose) if len(loose) > LOOSE_MODULES else []


def repeated_file_names(root: Path) -> list[str]:
    """A verb's file may be named as the function it calls; the file of an op, a kernel or a file
    format as the method it belongs to."""
    methods = {path.stem for level in LEVELS for path in (root / "methods" / level).glob("*.py")}
    homes = defaultdict(list)
    for path in files_of(root):
        room = path.relative_to(root).parts[0]
        own = room in ("ops", "kernels") or path.parent.name == "formats"
        beside = room == "cli" or (own and path.stem in methods)
        if path.stem != "__init__" and not beside:
            homes[path.stem].append(str(path.relative_to(root)))
    return [f"{' and '.join(paths)} have one name" for paths in homes.values() if len(paths) > 1]


def repeated_public_names(root: Path) -> list[str]:
    homes = defaultdict(list)
    for path in files_of(root):
        own = str(path.relative_to(root).parent)
        for node in tree_of(path).body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if not node.name.startswith("_") and node.name not in PROTOCOLS.get(own, ()):
                homes[node.name].append(str(path.relative_to(root)))
    return [
        f"{name} is defined in {' and '.join(paths)}"
        for name, paths in homes.items()
        if len(paths) > 1
    ]


def long_functions(root: Path) -> list[str]:
    found = []
    for path in files_of(root):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    found.append(f"{path.relative_to(root)} {node.name} has {lines} lines")
    return found


def long_files(root: Path) -> list[str]:
    sizes = {path: path.read_text(encoding="utf-8").count("\n") for path in files_of(root)}
    return [
        f"{path.relative_to(root)} has {lines} lines"
        for path, lines in sizes.items()
        if lines > FILE_LINES
    ]


def crowded_calls(root: Path) -> list[str]:
    """Calls with more than three positional arguments; a star hides how many there are."""
    found = []
    for path in files_of(root):
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call) or len(node.args) <= POSITIONAL:
                continue
            if any(isinstance(argument, ast.Starred) for argument in node.args):
                continue
            name = ast.unparse(node.func)
            if name.rpartition(".")[2] not in VARIADIC:
                where = f"{path.relative_to(root)}:{node.lineno}"
                found.append(f"{where} {name} takes {len(node.args)} by position")
    return found
