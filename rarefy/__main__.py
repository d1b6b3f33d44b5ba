"""``python -m rarefy``."""

from rarefy.cli import main

main()
