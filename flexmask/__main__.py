"""`python -m flexmask`, and so `torchrun … -m flexmask train …`."""

import sys

from .cli import main

sys.exit(main())
