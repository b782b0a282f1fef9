"""`python -m trainer.demo`."""

import sys

from trainer.demo.command import main

if __name__ == "__main__":
    sys.exit(main())
