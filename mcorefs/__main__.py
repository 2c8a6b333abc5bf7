"""`python -m mcorefs`."""

from mcorefs.cli import main

main()
