"""What is claimed of dithered backprop, at our scale: zeros at equal accuracy, 8 bits, and more with more workers."""
