"""Probes: a grid of heads trained on a frozen encoder, the winner honestly chosen."""
