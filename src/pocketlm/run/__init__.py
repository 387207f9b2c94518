"""The engine: llama.cpp, from the prebuilt wheel `xllamacpp`."""
