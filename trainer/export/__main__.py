"""`python -m trainer.export`."""

import sys

from trainer.export.command import main

if __name__ == "__main__":
    sys.exit(main())
