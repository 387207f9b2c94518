"""What a language model is, where it comes from, and how to walk and cut it."""
