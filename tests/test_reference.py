"""Every public name explains itself, and the reference pages leave nothing out."""
import argparse
import dataclasses
import functools
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
from fastcore.docments import docments

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "nbs" / "reference"
FILES = sorted(p for p in (ROOT / "mlmsnet").rglob("*.py") if not p.name.startswith("_"))
MODULES = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in FILES]


@functools.lru_cache(None)
def page(name):
    """All text of a reference page, prose and outputs."""
    cells = json.loads((PAGES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [o for c in cells for o in c.get("outputs", [])]
    texts = [o["data"]["text/markdown"] for o in outputs if "text/markdown" in o.get("data", {})] + [c["source"] for c in cells]
    return "\n".join("".join(t) for t in texts)


@functools.lru_cache(None)
def shared_words():
    """The words that are explained once for all signatures."""
    from mlmsnet.labs.signatures import WORDS
    words = {w for names in WORDS for w in names.split()}
    assert not [w for w in words if f"`{w}`" not in page("api")]
    return words


def public(module):
    """(name, object) of what a module defines and lists in `__all__`."""
    m = importlib.import_module(module)
    for name in getattr(m, "__all__", ()):
        value = getattr(m, name)
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module and value.__name__ == name:
            yield name, value


def ours(cls):
    return [c for c in cls.__mro__ if c.__module__.startswith("mlmsnet")]


def source(value):
    """The text of a function or of a class's own `__init__`; "" if a dataclass made it."""
    try:
        return inspect.getsource(vars(value).get("__init__", source) if inspect.isclass(value) else value)
    except OSError:
        return ""


def explained(value):
    """Parameters of a function or class → does a comment beside them, the docstring or a word of the list say what they are?"""
    parameters = inspect.signature(value).parameters
    classes = ours(value) if inspect.isclass(value) else [value]
    notes = {}
    for c in classes:
        notes |= {k: v.get("docment") for k, v in docments(c, full=True, returns=False).items() if not notes.get(k)}
    data = getattr(value, "params", ())  # of a loss
    listed = {p.name for p in data if p.doc} if isinstance(data, tuple) else set()
    rest = {n for n, p in parameters.items() if p.kind is p.VAR_KEYWORD and any(f"**{n},  # " in source(c) for c in classes)}
    settings = model_settings() if inspect.isclass(value) and any(c.__name__ == "ModelOptions" for c in classes) else set()
    torchs = {n for c in (value.__mro__ if inspect.isclass(value) else ()) if c.__module__.startswith("torch.nn") and "__init__" in vars(c)
              for n in inspect.signature(c.__init__).parameters}
    said = set(re.findall(r"`(\w+)", " ".join(inspect.getdoc(c) or "" for c in classes)))
    plain = {n for n, p in parameters.items() if types_itself(p.annotation)}
    known = {n for n, text in notes.items() if text} | listed | rest | settings | torchs | said | plain
    known |= shared_words() | {"self", "args", "kwargs"}
    return {n: n in known for n in parameters}


def types_itself(annotation):
    """Is a parameter's type a public class of ours? Its page then explains it."""
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    module = getattr(annotation, "__module__", "")
    return module.startswith("mlmsnet") and not name.startswith("_")


@functools.lru_cache(None)
def model_settings():
    from mlmsnet.training.config import ModelConfig
    return {f.name for f in dataclasses.fields(ModelConfig)}


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_docstring(module):
    silent = [n for n, v in public(module) if not (vars(v).get("__doc__") if inspect.isclass(v) else v.__doc__)
              or inspect.isclass(v) and v.__doc__.startswith(f"{n}(")]
    assert not silent, f"{module}: no docstring: {silent}"


@pytest.mark.parametrize("module", MODULES)
def test_parameters_are_explained(module):
    """Two parameters may be clear from the docstring; from three on each has a word of its own."""
    missing = {}
    for name, value in public(module):
        if inspect.isclass(value) and issubclass(value, (BaseException, tuple)):
            continue  # an error; a NamedTuple has its comments in the source
        found = explained(value)
        if len(found) > 2 and not all(found.values()):
            missing[name] = [n for n, ok in found.items() if not ok]
    assert not missing, f"{module}: say what these are, beside them (`name: type,  # meaning`): {missing}"


@pytest.mark.parametrize("module", MODULES)
def test_documentation_has_a_row_per_parameter(module):
    """What `show_doc` puts on the page of a module."""
    from mlmsnet.labs.signatures import SignaturePage
    for name, value in public(module):
        text = SignaturePage(value)._repr_markdown_()
        assert f"### {name}\n" in text and (value.__doc__ or "").strip().split("\n")[0] in text
        own = inspect.isfunction(value) or inspect.isfunction(vars(value).get("__init__"))  # else a base class's, or torch's
        if own and not isinstance(getattr(value, "params", None), tuple):  # a loss has its list
            gone = [n for n in inspect.signature(value).parameters if f"`{n}`" not in text and f"*{n}`" not in text]
            assert not gone, f"{name}: {gone}"


@pytest.mark.parametrize("module", MODULES)
def test_api_page_lists_every_name(module):
    room = module.removeprefix("mlmsnet.")
    names = getattr(importlib.import_module(module), "__all__", ())
    if not names:
        return
    assert f"### {module}\n" in page("api"), "python tools/run_notebooks.py nbs/reference/api.ipynb"
    section = page("api").split(f"### {module}\n")[1].split("\n### ")[0]
    gone = [n for n in names if f"[`{n}`](" not in section and f"[`{n}()`](" not in section]
    assert not gone, f"not on the page: {gone}: python tools/run_notebooks.py nbs/reference/api.ipynb"
    assert f"{room.replace('.', '/')}.ipynb" in section


def test_loss_catalogue():
    from mlmsnet.losses.contract import available_losses, loss_info
    for name in available_losses():
        info = loss_info(name)
        if info.family == "yours":  # registered by another test
            continue
        assert info.formula and info.paper and info.url.startswith("https://") and info.use and info.summary, f"{name} does not say all"
        assert f"### {name}\n" in page("losses"), name
        assert info.formula in page("losses") and info.url in page("losses")
        text = page("losses").split(f"### {name}\n")[1].split("\n### ")[0]
        assert all(f"`{p.name}`" in text for p in info.params), name


def test_config_reference():
    from mlmsnet.data.datasets import DATASETS
    from mlmsnet.networks.backbones import available_backbones
    from mlmsnet.networks.mlmsnet import available_models
    from mlmsnet.training.config import Config, shipped_configs, valid_keys
    text = page("config")
    assert not [k for k in valid_keys() if f"| `{k}` |" not in text]
    assert not [n for n in shipped_configs() if f"### {n}\n" not in text]
    shipped = {"cityscapes", "camvid", "minicity", "list"}
    assert shipped <= set(DATASETS) and not [n for n in shipped if f"| `{n}` |" not in text]
    models = [n for n in available_models() if f"register_model(\"{n}\"" in sources()]
    assert len(models) > 15 and not [n for n in models if f"| `{n}` |" not in text]
    assert not [n for n in available_backbones() if f"`{n}`" not in text]
    empty = [f"{f.name}.{g.name}" for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default_factory)
             for g in dataclasses.fields(f.default_factory) if not docments(f.default_factory).get(g.name)]
    assert not empty, f"settings without a comment: {empty}"


@functools.lru_cache(None)
def sources():
    return "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "mlmsnet").rglob("*.py"))


def test_command_reference():
    from mlmsnet.cli import build_parser
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    for name, parser in commands.items():
        assert f"## mlmsnet {name}\n" in page("cli")
        text = page("cli").split(f"## mlmsnet {name}\n")[1].split("\n## ")[0]
        for a in parser._actions:
            assert a.help, f"mlmsnet {name}: {a.dest} has no help"
            called = [] if isinstance(a, argparse._HelpAction) else a.option_strings or [a.metavar or a.dest]
            assert all(f"`{c}" in text for c in called), (name, a.dest)


@pytest.mark.parametrize("name", sorted(p.stem for p in PAGES.glob("*.ipynb")))
def test_pages_are_light(name):
    assert (PAGES / f"{name}.ipynb").stat().st_size < 2_000_000
