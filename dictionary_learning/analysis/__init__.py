"""What did a dictionary learn? Statistics of its latents on text, what they do to the model, and names for them."""
