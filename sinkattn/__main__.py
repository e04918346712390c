"""The command `sinkattn`, which is `python -m sinkattn` too."""

import importlib.util
import sys


def main() -> None:
    """Run the command line; without the packages of the extra `cli`, say so in a line and exit with 1."""
    missing = [name for name in ("matplotlib", "rich", "typer") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f'sinkattn: {", ".join(missing)} not installed: pip install "sinkattn[cli]"')
    from .cli import app

    app(prog_name="sinkattn")


if __name__ == "__main__":
    main()
