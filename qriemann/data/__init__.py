"""Rows, from a file or the Hub to token ids and labels.

`sources.load_sources` finds them; `row_files` reads those of local files as they are written. `row_formats.FORMATS` is the
table of formats (a new one is an entry there), and `turns` makes conversations of them. `chat_mask` decides which tokens are
trained, `tokenized.tokenize_rows` makes the datasets that a trainer takes, and `defects.find_defects` looks for mistakes.
"""
