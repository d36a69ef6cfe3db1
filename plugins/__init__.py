"""Not a plugin: a folder of packages. This file exists to say so to ``--user-dir plugins``.

Without it, fairseq would import the bare folder as an empty namespace package and complain much
later about an "invalid choice" of criterion.
"""

raise ImportError(
    "`plugins` is the folder that holds the plugin; "
    'give fairseq `--user-dir plugins/l2t_fairseq` (or, installed, --user-dir "$(l2t user-dir)")'
)
