"""A local page: drop an image, and look at what a model does with it."""
