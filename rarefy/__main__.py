"""``python -m rarefy``."""

from rarefy.cli.main import main

main()
