"""`python -m stts_export.cli`."""

import sys

from stts_export.cli import main

if __name__ == "__main__":
    sys.exit(main())
