"""The frozen base model and its tokenizer.

`load.load_base` loads it in 4 bit from the Hub, a folder or a GGUF file; `load.read_config` reads its configuration alone.
`quantized` keeps its 4-bit layers trainable, `host_embedding` keeps its embeddings off the GPU, `chat_template.render` writes
its prompts. `files` and `finite` check what a download holds.
"""
