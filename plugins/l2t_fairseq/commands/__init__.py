"""fairseq commands as people write them: read, changed, and why one failed."""
