"""Let git merge notebooks cell by cell, and Jupyter trust what a merge brought: `nbdev_install_hooks`, with this environment's programs.

git calls them by their full path, so the environment need not be active. Run it again if the project is moved.
"""
import os
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent


def git(*args):
    return subprocess.run(["git", *args], check=True, capture_output=True, text=True).stdout.strip()


def main():
    subprocess.run([BIN / "nbdev_install_hooks"], check=True, env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"})
    git("config", "--local", "merge.nbdev-merge.driver", f"'{BIN / 'nbdev_merge'}' %O %A %B %P")
    hook = Path(git("rev-parse", "--git-path", "hooks")) / "post-merge"
    hook.write_text(f"#!/bin/sh\n'{BIN / 'nbdev_trust'}'\n")
    hook.chmod(0o755)
    print(f"git merges notebooks with {BIN / 'nbdev_merge'}; to undo: git config --local --unset include.path "
          "&& git config --local --remove-section merge.nbdev-merge")


if __name__ == "__main__":
    main()
