"""Parallel text: got, cut into subwords, brought into the form that recipes name."""
