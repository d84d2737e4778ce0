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


def pytest_configure(config):
    if os.environ.get("PYTEST_XDIST_WORKER"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker per core: more threads would wait for each other
