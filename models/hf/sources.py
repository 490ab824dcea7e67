"""Reads one of our modules as a list of statements: what each one defines and what it refers to.

Offsets within a statement are bytes of its UTF-8 text, as the ast module counts them.
"""

import ast
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("kernels", "models")


@dataclass(frozen=True)
class Target:
    """What an imported name means.

    Args:
        module: dotted name.
        name: in that module, or None for the module itself.
    """

    module: str
    name: str | None

    @property
    def ours(self) -> bool:
        """Whether it belongs to this repository."""
        return self.module.partition(".")[0] in PACKAGES


@dataclass
class Statement:
    """One statement at the top of a module.

    Args:
        text: its lines, decorators and the comments right above it included.
        first_line: of the text in the module, from 1.
        names: what it defines.
        node: its syntax tree.
    """

    text: str
    first_line: int
    names: tuple[str, ...]
    node: ast.stmt

    def span(self, node: ast.AST) -> tuple[int, int]:
        """First and last byte (exclusive) of a node in `text`."""
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def offset(self, line: int, column: int) -> int:
        """Byte in `text` of a place in the module."""
        before = self.text.splitlines(keepends=True)[: line - self.first_line]
        return len("".join(before).encode()) + column


@dataclass
class Module:
    """A module, taken apart.

    Args:
        name: dotted.
        path: from the root of the repository.
        docstring: its own.
        statements: in order, without docstring, imports and `__all__`.
        imports: local name -> what it means.
    """

    name: str
    path: str
    docstring: str
    statements: list[Statement]
    imports: dict[str, Target] = field(default_factory=dict)

    def defining(self, name: str) -> Statement | None:
        """The statement that defines a name, or None."""
        return next((statement for statement in self.statements if name in statement.names), None)


def module_file(name: str) -> Path | None:
    """The file of one of our modules, None where there is no such module."""
    base = ROOT.joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def read_module(name: str) -> Module:
    """Takes a module of ours apart.

    Raises:
        ValueError: where it does something when imported, or imports in a way that a single file cannot
            repeat.
    """
    path = module_file(name)
    if path is None:
        raise ValueError(f"{name} is no module of this repository")
    source = path.read_text()
    tree = ast.parse(source, str(path))
    module = Module(name, path.relative_to(ROOT).as_posix(), ast.get_docstring(tree) or "", [])
    end = 0
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module.imports |= _imports(node, module.path)
        elif not _is_docstring(node) and (names := _names(node, module.path)) != ("__all__",):
            if twice := [name for name in names if module.defining(name)]:
                raise ValueError(f"{module.path}:{node.lineno}: {twice} is defined twice")
            module.statements.append(_statement(node, names, source, end))
        end = node.end_lineno
    return module


def referred_names(node: ast.AST) -> set[str]:
    """Every name that a syntax tree mentions; names bound in an inner scope are among them."""
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def bound_within(node: ast.AST) -> set[str]:
    """Names that a function or class binds in scopes of its own: arguments and variables."""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and not isinstance(inner.ctx, ast.Load):
            found.add(inner.id)
        elif isinstance(inner, ast.arg):
            found.add(inner.arg)
        elif isinstance(inner, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in inner.names}
        elif inner is not node and isinstance(inner, ast.FunctionDef | ast.ClassDef):
            found.add(inner.name)
    return found


def _imports(node: ast.Import | ast.ImportFrom, path: str) -> dict[str, Target]:
    if isinstance(node, ast.Import):
        found = {a.asname or a.name.split(".")[0]: (a.name, None, a.asname) for a in node.names}
        if any(Target(name, None).ours or ("." in name and not alias) for name, _, alias in found.values()):
            raise ValueError(f"{path}:{node.lineno}: write `from package import name` in an exported module")
        return {local: Target(name, None) for local, (name, _, _) in found.items()}
    if node.level or any(alias.name == "*" for alias in node.names):
        raise ValueError(f"{path}:{node.lineno}: an exported module imports names absolutely, one by one")
    targets = {}
    for alias in node.names:
        target = Target(node.module, alias.name)
        if target.ours and module_file(f"{node.module}.{alias.name}"):
            target = Target(f"{node.module}.{alias.name}", None)
        targets[alias.asname or alias.name] = target
    return targets


def _names(node: ast.stmt, path: str) -> tuple[str, ...]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return (node.name,)
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    flat = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
    if isinstance(node, ast.Assign | ast.AnnAssign) and all(isinstance(name, ast.Name) for name in flat):
        return tuple(name.id for name in flat)
    raise ValueError(f"{path}:{node.lineno}: an exported module only defines things when it is imported")


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _statement(node: ast.stmt, names: tuple[str, ...], source: str, end: int) -> Statement:
    """The statement with the comments right above it; `end` is the last line of the one before."""
    lines = source.splitlines(keepends=True)
    first = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", ()))])
    while first - 1 > end and lines[first - 2].startswith("#"):
        first -= 1
    return Statement("".join(lines[first - 1 : node.end_lineno]), first, names, node)
