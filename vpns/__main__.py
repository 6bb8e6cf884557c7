"""`python -m vpns` is `vpns`."""

import sys

from vpns.cli import main

if __name__ == "__main__":
    sys.exit(main())
