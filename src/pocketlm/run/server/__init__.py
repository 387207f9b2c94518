"""`pocketlm serve`: the engine in a process of its own, and in front of it what a server owes its clients."""
