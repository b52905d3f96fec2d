"""python -m dynamickv"""

import sys

from dynamickv.cli import main

sys.exit(main())
