"""Build optimizers and wrappers from configs."""
