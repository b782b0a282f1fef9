"""`python -m trainer.report`; see `trainer.report.command`."""

import sys

from trainer.report.command import main

if __name__ == "__main__":
    sys.exit(main())
