"""`python -m stts_export.training CONFIG`, as torchrun starts it: `stts-export train CONFIG`."""

from __future__ import annotations

import sys

from stts_export.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
