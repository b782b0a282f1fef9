"""`python -m cluster.sweep`, which `./launch.sh sweep` starts."""

import sys

from cluster.sweep.command import main

if __name__ == "__main__":
    sys.exit(main())
