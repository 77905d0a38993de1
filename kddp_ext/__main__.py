"""`python -m kddp_ext`: the command `kddp`."""

import sys

from kddp_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
