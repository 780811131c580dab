"""`python -m dpg_cli` is `dpg`."""

from dpg_cli.cli import main

if __name__ == "__main__":
    main()
