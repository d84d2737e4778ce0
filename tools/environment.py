"""Make the project's own environment in .venv: `python3 tools/environment.py` (any Python >= 3.10; nothing else is needed)."""
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LAB = {  # JupyterLab's settings in this environment: no news popup, links jump to anchors, long lines wrap
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false"},
    "@jupyterlab/apputils-extension:sanitizer": {"allowNamedProperties": True},
    "@jupyterlab/notebook-extension:tracker": {"codeCellConfig": {"lineWrap": True}},
}


def main():
    if sys.version_info < (3, 10):  # noqa: UP036 (an older Python may well start this file)
        sys.exit(f"Python {sys.version.split()[0]} is too old, 3.10 or newer is needed. Try: make lab PYTHON=python3.12 (or demo, test …)")
    python = VENV / "bin" / "python"
    if not python.exists():
        print(f"Making an environment in {VENV.name}/ with Python {sys.version.split()[0]} ...", flush=True)
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
        if made.returncode:
            sys.exit(f"{made.stdout}{made.stderr}\nThe venv module does not work here; on Debian and Ubuntu: apt install python3-venv")
    print("Installing the project and its tools (torch is large: a few minutes and some 6 GB the first time) ...", flush=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    if subprocess.run([*pip, "--editable", ".[dev]"], cwd=ROOT).returncode:
        sys.exit("pip failed, see above. Mend the cause and run the same command again: it goes on where it stopped.")
    settings = VENV / "share/jupyter/lab/settings/overrides.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(LAB, indent=1))
    (VENV / ".ready").touch()
    print("Ready.", flush=True)


if __name__ == "__main__":
    main()
