"""``l2t apply-teacher``: students under a trained teacher, image and fairseq."""
