"""`python -m trainer.checkpoint`."""

import sys

from trainer.checkpoint.command import main

if __name__ == "__main__":
    sys.exit(main())
