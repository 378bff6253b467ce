"""``python -m p2pdyn``."""

from p2pdyn.cli.main import main

if __name__ == "__main__":
    main()
