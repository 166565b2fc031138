"""A digest of the code that a result depends on, followed through names and imports."""

import ast
import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path

from collapse.utils.files import ROOT


def digest_of_code(*functions: Callable) -> str:
    """SHA-256 of the source of these functions and of everything in this repository that they use.

    Follows names of the same module and of imported modules of this repository, through functions,
    classes and constants. A method counts where the class of its object is named. Comments,
    docstrings and layout do not count.
    """
    todo = [(Path(inspect.getsourcefile(f)).resolve(), f.__name__) for f in functions]
    seen: dict[tuple[Path, str], str] = {}
    while todo:
        place = todo.pop()
        definitions, imports = _module(place[0])
        if place in seen or place[1] not in definitions:
            continue
        nodes = definitions[place[1]]
        seen[place] = "\n".join(ast.unparse(node) for node in nodes)
        for node in (part for whole in nodes for part in ast.walk(whole)):
            if isinstance(node, ast.Name):
                todo.append((place[0], node.id))
                if node.id in imports:
                    todo.append(imports[node.id])
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module, name = imports.get(node.value.id, (None, ""))
                if module and not name:  # an attribute of an imported module
                    todo.append((module, node.attr))
    texts = sorted(
        f"{path.relative_to(ROOT)} {name}\n{text}" for (path, name), text in seen.items()
    )
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


@cache
def _module(path: Path) -> tuple[dict[str, list[ast.AST]], dict[str, tuple[Path, str]]]:
    """For a file: name -> its definitions, and imported name -> (file of this repository, name).

    The name of an import is "" where the module itself is imported.
    """
    definitions: dict[str, list[ast.AST]] = {}
    imports: dict[str, tuple[Path, str]] = {}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.Import):
            for alias in node.names:
                if file := _file(alias.name):
                    imports[alias.asname or alias.name] = file, ""
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if file := _file(f"{node.module}.{alias.name}"):
                    imports[alias.asname or alias.name] = file, ""
                elif file := _file(node.module):
                    imports[alias.asname or alias.name] = file, alias.name
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        else:
            targets = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
            names = [part.id for part in targets if isinstance(part.ctx, ast.Store)]
        for name in names:
            definitions.setdefault(name, []).append(node)
    return definitions, imports


def _file(module: str) -> Path | None:
    """The file of a module of this repository; None for any other."""
    path = ROOT / (module.replace(".", "/") + ".py")
    return path if path.exists() else None
