"""``python -m l2t_cli`` is the same as ``l2t``."""

from __future__ import annotations

from l2t_cli.main import main

if __name__ == "__main__":
    main()
