"""OptimWrapper, AmpOptimWrapper and OptimWrapperDict: drop-ins for MMEngine."""
