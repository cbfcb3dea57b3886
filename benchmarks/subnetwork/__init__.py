"""What training by small subnetworks reaches, and in what time."""
