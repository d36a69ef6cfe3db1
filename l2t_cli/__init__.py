"""The ``l2t`` command: it parses, shows and calls; the mathematics is in ``l2t_core``."""

from __future__ import annotations
