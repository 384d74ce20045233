import sys

from dictionary_learning.cli import main

sys.exit(main())
