"""``python -m fastseq``."""

import sys

from fastseq.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
