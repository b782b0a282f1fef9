"""`python -m trainer.bench`."""

import sys

from trainer.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
