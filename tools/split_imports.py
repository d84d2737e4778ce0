"""Give imports a cell of their own: the docs step executes every cell that holds one (nbdev), so nothing else may stand beside them.

    python tools/split_imports.py [--check] [NOTEBOOK ...]      default: all of nbs/
"""
import ast
import hashlib
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = (ast.Import, ast.ImportFrom)


def mixed(source):
    """Does a cell that is not exported hold imports at its top level and other code too?"""
    if source.lstrip().startswith(("#| export", "#|export", "#| eval: false", "%")):
        return False
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    kinds = {isinstance(node, IMPORTS) for node in body}
    return kinds == {True, False}


def split(source):
    """(imports, the rest) of a mixed cell; directives stay with both."""
    lines = source.split("\n")
    directives = [line for line in lines if line.startswith("#|")]
    taken = set()
    for node in ast.parse(source).body:
        if isinstance(node, IMPORTS):
            taken.update(range(node.lineno - 1, node.end_lineno))
    own = [line for i, line in enumerate(lines) if i in taken]
    rest = [line for i, line in enumerate(lines) if i not in taken and line not in directives]
    return "\n".join([*directives, *own]), "\n".join([*directives, *rest]).strip("\n")


def main(args):
    check = "--check" in args
    paths = [Path(a) for a in args if a != "--check"] or sorted((ROOT / "nbs").rglob("*.ipynb"))
    found = 0
    for path in paths:
        nb = nbformat.read(path, as_version=4)
        cells = []
        for cell in nb.cells:
            if cell.cell_type == "code" and mixed(cell.source):
                found += 1
                if check:
                    print(f"{path}: imports beside other code in the cell that begins: {cell.source.splitlines()[0][:80]}")
                imports, rest = split(cell.source)
                new = nbformat.v4.new_code_cell(imports, id=hashlib.sha1((cell.id + imports).encode()).hexdigest()[:8])
                cell.source = rest
                cells.append(new)
            cells.append(cell)
        if not check and len(cells) != len(nb.cells):
            nb.cells = cells
            nbformat.write(nb, path)
            print(f"{path}: split")
    return 1 if check and found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
