"""`python -m srcflow` is the `srcflow` command."""

from srcflow.cli import main

if __name__ == "__main__":
    main()
