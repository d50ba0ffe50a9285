"""The fit: moments, bases, refit, allocation. Pure functions of tensors; no model, no file, no configuration."""
