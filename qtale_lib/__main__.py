"""`python -m qtale_lib`: see cli.py."""

from qtale_lib.cli import main

if __name__ == "__main__":
    main()
