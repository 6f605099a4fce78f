"""Probes: a grid of heads trained on a frozen encoder, with the best chosen on held-out images."""
