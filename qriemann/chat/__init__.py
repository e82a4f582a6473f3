"""Talking to an adapter or a merged model, in a terminal or through a pipe.

`session.load_session` puts a model and a conversation together, `terminal.chat` is the loop that a person types into.
"""
