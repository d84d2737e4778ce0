"""`python -m mlmsnet`, and `torchrun -m mlmsnet`, are the command."""
import sys

from mlmsnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
