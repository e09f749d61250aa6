"""Imports of a source tree, read from its syntax: module-level, inside functions, and for type checkers alike."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

COLLECTIVES = {
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single"),
    *("barrier", "broadcast", "broadcast_object_list", "destroy_process_group", "gather", "gather_object"),
    *("get_rank", "get_world_size", "init_distributed", "init_process_group", "irecv", "isend", "monitored_barrier"),
    *("new_group", "new_subgroups", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter"),
    *("scatter_object_list", "send"),
}
"""Functions of torch.distributed, and of deepspeed.comm, that communicate or ask who is who."""
BACKENDS = ("torch.distributed", "deepspeed.comm", "deepspeed")
RANK_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID", "OMPI_COMM_WORLD_RANK"}


@dataclass(frozen=True)
class Tree:
    """Packages by name, each with its folder."""

    packages: dict[str, Path]

    @cached_property
    def files(self) -> dict[str, Path]:
        """Each module's file."""
        return {
            _module(name, path.relative_to(folder)): path
            for name, folder in self.packages.items()
            for path in sorted(folder.rglob("*.py"))
        }

    @cached_property
    def syntax(self) -> dict[str, ast.Module]:
        """Each module's syntax tree."""
        return {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in self.files.items()}

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """The modules of this tree that each of its modules imports anywhere."""
        return {module: set(self._imports(module, ast.walk(tree))) - {module} for module, tree in self.syntax.items()}

    def _imports(self, module: str, nodes) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from filter(None, (self._known(alias.name) for alias in node.names))
            elif isinstance(node, ast.ImportFrom):
                source = self._source(module, node)
                yield from filter(None, (self._known(f"{source}.{a.name}", source) for a in node.names))

    def _source(self, module: str, node: ast.ImportFrom) -> str:
        """Return the absolute name of what a `from` names."""
        if not node.level:
            return node.module or ""
        package = module.split(".") if self.files[module].name == "__init__.py" else module.split(".")[:-1]
        return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])

    def _known(self, *names: str) -> str | None:
        return next((name for name in names if name in self.files), None)

    def circles(self) -> list[set[str]]:
        """Return the groups of modules that import each other, directly or by way of others."""
        reached = {module: self._reached(module) for module in self.files}
        groups = {frozenset(m for m in reached[module] if module in reached[m]) for module in self.files}
        return sorted((set(group) for group in groups if group), key=min)

    def _reached(self, module: str) -> set[str]:
        seen, left = set[str](), [module]
        while left:
            left += (new := self.imports[left.pop()] - seen)
            seen |= new
        return seen

    def collectives(self, module: str) -> set[str]:
        """Return the collectives and questions about ranks in a module."""
        names = dict(_backends(self.syntax[module]))
        return {
            found
            for node in ast.walk(self.syntax[module])
            for found in (_collective(node, names), _variable(node))
            if found
        }


def _module(package: str, path: Path) -> str:
    parts = [package, *path.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _backends(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield each name of a module that stands for a communication library or one of its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name, alias.name) for alias in node.names if alias.name in BACKENDS)
            yield from (("torch.distributed", "torch.distributed") for alias in node.names if alias.name == "torch")
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in BACKENDS or node.module in BACKENDS:
                    yield alias.asname or alias.name, full


def _collective(node: ast.AST, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES and ast.unparse(node.value) in names:
        return f"{names[ast.unparse(node.value)]}.{node.attr}"
    is_function = isinstance(node, ast.Name) and names.get(node.id, "").rpartition(".")[2] in COLLECTIVES
    return names[node.id] if isinstance(node, ast.Name) and is_function else None


def _variable(node: ast.AST) -> str | None:
    """Return the variable of a launcher that a node names."""
    return node.value if isinstance(node, ast.Constant) and node.value in RANK_VARIABLES else None
