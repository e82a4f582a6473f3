"""A trained adapter, or the model merged with it, as GGUF files for llama.cpp, and the proof by llama.cpp itself.

`architectures` is the table of model types; `vocabulary` and `write` make the files; `engine` runs llama.cpp in a process of
its own, `compare` holds what it finds against the trained model, and `modelfile` writes what Ollama needs beside a file.
"""
