"""Talking to an adapter or a merged model in a terminal."""
