import sys

from qriemann.cli import main

sys.exit(main())
