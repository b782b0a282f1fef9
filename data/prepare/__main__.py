"""`python -m data.prepare`."""

import sys

from data.prepare.command import main
from data.processes.leaving import leave

if __name__ == "__main__":
    code = main()
    if "ray" in sys.modules:
        leave(code)
    sys.exit(code)
