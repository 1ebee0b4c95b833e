"""``detcoll run`` that gives ranks more time after one has failed, for tests of what the others say then."""

import sys
from functools import partial

from detcoll.cli import main
from detcoll.launch import ranks

ranks.run_crew = partial(ranks.run_crew, settle_s=30.0)
sys.exit(main())
