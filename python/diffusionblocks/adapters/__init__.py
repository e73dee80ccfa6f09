"""One file an architecture: from a network to its ends, layers and target."""
