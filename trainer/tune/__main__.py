"""`python -m trainer.tune`."""

import sys

from trainer.tune.command import main

if __name__ == "__main__":
    sys.exit(main())
