"""Shared fixtures. Reference data stand beside the project's root (or where MLMSNET_SHARED says); without them those tests are skipped."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    path = Path(os.environ.get("MLMSNET_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip("reference data (a folder `shared` beside the project, or MLMSNET_SHARED) are not here")
    return path


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items):
    """With several workers (pytest-xdist) a file's tests stay together, for they share runs; notebooks and losses are spread."""
    for item in items:
        if item.path.name not in ("test_notebooks.py", "test_losses.py"):
            item.add_marker(pytest.mark.xdist_group(item.path.name))


def pytest_configure(config):
    if os.environ.get("PYTEST_XDIST_WORKER"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker per core: more threads would wait for each other
