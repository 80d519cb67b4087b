"""``python -m gradclust_fast``: the same as the command ``gradclust``."""

import sys

from .cli import main

sys.exit(main())
