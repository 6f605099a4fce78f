"""What a frozen encoder is worth: features, probes, nearest neighbours."""
