"""The recipes that come with l2t; installed as ``l2t_cli.recipes``."""
