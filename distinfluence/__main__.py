"""`python -m distinfluence`."""

from distinfluence.cli import main

main()
