"""FastPTuning: the drop-in classifier, and the module that it replaces."""
