"""`python -m trainer.sample`."""

import sys

from trainer.sample.command import main

if __name__ == "__main__":
    sys.exit(main())
