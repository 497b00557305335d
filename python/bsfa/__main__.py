"""``python -m bsfa``."""

from bsfa.cli import main

if __name__ == "__main__":
    main()
