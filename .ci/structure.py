"""Keep the structure of the program true, by its syntax trees.

usage: python3 .ci/structure.py [root folder]

Looks at tunnel.py, tunnel_sub.py, install.py and each file of tunnel_lib/. Prints ``file:line: rule`` for each
breach of a rule. Ends with 1 if a rule is broken, with 2 if the folder holds no program that can be read, else
with 0.
"""

import ast
import glob
import io
import os
import sys
import tokenize

# What the standard library has in every Python from 3.6 on, as far as the program needs it. Not distutils and
# others that newer versions have dropped.
STANDARD = """
    _signal _socket argparse binascii collections copy ctypes errno fcntl hashlib importlib io json os
    pwd py_compile re resource select shlex signal socket struct subprocess sys tempfile termios threading time
    traceback zlib
"""

# Which modules of the program each module may import: in each list, those before it. What is sent imports nothing
# else of the program. The rooms import what is sent, and tunnel.py; tunnel.py imports rooms inside a function.
SENT = ["door", "bootstrap", "wire", "channels", "line", "kernel", "job", "far", "keeper"]
ROOMS = ["names", "system", "windows", "probe", "notes", "why", "usage", "share", "check", "near", "relay", "hub"]
ORDER = ["tunnel_lib.sent"] + ["tunnel_lib.sent." + name for name in SENT]
ORDER += ["tunnel_lib", "tunnel"] + ["tunnel_lib." + name for name in ROOMS]
MAY_IMPORT = {module: ORDER[:number] for number, module in enumerate(ORDER)}
MAY_IMPORT.update(tunnel_sub=["tunnel"], install=["tunnel"])

COMPUTED = "tunnel_lib.(a computed name)"  # what __import__ and import_module import
MAY_IMPORT["tunnel"] = ORDER + [COMPUTED]

MOST = {("class", "lines"): 250, ("class", "methods"): 20, ("function", "lines"): 60}
TUNNEL_LINES = 3200
MODULE_NAMES = ("tunnel", "tunnel_relay", "relay_module")  # a parameter or attribute of that name holds a module
TAKE_MODULES = ("getattr", "hasattr", "setdefault")  # functions that may be given a module
SHARED_NAMES = ("main", "_")  # top-level names that each file may define; names such as __all__ too
# An attribute that no method changes tells the kind of its object: one that begins so, if a method tests it; one
# that holds a parameter of __init__, if more than so many methods test it. What a user asked for is no kind.
KIND_NAMES, KIND_METHODS, OPTIONS = ("kind", "is_"), 5, {"dry_run"}

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def word(node):
    """The last name in an expression: ``c`` of ``c`` and of ``a.b.c``; an empty one for other expressions."""
    return getattr(node, "attr", getattr(node, "id", ""))


def own(node):
    """The name of an attribute of ``self``; None for any other expression."""
    return node.attr if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self" else None


def outermost(node, *kinds):
    """The outermost node of some kinds in which a node stands, or which it is; None if there is none."""
    found = None
    while node:
        found, node = node if isinstance(node, kinds) else found, node.outer
    return found


class File:
    """One file of the program.

    :ivar module: the full name that import statements have for the file
    :ivar nodes: all nodes of the file's tree, by line; each knows its ``outer`` node
    :ivar imports: for each import the node, the module, and the name that stands for the module in the file; None
        for no such name
    :ivar names: functions, classes and constants of its top level, as pairs of name and line
    """

    def __init__(self, root, path):
        with open(os.path.join(root, path), encoding="utf-8") as stream:
            text = stream.read()
        self.path, self.lines, self.tree = path, text.count("\n"), ast.parse(text, path)
        parts = path[: -len(".py")].split(os.sep)
        self.package, self.module = parts[:-1], ".".join(parts).replace(".__init__", "")
        self.nodes = sorted(ast.walk(self.tree), key=lambda node: getattr(node, "lineno", 0))
        self.tree.outer = None
        for node in self.nodes:
            for child in ast.iter_child_nodes(node):
                child.outer = node
        self.imports = [found for node in self.nodes for found in self._imported(node)]
        self.names = [(name, node.lineno) for node in self.nodes for name in self._named(node)]
        self.ends, first = {}, 1  # for each line the last line of its statement
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NEWLINE:
                self.ends.update(dict.fromkeys(range(first, token.start[0] + 1), token.start[0]))
                first = token.start[0] + 1

    def of(self, *kinds):
        return [node for node in self.nodes if isinstance(node, kinds)]

    @staticmethod
    def _named(node):
        if outermost(node, ast.ClassDef, *FUNCTIONS) is node:
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and not outermost(node, ast.ClassDef, *FUNCTIONS):
            named = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
            used = {each.id for each in named if isinstance(each.ctx, ast.Load)}  # X = X + 1 defines no other X
            yield from {each.id for each in named if isinstance(each.ctx, ast.Store)} - used

    def _imported(self, node):
        if isinstance(node, ast.Call) and word(node.func) in ("__import__", "import_module"):
            yield node, COMPUTED, None
        elif isinstance(node, ast.Import):
            for each in node.names:
                yield node, each.name, each.asname or each.name
        elif isinstance(node, ast.ImportFrom):
            start = self.package[: len(self.package) - node.level + 1] if node.level else []
            base = ".".join(start + ([node.module] if node.module else [])) or "."
            for each in node.names:
                name = "{}.{}".format(base, each.name)
                is_module = name in ORDER or base in ("tunnel_lib", "tunnel_lib.sent")
                yield (node, name, each.asname or each.name) if is_module else (node, base, None)


def sizes(file, program):
    for node in file.of(ast.ClassDef, *FUNCTIONS):
        first = min(each.lineno for each in [node] + node.decorator_list)  # as Python 3.6 has it, and not 3.8
        last = max(each.lineno for each in ast.walk(node) if hasattr(each, "lineno"))
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        methods = sum(isinstance(each, FUNCTIONS) for each in node.body)
        for count, what in ((file.ends.get(last, last) - first + 1, "lines"), (methods, "methods")):
            most = MOST.get((kind, what), count)
            if count > most:
                yield (
                    first,
                    "{0} {1} has {2} {3}; a {0} has at most {4}".format(kind, node.name, count, what, most),
                )
    if file.module == "tunnel" and file.lines > TUNNEL_LINES:
        yield TUNNEL_LINES + 1, "tunnel.py has {} lines; it has at most {}".format(file.lines, TUNNEL_LINES)


def kinds_by_type(file, program):
    for node in file.of(ast.Call, ast.Attribute):
        asks = isinstance(node, ast.Call) and word(node.func) in ("isinstance", "type") and node.args[:1]
        if own(node) == "__class__" or (asks and word(asks[0]) == "self"):
            text = "{} of self asks what kind its object is; no method does"
            yield node.lineno, text.format(word(node.func) if asks else node.attr)


def tested(node):
    """The expressions at a node whose truth or equality is asked."""
    kinds = {ast.UnaryOp: ["operand"], ast.BoolOp: ["values"], ast.Compare: ["left", "comparators"]}
    for name in kinds.get(type(node), ["test", "ifs"]):
        found = getattr(node, name, [])
        yield from found if isinstance(found, list) else [found]


def family(node, classes):
    """A class and what it inherits from, as far as the program defines that."""
    bases = [classes[name] for name in map(word, node.bases) if classes.get(name, node) is not node]
    return [node] + [each for base in bases for each in family(base, classes)]


def kinds_by_attribute(file, program):
    classes = {node.name: node for each in program for node in each.of(ast.ClassDef)}
    for node in file.of(ast.ClassDef):
        asked, given, changed = {}, set(), set()
        for owner in family(node, classes):
            for method in [each for each in owner.body if isinstance(each, FUNCTIONS)]:
                changed.add(method.name)  # a property, whose value may change
                for inner in ast.walk(method):
                    if method.name == "__init__":
                        given.add(getattr(inner, "arg", None))
                    elif isinstance(getattr(inner, "ctx", None), ast.Store):
                        changed.add(own(inner))
                    for each in tested(inner) if owner is node else []:
                        asked.setdefault(own(each), {}).setdefault(method.name, each.lineno)
        for name in set(asked) - changed - OPTIONS - {None}:
            if name.startswith(KIND_NAMES) or (name in given and len(asked[name]) > KIND_METHODS):
                text = "self.{} tells what kind its object is; no method asks, and {} of {} do"
                yield min(asked[name].values()), text.format(name, len(asked[name]), node.name)


def arrows(file, program):
    may = MAY_IMPORT.get(file.module, ORDER)
    if file.module not in MAY_IMPORT:
        yield 1, "{} stands in no list of .ci/structure.py".format(file.module)
    for node, name, _ in file.imports:
        top, by_full_name = name.partition(".")[0], not getattr(node, "level", 0)
        ours, sent = top in ("tunnel", "tunnel_lib"), file.module.startswith("tunnel_lib.sent.")
        at_start = file.module == "tunnel" and not outermost(node, *FUNCTIONS)
        foreign = not ours and not (by_full_name and top in STANDARD.split())
        for is_broken, text in (
            (foreign, "imports {}, which is not in the standard library of each Python from 3.6 on"),
            (ours and name not in may, "imports {}, against the order in .ci/structure.py"),
            (name in may and sent and by_full_name, "imports {} by its full name, not relatively"),
            (ours and at_start, "imports {} at module level; tunnel.py does so inside a function"),
        ):
            if is_broken:
                yield node.lineno, text.format(name)


def doors(file, program):
    ours = [node for node, name, _ in file.imports if name.startswith("tunnel_lib") and file.module == "tunnel"]
    found = [(outermost(node, *FUNCTIONS), node.lineno) for node in ours if outermost(node, *FUNCTIONS)]
    for function, line in found:
        if function is not found[0][0]:
            yield line, "{} imports from tunnel_lib; {} does so for all".format(function.name, found[0][0].name)


def handed_modules(file, program):
    text = "{} is handed in; a module is imported where it is used"
    assigned = {node.id for node in file.of(ast.Name) if isinstance(node.ctx, ast.Store)}
    assigned |= {node.arg for node in file.of(ast.arg)}
    modules = {alias for _, name, alias in file.imports if alias and name in ORDER} - assigned
    for node in file.of(ast.arg, ast.Attribute):
        name = getattr(node, "arg", word(node))
        if name in MODULE_NAMES:
            yield node.lineno, text.format("module " + name)
    for node in file.of(ast.Call):
        if word(node.func) == "globals":
            yield node.lineno, "globals() is called; no code asks where it runs"
        given = [] if word(node.func) in TAKE_MODULES else node.args + [each.value for each in node.keywords]
        for each in given:
            index = getattr(each, "slice", None)
            if getattr(each, "id", None) in modules:
                yield node.lineno, text.format("module " + each.id)
            if word(getattr(index, "value", index)) == "__name__" and word(each.value) == "modules":
                yield node.lineno, text.format("sys.modules[__name__]")


def unique_names(file, program):
    text = "{} is defined in {}:{} too; a top-level name stands for one thing"
    places = {}
    for other in program:
        for name, line in other.names if (other.module == "install") == (file.module == "install") else []:
            places.setdefault(name, (other.path, line))
    for name, line in file.names:
        if places[name] != (file.path, line) and name not in SHARED_NAMES and not name.startswith("__"):
            yield line, text.format(name, *places[name])


RULES = (sizes, kinds_by_type, kinds_by_attribute, arrows, doors, handed_modules, unique_names)


def breaches(root):
    """What is broken in the program below a folder: path, line and rule, sorted."""
    patterns = ("tunnel*.py", "install.py", "tunnel_lib/*.py", "tunnel_lib/*/*.py")
    found = {path for pattern in patterns for path in glob.glob(os.path.join(root, *pattern.split("/")))}
    paths = sorted(found | {os.path.join(root, "tunnel.py")})
    program = [File(root, os.path.relpath(path, root)) for path in paths]
    return sorted({(file.path, *each) for file in program for rule in RULES for each in rule(file, program)})


def main():
    root = (sys.argv[1:] or [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))])[0]
    try:
        found = breaches(root)
    except (OSError, SyntaxError, ValueError) as error:  # no such file, no Python, no text
        print("structure.py: {}".format(error), file=sys.stderr)
        return 2
    print("\n".join("{}:{}: {}".format(*each) for each in found) or "the structure is true")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
