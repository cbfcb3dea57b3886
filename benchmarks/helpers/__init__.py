"""What measures share: timing, networks, gradients, peers, and how rows become files. None of it measures by itself."""
