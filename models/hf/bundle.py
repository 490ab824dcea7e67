"""Writes one self-contained modeling file from our own sources, so that a mixer is written once.

It works like a linker. From the classes of `models/hf/modeling.py` it follows every name through our modules
and keeps the statements that are reached; a name that two modules use gets the module's name in front. Left
out are mixers that the student does not have and every backend of an operator that is not plain torch.
"""

import ast
import sys
from collections.abc import Iterable, Sequence
from textwrap import wrap

from models.hf.sources import (
    Module,
    Statement,
    Target,
    bound_within,
    read_module,
    referred_names,
)
from models.mixers import MIXERS

HEAD = "models.hf.modeling"
ROOTS = (Target(HEAD, "TransmuteConfig"), Target(HEAD, "TransmuteForCausalLM"))
REPLACED = {"kernels.dispatch": "models.hf.dispatch"}
PORTABLE_BACKENDS = ("chunked", "reference", "lists", "pool")  # and what they share
RULE = "# " + "-" * 107
HEADER = '''"""A language model converted by Transmute: a Transformer with other mixers where attention was.

Made from Transmute's sources; the lines above each part name its file. It needs torch and transformers only.
"""
# ruff: noqa: E501 - a name that two parts share has its file's name in front, which makes its lines longer
'''


def bundle(mixers: Iterable[str]) -> str:
    """The text of a modeling file for students with the given mixers; the same mixers give the same text.

    Raises:
        ValueError: for a source that cannot stand in a single file, or names that stay in conflict.
    """
    used = set(mixers)
    unused = {mixer.__module__ for name, mixer in MIXERS.items() if name not in used}
    linker = _Linker(unused)
    for root in ROOTS:
        linker.reach(root)
    return linker.text()


class _Linker:
    """Collects the statements that are reached, and writes them.

    Args:
        left_out: modules that must not be reached.
    """

    def __init__(self, left_out: set[str]):
        self.left_out = left_out
        self.modules: dict[str, Module] = {}
        self.order: list[str] = []  # a module comes after those it imports
        self.kept: dict[str, list[Statement]] = {}

    def reach(self, target: Target) -> None:
        """Keeps the statement that a name means, and everything that it refers to."""
        module = self._module(target.module)
        statement = module.defining(target.name)
        if statement is None:  # handed on by a package
            if target.name not in module.imports:
                raise ValueError(f"{module.path} has no {target.name}")
            self.reach(self._resolved(module.imports[target.name]))
            return
        if statement in self.kept[module.name]:
            return
        self.kept[module.name].append(statement)
        for name in sorted(self._references(module, statement)):
            if module.defining(name) is not None:
                self.reach(Target(module.name, name))
        for target in self._imported(module, statement).values():
            if target.ours and target.name is not None:
                self.reach(target)

    def text(self) -> str:
        """The whole file."""
        names = self._final_names()
        parts = [HEADER, self._import_lines(names)]
        for name in self.order:
            module, statements = self.modules[name], self.kept[name]
            if statements:
                space = "\n" if len(parts) == 2 else "\n\n"
                parts.append(f"{space}{RULE}\n{_heading(module)}\n{RULE}\n")
            previous = None
            for statement in sorted(statements, key=lambda kept: kept.first_line):
                parts.append(_gap(previous, statement) + self._linked(module, statement, names))
                previous = statement
        return "".join(parts)

    def _module(self, name: str) -> Module:
        """A module, read and put in order when it is first met."""
        if name in self.modules:
            return self.modules[name]
        if self._is_left_out(name):
            raise ValueError(f"{name} cannot stand in an exported file, but something there refers to it")
        module = self.modules[name] = read_module(name)
        self.kept[name] = []
        for target in map(self._resolved, module.imports.values()):
            if target.ours and not self._is_left_out(target.module):
                self._module(target.module)
        self.order.append(name)
        return module

    def _is_left_out(self, name: str) -> bool:
        parts = name.split(".")
        special = parts[0] == "kernels" and len(parts) == 3 and parts[2] not in PORTABLE_BACKENDS
        return special or name in self.left_out

    def _resolved(self, target: Target) -> Target:
        return Target(REPLACED.get(target.module, target.module), target.name)

    def _dropped(self, module: Module, statement: Statement) -> list[ast.AST]:
        """Elements of a table that lead to what is left out: backends, mixers."""
        table = getattr(statement.node, "value", None)
        gone = {
            name
            for name, target in module.imports.items()
            if self._is_left_out(self._resolved(target).module)
        }
        elements = getattr(table, "elts", None) or getattr(table, "values", None) or ()
        return [e for e in elements if isinstance(table, ast.Tuple | ast.Dict) and referred_names(e) & gone]

    def _references(self, module: Module, statement: Statement) -> set[str]:
        """Names that a statement mentions outside of its dropped elements."""
        dropped = self._dropped(module, statement)
        names = [referred_names(node) for node in _children_but(statement.node, dropped)]
        return set().union(*names) - set(statement.names)

    def _imported(self, module: Module, statement: Statement) -> dict[str, Target]:
        """Imported names and `module.name` expressions of a statement, as written -> what they mean."""
        found = {}
        mentioned = self._references(module, statement)
        for local, target in module.imports.items():
            target = self._resolved(target)
            if local not in mentioned:
                continue
            found[local] = target
            if target.ours and target.name is None:
                for node in _attributes(statement.node, local):
                    found[f"{local}.{node.attr}"] = Target(target.module, node.attr)
        return found

    def _origin(self, target: Target) -> Target:
        """Where a name is defined, behind packages that hand it on."""
        module = self._module(target.module)
        if module.defining(target.name) is not None:
            return target
        return self._origin(self._resolved(module.imports[target.name]))

    def _final_names(self) -> dict[Target, str]:
        """The name of every kept definition in the file.

        Raises:
            ValueError: where two definitions would still share a name.
        """
        every = [Target(m, n) for m in self.order for kept in self.kept[m] for n in kept.names]
        written = [target.name for target in every]
        final = {t: t.name if written.count(t.name) == 1 else _with_module(t) for t in every}
        taken = list(final.values())
        if twice := sorted({name for name in taken if taken.count(name) > 1}):
            raise ValueError(f"{twice}: two modules of an exported file define this; rename one of them")
        return final

    def _import_lines(self, names: dict[Target, str]) -> str:
        """The imports of other people's packages that kept statements need, sorted as ruff sorts them.

        Raises:
            ValueError: where two modules mean different things by a name.
        """
        meant: dict[str, Target] = {}
        for name in self.order:
            for statement in self.kept[name]:
                for local, target in self._imported(self.modules[name], statement).items():
                    if target.ours:
                        continue
                    if meant.setdefault(local, target) != target or local in names.values():
                        raise ValueError(f"{name}: {local!r} means something else elsewhere; rename it there")
        return _import_block(meant)

    def _linked(self, module: Module, statement: Statement, names: dict[Target, str]) -> str:
        """A statement's text, with what it refers to under its final name and without dropped elements."""
        edits = _without(statement, self._dropped(module, statement))
        gaps = [(start, end) for start, end, _ in edits]
        for written, final in self._renamed(module, statement, names).items():
            inner = written.partition(".")[0]
            if inner in bound_within(statement.node) - set(statement.names):
                raise ValueError(f"{module.path}: {statement.names[0]} uses the name {inner!r} for its own")
            for span in _spans(statement, written):
                if not any(start <= span[0] < end for start, end in gaps):
                    edits.append((*span, final))
        text = statement.text.encode()
        for start, end, new in sorted(edits, reverse=True):
            text = text[:start] + new.encode() + text[end:]
        return text.decode()

    def _renamed(self, module: Module, statement: Statement, names: dict[Target, str]) -> dict[str, str]:
        """What a statement writes -> the final name, where the two differ."""
        meant = {own: names.get(Target(module.name, own), own) for own in self._own_names(module)}
        for written, target in self._imported(module, statement).items():
            if target.ours and target.name is not None:
                meant[written] = names[self._origin(target)]
        return {written: final for written, final in meant.items() if written != final}

    def _own_names(self, module: Module) -> list[str]:
        return [name for statement in self.kept[module.name] for name in statement.names]


def _children_but(node: ast.AST, dropped: Sequence[ast.AST]) -> list[ast.AST]:
    """All nodes below one that are names and do not stand in a dropped one."""
    if any(node is gone for gone in dropped):
        return []
    below = [found for child in ast.iter_child_nodes(node) for found in _children_but(child, dropped)]
    return [node, *below] if isinstance(node, ast.Name) else below


def _attributes(node: ast.AST, local: str) -> list[ast.Attribute]:
    """The expressions `local.something`."""
    inner = [found for found in ast.walk(node) if isinstance(found, ast.Attribute)]
    return [found for found in inner if isinstance(found.value, ast.Name) and found.value.id == local]


def _spans(statement: Statement, written: str) -> list[tuple[int, int]]:
    """Where a name, or `module.name`, stands in a statement's text; definitions included."""
    node = statement.node
    local, _, attribute = written.partition(".")
    if attribute:
        return [statement.span(found) for found in _attributes(node, local) if found.attr == attribute]
    found = [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == local]
    spans = [statement.span(name) for name in found]
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == local:
        start = statement.span(node)[0] + len("def " if isinstance(node, ast.FunctionDef) else "class ")
        spans.append((start, start + len(local.encode())))
    return spans


def _without(statement: Statement, dropped: Sequence[ast.AST]) -> list[tuple[int, int, str]]:
    """Edits (start, end, new text) that leave a table with the elements that are not dropped, one a line."""
    if not dropped:
        return []
    table = statement.node.value
    if isinstance(table, ast.Tuple):
        pairs = [(element, element) for element in table.elts]
    else:
        pairs = list(zip(table.keys, table.values, strict=True))
    kept = [pair for pair in pairs if not any(pair[1] is gone for gone in dropped)]
    start, end = statement.span(table)
    edits, place = [], start + 1
    for index, (first, last) in enumerate(kept):
        edits.append((place, statement.span(first)[0], ",\n    " if index else "\n    "))
        place = statement.span(last)[1]
    return [*edits, (place, end - 1, ",\n" if kept else "")]


def _with_module(target: Target) -> str:
    """A name with its module's in front: `run` of kernels/wkv7/chunked.py becomes `wkv7_chunked_run`."""
    words = [word for word in target.module.split(".")[1:] if word not in ("mixers", "hf")]
    bare = target.name.lstrip("_")
    if bare.isupper():
        bare = "_".join([*words, bare]).upper()
    elif bare[0].isupper():
        bare = "".join(word.capitalize() for word in words) + bare
    else:
        bare = "_".join([*words, bare])
    return f"_{bare}" if target.name.startswith("_") else bare


def _heading(module: Module) -> str:
    """The module's path and docstring as comments."""
    lines = f"{module.path}: {module.docstring}".splitlines()
    wrapped = [part for line in lines for part in (wrap(line, 107) if len(line) > 107 else [line])]
    return "\n".join(f"# {line}".rstrip() for line in wrapped)


def _gap(previous: Statement | None, statement: Statement) -> str:
    """Two empty lines beside functions and classes, one between constants."""
    blocks = (ast.FunctionDef, ast.ClassDef)
    if previous is None:
        return "\n" if not isinstance(statement.node, blocks) else "\n\n"
    return "\n\n" if isinstance(statement.node, blocks) or isinstance(previous.node, blocks) else ""


def _import_block(meant: dict[str, Target]) -> str:
    """Import statements: standard library first, then packages."""
    blocks = []
    for standard in (True, False):
        chosen = {name: t for name, t in meant.items() if _is_standard(t.module) == standard}
        lines = [_plain_import(name, t) for name, t in chosen.items() if t.name is None]
        lines = sorted(lines, key=lambda line: line.split()[1])
        sources = sorted({target.module for target in chosen.values() if target.name is not None})
        lines += [
            _from_import(source, {n: t for n, t in chosen.items() if t.name and t.module == source})
            for source in sources
        ]
        if lines:
            blocks.append("".join(lines))
    return "\n" + "\n".join(blocks)


def _is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _plain_import(local: str, target: Target) -> str:
    return f"import {target.module}\n" if local == target.module else f"import {target.module} as {local}\n"


def _from_import(module: str, chosen: dict[str, Target]) -> str:
    """`from module import ...`: constants, classes, functions; each on its own line if that is too long."""

    def place(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[0].isupper() else 2), name

    aliases = {target.name: local for local, target in chosen.items()}
    items = [n if n == aliases[n] else f"{n} as {aliases[n]}" for n in sorted(aliases, key=place)]
    line = f"from {module} import {', '.join(items)}\n"
    return (
        line
        if len(line) <= 111
        else f"from {module} import (\n" + "".join(f"    {i},\n" for i in items) + ")\n"
    )
