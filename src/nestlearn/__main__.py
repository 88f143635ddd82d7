"""``python -m nestlearn`` is the command ``nestlearn``."""

from nestlearn.cli import main

main()
