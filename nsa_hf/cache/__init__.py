"""What is kept between forwards: keys, values and compressed entries."""
