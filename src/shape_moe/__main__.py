"""``python -m shape_moe`` is the command ``shape-moe``."""

from shape_moe.cli.main import main

if __name__ == "__main__":
    main()
