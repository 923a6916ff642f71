"""`python -m nsa_train COMMAND` is `nsa-train COMMAND`."""

import sys

from nsa_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
