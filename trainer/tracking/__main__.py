"""`python -m trainer.tracking`."""

import sys

from trainer.tracking.command import main

if __name__ == "__main__":
    sys.exit(main())
