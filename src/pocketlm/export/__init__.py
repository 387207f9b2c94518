"""Files that engines run, and the proof that they run them."""
