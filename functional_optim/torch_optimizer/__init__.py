"""TransformOptimizer: a transform as a `torch.optim.Optimizer`."""
