"""``python -m quest_compile`` is ``quest-compile``."""

import sys

from quest_compile.cli import main

sys.exit(main())
