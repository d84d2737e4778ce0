"""Who imports whom in mlmsnet/, read from the source and not from memory; and the two drawings of the architecture page.

    python tools/architecture.py        prints the rooms, their modules and their imports
"""
import ast
import functools
from html import escape
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "mlmsnet"
# A room imports from its own and from those before it. The label tables come before viz, which draws in their colours;
# evaluation.inference comes before training, whose config holds its settings.
ORDER = ["core", "data.labels", "viz", "data", "networks", "losses", "evaluation.inference", "training", "evaluation", "comparing",
         "labs", "cli", "__main__"]
# Of each room, what it is there for
PURPOSE = {
    "core": "errors, registry, seeds, devices, files", "data.labels": "what the numbers mean", "viz": "pictures", "data": "files → tensors",
    "networks": "images → logits", "losses": "logits → a number", "evaluation.inference": "an image → a class map",
    "training": "settings, loop, scores, records", "evaluation": "a split → a score and its cost", "comparing": "many runs → one answer",
    "labs": "explorers for notebooks", "cli": "the command mlmsnet",
}
# What becomes of the data: (public name, its module, what it gives)
TRAINING = [
    ("create_dataset", "data.datasets", "image H W 3, mask H W: uint8"),
    ("TrainTransform", "data.transforms", "x 3 h w: float32, y h w: int64"),
    ("train_loader", "data.loaders", "a batch N 3 h w"),
    ("create_model", "networks.mlmsnet", "logits N C h w"),
    ("create_loss", "losses.contract", "one number"),
    ("fit", "training.loop", "weights, a line per epoch"),
    ("RunRecord", "training.records", "a folder that says all"),
]
EVALUATION = [
    ("create_dataset", "data.datasets", "image H W 3, mask H W: uint8"),
    ("predict", "evaluation.inference", "class map H W: uint8"),
    ("ConfusionMatrix", "training.metrics", "counts C C: int64"),
    ("SegMetrics", "training.metrics", "mIoU, mAcc, allAcc"),
    ("evaluate", "evaluation.evaluate", "evaluation_SPLIT.json"),
    ("read_study", "comparing.study", "arms and differences"),
    ("write_report", "comparing.report", "report.html"),
]
PLACE = {"networks": 0, "data": 1, "losses": 2, "evaluation.inference": 3, "evaluation": 0, "viz": 1}  # from left to right in the drawing


def rank(module):
    """The place in ORDER of the longest entry that `module` belongs to; -1 for the package itself."""
    fits = [r for r in ORDER if module == r or module.startswith(f"{r}.")]
    if not fits and module:
        raise ValueError(f"mlmsnet.{module} has no place in ORDER")
    return ORDER.index(max(fits, key=len)) if fits else -1


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.lru_cache(None)
def modules():
    """Name → syntax tree of every module, without the `mlmsnet.` in front."""
    return {name_of(p): ast.parse(p.read_text(encoding="utf-8")) for p in sorted(PACKAGE.rglob("*.py")) if p.name != "_modidx.py"}


def _absolute(module, node):
    """The full name that `from X import …` speaks of."""
    if not node.level:
        return node.module
    here = ["mlmsnet", *module.split(".")][:-node.level]
    return ".".join([*here, *([node.module] if node.module else [])])


def imports(module):
    """The modules of mlmsnet that `module` imports, inside functions too."""
    found = set()
    for node in ast.walk(modules()[module]):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            names = [f"{base}.{a.name}" if f"{base}.{a.name}".removeprefix("mlmsnet.") in modules() else base for a in node.names]
        found |= {n.removeprefix("mlmsnet").removeprefix(".") for n in names if n.split(".")[0] == "mlmsnet"}
    return found - {module}


def rooms():
    """Room → its modules, in ORDER; what a folder's own `__init__` and `__main__` hold is left out."""
    folders = {m.split(".")[0] for m in modules() if "." in m}
    return {r: [m for m in modules() if m and m not in folders and rank(m) == ORDER.index(r)] for r in PURPOSE}


def room_imports():
    """Room → the rooms that its modules import from, in ORDER."""
    out = {}
    for room, own in rooms().items():
        seen = {ORDER[rank(n)] for m in own for n in imports(m) if rank(n) >= 0} - {room}
        out[room] = sorted(seen, key=ORDER.index)
    return out


def direct(edges):
    """The edges that no longer way implies."""
    def below(room):
        return {room}.union(*(below(r) for r in edges[room]))
    return {a: [b for b in bs if not any(b in below(c) for c in bs if c != b)] for a, bs in edges.items()}


def layers(edges):
    """Room → its layer, 0 at the bottom: right below the lowest room that imports from it."""
    @functools.lru_cache(None)
    def down(room):
        return 1 + max((down(r) for r in edges if room in edges[r]), default=-1)
    return {room: max(map(down, edges)) - down(room) for room in edges}


def table():
    """The rooms in Markdown: what each is for, its modules and the rooms it imports from."""
    def page(m):
        return f"[{m.split('.')[-1]}](../{m.replace('.', '/')}.ipynb)"
    needs = room_imports()
    rows = [f"| **{room}** | {PURPOSE[room]} | {', '.join(map(page, own))} | {', '.join(needs[room]) or 'nothing'} |"
            for room, own in rooms().items()]
    return "\n".join(["| room | what for | modules | imports from |", "|---|---|---|---|", *rows])


WIDTH, GAP, PAD, LINE = 620, 14, 8, 13
INK, SOFT, PAPER = "#1b1b1b", "#57606a", "#ffffff"
FILL = ["#e8eef4", "#dcebf7", "#e3f2ea", "#fdf1dc", "#fae6dc", "#f3e4ee", "#ece6f5"]  # by layer


def _wrap(words, room):
    """Words with commas between, in lines of at most `room` characters."""
    lines = [""]
    for w in words:
        if lines[-1] and len(lines[-1]) + len(w) + 2 > room:
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + w
    return lines


def _text(x, y, text, size=10.0, color=INK, weight="normal"):
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{color}" font-weight="{weight}">{escape(text)}</text>'


def _rect(x, y, w, h, fill):
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6" fill="{fill}" stroke="{SOFT}" stroke-width=".8"/>'


def _arrow(path):
    return f'<path d="{path}" fill="none" stroke="{SOFT}" stroke-width="1.2" marker-end="url(#tip)"/>'


def _svg(height, parts, label):
    tip = (f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
           f'<path d="M0,0L8,4L0,8z" fill="{SOFT}"/></marker></defs>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(label)}" width="{WIDTH}" height="{height:g}" '
            f'viewBox="0 0 {WIDTH} {height:g}" font-family="system-ui, sans-serif" style="max-width:100%;height:auto">{tip}'
            f'<rect width="{WIDTH}" height="{height:g}" rx="8" fill="{PAPER}"/>{"".join(parts)}</svg>')


def _row(row, inside, y, fill):
    """The boxes of one layer: places, drawings, height."""
    w = min((WIDTH - 3 * GAP - (len(row) - 1) * GAP) / len(row), WIDTH - 4 * GAP if row == ["core"] else 270)
    short = {r: [m.removeprefix(f"{r}.") for m in inside[r]] for r in row}
    lines = {r: _wrap(short[r], int((w - 2 * PAD) / 5)) if short[r] != [r] else [] for r in row}
    h = 2 * PAD + 2 * LINE + LINE * max(map(len, lines.values()))
    x = (WIDTH - len(row) * w - (len(row) - 1) * GAP) / 2
    places, parts = {}, []
    for r in row:
        places[r] = (x, y, w, h)
        parts += [_rect(x, y, w, h, fill), _text(x + PAD, y + PAD + 9, r, 11 if len(r) < 16 else 9.7, weight="bold"),
                  _text(x + PAD, y + PAD + 9 + LINE, PURPOSE[r], 9.5, SOFT)]
        parts += [_text(x + PAD, y + PAD + 9 + (i + 2) * LINE, line, 9.5) for i, line in enumerate(lines[r])]
        x += w + GAP
    return places, parts, h


def _edge(a, b, far):
    """An arrow from the box `a` down to the box `b`; along the right margin if boxes are in between."""
    (xa, ya, wa, ha), (xb, yb, wb, hb) = a, b
    if far:
        lane = WIDTH - 9
        return _arrow(f"M{xa + wa:g},{ya + ha / 2:g}H{lane - 8}Q{lane},{ya + ha / 2:g} {lane},{ya + ha / 2 + 8:g}"
                      f"V{yb + hb / 2 - 8:g}Q{lane},{yb + hb / 2:g} {lane - 8},{yb + hb / 2:g}H{xb + wb:g}")
    shift = (xb + wb / 2 - xa - wa / 2) * .25
    start, end = xa + wa / 2 + shift, xb + wb / 2 - shift
    if wb > WIDTH - 5 * GAP:  # a floor under all: straight down
        start = end = xa + wa / 2
    start, end = min(max(start, xa + 12), xa + wa - 12), min(max(end, xb + 12), xb + wb - 12)
    bend = (ya + ha + yb) / 2
    return _arrow(f"M{start:g},{ya + ha:g}C{start:g},{bend:g} {end:g},{bend:g} {end:g},{yb:g}")


def draw_rooms():
    """The rooms in layers, the one that needs nothing at the bottom; an arrow goes from a room to one that it imports from."""
    edges, inside = room_imports(), rooms()
    level, boxes, parts, y = layers(edges), {}, [], 16
    for k in range(max(level.values()), -1, -1):
        row = sorted((r for r in inside if level[r] == k), key=lambda r: PLACE.get(r, 0))
        places, drawn, h = _row(row, inside, y, FILL[k % len(FILL)])
        boxes, parts, y = boxes | places, parts + drawn, y + h + 32
    arrows = [_edge(boxes[a], boxes[b], level[a] - level[b] > 2) for a, below in direct(edges).items() for b in below]
    return _svg(y - 16, arrows + parts, "The rooms of the library in layers; arrows lead down to what a room imports from")


def draw_flow():
    """What becomes of an image in training (left) and in evaluation (right): who takes it, and what it is then."""
    level = layers(room_imports())
    w, h, parts = (WIDTH - 3 * GAP) / 2, 40, []
    for x, title, steps in ((GAP, "training", TRAINING), (2 * GAP + w, "evaluation", EVALUATION)):
        parts.append(_text(x, 24, title, 13, weight="bold"))
        for i, (name, module, gives) in enumerate(steps):
            y = 36 + i * (h + 32)
            parts += [_rect(x, y, w, h, FILL[level[ORDER[rank(module)]] % len(FILL)]), _text(x + PAD, y + 17, name, 12, weight="bold"),
                      _text(x + PAD, y + 31, module, 9.5, SOFT), _text(x + 30, y + h + 20, gives, 10.5)]
            if i + 1 < len(steps):
                parts.append(_arrow(f"M{x + 18:g},{y + h}V{y + h + 31}"))
    label = "From files to weights, and from weights to a report: the functions in turn, and the shape of what each gives"
    return _svg(36 + len(TRAINING) * (h + 32), parts, label)


def main():
    for room, needs in room_imports().items():
        print(f"{room:22} {PURPOSE[room]}\n{'':22} modules: {', '.join(rooms()[room])}")
        print(f"{'':22} imports: {', '.join(needs) or 'nothing'}")


if __name__ == "__main__":
    main()
