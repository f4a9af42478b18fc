"""`python -m qtale_lib`: see cli/."""

from qtale_lib.cli import main

if __name__ == "__main__":
    main()
