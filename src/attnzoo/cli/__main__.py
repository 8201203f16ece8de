"""`python -m attnzoo.cli`: what torchrun and other launchers start."""

import sys

from attnzoo.cli import main

if __name__ == "__main__":
    sys.exit(main())
