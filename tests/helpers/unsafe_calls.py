"""Search of a Python syntax tree for calls that can run code from a file, or a shell."""

import ast

LOADERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "jsonpickle"}
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn", "tempfile.mktemp"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "shelve.open", "joblib.load"),
    *("torch.hub.load", "torch.jit.load", "pandas.read_pickle"),
    *(f"{module}.{name}" for module in LOADERS for name in ("load", "loads", "Unpickler")),
}
ONLY = {"shell": False, "allow_pickle": False, "trust_remote_code": False, "weights_only": True}
"""The only allowed value of each keyword, which must be a constant."""
UNPACKING = {"extractall", "extract", "unpack_archive"}
UNPICKLING = {"load_checkpoint", "load_universal_checkpoint"}
"""Methods of DeepSpeed engines."""


def unsafe_calls(source):
    """Return (line, name) of each unsafe call."""
    tree = ast.parse(source)
    names = dict(pair for node in ast.walk(tree) for pair in _imported(node))
    return sorted({found for node in ast.walk(tree) for found in _faults(node, names)})


def _imported(node):
    """Return the local names of an import with their full names."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield (
                alias.asname or alias.name.partition(".")[0],
                alias.name if alias.asname else alias.name.partition(".")[0],
            )
    if isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _full_name(node, names):
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_full_name(node.value, names)}.{node.attr}"
    return "?"


def _faults(node, names):
    # Named is as bad as called: it may be called by another name.
    if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
        name = _full_name(node, names)
        if name in FORBIDDEN:
            yield node.lineno, name
    if isinstance(node, ast.ImportFrom) and node.module in LOADERS:
        yield from ((node.lineno, f"{node.module}.*") for alias in node.names if alias.name == "*")
    if isinstance(node, ast.Call):
        yield from ((node.lineno, what) for what in _faults_of_call(node, _full_name(node.func, names)))


def _faults_of_call(call, name):
    given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
    yield from (f"{key}={given[key]}" for key, value in ONLY.items() if key in given and given[key] is not value)
    if name.rpartition(".")[2] in UNPICKLING:
        yield name
    if name == "torch.load" and "weights_only" not in given:
        yield "torch.load without weights_only=True"
    if name.rpartition(".")[2] in UNPACKING and given.get("filter") != "data":
        yield f'{name} without filter="data"'
