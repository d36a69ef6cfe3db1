"""``l2t compare`` and ``l2t transfer``: trials, their plan, and the report."""
