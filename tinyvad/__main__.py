"""``python -m tinyvad`` is the command ``tinyvad``."""

from tinyvad.cli import main

main()
