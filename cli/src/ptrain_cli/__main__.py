"""`python -m ptrain_cli` is `ptrain` (for launchers that start a Python module)."""

from ptrain_cli.main import main

if __name__ == "__main__":
    main()
