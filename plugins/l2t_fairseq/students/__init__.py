"""The NMT student: a fairseq run that can be replayed and differentiated twice."""
